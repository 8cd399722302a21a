//! What one build leaves for the next.
//!
//! ```text
//! ROOT/debs/SHA256.deb     packages, checked by hash at each use
//!      root/KEY            root trees as tar      ┐
//!      kernel/KEY          kernel and modules     ├ KEY: hash of everything that they are made from
//!      tools/KEY           tool trees             ┘
//!      guest/KEY           cargo's target directories
//! ```
//!
//! An entry is made beside its place and renamed into it, so that a half one is never found. Entries
//! in use are locked; of each kind only the newest few are kept.

use crate::{
    files::{self, FileError},
    staging::{Existing, Staging},
};
use kontor_trust::Digest;
use ring::digest::{Context, SHA256};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// The cache of the user who builds.
pub(crate) struct Cache {
    root: PathBuf,
}

/// A kind of entries.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Root,
    Kernel,
    Tools,
    Guest,
}

/// An entry in use; it is not evicted before this is dropped.
pub(crate) struct Entry {
    path: PathBuf,
    _lock: File,
}

impl Entry {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Cache {
    /// The cache that `KONTOR_CACHE` names, or the user's usual one.
    pub(crate) fn open() -> Result<Self, FileError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = variable("KONTOR_CACHE")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("kontor")))
            .or_else(|| Some(variable("HOME")?.join(".cache/kontor")))
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "neither KONTOR_CACHE nor HOME is set"))
            .map_err(FileError::at("find the cache below", Path::new("$HOME")))?;
        Self::at(&root)
    }

    /// The cache at `root`.
    pub(crate) fn at(root: &Path) -> Result<Self, FileError> {
        files::make_directory(&root.join(DEBS))?;
        let root = root.canonicalize().map_err(FileError::at("find", root))?;
        Ok(Self { root })
    }

    /// Where the package with this hash is kept, or belongs.
    pub(crate) fn deb(&self, sha256: &Digest) -> PathBuf {
        self.root.join(DEBS).join(format!("{sha256}.deb"))
    }

    /// A directory for the length of one step, on the cache's file system.
    pub(crate) fn scratch(&self) -> Result<Staging, FileError> {
        Staging::begin(&self.root.join("work"), "step")
    }

    /// The entry of `key`; if there is none, `make` fills an empty directory with one.
    pub(crate) fn entry<E: From<FileError>>(
        &self,
        kind: Kind,
        key: &Digest,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Entry, E> {
        let parent = self.root.join(kind.name());
        let path = parent.join(key.to_string());
        if let Some(entry) = hold(&path)? {
            return Ok(entry);
        }
        let staging = Staging::begin(&parent, "new")?;
        make(staging.path())?;
        staging.publish(&path, Existing::Kept)?;
        let gone = || FileError::at("use", &path)(io::ErrorKind::NotFound.into());
        let entry = hold(&path)?.ok_or_else(gone)?;
        evict(&parent, kind.kept())?;
        Ok(entry)
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Kernel => "kernel",
            Self::Tools => "tools",
            Self::Guest => "guest",
        }
    }

    /// How many entries stay: a few for those who change between branches, fewer of the large ones.
    fn kept(self) -> usize {
        match self {
            Self::Root | Self::Kernel | Self::Tools => 6,
            Self::Guest => 3,
        }
    }
}

/// A key over named parts; each part's length goes in, so that no two lists of parts look alike.
pub(crate) fn key(recipe: &str, parts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Digest {
    let mut context = Context::new(&SHA256);
    let mut add = |bytes: &[u8]| {
        context.update(&(bytes.len() as u64).to_le_bytes());
        context.update(bytes);
    };
    add(recipe.as_bytes());
    parts.into_iter().for_each(|part| add(part.as_ref()));
    Digest::finish(context.finish())
}

/// Locks an entry for use, if it is there, and marks it as used now.
fn hold(path: &Path) -> Result<Option<Entry>, FileError> {
    let hold = || {
        let lock = match File::open(path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        lock.lock_shared()?;
        // Evicted between opening and locking.
        if !path.exists() {
            return Ok(None);
        }
        lock.set_modified(std::time::SystemTime::now())?;
        Ok(Some(Entry { path: path.to_owned(), _lock: lock }))
    };
    hold().map_err(FileError::at("use", path))
}

/// Removes the entries that were not used for longest, but none that is in use.
fn evict(parent: &Path, kept: usize) -> Result<(), FileError> {
    let evict = || {
        let mut entries = Vec::new();
        for entry in fs::read_dir(parent)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().parse::<Digest>().is_ok() {
                entries.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        entries.sort();
        let surplus = entries.len().saturating_sub(kept);
        for (_, path) in entries.into_iter().take(surplus) {
            if File::open(&path)?.try_lock().is_ok() {
                // Out of sight first: a removal that is cut short leaves no half entry.
                let aside = path.with_file_name(format!(".new.partial.{}", std::process::id()));
                fs::rename(&path, &aside)?;
                fs::remove_dir_all(&aside)?;
            }
        }
        Ok(())
    };
    evict().map_err(FileError::at("tidy", parent))
}

const DEBS: &str = "debs";

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("c")).unwrap();
        (dir, cache)
    }

    fn fill(path: &Path) -> Result<(), FileError> {
        files::write_new(&path.join("f"), b"made")
    }

    #[test]
    fn entry_is_made_once_and_found_again() {
        let (_dir, cache) = cache();
        let key = Digest::of(b"k");
        let entry = cache.entry(Kind::Root, &key, fill).unwrap();
        assert_eq!(fs::read(entry.path().join("f")).unwrap(), b"made");
        drop(entry);
        cache.entry(Kind::Root, &key, |_| -> Result<(), FileError> { panic!("made again") }).unwrap();
    }

    #[test]
    fn entry_whose_making_fails_is_not_found_later() {
        let (_dir, cache) = cache();
        let key = Digest::of(b"k");
        let broken = |path: &Path| {
            fill(path)?;
            Err(FileError::at("break", path)(io::ErrorKind::StorageFull.into()))
        };
        assert!(cache.entry(Kind::Root, &key, broken).is_err());
        assert_eq!(files::list(&cache.root.join("root")).unwrap(), [""; 0]);
        cache.entry(Kind::Root, &key, fill).unwrap();
    }

    #[test]
    fn newest_entries_are_kept_and_those_in_use() {
        let (_dir, cache) = cache();
        let make = |n: usize| {
            let entry = cache.entry(Kind::Guest, &Digest::of(&[u8::try_from(n).unwrap()]), fill).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(n as u64);
            entry._lock.set_modified(time).unwrap();
            entry
        };
        let in_use = make(0);
        let kept = Kind::Guest.kept();
        let paths: Vec<_> = (1..=kept + 1).map(|n| make(n).path().to_owned()).collect();
        assert!(in_use.path().exists());
        assert!(!paths[0].exists());
        assert!(paths[1..].iter().all(|p| p.exists()));
    }

    #[test]
    fn key_tells_lists_of_parts_apart() {
        assert_ne!(key("r", ["ab", "c"]), key("r", ["a", "bc"]));
        assert_ne!(key("r", ["a"]), key("ra", [""; 0]));
        assert_eq!(key("r", ["a"]), key("r", ["a"]));
    }
}
