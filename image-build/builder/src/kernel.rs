//! The kernel and those of its modules that the initrd holds, out of the kernel's package.

use crate::{
    cache::{self, Cache, Entry, Kind},
    command::{CommandError, Program, Run},
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
    #[error("module {0} is compressed in a way that is not known")]
    Compressed(String),
}

impl KernelError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
            Self::Tools(error) => error.exit(),
            Self::Modules(_) | Self::Kernels(..) | Self::Compressed(_) => Exit::Usage,
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
        let parts = parts.chain([BETWEEN]).chain(profile.vfio_modules.iter().map(String::as_bytes));
        let entry = cache.entry(Kind::Kernel, &cache::key(RECIPE, parts), |path| {
            let _step = progress.step(format!("take {} apart", lock.kernel.name));
            let scratch = cache.scratch()?;
            tools::unpack(&cache.deb(&lock.kernel.sha256), scratch.path())?;
            pick(scratch.path(), path, &lock.kernel.name, profile, tools)
        })?;
        Ok(Self(entry))
    }

    /// The kernel's own file.
    pub(crate) fn image(&self) -> std::path::PathBuf {
        self.0.path().join(IMAGE)
    }

    /// Paths in the initrd and contents of the modules, in load order.
    pub(crate) fn modules(&self) -> Result<Vec<(String, Vec<u8>)>, FileError> {
        let mut modules = Vec::new();
        for directory in [MODULES, VFIO_MODULES] {
            let at = self.0.path().join(directory);
            for name in files::list(&at)? {
                let content = files::read(&at.join(&name), MAX_MODULE)?;
                modules.push((format!("{directory}/{name}"), content));
            }
        }
        Ok(modules)
    }
}

/// Moves kernel and modules from the unpacked package to the cache's entry.
fn pick(from: &Path, to: &Path, package: &str, profile: &Profile, tools: &Tools) -> Result<(), KernelError> {
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
    let always = index.order(&profile.modules)?;
    // What is wanted last comes last, so the first ones are the same.
    let all = index.order(&[&profile.modules[..], &profile.vfio_modules].concat())?;
    let vfio = all.get(always.len()..).unwrap_or_default();
    for (directory, order) in [(MODULES, &always[..]), (VFIO_MODULES, vfio)] {
        files::make_directory(&to.join(directory))?;
        for (number, path) in order.iter().enumerate() {
            let name = path.rsplit('/').next().unwrap_or(path);
            let name = name.strip_suffix(XZ_SUFFIX).unwrap_or(name);
            let content = plain(&tree.join(path))?;
            files::write_new(&to.join(directory).join(format!("{number:02}-{name}")), &content)?;
        }
    }
    files::link_or_copy(&from.join(format!("boot/vmlinuz-{version}")), &to.join(IMAGE))?;
    Ok(())
}

/// A module as the kernel takes it, with its signature: the initrd is compressed as a whole, which is as small,
/// and what each boot would unpack one by one the build unpacks once.
fn plain(path: &Path) -> Result<Vec<u8>, KernelError> {
    let name = path.display().to_string();
    if name.ends_with(XZ_SUFFIX) {
        Ok(Run::new(XZ).args(["--decompress", "--stdout"]).arg(path).bytes()?)
    } else if name.ends_with(".ko") {
        Ok(files::read(path, MAX_MODULE)?)
    } else {
        Err(KernelError::Compressed(name))
    }
}

const RECIPE: &str = "kernel 2";
/// Tells the two lists of modules in a key apart.
const BETWEEN: &[u8] = b"";
const XZ: Program = Program { name: "xz", package: "xz-utils" };
const XZ_SUFFIX: &str = ".xz";
const TREE: &str = "usr/lib/modules";
const IMAGE: &str = "vmlinuz";
const MODULES: &str = "modules";
const VFIO_MODULES: &str = "modules-vfio";
/// Most bytes of a module.
const MAX_MODULE: u64 = 64 * 1024 * 1024;
/// Most bytes of one of depmod's files.
const MAX_INDEX: u64 = 64 * 1024 * 1024;
