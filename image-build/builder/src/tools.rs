//! The tool tree: programs of the image's own Debian release that make the image. They run on the
//! build machine through their own loader, with their own libraries, whatever that machine has.

use crate::{
    cache::{self, Cache, Entry, Kind},
    command::{CommandError, Program, Run},
    exit::Exit,
    files::FileError,
    lock::{Deb, Lock},
    progress::Progress,
};
use kontor_trust::Digest;
use std::path::Path;

/// The tool tree in use.
pub(crate) struct Tools(Entry);

/// The tool tree could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolsError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl ToolsError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
        }
    }
}

impl Tools {
    /// Unpacks the lock's tools, unless the cache has them.
    pub(crate) fn unpack(lock: &Lock, cache: &Cache, progress: &Progress) -> Result<Self, ToolsError> {
        let entry = cache.entry(Kind::Tools, &key(&lock.tool), |path| {
            let _step = progress.step(format!("unpack {} tool packages", lock.tool.len()));
            lock.tool.iter().try_for_each(|deb| unpack(&cache.deb(&deb.sha256), path))
        })?;
        Ok(Self(entry))
    }

    pub(crate) fn mkfs_erofs(&self) -> Run {
        self.run("usr/bin/mkfs.erofs", "mkfs.erofs")
    }

    pub(crate) fn fsck_erofs(&self) -> Run {
        self.run("usr/bin/fsck.erofs", "fsck.erofs")
    }

    pub(crate) fn depmod(&self) -> Run {
        // One program that looks at the name it is called by.
        self.run("usr/bin/kmod", "depmod")
    }

    fn run(&self, program: &str, name: &str) -> Run {
        let tree = self.0.path();
        let libraries = tree.join(LIBRARIES);
        Run::of_path(&libraries.join(LOADER), "libc6")
            .arg("--library-path")
            .arg(&libraries)
            .args(["--argv0", name])
            .arg(tree.join(program))
    }
}

/// Identifies a tool tree.
pub(crate) fn key(tools: &[Deb]) -> Digest {
    cache::key("tools 1", tools.iter().map(|deb| deb.sha256.0))
}

/// Unpacks a package into a directory, without running anything of it.
pub(crate) fn unpack(deb: &Path, into: &Path) -> Result<(), ToolsError> {
    Run::new(DPKG_DEB).arg("--extract").arg(deb).arg(into).bytes()?;
    Ok(())
}

/// What the tool tree is resolved from.
pub(crate) const WANTED: [&str; 2] = ["erofs-utils", "kmod"];
pub(crate) const DPKG_DEB: Program = Program { name: "dpkg-deb", package: "dpkg" };
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";
