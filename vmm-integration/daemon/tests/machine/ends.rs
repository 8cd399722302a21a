//! Ends that nobody asked for: by the guest, QEMU or the relay.

use crate::{
    ended, run, stopped, tenant,
    world::{self, Ran, Setup, World},
};
use kontor_daemon::{
    daemon::plan,
    lease::Asker,
    office::HttpsOffice,
    session::Times,
    status::{State, Status},
    store::Store,
    vm,
};
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

pub(crate) fn garbage_of_the_guest_stops_it() {
    let (world, ran) = run("garbage");
    ended(&ran, 1, "broke the rules of its channel");
    assert_eq!(stopped(&world), ("garbage".into(), false));
}

pub(crate) fn garbage_on_the_uplink_stops_the_guest() {
    let (world, ran) = run("uplink-garbage");
    ended(&ran, 1, "an uplink frame of 3 bytes");
    assert_eq!(stopped(&world), ("garbage".into(), false));
    assert!(world.status()["relay"]["up"]["malformed"].as_u64().unwrap() > 16);
}

pub(crate) fn guests_own_reason_is_shown() {
    let (world, ran) = run("root-corrupt");
    ended(&ran, 3, "The installed release is damaged");
    assert!(ran.out.ends_with("early\n"), "{ran:?}");
    assert_eq!(stopped(&world), ("root-corrupt".into(), false));
}

pub(crate) fn kernel_panic_on_the_console_is_inferred() {
    let (world, ran) = run("panic");
    ended(&ran, 3, "Kernel panic - not syncing: dm-verity device corrupted");
    ended(&ran, 3, "Kontor concludes this");
    assert_eq!(stopped(&world), ("kernel-panic".into(), true));
}

pub(crate) fn kernel_panic_by_device_is_inferred() {
    let (world, ran) = run("pvpanic");
    ended(&ran, 3, "pvpanic");
    assert_eq!(stopped(&world), ("kernel-panic".into(), true));
}

pub(crate) fn killed_qemu_is_inferred_as_vanished() {
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

pub(crate) fn qemu_that_does_not_start_is_told_with_its_words() {
    let (world, ran) = run("broken");
    ended(&ran, 1, r"exit status: 1) qemu-stub: could not\x1b[2J set up");
    assert_eq!(stopped(&world), ("vanished".into(), true));
}

pub(crate) fn killed_relay_stops_the_guest() {
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

pub(crate) fn silent_guest_is_stopped() {
    let stop = hurried("silent", 100).stop.unwrap();
    assert_eq!((stop.reason.as_str(), stop.inferred), ("silent", false));
    assert_eq!(stop.detail, "nothing more came after start");
}

pub(crate) fn guest_and_qemu_that_are_deaf_are_killed() {
    assert_eq!(hurried("deaf", 100).stop.unwrap().reason, "silent");
}

pub(crate) fn guest_that_does_not_power_off_is_made_to() {
    let status = hurried("stubborn", 20);
    assert_eq!(status.stop.unwrap().reason, "requested");
    assert!(status.ready_at_ms.is_some());
}

pub(crate) fn flood_on_every_channel_is_stopped_and_does_not_fill_memory() {
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
