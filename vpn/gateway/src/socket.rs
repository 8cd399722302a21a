//! The UDP sockets: one for each address to listen on, and answers leave through the one that was asked.
//!
//! Datagrams of one length to one peer leave in one call (`UDP_SEGMENT`), and what came together comes in one (`UDP_GRO`),
//! where kernel and device can. Where they cannot, each has a call of its own, and nobody else notices.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::sys::{self, Inbox};

/// The sockets in the order of the settings.
pub(crate) struct Sockets(Vec<Socket>);

struct Socket {
    socket: UdpSocket,
    /// False once a device has refused segments.
    segments: AtomicBool,
}

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

    /// Opens a port for both families, or for IPv4 alone where there is no IPv6; 0 for any that is free.
    pub(crate) fn bind_port(port: u16) -> io::Result<Self> {
        let v4 = bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))?;
        let port = v4.socket.local_addr()?.port();
        match bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
            Ok(v6) => Ok(Self(vec![v4, v6])),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(Self(vec![v4])),
            Err(error) => Err(error),
        }
    }

    /// The port of [`Self::bind_port`], 0 without any.
    pub(crate) fn port(&self) -> u16 {
        let address = self.0.first().and_then(|socket| socket.socket.local_addr().ok());
        address.map_or(0, |address| address.port())
    }

    /// Which of [`Self::bind_port`]'s sockets reaches an address.
    pub(crate) fn of_family(address: &SocketAddr) -> usize {
        usize::from(address.is_ipv6())
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|socket| socket.socket.as_fd())
    }

    /// Takes what has come to one socket; `WouldBlock` when there is nothing.
    pub(crate) fn receive(&self, socket: usize, inbox: &mut Inbox) -> io::Result<()> {
        let socket = self.0.get(socket).ok_or(io::ErrorKind::WouldBlock)?;
        inbox.receive(socket.socket.as_fd())
    }

    /// Sends one datagram, or not.
    pub(crate) fn send(&self, to: Endpoint, datagram: &[u8]) -> io::Result<()> {
        let socket = self.0.get(to.socket).ok_or(io::ErrorKind::AddrNotAvailable)?;
        socket.socket.send_to(datagram, to.address).map(drop)
    }

    /// Sends datagrams of `segment` bytes each, the last perhaps shorter, at most [`TRAIN_MAX`] of them and
    /// [`TRAIN_LEN_MAX`] bytes. Waits a moment where there is no room: whoever sends so much feels it then, and need not
    /// send again. Returns how many the kernel did not take.
    pub(crate) fn send_train(&self, to: Endpoint, train: &[u8], segment: usize) -> u64 {
        let Some(Socket { socket, segments }) = self.0.get(to.socket) else {
            return train.chunks(segment.max(1)).len() as u64;
        };
        let whole =
            |segment| patiently(socket, || sys::send_train(socket.as_fd(), to.address, train, segment));
        let alone = |datagram: &[u8]| patiently(socket, || socket.send_to(datagram, to.address).map(drop));
        let was = segments.load(Ordering::Relaxed);
        let (failed, segment) = send_train(was, train, segment, whole, alone);
        if was && !segment {
            segments.store(false, Ordering::Relaxed);
            tracing::info!(to = %to.address, "no segments of datagrams on this way: each is sent alone");
        }
        failed
    }
}

/// Sends a train at once where that `can` be done, else one datagram after the other. Returns how many of them failed,
/// and whether it can be done the next time.
fn send_train(
    mut can: bool,
    train: &[u8],
    segment: usize,
    whole: impl FnOnce(u16) -> io::Result<()>,
    mut alone: impl FnMut(&[u8]) -> io::Result<()>,
) -> (u64, bool) {
    let several = u16::try_from(segment).ok().filter(|_| train.len() > segment);
    if let Some(segment) = several.filter(|_| can) {
        match whole(segment) {
            Ok(()) => return (0, can),
            // The device has no checksums of its own, without which the kernel cuts nothing up for it.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => can = false,
            // EMSGSIZE, EINVAL: the path to this peer is too narrow for one of them. Alone, each may go in fragments.
            Err(_) => {}
        }
    }
    let failed = train.chunks(segment.max(1)).filter(|datagram| alone(datagram).is_err()).count();
    (failed as u64, can)
}

/// Sends, and waits once for room where there is none.
fn patiently(socket: &UdpSocket, mut send: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    match send() {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            rustix::event::poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&PATIENCE))?;
            send()
        }
        result => result,
    }
}

fn bind(address: SocketAddr) -> io::Result<Socket> {
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
    // A kernel before 5.0 has none: each datagram is a message then.
    if let Err(error) = sys::receive_trains(socket.as_fd()) {
        tracing::debug!(%error, "no UDP_GRO");
    }
    rustix::net::bind(&socket, &address)?;
    Ok(Socket { socket: socket.into(), segments: AtomicBool::new(true) })
}

/// Most datagrams in a call (`UDP_MAX_SEGMENTS` of older kernels).
pub(crate) const TRAIN_MAX: usize = 64;
/// Most bytes in a call: what a UDP datagram over IPv4 has, which the kernel cuts up.
pub(crate) const TRAIN_LEN_MAX: usize = 65_507;
/// Bytes of a socket's buffers: some milliseconds of datagrams at a gigabit per second.
const BUFFER_LEN: usize = 4 * 1024 * 1024;
/// How long a full socket is waited for before a datagram is dropped.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn train_that_is_refused_goes_out_one_by_one() {
        for (errno, can) in [(libc::EMSGSIZE, true), (libc::EINVAL, true), (libc::EIO, false)] {
            let mut sent = Vec::new();
            let alone = |datagram: &[u8]| {
                sent.push(datagram.len());
                Ok(())
            };
            assert_eq!(send_train(true, &[0; 250], 100, |_| refused(errno), alone), (0, can));
            assert_eq!(sent, [100, 100, 50]);
        }
    }

    #[test]
    fn way_without_segments_is_not_asked_for_them_again() {
        let mut sent = 0;
        let alone = |_: &[u8]| {
            sent += 1;
            if sent == 2 { refused(libc::ENOBUFS) } else { Ok(()) }
        };
        let whole = |_| panic!("this way has no segments");
        assert_eq!(send_train(false, &[0; 300], 100, whole, alone), (1, false));
        assert_eq!(sent, 3);
    }

    #[test]
    fn one_datagram_is_no_train() {
        for len in [1, 99, 100] {
            let whole = |_| panic!("this is one datagram");
            let alone = |datagram: &[u8]| {
                assert_eq!(datagram.len(), len);
                Ok(())
            };
            assert_eq!(send_train(true, &vec![0; len], 100, whole, alone), (0, true));
        }
    }

    #[test]
    fn train_arrives_as_it_was_sent() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(sockets) = Sockets::bind(&[address.parse().unwrap(), address.parse().unwrap()]) else {
                println!("skipped in part: no {address} here");
                continue;
            };
            let address = |socket: usize| sockets.0[socket].socket.local_addr().unwrap();
            let train: Vec<u8> = (0..6_400).map(|at: u32| at.to_le_bytes()[0]).collect();
            let mut inbox = Inbox::new();
            // Together, alone, and with a short one at the end.
            for segment in [100, 6_400, 1_452] {
                assert_eq!(
                    sockets.send_train(Endpoint { socket: 0, address: address(1) }, &train, segment),
                    0
                );
                let mut received = Vec::new();
                while received.len() < train.len() {
                    rustix::event::poll(&mut [PollFd::new(&sockets.0[1].socket, PollFlags::IN)], None)
                        .unwrap();
                    sockets.receive(1, &mut inbox).unwrap();
                    for train in inbox.trains() {
                        assert_eq!(train.from, address(0));
                        assert!(train.bytes.chunks(train.segment).all(|datagram| datagram.len() <= segment));
                        received.extend_from_slice(train.bytes);
                    }
                }
                assert!(received == train, "{segment}");
            }
            let nothing = sockets.receive(1, &mut inbox).unwrap_err();
            assert_eq!((nothing.kind(), inbox.trains().count()), (io::ErrorKind::WouldBlock, 0));
        }
    }
}
