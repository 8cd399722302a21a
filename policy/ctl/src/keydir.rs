//! The directory of a tenant's keysets and of such secret keys as the user holds.

use crate::{
    Exit,
    files::{self, FileError},
};
use clap::Args;
use kontor_trust::{
    Digest, EnvelopeError, KeyError, KeysetError, MAX_ENVELOPE, RoleKind, SecretKey, TrustedKeyset, Verified,
    sign,
};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Most bytes of a key file that are looked at; a key has 83.
const MAX_KEY: usize = 4096;
/// Most key files that are looked at.
pub(crate) const MAX_KEY_FILES: usize = 256;
/// Permission bits that a key file must not have.
const OTHERS: u32 = 0o077;

/// Which tenant, and with which keys.
#[derive(Args)]
pub(crate) struct KeyDir {
    /// Directory with the tenant's keysets and the keys, as `keyset init` makes it.
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,
    /// The tenant that the directory must be of.
    #[arg(long, value_name = "HEX")]
    tenant: Option<Digest>,
}

/// Why nothing can be signed or checked with a directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyDirError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("list {path}")]
    List { path: PathBuf, source: io::Error },
    #[error("{path} has more than {MAX_KEY_FILES} keys")]
    TooManyKeys { path: PathBuf },
    #[error("{path} is readable by others than its owner: make it 0600, and a new key if others had access")]
    Open { path: PathBuf },
    #[error("{path} is no key")]
    Key { path: PathBuf, source: KeyError },
    #[error("{path} does not verify")]
    Keyset { path: PathBuf, source: KeysetError },
    #[error("{path} is no {kind} that the tenant signed")]
    Document { path: PathBuf, kind: &'static str, source: EnvelopeError },
    #[error("the keys in {path} cannot sign a {kind}: bring together the keys of enough persons of the role")]
    Unsigned { path: PathBuf, kind: &'static str, source: EnvelopeError },
}

impl KeyDirError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Keyset { .. } | Self::Document { .. } | Self::Unsigned { .. } => Exit::NotVerified,
            Self::File(_)
            | Self::List { .. }
            | Self::TooManyKeys { .. }
            | Self::Open { .. }
            | Self::Key { .. } => Exit::Lacks,
        }
    }
}

impl KeyDir {
    /// The newest keyset, by the chain from the first.
    pub(crate) fn keyset(&self) -> Result<TrustedKeyset, KeyDirError> {
        let keysets = self.keys.join("keysets");
        let path = keysets.join(keyset_name(1));
        let mut newest = first(&path, self.tenant.as_ref())?;
        while let Some(version) = newest.version().checked_add(1) {
            let path = keysets.join(keyset_name(version));
            let Some(envelope) = files::read_if_present(&path, MAX_ENVELOPE)? else { break };
            newest = newest.advance(&envelope).map_err(|source| KeyDirError::Keyset { path, source })?;
        }
        Ok(newest)
    }

    /// Signs `payload` with every key at hand whose role signs documents of this kind, and checks the
    /// result as its readers will.
    pub(crate) fn sign<K: RoleKind>(
        &self,
        keyset: &TrustedKeyset,
        payload: &[u8],
    ) -> Result<Verified<K>, KeyDirError> {
        let role = K::role(&keyset.keyset().roles);
        let keys = self.secret_keys()?;
        let signers: Vec<&SecretKey> =
            keys.iter().filter(|key| role.keys.iter().any(|member| member.key == key.public())).collect();
        let envelope = sign::<K>(payload, &signers);
        keyset.verify::<K>(&envelope).map_err(|source| KeyDirError::Unsigned {
            path: self.keys.clone(),
            kind: K::NAME,
            source,
        })
    }

    /// Reads a document and checks its signatures.
    pub(crate) fn verified<K: RoleKind>(
        &self,
        keyset: &TrustedKeyset,
        path: &Path,
    ) -> Result<Verified<K>, KeyDirError> {
        let envelope = files::read(path, MAX_ENVELOPE)?;
        let path = path.to_owned();
        keyset.verify::<K>(&envelope).map_err(|source| KeyDirError::Document { path, kind: K::NAME, source })
    }

    fn secret_keys(&self) -> Result<Vec<SecretKey>, KeyDirError> {
        let list = |source| KeyDirError::List { path: self.keys.clone(), source };
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.keys).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_some_and(|extension| extension == "key") {
                paths.push(path);
            }
            if paths.len() > MAX_KEY_FILES {
                return Err(KeyDirError::TooManyKeys { path: self.keys.clone() });
            }
        }
        // So that the same keys sign in the same order wherever the directory lies.
        paths.sort();
        paths.iter().map(|path| secret_key(path)).collect()
    }
}

/// The first keyset, pinned if there is something to pin it to.
pub(crate) fn first(path: &Path, tenant: Option<&Digest>) -> Result<TrustedKeyset, KeyDirError> {
    let envelope = files::read(path, MAX_ENVELOPE)?;
    let trusted = match tenant {
        Some(tenant) => TrustedKeyset::first(&envelope, tenant),
        None => TrustedKeyset::dangerous_unpinned(&envelope),
    };
    trusted.map_err(|source| KeyDirError::Keyset { path: path.to_owned(), source })
}

/// The file name of a version.
pub(crate) fn keyset_name(version: u64) -> String {
    format!("{version:08}.json")
}

fn secret_key(path: &Path) -> Result<SecretKey, KeyDirError> {
    let read = |source| FileError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    if file.metadata().map_err(read)?.permissions().mode() & OTHERS != 0 {
        return Err(KeyDirError::Open { path: path.to_owned() });
    }
    // With room for all of it from the start, no copy of the key is left behind when the buffer grows.
    let mut der = Zeroizing::new(Vec::with_capacity(MAX_KEY + 1));
    file.take(MAX_KEY as u64 + 1).read_to_end(&mut der).map_err(read)?;
    SecretKey::from_pkcs8(&der).map_err(|source| KeyDirError::Key { path: path.to_owned(), source })
}
