//! Directories that appear whole or not at all.
//!
//! ```text
//! .NAME.partial.XXXX ──fsync──► rename ──► NAME        killed or out of disk: only .partial. is left,
//!      (locked)                                        which nobody reads and the next run removes
//! ```

use crate::files::FileError;
use rustix::fs::{CWD, RenameFlags};
use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A directory in the making. Dropped, it is removed.
pub(crate) struct Staging {
    path: PathBuf,
    /// Tells other runs that this one is alive: the kernel drops the lock with the process.
    lock: File,
}

/// What becomes of a directory that is already where a new one shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    Replaced,
    /// The new one is thrown away: both were made from the same.
    Kept,
}

impl Staging {
    /// Begins a directory that will lie in `parent` as `name`, and removes what dead runs left there.
    pub(crate) fn begin(parent: &Path, name: &str) -> Result<Self, FileError> {
        let begin = || {
            fs::create_dir_all(parent)?;
            let prefix = format!(".{name}{MARK}");
            sweep(parent, &prefix)?;
            loop {
                let path = tempfile::Builder::new()
                    .prefix(&prefix)
                    .permissions(fs::Permissions::from_mode(0o755))
                    .tempdir_in(parent)?
                    .keep();
                let lock = File::open(&path)?;
                lock.lock()?;
                // Another run may have swept the directory before it was locked.
                let same = fs::metadata(&path).ok().map(|m| m.ino()) == Some(lock.metadata()?.ino());
                if same {
                    return Ok(Self { path, lock });
                }
            }
        };
        begin().map_err(FileError::at("make a directory in", parent))
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the directory at `target`, on disk, in one step.
    pub(crate) fn publish(self, target: &Path, existing: Existing) -> Result<(), FileError> {
        let publish = || {
            sync_tree(&self.path)?;
            match rustix::fs::renameat_with(CWD, &self.path, CWD, target, RenameFlags::NOREPLACE) {
                Err(rustix::io::Errno::EXIST) => match existing {
                    // What is at `self.path` from then on is the old one, and Drop removes it.
                    Existing::Replaced => {
                        rustix::fs::renameat_with(CWD, &self.path, CWD, target, RenameFlags::EXCHANGE)?;
                    }
                    Existing::Kept => (),
                },
                other => other?,
            }
            match target.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
                _ => File::open(".")?.sync_all(),
            }
        };
        publish().map_err(FileError::at("publish", target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Gone after `publish`; and what cannot be removed now, the next run sweeps.
        let _ = fs::remove_dir_all(&self.path);
        let _ = self.lock.unlock();
    }
}

fn sweep(parent: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) || !entry.file_type()?.is_dir() {
            continue;
        }
        let Ok(lock) = File::open(entry.path()) else { continue };
        match lock.try_lock() {
            Ok(()) => match fs::remove_dir_all(entry.path()) {
                // Another user's, in a directory for everybody.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => (),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => (),
            },
            Err(TryLockError::WouldBlock) => (),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(())
}

fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()
}

/// What sets a directory in the making apart.
const MARK: &str = ".partial.";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::list;

    #[test]
    fn published_directory_replaces_the_old_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        for content in ["old", "new"] {
            let staging = Staging::begin(dir.path(), "out").unwrap();
            fs::write(staging.path().join(content), content).unwrap();
            staging.publish(&target, Existing::Replaced).unwrap();
        }
        assert_eq!(list(&target).unwrap(), ["new"]);
        assert_eq!(list(dir.path()).unwrap(), ["out"]);
    }

    #[test]
    fn directory_that_is_kept_loses_nothing_to_a_second_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        for content in ["first", "second"] {
            let staging = Staging::begin(dir.path(), "out").unwrap();
            fs::write(staging.path().join(content), content).unwrap();
            staging.publish(&target, Existing::Kept).unwrap();
        }
        assert_eq!(list(&target).unwrap(), ["first"]);
        assert_eq!(list(dir.path()).unwrap(), ["out"]);
    }

    #[test]
    fn dropped_staging_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::begin(dir.path(), "out").unwrap();
        fs::write(staging.path().join("half"), "x").unwrap();
        drop(staging);
        assert_eq!(list(dir.path()).unwrap(), [""; 0]);
    }

    #[test]
    fn leftover_of_a_dead_run_is_swept_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let dead = dir.path().join(".out.partial.dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("half"), "x").unwrap();
        let alive = Staging::begin(dir.path(), "out").unwrap();
        assert!(!dead.exists());
        let other = Staging::begin(dir.path(), "out").unwrap();
        assert!(alive.path().exists());
        assert!(other.path().exists());
    }

    #[test]
    fn other_names_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".other.partial.x")).unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        drop(Staging::begin(dir.path(), "out").unwrap());
        assert_eq!(list(dir.path()).unwrap(), [".other.partial.x", "out"]);
    }
}
