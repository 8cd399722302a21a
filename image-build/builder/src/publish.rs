//! Publishing: a release's files and the tenant's keysets into the repository, under the signatures of as
//! many persons as its root demands.
//!
//! ```text
//! CI         publish  the list of targets, signed once     → waits in pending.targets.json
//! rebuilder  cosign   the same list, if its own build has the same digests
//! whoever has snapshot and timestamp key, and comes last   → readers see it
//! ```

use crate::{
    Failure,
    exit::Exit,
    files::{self, FileError},
    repository::{Repository, RepositoryError},
    sign::{self, MANIFEST},
};
use kontor_release::{MAX_MANIFEST, Manifest, ManifestError};
use kontor_repository::{
    Draft, RoleError, RoleType, SignError, Signer, Staff, Target, keyset_target, manifest_target,
    piece_target, seal,
};
use kontor_trust::{Digest, KeyError, SecretKey};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt,
    num::NonZeroU64,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// A release that is not published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Keysets(#[from] sign::SignError),
    #[error("{0} is no description of a release")]
    Manifest(PathBuf, #[source] ManifestError),
    #[error("{path} is not what {MANIFEST} says: it has {found}, and {expected} is expected")]
    Piece { path: PathBuf, found: Digest, expected: Digest },
    #[error("the release is for the tenant {release}, the keysets are of {keysets}")]
    OtherTenant { release: Digest, keysets: Digest },
    #[error("the repository is of the tenant {published}, the release is for {release}")]
    OtherRepository { release: Digest, published: Digest },
    #[error("version {published} of profile {profile} is published; {found} is no newer release")]
    NotNewer { profile: String, published: u64, found: u64 },
    #[error("make a key")]
    NewKey(#[source] KeyError),
    #[error("{0} may be read by others; its mode must be 0600")]
    KeyMode(PathBuf),
    #[error("{0} is no secret key")]
    Key(PathBuf, #[source] KeyError),
    #[error("{0} has no keys (files that end in .key)")]
    NoKeys(PathBuf),
    #[error("none of the keys is one of those who vouch for releases, or each has signed already")]
    NobodySigned,
    #[error("nothing waits for a signature in {0}")]
    NothingWaits(PathBuf),
    #[error("{name} of this build has {own}, the list that waits names {waiting}; it is not signed")]
    Differs { name: String, own: String, waiting: String },
    #[error(
        "the list that waits may be fetched until {found}, {most} is the latest that is signed; publish again"
    )]
    TooLong { found: String, most: String },
    #[error("the list that waits has version {found}, {expected} is the next; publish again")]
    OtherVersion { found: u64, expected: u64 },
    #[error("the list of targets may be fetched until {0} only; publish its release again")]
    Expired(String),
    #[error("nothing is published in {0} yet")]
    Nothing(PathBuf),
    #[error("another root waits in {0} for signatures; sign that one without naming keys anew, or remove it")]
    RootWaits(PathBuf),
    #[error("the repository's root names no key for a role")]
    Staff,
    #[error("the root")]
    Root(#[source] RoleError),
    #[error("none of the keys is a root key, or each has signed already")]
    NoRootSigned,
    #[error("sign the metadata")]
    Sign(#[from] SignError),
    #[error("the waiting list of targets")]
    Waiting(#[source] RoleError),
    #[error("{0} is there already")]
    KeyExists(PathBuf),
    #[error("this machine's clock says that it is before 1970")]
    Clock,
}

impl PublishError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Repository(error) => error.exit(),
            Self::Keysets(error) => error.exit(),
            Self::Piece { .. }
            | Self::Manifest(..)
            | Self::OtherTenant { .. }
            | Self::OtherRepository { .. }
            | Self::NotNewer { .. }
            | Self::Differs { .. }
            | Self::TooLong { .. }
            | Self::OtherVersion { .. }
            | Self::Expired(_)
            | Self::Root(_)
            | Self::Waiting(_) => Exit::NotVerified,
            Self::KeyMode(_)
            | Self::Key(..)
            | Self::NoKeys(_)
            | Self::NobodySigned
            | Self::NothingWaits(_)
            | Self::Nothing(_)
            | Self::RootWaits(_)
            | Self::NoRootSigned
            | Self::Sign(SignError::Threshold { .. })
            | Self::KeyExists(_) => Exit::Usage,
            Self::Sign(SignError::Role(..)) => Exit::NotVerified,
            Self::Clock => Exit::HostLacks,
            Self::NewKey(_) | Self::Staff | Self::Sign(_) => Exit::Bug,
        }
    }
}

/// What is published, and by whom.
pub(crate) struct Request<'a> {
    /// A release that `sign` made.
    pub(crate) release: &'a Path,
    /// The tenant's id and keysets.
    pub(crate) tenant: &'a Path,
    /// The repository.
    pub(crate) repository: &'a Path,
    /// Key files, and directories with such.
    pub(crate) keys: &'a [PathBuf],
    /// How long it may be fetched.
    pub(crate) days: Days,
}

/// Life of signatures, in days.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Days {
    /// Of the list of targets.
    pub(crate) targets: u32,
    /// Of snapshot and timestamp.
    pub(crate) fresh: u32,
}

/// What came of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Readers see it.
    Published { release: String, version: u64, timestamp: u64 },
    /// It lacks something, named in words.
    Waits { release: String, version: u64, lacks: String },
    /// Readers may fetch what is published for longer: snapshot and timestamp until the first time, the list of
    /// targets until the second (both in Unix seconds).
    Refreshed { timestamp: u64, until: u64, targets_until: u64 },
    /// Readers follow a new root.
    Root { version: u64 },
    /// A new root lacks something, named in words.
    RootWaits { version: u64, lacks: String },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Published { release, version, .. } => {
                writeln!(f, "{release} (version {version}) is published")
            }
            Self::Waits { release, version, lacks } => {
                writeln!(f, "{release} (version {version}) waits: {lacks}")
            }
            Self::Refreshed { until, targets_until, .. } => {
                let [until, targets_until] = [*until, *targets_until].map(crate::date::iso8601);
                writeln!(
                    f,
                    "fetched until {until}; the list of targets needs its signers before {targets_until}"
                )
            }
            Self::Root { version } => writeln!(f, "root {version} is published"),
            Self::RootWaits { version, lacks } => writeln!(f, "root {version} waits: {lacks}"),
        }
    }
}

/// Makes the keys of a tenant's repository in `keys`, and the repository itself with its first root.
/// Returns the root's hash, by which employees' PCs know it.
pub(crate) fn init(keys: &Path, repository: &Path, days: u32) -> Result<Digest, Failure> {
    Ok(init_inner(keys, repository, days)?)
}

fn init_inner(keys: &Path, repository: &Path, days: u32) -> Result<Digest, PublishError> {
    Repository::require_none(repository)?;
    files::make_directory(keys)?;
    std::fs::set_permissions(keys, std::fs::Permissions::from_mode(0o700))
        .map_err(FileError::at("protect", keys))?;
    let make = |name: &str| new_key(&keys.join(format!("{name}{KEY_SUFFIX}")));
    let root = ROOT_KEYS.map(make).into_iter().collect::<Result<Vec<_>, _>>()?;
    let targets = TARGETS_KEYS.map(make).into_iter().collect::<Result<Vec<_>, _>>()?;
    let (snapshot, timestamp) = (make("snapshot")?, make("timestamp")?);
    let public = |keys: &[SecretKey]| keys.iter().map(SecretKey::public).collect::<Vec<_>>();
    let staff = Staff {
        root: public(&root),
        root_threshold: THRESHOLD,
        targets: public(&targets),
        targets_threshold: THRESHOLD,
        snapshot: snapshot.public(),
        timestamp: timestamp.public(),
    };
    let signers = root.iter().map(Signer::new).collect::<Result<Vec<_>, _>>()?;
    let first = kontor_repository::new_root(
        NonZeroU64::MIN,
        &staff,
        after(days)?,
        &signers.iter().collect::<Vec<_>>(),
    )?;
    Repository::create(repository, &first)?;
    Ok(Digest::of(&first))
}

/// Makes a key, readable by its owner only.
fn new_key(path: &Path) -> Result<SecretKey, PublishError> {
    let key = SecretKey::generate().map_err(PublishError::NewKey)?;
    if path.exists() {
        return Err(PublishError::KeyExists(path.into()));
    }
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        std::io::Write::write_all(&mut file, key.to_pkcs8())?;
        file.sync_all()
    };
    write().map_err(FileError::at("write", path))?;
    Ok(key)
}

/// Adds a release to the repository. Where signatures are missing it waits there for [`cosign`].
pub(crate) fn publish(request: &Request<'_>) -> Result<Outcome, Failure> {
    Ok(publish_inner(request)?)
}

fn publish_inner(request: &Request<'_>) -> Result<Outcome, PublishError> {
    let release = Release::read(request)?;
    let signers = signers(request.keys)?;
    let repository = Repository::open(request.repository)?;
    let targets = release.targets(&repository)?;
    for (name, path, target) in &release.files {
        repository.add(path, name, target)?;
    }
    for (name, bytes) in &release.documents {
        repository.add_bytes(name, bytes)?;
    }
    let draft = Draft::new(repository.current(), &targets, after(request.days.targets)?)?;
    finish(&release, &repository, draft, &signers, request.days)
}

/// Signs the list that waits, if this build has the digests that it names.
pub(crate) fn cosign(request: &Request<'_>) -> Result<Outcome, Failure> {
    Ok(cosign_inner(request)?)
}

fn cosign_inner(request: &Request<'_>) -> Result<Outcome, PublishError> {
    let release = Release::read(request)?;
    let signers = signers(request.keys)?;
    let repository = Repository::open(request.repository)?;
    let draft = repository.pending()?.ok_or_else(|| PublishError::NothingWaits(request.repository.into()))?;
    check_draft(&draft, &repository, request.days)?;
    let own = release.targets(&repository)?;
    let waiting = draft.targets().map_err(PublishError::Waiting)?;
    let words = |target: Option<&Target>| target.map_or("nothing".to_owned(), |t| t.sha256.to_string());
    for name in own.keys().chain(waiting.keys()) {
        let (own, waiting) = (own.get(name), waiting.get(name));
        if own != waiting {
            let (own, waiting) = (words(own), words(waiting));
            return Err(PublishError::Differs { name: name.clone(), own, waiting });
        }
    }
    finish(&release, &repository, draft, &signers, request.days)
}

/// Whether the list that the first signer began is the next one, and lives no longer than the second one wants.
fn check_draft(draft: &Draft, repository: &Repository, days: Days) -> Result<(), PublishError> {
    let next = repository.current().map_or(0, |current| current.versions().targets).saturating_add(1);
    if draft.version() != next {
        return Err(PublishError::OtherVersion { found: draft.version(), expected: next });
    }
    let most = after(days.targets)?.saturating_add(CLOCKS_APART_S);
    if draft.expires() > most {
        let (found, most) = (crate::date::iso8601(draft.expires()), crate::date::iso8601(most));
        return Err(PublishError::TooLong { found, most });
    }
    Ok(())
}

/// Adds signatures, and publishes once there are enough.
fn finish(
    release: &Release,
    repository: &Repository,
    mut draft: Draft,
    signers: &[Signer],
    days: Days,
) -> Result<Outcome, PublishError> {
    let signers: Vec<&Signer> = signers.iter().collect();
    let root = repository.root();
    let added = draft.sign(root, &signers)?;
    let (name, version) = (release.manifest.image.release.clone(), release.manifest.version);
    let has = |role| signers.iter().any(|signer| signer.is_in(root, role));
    let lacks = match draft.check(root) {
        Err(error) => Some(match std::error::Error::source(&error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        }),
        Ok(()) if !has(RoleType::Snapshot) => Some("the snapshot's key is not among the keys".to_owned()),
        Ok(()) if !has(RoleType::Timestamp) => Some("the timestamp's key is not among the keys".to_owned()),
        Ok(()) => None,
    };
    match lacks {
        Some(_) if added == 0 => Err(PublishError::NobodySigned),
        Some(lacks) => {
            repository.wait(&draft.to_bytes()?)?;
            Ok(Outcome::Waits { release: name, version, lacks })
        }
        None => {
            let sealed = seal(root, &draft, repository.current(), after(days.fresh)?, &signers)?;
            repository.publish(&sealed)?;
            let timestamp = repository.current().map_or(1, |current| current.versions().timestamp + 1);
            Ok(Outcome::Published { release: name, version, timestamp })
        }
    }
}

/// A release as it lies in its directory, every piece measured, with the tenant's keysets.
struct Release {
    manifest: Manifest,
    /// Name of the target, where it lies, what it is.
    files: Vec<(String, PathBuf, Target)>,
    /// Small targets: the manifest and the keysets.
    documents: Vec<(String, Vec<u8>)>,
}

impl Release {
    fn read(request: &Request<'_>) -> Result<Self, PublishError> {
        let path = request.release.join(MANIFEST);
        let text = files::read(&path, MAX_MANIFEST as u64)?;
        let manifest = Manifest::parse(&text).map_err(|error| PublishError::Manifest(path, error))?;
        let profile = &manifest.image.profile;
        let mut pieces = Vec::new();
        for piece in manifest.pieces() {
            let path = request.release.join(&piece.name);
            let (bytes, sha256) = files::measure(&path)?;
            if (bytes, sha256) != (piece.bytes, piece.sha256) {
                return Err(PublishError::Piece { path, found: sha256, expected: piece.sha256 });
            }
            pieces.push((piece_target(profile, piece), path, Target { bytes, sha256 }));
        }
        let (tenant, keysets) = sign::keysets(request.tenant)?;
        if tenant != manifest.tenant {
            return Err(PublishError::OtherTenant { release: manifest.tenant, keysets: tenant });
        }
        let keysets = keysets.into_iter().map(|(version, envelope)| (keyset_target(version), envelope));
        let documents = keysets.chain([(manifest_target(profile), text)]).collect();
        Ok(Self { manifest, files: pieces, documents })
    }

    /// Everything that the repository names once this release is its profile's newest.
    fn targets(&self, repository: &Repository) -> Result<BTreeMap<String, Target>, PublishError> {
        let profile = &self.manifest.image.profile;
        let mut targets: BTreeMap<String, Target> = repository
            .current()
            .map(|current| current.targets().map(|(name, target)| (name.to_owned(), target)).collect())
            .unwrap_or_default();
        if let Some(published) = targets.get(&manifest_target(profile)) {
            let name = manifest_target(profile);
            let text = repository.target(&name, published, MAX_MANIFEST as u64)?;
            let old = Manifest::parse(&text)
                .map_err(|error| PublishError::Manifest(PathBuf::from(&name), error))?;
            if old.tenant != self.manifest.tenant {
                let (release, published) = (self.manifest.tenant, old.tenant);
                return Err(PublishError::OtherRepository { release, published });
            }
            // The same again is how its signatures are renewed.
            if old.version > self.manifest.version
                || (old.version == self.manifest.version && old != self.manifest)
            {
                let (published, found) = (old.version, self.manifest.version);
                return Err(PublishError::NotNewer { profile: profile.clone(), published, found });
            }
            for piece in old.pieces() {
                targets.remove(&piece_target(profile, piece));
            }
        }
        targets.extend(self.files.iter().map(|(name, _, target)| (name.clone(), *target)));
        targets.extend(self.documents.iter().map(|(name, bytes)| {
            (name.clone(), Target { bytes: bytes.len() as u64, sha256: Digest::of(bytes) })
        }));
        Ok(targets)
    }
}

/// The keys in files and directories. A key that others may read is refused.
fn signers(paths: &[PathBuf]) -> Result<Vec<Signer>, PublishError> {
    let mut signers = Vec::new();
    for path in paths {
        let keys = if path.is_dir() {
            let names = files::list(path)?.into_iter().filter(|name| name.ends_with(KEY_SUFFIX));
            let keys: Vec<PathBuf> = names.map(|name| path.join(name)).collect();
            if keys.is_empty() {
                return Err(PublishError::NoKeys(path.clone()));
            }
            keys
        } else {
            vec![path.clone()]
        };
        for path in keys {
            let metadata = std::fs::metadata(&path).map_err(FileError::at("read", &path))?;
            if metadata.permissions().mode() & 0o077 != 0 {
                return Err(PublishError::KeyMode(path));
            }
            let key = SecretKey::from_pkcs8(&files::read(&path, MAX_KEY)?);
            signers.push(Signer::new(&key.map_err(|error| PublishError::Key(path, error))?)?);
        }
    }
    Ok(signers)
}

/// So many days from now, in Unix seconds.
fn after(days: u32) -> Result<u64, PublishError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| PublishError::Clock)?;
    Ok(now.as_secs() + u64::from(days) * crate::date::DAY)
}

/// How far the clock of who signs first may be ahead.
const CLOCKS_APART_S: u64 = crate::date::DAY;
/// Three persons of whom two make a root.
const ROOT_KEYS: [&str; 3] = ["root-1", "root-2", "root-3"];
/// Those who vouch for a release: who built it, and who built it again.
const TARGETS_KEYS: [&str; 2] = ["targets-ci", "targets-rebuilder"];
/// Of root keys, and of those who vouch for releases.
const THRESHOLD: u64 = 2;
const KEY_SUFFIX: &str = ".key";
/// Most bytes of a key file.
const MAX_KEY: u64 = 4096;

mod upkeep;

pub(crate) use upkeep::{RootRequest, key, new_root, refresh};

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sign::tests as fixture;
    use kontor_repository::{METADATA, TARGETS};
    use std::fs;

    pub(crate) struct Scene {
        dir: tempfile::TempDir,
    }

    impl Scene {
        pub(crate) fn new() -> Self {
            let scene = Self { dir: tempfile::tempdir().unwrap() };
            fixture::image(&scene.path("image"));
            fixture::tenant(&scene.path("tenant"));
            scene.sign(1);
            init(&scene.path("keys"), &scene.path("repo"), 1).unwrap();
            scene
        }

        pub(crate) fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        pub(crate) fn sign(&self, version: u64) {
            sign::sign(&self.path("image"), &self.path("tenant"), version, &self.path("release")).unwrap();
        }

        pub(crate) fn with(
            &self,
            verb: fn(&Request<'_>) -> Result<Outcome, Failure>,
            keys: &[&str],
        ) -> Result<Outcome, Failure> {
            let keys: Vec<PathBuf> = keys.iter().map(|name| self.path(name)).collect();
            verb(&Request {
                release: &self.path("release"),
                tenant: &self.path("tenant"),
                repository: &self.path("repo"),
                keys: &keys,
                days: Days { targets: 1, fresh: 1 },
            })
        }

        pub(crate) fn publish(&self) -> Result<Outcome, Failure> {
            self.with(publish, &["keys"])
        }

        pub(crate) fn waits(&self) -> bool {
            self.path("repo/pending.targets.json").exists()
        }

        pub(crate) fn timestamp(&self) -> Option<Vec<u8>> {
            fs::read(self.path("repo/metadata/timestamp.json")).ok()
        }

        pub(crate) fn refused(&self, outcome: Result<Outcome, Failure>) -> PublishError {
            let failure = outcome.unwrap_err();
            let Failure::Publish(error) = failure else { panic!("{failure}") };
            error
        }
    }

    const CI: &str = "keys/targets-ci.key";
    const REBUILDER: [&str; 3] = ["keys/targets-rebuilder.key", "keys/snapshot.key", "keys/timestamp.key"];

    #[test]
    fn keys_are_for_the_owner_only_and_are_never_overwritten() {
        let scene = Scene::new();
        let names = files::list(&scene.path("keys")).unwrap();
        assert_eq!(names.len(), 7);
        for name in names {
            let mode = fs::metadata(scene.path("keys").join(&name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let again = init(&scene.path("keys"), &scene.path("other"), 1).unwrap_err();
        assert!(matches!(again, Failure::Publish(PublishError::KeyExists(_))), "{again}");
        let again = init(&scene.path("other-keys"), &scene.path("repo"), 1).unwrap_err();
        assert_eq!(again.exit(), Exit::Usage, "{again}");
        assert!(!scene.path("other-keys").exists());
    }

    #[test]
    fn published_release_is_there_under_the_names_of_its_content() {
        let scene = Scene::new();
        let outcome = scene.publish().unwrap();
        assert!(matches!(outcome, Outcome::Published { version: 1, timestamp: 1, .. }), "{outcome}");
        assert!(!scene.waits());
        let repository = Repository::open(&scene.path("repo")).unwrap();
        let published: Vec<(String, Target)> =
            repository.current().unwrap().targets().map(|(name, t)| (name.to_owned(), t)).collect();
        // Six pieces, the manifest, two keysets.
        assert_eq!(published.len(), 9);
        for (name, target) in published {
            let path =
                scene.path("repo").join(TARGETS).join(kontor_repository::target_file(&name, &target.sha256));
            assert_eq!(files::measure(&path).unwrap(), (target.bytes, target.sha256), "{name}");
        }
        let names = files::list(&scene.path("repo").join(METADATA)).unwrap();
        assert_eq!(names, ["1.root.json", "1.snapshot.json", "1.targets.json", "timestamp.json"]);
    }

    #[test]
    fn newer_release_takes_the_place_of_the_older_in_the_list() {
        let scene = Scene::new();
        scene.publish().unwrap();
        scene.sign(2);
        let outcome = scene.publish().unwrap();
        assert!(matches!(outcome, Outcome::Published { version: 2, timestamp: 2, .. }), "{outcome}");
        let repository = Repository::open(&scene.path("repo")).unwrap();
        assert_eq!(repository.current().unwrap().targets().count(), 9);
    }

    #[test]
    fn older_release_and_another_of_the_same_version_are_refused() {
        let scene = Scene::new();
        scene.sign(2);
        scene.publish().unwrap();
        let before = scene.timestamp();
        scene.sign(1);
        let error = scene.refused(scene.publish());
        assert!(matches!(error, PublishError::NotNewer { published: 2, found: 1, .. }), "{error}");
        fixture::tenant(&scene.path("tenant"));
        scene.sign(3);
        let error = scene.refused(scene.publish());
        assert!(matches!(error, PublishError::OtherRepository { .. }), "{error}");
        assert_eq!(scene.timestamp(), before);
    }

    #[test]
    fn first_signature_waits_for_the_second_and_readers_see_nothing_of_it() {
        let scene = Scene::new();
        let outcome = scene.with(publish, &[CI]).unwrap();
        assert!(matches!(&outcome, Outcome::Waits { lacks, .. } if lacks.contains("threshold")), "{outcome}");
        assert!(scene.waits() && scene.timestamp().is_none());
        // The same person again changes nothing.
        assert!(matches!(scene.refused(scene.with(cosign, &[CI])), PublishError::NobodySigned));
        let outcome = scene.with(cosign, &REBUILDER).unwrap();
        assert!(matches!(outcome, Outcome::Published { .. }), "{outcome}");
        assert!(!scene.waits() && scene.timestamp().is_some());
        assert!(matches!(scene.refused(scene.with(cosign, &REBUILDER)), PublishError::NothingWaits(_)));
    }

    #[test]
    fn build_with_another_digest_is_not_cosigned() {
        let scene = Scene::new();
        scene.with(publish, &[CI]).unwrap();
        let image = scene.path("image");
        let mut description: serde_json::Value =
            serde_json::from_slice(&fs::read(image.join("image.json")).unwrap()).unwrap();
        fs::remove_file(image.join("kernel")).unwrap();
        fs::write(image.join("kernel"), b"kernem").unwrap();
        description["kernel"]["sha256"] = Digest::of(b"kernem").to_string().into();
        fs::write(image.join("image.json"), description.to_string()).unwrap();
        scene.sign(1);
        let error = scene.refused(scene.with(cosign, &REBUILDER));
        assert!(
            matches!(&error, PublishError::Differs { name, .. } if name.starts_with("smoke.")),
            "{error}"
        );
        assert_eq!(error.exit(), Exit::NotVerified);
        assert!(scene.waits() && scene.timestamp().is_none());
    }

    #[test]
    fn list_that_lives_too_long_or_skips_versions_is_not_cosigned() {
        let scene = Scene::new();
        scene.with(publish, &[CI]).unwrap();
        let repository = Repository::open(&scene.path("repo")).unwrap();
        let targets = repository.pending().unwrap().unwrap().targets().unwrap();
        drop(repository);
        let wait = |expires: u64| {
            let repository = Repository::open(&scene.path("repo")).unwrap();
            let mut draft = Draft::new(repository.current(), &targets, expires).unwrap();
            let ci = signers(&[scene.path(CI)]).unwrap();
            draft.sign(repository.root(), &ci.iter().collect::<Vec<_>>()).unwrap();
            repository.wait(&draft.to_bytes().unwrap()).unwrap();
        };
        wait(after(2).unwrap() + 60);
        let error = scene.refused(scene.with(cosign, &REBUILDER));
        assert!(matches!(error, PublishError::TooLong { .. }), "{error}");
        assert_eq!(error.exit(), Exit::NotVerified);
        let path = scene.path("repo/pending.targets.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replacen("\"version\": 1", "\"version\": 9", 1)).unwrap();
        let error = scene.refused(scene.with(cosign, &REBUILDER));
        assert!(matches!(error, PublishError::OtherVersion { found: 9, expected: 1 }), "{error}");
        // The second one wants a day, and clocks may differ by another.
        wait(after(2).unwrap() - 60);
        assert!(matches!(scene.with(cosign, &REBUILDER).unwrap(), Outcome::Published { .. }));
    }

    #[test]
    fn release_with_a_changed_byte_is_not_published() {
        let scene = Scene::new();
        fs::remove_file(scene.path("release/kernel")).unwrap();
        fs::write(scene.path("release/kernel"), b"kernem").unwrap();
        let error = scene.refused(scene.publish());
        assert!(matches!(error, PublishError::Piece { .. }), "{error}");
        assert_eq!(files::list(&scene.path("repo").join(TARGETS)).unwrap(), [""; 0]);
    }

    #[test]
    fn key_that_others_may_read_is_refused() {
        let scene = Scene::new();
        fs::set_permissions(scene.path(CI), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(scene.refused(scene.publish()), PublishError::KeyMode(_)));
    }

    #[test]
    fn keys_that_vouch_for_nothing_sign_nothing() {
        let scene = Scene::new();
        let error = scene.refused(scene.with(publish, &["keys/root-1.key"]));
        assert!(matches!(error, PublishError::NobodySigned), "{error}");
        assert!(!scene.waits());
    }

    #[test]
    fn change_that_was_cut_short_is_overwritten_by_the_next() {
        let scene = Scene::new();
        scene.publish().unwrap();
        let timestamp = scene.timestamp().unwrap();
        scene.sign(2);
        scene.publish().unwrap();
        // As if it had been killed before the last step.
        fs::write(scene.path("repo/metadata/timestamp.json"), timestamp).unwrap();
        scene.sign(3);
        let outcome = scene.publish().unwrap();
        assert!(matches!(outcome, Outcome::Published { version: 3, timestamp: 2, .. }), "{outcome}");
        Repository::open(&scene.path("repo")).unwrap();
    }

    #[test]
    fn directory_without_a_root_is_no_repository() {
        let scene = Scene::new();
        fs::remove_file(scene.path("repo/metadata/1.root.json")).unwrap();
        let error = scene.refused(scene.publish());
        assert!(matches!(error, PublishError::Repository(RepositoryError::None(_))), "{error}");
    }
}
