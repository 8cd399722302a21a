//! The guest's side (`lease.md` 17 and 18).

use super::{Asked, Checked, LeaseError, Parts, Untrusted, lease_answers};
use kontor_trust::TrustedKeyset;

/// How long a guest may wait for the answer to a challenge, in seconds.
pub const MAX_WAIT_S: u64 = 60;

/// Checks a lease as the guest that asked for it. `floor` is the newest keyset in its image, `built_at`
/// the Unix time of the image's build.
///
/// # Errors
/// [`LeaseError`] says what is wrong.
pub fn for_guest(
    floor: &TrustedKeyset,
    untrusted: &Parts,
    asked: &Asked,
    built_at: u64,
) -> Result<Checked, LeaseError> {
    let Parts { keysets, device, bundle, lease } = untrusted;
    let checked = Untrusted { keysets, device, bundle, lease }.check(floor)?;
    lease_answers(&checked.lease, asked)?;
    let issued_at = checked.lease.issued_at;
    if issued_at < built_at { Err(LeaseError::BeforeBuild { issued_at, built_at }) } else { Ok(checked) }
}
