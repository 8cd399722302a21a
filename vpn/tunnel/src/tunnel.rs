//! One WireGuard device: its peers, by key, by session and by address.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use ipnet::IpNet;
use ring::hmac;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::allowed::AllowedIps;
use crate::drops::{DropReason, Drops};
use crate::effects::Effects;
use crate::inner::Inner;
use crate::outbox::{MESSAGE_MAX, Outbox};
use crate::peer::{Handshake, Own, Peer, PeerConfig, PeerStatus, Routes, Start, reason};
use crate::{DATAGRAM_MAX, MTU_MAX, MTU_MIN, PEERS_MAX, cookie};

/// What a tunnel is made of.
pub struct Config {
    /// Our static key.
    pub private_key: StaticSecret,
    /// MTU in bytes of the interface in front of the tunnel: no packet is longer or padded beyond it.
    pub mtu: u16,
    /// Handshake messages per second that are answered without asking for a cookie.
    pub handshakes_per_s_max: u64,
    /// Most peers, up to [`PEERS_MAX`].
    pub peers_max: usize,
    /// Randomness, used for nothing else: session indices and cookies are made of it.
    pub seed: [u8; 32],
}

/// Why a tunnel cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not within [`MTU_MIN`] and [`MTU_MAX`].
    #[error("an MTU of {0} bytes; it can be {MTU_MIN} to {MTU_MAX}")]
    Mtu(u16),
    /// More than [`PEERS_MAX`].
    #[error("{0} peers; there can be {PEERS_MAX}")]
    Peers(usize),
}

/// A peer of one tunnel, until it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(u32);

impl PeerId {
    /// The peer whose session has this index at our end.
    pub(crate) fn of_session(session: u32) -> Self {
        Self(session >> SESSION_BITS)
    }
}

/// Why a peer cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddPeerError {
    /// Our own key, or a point of low order, with which anybody could speak for the peer.
    #[error("a key that no peer can have")]
    BadKey,
    /// The key is another peer's.
    #[error("the key of a peer that is there")]
    Key,
    /// An address is another peer's.
    #[error("the address {0} of a peer that is there")]
    Address(IpAddr),
    /// A peer with [`Routes::Everything`] beside another one.
    #[error("a peer for all addresses is the only peer")]
    Everything,
    /// There are as many as there may be.
    #[error("more than {0} peers")]
    TooMany(usize),
}

/// A packet that came out of the tunnel.
#[derive(Debug, PartialEq, Eq)]
pub struct Received<'o> {
    /// Who sent it; its source address is this peer's.
    pub peer: PeerId,
    /// The packet without its padding.
    pub packet: &'o mut [u8],
}

/// A datagram to be sent: the first `len` bytes of the buffer that was handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit<E> {
    /// Where to.
    pub to: E,
    /// Bytes of the datagram.
    pub len: usize,
}

/// One WireGuard device.
pub struct Tunnel<E> {
    private_key: StaticSecret,
    public_key: PublicKey,
    mtu: usize,
    peers_max: usize,
    /// In front of all peers.
    limiter: RateLimiter,
    /// Behind it, where boringtun asks again.
    no_limit: Arc<RateLimiter>,
    seed: hmac::Key,
    indices_made: u64,
    /// By the upper 24 bits of their session indices.
    peers: BTreeMap<PeerId, Box<Peer<E>>>,
    by_key: BTreeMap<[u8; 32], PeerId>,
    by_v4: BTreeMap<Ipv4Addr, PeerId>,
    by_v6: BTreeMap<Ipv6Addr, PeerId>,
    /// Of peers with [`Routes::Allowed`].
    allowed: AllowedIps,
    /// The one peer for all addresses.
    everything: Option<PeerId>,
    /// Timers that run: of this peer and those behind it.
    sweep: Option<(PeerId, Instant)>,
    effects: Effects<E>,
    /// A packet with its padding.
    padded: [u8; MTU_MAX as usize],
}

impl<E: Copy + Eq + Hash> Tunnel<E> {
    /// A tunnel without peers.
    ///
    /// # Errors
    /// [`ConfigError`] names the setting.
    pub fn new(config: Config, now: Instant) -> Result<Self, ConfigError> {
        if !(MTU_MIN..=MTU_MAX).contains(&config.mtu) {
            return Err(ConfigError::Mtu(config.mtu));
        }
        if config.peers_max > PEERS_MAX {
            return Err(ConfigError::Peers(config.peers_max));
        }
        let public_key = PublicKey::from(&config.private_key);
        Ok(Self {
            limiter: RateLimiter::new(&public_key, config.handshakes_per_s_max),
            no_limit: Arc::new(RateLimiter::new(&public_key, u64::MAX)),
            private_key: config.private_key,
            public_key,
            mtu: usize::from(config.mtu),
            peers_max: config.peers_max,
            seed: hmac::Key::new(hmac::HMAC_SHA256, &config.seed),
            indices_made: 0,
            peers: BTreeMap::new(),
            by_key: BTreeMap::new(),
            by_v4: BTreeMap::new(),
            by_v6: BTreeMap::new(),
            allowed: AllowedIps::default(),
            everything: None,
            sweep: None,
            effects: Effects {
                outbox: Outbox::new(),
                drops: Drops::default(),
                flushing: BTreeSet::new(),
                next_sweep: now + SWEEP_INTERVAL,
            },
            padded: [0; MTU_MAX as usize],
        })
    }

    /// Our public key.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// Adds a peer; one to connect to is sent a handshake at once.
    ///
    /// # Errors
    /// [`AddPeerError`] names what is wrong or taken; nothing has changed then.
    pub fn add_peer(&mut self, config: &PeerConfig<E>, now: Instant) -> Result<PeerId, AddPeerError> {
        self.check_peer(config)?;
        let id = self.new_id();
        let own =
            Own { private_key: &self.private_key, public_key: self.public_key, limiter: &self.no_limit };
        let mut peer = Box::new(Peer::new(config, &own, id.0, now));
        match config.start {
            Start::Connect(_) => peer.connect(now, &mut self.effects),
            Start::Ask(_) | Start::Listen => {}
        }
        self.effects.settle(id, &peer);
        self.peers.insert(id, peer);
        self.by_key.insert(*config.public_key.as_bytes(), id);
        match config.routes {
            Routes::Own { v4, v6 } => {
                self.by_v4.insert(v4, id);
                self.by_v6.insert(v6, id);
            }
            Routes::Everything => self.everything = Some(id),
            Routes::Allowed => {}
        }
        Ok(id)
    }

    /// Removes a peer with its sessions and the packets that wait for one; false if it is not there.
    pub fn remove_peer(&mut self, id: PeerId) -> bool {
        let Some(peer) = self.peers.remove(&id) else {
            return false;
        };
        self.by_key.remove(peer.public_key().as_bytes());
        match peer.routes() {
            Routes::Own { v4, v6 } => {
                self.by_v4.remove(&v4);
                self.by_v6.remove(&v6);
            }
            Routes::Everything => self.everything = None,
            Routes::Allowed => self.allowed.remove_peer(id),
        }
        self.effects.flushing.remove(&id);
        true
    }

    /// Sends what is for `network` to this peer, and lets it send from there: nobody else from now on, but for longer
    /// networks in it. False, and nothing is done, for a peer without [`Routes::Allowed`].
    pub fn allow(&mut self, id: PeerId, network: IpNet) -> bool {
        let is_one = self.peers.get(&id).is_some_and(|peer| matches!(peer.routes(), Routes::Allowed));
        if is_one {
            self.allowed.insert(network, id);
        }
        is_one
    }

    /// Takes `network` from this peer, if it was its.
    pub fn disallow(&mut self, id: PeerId, network: IpNet) {
        self.allowed.remove(network, id);
    }

    /// Drops a peer's sessions and begins a handshake at once: after a sleep, or a copy of the machine.
    /// A peer that has not spoken yet still has to.
    pub fn reconnect(&mut self, id: PeerId, now: Instant) {
        let own =
            Own { private_key: &self.private_key, public_key: self.public_key, limiter: &self.no_limit };
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.forget_sessions(&own);
            if peer.status().endpoint.is_some() {
                peer.connect(now, &mut self.effects);
            }
            self.effects.settle(id, peer);
        }
    }

    /// A peer as it is now.
    #[must_use]
    pub fn status(&self, id: PeerId) -> Option<PeerStatus<E>> {
        self.peers.get(&id).map(|peer| peer.status())
    }

    /// The peer with this key.
    #[must_use]
    pub fn peer_by_key(&self, key: &PublicKey) -> Option<PeerId> {
        self.by_key.get(key.as_bytes()).copied()
    }

    /// The peer that packets for this address go to.
    #[must_use]
    pub fn peer_by_address(&self, address: IpAddr) -> Option<PeerId> {
        let own = match address {
            IpAddr::V4(address) => self.by_v4.get(&address),
            IpAddr::V6(address) => self.by_v6.get(&address),
        };
        own.copied().or_else(|| self.allowed.get(address)).or(self.everything)
    }

    /// All peers in the order of their ids.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, PeerStatus<E>)> + '_ {
        self.peers.iter().map(|(id, peer)| (*id, peer.status()))
    }

    /// What was dropped, by reason.
    #[must_use]
    pub fn drops(&self) -> &Drops {
        &self.effects.drops
    }

    /// Takes a datagram from `source`. `None`: it was no packet, but may have an answer.
    ///
    /// # Errors
    /// [`DropReason`], which is counted too.
    pub fn handle_datagram<'o>(
        &mut self,
        source: E,
        datagram: &[u8],
        out: &'o mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) -> Result<Option<Received<'o>>, DropReason> {
        let result = self.receive(source, datagram, out, now);
        if let Err(reason) = result {
            self.effects.drops.count(reason);
        }
        result
    }

    /// Takes an IP packet for a peer and makes a datagram of it in `out`. `None`: it waits for a session.
    ///
    /// # Errors
    /// [`DropReason`], which is counted too.
    pub fn handle_packet(
        &mut self,
        packet: &[u8],
        out: &mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) -> Result<Option<Transmit<E>>, DropReason> {
        let result = self.send(packet, out, now);
        if let Err(reason) = result {
            self.effects.drops.count(reason);
        }
        result
    }

    /// Runs the timers that are due; their messages come out of [`Self::poll_transmit`].
    pub fn handle_timers(&mut self, now: Instant) {
        if self.next_timeout().is_some_and(|due| due <= now) {
            self.sweep = Some((PeerId(0), now));
            self.effects.next_sweep = now + SWEEP_INTERVAL;
        }
    }

    /// When [`Self::handle_timers`] is due; never without peers.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        (!self.peers.is_empty()).then_some(self.effects.next_sweep)
    }

    /// The next datagram to send that is not a packet's own: handshakes, cookies, keepalives, packets that
    /// waited. `None` when there is no more.
    pub fn poll_transmit(&mut self, out: &mut [u8; DATAGRAM_MAX]) -> Option<Transmit<E>> {
        loop {
            if let Some(message) = self.effects.outbox.pop() {
                let bytes = message.bytes();
                out[..bytes.len()].copy_from_slice(bytes);
                return Some(Transmit { to: message.to(), len: bytes.len() });
            }
            if let Some(id) = self.effects.flushing.first().copied() {
                match self.peers.get_mut(&id).and_then(|peer| peer.flush(out)) {
                    Some((to, len)) => return Some(Transmit { to, len }),
                    None => self.effects.flushing.remove(&id),
                };
                continue;
            }
            let (next, now) = self.sweep?;
            let Some((id, peer)) = self.peers.range_mut(next..).next() else {
                self.sweep = None;
                return None;
            };
            let id = *id;
            peer.tick(now, &mut self.effects);
            self.effects.settle(id, peer);
            self.sweep = Some((PeerId(id.0 + 1), now));
        }
    }

    fn receive<'o>(
        &mut self,
        source: E,
        datagram: &[u8],
        out: &'o mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) -> Result<Option<Received<'o>>, DropReason> {
        if datagram.len() > DATAGRAM_MAX {
            return Err(DropReason::TooLong);
        }
        let parsed = Tunn::parse_incoming_packet(datagram).map_err(|error| reason(&error))?;
        let (message, session) = match &parsed {
            Packet::PacketData(data) => {
                let session = data.receiver_idx;
                let received = self.receive_data(source, session, datagram, out, now)?;
                return Ok(received);
            }
            Packet::HandshakeInit(_) => (Handshake::Initiation, None),
            Packet::HandshakeResponse(response) => (Handshake::Response, Some(response.receiver_idx)),
            Packet::PacketCookieReply(cookie) => (Handshake::Cookie, Some(cookie.receiver_idx)),
        };
        // Cheapest first: an answer to nothing costs one look-up.
        let answered = session.map(PeerId::of_session);
        if answered.is_some_and(|id| !self.peers.contains_key(&id)) {
            return Err(DropReason::UnknownSession);
        }
        match message {
            Handshake::Initiation | Handshake::Response => self.admit(source, datagram)?,
            Handshake::Cookie => {}
        }
        let id = match (answered, &parsed) {
            (Some(id), _) => id,
            (None, Packet::HandshakeInit(initiation)) => {
                let half = parse_handshake_anon(&self.private_key, &self.public_key, initiation)
                    .map_err(|error| reason(&error))?;
                self.by_key.get(&half.peer_static_public).copied().ok_or(DropReason::UnknownPeer)?
            }
            (None, _) => return Err(DropReason::UnknownSession),
        };
        let peer = self.peers.get_mut(&id).ok_or(DropReason::UnknownPeer)?;
        let result = peer.handshake(source, message, datagram, now, &mut self.effects);
        self.effects.settle(id, peer);
        result.map(|()| None)
    }

    fn receive_data<'o>(
        &mut self,
        source: E,
        session: u32,
        datagram: &[u8],
        out: &'o mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) -> Result<Option<Received<'o>>, DropReason> {
        let id = PeerId::of_session(session);
        let peer = self.peers.get_mut(&id).ok_or(DropReason::UnknownSession)?;
        let counter = datagram.get(8..16).and_then(<[u8]>::first_chunk).copied().map(u64::from_le_bytes);
        if counter.is_none_or(|counter| counter >= REJECT_AFTER_MESSAGES) {
            return Err(DropReason::Replayed);
        }
        let result = peer.open(source, session, datagram, out, now, &mut self.effects);
        self.effects.settle(id, peer);
        let Some(packet) = result? else { return Ok(None) };
        if matches!(peer.routes(), Routes::Allowed) {
            // In the table of all, so that of two networks, one in the other, each peer speaks for its own.
            let source = Inner::parse(packet).ok_or(DropReason::Malformed)?.source;
            if self.allowed.get(source) != Some(id) {
                return Err(DropReason::Source);
            }
        }
        Ok(Some(Received { peer: id, packet }))
    }

    fn send(
        &mut self,
        packet: &[u8],
        out: &mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) -> Result<Option<Transmit<E>>, DropReason> {
        if packet.len() > self.mtu {
            return Err(DropReason::TooLong);
        }
        let inner = Inner::parse(packet).ok_or(DropReason::Malformed)?;
        let id = self.peer_by_address(inner.destination).ok_or(DropReason::NoRoute)?;
        let padded_len = inner.len.next_multiple_of(PADDING).min(self.mtu);
        let padded = if padded_len == packet.len() && inner.len == packet.len() {
            packet
        } else {
            self.padded[..inner.len].copy_from_slice(&packet[..inner.len]);
            self.padded[inner.len..padded_len].fill(0);
            &self.padded[..padded_len]
        };
        let peer = self.peers.get_mut(&id).ok_or(DropReason::NoRoute)?;
        let result = peer.seal(padded, inner.len, out, now, &mut self.effects);
        self.effects.settle(id, peer);
        result.map(|sealed| sealed.map(|(to, len)| Transmit { to, len }))
    }

    /// The MAC and the limit in front of all public-key work. A sender who has to show a cookie is sent one.
    fn admit(&mut self, source: E, datagram: &[u8]) -> Result<(), DropReason> {
        self.limiter.reset_count();
        let mut scratch = [0; MESSAGE_MAX];
        let address = cookie::source(&self.seed, &source);
        match self.limiter.verify_packet(Some(address), datagram, &mut scratch) {
            Ok(_) => Ok(()),
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.effects.send(Some(source), cookie);
                Err(DropReason::Load)
            }
            Err(TunnResult::Err(error)) => Err(reason(&error)),
            Err(TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..)) => {
                Err(DropReason::Malformed)
            }
        }
    }

    fn check_peer(&self, config: &PeerConfig<E>) -> Result<(), AddPeerError> {
        if self.peers.len() >= self.peers_max {
            return Err(AddPeerError::TooMany(self.peers_max));
        }
        let shared = self.private_key.diffie_hellman(&config.public_key);
        if config.public_key == self.public_key || !shared.was_contributory() {
            return Err(AddPeerError::BadKey);
        }
        if self.by_key.contains_key(config.public_key.as_bytes()) {
            return Err(AddPeerError::Key);
        }
        match config.routes {
            _ if self.everything.is_some() => Err(AddPeerError::Everything),
            Routes::Everything if !self.peers.is_empty() => Err(AddPeerError::Everything),
            Routes::Own { v4, .. } if self.by_v4.contains_key(&v4) => Err(AddPeerError::Address(v4.into())),
            Routes::Own { v6, .. } if self.by_v6.contains_key(&v6) => Err(AddPeerError::Address(v6.into())),
            Routes::Everything | Routes::Own { .. } | Routes::Allowed => Ok(()),
        }
    }

    /// An id that nobody can guess and no peer has: it is seen in the session indices on the wire.
    fn new_id(&mut self) -> PeerId {
        loop {
            let tag = hmac::sign(&self.seed, &[INDEX_LABEL, &self.indices_made.to_le_bytes()].concat());
            self.indices_made += 1;
            let [a, b, c] = tag.as_ref().first_chunk().copied().unwrap_or_default();
            let id = PeerId(u32::from_le_bytes([a, b, c, 0]));
            if !self.peers.contains_key(&id) {
                return id;
            }
        }
    }
}

/// Between two runs of all timers. The times in them are tens of seconds, and a peer's run besides with
/// each of its packets; only a first handshake is in more of a hurry.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// boringtun numbers the sessions of a peer in the lower bits of their indices.
const SESSION_BITS: u32 = 8;
/// Plaintext is a multiple of this many bytes (WireGuard paper, 5.4.6).
const PADDING: usize = 16;
/// Counters from here on are refused (WireGuard paper, 6.1); boringtun 0.7.1 has no such limit, and
/// adds to the counter.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
const INDEX_LABEL: &[u8] = b"index";
