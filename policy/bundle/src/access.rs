//! Which destinations in the office a work VM may open flows to.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Most destinations of a bundle: as many as fit into an envelope.
pub const MAX_DESTINATIONS: usize = 1024;

/// What may be reached. Everything else is dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// A flow that any of these matches may be opened; at most [`MAX_DESTINATIONS`].
    pub destinations: Vec<Destination>,
}

/// A network, and what may be opened to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Destination {
    /// The network, without host bits.
    pub to: IpNet,
    /// The protocol above IP.
    pub protocol: Protocol,
    /// First and last destination port; absent means all. Only for TCP and UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<[u16; 2]>,
}

/// A protocol above IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP for IPv4, ICMPv6 for IPv6.
    Icmp,
    /// Any protocol.
    Any,
}

/// What is wrong with a table of destinations.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessFault {
    /// More than [`MAX_DESTINATIONS`].
    #[error("there are {0} destinations, the limit is {MAX_DESTINATIONS}")]
    TooMany(usize),
    /// A network with host bits: it is not clear what is meant.
    #[error("destination {0} has host bits; {network} may be meant", network = .0.trunc())]
    HostBits(IpNet),
    /// Ports of a protocol that has none.
    #[error("destination {0} has ports, but its protocol is neither tcp nor udp")]
    PortsWithoutProtocol(IpNet),
    /// The first port is above the last.
    #[error("destination {to} has the ports {first} to {last}")]
    PortRange {
        /// The network.
        to: IpNet,
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
}

impl Access {
    pub(crate) fn check(&self) -> Result<(), AccessFault> {
        if self.destinations.len() > MAX_DESTINATIONS {
            return Err(AccessFault::TooMany(self.destinations.len()));
        }
        self.destinations.iter().try_for_each(Destination::check)
    }
}

impl Destination {
    fn check(&self) -> Result<(), AccessFault> {
        if self.to != self.to.trunc() {
            return Err(AccessFault::HostBits(self.to));
        }
        match (self.protocol, self.ports) {
            (Protocol::Icmp | Protocol::Any, Some(_)) => Err(AccessFault::PortsWithoutProtocol(self.to)),
            (Protocol::Tcp | Protocol::Udp, Some([first, last])) if first > last => {
                Err(AccessFault::PortRange { to: self.to, first, last })
            }
            (Protocol::Tcp | Protocol::Udp | Protocol::Icmp | Protocol::Any, _) => Ok(()),
        }
    }
}
