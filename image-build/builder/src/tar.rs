//! tar archives: the root tree's is read, changed and written without being unpacked, so that owners,
//! modes and extended attributes need no privilege. POSIX ustar with pax headers (pax(1)), and GNU's
//! long names.

use std::io::{self, Write};

/// One member of an archive that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member<'a> {
    /// Absolute and normal; `/` is the top.
    pub(crate) path: String,
    pub(crate) kind: Kind,
    /// Target of a link as it stands there; of a hard link, a normal path.
    pub(crate) target: String,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) content: &'a [u8],
    /// Every block of it, with the headers that belong to it.
    raw: &'a [u8],
}

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    SymbolicLink,
    Directory,
    /// A device node or a pipe.
    Special,
}

/// An archive that is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TarError {
    #[error("the archive ends in the middle of a member")]
    Short,
    #[error("the archive has a broken header at byte {0}")]
    Header(usize),
    #[error("the archive has a member of type {0:?}")]
    Type(char),
    #[error("the archive has a path that is not plain: {0:?}")]
    Path(String),
}

/// Every member of an archive, in order.
pub(crate) fn read(archive: &[u8]) -> Result<Vec<Member<'_>>, TarError> {
    let mut members = Vec::new();
    let mut at = 0;
    // Where the headers begin that describe the next member, and what they said.
    let (mut begin, mut extra) = (0, Extra::default());
    loop {
        let block = archive.get(at..at + BLOCK).ok_or(TarError::Short)?;
        if block.iter().all(|b| *b == 0) {
            return if begin == at { Ok(members) } else { Err(TarError::Short) };
        }
        let header = Header { block, at };
        header.check()?;
        let own = header.number(SIZE)?;
        let size = extra.size.filter(|_| !header.is_extra()).unwrap_or(own);
        let size = usize::try_from(size).map_err(|_| TarError::Header(at))?;
        let start = at + BLOCK;
        let end = start.checked_add(size).ok_or(TarError::Short)?;
        let content = archive.get(start..end).ok_or(TarError::Short)?;
        let next = end.checked_next_multiple_of(BLOCK).ok_or(TarError::Short)?;
        match header.kind() {
            b'x' => extra.read_pax(content).ok_or(TarError::Header(at))?,
            b'L' => extra.path = Some(text(content)),
            b'K' => extra.target = Some(text(content)),
            other => {
                let raw = archive.get(begin..next).ok_or(TarError::Short)?;
                members.push(member(&header, other, std::mem::take(&mut extra), content, raw)?);
                begin = next;
            }
        }
        at = next;
    }
}

fn member<'a>(
    header: &Header<'_>,
    kind: u8,
    extra: Extra,
    content: &'a [u8],
    raw: &'a [u8],
) -> Result<Member<'a>, TarError> {
    let kind = match kind {
        b'0' | 0 | b'7' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::SymbolicLink,
        b'3' | b'4' | b'6' => Kind::Special,
        b'5' => Kind::Directory,
        other => return Err(TarError::Type(char::from(other))),
    };
    let target = extra.target.unwrap_or_else(|| text(header.field(TARGET)));
    Ok(Member {
        path: normal(&extra.path.unwrap_or_else(|| header.path()))?,
        kind,
        target: if kind == Kind::HardLink { normal(&target)? } else { target },
        mode: header.small(MODE)?,
        uid: header.small(UID)?,
        gid: header.small(GID)?,
        content,
        raw,
    })
}

/// Writes an archive: members that were read, as they are, and new ones owned by anybody.
pub(crate) struct Writer<W> {
    out: W,
    mtime: u64,
}

impl<W: Write> Writer<W> {
    /// New members get this time, in Unix seconds.
    pub(crate) fn new(out: W, mtime: u64) -> Self {
        Self { out, mtime }
    }

    /// A member as it was read.
    pub(crate) fn copy(&mut self, member: &Member<'_>) -> io::Result<()> {
        self.out.write_all(member.raw)
    }

    pub(crate) fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.header(path, b'5', (mode, 0, 0), 0, "")
    }

    pub(crate) fn file(&mut self, path: &str, owner: (u32, u32, u32), content: &[u8]) -> io::Result<()> {
        self.header(path, b'0', owner, content.len() as u64, "")?;
        self.out.write_all(content)?;
        let padding = content.len().next_multiple_of(BLOCK) - content.len();
        self.out.write_all(&[0; BLOCK][..padding])
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.header(path, b'2', (0o777, 0, 0), 0, target)
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn header(
        &mut self,
        path: &str,
        kind: u8,
        (mode, uid, gid): (u32, u32, u32),
        size: u64,
        target: &str,
    ) -> io::Result<()> {
        let mut block = [0; BLOCK];
        put(&mut block, NAME, format!(".{path}").as_bytes())?;
        put(&mut block, MODE, format!("{mode:07o}").as_bytes())?;
        put(&mut block, UID, format!("{uid:07o}").as_bytes())?;
        put(&mut block, GID, format!("{gid:07o}").as_bytes())?;
        put(&mut block, SIZE, format!("{size:011o}").as_bytes())?;
        put(&mut block, MTIME, format!("{:011o}", self.mtime).as_bytes())?;
        put(&mut block, KIND, &[kind])?;
        put(&mut block, TARGET, target.as_bytes())?;
        put(&mut block, MAGIC, b"ustar\x0000")?;
        let sum = checksum(&block);
        put(&mut block, SUM, format!("{sum:06o}\0 ").as_bytes())?;
        self.out.write_all(&block)
    }
}

/// What pax and GNU headers say about the member behind them.
#[derive(Default)]
struct Extra {
    path: Option<String>,
    target: Option<String>,
    size: Option<u64>,
}

impl Extra {
    /// Records of the form `LENGTH KEY=VALUE\n`, where the length counts the whole record.
    fn read_pax(&mut self, mut records: &[u8]) -> Option<()> {
        while !records.is_empty() {
            let space = records.iter().position(|b| *b == b' ')?;
            let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
            let record = records.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|b| *b == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.path = Some(String::from_utf8(value.to_vec()).ok()?),
                b"linkpath" => self.target = Some(String::from_utf8(value.to_vec()).ok()?),
                b"size" => self.size = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
                _ => (),
            }
            records = &records[length..];
        }
        Some(())
    }
}

struct Header<'a> {
    block: &'a [u8],
    at: usize,
}

impl Header<'_> {
    fn check(&self) -> Result<(), TarError> {
        if &self.field(MAGIC)[..5] != b"ustar" || self.number(SUM)? != u64::from(checksum(self.block)) {
            return Err(TarError::Header(self.at));
        }
        Ok(())
    }

    fn kind(&self) -> u8 {
        self.field(KIND)[0]
    }

    fn is_extra(&self) -> bool {
        matches!(self.kind(), b'x' | b'L' | b'K')
    }

    fn path(&self) -> String {
        let (prefix, name) = (text(self.field(PREFIX)), text(self.field(NAME)));
        // GNU's own form has times where POSIX has the prefix.
        if prefix.is_empty() || self.field(MAGIC) != b"ustar\x0000" {
            name
        } else {
            format!("{prefix}/{name}")
        }
    }

    /// An octal number, or GNU's big-endian one behind a set highest bit.
    fn number(&self, field: Field) -> Result<u64, TarError> {
        let bytes = self.field(field);
        let broken = TarError::Header(self.at);
        if bytes[0] & 0x80 != 0 {
            let value = bytes.iter().fold(0u128, |value, byte| value << 8 | u128::from(*byte));
            // The mark itself is not part of the number.
            let value = value & !(0x80 << (8 * (bytes.len() - 1)));
            return u64::try_from(value).map_err(|_| broken);
        }
        let digits = text(bytes);
        let digits = digits.trim();
        if digits.is_empty() { Ok(0) } else { u64::from_str_radix(digits, 8).map_err(|_| broken) }
    }

    fn small(&self, field: Field) -> Result<u32, TarError> {
        u32::try_from(self.number(field)?).map_err(|_| TarError::Header(self.at))
    }

    fn field(&self, (start, length): Field) -> &[u8] {
        &self.block[start..start + length]
    }
}

fn checksum(block: &[u8]) -> u32 {
    let sum_field = SUM.0..SUM.0 + SUM.1;
    block
        .iter()
        .enumerate()
        .map(|(i, b)| if sum_field.contains(&i) { u32::from(b' ') } else { u32::from(*b) })
        .sum()
}

fn put(block: &mut [u8; BLOCK], (start, length): Field, value: &[u8]) -> io::Result<()> {
    if value.len() > length {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too long for a tar header"));
    }
    block[start..start + value.len()].copy_from_slice(value);
    Ok(())
}

/// Up to the first NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn normal(path: &str) -> Result<String, TarError> {
    let mut out = String::new();
    for part in path.split('/') {
        match part {
            "" | "." => (),
            ".." => return Err(TarError::Path(path.chars().take(160).collect())),
            part => {
                out.push('/');
                out.push_str(part);
            }
        }
    }
    Ok(if out.is_empty() { "/".to_owned() } else { out })
}

/// Start and length within a header.
type Field = (usize, usize);
const BLOCK: usize = 512;
const NAME: Field = (0, 100);
const MODE: Field = (100, 8);
const UID: Field = (108, 8);
const GID: Field = (116, 8);
const SIZE: Field = (124, 12);
const MTIME: Field = (136, 12);
const SUM: Field = (148, 8);
const KIND: Field = (156, 1);
const TARGET: Field = (157, 100);
const MAGIC: Field = (257, 8);
const PREFIX: Field = (345, 155);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::profile::MAX_PATH;
    use std::process::{Command, Stdio};

    /// An archive made by ourselves.
    pub(crate) fn archive(fill: impl FnOnce(&mut Writer<Vec<u8>>) -> io::Result<()>) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), 1);
        fill(&mut writer).unwrap();
        writer.finish().unwrap()
    }

    fn sample() -> Vec<u8> {
        archive(|tar| {
            tar.directory("/", 0o755)?;
            tar.directory("/d", 0o1777)?;
            tar.file("/d/f", (0o640, 3, 42), b"content")?;
            tar.link("/d/l", "../f")
        })
    }

    #[test]
    fn what_is_written_is_read() {
        let archive = sample();
        let members = read(&archive).unwrap();
        let short: Vec<_> =
            members.iter().map(|m| (m.path.as_str(), m.kind, m.mode, m.target.as_str())).collect();
        assert_eq!(
            short,
            [
                ("/", Kind::Directory, 0o755, ""),
                ("/d", Kind::Directory, 0o1777, ""),
                ("/d/f", Kind::File, 0o640, ""),
                ("/d/l", Kind::SymbolicLink, 0o777, "../f"),
            ]
        );
        assert_eq!((members[2].uid, members[2].gid, members[2].content), (3, 42, &b"content"[..]));
    }

    #[test]
    fn copied_members_are_the_same_bytes() {
        let archive = sample();
        let mut writer = Writer::new(Vec::new(), 2);
        read(&archive).unwrap().iter().for_each(|m| writer.copy(m).unwrap());
        assert_eq!(writer.finish().unwrap(), archive);
    }

    #[test]
    fn path_of_the_limit_fits_a_header() {
        let path = format!("/{}", "p".repeat(MAX_PATH - 1));
        let target = "t".repeat(MAX_PATH);
        let archive = archive(|tar| tar.link(&path, &target));
        assert_eq!((&read(&archive).unwrap()[0].path, &read(&archive).unwrap()[0].target), (&path, &target));
        let long = format!("/{}", "p".repeat(100));
        assert!(Writer::new(Vec::new(), 0).directory(&long, 0).is_err());
    }

    #[test]
    fn archive_of_gnu_tar_with_pax_headers_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120)).join("e".repeat(120));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("f"), "x").unwrap();
        std::fs::hard_link(deep.join("f"), deep.join("g")).unwrap();
        for format in ["pax", "gnu"] {
            let mut tar = Command::new("tar");
            tar.args(["-c", "--sort=name", "--format", format, "-C"]).arg(dir.path()).arg(".");
            let Ok(output) = tar.stderr(Stdio::inherit()).output() else {
                eprintln!("skipped: this host has no tar");
                return;
            };
            let members = read(&output.stdout).unwrap();
            let folder = format!("/{}/{}", "d".repeat(120), "e".repeat(120));
            let last = &members[members.len() - 2..];
            assert_eq!(
                (last[0].path.clone(), last[0].content),
                (format!("{folder}/f"), &b"x"[..]),
                "{format}"
            );
            assert_eq!(last[1].kind, Kind::HardLink, "{format}");
            assert_eq!(last[1].target, format!("{folder}/f"), "{format}");
        }
    }

    #[test]
    fn no_cut_or_changed_byte_panics() {
        let archive = sample();
        for end in (0..archive.len() - 2 * BLOCK).step_by(7) {
            assert!(read(&archive[..end]).is_err(), "{end}");
        }
        for at in 0..archive.len() - 2 * BLOCK {
            let mut bad = archive.clone();
            for value in [0, 0x80, 0xff] {
                bad[at] = value;
                let _ = read(&bad);
            }
        }
    }

    #[test]
    fn size_that_overflows_is_refused() {
        let mut bad = sample();
        bad[SIZE.0..SIZE.0 + SIZE.1]
            .copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        let sum = format!("{:06o}\0 ", checksum(&bad[..BLOCK]));
        bad[SUM.0..SUM.0 + SUM.1].copy_from_slice(sum.as_bytes());
        assert_eq!(read(&bad), Err(TarError::Short));
    }

    #[test]
    fn path_that_climbs_out_is_refused() {
        let archive = archive(|tar| tar.directory("/../x", 0o755));
        assert!(matches!(read(&archive), Err(TarError::Path(_))));
    }
}
