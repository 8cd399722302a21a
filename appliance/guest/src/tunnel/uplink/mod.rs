//! The one way out of the work VM, whichever device it is: a virtio-serial [`Port`], or a network device
//! behind an IOMMU that this process drives itself ([`open_vfio`]).

#[cfg(test)]
mod fake;
mod net;
mod port;
mod ring;
mod vfio;

pub(crate) use port::Port;
pub(crate) use vfio::{Vfio, VfioError, open as open_vfio};

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
    /// Takes up work, once, after every power is given up and before anything else is asked of it.
    fn begin(&mut self) -> io::Result<()> {
        Ok(())
    }

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
