//! Allowed IPs: which peer a network is sent to, and may send from (WireGuard paper, 2). Each network is one peer's; of
//! those that contain an address the longest counts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::tunnel::PeerId;

#[derive(Default)]
pub(crate) struct AllowedIps {
    peers: BTreeMap<IpNet, PeerId>,
    /// Lengths of prefixes of each family, as often as there are networks of them.
    lens: [BTreeMap<u8, usize>; 2],
}

impl AllowedIps {
    /// The network is this peer's from now on.
    pub(crate) fn insert(&mut self, network: IpNet, peer: PeerId) {
        if self.peers.insert(network.trunc(), peer).is_none() {
            *self.lens[family(&network)].entry(network.prefix_len()).or_default() += 1;
        }
    }

    /// The network is nobody's, if it was this peer's.
    pub(crate) fn remove(&mut self, network: IpNet, peer: PeerId) {
        let network = network.trunc();
        if self.peers.get(&network) != Some(&peer) {
            return;
        }
        self.peers.remove(&network);
        let lens = &mut self.lens[family(&network)];
        if let Some(count) = lens.get_mut(&network.prefix_len()) {
            *count -= 1;
            if *count == 0 {
                lens.remove(&network.prefix_len());
            }
        }
    }

    /// Nothing is this peer's any more.
    pub(crate) fn remove_peer(&mut self, peer: PeerId) {
        let networks: BTreeSet<_> =
            self.peers.iter().filter(|(_, of)| **of == peer).map(|(network, _)| *network).collect();
        for network in networks {
            self.remove(network, peer);
        }
    }

    /// The peer with the longest network that contains the address: a look-up for each length that there is.
    pub(crate) fn get(&self, address: IpAddr) -> Option<PeerId> {
        let lens = &self.lens[usize::from(address.is_ipv6())];
        lens.keys().rev().find_map(|len| {
            let network = IpNet::new(address, *len).ok()?.trunc();
            self.peers.get(&network).copied()
        })
    }
}

fn family(network: &IpNet) -> usize {
    usize::from(matches!(network, IpNet::V6(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::PeerId;

    fn table(entries: &[(&str, u32)]) -> AllowedIps {
        let mut table = AllowedIps::default();
        for (network, peer) in entries {
            table.insert(network.parse().unwrap(), PeerId::of_session(*peer << 8));
        }
        table
    }

    fn get(table: &AllowedIps, address: &str) -> Option<u32> {
        let found = table.get(address.parse().unwrap());
        (0..9).find(|peer| found == Some(PeerId::of_session(peer << 8)))
    }

    #[test]
    fn longest_network_counts() {
        let table = table(&[
            ("0.0.0.0/0", 1),
            ("10.0.0.0/8", 2),
            ("10.1.0.0/16", 3),
            ("10.1.2.3/32", 4),
            ("fd00::/8", 5),
        ]);
        for (address, peer) in
            [("192.0.2.1", 1), ("10.9.9.9", 2), ("10.1.9.9", 3), ("10.1.2.3", 4), ("fd00::1", 5)]
        {
            assert_eq!(get(&table, address), Some(peer), "{address}");
        }
        assert_eq!(get(&table, "2001:db8::1"), None);
    }

    #[test]
    fn network_moves_and_is_taken_away_from_its_own_peer_only() {
        let mut table = table(&[("10.0.0.0/8", 1), ("10.0.0.0/8", 2), ("10.1.0.0/16", 1)]);
        assert_eq!((get(&table, "10.9.0.1"), get(&table, "10.1.0.1")), (Some(2), Some(1)));
        table.remove("10.0.0.0/8".parse().unwrap(), PeerId::of_session(1 << 8));
        assert_eq!(get(&table, "10.9.0.1"), Some(2));
        table.remove_peer(PeerId::of_session(2 << 8));
        assert_eq!((get(&table, "10.9.0.1"), get(&table, "10.1.0.1")), (None, Some(1)));
        table.remove_peer(PeerId::of_session(1 << 8));
        assert!(table.lens.iter().all(BTreeMap::is_empty) && table.peers.is_empty());
    }

    #[test]
    fn bits_of_hosts_do_not_count() {
        let table = table(&[("10.1.2.3/8", 1)]);
        assert_eq!(get(&table, "10.200.0.1"), Some(1));
    }
}
