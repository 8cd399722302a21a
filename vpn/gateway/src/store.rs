//! What the gateway remembers across restarts, in its state directory:
//!
//! ```text
//! keysets/00000002.json …    the keysets behind the first, as received
//! lines/<line>.json          the highest revision of the line's bundle, and that bundle
//! open/<device>.json         the last boot of the device that was answered at the post
//! lock                       locked by the gateway that runs
//! devices/<device>.json      the last lease of the device with all that it rests on, and what it must surpass
//! ```
//!
//! Each file is replaced whole. The numbers are believed as they are: they are this gateway's own. The documents
//! are verified again when they are read, by whoever reads them, because a keyset may have taken a signer away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kontor_bundle::lease::Admit;
use kontor_trust::{DeviceId, Digest, Line, MAX_ENVELOPE, hex32};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};

/// The state directory.
#[derive(Debug)]
pub(crate) struct Store {
    keysets: PathBuf,
    lines: PathBuf,
    devices: PathBuf,
    open: PathBuf,
}

/// What is remembered of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredLine {
    /// The highest revision that was seen.
    pub(crate) revision: u64,
    /// Hash of that bundle's payload.
    pub(crate) hash: Digest,
    /// Its envelope.
    pub(crate) bundle: String,
}

/// What is remembered of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredDevice {
    /// Highest serial of the device's record.
    pub(crate) serial: u64,
    /// When its last lease was issued, in Unix seconds.
    pub(crate) issued_at: u64,
    /// The boot key of that lease.
    #[serde(with = "hex32")]
    pub(crate) boot_key: [u8; 32],
    /// The number of the challenge that it answered.
    pub(crate) seq: u64,
    /// The lease, its request, record and bundle, without the keysets.
    pub(crate) admit: Admit,
}

/// Which boot of a device was answered at the post.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredOpen {
    #[serde(with = "hex32")]
    pub(crate) boot_key: [u8; 32],
}

/// Why the gateway cannot remember.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("make the directory {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("list the directory {path}")]
    List { path: PathBuf, source: io::Error },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path} does not parse: restore it from a backup; without it old leases could be used again")]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("{0} has a name that the gateway did not give it")]
    Name(PathBuf),
}

impl Store {
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        let store = Self {
            keysets: dir.join("keysets"),
            lines: dir.join("lines"),
            devices: dir.join("devices"),
            open: dir.join("open"),
        };
        for path in [&store.keysets, &store.lines, &store.devices, &store.open] {
            fs::create_dir_all(path)
                .map_err(|source| StoreError::Directory { path: path.clone(), source })?;
        }
        Ok(store)
    }

    /// The stored keyset of this version.
    pub(crate) fn keyset(&self, version: u64) -> Result<Option<Vec<u8>>, StoreError> {
        match files::read(&self.keyset_path(version), MAX_ENVELOPE) {
            Ok(envelope) => Ok(Some(envelope)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn put_keyset(&self, version: u64, envelope: &[u8]) -> Result<(), StoreError> {
        Ok(files::replace(&self.keyset_path(version), envelope)?)
    }

    pub(crate) fn lines(&self) -> Result<Vec<(Line, StoredLine)>, StoreError> {
        entries(&self.lines)
    }

    pub(crate) fn put_line(&self, line: &Line, stored: &StoredLine) -> Result<(), StoreError> {
        put(&self.lines, line.as_str(), stored)
    }

    pub(crate) fn devices(&self) -> Result<Vec<(DeviceId, StoredDevice)>, StoreError> {
        entries(&self.devices)
    }

    pub(crate) fn put_device(&self, device: &DeviceId, stored: &StoredDevice) -> Result<(), StoreError> {
        put(&self.devices, device.as_str(), stored)
    }

    pub(crate) fn open_boots(&self) -> Result<Vec<(DeviceId, StoredOpen)>, StoreError> {
        entries(&self.open)
    }

    pub(crate) fn put_open(&self, device: &DeviceId, stored: &StoredOpen) -> Result<(), StoreError> {
        put(&self.open, device.as_str(), stored)
    }

    fn keyset_path(&self, version: u64) -> PathBuf {
        self.keysets.join(format!("{version:08}.json"))
    }
}

fn put(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(value).expect("text and numbers serialize");
    Ok(files::replace(&dir.join(name).with_extension(EXTENSION), &bytes)?)
}

/// All files of a directory in the order of their names; those that were never finished are passed over.
fn entries<N: std::str::FromStr + Ord, T: DeserializeOwned>(dir: &Path) -> Result<Vec<(N, T)>, StoreError> {
    let listed = |source| StoreError::List { path: dir.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(listed)? {
        let path = entry.map_err(listed)?.path();
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        let name = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        let name: N = name.ok_or_else(|| StoreError::Name(path.clone()))?;
        let bytes = files::read(&path, BYTES_MAX)?;
        let value = serde_json::from_slice(&bytes).map_err(|source| StoreError::Parse { path, source })?;
        found.push((name, value));
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found)
}

const EXTENSION: &str = "json";
/// Most bytes of a file: four envelopes in base64, and some numbers.
const BYTES_MAX: usize = 6 * MAX_ENVELOPE;

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> StoredDevice {
        StoredDevice { serial: 1, issued_at: 2, boot_key: [3; 32], seq: 4, admit: Admit::default() }
    }

    #[test]
    fn what_was_put_is_found_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let line = StoredLine { revision: 7, hash: Digest([1; 32]), bundle: "{}".into() };
        store.put_device(&"pc-1".parse().unwrap(), &device()).unwrap();
        store.put_line(&"sales".parse().unwrap(), &line).unwrap();
        store.put_keyset(2, b"keyset").unwrap();
        store.put_open(&"pc-1".parse().unwrap(), &StoredOpen { boot_key: [3; 32] }).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.devices().unwrap(), [("pc-1".parse().unwrap(), device())]);
        assert_eq!(store.lines().unwrap(), [("sales".parse().unwrap(), line)]);
        assert_eq!(store.keyset(2).unwrap().unwrap(), b"keyset");
        assert_eq!(store.keyset(3).unwrap(), None);
        assert_eq!(
            store.open_boots().unwrap(),
            [("pc-1".parse().unwrap(), StoredOpen { boot_key: [3; 32] })]
        );
    }

    #[test]
    fn unfinished_file_is_passed_over_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::write(dir.path().join("devices/pc-1.new"), b"{").unwrap();
        assert_eq!(store.devices().unwrap(), []);
        fs::write(dir.path().join("devices/pc-1.json"), b"{").unwrap();
        assert!(matches!(store.devices(), Err(StoreError::Parse { .. })));
    }

    #[test]
    fn largest_admission_fits_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let envelope = vec![7; MAX_ENVELOPE];
        let admit = Admit {
            keysets: Vec::new(),
            device: envelope.clone(),
            request: envelope.clone(),
            bundle: envelope.clone(),
            lease: envelope,
        };
        store.put_device(&"pc-1".parse().unwrap(), &StoredDevice { admit, ..device() }).unwrap();
        assert_eq!(store.devices().unwrap().len(), 1);
    }
}
