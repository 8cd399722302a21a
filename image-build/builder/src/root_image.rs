//! The root image: the tree as erofs, and behind it the hash tree that dm-verity checks it with.

use crate::{
    command::CommandError,
    exit::Exit,
    files::{self, FileError},
    sbom::uuid_of,
    tools::Tools,
    verity,
};
use kontor_release::Verity;
use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, Seek, SeekFrom, Write},
    path::Path,
};

/// The root image could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootImageError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("the file system in {0} is damaged")]
    Damaged(String, #[source] CommandError),
}

impl RootImageError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
            Self::Damaged(..) => Exit::NotVerified,
        }
    }
}

/// Makes the image `to` out of the tree in the archive `tar`.
pub(crate) fn make(tar: &Path, to: &Path, built_at: u64, tools: &Tools) -> Result<Verity, RootImageError> {
    let (tar_bytes, tar_digest) = files::measure(tar)?;
    // mkfs.erofs reports a full disk as a broken archive.
    files::require_space(to, tar_bytes)?;
    let uuid = uuid_of(&tar_digest);
    tools
        .mkfs_erofs()
        .args(["--quiet", "--tar=f", &format!("-b{}", verity::BLOCK)])
        .args(COMPRESSION)
        .args(["-T", &built_at.to_string(), "-U", &uuid])
        .args([to, tar])
        .bytes()?;
    check(to, tools)?;
    Ok(append_tree(to)?)
}

/// Reads the whole file system back: every inode, every compressed block.
fn check(image: &Path, tools: &Tools) -> Result<(), RootImageError> {
    let checked = tools.fsck_erofs().arg("--extract").arg(image).bytes();
    checked.map(drop).map_err(|e| RootImageError::Damaged(image.display().to_string(), e))
}

/// Appends the hash tree; says how it is opened.
fn append_tree(image: &Path) -> Result<Verity, FileError> {
    let (bytes, digest) = files::measure(image)?;
    let salt = verity::salt(&digest);
    let append = || {
        let mut file = OpenOptions::new().read(true).write(true).open(image)?;
        let data_blocks = bytes.div_ceil(verity::BLOCK as u64);
        file.set_len(data_blocks * verity::BLOCK as u64)?;
        let tree = verity::tree(BufReader::new(&file), data_blocks, &salt)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(&tree.blocks)?;
        Ok(Verity { root_hash: tree.root, salt, data_blocks })
    };
    append().map_err(FileError::at("append the hash tree to", image))
}

/// Whether an image is what `verity` says: the tree over its data has that root, and stands behind it.
pub(crate) fn fits(image: &Path, verity: &Verity) -> Result<bool, FileError> {
    let read = || {
        let file = File::open(image)?;
        let length = file.metadata()?.len();
        let data = verity.data_blocks.checked_mul(verity::BLOCK as u64).filter(|data| *data <= length);
        let Some(data) = data else { return Ok(false) };
        let mut reader = BufReader::new(file);
        let tree = verity::tree(&mut reader, verity.data_blocks, &verity.salt)?;
        let mut behind = Vec::new();
        io::copy(&mut reader, &mut behind)?;
        Ok(tree.root == verity.root_hash && tree.blocks == behind && data + behind.len() as u64 == length)
    };
    read().map_err(FileError::at("read", image))
}

/// Level 4 is where zstd's ratio leaps on a tree of programs (30 MB, level 3 makes 36); level 6 takes
/// two thirds longer for another 2 %. Fragments and deduplication pack small files and the ends of large.
const COMPRESSION: [&str; 3] = ["-zzstd,4", "-C65536", "-Efragments,dedupe"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appended_tree_fits_until_a_byte_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.img");
        std::fs::write(&path, [5; 3 * verity::BLOCK + 1]).unwrap();
        let verity = append_tree(&path).unwrap();
        assert_eq!(verity.data_blocks, 4);
        assert!(fits(&path, &verity).unwrap());
        let good = std::fs::read(&path).unwrap();
        assert_eq!(good.len(), 5 * verity::BLOCK);
        for at in [0, 3 * verity::BLOCK + 1, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            assert!(!fits(&path, &verity).unwrap(), "{at}");
        }
        std::fs::write(&path, &good[..verity::BLOCK]).unwrap();
        assert!(!fits(&path, &verity).unwrap());
        let greedy = Verity { data_blocks: u64::MAX, ..verity };
        assert!(!fits(&path, &greedy).unwrap());
    }
}
