//! One virtqueue and the buffers that go through it.
//!
//! ```text
//!   free ──send, offer──► in flight (known by the descriptor's number) ──take──► free
//! ```
//!
//! The crate's queue believes what the device writes into the used ring: a number out of range makes it
//! panic, one that is not in flight or comes twice corrupts its list of free descriptors, and a length is
//! passed on as it stands. So each number is looked up in a table that the device cannot reach before the
//! queue hears of it, a length beyond the buffer is no length, and what a buffer holds is copied out
//! before it is read, because the device could still change it.
//!
//! The `unsafe` here rests on this: a buffer lies in memory that only this ring hands out, is either free
//! or in flight, and while it is in flight no reference to it exists.

use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};

/// Buffers of a ring, and descriptors of its queue. QEMU's network device offers so many.
pub(super) const SIZE: usize = 256;
/// Bytes of a buffer: one datagram with every header fits, see the driver.
pub(super) const BUFFER: usize = 2048;

/// What the device did that no device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingFault {
    #[error("the device refuses queue {0}")]
    Refused(u16),
    #[error("the device gives back descriptor {0}, which it does not have")]
    NotInFlight(u16),
    #[error("the device changed the used ring while it was read")]
    Changed,
    #[error("the queue takes no buffer though one is free")]
    Full,
}

/// Which way the buffers of a ring go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// The device writes them.
    In,
    /// The device reads them.
    Out,
}

/// A buffer that the device gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Used {
    slot: usize,
    /// Bytes that the device claims to have written.
    pub(super) len: u32,
}

/// One queue.
pub(super) struct Ring<H: Hal> {
    queue: VirtQueue<H, SIZE>,
    index: u16,
    way: Way,
    /// [`SIZE`] buffers of [`BUFFER`] bytes, one behind the other.
    memory: NonNull<u8>,
    /// Which buffer each descriptor has, if the device has it.
    in_flight: [Option<usize>; SIZE],
    /// Buffers that nobody uses, the ones used last first.
    free: Vec<usize>,
    /// Whether the device was not told yet of what it was given.
    unannounced: bool,
}

impl<H: Hal> Ring<H> {
    /// Sets queue `index` up on a device whose features are agreed on.
    pub(super) fn new(transport: &mut impl Transport, index: u16, way: Way) -> Result<Self, RingFault> {
        let refused = |_| RingFault::Refused(index);
        // Neither indirect descriptors nor event indices: the crate's are broken.
        let queue = VirtQueue::new(transport, index, false, false).map_err(refused)?;
        let direction = match way {
            Way::In => BufferDirection::DeviceToDriver,
            Way::Out => BufferDirection::DriverToDevice,
        };
        let (address, memory) = H::dma_alloc(SIZE * BUFFER / PAGE_SIZE, direction);
        if address == 0 {
            return Err(RingFault::Refused(index));
        }
        let free = (0..SIZE).rev().collect();
        Ok(Self { queue, index, way, memory, in_flight: [None; SIZE], free, unannounced: false })
    }

    /// How many buffers are free.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Hands every free buffer to the device, for it to write.
    pub(super) fn offer(&mut self) -> Result<(), RingFault> {
        while let Some(slot) = self.free.pop() {
            self.hand_over(slot, BUFFER)?;
        }
        Ok(())
    }

    /// Hands `parts`, one behind the other, to the device in one buffer. `false` when none is free or
    /// they do not fit.
    pub(super) fn send(&mut self, parts: &[&[u8]]) -> Result<bool, RingFault> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length == 0 || length > BUFFER {
            return Ok(false);
        }
        let Some(slot) = self.free.pop() else { return Ok(false) };
        let mut rest = self.buffer(slot, length);
        for part in parts {
            let (here, behind) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            rest = behind;
        }
        self.hand_over(slot, length)?;
        Ok(true)
    }

    fn hand_over(&mut self, slot: usize, length: usize) -> Result<(), RingFault> {
        let buffer = self.buffer_detached(slot, length);
        let added = match self.way {
            // SAFETY: the buffer is valid for as long as the ring, and nobody refers to it until
            // `take` has popped it: its slot is not free.
            Way::In => unsafe { self.queue.add(&[], &mut [buffer]) },
            // SAFETY: as above.
            Way::Out => unsafe { self.queue.add(&[buffer], &mut []) },
        };
        let token = added.map_err(|_| RingFault::Full)?;
        *self.in_flight.get_mut(usize::from(token)).ok_or(RingFault::Full)? = Some(slot);
        self.unannounced = true;
        Ok(())
    }

    /// Takes the next buffer that the device gave back. It is free from then on.
    pub(super) fn take(&mut self) -> Result<Option<Used>, RingFault> {
        let Some(token) = self.queue.peek_used() else { return Ok(None) };
        let entry = self.in_flight.get_mut(usize::from(token));
        let slot = entry.and_then(Option::take).ok_or(RingFault::NotInFlight(token))?;
        let buffer = self.buffer_detached(slot, BUFFER);
        let popped = match self.way {
            // SAFETY: the descriptor was in flight, with one buffer in this direction, which is this
            // one: the queue looks at no more of it than that it is not empty.
            Way::In => unsafe { self.queue.pop_used(token, &[], &mut [buffer]) },
            // SAFETY: as above.
            Way::Out => unsafe { self.queue.pop_used(token, &[buffer], &mut []) },
        };
        // The number is read again there; another one than before is refused.
        let len = popped.map_err(|_| RingFault::Changed)?;
        self.free.push(slot);
        Ok(Some(Used { slot, len }))
    }

    /// Copies what the device wrote into `out`; `None` when it claims to have written beyond the buffer.
    /// To be called before the buffer is used again.
    pub(super) fn copy_out<'o>(&self, used: &Used, out: &'o mut [u8; BUFFER]) -> Option<&'o [u8]> {
        let length = usize::try_from(used.len).ok().filter(|length| *length <= BUFFER)?;
        // SAFETY: the slot's buffer lies in `memory`, `length` is within it, and `out` is another memory
        // of that size. No reference to the buffer is made, so that it does no harm if the device
        // breaks the rules and writes meanwhile: the copy is what is read.
        unsafe { std::ptr::copy_nonoverlapping(self.at(used.slot).as_ptr(), out.as_mut_ptr(), length) };
        Some(&out[..length])
    }

    /// Whether the device gave anything back that was not taken yet. To be asked after
    /// [`Ring::interrupt`], before going to sleep.
    pub(super) fn has_used(&self) -> bool {
        // What was written before must be seen by the device before what it wrote is read here.
        fence(Ordering::SeqCst);
        self.queue.can_pop()
    }

    /// Asks the device to interrupt when it gives something back, or not to.
    pub(super) fn interrupt(&mut self, wanted: bool) {
        self.queue.set_dev_notify(wanted);
    }

    /// Tells the device once of all that it was given, unless it looks by itself.
    pub(super) fn announce(&mut self, transport: &mut impl Transport) {
        if !std::mem::take(&mut self.unannounced) {
            return;
        }
        // The queue itself has no barrier between its index and the device's wish not to be told.
        fence(Ordering::SeqCst);
        if self.queue.should_notify() {
            transport.notify(self.index);
        }
    }

    fn at(&self, slot: usize) -> NonNull<u8> {
        assert!(slot < SIZE, "slots are made here");
        // SAFETY: `memory` has SIZE buffers of BUFFER bytes.
        unsafe { self.memory.add(slot * BUFFER) }
    }

    /// The free buffer `slot`.
    fn buffer(&mut self, slot: usize, length: usize) -> &mut [u8] {
        self.buffer_detached(slot, length)
    }

    /// The same without a tie to this ring, for the calls that need both.
    fn buffer_detached<'b>(&self, slot: usize, length: usize) -> &'b mut [u8] {
        assert!(length <= BUFFER, "lengths are checked before");
        // SAFETY: the memory is initialised (zeroed at first), lives as long as the ring, and callers
        // drop the slice before the device may touch the buffer or another one is made.
        unsafe { std::slice::from_raw_parts_mut(self.at(slot).as_ptr(), length) }
    }
}
