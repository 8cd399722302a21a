//! The one way out of the work VM, whichever device it is.

mod port;

pub(crate) use port::Port;

use kontor_wire::uplink::GatewayId;
use std::io;
use std::os::fd::BorrowedFd;

/// Whether there may be more to do without waiting for an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    /// Stopped at the batch's end.
    More,
    /// Nothing is left until the next event.
    None,
}

/// Datagrams to and from gateways. Nothing here blocks.
pub(crate) trait Uplink {
    /// Hands datagrams that have come to `take`, about a batch of them.
    fn recv_batch(&mut self, take: &mut dyn FnMut(GatewayId, &[u8])) -> io::Result<Rest>;

    /// Whether a datagram of any length may be queued now.
    fn has_room(&self) -> bool;

    /// Queues a datagram; drops and counts it when there is no room.
    fn push(&mut self, to: GatewayId, datagram: &[u8]);

    /// Sends what is queued, as far as the device takes it.
    fn send_batch(&mut self) -> io::Result<()>;

    /// What to wait on, for each change once: datagrams came, or the device takes some again.
    fn readable(&self) -> BorrowedFd<'_>;

    /// What was lost.
    fn losses(&self) -> Losses;
}

/// What was lost at the uplink since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Losses {
    /// Datagrams that found no room, or that no frame can carry.
    pub(crate) dropped: u64,
    /// Frames from the host that break a rule.
    pub(crate) malformed: u64,
}
