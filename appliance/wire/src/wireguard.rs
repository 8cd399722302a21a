//! What a datagram of WireGuard's looks like from outside (WireGuard whitepaper, 5.4).
//!
//! ```text
//!  0      type: 1 initiation, 2 response, 3 cookie reply, 4 transport
//!  1..4   zero
//!  4..    the rest, of a length that the type decides
//! ```
//!
//! Whoever has no keys sees no more than that. It is what the relay demands of everything that passes,
//! so that the uplink carries no other protocol.

use std::ops::RangeInclusive;

/// Bytes of a handshake initiation.
pub const INITIATION_LEN: usize = 148;
/// Bytes of a handshake response.
pub const RESPONSE_LEN: usize = 92;
/// Bytes of a cookie reply.
pub const COOKIE_REPLY_LEN: usize = 64;
/// Bytes of a transport message without content, a keepalive: the shortest of all.
pub const KEEPALIVE_LEN: usize = 32;
/// Packets are padded to a multiple of so many bytes, which is also what header and tag have.
pub const PADDING: usize = 16;
/// Bytes of the transport messages that carry a packet as long as the tunnel's MTU, beyond which none is
/// padded: that of an MTU of 1280 (RFC 8200, 5) to that of 1420, the tunnel's largest.
pub const FULL_LEN: RangeInclusive<usize> = 1280 + KEEPALIVE_LEN..=LONGEST;
/// Bytes of the longest transport message. Over IPv6 it fills 1500.
pub const LONGEST: usize = 1420 + KEEPALIVE_LEN;

/// Which of WireGuard's messages a datagram may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Asks for a session; answering costs the other side public-key work.
    Initiation,
    /// Answers an initiation.
    Response,
    /// Asks to repeat a message with proof of the address.
    CookieReply,
    /// A packet, or a keepalive.
    Transport,
}

impl Shape {
    /// The shape of `datagram`, `None` when it is no message of WireGuard's whatever its content.
    #[must_use]
    pub fn of(datagram: &[u8]) -> Option<Self> {
        let ([kind, 0, 0, 0], _) = datagram.split_first_chunk()? else { return None };
        match (kind, datagram.len()) {
            (1, INITIATION_LEN) => Some(Self::Initiation),
            (2, RESPONSE_LEN) => Some(Self::Response),
            (3, COOKIE_REPLY_LEN) => Some(Self::CookieReply),
            (4, length) if is_transport(length) => Some(Self::Transport),
            _ => None,
        }
    }
}

fn is_transport(length: usize) -> bool {
    let padded = (KEEPALIVE_LEN..=LONGEST).contains(&length) && length.is_multiple_of(PADDING);
    padded || FULL_LEN.contains(&length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn datagram(kind: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xAA; length];
        let header = [kind, 0, 0, 0];
        let shown = length.min(header.len());
        bytes[..shown].copy_from_slice(&header[..shown]);
        bytes
    }

    #[test]
    fn each_type_has_its_one_length() {
        let fixed = [
            (1, INITIATION_LEN, Shape::Initiation),
            (2, RESPONSE_LEN, Shape::Response),
            (3, COOKIE_REPLY_LEN, Shape::CookieReply),
        ];
        for (kind, length, shape) in fixed {
            let fitting: Vec<usize> =
                (0..3000).filter(|length| Shape::of(&datagram(kind, *length)).is_some()).collect();
            assert_eq!(fitting, [length]);
            assert_eq!(Shape::of(&datagram(kind, length)), Some(shape));
        }
    }

    #[test]
    fn transport_is_padded_or_as_long_as_an_mtu_makes_it() {
        for length in 0..70_000 {
            let expected = match length {
                ..32 | 1453.. => None,
                1312..=1452 => Some(Shape::Transport),
                _ => (length % 16 == 0).then_some(Shape::Transport),
            };
            assert_eq!(Shape::of(&datagram(4, length)), expected, "{length}");
        }
    }

    #[test]
    fn other_types_and_used_reserved_bytes_have_no_shape() {
        for kind in (0..=u8::MAX).filter(|kind| !(1..=4).contains(kind)) {
            for length in [32, 64, 92, 148, 1456] {
                assert_eq!(Shape::of(&datagram(kind, length)), None, "{kind} {length}");
            }
        }
        for (kind, length) in [(1, 148), (2, 92), (3, 64), (4, 1456)] {
            for reserved in 1..4 {
                let mut bytes = datagram(kind, length);
                bytes[reserved] = 1;
                assert_eq!(Shape::of(&bytes), None, "{kind} {reserved}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_shape_or_none_and_its_type_is_the_first_byte(
            kind in 0_u8..6,
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = [&[kind, 0, 0, 0][..], &rest].concat();
            let expected = match Shape::of(&bytes) {
                None => return Ok(()),
                Some(Shape::Initiation) => 1,
                Some(Shape::Response) => 2,
                Some(Shape::CookieReply) => 3,
                Some(Shape::Transport) => 4,
            };
            prop_assert_eq!(kind, expected);
        }
    }
}
