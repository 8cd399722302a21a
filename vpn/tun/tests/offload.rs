//! Packets through cutting and joining: what comes out is what went in, in each flow's order.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use kontor_tun::{Coalescer, HEADER_LEN, OffloadError, Offloads, RUN_MAX, Segments};
use proptest::prelude::*;

const ALL: Offloads = Offloads { tcp4: true, tcp6: true, udp: true };
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;

/// A packet to be made.
#[derive(Debug, Clone)]
struct Packet {
    v4: bool,
    tcp: bool,
    flow: u8,
    sequence: u32,
    flags: u8,
    tos: u8,
    ttl: u8,
    window: u16,
    options: Vec<u8>,
    payload: Vec<u8>,
}

impl Packet {
    fn tcp(v4: bool, sequence: u32, payload: Vec<u8>) -> Self {
        let options = vec![1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9];
        Self { v4, tcp: true, flow: 1, sequence, flags: ACK, tos: 0, ttl: 64, window: 500, options, payload }
    }

    fn udp(v4: bool, payload: Vec<u8>) -> Self {
        Self { tcp: false, options: Vec::new(), ..Self::tcp(v4, 0, payload) }
    }

    fn transport(&self) -> usize {
        if self.v4 { 20 } else { 40 }
    }

    /// Its bytes, checksums included; `id` is IPv4's.
    fn bytes(&self, id: u16) -> Vec<u8> {
        let mut own = vec![0x10, self.flow, 0x01, 0xbb];
        if self.tcp {
            own.extend(self.sequence.to_be_bytes());
            own.extend(77_u32.to_be_bytes());
            own.extend([((20 + self.options.len()) as u8 / 4) << 4, self.flags]);
            own.extend(self.window.to_be_bytes());
            own.extend([0, 0, 0, 0]);
            own.extend(&self.options);
        } else {
            own.extend((8 + self.payload.len() as u16).to_be_bytes());
            own.extend([0, 0]);
        }
        own.extend(&self.payload);
        let protocol = if self.tcp { 6 } else { 17 };
        let mut packet = if self.v4 {
            let total = (20 + own.len()) as u16;
            let mut header = vec![0x45, self.tos];
            header.extend(total.to_be_bytes());
            header.extend(id.to_be_bytes());
            header.extend([0x40, 0, self.ttl, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum);
            header
        } else {
            let mut header = vec![0x60 | self.tos >> 4, self.tos << 4, 0, 0];
            header.extend((own.len() as u16).to_be_bytes());
            header.extend([protocol, self.ttl]);
            header.extend([0xfd; 16]);
            header.extend([0xfc; 16]);
            header
        };
        let addresses = if self.v4 { &packet[12..20] } else { &packet[8..40] };
        let pseudo = [&[0, protocol][..], &(own.len() as u16).to_be_bytes()].concat();
        let sum = checksum(&[addresses, &pseudo, &own]);
        let field = if self.tcp { 16 } else { 6 };
        own[field..field + 2].copy_from_slice(&sum);
        packet.extend(own);
        packet
    }

    /// As the kernel would hand it over for segments of `size` bytes.
    fn frame(&self, size: u16) -> Vec<u8> {
        let kind = match (self.tcp, self.v4) {
            (true, true) => 1,
            (true, false) => 4,
            (false, _) => 5,
        };
        let mut frame = vec![1, kind, 0, 0];
        frame.extend(size.to_ne_bytes());
        frame.extend((self.transport() as u16).to_ne_bytes());
        frame.extend(if self.tcp { 16_u16 } else { 6 }.to_ne_bytes());
        frame.extend(self.bytes(1000));
        frame
    }
}

/// The plain way, a byte pair at a time.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    let sum = !(sum as u16);
    if sum == 0 { [0xff; 2] } else { sum.to_be_bytes() }
}

fn segments(frame: &[u8]) -> Result<Vec<Vec<u8>>, OffloadError> {
    let mut segments = Segments::parse(frame)?;
    let (mut out, mut all) = (vec![0; 65_536], Vec::new());
    while let Some(len) = segments.write_next(&mut out) {
        all.push(out[..len].to_vec());
    }
    Ok(all)
}

/// What is written for these packets.
fn writes(packets: &[Vec<u8>], offloads: Offloads) -> Vec<Vec<u8>> {
    let mut arena = packets.concat();
    let mut coalescer = Coalescer::new(offloads, packets.len());
    let mut at = 0;
    for packet in packets {
        coalescer.push(&arena, at, at + packet.len());
        at += packet.len();
    }
    let mut written = Vec::new();
    coalescer.flush(&mut arena, |parts| {
        assert!(parts.len() <= RUN_MAX + 1);
        written.push(parts.iter().flat_map(|part| part.iter().copied()).collect());
    });
    coalescer.flush(&mut arena, |_| panic!("nothing is left"));
    written
}

/// A packet without what may change on the way: IPv4's identification, and zero and all ones as a checksum.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let (transport, protocol) = if packet[0] >> 4 == 4 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
        (20, packet[9])
    } else {
        (40, packet[6])
    };
    let field = transport + if protocol == 6 { 16 } else { 6 };
    if packet.get(field..field + 2) == Some(&[0; 2]) {
        packet[field..field + 2].fill(0xff);
    }
    packet
}

fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn any_packet() -> impl Strategy<Value = Packet> {
    let kind = (any::<bool>(), any::<bool>(), 0..3_u8);
    let flags = prop_oneof![6 => Just(ACK), 1 => Just(ACK | PSH), 1 => Just(ACK | FIN), 1 => Just(2)];
    let rare = (prop_oneof![9 => Just(0_u8), 1 => Just(2)], prop_oneof![9 => Just(64_u8), 1 => Just(63)]);
    let window = prop_oneof![9 => Just(500_u16), 1 => Just(501)];
    let len = prop_oneof![4 => Just(100_usize), 1 => 0..100_usize, 1 => Just(101_usize)];
    // Whether it follows the one before.
    (kind, flags, rare, window, len, any::<u8>(), 0..10_u32).prop_map(
        |((v4, tcp, flow), flags, (tos, ttl), window, len, seed, gap)| {
            let base = if tcp {
                Packet::tcp(v4, 0, payload(len, seed))
            } else {
                Packet::udp(v4, payload(len, seed))
            };
            let sequence = if gap == 0 { 5 } else { 0 };
            Packet { flow, flags, tos, ttl, window, sequence, ..base }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn frame_is_cut_into_what_the_kernel_would_have_sent_and_joined_again(
        v4: bool, tcp: bool, sequence: u32, len in 1..60_000_usize, size in 1000..1400_u16, seed: u8,
        last in prop_oneof![Just(0), Just(PSH)],
    ) {
        let whole = if tcp {
            Packet { flags: ACK | last, ..Packet::tcp(v4, sequence, payload(len, seed)) }
        } else {
            Packet::udp(v4, payload(len, seed))
        };
        let cut = segments(&whole.frame(size)).unwrap();
        let count = len.div_ceil(usize::from(size));
        prop_assert_eq!(cut.len(), count);
        for (index, piece) in whole.payload.chunks(usize::from(size)).enumerate() {
            let sequence = sequence.wrapping_add((index * usize::from(size)) as u32);
            let flags = if index + 1 == count { whole.flags } else { ACK };
            let expected = Packet { sequence, flags, payload: piece.to_vec(), ..whole.clone() };
            let expected = expected.bytes(1000_u16.wrapping_add(index as u16));
            prop_assert_eq!(&cut[index], &expected);
        }
        let written = writes(&cut, ALL);
        prop_assert_eq!(written.len(), count.div_ceil(RUN_MAX));
        let again: Vec<_> = written.iter().flat_map(|frame| segments(frame).unwrap()).collect();
        prop_assert_eq!(again, cut);
        prop_assert_eq!(writes(&again_of(&written), Offloads::default()).len(), count);
    }

    #[test]
    fn packets_of_many_flows_keep_their_order_and_their_bytes(
        packets in prop::collection::vec(any_packet(), 1..120), broken in prop::collection::vec(0..1200_usize, 0..4),
    ) {
        let mut next = std::collections::BTreeMap::new();
        let mut packets: Vec<_> = packets.into_iter().enumerate().map(|(id, packet)| {
            let at = next.entry((packet.v4, packet.flow)).or_insert(0_u32);
            let sequence = at.wrapping_add(packet.sequence);
            if packet.tcp {
                *at = sequence.wrapping_add(packet.payload.len() as u32);
            }
            Packet { sequence, ..packet }.bytes(id as u16)
        }).collect();
        for at in broken {
            let number = at / 10;
            if let Some(packet) = packets.get_mut(number) {
                let last = packet.len() - 1;
                packet[last] ^= 1;
            }
        }
        let flow = |packet: &Vec<u8>| {
            if packet[0] >> 4 == 4 { (4, packet[9], packet[21]) } else { (6, packet[6], packet[41]) }
        };
        let again: Vec<_> = writes(&packets, ALL).iter().flat_map(|frame| segments(frame).unwrap()).collect();
        prop_assert_eq!(again.len(), packets.len());
        let flows: std::collections::BTreeSet<_> = packets.iter().map(flow).collect();
        for one in flows {
            let of = |all: &[Vec<u8>]| -> Vec<_> {
                all.iter().filter(|packet| flow(packet) == one).map(|packet| comparable(packet)).collect()
            };
            prop_assert_eq!(of(&again), of(&packets));
        }
    }

    #[test]
    fn no_bytes_panic(frame in prop::collection::vec(any::<u8>(), 0..200), kind in 0..6_u8, version in 4..7_u8) {
        let _ = segments(&frame);
        let mut frame = frame;
        if frame.len() > HEADER_LEN + 12 {
            frame[0] = 1;
            frame[1] = kind;
            frame[7] = 0;
            frame[6] &= 63;
            frame[HEADER_LEN] = version << 4 | 5;
            let _ = segments(&frame);
            let packet = frame[HEADER_LEN..].to_vec();
            prop_assert_eq!(writes(&[packet.clone(), packet.clone()], ALL).len(), 2);
        }
    }
}

/// The single packets in what was written.
fn again_of(written: &[Vec<u8>]) -> Vec<Vec<u8>> {
    written.iter().flat_map(|frame| segments(frame).unwrap()).collect()
}

#[test]
fn only_the_first_says_that_the_window_was_reduced() {
    let whole = Packet { flags: ACK | CWR | FIN, ..Packet::tcp(true, 7, payload(2500, 1)) };
    let flags: Vec<_> = segments(&whole.frame(1000)).unwrap().iter().map(|packet| packet[33]).collect();
    assert_eq!(flags, [ACK | CWR, ACK, ACK | FIN]);
}

#[test]
fn packet_without_a_checksum_gets_one() {
    for packet in [Packet::tcp(true, 9, payload(33, 2)), Packet::udp(false, payload(34, 3))] {
        let (expected, field) = (packet.bytes(1000), packet.transport() + if packet.tcp { 16 } else { 6 });
        let mut frame = packet.frame(0);
        frame[1] = 0;
        let own_len = expected.len() - packet.transport();
        let addresses = if packet.v4 { &expected[12..20] } else { &expected[8..40] };
        let pseudo = [0, if packet.tcp { 6 } else { 17 }, (own_len >> 8) as u8, own_len as u8];
        let sum = checksum(&[addresses, &pseudo]).map(|byte| !byte);
        frame[HEADER_LEN + field..][..2].copy_from_slice(&sum);
        assert_eq!(segments(&frame).unwrap(), [expected]);
    }
}

#[test]
fn frames_that_contradict_themselves_are_refused() {
    let frame = Packet::tcp(true, 0, payload(3000, 0)).frame(1000);
    let changed = |at: usize, byte: u8| {
        let mut frame = frame.clone();
        frame[at] = byte;
        segments(&frame)
    };
    assert_eq!(segments(&frame[..HEADER_LEN]), Err(OffloadError::Short(HEADER_LEN)));
    assert_eq!(changed(1, 4), Err(OffloadError::Kind));
    assert_eq!(changed(1, 3), Err(OffloadError::Kind));
    assert_eq!(changed(0, 0), Err(OffloadError::Size));
    let mut sizeless = frame.clone();
    sizeless[4..6].fill(0);
    assert_eq!(segments(&sizeless), Err(OffloadError::Size));
    // A TCP header of 16 bytes, and one that starts within the IP header or behind the end.
    for (at, byte) in [(HEADER_LEN + 32, 0x40), (6, 19), (7, 0x40)] {
        assert_eq!(changed(at, byte), Err(OffloadError::Short(frame.len())), "{at}");
    }
}

#[test]
fn runs_end_where_cutting_would_not_give_the_same() {
    let data = |sequence| Packet::tcp(true, sequence, payload(100, 4));
    let count = |second: Packet| writes(&[data(0).bytes(1), second.bytes(2)], ALL).len();
    assert_eq!(count(data(100)), 1);
    for other in [
        data(101),
        Packet { tos: 3, ..data(100) },
        Packet { ttl: 9, ..data(100) },
        Packet { window: 1, ..data(100) },
        Packet { flow: 2, ..data(100) },
        Packet { flags: ACK | FIN, ..data(100) },
        Packet { flags: ACK | CWR, ..data(100) },
        Packet { payload: payload(101, 4), ..data(100) },
        Packet { payload: Vec::new(), ..data(100) },
        Packet { options: vec![1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 8], ..data(100) },
        Packet { v4: false, ..data(100) },
    ] {
        assert_eq!(count(other.clone()), 2, "{other:?}");
    }
    // Behind a short one and behind a push nothing follows.
    let short = Packet { payload: payload(99, 4), ..data(100) };
    assert_eq!(writes(&[data(0), short, data(199)].map(|packet| packet.bytes(0)), ALL).len(), 2);
    let push = Packet { flags: ACK | PSH, ..data(100) };
    assert_eq!(writes(&[data(0), push, data(200)].map(|packet| packet.bytes(0)), ALL).len(), 2);
    // A fragment holds every flow back.
    let mut fragment = Packet::udp(true, payload(9, 9)).bytes(3);
    fragment[6] = 0x20;
    assert_eq!(writes(&[data(0).bytes(0), fragment, data(100).bytes(1)], ALL).len(), 3);
}
