//! What IT decides, as a [`Bundle`] that the policy role signed; and [`lease`], the checks by which
//! guest, host and gateway each find out that a lease, its bundle and its device record belong together
//! and are fresh. Pure: bytes and `now` in, values out.
//!
//! Trusted is the [`TrustedKeyset`](kontor_trust::TrustedKeyset) that the caller starts from and the
//! memory that it keeps; nothing that came by wire.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod access;
mod bundle;
pub mod lease;

pub use access::{Access, AccessFault, Destination, MAX_DESTINATIONS, Protocol};
pub use bundle::{
    Bundle, BundleError, BundleFault, Draft, Gateway, MAX_ENDPOINTS, MAX_GATEWAYS, MAX_LIFE_S,
    MAX_MEMORY_MIB, MAX_RESOLVERS, MAX_TIMER_S, MIN_MEMORY_MIB, Settings,
};

#[cfg(test)]
mod tests;
