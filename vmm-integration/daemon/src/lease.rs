//! From a guest's challenge to a lease that the host found good (`lease.md` 7 and 16).

use crate::{
    daemon::StartError,
    exit::chain,
    host::Accelerator,
    office::{LeaseSource, Reply},
    session::{Answer, Granted, LeaseNote},
    store::{Store, StoreError},
};
use kontor_bundle::{
    Bundle,
    lease::{Checked, LeaseError, Notice, Parts, for_host},
};
use kontor_release::Manifest;
use kontor_trust::{Digest, Request, RequestKind, Verified, sign, verify_request};
use kontor_wire::control::Challenge;
use std::time::Duration;

/// Why an answer of the office is not used.
#[derive(Debug, thiserror::Error)]
enum Rejected {
    #[error("check the office's answer")]
    Lease(#[from] LeaseError),
    #[error("check the office's answer")]
    Store(#[from] StoreError),
    #[error("the office's newest policy forbids what runs")]
    Forbidden(#[source] StartError),
}

/// Asks for leases in the name of one device and one started release.
#[derive(Debug, Clone)]
pub struct Asker<O> {
    /// The device's keys and documents.
    pub store: Store,
    /// Who is asked.
    pub office: O,
    /// What was started.
    pub running: Running,
    /// The host's clock, in Unix seconds. Nobody else's, and it may be wrong.
    pub clock: fn() -> u64,
}

/// What of a machine policy has a say in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Name of the release, for people.
    pub release: String,
    /// Its version.
    pub version: u64,
    /// Whether it is a test image.
    pub test: bool,
    /// What executes it.
    pub accelerator: Accelerator,
}

impl Running {
    /// A machine that runs, or would run, this release.
    #[must_use]
    pub fn of(manifest: &Manifest, accelerator: Accelerator) -> Self {
        let image = &manifest.image;
        Self { release: image.release.clone(), version: manifest.version, test: image.test, accelerator }
    }

    /// Whether `bundle` lets it run.
    pub(crate) fn allowed_by(&self, bundle: &Bundle) -> Result<(), StartError> {
        if self.version < bundle.min_release {
            return Err(StartError::OldRelease { version: self.version, floor: bundle.min_release });
        }
        if self.test && !bundle.settings.allow_test_image {
            return Err(StartError::TestImage);
        }
        if self.accelerator.is_emulation() && !bundle.settings.allow_emulation {
            return Err(StartError::NoKvm);
        }
        Ok(())
    }
}

impl<O: LeaseSource> Asker<O> {
    /// Answers one challenge. What the answer brought is on disk before this returns it.
    pub async fn ask(&self, challenge: Challenge) -> Answer {
        let request = match self.request(&challenge) {
            Ok(request) => request,
            Err(error) => return Answer::NotVerified(chain(&error)),
        };
        let parts = match self.office.answer(request.envelope().to_vec()).await {
            Ok(Reply::Lease(parts)) => parts,
            Ok(Reply::Refused(words)) => return Answer::Refused(words),
            Ok(Reply::Revoked(notice)) => return self.stand_down(&notice),
            Err(error) => return Answer::Unreachable(chain(&error)),
        };
        match self.accept(&request, &parts) {
            Ok(checked) => Answer::Lease(Box::new(grant(parts, &checked))),
            Err(error @ Rejected::Forbidden(_)) => Answer::Forbidden(chain(&error)),
            Err(error @ (Rejected::Lease(_) | Rejected::Store(_))) => Answer::NotVerified(chain(&error)),
        }
    }

    /// Whether the enrol role has revoked the device: then nothing of it runs on. Not kept: the office says so again.
    fn stand_down(&self, notice: &Notice) -> Answer {
        match self.store.check_revocation(notice) {
            Ok(()) => Answer::Forbidden(StoreError::Revoked.to_string()),
            Err(error) => Answer::NotVerified(chain(&error)),
        }
    }

    fn request(&self, challenge: &Challenge) -> Result<Verified<RequestKind>, StoreError> {
        let key = self.store.host_key()?;
        let records = self.store.records(&key.public())?;
        // The chain has to begin where both can follow: at the older of the guest's and the host's.
        let keyset_version = challenge.keyset_version.min(records.keyset.version());
        let request = Request {
            tenant: self.store.tenant(),
            device: self.store.device().clone(),
            enrolment: records.device.enrolment,
            nonce: challenge.nonce,
            boot_key: challenge.boot_key,
            seq: challenge.seq,
            verity_root: Digest(challenge.verity_root),
            release: self.running.release.clone(),
            keyset_version,
        };
        let envelope = sign::<RequestKind>(&request.payload(), &[&key]);
        Ok(verify_request(&envelope, &key.public())
            .expect("what was just signed with a key verifies with it"))
    }

    fn accept(&self, request: &Verified<RequestKind>, parts: &Parts) -> Result<Checked, Rejected> {
        let floor = self.store.keyset()?;
        let now = (self.clock)();
        let memory = self.store.memory()?.for_leases(now);
        let checked = for_host(&floor, parts, request, &memory)?;
        // Kept also when it forbids what runs: the next start is decided by it.
        self.store.remember(&checked, &parts.keysets, now)?;
        self.running.allowed_by(&checked.bundle).map_err(Rejected::Forbidden)?;
        Ok(checked)
    }
}

fn grant(parts: Parts, checked: &Checked) -> Granted {
    let gateways = checked.bundle.gateways.iter();
    let lease = LeaseNote {
        issued_at: checked.lease.issued_at,
        not_after: checked.lease.not_after,
        revision: checked.lease.revision,
    };
    Granted {
        parts,
        gateways: gateways.map(|gateway| (gateway.id, gateway.endpoints.clone())).collect(),
        lease,
        off_after: Duration::from_secs(checked.life_s().saturating_add(checked.bundle.lapse_off_s)),
    }
}
