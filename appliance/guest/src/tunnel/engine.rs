//! The loop: asks each source for a batch, lets the core decide, sends what it decided, waits.
//!
//! Sources are watched on edges, so each remembers whether it may have more. Packets are taken from the
//! interface only while the uplink has room: what does not fit waits in the kernel's queue, where the
//! senders feel it.

use super::uplink::{Losses, Rest, Uplink};
use crate::clock::timespec;
use crate::link::{Configure, FromTunnel, Link, LinkError, ToTunnel, Way};
use kontor_vpn::{
    AddPeerError, Config, ConfigError, DATAGRAM_MAX, HANDSHAKES_PER_S, MTU_MAX, PeerConfig, PeerId,
    PublicKey, Routes, Start, StaticSecret, Traffic, Tunnel,
};
use kontor_wire::uplink::GatewayId;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::{Errno, read, write};
use rustix::rand::{GetRandomFlags, getrandom};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Packets taken from the interface in one round.
const PACKETS_MAX: usize = 64;
/// How long the first gateway is waited for before the next is asked too (`lease.md` 19).
const SPARE_AFTER: Duration = Duration::from_secs(3);
/// Least time between two words to init that the gateway was heard.
const HEARD_EVERY: Duration = Duration::from_secs(1);
/// What the relay takes for WireGuard's is what the core makes.
const _: () = assert!(DATAGRAM_MAX == kontor_wire::wireguard::LONGEST);
/// More than the interface's MTU, so that a longer packet shows as one.
const PACKET_BUFFER: usize = 2048;

/// What ended the loop.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the uplink")]
    Uplink(#[source] io::Error),
    #[error("the TUN interface")]
    Tun(#[source] io::Error),
    #[error("the socket to init")]
    Link(#[source] LinkError),
    #[error("init configured the tunnel a second time")]
    Configured,
    #[error("make the tunnel")]
    Config(#[source] ConfigError),
    #[error("use the gateway's key")]
    Gateway(#[source] AddPeerError),
    #[error("get random bytes")]
    Random(#[source] io::Error),
    #[error("wait for events")]
    Wait(#[source] io::Error),
}

/// Whether to go on.
#[derive(Debug, PartialEq, Eq)]
enum Go {
    On,
    Close,
}

/// Everything that the process has.
pub(crate) struct Engine<'l, U> {
    set: OwnedFd,
    link: &'l Link,
    uplink: U,
    tun: OwnedFd,
    session: Option<Session>,
    uplink_rest: Rest,
    tun_rest: Rest,
    /// Packets from the gateway that the kernel did not take.
    refused: u64,
}

/// What went through and what was lost, for the console.
#[derive(Debug, Default)]
pub struct Summary {
    traffic: Traffic,
    uplink: Losses,
    /// Packets from the gateway that the kernel did not take.
    refused: u64,
    /// Why the core dropped something, and how often.
    drops: Vec<(&'static str, u64)>,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { traffic, uplink, refused, drops } = self;
        let (received, sent) = (traffic.rx_packets, traffic.tx_packets);
        write!(
            f,
            "received {received} sent {sent} dropped {} malformed {}",
            uplink.dropped, uplink.malformed
        )?;
        write!(f, " refused {refused}")?;
        drops.iter().try_for_each(|(reason, count)| write!(f, " {reason} {count}"))
    }
}

/// The gateways, and what init was last told of them.
struct Session {
    /// Those that are asked for a session, best first; once one has answered, that one alone.
    asked: Vec<Gateway>,
    /// Those that are not asked yet, and when the next one is.
    spare: VecDeque<Way>,
    spare_at: Instant,
    private_key: StaticSecret,
    keepalive_s: u16,
    /// Whether the one that is left is the one that answered.
    settled: bool,
    up: bool,
    heard_at: Option<Instant>,
    /// Datagrams from gateways that are not asked.
    strangers: u64,
}

/// The core, for one gateway. Each has its own, so that no message of one counts for another.
struct Gateway {
    id: GatewayId,
    tunnel: Tunnel<GatewayId>,
    peer: PeerId,
}

impl<'l, U: Uplink> Engine<'l, U> {
    /// Watches everything; none of the descriptors may block.
    pub(crate) fn new(link: &'l Link, uplink: U, tun: OwnedFd) -> Result<Self, EngineError> {
        let wait = |error: Errno| EngineError::Wait(error.into());
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(wait)?;
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        for source in [link.as_fd(), uplink.readable(), tun.as_fd()] {
            epoll::add(&set, source, epoll::EventData::new_u64(0), edges).map_err(wait)?;
        }
        let (uplink_rest, tun_rest) = (Rest::None, Rest::None);
        Ok(Self { set, link, uplink, tun, session: None, uplink_rest, tun_rest, refused: 0 })
    }

    /// Runs until init closes the tunnel.
    pub(crate) fn run(mut self) -> Result<Summary, EngineError> {
        self.uplink.begin().map_err(EngineError::Uplink)?;
        self.link.send(&FromTunnel::Ready).map_err(EngineError::Link)?;
        while self.round()? == Go::On {
            self.wait()?;
        }
        Ok(self.summary())
    }

    fn summary(&self) -> Summary {
        let (uplink, refused) = (self.uplink.losses(), self.refused);
        let Some(session) = &self.session else {
            return Summary { uplink, refused, ..Summary::default() };
        };
        let strangers = Some(("strange gateway", session.strangers));
        let Some(Gateway { tunnel, peer, .. }) = session.asked.first() else {
            return Summary { uplink, refused, ..Summary::default() };
        };
        let drops = tunnel.drops().iter().map(|(reason, count)| (reason.name(), count));
        let drops = drops.chain(strangers).filter(|(_, count)| *count > 0).collect();
        let traffic = tunnel.status(*peer).map(|status| status.traffic).unwrap_or_default();
        Summary { traffic, uplink, refused, drops }
    }

    fn round(&mut self) -> Result<Go, EngineError> {
        while let Some(message) = self.link.receive().map_err(EngineError::Link)? {
            match message {
                ToTunnel::Configure(configure) => self.configure(&configure)?,
                ToTunnel::Reconnect => {
                    if let Some(session) = &mut self.session {
                        session.reconnect(Instant::now());
                    }
                }
                ToTunnel::Close => return Ok(Go::Close),
            }
        }
        // Before there is a key, nothing is read from anywhere.
        let Some(session) = &mut self.session else { return Ok(Go::On) };
        let now = Instant::now();
        self.uplink_rest = from_uplink(session, &mut self.uplink, &self.tun, &mut self.refused, now)?;
        self.tun_rest = from_tun(session, &mut self.uplink, &self.tun, now)?;
        session.settle();
        session.ask_spare(now)?;
        let mut out = [0; DATAGRAM_MAX];
        for Gateway { tunnel, .. } in &mut session.asked {
            tunnel.handle_timers(now);
            while let Some(transmit) = tunnel.poll_transmit(&mut out) {
                self.uplink.push(transmit.to, &out[..transmit.len]);
            }
        }
        self.uplink.send_batch().map_err(EngineError::Uplink)?;
        while let Some(news) = session.news() {
            self.link.send(&news).map_err(EngineError::Link)?;
        }
        Ok(Go::On)
    }

    fn configure(&mut self, configure: &Configure) -> Result<(), EngineError> {
        if self.session.is_some() {
            return Err(EngineError::Configured);
        }
        self.session = Some(Session::new(configure, Instant::now())?);
        Ok(())
    }

    fn wait(&self) -> Result<(), EngineError> {
        let nothing = epoll::Event { flags: EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let left = self.left().map(timespec);
        match epoll::wait(&self.set, &mut [nothing; 4], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(EngineError::Wait(error.into())),
        }
    }

    /// How long there is nothing to do unless something happens.
    fn left(&self) -> Option<Duration> {
        let carried = self.session.as_ref().is_some_and(|session| session.settled);
        let packets = self.tun_rest == Rest::More && carried && self.uplink.has_room();
        if packets || self.uplink_rest == Rest::More {
            return Some(Duration::ZERO);
        }
        let session = self.session.as_ref()?;
        let spare = (!session.spare.is_empty()).then_some(session.spare_at);
        let due =
            session.asked.iter().filter_map(|gateway| gateway.tunnel.next_timeout()).chain(spare).min()?;
        Some(due.saturating_duration_since(Instant::now()))
    }
}

impl Session {
    fn new(configure: &Configure, now: Instant) -> Result<Self, EngineError> {
        let mut session = Self {
            asked: Vec::new(),
            spare: configure.gateways.iter().copied().collect(),
            spare_at: now,
            private_key: StaticSecret::from(configure.private_key),
            keepalive_s: configure.keepalive_s,
            settled: false,
            up: false,
            heard_at: None,
            strangers: 0,
        };
        session.ask_spare(now)?;
        Ok(session)
    }

    /// Asks the next gateway for a session when it is time.
    fn ask_spare(&mut self, now: Instant) -> Result<(), EngineError> {
        if now < self.spare_at {
            return Ok(());
        }
        if let Some(way) = self.spare.pop_front() {
            self.asked.push(Gateway::new(way, &self.private_key, self.keepalive_s, now)?);
            self.spare_at = now + SPARE_AFTER;
        }
        Ok(())
    }

    /// Keeps the first gateway that has answered, if one has, and forgets the others for good.
    fn settle(&mut self) {
        if self.settled {
            return;
        }
        let Some(first) = self.asked.iter().position(Gateway::is_established) else { return };
        self.asked.swap(0, first);
        self.asked.truncate(1);
        self.spare.clear();
        self.settled = true;
    }

    /// What init does not know yet.
    fn news(&mut self) -> Option<FromTunnel> {
        self.settle();
        let gateway = self.asked.first().filter(|_| self.settled)?;
        let status = gateway.tunnel.status(gateway.peer)?;
        if status.established != self.up {
            self.up = status.established;
            return Some(if self.up { FromTunnel::Up(gateway.id.0) } else { FromTunnel::Down });
        }
        let received = status.last_received?;
        if self.heard_at.is_none_or(|heard| received >= heard + HEARD_EVERY) {
            self.heard_at = Some(received);
            return Some(FromTunnel::Heard);
        }
        None
    }

    /// The gateway that packets go to.
    fn carrier(&mut self) -> Option<&mut Gateway> {
        self.asked.first_mut().filter(|_| self.settled)
    }

    /// Drops every session and asks again, as after a sleep.
    fn reconnect(&mut self, now: Instant) {
        for Gateway { tunnel, peer, .. } in &mut self.asked {
            tunnel.reconnect(*peer, now);
        }
    }
}

impl Gateway {
    fn new(
        way: Way,
        private_key: &StaticSecret,
        keepalive_s: u16,
        now: Instant,
    ) -> Result<Self, EngineError> {
        let mut seed = [0; 32];
        let filled = getrandom(&mut seed, GetRandomFlags::empty())
            .map_err(|error| EngineError::Random(error.into()))?;
        if filled < seed.len() {
            return Err(EngineError::Random(io::ErrorKind::UnexpectedEof.into()));
        }
        let config = Config {
            private_key: private_key.clone(),
            mtu: MTU_MAX,
            handshakes_per_s_max: HANDSHAKES_PER_S,
            peers_max: 1,
            seed,
        };
        let mut tunnel = Tunnel::new(config, now).map_err(EngineError::Config)?;
        let id = GatewayId(way.gateway);
        let gateway = PeerConfig {
            public_key: PublicKey::from(way.key),
            routes: Routes::Everything,
            start: Start::Connect(id),
            keepalive_s: Some(keepalive_s),
        };
        let peer = tunnel.add_peer(&gateway, now).map_err(EngineError::Gateway)?;
        Ok(Self { id, tunnel, peer })
    }

    fn is_established(&self) -> bool {
        self.tunnel.status(self.peer).is_some_and(|status| status.established)
    }
}

fn from_uplink(
    session: &mut Session,
    uplink: &mut impl Uplink,
    tun: &OwnedFd,
    refused: &mut u64,
    now: Instant,
) -> Result<Rest, EngineError> {
    let mut out = [0; DATAGRAM_MAX];
    let mut broken = None;
    let rest = uplink.recv_batch(&mut |from, datagram| {
        let Some(gateway) = session.asked.iter_mut().find(|gateway| gateway.id == from) else {
            session.strangers += 1;
            return;
        };
        // What is dropped is counted by the core.
        let Ok(Some(received)) = gateway.tunnel.handle_datagram(from, datagram, &mut out, now) else {
            return;
        };
        match write(tun, received.packet) {
            Ok(_) => {}
            Err(error @ (Errno::BADFD | Errno::NODEV)) => broken = Some(error),
            // Full, or no packet that this kernel takes: lost, as on any wire.
            Err(_) => *refused += 1,
        }
    });
    match broken {
        Some(error) => Err(EngineError::Tun(error.into())),
        None => rest.map_err(EngineError::Uplink),
    }
}

fn from_tun(
    session: &mut Session,
    uplink: &mut impl Uplink,
    tun: &OwnedFd,
    now: Instant,
) -> Result<Rest, EngineError> {
    let mut packet = [0; PACKET_BUFFER];
    let mut out = [0; DATAGRAM_MAX];
    // Until a gateway has answered there is none that a packet could be for.
    let Some(Gateway { tunnel, .. }) = session.carrier() else { return Ok(Rest::More) };
    for _ in 0..PACKETS_MAX {
        if !uplink.has_room() {
            return Ok(Rest::More);
        }
        let length = match read(tun, &mut packet) {
            Ok(length) => length,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Ok(Rest::None),
            Err(error) => return Err(EngineError::Tun(error.into())),
        };
        // What is dropped is counted by the core.
        if let Ok(Some(transmit)) = tunnel.handle_packet(&packet[..length], &mut out, now) {
            uplink.push(transmit.to, &out[..transmit.len]);
        }
    }
    Ok(Rest::More)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::uplink::Port;
    use super::*;
    use kontor_wire::uplink::{PortDecoder, encode_port};
    use std::collections::VecDeque;
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::thread::JoinHandle;

    const GATEWAY: u8 = 5;
    const GATEWAY_SECRET: [u8; 32] = [9; 32];
    const SPARE: u8 = 6;
    const SPARE_SECRET: [u8; 32] = [10; 32];
    const GUEST_SECRET: [u8; 32] = [8; 32];
    const V4: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 7);

    fn public(secret: [u8; 32]) -> PublicKey {
        PublicKey::from(&StaticSecret::from(secret))
    }

    fn configure() -> ToTunnel {
        ToTunnel::Configure(Configure {
            private_key: GUEST_SECRET,
            gateways: vec![Way { gateway: GATEWAY, key: public(GATEWAY_SECRET).to_bytes() }],
            keepalive_s: 25,
        })
    }

    /// An IPv4 packet of a protocol for experiments.
    fn packet(source: Ipv4Addr, destination: Ipv4Addr, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(20 + content.len()).unwrap().to_be_bytes();
        let mut packet = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, 253, 0, 0];
        packet.extend(source.octets());
        packet.extend(destination.octets());
        packet.extend(content);
        packet
    }

    /// Everything outside of the tunnel's process: init, the kernel's interface, relay and gateway.
    pub(in super::super) struct World {
        pub(in super::super) init: Link,
        pub(in super::super) interface: UnixDatagram,
        wire: UnixStream,
        decoder: PortDecoder,
        /// Of a frame that was read.
        datagrams: VecDeque<(u8, Vec<u8>)>,
        /// The gateway that is there; others do not answer.
        answers: u8,
        gateway: Tunnel<u8>,
    }

    /// What the tunnel's process has.
    pub(in super::super) struct Ends {
        pub(in super::super) uplink: OwnedFd,
        pub(in super::super) tun: OwnedFd,
        pub(in super::super) link: Link,
    }

    impl World {
        pub(in super::super) fn new() -> (Self, Ends) {
            let (init, link) = Link::pair().unwrap();
            let (interface, tun) = UnixDatagram::pair().unwrap();
            let (wire, uplink) = UnixStream::pair().unwrap();
            tun.set_nonblocking(true).unwrap();
            uplink.set_nonblocking(true).unwrap();
            interface.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            wire.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let gateway = Self::gateway(GATEWAY_SECRET);
            let (decoder, datagrams) = (PortDecoder::new(), VecDeque::new());
            let world = Self { init, interface, wire, decoder, datagrams, answers: GATEWAY, gateway };
            (world, Ends { uplink: uplink.into(), tun: tun.into(), link })
        }

        /// A gateway that admits the guest.
        fn gateway(secret: [u8; 32]) -> Tunnel<u8> {
            let config = Config {
                private_key: StaticSecret::from(secret),
                mtu: MTU_MAX,
                handshakes_per_s_max: HANDSHAKES_PER_S,
                peers_max: 1,
                seed: [1; 32],
            };
            let mut gateway = Tunnel::new(config, Instant::now()).unwrap();
            let guest = PeerConfig {
                public_key: public(GUEST_SECRET),
                routes: Routes::Own { v4: V4, v6: Ipv6Addr::LOCALHOST },
                start: Start::Listen,
                keepalive_s: None,
            };
            gateway.add_peer(&guest, Instant::now()).unwrap();
            gateway
        }

        pub(in super::super) fn heard(&self) -> FromTunnel {
            let mut sources = [rustix::event::PollFd::new(&self.init, rustix::event::PollFlags::IN)];
            assert!(rustix::event::poll(&mut sources, Some(&timespec(Duration::from_secs(20)))).unwrap() > 0);
            self.init.receive().unwrap().unwrap()
        }

        /// The gateway takes what comes until a packet is among it.
        pub(in super::super) fn packet_at_gateway(&mut self) -> Vec<u8> {
            loop {
                if let Some(packet) = self.gateway_takes_a_frame() {
                    return packet;
                }
            }
        }

        fn gateway_takes_a_frame(&mut self) -> Option<Vec<u8>> {
            let mut out = [0; DATAGRAM_MAX];
            let (from, datagram) = loop {
                if let Some(datagram) = self.datagrams.pop_front() {
                    break datagram;
                }
                if let Some(frame) = self.decoder.next_frame().unwrap() {
                    let from = frame.gateway().0;
                    self.datagrams.extend(frame.segments().map(|datagram| (from, datagram.to_vec())));
                    continue;
                }
                let count = self.wire.read(self.decoder.space()).unwrap();
                self.decoder.advance(count);
            };
            if from != self.answers {
                return None;
            }
            let received = self.gateway.handle_datagram(from, &datagram, &mut out, Instant::now()).unwrap();
            let packet = received.map(|received| received.packet.to_vec());
            while let Some(transmit) = self.gateway.poll_transmit(&mut out) {
                let datagram = out[..transmit.len].to_vec();
                self.send_frame(&datagram);
            }
            packet
        }

        pub(in super::super) fn shake_hands(&mut self) {
            self.init.send(&configure()).unwrap();
            assert!(self.gateway_takes_a_frame().is_none());
            assert_eq!(self.heard(), FromTunnel::Up(GATEWAY));
            assert_eq!(self.heard(), FromTunnel::Heard);
        }

        fn send_frame(&mut self, datagram: &[u8]) {
            let mut frame = Vec::new();
            encode_port(GatewayId(self.answers), datagram.len(), datagram, &mut frame).unwrap();
            self.wire.write_all(&frame).unwrap();
        }

        fn gateway_sends(&mut self, packet: &[u8]) {
            let mut out = [0; DATAGRAM_MAX];
            let transmit = self.gateway.handle_packet(packet, &mut out, Instant::now()).unwrap().unwrap();
            self.send_frame(&out[..transmit.len]);
        }

        /// One packet each way.
        pub(in super::super) fn exchange(&mut self) {
            let out = packet(V4, Ipv4Addr::new(192, 0, 2, 1), b"to the office.");
            self.interface.send(&out).unwrap();
            assert_eq!(self.packet_at_gateway(), out);
            let back = packet(Ipv4Addr::new(192, 0, 2, 1), V4, b"and back.");
            self.gateway_sends(&back);
            let mut buffer = [0; PACKET_BUFFER];
            let length = self.interface.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..length], back);
        }
    }

    fn running() -> (World, JoinHandle<Result<Summary, EngineError>>) {
        let (world, Ends { uplink, tun, link }) = World::new();
        let engine = std::thread::spawn(move || Engine::new(&link, Port::new(uplink), tun)?.run());
        assert_eq!(world.heard(), FromTunnel::Ready);
        (world, engine)
    }

    #[test]
    fn session_comes_up_and_carries_packets_both_ways() {
        let (mut world, engine) = running();
        world.shake_hands();
        world.exchange();
        world.init.send(&ToTunnel::Close).unwrap();
        let summary = engine.join().unwrap().unwrap();
        assert_eq!((summary.traffic.rx_packets, summary.traffic.tx_packets), (1, 1));
        assert_eq!(summary.to_string(), "received 1 sent 1 dropped 0 malformed 0 refused 0");
    }

    fn configure_both() -> ToTunnel {
        let ToTunnel::Configure(mut both) = configure() else { panic!("no configuration") };
        both.gateways.push(Way { gateway: SPARE, key: public(SPARE_SECRET).to_bytes() });
        ToTunnel::Configure(both)
    }

    /// The gateways that datagrams of the guest are for, up to the first for `last`, which stays to be taken.
    fn asked_until(world: &mut World, last: u8) -> Vec<u8> {
        let mut asked = Vec::new();
        loop {
            while let Some((to, _)) = world.datagrams.front() {
                asked.push(*to);
                if *to == last {
                    return asked;
                }
                world.datagrams.pop_front();
            }
            while let Some(frame) = world.decoder.next_frame().unwrap() {
                let to = frame.gateway().0;
                world.datagrams.extend(frame.segments().map(|datagram| (to, datagram.to_vec())));
            }
            if world.datagrams.is_empty() {
                let count = world.wire.read(world.decoder.space()).unwrap();
                world.decoder.advance(count);
            }
        }
    }

    #[test]
    fn second_gateway_is_asked_after_three_seconds_and_carries_when_the_first_is_silent() {
        let (mut world, engine) = running();
        (world.answers, world.gateway) = (SPARE, World::gateway(SPARE_SECRET));
        let begin = Instant::now();
        world.init.send(&configure_both()).unwrap();
        let asked = asked_until(&mut world, SPARE);
        let waited = begin.elapsed();
        assert!(waited >= SPARE_AFTER && waited < 2 * SPARE_AFTER, "{waited:?}");
        assert!(asked.len() > 4, "the first is asked again and again: {asked:?}");
        assert!(world.gateway_takes_a_frame().is_none());
        assert_eq!(world.heard(), FromTunnel::Up(SPARE));
        assert_eq!(world.heard(), FromTunnel::Heard);
        world.exchange();
        // The first gateway comes too late: nothing of it is looked at any more.
        let mut late = Vec::new();
        encode_port(GatewayId(GATEWAY), 92, &[2; 92], &mut late).unwrap();
        world.wire.write_all(&late).unwrap();
        world.exchange();
        world.init.send(&ToTunnel::Close).unwrap();
        let summary = engine.join().unwrap().unwrap();
        assert_eq!(summary.drops, [("strange gateway", 1)]);
        assert_eq!((summary.traffic.rx_packets, summary.traffic.tx_packets), (2, 2));
    }

    #[test]
    fn second_gateway_is_left_alone_when_the_first_answers() {
        let (mut world, engine) = running();
        world.init.send(&configure_both()).unwrap();
        assert!(world.gateway_takes_a_frame().is_none());
        assert_eq!(world.heard(), FromTunnel::Up(GATEWAY));
        let until = Instant::now() + SPARE_AFTER + Duration::from_millis(500);
        world.wire.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        while Instant::now() < until {
            match world.wire.read(world.decoder.space()) {
                Ok(count) => world.decoder.advance(count),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            while let Some(frame) = world.decoder.next_frame().unwrap() {
                assert_eq!(frame.gateway(), GatewayId(GATEWAY));
            }
        }
        world.init.send(&ToTunnel::Close).unwrap();
        engine.join().unwrap().unwrap();
    }

    #[test]
    fn reconnecting_drops_the_session_and_opens_another_at_once() {
        let (mut world, engine) = running();
        world.shake_hands();
        world.exchange();
        world.init.send(&ToTunnel::Reconnect).unwrap();
        // The gateway is asked anew, long before the old session's two minutes are over.
        let mut initiation = false;
        while !initiation {
            asked_until(&mut world, GATEWAY);
            initiation = world.datagrams.front().unwrap().1[0] == 1;
            assert!(world.gateway_takes_a_frame().is_none());
        }
        world.exchange();
        world.init.send(&ToTunnel::Close).unwrap();
        engine.join().unwrap().unwrap();
    }

    #[test]
    fn nothing_is_read_before_there_is_a_key() {
        let (world, engine) = running();
        let mut wire = &world.wire;
        world.interface.send(&packet(V4, V4, b"early")).unwrap();
        wire.write_all(&[0xff; 100]).unwrap();
        world.init.send(&ToTunnel::Close).unwrap();
        let summary = engine.join().unwrap().unwrap();
        assert_eq!((summary.uplink, summary.drops), (Losses::default(), Vec::new()));
    }

    #[test]
    fn garbage_from_the_host_is_counted_and_harms_nothing() {
        let (mut world, engine) = running();
        world.shake_hands();
        let mut frame = vec![3, 0, 9, 9, 9];
        encode_port(GatewayId(GATEWAY), 40, &[0xaa; 400], &mut frame).unwrap();
        world.wire.write_all(&frame).unwrap();
        world.exchange();
        world.init.send(&ToTunnel::Close).unwrap();
        let summary = engine.join().unwrap().unwrap();
        assert_eq!(summary.uplink.malformed, 1);
        assert_eq!(summary.drops.iter().map(|(_, count)| count).sum::<u64>(), 10);
    }

    #[test]
    fn second_configuration_ends_the_tunnel() {
        let (world, engine) = running();
        world.init.send(&configure()).unwrap();
        world.init.send(&configure()).unwrap();
        assert!(matches!(engine.join().unwrap(), Err(EngineError::Configured)));
    }

    #[test]
    fn gateway_key_of_low_order_ends_the_tunnel() {
        let (world, engine) = running();
        let ToTunnel::Configure(mut bad) = configure() else { panic!("no configuration") };
        bad.gateways[0].key = [0; 32];
        world.init.send(&ToTunnel::Configure(bad)).unwrap();
        assert!(matches!(engine.join().unwrap(), Err(EngineError::Gateway(AddPeerError::BadKey))));
    }

    #[test]
    fn init_that_is_gone_ends_the_tunnel() {
        let (world, engine) = running();
        drop(world.init);
        assert!(matches!(engine.join().unwrap(), Err(EngineError::Link(LinkError::Gone))));
    }

    #[test]
    fn interface_waits_while_the_relay_does_not_read() {
        let (mut world, engine) = running();
        world.shake_hands();
        let long = packet(V4, Ipv4Addr::new(192, 0, 2, 1), &[7; 1380]);
        // More than every buffer between here and the gateway holds.
        world.interface.set_nonblocking(true).unwrap();
        let (mut sent, deadline) = (0, Instant::now() + Duration::from_millis(500));
        while Instant::now() < deadline {
            match world.interface.send(&long) {
                Ok(_) => sent += 1,
                Err(_) => std::thread::yield_now(),
            }
        }
        for _ in 0..sent {
            assert_eq!(world.packet_at_gateway(), long);
        }
        world.init.send(&ToTunnel::Close).unwrap();
        let summary = engine.join().unwrap().unwrap();
        assert_eq!((summary.traffic.tx_packets, summary.uplink.dropped), (sent, 0));
    }
}
