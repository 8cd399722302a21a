//! What of the build machine has a hand in the image: compiler, linker, the C library that is linked
//! in, and the programs that make the root tree.

use crate::{
    command::{CommandError, Program, Run},
    files::{self, FileError},
    profile::Source,
};
use std::{collections::BTreeMap, path::Path};

/// The host's programs could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("this host has no static C library (install the Debian package libc6-dev)")]
    NoStaticLibc,
    #[error(transparent)]
    File(#[from] FileError),
}

impl HostError {
    pub(crate) fn exit(&self) -> crate::exit::Exit {
        match self {
            Self::Command(error) => error.exit(),
            Self::NoStaticLibc => crate::exit::Exit::HostLacks,
            Self::File(error) => error.exit(),
        }
    }
}

/// Program or library → version, as the lock records it.
pub(crate) fn programs(source: &Source) -> Result<BTreeMap<String, String>, HostError> {
    let version = |program, argument| Run::new(program).directory(source.root()).arg(argument).first_line();
    let mut found = BTreeMap::from([
        ("rustc".to_owned(), version(RUSTC, "-V")?),
        ("cc".to_owned(), version(CC, "--version")?),
        ("ld".to_owned(), version(LD, "--version")?),
    ]);
    let libc = Run::new(CC).arg("-print-file-name=libc.a").first_line()?;
    // cc answers with the bare name when it has no such file.
    if !Path::new(&libc).is_absolute() {
        return Err(HostError::NoStaticLibc);
    }
    found.insert("libc.a".into(), format!("sha256 {}", files::measure(Path::new(&libc))?.1));
    for package in PACKAGES {
        let query = ["--show", "--showformat", "${db:Status-Status} ${Version}\n", package];
        let answer = Run::new(DPKG_QUERY).args(query).first_line();
        match answer.as_deref().ok().and_then(|line| line.split_once(' ')) {
            Some(("installed", version)) => found.insert(package.into(), version.into()),
            _ => return Err(CommandError::Missing { program: package.into(), package }.into()),
        };
    }
    Ok(found)
}

/// Names of what differs between the host and the lock, with both versions.
pub(crate) fn differences(locked: &BTreeMap<String, String>, here: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = locked.keys().chain(here.keys()).collect();
    let version =
        |map: &BTreeMap<String, String>, name: &String| map.get(name).map_or("none".into(), Clone::clone);
    names
        .into_iter()
        .map(|name| (name, version(locked, name), version(here, name)))
        .filter(|(_, locked, here)| locked != here)
        .map(|(name, locked, here)| format!("{name} ({here} here, {locked} in the lock)"))
        .collect()
}

pub(crate) const RUSTC: Program = Program { name: "rustc", package: "rustup" };
const CC: Program = Program { name: "cc", package: "gcc" };
const LD: Program = Program { name: "ld", package: "binutils" };
const DPKG_QUERY: Program = Program { name: "dpkg-query", package: "dpkg" };
/// The programs that turn packages into a tree, and the C library that the guest's programs carry.
const PACKAGES: [&str; 5] = ["apt", "dpkg", "libc6-dev", "mmdebstrap", "tar"];

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn each_difference_is_named_with_both_versions() {
        let locked = map(&[("cc", "12"), ("ld", "2.40"), ("tar", "1.34")]);
        let here = map(&[("cc", "14"), ("ld", "2.40")]);
        assert_eq!(
            differences(&locked, &here),
            ["cc (14 here, 12 in the lock)", "tar (none here, 1.34 in the lock)"]
        );
        assert_eq!(differences(&locked, &locked), [""; 0]);
    }
}
