//! Debian's own package manager, in a root of its own: it reads the archives' signed indices, chooses
//! packages and downloads. Nothing of the host's apt state is read or changed but its configuration of
//! mirrors, proxies and passwords.

use crate::{
    command::{CommandError, Program, Run, Running},
    date, deb822,
    exit::Exit,
    files::{self, FileError},
    lock::{Deb, Release},
    profile::{self, Archive},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Label of an archive → address of its mirror, ending in `/`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mirrors(BTreeMap<String, String>);

/// What apt could not do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AptError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("this host has no {KEYRING} (install the Debian package debian-archive-keyring)")]
    NoKeyring,
    #[error(
        "apt on this host knows no archive with the label {0:?}: run apt-get update, or name a mirror with --mirror {0}=URL"
    )]
    NoMirror(String),
    #[error("{0:?} is no mirror: http, https, file or copy and an address are expected")]
    MirrorAddress(String),
    #[error("the archive's indices are not signed as they must be; apt says:\n{0}")]
    NotVerified(String),
    #[error("the mirror cannot be reached, or has no such suite; apt says:\n{0}")]
    Unreachable(String),
    #[error("apt finds no set of packages for the profile; it says:\n{0}")]
    NoSolution(String),
    #[error("apt's answer is not understood: {0}")]
    Answer(String),
}

impl AptError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
            Self::NoKeyring | Self::NoMirror(_) => Exit::HostLacks,
            Self::MirrorAddress(_) | Self::NoSolution(_) => Exit::Usage,
            Self::NotVerified(_) => Exit::NotVerified,
            Self::Unreachable(_) => Exit::Unreachable,
            Self::Answer(_) => Exit::Bug,
        }
    }
}

impl Mirrors {
    /// The mirrors of `[LABEL=]URL` arguments; a bare address is for the label `Debian`.
    pub(crate) fn named(arguments: &[String]) -> Result<Self, AptError> {
        let mut mirrors = BTreeMap::new();
        for argument in arguments {
            let (label, address) = match argument.split_once('=') {
                Some((label, address)) if profile::is_label(label) => (label, address),
                _ => (DEFAULT_LABEL, argument.as_str()),
            };
            let known = SCHEMES.iter().any(|scheme| address.starts_with(scheme));
            let quotable = address.bytes().all(|b| b.is_ascii_graphic() && !b"\"'[]".contains(&b));
            if !known || !quotable {
                return Err(AptError::MirrorAddress(address.chars().take(160).collect()));
            }
            mirrors.insert(label.to_owned(), format!("{}/", address.trim_end_matches('/')));
        }
        Ok(Self(mirrors))
    }

    /// Those of `self`, and for every label that it lacks the host's own.
    pub(crate) fn or_of_host(mut self) -> Result<Self, AptError> {
        let format = "$(LABEL)\t$(REPO_URI)";
        let targets = Run::new(APT_GET)
            .args(["indextargets", "--format", format, "Created-By: Packages", "Origin: Debian"])
            .text()?;
        for (label, address) in targets.lines().filter_map(|line| line.split_once('\t')) {
            self.0.entry(label.to_owned()).or_insert_with(|| format!("{}/", address.trim_end_matches('/')));
        }
        Ok(self)
    }

    /// The mirror of an archive.
    pub(crate) fn get(&self, label: &str) -> Result<&str, AptError> {
        self.0.get(label).map(String::as_str).ok_or_else(|| AptError::NoMirror(label.to_owned()))
    }

    /// Label and path of a file that apt named by its whole address.
    fn split(&self, address: &str) -> Option<(String, String)> {
        let longest = self
            .0
            .iter()
            .filter_map(|(label, mirror)| Some((mirror.len(), label, address.strip_prefix(mirror.as_str())?)))
            .max()?;
        Some((longest.1.clone(), percent_decode(longest.2)?))
    }
}

/// apt with state of its own, below a directory of the caller's.
pub(crate) struct PrivateApt {
    config: PathBuf,
    lists: PathBuf,
    mirrors: Mirrors,
}

impl PrivateApt {
    /// Lays out the state. No index is there yet.
    pub(crate) fn new(root: &Path, mirrors: Mirrors) -> Result<Self, AptError> {
        for part in STATE {
            files::make_directory(&root.join(part))?;
        }
        files::write_new(&root.join("var/lib/dpkg/status"), b"")?;
        let config = root.join("apt.conf");
        files::write_new(&config, configuration(root)?.as_bytes())?;
        Ok(Self { config, lists: root.join("var/lib/apt/lists"), mirrors })
    }

    /// Fetches the indices of `archives` and checks their signatures.
    pub(crate) fn update(&self, archives: &[Archive]) -> Result<(), AptError> {
        if !Path::new(KEYRING).is_file() {
            return Err(AptError::NoKeyring);
        }
        let mut sources = String::new();
        for Archive { label, suite } in archives {
            let mirror = self.mirrors.get(label)?;
            sources += &format!("deb [signed-by={KEYRING}] {mirror} {suite} {COMPONENT}\n");
        }
        files::replace(&self.config.with_file_name("etc/apt/sources.list"), sources.as_bytes())?;
        match self.run(APT_GET).args(["--quiet", "--quiet", "update", "--error-on=any"]).bytes() {
            Ok(_) => Ok(()),
            Err(error) => Err(judge_update(error)),
        }
    }

    /// The Release files that [`PrivateApt::update`] fetched, and the newest of their dates.
    pub(crate) fn releases(&self, archives: &[Archive]) -> Result<(Vec<Release>, u64), AptError> {
        let names = files::list(&self.lists)?;
        let mut releases = Vec::new();
        let mut newest = 0;
        for Archive { label, suite } in archives {
            let missing = || AptError::Answer(format!("no Release file of {suite}"));
            let end = format!("_dists_{suite}_InRelease");
            let name = names.iter().find(|name| name.ends_with(&end)).ok_or_else(missing)?;
            let text = files::read_text(&self.lists.join(name), MAX_INDEX)?;
            // The signature stands around the stanza; the date stands in it once.
            let stanzas = deb822::parse(&text);
            let date = stanzas.iter().find_map(|s| s.get("Date")).ok_or_else(missing)?;
            let seconds =
                date::parse_release(date).ok_or_else(|| AptError::Answer(format!("date {date:?}")))?;
            newest = newest.max(seconds);
            releases.push(Release { archive: label.clone(), suite: suite.clone(), date: date.to_owned() });
        }
        Ok((releases, newest))
    }

    /// Everything that must be installed so that `wanted` are, beginning from nothing, sorted by name.
    /// `wanted` are package names or apt's patterns.
    pub(crate) fn resolve(&self, wanted: &[&str]) -> Result<Vec<Deb>, AptError> {
        self.choose(&["--no-install-recommends", "install"], wanted)
    }

    /// The kernel that `package` is, or that it depends on where it is a metapackage; without what the
    /// kernel's package depends on, which a guest with its own init has no use for.
    pub(crate) fn kernel(&self, package: &str) -> Result<Deb, AptError> {
        let stanzas = self.show(&[package])?;
        let depends = stanzas.first().and_then(|s| s.get("Depends")).unwrap_or_default();
        let real = depends.split(['|', ',']).map(str::trim).find(|d| d.starts_with(KERNEL_PREFIX));
        // `NAME (= VERSION)` is `NAME=VERSION` to apt's commands.
        let name = real.map_or(package.to_owned(), |dependency| dependency.replace([' ', '(', ')'], ""));
        let strange = || AptError::Answer(format!("no one package for {name}"));
        self.choose(&["download"], &[&name])?.pop().ok_or_else(strange)
    }

    /// The packages that apt's command would fetch, sorted by name.
    fn choose(&self, command: &[&str], wanted: &[&str]) -> Result<Vec<Deb>, AptError> {
        let run = self.run(APT_GET).args(["--quiet", "--quiet", "--print-uris"]);
        let answer = run.args(command).args(wanted).text().map_err(no_solution)?;
        let mut chosen = Vec::new();
        for line in answer.lines().filter(|line| !line.trim().is_empty()) {
            let strange = || AptError::Answer(line.chars().take(300).collect());
            let mut words = line.split_ascii_whitespace();
            let address =
                words.next().and_then(|w| w.strip_prefix('\'')?.strip_suffix('\'')).ok_or_else(strange)?;
            let (archive, path) = self.mirrors.split(address).ok_or_else(strange)?;
            // NAME_VERSION_ARCH.deb with the version's colon as %3a.
            let name =
                words.next().and_then(|w| percent_decode(w.strip_suffix(".deb")?)).ok_or_else(strange)?;
            let (name, rest) = name.split_once('_').ok_or_else(strange)?;
            let (version, _) = rest.rsplit_once('_').ok_or_else(strange)?;
            chosen.push((format!("{name}={version}"), archive, path));
        }
        if chosen.is_empty() {
            return Err(AptError::Answer("no package at all".into()));
        }
        let names: Vec<&str> = chosen.iter().map(|(name, _, _)| name.as_str()).collect();
        let stanzas = self.show(&names)?;
        let mut debs = Vec::new();
        for (name, archive, path) in &chosen {
            let stanza = stanzas.iter().find(|s| s.get("Filename") == Some(path.as_str()));
            let deb = stanza.and_then(|stanza| deb_of(stanza, archive));
            debs.push(deb.ok_or_else(|| AptError::Answer(format!("no index entry for {name}")))?);
        }
        debs.sort();
        Ok(debs)
    }

    /// Starts the download of files, each checked against its hash by apt.
    pub(crate) fn download(&self, wanted: &[(&Deb, PathBuf)]) -> Result<Running, AptError> {
        let mut run = self.run(APT_HELPER).arg("--quiet").arg("download-file");
        for (deb, target) in wanted {
            let mirror = self.mirrors.get(&deb.archive)?;
            // As a file: address, apt would leave the file where it is.
            let mirror =
                mirror.strip_prefix("file:").map_or(mirror.to_owned(), |path| format!("copy:{path}"));
            let address = format!("{mirror}{}", percent_encode(&deb.path));
            // Without the hash: what apt says of a wrong one depends on its version, and the caller looks itself.
            run = run.arg(address).arg(target);
        }
        Ok(run.start()?)
    }

    fn show(&self, names: &[&str]) -> Result<Vec<deb822::Stanza>, AptError> {
        let run = self.run(Program { name: "apt-cache", package: "apt" });
        let text = run.args(["show", "--no-all-versions"]).args(names).text().map_err(no_solution)?;
        Ok(deb822::parse(&text))
    }

    fn run(&self, program: Program) -> Run {
        Run::new(program).env("APT_CONFIG", &self.config)
    }
}

/// The private root's apt.conf: its own directories, and of the host's configuration how to reach a
/// mirror and how strict its admin is about expired indices.
fn configuration(root: &Path) -> Result<String, AptError> {
    let dump = Run::new(Program { name: "apt-config", package: "apt" }).arg("dump").text()?;
    let reaches = |line: &&str| HOST_OPTIONS.iter().any(|option| line.starts_with(option));
    let host = dump.lines().filter(reaches).collect::<Vec<_>>().join("\n");
    let root = root.display();
    // The sandbox user could not read a private cache; what comes in is checked by hash or signature.
    Ok(format!(
        r#"Dir "{root}/";
Dir::State::status "{root}/var/lib/dpkg/status";
Dir::Etc::netrc "/etc/apt/auth.conf";
Dir::Etc::netrcparts "/etc/apt/auth.conf.d";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
{host}"#
    ))
}

fn judge_update(error: CommandError) -> AptError {
    let words = error.last_words().to_owned();
    if words.is_empty() || error.exit() != Exit::Bug {
        AptError::Command(error)
    } else if UNSIGNED.iter().any(|sign| words.contains(sign)) {
        AptError::NotVerified(words)
    } else {
        AptError::Unreachable(words)
    }
}

fn no_solution(error: CommandError) -> AptError {
    match error.last_words() {
        "" => AptError::Command(error),
        words => AptError::NoSolution(words.to_owned()),
    }
}

fn deb_of(stanza: &deb822::Stanza, archive: &str) -> Option<Deb> {
    Some(Deb {
        name: stanza.get("Package")?.to_owned(),
        version: stanza.get("Version")?.to_owned(),
        arch: stanza.get("Architecture")?.to_owned(),
        archive: archive.to_owned(),
        path: stanza.get("Filename")?.to_owned(),
        bytes: stanza.get("Size")?.parse().ok()?,
        sha256: stanza.get("SHA256")?.parse().ok()?,
    })
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let mut byte = [0];
            hex::decode_to_slice(after.get(..2)?, &mut byte).ok()?;
            bytes.push(byte[0]);
            rest = &after[2..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

/// Everything but unreserved characters and `/` as `%XX` (RFC 3986).
pub(crate) fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded += &format!("%{byte:02X}");
        }
    }
    encoded
}

/// Directories that apt wants to find.
const STATE: [&str; 6] = [
    "etc/apt/apt.conf.d",
    "etc/apt/preferences.d",
    "etc/apt/sources.list.d",
    "var/lib/apt/lists/partial",
    "var/cache/apt/archives/partial",
    "var/lib/dpkg",
];
const APT_GET: Program = Program { name: "apt-get", package: "apt" };
const APT_HELPER: Program = Program { name: "/usr/lib/apt/apt-helper", package: "apt" };
/// Whose signatures on the indices are believed.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The label of Debian's main archive.
const DEFAULT_LABEL: &str = "Debian";
/// The free software part; firmware and others are of no use to a virtual machine.
const COMPONENT: &str = "main";
const KERNEL_PREFIX: &str = "linux-image-";
const SCHEMES: [&str; 4] = ["http://", "https://", "file:/", "copy:/"];
/// Options of the host's apt that reach the private one.
const HOST_OPTIONS: [&str; 5] = [
    "Acquire::http",
    "Acquire::https",
    "Acquire::Retries",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
];
/// Words of apt about signatures, in the C locale.
const UNSIGNED: [&str; 8] = [
    "NO_PUBKEY",
    "BADSIG",
    "EXPKEYSIG",
    "REVKEYSIG",
    "is not signed",
    "not valid yet",
    "is expired",
    "Hash Sum mismatch",
];
/// Most bytes of an index.
const MAX_INDEX: u64 = 512 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_without_a_label_is_debians() {
        let mirrors = Mirrors::named(&["http://a.example/debian".into(), "Debian-Security=copy:/s/".into()]);
        let mirrors = mirrors.unwrap();
        assert_eq!(mirrors.get("Debian").unwrap(), "http://a.example/debian/");
        assert_eq!(mirrors.get("Debian-Security").unwrap(), "copy:/s/");
        assert_eq!(mirrors.get("Other").unwrap_err().exit(), Exit::HostLacks);
    }

    #[test]
    fn mirror_that_could_smuggle_an_option_is_refused() {
        for bad in ["ftp://x/", "x", "http://a b/", "http://a\" \"/", "http://a/ [trusted=yes]", "http://a\n"]
        {
            let error = Mirrors::named(&[bad.to_owned()]).unwrap_err();
            assert!(matches!(error, AptError::MirrorAddress(_)), "{bad}: {error}");
        }
    }

    #[test]
    fn file_belongs_to_the_archive_with_the_longest_address() {
        let mirrors =
            Mirrors::named(&["http://m/debian".into(), "Debian-Security=http://m/debian/security".into()]);
        let mirrors = mirrors.unwrap();
        let split = |address| mirrors.split(address).unwrap();
        assert_eq!(split("http://m/debian/pool/a%2bb.deb"), ("Debian".into(), "pool/a+b.deb".into()));
        assert_eq!(split("http://m/debian/security/pool/c"), ("Debian-Security".into(), "pool/c".into()));
        assert_eq!(mirrors.split("http://other/pool/c"), None);
    }

    #[test]
    fn percent_signs_are_read_and_written() {
        assert_eq!(percent_encode("pool/libstdc++6_1%3a2~b.deb"), "pool/libstdc%2B%2B6_1%253a2~b.deb");
        assert_eq!(percent_decode("a%2bb%3A"), Some("a+b:".into()));
        for broken in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(percent_decode(broken), None, "{broken}");
        }
    }

    #[test]
    fn unsigned_index_is_told_from_an_unreachable_mirror() {
        let failed = |words: &str| {
            let script = format!("echo '{words}' >&2; exit 100");
            let error = Run::new(Program { name: "sh", package: "dash" }).args(["-c", &script]).bytes();
            judge_update(error.unwrap_err()).exit()
        };
        assert_eq!(failed("E: The repository is not signed."), Exit::NotVerified);
        assert_eq!(failed("NO_PUBKEY 6ED0E7B82643E131"), Exit::NotVerified);
        assert_eq!(failed("Could not resolve"), Exit::Unreachable);
        assert_eq!(failed("No space left on device"), Exit::HostLacks);
    }
}
