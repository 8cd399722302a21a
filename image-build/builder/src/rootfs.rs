//! The root tree as the packages make it: mmdebstrap, offline, from exactly the locked packages.

use crate::{
    cache::{self, Cache, Entry, Kind},
    command::{CommandError, Program, Run},
    deb822,
    exit::Exit,
    files::{self, FileError},
    lock::{Deb, Lock},
    profile::Profile,
    progress::Progress,
    staging::Staging,
    tools::DPKG_DEB,
};
use std::{collections::BTreeMap, fs::File, path::Path};

/// The base tree in use, a tar archive.
pub(crate) struct BaseTree(Entry);

/// The base tree could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(
        "an ordinary user needs a range of user ids for this: add one to /etc/subuid and /etc/subgid with usermod --add-subuids and --add-subgids (tried as user {0})"
    )]
    NoSubordinateIds(u32),
}

impl RootError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
            Self::NoSubordinateIds(_) => Exit::HostLacks,
        }
    }
}

impl BaseTree {
    /// Installs the lock's packages into a tree, unless the cache has it.
    pub(crate) fn make(
        lock: &Lock,
        profile: &Profile,
        host: &BTreeMap<String, String>,
        cache: &Cache,
        progress: &Progress,
    ) -> Result<Self, RootError> {
        let entry = cache.entry(Kind::Root, &key(lock, profile, host), |path| {
            let _step = progress.step(format!("install {} packages in a tree", lock.root.len()));
            install(lock, profile, cache, &path.join(TAR))
        })?;
        Ok(Self(entry))
    }

    pub(crate) fn read(&self) -> Result<Vec<u8>, FileError> {
        files::read(&self.0.path().join(TAR), MAX_TAR)
    }
}

fn key(lock: &Lock, profile: &Profile, host: &BTreeMap<String, String>) -> kontor_trust::Digest {
    let built_at = lock.built_at.to_le_bytes();
    let rules = [&profile.packages, &profile.exclude, &profile.keep].map(|list| list.join("\n"));
    let host = HOST.map(|name| host.get(name).map_or("", String::as_str));
    let parts = lock.root.iter().map(|deb| &deb.sha256.0[..]).chain([&built_at[..]]);
    cache::key(RECIPE, parts.chain(rules.iter().map(String::as_bytes)).chain(host.map(str::as_bytes)))
}

fn install(lock: &Lock, profile: &Profile, cache: &Cache, tar: &Path) -> Result<(), RootError> {
    let as_root = rustix::process::geteuid().is_root();
    // The users that an ordinary user's tree is made by cannot enter that user's home.
    let scratch =
        if as_root { cache.scratch()? } else { Staging::begin(&std::env::temp_dir(), "kontor-step")? };
    let archive = scratch.path().join("archive");
    files::make_directory(&archive)?;
    write_archive(&lock.root, cache, &archive)?;
    let output = File::create_new(tar).map_err(FileError::at("write", tar))?;
    let mut run = Run::new(MMDEBSTRAP)
        .env("SOURCE_DATE_EPOCH", lock.built_at.to_string())
        .env("TMPDIR", scratch.path())
        .args(["--quiet", "--variant=essential", "--format=tar", "--architectures=amd64"])
        .arg(if as_root { "--mode=root" } else { "--mode=unshare" })
        .arg(format!("--include={}", profile.packages.join(",")));
    let exclude = profile.exclude.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}"));
    let keep = profile.keep.iter().map(|pattern| format!("--dpkgopt=path-include={pattern}"));
    run = run.args(exclude.chain(keep));
    // No suite: the archive is the lock's, whole. Trusted, because every package was checked by hash.
    let source = format!("deb [trusted=yes] copy:{} ./", archive.display());
    run.args(["", "-"]).arg(source).output_to(output).bytes().map_err(|error| {
        if error.last_words().contains("/etc/subuid") {
            RootError::NoSubordinateIds(rustix::process::geteuid().as_raw())
        } else {
            RootError::Command(error)
        }
    })?;
    Ok(())
}

/// A flat package archive: the files and their index.
fn write_archive(debs: &[Deb], cache: &Cache, archive: &Path) -> Result<(), RootError> {
    let mut index = String::new();
    for deb in debs {
        let (cached, file) = (cache.deb(&deb.sha256), format!("{}.deb", deb.name));
        // Copied where a link would keep a user's private modes, or another file system is in between.
        files::link_or_copy(&cached, &archive.join(&file))?;
        index += &index_entry(&Run::new(DPKG_DEB).arg("--field").arg(&cached).text()?, deb, &file);
    }
    files::write_new(&archive.join("Packages"), index.as_bytes())?;
    Ok(())
}

/// A package's stanza: what it says of itself, and where it lies.
fn index_entry(control: &str, deb: &Deb, file: &str) -> String {
    debug_assert_eq!(deb822::parse(control).len(), 1);
    let control = control.trim_end();
    format!("{control}\nFilename: ./{file}\nSize: {}\nSHA256: {}\n\n", deb.bytes, deb.sha256)
}

/// Changes when this file makes another tree from the same.
const RECIPE: &str = "root 1";
const MMDEBSTRAP: Program = Program { name: "mmdebstrap", package: "mmdebstrap" };
/// The host's programs that the tree passes through.
const HOST: [&str; 4] = ["apt", "dpkg", "mmdebstrap", "tar"];
const TAR: &str = "root.tar";
/// Most bytes of a root tree, which is held in memory.
const MAX_TAR: u64 = 8 << 30;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lock::tests::lock, profile::tests::smoke};

    #[test]
    fn index_entry_is_one_stanza_with_hash_and_place() {
        let lock = lock();
        let entry = index_entry("Package: bash\nDescription: shell\n more\n", &lock.root[0], "bash.deb");
        let stanzas = deb822::parse(&entry);
        assert_eq!(stanzas.len(), 1);
        assert_eq!(stanzas[0].get("Filename"), Some("./bash.deb"));
        assert_eq!(stanzas[0].get("SHA256"), Some(lock.root[0].sha256.to_string().as_str()));
    }

    #[test]
    fn key_follows_packages_rules_time_and_host_but_not_the_profiles_files() {
        let here = BTreeMap::from([("mmdebstrap".to_owned(), "1".to_owned())]);
        let base = key(&lock(), &smoke(), &here);
        let mut other = smoke();
        other.files.clear();
        assert_eq!(key(&lock(), &other, &here), base);
        other.exclude.push("/usr/share/x".into());
        assert_ne!(key(&lock(), &other, &here), base);
        let mut later = lock();
        later.built_at += 1;
        assert_ne!(key(&later, &smoke(), &here), base);
        let mut fewer = lock();
        fewer.root.pop();
        assert_ne!(key(&fewer, &smoke(), &here), base);
        assert_ne!(key(&lock(), &smoke(), &BTreeMap::new()), base);
    }
}
