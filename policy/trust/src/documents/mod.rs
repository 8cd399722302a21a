//! The documents that the keyset's roles and the host key sign, as JSON: unknown and repeated fields are
//! refused. Each is parsed from its `Verified<_>` only; that is why none of them implements
//! `serde::Deserialize` (the derived function is inherent, by `remote = "Self"`).
//!
//! A parsed document is well formed and well signed. What it says about others (hashes, tenants, times)
//! is for its reader to compare.

mod device;
mod lease;
mod request;

pub use device::{Device, DeviceState};
pub use lease::{Lease, LeaseGateway, MAX_LEASE_GATEWAYS, StateMode};
pub use request::{MAX_RELEASE, Request, untrusted_device, verify_request};

use crate::Kind;

/// A document that does not say what its kind must.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not the JSON of this kind.
    #[error("the {kind} does not parse")]
    Parse {
        /// Its kind.
        kind: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A field has a value that is never right.
    #[error("the {kind}'s {field} is wrong")]
    Field {
        /// Its kind.
        kind: &'static str,
        /// The field.
        field: &'static str,
    },
}

/// Runs the derived parser `read` over the whole of `payload`.
fn parse<'a, K: Kind, T>(
    payload: &'a [u8],
    read: impl FnOnce(&mut serde_json::Deserializer<serde_json::de::SliceRead<'a>>) -> serde_json::Result<T>,
) -> Result<T, DocumentError> {
    let mut deserializer = serde_json::Deserializer::from_slice(payload);
    read(&mut deserializer)
        .and_then(|document| deserializer.end().map(|()| document))
        .map_err(|source| DocumentError::Parse { kind: K::NAME, source })
}

/// Runs the derived writer `write`.
fn payload(
    write: impl FnOnce(&mut serde_json::Serializer<&mut Vec<u8>>) -> serde_json::Result<()>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut serde_json::Serializer::new(&mut bytes)).expect("text and numbers serialize");
    bytes
}
