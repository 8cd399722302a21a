//! The software bill of materials: CycloneDX 1.6 as JSON (ECMA-424), the same bytes for the same
//! content. It lists every Debian package of the image and every crate compiled into our programs.

use crate::{
    apt::percent_encode,
    command::CommandError,
    date,
    guest::{PACKAGE, TARGET, cargo},
    lock::{Deb, Lock},
    profile::Source,
};
use kontor_trust::Digest;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

/// A crate of the guest's programs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Crate {
    name: String,
    version: String,
    license: Option<String>,
    /// SHA-256 of the package as the registry gave it; none for the source tree's own crates.
    checksum: Option<String>,
}

/// What cargo says about the guest's programs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Crates {
    /// The crates that they are compiled from, sorted.
    pub(crate) list: Vec<Crate>,
    /// The directories that registries' crates lie in on this machine.
    pub(crate) registries: BTreeSet<PathBuf>,
}

/// `name version checksum`, what tells one crate from another.
impl fmt::Display for Crate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.name, self.version, self.checksum.as_deref().unwrap_or("-"))
    }
}

/// Cargo could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SbomError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    File(#[from] crate::files::FileError),
    #[error("cargo metadata's answer does not parse")]
    Metadata(#[source] serde_json::Error),
    #[error("Cargo.lock does not parse")]
    CargoLock(#[source] Box<toml::de::Error>),
    #[error("cargo metadata knows no package {PACKAGE}")]
    NoGuest,
}

impl SbomError {
    pub(crate) fn exit(&self) -> crate::exit::Exit {
        match self {
            Self::Command(error) => error.exit(),
            Self::File(error) => error.exit(),
            Self::Metadata(_) | Self::CargoLock(_) | Self::NoGuest => crate::exit::Exit::Bug,
        }
    }
}

/// Asks cargo, which downloads what is missing.
pub(crate) fn crates(source: &Source) -> Result<Crates, SbomError> {
    let metadata = cargo(source)
        .args(["metadata", "--quiet", "--locked", "--format-version", "1", "--filter-platform", TARGET])
        .bytes()?;
    let lock = crate::files::read_text(&source.root().join("Cargo.lock"), MAX_CARGO_LOCK)?;
    crates_of(&metadata, &lock)
}

fn crates_of(metadata: &[u8], cargo_lock: &str) -> Result<Crates, SbomError> {
    let Metadata { packages, resolve } = serde_json::from_slice(metadata).map_err(SbomError::Metadata)?;
    let lock: CargoLock = toml::from_str(cargo_lock).map_err(|e| SbomError::CargoLock(Box::new(e)))?;
    let checksums: BTreeMap<_, _> =
        lock.package.into_iter().map(|p| ((p.name, p.version), p.checksum)).collect();
    let nodes: BTreeMap<_, _> = resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let guest = packages.iter().find(|p| p.name == PACKAGE).ok_or(SbomError::NoGuest)?;
    let (mut reached, mut open) = (BTreeSet::new(), vec![guest.id.as_str()]);
    while let Some(id) = open.pop() {
        if reached.insert(id) {
            // No kind is a normal dependency; the others are for tests and build scripts.
            let normal = |dep: &&Dependency| dep.dep_kinds.iter().any(|k| k.kind.is_none());
            let deps = nodes.get(id).map(|node| node.deps.as_slice()).unwrap_or_default();
            open.extend(deps.iter().filter(normal).map(|dep| dep.pkg.as_str()));
        }
    }
    let mut list: Vec<Crate> = packages
        .iter()
        .filter(|p| reached.contains(p.id.as_str()))
        .map(|p| Crate {
            checksum: checksums.get(&(p.name.clone(), p.version.clone())).cloned().flatten(),
            name: p.name.clone(),
            version: p.version.clone(),
            license: p.license.clone(),
        })
        .collect();
    list.sort();
    let foreign = packages.iter().filter(|p| p.source.is_some());
    let registries = foreign.filter_map(|p| Some(p.manifest_path.parent()?.parent()?.to_owned())).collect();
    Ok(Crates { list, registries })
}

/// The document.
pub(crate) fn document(
    lock: &Lock,
    release: &str,
    host: &BTreeMap<String, String>,
    crates: &[Crate],
) -> Vec<u8> {
    let suite = lock.releases.first().map_or("", |release| release.suite.as_str());
    let mut components: Vec<Component> =
        lock.root.iter().chain([&lock.kernel]).map(|deb| Component::of_deb(deb, suite)).collect();
    components.extend(crates.iter().map(Component::of_crate));
    let mut tools = vec![Component::plain("application", "kontor-image", env!("CARGO_PKG_VERSION"))];
    tools.extend(host.iter().map(|(name, version)| Component::plain("application", name, version)));
    tools.extend(lock.tool.iter().map(|deb| Component::of_deb(deb, suite)));
    let mut document = Document {
        bom_format: "CycloneDX",
        spec_version: "1.6",
        serial_number: String::new(),
        version: 1,
        metadata: Meta {
            timestamp: date::iso8601(lock.built_at),
            tools: Tools { components: tools },
            component: Component::plain("operating-system", &lock.profile, release),
        },
        components,
    };
    // The number must be unique to the content, and the content must not change by itself.
    let content = serde_json::to_vec(&document).expect("text and numbers serialize");
    document.serial_number = format!("urn:uuid:{}", uuid_of(&Digest::of(&content)));
    let mut bytes = serde_json::to_vec_pretty(&document).expect("text and numbers serialize");
    bytes.push(b'\n');
    bytes
}

/// A UUID of version 8 (RFC 9562, section 5.8) made from a digest.
pub(crate) fn uuid_of(digest: &Digest) -> String {
    let mut bytes: [u8; 16] = digest.0[..16].try_into().expect("a digest is longer");
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    bom_format: &'a str,
    spec_version: &'a str,
    #[serde(skip_serializing_if = "String::is_empty")]
    serial_number: String,
    version: u32,
    metadata: Meta,
    components: Vec<Component>,
}

#[derive(Serialize)]
struct Meta {
    timestamp: String,
    tools: Tools,
    component: Component,
}

#[derive(Serialize)]
struct Tools {
    components: Vec<Component>,
}

#[derive(Serialize)]
struct Component {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(rename = "bom-ref", skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    name: String,
    version: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hashes: Vec<Hash>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    licenses: Vec<License>,
    #[serde(skip_serializing_if = "Option::is_none")]
    purl: Option<String>,
}

#[derive(Serialize)]
struct Hash {
    alg: &'static str,
    content: String,
}

#[derive(Serialize)]
struct License {
    expression: String,
}

impl Component {
    fn plain(kind: &'static str, name: &str, version: &str) -> Self {
        Self {
            kind,
            reference: None,
            name: name.to_owned(),
            version: version.to_owned(),
            hashes: Vec::new(),
            licenses: Vec::new(),
            purl: None,
        }
    }

    fn of_deb(deb: &Deb, suite: &str) -> Self {
        let (name, version) = (percent_encode(&deb.name), percent_encode(&deb.version));
        let purl = format!("pkg:deb/debian/{name}@{version}?arch={}&distro={suite}", deb.arch);
        Self {
            hashes: vec![Hash { alg: "SHA-256", content: deb.sha256.to_string() }],
            reference: Some(purl.clone()),
            purl: Some(purl),
            ..Self::plain("library", &deb.name, &deb.version)
        }
    }

    fn of_crate(krate: &Crate) -> Self {
        let Crate { name, version, license, checksum } = krate;
        // The source tree's own crates are in no registry, and a URL would point at a stranger's.
        let purl = checksum.as_ref().map(|_| format!("pkg:cargo/{name}@{}", percent_encode(version)));
        let hash = |content: &String| Hash { alg: "SHA-256", content: content.clone() };
        // Cargo's older form of an expression has a slash for OR.
        let expression = |text: &String| License { expression: text.replace('/', " OR ") };
        Self {
            hashes: checksum.iter().map(hash).collect(),
            licenses: license.iter().map(expression).collect(),
            reference: purl.clone(),
            purl,
            ..Self::plain("library", name, version)
        }
    }
}

/// Most bytes of a Cargo.lock.
const MAX_CARGO_LOCK: u64 = 16 * 1024 * 1024;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// Which registry; none for the source tree's own.
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    kind: Option<String>,
}

#[derive(Deserialize)]
struct CargoLock {
    package: Vec<LockedCrate>,
}

#[derive(Deserialize)]
struct LockedCrate {
    name: String,
    version: String,
    checksum: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::tests::lock;

    const METADATA: &str = r#"{"packages":[
        {"id":"g","name":"kontor-guest","version":"0.1.0","license":"Apache-2.0","source":null,"manifest_path":"/s/guest/Cargo.toml"},
        {"id":"a","name":"ring","version":"0.17.14+x","license":"Apache-2.0/ISC","source":"registry","manifest_path":"/r/ring/Cargo.toml"},
        {"id":"b","name":"cc","version":"1.0.0","license":null,"source":"registry","manifest_path":"/r/cc/Cargo.toml"},
        {"id":"c","name":"other","version":"1.0.0","license":null,"source":null,"manifest_path":"/s/other/Cargo.toml"}],
      "resolve":{"nodes":[
        {"id":"g","deps":[{"pkg":"a","dep_kinds":[{"kind":"dev"},{"kind":null}]},{"pkg":"c","dep_kinds":[{"kind":"dev"}]}]},
        {"id":"a","deps":[{"pkg":"b","dep_kinds":[{"kind":"build"}]},{"pkg":"g","dep_kinds":[{"kind":null}]}]},
        {"id":"b","deps":[]},{"id":"c","deps":[]}]}}"#;
    const CARGO_LOCK: &str = r#"
        version = 4
        [[package]]
        name = "ring"
        version = "0.17.14+x"
        checksum = "00ff"
    "#;

    fn crates() -> Crates {
        crates_of(METADATA.as_bytes(), CARGO_LOCK).unwrap()
    }

    fn sample() -> serde_json::Value {
        let host = BTreeMap::from([("rustc".to_owned(), "1.95".to_owned())]);
        serde_json::from_slice(&document(&lock(), "smoke-1", &host, &crates().list)).unwrap()
    }

    #[test]
    fn only_what_is_compiled_in_is_listed() {
        assert_eq!(crates().registries, BTreeSet::from(["/r".into()]));
        let names: Vec<_> = crates().list.into_iter().map(|c| (c.name, c.checksum)).collect();
        assert_eq!(names, [("kontor-guest".to_owned(), None), ("ring".to_owned(), Some("00ff".to_owned()))]);
    }

    #[test]
    fn packages_and_crates_have_their_urls() {
        let document = sample();
        let purls: Vec<_> =
            document["components"].as_array().unwrap().iter().filter_map(|c| c["purl"].as_str()).collect();
        assert!(purls.contains(&"pkg:deb/debian/curl@1%3A2.3%2Bb4~5-6?arch=amd64&distro="), "{purls:?}");
        assert!(purls.contains(&"pkg:cargo/ring@0.17.14%2Bx"), "{purls:?}");
        assert!(!purls.iter().any(|p| p.contains("kontor-guest")), "{purls:?}");
        assert_eq!(document["metadata"]["timestamp"], "2026-11-21T09:15:44Z");
        assert_eq!(document["components"][4]["licenses"][0]["expression"], "Apache-2.0 OR ISC");
    }

    #[test]
    fn serial_number_follows_the_content() {
        let first = sample();
        assert_eq!(first, sample());
        let mut lock = lock();
        lock.built_at += 1;
        let other: serde_json::Value =
            serde_json::from_slice(&document(&lock, "smoke-1", &BTreeMap::new(), &crates().list)).unwrap();
        assert_ne!(first["serialNumber"], other["serialNumber"]);
        let serial = first["serialNumber"].as_str().unwrap();
        assert_eq!((serial.len(), &serial[..9], &serial[23..24]), (45, "urn:uuid:", "8"));
    }

    #[test]
    fn answer_that_is_not_cargos_is_refused() {
        assert!(matches!(crates_of(b"{}", ""), Err(SbomError::Metadata(_))));
        let foreign = br#"{"packages":[],"resolve":{"nodes":[]}}"#;
        assert!(matches!(crates_of(foreign, "package = []"), Err(SbomError::NoGuest)));
    }
}
