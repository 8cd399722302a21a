//! Interfaces of a network namespace that this process makes for itself and that ends with it.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::thread::UnshareFlags;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before libtest-mimic has threads.
    let missing = enter_namespace().err();
    let tests: [(&str, fn()); 10] = [
        ("interface_has_its_addresses", interface_has_its_addresses),
        ("kernel_answers_a_ping_written_to_the_interface", kernel_answers_a_ping),
        ("kernel_answers_a_ping_to_ipv6_as_soon_as_it_is_up", kernel_answers_a_ping_to_ipv6),
        ("routes_lead_into_the_interface", routes_lead_into_the_interface),
        ("default_routes_lead_into_the_interface", default_routes_lead_into_the_interface),
        ("longer_packets_than_the_mtu_are_cut", longer_packets_than_the_mtu_are_cut),
        ("kernel_gives_the_interface_no_address_of_its_own", no_address_of_its_own),
        ("interface_that_another_has_open_is_busy", interface_that_another_has_open_is_busy),
        ("interface_goes_away_with_its_descriptor", interface_goes_away_with_its_descriptor),
        ("descriptor_does_not_block_and_closes_on_exec", descriptor_does_not_block),
    ];
    let trials = tests.into_iter().map(|(name, test)| {
        let missing = missing.clone();
        Trial::ignorable_test(name, move || match &missing {
            Some(reason) => {
                eprintln!("skipped {name}: {reason}");
                Ok(Completion::ignored_with(reason))
            }
            None => std::panic::catch_unwind(test)
                .map(|()| Completion::Completed)
                .map_err(|_| Failed::from("panicked")),
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Makes user and network namespaces in which this process may do what it likes.
fn enter_namespace() -> Result<(), String> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    // SAFETY: this process has one thread, and no descriptor of another namespace.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET) }
        .map_err(|errno| format!("no namespaces here: {errno}"))?;
    let write = |path: &str, text: String| fs::write(path, text).map_err(|error| format!("{path}: {error}"));
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    match fs::File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/net/tun: {error}")),
    }
}

const MTU: u16 = 1420;

/// An interface that is up, with the addresses 10.1.N.7 and fd01:N::7.
fn interface(name: &str, number: u8) -> OwnedFd {
    let tun = kontor_tun::create(name).unwrap();
    let v4 = format!("{}/32", own_v4(number)).parse().unwrap();
    let v6 = format!("{}/128", own_v6(number)).parse().unwrap();
    kontor_tun::configure(name, &[v4, v6], MTU).unwrap();
    kontor_tun::up(name).unwrap();
    tun
}

fn own_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, number, 7)
}

fn own_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd01, u16::from(number), 0, 0, 0, 0, 0, 7)
}

/// The next packet that `wanted` likes; what the kernel sends besides is passed over.
fn read(tun: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = [0; 2048];
    loop {
        match rustix::io::read(tun, &mut buffer[..]) {
            Ok(len) if wanted(&buffer[..len]) => return buffer[..len].to_vec(),
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let mut fds = [PollFd::new(tun, PollFlags::IN)];
                let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
                assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1), "no packet came");
            }
            Err(errno) => panic!("{errno}"),
        }
    }
}

fn interface_has_its_addresses() {
    let _tun = interface("addresses0", 1);
    // A socket binds to local addresses only.
    for address in [SocketAddr::from((own_v4(1), 0)), SocketAddr::from((own_v6(1), 0))] {
        UdpSocket::bind(address).unwrap();
    }
    let stranger = SocketAddr::from((Ipv4Addr::new(10, 1, 1, 8), 0));
    assert_eq!(UdpSocket::bind(stranger).unwrap_err().kind(), io::ErrorKind::AddrNotAvailable);
}

fn kernel_answers_a_ping() {
    let tun = interface("ping0", 2);
    kontor_tun::add_route("ping0", "10.1.2.0/24".parse().unwrap()).unwrap();
    let mut ping = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 1, 2, 9, 10, 1, 2, 7];
    let sum = checksum(&ping);
    ping[10..12].copy_from_slice(&sum);
    let mut echo = [8, 0, 0, 0, 0, 1, 0, 2];
    let sum = checksum(&echo);
    echo[2..4].copy_from_slice(&sum);
    ping.extend(echo);
    rustix::io::write(&tun, &ping).unwrap();
    let pong = read(&tun, |packet| packet[0] == 0x45 && packet[9] == 1);
    assert_eq!((&pong[12..16], &pong[16..20]), (&[10, 1, 2, 7][..], &[10, 1, 2, 9][..]));
    assert_eq!(pong[20], 0, "an echo reply");
}

/// The kernel makes an address's local route in a worker that waits for the lock of all interfaces, so other
/// threads hold that lock as much as they can.
fn kernel_answers_a_ping_to_ipv6() {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..3 {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    drop(kontor_tun::create(&format!("busy6{number}")).unwrap());
                }
            });
        }
        let answered = (0..40_u8)
            .map(|_| {
                let tun = interface("ping6", 10);
                kontor_tun::add_route("ping6", "fd01:a::/64".parse().unwrap()).unwrap();
                rustix::io::write(&tun, &ping6()).unwrap();
                let mut fds = [PollFd::new(&tun, PollFlags::IN)];
                let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
                rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
            })
            .collect::<Vec<_>>();
        done.store(true, Ordering::Relaxed);
        assert!(answered.iter().all(|answered| *answered), "{answered:?}");
    });
}

/// An echo request from fd01:a::9 to fd01:a::7.
fn ping6() -> Vec<u8> {
    let addresses = [Ipv6Addr::new(0xfd01, 10, 0, 0, 0, 0, 0, 9), own_v6(10)].map(|address| address.octets());
    let mut echo = [128, 0, 0, 0, 0, 1, 0, 2];
    let pseudo = [addresses.as_flattened(), &[0, 8, 0, 58], &echo].concat();
    let sum = checksum(&pseudo);
    echo[2..4].copy_from_slice(&sum);
    [&[0x60, 0, 0, 0, 0, 8, 58, 64], addresses.as_flattened(), &echo].concat()
}

fn routes_lead_into_the_interface() {
    let tun = interface("routes0", 3);
    for (to, destination) in [("10.3.0.0/16", "10.3.200.1:9"), ("fd33::/32", "[fd33::5]:9")] {
        kontor_tun::add_route("routes0", to.parse().unwrap()).unwrap();
        send_and_find(&tun, 3, destination.parse().unwrap());
        let again = kontor_tun::add_route("routes0", to.parse().unwrap()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }
    // Host bits do not matter.
    kontor_tun::add_route("routes0", "10.4.0.77/16".parse().unwrap()).unwrap();
    send_and_find(&tun, 3, "10.4.0.1:9".parse().unwrap());
}

fn default_routes_lead_into_the_interface() {
    let tun = interface("default0", 4);
    for (to, destination) in [("0.0.0.0/0", "192.0.2.1:9"), ("::/0", "[2001:db8::1]:9")] {
        kontor_tun::add_route("default0", to.parse().unwrap()).unwrap();
        send_and_find(&tun, 4, destination.parse().unwrap());
    }
}

/// Sends a datagram and waits until it comes out of the interface, from its own address.
fn send_and_find(tun: &OwnedFd, number: u8, destination: SocketAddr) {
    let any = if destination.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any).unwrap().send_to(b"hello", destination).unwrap();
    let packet = read(tun, |packet| packet.ends_with(b"hello"));
    match destination {
        SocketAddr::V4(destination) => {
            assert_eq!(packet[12..16], own_v4(number).octets());
            assert_eq!(packet[16..20], destination.ip().octets());
        }
        SocketAddr::V6(destination) => {
            assert_eq!(packet[8..24], own_v6(number).octets());
            assert_eq!(packet[24..40], destination.ip().octets());
        }
    }
}

fn longer_packets_than_the_mtu_are_cut() {
    let tun = interface("mtu0", 5);
    kontor_tun::add_route("mtu0", "10.5.0.0/16".parse().unwrap()).unwrap();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let headers = 28;
    let content = vec![0xA5; usize::from(MTU) - headers + 1];
    let is_ours = |packet: &[u8]| packet[0] == 0x45 && packet[9] == 17 && packet[16..18] == [10, 5];
    socket.send_to(&content[1..], "10.5.0.1:9").unwrap();
    assert_eq!(read(&tun, is_ours).len(), usize::from(MTU));
    socket.send_to(&content, "10.5.0.1:9").unwrap();
    assert!(read(&tun, is_ours).len() <= usize::from(MTU));
    assert!(read(&tun, is_ours).len() < 100, "the rest of it");
}

fn no_address_of_its_own() {
    let _tun = interface("silent0", 6);
    let addresses = fs::read_to_string("/proc/net/if_inet6").unwrap();
    let own: Vec<_> = addresses.lines().filter(|line| line.ends_with("silent0")).collect();
    assert_eq!(own.len(), 1, "{own:?}");
    assert!(own[0].starts_with("fd01"), "{own:?}");
}

fn interface_that_another_has_open_is_busy() {
    let _tun = kontor_tun::create("busy0").unwrap();
    assert_eq!(kontor_tun::create("busy0").unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    let two = ["10.1.7.1/32".parse().unwrap(), "10.1.7.2/32".parse().unwrap()];
    let refused = kontor_tun::configure("busy0", &two, MTU).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
}

fn interface_goes_away_with_its_descriptor() {
    let tun = interface("gone0", 8);
    drop(tun);
    assert!(kontor_tun::up("gone0").is_err());
    let address = "10.1.8.7/32".parse().unwrap();
    assert!(kontor_tun::configure("gone0", &[address], MTU).is_err());
    assert!(kontor_tun::add_route("gone0", address).is_err());
}

fn descriptor_does_not_block() {
    let tun = kontor_tun::create("flags0").unwrap();
    let flags = rustix::fs::fcntl_getfl(&tun).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    let flags = rustix::io::fcntl_getfd(tun.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!u16::try_from(folded).unwrap()).to_be_bytes()
}
