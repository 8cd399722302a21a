//! Who talks to kontord on its socket, and who may.

use crate::{
    ended,
    world::{Ran, Setup, World},
};
use kontor_daemon::verbs::MAX_REQUEST;
use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
};

/// What kontord answers to `bytes`, line by line.
fn talk(socket: &Path, bytes: &[u8]) -> Vec<serde_json::Value> {
    let mut stream = UnixStream::connect(socket).unwrap();
    // It may have answered before it has read all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let lines = BufReader::new(stream).lines();
    lines.map_while(Result::ok).map(|line| serde_json::from_str(&line).unwrap()).collect()
}

pub(crate) fn garbage_on_the_socket_is_answered_and_survived() {
    let world = World::new(&Setup::new("ready"));
    let socket = world.path("kontord.sock");
    let long = [br#"{"verb":""#.as_slice(), &[b'x'; 5000], b"\"}\n"].concat();
    let deep = b"[".repeat(4000);
    for garbage in [
        b"\n".as_slice(),
        b"stop\n",
        b"\xff\xfe\x00\n",
        b"{\"verb\":\"exec\",\"argv\":[\"sh\"]}\n",
        b"{\"verb\":\"status\",\"more\":1}\n",
        b"{\"verb\":\"status\"",
        &[deep.as_slice(), b"\n"].concat(),
    ] {
        let answers = talk(&socket, garbage);
        assert_eq!(answers.len(), 1, "{answers:?}");
        assert_eq!(answers[0]["done"]["exit"], 2, "{answers:?}");
    }
    let status = br#"{"verb":"status"}"#;
    for (length, answered) in [(MAX_REQUEST, true), (MAX_REQUEST + 1, false)] {
        let padded = [status.as_slice(), &b" ".repeat(length - status.len()), b"\n"].concat();
        assert_eq!(talk(&socket, &padded).iter().any(|answer| !answer["status"].is_null()), answered);
    }
    // The connection may be gone before the answer was read: more was sent than is read.
    assert!(talk(&socket, &long).iter().all(|answer| answer["done"]["exit"] == 2));
    assert!(talk(&socket, b"").is_empty());
    assert_eq!(talk(&socket, b"{\"verb\":\"status\"}\n")[0]["status"]["state"], "off");
}

pub(crate) fn crowd_of_silent_clients_holds_nobody_off_for_good() {
    let world = World::new(&Setup::new("ready"));
    let socket = world.path("kontord.sock");
    let mut crowd: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let asking = std::thread::spawn(move || talk(&socket, b"{\"verb\":\"status\"}\n"));
    crowd.drain(..10);
    assert_eq!(asking.join().unwrap()[0]["status"]["state"], "off");
}

pub(crate) fn strangers_are_refused() {
    let world = World::new(&Setup::new("ready"));
    let socket = world.path("kontord.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped in part: only root can try as another user");
        return;
    }
    // Even where somebody opened the socket to all.
    fs::set_permissions(world.dir.path(), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let mut command = world.kontor_command(&["status"]);
    command.uid(65534).gid(65534);
    match command.output() {
        Ok(output) => ended(&Ran::from(output), 4, "only the user 0 may ask"),
        Err(error) => eprintln!("skipped in part: another user cannot run kontor here ({error})"),
    }
}

pub(crate) fn one_kontord_for_a_device() {
    let world = World::new(&Setup::new("ready"));
    let second = world.kontord(&["run", "--user"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("kontord already runs"));
    assert_eq!(world.status()["state"], "off");
    // Without --user somebody has to be named.
    let nobody = world.kontord(&["run"]);
    assert_eq!(nobody.status.code(), Some(2));
}

pub(crate) fn kontor_without_kontord_says_so() {
    let world = World::configured(&Setup::new("ready"));
    ended(&world.kontor(&["status"]), 5, "is it running?");
    let missing: PathBuf = world.path("kontord.sock");
    assert!(!missing.exists());
}
