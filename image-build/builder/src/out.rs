//! Where a result goes: a directory that appears whole, in the place of an older result or of nothing,
//! but never of anything else.

use crate::{
    Failure,
    build::IMAGE,
    files::{self, FileError},
    sign::MANIFEST,
    staging::{Existing, Staging},
};
use std::path::{Path, PathBuf};

/// A result in the making.
pub(crate) struct Output {
    staging: Staging,
    target: PathBuf,
}

impl Output {
    /// Begins a result at `target`.
    pub(crate) fn begin(target: &Path) -> Result<Self, Failure> {
        let strange = || Failure::NotAResult(target.to_owned());
        let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(strange)?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if target.exists() {
            let names = if target.is_dir() { files::list(target)? } else { return Err(strange()) };
            if !names.is_empty() && !names.iter().any(|name| name == IMAGE || name == MANIFEST) {
                return Err(strange());
            }
        }
        Ok(Self { staging: Staging::begin(parent, name)?, target: target.to_owned() })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Puts the result in its place.
    pub(crate) fn publish(self) -> Result<(), FileError> {
        self.staging.publish(&self.target, Existing::Replaced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_directory_is_not_replaced_but_an_empty_one_and_an_image_are() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        std::fs::create_dir(&target).unwrap();
        assert!(Output::begin(&target).is_ok());
        std::fs::write(target.join("thesis.txt"), "x").unwrap();
        assert!(matches!(Output::begin(&target), Err(Failure::NotAResult(_))));
        std::fs::write(target.join(IMAGE), "x").unwrap();
        let output = Output::begin(&target).unwrap();
        output.publish().unwrap();
        assert_eq!(files::list(&target).unwrap(), [""; 0]);
    }

    #[test]
    fn file_in_the_way_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        std::fs::write(&target, "x").unwrap();
        assert!(matches!(Output::begin(&target), Err(Failure::NotAResult(_))));
    }
}
