//! What an image or a release is, and whether its files are what its description says.

use crate::{
    build::IMAGE,
    date,
    exit::Exit,
    files::{self, FileError},
    root_image,
    sign::MANIFEST,
};
use kontor_release::{Image, MAX_MANIFEST, Manifest, ManifestError, Piece};
use serde::Serialize;
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// A directory that is neither image nor release.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InspectError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0} has neither {IMAGE} nor {MANIFEST}")]
    Neither(PathBuf),
    #[error("{0} is no description of an image")]
    Description(PathBuf, #[source] ManifestError),
}

impl InspectError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Neither(_) => Exit::Usage,
            Self::Description(..) => Exit::NotVerified,
        }
    }
}

/// Everything about a directory.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Set for a release, which has a tenant and a version.
    #[serde(skip_serializing_if = "Option::is_none")]
    release: Option<Release>,
    image: Image,
    pieces: Vec<Checked>,
    /// Whether the hash tree in the root image is the one over its data.
    root_hash_fits: bool,
    /// Whether everything is as described.
    pub(crate) verified: bool,
}

#[derive(Debug, Serialize)]
struct Release {
    tenant: kontor_trust::Digest,
    version: u64,
}

#[derive(Debug, Serialize)]
struct Checked {
    #[serde(flatten)]
    piece: Piece,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Good,
    Changed,
    Missing,
}

/// Reads and checks a directory.
pub(crate) fn inspect(directory: &Path) -> Result<Report, InspectError> {
    let described = |path: PathBuf| move |error| InspectError::Description(path, error);
    let (manifest, image) = (directory.join(MANIFEST), directory.join(IMAGE));
    let (release, pieces, image) = if manifest.is_file() {
        let bytes = files::read(&manifest, MAX_MANIFEST as u64)?;
        let manifest = Manifest::parse(&bytes).map_err(described(manifest))?;
        let pieces: Vec<Piece> = manifest.pieces().cloned().collect();
        (Some(Release { tenant: manifest.tenant, version: manifest.version }), pieces, manifest.image)
    } else if image.is_file() {
        let bytes = files::read(&image, MAX_MANIFEST as u64)?;
        let image = Image::parse(&bytes).map_err(described(image))?;
        (None, image.pieces().cloned().collect(), image)
    } else {
        return Err(InspectError::Neither(directory.to_owned()));
    };
    let check = |piece: Piece| {
        let path = directory.join(&piece.name);
        let state = match path.is_file() {
            false => State::Missing,
            true if files::measure(&path)? == (piece.bytes, piece.sha256) => State::Good,
            true => State::Changed,
        };
        Ok(Checked { piece, state })
    };
    let pieces = pieces.into_iter().map(check).collect::<Result<Vec<_>, FileError>>()?;
    let root = directory.join(&image.root.name);
    let root_hash_fits = root.is_file() && root_image::fits(&root, &image.verity)?;
    let verified = root_hash_fits && pieces.iter().all(|checked| checked.state == State::Good);
    Ok(Report { release, image, pieces, root_hash_fits, verified })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = &self.image;
        let test = if image.test { ", TEST IMAGE" } else { "" };
        writeln!(f, "{} (profile {}{test})", image.release, image.profile)?;
        if let Some(Release { tenant, version }) = &self.release {
            writeln!(f, "tenant     {tenant}\nversion    {version}")?;
        }
        writeln!(f, "built at   {} ({})", date::iso8601(image.built_at), image.built_at)?;
        writeln!(f, "memory     at least {} MiB", image.memory_mib_min)?;
        writeln!(f, "cmdline    {}", image.cmdline)?;
        let fits = if self.root_hash_fits { "fits" } else { "DOES NOT FIT" };
        writeln!(f, "root hash  {} ({fits})", image.verity.root_hash)?;
        for Checked { piece, state } in &self.pieces {
            let state = match state {
                State::Good => "",
                State::Changed => "  CHANGED",
                State::Missing => "  MISSING",
            };
            writeln!(f, "{:<14} {:>12}  {}{state}", piece.name, piece.bytes, piece.sha256)?;
        }
        let total: u64 = self.pieces.iter().map(|checked| checked.piece.bytes).sum();
        writeln!(f, "{:<14} {total:>12}", "in all")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sign::tests::image;

    #[test]
    fn good_image_is_verified() {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let report = inspect(dir.path()).unwrap();
        assert!(report.verified);
        assert!(report.to_string().contains("TEST IMAGE"));
    }

    #[test]
    fn changed_and_missing_pieces_are_named() {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        std::fs::write(dir.path().join("initrd"), "INITRD").unwrap();
        std::fs::remove_file(dir.path().join("kernel")).unwrap();
        let report = inspect(dir.path()).unwrap();
        assert!(!report.verified && report.root_hash_fits);
        let states: Vec<_> = report.pieces.iter().map(|c| (c.piece.name.as_str(), c.state)).collect();
        assert_eq!(states[..2], [("kernel", State::Missing), ("initrd", State::Changed)]);
    }

    #[test]
    fn root_that_does_not_fit_its_hash_is_found_even_if_the_description_agrees() {
        let dir = tempfile::tempdir().unwrap();
        let mut image = image(dir.path());
        let other = vec![8; crate::verity::BLOCK];
        image.root.sha256 = kontor_trust::Digest::of(&other);
        std::fs::write(dir.path().join("root.img"), other).unwrap();
        std::fs::write(dir.path().join(IMAGE), serde_json::to_vec(&image).unwrap()).unwrap();
        let report = inspect(dir.path()).unwrap();
        assert!(!report.root_hash_fits && !report.verified);
    }

    #[test]
    fn other_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(inspect(dir.path()), Err(InspectError::Neither(_))));
        std::fs::write(dir.path().join(IMAGE), "{}").unwrap();
        assert_eq!(inspect(dir.path()).unwrap_err().exit(), Exit::NotVerified);
    }
}
