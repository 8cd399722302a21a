//! The repository that employees' PCs fetch releases from, as a directory on this machine.
//!
//! A reader never sees half of a change: files and versioned metadata are added under new names first, each
//! whole, and `timestamp.json`, which names them all, is replaced last in one step. A change that still
//! lacks a signature waits in `pending.targets.json`, which no reader asks for.

use crate::{
    exit::Exit,
    files::{self, FileError},
};
use kontor_release::Digest;
use kontor_repository::{
    Draft, MAX_ROLE, METADATA, Metadata, MetadataError, RoleError, RootDraft, Sealed, SignError, TARGETS,
    TIMESTAMP, Target, TrustedRoot, Verified, gather, root_file, snapshot_file, target_file, targets_file,
    verify,
};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::File,
    path::{Path, PathBuf},
};

/// A repository that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RepositoryError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0} is no repository: it has no {METADATA}/1.root.json; kontor-image tuf-init makes one")]
    None(PathBuf),
    #[error("{0} is a repository already")]
    Exists(PathBuf),
    #[error("the repository {0}")]
    Metadata(PathBuf, #[source] MetadataError),
    #[error("{0} is not what the repository's metadata says: it has {1}")]
    Target(PathBuf, Digest),
    #[error("what waits in {0}")]
    Pending(PathBuf, #[source] RoleError),
    #[error("write the root")]
    Root(#[source] SignError),
}

impl RepositoryError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::None(_) | Self::Exists(_) => Exit::Usage,
            Self::Metadata(..) | Self::Target(..) | Self::Pending(..) => Exit::NotVerified,
            Self::Root(_) => Exit::Bug,
        }
    }
}

/// A repository that nobody else changes meanwhile.
pub(crate) struct Repository {
    dir: PathBuf,
    root: TrustedRoot,
    current: Option<Verified>,
    #[expect(dead_code, reason = "what is held is the descriptor's lock")]
    lock: File,
}

impl Repository {
    /// Makes a repository with nothing in it but its first root.
    pub(crate) fn create(dir: &Path, root: &[u8]) -> Result<(), RepositoryError> {
        Self::require_none(dir)?;
        let first = dir.join(METADATA).join(root_file(1));
        for part in [METADATA, TARGETS] {
            files::make_directory(&dir.join(part))?;
        }
        Ok(files::replace(&first, root)?)
    }

    /// Fails where there is a repository.
    pub(crate) fn require_none(dir: &Path) -> Result<(), RepositoryError> {
        let there = dir.join(METADATA).join(root_file(1)).exists();
        if there { Err(RepositoryError::Exists(dir.into())) } else { Ok(()) }
    }

    /// Opens a repository, waits until nobody else changes it, and verifies its metadata.
    pub(crate) fn open(dir: &Path) -> Result<Self, RepositoryError> {
        let metadata = dir.join(METADATA);
        if !metadata.join(root_file(1)).exists() {
            return Err(RepositoryError::None(dir.into()));
        }
        let path = dir.join(LOCK);
        let lock = File::create(&path).map_err(FileError::at("open", &path))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|errno| FileError::at("lock", &path)(errno.into()))?;
        // Who held the lock before may have been killed in the middle of a file.
        for part in [dir, &metadata, &dir.join(TARGETS)] {
            files::sweep(part)?;
        }

        let stored = gather(|name| {
            let path = metadata.join(name);
            if path.exists() { files::read(&path, MAX_ROLE as u64).map(Some) } else { Ok(None) }
        })?;
        // The publisher's own directory says which root is the first; readers have it by hash.
        let first = stored.roots.first().ok_or_else(|| RepositoryError::None(dir.into()))?;
        let pin = Digest::of(first);
        let failed = |error| RepositoryError::Metadata(dir.into(), error);
        let root = TrustedRoot::follow(&stored.roots, &pin).map_err(failed)?;
        let current = match stored.timestamp.is_empty() {
            true => None,
            false => Some(current(stored, &pin).map_err(failed)?),
        };
        Ok(Self { dir: dir.into(), root, current, lock })
    }

    /// Who may sign.
    pub(crate) fn root(&self) -> &TrustedRoot {
        &self.root
    }

    /// What is published.
    pub(crate) fn current(&self) -> Option<&Verified> {
        self.current.as_ref()
    }

    /// Content of a published file of at most `max` bytes.
    pub(crate) fn target(&self, name: &str, target: &Target, max: u64) -> Result<Vec<u8>, RepositoryError> {
        let path = self.dir.join(TARGETS).join(target_file(name, &target.sha256));
        let bytes = files::read(&path, max)?;
        let found = Digest::of(&bytes);
        if found == target.sha256 { Ok(bytes) } else { Err(RepositoryError::Target(path, found)) }
    }

    /// Adds a file under its content's name; one that is there already is measured.
    pub(crate) fn add(&self, from: &Path, name: &str, target: &Target) -> Result<(), RepositoryError> {
        let path = self.dir.join(TARGETS).join(target_file(name, &target.sha256));
        if path.exists() && files::measure(&path)? == (target.bytes, target.sha256) {
            return Ok(());
        }
        files::require_space(&path, target.bytes)?;
        let beside = tempfile::Builder::new()
            .prefix(files::BESIDE)
            .tempdir_in(self.dir.join(TARGETS))
            .map_err(FileError::at("write in", &self.dir))?;
        let copy = beside.path().join("file");
        files::copy_new(from, &copy)?;
        let (bytes, sha256) = files::measure(&copy)?;
        if (bytes, sha256) != (target.bytes, target.sha256) {
            return Err(RepositoryError::Target(from.into(), sha256));
        }
        std::fs::rename(&copy, &path).map_err(FileError::at("write", &path))?;
        Ok(())
    }

    /// Adds a small file under its content's name.
    pub(crate) fn add_bytes(&self, name: &str, bytes: &[u8]) -> Result<(), RepositoryError> {
        Ok(files::replace(&self.dir.join(TARGETS).join(target_file(name, &Digest::of(bytes))), bytes)?)
    }

    /// The list of targets that is published, as it is.
    pub(crate) fn published(&self, current: &Verified) -> Result<Vec<u8>, RepositoryError> {
        let path = self.dir.join(METADATA).join(targets_file(current.versions().targets));
        Ok(files::read(&path, MAX_ROLE as u64)?)
    }

    /// Makes `sealed` what readers see, and what waited for signatures settled.
    pub(crate) fn publish(&self, sealed: &Sealed) -> Result<(), RepositoryError> {
        self.refresh(sealed)?;
        remove(&self.dir.join(PENDING))
    }

    /// Makes `sealed` what readers see; what waits for signatures goes on waiting.
    pub(crate) fn refresh(&self, sealed: &Sealed) -> Result<(), RepositoryError> {
        let metadata = self.dir.join(METADATA);
        let targets = self.dir.join(TARGETS);
        File::open(&targets).and_then(|dir| dir.sync_all()).map_err(FileError::at("flush", &targets))?;
        files::replace(&metadata.join(targets_file(sealed.targets.0)), &sealed.targets.1)?;
        files::replace(&metadata.join(snapshot_file(sealed.snapshot.0)), &sealed.snapshot.1)?;
        Ok(files::replace(&metadata.join(TIMESTAMP), &sealed.timestamp)?)
    }

    /// Lets readers follow a new root.
    pub(crate) fn add_root(&self, root: &RootDraft) -> Result<(), RepositoryError> {
        let bytes = root.to_bytes().map_err(RepositoryError::Root)?;
        files::replace(&self.dir.join(METADATA).join(root_file(root.version())), &bytes)?;
        remove(&self.dir.join(PENDING_ROOT))
    }

    /// The root that waits for signatures.
    pub(crate) fn pending_root(&self) -> Result<Option<RootDraft>, RepositoryError> {
        let path = self.dir.join(PENDING_ROOT);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = files::read(&path, MAX_ROLE as u64)?;
        RootDraft::parse(&bytes).map(Some).map_err(|error| RepositoryError::Pending(path, error))
    }

    /// Lets a root wait for signatures.
    pub(crate) fn wait_root(&self, root: &RootDraft) -> Result<(), RepositoryError> {
        let bytes = root.to_bytes().map_err(RepositoryError::Root)?;
        Ok(files::replace(&self.dir.join(PENDING_ROOT), &bytes)?)
    }

    /// The list of targets that waits for signatures.
    pub(crate) fn pending(&self) -> Result<Option<Draft>, RepositoryError> {
        let path = self.dir.join(PENDING);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = files::read(&path, MAX_ROLE as u64)?;
        Draft::parse(&bytes).map(Some).map_err(|error| RepositoryError::Pending(path, error))
    }

    /// Lets a list of targets wait for signatures.
    pub(crate) fn wait(&self, draft: &[u8]) -> Result<(), RepositoryError> {
        Ok(files::replace(&self.dir.join(PENDING), draft)?)
    }
}

/// What is published. Under a new root the older signatures may not be enough any more, which is for the next
/// signers to mend: then it counts as it did under the root before.
fn current(mut stored: Metadata, pin: &Digest) -> Result<Verified, MetadataError> {
    let newest = verify(&stored, pin);
    while newest.is_err() && stored.roots.len() > 1 {
        stored.roots.pop();
        if let Ok(older) = verify(&stored, pin) {
            return Ok(older);
        }
    }
    newest
}

fn remove(path: &Path) -> Result<(), RepositoryError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FileError::at("remove", path)(error).into())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Held while the repository changes.
const LOCK: &str = ".lock";
/// A root that lacks signatures.
const PENDING_ROOT: &str = "pending.root.json";
/// A list of targets that lacks signatures.
const PENDING: &str = "pending.targets.json";
