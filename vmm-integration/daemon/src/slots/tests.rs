#[path = "../../tests/repository/mod.rs"]
mod repository;

use super::*;
use kontor_release::{CommandLine, FORMAT, Image, Verity};
use kontor_repository::RoleError;
use repository::Repository;
use std::os::unix::fs::FileExt;

const TENANT: Digest = Digest([7; 32]);

struct World {
    dir: tempfile::TempDir,
    release: PathBuf,
    repository: Repository,
    store: Store,
}

/// Names and contents of a release's pieces. The initrd's length is no multiple of four.
const PIECES: [(&str, &[u8]); 6] = [
    ("kernel", b"the kernel"),
    ("initrd", b"the initrd"),
    ("root.img", b"the root image"),
    ("sbom.cdx.json", b"{}"),
    ("lock.toml", b"lock"),
    ("segment", b"the segment"),
];

fn piece(name: &str) -> Piece {
    let content = PIECES.iter().find(|(piece, _)| *piece == name).unwrap().1;
    Piece { name: name.into(), bytes: content.len() as u64, sha256: Digest::of(content) }
}

fn manifest(version: u64) -> Manifest {
    let verity = Verity { root_hash: Digest([1; 32]), salt: [2; 32], data_blocks: 3 };
    let line = CommandLine { verity: verity.clone(), built_at: 9, test: true };
    let image = Image {
        format: FORMAT,
        profile: "smoke".into(),
        release: format!("smoke-{version}"),
        built_at: 9,
        test: true,
        memory_mib_min: 128,
        cmdline: format!("quiet {line}"),
        verity,
        kernel: piece("kernel"),
        initrd: piece("initrd"),
        root: piece("root.img"),
        sbom: piece("sbom.cdx.json"),
        lock: piece("lock.toml"),
    };
    Manifest { tenant: TENANT, version, segment: piece("segment"), image }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let release = dir.path().join("release");
        fs::create_dir(&release).unwrap();
        for (name, content) in PIECES {
            fs::write(release.join(name), content).unwrap();
        }
        let store = Store::open(&dir.path().join("state"), TENANT, "laptop-7".parse().unwrap()).unwrap();
        let repository = Repository::new(&dir.path().join("repository"));
        let mut world = Self { dir, release, repository, store };
        world.publish(&manifest(1));
        world
    }

    fn describe(&self, manifest: &Manifest) {
        fs::write(self.release.join(MANIFEST), serde_json::to_vec(manifest).unwrap()).unwrap();
    }

    fn publish(&mut self, manifest: &Manifest) {
        self.describe(manifest);
        self.repository.publish(&self.release);
    }

    /// Version 2, which differs from version 1 in its kernel.
    fn publish_other_kernel(&mut self) {
        let kernel = b"another kernel";
        fs::write(self.release.join("kernel"), kernel).unwrap();
        let mut manifest = manifest(2);
        manifest.image.kernel =
            Piece { name: "kernel".into(), bytes: kernel.len() as u64, sha256: Digest::of(kernel) };
        self.publish(&manifest);
    }

    fn installed() -> Self {
        let world = Self::new();
        world.install().unwrap();
        world
    }

    fn install(&self) -> Result<Manifest, SlotError> {
        install(&self.store, &self.repository.pin(), self.repository.dir.to_str().unwrap())
    }

    fn open(&self) -> Result<Ready, SlotError> {
        open(&self.store, &self.repository.pin())
    }

    /// Installing is refused with exit code 3 and `words`, and what was installed is still there.
    fn refuses(&self, words: &str) {
        let before = self.open().map(|ready| ready.manifest).ok();
        let error = self.install().unwrap_err();
        let said = crate::exit::chain(&error);
        assert!(said.contains(words), "{words:?} is not in: {said}");
        assert_eq!(error.exit(), Exit::NotVerified, "{said}");
        assert_eq!(self.open().map(|ready| ready.manifest).ok(), before);
        assert!(!self.store.slots().join("A.new").exists());
    }

    fn slot(&self, name: &str) -> PathBuf {
        slot_dir(&self.store).join(name)
    }
}

fn flip_a_byte(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 3).unwrap();
}

fn content(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn installed_release_is_ready_for_a_start() {
    let world = World::installed();
    let ready = world.open().unwrap();
    assert_eq!(ready.manifest, manifest(1));
    assert_eq!(content(&ready.kernel), b"the kernel");
    assert_eq!(content(&ready.initrd), b"the initrd\0\0the segment");
    assert_eq!(content(&ready.root), b"the root image");
    assert_eq!(world.store.memory().unwrap().manifest_version, 1);
}

#[test]
fn sealed_pieces_cannot_be_changed_any_more() {
    let ready = World::installed().open().unwrap();
    for mut file in [&ready.kernel, &ready.initrd] {
        assert!(io::Write::write(&mut file, b"x").is_err());
        assert!(file.set_len(1).is_err());
        assert!(file.set_len(1000).is_err());
        let more = fcntl_add_seals(file, SealFlags::FUTURE_WRITE);
        assert_eq!(more, Err(Errno::PERM));
    }
    assert!(io::Write::write(&mut &ready.root, b"x").is_err());
}

#[test]
fn flipped_byte_of_each_piece_is_refused_at_installing_and_the_piece_is_named() {
    for (name, _) in PIECES.iter().filter(|(_, content)| content.len() > 3) {
        let world = World::new();
        flip_a_byte(&world.repository.piece(name));
        world.refuses(&format!("fetch the release's {name}: "));
        assert!(matches!(world.open(), Err(SlotError::Empty)));
    }
}

#[test]
fn flipped_byte_of_each_started_piece_is_refused_at_a_start_and_the_piece_is_named() {
    for name in ["kernel", "initrd", "segment"] {
        let world = World::installed();
        flip_a_byte(&world.slot(name));
        let refused = world.open();
        assert!(matches!(&refused, Err(SlotError::Hash(piece)) if piece == name), "{name}: {refused:?}");
    }
}

#[test]
fn every_piece_is_hashed_on_demand() {
    for (name, _) in PIECES.iter().filter(|(_, content)| content.len() > 3) {
        let world = World::installed();
        assert!(verify_all(&world.store, &world.repository.pin()).is_ok());
        flip_a_byte(&world.slot(name));
        assert!(
            matches!(verify_all(&world.store, &world.repository.pin()), Err(SlotError::Hash(piece)) if piece == *name)
        );
    }
}

#[test]
fn piece_of_another_length_is_refused() {
    for (name, content) in PIECES {
        for length in [content.len() as u64 - 1, content.len() as u64 + 1] {
            let world = World::new();
            let piece = OpenOptions::new().write(true).open(world.repository.piece(name)).unwrap();
            piece.set_len(length).unwrap();
            world.refuses(&format!("the release's {name}"));
        }
    }
    for name in ["kernel", "initrd", "segment", "root.img"] {
        let world = World::installed();
        OpenOptions::new().write(true).open(world.slot(name)).unwrap().set_len(4).unwrap();
        assert!(matches!(world.open(), Err(SlotError::Length { piece, found: 4, .. }) if piece == name));
    }
}

#[test]
fn missing_piece_is_named() {
    let world = World::installed();
    fs::remove_file(world.slot("initrd")).unwrap();
    assert!(matches!(world.open(), Err(SlotError::Piece { piece, .. }) if piece == "initrd"));
}

#[test]
fn link_in_the_place_of_a_piece_is_not_followed() {
    let world = World::installed();
    fs::rename(world.slot("root.img"), world.slot("elsewhere")).unwrap();
    std::os::unix::fs::symlink(world.slot("elsewhere"), world.slot("root.img")).unwrap();
    assert!(matches!(world.open(), Err(SlotError::Piece { piece, .. }) if piece == "root.img"));
}

#[test]
fn half_written_install_is_not_used_and_does_not_hinder_the_next() {
    let mut world = World::installed();
    // What a crash leaves: a directory beside the slot with some of the pieces.
    let beside = world.store.slots().join("A.new");
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("kernel"), b"half").unwrap();
    fs::write(beside.join(MANIFEST), serde_json::to_vec(&manifest(2)).unwrap()).unwrap();
    assert_eq!(world.open().unwrap().manifest.version, 1);
    world.publish(&manifest(2));
    world.install().unwrap();
    assert_eq!(world.open().unwrap().manifest.version, 2);
    assert!(!beside.exists());
}

#[test]
fn refused_install_leaves_the_installed_release_alone() {
    let mut world = World::installed();
    world.publish_other_kernel();
    flip_a_byte(&world.repository.piece("kernel"));
    world.refuses("kernel");
    assert_eq!(world.open().unwrap().manifest.version, 1);
}

#[test]
fn what_the_installed_release_has_is_not_fetched_again() {
    let mut world = World::installed();
    world.publish_other_kernel();
    for (name, _) in PIECES.iter().filter(|(name, _)| *name != "kernel") {
        fs::remove_file(world.repository.piece(name)).unwrap();
    }
    assert_eq!(world.install().unwrap().version, 2);
    assert_eq!(content(&world.open().unwrap().kernel), b"another kernel");
    verify_all(&world.store, &world.repository.pin()).unwrap();
}

#[test]
fn what_the_installed_release_has_with_another_byte_is_fetched() {
    for (name, _) in PIECES.iter().filter(|(_, content)| content.len() > 3) {
        let mut world = World::installed();
        world.publish(&manifest(2));
        flip_a_byte(&world.slot(name));
        assert_eq!(world.install().unwrap().version, 2);
        verify_all(&world.store, &world.repository.pin()).unwrap();
        // Nor is it believed where it cannot be fetched.
        flip_a_byte(&world.slot(name));
        world.publish(&manifest(3));
        fs::remove_file(world.repository.piece(name)).unwrap();
        assert_eq!(world.install().unwrap_err().exit(), Exit::Unreachable);
    }
}

#[test]
fn keyset_of_the_repository_that_is_too_long_is_refused() {
    let mut world = World::new();
    world.repository.add_file("keyset-00000001.json".into(), &vec![b' '; kontor_trust::MAX_ENVELOPE + 1]);
    world.publish(&manifest(1));
    world.refuses("keyset-00000001.json is above a limit");
}

#[test]
fn running_release_is_not_touched_by_an_install() {
    let mut world = World::installed();
    let ready = world.open().unwrap();
    world.publish(&manifest(2));
    world.install().unwrap();
    assert_eq!(content(&ready.root), b"the root image");
}

#[test]
fn release_older_than_one_that_was_seen_is_refused() {
    let mut world = World::installed();
    let old = world.dir.path().join("old");
    copy_tree(&world.store.slots().join(SLOT), &old);
    world.publish(&manifest(5));
    world.install().unwrap();
    // In a newer list of targets, signed by everybody.
    world.publish(&manifest(4));
    world.refuses("the release is of version 4, version 5 was seen before");
    // Nor is an older slot that was put back by hand, with everything that vouched for it.
    fs::remove_dir_all(world.store.slots().join(SLOT)).unwrap();
    fs::rename(old, world.store.slots().join(SLOT)).unwrap();
    assert!(matches!(world.open(), Err(SlotError::Store(StoreError::Older { found: 1, known: 5, .. }))));
    // The same version again is no step back.
    world.publish(&manifest(5));
    assert!(world.install().is_ok());
}

#[test]
fn repository_older_than_what_was_fetched_is_refused() {
    let mut world = World::new();
    let old = world.dir.path().join("old");
    copy_tree(&world.repository.metadata(""), &old);
    world.publish(&manifest(2));
    world.install().unwrap();
    fs::rename(old.join("timestamp.json"), world.repository.metadata("timestamp.json")).unwrap();
    world.refuses("version 1 of timestamp metadata");
}

#[test]
fn release_of_another_tenant_is_refused() {
    let mut world = World::new();
    world.publish(&Manifest { tenant: Digest([8; 32]), ..manifest(1) });
    world.refuses("of another tenant");
}

#[test]
fn newest_of_the_tenants_releases_is_taken() {
    let mut world = World::new();
    let mut desktop = manifest(7);
    desktop.image.profile = "desktop".into();
    world.publish(&desktop);
    let mut theirs = Manifest { tenant: Digest([8; 32]), ..manifest(9) };
    theirs.image.profile = "theirs".into();
    world.publish(&theirs);
    assert_eq!(world.install().unwrap(), desktop);
    assert_eq!(world.open().unwrap().manifest, desktop);
}

#[test]
fn repository_of_another_company_is_refused() {
    let (world, other) = (World::new(), World::new());
    let refused = install(&world.store, &world.repository.pin(), other.repository.dir.to_str().unwrap());
    let said = crate::exit::chain(&refused.unwrap_err());
    assert!(said.contains("1.root.json has the hash"), "{said}");
    // With our first root in front of their releases.
    let own = fs::read(world.repository.metadata("1.root.json")).unwrap();
    fs::write(other.repository.metadata("1.root.json"), own).unwrap();
    let refused = install(&world.store, &world.repository.pin(), other.repository.dir.to_str().unwrap());
    let error = refused.unwrap_err();
    assert!(crate::exit::chain(&error).contains("timestamp"), "{error}");
    assert_eq!(error.exit(), Exit::NotVerified);
}

#[test]
fn changed_metadata_is_refused_at_installing_and_the_role_is_named() {
    for (name, role) in [
        ("1.root.json", "1.root.json"),
        ("timestamp.json", "timestamp"),
        ("1.snapshot.json", "snapshot"),
        ("1.targets.json", "targets"),
    ] {
        let world = World::new();
        flip_a_byte(&world.repository.metadata(name));
        world.refuses(role);
    }
}

/// Changes the signatures of a metadata file.
fn sign_again(file: &Path, change: impl FnOnce(&mut Vec<serde_json::Value>)) {
    let mut role: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(role["signatures"].as_array_mut().unwrap());
    fs::write(file, serde_json::to_vec(&role).unwrap()).unwrap();
}

#[test]
fn unsigned_wrongly_signed_and_doubly_signed_are_refused() {
    let world = World::new();
    let timestamp = world.repository.metadata("timestamp.json");
    let good = fs::read(&timestamp).unwrap();
    sign_again(&timestamp, Vec::clear);
    world.refuses("timestamp");
    fs::write(&timestamp, &good).unwrap();
    sign_again(&timestamp, |signatures| signatures[0]["sig"] = "00".repeat(64).into());
    world.refuses("timestamp");
    fs::write(&timestamp, &good).unwrap();
    sign_again(&timestamp, |signatures| signatures.push(signatures[0].clone()));
    world.refuses("timestamp");
    fs::write(&timestamp, &good).unwrap();
    world.install().unwrap();
}

#[test]
fn release_that_one_person_alone_signed_is_refused() {
    let mut world = World::new();
    world.describe(&manifest(2));
    world.repository.publish_by_one(&world.release);
    world.refuses("Signature threshold of 2 not met for role targets (1 valid signatures)");
}

#[test]
fn expired_metadata_stops_installing_and_never_a_start() {
    let mut world = World::installed();
    world.describe(&manifest(2));
    world.repository.publish_until(&world.release, 1_000_000_000);
    world.refuses("expired");
    // The same as an installed release.
    let tuf = world.slot(TUF);
    fs::remove_dir_all(&tuf).unwrap();
    copy_tree(&world.repository.metadata(""), &tuf);
    fs::copy(world.release.join(MANIFEST), world.slot(MANIFEST)).unwrap();
    assert_eq!(world.open().unwrap().manifest.version, 2);
}

#[test]
fn clock_that_was_once_in_the_future_stops_nothing() {
    let mut world = World::installed();
    let time = world.store.fetched().join("latest_known_time.json");
    assert!(time.exists());
    fs::write(&time, "\"2090-01-01T00:00:00Z\"").unwrap();
    world.open().unwrap();
    world.publish(&manifest(2));
    assert_eq!(world.install().unwrap().version, 2);
}

#[test]
fn lease_of_a_control_that_wrote_a_time_far_ahead_stops_no_installing() {
    let mut world = World::installed();
    let memory = world.dir.path().join("state").join(TENANT.to_string()).join("laptop-7/memory.json");
    let text = fs::read_to_string(&memory).unwrap();
    for issued_at in [repository::FAR, u64::MAX] {
        let text = text.replace("\"issued_at\":0", &format!("\"issued_at\":{issued_at}"));
        fs::write(&memory, text).unwrap();
        assert_eq!(world.store.memory().unwrap().issued_at, issued_at);
        world.install().unwrap();
    }
    world.publish(&manifest(2));
    assert_eq!(world.install().unwrap().version, 2);
}

#[test]
fn clock_far_behind_the_build_of_a_release_stops_installing() {
    let built_at = |version, built_at| {
        let mut manifest = manifest(version);
        let line = CommandLine { verity: manifest.image.verity.clone(), built_at, test: true };
        (manifest.image.built_at, manifest.image.cmdline) = (built_at, format!("quiet {line}"));
        manifest
    };
    let stops = |world: &World, built_at| {
        let refused = world.install().unwrap_err();
        let SlotError::Fetch(FetchError::Clock { built_at: found, .. }) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!((*found, refused.exit()), (built_at, Exit::HostLacks));
    };
    // Of the one that is offered.
    let mut world = World::installed();
    world.publish(&built_at(2, repository::FAR));
    stops(&world, repository::FAR);
    assert_eq!(world.open().unwrap().manifest.version, 1);
    // Of the one that is installed, as by a clock that was right.
    let tuf = world.slot(TUF);
    fs::remove_dir_all(&tuf).unwrap();
    copy_tree(&world.repository.metadata(""), &tuf);
    fs::copy(world.release.join(MANIFEST), world.slot(MANIFEST)).unwrap();
    world.publish(&built_at(3, 9));
    stops(&world, repository::FAR);
    assert_eq!(world.open().unwrap().manifest.version, 2);
    // One that is damaged stops nothing.
    fs::write(world.slot(MANIFEST), "{}").unwrap();
    assert_eq!(world.install().unwrap().version, 3);
}

#[test]
fn new_root_is_followed_kept_and_not_forgotten() {
    let mut world = World::installed();
    world.repository.add_root(2);
    world.publish(&manifest(2));
    world.install().unwrap();
    assert!(world.slot("tuf/2.root.json").exists());
    world.open().unwrap();
    // A repository that withholds it does not bring the old one back.
    fs::remove_file(world.repository.metadata("2.root.json")).unwrap();
    world.install().unwrap();
    assert!(world.slot("tuf/2.root.json").exists());
}

#[test]
fn changed_metadata_of_the_slot_is_refused_at_a_start_and_the_file_is_named() {
    for name in ["timestamp.json", "1.snapshot.json", "1.targets.json"] {
        let world = World::installed();
        flip_a_byte(&world.slot(&format!("tuf/{name}")));
        let refused = world.open().unwrap_err();
        let SlotError::Metadata(MetadataError::Role { file, .. }) = &refused else { panic!("{refused:?}") };
        assert_eq!(file, name);
        fs::remove_file(world.slot(&format!("tuf/{name}"))).unwrap();
        let refused = world.open().unwrap_err();
        let SlotError::Metadata(MetadataError::Role { file, source: RoleError::Absent }) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!(file, name);
    }
    let world = World::installed();
    flip_a_byte(&world.slot("tuf/1.root.json"));
    assert!(matches!(world.open(), Err(SlotError::Metadata(MetadataError::OtherRoot { .. }))));
    fs::remove_file(world.slot("tuf/1.root.json")).unwrap();
    assert!(matches!(world.open(), Err(SlotError::Metadata(MetadataError::NoRoot))));
}

#[test]
fn manifest_that_nobody_signed_is_not_started() {
    let world = World::installed();
    flip_a_byte(&world.slot(MANIFEST));
    assert!(matches!(world.open(), Err(SlotError::Hash(piece)) if piece == MANIFEST));
    fs::write(world.slot(MANIFEST), serde_json::to_vec(&manifest(2)).unwrap()).unwrap();
    assert!(matches!(world.open(), Err(SlotError::Hash(piece)) if piece == MANIFEST));
}

#[test]
fn repository_that_is_not_there_is_out_of_reach() {
    let world = World::new();
    let pin = world.repository.pin();
    for (place, exit) in [("/nonexistent", Exit::Unreachable), ("https://example.org/", Exit::Usage)] {
        assert_eq!(install(&world.store, &pin, place).unwrap_err().exit(), exit, "{place}");
    }
    fs::remove_file(world.repository.piece("initrd")).unwrap();
    let error = world.install().unwrap_err();
    assert_eq!(error.exit(), Exit::Unreachable, "{error}");
    // By URL it is the same repository.
    let world = World::new();
    let url = format!("file://{}", world.repository.dir.display());
    assert_eq!(install(&world.store, &world.repository.pin(), &url).unwrap(), manifest(1));
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &to)
        } else {
            fs::copy(entry.path(), to).map(drop).unwrap()
        }
    }
}

#[test]
fn two_pieces_of_one_name_are_refused() {
    let mut world = World::new();
    let mut double = manifest(1);
    double.segment = double.image.kernel.clone();
    world.publish(&double);
    assert!(matches!(world.install(), Err(SlotError::Piece { piece, .. }) if piece == "kernel"));

    for name in [MANIFEST, TUF, "arriving"] {
        let mut world = World::new();
        let mut own = manifest(1);
        own.segment.name = name.into();
        // Whole and signed: nothing is wrong with it but the name.
        fs::write(world.release.join(name), b"the segment").unwrap();
        world.publish(&own);
        assert!(world.install().is_err(), "{name}");
    }
}

#[test]
fn piece_that_is_held_in_memory_has_a_limit() {
    for (bytes, refused) in [(MAX_BOOT_PIECE, false), (MAX_BOOT_PIECE + 1, true)] {
        let mut world = World::installed();
        let mut large = manifest(1);
        large.image.kernel.bytes = bytes;
        world.publish(&large);
        fs::remove_dir_all(world.slot(TUF)).unwrap();
        copy_tree(&world.repository.metadata(""), &world.slot(TUF));
        fs::copy(world.release.join(MANIFEST), world.slot(MANIFEST)).unwrap();
        let error = world.open().unwrap_err();
        assert_eq!(matches!(error, SlotError::TooLarge { .. }), refused, "{error:?}");
    }
}
