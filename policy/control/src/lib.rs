//! What control decides when a boot asks for a lease (`lease.md` 8 to 11). The core of it, without IO:
//! envelopes, the time and a memory go in; a lease, or a refusal for the host, comes out.
//!
//! ```text
//! request ─► Office::identify ─► Identified ─► Rates ─► issue(bundle, memory, now) ─► Issued{parts, admit}
//! TLS key    device record        (its line)                                      │
//!                                                             checked as the host will check it
//! ```
//!
//! Trusted are the keyset and the pools of addresses. Device records and bundles are checked like
//! everybody checks them; a request is untrusted until its host key's signature was found good.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod addresses;
mod issue;
mod memory;
mod rates;

pub use addresses::{Addresses, Pool};
pub use issue::{Identified, IssueError, Issued, MAX_NAMED_GATEWAYS, Office, OfficeFault, Refusal};
pub use memory::{BOOTS_KEPT, Boot, CLOCK_BACK_S_MAX, Memory, Past};
pub use rates::{BURST, INTERVAL, Rates};

#[cfg(test)]
mod tests;
