//! What QEMU and the relay have, and what they cannot reach.

use crate::{
    ended, escape, make_fifo, run, run_with, stopped, stub,
    world::{Process, Ran, Setup, World, own_program},
};
use rustix::process::Pid;
use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

pub(crate) fn qemu_gets_its_descriptors_and_nothing_else() {
    let (world, _) = run("inspect");
    let log = world.kontor(&["logs"]).out;
    let line = format!("quiet stub=inspect kontor.verity={}", kontor_release::Digest(stub::ROOT));
    for expected in [
        "kernel the kernel",
        r"initrd the initrd\u{0}\u{0}the segment",
        "root the root image",
        line.as_str(),
        "no_timer_check",
        "descriptors [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n",
        "core 0 files 0",
        if kontor_jail::counts_threads_apart() { "threads 128" } else { "threads " },
        r#"environment ["LD_LIBRARY_PATH", "QEMU_MODULE_DIR", "MALLOC_ARENA_MAX"]"#,
        "NoNewPrivs: 1",
    ] {
        assert!(log.contains(expected), "{expected} is not in\n{log}");
    }
}

pub(crate) fn qemu_cannot_get_out_of_its_jail() {
    let (world, _) = run("escape");
    let log = world.kontor(&["logs"]).out;
    assert!(!log.contains("PASSED") && !log.contains("FAILED"), "{log}");
    assert_eq!(log.lines().filter(|line| line.starts_with("refused: ")).count(), escape::count(), "{log}");
}

pub(crate) fn qemu_reaches_no_socket_of_the_host_by_its_uplink() {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, bind, recv, socket};
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("listening");
    let name = format!("kontor-test-{}", std::process::id());
    let addresses = [
        SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap(),
        SocketAddrUnix::new(file.as_path()).unwrap(),
    ];
    let listening = addresses.each_ref().map(|address| {
        let listening = socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
        bind(&listening, address).unwrap();
        listening
    });
    let heard = || listening.each_ref().map(|socket| recv(socket, &mut [0; 9], RecvFlags::DONTWAIT).is_ok());
    // They hear whoever is let.
    let other = socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
    for address in &addresses {
        rustix::net::sendto(&other, b"here", SendFlags::empty(), address).unwrap();
    }
    assert_eq!(heard(), [true, true]);

    for config in ["uplink = 'port'\n", "uplink = 'vfio'\n"] {
        let scenario = format!("away:{name}:{}", file.display()).leak();
        let (world, _) = run_with(&Setup { config, ..Setup::new(scenario) });
        let log = world.kontor(&["logs"]).out;
        assert_eq!(log.lines().filter(|line| line.starts_with("sent: ")).count(), 2, "{log}");
        assert_eq!(heard(), [false, false], "{log}");
    }
}

pub(crate) fn relay_that_was_taken_over_reaches_the_gateways_and_nobody_else() {
    let stranger = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.set_nonblocking(true).unwrap();
    let name = format!("{}{}", stub::TAKEN_OVER, stranger.local_addr().unwrap().port());
    let mut world = World::installed(&Setup::new("leased"));
    std::os::unix::fs::symlink(own_program(), world.path(&name)).unwrap();
    world.configure("relay", &format!("DIR/{name}"));
    world.serve();
    let ran = world.start();
    ended(&ran, 1, "tried 10, not refused: []; gateway: Ok(32), answers: true");
    assert_eq!(stopped(&world), ("uplink-failed".into(), false));
    let heard = stranger.recv(&mut [0; 99]).unwrap_err();
    assert_eq!(heard.kind(), std::io::ErrorKind::WouldBlock);
}

pub(crate) fn qemu_has_no_more_threads_than_its_jail_gives_it() {
    if !kontor_jail::counts_threads_apart() {
        eprintln!("skipped: this kernel counts the threads of all jails together (Linux before 5.14)");
        return;
    }
    let (world, _) = run("threads");
    let log = world.kontor(&["logs"]).out;
    // The jailer has one.
    assert!(log.contains("threads: 127\n"), "{log}");
}

pub(crate) fn jailed_processes_are_confined_and_stay_apart() {
    let mut world = World::new(&Setup::new("ready"));
    ended(&world.start(), 0, "ready");
    world.await_pid("the relay was started");
    let qemu = world.await_pid("QEMU was started").as_raw_nonzero().to_string();
    let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"] {
        assert!(status.contains(line), "{line} is not in\n{status}");
    }
    for space in ["user", "mnt", "net", "ipc", "uts", "pid", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap();
        assert_ne!(of(&qemu), of("self"), "{space}");
    }
    let mounts = fs::read_to_string(format!("/proc/{qemu}/mountinfo")).unwrap();
    for mount in mounts.lines() {
        let options = mount.split(' ').nth(5).unwrap();
        assert!(options.contains("nosuid") && options.contains("nodev"), "{mount}");
        assert!(options.starts_with("ro,") || mount.contains(" - proc proc rw,subset=pid"), "{mount}");
    }
    assert_eq!(world.status()["jail"]["limit"], "address-space");
    let threads = kontor_jail::counts_threads_apart().then_some(128);
    assert_eq!(world.status()["jail"]["threads"], serde_json::json!(threads));
    assert_eq!(world.status()["uplink"], "port");
}

/// Beginning of a shell's script: in a user namespace that may have none below it. The setting is that
/// namespace's own.
const FORBIDDEN: &str = "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"";

pub(crate) fn host_without_user_namespaces_starts_nothing() {
    let forbidden = |program: &Path| {
        let mut command = std::process::Command::new("unshare");
        command.args(["--user", "--map-root-user", "--", "sh", "-euc", FORBIDDEN, "sh"]).arg(program);
        command
    };
    // Only a namespace whose parent is another one has a limit of its own that nobody else sees.
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    let inside = forbidden(Path::new("readlink")).arg("/proc/self/ns/user").output();
    match &inside {
        Ok(output) if output.status.success() => {
            assert_ne!(String::from_utf8_lossy(&output.stdout).trim(), own.to_str().unwrap());
        }
        other => {
            eprintln!("skipped: no user namespace with a limit of its own can be made: {other:?}");
            return;
        }
    }
    let check = forbidden(Path::new(env!("CARGO_BIN_EXE_kontor-jail"))).arg("check").output().unwrap();
    let words = String::from_utf8_lossy(&check.stderr);
    assert_eq!(check.status.code(), Some(125), "{words}");
    assert!(words.contains("user.max_user_namespaces"), "{words}");

    let mut world = World::installed(&Setup::new("ready"));
    world.serve_as(forbidden(Path::new(env!("CARGO_BIN_EXE_kontord"))));
    let ran = world.start();
    ended(&ran, 4, "cannot be jailed, and Kontor starts it no other way");
    for setting in [
        "user.max_user_namespaces",
        "kernel.unprivileged_userns_clone",
        "kernel.apparmor_restrict_unprivileged_userns",
    ] {
        assert!(ran.err.contains(setting), "{ran:?}");
    }
    assert_eq!(world.status()["state"], "not-started");
    let doctor = world.kontor(&["doctor"]);
    ended(&doctor, 4, "user.max_user_namespaces");
}

/// In the jailer's place: says which process it is, and goes no further with QEMU.
const HANGING: &str =
    "#!/bin/sh\ncase $1 in qemu) echo $$ > DIR/hung; kill -STOP $$;; *) exec JAIL \"$@\";; esac\n";

pub(crate) fn jailer_that_hangs_is_ended_by_a_stop() {
    let mut world = World::installed(&Setup::new("ready"));
    let script = HANGING.replace("DIR", world.dir.path().to_str().unwrap());
    fs::write(world.path("jail"), script.replace("JAIL", env!("CARGO_BIN_EXE_kontor-jail"))).unwrap();
    fs::set_permissions(world.path("jail"), Permissions::from_mode(0o755)).unwrap();
    make_fifo(&world.path("hung"));
    world.configure("jail", "DIR/jail");
    world.serve();
    let starting = world.kontor_command(&["start", "--headless"]).spawn().unwrap();
    let jailer = fs::read_to_string(world.path("hung")).unwrap();
    let jailer = Process::of(Pid::from_raw(jailer.trim().parse().unwrap()).unwrap());
    let stopping = world.kontor_command(&["stop"]).spawn().unwrap();
    Process::of(Pid::from_child(&stopping)).await_end();
    ended(&Ran::from(stopping.wait_with_output().unwrap()), 0, "stopped before it ran");
    ended(&Ran::from(starting.wait_with_output().unwrap()), 0, "stopped before it ran");
    jailer.await_end();
    assert_eq!(world.status()["state"], "not-started");
}
