//! The relay's sockets, one for each gateway, and the watch over the host's network.
//!
//! Each is connected here, to the gateway's first endpoint that the host has a way to, and handed to the relay. A
//! connected socket keeps the address that it sends from. So when the host's network changes (another cable, Wi-Fi, a
//! VPN), the ways are looked for again, and the relay gets fresh sockets where they are others. A socket whose way
//! is the same stays, and with it the port that the gateway and every router in between know.

use crate::sys;
use kontor_relay::message::Gateway;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, connect, getsockname,
    netlink::SocketAddrNetlink, recv, socket_with, sockopt,
};
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};

/// Bytes that the kernel may hold for each socket and direction, as far as the host allows.
const BUFFER: usize = 2 << 20;
/// The least time between two looks at the network: a change of it is many messages.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Messages that are read for one look; more bring another one.
const MESSAGES_MAX: usize = 1024;
/// What tells of a change: of interfaces, which take their routes with them in silence, of addresses, routes and
/// rules for routes (`linux/rtnetlink.h`; IPv6's rules are group 19).
const GROUPS: libc::c_int = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV4_RULE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE
    | 1 << 18;

/// The gateways and the ways to them.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// Each gateway with its endpoints, best first.
    wanted: Vec<(u8, Vec<SocketAddr>)>,
    links: Vec<Link>,
}

/// A socket that is connected to a gateway.
#[derive(Debug)]
struct Link {
    gateway: u8,
    endpoint: SocketAddr,
    /// Its own address and port.
    source: SocketAddr,
    socket: OwnedFd,
}

impl Links {
    /// These are the gateways from now on. Whether the relay has to be told.
    pub(crate) fn want(&mut self, gateways: Vec<(u8, Vec<SocketAddr>)>) -> bool {
        let before = (self.table(), self.sources());
        self.wanted = gateways;
        self.look();
        before != (self.table(), self.sources())
    }

    /// The network has changed. Whether the relay has to be told.
    pub(crate) fn look_again(&mut self) -> bool {
        let before = self.sources();
        self.look();
        before != self.sources()
    }

    /// What the relay is told.
    pub(crate) fn table(&self) -> Vec<Gateway> {
        let endpoint = |id| self.link(id).map(|link| link.endpoint);
        self.wanted.iter().map(|(id, _)| Gateway { id: *id, endpoint: endpoint(*id) }).collect()
    }

    /// A socket for each of the table that has an endpoint.
    pub(crate) fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.wanted.iter().filter_map(|(id, _)| self.link(*id)).map(|link| link.socket.as_fd()).collect()
    }

    fn link(&self, gateway: u8) -> Option<&Link> {
        self.links.iter().find(|link| link.gateway == gateway)
    }

    fn sources(&self) -> Vec<(u8, SocketAddr, SocketAddr)> {
        self.links.iter().map(|link| (link.gateway, link.endpoint, link.source)).collect()
    }

    fn look(&mut self) {
        let mut before = std::mem::take(&mut self.links);
        for (gateway, endpoints) in &self.wanted {
            let same = |link: &Link| link.gateway == *gateway && endpoints.contains(&link.endpoint);
            let old = before.iter().position(same).map(|at| before.swap_remove(at));
            let new = endpoints.iter().find_map(|endpoint| Link::new(*gateway, *endpoint).ok());
            let link = match (new, old) {
                (Some(new), Some(old)) if !new.is_another_way_than(&old) => Some(old),
                (Some(new), _) => Some(new),
                // There is none at the moment. Often the old one comes back.
                (None, old) => old,
            };
            self.links.extend(link);
        }
    }
}

impl Link {
    fn new(gateway: u8, endpoint: SocketAddr) -> io::Result<Self> {
        let family = if endpoint.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
        for set in [sockopt::set_socket_recv_buffer_size, sockopt::set_socket_send_buffer_size] {
            set(&socket, BUFFER)?;
        }
        connect(&socket, &endpoint)?;
        let source = SocketAddr::try_from(getsockname(&socket)?)?;
        Ok(Self { gateway, endpoint, source, socket })
    }

    fn is_another_way_than(&self, other: &Self) -> bool {
        (self.endpoint, self.source.ip()) != (other.endpoint, other.source.ip())
    }
}

/// Tells when the host's network has changed.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Netlink's messages on it; `None` where there is no such socket.
    changes: Option<AsyncFd<OwnedFd>>,
    not_before: Instant,
}

impl Watch {
    /// Watches from now on. Where that is impossible nothing is ever told.
    pub(crate) fn new() -> Self {
        let changes = listen().inspect_err(|error| {
            tracing::warn!(%error, "changes of the network are not seen, so a work VM does not follow them");
        });
        Self { changes: changes.ok(), not_before: Instant::now() }
    }

    /// Resolves when something has changed since this was called last.
    pub(crate) async fn changed(&mut self) {
        let Some(changes) = &self.changes else { return std::future::pending().await };
        sleep_until(self.not_before).await;
        let told = changes.async_io(Interest::READABLE, |socket| {
            // What changed is looked at anew, so only that something did counts; that messages were lost, too.
            match recv(socket, &mut [0; 16], RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
            let more = || recv(socket, &mut [0; 16], RecvFlags::DONTWAIT | RecvFlags::TRUNC).is_ok();
            let _all = (0..MESSAGES_MAX).take_while(|_| more()).count();
            Ok(())
        });
        if let Err(error) = told.await {
            tracing::warn!(%error, "changes of the network are not seen any more");
            self.changes = None;
            return;
        }
        self.not_before = Instant::now() + LOOK_EVERY;
    }
}

fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS.cast_unsigned()))?;
    sys::readable(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    fn gateway() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    /// An address that no host has a way to: connect refuses it (RFC 1122, 3.2.1.3).
    fn nowhere() -> SocketAddr {
        "255.255.255.255:9".parse().unwrap()
    }

    #[test]
    fn socket_stays_as_long_as_the_way_does() {
        let ((_a, a), (_b, b)) = (gateway(), gateway());
        let mut links = Links::default();
        assert!(links.want(vec![(1, vec![a]), (2, vec![b])]));
        let before = links.sources();
        assert_eq!(before.len(), 2);
        assert!(!links.want(vec![(1, vec![a]), (2, vec![b])]));
        assert!(!links.look_again());
        assert_eq!(links.sources(), before);
        // One that is left out goes, and the other keeps its socket.
        assert!(links.want(vec![(2, vec![b])]));
        assert_eq!(links.sources(), before[1..]);
        assert_eq!((links.table().len(), links.sockets().len()), (1, 1));
        // Another endpoint is another socket.
        assert!(links.want(vec![(2, vec![a])]));
        assert_ne!(links.sources()[0].2, before[1].2);
    }

    #[test]
    fn first_endpoint_with_a_way_to_it_is_taken_and_a_gateway_without_stays_in_the_table() {
        let (_socket, a) = gateway();
        let mut links = Links::default();
        assert!(links.want(vec![(1, vec![nowhere(), a]), (2, vec![nowhere()])]));
        let gateways = [Gateway { id: 1, endpoint: Some(a) }, Gateway { id: 2, endpoint: None }];
        assert_eq!(links.table(), gateways);
        assert_eq!(links.sockets().len(), 1);
    }

    #[test]
    fn datagrams_come_from_the_socket_that_is_handed_over() {
        let (socket, address) = gateway();
        let mut links = Links::default();
        links.want(vec![(1, vec![address])]);
        rustix::net::send(links.sockets()[0], b"x", rustix::net::SendFlags::empty()).unwrap();
        assert_eq!(socket.recv_from(&mut [0; 9]).unwrap(), (1, links.sources()[0].2));
    }
}
