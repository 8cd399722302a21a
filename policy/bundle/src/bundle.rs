//! The bundle: everything that IT decides for one line of devices (`lease.md` 3).
//!
//! A [`Bundle`] is read from a `Verified<BundleKind>` only, and does not implement
//! `serde::Deserialize`. What IT writes by hand, before anyone signed it, is a [`Draft`].

use crate::{Access, AccessFault};
use kontor_trust::{BundleKind, Digest, Line, Verified, hex32};
use serde::{Deserialize, Deserializer, Serialize};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Most gateways of a bundle.
pub const MAX_GATEWAYS: usize = 8;
/// Most endpoints of a gateway.
pub const MAX_ENDPOINTS: usize = 4;
/// Most resolvers.
pub const MAX_RESOLVERS: usize = 4;
/// Least memory of a work VM, in MiB.
pub const MIN_MEMORY_MIB: u32 = 128;
/// Most memory of a work VM, in MiB.
pub const MAX_MEMORY_MIB: u32 = 64 * 1024;
/// Longest life of any lease, in seconds.
pub const MAX_LIFE_S: u64 = 24 * 60 * 60;
/// Longest of the other times, in seconds.
pub const MAX_TIMER_S: u64 = 7 * 24 * 60 * 60;

/// What IT decides for one line of devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Bundle {
    /// The tenant.
    pub tenant: Digest,
    /// The line that it is for.
    pub line: Line,
    /// From 1, rising; a lower one is refused once a higher was seen.
    pub revision: u64,
    /// Lowest version of a release that may start.
    pub min_release: u64,
    /// Longest life of a lease, in seconds; 1 to [`MAX_LIFE_S`].
    pub lease_s_max: u64,
    /// How long a peer may stay on an older revision, in seconds; 1 to [`MAX_TIMER_S`].
    pub apply_s: u64,
    /// How long the gateway may be silent before the guest closes the tunnel, in seconds; 1 to [`MAX_TIMER_S`].
    pub silence_s: u64,
    /// How long after that, or after the lease's end, the guest powers off, in seconds; at most [`MAX_TIMER_S`].
    pub lapse_off_s: u64,
    /// The office's ends of the tunnel: 1 to [`MAX_GATEWAYS`].
    pub gateways: Vec<Gateway>,
    /// Settings of host and guest.
    pub settings: Settings,
    /// What may be reached in the office.
    pub access: Access,
}

/// One office end of the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    /// Its number in leases and uplink frames.
    pub id: u8,
    /// Its WireGuard key (X25519).
    #[serde(with = "hex32")]
    pub key: [u8; 32],
    /// Where its UDP socket is reached from outside: 1 to [`MAX_ENDPOINTS`], each in the bundle once.
    pub endpoints: Vec<SocketAddr>,
    /// Its own inner IPv4 address.
    pub v4: Ipv4Addr,
    /// Its own inner IPv6 address.
    pub v6: Ipv6Addr,
}

/// Settings of host and guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Whether a host without KVM may emulate. An emulator is no security boundary.
    pub allow_emulation: bool,
    /// Whether a release with a probe channel may start.
    pub allow_test_image: bool,
    /// Memory of the work VM in MiB; [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Name servers in the office, at most [`MAX_RESOLVERS`].
    pub resolvers: Vec<IpAddr>,
}

/// What makes a bundle unusable, whoever signed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleFault {
    /// A number outside its bounds.
    #[error("{field} is {value}, it must be {least} to {most}")]
    Bounds {
        /// Which field.
        field: &'static str,
        /// Its value, or its number of entries.
        value: u64,
        /// Least.
        least: u64,
        /// Most.
        most: u64,
    },
    /// Two gateways with one number.
    #[error("gateway {0} is listed twice")]
    RepeatedGateway(u8),
    /// Two gateways with one key.
    #[error("gateway {0} has the key of another gateway")]
    RepeatedKey(u8),
    /// One address twice: the relay could not tell whose a datagram is.
    #[error("endpoint {0} is listed twice")]
    RepeatedEndpoint(SocketAddr),
    /// An address that no datagram can be sent to.
    #[error("endpoint {0} is no address of a gateway")]
    Endpoint(SocketAddr),
    /// The table of destinations.
    #[error("access is wrong")]
    Access(#[source] AccessFault),
}

/// Why a bundle is not used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Not the JSON of a bundle.
    #[error("the bundle does not parse")]
    Parse(#[source] serde_json::Error),
    /// It makes no sense.
    #[error("the bundle is unusable")]
    Fault(#[source] BundleFault),
}

impl Bundle {
    /// Reads a bundle that the policy role signed.
    ///
    /// # Errors
    /// [`BundleError`] says what is wrong.
    pub fn parse(verified: &Verified<BundleKind>) -> Result<Self, BundleError> {
        let mut deserializer = serde_json::Deserializer::from_slice(verified.payload());
        let bundle = Self::deserialize(&mut deserializer).map_err(BundleError::Parse)?;
        deserializer.end().map_err(BundleError::Parse)?;
        bundle.check().map_err(BundleError::Fault)?;
        Ok(bundle)
    }

    /// The bytes to be signed.
    ///
    /// # Panics
    /// Never: a bundle is made of text and numbers, which always serialize.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        Self::serialize(self, &mut serde_json::Serializer::new(&mut bytes))
            .expect("text and numbers serialize");
        bytes
    }

    /// The gateway with this number.
    #[must_use]
    pub fn gateway(&self, id: u8) -> Option<&Gateway> {
        self.gateways.iter().find(|gateway| gateway.id == id)
    }

    /// Checks everything that can be wrong with a bundle by itself.
    ///
    /// # Errors
    /// The first [`BundleFault`] found.
    pub fn check(&self) -> Result<(), BundleFault> {
        within("revision", self.revision, 1, u64::MAX)?;
        within("lease_s_max", self.lease_s_max, 1, MAX_LIFE_S)?;
        within("apply_s", self.apply_s, 1, MAX_TIMER_S)?;
        within("silence_s", self.silence_s, 1, MAX_TIMER_S)?;
        within("lapse_off_s", self.lapse_off_s, 0, MAX_TIMER_S)?;
        let memory = u64::from(self.settings.memory_mib);
        within("settings.memory_mib", memory, u64::from(MIN_MEMORY_MIB), u64::from(MAX_MEMORY_MIB))?;
        count("settings.resolvers", self.settings.resolvers.len(), 0, MAX_RESOLVERS)?;
        count("gateways", self.gateways.len(), 1, MAX_GATEWAYS)?;
        let (mut ids, mut keys, mut endpoints) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for gateway in &self.gateways {
            if !ids.insert(gateway.id) {
                return Err(BundleFault::RepeatedGateway(gateway.id));
            }
            if !keys.insert(gateway.key) {
                return Err(BundleFault::RepeatedKey(gateway.id));
            }
            count("gateways.endpoints", gateway.endpoints.len(), 1, MAX_ENDPOINTS)?;
            for endpoint in &gateway.endpoints {
                let ip = endpoint.ip();
                if endpoint.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
                    return Err(BundleFault::Endpoint(*endpoint));
                }
                if !endpoints.insert(*endpoint) {
                    return Err(BundleFault::RepeatedEndpoint(*endpoint));
                }
            }
        }
        self.access.check().map_err(BundleFault::Access)
    }
}

/// A bundle as IT writes it, before anyone signed it. It serves to be checked and signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft(Bundle);

impl Draft {
    /// The bytes to be signed.
    ///
    /// # Errors
    /// The first [`BundleFault`] found.
    pub fn payload(&self) -> Result<Vec<u8>, BundleFault> {
        self.0.check()?;
        Ok(self.0.payload())
    }

    /// What it says so far.
    #[must_use]
    pub fn unsigned(&self) -> &Bundle {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Draft {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Bundle::deserialize(deserializer).map(Self)
    }
}

fn within(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), BundleFault> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(BundleFault::Bounds { field, value, least, most })
    }
}

fn count(field: &'static str, entries: usize, least: usize, most: usize) -> Result<(), BundleFault> {
    let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    within(field, wide(entries), wide(least), wide(most))
}
