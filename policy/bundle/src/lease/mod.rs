//! Whether a lease is to be believed (`lease.md` 12 to 18). What all sides check is in one place, here;
//! each side adds what only it can know:
//!
//! ```text
//! for_guest     what it asked for in this boot, and when its image was built
//! for_host      the request that it signed, and the highest versions it has seen
//! for_gateway   the request itself, the time, its own number and addresses, and what it has admitted
//! ```
//!
//! The guest has no clock and no memory: that the answer came within [`MAX_WAIT_S`], that the lease's life
//! is counted from the question, and that nothing newer exists (the gateway says so through the tunnel)
//! is for the guest's boot to see to.

mod error;
mod gateway;
mod guest;
mod host;
mod parts;

pub use error::LeaseError;
pub use gateway::{CLOCK_SKEW_S, GatewayMemory, OwnGateway, for_gateway};
pub use guest::{MAX_WAIT_S, for_guest};
pub use host::{HOST_SKEW_S, HostMemory, for_host};
pub use parts::{Admit, Notice, Parts};

use crate::{Bundle, MAX_LIFE_S};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, Kind, Lease, LeaseKind, Request, RequestKind,
    RoleKind, TrustedKeyset, Verified,
};

/// Most keysets that come with a lease.
pub const MAX_KEYSETS: usize = 8;

/// A lease that one side has found good, and everything that it rests on.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Checked {
    /// The newest keyset: the floor, or what the chain led to.
    pub keyset: TrustedKeyset,
    /// The device record.
    pub device: Device,
    /// The bundle.
    pub bundle: Bundle,
    /// The lease.
    pub lease: Lease,
    /// SHA-256 of the bundle's payload.
    pub bundle_hash: Digest,
    /// SHA-256 of the lease's payload.
    pub lease_hash: Digest,
    /// The device record's envelope.
    pub verified_device: Verified<DeviceKind>,
    /// The bundle's envelope.
    pub verified_bundle: Verified<BundleKind>,
    /// The lease's envelope.
    pub verified_lease: Verified<LeaseKind>,
}

impl Checked {
    /// How long the lease lasts from its issue, in seconds.
    #[must_use]
    pub fn life_s(&self) -> u64 {
        self.lease.not_after - self.lease.issued_at
    }
}

/// What one boot asked for, and what the lease must therefore name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The challenge's nonce.
    pub nonce: [u8; 32],
    /// The public key of this boot's tunnel.
    pub boot_key: [u8; 32],
    /// The challenge's number.
    pub seq: u64,
    /// Root hash of the running image.
    pub verity_root: Digest,
}

/// The envelopes that every side gets.
struct Untrusted<'a> {
    keysets: &'a [Vec<u8>],
    device: &'a [u8],
    bundle: &'a [u8],
    lease: &'a [u8],
}

impl Untrusted<'_> {
    /// What does not depend on who checks: the signatures, and that the documents fit each other.
    fn check(&self, floor: &TrustedKeyset) -> Result<Checked, LeaseError> {
        if self.keysets.len() > MAX_KEYSETS {
            return Err(LeaseError::TooManyKeysets(self.keysets.len()));
        }
        let keyset = floor.follow(self.keysets).map_err(LeaseError::Keyset)?;

        let verified_device = verify::<DeviceKind>(&keyset, self.device)?;
        let device = Device::parse(&verified_device).map_err(LeaseError::Document)?;
        same_tenant(&keyset, device.tenant, DeviceKind::NAME)?;
        if device.state != DeviceState::Active {
            return Err(LeaseError::Revoked);
        }

        let verified_lease = verify::<LeaseKind>(&keyset, self.lease)?;
        let lease = Lease::parse(&verified_lease).map_err(LeaseError::Document)?;
        same_tenant(&keyset, lease.tenant, LeaseKind::NAME)?;
        lease_fits_device(&lease, &device)?;
        if lease.keyset_version != keyset.version() {
            return Err(LeaseError::KeysetVersion { lease: lease.keyset_version, newest: keyset.version() });
        }

        let verified_bundle = verify::<BundleKind>(&keyset, self.bundle)?;
        let bundle = Bundle::parse(&verified_bundle).map_err(LeaseError::Bundle)?;
        same_tenant(&keyset, bundle.tenant, BundleKind::NAME)?;
        lease_fits_bundle(&lease, &bundle, verified_bundle.hash())?;

        let (bundle_hash, lease_hash) = (verified_bundle.hash(), verified_lease.hash());
        Ok(Checked {
            keyset,
            device,
            bundle,
            lease,
            bundle_hash,
            lease_hash,
            verified_device,
            verified_bundle,
            verified_lease,
        })
    }
}

fn verify<K: RoleKind>(keyset: &TrustedKeyset, untrusted: &[u8]) -> Result<Verified<K>, LeaseError> {
    keyset.verify(untrusted).map_err(|source| LeaseError::Envelope { kind: K::NAME, source })
}

fn same_tenant(keyset: &TrustedKeyset, tenant: Digest, kind: &'static str) -> Result<(), LeaseError> {
    if tenant == keyset.tenant() { Ok(()) } else { Err(LeaseError::OtherTenant { kind }) }
}

fn lease_fits_device(lease: &Lease, device: &Device) -> Result<(), LeaseError> {
    if lease.device != device.device {
        Err(LeaseError::OtherDevice)
    } else if lease.enrolment != device.enrolment {
        Err(LeaseError::OtherEnrolment)
    } else if lease.line != device.line {
        Err(LeaseError::OtherLine)
    } else {
        Ok(())
    }
}

fn lease_fits_bundle(lease: &Lease, bundle: &Bundle, hash: Digest) -> Result<(), LeaseError> {
    if lease.bundle != hash {
        return Err(LeaseError::OtherBundle);
    }
    if bundle.line != lease.line {
        return Err(LeaseError::BundleLine);
    }
    if bundle.revision != lease.revision {
        return Err(LeaseError::BundleRevision { lease: lease.revision, bundle: bundle.revision });
    }
    let most_s = bundle.lease_s_max.min(MAX_LIFE_S);
    if lease.life_s().is_none_or(|life_s| life_s > most_s) {
        return Err(LeaseError::Life { issued_at: lease.issued_at, not_after: lease.not_after, most_s });
    }
    match lease.gateways.iter().find(|gateway| bundle.gateway(gateway.id).is_none()) {
        Some(gateway) => Err(LeaseError::UnknownGateway(gateway.id)),
        None => Ok(()),
    }
}

fn lease_answers(lease: &Lease, asked: &Asked) -> Result<(), LeaseError> {
    if lease.nonce != asked.nonce {
        Err(LeaseError::OtherNonce)
    } else if lease.boot_key != asked.boot_key {
        Err(LeaseError::OtherBootKey)
    } else if lease.seq != asked.seq {
        Err(LeaseError::OtherSeq { lease: lease.seq, asked: asked.seq })
    } else if lease.verity_root != asked.verity_root {
        Err(LeaseError::OtherRoot)
    } else {
        Ok(())
    }
}

/// The lease answers exactly this request: by its hash, and field by field.
fn lease_answers_request(lease: &Lease, verified: &Verified<RequestKind>) -> Result<(), LeaseError> {
    let request = Request::parse(verified).map_err(LeaseError::Document)?;
    if request.tenant != lease.tenant {
        return Err(LeaseError::OtherTenant { kind: RequestKind::NAME });
    }
    if request.device != lease.device {
        return Err(LeaseError::OtherDevice);
    }
    if request.enrolment != lease.enrolment {
        return Err(LeaseError::OtherEnrolment);
    }
    let Request { nonce, boot_key, seq, verity_root, .. } = request;
    lease_answers(lease, &Asked { nonce, boot_key, seq, verity_root })?;
    if lease.keyset_version < request.keyset_version {
        return Err(LeaseError::OldKeyset { lease: lease.keyset_version, known: request.keyset_version });
    }
    if lease.request == verified.hash() { Ok(()) } else { Err(LeaseError::OtherRequest) }
}
