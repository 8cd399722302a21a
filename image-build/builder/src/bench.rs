//! What benchmarks boot: the image's own kernel, and an initrd whose only program measures. No image is made.

use crate::{
    Failure,
    apt::Mirrors,
    cache::Cache,
    fetch,
    files::{self, FileError},
    guest::Guest,
    initrd,
    kernel::Kernel,
    lock::Lock,
    profile::{Profile, Source},
    progress::Progress,
    sbom,
    tools::Tools,
};
use std::path::Path;

/// The uplinks' modules, and the driver that they are compared with.
const MODULES: [&str; 5] = ["irqbypass", "vfio", "vfio_iommu_type1", "vfio-pci", "virtio_net"];
/// The kernel, as in an image.
const KERNEL: &str = "kernel";
/// The program and [`MODULES`].
const INITRD: &str = "uplink.initrd";
/// The program alone.
const EMPTY: &str = "empty.initrd";

/// Writes kernel and initrds into `out`, which is made where it is missing.
pub(crate) fn make(
    source: &Source,
    profile: &Profile,
    lock: &Path,
    mirrors: &Mirrors,
    out: &Path,
    progress: &Progress,
) -> Result<(), Failure> {
    let (lock, _) = Lock::load(lock, profile)?;
    let cache = Cache::open()?;
    fetch::fetch(lock.debs(), &cache, mirrors, progress)?;
    let crates = sbom::crates(source)?;
    let program = Guest::bench(source, &crates, &cache, progress)?;
    let tools = Tools::unpack(&lock, &cache, progress)?;
    let modules = MODULES.map(str::to_owned).to_vec();
    let profile = Profile { modules, vfio_modules: Vec::new(), ..profile.clone() };
    let kernel = Kernel::unpack(&lock, &profile, &tools, &cache, progress)?;
    files::make_directory(out)?;
    let write = |name: &str, bytes: &[u8]| -> Result<(), FileError> {
        let path = out.join(name);
        std::fs::write(&path, bytes).map_err(FileError::at("write", &path))
    };
    write(INITRD, &initrd::pack(program.clone(), kernel.modules()?)?)?;
    write(EMPTY, &initrd::pack(program, Vec::new())?)?;
    write(KERNEL, &files::read(&kernel.image(), MAX_KERNEL)?)?;
    Ok(())
}

/// Most bytes of a kernel.
const MAX_KERNEL: u64 = 64 * 1024 * 1024;
