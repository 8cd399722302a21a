//! What a program needs to be loaded: its loader and libraries, as the host's own loader finds them.

use crate::JailError;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Most bytes at a program's start that are looked at for its loader's name.
const HEAD_MAX: u64 = 4096;

/// What has to be in the jail for a program to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The loader's path, as the program names it.
    pub loader: PathBuf,
    /// Each library's name and its file on the host.
    pub libraries: BTreeMap<String, PathBuf>,
}

impl Loaded {
    /// Asks the loader that `program` names what it and `modules` would be loaded with. Nothing of them runs.
    ///
    /// # Errors
    /// [`JailError`] when the program is no dynamic one, or a library is not found.
    pub fn of(program: &Path, modules: &[PathBuf]) -> Result<Self, JailError> {
        let doing = format!("find the libraries of {}", program.display());
        let loader = loader(program).map_err(JailError::at(doing.as_str()))?;
        let mut command = Command::new(&loader);
        if !modules.is_empty() {
            let list: Vec<_> = modules.iter().map(|path| path.to_string_lossy()).collect();
            command.arg("--preload").arg(list.join(" "));
        }
        let output = command
            .arg("--list")
            .arg(program)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .map_err(JailError::at(doing.as_str()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(JailError { doing, source: io::Error::other(words) });
        }
        let libraries = parse(&text).map_err(JailError::at(doing))?;
        Ok(Self { loader, libraries })
    }
}

/// Reads lines of the form `name => /path (0xADDRESS)`. A line without an arrow is the loader, the kernel's own
/// library, or a module.
fn parse(text: &str) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut libraries = BTreeMap::new();
    for line in text.lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let path = rest.rsplit_once(" (").map_or(rest, |(path, _)| path);
        if !path.starts_with('/') {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{name}: {path}")));
        }
        // A loader that is named by its path is in the jail anyway.
        if !name.contains('/') {
            libraries.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(libraries)
}

/// The loader that an ELF file of 64 bits names (System V ABI, chapter 5: `PT_INTERP`).
fn loader(program: &Path) -> io::Result<PathBuf> {
    const INTERPRETER: u32 = 3;
    let mut head = Vec::new();
    File::open(program)?.take(HEAD_MAX).read_to_end(&mut head)?;
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "it is no dynamic program of 64 bits");
    let number = |at: usize, length: usize| -> io::Result<usize> {
        let bytes = head.get(at..at.saturating_add(length)).ok_or_else(wrong)?;
        let value = bytes.iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).map_err(|_| wrong())
    };
    if head.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(wrong());
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for entry in 0..count {
        let at = table.saturating_add(entry * size);
        if number(at, 4)? == INTERPRETER as usize {
            let (start, length) = (number(at.saturating_add(8), 8)?, number(at.saturating_add(32), 8)?);
            let name = head.get(start..start.saturating_add(length)).ok_or_else(wrong)?;
            let name = name.strip_suffix(b"\0").unwrap_or(name);
            return String::from_utf8(name.to_vec()).map(PathBuf::from).map_err(|_| wrong());
        }
    }
    Err(wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_program_is_loaded_with_the_c_library() {
        let loaded = Loaded::of(&std::env::current_exe().unwrap(), &[]).unwrap();
        assert!(loaded.loader.is_absolute() && loaded.loader.exists());
        assert!(loaded.libraries["libc.so.6"].exists());
    }

    #[test]
    fn library_that_is_not_there_is_named() {
        let error = parse("\tlibnone.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libnone.so.1"), "{error}");
    }

    #[test]
    fn what_is_no_program_is_refused_at_any_length() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        for length in (0..400).step_by(7) {
            std::fs::write(file.path(), &own[..length]).unwrap();
            assert!(loader(file.path()).is_err(), "{length}");
        }
        std::fs::write(file.path(), "#!/bin/sh\n").unwrap();
        assert!(loader(file.path()).is_err());
    }
}
