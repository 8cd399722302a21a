//! One peer: its sessions, its addresses, where it is, and how a first session comes about.
//!
//! ```text
//!            connect                    every 250 ms for 3 s           answer
//!  (nothing) ───────► initiation sent ──────────────────────► ... ────────────► established
//!                          ▲      no answer: boringtun's timers, every 5 s          │
//!                          └─────────── 180 s without a handshake ──────────────────┘
//! ```
//!
//! Of the initiations every second one repeats the bytes of the one before. boringtun accepts an
//! answer only to its last two handshakes; with a new one every 250 ms no path with a round trip above
//! 500 ms would ever get a session, and with this every path up to 1 s does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::DATAGRAM_MAX;
use crate::drops::DropReason;
use crate::effects::Effects;
use crate::inner::Inner;
use crate::outbox::MESSAGE_MAX;

/// A peer to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig<E> {
    /// The peer's static key.
    pub public_key: PublicKey,
    /// What is sent to it, and what may come from it.
    pub routes: Routes,
    /// Which side speaks first.
    pub start: Start<E>,
    /// Seconds between keepalives that are sent whatever else is; none without.
    pub keepalive_s: Option<u16>,
}

/// The inner addresses of a peer: destinations of what it is sent, and sources of what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routes {
    /// One address of each family and no other peer's: what a gateway gives a work VM.
    Own {
        /// The /32.
        v4: Ipv4Addr,
        /// The /128.
        v6: Ipv6Addr,
    },
    /// 0.0.0.0/0 and ::/0: what a work VM gives its gateway, which is then its only peer.
    Everything,
    /// What [`Tunnel::allow`](crate::Tunnel::allow) says, nothing at first.
    Allowed,
}

impl Routes {
    fn contain(self, address: IpAddr) -> bool {
        match (self, address) {
            (Self::Own { v4, .. }, IpAddr::V4(address)) => v4 == address,
            (Self::Own { v6, .. }, IpAddr::V6(address)) => v6 == address,
            // The tunnel's table knows, and is asked after this.
            (Self::Everything | Self::Allowed, _) => true,
        }
    }
}

/// Which side speaks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start<E> {
    /// We do, at once and until there is a session: the peer is there.
    Connect(E),
    /// We do, as soon as there is something to send: the peer is there.
    Ask(E),
    /// The peer does: until then nobody knows where it is.
    Listen,
}

/// A peer as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus<E> {
    /// Where the last authenticated message came from, or where the first one goes.
    pub endpoint: Option<E>,
    /// There is a session that packets can be sent in.
    pub established: bool,
    /// When both sides last agreed on a new session.
    pub last_handshake: Option<Instant>,
    /// When a message last proved to be the peer's.
    pub last_received: Option<Instant>,
    /// Packets received and sent, padding and keepalives not counted.
    pub traffic: Traffic,
}

/// Packets and their bytes, as IP counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes in them.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes in them.
    pub tx_bytes: u64,
}

/// The tunnel's own half of what a peer needs.
pub(crate) struct Own<'a> {
    pub(crate) private_key: &'a StaticSecret,
    pub(crate) public_key: PublicKey,
    /// Never under load: the one in front of all peers has already decided.
    pub(crate) limiter: &'a Arc<RateLimiter>,
}

pub(crate) struct Peer<E> {
    tunn: Tunn,
    public_key: PublicKey,
    routes: Routes,
    /// On whose word a handshake starts again when boringtun has given up.
    persistent: bool,
    endpoint: Option<E>,
    connecting: Option<Connecting>,
    established: bool,
    /// The session that we answered with and that the peer has not used yet.
    unconfirmed: Option<u32>,
    /// Packets in boringtun's queue.
    waiting: usize,
    /// When boringtun last looked at its clock.
    clocked: Instant,
    last_handshake: Option<Instant>,
    last_received: Option<Instant>,
    traffic: Traffic,
}

/// The first three seconds.
struct Connecting {
    next: Instant,
    left: u32,
    /// The initiation to repeat; without one the next is new.
    repeat: Option<[u8; MESSAGE_MAX]>,
}

impl<E: Copy + Eq> Peer<E> {
    pub(crate) fn new(config: &PeerConfig<E>, own: &Own<'_>, index: u32, now: Instant) -> Self {
        let tunn = Tunn::new(
            own.private_key.clone(),
            config.public_key,
            None,
            config.keepalive_s,
            index,
            Some(Arc::clone(own.limiter)),
        );
        let endpoint = match config.start {
            Start::Connect(endpoint) | Start::Ask(endpoint) => Some(endpoint),
            Start::Listen => None,
        };
        Self {
            tunn,
            public_key: config.public_key,
            routes: config.routes,
            persistent: matches!(config.start, Start::Connect(_)),
            endpoint,
            connecting: None,
            established: false,
            unconfirmed: None,
            waiting: 0,
            clocked: now,
            last_handshake: None,
            last_received: None,
            traffic: Traffic::default(),
        }
    }

    pub(crate) fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    pub(crate) fn routes(&self) -> Routes {
        self.routes
    }

    pub(crate) fn status(&self) -> PeerStatus<E> {
        PeerStatus {
            endpoint: self.endpoint,
            established: self.established,
            last_handshake: self.last_handshake,
            last_received: self.last_received,
            traffic: self.traffic,
        }
    }

    /// When the next initiation of the first three seconds is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.connecting.as_ref().map(|connecting| connecting.next)
    }

    /// Whether packets wait although there is a session for them.
    pub(crate) fn can_flush(&self) -> bool {
        self.established && self.waiting > 0
    }

    /// Starts a handshake now, and a fast series of them while there is no session.
    pub(crate) fn connect(&mut self, now: Instant, effects: &mut Effects<E>) {
        self.connecting = Some(Connecting { next: now, left: INITIATIONS, repeat: None });
        self.initiate(now, effects);
    }

    /// Forgets every session, as if none had ever been.
    pub(crate) fn forget_sessions(&mut self, own: &Own<'_>) {
        // Not a new `Tunn`: that would read the wall clock again, and a peer takes no handshake with a
        // time before the last one's.
        self.tunn.set_static_private(own.private_key.clone(), own.public_key, Some(Arc::clone(own.limiter)));
        self.established = false;
        self.unconfirmed = None;
    }

    /// Lets boringtun look at its clock, at most once per [`CLOCK_STEP`].
    pub(crate) fn refresh(&mut self, now: Instant, effects: &mut Effects<E>) {
        if now.saturating_duration_since(self.clocked) >= CLOCK_STEP {
            self.tick(now, effects);
        }
    }

    /// Does what is due by boringtun's clock and by `now`.
    pub(crate) fn tick(&mut self, now: Instant, effects: &mut Effects<E>) {
        self.clocked = now;
        let mut scratch = [0; MESSAGE_MAX];
        match self.tunn.update_timers(&mut scratch) {
            TunnResult::WriteToNetwork(message) => effects.send(self.endpoint, message),
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.waiting = 0;
                if self.persistent && self.connecting.is_none() {
                    self.connect(now, effects);
                }
            }
            TunnResult::Err(_)
            | TunnResult::Done
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {}
        }
        self.look();
        self.initiate(now, effects);
    }

    /// Takes a handshake message or a cookie that passed the limiter.
    pub(crate) fn handshake(
        &mut self,
        source: E,
        message: Handshake,
        datagram: &[u8],
        now: Instant,
        effects: &mut Effects<E>,
    ) -> Result<(), DropReason> {
        self.refresh(now, effects);
        let mut scratch = [0; MESSAGE_MAX];
        match self.tunn.decapsulate(Some(ANY_SOURCE), datagram, &mut scratch) {
            TunnResult::WriteToNetwork(answer) => {
                match message {
                    // Without proof yet that the peer sent it just now: only its answer goes there.
                    Handshake::Initiation => self.unconfirmed = sender_index(answer),
                    Handshake::Response => {
                        self.authenticated(source, now);
                        self.last_handshake = Some(now);
                    }
                    Handshake::Cookie => {}
                }
                effects.send(Some(source), answer);
            }
            TunnResult::Done => {
                if let (Handshake::Cookie, Some(connecting)) = (message, &mut self.connecting) {
                    connecting.repeat = None;
                }
            }
            TunnResult::Err(error) => return Err(reason(&error)),
            TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {}
        }
        Ok(())
    }

    /// Opens a data message; `None` for a keepalive.
    pub(crate) fn open<'o>(
        &mut self,
        source: E,
        session: u32,
        datagram: &[u8],
        out: &'o mut [u8; DATAGRAM_MAX],
        now: Instant,
        effects: &mut Effects<E>,
    ) -> Result<Option<&'o mut [u8]>, DropReason> {
        self.refresh(now, effects);
        let packet = match self.tunn.decapsulate(None, datagram, out) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => Some(packet),
            TunnResult::Done => None,
            TunnResult::Err(error) => return Err(reason(&error)),
            TunnResult::WriteToNetwork(_) => None,
        };
        self.authenticated(source, now);
        if self.unconfirmed == Some(session) {
            self.unconfirmed = None;
            self.last_handshake = Some(now);
        }
        let Some(packet) = packet else {
            return Ok(None);
        };
        let inner = Inner::parse(packet).ok_or(DropReason::Malformed)?;
        if !self.routes.contain(inner.source) {
            return Err(DropReason::Source);
        }
        self.traffic.rx_packets += 1;
        self.traffic.rx_bytes += inner.len as u64;
        Ok(Some(packet))
    }

    /// Seals a packet of `len` bytes that stands padded in `padded`. `None`: it waits for a session.
    pub(crate) fn seal(
        &mut self,
        padded: &[u8],
        len: usize,
        out: &mut [u8; DATAGRAM_MAX],
        now: Instant,
        effects: &mut Effects<E>,
    ) -> Result<Option<(E, usize)>, DropReason> {
        self.refresh(now, effects);
        let endpoint = self.endpoint.ok_or(DropReason::NoEndpoint)?;
        if !self.established && self.waiting == WAITING_MAX {
            return Err(DropReason::Waiting);
        }
        let sealed = match self.tunn.encapsulate(padded, out) {
            TunnResult::WriteToNetwork(message) if self.established => Some((endpoint, message.len())),
            TunnResult::WriteToNetwork(initiation) => {
                effects.send(Some(endpoint), initiation);
                self.waiting += 1;
                None
            }
            TunnResult::Done => {
                self.waiting += 1;
                None
            }
            TunnResult::Err(error) => return Err(reason(&error)),
            TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => None,
        };
        self.traffic.tx_packets += 1;
        self.traffic.tx_bytes += len as u64;
        Ok(sealed)
    }

    /// Seals the next packet that waited for a session; `None` when there is no more.
    pub(crate) fn flush(&mut self, out: &mut [u8; DATAGRAM_MAX]) -> Option<(E, usize)> {
        let endpoint = self.endpoint.filter(|_| self.can_flush())?;
        match self.tunn.decapsulate(None, &[], out) {
            TunnResult::WriteToNetwork(message) => Some((endpoint, message.len())),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {
                self.waiting = 0;
                None
            }
        }
    }

    /// The peer has just proved that it is there.
    fn authenticated(&mut self, source: E, now: Instant) {
        self.endpoint = Some(source);
        self.last_received = Some(now);
        // boringtun has switched to the message's session, unless it has a newer one.
        self.established = true;
    }

    /// Asks boringtun whether there is a session.
    fn look(&mut self) {
        self.established = self.tunn.time_since_last_handshake().is_some();
    }

    /// Sends the initiation that is due.
    fn initiate(&mut self, now: Instant, effects: &mut Effects<E>) {
        if self.established {
            self.connecting = None;
        }
        let Some(connecting) = self.connecting.as_mut().filter(|connecting| connecting.next <= now) else {
            return;
        };
        match connecting.repeat.take() {
            Some(initiation) => effects.send(self.endpoint, &initiation),
            None => {
                let mut scratch = [0; MESSAGE_MAX];
                if let TunnResult::WriteToNetwork(message) =
                    self.tunn.format_handshake_initiation(&mut scratch, true)
                {
                    connecting.repeat = message.as_array().copied();
                    effects.send(self.endpoint, message);
                }
            }
        }
        connecting.next += INITIATION_INTERVAL;
        connecting.left -= 1;
        if connecting.left == 0 {
            self.connecting = None;
        }
    }
}

/// A message that makes no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handshake {
    Initiation,
    Response,
    Cookie,
}

/// The index that the sender of a handshake message gave its session (WireGuard paper, 5.4).
fn sender_index(message: &[u8]) -> Option<u32> {
    message.get(4..8)?.first_chunk().copied().map(u32::from_le_bytes)
}

/// boringtun's word for a failure in ours.
pub(crate) fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidMac => DropReason::Mac,
        WireGuardError::UnderLoad => DropReason::Load,
        WireGuardError::WrongKey => DropReason::UnknownPeer,
        WireGuardError::NoCurrentSession
        | WireGuardError::WrongIndex
        | WireGuardError::UnexpectedPacket
        | WireGuardError::ConnectionExpired => DropReason::UnknownSession,
        WireGuardError::InvalidAeadTag => DropReason::Forged,
        WireGuardError::WrongTai64nTimestamp
        | WireGuardError::InvalidCounter
        | WireGuardError::DuplicateCounter => DropReason::Replayed,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::InvalidPacket
        | WireGuardError::LockFailed => DropReason::Malformed,
    }
}

/// Between two initiations of a first handshake.
pub(crate) const INITIATION_INTERVAL: Duration = Duration::from_millis(250);
/// Initiations of a first handshake: at 0, 250 .. 3000 ms.
pub(crate) const INITIATIONS: u32 = 13;
/// Most packets that wait for a session of one peer.
pub(crate) const WAITING_MAX: usize = 16;
/// boringtun takes the time only when its timers run, and orders events by it: two in one step count as
/// simultaneous.
const CLOCK_STEP: Duration = Duration::from_millis(10);
/// The limiter of a peer is never under load, so it never looks.
const ANY_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
