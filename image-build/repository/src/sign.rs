//! Making metadata: roots, lists of targets, and what names the newest of them.

use crate::verify::{RoleError, Target, TrustedRoot, Verified, has_signatures, list, next_root, parse};
use jiff::Timestamp as Time;
use kontor_release::Digest;
use kontor_trust::{PublicKey, SecretKey};
use ring::signature::Ed25519KeyPair;
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU64,
};
use tough::{
    TargetName,
    schema::{
        Hashes, Metafile, Role, RoleKeys, RoleType, Root, Signature, Signed, Snapshot, Target as TufTarget,
        Targets, Timestamp,
        decoded::{Decoded, Hex},
        key::{Ed25519Key, Ed25519Scheme, Key},
    },
};

/// The version of the TUF specification that is written.
const SPEC: &str = "1.0.0";

/// Why metadata is not made.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// A secret key that cannot be used.
    #[error("use the secret key")]
    Key,
    /// A time that no calendar has.
    #[error("{0} seconds after 1970 is no time")]
    Time(u64),
    /// A threshold of nobody, or of more than there are.
    #[error("a role of {keys} keys cannot need {threshold} signatures")]
    Threshold {
        /// Keys of the role.
        keys: usize,
        /// How many of them shall sign.
        threshold: u64,
    },
    /// A version above every other.
    #[error("there is no version after {0}")]
    Version(u64),
    /// A name that a target cannot have.
    #[error("{name:?} is no name of a target")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        #[source]
        source: Box<tough::error::Error>,
    },
    /// Canonical JSON.
    #[error("write canonical JSON")]
    Canonical(#[source] Box<tough::schema::Error>),
    /// JSON.
    #[error("write JSON")]
    Write(#[source] serde_json::Error),
    /// What was made would be refused by its readers.
    #[error("{0}")]
    Role(&'static str, #[source] RoleError),
}

/// A secret key that signs metadata.
pub struct Signer {
    pair: Ed25519KeyPair,
    key: Key,
    id: Decoded<Hex>,
}

/// Who signs, by public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staff {
    /// Root keys.
    pub root: Vec<PublicKey>,
    /// How many of them sign a root.
    pub root_threshold: u64,
    /// Keys of those who vouch for releases.
    pub targets: Vec<PublicKey>,
    /// How many of them vouch for one.
    pub targets_threshold: u64,
    /// The snapshot's key.
    pub snapshot: PublicKey,
    /// The timestamp's key.
    pub timestamp: PublicKey,
}

/// A list of targets that may still lack signatures.
#[derive(Debug, Clone)]
pub struct Draft(Signed<Targets>);

/// A root that may still lack signatures.
#[derive(Debug, Clone)]
pub struct RootDraft(Signed<Root>);

/// A finished state of the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Version and content of the targets.
    pub targets: (u64, Vec<u8>),
    /// Version and content of the snapshot.
    pub snapshot: (u64, Vec<u8>),
    /// Content of the timestamp.
    pub timestamp: Vec<u8>,
}

impl Signer {
    /// Makes a signer of a key.
    ///
    /// # Errors
    /// [`SignError::Key`] when it cannot sign.
    pub fn new(secret: &SecretKey) -> Result<Self, SignError> {
        let pair = Ed25519KeyPair::from_pkcs8(secret.to_pkcs8()).map_err(|_| SignError::Key)?;
        let (key, id) = key(&secret.public())?;
        Ok(Self { pair, key, id })
    }

    /// Whether this signer stands in a role of `root`.
    #[must_use]
    pub fn is_in(&self, root: &TrustedRoot, role: RoleType) -> bool {
        root.root.keys(role).any(|key| *key == self.key)
    }

    fn sign<T: Role>(&self, role: &T) -> Result<Signature, SignError> {
        let message = role.canonical_form().map_err(|error| SignError::Canonical(Box::new(error)))?;
        let sig = self.pair.sign(&message).as_ref().to_vec().into();
        Ok(Signature { keyid: self.id.clone(), sig })
    }
}

/// Makes a root of `version`. The first is signed by its own root keys, each later one by those of its
/// predecessor too.
///
/// # Errors
/// [`SignError`]; a root without enough signatures is not refused here, but by its readers.
pub fn new_root(
    version: NonZeroU64,
    staff: &Staff,
    expires: u64,
    signers: &[&Signer],
) -> Result<Vec<u8>, SignError> {
    bytes(&signed_root(version, staff, expires, signers)?)
}

fn signed_root(
    version: NonZeroU64,
    staff: &Staff,
    expires: u64,
    signers: &[&Signer],
) -> Result<Signed<Root>, SignError> {
    let mut keys = HashMap::new();
    let mut role = |public: &[PublicKey], threshold: u64| {
        let short = SignError::Threshold { keys: public.len(), threshold };
        let keyids = public.iter().map(|public| {
            let (key, id) = key(public)?;
            keys.insert(id.clone(), key);
            Ok(id)
        });
        let keyids = keyids.collect::<Result<_, SignError>>()?;
        let possible = usize::try_from(threshold).is_ok_and(|threshold| threshold <= public.len());
        let threshold = NonZeroU64::new(threshold).filter(|_| possible).ok_or(short)?;
        Ok::<_, SignError>(RoleKeys { keyids, threshold, _extra: HashMap::new() })
    };
    let roles = HashMap::from([
        (RoleType::Root, role(&staff.root, staff.root_threshold)?),
        (RoleType::Targets, role(&staff.targets, staff.targets_threshold)?),
        (RoleType::Snapshot, role(&[staff.snapshot], 1)?),
        (RoleType::Timestamp, role(&[staff.timestamp], 1)?),
    ]);
    let root = Root {
        spec_version: SPEC.into(),
        consistent_snapshot: true,
        version,
        expires: time(expires)?,
        keys,
        roles,
        _extra: HashMap::new(),
    };
    let signatures = signers.iter().map(|signer| signer.sign(&root)).collect::<Result<_, _>>()?;
    Ok(Signed { signed: root, signatures })
}

impl RootDraft {
    /// The root that follows `previous`, without a signature.
    ///
    /// # Errors
    /// [`SignError`] when the time is none, or a role could never sign.
    pub fn new(previous: &TrustedRoot, staff: &Staff, expires: u64) -> Result<Self, SignError> {
        signed_root(after(previous.version())?, staff, expires, &[]).map(Self)
    }

    /// Reads a root that somebody else began.
    ///
    /// # Errors
    /// [`RoleError`] when it is none.
    pub fn parse(untrusted: &[u8]) -> Result<Self, RoleError> {
        parse(untrusted).map(Self)
    }

    /// Adds the signatures of those among `signers` who are root in `previous` or in this one, and did not sign yet.
    /// Returns how many that were.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn sign(&mut self, previous: &TrustedRoot, signers: &[&Signer]) -> Result<usize, SignError> {
        let before = self.0.signatures.len();
        for signer in signers {
            let own = self.0.signed.keys(RoleType::Root).any(|key| *key == signer.key);
            let signed = self.0.signatures.iter().any(|signature| signature.keyid == signer.id);
            if (own || signer.is_in(previous, RoleType::Root)) && !signed {
                let signature = signer.sign(&self.0.signed)?;
                self.0.signatures.push(signature);
            }
        }
        Ok(self.0.signatures.len() - before)
    }

    /// Whether enough of the root keys of `previous`, and enough of its own, signed it.
    ///
    /// # Errors
    /// [`RoleError`] says what is wrong or missing.
    pub fn check(&self, previous: &TrustedRoot) -> Result<(), RoleError> {
        let own = serde_json::to_vec(&self.0).map_err(RoleError::Parse)?;
        next_root(&previous.root, &own).map(|_| ())
    }

    /// As it is written.
    ///
    /// # Errors
    /// [`SignError::Write`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, SignError> {
        bytes(&self.0)
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.signed.version.get()
    }

    /// Who signs under it; `None` where a role has no key.
    #[must_use]
    pub fn staff(&self) -> Option<Staff> {
        TrustedRoot { root: self.0.signed.clone() }.staff()
    }

    /// Until when it may be fetched, in Unix seconds.
    #[must_use]
    pub fn expires(&self) -> u64 {
        unix(self.0.signed.expires)
    }
}

impl Draft {
    /// A list of `targets` that follows `previous`, without a signature.
    ///
    /// # Errors
    /// [`SignError`] when a name or the time is none.
    pub fn new(
        previous: Option<&Verified>,
        targets: &BTreeMap<String, Target>,
        expires: u64,
    ) -> Result<Self, SignError> {
        let version = after(previous.map_or(0, |previous| previous.versions().targets))?;
        let mut list = Targets::new(SPEC.into(), version, time(expires)?);
        // Readers refuse delegations; an absent field says best that there are none.
        list.delegations = None;
        for (name, target) in targets {
            let failed = |source| SignError::Name { name: name.clone(), source: Box::new(source) };
            let entry = TufTarget {
                length: target.bytes,
                hashes: hashes(&target.sha256),
                custom: HashMap::new(),
                _extra: HashMap::new(),
            };
            list.add_target(TargetName::new(name.as_str()).map_err(failed)?, entry);
        }
        Ok(Self(Signed { signed: list, signatures: Vec::new() }))
    }

    /// Reads a list that somebody else began.
    ///
    /// # Errors
    /// [`RoleError`] when it is none.
    pub fn parse(untrusted: &[u8]) -> Result<Self, RoleError> {
        let draft = Self(parse(untrusted)?);
        list(&draft.0.signed)?;
        Ok(draft)
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.signed.version.get()
    }

    /// Until when it may be fetched, in Unix seconds.
    #[must_use]
    pub fn expires(&self) -> u64 {
        unix(self.0.signed.expires)
    }

    /// What it names.
    ///
    /// # Errors
    /// [`RoleError`] when it names anything without a hash.
    pub fn targets(&self) -> Result<BTreeMap<String, Target>, RoleError> {
        list(&self.0.signed)
    }

    /// Adds the signatures of those among `signers` who vouch for releases and did not yet. Returns how
    /// many that were.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn sign(&mut self, root: &TrustedRoot, signers: &[&Signer]) -> Result<usize, SignError> {
        let before = self.0.signatures.len();
        for signer in signers.iter().filter(|signer| signer.is_in(root, RoleType::Targets)) {
            if self.0.signatures.iter().all(|signature| signature.keyid != signer.id) {
                let signature = signer.sign(&self.0.signed)?;
                self.0.signatures.push(signature);
            }
        }
        Ok(self.0.signatures.len() - before)
    }

    /// Whether enough of those who vouch for releases signed it.
    ///
    /// # Errors
    /// [`RoleError::Signatures`] says how many did.
    pub fn check(&self, root: &TrustedRoot) -> Result<(), RoleError> {
        has_signatures(&root.root, &self.0)
    }

    /// As it is written.
    ///
    /// # Errors
    /// [`SignError::Write`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, SignError> {
        bytes(&self.0)
    }
}

/// Makes `draft` the newest list of targets: the snapshot that names it, and the timestamp that names
/// that. The signers of both have to be among `signers`.
///
/// # Errors
/// [`SignError::Role`] when a signature is missing.
pub fn seal(
    root: &TrustedRoot,
    draft: &Draft,
    previous: Option<&Verified>,
    expires: u64,
    signers: &[&Signer],
) -> Result<Sealed, SignError> {
    draft.check(root).map_err(|error| SignError::Role("the list of targets", error))?;
    let (last_snapshot, last_timestamp) =
        previous.map_or((0, 0), |previous| (previous.versions().snapshot, previous.versions().timestamp));
    let targets = (draft.version(), draft.to_bytes()?);

    let snapshot_version = after(last_snapshot)?;
    let snapshot = snapshot_of(root, snapshot_version, draft.0.signed.version, &targets.1, expires, signers)?;
    let timestamp =
        timestamp_of(root, after(last_timestamp)?, snapshot_version, &snapshot, expires, signers)?;
    Ok(Sealed { targets, snapshot: (snapshot_version.get(), snapshot), timestamp })
}

/// Makes the published list of targets fetchable for longer: a new snapshot that names it, and the timestamp that
/// names that. `targets` is the list as published, of the state `previous`.
///
/// # Errors
/// [`SignError::Role`] when it is another list, when the root no longer trusts its signers, or when a signature is
/// missing.
pub fn refresh(
    root: &TrustedRoot,
    targets: &[u8],
    previous: &Verified,
    expires: u64,
    signers: &[&Signer],
) -> Result<Sealed, SignError> {
    let wrong = |error| SignError::Role("the list of targets", error);
    let draft = Draft::parse(targets).map_err(wrong)?;
    draft.check(root).map_err(wrong)?;
    let (versions, found) = (previous.versions(), draft.version());
    if found != versions.targets {
        return Err(wrong(RoleError::Version { found, expected: versions.targets }));
    }
    let snapshot_version = after(versions.snapshot)?;
    let targets_version = draft.0.signed.version;
    let snapshot = snapshot_of(root, snapshot_version, targets_version, targets, expires, signers)?;
    let timestamp =
        timestamp_of(root, after(versions.timestamp)?, snapshot_version, &snapshot, expires, signers)?;
    Ok(Sealed { targets: (found, targets.to_vec()), snapshot: (snapshot_version.get(), snapshot), timestamp })
}

/// The snapshot that names `targets`.
fn snapshot_of(
    root: &TrustedRoot,
    version: NonZeroU64,
    targets_version: NonZeroU64,
    targets: &[u8],
    expires: u64,
    signers: &[&Signer],
) -> Result<Vec<u8>, SignError> {
    let mut snapshot = Snapshot::new(SPEC.into(), version, time(expires)?);
    snapshot.meta = HashMap::from([("targets.json".to_owned(), entry(targets_version, targets))]);
    finished(root, snapshot, "the snapshot", signers)
}

/// The timestamp that names `snapshot`.
fn timestamp_of(
    root: &TrustedRoot,
    version: NonZeroU64,
    snapshot_version: NonZeroU64,
    snapshot: &[u8],
    expires: u64,
    signers: &[&Signer],
) -> Result<Vec<u8>, SignError> {
    let mut timestamp = Timestamp::new(SPEC.into(), version, time(expires)?);
    timestamp.meta = HashMap::from([("snapshot.json".to_owned(), entry(snapshot_version, snapshot))]);
    finished(root, timestamp, "the timestamp", signers)
}

/// Version 1 of snapshot and timestamp over whatever stands for version 1 of the targets.
#[cfg(test)]
pub(crate) fn over(
    root: &TrustedRoot,
    targets: &[u8],
    expires: u64,
    signers: &[&Signer],
) -> Result<(Vec<u8>, Vec<u8>), SignError> {
    let one = NonZeroU64::MIN;
    let snapshot = snapshot_of(root, one, one, targets, expires, signers)?;
    let timestamp = timestamp_of(root, one, one, &snapshot, expires, signers)?;
    Ok((snapshot, timestamp))
}

/// Signs a role by all of its keys that are there, and checks that they are enough.
fn finished<T: Role + Serialize>(
    root: &TrustedRoot,
    role: T,
    name: &'static str,
    signers: &[&Signer],
) -> Result<Vec<u8>, SignError> {
    let own = signers.iter().filter(|signer| signer.is_in(root, T::TYPE));
    let signatures = own.map(|signer| signer.sign(&role)).collect::<Result<_, _>>()?;
    let role = Signed { signed: role, signatures };
    has_signatures(&root.root, &role).map_err(|error| SignError::Role(name, error))?;
    bytes(&role)
}

fn entry(version: NonZeroU64, bytes: &[u8]) -> Metafile {
    Metafile {
        length: Some(bytes.len() as u64),
        hashes: Some(hashes(&Digest::of(bytes))),
        version,
        _extra: HashMap::new(),
    }
}

fn hashes(sha256: &Digest) -> Hashes {
    Hashes { sha256: sha256.0.to_vec().into(), _extra: HashMap::new() }
}

fn key(public: &PublicKey) -> Result<(Key, Decoded<Hex>), SignError> {
    let keyval = Ed25519Key { public: public.0.to_vec().into(), _extra: HashMap::new() };
    let key = Key::Ed25519 { keyval, scheme: Ed25519Scheme::Ed25519, _extra: HashMap::new() };
    let id = key.key_id().map_err(|error| SignError::Canonical(Box::new(error)))?;
    Ok((key, id))
}

fn after(version: u64) -> Result<NonZeroU64, SignError> {
    version.checked_add(1).and_then(NonZeroU64::new).ok_or(SignError::Version(version))
}

fn time(unix: u64) -> Result<Time, SignError> {
    let seconds = i64::try_from(unix).map_err(|_| SignError::Time(unix))?;
    Time::from_second(seconds).map_err(|_| SignError::Time(unix))
}

fn unix(time: Time) -> u64 {
    u64::try_from(time.as_second()).unwrap_or_default()
}

fn bytes<T: Serialize>(role: &Signed<T>) -> Result<Vec<u8>, SignError> {
    let mut bytes = serde_json::to_vec_pretty(role).map_err(SignError::Write)?;
    bytes.push(b'\n');
    Ok(bytes)
}
