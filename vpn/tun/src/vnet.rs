//! The header that stands in front of each packet on an interface with offloads.
//!
//! ```text
//!  0      1          2          4          6            8             10
//!  flags  gso_type   hdr_len    gso_size   csum_start   csum_offset   packet …
//! ```
//!
//! Source: `struct virtio_net_hdr` in `linux/virtio_net.h`; numbers in the machine's byte order, as on every TUN for
//! which TUNSETVNETLE was not called.

/// Bytes of the header.
pub const HEADER_LEN: usize = 10;

/// The checksum from `csum_start` on is to be completed.
const NEEDS_CHECKSUM: u8 = 1;
/// TCP over this had ECN's CWR; says nothing that the packet does not.
const ECN: u8 = 0x80;

/// What is to be made of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gso {
    /// Nothing.
    None,
    TcpV4,
    TcpV6,
    /// UDP over either.
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) gso: Gso,
    /// Bytes of each segment's payload.
    pub(crate) size: u16,
    /// Bytes of all headers of the packet.
    pub(crate) headers: u16,
    /// Where the checksum starts, and where from there it is stored.
    pub(crate) checksum: Option<(u16, u16)>,
}

impl Header {
    /// `None` for a kind of segments that was not asked for.
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let [flags, gso, ..] = *bytes;
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let gso = match gso & !ECN {
            0 => Gso::None,
            1 => Gso::TcpV4,
            4 => Gso::TcpV6,
            5 => Gso::Udp,
            _ => return None,
        };
        let checksum = (flags & NEEDS_CHECKSUM != 0).then(|| (number(6), number(8)));
        Some(Self { gso, size: number(4), headers: number(2), checksum })
    }

    pub(crate) fn encode(self) -> [u8; HEADER_LEN] {
        let gso = match self.gso {
            Gso::None => 0,
            Gso::TcpV4 => 1,
            Gso::TcpV6 => 4,
            Gso::Udp => 5,
        };
        let flags = if self.checksum.is_some() { NEEDS_CHECKSUM } else { 0 };
        let (start, offset) = self.checksum.unwrap_or_default();
        let mut bytes = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0];
        for (at, number) in [(2, self.headers), (4, self.size), (6, start), (8, offset)] {
            bytes[at..at + 2].copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_read_as_it_was_written() {
        for gso in [Gso::None, Gso::TcpV4, Gso::TcpV6, Gso::Udp] {
            for checksum in [None, Some((40, 16))] {
                let header = Header { gso, size: 1380, headers: 60, checksum };
                assert_eq!(Header::parse(&header.encode()), Some(header));
            }
        }
    }

    #[test]
    fn kinds_that_nobody_asked_for_are_refused() {
        for kind in (0..=u8::MAX).filter(|kind| ![0, 1, 4, 5].contains(&(kind & !ECN))) {
            assert_eq!(Header::parse(&[0, kind, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        }
    }
}
