//! A work VM's tunnel and its gateway's over a network that loses, repeats and reorders datagrams, for hours
//! that pass in moments: boringtun's clock is the one that [`World`] sets.
//!
//! Each world runs in a thread of its own: the clock belongs to the thread. What the network does follows from
//! the seed; the keys of sessions are random all the same.

use kontor_vpn::{
    Config, DATAGRAM_MAX, HANDSHAKES_PER_S, MTU_MAX, PeerConfig, PeerId, PublicKey, Routes, Start,
    StaticSecret, Tunnel,
};
use mock_instant::MockClock;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Vm,
    Gateway,
}

/// What the network does to a datagram. Probabilities are in thousandths.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    pub lost: u64,
    pub repeated: u64,
    /// From the least to the most a datagram takes, in milliseconds; what is sent later may come earlier.
    pub delay_ms: (u64, u64),
}

/// Both ends, the network between them, and the time.
pub struct World {
    vm: Tunnel<SocketAddr>,
    gateway: Tunnel<SocketAddr>,
    /// The gateway, in the VM.
    office: PeerId,
    /// The VM, in the gateway.
    home: PeerId,
    begin: Instant,
    elapsed: Duration,
    random: u64,
    network: Network,
    cut: bool,
    /// Under way: when it arrives, and a number that keeps those of one moment apart.
    flying: BTreeMap<(Duration, u64), (End, Vec<u8>)>,
    count: u64,
    /// Numbers of packets that were sent and have not arrived, by where they go to.
    sent: BTreeSet<(End, u64)>,
    next_number: u64,
    /// When the VM last agreed on a session.
    last_agreed: Option<Duration>,
    /// What has happened.
    pub seen: Seen,
}

/// What has happened in a [`World`].
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// Packets given to a tunnel and packets that came out at the other end.
    pub sent: u64,
    pub arrived: u64,
    /// Sessions that the VM agreed on.
    pub sessions: u64,
    /// When a packet last came out at each end.
    pub last_arrival: BTreeMap<End, Duration>,
    /// The longest that a session that was in use had been there.
    pub oldest_session: Duration,
    /// A data datagram that arrived, for those who record.
    pub recorded: Option<Vec<u8>>,
}

const OFFICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 51820);
const HOME: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 40000);
const VM_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const VM_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 80);
/// An IPv4 header with an experiment's protocol (RFC 3692), and a number.
const PACKET_LEN: usize = 28;
const PROTOCOL: u8 = 253;
/// Type of a data message (WireGuard paper, 5.4.6).
const DATA: u8 = 4;

impl World {
    /// Two ends that have not spoken yet. The VM keeps its session alive every `keepalive_s` seconds.
    ///
    /// # Panics
    /// When a tunnel does not take its configuration, which is the same each time.
    #[must_use]
    pub fn new(seed: u64, network: Network, keepalive_s: Option<u16>) -> Self {
        MockClock::set_time(Duration::from_secs(1_000_000));
        let begin = Instant::now();
        let secret = |number: u8| StaticSecret::from([number; 32]);
        let tunnel = |number: u8| {
            let config = Config {
                private_key: secret(number),
                mtu: MTU_MAX,
                handshakes_per_s_max: HANDSHAKES_PER_S,
                peers_max: 8,
                seed: [number; 32],
            };
            Tunnel::new(config, begin).expect("the configuration is good")
        };
        let (mut vm, mut gateway) = (tunnel(1), tunnel(2));
        let peer = |tunnel: &mut Tunnel<SocketAddr>, number, routes, start, keepalive_s| {
            let public_key = PublicKey::from(&secret(number));
            let config = PeerConfig { public_key, routes, start, keepalive_s };
            tunnel.add_peer(&config, begin).expect("the first peer has room")
        };
        let home = peer(&mut gateway, 1, Routes::Own { v4: VM_V4, v6: VM_V6 }, Start::Listen, None);
        let office = peer(&mut vm, 2, Routes::Everything, Start::Connect(OFFICE), keepalive_s);
        Self {
            vm,
            gateway,
            office,
            home,
            begin,
            elapsed: Duration::ZERO,
            // Zero is the one state that this generator does not leave.
            random: seed.wrapping_mul(2).wrapping_add(1),
            network,
            cut: false,
            flying: BTreeMap::new(),
            count: 0,
            sent: BTreeSet::new(),
            next_number: 0,
            last_agreed: None,
            seen: Seen::default(),
        }
    }

    /// Time since the beginning.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// From now on nothing passes, or what the network lets pass.
    pub fn cut(&mut self, cut: bool) {
        self.cut = cut;
        if cut {
            self.flying.clear();
        }
    }

    /// Lets `time` pass; both ends send a packet each `every`, where that is given.
    pub fn pass(&mut self, time: Duration, every: Option<Duration>) {
        let end = self.elapsed + time;
        let mut speak = every.map(|every| self.elapsed + every);
        self.send_out();
        while self.elapsed < end {
            let due = [self.vm.next_timeout(), self.gateway.next_timeout()].into_iter().flatten();
            let due = due.map(|at| at.saturating_duration_since(self.begin));
            let arrival = self.flying.keys().next().map(|(at, _)| *at);
            let next = due.chain(arrival).chain(speak).min().map_or(end, |next| next.min(end));
            self.advance_to(next);
            self.vm.handle_timers(self.now());
            self.gateway.handle_timers(self.now());
            self.send_out();
            self.deliver();
            if let (Some(at), Some(every)) = (speak, every)
                && at <= self.elapsed
            {
                self.speak();
                speak = Some(at + every);
            }
            self.look();
        }
    }

    /// Gives a datagram to the gateway as if it came from the VM; whether a packet came out.
    pub fn inject(&mut self, datagram: &[u8]) -> bool {
        let now = self.now();
        let mut out = [0; DATAGRAM_MAX];
        self.gateway.handle_datagram(HOME, datagram, &mut out, now).is_ok_and(|received| received.is_some())
    }

    /// Whether the VM has a session to send in.
    #[must_use]
    pub fn established(&self) -> bool {
        self.vm.status(self.office).is_some_and(|status| status.established)
    }

    fn now(&self) -> Instant {
        self.begin + self.elapsed
    }

    fn advance_to(&mut self, time: Duration) {
        if time > self.elapsed {
            MockClock::advance(time - self.elapsed);
            self.elapsed = time;
        }
    }

    /// xorshift64 (Marsaglia, 2003).
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Both ends send a numbered packet.
    fn speak(&mut self) {
        for to in [End::Gateway, End::Vm] {
            let number = self.next_number;
            self.next_number += 1;
            let packet = packet(to, number);
            let (now, mut out) = (self.now(), [0; DATAGRAM_MAX]);
            let tunnel = match to {
                End::Gateway => &mut self.vm,
                End::Vm => &mut self.gateway,
            };
            // Without a session a packet waits, or is dropped where too many wait.
            let Ok(sealed) = tunnel.handle_packet(&packet, &mut out, now) else { continue };
            self.sent.insert((to, number));
            self.seen.sent += 1;
            if let Some(transmit) = sealed {
                self.throw(to, out[..transmit.len].to_vec());
            }
        }
        self.send_out();
    }

    /// Takes what both ends want to send.
    fn send_out(&mut self) {
        let mut out = [0; DATAGRAM_MAX];
        while let Some(transmit) = self.vm.poll_transmit(&mut out) {
            self.throw(End::Gateway, out[..transmit.len].to_vec());
        }
        while let Some(transmit) = self.gateway.poll_transmit(&mut out) {
            self.throw(End::Vm, out[..transmit.len].to_vec());
        }
    }

    /// Gives a datagram to the network.
    fn throw(&mut self, to: End, datagram: Vec<u8>) {
        let Network { lost, repeated, delay_ms: (least, most) } = self.network;
        if self.cut || self.random(1000) < lost {
            return;
        }
        let copies = if self.random(1000) < repeated { 2 } else { 1 };
        for _ in 0..copies {
            let delay = Duration::from_millis(least + self.random(most - least + 1));
            self.count += 1;
            self.flying.insert((self.elapsed + delay, self.count), (to, datagram.clone()));
        }
    }

    /// Delivers what has arrived by now.
    fn deliver(&mut self) {
        while let Some(entry) = self.flying.first_entry().filter(|entry| entry.key().0 <= self.elapsed) {
            let (to, datagram) = entry.remove();
            let (now, mut out) = (self.now(), [0; DATAGRAM_MAX]);
            let (tunnel, from) = match to {
                End::Vm => (&mut self.vm, OFFICE),
                End::Gateway => (&mut self.gateway, HOME),
            };
            let received = tunnel.handle_datagram(from, &datagram, &mut out, now);
            if let Ok(Some(received)) = received {
                let received = received.packet.to_vec();
                self.arrived(to, &received);
                if to == End::Gateway && datagram.first() == Some(&DATA) {
                    self.seen.recorded = Some(datagram);
                }
            }
            self.send_out();
        }
    }

    fn arrived(&mut self, at: End, received: &[u8]) {
        let number =
            received.get(20..PACKET_LEN).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let number = number.expect("a packet of ours has a number");
        assert_eq!(received, packet(at, number), "a packet comes out as it was sent");
        assert!(self.sent.remove(&(at, number)), "packet {number} came out twice, or was never sent");
        self.seen.arrived += 1;
        self.seen.last_arrival.insert(at, self.elapsed);
        // What a session that is too old carries must not arrive.
        let agreed = self.gateway.status(self.home).and_then(|status| status.last_handshake);
        if let Some(age) = agreed.map(|agreed| self.now().saturating_duration_since(agreed)) {
            self.seen.oldest_session = self.seen.oldest_session.max(age);
        }
    }

    /// Counts the VM's sessions.
    fn look(&mut self) {
        let agreed = self.vm.status(self.office).and_then(|status| status.last_handshake);
        let agreed = agreed.map(|at| at.saturating_duration_since(self.begin));
        if agreed.is_some() && agreed != self.last_agreed {
            self.last_agreed = agreed;
            self.seen.sessions += 1;
        }
    }
}

/// An IPv4 packet that goes to `to` and bears `number`.
fn packet(to: End, number: u64) -> [u8; PACKET_LEN] {
    let (source, destination) = match to {
        End::Vm => (SERVER, VM_V4),
        End::Gateway => (VM_V4, SERVER),
    };
    let mut packet = [0; PACKET_LEN];
    packet[0] = 0x45;
    packet[3] = 28;
    packet[9] = PROTOCOL;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&destination.octets());
    packet[20..].copy_from_slice(&number.to_be_bytes());
    packet
}
