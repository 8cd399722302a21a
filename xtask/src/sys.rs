//! The one thing here that no safe interface offers: a packet socket bound to one interface.

#![expect(unsafe_code, reason = "packet(7) sockets have addresses that no safe wrapper builds")]
#![expect(clippy::cast_possible_truncation, reason = "constants and sizes of C structures")]

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// A socket that receives every frame that passes `interface` of the calling thread's network
/// namespace in either direction, or of all its interfaces for `None` (packet(7)).
pub(crate) fn packet_socket(interface: Option<u32>) -> io::Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointer.
    let raw = check(unsafe { libc::socket(libc::AF_PACKET, flags, 0) })?;
    // SAFETY: `raw` was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let buffer: libc::c_int = 32 << 20;
    // SAFETY: the pointer and length describe `buffer`. Failure leaves the default, and the count of
    // lost packets tells whether that was enough.
    let _ = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const buffer).cast(),
            mem::size_of_val(&buffer) as libc::socklen_t,
        )
    };
    // SAFETY: `sockaddr_ll` is plain data for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = interface.unwrap_or(0).cast_signed();
    // SAFETY: the pointer and length describe `address`.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

/// How many packets the kernel could not hand to a packet socket since the last call.
pub(crate) fn lost_packets(socket: &OwnedFd) -> io::Result<u32> {
    // SAFETY: `tpacket_stats` is plain data for which zero is a value.
    let mut stats: libc::tpacket_stats = unsafe { mem::zeroed() };
    let mut length = mem::size_of_val(&stats) as libc::socklen_t;
    // SAFETY: the pointers describe `stats` and its length.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut length,
        )
    })?;
    Ok(stats.tp_drops)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
