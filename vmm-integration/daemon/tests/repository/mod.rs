//! A release repository in a directory, with all of its keys: good, until a test bends it.

use kontor_release::{Digest, Manifest};
use kontor_repository::{
    Draft, METADATA, Metadata, Signer, Staff, TARGETS, TIMESTAMP, Target, TrustedRoot, Verified, gather,
    manifest_target, new_root, piece_target, root_file, seal, snapshot_file, target_file, targets_file,
    verify,
};
use kontor_trust::SecretKey;
use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    num::NonZeroU64,
    path::{Path, PathBuf},
};

/// The year 2100, in Unix seconds.
pub(crate) const FAR: u64 = 4_102_444_800;

pub(crate) struct Repository {
    pub(crate) dir: PathBuf,
    signers: Vec<Signer>,
    staff: Staff,
    roots: Vec<Vec<u8>>,
    targets: BTreeMap<String, Target>,
}

fn signer() -> (Signer, kontor_trust::PublicKey) {
    let secret = SecretKey::generate().unwrap();
    (Signer::new(&secret).unwrap(), secret.public())
}

impl Repository {
    /// An empty repository whose releases two of two persons sign.
    pub(crate) fn new(dir: &Path) -> Self {
        for part in [METADATA, TARGETS] {
            fs::create_dir_all(dir.join(part)).unwrap();
        }
        let people: [_; 7] = std::array::from_fn(|_| signer());
        let public: Vec<_> = people.iter().map(|(_, public)| *public).collect();
        let staff = Staff {
            root: public[..3].to_vec(),
            root_threshold: 2,
            targets: public[3..5].to_vec(),
            targets_threshold: 2,
            snapshot: public[5],
            timestamp: public[6],
        };
        let signers = people.into_iter().map(|(signer, _)| signer).collect();
        let mut repository =
            Self { dir: dir.into(), signers, staff, roots: Vec::new(), targets: BTreeMap::new() };
        repository.add_root(2);
        repository
    }

    /// What the PC knows the repository by.
    pub(crate) fn pin(&self) -> Digest {
        Digest::of(&self.roots[0])
    }

    /// One more root: the same persons, of whom so many sign a release.
    pub(crate) fn add_root(&mut self, threshold: u64) {
        let staff = Staff { targets_threshold: threshold, ..self.staff.clone() };
        let version = self.roots.len() as u64 + 1;
        let signers: Vec<&Signer> = self.signers[..2].iter().collect();
        let root = new_root(NonZeroU64::new(version).unwrap(), &staff, FAR, &signers).unwrap();
        fs::write(self.metadata(&root_file(version)), &root).unwrap();
        self.roots.push(root);
    }

    pub(crate) fn metadata(&self, name: &str) -> PathBuf {
        self.dir.join(METADATA).join(name)
    }

    /// Where the content of a piece lies.
    pub(crate) fn piece(&self, name: &str) -> PathBuf {
        let name = format!("smoke.{name}");
        self.dir.join(TARGETS).join(target_file(&name, &self.targets[&name].sha256))
    }

    fn current(&self) -> Option<Verified> {
        let metadata = self.gather();
        (!metadata.timestamp.is_empty()).then(|| verify(&metadata, &self.pin()).unwrap())
    }

    fn gather(&self) -> Metadata {
        let Ok(metadata) = gather(|name| Ok::<_, Infallible>(fs::read(self.metadata(name)).ok()));
        metadata
    }

    /// Publishes a release directory under the signatures of everybody.
    pub(crate) fn publish(&mut self, release: &Path) {
        self.publish_until(release, FAR);
    }

    /// The same, to expire at a time.
    pub(crate) fn publish_until(&mut self, release: &Path, expires: u64) {
        self.add(release);
        let root = TrustedRoot::follow(&self.roots, &self.pin()).unwrap();
        self.seal(&root, expires, |_| true);
    }

    /// The same without the second of those who vouch for releases, as if one were enough.
    pub(crate) fn publish_by_one(&mut self, release: &Path) {
        self.add(release);
        let lax = Staff { targets_threshold: 1, ..self.staff.clone() };
        let signers: Vec<&Signer> = self.signers.iter().collect();
        let root = new_root(NonZeroU64::MIN, &lax, FAR, &signers).unwrap();
        let root = TrustedRoot::follow(std::slice::from_ref(&root), &Digest::of(&root)).unwrap();
        self.seal(&root, FAR, |number| number != 4);
    }

    fn add(&mut self, release: &Path) {
        let text = fs::read(release.join("manifest.json")).unwrap();
        let manifest: Manifest = serde_json::from_slice(&text).unwrap();
        let profile = &manifest.image.profile;
        let target = Target { bytes: text.len() as u64, sha256: Digest::of(&text) };
        self.put(manifest_target(profile), target, &text);
        for piece in manifest.pieces() {
            let target = Target { bytes: piece.bytes, sha256: piece.sha256 };
            let content = fs::read(release.join(&piece.name)).unwrap_or_default();
            self.put(piece_target(profile, piece), target, &content);
        }
    }

    /// One more file, which the next publication names.
    pub(crate) fn add_file(&mut self, name: String, content: &[u8]) {
        let target = Target { bytes: content.len() as u64, sha256: Digest::of(content) };
        self.put(name, target, content);
    }

    fn put(&mut self, name: String, target: Target, content: &[u8]) {
        fs::write(self.dir.join(TARGETS).join(target_file(&name, &target.sha256)), content).unwrap();
        self.targets.insert(name, target);
    }

    fn seal(&self, root: &TrustedRoot, expires: u64, signs: impl Fn(usize) -> bool) {
        let previous = self.current();
        let people: Vec<&Signer> =
            self.signers.iter().enumerate().filter(|(number, _)| signs(*number)).map(|(_, s)| s).collect();
        let mut draft = Draft::new(previous.as_ref(), &self.targets, expires).unwrap();
        draft.sign(root, &people).unwrap();
        let sealed = seal(root, &draft, previous.as_ref(), expires, &people).unwrap();
        fs::write(self.metadata(&targets_file(sealed.targets.0)), sealed.targets.1).unwrap();
        fs::write(self.metadata(&snapshot_file(sealed.snapshot.0)), sealed.snapshot.1).unwrap();
        fs::write(self.metadata(TIMESTAMP), sealed.timestamp).unwrap();
    }
}
