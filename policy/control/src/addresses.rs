//! Which inner addresses a device has: one index per device, which stands for the same place in the pool
//! of every gateway.
//!
//! ```text
//! pool      network, network + 1 (the gateway's, by custom), then index 0, 1, 2, …
//! ```

use ipnet::{Ipv4Net, Ipv6Net};
use kontor_bundle::Gateway;
use kontor_trust::{DeviceId, LeaseGateway};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

/// Addresses of a pool that stand before index 0.
const RESERVED: u32 = 2;

/// The inner addresses that one gateway gives to its guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// The gateway's number.
    pub id: u8,
    /// Its IPv4 addresses.
    pub v4: Ipv4Net,
    /// Its IPv6 addresses.
    pub v6: Ipv6Net,
}

impl Pool {
    fn v4_at(&self, index: u32) -> Option<Ipv4Addr> {
        let address = u32::from(self.v4.network()).checked_add(index)?.checked_add(RESERVED)?;
        (address < u32::from(self.v4.broadcast())).then(|| address.into())
    }

    fn v6_at(&self, index: u32) -> Option<Ipv6Addr> {
        let address = u128::from(self.v6.network()).checked_add(u128::from(index) + u128::from(RESERVED))?;
        (address <= u128::from(self.v6.broadcast())).then(|| address.into())
    }

    /// The addresses of `index`, or `None` behind the pool's end.
    fn at(&self, index: u32) -> Option<LeaseGateway> {
        Some(LeaseGateway { id: self.id, v4: self.v4_at(index)?, v6: self.v6_at(index)? })
    }
}

/// The index of each device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Addresses(BTreeMap<DeviceId, u32>);

impl Addresses {
    /// The addresses of `device` at each of these gateways. A device keeps its index for as long as that
    /// fits; else it gets the lowest free one, and `None` means that a pool is full.
    pub fn assign(&mut self, device: &DeviceId, at: &[(Pool, &Gateway)]) -> Option<Vec<LeaseGateway>> {
        if let Some(Place::Free(addresses)) = self.0.get(device).map(|index| place(*index, at)) {
            return Some(addresses);
        }
        let taken: BTreeSet<u32> = self.0.values().copied().collect();
        for index in (0..=u32::MAX).filter(|index| !taken.contains(index)) {
            match place(index, at) {
                Place::Free(addresses) => {
                    self.0.insert(device.clone(), index);
                    return Some(addresses);
                }
                Place::Gateways => {}
                Place::BehindTheEnd => return None,
            }
        }
        None
    }

    /// The index of a device that has one.
    #[must_use]
    pub fn index(&self, device: &DeviceId) -> Option<u32> {
        self.0.get(device).copied()
    }
}

/// What an index means in all pools.
enum Place {
    Free(Vec<LeaseGateway>),
    /// One of its addresses is a gateway's own.
    Gateways,
    BehindTheEnd,
}

fn place(index: u32, at: &[(Pool, &Gateway)]) -> Place {
    let mut addresses = Vec::with_capacity(at.len());
    let mut own = false;
    for (pool, gateway) in at {
        let Some(address) = pool.at(index) else { return Place::BehindTheEnd };
        own |= address.v4 == gateway.v4 || address.v6 == gateway.v6;
        addresses.push(address);
    }
    if own { Place::Gateways } else { Place::Free(addresses) }
}
