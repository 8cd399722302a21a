//! What a release is: the signed manifest, and what of it reaches the guest on the kernel's command
//! line. Pure: bytes in, values out.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod cmdline;
mod manifest;

pub use cmdline::{CommandLine, CommandLineError};
pub use kontor_trust::{Digest, DigestError};
pub use manifest::{
    FORMAT, Image, MAX_MANIFEST, MAX_PIECE, MAX_SEGMENT_KEYSETS, Manifest, ManifestError, Piece, Verity,
};
