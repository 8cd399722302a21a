//! An image taken apart, to be looked at.

use crate::{
    Failure,
    build::{INITRD, LOCK, ROOT},
    cache::Cache,
    files::{self, FileError},
    lock::Lock,
    profile::Profile,
    progress::Progress,
    tools::{Tools, ToolsError},
};
use std::{fs, io, path::Path};

/// Writes the files of the image's root to `out/root` and its initrd, which is an archive, to
/// `out/initrd.cpio`. Owners and modes are left behind.
pub(crate) fn unpack(
    image: &Path,
    profile: &Profile,
    out: &Path,
    progress: &Progress,
) -> Result<(), Failure> {
    let (lock, _) = Lock::load(&image.join(LOCK), profile)?;
    let tools = Tools::unpack(&lock, &Cache::open()?, progress)?;
    fs::create_dir(out).map_err(FileError::at("create", out))?;
    let packed = files::read(&image.join(INITRD), MAX_INITRD)?;
    let unpacked = decompress(&packed).map_err(FileError::at("decompress", &image.join(INITRD)))?;
    files::write_new(&out.join("initrd.cpio"), &unpacked)?;
    let mut extract = std::ffi::OsString::from("--extract=");
    extract.push(out.join("root"));
    tools
        .fsck_erofs()
        .args(["--no-preserve-owner", "--no-preserve-perms"])
        .arg(extract)
        .arg(image.join(ROOT))
        .bytes()
        .map_err(ToolsError::from)?;
    Ok(())
}

fn decompress(packed: &[u8]) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    let mut reader = io::Read::take(zstd::Decoder::new(packed)?, MAX_INITRD + 1);
    io::Read::read_to_end(&mut reader, &mut unpacked)?;
    if unpacked.len() as u64 > MAX_INITRD {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(unpacked)
}

/// Most bytes of an initrd, packed or not.
const MAX_INITRD: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initrd_that_fits_is_unpacked_and_a_larger_one_is_not() {
        for (size, fits) in [(0, true), (MAX_INITRD, true), (MAX_INITRD + 1, false)] {
            let packed = zstd::encode_all(io::Read::take(io::repeat(7), size), 1).unwrap();
            assert_eq!(decompress(&packed).is_ok(), fits, "{size}");
        }
        assert!(decompress(b"no archive").is_err());
    }
}
