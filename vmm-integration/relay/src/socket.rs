//! The guest's side of the relay.

use std::os::{
    fd::{AsFd, BorrowedFd},
    unix::net::{UnixDatagram, UnixStream},
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
