//! The kernel's `ioctl`s for interfaces and routes, and all of this crate's `unsafe`.
//!
//! Why `unsafe` at all: no safe wrapper of these requests exists, and in rtnetlink each of them is a
//! message to write and an answer to read where here it is one call. Each request is plain bytes that the kernel
//! copies in: no pointer in them but one, to an interface's name, that outlives its call.
//!
//! Layouts: `linux/if.h`, `linux/if_tun.h`, `linux/route.h`, `linux/ipv6_route.h`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Offloads;
use crate::name::Name;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("the layouts in this file are those of 64-bit Linux");

/// `struct sockaddr_in`.
#[repr(C)]
struct Sockaddr4 {
    family: u16,
    port: u16,
    address: [u8; 4],
    zero: [u8; 8],
}

impl Sockaddr4 {
    fn new(address: Ipv4Addr) -> Self {
        Self { family: AF_INET, port: 0, address: address.octets(), zero: [0; 8] }
    }
}

/// `struct ifreq` with an address in its union.
#[repr(C)]
struct IfreqAddress {
    name: Name,
    address: Sockaddr4,
    rest: [u8; 8],
}

/// `struct ifreq` with `ifr_flags` in its union.
#[repr(C)]
struct IfreqFlags {
    name: Name,
    flags: u16,
    rest: [u8; 22],
}

/// `struct ifreq` with `ifr_mtu` in its union.
#[repr(C)]
struct IfreqMtu {
    name: Name,
    mtu: i32,
    rest: [u8; 20],
}

/// `struct rtentry`.
#[repr(C)]
struct Route4 {
    pad1: u64,
    destination: Sockaddr4,
    gateway: Sockaddr4,
    mask: Sockaddr4,
    flags: u16,
    pad2: i16,
    pad3: u64,
    pad4: u64,
    metric: i16,
    device: *const Name,
    mtu: u64,
    window: u64,
    irtt: u16,
}

/// `struct in6_rtmsg`.
#[repr(C)]
struct Route6 {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    destination_len: u16,
    source_len: u16,
    metric: u32,
    info: u64,
    flags: u32,
    index: u32,
}

/// Makes `fd`, an open `/dev/net/tun`, the queue of the TUN interface `name`, with a header before each packet or none.
pub(crate) fn attach(fd: BorrowedFd<'_>, name: Name, header: bool) -> io::Result<()> {
    let header = if header { IFF_VNET_HDR } else { 0 };
    let mut request = IfreqFlags { name, flags: IFF_TUN | IFF_NO_PI | header, rest: [0; 22] };
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is as long as (below).
    unsafe { ioctl(fd, libc::TUNSETIFF, &mut request) }
}

/// Says which packets may come without a checksum and unsegmented.
pub(crate) fn offload(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let flags = [
        (true, libc::TUN_F_CSUM),
        (offloads.tcp4, libc::TUN_F_TSO4),
        (offloads.tcp6, libc::TUN_F_TSO6),
        (offloads.udp, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let flags = flags.into_iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag);
    // SAFETY: TUNSETOFFLOAD takes a number and no pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the interface's one IPv4 address; on a point-to-point interface its mask becomes /32.
pub(crate) fn set_address4(socket: BorrowedFd<'_>, name: Name, address: Ipv4Addr) -> io::Result<()> {
    let mut request = IfreqAddress { name, address: Sockaddr4::new(address), rest: [0; 8] };
    // SAFETY: SIOCSIFADDR reads one `struct ifreq`, which `request` is as long as (below).
    unsafe { ioctl(socket, libc::SIOCSIFADDR, &mut request) }
}

/// Sets the mask of the interface's IPv4 address.
pub(crate) fn set_mask4(socket: BorrowedFd<'_>, name: Name, mask: Ipv4Addr) -> io::Result<()> {
    let mut request = IfreqAddress { name, address: Sockaddr4::new(mask), rest: [0; 8] };
    // SAFETY: SIOCSIFNETMASK reads one `struct ifreq`, which `request` is as long as (below).
    unsafe { ioctl(socket, libc::SIOCSIFNETMASK, &mut request) }
}

/// Sets the interface's MTU in bytes.
pub(crate) fn set_mtu(socket: BorrowedFd<'_>, name: Name, mtu: u16) -> io::Result<()> {
    let mut request = IfreqMtu { name, mtu: i32::from(mtu), rest: [0; 20] };
    // SAFETY: SIOCSIFMTU reads one `struct ifreq`, which `request` is as long as (below).
    unsafe { ioctl(socket, libc::SIOCSIFMTU, &mut request) }
}

/// Sets the interface's flag IFF_UP, and leaves the others as they are.
pub(crate) fn set_up(socket: BorrowedFd<'_>, name: Name) -> io::Result<()> {
    let mut request = IfreqFlags { name, flags: 0, rest: [0; 22] };
    // SAFETY: SIOCGIFFLAGS reads and writes one `struct ifreq`, which `request` is as long as (below).
    unsafe { ioctl(socket, libc::SIOCGIFFLAGS, &mut request) }?;
    request.flags |= IFF_UP;
    // SAFETY: SIOCSIFFLAGS reads one `struct ifreq`, which `request` is as long as (below).
    unsafe { ioctl(socket, libc::SIOCSIFFLAGS, &mut request) }
}

/// Adds an IPv4 route through the interface.
pub(crate) fn add_route4(
    socket: BorrowedFd<'_>,
    name: &Name,
    destination: Ipv4Addr,
    mask: Ipv4Addr,
) -> io::Result<()> {
    let mut request = Route4 {
        pad1: 0,
        destination: Sockaddr4::new(destination),
        gateway: Sockaddr4::new(Ipv4Addr::UNSPECIFIED),
        mask: Sockaddr4::new(mask),
        flags: libc::RTF_UP,
        pad2: 0,
        pad3: 0,
        pad4: 0,
        metric: 0,
        device: name,
        mtu: 0,
        window: 0,
        irtt: 0,
    };
    // SAFETY: SIOCADDRT on an IPv4 socket reads one `struct rtentry`, which `request` is, and through
    // its `rt_dev` up to 15 bytes of a name: `name` has 16, the last of them zero, and is borrowed here.
    unsafe { ioctl(socket, libc::SIOCADDRT, &mut request) }
}

/// Adds an IPv6 route through the interface; `socket` is one of IPv6.
pub(crate) fn add_route6(
    socket: BorrowedFd<'_>,
    index: u32,
    destination: Ipv6Addr,
    prefix_len: u8,
) -> io::Result<()> {
    let mut request = Route6 {
        destination: destination.octets(),
        source: [0; 16],
        gateway: [0; 16],
        kind: 0,
        destination_len: u16::from(prefix_len),
        source_len: 0,
        metric: 0,
        info: 0,
        flags: u32::from(libc::RTF_UP),
        index,
    };
    // SAFETY: SIOCADDRT on an IPv6 socket reads one `struct in6_rtmsg`, which `request` is.
    unsafe { ioctl(socket, libc::SIOCADDRT, &mut request) }
}

/// Calls `ioctl`.
///
/// # Safety
/// `request` reads and writes at most one `T`, and every pointer in it is good for what it does.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: `argument` is one `T` for as long as the call lasts; the rest is the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const AF_INET: u16 = 2;
const IFF_UP: u16 = 0x0001;
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

// The kernel copies `sizeof(struct ifreq)` bytes, whatever is in the union.
const _: () = assert!(size_of::<IfreqAddress>() == size_of::<libc::ifreq>());
const _: () = assert!(size_of::<IfreqFlags>() == size_of::<libc::ifreq>());
const _: () = assert!(size_of::<IfreqMtu>() == size_of::<libc::ifreq>());
const _: () = assert!(size_of::<Route4>() == 120);
const _: () = assert!(size_of::<Route6>() == size_of::<libc::in6_rtmsg>());
