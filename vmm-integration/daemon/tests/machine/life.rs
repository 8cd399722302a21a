//! A work VM's life: start, boot, renewal, stop, and the end of kontord.

use crate::{
    ended, run, stopped, tenant,
    world::{self, Ran, Setup, World, own_program},
};
use rustix::process::Signal;
use std::fs;

pub(crate) fn boot_reaches_ready_and_stop_powers_off() {
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

pub(crate) fn renewed_lease_moves_the_end() {
    let (mut world, ran) = run("again");
    ended(&ran, 0, "ready");
    // The first answer was the boot's.
    world.await_log("the office was asked");
    world.await_log("the office was asked");
    ended(&world.kontor(&["stop"]), 0, "closed");
    let log = world.kontor(&["logs"]).out;
    assert!(log.contains("\nrenewed\n"), "{log}");
}

pub(crate) fn second_start_follows_the_first() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    let again = world.start();
    ended(&again, 0, "ready");
    assert_eq!(again.out, ran.out);
}

pub(crate) fn machine_starts_again_after_a_stop() {
    let (world, ran) = run("ready");
    ended(&ran, 0, "ready");
    ended(&world.kontor(&["stop"]), 0, "closed");
    ended(&world.start(), 0, "ready");
    assert_eq!(world.status()["stop"], serde_json::Value::Null);
}

pub(crate) fn start_right_behind_a_stop_waits_for_it() {
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

pub(crate) fn start_with_a_window_is_not_there_yet() {
    let world = World::new(&Setup::new("ready"));
    ended(&world.kontor(&["start"]), 4, "kontor start --headless");
    assert_eq!(world.status()["state"], "off");
}

pub(crate) fn terminated_kontord_leaves_nothing_behind() {
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

pub(crate) fn second_signal_hurries() {
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

pub(crate) fn killed_kontord_takes_everything_with_it() {
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
