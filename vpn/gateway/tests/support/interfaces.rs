//! Two interfaces of `kontor-gateway wg` in network namespaces of their own, joined by a link, and what goes through
//! them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{file, genkey, wg};

/// Bytes of each transfer: some hundred batches.
const TRANSFER: usize = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct End {
    namespace: String,
    interface: String,
    link: String,
    daemon: Child,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
    }
}

/// The two ends; their inner addresses are 10.7.0.1, fd07::1 and 10.7.0.2, fd07::2.
struct Pair([End; 2]);

fn ip(line: &str) {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Pair {
    /// Ends that know each other; `mtu` is the link's.
    fn new(mtu: u16) -> Self {
        static PAIRS: AtomicU32 = AtomicU32::new(0);
        let pair = PAIRS.fetch_add(1, Ordering::Relaxed);
        let names =
            [1, 2].map(|end| (format!("n{pair}-{end}"), format!("wg{pair}-{end}"), format!("v{pair}-{end}")));
        for (namespace, ..) in &names {
            ip(&format!("netns add {namespace}"));
        }
        let [(a, _, link_a), (b, _, link_b)] = &names;
        ip(&format!("link add {link_a} netns {a} mtu {mtu} type veth peer {link_b} netns {b} mtu {mtu}"));
        let ends = names.map(|(namespace, interface, link)| {
            let number = if link.ends_with('1') { 1 } else { 2 };
            ip(&format!("-n {namespace} addr add 192.0.2.{number}/24 dev {link}"));
            ip(&format!("-n {namespace} link set {link} up"));
            ip(&format!("-n {namespace} link set lo up"));
            let daemon = Command::new("ip")
                .args(["netns", "exec", &namespace, env!("CARGO_BIN_EXE_kontor-gateway")])
                .args(["wg", "--foreground", &interface])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut end = End { namespace, interface, link, daemon };
            end.await_words("ready");
            end
        });
        let keys = [genkey(), genkey()];
        let public = keys.clone().map(|key| {
            let key = Command::new("sh").args(["-c", "echo \"$0\" | wg pubkey", &key]).output().unwrap();
            String::from_utf8(key.stdout).unwrap().trim().to_owned()
        });
        for (own, other) in [(0, 1), (1, 0)] {
            let key = file(&keys[own]);
            let (port, peer_port) = (51820 + own, 51820 + other);
            let (addresses, endpoint) = (
                format!("10.7.0.{0}/32,fd07::{0}/128", other + 1),
                format!("192.0.2.{}:{peer_port}", other + 1),
            );
            let name = &ends[own].interface;
            wg(&["set", name, "listen-port", &port.to_string(), "private-key", key.path().to_str().unwrap()]);
            wg(&["set", name, "peer", &public[other], "allowed-ips", &addresses, "endpoint", &endpoint]);
            let (namespace, number) = (&ends[own].namespace, own + 1);
            ip(&format!("-n {namespace} addr add 10.7.0.{number}/24 dev {name}"));
            ip(&format!("-n {namespace} -6 addr add fd07::{number}/64 dev {name} nodad"));
            ip(&format!("-n {namespace} link set {name} up"));
        }
        Self(ends)
    }

    /// Bytes both ways at once, over each family, arrive as they were sent.
    fn carries_tcp(&self) {
        for address in ["10.7.0.2", "fd07::2"] {
            let listener =
                self.inside(1, || TcpListener::bind((address.parse::<IpAddr>().unwrap(), 0)).unwrap());
            let to = listener.local_addr().unwrap();
            let near = self.inside(0, || TcpStream::connect_timeout(&to, PATIENCE).unwrap());
            let (far, _) = listener.accept().unwrap();
            std::thread::scope(|scope| {
                for (stream, seed) in [(&near, 3), (&far, 5)] {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.set_write_timeout(Some(PATIENCE)).unwrap();
                    scope.spawn(move || {
                        let mut stream = stream;
                        stream.write_all(&bytes(seed)).unwrap();
                    });
                }
                for (stream, seed) in [(&near, 5), (&far, 3)] {
                    scope.spawn(move || {
                        let (mut stream, mut received) = (stream, vec![0; TRANSFER]);
                        stream.read_exact(&mut received).unwrap();
                        assert!(received == bytes(seed), "other bytes have arrived");
                    });
                }
            });
        }
    }

    /// Datagrams of every length that fits come whole and in order, empty ones too.
    fn carries_udp(&self) {
        for address in ["10.7.0.2:0", "[fd07::2]:0"] {
            let far = self.inside(1, || UdpSocket::bind(address.parse::<SocketAddr>().unwrap()).unwrap());
            let near = address.replace("7.0.2", "7.0.1").replace("::2", "::1");
            let near = self.inside(0, || UdpSocket::bind(near.parse::<SocketAddr>().unwrap()).unwrap());
            near.connect(far.local_addr().unwrap()).unwrap();
            far.set_read_timeout(Some(PATIENCE)).unwrap();
            let (sent, mut received) = (bytes(9), vec![0; 2000]);
            for len in 0..1372 {
                near.send(&sent[..len]).unwrap();
                // One at a time: nothing here may be lost for want of room.
                let count = far.recv(&mut received).unwrap();
                assert!(received[..count] == sent[..len], "{len}");
            }
        }
    }

    /// What `make` makes, in the namespace of an end.
    fn inside<T: Send>(&self, end: usize, make: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/var/run/netns/{}", self.0[end].namespace)).unwrap();
        let thread = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            make()
        };
        std::thread::scope(|scope| scope.spawn(thread).join().unwrap())
    }
}

impl End {
    /// Reads what the daemon says up to a line with these words.
    fn await_words(&mut self, words: &str) {
        let stderr = self.daemon.stderr.as_mut().unwrap();
        let mut said = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&said).lines().any(|line| line.contains(words)) || byte != *b"\n" {
            assert_eq!(stderr.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&said));
            said.push(byte[0]);
        }
    }
}

fn bytes(seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        // Marsaglia, Xorshift RNGs (2003).
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()
    };
    (0..TRANSFER / 4).flat_map(|_| next()).collect()
}

pub(crate) fn whole() {
    let pair = Pair::new(1500);
    pair.carries_tcp();
    pair.carries_udp();
    let [a, _] = &pair.0;
    assert!(wg(&["show", &a.interface, "latest-handshakes"]).trim_end().split('\t').nth(1).unwrap() != "0");
}

pub(crate) fn narrow() {
    let pair = Pair::new(1280);
    pair.carries_tcp();
    pair.carries_udp();
}

/// Kernels before 6.11 refuse trains there.
pub(crate) fn without_checksums() {
    let pair = Pair::new(1500);
    for end in &pair.0 {
        let tool = Command::new("ip")
            .args(["netns", "exec", &end.namespace, "ethtool", "-K", &end.link, "tx", "off"])
            .output()
            .unwrap();
        if !tool.status.success() {
            eprintln!("skipped in part: no ethtool here, so that the link keeps its checksums");
            return;
        }
    }
    pair.carries_tcp();
    pair.carries_udp();
}

pub(crate) fn ends_with_its_socket() {
    let mut pair = Pair::new(1500);
    let [a, b] = &mut pair.0;
    std::fs::remove_file(format!("/var/run/wireguard/{}.sock", a.interface)).unwrap();
    assert!(a.daemon.wait().unwrap().success());
    rustix::process::kill_process(rustix::process::Pid::from_child(&b.daemon), rustix::process::Signal::TERM)
        .unwrap();
    assert!(b.daemon.wait().unwrap().success());
    assert!(!std::path::Path::new(&format!("/var/run/wireguard/{}.sock", b.interface)).exists());
}
