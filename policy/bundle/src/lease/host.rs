//! The host's side (`lease.md` 16).

use super::{Checked, LeaseError, Parts, Untrusted, lease_answers_request};
use kontor_trust::{Line, RequestKind, TrustedKeyset, Verified};
use std::collections::BTreeMap;

/// How far ahead of the host's clock the office's may be, in seconds, for its word to be held against a later
/// one: see [`HostMemory::as_of`].
pub const HOST_SKEW_S: u64 = 600;

/// The highest that a host has seen for its device. All zero before the first lease.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostMemory {
    /// Highest version of a keyset.
    pub keyset_version: u64,
    /// Serial of the device's record.
    pub serial: u64,
    /// Highest revision of a bundle, for each line that the device was ever in.
    pub revisions: BTreeMap<Line, u64>,
    /// When the last lease was issued, in Unix seconds.
    pub issued_at: u64,
}

impl HostMemory {
    /// What of it counts at `now` (Unix seconds, the host's own clock). A lease that was issued more than
    /// [`HOST_SKEW_S`] in the host's future is no measure for later ones: either clock is wrong, and whoever
    /// has control's key may write any time into a lease. A lease answers a fresh nonce, so none that was
    /// seen before is believed again.
    #[must_use]
    pub fn as_of(self, now: u64) -> Self {
        let is_measure = self.issued_at <= now.saturating_add(HOST_SKEW_S);
        Self { issued_at: if is_measure { self.issued_at } else { 0 }, ..self }
    }

    /// Checks that nothing of a lease is older than what was seen.
    ///
    /// # Errors
    /// [`LeaseError`] says what is.
    pub fn admits(&self, checked: &Checked) -> Result<(), LeaseError> {
        let lease = &checked.lease;
        if lease.keyset_version < self.keyset_version {
            return Err(LeaseError::OldKeyset { lease: lease.keyset_version, known: self.keyset_version });
        }
        if checked.device.serial < self.serial {
            return Err(LeaseError::OldSerial { record: checked.device.serial, known: self.serial });
        }
        if let Some(known) = self.revisions.get(&lease.line).copied().filter(|known| lease.revision < *known)
        {
            return Err(LeaseError::OldRevision { lease: lease.revision, known });
        }
        if lease.issued_at < self.issued_at {
            return Err(LeaseError::OldIssue { lease: lease.issued_at, known: self.issued_at });
        }
        Ok(())
    }
}

/// Checks a lease as the host that signed `request`. `floor` is the highest keyset that it has stored.
///
/// # Errors
/// [`LeaseError`] says what is wrong.
pub fn for_host(
    floor: &TrustedKeyset,
    untrusted: &Parts,
    request: &Verified<RequestKind>,
    memory: &HostMemory,
) -> Result<Checked, LeaseError> {
    let Parts { keysets, device, bundle, lease } = untrusted;
    let checked = Untrusted { keysets, device, bundle, lease }.check(floor)?;
    lease_answers_request(&checked.lease, request)?;
    memory.admits(&checked)?;
    Ok(checked)
}
