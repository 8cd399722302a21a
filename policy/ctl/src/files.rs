//! Files: read whole within a limit, written beside and renamed.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Mode of a file that holds a secret.
pub(crate) const SECRET: u32 = 0o600;
/// Mode of a file that anybody may read.
pub(crate) const PUBLIC: u32 = 0o644;
/// Mode of a directory that holds secrets.
const SECRET_DIR: u32 = 0o700;

/// Why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} has more than {limit} bytes")]
    TooLarge { path: PathBuf, limit: usize },
    #[error("write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path} exists already and is not overwritten")]
    Exists { path: PathBuf },
}

/// A whole file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: usize) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(limit as u64 + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) if bytes.len() > limit => Err(FileError::TooLarge { path: path.to_owned(), limit }),
        Ok(_) => Ok(bytes),
        Err(source) => Err(FileError::Read { path: path.to_owned(), source }),
    }
}

/// A whole file, or `None` when there is none.
pub(crate) fn read_if_present(path: &Path, limit: usize) -> Result<Option<Vec<u8>>, FileError> {
    match read(path, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(FileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a file that must not exist yet.
pub(crate) fn create(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let write = || {
        beside(path, bytes, mode)?.persist_noclobber(path)?;
        flush_directory(path)
    };
    write().map_err(|source: io::Error| {
        let path = path.to_owned();
        if source.kind() == io::ErrorKind::AlreadyExists {
            FileError::Exists { path }
        } else {
            FileError::Write { path, source }
        }
    })
}

/// Writes a file in place of what is there: a reader finds the old one or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let write = || {
        beside(path, bytes, mode)?.persist(path)?;
        flush_directory(path)
    };
    write().map_err(|source: io::Error| FileError::Write { path: path.to_owned(), source })
}

/// Makes a directory for its owner only, unless it is there.
pub(crate) fn directory(path: &Path) -> Result<(), FileError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(SECRET_DIR);
    builder.create(path).map_err(|source| FileError::Write { path: path.to_owned(), source })
}

fn beside(path: &Path, bytes: &[u8], mode: u32) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::NamedTempFile::new_in(parent(path))?;
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn flush_directory(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
