//! The host's side (`lease.md` 16).

use super::{Checked, LeaseError, Parts, Untrusted, lease_answers_request};
use kontor_trust::{RequestKind, TrustedKeyset, Verified};

/// The highest that a host has seen for its device. All zero before the first lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostMemory {
    /// Highest version of a keyset.
    pub keyset_version: u64,
    /// Highest revision of a bundle of the device's line.
    pub revision: u64,
    /// When the last lease was issued, in Unix seconds.
    pub issued_at: u64,
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
    let lease = &checked.lease;
    lease_answers_request(lease, request)?;
    if lease.keyset_version < memory.keyset_version {
        return Err(LeaseError::OldKeyset { lease: lease.keyset_version, known: memory.keyset_version });
    }
    if lease.revision < memory.revision {
        return Err(LeaseError::OldRevision { lease: lease.revision, known: memory.revision });
    }
    if lease.issued_at < memory.issued_at {
        return Err(LeaseError::OldIssue { lease: lease.issued_at, known: memory.issued_at });
    }
    Ok(checked)
}
