//! The program itself: descriptors by number, its limits, its exit codes.
#![expect(clippy::unwrap_used, reason = "a test may panic, and knows its numbers")]

use command_fds::{CommandFdExt, FdMapping};
use kontor_relay::message::{self, FromDaemon, FromRelay};
use kontor_wire::uplink::{GatewayId, encode_port};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::{
    io::Write,
    net::UdpSocket,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

struct Program {
    child: Child,
    guest: UnixStream,
    daemon: OwnedFd,
}

fn start() -> Program {
    let (guest, uplink) = UnixStream::pair().unwrap();
    let (daemon, control) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let udp4 = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mappings = [uplink.into(), control, udp4.into()]
        .into_iter()
        .zip(3..)
        .map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd })
        .collect();
    let child = Command::new(env!("CARGO_BIN_EXE_kontor-relay"))
        .args(["--uplink", "3", "--control", "4", "--udp4", "5"])
        .fd_mappings(mappings)
        .unwrap()
        .spawn()
        .unwrap();
    let program = Program { child, guest, daemon };
    assert_eq!(hear(&program.daemon), FromRelay::Ready);
    program
}

fn hear(daemon: &OwnedFd) -> FromRelay {
    let mut packet = [0; message::MAX_MESSAGE];
    let (_, length) = recv(daemon, packet.as_mut_slice(), RecvFlags::empty()).unwrap();
    message::decode(&packet[..length]).unwrap()
}

fn say(daemon: &OwnedFd, message: &FromDaemon) {
    send(daemon, &message::encode(message).unwrap(), SendFlags::NOSIGNAL).unwrap();
}

#[test]
fn it_forwards_and_can_open_nothing() {
    let gateway = UdpSocket::bind("127.0.0.1:0").unwrap();
    gateway.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut program = start();
    say(&program.daemon, &FromDaemon::Gateways(vec![(1, vec![gateway.local_addr().unwrap()])]));
    say(&program.daemon, &FromDaemon::Report);
    assert!(matches!(hear(&program.daemon), FromRelay::Counters(_)));

    let mut frame = Vec::new();
    let keepalive = [&[4, 0, 0, 0][..], &[3; 28]].concat();
    encode_port(GatewayId(1), 32, &keepalive, &mut frame).unwrap();
    program.guest.write_all(&frame).unwrap();
    let mut datagram = [0; 100];
    assert_eq!(gateway.recv(&mut datagram).unwrap(), 32);
    assert_eq!(datagram[..32], keepalive);

    let limits = std::fs::read_to_string(format!("/proc/{}/limits", program.child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().collect::<Vec<_>>()[3..5], ["4", "4"]);

    let status = std::fs::read_to_string(format!("/proc/{}/status", program.child.id())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");

    say(&program.daemon, &FromDaemon::Shutdown);
    assert_eq!(program.child.wait().unwrap().code(), Some(0));
}

#[test]
fn garbage_of_the_guest_has_its_own_exit_code() {
    let mut program = start();
    // The program may end before it has read all of this.
    let _ = program.guest.write_all(&[3, 0, 9, 9, 9].repeat(1000));
    assert!(matches!(hear(&program.daemon), FromRelay::Garbage(_)));
    assert_eq!(program.child.wait().unwrap().code(), Some(3));
}

#[test]
fn wrong_command_line_is_a_usage_error() {
    let status = Command::new(env!("CARGO_BIN_EXE_kontor-relay"))
        .args(["--uplink", "3"])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn descriptor_that_is_not_open_is_an_error() {
    let status = Command::new(env!("CARGO_BIN_EXE_kontor-relay"))
        .args(["--uplink", "60", "--control", "61", "--udp4", "62"])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}
