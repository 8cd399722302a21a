//! The kernel and those of its modules that the initrd holds, out of the kernel's package.

use crate::{
    cache::{self, Cache, Entry, Kind},
    command::CommandError,
    exit::Exit,
    files::{self, FileError},
    lock::Lock,
    modules::{Index, ModulesError, Texts},
    profile::Profile,
    progress::Progress,
    tools::{self, Tools, ToolsError},
};
use std::path::Path;

/// The kernel's files in use.
pub(crate) struct Kernel(Entry);

/// The kernel's package is not what is expected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Tools(#[from] ToolsError),
    #[error(transparent)]
    Modules(#[from] ModulesError),
    #[error("package {0} holds {1} kernels, one is expected")]
    Kernels(String, usize),
}

impl KernelError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
            Self::Tools(error) => error.exit(),
            Self::Modules(_) | Self::Kernels(..) => Exit::Usage,
        }
    }
}

impl Kernel {
    /// Takes the kernel apart, unless the cache has it.
    pub(crate) fn unpack(
        lock: &Lock,
        profile: &Profile,
        tools: &Tools,
        cache: &Cache,
        progress: &Progress,
    ) -> Result<Self, KernelError> {
        let parts = [lock.kernel.sha256.0, tools::key(&lock.tool).0];
        let parts = parts.iter().map(|p| &p[..]).chain(profile.modules.iter().map(String::as_bytes));
        let entry = cache.entry(Kind::Kernel, &cache::key(RECIPE, parts), |path| {
            let _step = progress.step(format!("take {} apart", lock.kernel.name));
            let scratch = cache.scratch()?;
            tools::unpack(&cache.deb(&lock.kernel.sha256), scratch.path())?;
            pick(scratch.path(), path, &lock.kernel.name, &profile.modules, tools)
        })?;
        Ok(Self(entry))
    }

    /// The kernel's own file.
    pub(crate) fn image(&self) -> std::path::PathBuf {
        self.0.path().join(IMAGE)
    }

    /// Names and contents of the modules, in load order.
    pub(crate) fn modules(&self) -> Result<Vec<(String, Vec<u8>)>, FileError> {
        let directory = self.0.path().join(MODULES);
        let read = |name: String| Ok((name.clone(), files::read(&directory.join(name), MAX_MODULE)?));
        files::list(&directory)?.into_iter().map(read).collect()
    }
}

/// Moves kernel and modules from the unpacked package to the cache's entry.
fn pick(from: &Path, to: &Path, package: &str, wishes: &[String], tools: &Tools) -> Result<(), KernelError> {
    let versions = files::list(&from.join(TREE))?;
    let [version] = &versions[..] else {
        return Err(KernelError::Kernels(package.to_owned(), versions.len()));
    };
    let tree = from.join(TREE).join(version);
    tools.depmod().arg("-b").arg(from).args(["-m", "/usr/lib/modules", version]).bytes()?;
    let text = |name| files::read_text(&tree.join(name), MAX_INDEX);
    let (dep, alias) = (text("modules.dep")?, text("modules.alias")?);
    let (softdep, builtin) = (text("modules.softdep")?, text("modules.builtin")?);
    let index = Index::parse(Texts { dep: &dep, alias: &alias, softdep: &softdep, builtin: &builtin });
    let order = index.order(wishes)?;
    files::make_directory(&to.join(MODULES))?;
    for (number, path) in order.iter().enumerate() {
        let name = path.rsplit('/').next().unwrap_or(path);
        files::link_or_copy(&tree.join(path), &to.join(MODULES).join(format!("{number:02}-{name}")))?;
    }
    files::link_or_copy(&from.join(format!("boot/vmlinuz-{version}")), &to.join(IMAGE))?;
    Ok(())
}

const RECIPE: &str = "kernel 1";
const TREE: &str = "usr/lib/modules";
const IMAGE: &str = "vmlinuz";
const MODULES: &str = "modules";
/// Most bytes of a compressed module.
const MAX_MODULE: u64 = 64 * 1024 * 1024;
/// Most bytes of one of depmod's files.
const MAX_INDEX: u64 = 64 * 1024 * 1024;
