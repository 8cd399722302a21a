//! What is built before anything runs: the host's and the office's programs, the image, a tenant.

use crate::run::{Error, Result, at, openly, os, quietly};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::{
    env, fs,
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where everything lies that the inside needs; handed over as a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// The host's and the office's programs.
    pub(crate) bin: PathBuf,
    /// An unsigned image, as `kontor-image build` wrote it.
    pub(crate) image: PathBuf,
    /// Which device the work VM's uplink is.
    pub(crate) uplink: Backend,
    /// Scratch for this run alone.
    pub(crate) scratch: PathBuf,
    /// The demo's JSON report goes to this file (`-`: standard output).
    pub(crate) json: Option<PathBuf>,
}

/// Which device the work VM's uplink is, as kontord's configuration names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum Backend {
    Port,
    Vfio,
}

impl Backend {
    pub(crate) const ALL: [Self; 2] = [Self::Port, Self::Vfio];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Vfio => "vfio",
        }
    }
}

impl Plan {
    /// Says that the plan comes by standard input.
    pub(crate) const STDIN: &str = "-";

    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        let read = if path == Path::new(Self::STDIN) {
            std::io::stdin().lock().read_to_end(&mut bytes)
        } else {
            fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes))
        };
        read.map_err(at("read the plan", path))?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { what: "the plan".into(), source })
    }

    /// Standard input for a program that reads the plan from there.
    pub(crate) fn as_stdin(&self) -> Result<Stdio> {
        let bytes =
            serde_json::to_vec(self).map_err(|source| Error::Json { what: "the plan".into(), source })?;
        let memory = memfd_create("plan", MemfdFlags::CLOEXEC).map_err(os("memory for the plan"))?;
        let mut file = fs::File::from(memory);
        let written = file.write_all(&bytes).and_then(|()| file.rewind());
        written.map_err(at("write the plan", Path::new("memory")))?;
        Ok(file.into())
    }
}

/// The profile of demo and tests.
pub(crate) const PROFILE: &str = "smoke";

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.to_owned(), Path::to_owned)
}

pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Where the caches lie, as `kontor-image` finds them too; all of them optional.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(path) = env::var_os("KONTOR_CACHE") {
        return Ok(path.into());
    }
    if let Some(path) = env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()) {
        return Ok(Path::new(&path).join("kontor"));
    }
    let home = env::var_os("HOME").ok_or_else(|| Error::Unexpected("HOME is not set".into()))?;
    Ok(Path::new(&home).join(".cache/kontor"))
}

/// Builds the programs; returns the directory they lie in.
pub(crate) fn programs() -> Result<PathBuf> {
    // The whole workspace, so that dependencies are built once, with the features that tests use too.
    let target = root().join("target");
    let arguments = ["build", "--locked", "--workspace", "--bins", "--target-dir"];
    openly(cargo().args(arguments).arg(&target))?;
    Ok(target.join("debug"))
}

/// Builds the image of [`PROFILE`] with the lock in the tree, or a fresh one where the archive has
/// moved on; returns its directory.
pub(crate) fn image(bin: &Path) -> Result<PathBuf> {
    make(bin, "build", "image")
}

/// Makes what benchmarks boot, from the same lock; returns its directory.
pub(crate) fn bench(bin: &Path) -> Result<PathBuf> {
    make(bin, "bench", "bench")
}

fn make(bin: &Path, verb: &str, name: &str) -> Result<PathBuf> {
    const UNREACHABLE: i32 = 5;
    let tool = bin.join("kontor-image");
    let out = root().join("target/kontor").join(name);
    fs::create_dir_all(root().join("target/kontor")).map_err(at("create", &out))?;
    let committed = root().join(format!("image-build/image/{PROFILE}.lock.toml"));
    let build = |lock: &Path| {
        let mut command = Command::new(&tool);
        command.current_dir(root()).args([verb, "--profile", PROFILE, "--lock"]).arg(lock);
        command.arg("--out").arg(&out);
        openly(&mut command)
    };
    match build(&committed) {
        Err(Error::Failed { status, .. }) if status.code() == Some(UNREACHABLE) => {
            eprintln!("the committed lock names packages that the archive no longer has: locking afresh");
            let fresh = root().join("target/kontor/fresh.lock.toml");
            let mut lock = Command::new(&tool);
            lock.current_dir(root()).args(["lock", "--profile", PROFILE, "--out"]).arg(&fresh);
            openly(&mut lock)?;
            build(&fresh)?;
        }
        other => other?,
    }
    Ok(out)
}

/// Copies `from` to `to`, sharing blocks where the file system can.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    quietly(Command::new("cp").args(["--archive", "--reflink=auto"]).arg(from).arg(to)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Features of boringtun as all packages beside `manifest` together switch them on.
    fn boringtun_features(manifest: &str) -> Vec<String> {
        let mut metadata = cargo();
        metadata.args(["metadata", "--locked", "--format-version", "1", "--manifest-path", manifest]);
        let bytes = quietly(metadata.args(["--filter-platform", "x86_64-unknown-linux-gnu"])).unwrap();
        let metadata: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
        let is_boringtun = |id: &str| id.contains("#boringtun@");
        let node = nodes.iter().find(|node| node["id"].as_str().is_some_and(is_boringtun)).unwrap();
        let features = node["features"].as_array().unwrap();
        features.iter().map(|feature| feature.as_str().unwrap().to_owned()).collect()
    }

    /// A clock that a program sets is for the simulator; of all that ships, tests included, nothing has it.
    #[test]
    fn only_the_simulator_has_a_clock_that_a_program_sets() {
        assert!(boringtun_features("vpn/simulator/Cargo.toml").iter().any(|name| name.starts_with("mock")));
        assert_eq!(boringtun_features("Cargo.toml"), [""; 0]);
    }
}
