//! Which packets pass between a peer and the office: the bundle's table of destinations, both ways.
//!
//! ```text
//! up     peer ──► destination, if the table has it with this protocol and destination port
//! down   source ──► peer, if the table has the source with this protocol and source port
//! ```
//!
//! There is no state: down passes whatever could be an answer. No peer reaches another one, whatever
//! the table says. Every peer reaches the gateway's own post (`lease.md` 19), and one that was not answered
//! there yet reaches nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kontor_bundle::{Access, Destination, Protocol};
use kontor_wire::post;

use crate::packet::{Header, ICMP, ICMPV6, Ports, TCP, UDP};

/// The destinations of one revision of a line's bundle.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Table {
    v4: Vec<Destination>,
    v6: Vec<Destination>,
}

/// The addresses that peers have, and the gateway's own among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pools {
    pub(crate) v4: Ipv4Net,
    pub(crate) v6: Ipv6Net,
    pub(crate) own_v4: Ipv4Addr,
    pub(crate) own_v6: Ipv6Addr,
}

/// What holds for a peer's packets besides the way to the post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passage<'a> {
    /// Nothing: its `Hello` was not answered yet.
    Shut,
    /// Both tables.
    Open([&'a Table; 2]),
}

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From a peer.
    Up,
    /// To a peer.
    Down,
}

/// Why a packet does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Its headers cannot be read for certain.
    Unreadable,
    /// Both its ends are peers.
    PeerToPeer,
    /// The table does not have it.
    NotListed,
    /// The peer has not been answered at the post yet.
    BeforeHello,
}

impl Refusal {
    pub(crate) const ALL: [Self; 4] =
        [Self::Unreadable, Self::PeerToPeer, Self::NotListed, Self::BeforeHello];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::PeerToPeer => "peer_to_peer",
            Self::NotListed => "not_listed",
            Self::BeforeHello => "before_hello",
        }
    }
}

impl Pools {
    pub(crate) fn contain(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.contains(&address),
            IpAddr::V6(address) => self.v6.contains(&address),
        }
    }

    fn has_post(&self, header: &Header, direction: Direction) -> bool {
        let Ports::Of { source, destination } = header.ports else { return false };
        let (office, port) = match direction {
            Direction::Up => (header.destination, destination),
            Direction::Down => (header.source, source),
        };
        let own = match office {
            IpAddr::V4(address) => address == self.own_v4,
            IpAddr::V6(address) => address == self.own_v6,
        };
        own && port == post::PORT && header.protocol == TCP
    }
}

impl Table {
    pub(crate) fn new(access: &Access) -> Self {
        let (v4, v6) = access
            .destinations
            .iter()
            .cloned()
            .partition(|destination| matches!(destination.to, IpNet::V4(_)));
        Self { v4, v6 }
    }

    fn lists(&self, header: &Header, direction: Direction) -> bool {
        let (office, port) = match (direction, header.ports) {
            (Direction::Up, Ports::Of { destination, .. }) => (header.destination, Some(destination)),
            (Direction::Up, Ports::None | Ports::Elsewhere) => (header.destination, None),
            (Direction::Down, Ports::Of { source, .. }) => (header.source, Some(source)),
            (Direction::Down, Ports::None | Ports::Elsewhere) => (header.source, None),
        };
        let destinations = match office {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        destinations.iter().any(|destination| {
            destination.to.contains(&office)
                && is_protocol(destination.protocol, header.protocol, office)
                && has_port(destination.ports, port)
        })
    }
}

/// Whether a packet passes.
pub(crate) fn check(
    packet: &[u8],
    direction: Direction,
    pools: &Pools,
    passage: Passage<'_>,
) -> Result<(), Refusal> {
    let header = Header::parse(packet).map_err(|_| Refusal::Unreadable)?;
    if pools.has_post(&header, direction) {
        return Ok(());
    }
    let office = match direction {
        Direction::Up => header.destination,
        Direction::Down => header.source,
    };
    if pools.contain(office) {
        return Err(Refusal::PeerToPeer);
    }
    let Passage::Open([first, second]) = passage else { return Err(Refusal::BeforeHello) };
    let listed =
        first.lists(&header, direction) && (std::ptr::eq(first, second) || second.lists(&header, direction));
    if listed { Ok(()) } else { Err(Refusal::NotListed) }
}

/// Where a packet goes.
pub(crate) fn destination(packet: &[u8]) -> Result<IpAddr, Refusal> {
    Header::parse(packet).map(|header| header.destination).map_err(|_| Refusal::Unreadable)
}

fn is_protocol(wanted: Protocol, number: u8, office: IpAddr) -> bool {
    match wanted {
        Protocol::Tcp => number == TCP,
        Protocol::Udp => number == UDP,
        Protocol::Icmp => number == if office.is_ipv4() { ICMP } else { ICMPV6 },
        Protocol::Any => true,
    }
}

/// Whether the port is within the range. One that is not known is within no range but that of all.
fn has_port(range: Option<[u16; 2]>, port: Option<u16>) -> bool {
    match (range, port) {
        (None, _) => true,
        (Some([first, last]), Some(port)) => (first..=last).contains(&port),
        (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::tests::{ports, v4, v6};

    const PEER_V4: &str = "10.9.0.7";
    const PEER_V6: &str = "fd09::7";

    fn pools() -> Pools {
        Pools {
            v4: "10.9.0.0/16".parse().unwrap(),
            v6: "fd09::/64".parse().unwrap(),
            own_v4: "10.9.0.1".parse().unwrap(),
            own_v6: "fd09::1".parse().unwrap(),
        }
    }

    fn table(destinations: &[(&str, Protocol, Option<[u16; 2]>)]) -> Table {
        let destinations = destinations
            .iter()
            .map(|(to, protocol, ports)| Destination {
                to: to.parse().unwrap(),
                protocol: *protocol,
                ports: *ports,
            })
            .collect();
        Table::new(&Access { destinations })
    }

    fn up(table: &Table, packet: &[u8]) -> Result<(), Refusal> {
        check(packet, Direction::Up, &pools(), Passage::Open([table, table]))
    }

    fn down(table: &Table, packet: &[u8]) -> Result<(), Refusal> {
        check(packet, Direction::Down, &pools(), Passage::Open([table, table]))
    }

    #[test]
    fn packet_passes_to_a_listed_network_and_not_beside_it() {
        let table = table(&[("10.0.0.0/24", Protocol::Any, None), ("fd00:1::/32", Protocol::Any, None)]);
        for (destination, passes) in
            [("10.0.0.0", true), ("10.0.0.255", true), ("10.0.1.0", false), ("9.255.255.255", false)]
        {
            assert_eq!(up(&table, &v4(PEER_V4, destination, 17, &ports(1, 2))).is_ok(), passes);
        }
        assert_eq!(up(&table, &v6(PEER_V6, "fd00:1::9", 17, &ports(1, 2))), Ok(()));
        assert_eq!(up(&table, &v6(PEER_V6, "fd00:2::9", 17, &ports(1, 2))), Err(Refusal::NotListed));
    }

    #[test]
    fn port_range_holds_at_its_edges_and_by_direction() {
        let table = table(&[("10.0.0.1/32", Protocol::Tcp, Some([80, 443]))]);
        for (port, passes) in [(79, false), (80, true), (443, true), (444, false)] {
            assert_eq!(up(&table, &v4(PEER_V4, "10.0.0.1", 6, &ports(9, port))).is_ok(), passes);
            assert_eq!(down(&table, &v4("10.0.0.1", PEER_V4, 6, &ports(port, 9))).is_ok(), passes);
            assert!(up(&table, &v4(PEER_V4, "10.0.0.1", 6, &ports(port, 9))).is_err());
            assert!(down(&table, &v4("10.0.0.1", PEER_V4, 6, &ports(9, port))).is_err());
        }
    }

    #[test]
    fn protocol_is_the_listed_one() {
        let icmp = table(&[("10.0.0.1/32", Protocol::Icmp, None), ("fd00::1/128", Protocol::Icmp, None)]);
        assert_eq!(up(&icmp, &v4(PEER_V4, "10.0.0.1", 1, &[8, 0])), Ok(()));
        assert_eq!(down(&icmp, &v4("10.0.0.1", PEER_V4, 1, &[0, 0])), Ok(()));
        assert_eq!(up(&icmp, &v6(PEER_V6, "fd00::1", 58, &[128, 0])), Ok(()));
        assert_eq!(up(&icmp, &v4(PEER_V4, "10.0.0.1", 58, &[128, 0])), Err(Refusal::NotListed));
        assert_eq!(up(&icmp, &v6(PEER_V6, "fd00::1", 1, &[8, 0])), Err(Refusal::NotListed));
        for (protocol, other) in [(Protocol::Tcp, 17), (Protocol::Udp, 6)] {
            let table = table(&[("10.0.0.1/32", protocol, None)]);
            assert_eq!(up(&table, &v4(PEER_V4, "10.0.0.1", other, &ports(1, 2))), Err(Refusal::NotListed));
        }
        let any = table(&[("10.0.0.1/32", Protocol::Any, None)]);
        assert_eq!(up(&any, &v4(PEER_V4, "10.0.0.1", 47, &[])), Ok(()));
    }

    #[test]
    fn later_fragment_passes_only_where_all_ports_do() {
        let mut fragment = v4(PEER_V4, "10.0.0.1", 17, &ports(1, 80));
        fragment[7] = 1;
        let ranged = table(&[("10.0.0.1/32", Protocol::Udp, Some([0, 65535]))]);
        assert_eq!(up(&ranged, &fragment), Err(Refusal::NotListed));
        let open = table(&[("10.0.0.1/32", Protocol::Udp, None)]);
        assert_eq!(up(&open, &fragment), Ok(()));
    }

    #[test]
    fn peers_do_not_reach_each_other_whatever_is_listed() {
        let table = table(&[("0.0.0.0/0", Protocol::Any, None), ("::/0", Protocol::Any, None)]);
        assert_eq!(up(&table, &v4(PEER_V4, "8.8.8.8", 17, &ports(1, 2))), Ok(()));
        assert_eq!(up(&table, &v4(PEER_V4, "10.9.0.8", 17, &ports(1, 2))), Err(Refusal::PeerToPeer));
        assert_eq!(up(&table, &v6(PEER_V6, "fd09::8", 17, &ports(1, 2))), Err(Refusal::PeerToPeer));
        assert_eq!(down(&table, &v4("10.9.0.8", PEER_V4, 17, &ports(1, 2))), Err(Refusal::PeerToPeer));
    }

    #[test]
    fn packet_passes_both_tables_or_not_at_all() {
        let old = table(&[("10.0.0.1/32", Protocol::Any, None), ("10.0.0.2/32", Protocol::Any, None)]);
        let new = table(&[("10.0.0.2/32", Protocol::Any, None), ("10.0.0.3/32", Protocol::Any, None)]);
        for (destination, passes) in [("10.0.0.1", false), ("10.0.0.2", true), ("10.0.0.3", false)] {
            let packet = v4(PEER_V4, destination, 17, &ports(1, 2));
            for tables in [[&old, &new], [&new, &old]] {
                assert_eq!(check(&packet, Direction::Up, &pools(), Passage::Open(tables)).is_ok(), passes);
            }
        }
    }

    #[test]
    fn peer_that_was_not_answered_reaches_the_post_and_nothing_else() {
        let ports = |to_post: bool, up: bool| {
            let office = if to_post { post::PORT } else { post::PORT + 1 };
            if up { ports(9, office) } else { ports(office, 9) }
        };
        let shut = |packet: &[u8], direction| check(packet, direction, &pools(), Passage::Shut);
        for (own, peer, build) in
            [("10.9.0.1", PEER_V4, v4 as fn(&str, &str, u8, &[u8]) -> Vec<u8>), ("fd09::1", PEER_V6, v6)]
        {
            assert_eq!(shut(&build(peer, own, 6, &ports(true, true)), Direction::Up), Ok(()));
            assert_eq!(shut(&build(own, peer, 6, &ports(true, false)), Direction::Down), Ok(()));
            let not = [
                build(peer, own, 6, &ports(false, true)),
                build(peer, own, 17, &ports(true, true)),
                build(peer, own, 6, &ports(true, false)),
            ];
            for packet in not {
                assert_eq!(shut(&packet, Direction::Up), Err(Refusal::PeerToPeer));
            }
        }
        let office = v4(PEER_V4, "10.0.0.1", 6, &ports(true, true));
        assert_eq!(shut(&office, Direction::Up), Err(Refusal::BeforeHello));
    }

    #[test]
    fn post_is_reached_whatever_the_table_lists() {
        let nothing = table(&[]);
        assert_eq!(up(&nothing, &v4(PEER_V4, "10.9.0.1", 6, &ports(9, post::PORT))), Ok(()));
        assert_eq!(down(&nothing, &v4("10.9.0.1", PEER_V4, 6, &ports(post::PORT, 9))), Ok(()));
    }

    #[test]
    fn empty_table_passes_nothing_and_garbage_is_unreadable() {
        let nothing = table(&[]);
        assert_eq!(up(&nothing, &v4(PEER_V4, "10.0.0.1", 17, &ports(1, 2))), Err(Refusal::NotListed));
        assert_eq!(up(&nothing, &[0x45; 12]), Err(Refusal::Unreadable));
    }
}
