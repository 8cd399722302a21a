//! A network device that does what a test wants, over rings in this process's memory.

use super::net::Device;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Memory whose addresses mean the same to device and driver.
pub(super) struct FakeMemory;

fn layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).unwrap()
}

// SAFETY: the memory is zeroed, aligned, and nobody else's.
unsafe impl Hal for FakeMemory {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout has a size.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout(pages)) }).unwrap();
        (memory.as_ptr().expose_provenance() as u64, memory)
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: it was allocated above with this layout.
        unsafe { dealloc(memory.as_ptr(), layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        panic!("the fake device has no registers")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// What the device is like, and what was done with it.
pub(super) struct State {
    pub(super) kind: DeviceType,
    pub(super) queue_size: u32,
    pub(super) never_resets: bool,
    pub(super) refuses_features: bool,
    pub(super) claims_used: bool,
    pub(super) unwired: Option<u16>,
    offered: u64,
    accepted: Option<u64>,
    status: DeviceStatus,
    queues: [Queue; 2],
}

#[derive(Default, Clone, Copy)]
struct Queue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    /// How far the device has looked into the available ring, and written the used one.
    looked: u16,
    gave_back: u16,
    kicks: u64,
}

/// The device; clones are the same one.
#[derive(Clone)]
pub(super) struct FakeDevice(Arc<Mutex<State>>);

fn read<T: Copy>(address: u64) -> T {
    let address = usize::try_from(address).unwrap();
    // SAFETY: the address is one of a ring or buffer that the driver under test made and still has.
    unsafe { std::ptr::with_exposed_provenance::<T>(address).read_volatile() }
}

fn write<T>(address: u64, value: T) {
    let address = usize::try_from(address).unwrap();
    // SAFETY: as for `read`.
    unsafe { std::ptr::with_exposed_provenance_mut::<T>(address).write_volatile(value) }
}

impl Queue {
    /// The next descriptor that the driver made available.
    fn next(&mut self) -> Option<u16> {
        if self.looked == read::<u16>(self.available + 2) {
            return None;
        }
        let head = read(self.available + 4 + 2 * u64::from(self.looked % self.size));
        self.looked = self.looked.wrapping_add(1);
        Some(head)
    }

    fn buffer(&self, descriptor: u16) -> (u64, u32) {
        let at = self.descriptors + 16 * u64::from(descriptor);
        (read(at), read(at + 8))
    }

    fn complete(&mut self, id: u32, length: u32) {
        let at = self.used + 4 + 8 * u64::from(self.gave_back % self.size);
        write(at, id);
        write(at + 4, length);
        self.gave_back = self.gave_back.wrapping_add(1);
        write(self.used + 2, self.gave_back);
    }
}

impl FakeDevice {
    pub(super) fn offering(offered: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            kind: DeviceType::Network,
            queue_size: 256,
            never_resets: false,
            refuses_features: false,
            claims_used: false,
            unwired: None,
            offered,
            accepted: None,
            status: DeviceStatus::empty(),
            queues: [Queue::default(); 2],
        })))
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.lock().unwrap());
    }

    fn queue<T>(&self, index: u16, with: impl FnOnce(&mut Queue) -> T) -> T {
        with(&mut self.0.lock().unwrap().queues[usize::from(index)])
    }

    pub(super) fn accepted(&self) -> Option<u64> {
        self.0.lock().unwrap().accepted
    }

    pub(super) fn kicks(&self, queue: u16) -> u64 {
        self.queue(queue, |queue| queue.kicks)
    }

    /// Gives back whatever it wants.
    pub(super) fn complete(&self, queue: u16, id: u32, length: u32) {
        self.queue(queue, |queue| queue.complete(id, length));
    }

    /// Claims to have given back many, without having written which.
    pub(super) fn jump(&self, queue: u16, by: u16) {
        self.queue(queue, |queue| write(queue.used + 2, queue.gave_back.wrapping_add(by)));
    }

    pub(super) fn set_no_notify(&self, queue: u16, looks_by_itself: bool) {
        self.queue(queue, |queue| write(queue.used, u16::from(looks_by_itself)));
    }

    pub(super) fn wants_interrupt(&self, queue: u16) -> bool {
        self.queue(queue, |queue| read::<u16>(queue.available) & 1 == 0)
    }

    /// Buffers that wait to be written.
    pub(super) fn offered_buffers(&self) -> usize {
        self.queue(0, |queue| usize::from(read::<u16>(queue.available + 2).wrapping_sub(queue.looked)))
    }

    /// Sends every frame that waits, and gives the buffers back.
    pub(super) fn transmit_all(&self) -> Vec<Vec<u8>> {
        self.queue(1, |queue| {
            let mut frames = Vec::new();
            while let Some(head) = queue.next() {
                let (address, length) = queue.buffer(head);
                frames.push((0..u64::from(length)).map(|at| read(address + at)).collect());
                queue.complete(head.into(), 0);
            }
            frames
        })
    }

    /// Writes a frame into the next buffer; the descriptor's number.
    pub(super) fn deliver(&self, frame: &[u8]) -> u32 {
        self.deliver_as(frame, u32::try_from(frame.len()).unwrap())
    }

    /// The same, but says that it has another length.
    pub(super) fn deliver_as(&self, frame: &[u8], length: u32) -> u32 {
        self.queue(0, |queue| {
            let head = queue.next().unwrap();
            let (address, room) = queue.buffer(head);
            assert!(frame.len() <= usize::try_from(room).unwrap());
            for (byte, at) in frame.iter().zip(0..) {
                write(address + at, *byte);
            }
            queue.complete(head.into(), length);
            head.into()
        })
    }
}

impl Device for FakeDevice {
    fn is_wired(&self, index: u16) -> bool {
        self.0.lock().unwrap().unwired != Some(index)
    }
}

impl Transport for FakeDevice {
    fn device_type(&self) -> DeviceType {
        self.0.lock().unwrap().kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.0.lock().unwrap().offered
    }

    fn write_driver_features(&mut self, features: u64) {
        self.0.lock().unwrap().accepted = Some(features);
    }

    fn max_queue_size(&mut self, _: u16) -> u32 {
        self.0.lock().unwrap().queue_size
    }

    fn notify(&mut self, queue: u16) {
        self.queue(queue, |queue| queue.kicks += 1);
    }

    fn get_status(&self) -> DeviceStatus {
        let state = self.0.lock().unwrap();
        if state.never_resets { DeviceStatus::DRIVER_OK } else { state.status }
    }

    fn set_status(&mut self, status: DeviceStatus) {
        let mut state = self.0.lock().unwrap();
        state.status = status;
        if state.refuses_features {
            state.status.remove(DeviceStatus::FEATURES_OK);
        }
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: u64, available: u64, used: u64) {
        let size = u16::try_from(size).unwrap();
        self.queue(queue, |queue| *queue = Queue { size, descriptors, available, used, ..Queue::default() });
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, _: u16) -> bool {
        self.0.lock().unwrap().claims_used
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        panic!("nothing of the device's configuration is read")
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        panic!("nothing of the device's configuration is read")
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _: usize, _: T) -> virtio_drivers::Result<()> {
        panic!("nothing of the device's configuration is written")
    }
}
