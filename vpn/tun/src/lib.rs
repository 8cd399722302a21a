//! TUN interfaces: made, given addresses and routes, brought up.
//!
//! Both ends of the tunnel use this at their start, with CAP_NET_ADMIN, and need no privilege for the
//! packets afterwards. Everything is an `ioctl` but one message of rtnetlink: no resolver, no other program.
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! let tun = kontor_tun::create("kontor0")?;
//! let addresses = ["10.1.0.7/32".parse().unwrap(), "fd00::7/128".parse().unwrap()];
//! kontor_tun::configure("kontor0", &addresses, 1420)?;
//! kontor_tun::up("kontor0")?;
//! kontor_tun::add_route("kontor0", "0.0.0.0/0".parse().unwrap())?;
//! # drop(tun);
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

mod address;
mod checksum;
mod coalesce;
mod name;
mod segment;
mod sys;
mod vnet;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use ipnet::IpNet;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use name::Name;

pub use coalesce::{Coalescer, RUN_MAX};
pub use segment::{OffloadError, Segments};
pub use vnet::HEADER_LEN;

/// Makes the TUN interface `name`, or takes it when it is there and nobody has it open.
///
/// The descriptor carries bare IP packets, one per read and write, does not block, and is closed on
/// exec. The interface goes away with it.
///
/// # Errors
/// `InvalidInput` for a bad name; `NotFound` without `/dev/net/tun`; `PermissionDenied` without
/// CAP_NET_ADMIN; `ResourceBusy` when another process has the interface.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let name = Name::parse(name)?;
    let fd = open()?;
    sys::attach(fd.as_fd(), name, false)?;
    Ok(fd)
}

/// What the kernel leaves to whoever reads an interface, and takes from whoever writes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Segments of TCP over IPv4.
    pub tcp4: bool,
    /// Segments of TCP over IPv6.
    pub tcp6: bool,
    /// Segments of UDP, since Linux 6.2.
    pub udp: bool,
}

/// Makes a TUN interface like [`create`], with as many offloads as the kernel has.
///
/// Each read and write of the descriptor is [`HEADER_LEN`] bytes and a packet of up to 64 KiB: [`Segments`] takes
/// apart what was read, a [`Coalescer`] puts together what is written.
///
/// # Errors
/// As [`create`]'s.
pub fn create_offloading(name: &str) -> io::Result<(OwnedFd, Offloads)> {
    let name = Name::parse(name)?;
    let fd = open()?;
    sys::attach(fd.as_fd(), name, true)?;
    let all = Offloads { tcp4: true, tcp6: true, udp: true };
    for offloads in [all, Offloads { udp: false, ..all }] {
        match sys::offload(fd.as_fd(), offloads) {
            Ok(()) => return Ok((fd, offloads)),
            // A kernel that does not know one of them refuses them all.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => return Err(error),
        }
    }
    Ok((fd, Offloads::default()))
}

fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(DEVICE, flags, Mode::empty())?)
}

/// Gives an interface that is not up yet its addresses and its MTU in bytes.
///
/// Also tells the kernel to put nothing of its own on it: no link-local address, no router
/// solicitation, no address or route from a router's word.
///
/// # Errors
/// `InvalidInput` for a bad name or a second IPv4 address; `PermissionDenied` without CAP_NET_ADMIN;
/// the kernel's for an interface that is not there or an MTU that it does not take.
pub fn configure(name: &str, addresses: &[IpNet], mtu: u16) -> io::Result<()> {
    let parsed = Name::parse(name)?;
    let in_v4 = addresses.iter().filter(|address| matches!(address, IpNet::V4(_))).count();
    if in_v4 > ADDRESSES_V4_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface takes one IPv4 address here"));
    }
    silence(name)?;
    let v4 = socket(AddressFamily::INET)?;
    sys::set_mtu(v4.as_fd(), parsed, mtu)?;
    for address in addresses {
        match address {
            IpNet::V4(net) => {
                sys::set_address4(v4.as_fd(), parsed, net.addr())?;
                sys::set_mask4(v4.as_fd(), parsed, net.netmask())?;
            }
            IpNet::V6(net) => {
                let index = rustix::net::netdevice::name_to_index(&v4, name)?;
                address::add(index, net.addr(), net.prefix_len())?;
            }
        }
    }
    Ok(())
}

/// Brings an interface up.
///
/// # Errors
/// `InvalidInput` for a bad name; `PermissionDenied` without CAP_NET_ADMIN; the kernel's for an
/// interface that is not there.
pub fn up(name: &str) -> io::Result<()> {
    let name = Name::parse(name)?;
    sys::set_up(socket(AddressFamily::INET)?.as_fd(), name)
}

/// Sends everything for `destination` into an interface that is up.
///
/// # Errors
/// `InvalidInput` for a bad name; `AlreadyExists` for a route that is there; `PermissionDenied` without
/// CAP_NET_ADMIN; the kernel's for an interface that is not there, or not up.
pub fn add_route(name: &str, destination: IpNet) -> io::Result<()> {
    let parsed = Name::parse(name)?;
    match destination.trunc() {
        IpNet::V4(net) => {
            sys::add_route4(socket(AddressFamily::INET)?.as_fd(), &parsed, net.addr(), net.netmask())
        }
        IpNet::V6(net) => {
            let v6 = socket(AddressFamily::INET6)?;
            let index = rustix::net::netdevice::name_to_index(&v6, name)?;
            sys::add_route6(v6.as_fd(), index, net.addr(), net.prefix_len())
        }
    }
}

/// Turns off what the kernel would send and believe by itself. A kernel without IPv6 has none of it.
fn silence(name: &str) -> io::Result<()> {
    for (setting, value) in SILENT {
        match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) | Ok(()) => {}
        }
    }
    Ok(())
}

/// A socket only to speak to the kernel through.
fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

const DEVICE: &str = "/dev/net/tun";
/// The older `ioctl`s know one IPv4 address per interface.
const ADDRESSES_V4_MAX: usize = 1;
/// `Documentation/networking/ip-sysctl.rst`: 1 is IN6_ADDR_GEN_MODE_NONE.
const SILENT: [(&str, &str); 4] =
    [("addr_gen_mode", "1"), ("router_solicitations", "0"), ("accept_ra", "0"), ("autoconf", "0")];
