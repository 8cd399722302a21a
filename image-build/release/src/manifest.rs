//! The two descriptions of a release.
//!
//! `image.json` is what `kontor-image build` writes: tenant-neutral, unsigned, the same bit for bit
//! for the same lock and compiler. `manifest.json` is what `kontor-image sign --tenant` makes of it:
//! the same image plus the tenant's segment, named in full, ready to be signed.
//!
//! A release directory holds `manifest.json` and the pieces that it names.

use crate::{CommandLine, CommandLineError, Digest};
use serde::{Deserialize, Serialize};

/// The one format of both descriptions so far.
pub const FORMAT: u32 = 1;
/// Most bytes of a description.
pub const MAX_MANIFEST: usize = 64 * 1024;
/// Most keysets in a tenant's segment: the guest reads no more, so nobody signs more.
pub const MAX_SEGMENT_KEYSETS: usize = 64;
/// Most bytes of one piece: 16 GiB, far above any root image.
pub const MAX_PIECE: u64 = 16 << 30;

/// A file of the release: its name within the release's directory, length and digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// File name without any directory.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the content.
    pub sha256: Digest,
}

/// How dm-verity opens the root image. Blocks are 4096 bytes, the digest is SHA-256, the tree stands
/// behind the data in the same file, without a superblock (kernel documentation, dm-verity, version 1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verity {
    /// Root of the hash tree.
    pub root_hash: Digest,
    /// Salt in front of every hashed block.
    #[serde(with = "hex::serde")]
    pub salt: [u8; 32],
    /// Data blocks; the tree begins at this block.
    pub data_blocks: u64,
}

/// `image.json`: a built image that belongs to no tenant yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// [`FORMAT`].
    pub format: u32,
    /// Profile it was built from.
    pub profile: String,
    /// Name for people, such as `smoke-20251123`.
    pub release: String,
    /// Unix time that stands for the build, in seconds; from the lock, not from a clock.
    pub built_at: u64,
    /// Whether it carries the probe channel.
    pub test: bool,
    /// Smallest guest memory in MiB that it runs in.
    pub memory_mib_min: u32,
    /// Kernel command line, whole but for what depends on the host's accelerator.
    pub cmdline: String,
    /// How the root image is opened.
    pub verity: Verity,
    /// The kernel.
    pub kernel: Piece,
    /// The first initrd segment: `kontor-init` and its modules.
    pub initrd: Piece,
    /// The root image with its hash tree.
    pub root: Piece,
    /// Software bill of materials, CycloneDX JSON.
    pub sbom: Piece,
    /// The lock that it was built from.
    pub lock: Piece,
}

/// `manifest.json`: an image made ready for one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The tenant: SHA-256 of its first keyset's payload.
    pub tenant: Digest,
    /// Rises with every release of the tenant; an older one is refused once a newer was seen.
    pub version: u64,
    /// The second initrd segment: tenant and keysets.
    pub segment: Piece,
    /// Everything else.
    pub image: Image,
}

/// What is wrong with a description.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than [`MAX_MANIFEST`].
    #[error("the manifest has {0} bytes, the limit is {MAX_MANIFEST}")]
    TooLong(usize),
    /// Not the JSON that is expected.
    #[error("the manifest does not parse")]
    Parse(#[source] serde_json::Error),
    /// A format that this version does not read.
    #[error("the manifest has format {0}, this version reads {FORMAT}")]
    Format(u32),
    /// A piece's name would leave the directory.
    #[error("the manifest names a piece {0:?}, which is no plain file name")]
    Name(String),
    /// A piece is larger than [`MAX_PIECE`].
    #[error("the manifest names a piece {name:?} of {bytes} bytes")]
    Size {
        /// Which piece.
        name: String,
        /// Its announced length.
        bytes: u64,
    },
    /// The command line is broken.
    #[error("the manifest's command line is wrong")]
    CommandLine(#[source] CommandLineError),
    /// The command line and the manifest say different things.
    #[error("the manifest's command line and its {0} differ")]
    Differs(&'static str),
}

impl Image {
    /// Reads `image.json`.
    ///
    /// # Errors
    /// [`ManifestError`] names what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let image: Self = parse(bytes)?;
        image.check()?;
        Ok(image)
    }

    /// Every piece, in a fixed order.
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        [&self.kernel, &self.initrd, &self.root, &self.sbom, &self.lock].into_iter()
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.format != FORMAT {
            return Err(ManifestError::Format(self.format));
        }
        self.pieces().try_for_each(Piece::check)?;
        let line = CommandLine::parse(&self.cmdline).map_err(ManifestError::CommandLine)?;
        if line.verity != self.verity {
            return Err(ManifestError::Differs("verity parameters"));
        }
        if line.built_at != self.built_at {
            return Err(ManifestError::Differs("build time"));
        }
        if line.test != self.test {
            return Err(ManifestError::Differs("test mark"));
        }
        Ok(())
    }
}

impl Manifest {
    /// Reads `manifest.json`.
    ///
    /// # Errors
    /// [`ManifestError`] names what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = parse(bytes)?;
        manifest.image.check()?;
        manifest.segment.check()?;
        Ok(manifest)
    }

    /// Every piece, in a fixed order.
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.image.pieces().chain([&self.segment])
    }
}

impl Piece {
    fn check(&self) -> Result<(), ManifestError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.bytes().all(plain) {
            return Err(ManifestError::Name(self.name.chars().take(160).collect()));
        }
        if self.bytes > MAX_PIECE {
            return Err(ManifestError::Size { name: self.name.clone(), bytes: self.bytes });
        }
        Ok(())
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, ManifestError> {
    if bytes.len() > MAX_MANIFEST {
        return Err(ManifestError::TooLong(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(ManifestError::Parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(name: &str) -> Piece {
        Piece { name: name.into(), bytes: 5, sha256: Digest::of(b"hello") }
    }

    fn manifest() -> Manifest {
        let verity = Verity { root_hash: Digest([1; 32]), salt: [2; 32], data_blocks: 3 };
        let line = CommandLine { verity: verity.clone(), built_at: 9, test: true };
        let image = Image {
            format: FORMAT,
            profile: "smoke".into(),
            release: "smoke-1".into(),
            built_at: 9,
            test: true,
            memory_mib_min: 128,
            cmdline: format!("quiet {line}"),
            verity,
            kernel: piece("kernel"),
            initrd: piece("initrd"),
            root: piece("root.img"),
            sbom: piece("sbom.cdx.json"),
            lock: piece("lock.toml"),
        };
        Manifest { tenant: Digest([7; 32]), version: 1, segment: piece("segment"), image }
    }

    fn reparse(manifest: &Manifest) -> Result<Manifest, ManifestError> {
        Manifest::parse(&serde_json::to_vec(manifest).unwrap())
    }

    #[test]
    fn manifest_survives_writing_and_reading() {
        assert_eq!(reparse(&manifest()).unwrap(), manifest());
    }

    #[test]
    fn piece_that_leaves_the_directory_is_refused() {
        for name in ["../kernel", "a/b", "", ".hidden", "nul\0"] {
            let mut bad = manifest();
            bad.segment.name = name.into();
            assert!(matches!(reparse(&bad), Err(ManifestError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn command_line_that_names_another_root_is_refused() {
        let mut bad = manifest();
        bad.image.verity.data_blocks = 4;
        assert!(matches!(reparse(&bad), Err(ManifestError::Differs("verity parameters"))));
    }

    #[test]
    fn test_image_cannot_hide_that_it_is_one() {
        let mut bad = manifest();
        bad.image.test = false;
        assert!(matches!(reparse(&bad), Err(ManifestError::Differs("test mark"))));
    }

    #[test]
    fn unknown_and_repeated_fields_are_refused() {
        let text = serde_json::to_string(&manifest()).unwrap();
        let unknown = text.replacen("\"version\":1", "\"version\":1,\"extra\":1", 1);
        let repeated = text.replacen("\"version\":1", "\"version\":1,\"version\":2", 1);
        for bad in [unknown, repeated] {
            assert!(matches!(Manifest::parse(bad.as_bytes()), Err(ManifestError::Parse(_))));
        }
    }

    #[test]
    fn manifest_above_the_limit_is_refused() {
        let long = vec![b' '; MAX_MANIFEST + 1];
        assert!(matches!(Manifest::parse(&long), Err(ManifestError::TooLong(_))));
    }
}
