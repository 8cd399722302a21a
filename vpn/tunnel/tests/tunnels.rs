//! Tunnels in memory, one against the other.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use kontor_vpn::{
    AddPeerError, Config, ConfigError, DATAGRAM_MAX, DropReason, HANDSHAKES_PER_S, MTU_MAX, MTU_MIN,
    OVERHEAD, PEERS_MAX, PeerConfig, PeerId, PublicKey, Routes, Start, StaticSecret, Tunnel,
};
use proptest::prelude::*;

const OFFICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 51820);
const HOME: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 40000);
const HOTEL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)), 40001);
const SERVER_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 80));
const SERVER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x80));
const UDP: u8 = 17;
const PACKET_MAX: usize = MTU_MAX as usize;

/// The one reading of the clock; the time of a test then goes on as the test says.
#[expect(clippy::disallowed_methods, reason = "a test is where time comes from")]
fn start() -> Instant {
    Instant::now()
}

fn secret(number: u8) -> StaticSecret {
    StaticSecret::from([number; 32])
}

fn config(number: u8) -> Config {
    Config {
        private_key: secret(number),
        mtu: MTU_MAX,
        handshakes_per_s_max: HANDSHAKES_PER_S,
        peers_max: 8,
        seed: [number; 32],
    }
}

fn own(number: u8) -> Routes {
    Routes::Own {
        v4: Ipv4Addr::new(10, 9, 0, number),
        v6: Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(number)),
    }
}

fn v4(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 9, 0, number).into()
}

fn v6(number: u8) -> IpAddr {
    Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(number)).into()
}

/// A packet of `len` bytes whose content is easy to tell from padding.
fn packet(source: IpAddr, destination: IpAddr, len: usize) -> Vec<u8> {
    let mut packet = vec![0xA5; len];
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet[..12].fill(0);
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
            packet[9] = UDP;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[..8].fill(0);
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
            packet[6] = UDP;
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
        }
        _ => panic!("a packet has one family"),
    }
    packet
}

type Datagram = (SocketAddr, Vec<u8>);

fn drain(tunnel: &mut Tunnel<SocketAddr>) -> Vec<Datagram> {
    let mut out = [0; DATAGRAM_MAX];
    let mut datagrams = Vec::new();
    while let Some(transmit) = tunnel.poll_transmit(&mut out) {
        datagrams.push((transmit.to, out[..transmit.len].to_vec()));
    }
    datagrams
}

fn seal(tunnel: &mut Tunnel<SocketAddr>, packet: &[u8], now: Instant) -> Datagram {
    let mut out = [0; DATAGRAM_MAX];
    let transmit = tunnel.handle_packet(packet, &mut out, now).unwrap().expect("there is a session");
    (transmit.to, out[..transmit.len].to_vec())
}

fn refusal(tunnel: &mut Tunnel<SocketAddr>, packet: &[u8], now: Instant) -> DropReason {
    tunnel.handle_packet(packet, &mut [0; DATAGRAM_MAX], now).unwrap_err()
}

/// The packet in a datagram and the peer that it is from.
fn open(
    tunnel: &mut Tunnel<SocketAddr>,
    from: SocketAddr,
    datagram: &[u8],
    now: Instant,
) -> Result<Option<(PeerId, Vec<u8>)>, DropReason> {
    let mut out = [0; DATAGRAM_MAX];
    let received = tunnel.handle_datagram(from, datagram, &mut out, now)?;
    Ok(received.map(|received| (received.peer, received.packet.to_vec())))
}

/// A work VM and its gateway, and the two ends' words for each other.
struct Pair {
    vm: Tunnel<SocketAddr>,
    gateway: Tunnel<SocketAddr>,
    /// The gateway, in the VM.
    office: PeerId,
    /// The VM, in the gateway.
    home: PeerId,
    now: Instant,
}

const VM: u8 = 1;
const GATEWAY: u8 = 100;

impl Pair {
    fn strangers() -> Self {
        Self::made_of(config(VM), config(GATEWAY), None)
    }

    fn made_of(vm: Config, gateway: Config, keepalive_s: Option<u16>) -> Self {
        let now = start();
        let (vm_key, gateway_key) = (PublicKey::from(&vm.private_key), PublicKey::from(&gateway.private_key));
        let mut vm = Tunnel::new(vm, now).unwrap();
        let mut gateway = Tunnel::new(gateway, now).unwrap();
        let home = gateway
            .add_peer(
                &PeerConfig { public_key: vm_key, routes: own(VM), start: Start::Listen, keepalive_s: None },
                now,
            )
            .unwrap();
        let office = vm
            .add_peer(
                &PeerConfig {
                    public_key: gateway_key,
                    routes: Routes::Everything,
                    start: Start::Connect(OFFICE),
                    keepalive_s,
                },
                now,
            )
            .unwrap();
        Self { vm, gateway, office, home, now }
    }

    fn connected() -> Self {
        let mut pair = Self::strangers();
        pair.shake_hands();
        pair
    }

    /// Carries what both want to send until both are silent.
    fn shake_hands(&mut self) {
        loop {
            let up = drain(&mut self.vm);
            for (to, datagram) in &up {
                assert_eq!(*to, OFFICE);
                let _ = open(&mut self.gateway, HOME, datagram, self.now);
            }
            let down = drain(&mut self.gateway);
            for (to, datagram) in &down {
                assert_eq!(*to, HOME);
                let _ = open(&mut self.vm, OFFICE, datagram, self.now);
            }
            if up.is_empty() && down.is_empty() {
                break;
            }
        }
    }

    /// Sends a packet from the VM to the office and says what came out there.
    fn up(&mut self, packet: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
        let (_, datagram) = seal(&mut self.vm, packet, self.now);
        let received = open(&mut self.gateway, HOME, &datagram, self.now)?;
        Ok(received.map(|(peer, packet)| {
            assert_eq!(peer, self.home);
            packet
        }))
    }

    fn down(&mut self, packet: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
        let (to, datagram) = seal(&mut self.gateway, packet, self.now);
        assert_eq!(to, HOME);
        let received = open(&mut self.vm, OFFICE, &datagram, self.now)?;
        Ok(received.map(|(peer, packet)| {
            assert_eq!(peer, self.office);
            packet
        }))
    }
}

/// A datagram of a VM's initiation: the first thing that a new tunnel says.
fn initiation(number: u8, now: Instant) -> Vec<u8> {
    let mut vm = Tunnel::new(config(number), now).unwrap();
    vm.add_peer(
        &PeerConfig {
            public_key: PublicKey::from(&secret(GATEWAY)),
            routes: Routes::Everything,
            start: Start::Connect(OFFICE),
            keepalive_s: None,
        },
        now,
    )
    .unwrap();
    drain(&mut vm).remove(0).1
}

mod data {
    use super::*;

    #[test]
    fn packets_of_both_families_pass_both_ways() {
        let mut pair = Pair::connected();
        for (mine, theirs) in [(v4(VM), SERVER_V4), (v6(VM), SERVER_V6)] {
            let up = packet(mine, theirs, 100);
            assert_eq!(pair.up(&up), Ok(Some(up)));
            let down = packet(theirs, mine, 100);
            assert_eq!(pair.down(&down), Ok(Some(down)));
        }
        let status = pair.gateway.status(pair.home).unwrap();
        assert!(status.established);
        assert_eq!(status.endpoint, Some(HOME));
        assert_eq!(status.last_handshake, Some(pair.now));
        let traffic = status.traffic;
        assert_eq!((traffic.rx_packets, traffic.rx_bytes), (2, 200));
        assert_eq!((traffic.tx_packets, traffic.tx_bytes), (2, 200));
        assert_eq!(pair.vm.status(pair.office).unwrap().traffic, traffic);
        assert!(pair.gateway.drops().iter().chain(pair.vm.drops().iter()).all(|(_, count)| count == 0));
    }

    #[test]
    fn plaintext_is_padded_to_sixteen_bytes_on_the_wire_and_trimmed_behind_it() {
        let mut pair = Pair::connected();
        for len in 20..=PACKET_MAX {
            let sent = packet(v4(VM), SERVER_V4, len);
            let (_, datagram) = seal(&mut pair.vm, &sent, pair.now);
            assert_eq!(datagram.len(), len.next_multiple_of(16).min(PACKET_MAX) + OVERHEAD, "{len} bytes");
            let (_, received) = open(&mut pair.gateway, HOME, &datagram, pair.now).unwrap().unwrap();
            assert_eq!(received, sent);
        }
    }

    #[test]
    fn no_packet_is_longer_or_padded_beyond_the_mtu() {
        let mtu = MTU_MIN + 4;
        let mut pair = Pair::made_of(Config { mtu, ..config(VM) }, config(GATEWAY), None);
        pair.shake_hands();
        let longest = usize::from(mtu);
        for (len, padded) in [(longest, longest), (longest - 1, longest), (longest - 4, longest - 4)] {
            let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, len), pair.now);
            assert_eq!(datagram.len(), padded + OVERHEAD);
        }
        let too_long = packet(v4(VM), SERVER_V4, longest + 1);
        assert_eq!(refusal(&mut pair.vm, &too_long, pair.now), DropReason::TooLong);
        assert_eq!(pair.vm.drops().get(DropReason::TooLong), 1);
    }

    #[test]
    fn bytes_behind_a_packet_are_not_sent() {
        let mut pair = Pair::connected();
        let sent = packet(v4(VM), SERVER_V4, 40);
        let mut with_tail = sent.clone();
        with_tail.extend([0xEE; 60]);
        let (_, datagram) = seal(&mut pair.vm, &with_tail, pair.now);
        assert_eq!(datagram.len(), 48 + OVERHEAD);
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now).unwrap().unwrap().1, sent);
    }

    #[test]
    fn packet_that_is_none_is_dropped_on_either_side() {
        let mut pair = Pair::connected();
        for broken in [&[][..], &[0x45; 19], &[0x60; 39], &[0x00; 64], &[0xFF; 64]] {
            assert_eq!(refusal(&mut pair.vm, broken, pair.now), DropReason::Malformed);
        }
        // boringtun itself, without our check in front, stands for a peer that sends such things.
        let mut rogue = Rogue::connected(&mut pair);
        for broken in [&[0x45; 19][..], &[0x60; 39], &[0xFF; 64], &[0; 16]] {
            let datagram = rogue.seal(broken);
            assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Malformed));
        }
        // A total length below the header's passes boringtun, and not us.
        let mut short = packet(v4(VM), SERVER_V4, 64);
        short[2..4].copy_from_slice(&19_u16.to_be_bytes());
        let datagram = rogue.seal(&short);
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Malformed));
        let datagram = rogue.seal(&packet(v4(VM), SERVER_V4, 64));
        assert!(open(&mut pair.gateway, HOME, &datagram, pair.now).unwrap().is_some());
    }

    #[test]
    fn packet_for_nobody_is_dropped() {
        let mut pair = Pair::connected();
        let stray = packet(SERVER_V4, v4(2), 64);
        assert_eq!(refusal(&mut pair.gateway, &stray, pair.now), DropReason::NoRoute);
    }
}

/// A VM whose kernel lies: boringtun's own `Tunn` with nothing of ours around it.
struct Rogue(Tunn);

impl Rogue {
    /// Takes the place of the pair's VM.
    fn connected(pair: &mut Pair) -> Self {
        let gateway = PublicKey::from(&secret(GATEWAY));
        let mut tunn = Tunn::new(secret(VM), gateway, None, None, 7, None);
        let mut scratch = [0; DATAGRAM_MAX];
        let hello = message(tunn.format_handshake_initiation(&mut scratch, false));
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
        let (_, answer) = drain(&mut pair.gateway).remove(0);
        let confirmation = message(tunn.decapsulate(None, &answer, &mut scratch));
        assert_eq!(open(&mut pair.gateway, HOME, &confirmation, pair.now), Ok(None));
        Self(tunn)
    }

    fn seal(&mut self, plaintext: &[u8]) -> Vec<u8> {
        message(self.0.encapsulate(plaintext, &mut [0; DATAGRAM_MAX]))
    }
}

fn message(result: TunnResult<'_>) -> Vec<u8> {
    let TunnResult::WriteToNetwork(message) = result else {
        panic!("{result:?}");
    };
    message.to_vec()
}

mod hostile {
    use super::*;

    /// A gateway with a second VM beside the pair's.
    fn with_neighbour(pair: &mut Pair) -> PeerId {
        let neighbour = PeerConfig {
            public_key: PublicKey::from(&secret(2)),
            routes: own(2),
            start: Start::Listen,
            keepalive_s: None,
        };
        pair.gateway.add_peer(&neighbour, pair.now).unwrap()
    }

    #[test]
    fn packet_from_an_address_that_is_not_the_peers_own_is_dropped() {
        let mut pair = Pair::connected();
        with_neighbour(&mut pair);
        for (source, destination) in
            [(v4(2), SERVER_V4), (v6(2), SERVER_V6), (SERVER_V4, v4(2)), (v4(0), SERVER_V4)]
        {
            assert_eq!(pair.up(&packet(source, destination, 64)), Err(DropReason::Source));
        }
        assert_eq!(pair.gateway.drops().get(DropReason::Source), 4);
        assert_eq!(pair.gateway.status(pair.home).unwrap().traffic.rx_packets, 0);
    }

    #[test]
    fn work_vm_takes_any_source_from_its_gateway() {
        let mut pair = Pair::connected();
        let down = packet("8.8.8.8".parse().unwrap(), v4(VM), 64);
        assert_eq!(pair.down(&down), Ok(Some(down)));
    }

    #[test]
    fn stranger_gets_no_answer() {
        let mut pair = Pair::strangers();
        let hello = initiation(3, pair.now);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::UnknownPeer));
        assert_eq!(drain(&mut pair.gateway), []);
    }

    #[test]
    fn repeated_datagram_is_dropped() {
        let mut pair = Pair::connected();
        let (_, first) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        let (_, second) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        assert!(open(&mut pair.gateway, HOME, &second, pair.now).unwrap().is_some(), "out of order");
        assert!(open(&mut pair.gateway, HOME, &first, pair.now).unwrap().is_some());
        for datagram in [first, second] {
            assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Replayed));
        }
    }

    #[test]
    fn repeated_initiation_gets_no_answer_and_moves_nothing() {
        let mut pair = Pair::strangers();
        let (_, hello) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
        assert_eq!(drain(&mut pair.gateway).len(), 1);
        assert_eq!(open(&mut pair.gateway, HOTEL, &hello, pair.now), Err(DropReason::Replayed));
        assert_eq!(drain(&mut pair.gateway), []);
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, None);
    }

    #[test]
    fn counter_at_the_end_of_its_range_is_refused() {
        let mut pair = Pair::connected();
        let (_, genuine) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        let limit = u64::MAX - (1 << 13);
        for counter in [limit, limit + 1, u64::MAX - 1023, u64::MAX] {
            let mut datagram = genuine.clone();
            datagram[8..16].copy_from_slice(&counter.to_le_bytes());
            assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Replayed));
        }
        let mut datagram = genuine.clone();
        datagram[8..16].copy_from_slice(&(limit - 1).to_le_bytes());
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Forged));
        assert!(open(&mut pair.gateway, HOME, &genuine, pair.now).unwrap().is_some());
    }

    #[test]
    fn garbage_of_every_length_is_dropped() {
        let mut pair = Pair::connected();
        let (_, genuine) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        let session: [u8; 4] = genuine[4..8].try_into().unwrap();
        for len in 0..=DATAGRAM_MAX {
            for kind in 0..6_u8 {
                let mut garbage = vec![0xA5; len];
                for (at, byte) in [kind, 0, 0, 0].into_iter().chain(session).chain(session).enumerate() {
                    if at < len {
                        garbage[at] = byte;
                    }
                }
                assert!(open(&mut pair.gateway, HOTEL, &garbage, pair.now).is_err(), "{kind} of {len}");
                assert!(open(&mut pair.vm, HOTEL, &garbage, pair.now).is_err(), "{kind} of {len}");
            }
        }
        assert_eq!(drain(&mut pair.gateway), []);
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
        assert!(open(&mut pair.gateway, HOME, &genuine, pair.now).unwrap().is_some());
    }

    #[test]
    fn datagram_of_the_greatest_length_is_read_and_of_one_more_is_not() {
        let mut pair = Pair::connected();
        let (_, longest) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, PACKET_MAX), pair.now);
        assert_eq!(longest.len(), DATAGRAM_MAX);
        let mut longer = longest.clone();
        longer.push(0);
        assert_eq!(open(&mut pair.gateway, HOME, &longer, pair.now), Err(DropReason::TooLong));
        assert!(open(&mut pair.gateway, HOME, &longest, pair.now).unwrap().is_some());
    }

    #[test]
    fn each_changed_byte_of_a_data_message_makes_it_none() {
        let mut pair = Pair::connected();
        let (_, genuine) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        for at in 0..genuine.len() {
            let mut changed = genuine.clone();
            changed[at] ^= 1;
            assert!(open(&mut pair.gateway, HOTEL, &changed, pair.now).is_err(), "byte {at}");
        }
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
        assert!(open(&mut pair.gateway, HOME, &genuine, pair.now).unwrap().is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_dropped(datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 64)) {
            let mut pair = Pair::connected();
            for datagram in datagrams {
                prop_assert!(open(&mut pair.gateway, HOTEL, &datagram, pair.now).is_err());
            }
        }

        #[test]
        fn any_changes_to_a_handshake_never_panic(flips in prop::collection::vec((0..148_usize, any::<u8>()), 1..8)) {
            let mut pair = Pair::strangers();
            let (_, mut hello) = drain(&mut pair.vm).remove(0);
            for (at, byte) in flips {
                hello[at] ^= byte;
            }
            let _ = open(&mut pair.gateway, HOME, &hello, pair.now);
            let _ = drain(&mut pair.gateway);
        }
    }
}

mod roaming {
    use super::*;

    #[test]
    fn endpoint_moves_with_an_authenticated_packet() {
        let mut pair = Pair::connected();
        let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        assert!(open(&mut pair.gateway, HOTEL, &datagram, pair.now).unwrap().is_some());
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOTEL));
        let (to, _) = seal(&mut pair.gateway, &packet(SERVER_V4, v4(VM), 64), pair.now);
        assert_eq!(to, HOTEL);
    }

    #[test]
    fn repeated_datagram_moves_no_endpoint() {
        let mut pair = Pair::connected();
        let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        assert!(open(&mut pair.gateway, HOME, &datagram, pair.now).is_ok());
        assert_eq!(open(&mut pair.gateway, HOTEL, &datagram, pair.now), Err(DropReason::Replayed));
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
    }

    #[test]
    fn initiation_is_answered_where_it_came_from_and_moves_no_endpoint() {
        let mut pair = Pair::connected();
        pair.vm.reconnect(pair.office, pair.now);
        let (_, hello) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOTEL, &hello, pair.now), Ok(None));
        let (to, answer) = drain(&mut pair.gateway).remove(0);
        assert_eq!(to, HOTEL);
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
        assert_eq!(open(&mut pair.vm, OFFICE, &answer, pair.now), Ok(None));
        let (_, keepalive) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOTEL, &keepalive, pair.now), Ok(None));
        assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOTEL));
    }
}

mod handshake {
    use super::*;

    /// Runs a VM that nobody answers, and says when it sent what.
    fn unanswered(ms: u64) -> Vec<(u64, Vec<u8>)> {
        let now = start();
        let mut vm = Tunnel::new(config(VM), now).unwrap();
        vm.add_peer(
            &PeerConfig {
                public_key: PublicKey::from(&secret(GATEWAY)),
                routes: Routes::Everything,
                start: Start::Connect(OFFICE),
                keepalive_s: None,
            },
            now,
        )
        .unwrap();
        let mut sent: Vec<_> = drain(&mut vm).into_iter().map(|(_, datagram)| (0, datagram)).collect();
        let end = now + Duration::from_millis(ms);
        while let Some(due) = vm.next_timeout().filter(|due| *due <= end) {
            vm.handle_timers(due);
            let at = u64::try_from((due - now).as_millis()).unwrap();
            sent.extend(drain(&mut vm).into_iter().map(|(_, datagram)| (at, datagram)));
        }
        sent
    }

    #[test]
    fn initiations_go_out_every_quarter_of_a_second_for_three_seconds() {
        let times: Vec<_> = unanswered(10_000).into_iter().map(|(at, _)| at).collect();
        assert_eq!(times, (0..=12).map(|step| step * 250).collect::<Vec<_>>());
    }

    #[test]
    fn every_second_initiation_repeats_the_one_before() {
        let sent = unanswered(3_000);
        for pair in sent.chunks(2) {
            if let [first, again] = pair {
                assert_eq!(first.1, again.1);
            }
        }
        let new: std::collections::BTreeSet<_> = sent.iter().map(|(_, datagram)| datagram).collect();
        assert_eq!(new.len(), 7);
    }

    #[test]
    fn path_with_a_round_trip_of_nearly_a_second_gets_a_session() {
        let mut pair = Pair::strangers();
        let begin = pair.now;
        let (_, hello) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, begin), Ok(None));
        let (_, answer) = drain(&mut pair.gateway).remove(0);
        for ms in [250, 500, 750] {
            pair.vm.handle_timers(begin + Duration::from_millis(ms));
            assert_eq!(drain(&mut pair.vm).len(), 1);
        }
        let arrival = begin + Duration::from_millis(990);
        assert_eq!(open(&mut pair.vm, OFFICE, &answer, arrival), Ok(None));
        assert!(pair.vm.status(pair.office).unwrap().established);
        assert_eq!(pair.vm.status(pair.office).unwrap().last_handshake, Some(arrival));
    }

    #[test]
    fn no_initiation_follows_a_session() {
        let mut pair = Pair::connected();
        for ms in (250..5_000).step_by(250) {
            pair.vm.handle_timers(pair.now + Duration::from_millis(ms));
            assert_eq!(drain(&mut pair.vm), [], "after {ms} ms");
        }
    }

    #[test]
    fn peer_admitted_after_the_first_initiation_gets_a_session_with_its_repetition() {
        let mut pair = Pair::strangers();
        let vm_key = pair.vm.public_key();
        assert!(pair.gateway.remove_peer(pair.home));
        let (_, hello) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::UnknownPeer));
        let admitted =
            PeerConfig { public_key: vm_key, routes: own(VM), start: Start::Listen, keepalive_s: None };
        pair.home = pair.gateway.add_peer(&admitted, pair.now).unwrap();
        pair.now += Duration::from_millis(250);
        pair.vm.handle_timers(pair.now);
        pair.shake_hands();
        assert!(pair.gateway.status(pair.home).unwrap().established);
    }

    #[test]
    fn both_sides_may_begin_at_once() {
        let mut pair = Pair::connected();
        pair.vm.reconnect(pair.office, pair.now);
        pair.gateway.reconnect(pair.home, pair.now);
        let (up, down) = (drain(&mut pair.vm), drain(&mut pair.gateway));
        for (_, datagram) in up {
            assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Ok(None));
        }
        for (_, datagram) in down {
            assert_eq!(open(&mut pair.vm, OFFICE, &datagram, pair.now), Ok(None));
        }
        pair.shake_hands();
        let up = packet(v4(VM), SERVER_V4, 64);
        assert_eq!(pair.up(&up), Ok(Some(up)));
        let down = packet(SERVER_V4, v4(VM), 64);
        assert_eq!(pair.down(&down), Ok(Some(down)));
    }

    #[test]
    fn reconnection_forgets_the_session_and_makes_another() {
        let mut pair = Pair::connected();
        let (_, old) = seal(&mut pair.gateway, &packet(SERVER_V4, v4(VM), 64), pair.now);
        pair.vm.reconnect(pair.office, pair.now);
        assert!(!pair.vm.status(pair.office).unwrap().established);
        assert_eq!(open(&mut pair.vm, OFFICE, &old, pair.now), Err(DropReason::UnknownSession));
        pair.shake_hands();
        let up = packet(v4(VM), SERVER_V4, 64);
        assert_eq!(pair.up(&up), Ok(Some(up)));
    }

    #[test]
    fn sender_under_load_is_let_in_with_a_cookie() {
        let loaded = Config { handshakes_per_s_max: 0, ..config(GATEWAY) };
        let mut pair = Pair::made_of(config(VM), loaded, None);
        let (_, hello) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::Load));
        let (to, cookie) = drain(&mut pair.gateway).remove(0);
        assert_eq!((to, cookie.len()), (HOME, 64));
        assert_eq!(open(&mut pair.vm, OFFICE, &cookie, pair.now), Ok(None));
        pair.now += Duration::from_millis(250);
        pair.vm.handle_timers(pair.now);
        let (_, hello) = drain(&mut pair.vm).remove(0);
        let mut elsewhere = HOME;
        elsewhere.set_port(HOME.port() + 1);
        assert_eq!(open(&mut pair.gateway, elsewhere, &hello, pair.now), Err(DropReason::Load));
        drain(&mut pair.gateway);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
        let (_, answer) = drain(&mut pair.gateway).remove(0);
        assert_eq!(open(&mut pair.vm, OFFICE, &answer, pair.now), Ok(None));
        assert!(pair.vm.status(pair.office).unwrap().established);
    }

    #[test]
    fn limit_on_handshakes_holds_at_its_edge() {
        let now = start();
        let limit = 3;
        let mut gateway =
            Tunnel::new(Config { handshakes_per_s_max: limit, ..config(GATEWAY) }, now).unwrap();
        let reasons: Vec<_> =
            (0..=limit).map(|_| open(&mut gateway, HOME, &initiation(3, now), now).unwrap_err()).collect();
        let (last, first) = reasons.split_last().unwrap();
        assert!(first.iter().all(|reason| *reason == DropReason::UnknownPeer));
        assert_eq!(*last, DropReason::Load);
    }

    #[test]
    fn session_indices_tell_nothing_of_other_peers() {
        let now = start();
        let mut upper = std::collections::BTreeSet::new();
        for seed in 0..4_u8 {
            let mut vm = Tunnel::new(Config { seed: [seed; 32], ..config(VM) }, now).unwrap();
            for number in 2..6 {
                let id = vm
                    .add_peer(
                        &PeerConfig {
                            public_key: PublicKey::from(&secret(number)),
                            routes: own(number),
                            start: Start::Connect(OFFICE),
                            keepalive_s: None,
                        },
                        now,
                    )
                    .unwrap();
                assert!(vm.status(id).is_some());
            }
            for (_, datagram) in drain(&mut vm) {
                upper.insert(u32::from_le_bytes(datagram[4..8].try_into().unwrap()) >> 8);
            }
        }
        assert_eq!(upper.len(), 16);
        let neighbours = upper.iter().zip(upper.iter().skip(1)).filter(|(a, b)| *b - *a == 1).count();
        assert_eq!(neighbours, 0);
    }
}

mod waiting {
    use super::*;

    const WAITING_MAX: usize = 16;

    #[test]
    fn packets_wait_for_the_session_and_keep_their_order() {
        let mut pair = Pair::strangers();
        let packets: Vec<_> = (0..WAITING_MAX).map(|n| packet(v4(VM), SERVER_V4, 40 + n)).collect();
        for packet in &packets {
            assert_eq!(pair.vm.handle_packet(packet, &mut [0; DATAGRAM_MAX], pair.now), Ok(None));
        }
        let one_more = packet(v4(VM), SERVER_V4, 40);
        assert_eq!(refusal(&mut pair.vm, &one_more, pair.now), DropReason::Waiting);
        let (_, hello) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
        let (_, answer) = drain(&mut pair.gateway).remove(0);
        assert_eq!(open(&mut pair.vm, OFFICE, &answer, pair.now), Ok(None));
        let arrived: Vec<_> = drain(&mut pair.vm)
            .iter()
            .filter_map(|(_, datagram)| open(&mut pair.gateway, HOME, datagram, pair.now).unwrap())
            .map(|(_, packet)| packet)
            .collect();
        assert_eq!(arrived, packets);
        assert!(pair.vm.handle_packet(&one_more, &mut [0; DATAGRAM_MAX], pair.now).unwrap().is_some());
    }

    #[test]
    fn gateway_sends_nothing_to_a_peer_that_has_not_spoken() {
        let mut pair = Pair::strangers();
        let down = packet(SERVER_V4, v4(VM), 64);
        assert_eq!(refusal(&mut pair.gateway, &down, pair.now), DropReason::NoEndpoint);
        assert_eq!(drain(&mut pair.gateway), []);
    }

    #[test]
    fn gateway_whose_session_is_gone_begins_one_for_a_packet() {
        let mut pair = Pair::connected();
        pair.gateway.reconnect(pair.home, pair.now);
        let down = packet(SERVER_V4, v4(VM), 64);
        assert_eq!(pair.gateway.handle_packet(&down, &mut [0; DATAGRAM_MAX], pair.now), Ok(None));
        let (_, hello) = drain(&mut pair.gateway).remove(0);
        assert_eq!(open(&mut pair.vm, OFFICE, &hello, pair.now), Ok(None));
        let (_, answer) = drain(&mut pair.vm).remove(0);
        assert_eq!(open(&mut pair.gateway, HOME, &answer, pair.now), Ok(None));
        let arrived: Vec<_> = drain(&mut pair.gateway)
            .iter()
            .filter_map(|(_, datagram)| open(&mut pair.vm, OFFICE, datagram, pair.now).unwrap())
            .map(|(_, packet)| packet)
            .collect();
        assert_eq!(arrived, [down]);
    }

    #[test]
    fn answers_nobody_fetches_are_counted_once_there_is_no_room() {
        let loaded = Config { handshakes_per_s_max: 0, ..config(GATEWAY) };
        let mut pair = Pair::made_of(config(VM), loaded, None);
        let (_, hello) = drain(&mut pair.vm).remove(0);
        for _ in 0..64 {
            assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::Load));
        }
        assert_eq!(pair.gateway.drops().get(DropReason::NoRoom), 0);
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::Load));
        assert_eq!(pair.gateway.drops().get(DropReason::NoRoom), 1);
        assert_eq!(drain(&mut pair.gateway).len(), 64);
    }
}

mod peers {
    use super::*;

    fn gateway() -> (Tunnel<SocketAddr>, Instant) {
        let now = start();
        (Tunnel::new(Config { peers_max: 2, ..config(GATEWAY) }, now).unwrap(), now)
    }

    fn peer(number: u8, routes: Routes) -> PeerConfig<SocketAddr> {
        PeerConfig {
            public_key: PublicKey::from(&secret(number)),
            routes,
            start: Start::Listen,
            keepalive_s: None,
        }
    }

    #[test]
    fn removed_peer_is_gone_with_its_session_and_may_come_back() {
        let mut pair = Pair::connected();
        let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
        assert!(pair.gateway.remove_peer(pair.home));
        assert!(!pair.gateway.remove_peer(pair.home));
        assert_eq!(pair.gateway.status(pair.home), None);
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::UnknownSession));
        let down = packet(SERVER_V4, v4(VM), 64);
        assert_eq!(refusal(&mut pair.gateway, &down, pair.now), DropReason::NoRoute);
        assert!(pair.gateway.add_peer(&peer(VM, own(VM)), pair.now).is_ok());
    }

    #[test]
    fn key_and_addresses_belong_to_one_peer() {
        let (mut gateway, now) = gateway();
        let id = gateway.add_peer(&peer(1, own(1)), now).unwrap();
        assert_eq!(gateway.peer_by_key(&PublicKey::from(&secret(1))), Some(id));
        assert_eq!(gateway.peer_by_address(v4(1)), Some(id));
        assert_eq!(gateway.peer_by_address(v6(1)), Some(id));
        assert_eq!(gateway.peer_by_address(v6(2)), None);
        assert_eq!(gateway.add_peer(&peer(1, own(2)), now), Err(AddPeerError::Key));
        let (IpAddr::V4(taken), IpAddr::V6(free)) = (v4(1), v6(2)) else { unreachable!() };
        assert_eq!(
            gateway.add_peer(&peer(2, Routes::Own { v4: taken, v6: free }), now),
            Err(AddPeerError::Address(v4(1)))
        );
        let (IpAddr::V4(free), IpAddr::V6(taken)) = (v4(2), v6(1)) else { unreachable!() };
        assert_eq!(
            gateway.add_peer(&peer(2, Routes::Own { v4: free, v6: taken }), now),
            Err(AddPeerError::Address(v6(1)))
        );
        assert!(gateway.add_peer(&peer(2, own(2)), now).is_ok());
    }

    #[test]
    fn peer_for_everything_is_alone() {
        let (mut vm, now) = gateway();
        let id = vm.add_peer(&peer(1, Routes::Everything), now).unwrap();
        assert_eq!(vm.peer_by_address(SERVER_V4), Some(id));
        assert_eq!(vm.add_peer(&peer(2, own(2)), now), Err(AddPeerError::Everything));
        assert_eq!(vm.add_peer(&peer(2, Routes::Everything), now), Err(AddPeerError::Everything));
        assert!(vm.remove_peer(id));
        assert_eq!(vm.peer_by_address(SERVER_V4), None);
        assert!(vm.add_peer(&peer(2, own(2)), now).is_ok());
        assert_eq!(vm.add_peer(&peer(3, Routes::Everything), now), Err(AddPeerError::Everything));
    }

    #[test]
    fn limit_on_peers_holds_at_its_edge() {
        let (mut gateway, now) = gateway();
        assert!(gateway.add_peer(&peer(1, own(1)), now).is_ok());
        assert!(gateway.add_peer(&peer(2, own(2)), now).is_ok());
        assert_eq!(gateway.add_peer(&peer(3, own(3)), now), Err(AddPeerError::TooMany(2)));
        assert!(Tunnel::<u8>::new(Config { peers_max: PEERS_MAX, ..config(1) }, now).is_ok());
        assert_eq!(
            Tunnel::<u8>::new(Config { peers_max: PEERS_MAX + 1, ..config(1) }, now).err(),
            Some(ConfigError::Peers(PEERS_MAX + 1))
        );
    }

    #[test]
    fn limits_on_the_mtu_hold_at_their_edges() {
        let now = start();
        for (mtu, taken) in [(MTU_MIN - 1, false), (MTU_MIN, true), (MTU_MAX, true), (MTU_MAX + 1, false)] {
            let result = Tunnel::<u8>::new(Config { mtu, ..config(1) }, now);
            assert_eq!(result.err(), (!taken).then_some(ConfigError::Mtu(mtu)));
        }
    }

    #[test]
    fn key_that_anybody_could_speak_for_is_refused() {
        let (mut gateway, now) = gateway();
        let mut low_order = [0; 32];
        for first in [0, 1] {
            low_order[0] = first;
            let config = PeerConfig { public_key: PublicKey::from(low_order), ..peer(1, own(1)) };
            assert_eq!(gateway.add_peer(&config, now), Err(AddPeerError::BadKey));
        }
        assert_eq!(gateway.add_peer(&peer(GATEWAY, own(1)), now), Err(AddPeerError::BadKey));
    }
}

#[path = "tunnels/clock.rs"]
mod clock;
