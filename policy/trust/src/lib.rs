//! Signed documents: DSSE, the keyset, k-of-n, `Verified`. Pure: bytes in, values out.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod digest;

pub use digest::{Digest, DigestError};
