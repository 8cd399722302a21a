//! Files with errors that name the path.

use crate::exit::Exit;
use kontor_trust::Digest;
use ring::digest::{Context, SHA256};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// An operation on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {}{}", path.display(), advice(source))]
pub(crate) struct FileError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl FileError {
    /// For `map_err`: says what was being done to which file.
    pub(crate) fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { doing, path: path.to_owned(), source }
    }

    pub(crate) fn exit(&self) -> Exit {
        const CALLERS: [io::ErrorKind; 7] = [
            io::ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::NotADirectory,
            io::ErrorKind::IsADirectory,
            io::ErrorKind::ReadOnlyFilesystem,
            io::ErrorKind::FileTooLarge,
            io::ErrorKind::InvalidData,
        ];
        if is_full(&self.source) {
            Exit::HostLacks
        } else if CALLERS.contains(&self.source.kind()) {
            Exit::Usage
        } else {
            Exit::Bug
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn advice(error: &io::Error) -> &'static str {
    if is_full(error) { " (make room there, or point --out, TMPDIR or KONTOR_CACHE elsewhere)" } else { "" }
}

/// Reads a whole file of at most `max` bytes.
pub(crate) fn read(path: &Path, max: u64) -> Result<Vec<u8>, FileError> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")));
        }
        Ok(bytes)
    };
    read().map_err(FileError::at("read", path))
}

/// Reads a whole text file of at most `max` bytes.
pub(crate) fn read_text(path: &Path, max: u64) -> Result<String, FileError> {
    String::from_utf8(read(path, max)?)
        .map_err(|e| FileError::at("read", path)(io::Error::new(io::ErrorKind::InvalidData, e)))
}

/// Writes a file that must not exist yet. It is on the disk when this returns.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(FileError::at("write", path))
}

/// Puts `bytes` at `path` whole or not at all: written beside and renamed.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let write = || {
        let mut file = tempfile::Builder::new()
            .prefix(BESIDE)
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(parent)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        File::open(parent)?.sync_all()
    };
    write().map_err(FileError::at("write", path))
}

/// Removes what runs that were killed left in a directory where nobody else writes now.
pub(crate) fn sweep(directory: &Path) -> Result<(), FileError> {
    for name in list(directory)?.iter().filter(|name| name.starts_with(BESIDE)) {
        let path = directory.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(FileError::at("remove", &path))?;
    }
    Ok(())
}

/// Makes a directory and its parents.
pub(crate) fn make_directory(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).map_err(FileError::at("make directory", path))
}

/// Names of a directory's entries, sorted.
pub(crate) fn list(path: &Path) -> Result<Vec<String>, FileError> {
    let list = || {
        let mut names = fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    list().map_err(FileError::at("list", path))
}

/// Puts `from` at `to`, which must not exist: a hard link where the file system allows it.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<(), FileError> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    copy_new(from, to)
}

/// Copies `from` to `to`, which must not exist. It is on the disk when this returns.
pub(crate) fn copy_new(from: &Path, to: &Path) -> Result<(), FileError> {
    let copy = || {
        let (mut source, mut target) = (File::open(from)?, File::create_new(to)?);
        io::copy(&mut source, &mut target)?;
        target.sync_all()
    };
    copy().map_err(FileError::at("copy to", to))
}

/// Fails as a full disk does when `path` is on one that has not `bytes` left.
pub(crate) fn require_space(path: &Path, bytes: u64) -> Result<(), FileError> {
    let check = || {
        let disk = rustix::fs::statvfs(path.parent().unwrap_or(path))?;
        if disk.f_bavail.saturating_mul(disk.f_frsize) < bytes {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("no space left: {bytes} bytes are needed"),
            ));
        }
        Ok(())
    };
    check().map_err(FileError::at("write", path))
}

/// Length and SHA-256 of a file.
pub(crate) fn measure(path: &Path) -> Result<(u64, Digest), FileError> {
    let measure = || {
        let mut file = File::open(path)?;
        let (mut context, mut bytes, mut buffer) = (Context::new(&SHA256), 0, vec![0; COPY_BYTES]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok((bytes, Digest::finish(context.finish()))),
                n => {
                    context.update(&buffer[..n]);
                    bytes += n as u64;
                }
            }
        }
    };
    measure().map_err(FileError::at("read", path))
}

/// Begins the names of what is not whole yet.
pub(crate) const BESIDE: &str = ".kontor-";

/// Bytes read at once when hashing.
const COPY_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_of_the_limit_is_read_and_one_byte_more_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [7; 10]).unwrap();
        assert_eq!(read(&path, 10).unwrap(), [7; 10]);
        let error = read(&path, 9).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(error.exit(), Exit::Usage);
    }

    #[test]
    fn replace_overwrites_whole_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"old and long").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(list(dir.path()).unwrap(), ["f"]);
    }

    #[test]
    fn space_is_checked_before_it_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        require_space(&dir.path().join("f"), 1).unwrap();
        let error = require_space(&dir.path().join("f"), u64::MAX).unwrap_err();
        assert_eq!(error.exit(), Exit::HostLacks);
    }

    #[test]
    fn full_disk_is_the_hosts_lack() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let error = FileError::at("write", Path::new("x"))(full);
        assert_eq!(error.exit(), Exit::HostLacks);
        assert!(error.to_string().contains("make room"));
    }
}
