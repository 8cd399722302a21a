//! The loop: one `poll`, then what is ready, each a bounded amount.

use crate::{
    bucket::Rate,
    down::DownPath,
    gateways::{Table, TableError},
    message::{self, Counters, FromDaemon, FromRelay, MAX_GATEWAYS, MAX_MESSAGE, MessageError},
    socket::Uplink,
    up::{Turn, UpPath},
};
use kontor_wire::uplink::{GatewayId, MAX_FRAME, MAX_FRAME_VFIO};
use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send},
};
use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

/// Reads of the uplink in one turn, so that the other direction has its turn too.
const READS_PER_TURN: usize = 4;
/// The same in Ethernet frames, each of which is a read.
const FRAMES_PER_TURN: usize = 64;
/// Datagrams received from each gateway in one turn.
const DATAGRAMS_PER_TURN: usize = 64;

/// Descriptors that are waited for: kontord, the uplink, and a socket for each gateway.
const POLLED_MAX: usize = 2 + MAX_GATEWAYS;

/// What the guest may send.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Datagrams. A frame above the limit is dropped.
    pub datagrams: Rate,
    /// Handshake initiations. A frame above the limit is dropped.
    pub initiations: Rate,
    /// Frames that are malformed, or hold what is not WireGuard's. One above the limit ends the relay.
    pub malformed: Rate,
    /// What was dropped above the first two limits or for an unknown gateway, in datagrams; an initiation
    /// counts as [`REFUSED_INITIATION`]. One above the limit ends the relay.
    pub refused: Rate,
}

/// How many datagrams an initiation above its limit counts for.
pub const REFUSED_INITIATION: u32 = 1_000;

impl Default for Limits {
    /// * Datagrams: more than twice a full gigabit of ordinary packets, which is 90 000 a second.
    /// * Initiations: the tunnel sends one each 250 ms to each of two gateways before its first session, and
    ///   far fewer later. Each costs a gateway public-key work of some 0.1 ms until it asks for cookies: a
    ///   guest that floods takes a thousandth of a core.
    /// * Malformed: no guest that works sends such a frame at all.
    /// * Refused: as much again as may pass, for ten seconds; or two thousand initiations. That is no load, it
    ///   is a flood.
    fn default() -> Self {
        Self {
            datagrams: Rate { per_s: 200_000, burst: 50_000 },
            initiations: Rate { per_s: 10, burst: 20 },
            malformed: Rate { per_s: 1, burst: 16 },
            refused: Rate { per_s: 200_000, burst: 2_000_000 },
        }
    }
}

/// The descriptors of a relay; the mode of `control` does not matter.
#[derive(Debug)]
pub struct Wires {
    /// The other end of the guest's uplink.
    pub uplink: Uplink,
    /// SEQPACKET, to kontord, which hands over the sockets to the gateways on it.
    pub control: OwnedFd,
}

/// Why a relay ended, when nothing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// kontord asked for it, or is gone.
    Shutdown,
    /// The virtual machine closed the uplink.
    UplinkClosed,
    /// The guest broke the rules of the uplink too often.
    Garbage,
}

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The wait for the descriptors.
    #[error("wait for the relay's descriptors")]
    Poll(#[source] io::Error),
    /// The uplink.
    #[error("use the uplink")]
    Uplink(#[source] io::Error),
    /// The channel to kontord.
    #[error("use the channel to kontord")]
    Control(#[source] io::Error),
    /// What came on it.
    #[error("read what kontord says")]
    Message(#[from] MessageError),
    /// The table in it.
    #[error("take the table of gateways")]
    Table(#[from] TableError),
}

/// The relay of one virtual machine.
#[derive(Debug)]
pub struct Relay {
    uplink: Uplink,
    control: OwnedFd,
    table: Table,
    up: UpPath,
    down: DownPath,
    /// The gateway whose socket has no room for what the guest sent last.
    blocked: Option<GatewayId>,
    started: Instant,
}

/// What one `poll` found.
struct Found {
    control: bool,
    uplink: bool,
    uplink_closed: bool,
}

impl Relay {
    /// A relay whose table is empty.
    #[must_use]
    pub fn new(wires: Wires, limits: Limits) -> Self {
        let Wires { uplink, control } = wires;
        let frame_max = match &uplink {
            Uplink::Stream(_) => MAX_FRAME,
            Uplink::Ethernet(_) => MAX_FRAME_VFIO,
        };
        Self {
            uplink,
            control,
            table: Table::default(),
            up: UpPath::new(&limits),
            down: DownPath::new(frame_max),
            blocked: None,
            started: Instant::now(),
        }
    }

    /// Runs until kontord, the guest or an error ends it. Its last word are its counters.
    ///
    /// # Errors
    /// [`RelayError`] when a descriptor fails, or kontord says what is no message.
    pub fn run(mut self) -> Result<End, RelayError> {
        self.say(&FromRelay::Ready)?;
        let end = self.forward()?;
        self.report()?;
        Ok(end)
    }

    fn forward(&mut self) -> Result<End, RelayError> {
        loop {
            let found = self.wait()?;
            if found.control
                && let Some(end) = self.listen()?
            {
                return Ok(end);
            }
            if found.uplink || self.blocked.is_some() {
                if let Some(end) = self.forward_up()? {
                    return Ok(end);
                }
                if found.uplink_closed && self.blocked.is_some() {
                    return Ok(End::UplinkClosed);
                }
            }
            self.down.receive(DATAGRAMS_PER_TURN, &self.table);
            let flushed = match &mut self.uplink {
                Uplink::Stream(stream) => self.down.flush(stream),
                Uplink::Ethernet(socket) => self.down.flush_ethernet(socket),
            };
            match flushed {
                Ok(()) => {}
                Err(error) if gone(&error) => return Ok(End::UplinkClosed),
                Err(error) => return Err(RelayError::Uplink(error)),
            }
        }
    }

    fn wait(&self) -> Result<Found, RelayError> {
        let when = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
        let uplink = when(self.blocked.is_none(), PollFlags::IN) | when(self.down.waiting(), PollFlags::OUT);
        let mut links = self.table.links().map(|link| {
            let room = when(self.blocked == Some(link.gateway), PollFlags::OUT);
            PollFd::new(&link.socket, PollFlags::IN | room)
        });
        let mut fds: [_; POLLED_MAX] = std::array::from_fn(|at| match at {
            0 => PollFd::new(&self.control, PollFlags::IN),
            1 => PollFd::new(&self.uplink, uplink),
            // poll takes a slice: behind the last socket it is cut off.
            _ => links.next().unwrap_or(PollFd::new(&self.control, PollFlags::empty())),
        });
        let count = 2 + self.table.links().count();
        match poll(&mut fds[..count], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(RelayError::Poll(errno.into())),
        }
        let closed = PollFlags::HUP | PollFlags::ERR;
        Ok(Found {
            control: !fds[0].revents().is_empty(),
            uplink: fds[1].revents().intersects(PollFlags::IN | closed),
            uplink_closed: fds[1].revents().intersects(closed),
        })
    }

    fn listen(&mut self) -> Result<Option<End>, RelayError> {
        let mut packet = [0; MAX_MESSAGE + 1];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_GATEWAYS))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.control, &mut [IoSliceMut::new(&mut packet)], &mut rights, flags);
        let length = match received.map(|message| message.bytes) {
            Ok(0) | Err(Errno::CONNRESET) => return Ok(Some(End::Shutdown)),
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(RelayError::Control(errno.into())),
        };
        match message::decode(&packet[..length])? {
            FromDaemon::Gateways(gateways) => {
                let mut sockets = Vec::with_capacity(MAX_GATEWAYS);
                for message in rights.drain() {
                    if let RecvAncillaryMessage::ScmRights(handed) = message {
                        sockets.extend(handed);
                    }
                }
                self.table = Table::new(&gateways, sockets)?;
            }
            FromDaemon::Report => self.report()?,
            FromDaemon::Shutdown => return Ok(Some(End::Shutdown)),
        }
        Ok(None)
    }

    fn forward_up(&mut self) -> Result<Option<End>, RelayError> {
        let now = self.started.elapsed();
        let table = &self.table;
        let turn = match &mut self.uplink {
            Uplink::Stream(stream) => self.up.turn(stream, READS_PER_TURN, table, now),
            Uplink::Ethernet(socket) => self.up.turn_ethernet(socket, FRAMES_PER_TURN, table, now),
        };
        self.blocked = None;
        match turn.map_err(RelayError::Uplink)? {
            Turn::Drained => Ok(None),
            Turn::Blocked(gateway) => {
                self.blocked = Some(gateway);
                Ok(None)
            }
            Turn::Closed => Ok(Some(End::UplinkClosed)),
            Turn::Garbage(words) => {
                self.say(&FromRelay::Garbage(words))?;
                Ok(Some(End::Garbage))
            }
        }
    }

    fn report(&self) -> Result<(), RelayError> {
        self.say(&FromRelay::Counters(Counters { up: self.up.counters(), down: self.down.counters() }))
    }

    /// Speaks to kontord; what does not fit its queue is lost, because the relay waits for nobody.
    fn say(&self, what: &FromRelay) -> Result<(), RelayError> {
        let packet = message::encode(what)?;
        match send(self.control.as_fd(), &packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(errno) => Err(RelayError::Control(errno.into())),
        }
    }
}

fn gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected)
}
