//! The kernel's driver, its IP stack and one UDP socket, as a program without an uplink of ours would have them.
//!
//! Alone each datagram is a system call. As trains, datagrams of one length go to the kernel, and come from it,
//! in one call (`UDP_SEGMENT`, `UDP_GRO`, udp(7)).

use super::load::{Drive, Round};
use super::{BenchError, DATAGRAM_MAX, GUEST, HOST, UDP_PORT, system};
use crate::init::{ports::APPEAR_MAX, uevent::Uevents};
use crate::sys::set_udp_option;
use crate::tunnel::uplink::Rest;
use kontor_wire::uplink::{MAX_DATAGRAM, MAX_SEGMENTS};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

/// Where the kernel lists interfaces.
const INTERFACES: &str = "/sys/class/net";
/// Bits of the prefix that guest and host share.
const PREFIX: u8 = 30;
/// What Ethernet carries.
const MTU: u16 = 1500;
/// Bytes that may wait to be received: what a program that cares asks for. For sending the kernel's own limit
/// stays: what is beyond the device's queue would be dropped without a word.
const BUFFER: usize = 4 << 20;
/// Datagrams, or trains, taken in one batch.
const BATCH: usize = 64;

/// The socket.
pub(super) struct Socket {
    socket: UdpSocket,
    bytes: usize,
    /// Datagrams that go in one call.
    segments: usize,
    buffer: Box<[u8]>,
}

/// Brings the interface up and opens the socket.
pub(super) fn open(uevents: &Uevents) -> Result<Socket, BenchError> {
    let name = uevents.until(APPEAR_MAX, device).map_err(system("look for the interface"))?;
    let name = name.ok_or(BenchError::Missing("network device"))?;
    let own = format!("{GUEST}/{PREFIX}").parse().map_err(|_| BenchError::Missing("network"))?;
    kontor_tun::configure(&name, &[own], MTU).map_err(system("configure the interface"))?;
    kontor_tun::up(&name).map_err(system("bring the interface up"))?;
    let make = || {
        let socket = UdpSocket::bind(SocketAddr::from((GUEST, UDP_PORT)))?;
        socket.connect(SocketAddr::from((HOST, UDP_PORT)))?;
        socket.set_nonblocking(true)?;
        set_socket_recv_buffer_size_force(&socket, BUFFER)?;
        Ok(socket)
    };
    let socket = make().map_err(system("open the socket"))?;
    Ok(Socket { socket, bytes: 0, segments: 1, buffer: vec![0x5A; MAX_DATAGRAM].into_boxed_slice() })
}

/// The interface that stands for a device, once there is one.
fn device() -> io::Result<Option<String>> {
    for entry in std::fs::read_dir(INTERFACES)? {
        let entry = entry?;
        if entry.path().join("device").exists() {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

/// Datagrams of one length that go in one call.
fn segments(bytes: usize) -> usize {
    (MAX_DATAGRAM / bytes.clamp(1, DATAGRAM_MAX)).min(MAX_SEGMENTS)
}

impl Drive for Socket {
    fn set(&mut self, bytes: usize, trains: bool) -> io::Result<()> {
        (self.bytes, self.segments) = (bytes, if trains { segments(bytes) } else { 1 });
        let segment = if trains { i32::try_from(bytes).map_err(io::Error::other)? } else { 0 };
        set_udp_option(self.socket.as_fd(), libc::UDP_SEGMENT, segment)?;
        set_udp_option(self.socket.as_fd(), libc::UDP_GRO, i32::from(trains))
    }

    fn send(&mut self, datagram: &[u8]) -> Round {
        let mut sent = 0;
        for _ in 0..BATCH.div_ceil(self.segments) {
            let bytes = if self.segments > 1 { &self.buffer[..self.segments * self.bytes] } else { datagram };
            match self.socket.send(bytes) {
                Ok(_) => sent += self.segments as u64,
                Err(error) if is(&error, Errno::AGAIN) => return Ok((sent, Rest::None)),
                // The device's queue is full; the socket's own is what says when there is room again.
                Err(error) if is(&error, Errno::NOBUFS) => return Ok((sent, Rest::More)),
                Err(error) => return Err(error),
            }
        }
        Ok((sent, Rest::More))
    }

    fn receive(&mut self) -> Round {
        let mut come = 0;
        for _ in 0..BATCH {
            match self.socket.recv(&mut self.buffer) {
                Ok(length) => come += (length / self.bytes.max(1)) as u64,
                Err(error) if is(&error, Errno::AGAIN) => return Ok((come, Rest::None)),
                Err(error) => return Err(error),
            }
        }
        Ok((come, Rest::More))
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn train_has_no_more_than_the_kernel_takes() {
        assert_eq!((segments(32), segments(64)), (MAX_SEGMENTS, MAX_SEGMENTS));
        assert_eq!(segments(DATAGRAM_MAX), 45);
        for bytes in 32..=DATAGRAM_MAX {
            assert!(segments(bytes) * bytes <= MAX_DATAGRAM);
        }
    }
}
