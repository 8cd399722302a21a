//! `cargo xtask fresh`: the README's two commands on a Debian 13 that has nothing but what the README asks for.
//!
//! ```text
//!   mmdebstrap ──► tree.tar (cached) ──► a directory ──► its own mounts and processes, as root
//!   this checkout's HEAD ── git clone ──► /root/kontor there ──► cargo xtask demo, cargo xtask test
//! ```
//!
//! How to reach registries and mirrors the caller's environment says; it is handed on by name and never
//! written into the tree. Certificates that it names, the resolver's configuration and, where rustup cannot
//! reach its server, the caller's toolchain are mounted read-only.

use crate::{
    build, packages,
    run::{Error, Result, at, openly, quietly, text},
};
use std::{
    env,
    ffi::OsString,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

const SUITE: &str = "trixie";
/// What the README asks for.
const PACKAGES: &str = "ca-certificates,gcc,git,libc6-dev,rustup";
const CHECKOUT: &str = "root/kontor";
/// Lines of each command that are shown once more at the end.
const CLOSING: usize = 16;
/// Variables that say how to reach something, and the beginnings of others.
const HANDED_ON: [&str; 11] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "RUSTUP_DIST_SERVER",
    "RUSTUP_UPDATE_ROOT",
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "TERM",
];
const HANDED_ON_BEGINNINGS: [&str; 4] = ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];

/// Runs `commands` of the README, each in its turn while they succeed; all where none is named.
pub(crate) fn run(commands: &[String]) -> Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Lacks("a fresh Debian has a root of its own: run this as root".into()));
    }
    packages::ensure()?;
    let store = build::cache()?.join("fresh");
    fs::create_dir_all(&store).map_err(at("create", &store))?;
    let archive = archive(&store)?;
    let place = tempfile::Builder::new()
        .prefix("tree-")
        .tempdir_in(&store)
        .map_err(at("make a directory in", &store))?;
    let tree = place.path();
    eprintln!("── unpacking");
    openly(Command::new("tar").arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(tree))?;
    let mut clone = Command::new("git");
    quietly(clone.args(["clone", "--quiet", "--no-hardlinks"]).arg(build::root()).arg(tree.join(CHECKOUT)))?;
    let toolchain = toolchain(tree)?;
    let commands =
        if commands.is_empty() { vec!["demo".to_owned(), "test".to_owned()] } else { commands.to_vec() };
    let mut closing = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for command in commands {
        eprintln!("── cargo xtask {command}");
        let (success, lines) = in_tree(tree, toolchain.as_deref(), &format!("cargo xtask {command}"))?;
        closing.push((command, success, lines));
        if !success {
            code = ExitCode::FAILURE;
            break;
        }
    }
    for (command, success, lines) in closing {
        eprintln!("\n── cargo xtask {command}: {}", if success { "done" } else { "FAILED" });
        lines.iter().for_each(|line| eprintln!("{line}"));
    }
    place.close().map_err(at("remove what was made in", &store))?;
    Ok(code)
}

/// The Debian tree as an archive, made anew when the lock in the source tree or the list of packages changes.
fn archive(store: &Path) -> Result<PathBuf> {
    let lock = build::root().join(format!("image-build/image/{}.lock.toml", build::PROFILE));
    let printed = quietly(Command::new("sha256sum").arg(&lock))?;
    let snapshot: String = String::from_utf8_lossy(&printed).chars().take(16).collect();
    let archive = store.join(format!("{SUITE}-{snapshot}-{}.tar", PACKAGES.replace(',', "+")));
    if archive.exists() {
        eprintln!("── the Debian tree of last time: {}", archive.display());
        return Ok(archive);
    }
    eprintln!("── making a Debian tree of {SUITE} with {PACKAGES}");
    let partial = archive.with_extension("partial");
    let mut make = Command::new("mmdebstrap");
    make.args(["--variant=minbase", "--format=tar", "--include", PACKAGES, SUITE]).arg(&partial);
    if let Some(mirror) = mirror()? {
        make.arg(mirror);
    }
    openly(&mut make)?;
    fs::rename(&partial, &archive).map_err(at("rename", &partial))?;
    Ok(archive)
}

/// The mirror that apt here uses for Debian.
fn mirror() -> Result<Option<String>> {
    let mut ask = Command::new("apt-get");
    ask.args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Origin: Debian",
        "Label: Debian",
    ]);
    let printed = quietly(&mut ask)?;
    Ok(String::from_utf8_lossy(&printed).lines().next().map(|line| line.trim_end_matches('/').to_owned()))
}

/// The caller's toolchain, where rustup in the tree cannot fetch its own.
fn toolchain(tree: &Path) -> Result<Option<PathBuf>> {
    eprintln!("── fetching the toolchain with rustup");
    let (fetched, _) = in_tree(tree, None, "cargo --version")?;
    if fetched {
        eprintln!("   the toolchain is rustup's, fetched for this tree");
        return Ok(None);
    }
    let printed = quietly(Command::new("rustc").current_dir(build::root()).args(["--print", "sysroot"]))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&printed).trim());
    eprintln!("   rustup's server is not reached: the toolchain is the caller's, mounted read-only");
    Ok(Some(sysroot))
}

/// Runs `script` as root in the tree, in the checkout; whether it succeeded, and its last lines.
fn in_tree(tree: &Path, toolchain: Option<&Path>, script: &str) -> Result<(bool, Vec<String>)> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig=KILL", "--", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"]);
    command.args(["--kill-child=SIGKILL", "--", "sh", "-euc", ENTER, "sh"]).arg(tree).arg(script);
    let mut read_only: Vec<(PathBuf, PathBuf)> = Vec::new();
    for file in ["/etc/resolv.conf".into()].into_iter().chain(certificates()) {
        let inside = tree.join(file.strip_prefix("/").unwrap_or(&file));
        read_only.push((file, inside));
    }
    if let Some((toolchain, name)) = toolchain.and_then(|path| Some((path, path.file_name()?))) {
        read_only.push((toolchain.to_owned(), tree.join("root/.rustup/toolchains").join(name)));
    }
    for (from, to) in read_only {
        command.arg(from).arg(to);
    }
    command.env_clear().envs(handed_on());
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root");
    command.env("LANG", "C.UTF-8").stdin(Stdio::null()).stdout(Stdio::piped());
    // Both go one way, so that they come in their order.
    let words = text(&command);
    let failed = |source| Error::Start(words.clone(), source);
    let mut child = command.spawn().map_err(failed)?;
    let stdout = child.stdout.take().ok_or_else(|| Error::Unexpected("no standard output".into()))?;
    let mut last = std::collections::VecDeque::new();
    for line in BufReader::new(stdout).lines() {
        let line = line.map_err(failed)?;
        eprintln!("{line}");
        if last.len() == CLOSING {
            last.pop_front();
        }
        last.push_back(line);
    }
    let status = child.wait().map_err(failed)?;
    Ok((status.success(), last.into()))
}

/// Makes the tree in `$1` the root and runs `$2` there. Then come pairs: what is mounted read-only, and where.
/// `chroot` would not do: no user namespace is made in one.
const ENTER: &str = r#"
exec 2>&1
tree=$1 script=$2
shift 2
mount --bind "$tree" "$tree"
mount -t proc proc "$tree/proc"
mount --rbind /sys "$tree/sys"
mount --rbind /dev "$tree/dev"
while [ $# -gt 0 ]; do
    if [ -d "$1" ]; then mkdir -p "$2"; else mkdir -p "$(dirname "$2")"; [ -e "$2" ] || : > "$2"; fi
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
    shift 2
done
cd "$tree"
pivot_root . mnt
cd /
umount -l /mnt
hostname fresh
cd /root/kontor
exec sh -c "$script"
"#;

/// Files of certificates that the environment names.
fn certificates() -> impl Iterator<Item = PathBuf> {
    let named = ["SSL_CERT_FILE", "CURL_CA_BUNDLE"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    named
        .filter(|path| path.is_absolute() && path.is_file())
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
}

fn handed_on() -> Vec<(OsString, OsString)> {
    env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_handed_on)).collect()
}

fn is_handed_on(name: &str) -> bool {
    HANDED_ON.contains(&name) || HANDED_ON_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_how_to_reach_something_is_handed_on() {
        for name in ["https_proxy", "SSL_CERT_FILE", "CARGO_REGISTRIES_X_INDEX", "RUSTUP_DIST_SERVER"] {
            assert!(is_handed_on(name), "{name}");
        }
        for name in
            ["HOME", "CARGO_HOME", "CARGO_TARGET_DIR", "RUSTUP_HOME", "SECRET", "CARGO_REGISTRY_TOKEN"]
        {
            assert!(!is_handed_on(name), "{name}");
        }
    }
}
