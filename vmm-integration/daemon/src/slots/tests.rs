use super::*;
use kontor_release::{CommandLine, FORMAT, Image, Verity};
use std::os::unix::fs::FileExt;

const TENANT: Digest = Digest([7; 32]);

struct World {
    _dir: tempfile::TempDir,
    release: PathBuf,
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
        let world = Self { _dir: dir, release, store };
        world.describe(&manifest(1));
        world
    }

    fn describe(&self, manifest: &Manifest) {
        fs::write(self.release.join(MANIFEST), serde_json::to_vec(manifest).unwrap()).unwrap();
    }

    fn installed() -> Self {
        let world = Self::new();
        world.install().unwrap();
        world
    }

    fn install(&self) -> Result<Manifest, SlotError> {
        install(&self.store, &self.release)
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
    let ready = open(&world.store).unwrap();
    assert_eq!(ready.manifest, manifest(1));
    assert_eq!(content(&ready.kernel), b"the kernel");
    assert_eq!(content(&ready.initrd), b"the initrd\0\0the segment");
    assert_eq!(content(&ready.root), b"the root image");
    assert_eq!(world.store.memory().unwrap().manifest_version, 1);
}

#[test]
fn sealed_pieces_cannot_be_changed_any_more() {
    let ready = open(&World::installed().store).unwrap();
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
    for (name, content) in PIECES.iter().filter(|(_, content)| content.len() > 3) {
        let world = World::new();
        flip_a_byte(&world.release.join(name));
        let refused = world.install();
        assert!(matches!(&refused, Err(SlotError::Hash(piece)) if piece == name), "{name}: {refused:?}");
        assert!(matches!(open(&world.store), Err(SlotError::Empty)));
        assert!(!content.is_empty());
    }
}

#[test]
fn flipped_byte_of_each_started_piece_is_refused_at_a_start_and_the_piece_is_named() {
    for name in ["kernel", "initrd", "segment"] {
        let world = World::installed();
        flip_a_byte(&world.slot(name));
        let refused = open(&world.store);
        assert!(matches!(&refused, Err(SlotError::Hash(piece)) if piece == name), "{name}: {refused:?}");
    }
}

#[test]
fn every_piece_is_hashed_on_demand() {
    for (name, _) in PIECES.iter().filter(|(_, content)| content.len() > 3) {
        let world = World::installed();
        assert!(verify_all(&world.store).is_ok());
        flip_a_byte(&world.slot(name));
        assert!(matches!(verify_all(&world.store), Err(SlotError::Hash(piece)) if piece == *name));
    }
}

#[test]
fn piece_of_another_length_is_refused() {
    for (name, content) in PIECES {
        for length in [content.len() as u64 - 1, content.len() as u64 + 1] {
            let world = World::new();
            OpenOptions::new().write(true).open(world.release.join(name)).unwrap().set_len(length).unwrap();
            assert!(matches!(world.install(), Err(SlotError::Length { piece, .. }) if piece == name));
        }
    }
    for name in ["kernel", "initrd", "segment", "root.img"] {
        let world = World::installed();
        OpenOptions::new().write(true).open(world.slot(name)).unwrap().set_len(4).unwrap();
        assert!(
            matches!(open(&world.store), Err(SlotError::Length { piece, found: 4, .. }) if piece == name)
        );
    }
}

#[test]
fn missing_piece_is_named() {
    let world = World::installed();
    fs::remove_file(world.slot("initrd")).unwrap();
    assert!(matches!(open(&world.store), Err(SlotError::Piece { piece, .. }) if piece == "initrd"));
}

#[test]
fn link_in_the_place_of_a_piece_is_not_followed() {
    let world = World::installed();
    fs::rename(world.slot("root.img"), world.slot("elsewhere")).unwrap();
    std::os::unix::fs::symlink(world.slot("elsewhere"), world.slot("root.img")).unwrap();
    assert!(matches!(open(&world.store), Err(SlotError::Piece { piece, .. }) if piece == "root.img"));
}

#[test]
fn half_written_install_is_not_used_and_does_not_hinder_the_next() {
    let world = World::installed();
    // What a crash leaves: a directory beside the slot with some of the pieces.
    let beside = world.store.slots().join("A.new");
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("kernel"), b"half").unwrap();
    fs::write(beside.join(MANIFEST), serde_json::to_vec(&manifest(2)).unwrap()).unwrap();
    assert_eq!(open(&world.store).unwrap().manifest.version, 1);
    world.describe(&manifest(2));
    world.install().unwrap();
    assert_eq!(open(&world.store).unwrap().manifest.version, 2);
    assert!(!beside.exists());
}

#[test]
fn refused_install_leaves_the_installed_release_alone() {
    let world = World::installed();
    world.describe(&manifest(2));
    flip_a_byte(&world.release.join("kernel"));
    assert!(world.install().is_err());
    assert_eq!(open(&world.store).unwrap().manifest.version, 1);
}

#[test]
fn running_release_is_not_touched_by_an_install() {
    let world = World::installed();
    let ready = open(&world.store).unwrap();
    world.describe(&manifest(2));
    world.install().unwrap();
    assert_eq!(content(&ready.root), b"the root image");
}

#[test]
fn release_older_than_one_that_was_seen_is_refused() {
    let world = World::new();
    world.describe(&manifest(5));
    world.install().unwrap();
    world.describe(&manifest(4));
    let refused = world.install();
    assert!(matches!(refused, Err(SlotError::Store(StoreError::Older { found: 4, known: 5, .. }))));
    // Nor is an older slot that was put back by hand.
    fs::write(world.slot(MANIFEST), serde_json::to_vec(&manifest(4)).unwrap()).unwrap();
    assert!(matches!(open(&world.store), Err(SlotError::Store(StoreError::Older { found: 4, .. }))));
    // The same version again is no step back.
    world.describe(&manifest(5));
    assert!(world.install().is_ok());
}

#[test]
fn release_of_another_tenant_is_refused() {
    let world = World::new();
    world.describe(&Manifest { tenant: Digest([8; 32]), ..manifest(1) });
    assert!(matches!(world.install(), Err(SlotError::OtherTenant)));
}

#[test]
fn two_pieces_of_one_name_are_refused() {
    let world = World::new();
    let mut double = manifest(1);
    double.segment = double.image.kernel.clone();
    world.describe(&double);
    assert!(matches!(world.install(), Err(SlotError::Piece { piece, .. }) if piece == "kernel"));

    let world = World::new();
    let mut own = manifest(1);
    own.segment.name = MANIFEST.into();
    world.describe(&own);
    assert!(world.install().is_err());
}

#[test]
fn piece_that_is_held_in_memory_has_a_limit() {
    let world = World::installed();
    for (bytes, refused) in [(MAX_BOOT_PIECE, false), (MAX_BOOT_PIECE + 1, true)] {
        let mut large = manifest(1);
        large.image.kernel.bytes = bytes;
        fs::write(world.slot(MANIFEST), serde_json::to_vec(&large).unwrap()).unwrap();
        let error = open(&world.store).unwrap_err();
        assert_eq!(matches!(error, SlotError::TooLarge { .. }), refused, "{error:?}");
    }
}
