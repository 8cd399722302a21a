//! What kontord keeps of one device, below `<state>/<tenant>/<device>/`.
//!
//! ```text
//! host.key                PKCS#8, mode 0600
//! keysets/00000001.json   … rising, without a gap
//! device.json bundle.json
//! memory.json             the highest that was ever seen of each
//! slots/A/                the installed release
//! console.log             what the guest's console said
//! lock                    held while something above changes
//! ```
//!
//! Everything is verified when it is read, from the tenant's hash on. An older state of these files than
//! `memory.json` remembers is refused; who can set back all of them together can set back the host.
//! Each file is replaced as a whole: written beside, flushed, renamed.

use kontor_bundle::{
    Bundle, BundleError,
    lease::{Checked, HostMemory},
};
use kontor_trust::{
    BundleKind, Device, DeviceId, DeviceKind, DeviceState, Digest, DocumentError, EnvelopeError, KeyError,
    KeysetError, MAX_ENVELOPE, PublicKey, SecretKey, TrustedKeyset, Verified,
};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Most bytes of `host.key` and `memory.json`.
const SMALL_MAX: u64 = 4096;
/// Most keysets that are kept.
pub const MAX_STORED_KEYSETS: u64 = 10_000;

/// The highest versions that were ever seen (`lease.md` 16).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Of a keyset.
    pub keyset_version: u64,
    /// Of the bundle of the device's line.
    pub revision: u64,
    /// When the last lease was issued, in Unix seconds.
    pub issued_at: u64,
    /// Of an installed release.
    pub manifest_version: u64,
}

impl Memory {
    /// The part that leases are checked against.
    #[must_use]
    pub fn for_leases(&self) -> HostMemory {
        let Self { keyset_version, revision, issued_at, manifest_version: _ } = *self;
        HostMemory { keyset_version, revision, issued_at }
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

/// Why something stored cannot be used, or something new is not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory.
    #[error("{doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file is longer than such a file can be.
    #[error("{path} is longer than {most} bytes")]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// The limit.
        most: u64,
    },
    /// Others than the owner may read the key.
    #[error("{0} may be read by others; its mode must be 0600")]
    KeyMode(PathBuf),
    /// The host key.
    #[error("use the host key")]
    Key(#[source] KeyError),
    /// `memory.json`.
    #[error("understand memory.json")]
    Memory(#[source] serde_json::Error),
    /// More than [`MAX_STORED_KEYSETS`].
    #[error("a keyset of version {0}")]
    KeysetNumber(u64),
    /// The chain of keysets.
    #[error("the stored keyset {version}")]
    Keyset {
        /// Which link.
        version: u64,
        /// What is wrong.
        #[source]
        source: KeysetError,
    },
    /// The signatures of the device record.
    #[error("the device record is not signed as it must be")]
    DeviceEnvelope(#[source] EnvelopeError),
    /// The device record's content.
    #[error("the device record is malformed")]
    Device(#[source] DocumentError),
    /// The signatures of the bundle.
    #[error("the bundle is not signed as it must be")]
    BundleEnvelope(#[source] EnvelopeError),
    /// The bundle's content.
    #[error("the bundle")]
    Bundle(#[source] BundleError),
    /// A document of another tenant.
    #[error("the {0} is of another tenant")]
    OtherTenant(&'static str),
    /// The record of another device.
    #[error("the device record is for {found}, this is {expected}")]
    OtherDevice {
        /// The configured one.
        expected: DeviceId,
        /// The record's.
        found: DeviceId,
    },
    /// A record that names another host key.
    #[error("the device record names the host key {found}, this host's is {own}; enrol this host again")]
    OtherKey {
        /// The record's.
        found: PublicKey,
        /// The stored one.
        own: PublicKey,
    },
    /// The device is revoked.
    #[error("the device is revoked")]
    Revoked,
    /// The bundle of another line.
    #[error("the bundle is for another line than the device's")]
    OtherLine,
    /// Something older than what was seen before.
    #[error("the {what} is of version {found}, version {known} was seen before")]
    Older {
        /// What is older.
        what: &'static str,
        /// Its version.
        found: u64,
        /// The highest seen.
        known: u64,
    },
    /// Another program changes the store.
    #[error("{0} is locked: kontord already runs for this device")]
    Busy(PathBuf),
}

impl StoreError {
    /// Whether something is simply not there yet.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The directory of one device.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    tenant: Digest,
    device: DeviceId,
}

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

    /// The highest versions ever seen; all zero before anything was.
    ///
    /// # Errors
    /// [`StoreError`] when the file cannot be read or understood.
    pub fn memory(&self) -> Result<Memory, StoreError> {
        match read(&self.dir.join("memory.json"), SMALL_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(StoreError::Memory),
            Err(error) if error.is_missing() => Ok(Memory::default()),
            Err(error) => Err(error),
        }
    }

    /// The newest stored keyset, its chain checked from the tenant's hash on.
    ///
    /// # Errors
    /// [`StoreError`] when a link is missing or wrong.
    pub fn keyset(&self) -> Result<TrustedKeyset, StoreError> {
        let first = read(&self.keyset_path(1)?, MAX_ENVELOPE as u64)?;
        let mut newest = TrustedKeyset::first(&first, &self.tenant).map_err(keyset_error(1))?;
        loop {
            let version = newest.version() + 1;
            match read(&self.keyset_path(version)?, MAX_ENVELOPE as u64) {
                Ok(next) => newest = newest.advance(&next).map_err(keyset_error(version))?,
                Err(error) if error.is_missing() => break,
                Err(error) => return Err(error),
            }
        }
        not_older("stored keyset", newest.version(), self.memory()?.keyset_version)?;
        Ok(newest)
    }

    /// The stored documents, verified, for the holder of `host_key`.
    ///
    /// # Errors
    /// [`StoreError`] names what is missing or wrong.
    pub fn records(&self, host_key: &PublicKey) -> Result<Records, StoreError> {
        let keyset = self.keyset()?;
        let device = read(&self.dir.join("device.json"), MAX_ENVELOPE as u64)?;
        let (_, device) = self.check_device(&keyset, &device, host_key)?;
        let bundle = read(&self.dir.join("bundle.json"), MAX_ENVELOPE as u64)?;
        let (_, bundle) = self.check_bundle(&keyset, &bundle, &device)?;
        not_older("stored bundle", bundle.revision, self.memory()?.revision)?;
        Ok(Records { keyset, device, bundle })
    }

    /// Verifies and stores what a device needs before its first start.
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
        let host_key = self.host_key()?.public();
        let _lock = self.lock()?;
        let (floor, links) = match self.keyset() {
            Ok(floor) => (floor, untrusted_keysets),
            Err(error) if error.is_missing() => {
                let (first, links) = untrusted_keysets.split_first().ok_or(error)?;
                (TrustedKeyset::first(first, &self.tenant).map_err(keyset_error(1))?, links)
            }
            Err(error) => return Err(error),
        };
        let chain = chain(floor, links)?;
        let keyset = newest(&chain).clone();
        let (verified_device, device) = self.check_device(&keyset, untrusted_device, &host_key)?;
        if let Ok(stored) = read(&self.dir.join("device.json"), MAX_ENVELOPE as u64)
            && let Ok((_, stored)) = self.check_device(&keyset, &stored, &host_key)
        {
            not_older("device record", device.serial, stored.serial)?;
        }
        let (verified_bundle, bundle) = self.check_bundle(&keyset, untrusted_bundle, &device)?;
        not_older("bundle", bundle.revision, self.memory()?.revision)?;
        self.write(&chain, &verified_device, &verified_bundle, |memory| {
            memory.revision = bundle.revision;
        })?;
        Ok(Records { keyset, device, bundle })
    }

    /// Stores what a checked lease brought, before anybody acts on it.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be written.
    pub fn remember(&self, checked: &Checked, untrusted_keysets: &[Vec<u8>]) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let chain = chain(self.keyset()?, untrusted_keysets)?;
        self.write(&chain, &checked.verified_device, &checked.verified_bundle, |memory| {
            memory.revision = memory.revision.max(checked.bundle.revision);
            memory.issued_at = memory.issued_at.max(checked.lease.issued_at);
        })
    }

    /// Remembers that a release of this version was installed. The caller holds the lock.
    pub(crate) fn remember_release(&self, version: u64) -> Result<(), StoreError> {
        let mut memory = self.memory()?;
        memory.manifest_version = memory.manifest_version.max(version);
        self.write_memory(&memory)
    }

    /// Documents first, memory last: a crash in between leaves newer documents than are remembered, which
    /// is allowed, and never the opposite.
    fn write(
        &self,
        chain: &[TrustedKeyset],
        device: &Verified<DeviceKind>,
        bundle: &Verified<BundleKind>,
        change: impl FnOnce(&mut Memory),
    ) -> Result<(), StoreError> {
        for keyset in chain {
            let path = self.keyset_path(keyset.version())?;
            if !path.exists() {
                replace(&path, keyset.envelope())?;
            }
        }
        replace(&self.dir.join("device.json"), device.envelope())?;
        replace(&self.dir.join("bundle.json"), bundle.envelope())?;
        let mut memory = self.memory()?;
        memory.keyset_version = memory.keyset_version.max(newest(chain).version());
        change(&mut memory);
        self.write_memory(&memory)
    }

    fn write_memory(&self, memory: &Memory) -> Result<(), StoreError> {
        let mut bytes = serde_json::to_vec(memory).map_err(StoreError::Memory)?;
        bytes.push(b'\n');
        replace(&self.dir.join("memory.json"), &bytes)
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
        match device.state {
            DeviceState::Active => Ok((verified, device)),
            DeviceState::Revoked => Err(StoreError::Revoked),
        }
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

pub(crate) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io { doing, path: path.into(), source }
}

/// A whole file of at most `most` bytes.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>, StoreError> {
    let failed = || io_error("read", path);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed())?;
    file.take(most + 1).read_to_end(&mut bytes).map_err(failed())?;
    if bytes.len() as u64 > most { Err(StoreError::TooLong { path: path.into(), most }) } else { Ok(bytes) }
}

/// Replaces a file as a whole: after a crash it is the old one or the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let beside = path.with_extension("new");
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        sync_parent(path)
    })();
    written.map_err(io_error("write", path))
}

/// Makes a rename in `path`'s directory durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
