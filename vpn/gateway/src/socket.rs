//! The UDP sockets: one for each address to listen on, and answers leave through the one that was asked.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// The sockets in the order of the settings.
pub(crate) struct Sockets(Vec<UdpSocket>);

/// Where a peer is: behind which of our sockets, and at which address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Endpoint {
    pub(crate) socket: usize,
    pub(crate) address: SocketAddr,
}

impl Sockets {
    pub(crate) fn bind(listen: &[SocketAddr]) -> Result<Self, (SocketAddr, io::Error)> {
        let bound = listen.iter().map(|address| bind(*address).map_err(|error| (*address, error)));
        bound.collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }

    /// The next datagram of one socket; `None` when there is no more.
    pub(crate) fn receive(&self, socket: usize, buffer: &mut [u8]) -> io::Result<Option<(Endpoint, usize)>> {
        match self.0[socket].recv_from(buffer) {
            Ok((len, address)) => Ok(Some((Endpoint { socket, address }, len))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn send(&self, to: Endpoint, datagram: &[u8]) -> io::Result<()> {
        self.0[to.socket].send_to(datagram, to.address).map(|_| ())
    }
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    for set in [sockopt::set_socket_recv_buffer_size, sockopt::set_socket_send_buffer_size] {
        // The kernel grants what it may, up to net.core.{r,w}mem_max.
        set(&socket, BUFFER_LEN)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

/// Bytes of a socket's buffers: some milliseconds of datagrams at a gigabit per second.
const BUFFER_LEN: usize = 4 * 1024 * 1024;
