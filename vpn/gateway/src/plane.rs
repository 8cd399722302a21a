//! The data path: one thread that turns datagrams into packets and back, and holds all peers.
//!
//! ```text
//!  UDP ─► tunnel ─► source = peer's own ─► table, up ─► TUN
//!  TUN ─► peer by destination ─► table, down ─► tunnel ─► UDP
//!  orders (admission's thread, post's) ─► peers    a signal ─► the end
//! ```
//!
//! It never waits but in `poll`, and reads each descriptor until it has no more, or until a batch is full. What
//! a socket or the TUN does not take at once is dropped and counted: whoever sent it sends it again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kontor_trust::DeviceId;
use kontor_vpn::{AddPeerError, DATAGRAM_MAX, DropReason, Transmit, Tunnel};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::filter::{self, Direction, Pools, Refusal};
use crate::office::Admission;
use crate::peers::Peers;
use crate::socket::{Endpoint, Sockets};

/// What the threads of admission and post ask of this one.
pub(crate) enum Order {
    /// Make a peer, and say how that went.
    Admit(Box<Admission>, SyncSender<Result<(), AddPeerError>>),
    /// Remove a device's peer.
    Remove(DeviceId),
    /// The post has answered the peer with this boot key: open its line's table, and say when that is done.
    Open(DeviceId, [u8; 32], SyncSender<()>),
}

/// Everything that the data path holds.
pub(crate) struct Plane {
    pub(crate) tunnel: Tunnel<Endpoint>,
    pub(crate) peers: Peers,
    pub(crate) pools: Pools,
    pub(crate) sockets: Sockets,
    pub(crate) tun: OwnedFd,
    /// Of each thread that may order.
    pub(crate) orders: Vec<Receiver<Order>>,
    /// An eventfd, written after each order, and when one of those threads has ended.
    pub(crate) wake: OwnedFd,
    /// Readable when this process shall end.
    pub(crate) signals: OwnedFd,
    pub(crate) counts: Counts,
}

/// What went no further, beside what the tunnel counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    up: [u64; Refusal::ALL.len()],
    down: [u64; Refusal::ALL.len()],
    /// The kernel took no packet, or no datagram.
    tun_full: u64,
    send_failed: u64,
    receive_failed: u64,
}

impl Plane {
    /// Runs until a signal arrives.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut datagram = [0; DATAGRAM_MAX + 1];
        let mut out = [0; DATAGRAM_MAX];
        let mut next_report = Instant::now() + REPORT_INTERVAL;
        loop {
            let now = Instant::now();
            self.expire();
            self.tunnel.handle_timers(now);
            self.transmit(&mut out);
            if next_report <= now {
                next_report = now + REPORT_INTERVAL;
                tracing::debug!(peers = self.peers.len(), drops = %self.drops(), "still here");
            }
            let ready = self.wait(next_report)?;
            if ready.signal {
                return Ok(());
            }
            if ready.orders {
                self.awake()?;
            }
            self.obey()?;
            let now = Instant::now();
            for socket in ready.sockets() {
                self.receive(socket, &mut datagram, &mut out, now);
                self.transmit(&mut out);
            }
            if ready.tun {
                self.forward(&mut datagram, &mut out, now)?;
                self.transmit(&mut out);
            }
        }
    }

    /// What was dropped by whom for which reason, as far as there is any.
    pub(crate) fn drops(&self) -> String {
        let tunnel = self.tunnel.drops().iter().map(|(reason, count)| (reason.name(), count));
        let refused =
            |counts: [u64; Refusal::ALL.len()]| Refusal::ALL.map(Refusal::name).into_iter().zip(counts);
        let kernel = [
            ("tun_full", self.counts.tun_full),
            ("send_failed", self.counts.send_failed),
            ("receive_failed", self.counts.receive_failed),
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

    fn wait(&self, next_report: Instant) -> io::Result<Ready> {
        let now = Instant::now();
        let until_end = self.peers.next_end().map(until_unix);
        let timeout = self
            .tunnel
            .next_timeout()
            .map(|due| due.saturating_duration_since(now))
            .into_iter()
            .chain(until_end)
            .fold(next_report.saturating_duration_since(now), Duration::min);
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let mut fds: Vec<_> = [self.signals.as_fd(), self.wake.as_fd(), self.tun.as_fd()]
            .into_iter()
            .chain(self.sockets.fds())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let mut ready = Ready {
            signal: is_ready(&fds[0]),
            orders: is_ready(&fds[1]),
            tun: is_ready(&fds[2]),
            sockets: 0,
        };
        for (socket, fd) in fds[3..].iter().enumerate() {
            ready.sockets |= u32::from(is_ready(fd)) << socket;
        }
        Ok(ready)
    }

    fn expire(&mut self) {
        let expired = self.peers.expire(&mut self.tunnel, unix_now());
        if expired > 0 {
            tracing::info!(expired, peers = self.peers.len(), "peers removed");
        }
    }

    fn awake(&self) -> io::Result<()> {
        match rustix::io::read(&self.wake, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn obey(&mut self) -> io::Result<()> {
        for way in 0..self.orders.len() {
            loop {
                match self.orders[way].try_recv() {
                    Err(TryRecvError::Empty) => break,
                    // A gateway that can admit nobody is better started again.
                    Err(TryRecvError::Disconnected) => {
                        return Err(io::Error::other("the thread of admission or of the post is gone"));
                    }
                    Ok(order) => self.carry_out(order),
                }
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Admit(admission, answer) => {
                self.expire();
                let result = self.peers.admit(*admission, &mut self.tunnel, Instant::now(), unix_now());
                // Whoever asked may have stopped waiting; the peer is made all the same.
                let _ = answer.send(result);
            }
            Order::Remove(device) => {
                self.peers.remove_device(&device, &mut self.tunnel);
            }
            Order::Open(device, boot_key, answer) => {
                self.peers.open(&device, &boot_key);
                let _ = answer.send(());
            }
        }
    }

    /// Datagrams of one socket, to the TUN.
    fn receive(
        &mut self,
        socket: usize,
        datagram: &mut [u8; DATAGRAM_MAX + 1],
        out: &mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) {
        for _ in 0..BATCH {
            let (from, len) = match self.sockets.receive(socket, datagram) {
                Ok(Some(received)) => received,
                Ok(None) => return,
                Err(_) => {
                    self.counts.receive_failed += 1;
                    continue;
                }
            };
            let Ok(Some(received)) = self.tunnel.handle_datagram(from, &datagram[..len], out, now) else {
                continue;
            };
            let Some(passage) = self.peers.passage(received.peer) else {
                continue;
            };
            match filter::check(received.packet, Direction::Up, &self.pools, passage) {
                Ok(()) if rustix::io::write(&self.tun, received.packet).is_err() => self.counts.tun_full += 1,
                Ok(()) => {}
                Err(refusal) => {
                    self.counts.up[refusal as usize] += 1;
                    tracing::trace!(reason = refusal.name(), "a packet from a peer is refused");
                }
            }
        }
    }

    /// Packets of the TUN, to the peers.
    fn forward(
        &mut self,
        packet: &mut [u8; DATAGRAM_MAX + 1],
        out: &mut [u8; DATAGRAM_MAX],
        now: Instant,
    ) -> io::Result<()> {
        for _ in 0..BATCH {
            let len = match rustix::io::read(&self.tun, &mut packet[..]) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Ok(len) => len,
                Err(rustix::io::Errno::INTR) => continue,
                // The interface was taken away or down: nothing here works without it.
                Err(errno) => return Err(errno.into()),
            };
            let packet = &packet[..len];
            if let Err(refusal) = self.check_down(packet) {
                self.counts.down[refusal as usize] += 1;
                tracing::trace!(reason = refusal.name(), "a packet to a peer is refused");
                continue;
            }
            if let Ok(Some(transmit)) = self.tunnel.handle_packet(packet, out, now) {
                self.send(transmit, out);
            }
        }
        Ok(())
    }

    /// A packet for nobody passes: the tunnel counts it.
    fn check_down(&self, packet: &[u8]) -> Result<(), Refusal> {
        let destination = filter::destination(packet)?;
        match self.tunnel.peer_by_address(destination).and_then(|peer| self.peers.passage(peer)) {
            Some(passage) => filter::check(packet, Direction::Down, &self.pools, passage),
            None => Ok(()),
        }
    }

    fn transmit(&mut self, out: &mut [u8; DATAGRAM_MAX]) {
        while let Some(transmit) = self.tunnel.poll_transmit(out) {
            self.send(transmit, out);
        }
    }

    fn send(&mut self, transmit: Transmit<Endpoint>, out: &[u8; DATAGRAM_MAX]) {
        if self.sockets.send(transmit.to, &out[..transmit.len]).is_err() {
            self.counts.send_failed += 1;
        }
    }
}

/// Which descriptors have something to say.
struct Ready {
    signal: bool,
    orders: bool,
    tun: bool,
    /// By number of the socket.
    sockets: u32,
}

impl Ready {
    fn sockets(&self) -> impl Iterator<Item = usize> + use<> {
        let sockets = self.sockets;
        (0..crate::config::LISTEN_MAX).filter(move |socket| sockets >> socket & 1 == 1)
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

/// Most datagrams or packets of one descriptor before the others are looked at.
const BATCH: usize = 64;
/// Between two lines on what was dropped.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

const _: () = assert!(crate::config::LISTEN_MAX <= u32::BITS as usize);
const _: () = assert!(DropReason::ALL.len() < 64);
