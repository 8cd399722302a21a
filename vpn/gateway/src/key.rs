//! The gateway's X25519 key: 64 hexadecimal digits in a file that only its owner reads.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kontor_vpn::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::files::{self, FileError};

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    #[error("read the key")]
    Read(#[source] FileError),
    #[error("{0} is readable by others than its owner: make it 0600, and a new key if others had access")]
    Open(PathBuf),
    #[error("{0} is no key: 64 hexadecimal digits are expected")]
    Shape(PathBuf),
    #[error("the operating system gave no randomness for a key")]
    Random(#[source] io::Error),
    #[error("{0} is there already; a key is never overwritten")]
    Exists(PathBuf),
    #[error("write {path}")]
    Write { path: PathBuf, source: io::Error },
}

/// Makes a key in a new file and gives its public half.
pub(crate) fn generate(path: &Path) -> Result<PublicKey, KeyError> {
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| KeyError::Random(errno.into()))?;
    let mut text = Zeroizing::new([0; 2 * KEY_LEN + 1]);
    hex::encode_to_slice(bytes.as_slice(), &mut text[..2 * KEY_LEN]).expect("the text is twice as long");
    text[2 * KEY_LEN] = b'\n';
    let write = || {
        let mut file = File::options().write(true).create_new(true).mode(OWNER_ONLY).open(path)?;
        file.write_all(&*text)?;
        file.sync_all()
    };
    write().map_err(|source| {
        if source.kind() == io::ErrorKind::AlreadyExists {
            KeyError::Exists(path.to_owned())
        } else {
            KeyError::Write { path: path.to_owned(), source }
        }
    })?;
    Ok(PublicKey::from(&StaticSecret::from(*bytes)))
}

/// Reads a key.
pub(crate) fn load(path: &Path) -> Result<StaticSecret, KeyError> {
    let text = Zeroizing::new(files::read(path, FILE_MAX).map_err(KeyError::Read)?);
    let metadata = path
        .metadata()
        .map_err(|source| KeyError::Read(FileError::Read { path: path.to_owned(), source }))?;
    if metadata.mode() & OTHERS != 0 {
        return Err(KeyError::Open(path.to_owned()));
    }
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    hex::decode_to_slice(text.trim_ascii(), &mut *bytes).map_err(|_| KeyError::Shape(path.to_owned()))?;
    Ok(StaticSecret::from(*bytes))
}

/// A public key as text.
pub(crate) fn public_text(key: &PublicKey) -> String {
    hex::encode(key.as_bytes())
}

const KEY_LEN: usize = 32;
const FILE_MAX: usize = 128;
const OWNER_ONLY: u32 = 0o600;
/// Permission bits that a key file must not have.
const OTHERS: u32 = 0o077;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn made_key_is_read_again_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.key");
        let public = generate(&path).unwrap();
        assert_eq!(PublicKey::from(&load(&path).unwrap()), public);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        let text = fs::read(&path).unwrap();
        assert!(matches!(generate(&path), Err(KeyError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), text);
    }

    #[test]
    fn key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.key");
        generate(&path).unwrap();
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(matches!(load(&path), Err(KeyError::Open(_))), "{mode:o}");
        }
    }

    #[test]
    fn file_that_is_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("short", "00".repeat(31)), ("long", "00".repeat(33)), ("odd", "zz".repeat(32))]
        {
            let path = dir.path().join(name);
            let mut file = File::options().write(true).create_new(true).mode(OWNER_ONLY).open(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert!(matches!(load(&path), Err(KeyError::Shape(_))), "{name}");
        }
    }
}
