//! What `set` means, without a tunnel.

use ipnet::IpNet;
use kontor_vpn::PublicKey;
use rustix::io::Errno;

use super::{AllowedIp, Change, Device, Set, SetPeer, State, StatePeer};

/// A device that only remembers: peers in the order in which they came, addresses in order.
#[derive(Clone, Default)]
pub struct Model(pub State);

impl Device for Model {
    fn get(&mut self) -> Result<State, Errno> {
        Ok(self.0.clone())
    }

    fn set(&mut self, set: Set) -> Result<(), Errno> {
        match set.private_key {
            Change::Keep => {}
            Change::Remove => self.0.private_key = None,
            Change::Put(key) => self.0.private_key = Some(key),
        }
        let own = self.0.private_key.as_ref().map(|key| PublicKey::from(&key.to_private_key()));
        self.0.peers.retain(|peer| Some(peer.public_key) != own);
        self.0.listen_port = set.listen_port.unwrap_or(self.0.listen_port);
        self.0.fwmark = set.fwmark.unwrap_or(self.0.fwmark);
        if set.replace_peers {
            self.0.peers.clear();
        }
        let others = set.peers.into_iter().filter(|peer| Some(peer.public_key) != own);
        others.for_each(|peer| self.set_peer(peer));
        Ok(())
    }
}

impl Model {
    fn set_peer(&mut self, set: SetPeer) {
        let found = self.0.peers.iter().position(|peer| peer.public_key == set.public_key);
        let index = match found {
            Some(index) if set.remove => {
                self.0.peers.remove(index);
                return;
            }
            Some(index) => index,
            None if set.remove || set.update_only => return,
            None => {
                self.0.peers.push(StatePeer::new(set.public_key));
                self.0.peers.len() - 1
            }
        };
        let peer = &mut self.0.peers[index];
        match set.preshared_key {
            Change::Keep => {}
            Change::Remove => peer.preshared_key = None,
            Change::Put(key) => peer.preshared_key = Some(key),
        }
        peer.endpoint = set.endpoint.or(peer.endpoint);
        peer.persistent_keepalive_s = set.persistent_keepalive_s.unwrap_or(peer.persistent_keepalive_s);
        if set.replace_allowed_ips {
            peer.allowed_ips.clear();
        }
        for change in set.allowed_ips {
            match change {
                AllowedIp::Add(network) => self.allow(index, network),
                AllowedIp::Remove(network) => {
                    self.0.peers[index].allowed_ips.retain(|other| *other != network);
                }
            }
        }
    }

    fn allow(&mut self, index: usize, network: IpNet) {
        for peer in &mut self.0.peers {
            peer.allowed_ips.retain(|other| *other != network);
        }
        let allowed = &mut self.0.peers[index].allowed_ips;
        let place = allowed.partition_point(|other| *other < network);
        allowed.insert(place, network);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Secret, StatePeer};
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from([byte; 32])
    }

    fn allowing(byte: u8, changes: &[AllowedIp]) -> SetPeer {
        let mut peer = SetPeer::new(key(byte));
        peer.allowed_ips = changes.to_vec();
        peer
    }

    fn set(model: &mut Model, peers: Vec<SetPeer>) {
        assert_eq!(model.set(Set { peers, ..Set::default() }), Ok(()));
    }

    fn networks(model: &Model, byte: u8) -> &[IpNet] {
        let peer = model.0.peers.iter().find(|peer| peer.public_key == key(byte));
        peer.map_or(&[], |StatePeer { allowed_ips, .. }| allowed_ips)
    }

    #[test]
    fn address_moves_to_the_peer_that_has_it_last() {
        let (ours, other) = ("10.0.0.0/8".parse().unwrap(), "fd00::/64".parse().unwrap());
        let mut model = Model::default();
        set(&mut model, vec![allowing(1, &[AllowedIp::Add(ours), AllowedIp::Add(other)])]);
        set(&mut model, vec![allowing(2, &[AllowedIp::Add(ours)])]);
        assert_eq!((networks(&model, 1), networks(&model, 2)), (&[other][..], &[ours][..]));
        // Of another peer's nothing is taken away.
        set(&mut model, vec![allowing(1, &[AllowedIp::Remove(ours), AllowedIp::Remove(other)])]);
        assert_eq!((networks(&model, 1), networks(&model, 2)), (&[][..], &[ours][..]));
    }

    #[test]
    fn update_only_makes_no_peer_and_remove_removes_one() {
        let mut model = Model::default();
        set(&mut model, vec![SetPeer { update_only: true, ..SetPeer::new(key(1)) }]);
        assert!(model.0.peers.is_empty());
        set(&mut model, vec![SetPeer::new(key(1)), SetPeer::new(key(2))]);
        set(&mut model, vec![SetPeer { remove: true, ..SetPeer::new(key(1)) }]);
        set(&mut model, vec![SetPeer { remove: true, ..SetPeer::new(key(3)) }]);
        assert_eq!(model.0.peers.len(), 1);
        let replace = Set { replace_peers: true, peers: vec![SetPeer::new(key(4))], ..Set::default() };
        assert_eq!(model.set(replace), Ok(()));
        assert_eq!(model.0.peers.len(), 1);
        assert_eq!(model.0.peers[0].public_key, key(4));
    }

    #[test]
    fn own_key_is_no_peer() {
        let secret = Secret::new(&[3; 32]);
        let own = PublicKey::from(&secret.to_private_key());
        let mut model = Model::default();
        set(&mut model, vec![SetPeer::new(own), SetPeer::new(key(1))]);
        let change =
            Set { private_key: Change::Put(secret), peers: vec![SetPeer::new(own)], ..Set::default() };
        assert_eq!(model.set(change), Ok(()));
        assert_eq!(model.0.peers.len(), 1);
    }
}
