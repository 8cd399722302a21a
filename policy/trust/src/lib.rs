//! Signed documents: who may say what, and whether they said it. Pure: bytes in, values out.
//!
//! ```text
//! bytes from anywhere ──► dsse: size, shape, kind ──► signatures by k distinct persons ──► Verified<K>
//!                                                      of the kind's role in the keyset        │
//!          Keyset 1 (pinned by its hash) ─► 2 ─► 3 … each signed by the last and by itself     ▼
//!                                                                             Device, Lease, …::parse
//! ```
//!
//! Trusted is one thing only: the tenant, which is the hash of the first keyset's payload. All else is
//! derived from it. A [`Verified`] says *who* signed; whether a document is the newest, or for this
//! device, is for those to check who have a memory (`kontor_bundle::lease`).
//!
//! Signatures are Ed25519 by `ring`; the one use of randomness is [`SecretKey::generate`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod digest;
mod documents;
mod dsse;
pub mod hex32;
mod keys;
mod keyset;
mod kinds;
mod names;
mod verified;

pub use digest::{Digest, DigestError};
pub use documents::{
    Device, DeviceState, DocumentError, Lease, LeaseGateway, MAX_LEASE_GATEWAYS, MAX_RELEASE, Request,
    StateMode, untrusted_device, verify_request,
};
pub use dsse::{EnvelopeError, MAX_ENVELOPE, MAX_SIGNATURES, sign};
pub use keys::{KeyError, PublicKey, PublicKeyError, SPKI_BYTES, SecretKey};
pub use keyset::{
    Keyset, KeysetError, KeysetFault, MAX_CONTROL_SPKI, MAX_MEMBERS, Member, Role, Roles, TrustedKeyset,
};
pub use kinds::{BundleKind, DeviceKind, KeysetKind, Kind, LeaseKind, RequestKind, RoleKind};
pub use names::{DeviceId, Line, MAX_NAME, NameError, Person, ShareId};
pub use verified::Verified;

#[cfg(test)]
mod tests;
