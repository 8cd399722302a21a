//! The relay over real sockets: a socketpair in QEMU's place, loopback in the network's.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and knows its numbers"
)]

mod wires;

use kontor_relay::{
    End, Limits, REFUSED_INITIATION, Rate, Relay, RelayError, TableError, Uplink, Wires,
    message::{Counters, FromDaemon, FromRelay, Gateway},
};
use kontor_wire::uplink::{GatewayId, MAX_SEGMENTS, MIN_DATAGRAM, PortDecoder, encode_port};
use kontor_wire::wireguard::{COOKIE_REPLY_LEN, INITIATION_LEN, LONGEST, RESPONSE_LEN};
use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{SocketAddr, UdpSocket},
    os::{
        fd::AsFd,
        unix::net::{UnixDatagram, UnixStream},
    },
    thread::{self, JoinHandle},
};
use wires::{Daemon, GATEWAY, PATIENCE, connected, daemon, localhost, receive, transport};

/// Bytes of [`datagram`].
const LEN: usize = 96;

type Ended = Result<End, RelayError>;

/// A relay on a thread of its own, and the far end of each of its wires.
struct World {
    guest: UnixStream,
    decoder: PortDecoder,
    received: VecDeque<(u8, Vec<u8>)>,
    /// Datagrams in the longest train that was received.
    longest_train: usize,
    daemon: Daemon,
    gateway: UdpSocket,
    /// Where the gateway sees the relay, once there is a socket to it.
    relay_v4: SocketAddr,
    relay: JoinHandle<Ended>,
}

fn guest_pair() -> (UnixStream, UnixStream) {
    let (guest, uplink) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(PATIENCE)).unwrap();
    guest.set_write_timeout(Some(PATIENCE)).unwrap();
    uplink.set_nonblocking(true).unwrap();
    (guest, uplink)
}

impl World {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let (guest, uplink) = guest_pair();
        let (daemon, control) = daemon();
        let wires = Wires { uplink: Uplink::Stream(uplink), control };
        let relay = thread::spawn(move || Relay::new(wires, limits).run());
        assert_eq!(daemon.hear(), FromRelay::Ready);
        Self {
            guest,
            decoder: PortDecoder::new(),
            received: VecDeque::new(),
            longest_train: 0,
            daemon,
            gateway: localhost(),
            relay_v4: "0.0.0.0:0".parse().unwrap(),
            relay,
        }
    }

    fn counters_once(&self, reached: impl Fn(&Counters) -> bool) -> Counters {
        loop {
            let counters = self.daemon.counters();
            if reached(&counters) {
                return counters;
            }
            thread::yield_now();
        }
    }

    fn connect(&mut self) {
        self.relay_v4 = self.daemon.connect(&self.gateway);
    }

    fn guest_sends(&mut self, gateway: u8, segment: usize, payload: &[u8]) {
        let mut frame = Vec::new();
        encode_port(GatewayId(gateway), segment, payload, &mut frame).unwrap();
        self.guest.write_all(&frame).unwrap();
    }

    /// The next datagram, of a train or alone.
    fn guest_receives(&mut self) -> (u8, Vec<u8>) {
        loop {
            if let Some(datagram) = self.received.pop_front() {
                return datagram;
            }
            while let Some(frame) = self.decoder.next_frame().unwrap() {
                let gateway = frame.gateway().0;
                self.longest_train = self.longest_train.max(frame.segments().count());
                self.received.extend(frame.segments().map(|datagram| (gateway, datagram.to_vec())));
            }
            if !self.received.is_empty() {
                continue;
            }
            let count = self.guest.read(self.decoder.space()).unwrap();
            assert!(count > 0, "the relay closed the uplink");
            self.decoder.advance(count);
        }
    }

    fn gateway_receives(&self) -> Vec<u8> {
        let (datagram, source) = receive(&self.gateway);
        assert_eq!(source, self.relay_v4);
        datagram
    }

    fn ended(self) -> Ended {
        self.relay.join().unwrap()
    }
}

fn datagram(fill: u8) -> Vec<u8> {
    transport(LEN, fill)
}

/// What looks like a handshake initiation.
fn initiation(fill: u8) -> Vec<u8> {
    let mut bytes = vec![fill; INITIATION_LEN];
    bytes[..4].copy_from_slice(&[1, 0, 0, 0]);
    bytes
}

#[test]
fn datagrams_go_to_the_gateway_and_come_back() {
    let mut world = World::new();
    world.connect();
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    world.gateway.send_to(&datagram(2), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, datagram(2)));
    let counters = world.daemon.counters();
    assert_eq!((counters.up.frames, counters.up.datagrams, counters.up.bytes), (1, 1, LEN as u64));
    assert_eq!((counters.down.datagrams, counters.down.bytes), (1, LEN as u64));
    world.daemon.say(&FromDaemon::Shutdown);
    assert_eq!(world.ended().unwrap(), End::Shutdown);
}

#[test]
fn gateways_of_both_families_are_reached_each_through_its_socket() {
    let Ok(gateway) = UdpSocket::bind("[::1]:0") else {
        eprintln!("skipped: this host has no IPv6");
        return;
    };
    gateway.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut world = World::new();
    let (first, second) = (world.gateway.local_addr().unwrap(), gateway.local_addr().unwrap());
    let sockets = [first, second].map(connected);
    world.daemon.hand(&[(1, first, sockets[0].as_fd()), (2, second, sockets[1].as_fd())]);
    world.guest_sends(2, LEN, &datagram(1));
    let (received, source) = receive(&gateway);
    assert_eq!(received, datagram(1));
    gateway.send_to(&datagram(2), source).unwrap();
    assert_eq!(world.guest_receives(), (2, datagram(2)));
}

#[test]
fn each_segment_of_a_train_is_one_datagram() {
    let mut world = World::new();
    world.connect();
    let train = [transport(LEN, 1), transport(LEN, 2), transport(48, 3)];
    world.guest_sends(GATEWAY, LEN, &train.concat());
    let received = [world.gateway_receives(), world.gateway_receives(), world.gateway_receives()];
    assert_eq!(received, train);
    assert_eq!(world.daemon.counters().up.frames, 1);
}

#[test]
fn longest_train_of_the_shortest_datagrams_arrives_in_order() {
    let mut world = World::new();
    world.connect();
    let train = |at: usize| transport(MIN_DATAGRAM, at as u8);
    let payload: Vec<u8> = (0..MAX_SEGMENTS).flat_map(train).collect();
    world.guest_sends(GATEWAY, MIN_DATAGRAM, &payload);
    for segment in 0..MAX_SEGMENTS {
        assert_eq!(world.gateway_receives(), train(segment));
    }
}

#[test]
fn datagram_from_another_source_is_dropped() {
    let mut world = World::new();
    // The same address, another port: a stranger on the gateway's own host. One datagram is there before the
    // socket is connected, the other is the kernel's to drop.
    let (endpoint, stranger) = (world.gateway.local_addr().unwrap(), localhost());
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    world.relay_v4 = socket.local_addr().unwrap();
    stranger.send_to(&datagram(9), world.relay_v4).unwrap();
    socket.connect(endpoint).unwrap();
    stranger.send_to(&datagram(9), world.relay_v4).unwrap();
    world.daemon.hand(&[(GATEWAY, endpoint, socket.as_fd())]);
    world.gateway.send_to(&datagram(1), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, datagram(1)));
    let counters = world.daemon.counters();
    assert_eq!((counters.down.wrong_source, counters.down.datagrams), (1, 1));
}

#[test]
fn nothing_passes_before_a_table_came() {
    let mut world = World::new();
    world.guest_sends(GATEWAY, LEN, &datagram(9));
    let counters = world.counters_once(|counters| counters.up.unknown_gateway == 1);
    assert_eq!(counters.up.datagrams, 0);
}

/// The home PC moves: the same gateway, from another port as here, or from another address.
#[test]
fn traffic_goes_on_through_the_sockets_that_replace_the_first() {
    let mut world = World::new();
    let mut seen = std::collections::HashSet::new();
    for turn in 0..20 {
        world.connect();
        assert!(seen.insert(world.relay_v4));
        world.guest_sends(GATEWAY, LEN, &datagram(turn));
        assert_eq!(world.gateway_receives(), datagram(turn));
        world.gateway.send_to(&datagram(turn), world.relay_v4).unwrap();
        assert_eq!(world.guest_receives(), (GATEWAY, datagram(turn)));
    }
}

#[test]
fn gateway_without_a_way_to_it_costs_datagrams_and_no_more() {
    let mut world = World::new();
    world.daemon.say(&FromDaemon::Gateways(vec![Gateway { id: GATEWAY, endpoint: None }]));
    world.guest_sends(GATEWAY, LEN, &datagram(9));
    let counters = world.counters_once(|counters| counters.up.frames == 1);
    assert_eq!((counters.up.send_failed, counters.up.unknown_gateway), (1, 0));
    world.connect();
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
}

#[test]
fn gateway_that_refuses_and_comes_back_is_reached_again() {
    let mut world = World::new();
    world.connect();
    let endpoint = world.gateway.local_addr().unwrap();
    // The old one is closed when the new one takes its place in the field.
    world.gateway = localhost();
    world.guest_sends(GATEWAY, LEN, &datagram(9));
    world.counters_once(|counters| counters.up.frames == 1);
    world.gateway = UdpSocket::bind(endpoint).unwrap();
    world.gateway.set_read_timeout(Some(PATIENCE)).unwrap();
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    assert_eq!(world.daemon.counters().up.send_failed, 0);
}

#[test]
fn frame_for_an_unknown_gateway_is_dropped() {
    let mut world = World::new();
    world.connect();
    world.guest_sends(GATEWAY + 1, LEN, &datagram(9));
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    let counters = world.daemon.counters();
    assert_eq!((counters.up.unknown_gateway, counters.up.datagrams), (1, 1));
}

#[test]
fn gateway_that_left_the_table_is_neither_reached_nor_heard() {
    let mut world = World::new();
    world.connect();
    let gone = world.gateway.try_clone().unwrap();
    world.gateway = localhost();
    world.connect();
    let _ = gone.send_to(&datagram(9), world.relay_v4);
    world.gateway.send_to(&datagram(1), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, datagram(1)));
    world.guest_sends(GATEWAY, LEN, &datagram(2));
    assert_eq!(world.gateway_receives(), datagram(2));
}

/// Bytes that have no shape of WireGuard's: of other types, with reserved bytes in use, of other lengths.
fn strangers() -> Vec<Vec<u8>> {
    let mut strangers =
        vec![vec![1; MIN_DATAGRAM], vec![0; 96], b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n".into()];
    for (kind, length) in [(1, INITIATION_LEN), (2, RESPONSE_LEN), (3, COOKIE_REPLY_LEN), (4, LEN)] {
        let good = [&[kind, 0, 0, 0][..], &vec![7; length - 4]].concat();
        strangers.push([&good[..], &[7]].concat());
        strangers.push(good[..length - 1].to_vec());
        strangers.extend((1..4).map(|at| {
            let mut reserved = good.clone();
            reserved[at] = 1;
            reserved
        }));
    }
    strangers.extend([transport(1456, 7), transport(LONGEST + 1, 7), [&[5, 0, 0, 0][..], &[7; 92]].concat()]);
    strangers
}

#[test]
fn datagram_of_the_gateways_that_is_not_wireguards_is_dropped() {
    let mut world = World::new();
    world.connect();
    let strangers = strangers();
    for stranger in strangers.iter().chain([&vec![4; MIN_DATAGRAM - 1]]) {
        world.gateway.send_to(stranger, world.relay_v4).unwrap();
    }
    for length in [MIN_DATAGRAM, LONGEST] {
        world.gateway.send_to(&transport(length, 2), world.relay_v4).unwrap();
        assert_eq!(world.guest_receives(), (GATEWAY, transport(length, 2)));
    }
    let counters = world.daemon.counters();
    assert_eq!((counters.down.not_wireguard, counters.down.datagrams), (strangers.len() as u64 + 1, 2));
}

#[test]
fn frame_of_the_guests_with_what_is_not_wireguards_is_dropped_whole() {
    let limits = Limits { malformed: Rate { per_s: 1, burst: 1_000 }, ..Limits::default() };
    let mut world = World::with(limits);
    world.connect();
    let strangers = strangers();
    for stranger in &strangers {
        world.guest_sends(GATEWAY, stranger.len(), stranger);
    }
    // One among good ones takes them with it, wherever it stands.
    for at in 0..3 {
        let mut train = [transport(LEN, 1), transport(LEN, 2), transport(LEN, 3)];
        train[at][1] = 1;
        world.guest_sends(GATEWAY, LEN, &train.concat());
    }
    world.guest_sends(GATEWAY, LEN, &[transport(LEN, 1), transport(40, 2)].concat());
    for (kind, length) in [(1, INITIATION_LEN), (2, RESPONSE_LEN), (3, COOKIE_REPLY_LEN), (4, LONGEST)] {
        let good = [&[kind, 0, 0, 0][..], &vec![8; length - 4]].concat();
        world.guest_sends(GATEWAY, length, &good);
        assert_eq!(world.gateway_receives(), good);
    }
    let counters = world.daemon.counters();
    assert_eq!((counters.up.not_wireguard, counters.up.datagrams), (strangers.len() as u64 + 4, 4));
}

#[test]
fn guest_that_keeps_sending_what_is_not_wireguards_ends_the_relay() {
    let limits = Limits { malformed: Rate { per_s: 1, burst: 4 }, ..Limits::default() };
    let mut world = World::with(limits);
    world.connect();
    let mut frames = Vec::new();
    encode_port(GatewayId(GATEWAY), LEN, &[b'x'; LEN], &mut frames).unwrap();
    world.guest.write_all(&frames.repeat(10)).unwrap();
    let words = "a datagram of 96 bytes without the shape of WireGuard";
    assert_eq!(world.daemon.hear(), FromRelay::Garbage(words.into()));
    assert_eq!(world.ended().unwrap(), End::Garbage);
}

#[test]
fn initiations_have_a_limit_of_their_own_and_a_flood_of_them_ends_the_relay() {
    let limits = Limits {
        initiations: Rate { per_s: 1, burst: 3 },
        refused: Rate { per_s: 1, burst: 5 * REFUSED_INITIATION },
        ..Limits::default()
    };
    let mut world = World::with(limits);
    world.connect();
    // Written at once, they are read in one turn, at one time. Other messages have their own limit.
    let mut frames = Vec::new();
    for number in 0..5 {
        encode_port(GatewayId(GATEWAY), INITIATION_LEN, &initiation(number), &mut frames).unwrap();
    }
    encode_port(GatewayId(GATEWAY), LEN, &datagram(9), &mut frames).unwrap();
    world.guest.write_all(&frames).unwrap();
    let received: Vec<Vec<u8>> = (0..4).map(|_| world.gateway_receives()).collect();
    assert_eq!(received, [initiation(0), initiation(1), initiation(2), datagram(9)]);
    assert_eq!(world.daemon.counters().up.initiations_above_rate, 2);

    world.guest_sends(GATEWAY, INITIATION_LEN, &initiation(9).repeat(MAX_SEGMENTS));
    let words = "a flood: 64 handshake initiations above the limit";
    assert_eq!(world.daemon.hear(), FromRelay::Garbage(words.into()));
    assert_eq!(world.ended().unwrap(), End::Garbage);
}

/// What a tunnel sends before its first session, to two gateways at once, is within the limit.
#[test]
fn initiations_of_a_tunnel_that_finds_no_gateway_pass() {
    let mut world = World::new();
    world.connect();
    let limit = Limits::default().initiations;
    assert!(limit.per_s >= 2 * 4 && limit.burst >= limit.per_s);
    for number in 0..limit.burst {
        world.guest_sends(GATEWAY, INITIATION_LEN, &initiation(number as u8));
    }
    for number in 0..limit.burst {
        assert_eq!(world.gateway_receives(), initiation(number as u8));
    }
    assert_eq!(world.daemon.counters().up.initiations_above_rate, 0);
}

#[test]
fn a_few_malformed_frames_are_dropped_and_one_too_many_ends_the_relay() {
    let burst = 4;
    let limits = Limits { malformed: Rate { per_s: 1, burst }, ..Limits::default() };
    let mut world = World::with(limits);
    world.connect();
    // One write for all: the refill of the second it takes cannot matter.
    let malformed = [3, 0, 9, 9, 9];
    world.guest.write_all(&malformed.repeat(burst as usize)).unwrap();
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    assert_eq!(world.daemon.counters().up.malformed, u64::from(burst));

    world.guest.write_all(&malformed.repeat(2 * burst as usize)).unwrap();
    assert_eq!(world.daemon.hear(), FromRelay::Garbage("an uplink frame of 3 bytes".into()));
    assert_eq!(world.ended().unwrap(), End::Garbage);
}

#[test]
fn malformed_frames_between_good_ones_end_the_relay_too() {
    let mut world = World::new();
    world.connect();
    let mut both = vec![3, 0, 9, 9, 9];
    encode_port(GatewayId(GATEWAY), LEN, &datagram(1), &mut both).unwrap();
    // The relay may be gone before all is written.
    let _ = world.guest.write_all(&both.repeat(40));
    assert!(matches!(world.daemon.hear(), FromRelay::Garbage(_)));
    assert_eq!(world.ended().unwrap(), End::Garbage);
}

#[test]
fn flood_above_the_rate_is_dropped_and_counted() {
    let limits = Limits { datagrams: Rate { per_s: 1, burst: 5 }, ..Limits::default() };
    let mut world = World::with(limits);
    world.connect();
    // A train counts by its datagrams: 2 and 2 pass, 2 more do not.
    for _ in 0..50 {
        world.guest_sends(GATEWAY, LEN, &datagram(1).repeat(2));
    }
    let all = |counters: &Counters| counters.up.frames + counters.up.above_rate == 50;
    let counters = world.counters_once(all);
    assert!(counters.up.above_rate > 0 && counters.up.datagrams >= 4, "{counters:?}");
}

#[test]
fn flood_that_goes_on_ends_the_relay() {
    for (gateway, words) in [
        (GATEWAY, "a flood: 64 datagrams above the limit"),
        (GATEWAY + 1, "a flood: 64 datagrams for a gateway that is not known"),
    ] {
        let limits = Limits {
            datagrams: Rate { per_s: 1, burst: 64 },
            refused: Rate { per_s: 1, burst: 640 },
            ..Limits::default()
        };
        let mut world = World::with(limits);
        world.connect();
        let mut frame = Vec::new();
        encode_port(GatewayId(gateway), 32, &transport(32, 1).repeat(64), &mut frame).unwrap();
        let _ = world.guest.write_all(&frame.repeat(20));
        assert_eq!(world.daemon.hear(), FromRelay::Garbage(words.into()));
        assert_eq!(world.ended().unwrap(), End::Garbage);
    }
}

#[test]
fn guest_that_does_not_read_loses_datagrams_and_blocks_nothing() {
    let mut world = World::new();
    world.connect();
    let payload = transport(LONGEST, 5);
    let full = loop {
        world.gateway.send_to(&payload, world.relay_v4).unwrap();
        let counters = world.daemon.counters();
        if counters.down.guest_full > 3 {
            break counters;
        }
    };
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    // Whatever was framed arrives whole once the guest reads again, and then new datagrams do.
    for _ in 0..full.down.datagrams {
        assert_eq!(world.guest_receives(), (GATEWAY, payload.clone()));
    }
    world.gateway.send_to(&datagram(2), world.relay_v4).unwrap();
    loop {
        let (_, received) = world.guest_receives();
        if received == datagram(2) {
            break;
        }
        assert_eq!(received, payload);
    }
}

/// Datagrams that come faster than the relay turns go in trains, and come out as they went in.
#[test]
fn datagrams_of_the_gateway_go_to_the_guest_in_trains() {
    let mut world = World::new();
    world.connect();
    // Whether any two are there at once is the scheduler's to say, not for long the same.
    for _ in 0..1_000 {
        for fill in 0..64 {
            world.gateway.send_to(&datagram(fill), world.relay_v4).unwrap();
        }
        for fill in 0..64 {
            assert_eq!(world.guest_receives(), (GATEWAY, datagram(fill)));
        }
        if world.longest_train > 1 {
            return;
        }
    }
    panic!("no train in 64 000 datagrams");
}

#[test]
fn closed_uplink_ends_the_relay_and_its_last_word_are_the_counters() {
    let mut world = World::new();
    world.connect();
    world.guest_sends(GATEWAY, LEN, &datagram(1));
    world.gateway_receives();
    world.guest.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(world.daemon.hear(), FromRelay::Counters(counters) if counters.up.datagrams == 1));
    assert_eq!(world.ended().unwrap(), End::UplinkClosed);
}

#[test]
fn death_of_kontord_ends_the_relay() {
    let world = World::new();
    drop(world.daemon.0);
    assert_eq!(world.relay.join().unwrap().unwrap(), End::Shutdown);
}

#[test]
fn what_is_no_message_of_kontord_ends_the_relay() {
    let world = World::new();
    world.daemon.send(&[0xff; 40], &[]);
    assert!(matches!(world.ended(), Err(RelayError::Message(_))));
}

#[test]
fn table_that_breaks_a_rule_ends_the_relay() {
    let world = World::new();
    let endpoint = world.gateway.local_addr().ok();
    world.daemon.say(&FromDaemon::Gateways(vec![Gateway { id: 1, endpoint }]));
    let refused = TableError::Sockets { named: 1, came: 0 };
    assert!(matches!(world.ended(), Err(RelayError::Table(error)) if error == refused));
}

/// A transport message that carries its number.
fn numbered(number: u32) -> Vec<u8> {
    let mut bytes = transport(400, 0);
    bytes[4..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

#[test]
fn network_without_room_holds_the_guest_back_and_loses_nothing() {
    let (mut guest, uplink) = guest_pair();
    let (daemon, control) = daemon();
    // A network whose queue is short: a pair of unix datagram sockets.
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    let wires = Wires { uplink: Uplink::Stream(uplink), control };
    let relay = thread::spawn(move || Relay::new(wires, Limits::default()).run());
    assert_eq!(daemon.hear(), FromRelay::Ready);
    daemon.hand(&[(1, "192.0.2.1:9".parse().unwrap(), near.as_fd())]);
    drop(near);
    let sent_so_far = || daemon.counters().up.datagrams;

    // Trains of numbered datagrams, until nothing moves any more: so far is the pressure felt.
    guest.set_nonblocking(true).unwrap();
    let (mut frames, mut pending, mut number, mut sent) = (0_u32, Vec::new(), 0_u32, u64::MAX);
    loop {
        if pending.is_empty() {
            let train: Vec<u8> = (number..number + 10).flat_map(numbered).collect();
            encode_port(GatewayId(1), 400, &train, &mut pending).unwrap();
            (number, frames) = (number + 10, frames + 1);
        }
        match guest.write(&pending) {
            Ok(count) => drop(pending.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let before = std::mem::replace(&mut sent, sent_so_far());
                if before == sent {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(frames > 10);
    guest.set_nonblocking(false).unwrap();
    let writer = thread::spawn(move || {
        guest.write_all(&pending).unwrap();
        guest
    });
    let mut received = [0; 1000];
    for expected in 0..number {
        assert_eq!(far.recv(&mut received).unwrap(), 400);
        assert_eq!(received[..400], numbered(expected));
    }
    drop(writer.join().unwrap());
    assert_eq!(relay.join().unwrap().unwrap(), End::UplinkClosed);
}

/// Any stream of the guest either passes as frames or ends the relay as garbage; nothing panics.
#[test]
fn random_bytes_of_the_guest_never_panic() {
    let seed = std::process::id();
    eprintln!("seed {seed}");
    let mut state = u64::from(seed) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut world = World::new();
    world.connect();
    let noise: Vec<u8> = (0..200_000).map(|_| next() as u8).collect();
    let _ = world.guest.write_all(&noise);
    let _ = world.guest.shutdown(std::net::Shutdown::Write);
    assert!(matches!(world.ended().unwrap(), End::Garbage | End::UplinkClosed));
}
