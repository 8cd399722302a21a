//! The program itself: descriptors by number, its limits, its exit codes.
#![expect(clippy::unwrap_used, reason = "a test may panic, and knows its numbers")]

mod wires;

use command_fds::{CommandFdExt, FdMapping};
use kontor_relay::message::{FromDaemon, FromRelay};
use kontor_wire::uplink::{GatewayId, encode_port};
use std::{
    io::Write,
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio},
};
use wires::{Daemon, GATEWAY, daemon, localhost, receive, transport};

struct Program {
    child: Child,
    guest: UnixStream,
    daemon: Daemon,
}

fn start() -> Program {
    let (guest, uplink) = UnixStream::pair().unwrap();
    let (daemon, control) = daemon();
    let mappings = [uplink.into(), control]
        .into_iter()
        .zip(3..)
        .map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd })
        .collect();
    let child = Command::new(env!("CARGO_BIN_EXE_kontor-relay"))
        .args(["--uplink", "3", "--control", "4"])
        .fd_mappings(mappings)
        .unwrap()
        .spawn()
        .unwrap();
    let program = Program { child, guest, daemon };
    assert_eq!(program.daemon.hear(), FromRelay::Ready);
    program
}

#[test]
fn it_forwards_and_can_open_nothing() {
    let gateway = localhost();
    let mut program = start();
    program.daemon.connect(&gateway);

    let mut frame = Vec::new();
    let keepalive = transport(32, 3);
    encode_port(GatewayId(GATEWAY), 32, &keepalive, &mut frame).unwrap();
    program.guest.write_all(&frame).unwrap();
    assert_eq!(receive(&gateway).0, keepalive);

    let limits = std::fs::read_to_string(format!("/proc/{}/limits", program.child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().collect::<Vec<_>>()[3..5], ["21", "21"]);

    let status = std::fs::read_to_string(format!("/proc/{}/status", program.child.id())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");

    program.daemon.say(&FromDaemon::Shutdown);
    assert_eq!(program.child.wait().unwrap().code(), Some(0));
}

#[test]
fn garbage_of_the_guest_has_its_own_exit_code() {
    let mut program = start();
    // The program may end before it has read all of this.
    let _ = program.guest.write_all(&[3, 0, 9, 9, 9].repeat(1000));
    assert!(matches!(program.daemon.hear(), FromRelay::Garbage(_)));
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
        .args(["--uplink", "60", "--control", "61"])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}
