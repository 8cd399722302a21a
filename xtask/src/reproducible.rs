//! The same lock and compiler give the same image, bit for bit: it is built a second time as somebody else
//! would, elsewhere and later, and nothing of the machine is found in it.

use crate::{
    build::{self, PROFILE},
    run::{Error, Result, at, openly, quietly},
};
use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// What the second builder's environment says; none of it may matter.
const OTHERWISE: [(&str, &str); 6] = [
    ("LANG", "tr_TR.UTF-8"),
    ("LC_ALL", "tr_TR.UTF-8"),
    ("TZ", "Pacific/Kiritimati"),
    ("SOURCE_DATE_EPOCH", "12345"),
    ("USER", "somebody-else"),
    ("LOGNAME", "somebody-else"),
];
/// The second builder keeps everything from others.
const UMASK: u32 = 0o077;
/// Shorter words stand in any program by chance.
const TELLING: usize = 6;

/// Builds `image` again from a copy of the source tree and compares. Nothing is shared but the downloads.
pub(crate) fn twice(bin: &Path, image: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("kontor-second-").tempdir();
    let scratch = scratch.map_err(at("make a directory in", &env::temp_dir()))?;
    let home = scratch.path().join("home-of-somebody-else");
    let checkout = home.join("work/another-checkout");
    copy_checkout(&checkout)?;
    let cache = home.join("cache");
    let own_cargo = env::var_os("CARGO_HOME").map_or_else(|| own_home().join(".cargo"), PathBuf::from);
    let cargo = home.join(".cargo");
    for (from, to) in [
        (build::cache()?.join("debs"), cache.join("debs")),
        (own_cargo.join("registry/cache"), cargo.join("registry/cache")),
        (own_cargo.join("registry/index"), cargo.join("registry/index")),
        (own_cargo.join("config.toml"), cargo.join("config.toml")),
    ] {
        if let (true, Some(parent)) = (from.exists(), to.parent()) {
            fs::create_dir_all(parent).map_err(at("create", parent))?;
            symlink(&from, &to).map_err(at("link", &to))?;
        }
    }
    let again = home.join("image");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("umask {UMASK:03o}; exec \"$@\""), "sh"]);
    command.arg(bin.join("kontor-image")).args(["build", "--profile", PROFILE, "--lock"]);
    command.arg(image.join("lock.toml")).arg("--out").arg(&again).current_dir(&checkout);
    command.envs(OTHERWISE).env("HOME", &home).env("KONTOR_CACHE", &cache).env("CARGO_HOME", &cargo);
    // Toolchains are found by the first home, where no variable names their place.
    let toolchains = env::var_os("RUSTUP_HOME").map_or_else(|| own_home().join(".rustup"), PathBuf::from);
    command.env("RUSTUP_HOME", toolchains);
    openly(&mut command)?;
    let mut compare = Command::new(bin.join("kontor-image"));
    quietly(compare.arg("compare").arg(image).arg(&again))?;
    let (first, second) = (root_hash(bin, image)?, root_hash(bin, &again)?);
    if first != second {
        return Err(Error::Unexpected(format!("root hash {first}, and {second} when built again")));
    }
    eprintln!("built again elsewhere: identical, root hash {first}");
    traceless(bin, image, &scratch.path().join("first"), &[build::root(), own_home(), own_cargo])?;
    traceless(bin, &again, &scratch.path().join("second"), &[home])
}

fn own_home() -> PathBuf {
    env::var_os("HOME").map(PathBuf::from).unwrap_or_default()
}

/// Everything of the source tree but what was built from it, with new times.
fn copy_checkout(to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(at("create", to))?;
    let root = build::root();
    let entries = fs::read_dir(&root).map_err(at("list", &root))?;
    for entry in entries {
        let path = entry.map_err(at("list", &root))?.path();
        if !["target", ".git"].map(OsStr::new).contains(&path.file_name().unwrap_or_default()) {
            quietly(Command::new("cp").args(["--recursive", "--no-dereference"]).arg(&path).arg(to))?;
        }
    }
    Ok(())
}

fn root_hash(bin: &Path, image: &Path) -> Result<String> {
    let printed = quietly(Command::new(bin.join("kontor-image")).args(["inspect", "--json"]).arg(image))?;
    let report: serde_json::Value = serde_json::from_slice(&printed)
        .map_err(|source| Error::Json { what: "kontor-image inspect --json".into(), source })?;
    let hash = report["image"]["verity"]["root_hash"].as_str();
    hash.map(str::to_owned).ok_or_else(|| Error::Unexpected(format!("no root hash of {}", image.display())))
}

/// Takes the image apart at `apart`; fails where a file of it holds a path of `paths`, the host's or the user's
/// name, or what the host resolves names by.
fn traceless(bin: &Path, image: &Path, apart: &Path, paths: &[PathBuf]) -> Result<()> {
    let mut unpack = Command::new(bin.join("kontor-image"));
    unpack.current_dir(build::root()).args(["unpack", "--profile", PROFILE, "--image"]).arg(image);
    openly(unpack.arg("--out").arg(apart))?;
    let mut traces: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    traces.push(rustix::system::uname().nodename().to_string_lossy().into_owned());
    traces.extend(["USER", "LOGNAME"].into_iter().filter_map(|name| env::var(name).ok()));
    traces.push(OTHERWISE[4].1.to_owned());
    let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let words = resolver.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_ascii_whitespace);
    traces.extend(words.filter(|word| !RESOLVER_WORDS.contains(word)).map(str::to_owned));
    traces.retain(|trace| trace.len() >= TELLING);
    let mut files = Vec::new();
    collect(apart, &mut files)?;
    collect(image, &mut files)?;
    for file in &files {
        let bytes = fs::read(file).map_err(at("read", file))?;
        if let Some(trace) = traces.iter().find(|trace| contains(&bytes, trace.as_bytes())) {
            return Err(Error::Unexpected(format!("{} holds {trace:?}", file.display())));
        }
    }
    // Too short to be looked for everywhere: where it would stand.
    let name = fs::read_to_string(apart.join("root/etc/hostname")).unwrap_or_default();
    if name.trim() == rustix::system::uname().nodename().to_string_lossy() {
        return Err(Error::Unexpected(format!("the work VM is called {name:?} like this machine")));
    }
    eprintln!("{} files of the image hold none of {traces:?}", files.len());
    Ok(())
}

/// Keywords of resolv.conf(5), and what they are often followed by.
const RESOLVER_WORDS: [&str; 8] =
    ["nameserver", "search", "domain", "options", "edns0", "trust-ad", "127.0.0.53", "127.0.0.1"];

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(at("list", directory))? {
        let entry = entry.map_err(at("list", directory))?;
        let kind = entry.file_type().map_err(at("look at", &entry.path()))?;
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    let Some(first) = wanted.first() else { return false };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        rest = &rest[at..];
        if rest.starts_with(wanted) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_is_found_wherever_it_stands() {
        for bytes in ["builder", "a builder", "bbuilder x", "\0bui\0builder"] {
            assert!(contains(bytes.as_bytes(), b"builder"), "{bytes:?}");
        }
        for bytes in ["", "build", "b u i l d e r"] {
            assert!(!contains(bytes.as_bytes(), b"builder"), "{bytes:?}");
        }
    }

    #[test]
    fn checkout_is_copied_without_what_was_built() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("x");
        copy_checkout(&to).unwrap();
        assert!(to.join("Cargo.lock").is_file() && to.join("xtask/src/reproducible.rs").is_file());
        assert!(!to.join("target").exists() && !to.join(".git").exists());
    }
}
