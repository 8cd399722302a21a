//! The guest's serial console: written to a file of limited size, and watched for a kernel panic.
//!
//! The guest writes what it likes, so what is not printable is escaped before it reaches the file:
//! reading the log with any tool is safe.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Most bytes of the file. A full one becomes the old one, and a new one begins.
pub(crate) const LOG_MAX: u64 = 512 * 1024;
/// Most bytes of a line that are searched.
const LINE_MAX: usize = 1024;
/// What the kernel prints when it gives up (Linux, kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing";

#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    file: File,
    length: u64,
    line: Vec<u8>,
}

impl Console {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = append(path)?;
        let length = file.seek(io::SeekFrom::End(0))?;
        Ok(Self { path: path.into(), file, length, line: Vec::with_capacity(LINE_MAX) })
    }

    /// Takes what the guest wrote. Returns the line in which its kernel panics, if this is the end of it, whether
    /// or not what was written could be kept.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> (Option<String>, io::Result<()>) {
        let mut clean = Vec::with_capacity(bytes.len());
        let mut panic = None;
        for &byte in bytes {
            match byte {
                b'\n' => {
                    clean.push(b'\n');
                    panic = panic.or_else(|| self.panic());
                    self.line.clear();
                }
                b'\r' => {}
                b'\t' | b' '..=b'~' => {
                    clean.push(byte);
                    if self.line.len() < LINE_MAX {
                        self.line.push(byte);
                    }
                }
                0..=b'\x08' | b'\x0b' | b'\x0c' | b'\x0e'..=b'\x1f' | b'\x7f'..=u8::MAX => {
                    clean.extend(std::ascii::escape_default(byte));
                }
            }
        }
        (panic, self.write(&clean))
    }

    fn panic(&self) -> Option<String> {
        let found = self.line.windows(PANIC.len()).any(|window| window == PANIC);
        found.then(|| String::from_utf8_lossy(&self.line).trim().to_owned())
    }

    fn write(&mut self, clean: &[u8]) -> io::Result<()> {
        // A chunk is far smaller than the limit; were it not, the limit still holds.
        for part in clean.chunks(usize::try_from(LOG_MAX).unwrap_or(usize::MAX)) {
            let more = part.len() as u64;
            if self.length + more > LOG_MAX {
                std::fs::rename(&self.path, old(&self.path))?;
                self.file = append(&self.path)?;
                self.length = 0;
            }
            self.file.write_all(part)?;
            self.length += more;
        }
        Ok(())
    }
}

/// What is kept of the console, oldest first.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for path in [old(path), path.to_owned()] {
        match File::open(path) {
            Ok(file) => drop(file.take(LOG_MAX).read_to_end(&mut text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(text)
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("log.old")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> (tempfile::TempDir, PathBuf, Console) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let console = Console::open(&path).unwrap();
        (dir, path, console)
    }

    #[test]
    fn panic_is_found_however_the_line_is_cut() {
        let line = b"[    1.5] Kernel panic - not syncing: dm-verity device corrupted\r\n";
        for cut in 0..line.len() {
            let (_dir, _, mut console) = console();
            assert_eq!(console.push(&line[..cut]).0, None);
            let panic = console.push(&line[cut..]).0.unwrap();
            assert_eq!(panic, "[    1.5] Kernel panic - not syncing: dm-verity device corrupted");
        }
    }

    #[test]
    fn other_lines_are_no_panic() {
        let (_dir, _, mut console) = console();
        assert_eq!(console.push(b"Kernel panic\n - not syncing\nbooting\n").0, None);
    }

    #[test]
    fn panic_is_found_also_when_the_disk_is_full() {
        let mut console = Console::open(Path::new("/dev/full")).unwrap();
        let (panic, written) = console.push(b"Kernel panic - not syncing: for a test\n");
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(panic.unwrap(), "Kernel panic - not syncing: for a test");
    }

    #[test]
    fn terminal_codes_reach_the_file_escaped() {
        let (_dir, path, mut console) = console();
        console.push(b"a\x1b[2J\xff\tb\r\n").1.unwrap();
        assert_eq!(read(&path).unwrap(), b"a\\x1b[2J\\xff\tb\n");
    }

    #[test]
    fn file_at_the_limit_stays_and_one_byte_more_begins_a_new_one() {
        let (_dir, path, mut console) = console();
        let full = vec![b'x'; usize::try_from(LOG_MAX).unwrap()];
        console.push(&full).1.unwrap();
        assert!(!old(&path).exists());
        console.push(b"y").1.unwrap();
        assert_eq!(std::fs::metadata(old(&path)).unwrap().len(), LOG_MAX);
        assert_eq!(std::fs::read(&path).unwrap(), b"y");
        for _ in 0..3 {
            console.push(&full).1.unwrap();
        }
        assert!(read(&path).unwrap().len() as u64 <= 2 * LOG_MAX);
    }

    #[test]
    fn log_of_an_earlier_start_is_continued() {
        let (_dir, path, mut console) = console();
        console.push(b"one\n").1.unwrap();
        Console::open(&path).unwrap().push(b"two\n").1.unwrap();
        assert_eq!(read(&path).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn endless_line_is_searched_up_to_its_limit_only() {
        let (_dir, _, mut console) = console();
        console.push(&vec![b'x'; 100 * LINE_MAX]).1.unwrap();
        assert_eq!(console.line.len(), LINE_MAX);
    }
}
