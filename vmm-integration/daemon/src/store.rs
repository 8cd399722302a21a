//! What kontord keeps of one device, below `<state>/<tenant>/<device>/`.
//!
//! ```text
//! host.key                PKCS#8, mode 0600
//! keysets/00000001.json   … rising, without a gap
//! memory.json             the device record, the bundle, and the highest that was ever seen of each kind
//! slots/A/                the installed release
//! kvm.json                whether KVM ran a guest when it was last tried
//! fetched/                the newest release metadata that was ever fetched
//! running                 the host's boot in which a machine was started that was not seen to its end
//! console.log             what the guest's console said
//! lock                    held while memory or host key change
//! slots.lock              held while a release is installed
//! ```
//!
//! Everything is verified when it is read, from the tenant's hash on. Older documents than those that
//! `memory.json` remembers are refused; who can set it back can set back the host.
//! Each file is replaced as a whole: written beside, flushed, renamed. A change is one such step: keysets are
//! written first and count when `memory.json` names their number, so that at any moment record, bundle and
//! newest keyset are those of one change.

mod error;
mod files;

pub use error::StoreError;
pub(crate) use files::{io_error, is_full, read, sync_parent};

use crate::{console, host::KvmVerdict};
use files::replace;
use kontor_bundle::{
    Bundle,
    lease::{Checked, HostMemory, MAX_KEYSETS, Notice},
};
use kontor_trust::{
    BundleKind, Device, DeviceId, DeviceKind, DeviceState, Digest, KeysetError, Line, MAX_ENVELOPE,
    PublicKey, SecretKey, TrustedKeyset, Verified,
};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Most bytes of `host.key` and `kvm.json`.
const SMALL_MAX: u64 = 4096;
/// Most bytes of `memory.json`: two envelopes, each quote of theirs escaped, and the numbers.
const MEMORY_MAX: u64 = 5 * MAX_ENVELOPE as u64;
/// Most keysets that are kept.
pub const MAX_STORED_KEYSETS: u64 = 10_000;

/// The highest versions that were ever seen (`lease.md` 16).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Of a keyset: the newest one that counts.
    pub keyset_version: u64,
    /// Serial of the device's record.
    pub serial: u64,
    /// Of bundles, for each line that the device was ever in.
    pub revisions: BTreeMap<Line, u64>,
    /// When the last lease was issued, in Unix seconds by the office's clock.
    pub issued_at: u64,
    /// Of an installed release.
    pub manifest_version: u64,
}

impl Memory {
    /// What leases are checked against at `now` (Unix seconds, the host's own clock). The only measure that is
    /// made of `issued_at`: see [`HostMemory::as_of`].
    #[must_use]
    pub fn for_leases(self, now: u64) -> HostMemory {
        let Self { keyset_version, serial, revisions, issued_at, manifest_version: _ } = self;
        HostMemory { keyset_version, serial, revisions, issued_at }.as_of(now)
    }
}

impl Memory {
    /// The highest revision of a line's bundle, 0 before the first.
    #[must_use]
    pub fn revision(&self, line: &Line) -> u64 {
        self.revisions.get(line).copied().unwrap_or_default()
    }

    /// What is remembered once these count.
    fn after(self, keyset: &TrustedKeyset, device: &Device, bundle: &Bundle) -> Self {
        let Self { keyset_version, serial, mut revisions, issued_at, manifest_version } = self;
        let known = revisions.entry(bundle.line.clone()).or_default();
        *known = bundle.revision.max(*known);
        let (keyset_version, serial) = (keyset.version().max(keyset_version), device.serial.max(serial));
        Self { keyset_version, serial, revisions, issued_at, manifest_version }
    }
}

/// `memory.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    seen: Memory,
    /// None before the first were provisioned.
    documents: Option<Documents>,
}

/// The envelopes of the newest documents, which are text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Documents {
    device: String,
    bundle: String,
}

impl Documents {
    fn new(device: &Verified<DeviceKind>, bundle: &Verified<BundleKind>) -> Self {
        let text = |envelope: &[u8]| String::from_utf8_lossy(envelope).into_owned();
        Self { device: text(device.envelope()), bundle: text(bundle.envelope()) }
    }
}

/// What the stored documents say, verified.
#[derive(Debug, Clone)]
pub struct Records {
    /// The newest keyset.
    pub keyset: TrustedKeyset,
    /// The device's own record.
    pub device: Device,
    /// The bundle of its line.
    pub bundle: Bundle,
}

/// The directory of one device.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    tenant: Digest,
    device: DeviceId,
}

/// Identifies a boot of the host (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What was seen, and the newest documents.
const MEMORY: &str = "memory.json";
/// What trying KVM came to.
const KVM_VERDICT: &str = "kvm.json";
/// Stands while a machine runs.
const RUNNING: &str = "running";
/// Least room for a start: two console logs, `memory.json` with the one that replaces it, and some.
pub const ROOM: u64 = 2 << 20;

const _: () = assert!(ROOM >= 2 * console::LOG_MAX + 2 * MEMORY_MAX);

/// What took down a machine that nobody saw to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutShort {
    /// The end of kontord, which the host outlived.
    Kontord,
    /// The end of the host's boot.
    Host,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfBoot {
    boot: String,
    verdict: KvmVerdict,
}

fn boot_id() -> io::Result<String> {
    fs::read_to_string(BOOT_ID)
}

/// A file, and what it becomes.
type Step = (PathBuf, Vec<u8>);

/// Held while files of the store change; released when dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "what is held is the descriptor's lock")] File);

impl Store {
    /// The store of `device`; its directories are made where they are missing.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(state: &Path, tenant: Digest, device: DeviceId) -> Result<Self, StoreError> {
        let dir = state.join(tenant.to_string()).join(device.as_str());
        for dir in [dir.join("keysets"), dir.join("slots")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(io_error("make the directory", &dir))?;
        }
        Ok(Self { dir, tenant, device })
    }

    /// The tenant.
    #[must_use]
    pub fn tenant(&self) -> Digest {
        self.tenant
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Where the slots are.
    #[must_use]
    pub fn slots(&self) -> PathBuf {
        self.dir.join("slots")
    }

    /// What was fetched last from the release repository.
    pub(crate) fn fetched(&self) -> PathBuf {
        self.dir.join("fetched")
    }

    /// The guest's console log.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Waits until nobody else changes the store.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn lock(&self) -> Result<Lock, StoreError> {
        self.flock("lock", FlockOperation::LockExclusive)
    }

    /// Waits until nobody else installs. Held while a release is fetched, which nothing else has to wait for.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub(crate) fn lock_slots(&self) -> Result<Lock, StoreError> {
        self.flock("slots.lock", FlockOperation::LockExclusive)
    }

    /// Claims the device for this process, at once or not at all.
    ///
    /// # Errors
    /// [`StoreError::Busy`] when another kontord has it.
    pub fn claim(&self) -> Result<Lock, StoreError> {
        self.flock("run.lock", FlockOperation::NonBlockingLockExclusive)
    }

    fn flock(&self, name: &str, operation: FlockOperation) -> Result<Lock, StoreError> {
        let path = self.dir.join(name);
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(io_error("open", &path))?;
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(Lock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Busy(path)),
            Err(errno) => Err(io_error("lock", &path)(errno.into())),
        }
    }

    /// This host's key for the device.
    ///
    /// # Errors
    /// [`StoreError`] when there is none, others may read it, or it is no key.
    pub fn host_key(&self) -> Result<SecretKey, StoreError> {
        let path = self.dir.join("host.key");
        let mode = fs::metadata(&path).map_err(io_error("read", &path))?.mode();
        if mode & 0o077 != 0 {
            return Err(StoreError::KeyMode(path));
        }
        let pkcs8 = Zeroizing::new(read(&path, SMALL_MAX)?);
        SecretKey::from_pkcs8(&pkcs8).map_err(StoreError::Key)
    }

    /// This host's key, made first where there is none.
    ///
    /// # Errors
    /// As [`Store::host_key`].
    pub fn make_host_key(&self) -> Result<SecretKey, StoreError> {
        let _lock = self.lock()?;
        match self.host_key() {
            Err(error) if error.is_missing() => {
                let key = SecretKey::generate().map_err(StoreError::Key)?;
                replace(&self.dir.join("host.key"), key.to_pkcs8())?;
                Ok(key)
            }
            key => key,
        }
    }

    /// What came of trying KVM with a guest; `None` when that was not in this boot of the host, whose
    /// kernel, firmware and settings may have changed since.
    #[must_use]
    pub fn kvm_verdict(&self) -> Option<KvmVerdict> {
        let (boot, verdict) = (boot_id().ok()?, read(&self.dir.join(KVM_VERDICT), SMALL_MAX).ok()?);
        let Ok(OfBoot { boot: then, verdict }) = serde_json::from_slice(&verdict) else { return None };
        (then == boot).then_some(verdict)
    }

    /// Keeps what [`Store::kvm_verdict`] tells.
    ///
    /// # Errors
    /// [`StoreError`] names the file.
    pub fn remember_kvm_verdict(&self, verdict: KvmVerdict) -> Result<(), StoreError> {
        let boot = boot_id().map_err(io_error("read", Path::new(BOOT_ID)))?;
        let verdict = serde_json::to_vec(&OfBoot { boot, verdict }).expect("text and numbers serialize");
        replace(&self.dir.join(KVM_VERDICT), &verdict)
    }

    /// Takes note that a machine is about to run.
    ///
    /// # Errors
    /// [`StoreError`] names the file.
    pub(crate) fn mark_running(&self) -> Result<(), StoreError> {
        let boot = boot_id().map_err(io_error("read", Path::new(BOOT_ID)))?;
        replace(&self.dir.join(RUNNING), boot.as_bytes())
    }

    /// Takes note that the machine was seen to its end.
    ///
    /// # Errors
    /// [`StoreError`] names the file.
    pub(crate) fn clear_running(&self) -> Result<(), StoreError> {
        let path = self.dir.join(RUNNING);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// What took down a machine that nobody saw to its end, if the last one was such.
    #[must_use]
    pub fn cut_short(&self) -> Option<CutShort> {
        let then = read(&self.dir.join(RUNNING), SMALL_MAX).ok()?;
        let same = boot_id().is_ok_and(|boot| boot.as_bytes() == then);
        Some(if same { CutShort::Kontord } else { CutShort::Host })
    }

    /// Whether a machine could keep here what it has to while it runs.
    ///
    /// # Errors
    /// [`StoreError`] of a full disk when there is less room than [`ROOM`].
    pub(crate) fn require_room(&self) -> Result<(), StoreError> {
        let check = || {
            let disk = rustix::fs::statvfs(&self.dir)?;
            if disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM {
                let words = format!("no space left for a work VM, which needs {ROOM} bytes");
                return Err(io::Error::new(io::ErrorKind::StorageFull, words));
            }
            Ok(())
        };
        check().map_err(io_error("write in", &self.dir))
    }

    /// The highest versions ever seen; all zero before anything was.
    ///
    /// # Errors
    /// [`StoreError`] when the file cannot be read or understood.
    pub fn memory(&self) -> Result<Memory, StoreError> {
        Ok(self.kept()?.seen)
    }

    fn kept(&self) -> Result<Kept, StoreError> {
        match read(&self.dir.join(MEMORY), MEMORY_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(StoreError::Memory),
            Err(error) if error.is_missing() => Ok(Kept::default()),
            Err(error) => Err(error),
        }
    }

    /// The newest stored keyset, its chain checked from the tenant's hash on.
    ///
    /// # Errors
    /// [`StoreError`] when a link is missing or wrong.
    pub fn keyset(&self) -> Result<TrustedKeyset, StoreError> {
        self.keyset_up_to(self.memory()?.keyset_version)
    }

    /// A file of a later version than `known` is of a change that was never completed.
    fn keyset_up_to(&self, known: u64) -> Result<TrustedKeyset, StoreError> {
        let first = read(&self.keyset_path(1)?, MAX_ENVELOPE as u64)?;
        let mut newest = TrustedKeyset::first(&first, &self.tenant).map_err(keyset_error(1))?;
        while newest.version() < known {
            let version = newest.version() + 1;
            match read(&self.keyset_path(version)?, MAX_ENVELOPE as u64) {
                Ok(next) => newest = newest.advance(&next).map_err(keyset_error(version))?,
                Err(error) if error.is_missing() => break,
                Err(error) => return Err(error),
            }
        }
        not_older("stored keyset", newest.version(), known)?;
        Ok(newest)
    }

    /// The stored documents, verified, for the holder of `host_key`.
    ///
    /// # Errors
    /// [`StoreError`] names what is missing or wrong.
    pub fn records(&self, host_key: &PublicKey) -> Result<Records, StoreError> {
        let Kept { seen, documents } = self.kept()?;
        let documents = documents.ok_or(StoreError::NoDocuments)?;
        let keyset = self.keyset_up_to(seen.keyset_version)?;
        let (_, device) = self.check_device(&keyset, documents.device.as_bytes(), host_key)?;
        not_older("stored device record", device.serial, seen.serial)?;
        let (_, bundle) = self.check_bundle(&keyset, documents.bundle.as_bytes(), &device)?;
        not_older("stored bundle", bundle.revision, seen.revision(&bundle.line))?;
        Ok(Records { keyset, device, bundle })
    }

    /// Verifies and stores what a device needs before its first start. Where stored keysets were lost or damaged,
    /// they are stored anew if all of them are given.
    ///
    /// # Errors
    /// [`StoreError`] when anything does not verify, or is older than what was seen before; then nothing
    /// is stored.
    pub fn provision(
        &self,
        untrusted_keysets: &[Vec<u8>],
        untrusted_device: &[u8],
        untrusted_bundle: &[u8],
    ) -> Result<Records, StoreError> {
        let _lock = self.lock()?;
        let host_key = self.host_key()?.public();
        let Kept { mut seen, documents } = self.kept()?;
        let chain = match self.keyset_up_to(seen.keyset_version) {
            Ok(floor) => chain(floor, untrusted_keysets)?,
            Err(error) => self.chain_from_the_first(untrusted_keysets, seen.keyset_version, error)?,
        };
        let keyset = newest(&chain).clone();
        let (verified_device, device) = self.check_device(&keyset, untrusted_device, &host_key)?;
        let is_known = documents.is_some_and(|stored| {
            let stored = stored.device.as_bytes();
            chain.iter().any(|keyset| self.check_device(keyset, stored, &host_key).is_ok())
        });
        if is_known {
            not_older("device record", device.serial, seen.serial)?;
        } else {
            // Of a host that was enrolled anew the numbers may begin again.
            seen.serial = 0;
        }
        let (verified_bundle, bundle) = self.check_bundle(&keyset, untrusted_bundle, &device)?;
        not_older("bundle", bundle.revision, seen.revision(&bundle.line))?;
        let seen = seen.after(&keyset, &device, &bundle);
        self.write(&self.change(&chain, Documents::new(&verified_device, &verified_bundle), seen)?)?;
        Ok(Records { keyset, device, bundle })
    }

    /// Stores what a lease brought that was checked at `now`, before anybody acts on it.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be written, or something newer was stored since it was checked.
    pub fn remember(
        &self,
        checked: &Checked,
        untrusted_keysets: &[Vec<u8>],
        now: u64,
    ) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let Kept { seen, documents } = self.kept()?;
        seen.clone().for_leases(now).admits(checked).map_err(StoreError::Meanwhile)?;
        let floor = self.keyset_up_to(seen.keyset_version)?;
        let Checked { device, bundle, verified_device, verified_bundle, lease, .. } = checked;
        // The serials of two enrolments do not tell which is the newer one.
        let stored = documents.ok_or(StoreError::NoDocuments)?;
        let (_, stored) = self.check_device(&floor, stored.device.as_bytes(), &self.host_key()?.public())?;
        if (stored.enrolment, stored.host_key) != (device.enrolment, device.host_key) {
            return Err(StoreError::EnrolledAnew);
        }
        let chain = chain(floor, untrusted_keysets)?;
        // Not the later one of two: what was in the host's future is forgotten ([`HostMemory::as_of`]).
        let seen = Memory { issued_at: lease.issued_at, ..seen.after(newest(&chain), device, bundle) };
        self.write(&self.change(&chain, Documents::new(verified_device, verified_bundle), seen)?)
    }

    /// Checks that this device was revoked: by the enrol role, in a record no older than the stored one.
    ///
    /// # Errors
    /// [`StoreError`] when it was not.
    pub fn check_revocation(&self, untrusted: &Notice) -> Result<(), StoreError> {
        let Notice { keysets, device } = untrusted;
        if keysets.len() > MAX_KEYSETS {
            return Err(StoreError::TooManyKeysets(keysets.len()));
        }
        let seen = self.memory()?;
        let chain = chain(self.keyset_up_to(seen.keyset_version)?, keysets)?;
        let (_, device) = self.check_record(newest(&chain), device, &self.host_key()?.public())?;
        not_older("device record", device.serial, seen.serial)?;
        if device.state == DeviceState::Revoked { Ok(()) } else { Err(StoreError::NotRevoked) }
    }

    /// Stores keysets that came by another way than with a lease, if record and bundle are good under the
    /// newest of them too: false if they are not. Without record and bundle there is nothing to store them
    /// for.
    ///
    /// # Errors
    /// [`StoreError`] when a keyset does not follow, or cannot be written.
    pub(crate) fn adopt(&self, untrusted_keysets: &[Vec<u8>]) -> Result<bool, StoreError> {
        let _lock = self.lock()?;
        let Kept { seen, documents } = self.kept()?;
        let (Some(documents), false) = (documents, untrusted_keysets.is_empty()) else { return Ok(true) };
        let chain = chain(self.keyset_up_to(seen.keyset_version)?, untrusted_keysets)?;
        let (keyset, host_key) = (newest(&chain), self.host_key()?.public());
        let device = self.check_device(keyset, documents.device.as_bytes(), &host_key);
        let good = device.and_then(|(_, device)| {
            let (_, bundle) = self.check_bundle(keyset, documents.bundle.as_bytes(), &device)?;
            Ok((device, bundle))
        });
        let Ok((device, bundle)) = good else { return Ok(false) };
        let seen = seen.after(keyset, &device, &bundle);
        self.write(&self.change(&chain, documents, seen)?)?;
        Ok(true)
    }

    /// Remembers that a release of this version was installed.
    pub(crate) fn remember_release(&self, version: u64) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let mut kept = self.kept()?;
        kept.seen.manifest_version = kept.seen.manifest_version.max(version);
        self.write(&[self.memory_step(&kept)?])
    }

    /// A chain that has every keyset up to version `known` at least, and needs none of the stored ones, which
    /// cannot be used because of `lost`.
    fn chain_from_the_first(
        &self,
        untrusted: &[Vec<u8>],
        known: u64,
        lost: StoreError,
    ) -> Result<Vec<TrustedKeyset>, StoreError> {
        let Some((first, links)) = untrusted.split_first() else { return Err(lost) };
        let first = TrustedKeyset::first(first, &self.tenant).map_err(keyset_error(1));
        match first.and_then(|first| chain(first, links)) {
            Err(error) if known == 0 => Err(error),
            Ok(chain) if newest(&chain).version() >= known => Ok(chain),
            Ok(_) | Err(_) => Err(StoreError::KeysetsLost { known, source: Box::new(lost) }),
        }
    }

    /// The steps of a change, the last of which is the one that makes it count.
    fn change(
        &self,
        chain: &[TrustedKeyset],
        documents: Documents,
        seen: Memory,
    ) -> Result<Vec<Step>, StoreError> {
        let mut steps = Vec::new();
        for keyset in chain {
            let path = self.keyset_path(keyset.version())?;
            // What is there counts only when it is just this.
            if read(&path, MAX_ENVELOPE as u64).ok().as_deref() != Some(keyset.envelope()) {
                steps.push((path, keyset.envelope().to_vec()));
            }
        }
        steps.push(self.memory_step(&Kept { seen, documents: Some(documents) })?);
        Ok(steps)
    }

    fn memory_step(&self, kept: &Kept) -> Result<Step, StoreError> {
        let mut bytes = serde_json::to_vec(kept).map_err(StoreError::Memory)?;
        bytes.push(b'\n');
        Ok((self.dir.join(MEMORY), bytes))
    }

    fn write(&self, steps: &[Step]) -> Result<(), StoreError> {
        steps.iter().try_for_each(|(path, bytes)| replace(path, bytes))
    }

    fn keyset_path(&self, version: u64) -> Result<PathBuf, StoreError> {
        if version > MAX_STORED_KEYSETS {
            return Err(StoreError::KeysetNumber(version));
        }
        Ok(self.dir.join("keysets").join(format!("{version:08}.json")))
    }

    fn check_device(
        &self,
        keyset: &TrustedKeyset,
        untrusted: &[u8],
        host_key: &PublicKey,
    ) -> Result<(Verified<DeviceKind>, Device), StoreError> {
        let (verified, device) = self.check_record(keyset, untrusted, host_key)?;
        match device.state {
            DeviceState::Active => Ok((verified, device)),
            DeviceState::Revoked => Err(StoreError::Revoked),
        }
    }

    /// The same for a device in any state.
    fn check_record(
        &self,
        keyset: &TrustedKeyset,
        untrusted: &[u8],
        host_key: &PublicKey,
    ) -> Result<(Verified<DeviceKind>, Device), StoreError> {
        let verified = keyset.verify::<DeviceKind>(untrusted).map_err(StoreError::DeviceEnvelope)?;
        let device = Device::parse(&verified).map_err(StoreError::Device)?;
        if device.tenant != self.tenant {
            return Err(StoreError::OtherTenant("device record"));
        }
        if device.device != self.device {
            return Err(StoreError::OtherDevice { expected: self.device.clone(), found: device.device });
        }
        if device.host_key != *host_key {
            return Err(StoreError::OtherKey { found: device.host_key, own: *host_key });
        }
        Ok((verified, device))
    }

    fn check_bundle(
        &self,
        keyset: &TrustedKeyset,
        untrusted: &[u8],
        device: &Device,
    ) -> Result<(Verified<BundleKind>, Bundle), StoreError> {
        let verified = keyset.verify::<BundleKind>(untrusted).map_err(StoreError::BundleEnvelope)?;
        let bundle = Bundle::parse(&verified).map_err(StoreError::Bundle)?;
        if bundle.tenant != self.tenant {
            return Err(StoreError::OtherTenant("bundle"));
        }
        if bundle.line != device.line {
            return Err(StoreError::OtherLine);
        }
        Ok((verified, bundle))
    }
}

/// Every keyset from `floor` to the end of `links`, in rising order; at least `floor` itself.
fn chain(floor: TrustedKeyset, links: &[Vec<u8>]) -> Result<Vec<TrustedKeyset>, StoreError> {
    let mut chain = vec![floor];
    for link in links {
        let last = newest(&chain);
        let next = last.follow(std::slice::from_ref(link)).map_err(keyset_error(last.version() + 1))?;
        if next.version() > last.version() {
            chain.push(next);
        }
    }
    Ok(chain)
}

fn newest(chain: &[TrustedKeyset]) -> &TrustedKeyset {
    chain.last().expect("a chain begins with its floor")
}

fn keyset_error(version: u64) -> impl FnOnce(KeysetError) -> StoreError {
    move |source| StoreError::Keyset { version, source }
}

pub(crate) fn not_older(what: &'static str, found: u64, known: u64) -> Result<(), StoreError> {
    if found < known { Err(StoreError::Older { what, found, known }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
