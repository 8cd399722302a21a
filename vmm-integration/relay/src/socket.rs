//! The sides of the relay: one faces the network, the other the guest.

use crate::gateways::Family;
use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
};

/// The guest's side, in non-blocking mode.
#[derive(Debug)]
pub enum Uplink {
    /// The other end of a virtio-serial port: frames behind their length.
    Stream(UnixStream),
    /// The other end of a network device: each packet is one Ethernet frame with one frame in it. A SEQPACKET
    /// socket, whose end shows as an empty packet.
    Ethernet(UnixDatagram),
}

impl AsFd for Uplink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(stream) => stream.as_fd(),
            Self::Ethernet(socket) => socket.as_fd(),
        }
    }
}

/// A socket that sends and receives datagrams and never waits.
pub trait Datagrams: AsFd {
    /// Receives one datagram. [`io::ErrorKind::WouldBlock`] when there is none.
    ///
    /// # Errors
    /// As the operating system says.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)>;

    /// Sends one datagram. [`io::ErrorKind::WouldBlock`] when there is no room for it yet.
    ///
    /// # Errors
    /// As the operating system says.
    fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()>;
}

/// The socket must be in non-blocking mode.
impl Datagrams for UdpSocket {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.recv_from(buffer)
    }

    fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.send_to(datagram, to).map(|_| ())
    }
}

/// One socket for each family; a host without IPv6 has no second.
#[derive(Debug)]
pub(crate) struct Sockets<S> {
    pub(crate) v4: S,
    pub(crate) v6: Option<S>,
}

impl<S> Sockets<S> {
    pub(crate) fn of(&self, family: Family) -> Option<&S> {
        match family {
            Family::V4 => Some(&self.v4),
            Family::V6 => self.v6.as_ref(),
        }
    }
}
