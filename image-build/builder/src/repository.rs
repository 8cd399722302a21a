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
    Draft, MAX_ROLE, METADATA, MetadataError, RoleError, Sealed, TARGETS, TIMESTAMP, Target, TrustedRoot,
    Verified, gather, root_file, snapshot_file, target_file, targets_file, verify,
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
    #[error("the waiting list of targets {0}")]
    Pending(PathBuf, #[source] RoleError),
}

impl RepositoryError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::None(_) | Self::Exists(_) => Exit::Usage,
            Self::Metadata(..) | Self::Target(..) | Self::Pending(..) => Exit::NotVerified,
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
            false => Some(verify(&stored, &pin).map_err(failed)?),
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
            .prefix(".kontor-")
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

    /// Makes `sealed` what readers see.
    pub(crate) fn publish(&self, sealed: &Sealed) -> Result<(), RepositoryError> {
        let metadata = self.dir.join(METADATA);
        let targets = self.dir.join(TARGETS);
        File::open(&targets).and_then(|dir| dir.sync_all()).map_err(FileError::at("flush", &targets))?;
        files::replace(&metadata.join(targets_file(sealed.targets.0)), &sealed.targets.1)?;
        files::replace(&metadata.join(snapshot_file(sealed.snapshot.0)), &sealed.snapshot.1)?;
        files::replace(&metadata.join(TIMESTAMP), &sealed.timestamp)?;
        let pending = self.dir.join(PENDING);
        if pending.exists() {
            std::fs::remove_file(&pending).map_err(FileError::at("remove", &pending))?;
        }
        Ok(())
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

/// Held while the repository changes.
const LOCK: &str = ".lock";
/// A list of targets that lacks signatures.
const PENDING: &str = "pending.targets.json";
