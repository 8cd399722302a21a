//! What is looked at before a start, by a start or by the doctor.

use crate::{
    ended, run_with,
    world::{self, Ran, Setup, World},
};
use rustix::process::Signal;
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

pub(crate) fn emulation_and_test_images_need_the_policy() {
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

pub(crate) fn release_below_the_floor_is_not_started() {
    let setup = Setup { bundle: |bundle| bundle.min_release = 2, ..Setup::new("ready") };
    ended(&run_with(&setup).1, 4, "older than the policy allows (2)");
    let setup = Setup {
        bundle: |bundle| bundle.min_release = 2,
        manifest: |manifest| manifest.version = 2,
        ..Setup::new("ready")
    };
    ended(&run_with(&setup).1, 0, "ready");
}

pub(crate) fn release_that_needs_more_memory_is_not_started() {
    let setup = Setup { manifest: |manifest| manifest.image.memory_mib_min = 257, ..Setup::new("ready") };
    ended(&run_with(&setup).1, 4, "needs 257 MiB");
    let setup = Setup { manifest: |manifest| manifest.image.memory_mib_min = 256, ..Setup::new("ready") };
    ended(&run_with(&setup).1, 0, "ready");
}

pub(crate) fn changed_release_is_not_started_and_the_piece_is_named() {
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

pub(crate) fn what_is_missing_is_said() {
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

pub(crate) fn doctor_says_what_is_missing_and_what_is_well() {
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

/// How long a trial of KVM waits for a guest that says nothing.
const TRIAL: Duration = Duration::from_secs(10);

pub(crate) fn stop_ends_a_start_that_tries_kvm() {
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("skipped: this host has no KVM, or not for this user");
        return;
    }
    let mut world = World::installed(&Setup::new("ready"));
    world.configure("kvm", "/dev/kvm");
    world.serve();
    let starting = world.kontor_command(&["start", "--headless"]).spawn().unwrap();
    let trial = world.await_process("a trial of KVM has begun");
    let asked = Instant::now();
    ended(&world.kontor(&["stop"]), 0, "stopped before it ran");
    assert!(asked.elapsed() < TRIAL, "{:?}", asked.elapsed());
    ended(&Ran::from(starting.wait_with_output().unwrap()), 0, "stopped before it ran");
    trial.await_end();
    // That was no verdict: the next start tries again.
    let starting = world.kontor_command(&["start", "--headless"]).spawn().unwrap();
    world.await_process("a trial of KVM has begun").kill(Signal::KILL);
    ended(&Ran::from(starting.wait_with_output().unwrap()), 0, "ready");
}

pub(crate) fn start_waits_for_the_doctors_trial_of_kvm_and_takes_its_result() {
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
