//! From one read of the interface to the packets in it.
//!
//! The kernel hands over a packet of up to 64 KiB where it would otherwise hand over dozens with the same headers, and
//! leaves the checksum to whoever takes it. Sources: RFC 9293 for what becomes of TCP's sequence number and flags, RFC
//! 6864 for IPv4's identification, `net/ipv4/tcp_offload.c` and `udp_offload.c` for the rest.

use crate::checksum::Sum;
use crate::vnet::{Gso, HEADER_LEN, Header};

/// Why a read makes no packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// Shorter than its headers.
    #[error("{0} bytes are shorter than their headers")]
    Short(usize),
    /// Segments of a kind that was not asked for, or that the packet's version contradicts.
    #[error("segments of an unknown kind")]
    Kind,
    /// Segments without a size, or without a checksum to complete.
    #[error("segments without a size or a checksum")]
    Size,
}

/// The packets of one read, made one by one.
#[derive(Debug)]
pub struct Segments<'f> {
    packet: &'f [u8],
    kind: Kind,
    /// Which segment is next, and where in `packet` its payload starts.
    index: u16,
    at: usize,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// One packet, with a checksum from here that is stored there.
    Whole(Option<(usize, usize)>),
    /// Behind an IP header, its own header up to the payload, of which each segment gets a piece.
    Cut { protocol: u8, transport: usize, payload: usize, size: usize },
}

impl<'f> Segments<'f> {
    /// Takes what was read: the header and a packet.
    ///
    /// # Errors
    /// [`OffloadError`]; nothing in the packet is believed that could lead out of it.
    pub fn parse(frame: &'f [u8]) -> Result<Self, OffloadError> {
        let short = OffloadError::Short(frame.len());
        let (header, packet) = frame.split_first_chunk::<HEADER_LEN>().ok_or(short)?;
        let header = Header::parse(header).ok_or(OffloadError::Kind)?;
        let version = packet.first().ok_or(short)? >> 4;
        let kind = match header.gso {
            Gso::None => {
                let checksum = header.checksum.map(|(start, offset)| {
                    let start = usize::from(start);
                    (start, start + usize::from(offset))
                });
                if checksum.is_some_and(|(start, field)| field < start || packet.len() < field + 2) {
                    return Err(short);
                }
                return Ok(Self { packet, kind: Kind::Whole(checksum), index: 0, at: 0 });
            }
            Gso::TcpV4 if version == 4 => TCP,
            Gso::TcpV6 if version == 6 => TCP,
            Gso::Udp if version == 4 || version == 6 => UDP,
            Gso::TcpV4 | Gso::TcpV6 | Gso::Udp => return Err(OffloadError::Kind),
        };
        let (transport, _) = header.checksum.ok_or(OffloadError::Size)?;
        let (transport, size) = (usize::from(transport), usize::from(header.size));
        if size == 0 {
            return Err(OffloadError::Size);
        }
        let ip_len = if version == 4 { IPV4_LEN } else { IPV6_LEN };
        let own_len = match kind {
            TCP => {
                let offset = packet.get(transport + 12).ok_or(short)?;
                usize::from(offset >> 4) * 4
            }
            _ => UDP_LEN,
        };
        let payload = transport + own_len;
        if transport < ip_len
            || own_len < UDP_LEN
            || (kind == TCP && own_len < TCP_LEN)
            || packet.len() <= payload
        {
            return Err(short);
        }
        let kind = Kind::Cut { protocol: kind, transport, payload, size };
        Ok(Self { packet, kind, index: 0, at: payload })
    }

    /// The packet as the kernel made it: with the headers that all its segments have. Its checksum may not be complete.
    #[must_use]
    pub fn whole(&self) -> &'f [u8] {
        self.packet
    }

    /// Writes the next packet to the front of `out` and says how long it is. `None`: there is no more, or no room
    /// for as much as [`Self::whole`] has, which is enough for each.
    pub fn write_next(&mut self, out: &mut [u8]) -> Option<usize> {
        if self.at >= self.packet.len() {
            return None;
        }
        match self.kind {
            Kind::Whole(checksum) => {
                let out = out.get_mut(..self.packet.len())?;
                out.copy_from_slice(self.packet);
                self.at = self.packet.len();
                if let Some((start, field)) = checksum {
                    // The field holds the sum of what the kernel calls the pseudo header.
                    let checksum = Sum::default().add(&out[start..]).checksum();
                    out[field..field + 2].copy_from_slice(&never_zero(checksum));
                }
                Some(out.len())
            }
            Kind::Cut { protocol, transport, payload, size } => {
                let end = self.packet.len().min(self.at + size);
                let (headers, piece) = (&self.packet[..payload], &self.packet[self.at..end]);
                let out = out.get_mut(..payload + piece.len())?;
                out[..payload].copy_from_slice(headers);
                out[payload..].copy_from_slice(piece);
                let last = end == self.packet.len();
                finish(out, protocol, transport, self.index, size, last);
                self.at = end;
                self.index = self.index.wrapping_add(1);
                Some(out.len())
            }
        }
    }
}

/// Gives a segment what is its own in the headers that it shares with the others.
fn finish(packet: &mut [u8], protocol: u8, transport: usize, index: u16, size: usize, last: bool) {
    let total = packet.len();
    let pseudo = if packet[0] >> 4 == 4 {
        put(packet, 2, total);
        let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(index);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[10..12].fill(0);
        let checksum = Sum::default().add(&packet[..transport]).checksum();
        packet[10..12].copy_from_slice(&checksum);
        Sum::default().add(&packet[12..20])
    } else {
        put(packet, 4, total - IPV6_LEN);
        Sum::default().add(&packet[8..40])
    };
    let own = &mut packet[transport..];
    let field = if protocol == TCP {
        let first = u32::from_be_bytes([own[4], own[5], own[6], own[7]]);
        // Below 64 KiB, as the packet was.
        let before = u32::try_from(usize::from(index) * size).unwrap_or_default();
        own[4..8].copy_from_slice(&first.wrapping_add(before).to_be_bytes());
        if !last {
            own[13] &= !(FIN | PSH);
        }
        if index > 0 {
            own[13] &= !CWR;
        }
        16
    } else {
        put(own, 4, total - transport);
        6
    };
    own[field..field + 2].fill(0);
    let checksum = pseudo_of(pseudo, protocol, own.len()).add(own).checksum();
    own[field..field + 2].copy_from_slice(&if protocol == UDP { never_zero(checksum) } else { checksum });
}

/// The sum of the pseudo header, of whose addresses this is the sum already (RFC 9293, 3.1; RFC 8200, 8.1).
pub(crate) fn pseudo_of(addresses: Sum, protocol: u8, len: usize) -> Sum {
    // At most 65 535, which an IPv4 header can say; the upper half is zero.
    let len = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    addresses.add(&[0, protocol, len[0], len[1]])
}

/// Zero says in UDP that there is no checksum (RFC 768); in one's complement all ones are the same number.
fn never_zero(checksum: [u8; 2]) -> [u8; 2] {
    if checksum == [0; 2] { [0xff; 2] } else { checksum }
}

/// Stores a length, which fits as the packet's did.
pub(crate) fn put(bytes: &mut [u8], at: usize, len: usize) {
    bytes[at..at + 2].copy_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
}

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const FIN: u8 = 0x01;
pub(crate) const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
pub(crate) const IPV4_LEN: usize = 20;
pub(crate) const IPV6_LEN: usize = 40;
pub(crate) const TCP_LEN: usize = 20;
pub(crate) const UDP_LEN: usize = 8;
