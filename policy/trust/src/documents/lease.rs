//! The lease (`lease.md` 10).

use super::{DocumentError, parse, payload};
use crate::{DeviceId, Digest, LeaseKind, Line, Verified, hex32};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

/// Most gateways that one lease names.
pub const MAX_LEASE_GATEWAYS: usize = 8;

/// Control's answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Lease {
    /// The tenant.
    pub tenant: Digest,
    /// The device.
    pub device: DeviceId,
    /// Its enrolment.
    pub enrolment: Digest,
    /// SHA-256 of the request's payload.
    pub request: Digest,
    /// The request's nonce.
    #[serde(with = "hex32")]
    pub nonce: [u8; 32],
    /// The request's tunnel key.
    #[serde(with = "hex32")]
    pub boot_key: [u8; 32],
    /// The request's number.
    pub seq: u64,
    /// Version of the newest keyset.
    pub keyset_version: u64,
    /// The device's line.
    pub line: Line,
    /// Revision of the line's newest bundle.
    pub revision: u64,
    /// SHA-256 of that bundle's payload.
    pub bundle: Digest,
    /// The request's root hash.
    pub verity_root: Digest,
    /// Where the guest may connect, primary first: 1 to [`MAX_LEASE_GATEWAYS`], ids distinct.
    pub gateways: Vec<LeaseGateway>,
    /// When it was issued, in Unix seconds by control's clock.
    pub issued_at: u64,
    /// When it ends, in Unix seconds.
    pub not_after: u64,
    /// What becomes of the state disk.
    pub state: StateMode,
}

/// A gateway, and the addresses that the guest has there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseGateway {
    /// The gateway's number in the bundle.
    pub id: u8,
    /// The guest's inner IPv4 address.
    pub v4: Ipv4Addr,
    /// The guest's inner IPv6 address.
    pub v6: Ipv6Addr,
}

/// What becomes of the state disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateMode {
    /// Format it: it must be blank.
    Create,
    /// Open it.
    Open,
    /// There is none; a tmpfs takes its place.
    Ephemeral,
}

impl Lease {
    /// Reads a lease that the lease role signed.
    ///
    /// # Errors
    /// [`DocumentError`] names the kind and the place.
    pub fn parse(verified: &Verified<LeaseKind>) -> Result<Self, DocumentError> {
        let lease =
            parse::<LeaseKind, _>(verified.payload(), |deserializer| Self::deserialize(deserializer))?;
        let mut ids = BTreeSet::new();
        let distinct = lease.gateways.iter().all(|gateway| ids.insert(gateway.id));
        if !(1..=MAX_LEASE_GATEWAYS).contains(&lease.gateways.len()) || !distinct {
            return Err(DocumentError::Field { kind: "lease", field: "gateways" });
        }
        Ok(lease)
    }

    /// The bytes to be signed.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        payload(|serializer| Self::serialize(self, serializer))
    }

    /// How long it lasts from its issue, in seconds; `None` when it ends before it begins.
    #[must_use]
    pub fn life_s(&self) -> Option<u64> {
        self.not_after.checked_sub(self.issued_at).filter(|life| *life > 0)
    }
}
