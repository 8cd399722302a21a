//! dm-verity's hash tree, version 1, SHA-256, without a superblock (kernel documentation,
//! admin-guide/device-mapper/verity).
//!
//! ```text
//! data block 0 … data block N-1 │ top level (one block) │ … │ lowest level │
//!                                 hash(salt ‖ block) of each block of the level below, 128 a block,
//!                                 the rest of a block zero; the root hash is that of the top block
//! ```

use kontor_trust::Digest;
use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN};
use std::io::{self, Read};

/// Bytes of a block, of data and of hashes alike.
pub(crate) const BLOCK: usize = 4096;

/// A finished tree.
pub(crate) struct Tree {
    /// What vouches for everything.
    pub(crate) root: Digest,
    /// Whole blocks, to stand right behind the data.
    pub(crate) blocks: Vec<u8>,
}

/// The salt of an image: every image its own, and the same for the same image.
pub(crate) fn salt(data: &Digest) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(SALT_LABEL);
    context.update(&data.0);
    Digest::finish(context.finish()).0
}

/// The tree over `data_blocks` blocks, at least one.
pub(crate) fn tree(mut data: impl Read, data_blocks: u64, salt: &[u8; 32]) -> io::Result<Tree> {
    let mut block = [0; BLOCK];
    let mut hashes = Vec::new();
    for _ in 0..data_blocks {
        data.read_exact(&mut block)?;
        hashes.extend(hash(&block, salt));
    }
    let mut levels = Vec::new();
    while hashes.len() > SHA256_OUTPUT_LEN {
        hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
        let above = hashes.chunks_exact(BLOCK).flat_map(|block| hash(block, salt)).collect();
        levels.push(std::mem::replace(&mut hashes, above));
    }
    let root = hashes.try_into().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "no data"))?;
    let blocks = levels.into_iter().rev().flatten().collect();
    Ok(Tree { root: Digest(root), blocks })
}

fn hash(block: &[u8], salt: &[u8; 32]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(salt);
    context.update(block);
    Digest::finish(context.finish()).0
}

const SALT_LABEL: &[u8] = b"kontor root image salt 1\0";

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const SALT: [u8; 32] = [7; 32];

    /// Blocks that all differ, unless there are more than 251.
    fn data(blocks: u8) -> Vec<u8> {
        (0..blocks).flat_map(|n| [n % 251; BLOCK]).collect()
    }

    fn tree_of(data: &[u8]) -> Tree {
        tree(data, (data.len() / BLOCK) as u64, &SALT).unwrap()
    }

    #[test]
    fn tree_of_two_levels_is_the_one_that_cryptsetup_2_7_5_makes() {
        let tree = tree_of(&data(129));
        assert_eq!(tree.root.to_string(), "6a6639a88083454395c2e0f5715ca85ce7f674f633fa5cc56336f9c015a9ed73");
        assert_eq!(
            Digest::of(&tree.blocks).to_string(),
            "6d9f400e5d9ab7741d382aceb17bd5a4ed8a4b3504d5975177b048bec4de4fd2"
        );
    }

    #[test]
    fn levels_grow_at_128_blocks() {
        for (blocks, tree_blocks) in [(1, 0), (2, 1), (128, 1), (129, 3)] {
            assert_eq!(tree_of(&data(blocks)).blocks.len(), tree_blocks * BLOCK, "{blocks}");
        }
    }

    #[test]
    fn every_byte_counts() {
        let good = data(3);
        for at in [0, BLOCK, 3 * BLOCK - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_ne!(tree_of(&bad).root, tree_of(&good).root);
        }
    }

    #[test]
    fn no_data_and_short_data_are_errors() {
        assert!(tree(&[][..], 0, &SALT).is_err());
        assert!(tree(&data(1)[1..], 1, &SALT).is_err());
    }

    #[test]
    fn veritysetup_verifies_the_tree() {
        if Command::new("veritysetup").arg("--version").output().is_err() {
            eprintln!("skipped: this host has no veritysetup (Debian package cryptsetup-bin)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (data_path, tree_path) = (dir.path().join("data"), dir.path().join("tree"));
        for blocks in [2, 128, 129, 255] {
            let data = data(blocks);
            let tree = tree_of(&data);
            std::fs::write(&data_path, &data).unwrap();
            std::fs::write(&tree_path, &tree.blocks).unwrap();
            let verify = Command::new("veritysetup")
                .args(["verify", "--no-superblock", "--hash=sha256", "--salt", &hex::encode(SALT)])
                .args([&data_path, &tree_path])
                .arg(tree.root.to_string())
                .output()
                .unwrap();
            assert!(verify.status.success(), "{blocks}: {}", String::from_utf8_lossy(&verify.stderr));
        }
    }
}
