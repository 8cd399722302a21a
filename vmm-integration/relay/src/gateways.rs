//! The table of gateways, each with a socket that kontord has connected to it. The relay has no other, and may
//! neither make nor connect one: whoever takes it over can send to the gateways and to nobody else.

use crate::message::{Gateway, MAX_GATEWAYS};
use kontor_wire::uplink::GatewayId;
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recvfrom, send},
};
use std::{net::SocketAddr, os::fd::OwnedFd};

/// Why a table is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// More than [`MAX_GATEWAYS`].
    #[error("a table of {0} gateways")]
    Gateways(usize),
    /// Two gateways of one id.
    #[error("gateway {0} is named twice")]
    Repeated(u8),
    /// A gateway without its socket, or a socket without a gateway.
    #[error("{came} sockets for {named} endpoints")]
    Sockets {
        /// Endpoints in the table.
        named: usize,
        /// Sockets that came with it.
        came: usize,
    },
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

/// A gateway.
#[derive(Debug)]
pub(crate) struct Row {
    id: GatewayId,
    /// `None` while the host has no way to it.
    link: Option<Link>,
}

/// The way to a gateway.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) gateway: GatewayId,
    pub(crate) socket: OwnedFd,
    endpoint: SocketAddr,
}

impl Table {
    pub(crate) fn new(gateways: &[Gateway], sockets: Vec<OwnedFd>) -> Result<Self, TableError> {
        if gateways.len() > MAX_GATEWAYS {
            return Err(TableError::Gateways(gateways.len()));
        }
        let named = gateways.iter().filter(|gateway| gateway.endpoint.is_some()).count();
        if named != sockets.len() {
            return Err(TableError::Sockets { named, came: sockets.len() });
        }
        let (mut table, mut sockets) = (Self::default(), sockets.into_iter());
        for Gateway { id, endpoint } in gateways {
            let gateway = GatewayId(*id);
            if table.row(gateway).is_some() {
                return Err(TableError::Repeated(*id));
            }
            let link = endpoint.and_then(|endpoint| Some((endpoint, sockets.next()?)));
            let link = link.map(|(endpoint, socket)| Link { gateway, socket, endpoint });
            table.rows.push(Row { id: gateway, link });
        }
        Ok(table)
    }

    pub(crate) fn row(&self, id: GatewayId) -> Option<&Row> {
        self.rows.iter().find(|row| row.id == id)
    }

    pub(crate) fn links(&self) -> impl Iterator<Item = &Link> {
        self.rows.iter().filter_map(|row| row.link.as_ref())
    }
}

impl Row {
    /// Sends one datagram; [`Errno::AGAIN`] when there is no room for it yet.
    pub(crate) fn send(&self, datagram: &[u8]) -> Result<(), Errno> {
        let Some(link) = &self.link else { return Err(Errno::NETUNREACH) };
        let attempt = || send(&link.socket, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop);
        match attempt() {
            answer @ (Ok(()) | Err(Errno::AGAIN)) => answer,
            // A connected socket tells here what an earlier datagram met (an ICMP message), and has not sent this one.
            Err(_) => attempt(),
        }
    }
}

impl Link {
    /// Receives one datagram; [`Errno::AGAIN`] when there is none. `None` is one of somebody else's: it was there
    /// before the socket was connected.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        let (length, _, source) = recvfrom(&self.socket, buffer, RecvFlags::DONTWAIT)?;
        let source = source.and_then(|source| SocketAddr::try_from(source).ok());
        let same =
            |source: SocketAddr| source.ip() == self.endpoint.ip() && source.port() == self.endpoint.port();
        Ok(source.is_some_and(same).then_some(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    /// A table of these gateways, with a socket for each that has an endpoint, and `more`.
    fn table(gateways: &[Gateway], more: usize) -> Result<Table, TableError> {
        let named = gateways.iter().filter(|gateway| gateway.endpoint.is_some()).count();
        let socket = || UdpSocket::bind("127.0.0.1:0").unwrap().into();
        Table::new(gateways, std::iter::repeat_with(socket).take(named + more).collect())
    }

    fn gateway(id: u8) -> Gateway {
        Gateway { id, endpoint: Some("192.0.2.1:9".parse().unwrap()) }
    }

    #[test]
    fn table_at_the_limit_passes_and_one_more_is_refused() {
        assert_eq!(table(&(0..8).map(gateway).collect::<Vec<_>>(), 0).unwrap().links().count(), MAX_GATEWAYS);
        let refused = table(&(0..9).map(gateway).collect::<Vec<_>>(), 0).unwrap_err();
        assert_eq!(refused, TableError::Gateways(MAX_GATEWAYS + 1));
    }

    #[test]
    fn repeated_id_is_refused() {
        assert_eq!(table(&[gateway(1), gateway(1)], 0).unwrap_err(), TableError::Repeated(1));
    }

    #[test]
    fn every_endpoint_has_its_socket_and_every_socket_its_endpoint() {
        assert_eq!(table(&[gateway(1)], 1).unwrap_err(), TableError::Sockets { named: 1, came: 2 });
        let none = Table::new(&[gateway(1)], Vec::new()).unwrap_err();
        assert_eq!(none, TableError::Sockets { named: 1, came: 0 });
    }

    #[test]
    fn gateway_that_the_host_has_no_way_to_is_known_and_not_reached() {
        let table = table(&[Gateway { id: 3, endpoint: None }, gateway(4)], 0).unwrap();
        assert_eq!(table.row(GatewayId(3)).unwrap().send(b"x"), Err(Errno::NETUNREACH));
        assert_eq!(table.links().map(|link| link.gateway).collect::<Vec<_>>(), [GatewayId(4)]);
    }

    #[test]
    fn refused_datagram_costs_no_later_one() {
        let (socket, gone) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let endpoint = gone.local_addr().unwrap();
        socket.connect(endpoint).unwrap();
        drop(gone);
        let table = Table::new(&[Gateway { id: 1, endpoint: Some(endpoint) }], vec![socket.into()]).unwrap();
        let row = table.row(GatewayId(1)).unwrap();
        // On the loopback the refusal is there before the call returns.
        row.send(b"lost").unwrap();
        let back = UdpSocket::bind(endpoint).unwrap();
        row.send(b"arrives").unwrap();
        let mut received = [0; 9];
        back.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        assert_eq!(back.recv(&mut received).unwrap(), 7);
    }
}
