//! Ends that nobody asked for: by the guest, QEMU or the relay.

use crate::{
    ended, run, stopped,
    world::{self, Ran, Setup, World},
};
use rustix::process::Signal;

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
