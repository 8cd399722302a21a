//! From many packets to few writes.
//!
//! Packets of one flow that follow each other become one of up to 64 KiB, which the kernel passes on whole or cuts again
//! by itself. What goes in is what the receiver would have got: a packet joins those before it only where cutting them
//! again gives the same packets, but for what IP does not promise (IPv4's identification). No packet overtakes another of
//! its flow. Sources: `tcp_gro_receive` and `udp_gro_receive` in the kernel, for what must be the same.

use std::io::IoSlice;

use crate::Offloads;
use crate::checksum::Sum;
use crate::segment::{FIN, IPV4_LEN, IPV6_LEN, PSH, TCP, TCP_LEN, UDP, UDP_LEN, pseudo_of, put};
use crate::vnet::{Gso, HEADER_LEN, Header};

/// Packets that wait to be written, as places in a buffer of the caller's.
#[derive(Debug)]
pub struct Coalescer {
    offloads: Offloads,
    packets: Vec<Packet>,
    runs: Vec<Run>,
}

/// One packet, and the next of its run.
#[derive(Debug, Clone, Copy)]
struct Packet {
    start: usize,
    end: usize,
    next: Option<usize>,
}

/// Packets that are written as one.
#[derive(Debug)]
struct Run {
    /// The first and the last of `packets`.
    first: usize,
    last: usize,
    /// Bytes of the whole, the first packet's headers included, and packets in it.
    len: usize,
    count: usize,
    /// Of the first packet; `None` where nobody knows which flow this is.
    shape: Option<Shape>,
    /// What may follow; `None` where nothing may.
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    /// Bytes of the payload of all but the last.
    size: usize,
    /// TCP's next sequence number.
    next: u32,
}

/// Where things are in a packet whose headers are nothing special.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    is_v4: bool,
    protocol: u8,
    transport: usize,
    payload: usize,
}

impl Coalescer {
    /// For an interface with these offloads, and as many packets at once.
    #[must_use]
    pub fn new(offloads: Offloads, packets_max: usize) -> Self {
        Self { offloads, packets: Vec::with_capacity(packets_max), runs: Vec::with_capacity(packets_max) }
    }

    /// Takes the packet at `start..end` of `arena`. Those before are in the same arena, unchanged.
    ///
    /// # Panics
    /// Where that is not in `arena`.
    pub fn push(&mut self, arena: &[u8], start: usize, end: usize) {
        let (packet, number) = (&arena[start..end], self.packets.len());
        self.packets.push(Packet { start, end, next: None });
        let alone = Run { first: number, last: number, len: packet.len(), count: 1, shape: None, open: None };
        let Some(shape) = Shape::of(packet) else {
            // A fragment, say: its flow is not known, so nothing overtakes it.
            self.runs.iter_mut().for_each(|run| run.open = None);
            self.runs.push(alone);
            return;
        };
        let payload = packet.len() - shape.payload;
        let can_join = self.takes(shape) && payload > 0 && shape.is_plain(packet) && shape.is_intact(packet);
        let sequence = shape.sequence(packet);
        let next = sequence.wrapping_add(u32::try_from(payload).unwrap_or_default());
        let ends = shape.pushes(packet);

        let first = |run: &Run| &arena[self.packets[run.first].start..self.packets[run.first].end];
        let same_flow =
            |run: &Run| run.shape.is_some_and(|theirs| shape.is_same_flow(theirs, packet, first(run)));
        let recent = self.runs.len().saturating_sub(RUNS_SEARCHED);
        if let Some(at) = self.runs[recent..].iter().rposition(same_flow) {
            let run = &self.runs[recent + at];
            let joins = run.shape.zip(run.open).is_some_and(|(theirs, open)| {
                can_join
                    && payload <= open.size
                    && (shape.protocol == UDP || sequence == open.next)
                    && run.len + payload <= RUN_LEN_MAX
                    && run.count < RUN_MAX
                    && shape.continues(theirs, packet, first(run))
            });
            let run = &mut self.runs[recent + at];
            if joins {
                self.packets[run.last].next = Some(number);
                run.last = number;
                run.len += payload;
                run.count += 1;
                run.open = run.open.filter(|open| !ends && payload == open.size);
                run.open = run.open.map(|open| Open { next, ..open });
                return;
            }
            run.open = None;
        }
        let open = (can_join && !ends).then_some(Open { size: payload, next });
        self.runs.push(Run { shape: Some(shape), open, ..alone });
    }

    /// Hands everything to `write`, the slices of one write after the other, and forgets it. Each write is
    /// [`HEADER_LEN`] bytes and a packet.
    pub fn flush(&mut self, arena: &mut [u8], mut write: impl FnMut(&[IoSlice<'_>])) {
        for run in &self.runs {
            let first = self.packets[run.first];
            let last = self.packets[run.last];
            let (mut header, mut headers_len) = ([0; HEADER_LEN], 0);
            if let Some(shape) = run.shape.filter(|_| run.count > 1) {
                let pushes = shape.pushes(&arena[last.start..last.end]);
                header = shape.make_whole(&mut arena[first.start..first.end], run.len, pushes);
                headers_len = shape.payload;
            }
            let mut parts = [IoSlice::new(&[]); RUN_MAX + 1];
            parts[0] = IoSlice::new(&header);
            parts[1] = IoSlice::new(&arena[first.start..first.end]);
            let mut count = 2;
            let mut next = first.next;
            while let Some(packet) = next.map(|number| self.packets[number]) {
                parts[count] = IoSlice::new(&arena[packet.start + headers_len..packet.end]);
                count += 1;
                next = packet.next;
            }
            write(&parts[..count]);
        }
        self.packets.clear();
        self.runs.clear();
    }

    fn takes(&self, shape: Shape) -> bool {
        match (shape.protocol, shape.is_v4) {
            (TCP, true) => self.offloads.tcp4,
            (TCP, false) => self.offloads.tcp6,
            _ => self.offloads.udp,
        }
    }
}

impl Shape {
    /// `None` for what is no TCP and no UDP, for fragments, options and extension headers, and for lengths that
    /// contradict each other.
    fn of(packet: &[u8]) -> Option<Self> {
        let number =
            |at: usize| Some(usize::from(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?])));
        let is_v4 = *packet.first()? == 0x45;
        let (protocol, transport) = if is_v4 {
            let is_fragment = number(6)? & 0x3fff != 0;
            if is_fragment || number(2)? != packet.len() {
                return None;
            }
            (*packet.get(9)?, IPV4_LEN)
        } else {
            if packet[0] >> 4 != 6 || number(4)? + IPV6_LEN != packet.len() {
                return None;
            }
            (*packet.get(6)?, IPV6_LEN)
        };
        let own_len = match protocol {
            TCP => usize::from(packet.get(transport + 12)? >> 4) * 4,
            UDP if number(transport + 4)? == packet.len() - transport => UDP_LEN,
            _ => return None,
        };
        let payload = transport + own_len;
        let fits = payload <= packet.len() && (protocol == UDP || own_len >= TCP_LEN);
        fits.then_some(Self { is_v4, protocol, transport, payload })
    }

    fn addresses(self) -> std::ops::Range<usize> {
        if self.is_v4 { 12..20 } else { 8..40 }
    }

    fn is_same_flow(self, theirs: Self, packet: &[u8], first: &[u8]) -> bool {
        let ports = self.transport..self.transport + 4;
        (self.is_v4, self.protocol) == (theirs.is_v4, theirs.protocol)
            && packet[ports.clone()] == first[ports]
            && packet[self.addresses()] == first[self.addresses()]
    }

    /// Whether nothing but data is in it: of TCP's flags ACK, and perhaps PSH.
    fn is_plain(self, packet: &[u8]) -> bool {
        self.protocol == UDP || packet[self.transport + 13] & !PSH == ACK
    }

    fn pushes(self, packet: &[u8]) -> bool {
        self.protocol == TCP && packet[self.transport + 13] & (PSH | FIN) != 0
    }

    /// Whether its checksums are there and right; who gets it in a larger packet cannot ask any more.
    fn is_intact(self, packet: &[u8]) -> bool {
        if self.is_v4 && !Sum::default().add(&packet[..IPV4_LEN]).is_intact() {
            return false;
        }
        let own = &packet[self.transport..];
        if self.protocol == UDP && own[6..8] == [0; 2] {
            return false;
        }
        pseudo_of(Sum::default().add(&packet[self.addresses()]), self.protocol, own.len())
            .add(own)
            .is_intact()
    }

    fn sequence(self, packet: &[u8]) -> u32 {
        let at = self.transport + 4;
        if self.protocol == UDP {
            0
        } else {
            u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
        }
    }

    /// Whether all that cutting would copy from the first packet's headers is the same in this one's.
    fn continues(self, theirs: Self, packet: &[u8], first: &[u8]) -> bool {
        let same = |from: usize, to: usize| packet[from..to] == first[from..to];
        // Type of service, flags, time to live; traffic class, flow label, hop limit.
        let ip = if self.is_v4 { same(0, 2) && same(6, 10) } else { same(0, 4) && same(6, 8) };
        let at = self.transport;
        // Acknowledgement, lengths, window, urgent pointer, options; the first has no PSH.
        ip && self == theirs
            && (self.protocol == UDP
                || (same(at + 8, at + 13) && same(at + 14, at + 16) && same(at + 18, self.payload)))
    }

    /// Makes the first packet the head of `len` bytes that the kernel may cut, and the header before it.
    fn make_whole(self, packet: &mut [u8], len: usize, pushes: bool) -> [u8; HEADER_LEN] {
        let size = packet.len() - self.payload;
        if self.is_v4 {
            put(packet, 2, len);
            packet[10..12].fill(0);
            let checksum = Sum::default().add(&packet[..IPV4_LEN]).checksum();
            packet[10..12].copy_from_slice(&checksum);
        } else {
            put(packet, 4, len - IPV6_LEN);
        }
        let own_len = len - self.transport;
        let pseudo =
            pseudo_of(Sum::default().add(&packet[self.addresses()]), self.protocol, own_len).folded();
        let own = &mut packet[self.transport..];
        let (gso, field) = match (self.protocol, self.is_v4) {
            (TCP, true) => (Gso::TcpV4, 16),
            (TCP, false) => (Gso::TcpV6, 16),
            _ => (Gso::Udp, 6),
        };
        if self.protocol == UDP {
            put(own, 4, own_len);
        } else if pushes {
            own[13] |= PSH;
        }
        own[field..field + 2].copy_from_slice(&pseudo);
        let short = |number: usize| u16::try_from(number).unwrap_or(u16::MAX);
        let checksum = Some((short(self.transport), short(field)));
        Header { gso, size: short(size), headers: short(self.payload), checksum }.encode()
    }
}

/// TCP's flag ACK.
const ACK: u8 = 0x10;
/// Most packets in a write: as many as a datagram of UDP_GRO has.
pub const RUN_MAX: usize = 64;
/// Most bytes of a packet.
const RUN_LEN_MAX: usize = 65_535;
/// How many runs are looked through for a packet's flow: one that was not found only begins a run of its own.
const RUNS_SEARCHED: usize = 32;
