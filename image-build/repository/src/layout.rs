//! Where things lie, and what they are called.
//!
//! Names of targets have no directory, since clients differ in where they put the digest then.

use kontor_release::{Digest, Piece};

/// Directory of the metadata.
pub const METADATA: &str = "metadata";
/// Directory of the files that the metadata names.
pub const TARGETS: &str = "targets";
/// The one metadata file without a version in its name.
pub const TIMESTAMP: &str = "timestamp.json";
/// How the name of each release's description ends.
pub const MANIFEST_SUFFIX: &str = ".manifest.json";

/// Name of a root file.
#[must_use]
pub fn root_file(version: u64) -> String {
    format!("{version}.root.json")
}

/// Name of a snapshot.
#[must_use]
pub fn snapshot_file(version: u64) -> String {
    format!("{version}.snapshot.json")
}

/// Name of a list of targets.
#[must_use]
pub fn targets_file(version: u64) -> String {
    format!("{version}.targets.json")
}

/// The target that describes a profile's newest release.
#[must_use]
pub fn manifest_target(profile: &str) -> String {
    format!("{profile}{MANIFEST_SUFFIX}")
}

/// The target of a piece of that release.
#[must_use]
pub fn piece_target(profile: &str, piece: &Piece) -> String {
    format!("{profile}.{}", piece.name)
}

/// The target of a keyset.
#[must_use]
pub fn keyset_target(version: u64) -> String {
    format!("keyset-{version:08}.json")
}

/// The file below [`TARGETS`] that holds a target of this content.
#[must_use]
pub fn target_file(target: &str, sha256: &Digest) -> String {
    format!("{sha256}.{target}")
}
