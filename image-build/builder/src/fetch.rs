//! Packages into the cache, each believed by its hash alone.

use crate::{
    apt::{AptError, Mirrors, PrivateApt},
    cache::Cache,
    exit::Exit,
    files::{self, FileError},
    lock::Deb,
    progress::Progress,
    staging::Staging,
};
use kontor_trust::Digest;
use std::{collections::BTreeMap, fs, path::PathBuf};

/// A package that is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Apt(#[from] AptError),
    #[error(
        "the mirror no longer has {package} {version} ({path}), which the lock names{others}; make a new lock with kontor-image lock, or name a mirror that keeps old versions with --mirror"
    )]
    Gone { package: String, version: String, path: String, others: String },
    #[error("what the mirror gave for {package} ({path}) has not the hash that the lock names: {words}")]
    WrongHash { package: String, path: String, words: String },
    #[error("{package} ({path}) could not be downloaded; apt says:\n{words}")]
    Unreachable { package: String, path: String, words: String },
}

impl FetchError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Apt(error) => error.exit(),
            Self::WrongHash { .. } => Exit::NotVerified,
            Self::Gone { .. } | Self::Unreachable { .. } => Exit::Unreachable,
        }
    }
}

/// Makes sure that the cache has every package of `debs`, byte for byte; downloads what is missing.
pub(crate) fn fetch<'a>(
    debs: impl Iterator<Item = &'a Deb>,
    cache: &Cache,
    mirrors: &Mirrors,
    progress: &Progress,
) -> Result<(), FetchError> {
    // The root and the tools share packages.
    let wanted: BTreeMap<_, _> = debs.map(|deb| (deb.sha256, deb)).collect();
    let mut missing = Vec::new();
    {
        let _step = progress.step(format!("check {} packages in the cache", wanted.len()));
        for deb in wanted.into_values() {
            if !is_cached(deb, cache)? {
                missing.push(deb);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let total: u64 = missing.iter().map(|deb| deb.bytes).sum();
    let step = progress.step(format!("fetch {} packages, {} MB", missing.len(), total.div_ceil(1_000_000)));
    step.expect_bytes(total);
    let scratch = cache.scratch()?;
    let apt_root = scratch.path().join("apt");
    files::make_directory(&apt_root)?;
    let apt = PrivateApt::new(&apt_root, mirrors.clone().or_of_host()?)?;
    let mut before = 0;
    for batch in missing.chunks(BATCH) {
        let files: Vec<_> = batch.iter().map(|deb| (*deb, arrival(&scratch, deb))).collect();
        let ended = apt.download(&files)?.wait(|| {
            let so_far = |(_, path): &(&Deb, PathBuf)| fs::metadata(path).map_or(0, |m| m.len());
            step.at_bytes(before + files.iter().map(so_far).sum::<u64>());
        });
        before += batch.iter().map(|deb| deb.bytes).sum::<u64>();
        // apt's helper fails when one file fails; which ones did is seen by what arrived.
        let (whole, words) = match ended {
            Err(error) if error.exit() != Exit::Bug => return Err(AptError::from(error).into()),
            Err(error) => (false, without_warnings(error.last_words())),
            Ok(()) => (true, String::new()),
        };
        let mut lost = Vec::new();
        for (deb, path) in &files {
            match adopt(deb, path, cache)? {
                Arrival::Adopted => {}
                Arrival::Other { bytes, sha256 } if whole || bytes >= deb.bytes => {
                    let words = format!("{bytes} bytes with SHA-256 {sha256} came");
                    return Err(FetchError::WrongHash {
                        package: deb.name.clone(),
                        path: deb.path.clone(),
                        words,
                    });
                }
                Arrival::Other { .. } | Arrival::Nothing => lost.push(*deb),
            }
        }
        if let Some(error) = judge(&lost, words) {
            return Err(error);
        }
    }
    Ok(())
}

fn is_cached(deb: &Deb, cache: &Cache) -> Result<bool, FileError> {
    let path = cache.deb(&deb.sha256);
    if !path.exists() {
        return Ok(false);
    }
    if files::measure(&path)? == (deb.bytes, deb.sha256) {
        return Ok(true);
    }
    // Damaged since: fetched again.
    fs::remove_file(&path).map_err(FileError::at("remove the damaged", &path))?;
    Ok(false)
}

/// What came of a download.
enum Arrival {
    Adopted,
    /// Something else than the lock names, or the beginning of it.
    Other {
        bytes: u64,
        sha256: Digest,
    },
    Nothing,
}

/// Moves an arrived package into the cache, if it is what the lock names.
fn adopt(deb: &Deb, path: &std::path::Path, cache: &Cache) -> Result<Arrival, FileError> {
    if !path.is_file() {
        return Ok(Arrival::Nothing);
    }
    let (bytes, sha256) = files::measure(path)?;
    if (bytes, sha256) != (deb.bytes, deb.sha256) {
        return Ok(Arrival::Other { bytes, sha256 });
    }
    let target = cache.deb(&deb.sha256);
    let adopt = || {
        fs::File::open(path)?.sync_all()?;
        fs::rename(path, &target)
    };
    adopt().map_err(FileError::at("keep", &target))?;
    Ok(Arrival::Adopted)
}

/// apt's warnings say nothing about a file, and would be mistaken for it.
fn without_warnings(words: &str) -> String {
    words.lines().filter(|line| !line.starts_with("W:")).collect::<Vec<_>>().join("\n")
}

fn judge(lost: &[&Deb], words: String) -> Option<FetchError> {
    let deb = lost.first()?;
    let (package, path) = (deb.name.clone(), deb.path.clone());
    Some(if GONE.iter().any(|sign| words.contains(sign)) {
        let others = match lost.len() - 1 {
            0 => String::new(),
            n => format!(" (and {n} more)"),
        };
        FetchError::Gone { package, version: deb.version.clone(), path, others }
    } else {
        FetchError::Unreachable { package, path, words }
    })
}

fn arrival(scratch: &Staging, deb: &Deb) -> PathBuf {
    scratch.path().join(format!("{}.deb", deb.sha256))
}

/// Packages that one run of apt's helper is asked for: their names fit on a command line.
const BATCH: usize = 256;
/// How apt says, in the C locale, that a mirror lacks a file.
const GONE: [&str; 3] = ["404 ", "File not found", "No such file"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::tests::deb;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        (dir, cache)
    }

    fn package(content: &[u8]) -> Deb {
        let sha256 = kontor_trust::Digest::of(content);
        Deb { bytes: content.len() as u64, sha256, ..deb("curl") }
    }

    /// apt's helper is what is tried, on a directory that stands for a mirror.
    fn fetch_from(mirror: &std::path::Path, deb: &Deb, cache: &Cache) -> Option<Result<(), FetchError>> {
        if !std::path::Path::new("/usr/lib/apt/apt-helper").exists() {
            eprintln!("skipped: this host has no apt");
            return None;
        }
        let mirrors = Mirrors::named(&[format!("file:{}", mirror.display())]).unwrap();
        Some(fetch([deb].into_iter(), cache, &mirrors, &Progress::new()))
    }

    fn mirror_with(deb: &Deb, content: &[u8]) -> tempfile::TempDir {
        let mirror = tempfile::tempdir().unwrap();
        let path = mirror.path().join(&deb.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        mirror
    }

    #[test]
    fn package_is_fetched_and_then_found_without_the_mirror() {
        let (_dir, cache) = cache();
        let deb = package(b"a package");
        let mirror = mirror_with(&deb, b"a package");
        let Some(fetched) = fetch_from(mirror.path(), &deb, &cache) else { return };
        fetched.unwrap();
        assert_eq!(fs::read(cache.deb(&deb.sha256)).unwrap(), b"a package");
        drop(mirror);
        fetch_from(std::path::Path::new("/nowhere"), &deb, &cache).unwrap().unwrap();
    }

    #[test]
    fn package_that_the_mirror_no_longer_has_is_unreachable() {
        let (_dir, cache) = cache();
        let empty = tempfile::tempdir().unwrap();
        let Some(fetched) = fetch_from(empty.path(), &package(b"x"), &cache) else { return };
        let error = fetched.unwrap_err();
        assert!(matches!(error, FetchError::Gone { .. }), "{error}");
        assert_eq!(error.exit(), Exit::Unreachable);
    }

    #[test]
    fn mirror_that_does_not_answer_is_not_one_that_lacks_the_package() {
        let words = "W: Unable to read /x/apt.conf.d/ - DirectoryExists (2: No such file or directory)\n\
                     E: Failed to fetch http://m/x.deb  Could not connect to m:80 (Connection refused)";
        let error = judge(&[&deb("x")], without_warnings(words)).unwrap();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        assert_eq!(error.exit(), Exit::Unreachable);
    }

    #[test]
    fn package_with_another_hash_is_not_verified_and_not_kept() {
        let (_dir, cache) = cache();
        let deb = package(b"good");
        let mirror = mirror_with(&deb, b"evil");
        let Some(fetched) = fetch_from(mirror.path(), &deb, &cache) else { return };
        let error = fetched.unwrap_err();
        assert_eq!(error.exit(), Exit::NotVerified, "{error}");
        assert!(!cache.deb(&deb.sha256).exists());
    }

    #[test]
    fn package_damaged_in_the_cache_is_fetched_again() {
        let (_dir, cache) = cache();
        let deb = package(b"good");
        fs::write(cache.deb(&deb.sha256), b"flip").unwrap();
        let mirror = mirror_with(&deb, b"good");
        let Some(fetched) = fetch_from(mirror.path(), &deb, &cache) else { return };
        fetched.unwrap();
        assert_eq!(fs::read(cache.deb(&deb.sha256)).unwrap(), b"good");
    }

    #[test]
    fn several_lost_packages_are_counted() {
        let (a, b) = (deb("a"), deb("b"));
        let error = judge(&[&a, &b], "E: 404  Not Found".into()).unwrap();
        assert!(
            error
                .to_string()
                .contains("a 1:2.3+b4~5-6 (pool/main/x/a_2.3.deb), which the lock names (and 1 more)")
        );
    }
}
