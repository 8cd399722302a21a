//! Kernel modules: those in the initrd, in the order of their names.

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::system::finit_module;
use std::io;
use std::path::{Path, PathBuf};

/// Where the initrd holds those that every machine needs, as `NN-name.ko`.
pub(crate) const DIRECTORY: &str = "/modules";
/// Those that a machine needs whose uplink is a device behind an IOMMU.
pub(crate) const VFIO_DIRECTORY: &str = "/modules-vfio";
const SUFFIX: &str = ".ko";
/// Most modules of an image.
const MODULES_MAX: usize = 99;
/// Why a module did not load.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error("list the modules")]
    List(#[source] io::Error),
    #[error("the initrd holds more than {MODULES_MAX} modules")]
    TooMany,
    #[error("{0:?} is no module")]
    Name(PathBuf),
    #[error("load {path:?}")]
    Load { path: PathBuf, source: Errno },
}

/// Loads all modules of `directory`; returns how many there are and how many of them are not for this machine.
pub(crate) fn load_all(directory: &str) -> Result<(usize, usize), ModuleError> {
    let modules = in_order(Path::new(directory))?;
    let mut passed_over = 0;
    for path in &modules {
        match load(path) {
            Ok(()) | Err(Errno::EXIST) => {}
            // Accelerated digests say so on a processor without the instructions. Where something is
            // lacking that is needed, the step that needs it fails.
            Err(Errno::NODEV) => passed_over += 1,
            Err(source) => return Err(ModuleError::Load { path: path.clone(), source }),
        }
    }
    Ok((modules.len(), passed_over))
}

fn load(path: &Path) -> Result<(), Errno> {
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    finit_module(&file, c"", 0)
}

fn in_order(directory: &Path) -> Result<Vec<PathBuf>, ModuleError> {
    let mut modules = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(ModuleError::List)? {
        let entry = entry.map_err(ModuleError::List)?;
        if !entry.file_name().to_str().is_some_and(is_module) {
            return Err(ModuleError::Name(entry.file_name().into()));
        }
        if modules.len() == MODULES_MAX {
            return Err(ModuleError::TooMany);
        }
        modules.push(entry.path());
    }
    modules.sort();
    Ok(modules)
}

/// `NN-name.ko`
fn is_module(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(SUFFIX) else { return false };
    let &[tens, ones, b'-', _, ..] = stem.as_bytes() else { return false };
    tens.is_ascii_digit() && ones.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn directory(names: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(directory.path().join(name), b"").unwrap();
        }
        directory
    }

    #[test]
    fn modules_come_in_the_order_of_their_numbers() {
        let directory = directory(&["10-erofs.ko", "02-dm-mod.ko", "01-virtio_blk.ko"]);
        let names: Vec<_> = in_order(directory.path()).unwrap();
        let names: Vec<_> = names.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["01-virtio_blk.ko", "02-dm-mod.ko", "10-erofs.ko"]);
    }

    #[test]
    fn what_is_no_module_is_refused() {
        for name in ["erofs.ko", "1-erofs.ko", "01-.ko", "01-erofs.ko.xz", "readme"] {
            let directory = directory(&[name]);
            assert!(matches!(in_order(directory.path()), Err(ModuleError::Name(_))), "{name}");
        }
    }

    #[test]
    fn as_many_modules_as_allowed_are_listed_and_one_more_is_refused() {
        let names: Vec<String> = (0..=MODULES_MAX).map(|n| format!("{:02}-m{n}.ko", n % 100)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(in_order(directory(&names[..MODULES_MAX]).path()).unwrap().len(), MODULES_MAX);
        assert!(matches!(in_order(directory(&names).path()), Err(ModuleError::TooMany)));
    }

    #[test]
    fn missing_directory_is_named() {
        assert!(matches!(in_order(Path::new("/nowhere")), Err(ModuleError::List(_))));
    }
}
