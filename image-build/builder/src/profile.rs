//! A profile: what goes into an image, as data. `image-build/image/profiles/` has them.

use crate::{
    exit::Exit,
    files::{self, FileError},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// The profile as its TOML file says it. Order matters only where a field says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// The profile's name; the release is named after it.
    pub(crate) name: String,
    /// Whether the probe channel is in the image.
    pub(crate) test: bool,
    /// Smallest guest memory in MiB that it runs in.
    pub(crate) memory_mib_min: u32,
    /// Packages beside Debian's essential ones.
    pub(crate) packages: Vec<String>,
    /// The kernel's package, or a metapackage that depends on it.
    pub(crate) kernel: String,
    /// Kernel modules wanted in the initrd, in this order; what they need is found and put before them.
    pub(crate) modules: Vec<String>,
    /// The same for those that only a machine whose uplink is a device behind an IOMMU loads.
    #[serde(default)]
    pub(crate) vfio_modules: Vec<String>,
    /// dpkg patterns of paths that are never unpacked.
    #[serde(default)]
    pub(crate) exclude: Vec<String>,
    /// dpkg patterns of excluded paths that are unpacked all the same.
    #[serde(default)]
    pub(crate) keep: Vec<String>,
    /// Paths removed from the finished tree; `/path/*` is all that lies below.
    #[serde(default)]
    pub(crate) remove: Vec<String>,
    /// Where packages come from.
    #[serde(rename = "archive")]
    pub(crate) archives: Vec<Archive>,
    /// Users beside Debian's own.
    #[serde(rename = "user", default)]
    pub(crate) users: Vec<User>,
    /// Directories that must be there.
    #[serde(rename = "directory", default)]
    pub(crate) directories: Vec<Directory>,
    /// Files written over what the packages brought.
    #[serde(rename = "file", default)]
    pub(crate) files: Vec<File>,
    /// Symbolic links written over what the packages brought.
    #[serde(rename = "link", default)]
    pub(crate) links: Vec<Link>,
}

/// One suite of one archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Archive {
    /// The archive's label, by which its mirror is found in the host's apt configuration.
    pub(crate) label: String,
    /// The suite's code name.
    pub(crate) suite: String,
}

/// A user with a group of the same name and number, no password and no home in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) id: u32,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// A directory, owned by root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Directory {
    pub(crate) path: String,
    #[serde(default = "directory_mode")]
    pub(crate) mode: u32,
}

/// A file, owned by root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    pub(crate) path: String,
    #[serde(default = "file_mode")]
    pub(crate) mode: u32,
    /// The content.
    pub(crate) text: String,
}

/// A symbolic link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Link {
    pub(crate) path: String,
    pub(crate) to: String,
}

/// Why a profile is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    #[error("no Kontor source tree here: go into one, or name it with --source")]
    NoSource,
    #[error(transparent)]
    File(#[from] FileError),
    #[error("profile {path} does not parse")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("profile {path} has format {found}, this version reads {FORMAT}")]
    Format { path: PathBuf, found: u32 },
    #[error("profile {path}: {what} {value:?} {fault}")]
    Value { path: PathBuf, what: &'static str, value: String, fault: &'static str },
}

impl ProfileError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::NoSource | Self::Parse { .. } | Self::Format { .. } | Self::Value { .. } => Exit::Usage,
        }
    }
}

impl Profile {
    /// Reads the profile called `name` of the source tree, or the one in the file `name`.
    pub(crate) fn find(name: &str, source: &Source) -> Result<Self, ProfileError> {
        let path = if name.contains('/') || name.ends_with(".toml") {
            PathBuf::from(name)
        } else {
            source.data().join(format!("profiles/{name}.toml"))
        };
        Self::parse(&files::read_text(&path, MAX_PROFILE)?, &path)
    }

    /// Reads a profile; `path` is for messages only.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ProfileError> {
        let profile: Self = toml::from_str(text)
            .map_err(|source| ProfileError::Parse { path: path.into(), source: Box::new(source) })?;
        if profile.format != FORMAT {
            return Err(ProfileError::Format { path: path.into(), found: profile.format });
        }
        profile.check().map_err(|(what, value, fault)| ProfileError::Value {
            path: path.into(),
            what,
            value: value.chars().take(80).collect(),
            fault,
        })?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), (&'static str, &str, &'static str)> {
        const NAME: &str = "is no plain name (a-z, 0-9 and + . - _ are expected)";
        const PATH: &str = "is no plain absolute path";
        if !is_name(&self.name) {
            return Err(("name", &self.name, NAME));
        }
        if self.archives.is_empty() {
            return Err(("archive", "", "is missing"));
        }
        for archive in &self.archives {
            if !is_name(&archive.suite) {
                return Err(("suite", &archive.suite, NAME));
            }
            if !is_label(&archive.label) {
                return Err(("label", &archive.label, "is no archive's label"));
            }
        }
        let packages = self.packages.iter().chain([&self.kernel]);
        if let Some(bad) = packages.chain(&self.modules).chain(&self.vfio_modules).find(|name| !is_name(name))
        {
            return Err(("package or module", bad, NAME));
        }
        let patterns = self.exclude.iter().chain(&self.keep);
        if let Some(bad) = patterns.into_iter().find(|p| !p.starts_with('/') || p.contains(['\n', '\0'])) {
            return Err(("pattern", bad, PATH));
        }
        if let Some(bad) = self.remove.iter().find(|p| !is_path(p.strip_suffix("/*").unwrap_or(p))) {
            return Err(("removed path", bad, PATH));
        }
        let placed = self.directories.iter().map(|d| &d.path).chain(self.files.iter().map(|f| &f.path));
        let mut seen = BTreeSet::new();
        for path in placed.chain(self.links.iter().map(|l| &l.path)) {
            if !is_path(path) {
                return Err(("path", path, PATH));
            }
            if !seen.insert(path) {
                return Err(("path", path, "is placed twice"));
            }
        }
        for link in &self.links {
            if link.to.is_empty() || link.to.len() > MAX_PATH || link.to.contains('\0') {
                return Err(("link", &link.to, "is no target"));
            }
        }
        let mut ids = BTreeSet::new();
        for user in &self.users {
            if !is_name(&user.name) {
                return Err(("user", &user.name, NAME));
            }
            if !is_path(&user.home) || !is_path(&user.shell) {
                return Err(("user", &user.name, "has a home or shell that is no plain absolute path"));
            }
            if !ids.insert(user.id) {
                return Err(("user", &user.name, "has the number of another"));
            }
        }
        Ok(())
    }
}

/// The source tree that the guest's programs and the profiles come from.
#[derive(Debug, Clone)]
pub(crate) struct Source(PathBuf);

impl Source {
    /// The tree named, or the nearest one above the working directory.
    pub(crate) fn find(named: Option<&Path>) -> Result<Self, ProfileError> {
        let start = match named {
            Some(path) => path.to_owned(),
            None => std::env::current_dir().map_err(FileError::at("find", Path::new(".")))?,
        };
        let start = start.canonicalize().map_err(FileError::at("find", &start))?;
        let is_source = |dir: &Path| dir.join(DATA).is_dir() && dir.join("Cargo.lock").is_file();
        let mut candidates = start.ancestors().take(if named.is_some() { 1 } else { usize::MAX });
        candidates.find(|dir| is_source(dir)).map(|dir| Self(dir.to_owned())).ok_or(ProfileError::NoSource)
    }

    /// The tree's top.
    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    /// Profiles and locks.
    pub(crate) fn data(&self) -> PathBuf {
        self.0.join(DATA)
    }

    /// Where the lock of a profile is kept.
    pub(crate) fn lock_of(&self, profile: &Profile) -> PathBuf {
        self.data().join(format!("{}.lock.toml", profile.name))
    }
}

/// Whether `text` is a name as packages, suites, modules and users have them.
pub(crate) fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+.-_".contains(&b);
    text.len() <= MAX_NAME && text.bytes().all(plain) && text.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Whether `text` is a label as archives have them, such as `Debian-Security`.
pub(crate) fn is_label(text: &str) -> bool {
    is_name(&text.to_ascii_lowercase())
}

/// Whether `text` is absolute, normal and short enough for a plain tar header.
fn is_path(text: &str) -> bool {
    let normal = |part: &str| !part.is_empty() && part != "." && part != "..";
    text.len() <= MAX_PATH
        && !text.contains(['\0', '\n', ':', '*'])
        && text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(normal))
}

fn directory_mode() -> u32 {
    0o755
}

fn file_mode() -> u32 {
    0o644
}

/// The one format of profiles so far.
const FORMAT: u32 = 1;
/// Most bytes of a profile.
const MAX_PROFILE: u64 = 256 * 1024;
/// Most characters of a name.
pub(crate) const MAX_NAME: usize = 128;
/// Most characters of a path placed in the image: what a tar header holds after `./`.
pub(crate) const MAX_PATH: usize = 96;
/// Profiles and locks, from the source tree's top.
const DATA: &str = "image-build/image";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const SMOKE: &str = include_str!("../../image/profiles/smoke.toml");

    pub(crate) fn smoke() -> Profile {
        Profile::parse(SMOKE, Path::new("smoke.toml")).unwrap()
    }

    fn fault_of(change: impl FnOnce(&mut Profile)) -> String {
        let mut profile = smoke();
        change(&mut profile);
        let text = toml::to_string(&profile).unwrap();
        Profile::parse(&text, Path::new("p")).unwrap_err().to_string()
    }

    #[test]
    fn smoke_profile_is_a_test_image_without_a_network_driver() {
        let profile = smoke();
        assert!(profile.test);
        let mut modules = profile.modules.iter().chain(&profile.vfio_modules);
        assert!(!modules.any(|m| m.contains("net") || m.contains("e1000")), "{profile:?}");
        assert_eq!(
            profile.users.iter().map(|u| (u.name.as_str(), u.id)).collect::<Vec<_>>(),
            [("kontor-tunnel", 990), ("user", 1000)]
        );
    }

    #[test]
    fn unknown_field_is_refused() {
        let text = format!("surprise = 1\n{SMOKE}");
        assert!(matches!(Profile::parse(&text, Path::new("p")), Err(ProfileError::Parse { .. })));
    }

    #[test]
    fn other_format_is_refused() {
        assert_eq!(fault_of(|p| p.format = 2), "profile p has format 2, this version reads 1");
    }

    #[test]
    fn package_that_apt_would_read_as_an_option_is_refused() {
        for bad in ["-oDebug=1", "curl=1", "curl/sid", "?name(x)", "Curl", ""] {
            let fault = fault_of(|p| p.packages.push(bad.into()));
            assert!(fault.contains("is no plain name"), "{bad}: {fault}");
        }
    }

    #[test]
    fn path_that_is_not_plain_is_refused() {
        let long = format!("/{}", "x".repeat(MAX_PATH));
        for bad in ["etc", "/", "/etc/../x", "/etc//x", "/a\nb", long.as_str()] {
            let fault = fault_of(|p| p.directories.push(Directory { path: bad.into(), mode: 0o755 }));
            assert!(fault.contains("is no plain absolute path"), "{bad:?}: {fault}");
        }
        assert!(is_path(&format!("/{}", "x".repeat(MAX_PATH - 1))));
    }

    #[test]
    fn path_placed_twice_is_refused() {
        let again = |p: &mut Profile| p.links.push(Link { path: p.files[0].path.clone(), to: "x".into() });
        assert!(fault_of(again).contains("is placed twice"));
    }

    #[test]
    fn name_of_the_limit_is_taken_and_one_more_is_refused() {
        assert!(is_name(&"n".repeat(MAX_NAME)));
        assert!(!is_name(&"n".repeat(MAX_NAME + 1)));
    }

    #[test]
    fn source_is_found_from_below_but_a_named_one_is_exact() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.ancestors().nth(2).unwrap();
        assert_eq!(Source::find(Some(root)).unwrap().root(), root);
        assert!(matches!(Source::find(Some(here)), Err(ProfileError::NoSource)));
    }
}
