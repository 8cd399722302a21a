//! The directory of files that control answers from.

use crate::config::{Config, ConfigError};
use kontor_control::{Memory, Office, OfficeFault};
use kontor_trust::{
    BundleKind, DeviceId, DeviceKind, KeyError, KeysetError, Kind, Line, MAX_ENVELOPE, SecretKey,
    TrustedKeyset,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Most keysets that are followed at a start.
pub(crate) const MAX_CHAIN: usize = 4096;
/// Most device records, and most bundles.
const MAX_DOCUMENTS: usize = 65_536;
/// Most bytes of the configuration.
const MAX_CONFIG: usize = 64 * 1024;
/// Most bytes of the key that are looked at; a key has 83.
const MAX_KEY: usize = 4096;
/// Most bytes of what control remembers.
const MAX_MEMORY: usize = 64 * 1024 * 1024;
/// Permission bits that a key file must not have.
const OTHERS: u32 = 0o077;

/// The directory, held for this process alone while it lives.
pub(crate) struct Store {
    dir: PathBuf,
    _lock: File,
}

/// The keysets on disk, followed.
pub(crate) struct Chain {
    pub(crate) newest: TrustedKeyset,
    pub(crate) envelopes: Vec<Vec<u8>>,
}

/// Why a file of the office cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("lock {path}")]
    Lock { path: PathBuf, source: io::Error },
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path} has more than {limit} bytes")]
    TooLarge { path: PathBuf, limit: usize },
    #[error("the configuration {path} cannot be used")]
    Config { path: PathBuf, source: ConfigError },
    #[error("{path} does not parse: restore it from a backup, or remove it to begin anew")]
    Memory { path: PathBuf, source: serde_json::Error },
    #[error("{path} is readable by others than its owner: make it 0600, and a new key if others had access")]
    Open { path: PathBuf },
    #[error("{path} is no key")]
    Key { path: PathBuf, source: KeyError },
    #[error("{path} does not verify")]
    Keyset { path: PathBuf, source: KeysetError },
    #[error("{path} holds more than {MAX_CHAIN} keysets")]
    LongChain { path: PathBuf },
    #[error("{path} holds more than {MAX_DOCUMENTS} files")]
    Full { path: PathBuf },
    #[error("{path} is not named after a device or line, with .json at the end")]
    Name { path: PathBuf },
    #[error("{path} does not verify")]
    Document { path: PathBuf, source: OfficeFault },
}

impl Store {
    /// Opens the directory, waiting while another process has it.
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        let open = || {
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        match open() {
            Ok(lock) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Err(source) => Err(StoreError::Lock { path, source }),
        }
    }

    pub(crate) fn config(&self) -> Result<Config, StoreError> {
        let path = self.dir.join("control.toml");
        let text = String::from_utf8(read(&path, MAX_CONFIG)?).map_err(|error| StoreError::Read {
            path: path.clone(),
            source: io::Error::new(io::ErrorKind::InvalidData, error),
        })?;
        Config::parse(&text).map_err(|source| StoreError::Config { path, source })
    }

    /// The keysets from the first, which must found the configured tenant if there is one.
    pub(crate) fn chain(&self, config: &Config) -> Result<Chain, StoreError> {
        let keysets = self.dir.join("keysets");
        let path = keysets.join(keyset_name(1));
        let first = read(&path, MAX_ENVELOPE)?;
        let trusted = match &config.tenant {
            Some(tenant) => TrustedKeyset::first(&first, tenant),
            None => TrustedKeyset::dangerous_unpinned(&first),
        };
        let mut newest = trusted.map_err(|source| StoreError::Keyset { path, source })?;
        let mut envelopes = vec![first];
        while let Some(version) = newest.version().checked_add(1) {
            let path = keysets.join(keyset_name(version));
            let Some(envelope) = present(read(&path, MAX_ENVELOPE))? else { break };
            newest = newest.advance(&envelope).map_err(|source| StoreError::Keyset { path, source })?;
            envelopes.push(envelope);
            if envelopes.len() > MAX_CHAIN {
                return Err(StoreError::LongChain { path: keysets });
            }
        }
        Ok(Chain { newest, envelopes })
    }

    /// The record of a device, if there is one.
    pub(crate) fn device(&self, device: &DeviceId) -> Result<Option<Vec<u8>>, StoreError> {
        present(read(&self.dir.join("devices").join(format!("{device}.json")), MAX_ENVELOPE))
    }

    /// The bundle of a line, if there is one.
    pub(crate) fn bundle(&self, line: &Line) -> Result<Option<Vec<u8>>, StoreError> {
        present(read(&self.dir.join("bundles").join(format!("{line}.json")), MAX_ENVELOPE))
    }

    /// The key that signs leases.
    pub(crate) fn lease_key(&self) -> Result<SecretKey, StoreError> {
        self.key("lease.key")
    }

    /// The key that hosts know control by.
    pub(crate) fn tls_key(&self) -> Result<SecretKey, StoreError> {
        self.key("control.key")
    }

    /// Checks every device record and bundle, so that a bad one is known before a host asks for it.
    pub(crate) fn check_documents(&self, office: &Office<'_>) -> Result<(), StoreError> {
        self.check_each("devices", |envelope, name| {
            let (_, device) = office.device(envelope)?;
            if device.device.as_str() == name {
                Ok(())
            } else {
                Err(OfficeFault::Misplaced(DeviceKind::NAME))
            }
        })?;
        self.check_each("bundles", |envelope, name| {
            let (_, bundle) = office.bundle(envelope)?;
            if bundle.line.as_str() == name { Ok(()) } else { Err(OfficeFault::Misplaced(BundleKind::NAME)) }
        })
    }

    fn check_each(
        &self,
        directory: &str,
        check: impl Fn(&[u8], &str) -> Result<(), OfficeFault>,
    ) -> Result<(), StoreError> {
        let directory = self.dir.join(directory);
        let failed = |source| StoreError::Read { path: directory.clone(), source };
        for (number, entry) in fs::read_dir(&directory).map_err(failed)?.enumerate() {
            let path = entry.map_err(failed)?.path();
            if number >= MAX_DOCUMENTS {
                return Err(StoreError::Full { path: directory });
            }
            let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json"));
            let Some(name) = name else { return Err(StoreError::Name { path }) };
            let envelope = read(&path, MAX_ENVELOPE)?;
            if let Err(source) = check(&envelope, name) {
                return Err(StoreError::Document { path, source });
            }
        }
        Ok(())
    }

    fn key(&self, name: &str) -> Result<SecretKey, StoreError> {
        let path = self.dir.join(name);
        let failed = |source| StoreError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        if file.metadata().map_err(failed)?.permissions().mode() & OTHERS != 0 {
            return Err(StoreError::Open { path });
        }
        // With room for all of it from the start, no copy of the key is left behind when the buffer grows.
        let mut der = Zeroizing::new(Vec::with_capacity(MAX_KEY + 1));
        file.take(MAX_KEY as u64 + 1).read_to_end(&mut der).map_err(failed)?;
        SecretKey::from_pkcs8(&der).map_err(|source| StoreError::Key { path, source })
    }

    pub(crate) fn memory(&self) -> Result<Memory, StoreError> {
        Ok(Memory { addresses: self.remembered(ADDRESSES)?, past: self.remembered(ANSWERED)? })
    }

    pub(crate) fn remember(&self, memory: &Memory) -> Result<(), StoreError> {
        self.replace(ADDRESSES, &memory.addresses)?;
        self.replace(ANSWERED, &memory.past)
    }

    fn remembered<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T, StoreError> {
        let path = self.dir.join(name);
        match present(read(&path, MAX_MEMORY))? {
            Some(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| StoreError::Memory { path, source })
            }
            None => Ok(T::default()),
        }
    }

    /// Writes beside, flushes and renames, so that a reader finds the old text or the new one.
    fn replace(&self, name: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        let bytes = serde_json::to_vec(value).expect("text and numbers serialize");
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            file.write_all(&bytes)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source: io::Error| StoreError::Write { path: path.clone(), source })
    }
}

const ADDRESSES: &str = "addresses.json";
const ANSWERED: &str = "answered.json";

fn keyset_name(version: u64) -> String {
    format!("{version:08}.json")
}

/// A whole file of at most `limit` bytes.
fn read(path: &Path, limit: usize) -> Result<Vec<u8>, StoreError> {
    let path = path.to_owned();
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(limit as u64 + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) if bytes.len() > limit => Err(StoreError::TooLarge { path, limit }),
        Ok(_) => Ok(bytes),
        Err(source) => Err(StoreError::Read { path, source }),
    }
}

/// Turns "there is no such file" into `None`.
fn present(read: Result<Vec<u8>, StoreError>) -> Result<Option<Vec<u8>>, StoreError> {
    match read {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StoreError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
