//! A cpio archive in the "newc" form that the kernel unpacks (kernel documentation,
//! driver-api/early-userspace/buffer-format). The same entries give the same bytes: sorted, numbered
//! in order, owned by root, from 1970.

use std::collections::BTreeMap;

/// Names and what stands under them.
#[derive(Debug, Default)]
pub(crate) struct Archive(BTreeMap<String, Node>);

#[derive(Debug)]
enum Node {
    Directory,
    File { mode: u32, content: Vec<u8> },
}

/// An entry that the form cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CpioError {
    #[error("{0:?} is too large for the initrd")]
    TooLarge(String),
    #[error("{0:?} is there twice")]
    Twice(String),
}

impl Archive {
    /// Adds a directory that may be there already.
    pub(crate) fn directory(&mut self, name: &str) {
        self.0.entry(name.to_owned()).or_insert(Node::Directory);
    }

    /// Adds a file; its directory must be added too.
    pub(crate) fn file(&mut self, name: &str, mode: u32, content: Vec<u8>) -> Result<(), CpioError> {
        if content.len() > MAX_FILE {
            return Err(CpioError::TooLarge(name.to_owned()));
        }
        match self.0.insert(name.to_owned(), Node::File { mode, content }) {
            None => Ok(()),
            Some(_) => Err(CpioError::Twice(name.to_owned())),
        }
    }

    /// The archive's bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, (name, node)) in (1..).zip(&self.0) {
            match node {
                Node::Directory => entry(&mut out, number, name, DIRECTORY | 0o755, 2, &[]),
                Node::File { mode, content } => entry(&mut out, number, name, FILE | mode, 1, content),
            }
        }
        entry(&mut out, 0, TRAILER, 0, 1, &[]);
        out
    }
}

fn entry(out: &mut Vec<u8>, number: u32, name: &str, mode: u32, links: u32, content: &[u8]) {
    let size = u32::try_from(content.len()).expect("bounded by MAX_FILE");
    let name_size = u32::try_from(name.len() + 1).expect("names are short");
    out.extend(MAGIC);
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    for field in [number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
        out.extend(format!("{field:08x}").bytes());
    }
    out.extend(name.bytes());
    out.push(0);
    pad(out);
    out.extend(content);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

const MAGIC: &[u8] = b"070701";
const TRAILER: &str = "TRAILER!!!";
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
/// Most bytes of a file in the initrd, which lies in the guest's memory.
const MAX_FILE: usize = 256 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        process::{Command, Stdio},
    };

    fn archive() -> Archive {
        let mut archive = Archive::default();
        archive.file("z", 0o644, b"last".to_vec()).unwrap();
        archive.file("d/a", 0o755, b"12345".to_vec()).unwrap();
        archive.directory("d");
        archive
    }

    #[test]
    fn bytes_are_those_of_the_form() {
        let mut archive = Archive::default();
        archive.file("f", 0o644, b"hi".to_vec()).unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000081a4",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000002",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "f\0",
            "hi\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0",
            "\0\0\0",
        );
        assert_eq!(String::from_utf8(archive.to_bytes()).unwrap(), expected);
    }

    #[test]
    fn length_is_a_multiple_of_four() {
        assert_eq!(archive().to_bytes().len() % 4, 0);
    }

    #[test]
    fn file_of_the_limit_is_taken_and_one_byte_more_is_refused() {
        let mut archive = Archive::default();
        archive.file("f", 0o644, vec![0; MAX_FILE]).unwrap();
        assert_eq!(archive.file("g", 0o644, vec![0; MAX_FILE + 1]), Err(CpioError::TooLarge("g".into())));
    }

    #[test]
    fn name_twice_is_refused() {
        let mut archive = archive();
        assert_eq!(archive.file("z", 0o644, Vec::new()), Err(CpioError::Twice("z".into())));
    }

    #[test]
    fn cpio_reads_it() {
        let mut list = Command::new("cpio");
        list.args(["-itv", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut cpio) = list.spawn() else {
            eprintln!("skipped: this host has no cpio");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&archive().to_bytes()).unwrap();
        let text = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let names: Vec<_> = text.lines().map(|l| (&l[..10], l.rsplit(' ').next().unwrap())).collect();
        assert_eq!(names, [("drwxr-xr-x", "d"), ("-rwxr-xr-x", "d/a"), ("-rw-r--r--", "z")]);
    }
}
