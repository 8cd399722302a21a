//! The table of gateways: the only addresses that the relay knows.

use crate::message::{MAX_ENDPOINTS, MAX_GATEWAYS};
use kontor_wire::uplink::GatewayId;
use std::net::SocketAddr;

/// Which of the two sockets an endpoint is reached through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(address: &SocketAddr) -> Self {
        match address {
            SocketAddr::V4(_) => Self::V4,
            SocketAddr::V6(_) => Self::V6,
        }
    }
}

/// Why a table is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// More than [`MAX_GATEWAYS`].
    #[error("a table of {0} gateways")]
    Gateways(usize),
    /// A gateway with no endpoint, or with more than [`MAX_ENDPOINTS`].
    #[error("gateway {id} has {endpoints} endpoints")]
    Endpoints {
        /// Which gateway.
        id: u8,
        /// How many endpoints.
        endpoints: usize,
    },
    /// Two gateways of one id, or two with the same first endpoint: an answer could belong to both.
    #[error("gateway {0} is named twice")]
    Repeated(u8),
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<(GatewayId, SocketAddr)>,
}

impl Table {
    /// One row for each gateway: its first endpoint that `reachable` says there is a socket for.
    pub(crate) fn new(
        gateways: &[(u8, Vec<SocketAddr>)],
        reachable: impl Fn(Family) -> bool,
    ) -> Result<Self, TableError> {
        if gateways.len() > MAX_GATEWAYS {
            return Err(TableError::Gateways(gateways.len()));
        }
        let mut table = Self { rows: Vec::with_capacity(gateways.len()) };
        for (id, endpoints) in gateways {
            if endpoints.is_empty() || endpoints.len() > MAX_ENDPOINTS {
                return Err(TableError::Endpoints { id: *id, endpoints: endpoints.len() });
            }
            let usable = endpoints.iter().find(|endpoint| reachable(Family::of(endpoint)));
            let Some(&endpoint) = usable else { continue };
            if table.endpoint(GatewayId(*id)).is_some() || table.gateway(&endpoint).is_some() {
                return Err(TableError::Repeated(*id));
            }
            table.rows.push((GatewayId(*id), endpoint));
        }
        Ok(table)
    }

    pub(crate) fn endpoint(&self, id: GatewayId) -> Option<SocketAddr> {
        self.rows.iter().find(|(row, _)| *row == id).map(|(_, endpoint)| *endpoint)
    }

    /// The gateway whose endpoint is exactly `source`.
    pub(crate) fn gateway(&self, source: &SocketAddr) -> Option<GatewayId> {
        let same = |row: &SocketAddr| row.ip() == source.ip() && row.port() == source.port();
        self.rows.iter().find(|(_, row)| same(row)).map(|(id, _)| *id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn first_endpoint_that_has_a_socket_is_used() {
        let gateways = [(3, vec![address("[::1]:9"), address("192.0.2.1:9"), address("192.0.2.2:9")])];
        let both = Table::new(&gateways, |_| true).unwrap();
        assert_eq!(both.endpoint(GatewayId(3)), Some(address("[::1]:9")));
        let v4 = Table::new(&gateways, |family| family == Family::V4).unwrap();
        assert_eq!(v4.endpoint(GatewayId(3)), Some(address("192.0.2.1:9")));
        assert_eq!(v4.gateway(&address("192.0.2.1:9")), Some(GatewayId(3)));
    }

    #[test]
    fn endpoint_that_is_not_used_is_no_source() {
        let gateways = [(3, vec![address("192.0.2.1:9"), address("192.0.2.2:9")])];
        let table = Table::new(&gateways, |_| true).unwrap();
        assert_eq!(table.gateway(&address("192.0.2.2:9")), None);
        assert_eq!(table.gateway(&address("192.0.2.1:10")), None);
    }

    #[test]
    fn table_at_the_limits_passes_and_one_more_is_refused() {
        let endpoints = |id: u8, count: usize| (id, vec![address(&format!("192.0.2.{id}:9")); count]);
        let row = |id| endpoints(id, MAX_ENDPOINTS);
        assert!(Table::new(&(0..8).map(row).collect::<Vec<_>>(), |_| true).is_ok());
        assert_eq!(
            Table::new(&(0..9).map(row).collect::<Vec<_>>(), |_| true).unwrap_err(),
            TableError::Gateways(MAX_GATEWAYS + 1)
        );
        for count in [0, MAX_ENDPOINTS + 1] {
            assert_eq!(
                Table::new(&[endpoints(1, count)], |_| true).unwrap_err(),
                TableError::Endpoints { id: 1, endpoints: count }
            );
        }
    }

    #[test]
    fn repeated_id_and_shared_endpoint_are_refused() {
        let (a, b) = (vec![address("192.0.2.1:9")], vec![address("192.0.2.2:9")]);
        let refused = |rows: &[_]| Table::new(rows, |_| true).unwrap_err();
        assert_eq!(refused(&[(1, a.clone()), (1, b)]), TableError::Repeated(1));
        assert_eq!(refused(&[(1, a.clone()), (2, a)]), TableError::Repeated(2));
    }
}
