//! The kernel's VFIO interface (linux/vfio.h, type 1): a PCI device that a process drives itself, behind
//! an IOMMU that lets the device reach nothing but what the process maps for it.
//!
//! `kontor-init` opens container and device ([`Container::open`]); `kontor-tunnel` maps its memory and
//! the device's registers. The `unsafe` of both is here.

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{pread, pwrite};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{NonNull, null_mut};

/// `_IO(';', 100 + n)`
const fn request(n: libc::Ioctl) -> libc::Ioctl {
    0x3B64 + n
}

const GET_API_VERSION: libc::Ioctl = request(0);
const CHECK_EXTENSION: libc::Ioctl = request(1);
const SET_IOMMU: libc::Ioctl = request(2);
const GROUP_GET_STATUS: libc::Ioctl = request(3);
const GROUP_SET_CONTAINER: libc::Ioctl = request(4);
const GROUP_GET_DEVICE_FD: libc::Ioctl = request(6);
const DEVICE_GET_REGION_INFO: libc::Ioctl = request(8);
const DEVICE_SET_IRQS: libc::Ioctl = request(10);
const IOMMU_MAP_DMA: libc::Ioctl = request(13);

const API_VERSION: libc::c_int = 0;
/// `VFIO_TYPE1v2_IOMMU`
const TYPE1V2: libc::c_ulong = 3;
/// `VFIO_GROUP_FLAGS_VIABLE`: no other driver has a device of the group.
const VIABLE: u32 = 1;
/// `VFIO_PCI_CONFIG_REGION_INDEX`
pub(crate) const CONFIG_REGION: u32 = 7;
/// `VFIO_REGION_INFO_FLAG_MMAP`
const REGION_MMAP: u32 = 1 << 2;
/// `VFIO_PCI_MSIX_IRQ_INDEX`
const MSIX: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`
const TRIGGER_EVENTFD: u32 = 1 << 2 | 1 << 5;
/// `VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE`
const READ_WRITE: u32 = 1 | 1 << 1;

/// The container that says what the device may reach. One per IOMMU domain.
#[derive(Debug)]
pub(crate) struct Container(OwnedFd);

/// A device that this process drives, or hands on to be driven.
#[derive(Debug)]
pub(crate) struct Device(OwnedFd);

/// Where a part of the device lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// Bytes.
    pub(crate) size: u64,
    offset: u64,
    can_map: bool,
}

/// Memory that stays for the life of the process: the device's registers, or what it may reach.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a window is an address and a length; what is done with them is each user's to justify.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A request whose argument is a number, or none.
fn ask(file: BorrowedFd<'_>, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    debug_assert!(matches!(request, GET_API_VERSION | CHECK_EXTENSION | SET_IOMMU));
    // SAFETY: these requests take their argument by value and touch no memory of the process.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, argument) })
}

/// A request whose argument is one of the structures below.
fn exchange<T>(file: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: every caller passes the structure that linux/vfio.h names for the request, with `argsz`
    // its size; the kernel reads and writes no more, and every bit pattern is valid in it.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a few bytes")
}

#[repr(C)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: i32,
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

impl Container {
    /// Opens the device `address` (`0000:00:05.0`), which the driver `vfio-pci` has, of the IOMMU group
    /// whose file is `group`, in a container of its own.
    pub(crate) fn open(container: &Path, group: &Path, address: &str) -> io::Result<(Self, Device)> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let container = open(container, flags, Mode::empty())?;
        let group = open(group, flags, Mode::empty())?;
        let unsupported = |words| io::Error::new(io::ErrorKind::Unsupported, words);
        if ask(container.as_fd(), GET_API_VERSION, 0)? != API_VERSION {
            return Err(unsupported("an unknown version of VFIO"));
        }
        if ask(container.as_fd(), CHECK_EXTENSION, TYPE1V2)? != 1 {
            return Err(unsupported("VFIO without an IOMMU of type 1"));
        }
        let mut status = GroupStatus { argsz: size_of_u32::<GroupStatus>(), flags: 0 };
        exchange(group.as_fd(), GROUP_GET_STATUS, &mut status)?;
        if status.flags & VIABLE == 0 {
            return Err(unsupported("an IOMMU group that others have a part of"));
        }
        let mut number = container.as_raw_fd();
        exchange(group.as_fd(), GROUP_SET_CONTAINER, &mut number)?;
        ask(container.as_fd(), SET_IOMMU, TYPE1V2)?;
        let name = CString::new(address).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the kernel reads the name up to its NUL and gives a new descriptor.
        let device = check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
        // SAFETY: the kernel made it just now, for this process alone.
        let device = unsafe { OwnedFd::from_raw_fd(device) };
        rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::CLOEXEC)?;
        // The device holds its group open.
        Ok((Self(container), Device(device)))
    }

    /// The container that was inherited.
    pub(crate) fn inherited(file: OwnedFd) -> Self {
        Self(file)
    }

    /// Makes zeroed memory that the device reaches at `iova`. No child of this process ever has it.
    pub(crate) fn map(&self, len: usize, iova: u64) -> io::Result<Window> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address that the kernel chooses.
        let base = unsafe { mmap_anonymous(null_mut(), len, protection, MapFlags::PRIVATE)? };
        // SAFETY: the range is the mapping made just now; the advice changes nothing in it.
        unsafe { madvise(base, len, Advice::LinuxDontFork)? };
        let window = Window::new(base.cast(), len)?;
        let mut map = DmaMap {
            argsz: size_of_u32::<DmaMap>(),
            flags: READ_WRITE,
            vaddr: window.base.as_ptr().expose_provenance() as u64,
            iova,
            size: len as u64,
        };
        exchange(self.0.as_fd(), IOMMU_MAP_DMA, &mut map)?;
        Ok(window)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Device {
    /// The device that was inherited.
    pub(crate) fn inherited(file: OwnedFd) -> Self {
        Self(file)
    }

    /// Where region `index` lies; a BAR that the device does not have has no bytes.
    pub(crate) fn region(&self, index: u32) -> io::Result<Region> {
        let argsz = size_of_u32::<RegionInfo>();
        let mut info = RegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
        exchange(self.0.as_fd(), DEVICE_GET_REGION_INFO, &mut info)?;
        Ok(Region { size: info.size, offset: info.offset, can_map: info.flags & REGION_MMAP != 0 })
    }

    /// Reads from `at` in a region; how many bytes there were.
    pub(crate) fn read(&self, region: Region, at: u64, into: &mut [u8]) -> io::Result<usize> {
        Ok(pread(&self.0, into, region.offset + at)?)
    }

    /// Writes to `at` in a region.
    pub(crate) fn write(&self, region: Region, at: u64, bytes: &[u8]) -> io::Result<()> {
        let written = pwrite(&self.0, bytes, region.offset + at)?;
        if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Maps the registers of a region.
    pub(crate) fn map(&self, region: Region) -> io::Result<Window> {
        let len = usize::try_from(region.size).map_err(|_| io::ErrorKind::InvalidInput)?;
        if !region.can_map || len == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { mmap(null_mut(), len, protection, MapFlags::SHARED, &self.0, region.offset)? };
        Window::new(base.cast(), len)
    }

    /// Lets message `vector` of MSI-X count in `eventfd`, and enables MSI-X.
    pub(crate) fn interrupt(&self, vector: u32, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let mut set = IrqSet {
            argsz: size_of_u32::<IrqSet>(),
            flags: TRIGGER_EVENTFD,
            index: MSIX,
            start: vector,
            count: 1,
            eventfd: eventfd.as_raw_fd(),
        };
        exchange(self.0.as_fd(), DEVICE_SET_IRQS, &mut set).map(drop)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Window {
    fn new(base: *mut u8, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, len })
    }

    /// A window on memory of the process, for tests.
    #[cfg(test)]
    pub(crate) fn leaked(len: usize) -> Self {
        let words: &'static mut [u64] = Box::leak(vec![0; len.div_ceil(8)].into_boxed_slice());
        Self { base: NonNull::from(words).cast(), len }
    }

    /// Bytes.
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// Its first byte.
    pub(crate) fn base(self) -> NonNull<u8> {
        self.base
    }

    /// The part of it from `at` on, if it has so many bytes.
    pub(crate) fn part(self, at: usize, len: usize) -> Option<Self> {
        if at.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `at` is within the mapping, or just behind its last byte.
        Some(Self { base: unsafe { self.base.add(at) }, len })
    }

    /// Reads a register of 16 bits (little endian, as this processor); `None` beyond the window or
    /// between registers.
    pub(crate) fn read_u16(self, at: usize) -> Option<u16> {
        let register = self.register(at)?;
        // SAFETY: aligned and within a mapping that stays; nobody holds a reference to registers.
        Some(unsafe { register.read_volatile() })
    }

    /// Writes one; the same.
    pub(crate) fn write_u16(self, at: usize, value: u16) -> Option<()> {
        let register = self.register(at)?;
        // SAFETY: as for reading.
        unsafe { register.write_volatile(value) };
        Some(())
    }

    fn register(self, at: usize) -> Option<NonNull<u16>> {
        let register = self.part(at, size_of::<u16>())?.base.cast::<u16>();
        register.is_aligned().then_some(register)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_beyond_the_window_or_between_registers_is_none() {
        let window = Window::leaked(8);
        assert_eq!(window.write_u16(6, 0xABCD), Some(()));
        assert_eq!((window.read_u16(6), window.read_u16(7), window.read_u16(8)), (Some(0xABCD), None, None));
        assert_eq!(window.read_u16(1), None);
        assert_eq!(window.read_u16(usize::MAX), None);
        let part = window.part(4, 4).unwrap();
        assert_eq!((part.read_u16(2), part.read_u16(4)), (Some(0xABCD), None));
        assert!(window.part(4, 5).is_none() && window.part(usize::MAX, 2).is_none());
    }

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!(size_of::<RegionInfo>(), 32);
        assert_eq!(size_of::<DmaMap>(), 32);
        assert_eq!(size_of::<IrqSet>(), 24);
        assert_eq!(IOMMU_MAP_DMA, 0x3B71);
    }
}
