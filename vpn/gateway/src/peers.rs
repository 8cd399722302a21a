//! Who is a peer now: until when, on which revision of its line's bundle, and which table holds for its packets.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Instant;

use kontor_trust::{DeviceId, Line};
use kontor_vpn::{AddPeerError, PeerConfig, PeerId, PublicKey, Routes, Start, Tunnel};

use crate::filter::{Passage, Table};
use crate::office::{Admission, Newest};

/// The peers of a tunnel that leases admitted.
#[derive(Default)]
pub(crate) struct Peers {
    admitted: BTreeMap<PeerId, Admitted>,
    by_device: BTreeMap<DeviceId, PeerId>,
    newest: BTreeMap<Line, Newest>,
    /// Unix seconds at which a peer goes.
    ends: BTreeSet<(u64, PeerId)>,
}

struct Admitted {
    device: DeviceId,
    boot_key: [u8; 32],
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    line: Line,
    revision: u64,
    table: Arc<Table>,
    /// The line's newest table: the same one, or one to pass besides.
    newest: Arc<Table>,
    /// Whether its `Hello` was answered at the post, in this boot.
    is_open: bool,
    /// Unix seconds.
    end: u64,
}

impl Peers {
    pub(crate) fn len(&self) -> usize {
        self.admitted.len()
    }

    /// Makes the peer of an admission, lets it go on, or puts it in the place of the device's earlier one.
    pub(crate) fn admit<E: Copy + Eq + Hash>(
        &mut self,
        admission: Admission,
        tunnel: &mut Tunnel<E>,
        now: Instant,
        unix_now: u64,
    ) -> Result<(), AddPeerError> {
        self.take_newest(&admission, unix_now);
        let Admission { device, boot_key, v4, v6, not_after, line, revision, table, newest, is_open } =
            admission;
        let end = if revision < newest.revision {
            not_after.min(unix_now.saturating_add(newest.apply_s))
        } else {
            not_after
        };
        let earlier = self.by_device.get(&device).copied();
        let same = earlier.filter(|id| {
            self.admitted.get(id).is_some_and(|peer| (peer.boot_key, peer.v4, peer.v6) == (boot_key, v4, v6))
        });
        let is_open =
            is_open || same.is_some_and(|id| self.admitted.get(&id).is_some_and(|peer| peer.is_open));
        let id = match (same, earlier) {
            (Some(id), _) => {
                self.forget(id);
                id
            }
            (None, earlier) => {
                if let Some(id) = earlier {
                    self.remove(id, tunnel);
                }
                tunnel.add_peer(
                    &PeerConfig {
                        public_key: PublicKey::from(boot_key),
                        routes: Routes::Own { v4, v6 },
                        start: Start::Listen,
                        keepalive_s: None,
                    },
                    now,
                )?
            }
        };
        self.by_device.insert(device.clone(), id);
        self.ends.insert((end, id));
        let newest = newest.table;
        let peer = Admitted { device, boot_key, v4, v6, line, revision, table, newest, is_open, end };
        self.admitted.insert(id, peer);
        Ok(())
    }

    /// Removes the peer of a device; false if it has none.
    pub(crate) fn remove_device<E: Copy + Eq + Hash>(
        &mut self,
        device: &DeviceId,
        tunnel: &mut Tunnel<E>,
    ) -> bool {
        match self.by_device.get(device).copied() {
            Some(id) => {
                self.remove(id, tunnel);
                true
            }
            None => false,
        }
    }

    /// Removes the peers whose time is over, and says how many those were.
    pub(crate) fn expire<E: Copy + Eq + Hash>(&mut self, tunnel: &mut Tunnel<E>, unix_now: u64) -> usize {
        let mut expired = 0;
        while let Some((end, id)) = self.ends.first().copied() {
            if unix_now < end {
                break;
            }
            if let Some(peer) = self.admitted.get(&id) {
                tracing::debug!(device = %peer.device, "the time of a peer is over");
            }
            self.remove(id, tunnel);
            expired += 1;
        }
        expired
    }

    /// When the next peer goes, in Unix seconds.
    pub(crate) fn next_end(&self) -> Option<u64> {
        self.ends.first().map(|(end, _)| *end)
    }

    /// Opens the line's table to the peer of a device, if it still is the one with this boot key.
    pub(crate) fn open(&mut self, device: &DeviceId, boot_key: &[u8; 32]) {
        let peer = self.by_device.get(device).and_then(|id| self.admitted.get_mut(id));
        if let Some(peer) = peer.filter(|peer| peer.boot_key == *boot_key) {
            peer.is_open = true;
        }
    }

    /// What holds for a peer's packets.
    pub(crate) fn passage(&self, id: PeerId) -> Option<Passage<'_>> {
        self.admitted.get(&id).map(|peer| {
            if peer.is_open { Passage::Open([&*peer.table, &*peer.newest]) } else { Passage::Shut }
        })
    }

    /// From now on all peers of the line pass the newest table besides their own, and those on an older
    /// revision go when they have had time to renew.
    fn take_newest(&mut self, admission: &Admission, unix_now: u64) {
        let Admission { line, newest, .. } = admission;
        let known = self.newest.get(line).map(|known| known.revision);
        if known.is_some_and(|known| known >= newest.revision) {
            return;
        }
        self.newest.insert(line.clone(), newest.clone());
        let end = unix_now.saturating_add(newest.apply_s);
        for (id, peer) in &mut self.admitted {
            if peer.line == *line && peer.revision < newest.revision {
                peer.newest = Arc::clone(&newest.table);
                self.ends.remove(&(peer.end, *id));
                peer.end = peer.end.min(end);
                self.ends.insert((peer.end, *id));
            }
        }
    }

    fn remove<E: Copy + Eq + Hash>(&mut self, id: PeerId, tunnel: &mut Tunnel<E>) {
        self.forget(id);
        tunnel.remove_peer(id);
    }

    fn forget(&mut self, id: PeerId) {
        if let Some(peer) = self.admitted.remove(&id) {
            self.by_device.remove(&peer.device);
            self.ends.remove(&(peer.end, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use kontor_bundle::{Access, Destination, Protocol};
    use kontor_vpn::{Config, HANDSHAKES_PER_S, MTU_MAX, StaticSecret};

    use super::*;

    const APPLY_S: u64 = 100;

    fn tunnel(now: Instant) -> Tunnel<u8> {
        let config = Config {
            private_key: StaticSecret::from([100; 32]),
            mtu: MTU_MAX,
            handshakes_per_s_max: HANDSHAKES_PER_S,
            peers_max: 8,
            seed: [0; 32],
        };
        Tunnel::new(config, now).unwrap()
    }

    fn newest(revision: u64) -> Newest {
        let to = format!("10.0.0.{revision}/32").parse().unwrap();
        let destinations = vec![Destination { to, protocol: Protocol::Any, ports: None }];
        Newest { revision, table: Arc::new(Table::new(&Access { destinations })), apply_s: APPLY_S }
    }

    fn admission(device: &str, boot: u8, address: u8, not_after: u64, newest: &Newest) -> Admission {
        Admission {
            device: device.parse().unwrap(),
            boot_key: *PublicKey::from(&StaticSecret::from([boot; 32])).as_bytes(),
            v4: Ipv4Addr::new(10, 9, 0, address),
            v6: Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(address)),
            not_after,
            line: "sales".parse().unwrap(),
            revision: newest.revision,
            table: Arc::clone(&newest.table),
            newest: newest.clone(),
            is_open: true,
        }
    }

    fn id(tunnel: &Tunnel<u8>, address: u8) -> Option<PeerId> {
        tunnel.peer_by_address(Ipv4Addr::new(10, 9, 0, address).into())
    }

    #[test]
    fn renewed_lease_keeps_the_peer_and_moves_its_end() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        peers.admit(admission("pc", 1, 2, 1000, &newest(1)), &mut tunnel, now, 0).unwrap();
        let first = id(&tunnel, 2);
        peers.admit(admission("pc", 1, 2, 2000, &newest(1)), &mut tunnel, now, 500).unwrap();
        assert_eq!(id(&tunnel, 2), first);
        assert_eq!((peers.len(), peers.next_end()), (1, Some(2000)));
        assert_eq!(peers.expire(&mut tunnel, 1999), 0);
        assert_eq!(peers.expire(&mut tunnel, 2000), 1);
        assert_eq!((id(&tunnel, 2), peers.len(), peers.next_end()), (None, 0, None));
    }

    #[test]
    fn another_boot_of_a_device_takes_the_place_of_the_one_before() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        peers.admit(admission("pc", 1, 2, 1000, &newest(1)), &mut tunnel, now, 0).unwrap();
        let first = id(&tunnel, 2).unwrap();
        peers.admit(admission("pc", 3, 2, 900, &newest(1)), &mut tunnel, now, 0).unwrap();
        assert_ne!(id(&tunnel, 2), Some(first));
        assert_eq!(tunnel.status(first), None);
        assert_eq!((peers.len(), peers.next_end()), (1, Some(900)));
        peers.admit(admission("pc", 3, 4, 900, &newest(1)), &mut tunnel, now, 0).unwrap();
        assert_eq!(id(&tunnel, 2), None);
        assert!(id(&tunnel, 4).is_some());
    }

    #[test]
    fn peer_is_shut_until_it_is_opened_and_stays_open_for_its_boot_only() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        let device: DeviceId = "pc".parse().unwrap();
        let shut =
            |boot, not_after| Admission { is_open: false, ..admission("pc", boot, 2, not_after, &newest(1)) };
        let first = shut(1, 1000);
        peers.admit(first.clone(), &mut tunnel, now, 0).unwrap();
        let pc = id(&tunnel, 2).unwrap();
        assert_eq!(peers.passage(pc), Some(Passage::Shut));
        peers.open(&device, &shut(3, 1000).boot_key);
        peers.open(&"laptop".parse().unwrap(), &first.boot_key);
        assert_eq!(peers.passage(pc), Some(Passage::Shut));
        peers.open(&device, &first.boot_key);
        assert!(matches!(peers.passage(pc), Some(Passage::Open(_))));
        // A renewal finds it open, another boot does not.
        peers.admit(shut(1, 2000), &mut tunnel, now, 500).unwrap();
        assert!(matches!(peers.passage(pc), Some(Passage::Open(_))));
        peers.admit(shut(3, 2000), &mut tunnel, now, 500).unwrap();
        assert_eq!(peers.passage(id(&tunnel, 2).unwrap()), Some(Passage::Shut));
    }

    #[test]
    fn address_of_another_peer_is_refused() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        peers.admit(admission("pc", 1, 2, 1000, &newest(1)), &mut tunnel, now, 0).unwrap();
        let other = admission("laptop", 3, 2, 1000, &newest(1));
        let address = Ipv4Addr::new(10, 9, 0, 2).into();
        assert_eq!(peers.admit(other, &mut tunnel, now, 0), Err(AddPeerError::Address(address)));
        assert_eq!(peers.len(), 1);
        assert!(!peers.remove_device(&"laptop".parse().unwrap(), &mut tunnel));
        assert!(peers.remove_device(&"pc".parse().unwrap(), &mut tunnel));
        assert_eq!((id(&tunnel, 2), peers.next_end()), (None, None));
    }

    #[test]
    fn peers_on_an_older_revision_pass_both_tables_and_go_when_their_time_to_renew_is_over() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        let (old, new) = (newest(1), newest(2));
        peers.admit(admission("pc", 1, 2, 1000, &old), &mut tunnel, now, 0).unwrap();
        peers.admit(admission("short", 5, 6, 120, &old), &mut tunnel, now, 0).unwrap();
        let pc = id(&tunnel, 2).unwrap();
        assert_eq!(peers.passage(pc), Some(Passage::Open([&*old.table, &*old.table])));
        peers.admit(admission("laptop", 3, 4, 1000, &new), &mut tunnel, now, 50).unwrap();
        assert_eq!(peers.passage(pc), Some(Passage::Open([&*old.table, &*new.table])));
        let laptop = id(&tunnel, 4).unwrap();
        assert_eq!(peers.passage(laptop), Some(Passage::Open([&*new.table, &*new.table])));
        assert_eq!(peers.expire(&mut tunnel, 120), 1);
        assert_eq!(peers.expire(&mut tunnel, 50 + APPLY_S - 1), 0);
        assert_eq!(peers.expire(&mut tunnel, 50 + APPLY_S), 1);
        assert_eq!((id(&tunnel, 2), id(&tunnel, 4)), (None, Some(laptop)));
    }

    #[test]
    fn peer_that_renews_onto_the_newest_revision_stays() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        let (old, new) = (newest(1), newest(2));
        peers.admit(admission("pc", 1, 2, 1000, &old), &mut tunnel, now, 0).unwrap();
        peers.admit(admission("laptop", 3, 4, 1000, &new), &mut tunnel, now, 50).unwrap();
        peers.admit(admission("pc", 1, 2, 1500, &new), &mut tunnel, now, 60).unwrap();
        let pc = id(&tunnel, 2).unwrap();
        assert_eq!(peers.passage(pc), Some(Passage::Open([&*new.table, &*new.table])));
        assert_eq!(peers.expire(&mut tunnel, 999), 0);
    }

    #[test]
    fn restored_peer_on_an_older_revision_gets_the_time_to_renew() {
        let now = Instant::now();
        let (mut tunnel, mut peers) = (tunnel(now), Peers::default());
        let (old, new) = (newest(1), newest(2));
        let restored = Admission { newest: new.clone(), ..admission("pc", 1, 2, 1000, &old) };
        peers.admit(restored, &mut tunnel, now, 10).unwrap();
        let pc = id(&tunnel, 2).unwrap();
        assert_eq!(peers.passage(pc), Some(Passage::Open([&*old.table, &*new.table])));
        assert_eq!(peers.next_end(), Some(10 + APPLY_S));
    }
}
