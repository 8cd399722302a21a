//! The data path: a thread for each direction, and one lock around what both need.
//!
//! ```text
//!  main: UDP ─► trains ─► [tunnel ─► judge, up] ─► runs of a flow ─► TUN
//!        a signal ─► the end    a wake ─► [what others asked of the judge]    [timers]
//!  down: TUN ─► packets ─► [judge, down ─► tunnel] ─► trains ─► UDP          [ ]: under the lock
//! ```
//!
//! A thread takes what its descriptor has, up to a batch, holds the lock once for all of it, and hands the result to
//! the kernel in as few calls as it can. So a peer's packets stay in order, and neither direction waits for a
//! system call of the other. What a socket or the TUN does not take is dropped and counted: whoever sent it sends it again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kontor_trust::DeviceId;
use kontor_tun::{Coalescer, HEADER_LEN, Offloads, Segments};
use kontor_vpn::{AddPeerError, DATAGRAM_MAX, DropReason, PeerId, Tunnel};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::filter::{self, Direction, Pools, Refusal};
use crate::office::Admission;
use crate::peers::Peers;
use crate::socket::{Endpoint, Sockets, TRAIN_LEN_MAX, TRAIN_MAX};
use crate::sys::Inbox;

/// Who decides about packets and peers. Held together with the tunnel, so that both are of one mind.
pub(crate) trait Judge: Send {
    /// Whether a packet to or from a peer passes. Of several with the same headers it may be asked once.
    fn check(&self, peer: PeerId, packet: &[u8], direction: Direction) -> Result<(), Refusal>;

    /// Does what others asked for and what is due; says when it wants to be called again.
    fn tend(&mut self, tunnel: &mut Tunnel<Endpoint>) -> io::Result<Option<Duration>>;
}

/// What the threads of admission and post ask of the data path.
pub(crate) enum Order {
    /// Make a peer, and say how that went.
    Admit(Box<Admission>, SyncSender<Result<(), AddPeerError>>),
    /// Remove a device's peer.
    Remove(DeviceId),
    /// The post has answered the peer with this boot key: open its line's table, and say when that is done.
    Open(DeviceId, [u8; 32], SyncSender<()>),
}

/// The judge of an office: leases make peers, and their lines' tables say what passes.
pub(crate) struct Leases {
    pub(crate) peers: Peers,
    pub(crate) pools: Pools,
    /// Of each thread that may order.
    pub(crate) orders: Vec<Receiver<Order>>,
}

impl Judge for Leases {
    fn check(&self, peer: PeerId, packet: &[u8], direction: Direction) -> Result<(), Refusal> {
        // A peer of the tunnel is one of these, too.
        let passage = self.peers.passage(peer).ok_or(Refusal::BeforeHello)?;
        filter::check(packet, direction, &self.pools, passage)
    }

    fn tend(&mut self, tunnel: &mut Tunnel<Endpoint>) -> io::Result<Option<Duration>> {
        self.expire(tunnel);
        for way in 0..self.orders.len() {
            loop {
                match self.orders[way].try_recv() {
                    Err(TryRecvError::Empty) => break,
                    // A gateway that can admit nobody is better started again.
                    Err(TryRecvError::Disconnected) => {
                        return Err(io::Error::other("the thread of admission or of the post is gone"));
                    }
                    Ok(order) => self.carry_out(order, tunnel),
                }
            }
        }
        Ok(self.peers.next_end().map(until_unix))
    }
}

impl Leases {
    fn expire(&mut self, tunnel: &mut Tunnel<Endpoint>) {
        let expired = self.peers.expire(tunnel, unix_now());
        if expired > 0 {
            tracing::info!(expired, peers = self.peers.len(), "peers removed");
        }
    }

    fn carry_out(&mut self, order: Order, tunnel: &mut Tunnel<Endpoint>) {
        match order {
            Order::Admit(admission, answer) => {
                self.expire(tunnel);
                let result = self.peers.admit(*admission, tunnel, Instant::now(), unix_now());
                // Whoever asked may have stopped waiting; the peer is made all the same.
                let _ = answer.send(result);
            }
            Order::Remove(device) => {
                self.peers.remove_device(&device, tunnel);
            }
            Order::Open(device, boot_key, answer) => {
                self.peers.open(&device, &boot_key);
                let _ = answer.send(());
            }
        }
    }
}

/// Everything that the data path holds.
pub(crate) struct Plane<J> {
    core: Mutex<Core<J>>,
    /// Each thread uses those that there are when it begins a batch.
    sockets: Mutex<Arc<Sockets>>,
    tun: OwnedFd,
    offloads: Offloads,
    /// An eventfd, written when there is something for the judge, or new peers.
    pub(crate) wake: OwnedFd,
    /// Readable when this process shall end.
    signals: OwnedFd,
}

/// What both directions need, and whoever else makes peers.
pub(crate) struct Core<J> {
    pub(crate) tunnel: Tunnel<Endpoint>,
    pub(crate) judge: J,
    counts: Counts,
}

/// What went no further, beside what the tunnel counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    up: [u64; Refusal::ALL.len()],
    down: [u64; Refusal::ALL.len()],
    /// The kernel took no packet, or no datagram.
    tun_full: u64,
    send_failed: u64,
    receive_failed: u64,
    /// What came from the interface was no packet.
    malformed: u64,
}

impl<J: Judge> Plane<J> {
    /// Joins an interface with its `offloads`, whose descriptor does not block, to sockets by a tunnel.
    pub(crate) fn new(
        tunnel: Tunnel<Endpoint>,
        judge: J,
        sockets: Sockets,
        (tun, offloads): (OwnedFd, Offloads),
        wake: OwnedFd,
        signals: OwnedFd,
    ) -> Self {
        let core = Mutex::new(Core { tunnel, judge, counts: Counts::default() });
        let sockets = Mutex::new(Arc::new(sockets));
        Self { core, sockets, tun, offloads, wake, signals }
    }

    /// The tunnel and its judge. Neither direction goes on while this is held.
    pub(crate) fn core(&self) -> MutexGuard<'_, Core<J>> {
        // Whoever panicked has ended the process, or did so in a test.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other sockets from now on, in the same order. Whoever calls this rings [`Self::wake`].
    pub(crate) fn rebind(&self, sockets: Sockets) {
        *self.sockets.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(sockets);
    }

    fn sockets(&self) -> Arc<Sockets> {
        Arc::clone(&self.sockets.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs until a signal arrives.
    pub(crate) fn run(&self) -> io::Result<()> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (stop, stopped) = (rustix::event::eventfd(0, flags)?, rustix::event::eventfd(0, flags)?);
        std::thread::scope(|scope| {
            let down = std::thread::Builder::new().name("down".to_owned()).spawn_scoped(scope, || {
                let result = self.down(stop.as_fd());
                ring(&stopped)?;
                result
            })?;
            let result = self.up(stopped.as_fd());
            ring(&stop)?;
            let down =
                down.join().unwrap_or_else(|_| Err(io::Error::other("the thread to the peers panicked")));
            result.and(down)
        })
    }

    /// Datagrams to packets, timers, and whatever is asked.
    fn up(&self, stopped: BorrowedFd<'_>) -> io::Result<()> {
        let mut up = Up::new(self.offloads);
        let mut next_report = Instant::now() + REPORT_INTERVAL;
        let mut ready = Ready::default();
        loop {
            let (now, sockets) = (Instant::now(), self.sockets());
            let mut left = next_report.saturating_duration_since(now);
            {
                let mut core = self.core();
                let Core { tunnel, judge, .. } = &mut *core;
                left = judge.tend(tunnel)?.into_iter().fold(left, Duration::min);
                tunnel.handle_timers(now);
                let due = tunnel.next_timeout().map(|due| due.saturating_duration_since(now));
                left = due.into_iter().fold(left, Duration::min);
                Self::transmit(&sockets, &mut core);
                if next_report <= now {
                    next_report = now + REPORT_INTERVAL;
                    tracing::debug!(drops = %core.drops(), "still here");
                }
            }
            if !ready.again {
                ready = self.wait(&sockets, stopped, left)?;
            }
            if ready.end {
                return Ok(());
            }
            if ready.wake {
                silence(&self.wake)?;
            }
            ready.again = false;
            for socket in 0..crate::config::LISTEN_MAX {
                if ready.sockets >> socket & 1 == 1 {
                    ready.again |= self.receive(&sockets, socket, &mut up);
                }
            }
        }
    }

    fn wait(&self, sockets: &Sockets, stopped: BorrowedFd<'_>, left: Duration) -> io::Result<Ready> {
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds: Vec<_> = [self.signals.as_fd(), stopped, self.wake.as_fd()]
            .into_iter()
            .chain(sockets.fds())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let end = is_ready(&fds[0]) || is_ready(&fds[1]);
        let mut ready = Ready { end, wake: is_ready(&fds[2]), ..Ready::default() };
        for (socket, fd) in fds[3..].iter().enumerate() {
            ready.sockets |= u32::from(is_ready(fd)) << socket;
        }
        Ok(ready)
    }

    /// Datagrams of one socket, to the TUN. Whether there may be more.
    fn receive(&self, sockets: &Sockets, socket: usize, up: &mut Up) -> bool {
        let Up { inbox, arena, coalescer } = up;
        if let Err(error) = sockets.receive(socket, inbox) {
            // A socket reports here what an earlier datagram met (an ICMP message).
            if error.kind() != io::ErrorKind::WouldBlock {
                self.core().counts.receive_failed += 1;
            }
            return false;
        }
        let now = Instant::now();
        for train in inbox.trains() {
            let mut core = self.core();
            let Core { tunnel, judge, counts } = &mut *core;
            let from = Endpoint { socket, address: train.from };
            let mut at = 0;
            for datagram in train.bytes.chunks(train.segment) {
                let Some(out) = arena[at..].first_chunk_mut::<DATAGRAM_MAX>() else { break };
                let Ok(Some(received)) = tunnel.handle_datagram(from, datagram, out, now) else { continue };
                let (peer, len) = (received.peer, received.packet.len());
                match judge.check(peer, received.packet, Direction::Up) {
                    Ok(()) => {
                        coalescer.push(arena, at, at + len);
                        at += DATAGRAM_MAX;
                    }
                    Err(refusal) => {
                        counts.up[refusal as usize] += 1;
                        tracing::trace!(reason = refusal.name(), "a packet from a peer is refused");
                    }
                }
            }
            Self::transmit(sockets, &mut core);
            drop(core);
            let mut full = 0;
            coalescer.flush(arena, |parts| {
                full += u64::from(rustix::io::writev(&self.tun, parts).is_err());
            });
            if full > 0 {
                self.core().counts.tun_full += full;
            }
        }
        inbox.is_full()
    }

    /// Packets to datagrams.
    fn down(&self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let mut down = Down::new();
        loop {
            let mut fds = [self.tun.as_fd(), stop].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
            while down.read(&self.tun)? {
                let sockets = self.sockets();
                self.seal(&sockets, &mut down);
                let failed = down.send(&sockets);
                if failed > 0 {
                    self.core().counts.send_failed += failed;
                }
            }
        }
    }

    /// Makes datagrams of what was read.
    fn seal(&self, sockets: &Sockets, down: &mut Down) {
        let now = Instant::now();
        let mut core = self.core();
        let Core { tunnel, judge, counts } = &mut *core;
        let Down { frames, ends, packet, sealed } = down;
        let mut start = 0;
        for end in ends.drain(..) {
            let frame = &frames[start..end];
            start = end;
            let Ok(mut segments) = Segments::parse(frame) else {
                counts.malformed += 1;
                continue;
            };
            let whole = segments.whole();
            // A packet for nobody passes: the tunnel counts it.
            let peer = filter::destination(whole).map(|to| tunnel.peer_by_address(to));
            let passed = match peer {
                Ok(Some(peer)) => judge.check(peer, whole, Direction::Down),
                Ok(None) => Ok(()),
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = passed {
                counts.down[refusal as usize] += 1;
                tracing::trace!(reason = refusal.name(), "a packet to a peer is refused");
                continue;
            }
            while let Some(len) = segments.write_next(packet) {
                let Some(out) = sealed.room() else { break };
                if let Ok(Some(transmit)) = tunnel.handle_packet(&packet[..len], out, now) {
                    sealed.push(transmit.to, transmit.len);
                }
            }
        }
        // Handshakes that the packets asked for.
        Self::transmit(sockets, &mut core);
    }

    /// Sends what is no packet's own.
    fn transmit(sockets: &Sockets, core: &mut Core<J>) {
        let mut out = [0; DATAGRAM_MAX];
        while let Some(transmit) = core.tunnel.poll_transmit(&mut out) {
            if sockets.send(transmit.to, &out[..transmit.len]).is_err() {
                core.counts.send_failed += 1;
            }
        }
    }
}

impl<J> Core<J> {
    /// What was dropped by whom for which reason, as far as there is any.
    pub(crate) fn drops(&self) -> String {
        let tunnel = self.tunnel.drops().iter().map(|(reason, count)| (reason.name(), count));
        let refused =
            |counts: [u64; Refusal::ALL.len()]| Refusal::ALL.map(Refusal::name).into_iter().zip(counts);
        let kernel = [
            ("tun_full", self.counts.tun_full),
            ("send_failed", self.counts.send_failed),
            ("receive_failed", self.counts.receive_failed),
            ("tun_malformed", self.counts.malformed),
        ];
        let text = |which: &str, counts: &mut dyn Iterator<Item = (&'static str, u64)>| {
            counts
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| format!("{which}{name}={count} "))
                .collect()
        };
        let all: [String; 4] = [
            text("", &mut { tunnel }),
            text("up_", &mut refused(self.counts.up)),
            text("down_", &mut refused(self.counts.down)),
            text("", &mut kernel.into_iter()),
        ];
        all.concat().trim_end().to_owned()
    }
}

/// What the way up works with.
struct Up {
    inbox: Inbox,
    /// The packets of one train, each in a place of its own.
    arena: Box<[u8]>,
    coalescer: Coalescer,
}

impl Up {
    fn new(offloads: Offloads) -> Self {
        let arena = vec![0; TRAIN_MAX * DATAGRAM_MAX].into_boxed_slice();
        Self { inbox: Inbox::new(), arena, coalescer: Coalescer::new(offloads, TRAIN_MAX) }
    }
}

/// What the way down works with.
struct Down {
    /// What was read, one frame behind the other, and where each ends.
    frames: Box<[u8]>,
    ends: Vec<usize>,
    /// One packet of a frame.
    packet: Box<[u8]>,
    sealed: Sealed,
}

/// Datagrams, one behind the other.
struct Sealed {
    bytes: Box<[u8]>,
    len: usize,
    trains: Vec<Train>,
}

/// Datagrams that leave in one call.
struct Train {
    to: Endpoint,
    start: usize,
    end: usize,
    /// Bytes of each, but that the last may be shorter.
    segment: usize,
    count: usize,
}

impl Down {
    fn new() -> Self {
        let buffer = |len: usize| vec![0; len].into_boxed_slice();
        let sealed = Sealed { bytes: buffer(SEALED_MAX), len: 0, trains: Vec::new() };
        let ends = Vec::with_capacity(FRAMES_MAX);
        Self { frames: buffer(FRAMES_LEN), ends, packet: buffer(FRAME_MAX), sealed }
    }

    /// Reads what there is, up to a batch. Whether there was anything.
    fn read(&mut self, tun: &OwnedFd) -> io::Result<bool> {
        let mut at = 0;
        while self.ends.len() < FRAMES_MAX && FRAMES_LEN - at >= FRAME_MAX {
            match rustix::io::read(tun, &mut self.frames[at..at + FRAME_MAX]) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
                Ok(len) => {
                    at += len;
                    self.ends.push(at);
                }
                Err(rustix::io::Errno::INTR) => {}
                // The interface was taken away or down: nothing here works without it.
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(!self.ends.is_empty())
    }

    /// Sends every train, and says how many datagrams the kernel did not take.
    fn send(&mut self, sockets: &Sockets) -> u64 {
        let Sealed { bytes, len, trains } = &mut self.sealed;
        *len = 0;
        let send = |train: Train| sockets.send_train(train.to, &bytes[train.start..train.end], train.segment);
        trains.drain(..).map(send).sum()
    }
}

impl Sealed {
    /// Where the next datagram goes; `None` when no more fits.
    fn room(&mut self) -> Option<&mut [u8; DATAGRAM_MAX]> {
        self.bytes.get_mut(self.len..)?.first_chunk_mut()
    }

    /// Takes the datagram of `len` bytes that was written where [`Self::room`] said.
    fn push(&mut self, to: Endpoint, len: usize) {
        let (start, end) = (self.len, self.len + len);
        self.len = end;
        if let Some(train) = self.trains.last_mut() {
            let is_open = train.end - train.start == train.segment * train.count;
            let fits = train.count < TRAIN_MAX && end - train.start <= TRAIN_LEN_MAX;
            if train.to == to && is_open && fits && len <= train.segment {
                train.end = end;
                train.count += 1;
                return;
            }
        }
        self.trains.push(Train { to, start, end, segment: len, count: 1 });
    }
}

/// What there is to do.
#[derive(Default)]
struct Ready {
    end: bool,
    wake: bool,
    /// By number of the socket.
    sockets: u32,
    /// One of them had more than a batch.
    again: bool,
}

/// Writes an eventfd.
pub(crate) fn ring(event: &OwnedFd) -> io::Result<()> {
    match rustix::io::write(event, &1_u64.to_ne_bytes()) {
        // It is as loud as can be.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn silence(event: &OwnedFd) -> io::Result<()> {
    match rustix::io::read(event, &mut [0; 8]) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The wall clock, in Unix seconds.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// How long until the wall clock shows `unix_s`.
fn until_unix(unix_s: u64) -> Duration {
    let end = UNIX_EPOCH.checked_add(Duration::from_secs(unix_s));
    end.and_then(|end| end.duration_since(SystemTime::now()).ok()).unwrap_or_default()
}

/// Most bytes of what is read from the interface at once: its header and an IP packet.
const FRAME_MAX: usize = HEADER_LEN + 65_535;
/// Most of them in a batch, and bytes of all: one that is as long as can be still fits behind two such.
const FRAMES_MAX: usize = 64;
const FRAMES_LEN: usize = 3 * FRAME_MAX;
/// Bytes of a batch's datagrams: as many as can be made of what was read. Segments of a few bytes each would be more;
/// those that do not fit are lost.
const SEALED_MAX: usize = 2 * FRAMES_LEN;
/// Between two lines on what was dropped.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

const _: () = assert!(crate::config::LISTEN_MAX <= u32::BITS as usize);
const _: () = assert!(DropReason::ALL.len() < 64);
