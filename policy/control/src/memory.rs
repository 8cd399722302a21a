//! What control remembers from one request to the next: addresses, the boots that it has answered, and
//! when. Without it the gateways would still refuse what is replayed; with it the host is told so.

use crate::Addresses;
use kontor_trust::{DeviceId, hex32};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How many boots are remembered per device.
pub const BOOTS_KEPT: usize = 16;
/// How far the clock may be behind the device's last lease, in seconds. Within this a lease is dated one
/// second after the last, since a gateway wants it later; beyond it the clock is wrong.
pub const CLOCK_BACK_S_MAX: u64 = 30;

/// What control remembers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// Who has which addresses.
    pub addresses: Addresses,
    /// What was answered.
    pub past: Past,
}

/// What was answered, per device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Past(BTreeMap<DeviceId, Answered>);

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answered {
    /// When the last lease was issued, in Unix seconds.
    issued_at: u64,
    /// The last boots, newest at the end; at most [`BOOTS_KEPT`].
    boots: Vec<Boot>,
}

/// A boot, by its tunnel's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// X25519 public key of the boot.
    #[serde(with = "hex32")]
    pub boot_key: [u8; 32],
    /// Its last challenge.
    pub seq: u64,
}

impl Past {
    /// Whether another device than `device` was seen with this boot key.
    #[must_use]
    pub fn is_anothers(&self, device: &DeviceId, boot_key: &[u8; 32]) -> bool {
        self.0.iter().any(|(other, answered)| {
            other != device && answered.boots.iter().any(|boot| boot.boot_key == *boot_key)
        })
    }

    /// The last challenge that was answered for this boot of `device`.
    #[must_use]
    pub fn last_seq(&self, device: &DeviceId, boot_key: &[u8; 32]) -> Option<u64> {
        self.0.get(device)?.boots.iter().find(|boot| boot.boot_key == *boot_key).map(|boot| boot.seq)
    }

    /// When a lease that is issued at `now` may say that it was; `None` when the clock went back by more
    /// than [`CLOCK_BACK_S_MAX`].
    #[must_use]
    pub fn issue_time(&self, device: &DeviceId, now: u64) -> Option<u64> {
        let next = self.0.get(device).map_or(0, |answered| answered.issued_at.saturating_add(1));
        (next <= now.saturating_add(CLOCK_BACK_S_MAX)).then(|| next.max(now))
    }

    /// Notes that a lease was issued.
    pub fn note(&mut self, device: &DeviceId, boot: Boot, issued_at: u64) {
        let answered = self.0.entry(device.clone()).or_default();
        answered.issued_at = issued_at;
        answered.boots.retain(|known| known.boot_key != boot.boot_key);
        answered.boots.push(boot);
        let surplus = answered.boots.len().saturating_sub(BOOTS_KEPT);
        answered.boots.drain(..surplus);
    }
}
