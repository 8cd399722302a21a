//! The request for a lease (`lease.md` 7). Its signer is not a role but the host key that the device
//! record names.

use super::{DocumentError, parse, payload};
use crate::{DeviceId, Digest, EnvelopeError, PublicKey, RequestKind, Verified, dsse::Opened, hex32};
use serde::{Deserialize, Serialize};

/// Most bytes of a release's name.
pub const MAX_RELEASE: usize = 128;

/// A boot's request for a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Request {
    /// The tenant.
    pub tenant: Digest,
    /// The device.
    pub device: DeviceId,
    /// Its enrolment, as the record has it.
    pub enrolment: Digest,
    /// The guest's 32 random bytes of this challenge.
    #[serde(with = "hex32")]
    pub nonce: [u8; 32],
    /// X25519 public key of this boot's tunnel.
    #[serde(with = "hex32")]
    pub boot_key: [u8; 32],
    /// Rises by one with each challenge for the same boot key, from 0.
    pub seq: u64,
    /// Root hash of the image that the guest runs from.
    pub verity_root: Digest,
    /// Name of the release that was started, for people; at most [`MAX_RELEASE`] printable characters.
    pub release: String,
    /// Version of the keyset in the guest's image.
    pub keyset_version: u64,
}

impl Request {
    /// Reads a request that the device's host key signed.
    ///
    /// # Errors
    /// [`DocumentError`] names the kind and the place.
    pub fn parse(verified: &Verified<RequestKind>) -> Result<Self, DocumentError> {
        Self::read(verified.payload())
    }

    /// The bytes to be signed.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        payload(|serializer| Self::serialize(self, serializer))
    }

    fn read(payload: &[u8]) -> Result<Self, DocumentError> {
        let request = parse::<RequestKind, _>(payload, |deserializer| Self::deserialize(deserializer))?;
        let printable = request.release.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        if !(1..=MAX_RELEASE).contains(&request.release.len()) || !printable {
            return Err(DocumentError::Field { kind: "request", field: "release" });
        }
        Ok(request)
    }
}

/// Checks a request against the host key of the device's record.
///
/// # Errors
/// [`EnvelopeError`] says what is wrong with `untrusted`.
pub fn verify_request(
    untrusted: &[u8],
    host_key: &PublicKey,
) -> Result<Verified<RequestKind>, EnvelopeError> {
    Opened::<RequestKind>::open(untrusted)?.verify(std::iter::once(((), host_key)), 1)
}

/// The device that a request claims to be from, before any signature was checked: enough to look its
/// record up, and nothing else. `None` when this is no request.
#[must_use]
pub fn untrusted_device(untrusted: &[u8]) -> Option<DeviceId> {
    let opened = Opened::<RequestKind>::open(untrusted).ok()?;
    Request::read(&opened.payload).ok().map(|request| request.device)
}
