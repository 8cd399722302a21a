//! Installing a release.

use crate::{
    PATIENCE, ended, make_fifo,
    world::{Setup, World},
};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::Stdio,
    time::Duration,
};

pub(crate) fn keyset_that_the_repository_has_is_installed_with_the_release() {
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

pub(crate) fn install_killed_at_any_file_leaves_a_whole_release_and_the_next_one_works() {
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
