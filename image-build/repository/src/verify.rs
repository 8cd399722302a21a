//! Verification of metadata at rest: from the pinned hash of the first root to the list of targets.

use crate::layout::{TIMESTAMP, root_file, snapshot_file, targets_file};
use crate::sign::Staff;
use kontor_release::Digest;
use kontor_trust::PublicKey;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, BTreeSet};
use tough::schema::{Metafile, Role, RoleType, Root, Signed, Snapshot, Targets, Timestamp, key::Key};

/// Most bytes of one metadata file.
pub const MAX_ROLE: usize = 1 << 20;
/// Most root files from the first to the newest.
pub const MAX_ROOTS: usize = 256;

/// The metadata files, as received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Every root, the first first.
    pub roots: Vec<Vec<u8>>,
    /// `timestamp.json`.
    pub timestamp: Vec<u8>,
    /// The snapshot that it names.
    pub snapshot: Vec<u8>,
    /// The targets that the snapshot names.
    pub targets: Vec<u8>,
}

/// A root that follows from the pinned one.
#[derive(Debug, Clone)]
pub struct TrustedRoot {
    pub(crate) root: Root,
}

/// Metadata whose every signature and hash was checked.
#[derive(Debug, Clone)]
pub struct Verified {
    versions: Versions,
    targets: BTreeMap<String, Target>,
}

/// Versions of the four roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// Of the newest root.
    pub root: u64,
    /// Of the timestamp.
    pub timestamp: u64,
    /// Of the snapshot.
    pub snapshot: u64,
    /// Of the targets.
    pub targets: u64,
}

/// What the metadata says about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of its content.
    pub sha256: Digest,
}

/// Which metadata file is wrong.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// There is no root.
    #[error("1.root.json is missing")]
    NoRoot,
    /// More than [`MAX_ROOTS`].
    #[error("{0} root files; at most {MAX_ROOTS} are followed")]
    TooManyRoots(usize),
    /// Another first root than the pinned one.
    #[error(
        "1.root.json has the hash {found}, expected is {pinned}: it is another company's, or was changed"
    )]
    OtherRoot {
        /// The file's.
        found: Digest,
        /// The expected one.
        pinned: Digest,
    },
    /// A file.
    #[error("{file}")]
    Role {
        /// Its name.
        file: String,
        /// What is wrong.
        #[source]
        source: RoleError,
    },
}

/// What is wrong with a metadata file.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
    /// Not there.
    #[error("it is missing")]
    Absent,
    /// Longer than [`MAX_ROLE`].
    #[error("it has {0} bytes, the limit is {MAX_ROLE}")]
    TooLong(usize),
    /// Not the JSON that is expected.
    #[error("it does not parse")]
    Parse(#[source] serde_json::Error),
    /// Another role than it stands for.
    #[error("it does not say that it is the role {0}")]
    Kind(RoleType),
    /// Its signatures.
    #[error("it is not signed as it must be")]
    Signatures(#[source] Box<tough::schema::Error>),
    /// Its version.
    #[error("it is of version {found}, {expected} is expected")]
    Version {
        /// The file's.
        found: u64,
        /// The expected one.
        expected: u64,
    },
    /// It is not the file that the role above it names.
    #[error("it is not what {0} names: a byte of it was changed")]
    Hash(&'static str),
    /// It does not say what it must.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// A delegation.
    #[error("it delegates to other roles, which is not allowed")]
    Delegation,
    /// A key that is no Ed25519 key.
    #[error("it has a key that is not Ed25519")]
    KeyKind,
    /// One key under two names in one role.
    #[error("it names one key twice for the role {0}")]
    RepeatedKey(RoleType),
}

impl Metadata {
    /// Every file with its name; `versions` are those of this metadata.
    pub fn files(&self, versions: Versions) -> impl Iterator<Item = (String, &[u8])> {
        let roots = (1..).map(root_file).zip(self.roots.iter().map(Vec::as_slice));
        roots.chain([
            (TIMESTAMP.to_owned(), self.timestamp.as_slice()),
            (snapshot_file(versions.snapshot), self.snapshot.as_slice()),
            (targets_file(versions.targets), self.targets.as_slice()),
        ])
    }
}

impl TrustedRoot {
    /// Follows the chain from the root with the hash `pin` to the last.
    ///
    /// # Errors
    /// [`MetadataError`] names the link.
    pub fn follow(untrusted: &[Vec<u8>], pin: &Digest) -> Result<Self, MetadataError> {
        if untrusted.len() > MAX_ROOTS {
            return Err(MetadataError::TooManyRoots(untrusted.len()));
        }
        let (first, links) = untrusted.split_first().ok_or(MetadataError::NoRoot)?;
        let found = Digest::of(first);
        if found != *pin {
            return Err(MetadataError::OtherRoot { found, pinned: *pin });
        }
        let mut newest: Root = first_root(first).map_err(wrong(root_file(1)))?;
        for link in links {
            let file = root_file(newest.version.get() + 1);
            newest = next_root(&newest, link).map_err(wrong(file))?;
        }
        Ok(Self { root: newest })
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.root.version.get()
    }

    /// Who signs under it; `None` where a role has no key.
    #[must_use]
    pub fn staff(&self) -> Option<Staff> {
        let keys = |role| -> Vec<PublicKey> { self.root.keys(role).filter_map(public_key).collect() };
        let threshold = |role| self.root.roles.get(&role).map(|keys| keys.threshold.get());
        Some(Staff {
            root: keys(RoleType::Root),
            root_threshold: threshold(RoleType::Root)?,
            targets: keys(RoleType::Targets),
            targets_threshold: threshold(RoleType::Targets)?,
            snapshot: *keys(RoleType::Snapshot).first()?,
            timestamp: *keys(RoleType::Timestamp).first()?,
        })
    }
}

/// Of the one kind that [`usable`] lets pass.
fn public_key(key: &Key) -> Option<PublicKey> {
    let Key::Ed25519 { keyval, .. } = key else { return None };
    keyval.public.to_vec().try_into().ok().map(PublicKey)
}

impl Verified {
    /// What the metadata says about a target.
    #[must_use]
    pub fn target(&self, name: &str) -> Option<Target> {
        self.targets.get(name).copied()
    }

    /// Every target by name.
    pub fn targets(&self) -> impl Iterator<Item = (&str, Target)> {
        self.targets.iter().map(|(name, target)| (name.as_str(), *target))
    }

    /// Versions of the four roles.
    #[must_use]
    pub fn versions(&self) -> Versions {
        self.versions
    }
}

/// Gathers the newest metadata by file name, as a reader of the repository does: every root, the timestamp,
/// and what that leads to. Nothing is verified yet; what `read` does not have stays empty.
///
/// # Errors
/// Those of `read`.
pub fn gather<E>(mut read: impl FnMut(&str) -> Result<Option<Vec<u8>>, E>) -> Result<Metadata, E> {
    let mut roots = Vec::new();
    // One more than allowed, so that too many are noticed.
    for version in (1..).take(MAX_ROOTS + 1) {
        match read(&root_file(version))? {
            Some(root) => roots.push(root),
            None => break,
        }
    }
    let timestamp = read(TIMESTAMP)?.unwrap_or_default();
    let (mut snapshot, mut targets) = (Vec::new(), Vec::new());
    if let Ok(timestamp) = parse::<Timestamp>(&timestamp)
        && let Some(entry) = timestamp.signed.meta.get("snapshot.json")
    {
        snapshot = read(&snapshot_file(entry.version.get()))?.unwrap_or_default();
    }
    if let Ok(snapshot) = parse::<Snapshot>(&snapshot)
        && let Some(entry) = snapshot.signed.meta.get("targets.json")
    {
        targets = read(&targets_file(entry.version.get()))?.unwrap_or_default();
    }
    Ok(Metadata { roots, timestamp, snapshot, targets })
}

/// Verifies stored metadata from the root with the hash `pin` on. Expiry is not looked at.
///
/// # Errors
/// [`MetadataError`] names the file that is wrong.
pub fn verify(untrusted: &Metadata, pin: &Digest) -> Result<Verified, MetadataError> {
    let trusted = TrustedRoot::follow(&untrusted.roots, pin)?;
    let root = &trusted.root;

    let at_timestamp = || wrong(TIMESTAMP.to_owned());
    let timestamp: Signed<Timestamp> = signed(root, &untrusted.timestamp).map_err(at_timestamp())?;
    let entry = timestamp.signed.meta.get("snapshot.json").filter(|_| timestamp.signed.meta.len() == 1);
    let entry = entry.ok_or(RoleError::Missing("one snapshot")).map_err(at_timestamp())?;

    let at_snapshot = || wrong(snapshot_file(entry.version.get()));
    named_by(TIMESTAMP, entry, &untrusted.snapshot).map_err(at_snapshot())?;
    let snapshot: Signed<Snapshot> = signed(root, &untrusted.snapshot).map_err(at_snapshot())?;
    of_version(snapshot.signed.version.get(), entry.version.get()).map_err(at_snapshot())?;
    let entry = snapshot.signed.meta.get("targets.json").filter(|_| snapshot.signed.meta.len() == 1);
    let entry = entry.ok_or(RoleError::Missing("one list of targets")).map_err(at_snapshot())?;

    let at_targets = || wrong(targets_file(entry.version.get()));
    named_by("the snapshot", entry, &untrusted.targets).map_err(at_targets())?;
    let targets: Signed<Targets> = signed(root, &untrusted.targets).map_err(at_targets())?;
    of_version(targets.signed.version.get(), entry.version.get()).map_err(at_targets())?;
    let versions = Versions {
        root: root.version.get(),
        timestamp: timestamp.signed.version.get(),
        snapshot: snapshot.signed.version.get(),
        targets: targets.signed.version.get(),
    };
    let targets = list(&targets.signed).map_err(at_targets())?;
    Ok(Verified { versions, targets })
}

/// The targets of a list by name.
pub(crate) fn list(targets: &Targets) -> Result<BTreeMap<String, Target>, RoleError> {
    // An empty delegation is written by other editors for none at all.
    if targets.delegations.as_ref().is_some_and(|all| !all.roles.is_empty() || !all.keys.is_empty()) {
        return Err(RoleError::Delegation);
    }
    let entry = |(name, target): (&tough::TargetName, &tough::schema::Target)| {
        let sha256 = digest(&target.hashes.sha256).ok_or(RoleError::Missing("SHA-256 of a target"))?;
        Ok((name.raw().to_owned(), Target { bytes: target.length, sha256 }))
    };
    targets.targets.iter().map(entry).collect()
}

pub(crate) fn parse<T: Role + DeserializeOwned>(untrusted: &[u8]) -> Result<Signed<T>, RoleError> {
    if untrusted.is_empty() {
        return Err(RoleError::Absent);
    }
    if untrusted.len() > MAX_ROLE {
        return Err(RoleError::TooLong(untrusted.len()));
    }
    // `tough` passes over this field's value when it reads, and signs the right one when it checks.
    let named: Named = serde_json::from_slice(untrusted).map_err(RoleError::Parse)?;
    if named.signed.kind != T::TYPE.to_string() {
        return Err(RoleError::Kind(T::TYPE));
    }
    serde_json::from_slice(untrusted).map_err(RoleError::Parse)
}

/// The part of a metadata file that says which role it is.
#[derive(Deserialize)]
struct Named {
    signed: NamedRole,
}

#[derive(Deserialize)]
struct NamedRole {
    #[serde(rename = "_type")]
    kind: String,
}

pub(crate) fn has_signatures<T: Role + Serialize>(root: &Root, role: &Signed<T>) -> Result<(), RoleError> {
    root.verify_role(role).map_err(|error| RoleError::Signatures(Box::new(error)))
}

/// A role that is signed by as many of its keys as the root demands.
fn signed<T: Role + Serialize + DeserializeOwned>(
    root: &Root,
    untrusted: &[u8],
) -> Result<Signed<T>, RoleError> {
    let role = parse(untrusted)?;
    has_signatures(root, &role)?;
    Ok(role)
}

fn first_root(bytes: &[u8]) -> Result<Root, RoleError> {
    let root: Signed<Root> = parse(bytes)?;
    has_signatures(&root.signed, &root)?;
    of_version(root.signed.version.get(), 1)?;
    usable(root.signed)
}

pub(crate) fn next_root(last: &Root, untrusted: &[u8]) -> Result<Root, RoleError> {
    let next: Signed<Root> = parse(untrusted)?;
    has_signatures(last, &next)?;
    has_signatures(&next.signed, &next)?;
    of_version(next.signed.version.get(), last.version.get() + 1)?;
    usable(next.signed)
}

/// A root whose thresholds count different keys, and whose files have their version in the name.
fn usable(root: Root) -> Result<Root, RoleError> {
    if !root.consistent_snapshot {
        return Err(RoleError::Missing("consistent snapshots"));
    }
    for role in [RoleType::Root, RoleType::Targets, RoleType::Snapshot, RoleType::Timestamp] {
        let mut seen = BTreeSet::new();
        for key in root.keys(role) {
            let Key::Ed25519 { keyval, .. } = key else { return Err(RoleError::KeyKind) };
            if !seen.insert(keyval.public.to_vec()) {
                return Err(RoleError::RepeatedKey(role));
            }
        }
    }
    Ok(root)
}

fn of_version(found: u64, expected: u64) -> Result<(), RoleError> {
    if found == expected { Ok(()) } else { Err(RoleError::Version { found, expected }) }
}

/// Whether `bytes` are the file that an entry of the role above names, by length and hash.
fn named_by(above: &'static str, entry: &Metafile, bytes: &[u8]) -> Result<(), RoleError> {
    let hash = entry.hashes.as_ref().and_then(|hashes| digest(&hashes.sha256));
    let hash = hash.ok_or(RoleError::Missing("hash in the role above it"))?;
    if bytes.is_empty() {
        return Err(RoleError::Absent);
    }
    if entry.length != Some(bytes.len() as u64) || hash != Digest::of(bytes) {
        return Err(RoleError::Hash(above));
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> Option<Digest> {
    bytes.try_into().ok().map(Digest)
}

fn wrong(file: String) -> impl FnOnce(RoleError) -> MetadataError {
    move |source| MetadataError::Role { file, source }
}
