//! From an image that belongs to nobody to a tenant's release: the tenant's segment, and the manifest
//! that names every piece.
//!
//! ```text
//! /tenant/id                      64 hexadecimal digits and a newline
//! /tenant/keyset-00000001.json …  every keyset as signed, rising, whole
//! ```

use crate::{
    Failure,
    build::IMAGE,
    cpio,
    exit::Exit,
    files::{self, FileError},
    out::Output,
};
use kontor_release::{Image, MAX_MANIFEST, MAX_SEGMENT_KEYSETS, Manifest, ManifestError, Piece};
use kontor_trust::{Digest, DigestError, KeysetError, MAX_ENVELOPE, TrustedKeyset};
use std::path::{Path, PathBuf};

/// A release that cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0} is no description of an image")]
    Image(PathBuf, #[source] ManifestError),
    #[error("{path} is not what {IMAGE} says: it has {found}, and {expected} is expected")]
    Piece { path: PathBuf, found: Digest, expected: Digest },
    #[error("{0} is no tenant's id")]
    Id(PathBuf, #[source] DigestError),
    #[error("{0} has no keysets; kontorctl keyset init makes the first")]
    NoKeysets(PathBuf),
    #[error("{0} has more than {MAX_SEGMENT_KEYSETS} keysets")]
    TooManyKeysets(PathBuf),
    #[error("keyset {0} is not the tenant's")]
    Keyset(PathBuf, #[source] KeysetError),
    #[error("pack the tenant's segment")]
    Segment(#[from] cpio::CpioError),
    #[error("the finished manifest is not valid")]
    Manifest(#[source] ManifestError),
}

impl SignError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Image(..) | Self::Piece { .. } | Self::Keyset(..) => Exit::NotVerified,
            Self::Id(..) | Self::NoKeysets(_) | Self::TooManyKeysets(_) => Exit::Usage,
            Self::Segment(_) | Self::Manifest(_) => Exit::Bug,
        }
    }
}

/// Makes the release of `image` for the tenant in `tenant`, at `out`.
pub(crate) fn sign(image: &Path, tenant: &Path, version: u64, out: &Path) -> Result<Manifest, Failure> {
    let output = Output::begin(out)?;
    let manifest = write(image, tenant, version, output.path())?;
    output.publish()?;
    Ok(manifest)
}

fn write(from: &Path, tenant: &Path, version: u64, to: &Path) -> Result<Manifest, SignError> {
    let description = from.join(IMAGE);
    let bytes = files::read(&description, MAX_MANIFEST as u64)?;
    let image = Image::parse(&bytes).map_err(|e| SignError::Image(description, e))?;
    for piece in image.pieces() {
        let path = to.join(&piece.name);
        files::link_or_copy(&from.join(&piece.name), &path)?;
        // Measured where it will lie: a copy that went wrong is noticed too.
        let (bytes, sha256) = files::measure(&path)?;
        if (bytes, sha256) != (piece.bytes, piece.sha256) {
            let path = from.join(&piece.name);
            return Err(SignError::Piece { path, found: sha256, expected: piece.sha256 });
        }
    }
    let (tenant, segment) = segment(tenant)?;
    files::write_new(&to.join(SEGMENT), &segment)?;
    let segment = Piece { name: SEGMENT.into(), bytes: segment.len() as u64, sha256: Digest::of(&segment) };
    let manifest = Manifest { tenant, version, segment, image };
    let mut text = serde_json::to_vec_pretty(&manifest).expect("text and numbers serialize");
    text.push(b'\n');
    Manifest::parse(&text).map_err(SignError::Manifest)?;
    files::write_new(&to.join(MANIFEST), &text)?;
    Ok(manifest)
}

/// The tenant and its segment, with a chain of keysets that holds from the first to the last.
fn segment(tenant: &Path) -> Result<(Digest, Vec<u8>), SignError> {
    let (id, keysets) = keysets(tenant)?;
    let mut archive = cpio::Archive::default();
    archive.directory("tenant");
    archive.file("tenant/id", 0o644, format!("{id}\n").into_bytes())?;
    for (version, envelope) in keysets {
        archive.file(&format!("tenant/keyset-{version:08}.json"), 0o644, envelope)?;
    }
    Ok((id, archive.to_bytes()))
}

/// Envelopes by version, rising.
pub(crate) type Keysets = Vec<(u64, Vec<u8>)>;

/// The tenant in a directory, and the envelopes of its keysets by version: at least one, and a chain that
/// holds from the first to the last.
pub(crate) fn keysets(tenant: &Path) -> Result<(Digest, Keysets), SignError> {
    let id_path = tenant.join("id");
    let id: Digest =
        files::read_text(&id_path, MAX_ID)?.trim_end().parse().map_err(|e| SignError::Id(id_path, e))?;
    let directory = tenant.join("keysets");
    let names: Vec<String> =
        files::list(&directory)?.into_iter().filter(|name| name.ends_with(".json")).collect();
    if names.len() > MAX_SEGMENT_KEYSETS {
        return Err(SignError::TooManyKeysets(directory));
    }
    let mut keysets = Vec::with_capacity(names.len());
    let mut newest: Option<TrustedKeyset> = None;
    for name in names {
        let path = directory.join(name);
        let envelope = files::read(&path, MAX_ENVELOPE as u64)?;
        let keyset = match &newest {
            None => TrustedKeyset::first(&envelope, &id),
            Some(keyset) => keyset.advance(&envelope),
        };
        let keyset = keyset.map_err(|e| SignError::Keyset(path, e))?;
        keysets.push((keyset.version(), envelope));
        newest = Some(keyset);
    }
    if keysets.is_empty() { Err(SignError::NoKeysets(directory)) } else { Ok((id, keysets)) }
}

pub(crate) const MANIFEST: &str = "manifest.json";
const SEGMENT: &str = "segment";
/// Most bytes of the file with the tenant's id.
const MAX_ID: u64 = 80;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::root_image;
    use kontor_release::{CommandLine, FORMAT, Verity};
    use kontor_trust::{Keyset, KeysetKind, Member, Role, Roles, SecretKey};
    use std::fs;

    fn role(person: &str, key: &SecretKey) -> Role {
        let member = Member { person: person.parse().unwrap(), key: key.public() };
        Role { threshold: 1, keys: vec![member] }
    }

    fn keyset(tenant: Option<Digest>, version: u64, root: &SecretKey) -> Vec<u8> {
        let [a, b] = [(); 2].map(|()| SecretKey::generate().unwrap());
        let it = || role("it", &a);
        let roles =
            Roles { policy: it(), command: it(), destroy: it(), enrol: it(), lease: role("control", &b) };
        let keyset = Keyset { tenant, version, root: role("root", root), roles, control_spki: Vec::new() };
        keyset.payload()
    }

    /// A tenant with two keysets.
    pub(crate) fn tenant(at: &Path) -> Digest {
        let root = SecretKey::generate().unwrap();
        let first = keyset(None, 1, &root);
        let id = Digest::of(&first);
        let second = keyset(Some(id), 2, &root);
        fs::create_dir_all(at.join("keysets")).unwrap();
        fs::write(at.join("id"), format!("{id}\n")).unwrap();
        for (name, payload) in [("00000001.json", first), ("00000002.json", second)] {
            let envelope = kontor_trust::sign::<KeysetKind>(&payload, &[&root]);
            fs::write(at.join("keysets").join(name), envelope).unwrap();
        }
        id
    }

    /// An image whose pieces are small and right.
    pub(crate) fn image(at: &Path) -> Image {
        fs::create_dir_all(at).unwrap();
        let piece = |name: &str, content: &[u8]| {
            fs::write(at.join(name), content).unwrap();
            Piece { name: name.into(), bytes: content.len() as u64, sha256: Digest::of(content) }
        };
        let salt = [1; 32];
        let mut root = vec![7; crate::verity::BLOCK];
        let tree = crate::verity::tree(&root[..], 1, &salt).unwrap();
        root.extend(tree.blocks);
        let verity = Verity { root_hash: tree.root, salt, data_blocks: 1 };
        let line = CommandLine { verity: verity.clone(), built_at: 9, test: true };
        let image = Image {
            format: FORMAT,
            profile: "smoke".into(),
            release: "smoke-1".into(),
            built_at: 9,
            test: true,
            memory_mib_min: 128,
            cmdline: line.to_string(),
            verity,
            kernel: piece("kernel", b"kernel"),
            initrd: piece("initrd", b"initrd"),
            root: piece("root.img", &root),
            sbom: piece("sbom.cdx.json", b"{}"),
            lock: piece("lock.toml", b""),
        };
        assert!(root_image::fits(&at.join("root.img"), &image.verity).unwrap());
        fs::write(at.join(IMAGE), serde_json::to_vec(&image).unwrap()).unwrap();
        image
    }

    struct Scene {
        dir: tempfile::TempDir,
        tenant: Digest,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            image(&dir.path().join("image"));
            let tenant = tenant(&dir.path().join("tenant"));
            Self { dir, tenant }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn sign(&self) -> Result<Manifest, Failure> {
            sign(&self.path("image"), &self.path("tenant"), 3, &self.path("release"))
        }

        /// The error, and proof that it left nothing.
        fn refused(&self) -> Failure {
            let error = self.sign().unwrap_err();
            assert_eq!(files::list(self.dir.path()).unwrap(), ["image", "tenant"]);
            error
        }
    }

    #[test]
    fn release_has_every_piece_and_the_keysets_in_order() {
        let scene = Scene::new();
        let manifest = scene.sign().unwrap();
        assert_eq!((manifest.tenant, manifest.version), (scene.tenant, 3));
        let bytes = fs::read(scene.path("release").join(MANIFEST)).unwrap();
        assert_eq!(Manifest::parse(&bytes).unwrap(), manifest);
        for piece in manifest.pieces() {
            let measured = files::measure(&scene.path("release").join(&piece.name)).unwrap();
            assert_eq!(measured, (piece.bytes, piece.sha256), "{}", piece.name);
        }
        let segment = fs::read(scene.path("release/segment")).unwrap();
        let text = String::from_utf8_lossy(&segment);
        let at = |name: &str| text.find(name).unwrap();
        assert!(text.contains(&format!("{}\n", scene.tenant)));
        assert!(at("tenant/id\0") < at("tenant/keyset-00000001.json\0"));
        assert!(at("tenant/keyset-00000001.json\0") < at("tenant/keyset-00000002.json\0"));
    }

    #[test]
    fn signing_again_replaces_the_release_with_the_same_bytes() {
        let scene = Scene::new();
        scene.sign().unwrap();
        let before = fs::read(scene.path("release/segment")).unwrap();
        scene.sign().unwrap();
        assert_eq!(fs::read(scene.path("release/segment")).unwrap(), before);
    }

    #[test]
    fn image_with_a_changed_byte_is_refused() {
        let scene = Scene::new();
        fs::write(scene.path("image/kernel"), b"kernem").unwrap();
        let error = scene.refused();
        assert!(matches!(error, Failure::Sign(SignError::Piece { .. })), "{error}");
        assert_eq!(error.exit(), Exit::NotVerified);
    }

    #[test]
    fn keysets_of_another_tenant_are_refused() {
        let scene = Scene::new();
        fs::write(scene.path("tenant/id"), format!("{}\n", Digest([0; 32]))).unwrap();
        let error = scene.refused();
        assert!(matches!(error, Failure::Sign(SignError::Keyset(_, KeysetError::NotTheFirst { .. }))));
        assert_eq!(error.exit(), Exit::NotVerified);
    }

    #[test]
    fn chain_with_a_gap_is_refused() {
        let scene = Scene::new();
        fs::remove_file(scene.path("tenant/keysets/00000001.json")).unwrap();
        assert_eq!(scene.refused().exit(), Exit::NotVerified);
        fs::remove_file(scene.path("tenant/keysets/00000002.json")).unwrap();
        assert!(matches!(scene.refused(), Failure::Sign(SignError::NoKeysets(_))));
    }

    #[test]
    fn tenant_with_too_many_keysets_is_refused() {
        let scene = Scene::new();
        for number in 3..=MAX_SEGMENT_KEYSETS + 1 {
            fs::write(scene.path(&format!("tenant/keysets/{number:08}.json")), "").unwrap();
        }
        assert!(matches!(scene.refused(), Failure::Sign(SignError::TooManyKeysets(_))));
        fs::remove_file(scene.path(&format!("tenant/keysets/{:08}.json", MAX_SEGMENT_KEYSETS + 1))).unwrap();
        // As many as allowed are read: the third is found to be no keyset.
        assert!(matches!(scene.refused(), Failure::Sign(SignError::Keyset(..))));
    }

    #[test]
    fn id_that_is_no_digest_is_refused() {
        let scene = Scene::new();
        fs::write(scene.path("tenant/id"), "acme\n").unwrap();
        assert!(matches!(scene.refused(), Failure::Sign(SignError::Id(..))));
    }
}
