//! The ways in which stored things are not what they must be.

use super::is_full;
use kontor_bundle::{BundleError, lease::LeaseError};
use kontor_trust::{DeviceId, DocumentError, EnvelopeError, KeyError, KeysetError, PublicKey};
use std::{io, path::PathBuf};

/// Why something stored cannot be used, or something new is not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory.
    #[error("{doing} {path}{}", advice(source))]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Nothing was provisioned yet.
    #[error("there is no device record and no bundle yet")]
    NoDocuments,
    /// A file is longer than such a file can be.
    #[error("{path} is longer than {most} bytes")]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// The limit.
        most: u64,
    },
    /// Others than the owner may read the key.
    #[error("{0} may be read by others; its mode must be 0600")]
    KeyMode(PathBuf),
    /// The host key.
    #[error("use the host key")]
    Key(#[source] KeyError),
    /// `memory.json`.
    #[error("understand memory.json")]
    Memory(#[source] serde_json::Error),
    /// More than [`MAX_STORED_KEYSETS`](super::MAX_STORED_KEYSETS).
    #[error("a keyset of version {0}")]
    KeysetNumber(u64),
    /// The chain of keysets.
    #[error("the stored keyset {version}")]
    Keyset {
        /// Which link.
        version: u64,
        /// What is wrong.
        #[source]
        source: KeysetError,
    },
    /// Stored keysets were lost or damaged.
    #[error(
        "the stored keysets are not whole; give kontord provision every keyset, from the first to version {known} or a later one"
    )]
    KeysetsLost {
        /// The highest version that was seen.
        known: u64,
        /// What is wrong with those that are stored.
        #[source]
        source: Box<StoreError>,
    },
    /// The signatures of the device record.
    #[error("the device record is not signed as it must be")]
    DeviceEnvelope(#[source] EnvelopeError),
    /// The device record's content.
    #[error("the device record is malformed")]
    Device(#[source] DocumentError),
    /// The signatures of the bundle.
    #[error("the bundle is not signed as it must be")]
    BundleEnvelope(#[source] EnvelopeError),
    /// The bundle's content.
    #[error("the bundle")]
    Bundle(#[source] BundleError),
    /// A document of another tenant.
    #[error("the {0} is of another tenant")]
    OtherTenant(&'static str),
    /// The record of another device.
    #[error("the device record is for {found}, this is {expected}")]
    OtherDevice {
        /// The configured one.
        expected: DeviceId,
        /// The record's.
        found: DeviceId,
    },
    /// A record that names another host key.
    #[error("the device record names the host key {found}, this host's is {own}; enrol this host again")]
    OtherKey {
        /// The record's.
        found: PublicKey,
        /// The stored one.
        own: PublicKey,
    },
    /// The device is revoked.
    #[error("the device is revoked")]
    Revoked,
    /// A record that does not revoke.
    #[error("the office says that the device is revoked, and its record does not")]
    NotRevoked,
    /// More keysets than a lease comes with.
    #[error("{0} keysets came with a device record")]
    TooManyKeysets(usize),
    /// The bundle of another line.
    #[error("the bundle is for another line than the device's")]
    OtherLine,
    /// Something older than what was seen before.
    #[error("the {what} is of version {found}, version {known} was seen before")]
    Older {
        /// What is older.
        what: &'static str,
        /// Its version.
        found: u64,
        /// The highest seen.
        known: u64,
    },
    /// A lease that was checked against less than is stored by now.
    #[error("something newer was stored while the office was asked; start again")]
    Meanwhile(#[source] LeaseError),
    /// A lease for an enrolment that was replaced.
    #[error("the device was enrolled anew while the office was asked; start again")]
    EnrolledAnew,
    /// Another program changes the store.
    #[error("{0} is locked: kontord already runs for this device")]
    Busy(PathBuf),
}

impl StoreError {
    /// Whether something is simply not there yet.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::NoDocuments)
            || matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
    /// Whether the disk has no room for more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }
}

fn advice(error: &io::Error) -> &'static str {
    if is_full(error) { " (make room there)" } else { "" }
}
