//! The lock: every byte that comes from outside, by hash.
//!
//! An image is a function of the lock, the profile, the source tree and the compiler. The lock names
//! each package of the three trees (root, kernel, the tools that make the image), the time that stands
//! for the build, and the programs of the host that had a hand in it.

use crate::{
    exit::Exit,
    files::{self, FileError},
    profile::{self, Profile},
};
use kontor_trust::Digest;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// The lock as its TOML file says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// The profile it was made for.
    pub(crate) profile: String,
    /// Unix time that stands for the build: the newest date of the archives' Release files.
    pub(crate) built_at: u64,
    /// What the profile asked for; another wish needs another lock.
    pub(crate) wish: Wish,
    /// Programs of the host that have a hand in the image, with their versions.
    pub(crate) host: BTreeMap<String, String>,
    /// The Release files that the packages were chosen from.
    #[serde(rename = "release")]
    pub(crate) releases: Vec<Release>,
    /// The kernel.
    pub(crate) kernel: Deb,
    /// Packages of the root tree.
    pub(crate) root: Vec<Deb>,
    /// Packages of the tools that make the image.
    pub(crate) tool: Vec<Deb>,
}

/// The part of a profile that decides which packages are locked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wish {
    pub(crate) packages: Vec<String>,
    pub(crate) kernel: String,
    /// `label/suite` of each archive.
    pub(crate) archives: Vec<String>,
}

/// A Release file that was valid when the lock was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Release {
    pub(crate) archive: String,
    pub(crate) suite: String,
    /// Its date, as it stands there.
    pub(crate) date: String,
}

/// One package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Deb {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) arch: String,
    /// Label of the archive.
    pub(crate) archive: String,
    /// Path within the archive.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: Digest,
}

/// Why a lock is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("lock {path} does not parse")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("lock {path} has format {found}, this version reads {FORMAT}")]
    Format { path: PathBuf, found: u32 },
    #[error("lock {path}: package {package:?} {fault}")]
    Package { path: PathBuf, package: String, fault: &'static str },
    #[error(
        "lock {path} was made for other {what} than profile {profile} has: make it anew with kontor-image lock --profile {profile}"
    )]
    Stale { path: PathBuf, profile: String, what: &'static str },
}

impl LockError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Parse { .. } | Self::Format { .. } | Self::Package { .. } | Self::Stale { .. } => {
                Exit::Usage
            }
        }
    }
}

impl Wish {
    pub(crate) fn of(profile: &Profile) -> Self {
        Self {
            packages: profile.packages.clone(),
            kernel: profile.kernel.clone(),
            archives: profile.archives.iter().map(|a| format!("{}/{}", a.label, a.suite)).collect(),
        }
    }
}

impl Lock {
    /// Reads a lock made for `profile`; also its text, as it is.
    pub(crate) fn load(path: &Path, profile: &Profile) -> Result<(Self, String), LockError> {
        let text = files::read_text(path, MAX_LOCK)?;
        Ok((Self::parse(&text, path, profile)?, text))
    }

    /// Reads a lock made for `profile`; `path` is for messages only.
    pub(crate) fn parse(text: &str, path: &Path, profile: &Profile) -> Result<Self, LockError> {
        let path = path.to_owned();
        let lock: Self = match toml::from_str(text) {
            Ok(lock) => lock,
            Err(source) => return Err(LockError::Parse { path, source: Box::new(source) }),
        };
        if lock.format != FORMAT {
            return Err(LockError::Format { path, found: lock.format });
        }
        if let Some((deb, fault)) = lock.debs().find_map(|deb| Some((deb, deb.fault()?))) {
            return Err(LockError::Package { path, package: deb.name.chars().take(80).collect(), fault });
        }
        for tree in [&lock.root, &lock.tool] {
            let mut seen = BTreeSet::new();
            if let Some(deb) = tree.iter().find(|deb| !seen.insert(&deb.name)) {
                return Err(LockError::Package { path, package: deb.name.clone(), fault: "is named twice" });
            }
        }
        let wish = Wish::of(profile);
        let stale = [
            (lock.profile != profile.name, "profile"),
            (lock.wish.packages != wish.packages, "packages"),
            (lock.wish.kernel != wish.kernel, "kernel"),
            (lock.wish.archives != wish.archives, "archives"),
        ];
        match stale.into_iter().find(|(stale, _)| *stale) {
            Some((_, what)) => Err(LockError::Stale { path, profile: profile.name.clone(), what }),
            None => Ok(lock),
        }
    }

    /// The file's text: the same for the same lock.
    pub(crate) fn to_text(&self) -> String {
        let body = toml::to_string(self).expect("a lock is made of text and numbers");
        format!("# Written by `kontor-image lock`; not meant to be edited.\n\n{body}")
    }

    /// Every package of every tree.
    pub(crate) fn debs(&self) -> impl Iterator<Item = &Deb> {
        self.root.iter().chain([&self.kernel]).chain(&self.tool)
    }
}

impl Deb {
    fn fault(&self) -> Option<&'static str> {
        let plain = |text: &str, extra: &[u8]| {
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || extra.contains(&b))
        };
        let normal = |part: &str| part != ".." && part != "." && plain(part, b"+.~_-:");
        if !profile::is_name(&self.name) {
            Some("has a name that no package has")
        } else if !plain(&self.version, b".+~:-") || self.version.len() > profile::MAX_NAME {
            Some("has a version that no package has")
        } else if !matches!(self.arch.as_str(), "amd64" | "all") {
            Some("is for another architecture than amd64")
        } else if !profile::is_label(&self.archive) {
            Some("has an archive that no profile can name")
        } else if self.path.len() > MAX_DEB_PATH || !self.path.split('/').all(normal) {
            Some("has a path that leaves the archive")
        } else if self.bytes > MAX_DEB {
            Some("is larger than any package")
        } else {
            None
        }
    }
}

/// The one format of locks so far.
pub(crate) const FORMAT: u32 = 1;
/// Most bytes of a lock: some ten thousand packages.
const MAX_LOCK: u64 = 4 * 1024 * 1024;
/// Most characters of a package's path in its archive.
const MAX_DEB_PATH: usize = 512;
/// Most bytes of a package.
const MAX_DEB: u64 = 4 << 30;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::profile::tests::smoke;

    pub(crate) fn deb(name: &str) -> Deb {
        Deb {
            name: name.into(),
            version: "1:2.3+b4~5-6".into(),
            arch: "amd64".into(),
            archive: "Debian".into(),
            path: format!("pool/main/x/{name}_2.3.deb"),
            bytes: 10,
            sha256: Digest::of(name.as_bytes()),
        }
    }

    pub(crate) fn lock() -> Lock {
        Lock {
            format: FORMAT,
            profile: "smoke".into(),
            built_at: 1_795_252_544,
            wish: Wish::of(&smoke()),
            host: BTreeMap::from([("rustc".into(), "rustc 1.95.0".into())]),
            releases: Vec::new(),
            kernel: deb("linux-image-6.12.117+deb13-amd64"),
            root: vec![deb("bash"), deb("curl")],
            tool: vec![deb("erofs-utils")],
        }
    }

    fn reparse(lock: &Lock) -> Result<Lock, LockError> {
        Lock::parse(&lock.to_text(), Path::new("l"), &smoke())
    }

    fn fault_of(change: impl FnOnce(&mut Deb)) -> String {
        let mut lock = lock();
        change(&mut lock.root[1]);
        reparse(&lock).unwrap_err().to_string()
    }

    #[test]
    fn lock_survives_writing_and_reading() {
        assert_eq!(reparse(&lock()).unwrap(), lock());
    }

    #[test]
    fn package_path_that_leaves_the_archive_is_refused() {
        for bad in ["../x.deb", "/etc/passwd", "pool//x.deb", "pool/./x.deb", "a b", "", "x?y", "x%2e"] {
            let fault = fault_of(|deb| deb.path = bad.into());
            assert!(fault.contains("leaves the archive"), "{bad}: {fault}");
        }
    }

    #[test]
    fn package_of_the_size_limit_is_taken_and_one_byte_more_is_refused() {
        let mut at_limit = lock();
        at_limit.root[0].bytes = MAX_DEB;
        assert!(reparse(&at_limit).is_ok());
        assert!(fault_of(|deb| deb.bytes = MAX_DEB + 1).contains("larger"));
    }

    #[test]
    fn package_path_of_the_limit_is_taken_and_one_more_is_refused() {
        let mut at_limit = lock();
        at_limit.root[0].path = "p".repeat(MAX_DEB_PATH);
        assert!(reparse(&at_limit).is_ok());
        assert!(fault_of(|deb| deb.path = "p".repeat(MAX_DEB_PATH + 1)).contains("leaves"));
    }

    #[test]
    fn package_named_twice_is_refused() {
        assert!(fault_of(|deb| deb.name = "bash".into()).contains("named twice"));
    }

    #[test]
    fn other_architecture_is_refused() {
        assert!(fault_of(|deb| deb.arch = "i386".into()).contains("architecture"));
    }

    #[test]
    fn lock_for_another_wish_is_stale() {
        let mut other = smoke();
        other.packages.push("vim".into());
        let error = Lock::parse(&lock().to_text(), Path::new("l"), &other).unwrap_err();
        assert!(matches!(error, LockError::Stale { what: "packages", .. }), "{error}");
        assert_eq!(error.exit(), Exit::Usage);
    }

    #[test]
    fn file_above_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let padding = |bytes: u64| "\n".repeat(usize::try_from(bytes).unwrap() - lock().to_text().len());
        std::fs::write(&path, lock().to_text() + &padding(MAX_LOCK)).unwrap();
        assert_eq!(Lock::load(&path, &smoke()).unwrap().0, lock());
        std::fs::write(&path, lock().to_text() + &padding(MAX_LOCK + 1)).unwrap();
        assert!(matches!(Lock::load(&path, &smoke()), Err(LockError::File(_))));
    }
}
