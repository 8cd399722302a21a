//! Whether two images are the same, bit for bit, and where not.

use crate::files::{self, FileError};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

/// What differs between two directories.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Comparison {
    pub(crate) identical: bool,
    differences: Vec<Difference>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Difference {
    name: String,
    #[serde(flatten)]
    how: How,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "how", rename_all = "lowercase")]
enum How {
    /// Only the left directory has it.
    Left,
    /// Only the right directory has it.
    Right,
    /// Both have it; the first byte that is not the same, or the end of the shorter one.
    Differs { from_byte: u64 },
}

/// Compares two directories, file by file.
pub(crate) fn compare(left: &Path, right: &Path) -> Result<Comparison, FileError> {
    let (left_names, right_names) = (names(left)?, names(right)?);
    let mut differences = Vec::new();
    for name in left_names.union(&right_names) {
        let how = match (left_names.contains(name), right_names.contains(name)) {
            (true, false) => Some(How::Left),
            (false, _) => Some(How::Right),
            (true, true) => first_difference(&left.join(name), &right.join(name))?
                .map(|from_byte| How::Differs { from_byte }),
        };
        differences.extend(how.map(|how| Difference { name: name.clone(), how }));
    }
    Ok(Comparison { identical: differences.is_empty(), differences })
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.identical {
            return writeln!(f, "identical");
        }
        for Difference { name, how } in &self.differences {
            match how {
                How::Left => writeln!(f, "{name}: only in the first")?,
                How::Right => writeln!(f, "{name}: only in the second")?,
                How::Differs { from_byte } => writeln!(f, "{name}: differs from byte {from_byte} on")?,
            }
        }
        Ok(())
    }
}

fn names(directory: &Path) -> Result<BTreeSet<String>, FileError> {
    Ok(files::list(directory)?.into_iter().collect())
}

fn first_difference(left: &Path, right: &Path) -> Result<Option<u64>, FileError> {
    let open = |path: &Path| io::Result::Ok(BufReader::with_capacity(BUFFER, File::open(path)?));
    let search = || {
        let (mut left, mut right) = (open(left)?, open(right)?);
        let (mut a, mut b, mut at) = (vec![0; BUFFER], vec![0; BUFFER], 0);
        loop {
            let (n, m) = (fill(&mut left, &mut a)?, fill(&mut right, &mut b)?);
            let same = a[..n].iter().zip(&b[..m]).take_while(|(x, y)| x == y).count();
            if same < n || same < m {
                return Ok(Some(at + same as u64));
            }
            if n == 0 {
                return Ok(None);
            }
            at += n as u64;
        }
    };
    search().map_err(FileError::at("compare", left))
}

fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

const BUFFER: usize = 128 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(left: &[(&str, &[u8])], right: &[(&str, &[u8])]) -> Comparison {
        let dir = tempfile::tempdir().unwrap();
        for (side, files) in [("l", left), ("r", right)] {
            std::fs::create_dir(dir.path().join(side)).unwrap();
            for (name, content) in files {
                std::fs::write(dir.path().join(side).join(name), content).unwrap();
            }
        }
        compare(&dir.path().join("l"), &dir.path().join("r")).unwrap()
    }

    #[test]
    fn same_files_are_identical() {
        let long = vec![1; 2 * BUFFER];
        let files = [("a", &long[..]), ("b", &b""[..])];
        assert!(pair(&files, &files).identical);
    }

    #[test]
    fn each_kind_of_difference_is_named() {
        let long = vec![1; BUFFER + 10];
        let mut other = long.clone();
        other[BUFFER + 3] = 2;
        let found = pair(
            &[("bytes", &long), ("left", b""), ("length", b"ab")],
            &[("bytes", &other), ("right", b""), ("length", b"abc")],
        );
        assert_eq!(
            found.to_string(),
            format!(
                "bytes: differs from byte {} on\nleft: only in the first\nlength: differs from byte 2 on\n\
                 right: only in the second\n",
                BUFFER + 3
            )
        );
    }
}
