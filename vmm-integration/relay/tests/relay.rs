//! The relay over real sockets: a socketpair in QEMU's place, loopback in the network's.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and knows its numbers"
)]

use kontor_relay::{
    Datagrams, End, Limits, Rate, Relay, RelayError, TableError, Uplink, Wires,
    message::{self, Counters, FromDaemon, FromRelay},
};
use kontor_wire::uplink::{GatewayId, MAX_SEGMENTS, MIN_DATAGRAM, PortDecoder, encode_port};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Nothing here takes so long: a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const GATEWAY: u8 = 7;

type Ended = Result<End, RelayError>;

/// A relay on a thread of its own, and the far end of each of its wires.
struct World {
    guest: UnixStream,
    decoder: PortDecoder,
    daemon: OwnedFd,
    gateway: UdpSocket,
    relay_v4: SocketAddr,
    relay: JoinHandle<Ended>,
}

fn localhost() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn nonblocking(socket: &UdpSocket) -> UdpSocket {
    socket.set_nonblocking(true).unwrap();
    socket.try_clone().unwrap()
}

fn control_pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
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
        let (daemon, control) = control_pair();
        let (udp4, udp6) = (localhost(), UdpSocket::bind("[::1]:0").ok());
        let relay_v4 = udp4.local_addr().unwrap();
        let wires = Wires {
            uplink: Uplink::Stream(uplink),
            control,
            udp4: nonblocking(&udp4),
            udp6: udp6.as_ref().map(nonblocking),
        };
        let relay = thread::spawn(move || Relay::new(wires, limits).run());
        let world =
            Self { guest, decoder: PortDecoder::new(), daemon, gateway: localhost(), relay_v4, relay };
        assert_eq!(world.hear(), FromRelay::Ready);
        world
    }

    fn say(&self, message: &FromDaemon) {
        send(&self.daemon, &message::encode(message).unwrap(), SendFlags::NOSIGNAL).unwrap();
    }

    fn hear(&self) -> FromRelay {
        let mut packet = [0; message::MAX_MESSAGE];
        let (_, length) = recv(&self.daemon, packet.as_mut_slice(), RecvFlags::empty()).unwrap();
        message::decode(&packet[..length]).unwrap()
    }

    /// Also shows that the relay still listens.
    fn counters(&self) -> Counters {
        self.say(&FromDaemon::Report);
        match self.hear() {
            FromRelay::Counters(counters) => counters,
            other @ (FromRelay::Ready | FromRelay::Garbage(_)) => panic!("{other:?}"),
        }
    }

    fn counters_once(&self, reached: impl Fn(&Counters) -> bool) -> Counters {
        loop {
            let counters = self.counters();
            if reached(&counters) {
                return counters;
            }
            thread::yield_now();
        }
    }

    /// The report behind it makes sure that the table is in use.
    fn connect(&self) {
        let endpoint = self.gateway.local_addr().unwrap();
        self.say(&FromDaemon::Gateways(vec![(GATEWAY, vec![endpoint])]));
        self.counters();
    }

    fn guest_sends(&mut self, gateway: u8, segment: usize, payload: &[u8]) {
        let mut frame = Vec::new();
        encode_port(GatewayId(gateway), segment, payload, &mut frame).unwrap();
        self.guest.write_all(&frame).unwrap();
    }

    fn guest_receives(&mut self) -> (u8, Vec<u8>) {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return (frame.gateway().0, frame.payload().to_vec());
            }
            let count = self.guest.read(self.decoder.space()).unwrap();
            assert!(count > 0, "the relay closed the uplink");
            self.decoder.advance(count);
        }
    }

    fn gateway_receives(&self) -> Vec<u8> {
        let mut datagram = vec![0; 65_536];
        let (length, source) = self.gateway.recv_from(&mut datagram).unwrap();
        assert_eq!(source, self.relay_v4);
        datagram.truncate(length);
        datagram
    }

    fn ended(self) -> Ended {
        self.relay.join().unwrap()
    }
}

fn datagram(fill: u8) -> Vec<u8> {
    vec![fill; 100]
}

#[test]
fn datagrams_go_to_the_gateway_and_come_back() {
    let mut world = World::new();
    world.connect();
    world.guest_sends(GATEWAY, 100, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    world.gateway.send_to(&datagram(2), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, datagram(2)));
    let counters = world.counters();
    assert_eq!((counters.up.frames, counters.up.datagrams, counters.up.bytes), (1, 1, 100));
    assert_eq!((counters.down.datagrams, counters.down.bytes), (1, 100));
    world.say(&FromDaemon::Shutdown);
    assert_eq!(world.ended().unwrap(), End::Shutdown);
}

#[test]
fn gateway_with_an_ipv6_address_is_reached_through_the_other_socket() {
    let Ok(gateway) = UdpSocket::bind("[::1]:0") else {
        eprintln!("skipped: this host has no IPv6");
        return;
    };
    gateway.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut world = World::new();
    world.connect();
    let endpoint = gateway.local_addr().unwrap();
    let first = world.gateway.local_addr().unwrap();
    world.say(&FromDaemon::Gateways(vec![(1, vec![first]), (2, vec![endpoint])]));
    world.counters();
    world.guest_sends(2, 100, &datagram(1));
    let mut received = [0; 200];
    let (length, source) = gateway.recv_from(&mut received).unwrap();
    assert_eq!(received[..length], datagram(1));
    gateway.send_to(&datagram(2), source).unwrap();
    assert_eq!(world.guest_receives(), (2, datagram(2)));
}

#[test]
fn each_segment_of_a_train_is_one_datagram() {
    let mut world = World::new();
    world.connect();
    let payload: Vec<u8> = (0..250).collect();
    world.guest_sends(GATEWAY, 100, &payload);
    let received = [world.gateway_receives(), world.gateway_receives(), world.gateway_receives()];
    assert_eq!(received.each_ref().map(Vec::len), [100, 100, 50]);
    assert_eq!(received.concat(), payload);
    assert_eq!(world.counters().up.frames, 1);
}

#[test]
fn longest_train_of_the_shortest_datagrams_arrives_in_order() {
    let mut world = World::new();
    world.connect();
    let payload: Vec<u8> = (0..MAX_SEGMENTS * MIN_DATAGRAM).map(|at| (at / MIN_DATAGRAM) as u8).collect();
    world.guest_sends(GATEWAY, MIN_DATAGRAM, &payload);
    for segment in 0..MAX_SEGMENTS {
        assert_eq!(world.gateway_receives(), vec![segment as u8; MIN_DATAGRAM]);
    }
}

#[test]
fn datagram_from_another_source_is_dropped() {
    let mut world = World::new();
    world.connect();
    // The same address, another port: a stranger on the gateway's own host.
    localhost().send_to(&datagram(9), world.relay_v4).unwrap();
    world.gateway.send_to(&datagram(1), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, datagram(1)));
    let counters = world.counters();
    assert_eq!((counters.down.wrong_source, counters.down.datagrams), (1, 1));
}

#[test]
fn nothing_passes_before_a_table_came() {
    let mut world = World::new();
    world.gateway.send_to(&datagram(9), world.relay_v4).unwrap();
    world.guest_sends(GATEWAY, 100, &datagram(9));
    let counters = world.counters_once(|counters| counters.down.wrong_source == 1);
    assert_eq!(counters.down.datagrams, 0);
    let counters = world.counters_once(|counters| counters.up.unknown_gateway == 1);
    assert_eq!(counters.up.datagrams, 0);
}

#[test]
fn frame_for_an_unknown_gateway_is_dropped() {
    let mut world = World::new();
    world.connect();
    world.guest_sends(GATEWAY + 1, 100, &datagram(9));
    world.guest_sends(GATEWAY, 100, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    let counters = world.counters();
    assert_eq!((counters.up.unknown_gateway, counters.up.datagrams), (1, 1));
}

#[test]
fn gateway_that_left_the_table_is_neither_reached_nor_heard() {
    let mut world = World::new();
    world.connect();
    let gone = world.gateway.try_clone().unwrap();
    world.gateway = localhost();
    world.connect();
    gone.send_to(&datagram(9), world.relay_v4).unwrap();
    world.gateway.send_to(&datagram(1), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, datagram(1)));
    world.guest_sends(GATEWAY, 100, &datagram(2));
    assert_eq!(world.gateway_receives(), datagram(2));
}

#[test]
fn datagram_too_short_for_wireguard_is_dropped() {
    let mut world = World::new();
    world.connect();
    world.gateway.send_to(&[1; MIN_DATAGRAM - 1], world.relay_v4).unwrap();
    world.gateway.send_to(&[2; MIN_DATAGRAM], world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), (GATEWAY, vec![2; MIN_DATAGRAM]));
    assert_eq!(world.counters().down.malformed, 1);
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
    world.guest_sends(GATEWAY, 100, &datagram(1));
    assert_eq!(world.gateway_receives(), datagram(1));
    assert_eq!(world.counters().up.malformed, u64::from(burst));

    world.guest.write_all(&malformed.repeat(2 * burst as usize)).unwrap();
    assert_eq!(world.hear(), FromRelay::Garbage("an uplink frame of 3 bytes".into()));
    assert_eq!(world.ended().unwrap(), End::Garbage);
}

#[test]
fn malformed_frames_between_good_ones_end_the_relay_too() {
    let mut world = World::new();
    world.connect();
    let mut both = vec![3, 0, 9, 9, 9];
    encode_port(GatewayId(GATEWAY), 100, &datagram(1), &mut both).unwrap();
    // The relay may be gone before all is written.
    let _ = world.guest.write_all(&both.repeat(40));
    assert!(matches!(world.hear(), FromRelay::Garbage(_)));
    assert_eq!(world.ended().unwrap(), End::Garbage);
}

#[test]
fn flood_above_the_rate_is_dropped_and_counted() {
    let limits = Limits { datagrams: Rate { per_s: 1, burst: 5 }, ..Limits::default() };
    let mut world = World::with(limits);
    world.connect();
    // A train counts by its datagrams: 2 and 2 pass, 2 more do not.
    for _ in 0..50 {
        world.guest_sends(GATEWAY, 100, &[1; 200]);
    }
    let all = |counters: &Counters| counters.up.frames + counters.up.above_rate == 50;
    let counters = world.counters_once(all);
    assert!(counters.up.above_rate > 0 && counters.up.datagrams >= 4, "{counters:?}");
}

#[test]
fn guest_that_does_not_read_loses_datagrams_and_blocks_nothing() {
    let mut world = World::new();
    world.connect();
    let payload = vec![5; 60_000];
    let full = loop {
        world.gateway.send_to(&payload, world.relay_v4).unwrap();
        let counters = world.counters();
        if counters.down.guest_full > 3 {
            break counters;
        }
    };
    world.guest_sends(GATEWAY, 100, &datagram(1));
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

#[test]
fn closed_uplink_ends_the_relay_and_its_last_word_are_the_counters() {
    let mut world = World::new();
    world.connect();
    world.guest_sends(GATEWAY, 100, &datagram(1));
    world.gateway_receives();
    world.guest.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(world.hear(), FromRelay::Counters(counters) if counters.up.datagrams == 1));
    assert_eq!(world.ended().unwrap(), End::UplinkClosed);
}

#[test]
fn death_of_kontord_ends_the_relay() {
    let world = World::new();
    drop(world.daemon);
    assert_eq!(world.relay.join().unwrap().unwrap(), End::Shutdown);
}

#[test]
fn what_is_no_message_of_kontord_ends_the_relay() {
    let world = World::new();
    send(&world.daemon, &[0xff; 40], SendFlags::NOSIGNAL).unwrap();
    assert!(matches!(world.ended(), Err(RelayError::Message(_))));
}

#[test]
fn table_that_breaks_a_rule_ends_the_relay() {
    let world = World::new();
    world.say(&FromDaemon::Gateways(vec![(1, vec![])]));
    let refused = TableError::Endpoints { id: 1, endpoints: 0 };
    assert!(matches!(world.ended(), Err(RelayError::Table(error)) if error == refused));
}

/// A network whose queue is as short as a test needs it: a pair of unix datagram sockets.
struct Narrow(UnixDatagram);

impl AsFd for Narrow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Datagrams for Narrow {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        Ok((self.0.recv(buffer)?, "192.0.2.1:9".parse().unwrap()))
    }

    fn send(&self, datagram: &[u8], _: SocketAddr) -> io::Result<()> {
        self.0.send(datagram).map(|_| ())
    }
}

#[test]
fn network_without_room_holds_the_guest_back_and_loses_nothing() {
    let (mut guest, uplink) = guest_pair();
    let (daemon, control) = control_pair();
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    let wires = Wires { uplink: Uplink::Stream(uplink), control, udp4: Narrow(near), udp6: None };
    let relay = thread::spawn(move || Relay::new(wires, Limits::default()).run());
    let table = FromDaemon::Gateways(vec![(1, vec!["192.0.2.1:9".parse().unwrap()])]);
    send(&daemon, &message::encode(&table).unwrap(), SendFlags::NOSIGNAL).unwrap();

    let sent_so_far = || {
        send(&daemon, &message::encode(&FromDaemon::Report).unwrap(), SendFlags::NOSIGNAL).unwrap();
        let mut packet = [0; message::MAX_MESSAGE];
        loop {
            let (_, length) = recv(&daemon, packet.as_mut_slice(), RecvFlags::empty()).unwrap();
            if let FromRelay::Counters(counters) = message::decode(&packet[..length]).unwrap() {
                return counters.up.datagrams;
            }
        }
    };

    // Trains of numbered datagrams, until nothing moves any more: so far is the pressure felt.
    guest.set_nonblocking(true).unwrap();
    let (mut frames, mut pending, mut number, mut sent) = (0_u32, Vec::new(), 0_u32, u64::MAX);
    loop {
        if pending.is_empty() {
            let train: Vec<u8> = (number..number + 10).flat_map(|n| n.to_le_bytes().repeat(100)).collect();
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
        assert_eq!(received[..4], expected.to_le_bytes());
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
