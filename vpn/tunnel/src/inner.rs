//! The little of an IP packet that a tunnel reads: its length, whence and whither.
//!
//! ```text
//!  IPv4 (RFC 791)                          IPv6 (RFC 8200)
//!   0      version (4) and header words     0      version (6)
//!   2..4   total length, big endian         4..6   length behind the header, big endian
//!  12..16  source                           8..24  source
//!  16..20  destination                     24..40  destination
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a whole IP packet says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inner {
    /// Bytes of the packet; what stands behind them is padding.
    pub(crate) len: usize,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
}

impl Inner {
    /// Reads the header of a packet that is wholly in `bytes`.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let inner = match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes.first_chunk()?),
            6 => Self::parse_v6(bytes.first_chunk()?),
            _ => None,
        }?;
        (inner.len <= bytes.len()).then_some(inner)
    }

    fn parse_v4(header: &[u8; V4_HEADER_LEN]) -> Option<Self> {
        let [first, _, high, low, .., a, b, c, d, e, f, g, h] = *header;
        let len = usize::from(u16::from_be_bytes([high, low]));
        let header_len = usize::from(first & 0x0f) * 4;
        (header_len >= V4_HEADER_LEN && len >= header_len).then_some(Self {
            len,
            source: Ipv4Addr::new(a, b, c, d).into(),
            destination: Ipv4Addr::new(e, f, g, h).into(),
        })
    }

    fn parse_v6(header: &[u8; V6_HEADER_LEN]) -> Option<Self> {
        let [_, _, _, _, high, low, _, _, addresses @ ..] = header;
        let (source, destination) = addresses.split_first_chunk::<16>()?;
        Some(Self {
            len: V6_HEADER_LEN + usize::from(u16::from_be_bytes([*high, *low])),
            source: Ipv6Addr::from(*source).into(),
            destination: Ipv6Addr::from(*destination.first_chunk::<16>()?).into(),
        })
    }
}

const V4_HEADER_LEN: usize = 20;
const V6_HEADER_LEN: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(first: u8, total: u16, bytes: usize) -> Vec<u8> {
        let mut packet = vec![0; bytes];
        packet[0] = first;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
        packet
    }

    #[test]
    fn packet_with_padding_is_as_long_as_its_header_says() {
        let inner = Inner::parse(&v4(0x45, 21, 32)).unwrap();
        assert_eq!(inner.len, 21);
        assert_eq!(inner.source, "10.0.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(inner.destination, "10.0.0.2".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn packet_longer_than_its_bytes_is_none() {
        assert!(Inner::parse(&v4(0x45, 32, 32)).is_some());
        assert_eq!(Inner::parse(&v4(0x45, 33, 32)), None);
        let mut v6 = vec![0; 48];
        v6[0] = 0x60;
        v6[5] = 8;
        assert_eq!(Inner::parse(&v6).unwrap().len, 48);
        v6[5] = 9;
        assert_eq!(Inner::parse(&v6), None);
    }

    #[test]
    fn packet_shorter_than_its_header_is_none() {
        assert_eq!(Inner::parse(&v4(0x44, 32, 32)), None, "four words of header");
        assert_eq!(Inner::parse(&v4(0x45, 19, 32)), None, "19 bytes in all");
        assert_eq!(Inner::parse(&v4(0x46, 23, 32)), None, "24 bytes of header, 23 in all");
        assert_eq!(Inner::parse(&[0x45; 19]), None);
        assert_eq!(Inner::parse(&[0x60; 39]), None);
    }

    #[test]
    fn packet_of_another_version_is_none() {
        assert_eq!(Inner::parse(&[]), None);
        for version in (0..16).filter(|version| ![4, 6].contains(version)) {
            assert_eq!(Inner::parse(&[version << 4 | 5; 64]), None);
        }
    }
}
