//! The gateway's process, and the site that it stands at: an office with a server behind it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kontor_bundle::lease::Admit;
use kontor_bundle::{Bundle, Destination, Protocol};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use kontor_wire::post::FromPost;

use crate::office::{self, Boot, GATEWAY, Tenant};
use crate::vm::{self, Vm};

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const BINARY: &str = env!("CARGO_BIN_EXE_kontor-gateway");

/// An office of its own: addresses, names and ports are made of its number, so that several run at once.
pub(crate) struct Site {
    number: u8,
    pub(crate) tenant: Tenant,
    dir: TempDir,
    public_key: [u8; 32],
    /// An interface with the servers' addresses, which the kernel answers for.
    servers: Option<OwnedFd>,
}

/// A gateway that runs.
pub(crate) struct Gateway {
    child: Child,
    lines: Mutex<Receiver<String>>,
    ready: String,
    door: PathBuf,
    listen: SocketAddr,
    public_key: [u8; 32],
}

pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Runs `kontor-gateway key`; gives its exit code and its output.
pub(crate) fn make_key(out: &Path) -> (i32, String) {
    let output = Command::new(BINARY).arg("key").arg("--out").arg(out).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

impl Site {
    pub(crate) fn new(number: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tenant = Tenant::new();
        fs::write(dir.path().join("keyset.json"), &tenant.keysets[0]).unwrap();
        let (code, key) = make_key(&dir.path().join("gateway.key"));
        assert_eq!(code, 0);
        let public_key = hex::decode(key.trim_end()).unwrap().try_into().unwrap();
        let mut site = Self { number, tenant, dir, public_key, servers: None };
        fs::write(site.path("gateway.toml"), site.settings()).unwrap();
        site.restart_servers();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn settings(&self) -> String {
        let (number, dir) = (self.number, self.dir.path().display());
        format!(
            r#"
            id = {GATEWAY}
            listen = ["{}"]
            key = "{dir}/gateway.key"
            tun = "tunnel{number}"
            v4 = "10.{number}.0.1"
            v6 = "fd{number:02x}::1"
            pool_v4 = "10.{number}.0.0/16"
            pool_v6 = "fd{number:02x}::/64"
            admission = "{dir}/admission.sock"
            state = "{dir}/state"
            tenant = "{}"
            keyset = "{dir}/keyset.json"
            "#,
            self.listen(),
            self.tenant.id
        )
    }

    pub(crate) fn listen(&self) -> SocketAddr {
        // Below the ports that the kernel gives to sockets which ask for none, such as the VMs'.
        (Ipv4Addr::LOCALHOST, 20_000 + u16::from(self.number)).into()
    }

    pub(crate) fn server_v4(&self) -> IpAddr {
        Ipv4Addr::new(172, 16, self.number, 80).into()
    }

    pub(crate) fn server_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfdff, u16::from(self.number), 0, 0, 0, 0, 0, 0x80).into()
    }

    pub(crate) fn other_server_v4(&self) -> IpAddr {
        Ipv4Addr::new(127, 0, 0, self.number).into()
    }

    /// Gives the servers' addresses a new interface.
    pub(crate) fn restart_servers(&mut self) {
        let name = format!("servers{}", self.number);
        self.servers = None;
        let servers = kontor_tun::create(&name).unwrap();
        let addresses = [self.server_v4(), self.server_v6()].map(ipnet::IpNet::from);
        kontor_tun::configure(&name, &addresses, 1500).unwrap();
        kontor_tun::up(&name).unwrap();
        self.servers = Some(servers);
    }

    /// A lease's worth of one device, whose boot key and addresses have the number `address`.
    pub(crate) fn boot(&self, device: &'static str, address: u8) -> Boot {
        Boot {
            device,
            serial: 1,
            boot_key: vm::public_key(address),
            seq: 0,
            v4: Ipv4Addr::new(10, self.number, 0, address),
            v6: Ipv6Addr::new(0xfd00 + u16::from(self.number), 0, 0, 0, 0, 0, 0, u16::from(address)),
            gateway: GATEWAY,
            issued_at: unix_now(),
            life_s: 600,
        }
    }

    pub(crate) fn bundle(&self, revision: u64, destinations: Vec<Destination>) -> Bundle {
        self.tenant.bundle(revision, self.public_key, destinations)
    }

    /// A bundle that lets everybody reach the servers.
    pub(crate) fn open_bundle(&self) -> Bundle {
        let destinations = [self.server_v4(), self.server_v6()].map(|server| Destination {
            to: server.into(),
            protocol: Protocol::Any,
            ports: None,
        });
        self.bundle(1, destinations.into())
    }

    pub(crate) fn start(&self) -> Gateway {
        let mut child = Command::new(BINARY)
            .arg("run")
            .arg("--config")
            .arg(self.path("gateway.toml"))
            .env("RUST_LOG", "info,boringtun=off")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                if sender.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        let mut gateway = Gateway {
            child,
            lines: Mutex::new(lines),
            ready: String::new(),
            door: self.path("admission.sock"),
            listen: self.listen(),
            public_key: self.public_key,
        };
        // Not "ready" alone: a port may be "already in use".
        gateway.ready = gateway.wait_for("ready peers=");
        gateway
    }

    /// A VM that was admitted, has a session and has said hello.
    pub(crate) fn admitted_vm(&self, gateway: &Gateway, boot: &Boot, bundle: &Bundle) -> Vm {
        let admit = self.tenant.admit(boot, bundle);
        gateway.admit(&admit).unwrap();
        let mut vm = Vm::new(gateway, boot);
        vm.connect();
        self.greet(&mut vm, &admit);
        vm
    }

    /// Lets a VM with a session say hello.
    pub(crate) fn greet(&self, vm: &mut Vm, admit: &Admit) {
        let answer = vm.hello(self.post(), office::lease_hash(admit));
        assert!(matches!(answer, FromPost::Admitted(_)), "{answer:?}");
    }

    /// The gateway's own inner address.
    pub(crate) fn post(&self) -> IpAddr {
        Ipv4Addr::new(10, self.number, 0, 1).into()
    }

    /// The same of the other family.
    pub(crate) fn post_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd00 + u16::from(self.number), 0, 0, 0, 0, 0, 0, 1).into()
    }

    /// Runs the gateway with settings that it ends on, and gives its exit code.
    pub(crate) fn exit_code_with(&self, change: &dyn Fn(String) -> String) -> i32 {
        let path = self.path("changed.toml");
        fs::write(&path, change(self.settings())).unwrap();
        let run = Command::new(BINARY).arg("run").arg("--config").arg(path).output().unwrap();
        run.status.code().unwrap()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum ToGateway<'a> {
    Admit(&'a Admit),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FromGateway {
    Admitted(bool),
    Refused(String),
}

impl Gateway {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn listen(&self) -> SocketAddr {
        self.listen
    }

    pub(crate) fn public_key(&self) -> [u8; 32] {
        self.public_key
    }

    /// How many peers it said it had when it was ready.
    pub(crate) fn peers_at_start(&self) -> usize {
        let (_, peers) = self.ready.split_once("peers=").unwrap();
        peers.trim().parse().unwrap()
    }

    /// Brings a lease, and gives the words of a refusal.
    pub(crate) fn admit(&self, admit: &Admit) -> Result<(), String> {
        let line = serde_json::to_string(&ToGateway::Admit(admit)).unwrap() + "\n";
        match serde_json::from_str(&self.say(&line)).unwrap() {
            FromGateway::Admitted(admitted) => {
                assert!(admitted);
                Ok(())
            }
            FromGateway::Refused(words) => Err(words),
        }
    }

    /// Says something at the door, and gives the answer.
    pub(crate) fn say(&self, text: &str) -> String {
        let mut stream = UnixStream::connect(&self.door).unwrap_or_else(|error| {
            let said: Vec<String> = self.lines.lock().unwrap().try_iter().collect();
            panic!("the gateway's door: {error}; since it was ready it said {said:#?}")
        });
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Waits until the gateway says a line with these words in it.
    pub(crate) fn wait_for(&self, words: &str) -> String {
        let end = Instant::now() + PATIENCE;
        let lines = self.lines.lock().unwrap();
        let mut seen = Vec::new();
        loop {
            match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(words) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("the gateway never said {words:?}, but {seen:#?}"),
            }
        }
    }

    /// Ends it in good order, and gives what it said of its drops.
    pub(crate) fn stop(mut self) -> String {
        self.signal(Signal::TERM);
        let last = self.wait_for("ends");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(!self.door.exists());
        last
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
