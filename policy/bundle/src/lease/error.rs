//! The ways in which a lease is not to be believed.

use crate::BundleError;
use kontor_trust::{DocumentError, EnvelopeError, KeysetError};
use std::net::IpAddr;

/// Why a lease is refused.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// More than [`MAX_KEYSETS`](super::MAX_KEYSETS) keysets.
    #[error("{0} keysets came with the lease, the limit is {limit}", limit = super::MAX_KEYSETS)]
    TooManyKeysets(usize),
    /// The chain of keysets.
    #[error("the chain of keysets")]
    Keyset(#[source] KeysetError),
    /// A signature.
    #[error("the {kind} is not signed as it must be")]
    Envelope {
        /// Of which document.
        kind: &'static str,
        /// What is wrong.
        #[source]
        source: EnvelopeError,
    },
    /// A document's content.
    #[error("a document of the lease is malformed")]
    Document(#[source] DocumentError),
    /// The bundle's content.
    #[error("the lease's bundle")]
    Bundle(#[source] BundleError),
    /// A document of another tenant.
    #[error("the {kind} is of another tenant")]
    OtherTenant {
        /// Which document.
        kind: &'static str,
    },
    /// The device record says that it is revoked.
    #[error("the device is revoked")]
    Revoked,
    /// The lease is for another device than its record or request.
    #[error("the lease is for another device")]
    OtherDevice,
    /// The lease is for another enrolment of the device.
    #[error("the lease is for another enrolment of the device")]
    OtherEnrolment,
    /// The lease names another line than the device record.
    #[error("the lease is for another line than the device's")]
    OtherLine,
    /// The lease was made under another keyset than the newest.
    #[error("the lease was made under keyset {lease}, the newest is {newest}")]
    KeysetVersion {
        /// What the lease names.
        lease: u64,
        /// The newest.
        newest: u64,
    },
    /// The lease names another bundle than the one beside it.
    #[error("the lease is for another bundle")]
    OtherBundle,
    /// The bundle is for another line than the lease.
    #[error("the bundle is for another line than the lease's")]
    BundleLine,
    /// Lease and bundle name different revisions.
    #[error("the lease is for revision {lease}, the bundle has revision {bundle}")]
    BundleRevision {
        /// What the lease names.
        lease: u64,
        /// What the bundle says.
        bundle: u64,
    },
    /// It ends before it begins, or lasts longer than the bundle allows.
    #[error("the lease lasts from {issued_at} to {not_after}, at most {most_s} s are allowed")]
    Life {
        /// Unix seconds.
        issued_at: u64,
        /// Unix seconds.
        not_after: u64,
        /// Seconds.
        most_s: u64,
    },
    /// The lease names a gateway that the bundle does not have.
    #[error("the lease names gateway {0}, which the bundle does not have")]
    UnknownGateway(u8),
    /// The lease answers another request.
    #[error("the lease answers another request")]
    OtherRequest,
    /// The lease answers another challenge.
    #[error("the lease has another nonce")]
    OtherNonce,
    /// The lease is for another boot.
    #[error("the lease is for another boot key")]
    OtherBootKey,
    /// The lease answers another challenge of this boot.
    #[error("the lease answers challenge {lease}, asked was {asked}")]
    OtherSeq {
        /// What the lease names.
        lease: u64,
        /// What was asked.
        asked: u64,
    },
    /// The lease is for another image.
    #[error("the lease is for another image")]
    OtherRoot,
    /// Guest: the lease is older than the image.
    #[error("the lease was issued at {issued_at}, before the image was built at {built_at}")]
    BeforeBuild {
        /// Unix seconds.
        issued_at: u64,
        /// Unix seconds.
        built_at: u64,
    },
    /// The lease was made under a keyset older than one that is known.
    #[error("the lease was made under keyset {lease}, keyset {known} is known")]
    OldKeyset {
        /// What the lease names.
        lease: u64,
        /// What is known.
        known: u64,
    },
    /// The lease brings back an old bundle.
    #[error("the lease is for revision {lease}, revision {known} is known")]
    OldRevision {
        /// What the lease names.
        lease: u64,
        /// What is known.
        known: u64,
    },
    /// The lease is no newer than one that was seen.
    #[error("the lease was issued at {lease}, one of {known} was seen")]
    OldIssue {
        /// Unix seconds.
        lease: u64,
        /// Unix seconds.
        known: u64,
    },
    /// The device record is older than one that was seen.
    #[error("the device record has serial {record}, serial {known} is known")]
    OldSerial {
        /// What the record says.
        record: u64,
        /// What is known.
        known: u64,
    },
    /// Gateway: the challenge's number does not rise.
    #[error("the lease answers challenge {lease} of its boot, {known} was seen")]
    OldSeq {
        /// What the lease names.
        lease: u64,
        /// What was seen.
        known: u64,
    },
    /// Gateway: the lease begins in the future.
    #[error("the lease was issued at {issued_at}, it is {now}")]
    NotYet {
        /// Unix seconds.
        issued_at: u64,
        /// Unix seconds.
        now: u64,
    },
    /// Gateway: the lease ended.
    #[error("the lease ended at {not_after}, it is {now}")]
    Expired {
        /// Unix seconds.
        not_after: u64,
        /// Unix seconds.
        now: u64,
    },
    /// Gateway: the lease does not name this gateway.
    #[error("the lease does not name gateway {0}")]
    NotNamed(u8),
    /// Gateway: the lease gives an address that is not this gateway's to give.
    #[error("the lease gives the address {0}, which is not for guests of this gateway")]
    ForeignAddress(IpAddr),
}
