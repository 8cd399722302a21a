//! `kontord` and `kontor` as processes, with a QEMU and a relay's program that this same executable plays,
//! and an office in it. See `stub.rs` for what the guests do and `world.rs` for the PC.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod escape;
#[path = "../https/mod.rs"]
mod https;
#[path = "../repository/mod.rs"]
#[expect(dead_code, reason = "the slots' own tests use all of it")]
mod repository;
mod stub;
#[path = "../tenant/mod.rs"]
mod tenant;
mod world;

use kontor_daemon::{
    daemon::plan,
    lease::Asker,
    office::HttpsOffice,
    session::Times,
    status::{State, Status},
    store::Store,
    verbs::MAX_REQUEST,
    vm,
};
use libtest_mimic::{Arguments, Trial};
use rustix::process::{Pid, Signal};
use std::{
    fs::{self, OpenOptions, Permissions},
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::{FileExt, OpenOptionsExt, PermissionsExt},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use world::{Process, Ran, Setup, World, own_program};

/// Nothing here takes so long: a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("-nodefaults") => stub::qemu(arguments),
        Some("--uplink") => stub::relay(&arguments),
        _ => {}
    }
    let check = std::process::Command::new(env!("CARGO_BIN_EXE_kontor-jail")).arg("check").output().unwrap();
    let words = String::from_utf8_lossy(&check.stderr).into_owned();
    if !check.status.success() && words.contains("user namespaces") {
        let mut out = std::io::stdout();
        writeln!(out, "skipped: nobody may make user namespaces here: {}", words.trim()).unwrap();
        return ExitCode::SUCCESS;
    }
    macro_rules! trials {
        ($($test:ident),* $(,)?) => {
            vec![$(Trial::test(stringify!($test), || { $test(); Ok(()) })),*]
        };
    }
    let trials = trials![
        boot_reaches_ready_and_stop_powers_off,
        renewed_lease_moves_the_end,
        second_start_follows_the_first,
        machine_starts_again_after_a_stop,
        qemu_gets_its_descriptors_and_nothing_else,
        qemu_cannot_get_out_of_its_jail,
        qemu_reaches_no_socket_of_the_host_by_its_uplink,
        qemu_has_no_more_threads_than_its_jail_gives_it,
        relay_that_was_taken_over_reaches_the_gateways_and_nobody_else,
        jailed_processes_are_confined_and_stay_apart,
        garbage_of_the_guest_stops_it,
        garbage_on_the_uplink_stops_the_guest,
        guests_own_reason_is_shown,
        kernel_panic_on_the_console_is_inferred,
        kernel_panic_by_device_is_inferred,
        killed_qemu_is_inferred_as_vanished,
        qemu_that_does_not_start_is_told_with_its_words,
        killed_relay_stops_the_guest,
        silent_guest_is_stopped,
        guest_and_qemu_that_are_deaf_are_killed,
        guest_that_does_not_power_off_is_made_to,
        office_that_refuses_is_quoted,
        office_that_does_not_work_is_unreachable,
        office_with_another_key_gets_no_request,
        answer_that_does_not_verify_stops_the_boot,
        emulation_and_test_images_need_the_policy,
        release_below_the_floor_is_not_started,
        release_that_needs_more_memory_is_not_started,
        changed_release_is_not_started_and_the_piece_is_named,
        what_is_missing_is_said,
        start_with_a_window_is_not_there_yet,
        doctor_says_what_is_missing_and_what_is_well,
        keyset_that_the_repository_has_is_installed_with_the_release,
        probe_of_a_test_image_is_served_byte_for_byte,
        probe_of_another_image_is_not_there,
        tap_records_both_directions,
        logs_are_safe_to_print,
        terminated_kontord_leaves_nothing_behind,
        second_signal_hurries,
        killed_kontord_takes_everything_with_it,
        host_without_user_namespaces_starts_nothing,
        jailer_that_hangs_is_ended_by_a_stop,
        start_waits_for_the_doctors_trial_of_kvm_and_takes_its_result,
        garbage_on_the_socket_is_answered_and_survived,
        crowd_of_silent_clients_holds_nobody_off_for_good,
        start_right_behind_a_stop_waits_for_it,
        strangers_are_refused,
        install_killed_at_any_file_leaves_a_whole_release_and_the_next_one_works,
        flood_on_every_channel_is_stopped_and_does_not_fill_memory,
        one_kontord_for_a_device,
        kontor_without_kontord_says_so,
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn run(scenario: &'static str) -> (World, Ran) {
    run_with(&Setup::new(scenario))
}

fn run_with(setup: &Setup) -> (World, Ran) {
    let world = World::new(setup);
    let ran = world.start();
    (world, ran)
}

/// The reason of the last stop and whether it is inferred.
fn stopped(world: &World) -> (String, bool) {
    let status = world.status();
    assert_eq!(status["state"], "stopped", "{status}");
    let stop = &status["stop"];
    (stop["reason"].as_str().unwrap().to_owned(), stop["inferred"].as_bool().unwrap())
}

#[track_caller]
fn ended(ran: &Ran, code: i32, words: &str) {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    assert!(format!("{}{}", ran.out, ran.err).contains(words), "{ran:?}");
}

fn boot_reaches_ready_and_stop_powers_off() {
    let mut world = World::new(&Setup::new("ready"));
    let ran = world.start();
    ended(&ran, 0, "ready");
    let (relay, qemu) =
        (world.await_process("the relay was started"), world.await_process("QEMU was started"));
    let told: Vec<_> = ran.out.lines().map(|line| line.split_whitespace().last().unwrap()).collect();
    let states = ["early", "verified", "leased", "tunnel-up", "admitted", "state-open", "session"].as_slice();
    assert_eq!(told, [states, &["ready"]].concat());

    let status = world.status();
    assert_eq!(status["state"], "running");
    let reached: Vec<_> = status["states"].as_array().unwrap().iter().collect();
    assert!(reached.iter().map(|reached| reached["state"].as_str().unwrap()).eq(states.iter().copied()));
    let times: Vec<_> = reached.iter().map(|reached| reached["at_ms"].as_u64().unwrap()).collect();
    assert!(times.is_sorted() && status["ready_at_ms"].as_u64().unwrap() >= times[6]);
    assert_eq!((&status["accel"], &status["emulated"]), (&"tcg".into(), &true.into()));
    assert_eq!(status["user_mode"], true);
    assert_eq!(status["release"], serde_json::json!({"name": "smoke-1", "version": 1, "test": false}));
    assert_eq!(status["lease"]["not_after"], tenant::NOW + 600);
    assert_eq!(status["lease"]["revision"], 1);
    let relayed = &status["relay"];
    assert_eq!((&relayed["up"]["datagrams"], &relayed["up"]["bytes"]), (&1.into(), &32.into()));
    assert_eq!(relayed["down"]["datagrams"], 1);
    let shown = world.kontor(&["status"]).out;
    assert!(shown.contains("EMULATED") && shown.contains("USER MODE"), "{shown}");

    ended(&world.kontor(&["stop"]), 0, "The work VM was closed.");
    assert_eq!(stopped(&world), ("requested".into(), false));
    assert_eq!(world.status()["relay"]["up"]["datagrams"], 1);
    assert!(relay.is_reaped() && qemu.is_reaped());
    ended(&world.kontor(&["stop"]), 0, "does not run");
}

fn renewed_lease_moves_the_end() {
    let (mut world, ran) = run("again");
    ended(&ran, 0, "ready");
    // The first answer was the boot's.
    world.await_log("the office was asked");
    world.await_log("the office was asked");
    ended(&world.kontor(&["stop"]), 0, "closed");
    let log = world.kontor(&["logs"]).out;
    assert!(log.contains("\nrenewed\n"), "{log}");
}

fn second_start_follows_the_first() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    let again = world.start();
    ended(&again, 0, "ready");
    assert_eq!(again.out, ran.out);
}

fn machine_starts_again_after_a_stop() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    ended(&world.kontor(&["stop"]), 0, "closed");
    ended(&world.start(), 0, "ready");
    assert_eq!(world.status()["stop"], serde_json::Value::Null);
}

fn qemu_gets_its_descriptors_and_nothing_else() {
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

fn qemu_cannot_get_out_of_its_jail() {
    let (world, _) = run("escape");
    let log = world.kontor(&["logs"]).out;
    assert!(!log.contains("PASSED") && !log.contains("FAILED"), "{log}");
    assert_eq!(log.lines().filter(|line| line.starts_with("refused: ")).count(), escape::count(), "{log}");
}

fn qemu_reaches_no_socket_of_the_host_by_its_uplink() {
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

fn relay_that_was_taken_over_reaches_the_gateways_and_nobody_else() {
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

fn qemu_has_no_more_threads_than_its_jail_gives_it() {
    if !kontor_jail::counts_threads_apart() {
        eprintln!("skipped: this kernel counts the threads of all jails together (Linux before 5.14)");
        return;
    }
    let (world, _) = run("threads");
    let log = world.kontor(&["logs"]).out;
    // The jailer has one.
    assert!(log.contains("threads: 127\n"), "{log}");
}

fn jailed_processes_are_confined_and_stay_apart() {
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

fn garbage_of_the_guest_stops_it() {
    let (world, ran) = run("garbage");
    ended(&ran, 1, "broke the rules of its channel");
    assert_eq!(stopped(&world), ("garbage".into(), false));
}

fn garbage_on_the_uplink_stops_the_guest() {
    let (world, ran) = run("uplink-garbage");
    ended(&ran, 1, "an uplink frame of 3 bytes");
    assert_eq!(stopped(&world), ("garbage".into(), false));
    assert!(world.status()["relay"]["up"]["malformed"].as_u64().unwrap() > 16);
}

fn guests_own_reason_is_shown() {
    let (world, ran) = run("root-corrupt");
    ended(&ran, 3, "The installed release is damaged");
    assert!(ran.out.ends_with("early\n"), "{ran:?}");
    assert_eq!(stopped(&world), ("root-corrupt".into(), false));
}

fn kernel_panic_on_the_console_is_inferred() {
    let (world, ran) = run("panic");
    ended(&ran, 3, "Kernel panic - not syncing: dm-verity device corrupted");
    ended(&ran, 3, "Kontor concludes this");
    assert_eq!(stopped(&world), ("kernel-panic".into(), true));
}

fn kernel_panic_by_device_is_inferred() {
    let (world, ran) = run("pvpanic");
    ended(&ran, 3, "pvpanic");
    assert_eq!(stopped(&world), ("kernel-panic".into(), true));
}

fn killed_qemu_is_inferred_as_vanished() {
    let mut world = World::new(&Setup::new("ready"));
    ended(&world.start(), 0, "ready");
    let relay = world.await_process("the relay was started");
    world.await_process("QEMU was started").kill(Signal::KILL);
    world.await_log("the work VM ended");
    assert_eq!(stopped(&world), ("vanished".into(), true));
    assert!(world.status()["stop"]["detail"].as_str().unwrap().contains("signal: 9"));
    relay.await_end();
    assert!(relay.is_reaped());
}

fn qemu_that_does_not_start_is_told_with_its_words() {
    let (world, ran) = run("broken");
    ended(&ran, 1, r"exit status: 1) qemu-stub: could not\x1b[2J set up");
    assert_eq!(stopped(&world), ("vanished".into(), true));
}

fn killed_relay_stops_the_guest() {
    let mut world = World::new(&Setup::new("ready"));
    ended(&world.start(), 0, "ready");
    let relay = world.await_process("the relay was started");
    let qemu = world.await_process("QEMU was started");
    relay.kill(Signal::KILL);
    qemu.await_end();
    world.await_log("the work VM ended");
    assert_eq!(stopped(&world), ("uplink-failed".into(), false));
}

/// A machine in this process, whose times are a fraction of the real ones.
fn hurried(scenario: &'static str, divisor: u32) -> Status {
    let world = World::installed(&Setup::new(scenario));
    let config = kontor_daemon::config::Config::read(&world.path("kontord.toml")).unwrap();
    let store = Store::open(&config.state, config.tenant, config.device.clone()).unwrap();
    let mut plan = plan(&config, &store, kontor_daemon::host::Accelerator::Tcg).unwrap();
    plan.times = Times::new(kontor_daemon::host::Accelerator::Kvm).divided_by(divisor);
    let office = HttpsOffice::new(config.office.clone(), store.clone());
    let running =
        kontor_daemon::lease::Running::of(&plan.ready.manifest, kontor_daemon::host::Accelerator::Tcg);
    let asker = Asker { store, office, running, clock: || tenant::NOW };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let status = watch::Sender::new(Status::off(true));
        let (commands, orders) = mpsc::channel(1);
        let mut watching = status.subscribe();
        let stop = tokio::spawn(async move {
            let decided = |status: &Status| matches!(status.state, State::Running | State::Stopped);
            watching.wait_for(decided).await.unwrap();
            let _ = commands.send(vm::Command::Stop).await;
            // Held until the machine has ended: the end of its commands would be a reason to kill it.
            watching.wait_for(|status| status.state == State::Stopped).await.is_ok()
        });
        vm::run(plan, asker, Instant::now(), orders, &status).await.unwrap();
        assert!(stop.await.unwrap());
        status.borrow().clone()
    })
}

fn silent_guest_is_stopped() {
    let stop = hurried("silent", 100).stop.unwrap();
    assert_eq!((stop.reason.as_str(), stop.inferred), ("silent", false));
    assert_eq!(stop.detail, "nothing more came after start");
}

fn guest_and_qemu_that_are_deaf_are_killed() {
    assert_eq!(hurried("deaf", 100).stop.unwrap().reason, "silent");
}

fn guest_that_does_not_power_off_is_made_to() {
    let status = hurried("stubborn", 20);
    assert_eq!(status.stop.unwrap().reason, "requested");
    assert!(status.ready_at_ms.is_some());
}

fn office_that_refuses_is_quoted() {
    let (world, ran) = run_with(&Setup { mode: "refused", ..Setup::new("ready") });
    ended(&ran, 5, "The office: the device is revoked");
    assert_eq!(stopped(&world), ("no-lease".into(), false));
}

fn office_that_does_not_work_is_unreachable() {
    let (world, ran) = run_with(&Setup { mode: "broken", ..Setup::new("ready") });
    ended(&ran, 5, "the office answers with HTTP status 500 Internal Server Error");
    assert_eq!(stopped(&world), ("no-lease".into(), false));
}

fn office_with_another_key_gets_no_request() {
    let (world, ran) = run_with(&Setup { mode: "stranger", ..Setup::new("ready") });
    ended(&ran, 5, "somebody else answers as the office");
    assert_eq!(stopped(&world), ("no-lease".into(), false));
    assert!(world.status()["office"].as_str().unwrap().contains("tell IT"));
}

fn answer_that_does_not_verify_stops_the_boot() {
    let (world, ran) = run_with(&Setup { mode: "bent", ..Setup::new("ready") });
    ended(&ran, 3, "did not verify");
    assert_eq!(stopped(&world), ("bad-lease".into(), false));
    assert_eq!(world.status()["lease"], serde_json::Value::Null);
}

fn emulation_and_test_images_need_the_policy() {
    if Path::new("/dev/kvm").exists() {
        eprintln!("skipped in part: this host has KVM");
    } else {
        let no_emulation =
            Setup { bundle: |bundle| bundle.settings.allow_emulation = false, ..Setup::new("ready") };
        let (world, ran) = run_with(&no_emulation);
        ended(&ran, 4, "does not allow emulation");
        assert_eq!(world.status()["state"], "not-started");
    }
    let no_test = Setup {
        test_image: true,
        bundle: |bundle| bundle.settings.allow_test_image = false,
        ..Setup::new("ready")
    };
    ended(&run_with(&no_test).1, 4, "is a test image");
}

fn release_below_the_floor_is_not_started() {
    let setup = Setup { bundle: |bundle| bundle.min_release = 2, ..Setup::new("ready") };
    ended(&run_with(&setup).1, 4, "older than the policy allows (2)");
    let setup = Setup {
        bundle: |bundle| bundle.min_release = 2,
        manifest: |manifest| manifest.version = 2,
        ..Setup::new("ready")
    };
    ended(&run_with(&setup).1, 0, "ready");
}

fn release_that_needs_more_memory_is_not_started() {
    let setup = Setup { manifest: |manifest| manifest.image.memory_mib_min = 257, ..Setup::new("ready") };
    ended(&run_with(&setup).1, 4, "needs 257 MiB");
    let setup = Setup { manifest: |manifest| manifest.image.memory_mib_min = 256, ..Setup::new("ready") };
    ended(&run_with(&setup).1, 0, "ready");
}

fn changed_release_is_not_started_and_the_piece_is_named() {
    for name in ["kernel", "initrd", "segment"] {
        let world = World::new(&Setup::new("ready"));
        let piece = OpenOptions::new().write(true).open(world.slot(name)).unwrap();
        piece.write_all_at(b"X", 2).unwrap();
        ended(&world.start(), 3, &format!("the release's {name} is not what its manifest says"));
    }
    let world = World::new(&Setup::new("ready"));
    OpenOptions::new().append(true).open(world.slot("root.img")).unwrap().write_all(b"X").unwrap();
    ended(&world.start(), 3, "the release's root.img has 15 bytes");
}

fn what_is_missing_is_said() {
    let mut bare = World::configured(&Setup::new("ready"));
    bare.serve();
    ended(&bare.start(), 4, "host.key");
    let world = World::new(&Setup::new("ready"));
    fs::remove_dir_all(world.slot("")).unwrap();
    ended(&world.start(), 4, "no release is installed");

    let mut world = World::installed(&Setup::new("ready"));
    world.configure("qemu", "/no/qemu");
    world.serve();
    ended(&world.start(), 4, "start QEMU (/no/qemu)");
    assert!(world::is_reaped(world.await_pid("the relay was started")));
}

fn start_with_a_window_is_not_there_yet() {
    let world = World::new(&Setup::new("ready"));
    ended(&world.kontor(&["start"]), 4, "kontor start --headless");
    assert_eq!(world.status()["state"], "off");
}

fn doctor_says_what_is_missing_and_what_is_well() {
    let mut bare = World::configured(&Setup::new("ready"));
    bare.serve();
    let ran = bare.kontor(&["doctor"]);
    ended(&ran, 4, "run kontord host-key");
    ended(&ran, 4, "run kontord install");

    let world = World::new(&Setup { config: "", ..Setup::new("ready") });
    let ran = world.kontor(&["doctor"]);
    for line in
        ["ok       host key", "ok       documents: keyset 1", "ok       release: smoke-1", "ok       policy"]
    {
        assert!(ran.out.contains(line), "{line} is not in\n{}", ran.out);
    }
    let piece = OpenOptions::new().write(true).open(world.slot("root.img")).unwrap();
    piece.write_all_at(b"X", 2).unwrap();
    ended(&world.kontor(&["doctor"]), 4, "missing  release: the release's root.img is not what");
}

fn keyset_that_the_repository_has_is_installed_with_the_release() {
    let mut world = World::new(&Setup::new("ready"));
    world.tenant.advance();
    let keysets = world.tenant.keysets.clone();
    for (version, keyset) in (1..).zip(&keysets) {
        world.repository.add_file(kontor_repository::keyset_target(version), keyset);
    }
    world.repository.publish(&world.path("release"));
    let place = world.repository.dir.to_str().unwrap().to_owned();
    let installed = world.kontord(&["install", "--repo", &place]);
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    let ran = world.kontor(&["doctor"]);
    assert!(ran.out.contains("ok       documents: keyset 2"), "{}", ran.out);
    // One that nobody signed stops the installation.
    world.repository.add_file(kontor_repository::keyset_target(3), b"{}");
    world.repository.publish(&world.path("release"));
    assert_eq!(world.kontord(&["install", "--repo", &place]).status.code(), Some(3));
}

fn probe_setup(test_image: bool) -> Setup {
    let scenario = if test_image { "probe" } else { "ready" };
    Setup { test_image, config: "probe_socket = 'DIR/probe.sock'\n", ..Setup::new(scenario) }
}

fn probe_of_a_test_image_is_served_byte_for_byte() {
    let (world, ran) = run_with(&probe_setup(true));
    ended(&ran, 0, "ready");
    let path = world.path("probe.sock");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let sent: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    // One client after the other.
    for _ in 0..2 {
        let mut client = UnixStream::connect(&path).unwrap();
        let mut back = vec![0; sent.len()];
        let mut writer = client.try_clone().unwrap();
        let sending = sent.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sending).unwrap());
        client.read_exact(&mut back).unwrap();
        writing.join().unwrap();
        assert!(back == sent);
    }
    ended(&world.kontor(&["stop"]), 0, "closed");
    assert!(!path.exists());
}

fn probe_of_another_image_is_not_there() {
    let (world, ran) = run_with(&probe_setup(false));
    ended(&ran, 0, "ready");
    assert!(!world.path("probe.sock").exists());
}

fn tap_records_both_directions() {
    let (world, ran) = run_with(&Setup { config: "tap = 'DIR/tap'\n", ..Setup::new("ready") });
    ended(&ran, 0, "ready");
    ended(&world.kontor(&["stop"]), 0, "closed");
    let file = fs::read(world.path("tap")).unwrap();
    let mut frame = Vec::new();
    let gateway = kontor_wire::uplink::GatewayId(tenant::GATEWAY);
    kontor_wire::uplink::encode_port(gateway, 32, &stub::KEEPALIVE, &mut frame).unwrap();
    for direction in [kontor_daemon::tap::Direction::Up, kontor_daemon::tap::Direction::Down] {
        let records = kontor_daemon::tap::records(&file);
        let bytes: Vec<u8> = records
            .filter(|record| record.direction == direction)
            .flat_map(|record| record.bytes.to_vec())
            .collect();
        assert_eq!(bytes, frame);
    }
}

fn logs_are_safe_to_print() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    assert_eq!(world.kontor(&["logs"]).out, "booting \\x1b[2J\n");
}

fn terminated_kontord_leaves_nothing_behind() {
    let mut world = World::new(&Setup {
        config: "probe_socket = 'DIR/probe.sock'\n",
        test_image: true,
        ..Setup::new("probe")
    });
    ended(&world.start(), 0, "ready");
    let processes = [world.await_process("the relay was started"), world.await_process("QEMU was started")];
    let (code, log) = world.end(Signal::TERM);
    assert_eq!(code, Some(0));
    assert!(log.contains(r#"the work VM ended reason="requested" witness=Host"#), "{log}");
    assert!(processes.iter().all(world::Process::is_reaped));
    assert!(!world.path("kontord.sock").exists() && !world.path("probe.sock").exists());
}

fn second_signal_hurries() {
    let mut world = World::new(&Setup::new("stubborn"));
    ended(&world.start(), 0, "ready");
    let processes = [world.await_process("the relay was started"), world.await_process("QEMU was started")];
    world.kontord_process().kill(Signal::TERM);
    world.await_log("kontord ends");
    let started = std::time::Instant::now();
    let (code, _) = world.end(Signal::TERM);
    assert_eq!(code, Some(0));
    assert!(processes.iter().all(world::Process::is_reaped));
    assert!(started.elapsed() < std::time::Duration::from_secs(15));
}

fn killed_kontord_takes_everything_with_it() {
    // What the whole host mounts meanwhile is its own affair.
    let program = own_program().file_name().unwrap().to_str().unwrap().to_owned();
    let mounts = || {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let jails = |line: &&str| {
            [program.as_str(), "size=1024k", "subset=pid"].iter().any(|part| line.contains(part))
        };
        table.lines().filter(jails).map(str::to_owned).collect::<Vec<_>>()
    };
    let mut world = World::new(&Setup::new("stubborn"));
    let before = mounts();
    ended(&world.start(), 0, "ready");
    let processes = [world.await_process("the relay was started"), world.await_process("QEMU was started")];
    let jailers = processes.each_ref().map(world::Process::parent);
    assert_eq!(mounts(), before);
    world.end(Signal::KILL);
    processes.iter().chain(&jailers).for_each(world::Process::await_end);
    assert_eq!(mounts(), before);
    // The next one says what happened, also if it is not asked before it is killed itself.
    world.serve();
    world.end(Signal::KILL);
    world.serve();
    assert_eq!(stopped(&world), ("vanished".into(), true));
    assert!(world.kontor(&["status"]).out.contains("kontord was killed while the work VM ran"));
    // Nor does what was left on disk hinder it.
    ended(&world.start(), 0, "ready");
    ended(&world.kontor(&["stop"]), 0, "closed");
    world.end(Signal::TERM);
    world.serve();
    assert_eq!(world.status()["state"], "off");
}

/// Beginning of a shell's script: in a user namespace that may have none below it. The setting is that
/// namespace's own.
const FORBIDDEN: &str = "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"";

fn host_without_user_namespaces_starts_nothing() {
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

fn jailer_that_hangs_is_ended_by_a_stop() {
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

fn start_waits_for_the_doctors_trial_of_kvm_and_takes_its_result() {
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("skipped: this host has no KVM, or not for this user");
        return;
    }
    let mut world = World::installed(&Setup::new("ready"));
    world.configure("kvm", "/dev/kvm");
    world.serve();
    let doctor = world.kontor_command(&["doctor"]).spawn().unwrap();
    let trial = world.await_process("a trial of KVM has begun");
    let starting = world.kontor_command(&["start", "--headless"]).spawn().unwrap();
    // It has not begun another one.
    let next = world.await_log("a trial of KVM");
    assert!(next.contains("is waited for"), "{next}");
    trial.kill(Signal::KILL);
    ended(&Ran::from(starting.wait_with_output().unwrap()), 0, "ready");
    assert_eq!(world.status()["accel"], "tcg");
    doctor.wait_with_output().unwrap();
    let (_, log) = world.end(Signal::TERM);
    assert!(!log.contains("a trial of KVM has begun"), "{log}");
}

/// What kontord answers to `bytes`, line by line.
fn talk(socket: &Path, bytes: &[u8]) -> Vec<serde_json::Value> {
    let mut stream = UnixStream::connect(socket).unwrap();
    // It may have answered before it has read all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let lines = BufReader::new(stream).lines();
    lines.map_while(Result::ok).map(|line| serde_json::from_str(&line).unwrap()).collect()
}

fn garbage_on_the_socket_is_answered_and_survived() {
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

fn crowd_of_silent_clients_holds_nobody_off_for_good() {
    let world = World::new(&Setup::new("ready"));
    let socket = world.path("kontord.sock");
    let mut crowd: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let asking = std::thread::spawn(move || talk(&socket, b"{\"verb\":\"status\"}\n"));
    crowd.drain(..10);
    assert_eq!(asking.join().unwrap()[0]["status"]["state"], "off");
}

fn start_right_behind_a_stop_waits_for_it() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    for _ in 0..5 {
        let stopping = world.kontor_command(&["stop"]).spawn().unwrap();
        ended(&Ran::from(stopping.wait_with_output().unwrap()), 0, "closed");
        ended(&world.start(), 0, "ready");
    }
    // Nor is the stop itself awaited by whoever starts.
    let stopping = world.kontor_command(&["stop"]).spawn().unwrap();
    let started = world.start();
    ended(&Ran::from(stopping.wait_with_output().unwrap()), 0, "closed");
    // It came before the stop, and was stopped with the rest, or after it, and runs.
    assert!(started.out.ends_with("ready\n"), "{started:?}");
}

fn strangers_are_refused() {
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

/// Kills the installing kontord while it reads `file`, in the middle of it.
fn kill_install_at(world: &World, file: &Path) {
    let content = fs::read(file).unwrap();
    fs::remove_file(file).unwrap();
    make_fifo(file);
    let mut child = world.install().stderr(Stdio::null()).spawn().unwrap();
    let limit = std::time::Instant::now() + PATIENCE;
    // Nobody can write before it reads.
    let not_waiting = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut fifo = loop {
        match OpenOptions::new().write(true).custom_flags(not_waiting).open(file) {
            Ok(fifo) => break fifo,
            Err(error) => assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NXIO.raw_os_error())),
        }
        assert_eq!(child.try_wait().unwrap(), None, "it ended without {}", file.display());
        assert!(std::time::Instant::now() < limit, "it never read {}", file.display());
        std::thread::sleep(Duration::from_millis(5));
    };
    rustix::fs::fcntl_setfl(&fifo, rustix::fs::OFlags::empty()).unwrap();
    fifo.write_all(&content[..content.len() / 2]).unwrap();
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
    drop(fifo);
    fs::remove_file(file).unwrap();
    fs::write(file, content).unwrap();
}

fn make_fifo(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

fn install_killed_at_any_file_leaves_a_whole_release_and_the_next_one_works() {
    let setup = Setup::new("ready");
    let mut world = World::new(&setup);
    // Whole is what a start verifies, and the rest of the pieces too. A start would bring a lease of a time that
    // this host has not reached, and then nothing is installed any more.
    let whole = |world: &World, version: u64| {
        let said = world.kontor(&["doctor"]).out;
        assert!(said.contains(&format!("release: smoke-1 (version {version}) is whole")), "{said}");
    };
    world.publish_newer(&setup);
    let slots = world.slot("").parent().unwrap().to_owned();
    let entries = || fs::read_dir(&slots).unwrap().count();
    kill_install_at(&world, &world.repository.metadata("timestamp.json"));
    for piece in ["kernel", "initrd", "root.img", "sbom.cdx.json", "lock.toml", "segment"] {
        kill_install_at(&world, &world.repository.piece(piece));
        assert_eq!(entries(), 2, "nothing was begun at {piece}");
        whole(&world, 1);
    }

    // When the release is in its place, and its number is not taken note of yet.
    let note = slots.parent().unwrap().join("memory.new");
    make_fifo(&note);
    let mut child = world.install().stderr(Stdio::null()).spawn().unwrap();
    let newer = fs::read(world.path("newer/manifest.json")).unwrap();
    let limit = std::time::Instant::now() + PATIENCE;
    while fs::read(world.slot("manifest.json")).ok().as_ref() != Some(&newer) {
        assert_eq!(child.try_wait().unwrap(), None, "it ended");
        assert!(std::time::Instant::now() < limit, "it never put the release in its place");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
    fs::remove_file(&note).unwrap();
    fs::write(&note, b"{\"seen\":").unwrap();
    whole(&world, 2);

    let installed = world.install().output().unwrap();
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    assert_eq!(entries(), 1, "something is left");
    whole(&world, 2);
    ended(&world.start(), 0, "ready");
    assert_eq!(world.status()["release"]["version"], 2);
}

fn flood_on_every_channel_is_stopped_and_does_not_fill_memory() {
    const MOST_MORE_KIB: u64 = 8 * 1024;
    let mut world = World::new(&Setup::new("flood"));
    let before = world.peak_kib();
    let starting = world.kontor_command(&["start", "--headless"]).spawn().unwrap();
    let qemu = world.await_pid("QEMU was started");
    // Reading its log to here keeps kontord from waiting for the reader.
    world.await_log("the work VM ended");
    let more = world.peak_kib() - before;
    ended(&Ran::from(starting.wait_with_output().unwrap()), 1, "a challenge while another is open");
    assert_eq!(stopped(&world), ("garbage".into(), false));
    assert!(more < MOST_MORE_KIB, "{more} KiB more");
    assert!(world::is_reaped(qemu));
    let log = world.kontor(&["logs"]).out;
    assert!((1 << 18..=1 << 20).contains(&log.len()), "{} bytes of log", log.len());
}

fn one_kontord_for_a_device() {
    let world = World::new(&Setup::new("ready"));
    let second = world.kontord(&["run", "--user"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("kontord already runs"));
    assert_eq!(world.status()["state"], "off");
    // Without --user somebody has to be named.
    let nobody = world.kontord(&["run"]);
    assert_eq!(nobody.status.code(), Some(2));
}

fn kontor_without_kontord_says_so() {
    let world = World::configured(&Setup::new("ready"));
    ended(&world.kontor(&["status"]), 5, "is it running?");
    let missing: PathBuf = world.path("kontord.sock");
    assert!(!missing.exists());
}
