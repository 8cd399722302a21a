//! The release repository: a directory of TUF metadata and of the files that it names, for any static
//! server.
//!
//! ```text
//! metadata/1.root.json …       who may sign what; each signed by its predecessor's root keys and its own
//! metadata/timestamp.json      the one file that changes: names the newest snapshot
//! metadata/N.snapshot.json     names the newest targets
//! metadata/N.targets.json      names every file of the newest releases; two persons sign it
//! targets/SHA256.NAME          the files
//! ```
//!
//! This crate signs metadata, and verifies it at rest: without a network, and without a clock, since a
//! stored release does not grow old by lying there. Expiry and rollback are judged where metadata is
//! fetched. Signatures are checked by `tough`; there are only the four top-level roles, and a delegation is
//! refused. Pure: bytes in, bytes out. Only Ed25519 keys are read, and no role may have one of them twice.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod layout;
mod sign;
mod verify;

pub use layout::{
    MANIFEST_SUFFIX, METADATA, TARGETS, TIMESTAMP, keyset_target, manifest_target, piece_target, root_file,
    snapshot_file, target_file, targets_file,
};
pub use sign::{Draft, RootDraft, Sealed, SignError, Signer, Staff, new_root, refresh, seal};
pub use verify::{
    MAX_ROLE, MAX_ROOTS, Metadata, MetadataError, RoleError, Target, TrustedRoot, Verified, Versions, gather,
    verify,
};

pub use tough::schema::RoleType;

#[cfg(test)]
mod tests;
