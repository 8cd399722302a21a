//! From a request to a lease.

use crate::{
    addresses::Pool,
    memory::{Boot, CLOCK_BACK_S_MAX, Memory},
};
use kontor_bundle::{
    Bundle, BundleError, Gateway, MAX_LIFE_S,
    lease::{Admit, HostMemory, LeaseError, MAX_KEYSETS, Parts, for_host},
};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, DocumentError, EnvelopeError, Kind, Lease, LeaseGateway,
    LeaseKind, PublicKey, Request, RequestKind, RoleKind, SecretKey, StateMode, TrustedKeyset, Verified,
    sign, verify_request,
};

/// Most gateways that a lease is issued for: a primary and a spare.
pub const MAX_NAMED_GATEWAYS: usize = 2;

/// What an office issues leases with.
pub struct Office<'a> {
    /// The newest keyset.
    pub keyset: &'a TrustedKeyset,
    /// The envelopes of the keysets in rising order, from any version up to the newest.
    pub chain: &'a [Vec<u8>],
    /// Control's key of the lease role.
    pub lease_key: &'a SecretKey,
    /// Life of a lease in seconds, unless the bundle allows less.
    pub lease_s: u64,
    /// The gateways' pools, in the order in which guests shall try them.
    pub pools: &'a [Pool],
}

/// Why a host gets no lease: what it is told.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a request at all.
    #[error("this is no request for a lease")]
    NoRequest,
    /// There is no record of the device.
    #[error("the office does not know this device")]
    UnknownDevice,
    /// The device is revoked.
    #[error("the device is revoked")]
    Revoked,
    /// The connection is another's.
    #[error("the connection is not made with the device's host key")]
    OtherPeer,
    /// The request is not signed by the device's host key.
    #[error("the request is not signed by the device's host key")]
    Signature(#[source] EnvelopeError),
    /// The request's content.
    #[error("the request is malformed")]
    Malformed(#[source] DocumentError),
    /// For another tenant than this office's.
    #[error("the request is for another tenant")]
    OtherTenant,
    /// For another device than the record is of.
    #[error("the request is for another device than its record")]
    OtherDevice,
    /// From before the device was enrolled anew.
    #[error("the request is for another enrolment of the device")]
    OtherEnrolment,
    /// The image holds a keyset that this office has not seen.
    #[error("the image holds keyset {image}, the office has {newest}")]
    NewerKeyset {
        /// The image's.
        image: u64,
        /// The office's.
        newest: u64,
    },
    /// The image's keyset is so old that the chain from it does not fit into an answer.
    #[error(
        "the image holds keyset {image}, the oldest that can be followed up is {oldest}: install a newer release"
    )]
    OldImage {
        /// The image's.
        image: u64,
        /// The oldest that an answer leads on from.
        oldest: u64,
    },
    /// The boot key was another device's.
    #[error("the boot key was used by another device")]
    BootKeyTaken,
    /// The request is not newer than the last of its boot.
    #[error("the request has number {found}, number {last} of this boot was answered already")]
    Replayed {
        /// The request's.
        found: u64,
        /// The last one's.
        last: u64,
    },
    /// There is no bundle for the device's line.
    #[error("the office has no policy for this device's line yet")]
    NoBundle,
    /// More requests than a device may make.
    #[error("the device asks too often: again in {0} s")]
    TooOften(u64),
    /// A pool of addresses is full.
    #[error("the office has no free address for this device")]
    NoAddress,
}

/// What is wrong in the office itself; the host is not to blame and not told.
#[derive(Debug, thiserror::Error)]
pub enum OfficeFault {
    /// A stored document is not signed as it must be.
    #[error("the stored {kind} is not signed as it must be")]
    Envelope {
        /// Of which document.
        kind: &'static str,
        /// What is wrong.
        #[source]
        source: EnvelopeError,
    },
    /// The stored device record.
    #[error("the stored device record")]
    Device(#[source] DocumentError),
    /// The stored bundle.
    #[error("the stored bundle")]
    Bundle(#[source] BundleError),
    /// A stored document is another's: of another tenant, device or line.
    #[error("the stored {0} is of another tenant, device or line")]
    Misplaced(&'static str),
    /// None of the gateways that the bundle has is configured.
    #[error("no gateway of the bundle is configured here")]
    NoGateway,
    /// The lease key at hand is none that the keyset names.
    #[error("the lease key is none of the keyset's role lease")]
    LeaseKey,
    /// The clock is behind what was issued already.
    #[error("the clock is more than {CLOCK_BACK_S_MAX} s behind the device's last lease: set it")]
    Clock,
    /// The lease does not pass the check that the host will make: the lease key may not be in the keyset.
    #[error("the lease that was made does not pass its check")]
    SelfCheck(#[source] Box<LeaseError>),
}

/// Why no lease was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The host is told.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The office is told.
    #[error(transparent)]
    Office(#[from] OfficeFault),
}

/// A request whose signer is a known, active device.
pub struct Identified {
    request: Request,
    verified_request: Verified<RequestKind>,
    device: Device,
    verified_device: Verified<DeviceKind>,
}

/// An issued lease.
#[derive(Debug)]
pub struct Issued {
    /// What the host gets.
    pub parts: Parts,
    /// What the gateways get that [`lease`](Self::lease) names.
    pub admit: Admit,
    /// The lease.
    pub lease: Lease,
}

impl Identified {
    /// The device record.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Office<'_> {
    /// Finds out who asks. `peer` is the key that the other end of the connection proved, `device_record`
    /// what is stored for the device that the request claims to be from
    /// ([`untrusted_device`](kontor_trust::untrusted_device)).
    ///
    /// # Errors
    /// [`IssueError`] says why not, and whose fault it is.
    pub fn identify(
        &self,
        peer: &PublicKey,
        untrusted_request: &[u8],
        device_record: &[u8],
    ) -> Result<Identified, IssueError> {
        let (verified_device, device) = self.device(device_record)?;
        if device.host_key != *peer {
            return Err(Refusal::OtherPeer.into());
        }
        let verified_request =
            verify_request(untrusted_request, &device.host_key).map_err(Refusal::Signature)?;
        let request = Request::parse(&verified_request).map_err(Refusal::Malformed)?;
        let refusal = if request.tenant != device.tenant {
            Some(Refusal::OtherTenant)
        } else if request.device != device.device {
            Some(Refusal::OtherDevice)
        } else if request.enrolment != device.enrolment {
            Some(Refusal::OtherEnrolment)
        } else if device.state != DeviceState::Active {
            Some(Refusal::Revoked)
        } else {
            self.refuse_keyset(request.keyset_version)
        };
        match refusal {
            Some(refusal) => Err(refusal.into()),
            None => Ok(Identified { request, verified_request, device, verified_device }),
        }
    }

    /// Issues a lease under `bundle`, the stored bundle of the device's line, at `now` (Unix seconds), and
    /// notes it in `memory`. The memory is to be stored before the lease is handed out.
    ///
    /// # Errors
    /// [`IssueError`] says why not, and whose fault it is; `memory` may hold a new address then.
    pub fn issue(
        &self,
        who: &Identified,
        bundle: &[u8],
        memory: &mut Memory,
        now: u64,
    ) -> Result<Issued, IssueError> {
        let Identified { request, device, .. } = who;
        if memory.past.is_anothers(&device.device, &request.boot_key) {
            return Err(Refusal::BootKeyTaken.into());
        }
        let last = memory.past.last_seq(&device.device, &request.boot_key);
        if let Some(last) = last.filter(|last| request.seq <= *last) {
            return Err(Refusal::Replayed { found: request.seq, last }.into());
        }
        let (verified_bundle, bundle) = self.bundle(bundle)?;
        if bundle.line != device.line {
            return Err(OfficeFault::Misplaced(BundleKind::NAME).into());
        }
        let gateways = self.assign(device, &bundle, memory)?;
        let issued_at = memory.past.issue_time(&device.device, now).ok_or(OfficeFault::Clock)?;
        let lease = self.lease(who, &verified_bundle, &bundle, gateways, issued_at);
        let issued = self.seal(who, &verified_bundle, lease)?;
        memory.past.note(&device.device, Boot { boot_key: request.boot_key, seq: request.seq }, issued_at);
        Ok(issued)
    }

    /// Checks a stored device record, whichever device it is of.
    ///
    /// # Errors
    /// [`OfficeFault`].
    pub fn device(&self, envelope: &[u8]) -> Result<(Verified<DeviceKind>, Device), OfficeFault> {
        let verified = self.stored::<DeviceKind>(envelope)?;
        let device = Device::parse(&verified).map_err(OfficeFault::Device)?;
        if device.tenant != self.keyset.tenant() {
            return Err(OfficeFault::Misplaced(DeviceKind::NAME));
        }
        Ok((verified, device))
    }

    /// Checks a stored bundle, whichever line it is for.
    ///
    /// # Errors
    /// [`OfficeFault`].
    pub fn bundle(&self, envelope: &[u8]) -> Result<(Verified<BundleKind>, Bundle), OfficeFault> {
        let verified = self.stored::<BundleKind>(envelope)?;
        let bundle = Bundle::parse(&verified).map_err(OfficeFault::Bundle)?;
        if bundle.tenant != self.keyset.tenant() {
            return Err(OfficeFault::Misplaced(BundleKind::NAME));
        }
        Ok((verified, bundle))
    }

    /// Whether leases signed with the key at hand will be believed.
    ///
    /// # Errors
    /// [`OfficeFault::LeaseKey`].
    pub fn check_lease_key(&self) -> Result<(), OfficeFault> {
        let own = self.lease_key.public();
        let named = self.keyset.keyset().roles.lease.keys.iter().any(|member| member.key == own);
        if named { Ok(()) } else { Err(OfficeFault::LeaseKey) }
    }

    fn stored<K: RoleKind>(&self, envelope: &[u8]) -> Result<Verified<K>, OfficeFault> {
        self.keyset.verify(envelope).map_err(|source| OfficeFault::Envelope { kind: K::NAME, source })
    }

    /// The newest keysets, as many as an answer carries. They are the same for everybody, because guest,
    /// host and gateway each start from a keyset of their own.
    #[must_use]
    pub fn links(&self) -> &[Vec<u8>] {
        &self.chain[self.chain.len().saturating_sub(MAX_KEYSETS)..]
    }

    fn refuse_keyset(&self, image: u64) -> Option<Refusal> {
        let newest = self.keyset.version();
        let links = u64::try_from(self.links().len()).unwrap_or(u64::MAX);
        // The first link may be the image's own keyset or follow it.
        let oldest = newest.saturating_sub(links).max(1);
        if image > newest {
            Some(Refusal::NewerKeyset { image, newest })
        } else if image < oldest {
            Some(Refusal::OldImage { image, oldest })
        } else {
            None
        }
    }

    fn assign(
        &self,
        device: &Device,
        bundle: &Bundle,
        memory: &mut Memory,
    ) -> Result<Vec<LeaseGateway>, IssueError> {
        let at: Vec<(Pool, &Gateway)> = self
            .pools
            .iter()
            .filter_map(|pool| bundle.gateway(pool.id).map(|gateway| (*pool, gateway)))
            .take(MAX_NAMED_GATEWAYS)
            .collect();
        if at.is_empty() {
            return Err(OfficeFault::NoGateway.into());
        }
        Ok(memory.addresses.assign(&device.device, &at).ok_or(Refusal::NoAddress)?)
    }

    fn lease(
        &self,
        Identified { request, verified_request, device, .. }: &Identified,
        verified_bundle: &Verified<BundleKind>,
        bundle: &Bundle,
        gateways: Vec<LeaseGateway>,
        issued_at: u64,
    ) -> Lease {
        let life_s = self.lease_s.min(bundle.lease_s_max).min(MAX_LIFE_S);
        Lease {
            tenant: device.tenant,
            device: device.device.clone(),
            enrolment: device.enrolment,
            request: verified_request.hash(),
            nonce: request.nonce,
            boot_key: request.boot_key,
            seq: request.seq,
            keyset_version: self.keyset.version(),
            line: device.line.clone(),
            revision: bundle.revision,
            bundle: verified_bundle.hash(),
            verity_root: request.verity_root,
            gateways,
            issued_at,
            not_after: issued_at.saturating_add(life_s),
            state: StateMode::Ephemeral,
        }
    }

    /// Signs the lease, and checks it as the host will.
    fn seal(
        &self,
        who: &Identified,
        bundle: &Verified<BundleKind>,
        lease: Lease,
    ) -> Result<Issued, OfficeFault> {
        let parts = Parts {
            keysets: self.links().to_vec(),
            device: who.verified_device.envelope().to_vec(),
            bundle: bundle.envelope().to_vec(),
            lease: sign::<LeaseKind>(&lease.payload(), &[self.lease_key]),
        };
        for_host(self.keyset, &parts, &who.verified_request, &HostMemory::default())
            .map_err(|error| OfficeFault::SelfCheck(Box::new(error)))?;
        let Parts { keysets, device, bundle, lease: envelope } = parts.clone();
        let request = who.verified_request.envelope().to_vec();
        Ok(Issued { parts, admit: Admit { keysets, device, request, bundle, lease: envelope }, lease })
    }
}
