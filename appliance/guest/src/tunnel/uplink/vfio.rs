//! The network device behind VFIO: its registers, its interrupt, and the one memory that it may reach.
//!
//! ```text
//! container ── arena: rings and buffers, mapped once     device ── configuration space, read once
//!                                                               └─ BARs: registers, doorbells
//! ```
//!
//! The crate's transport walks the configuration space itself, and would follow a chain that bites its
//! own tail, or add offsets that wrap. So it is shown one that is made here ([`Shown`]) from what was
//! read once and checked; no write of it reaches the device's own. What it lacks is added by
//! [`Registers`]: the queues' interrupt, and doorbells whose place is checked when the queue is made.

use super::net::{Device, Net};
use super::ring::{BUFFER, SIZE};
use crate::vfio::{self, CONFIG_REGION, Container, Window};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{
    PciTransport, VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_DEVICE_CFG, VIRTIO_PCI_CAP_ISR_CFG,
    VIRTIO_PCI_CAP_NOTIFY_CFG, VirtioPciError,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The device as an uplink.
pub(crate) type Vfio = Net<Registers, Arena>;

/// Where the device finds the arena. Not 0, which the crate takes for an error.
const ARENA_IOVA: u64 = 0x10_0000;
/// Both queues' buffers, and pages for their rings. Below what a process may lock in memory without any
/// privilege (8 MiB).
const ARENA_LEN: usize = 2 * SIZE * BUFFER + 16 * PAGE_SIZE;
/// The one message: both queues' interrupts are events of the same loop.
const VECTOR: u16 = 0;
/// Queues that are used.
const QUEUES: usize = 2;

/// Why the device is not used.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    #[error("{doing}")]
    Kernel { doing: &'static str, source: io::Error },
    #[error("the uplink's configuration space")]
    Space(#[source] SpaceError),
    #[error("the uplink's registers")]
    Transport(#[source] VirtioPciError),
    #[error("the uplink is opened a second time")]
    Again,
}

/// What is wrong with the device's configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SpaceError {
    #[error("it is no device of virtio but {vendor:#06x}:{device:#06x}")]
    Stranger { vendor: u16, device: u16 },
    #[error("its capabilities are no chain")]
    Chain,
    #[error("it lacks structure {0}")]
    Missing(u8),
    #[error("structure {kind} lies outside of BAR {bar}")]
    Outside { kind: u8, bar: u8 },
    #[error("the doorbells' spacing is {0}")]
    Spacing(u32),
}

/// Takes the device over: memory, registers, interrupt. It is not spoken to yet.
pub(crate) fn open(container: Container, device: vfio::Device) -> Result<Vfio, VfioError> {
    let kernel = |doing| move |source| VfioError::Kernel { doing, source };
    let config = device.region(CONFIG_REGION).map_err(kernel("find the configuration space"))?;
    let mut space = [0; SPACE_LEN];
    let length = device.read(config, 0, &mut space).map_err(kernel("read the configuration space"))?;
    let mut sizes = [0; BARS];
    let mut regions = Vec::new();
    for (size, index) in sizes.iter_mut().zip(0..) {
        let region = device.region(index).map_err(kernel("find a BAR"))?;
        *size = region.size;
        regions.push(region);
    }
    let found = Found::read(&space[..length], &sizes).map_err(VfioError::Space)?;
    // Memory decoding and bus mastering; no interrupt by pin.
    device.write(config, COMMAND, &COMMAND_VALUE.to_le_bytes()).map_err(kernel("enable the device"))?;

    let mut bars = [None; BARS];
    for structure in &found.structures {
        let bar = usize::from(structure.bar);
        if bars[bar].is_none() {
            bars[bar] = Some(device.map(regions[bar]).map_err(kernel("map a BAR"))?);
        }
    }
    let window = |structure: &Structure| {
        let place = (usize::try_from(structure.offset).ok()?, usize::try_from(structure.length).ok()?);
        bars[usize::from(structure.bar)]?.part(place.0, place.1)
    };
    let part = |kind| {
        let outside = |s: &Structure| SpaceError::Outside { kind, bar: s.bar };
        let structure = found.structure(kind);
        window(structure).ok_or(VfioError::Space(outside(structure)))
    };
    let (common, doorbells) = (part(VIRTIO_PCI_CAP_COMMON_CFG)?, part(VIRTIO_PCI_CAP_NOTIFY_CFG)?);

    let interrupts = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
        .map_err(|error| VfioError::Kernel { doing: "make the interrupt's counter", source: error.into() })?;
    device.interrupt(VECTOR.into(), interrupts.as_fd()).map_err(kernel("arm the interrupt"))?;
    let memory = container.map(ARENA_LEN, ARENA_IOVA).map_err(kernel("map memory for the device"))?;
    HELD.set(Held { memory, next: AtomicUsize::new(0), bars }).map_err(|_| VfioError::Again)?;

    let mut root = PciRoot::new(Shown::new(&found, &sizes));
    let transport = PciTransport::new::<Arena, _>(&mut root, FUNCTION).map_err(VfioError::Transport)?;
    let registers = Registers {
        inner: ManuallyDrop::new(transport),
        common,
        doorbells,
        spacing: usize::try_from(found.spacing).unwrap_or(usize::MAX),
        wired: [None; QUEUES],
        _open: (container, device),
    };
    Ok(Net::new(registers, interrupts))
}

/// What the crate's static functions work on: the process has one device.
struct Held {
    memory: Window,
    /// Bytes of the memory that are handed out.
    next: AtomicUsize,
    bars: [Option<Window>; BARS],
}

static HELD: OnceLock<Held> = OnceLock::new();

/// The memory that the device may reach. What is handed out stays: rings are made once.
pub(crate) struct Arena;

// SAFETY: `dma_alloc` hands out each page of a zeroed mapping once; `mmio_phys_to_virt` gives addresses in
// the BARs' mappings, within the bounds that were checked before the crate saw them.
unsafe impl Hal for Arena {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let none = (0, NonNull::dangling());
        let (Some(held), Some(len)) = (HELD.get(), pages.checked_mul(PAGE_SIZE)) else { return none };
        let taken = held.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            next.checked_add(len).filter(|end| *end <= held.memory.len())
        });
        let Ok(at) = taken else { return none };
        held.memory.part(at, len).map_or(none, |part| (ARENA_IOVA + at as u64, part.base()))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, len: usize) -> NonNull<u8> {
        let window = HELD.get().and_then(|held| {
            let (bar, at) = shown_place(address)?;
            held.bars.get(bar).copied()??.part(at, len)
        });
        // The crate has checked the same bounds on the space that was shown to it.
        window.expect("structures lie in their BARs").base()
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        let held = HELD.get().expect("rings are made in the arena");
        let at = buffer.cast::<u8>().addr().get().checked_sub(held.memory.base().addr().get());
        let at = at.filter(|at| held.memory.part(*at, buffer.len()).is_some());
        ARENA_IOVA + at.expect("buffers are parts of the arena") as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// Bytes of the configuration space that are looked at: what PCI has, without PCI Express's extension.
const SPACE_LEN: usize = 256;
/// Base address registers of a device.
const BARS: usize = 6;
/// Offset of the command register.
const COMMAND: u64 = 4;
/// Memory space, bus master, no interrupt by pin (PCI 3.0, 6.2.2).
const COMMAND_VALUE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
/// Offset of the first base address register.
const BAR0: usize = 0x10;
/// Offset of the first capability's offset.
const CAPABILITIES: usize = 0x34;
/// In the status register (upper half of the command's word): there are capabilities.
const HAS_CAPABILITIES: u32 = 1 << 20;
/// `PCI_CAP_ID_VNDR`
const VENDOR_CAPABILITY: u8 = 9;
/// Most capabilities: each has 4 bytes at least, behind the header of 64.
const CAPABILITIES_MAX: usize = (SPACE_LEN - 64) / 4;
const VIRTIO_VENDOR: u16 = 0x1af4;
/// Network device of virtio 1.
const VIRTIO_NET: u16 = 0x1041;
/// Bytes of `struct virtio_pci_common_cfg` (virtio 1.2, 4.1.4.3).
const COMMON_LEN: u32 = 56;
/// The structures that are needed, and what each must hold at least.
const NEEDED: [(u8, u32); 4] = [
    (VIRTIO_PCI_CAP_COMMON_CFG, COMMON_LEN),
    (VIRTIO_PCI_CAP_NOTIFY_CFG, 2),
    (VIRTIO_PCI_CAP_ISR_CFG, 1),
    (VIRTIO_PCI_CAP_DEVICE_CFG, 4),
];

/// A structure in a BAR, as a vendor capability says (virtio 1.2, 4.1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Structure {
    kind: u8,
    bar: u8,
    offset: u32,
    length: u32,
}

/// What the device's configuration space says, checked.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    structures: [Structure; NEEDED.len()],
    /// `notify_off_multiplier`
    spacing: u32,
}

impl Found {
    /// Reads a configuration space of a device with BARs of these sizes.
    fn read(untrusted_space: &[u8], sizes: &[u64; BARS]) -> Result<Self, SpaceError> {
        let byte = |at: usize| untrusted_space.get(at).copied();
        let word = |at: usize| Some(u32::from_le_bytes(*untrusted_space.get(at..)?.first_chunk()?));
        let half = |at: usize| Some(u16::from_le_bytes(*untrusted_space.get(at..)?.first_chunk()?));
        let (vendor, device) = (half(0).unwrap_or_default(), half(2).unwrap_or_default());
        if (vendor, device) != (VIRTIO_VENDOR, VIRTIO_NET) {
            return Err(SpaceError::Stranger { vendor, device });
        }
        let mut found = [None; NEEDED.len()];
        let mut spacing = None;
        let mut next = usize::from(byte(CAPABILITIES).unwrap_or_default() & 0xFC);
        let mut left = CAPABILITIES_MAX;
        while next != 0 {
            left = left.checked_sub(1).ok_or(SpaceError::Chain)?;
            let header = word(next).filter(|_| next >= 64).ok_or(SpaceError::Chain)?;
            let [id, behind, length, kind] = header.to_le_bytes();
            let place = NEEDED.iter().position(|(needed, _)| *needed == kind);
            if let Some(place) = place.filter(|_| id == VENDOR_CAPABILITY && length >= 16) {
                let read = (byte(next + 4), word(next + 8), word(next + 12));
                let (Some(bar), Some(offset), Some(length)) = read else { return Err(SpaceError::Chain) };
                if found[place].is_none() {
                    found[place] = Some(Structure { kind, bar, offset, length });
                    if kind == VIRTIO_PCI_CAP_NOTIFY_CFG {
                        spacing = word(next + 16);
                    }
                }
            }
            next = usize::from(behind & 0xFC);
        }
        let mut structures = [Structure { kind: 0, bar: 0, offset: 0, length: 0 }; NEEDED.len()];
        for ((structure, found), (kind, least)) in structures.iter_mut().zip(found).zip(NEEDED) {
            *structure = found.ok_or(SpaceError::Missing(kind))?;
            let Structure { bar, offset, length, .. } = *structure;
            let size = sizes.get(usize::from(bar)).copied().unwrap_or_default();
            let inside = u64::from(offset) + u64::from(length) <= size && size <= SHOWN_BAR_MAX;
            if !inside || length < least || offset % 4 != 0 {
                return Err(SpaceError::Outside { kind, bar });
            }
        }
        let spacing = spacing.ok_or(SpaceError::Missing(VIRTIO_PCI_CAP_NOTIFY_CFG))?;
        if spacing % 2 != 0 {
            return Err(SpaceError::Spacing(spacing));
        }
        Ok(Self { structures, spacing })
    }

    fn structure(&self, kind: u8) -> &Structure {
        let place = NEEDED.iter().position(|(needed, _)| *needed == kind);
        &self.structures[place.expect("only what is needed is asked for")]
    }
}

/// The device's place on the bus, as the crate is told.
const FUNCTION: DeviceFunction = DeviceFunction { bus: 0, device: 0, function: 0 };
/// Largest BAR that is shown.
const SHOWN_BAR_MAX: u64 = 1 << SHOWN_BAR_BITS;
/// Each BAR is shown at its number plus one, above this many bits.
const SHOWN_BAR_BITS: u32 = 24;
/// Bytes between the capabilities that are shown.
const SHOWN_CAPABILITY: usize = 20;

/// BAR and offset behind an address that was shown.
fn shown_place(address: PhysAddr) -> Option<(usize, usize)> {
    let bar = usize::try_from(address >> SHOWN_BAR_BITS).ok()?.checked_sub(1)?;
    Some((bar, usize::try_from(address & (SHOWN_BAR_MAX - 1)).ok()?))
}

/// A configuration space that says what was found, and nothing else.
struct Shown {
    words: [u32; SPACE_LEN / 4],
    /// What each BAR reads as after all ones are written to it.
    masks: [u32; BARS],
}

impl Shown {
    fn new(found: &Found, sizes: &[u64; BARS]) -> Self {
        let mut words = [0; SPACE_LEN / 4];
        words[0] = u32::from(VIRTIO_VENDOR) | u32::from(VIRTIO_NET) << 16;
        words[1] = u32::from(COMMAND_VALUE) | HAS_CAPABILITIES;
        let mut masks = [0; BARS];
        for (bar, size) in sizes.iter().enumerate().filter(|(_, size)| (1..=SHOWN_BAR_MAX).contains(*size)) {
            let address = u64::try_from(bar + 1).unwrap_or_default() << SHOWN_BAR_BITS;
            words[BAR0 / 4 + bar] = u32::try_from(address).unwrap_or_default();
            // A BAR's size is a power of two, and 16 bytes at least.
            let size = size.next_power_of_two().max(16);
            masks[bar] = u32::try_from(size).map_or(0, |size| !(size - 1));
        }
        let mut at = 64;
        words[CAPABILITIES / 4] = 64;
        for (structure, left) in found.structures.iter().zip((0..NEEDED.len()).rev()) {
            let behind = if left == 0 { 0 } else { at + SHOWN_CAPABILITY };
            let behind = u8::try_from(behind).unwrap_or_default();
            let length = u8::try_from(SHOWN_CAPABILITY).unwrap_or_default();
            let capability = [
                u32::from_le_bytes([VENDOR_CAPABILITY, behind, length, structure.kind]),
                structure.bar.into(),
                structure.offset,
                structure.length,
                found.spacing,
            ];
            words[at / 4..at / 4 + capability.len()].copy_from_slice(&capability);
            at += SHOWN_CAPABILITY;
        }
        Self { words, masks }
    }
}

impl ConfigurationAccess for Shown {
    fn read_word(&self, _: DeviceFunction, offset: u8) -> u32 {
        self.words.get(usize::from(offset) / 4).copied().unwrap_or_default()
    }

    /// The crate writes to find out how large a BAR is, and the command; neither is the device's own.
    fn write_word(&mut self, _: DeviceFunction, offset: u8, value: u32) {
        let Some(bar) = (usize::from(offset) / 4).checked_sub(BAR0 / 4) else { return };
        if let Some(mask) = self.masks.get(bar) {
            self.words[BAR0 / 4 + bar] = value & mask;
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self { words: self.words, masks: self.masks }
    }
}

/// `queue_select` in the common structure.
const QUEUE_SELECT: usize = 22;
/// `queue_msix_vector`
const QUEUE_MSIX_VECTOR: usize = 26;
/// `queue_notify_off`
const QUEUE_NOTIFY_OFF: usize = 30;

/// The crate's transport, with interrupts and with doorbells that one write rings.
pub(crate) struct Registers {
    /// Never dropped: it would wait for the device to reset, for as long as that likes. The kernel
    /// resets the device when the process ends.
    inner: ManuallyDrop<PciTransport>,
    common: Window,
    doorbells: Window,
    spacing: usize,
    /// Where each queue's doorbell lies, once its interrupt and it are found good.
    wired: [Option<usize>; QUEUES],
    /// While these are open the mappings hold.
    _open: (Container, vfio::Device),
}

/// Gives a queue its interrupt, reads it back, and finds its doorbell.
fn wire(common: Window, doorbells: Window, spacing: usize, queue: u16) -> Option<usize> {
    common.write_u16(QUEUE_SELECT, queue)?;
    common.write_u16(QUEUE_MSIX_VECTOR, VECTOR)?;
    if common.read_u16(QUEUE_MSIX_VECTOR)? != VECTOR {
        return None;
    }
    let doorbell = usize::from(common.read_u16(QUEUE_NOTIFY_OFF)?).checked_mul(spacing)?;
    // It must be a register of its own within the window.
    doorbells.part(doorbell, size_of::<u16>()).filter(|part| part.base().cast::<u16>().is_aligned())?;
    Some(doorbell)
}

impl Device for Registers {
    fn is_wired(&self, index: u16) -> bool {
        self.wired.get(usize::from(index)).is_some_and(Option::is_some)
    }
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.inner.write_driver_features(features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        if let Some(Some(doorbell)) = self.wired.get(usize::from(queue)) {
            // Its place was checked when it was found.
            let _ = self.doorbells.write_u16(*doorbell, queue);
        }
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.inner.set_status(status);
    }

    fn set_guest_page_size(&mut self, size: u32) {
        self.inner.set_guest_page_size(size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: PhysAddr, available: PhysAddr, used: PhysAddr) {
        if let Some(wired) = self.wired.get_mut(usize::from(queue)) {
            *wired = wire(self.common, self.doorbells, self.spacing, queue);
        }
        self.inner.queue_set(queue, size, table, available, used);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> virtio_drivers::Result<T> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.inner.write_config_space(offset, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; BARS] = [0, 4096, 0, 0, 16384, 0];

    /// As QEMU's device has it: four structures in BAR 4, a page each.
    fn space() -> [u8; SPACE_LEN] {
        let mut space = [0; SPACE_LEN];
        space[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        // The first capability is MSI-X, which is passed over.
        space[CAPABILITIES] = 0x98;
        space[0x98..0x9A].copy_from_slice(&[0x11, 0x40]);
        for (at, page, kind, _) in structures() {
            let behind = if kind == VIRTIO_PCI_CAP_DEVICE_CFG { 0 } else { at + SHOWN_CAPABILITY };
            space[at..at + 5].copy_from_slice(&[9, u8::try_from(behind).unwrap(), 20, kind, 4]);
            space[at + 8..at + 12].copy_from_slice(&(page * 4096).to_le_bytes());
            space[at + 12..at + 16].copy_from_slice(&4096_u32.to_le_bytes());
            space[at + 16..at + 20].copy_from_slice(&4_u32.to_le_bytes());
        }
        space
    }

    /// Offset of the capability, page, kind, least length.
    fn structures() -> impl Iterator<Item = (usize, u32, u8, u32)> {
        NEEDED
            .iter()
            .zip(0_u32..)
            .zip(0_usize..)
            .map(|(((kind, least), page), place)| (0x40 + place * SHOWN_CAPABILITY, page, *kind, *least))
    }

    #[test]
    fn structures_of_a_good_device_are_found() {
        let found = Found::read(&space(), &SIZES).unwrap();
        assert_eq!(found.spacing, 4);
        let notify = Structure { kind: VIRTIO_PCI_CAP_NOTIFY_CFG, bar: 4, offset: 4096, length: 4096 };
        assert_eq!(*found.structure(VIRTIO_PCI_CAP_NOTIFY_CFG), notify);
    }

    #[test]
    fn device_that_is_another_is_refused() {
        let mut other = space();
        other[2] = 0x42;
        let stranger = SpaceError::Stranger { vendor: 0x1af4, device: 0x1042 };
        assert_eq!(Found::read(&other, &SIZES), Err(stranger));
        assert!(matches!(Found::read(&[], &SIZES), Err(SpaceError::Stranger { vendor: 0, .. })));
    }

    #[test]
    fn chain_that_bites_its_tail_or_leaves_the_space_is_refused() {
        let mut endless = space();
        endless[0x99] = 0x98;
        assert_eq!(Found::read(&endless, &SIZES), Err(SpaceError::Chain));
        let mut into_header = space();
        into_header[0x99] = 0x20;
        assert_eq!(Found::read(&into_header, &SIZES), Err(SpaceError::Chain));
        let mut over_the_end = space();
        over_the_end[0x99] = 0xF8;
        over_the_end[0xF8..0xFC].copy_from_slice(&[9, 0, 20, VIRTIO_PCI_CAP_COMMON_CFG]);
        assert_eq!(Found::read(&over_the_end, &SIZES), Err(SpaceError::Chain));
        assert_eq!(Found::read(&space()[..0x50], &SIZES), Err(SpaceError::Chain));
    }

    #[test]
    fn structure_outside_of_its_bar_or_too_short_is_refused() {
        for (at, _, kind, least) in structures() {
            let mut wraps = space();
            wraps[at + 8..at + 12].copy_from_slice(&0xFFFF_F000_u32.to_le_bytes());
            assert_eq!(Found::read(&wraps, &SIZES), Err(SpaceError::Outside { kind, bar: 4 }));
            for bar in [0, 5, 6, 255] {
                let mut other = space();
                other[at + 4] = bar;
                assert_eq!(Found::read(&other, &SIZES), Err(SpaceError::Outside { kind, bar }));
            }
            let mut short = space();
            short[at + 12..at + 16].copy_from_slice(&(least - 1).to_le_bytes());
            assert_eq!(Found::read(&short, &SIZES), Err(SpaceError::Outside { kind, bar: 4 }));
            let mut missing = space();
            missing[at + 3] = 99;
            assert_eq!(Found::read(&missing, &SIZES), Err(SpaceError::Missing(kind)));
        }
    }

    #[test]
    fn doorbells_at_odd_places_are_refused() {
        let mut odd = space();
        odd[0x40 + SHOWN_CAPABILITY + 16] = 3;
        assert_eq!(Found::read(&odd, &SIZES), Err(SpaceError::Spacing(3)));
    }

    #[test]
    fn garbage_is_read_without_panic() {
        let mut seed: u64 = 0x9E37_79B9_7F4A_7C15;
        for _ in 0..20_000 {
            let mut space = space();
            for _ in 0..8 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let [at, value, ..] = seed.to_le_bytes();
                space[usize::from(at).max(4)] = value;
            }
            if let Ok(found) = Found::read(&space, &SIZES) {
                for structure in found.structures {
                    let end = u64::from(structure.offset) + u64::from(structure.length);
                    assert!(end <= SIZES[usize::from(structure.bar)]);
                }
            }
        }
    }

    #[test]
    fn the_crate_sees_what_was_found_and_its_writes_stay_here() {
        let found = Found::read(&space(), &SIZES).unwrap();
        let mut root = PciRoot::new(Shown::new(&found, &SIZES));
        assert_eq!(root.capabilities(FUNCTION).count(), NEEDED.len());
        for bar in [1, 4] {
            let info = root.bar_info(FUNCTION, bar).unwrap().unwrap();
            let place = usize::from(bar);
            let expected = ((u64::from(bar) + 1) << SHOWN_BAR_BITS, SIZES[place]);
            assert_eq!(info.memory_address_size(), Some(expected));
            assert_eq!(shown_place(expected.0 + 12), Some((place, 12)));
        }
        assert_eq!(root.bar_info(FUNCTION, 0).unwrap(), None);
        assert_eq!(shown_place(5), None);
    }

    #[test]
    fn queue_is_wired_only_when_its_vector_stays_and_its_doorbell_is_there() {
        let (common, doorbells) = (Window::leaked(56), Window::leaked(8));
        common.write_u16(QUEUE_NOTIFY_OFF, 1);
        assert_eq!(wire(common, doorbells, 4, 1), Some(4));
        assert_eq!(common.read_u16(QUEUE_SELECT), Some(1));
        common.write_u16(QUEUE_NOTIFY_OFF, 2);
        assert_eq!(wire(common, doorbells, 4, 1), None);
        common.write_u16(QUEUE_NOTIFY_OFF, u16::MAX);
        assert_eq!(wire(common, doorbells, usize::MAX, 1), None);
        // A structure that ends before the register: nothing is read beyond it.
        assert_eq!(wire(common.part(0, 26).unwrap(), doorbells, 4, 1), None);
    }
}
