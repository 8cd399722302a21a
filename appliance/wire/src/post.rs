//! The post: what guest and gateway say to each other *through the tunnel* (`lease.md` 19). It is the memory
//! that a guest lacks, told by somebody whom the host cannot speak for.
//!
//! The gateway listens on TCP port [`PORT`] of its own inner addresses. Frames are cut by
//! [`Decoder`](crate::Decoder); a connection carries one `Hello` and its answer, and the gateway closes it.
//! Whose lease it is the gateway knows by the inner address that the connection comes from, which the tunnel
//! enforces.
//!
//! ```text
//! guest                          gateway
//!   Hello{H(lease)}  ─────────►
//!                    ◄─────────  Admitted{H(lease), newest keyset, line, highest revision, now} | Refused(why)
//! ```
//!
//! Until the first `Hello` of a boot was answered with `Admitted`, nothing but this passes the gateway; then the
//! line's table opens. A guest does not say yet that it has applied a bundle (`lease.md` 20).
//! Enumerations here only ever grow at their end, because postcard writes the position of a variant.

use serde::{Deserialize, Serialize};

/// The gateway's port. Out of the range that kernels take ports for outgoing connections from.
pub const PORT: u16 = 5107;
/// Largest body of a frame that a guest may send, in bytes.
pub const MAX_FROM_GUEST: usize = 64;
/// Largest body of a frame that a gateway may send, in bytes.
pub const MAX_FROM_GATEWAY: usize = 256;

/// What the guest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPost {
    /// I have this lease.
    Hello {
        /// SHA-256 of the lease's payload.
        lease_hash: [u8; 32],
    },
}

/// What the gateway answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromPost {
    /// The lease is the one that admitted the peer; this is the newest that the gateway knows.
    Admitted(Newest),
    /// It is not.
    Refused(Refusal),
}

/// The newest that a gateway knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newest {
    /// SHA-256 of the payload of the lease that admits the peer.
    pub lease_hash: [u8; 32],
    /// Version of the newest keyset.
    pub keyset_version: u64,
    /// The line of the peer's device.
    pub line: String,
    /// Highest revision of the line's bundle.
    pub revision: u64,
    /// The gateway's clock, in Unix seconds.
    pub now: u64,
}

/// Why a `Hello` is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// No lease that runs gives anybody the address that it came from.
    #[error("the gateway has no lease for this address")]
    NoLease,
    /// Another lease admits the peer: an older one, or already a newer one.
    #[error("the gateway knows another lease for this address")]
    OtherLease,
    /// The gateway cannot write down that the peer is in.
    #[error("the gateway cannot remember")]
    Broken,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoder, encode};
    use proptest::prelude::*;

    /// Bytes of the length in front of every frame.
    const PREFIX: usize = 4;

    #[test]
    fn longest_messages_fit_their_limits() {
        let hello = encode(&ToPost::Hello { lease_hash: [255; 32] });
        assert!(hello.len() - PREFIX <= MAX_FROM_GUEST, "{}", hello.len());
        let newest = Newest {
            lease_hash: [255; 32],
            keyset_version: u64::MAX,
            line: "x".repeat(64),
            revision: u64::MAX,
            now: u64::MAX,
        };
        let answer = encode(&FromPost::Admitted(newest.clone()));
        assert!(answer.len() - PREFIX <= MAX_FROM_GATEWAY, "{}", answer.len());
        let mut decoder = Decoder::new(MAX_FROM_GATEWAY);
        decoder.push(&answer);
        assert_eq!(decoder.next_message(), Ok(Some(FromPost::Admitted(newest))));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new(MAX_FROM_GUEST);
            decoder.push(&bytes);
            let _ = decoder.next_message::<ToPost>();
            let mut decoder = Decoder::new(MAX_FROM_GATEWAY);
            decoder.push(&bytes);
            let _ = decoder.next_message::<FromPost>();
        }
    }
}
