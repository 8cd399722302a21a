//! What the relay's tests share: kontord's end, the sockets to a gateway, and datagrams that look like WireGuard's.

use kontor_relay::message::{self, Counters, FromDaemon, FromRelay, Gateway};
use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType, recv, sendmsg, socketpair,
    },
};
use std::{
    io::IoSlice,
    mem::MaybeUninit,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

/// Nothing here takes so long: a test that waits for it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const GATEWAY: u8 = 7;

/// kontord's end of the channel to the relay.
pub(crate) struct Daemon(pub(crate) OwnedFd);

/// Both ends of that channel.
pub(crate) fn daemon() -> (Daemon, OwnedFd) {
    let (daemon, control) = packets();
    (Daemon(daemon), control)
}

pub(crate) fn packets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

impl Daemon {
    pub(crate) fn say(&self, message: &FromDaemon) {
        self.send(&message::encode(message).unwrap(), &[]);
    }

    /// Sends a table of gateways, each with its endpoint and a socket; the report behind it makes sure that it is
    /// in use.
    pub(crate) fn hand(&self, table: &[(u8, SocketAddr, BorrowedFd<'_>)]) -> Counters {
        let gateways = table.iter().map(|(id, endpoint, _)| Gateway { id: *id, endpoint: Some(*endpoint) });
        let sockets: Vec<_> = table.iter().map(|(_, _, socket)| *socket).collect();
        let table = FromDaemon::Gateways(gateways.collect());
        self.send(&message::encode(&table).unwrap(), &sockets);
        self.counters()
    }

    pub(crate) fn send(&self, packet: &[u8], sockets: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(message::MAX_GATEWAYS))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(sockets.is_empty() || rights.push(SendAncillaryMessage::ScmRights(sockets)));
        sendmsg(&self.0, &[IoSlice::new(packet)], &mut rights, SendFlags::NOSIGNAL).unwrap();
    }

    pub(crate) fn hear(&self) -> FromRelay {
        let mut packet = [0; message::MAX_MESSAGE];
        let (_, length) = recv(&self.0, packet.as_mut_slice(), RecvFlags::empty()).unwrap();
        message::decode(&packet[..length]).unwrap()
    }

    /// Also shows that the relay still listens.
    pub(crate) fn counters(&self) -> Counters {
        self.say(&FromDaemon::Report);
        match self.hear() {
            FromRelay::Counters(counters) => counters,
            other @ (FromRelay::Ready | FromRelay::Garbage(_)) => panic!("{other:?}"),
        }
    }

    /// Hands over a socket to `gateway` under [`GATEWAY`]; the address that it sends from.
    pub(crate) fn connect(&self, gateway: &UdpSocket) -> SocketAddr {
        let endpoint = gateway.local_addr().unwrap();
        let socket = connected(endpoint);
        self.hand(&[(GATEWAY, endpoint, socket.as_fd())]);
        socket.local_addr().unwrap()
    }
}

/// A socket in a gateway's place.
pub(crate) fn localhost() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A socket as kontord makes it.
pub(crate) fn connected(endpoint: SocketAddr) -> UdpSocket {
    let any = if endpoint.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(endpoint).unwrap();
    socket
}

/// The next datagram, and who sent it.
pub(crate) fn receive(gateway: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut datagram = vec![0; 65_536];
    let (length, source) = gateway.recv_from(&mut datagram).unwrap();
    datagram.truncate(length);
    (datagram, source)
}

/// What looks like a transport message of WireGuard's.
pub(crate) fn transport(length: usize, fill: u8) -> Vec<u8> {
    let mut bytes = vec![fill; length];
    bytes[..4].copy_from_slice(&[4, 0, 0, 0]);
    bytes
}
