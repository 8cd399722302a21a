//! The first initrd segment: `kontor-init` and the modules that it loads, nothing else.
//!
//! ```text
//! /init   /modules/NN-name.ko   /modules-vfio/NN-name.ko (in load order)   and to mount on: /dev /proc /sys /root
//! ```

use crate::{cpio, exit::Exit};
use std::io;

/// The initrd could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitrdError {
    #[error("pack the initrd")]
    Cpio(#[from] cpio::CpioError),
    #[error("compress the initrd")]
    Zstd(#[source] io::Error),
}

impl InitrdError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Cpio(_) | Self::Zstd(_) => Exit::Bug,
        }
    }
}

/// The compressed segment.
pub(crate) fn pack(init: Vec<u8>, modules: Vec<(String, Vec<u8>)>) -> Result<Vec<u8>, InitrdError> {
    let mut archive = cpio::Archive::default();
    for directory in ["dev", "modules", "modules-vfio", "proc", "root", "sys"] {
        archive.directory(directory);
    }
    archive.file("init", 0o755, init)?;
    for (name, content) in modules {
        archive.file(&name, 0o644, content)?;
    }
    zstd::bulk::compress(&archive.to_bytes(), LEVEL).map_err(InitrdError::Zstd)
}

/// The highest level whose window every kernel unpacks.
const LEVEL: i32 = 19;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_unpacks_to_init_modules_and_mount_points() {
        let modules = vec![("modules/00-virtio_blk.ko".to_owned(), b"ko".to_vec())];
        let packed = pack(b"\x7fELF".to_vec(), modules.clone()).unwrap();
        assert_eq!(packed, pack(b"\x7fELF".to_vec(), modules).unwrap());
        let unpacked = zstd::bulk::decompress(&packed, 1 << 20).unwrap();
        let text = String::from_utf8_lossy(&unpacked);
        for name in ["dev\0", "init\0", "modules/00-virtio_blk.ko\0", "proc\0", "root\0", "sys\0"] {
            assert!(text.contains(name), "{name:?}");
        }
    }
}
