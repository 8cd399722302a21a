//! Which files of the host are in a jail, and where.

use crate::arguments::{Profile, Task};
use kontor_jail::{FIRMWARE, Grants, JailError, libraries::Loaded};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Libraries lie here, whatever directory of the host they come from.
pub(crate) const LIBRARIES: &str = "/lib";
/// QEMU looks here for its own modules.
pub(crate) const MODULES: &str = "/modules";
const KVM: &str = "/dev/kvm";

/// What a PC of the kind q35 reads to boot a kernel, and where distributions keep it.
const ROMS: &[&str] = &["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];
const ROM_DIRECTORIES: &[&str] = &["/usr/share/qemu", "/usr/share/seabios", "/usr/share/qemu-kvm"];
/// The emulator itself, where it is a module, and where distributions keep it.
const EMULATOR: &[&str] = &["accel-tcg-x86_64.so", "accel-tcg-i386.so"];
const MODULE_DIRECTORIES: &[&str] = &["/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib64/qemu", "/usr/lib/qemu"];

/// One file of the host and its place in the jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) from: PathBuf,
    pub(crate) to: PathBuf,
}

#[derive(Debug, Default)]
pub(crate) struct Layout {
    pub(crate) programs: Vec<Bind>,
    pub(crate) libraries: Vec<Bind>,
    pub(crate) data: Vec<Bind>,
    pub(crate) device: Option<PathBuf>,
}

impl Layout {
    pub(crate) fn of(task: &Task) -> Result<Self, JailError> {
        let Task::Start(start) = task else { return Ok(Self::default()) };
        let doing = || JailError::at::<io::Error>(format!("find {}", start.program.display()));
        let real = fs::canonicalize(&start.program).map_err(doing())?;
        let qemu = start.profile != Profile::Relay;
        let modules: Vec<PathBuf> = if qemu {
            EMULATOR.iter().filter_map(|name| first(name, MODULE_DIRECTORIES)).take(1).collect()
        } else {
            Vec::new()
        };
        let loaded = Loaded::of(&real, &modules)?;
        let loader = fs::canonicalize(&loaded.loader).map_err(doing())?;
        let mut layout = Self {
            programs: vec![
                Bind { from: real, to: start.program.clone() },
                Bind { from: loader, to: loaded.loader },
            ],
            ..Self::default()
        };
        let named = |directory: &str, from: &Path| {
            let name = from.file_name().unwrap_or_default();
            Bind { from: from.to_owned(), to: Path::new(directory).join(name) }
        };
        for (name, file) in &loaded.libraries {
            let from = fs::canonicalize(file).map_err(doing())?;
            layout.libraries.push(Bind { from, to: Path::new(LIBRARIES).join(name) });
        }
        for module in &modules {
            layout.libraries.push(named(MODULES, module));
        }
        if qemu {
            for name in ROMS {
                if let Some(file) = first(name, ROM_DIRECTORIES) {
                    let from = fs::canonicalize(&file).map_err(doing())?;
                    layout.data.push(Bind { from, to: Path::new(FIRMWARE).join(name) });
                }
            }
        }
        layout.device = (start.profile == Profile::QemuKvm).then(|| KVM.into());
        Ok(layout)
    }

    /// What Landlock lets pass of it.
    pub(crate) fn grants(&self) -> Grants {
        let places = |binds: &[Bind]| binds.iter().map(|bind| bind.to.clone()).collect::<Vec<_>>();
        let mut read = [places(&self.libraries), places(&self.data)].concat();
        // Its own descriptors, and what the C library asks of its own process.
        read.push("/proc".into());
        Grants { read, execute: places(&self.programs), devices: self.device.iter().cloned().collect() }
    }
}

fn first(name: &str, directories: &[&str]) -> Option<PathBuf> {
    directories.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
}
