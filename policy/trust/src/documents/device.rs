//! The device record (`lease.md` 2).

use super::{DocumentError, parse, payload};
use crate::{DeviceId, DeviceKind, Digest, Line, PublicKey, ShareId, Verified};
use serde::{Deserialize, Serialize};

/// One enrolled work VM on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Device {
    /// The tenant it belongs to.
    pub tenant: Digest,
    /// Its name.
    pub device: DeviceId,
    /// 32 random bytes of this enrolment.
    pub enrolment: Digest,
    /// Rises with each record of the device; an older one is refused once a newer was seen.
    pub serial: u64,
    /// Whether it may have leases.
    pub state: DeviceState,
    /// The key that signs its requests.
    pub host_key: PublicKey,
    /// The line whose bundle is for it.
    pub line: Line,
    /// Which share of its state disk's key the office holds.
    pub share_id: ShareId,
}

/// Whether a device may have leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// It may.
    Active,
    /// It may not, and its peer is removed.
    Revoked,
}

impl Device {
    /// Reads a record that the enrol role signed.
    ///
    /// # Errors
    /// [`DocumentError`] names the kind and the place.
    pub fn parse(verified: &Verified<DeviceKind>) -> Result<Self, DocumentError> {
        parse::<DeviceKind, _>(verified.payload(), |deserializer| Self::deserialize(deserializer))
    }

    /// The bytes to be signed.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        payload(|serializer| Self::serialize(self, serializer))
    }
}
