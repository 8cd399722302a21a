//! The headers of an IP packet, as far as a table of destinations asks for them.
//!
//! ```text
//!  IPv4 (RFC 791)                              IPv6 (RFC 8200)
//!   0      version (4), header words            0      version (6)
//!   2..4   total length                         4..6   length behind the header
//!   6..8   flags, fragment offset in 8 bytes    6      next header
//!   9      protocol                             8..24  source
//!  12..16  source                              24..40  destination
//!  16..20  destination
//! ```
//!
//! Read strictly: what a host behind the gateway might read otherwise (options, routing headers, a
//! transport header that is cut off) is refused, not guessed at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Who sends what to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// The number of the protocol above IP (IANA, Protocol Numbers).
    pub(crate) protocol: u8,
    pub(crate) ports: Ports,
}

/// The ports of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ports {
    /// Of TCP or UDP.
    Of { source: u16, destination: u16 },
    /// The protocol has none, or none that are known here.
    None,
    /// They are in the first fragment, and this is a later one.
    Elsewhere,
}

/// Why a packet has no header to speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unreadable;

impl Header {
    pub(crate) fn parse(packet: &[u8]) -> Result<Self, Unreadable> {
        match packet.first().ok_or(Unreadable)? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => Err(Unreadable),
        }
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, Unreadable> {
        let header = packet.first_chunk::<V4_LEN>().ok_or(Unreadable)?;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let payload =
            packet.get(V4_LEN..len).filter(|_| header[0] == V4_WITHOUT_OPTIONS).ok_or(Unreadable)?;
        let offset = u16::from_be_bytes([header[6], header[7]]) & V4_OFFSET_MASK;
        let protocol = header[9];
        let [.., a, b, c, d, e, f, g, h] = *header;
        Ok(Self {
            source: Ipv4Addr::new(a, b, c, d).into(),
            destination: Ipv4Addr::new(e, f, g, h).into(),
            protocol,
            ports: if offset == 0 { Ports::read(protocol, payload)? } else { Ports::Elsewhere },
        })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, Unreadable> {
        let (header, behind) = packet.split_first_chunk::<V6_LEN>().ok_or(Unreadable)?;
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut payload = behind.get(..len).ok_or(Unreadable)?;
        let mut protocol = header[6];
        let mut ports = None;
        for _ in 0..EXTENSIONS_MAX {
            let extension_len = match protocol {
                HOP_BY_HOP | DESTINATION_OPTIONS => 8 + 8 * usize::from(*payload.get(1).ok_or(Unreadable)?),
                FRAGMENT => {
                    let field: [u8; 2] =
                        payload.get(2..4).and_then(|field| field.try_into().ok()).ok_or(Unreadable)?;
                    if u16::from_be_bytes(field) >> V6_OFFSET_SHIFT != 0 {
                        ports = Some(Ports::Elsewhere);
                    }
                    8
                }
                ROUTING => return Err(Unreadable),
                _ => break,
            };
            protocol = *payload.first().ok_or(Unreadable)?;
            payload = payload.get(extension_len..).ok_or(Unreadable)?;
            if ports.is_some() {
                break;
            }
        }
        if matches!(protocol, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT | ROUTING) {
            return Err(Unreadable);
        }
        let [_, _, _, _, _, _, _, _, addresses @ ..] = header;
        let (source, destination) = addresses.split_first_chunk::<V6_ADDRESS_LEN>().ok_or(Unreadable)?;
        let destination = destination.first_chunk::<V6_ADDRESS_LEN>().ok_or(Unreadable)?;
        Ok(Self {
            source: Ipv6Addr::from(*source).into(),
            destination: Ipv6Addr::from(*destination).into(),
            protocol,
            ports: ports.map_or_else(|| Ports::read(protocol, payload), Ok)?,
        })
    }
}

impl Ports {
    fn read(protocol: u8, payload: &[u8]) -> Result<Self, Unreadable> {
        if !matches!(protocol, TCP | UDP) {
            return Ok(Self::None);
        }
        let [a, b, c, d] = *payload.first_chunk().ok_or(Unreadable)?;
        Ok(Self::Of { source: u16::from_be_bytes([a, b]), destination: u16::from_be_bytes([c, d]) })
    }
}

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const V4_LEN: usize = 20;
const V6_LEN: usize = 40;
const V6_ADDRESS_LEN: usize = 16;
/// Version 4, five words of header: none of them is a source route.
const V4_WITHOUT_OPTIONS: u8 = 0x45;
const V4_OFFSET_MASK: u16 = 0x1fff;
const V6_OFFSET_SHIFT: u32 = 3;
/// Most extension headers of an IPv6 packet.
const EXTENSIONS_MAX: usize = 4;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An IPv4 packet of these fields with `payload` behind its header.
    pub(crate) fn v4(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; V4_LEN];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&u16::try_from(V4_LEN + payload.len()).unwrap().to_be_bytes());
        packet[8] = 64;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&source.parse::<Ipv4Addr>().unwrap().octets());
        packet[16..20].copy_from_slice(&destination.parse::<Ipv4Addr>().unwrap().octets());
        packet.extend_from_slice(payload);
        packet
    }

    /// An IPv6 packet of these fields with `payload` behind its header.
    pub(crate) fn v6(source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; V6_LEN];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        packet[6] = next;
        packet[7] = 64;
        packet[8..24].copy_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
        packet[24..40].copy_from_slice(&destination.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(payload);
        packet
    }

    /// The first bytes of a TCP or UDP header.
    pub(crate) fn ports(source: u16, destination: u16) -> Vec<u8> {
        [source.to_be_bytes(), destination.to_be_bytes(), [0; 2], [0; 2]].concat()
    }

    #[test]
    fn ports_are_those_of_tcp_and_udp() {
        for protocol in [TCP, UDP] {
            let header = Header::parse(&v4("10.0.0.1", "10.0.0.2", protocol, &ports(1, 2))).unwrap();
            assert_eq!(header.source, "10.0.0.1".parse::<IpAddr>().unwrap());
            assert_eq!(header.destination, "10.0.0.2".parse::<IpAddr>().unwrap());
            assert_eq!((header.protocol, header.ports), (protocol, Ports::Of { source: 1, destination: 2 }));
            let header = Header::parse(&v6("fd00::1", "fd00::2", protocol, &ports(1, 2))).unwrap();
            assert_eq!(header.source, "fd00::1".parse::<IpAddr>().unwrap());
            assert_eq!(header.destination, "fd00::2".parse::<IpAddr>().unwrap());
            assert_eq!((header.protocol, header.ports), (protocol, Ports::Of { source: 1, destination: 2 }));
        }
        let ping = Header::parse(&v4("10.0.0.1", "10.0.0.2", ICMP, &[8, 0])).unwrap();
        assert_eq!(ping.ports, Ports::None);
    }

    #[test]
    fn packet_with_half_a_port_is_unreadable() {
        assert!(Header::parse(&v4("10.0.0.1", "10.0.0.2", UDP, &[0; 4])).is_ok());
        assert_eq!(Header::parse(&v4("10.0.0.1", "10.0.0.2", UDP, &[0; 3])), Err(Unreadable));
        assert_eq!(Header::parse(&v6("fd00::1", "fd00::2", TCP, &[0; 3])), Err(Unreadable));
    }

    #[test]
    fn ports_beyond_the_announced_length_are_not_read() {
        let mut packet = v4("10.0.0.1", "10.0.0.2", UDP, &ports(1, 2));
        packet[3] = 23;
        assert_eq!(Header::parse(&packet), Err(Unreadable));
        let mut packet = v6("fd00::1", "fd00::2", UDP, &ports(1, 2));
        packet[5] = 3;
        assert_eq!(Header::parse(&packet), Err(Unreadable));
    }

    #[test]
    fn ipv4_options_are_refused() {
        let mut packet = v4("10.0.0.1", "10.0.0.2", UDP, &[0; 12]);
        packet[0] = 0x46;
        assert_eq!(Header::parse(&packet), Err(Unreadable));
    }

    #[test]
    fn later_fragment_has_its_ports_elsewhere() {
        let mut packet = v4("10.0.0.1", "10.0.0.2", UDP, &ports(1, 2));
        packet[6] = 0x20;
        assert_eq!(Header::parse(&packet).unwrap().ports, Ports::Of { source: 1, destination: 2 });
        packet[7] = 1;
        assert_eq!(Header::parse(&packet).unwrap().ports, Ports::Elsewhere);
        let fragment = |offset: u16| [&[UDP, 0][..], &offset.to_be_bytes(), &[0; 4], &ports(1, 2)].concat();
        let first = v6("fd00::1", "fd00::2", FRAGMENT, &fragment(1));
        assert_eq!(Header::parse(&first).unwrap().ports, Ports::Of { source: 1, destination: 2 });
        let later = v6("fd00::1", "fd00::2", FRAGMENT, &fragment(8));
        let header = Header::parse(&later).unwrap();
        assert_eq!((header.protocol, header.ports), (UDP, Ports::Elsewhere));
    }

    #[test]
    fn ipv6_extension_headers_are_walked_up_to_their_limit() {
        let chain = |extensions: usize| {
            let mut payload = Vec::new();
            for number in 1..=extensions {
                let next = if number == extensions { UDP } else { DESTINATION_OPTIONS };
                payload.extend([next, 0, 1, 4, 0, 0, 0, 0]);
            }
            payload.extend(ports(1, 2));
            v6("fd00::1", "fd00::2", DESTINATION_OPTIONS, &payload)
        };
        let header = Header::parse(&chain(EXTENSIONS_MAX)).unwrap();
        assert_eq!((header.protocol, header.ports), (UDP, Ports::Of { source: 1, destination: 2 }));
        assert_eq!(Header::parse(&chain(EXTENSIONS_MAX + 1)), Err(Unreadable));
    }

    #[test]
    fn ipv6_routing_header_is_refused() {
        let payload = [&[UDP, 0, 0, 0, 0, 0, 0, 0][..], &ports(1, 2)].concat();
        assert_eq!(Header::parse(&v6("fd00::1", "fd00::2", ROUTING, &payload)), Err(Unreadable));
    }

    #[test]
    fn no_bytes_panic() {
        let whole = v6("fd00::1", "fd00::2", DESTINATION_OPTIONS, &[255; 64]);
        for len in 0..whole.len() {
            assert_eq!(Header::parse(&whole[..len]), Err(Unreadable));
            for first in 0..=255 {
                let mut garbage = vec![0xA5; len];
                if let Some(byte) = garbage.first_mut() {
                    *byte = first;
                }
                let _ = Header::parse(&garbage);
            }
        }
    }
}
