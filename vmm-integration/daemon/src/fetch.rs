//! Fetching from the release repository, under TUF by `tough`.
//!
//! What is fetched has to be signed by those whom the root names, must not have expired, and must not be
//! older than what was fetched before; `tough` judges that, and remembers in the store's `fetched`
//! directory. The metadata is handed on as received, so that the slot can keep it and every start can
//! verify it again.
//!
//! `tough` also remembers the latest time that it saw, and then refuses every earlier one: a PC whose clock
//! once stood in the future would not update for years. That memory is thrown away before each use. In its
//! place the clock must not be behind the build of a release, which those vouch for who sign releases
//! (decision 0015); an hour that a firmware clock in local time makes wrong is let pass.

use crate::{
    exit::Exit,
    slots::MANIFEST,
    store::{Store, StoreError, io_error, is_full},
};
use futures_core::Stream;
use kontor_release::{Digest, MAX_MANIFEST, Manifest, ManifestError, Piece};
use kontor_repository::{
    MANIFEST_SUFFIX, MAX_ROLE, METADATA, Metadata, MetadataError, TARGETS, Target, TrustedRoot, Verified,
    gather, keyset_target, piece_target, root_file, verify,
};
use kontor_trust::MAX_ENVELOPE;
use std::{
    collections::BTreeMap,
    error::Error as _,
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};
use tough::{
    Bytes, FilesystemTransport, IntoVec, Prefix, Repository, RepositoryLoader, TargetName, Transport,
    TransportError, TransportErrorKind, TransportStream, async_trait,
};
use url::Url;

/// Most releases, one for each profile, that a repository may offer.
const MAX_OFFERED: usize = 64;
/// How far the clock may be behind a release's build: local time instead of UTC, and a day on top.
pub(crate) const CLOCK_SLACK_S: u64 = 2 * 86_400;
/// `tough`'s memory of the latest time.
const LATEST_TIME: &str = "latest_known_time.json";

/// Why nothing is fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The repository's name.
    #[error("{0:?} is neither a directory nor a file: URL")]
    Place(String),
    /// The repository cannot be read.
    #[error("read {path} of the repository")]
    Read {
        /// What of it.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The clock is behind what it cannot be behind.
    #[error(
        "this PC's clock is {} days behind the build of a release that is there; set it, or no update can be installed",
        .built_at.saturating_sub(*.now) / 86_400
    )]
    Clock {
        /// The clock's time, in Unix seconds.
        now: u64,
        /// The release's.
        built_at: u64,
    },
    /// `tough` refuses it. Its words contain their causes.
    #[error("fetch {what}: {error}")]
    Tuf {
        /// What was fetched.
        what: String,
        /// Why it is refused.
        error: Box<tough::error::Error>,
    },
    /// The metadata.
    #[error("the repository's metadata")]
    Metadata(#[source] MetadataError),
    /// A description.
    #[error("the repository's {name}")]
    Manifest {
        /// The target's name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// A description that is too long, or too many of them.
    #[error("the repository's {0} is above a limit")]
    Limit(String),
    /// Nothing for this tenant.
    #[error("the repository has no release for this tenant, {0}; it has one of another tenant")]
    OtherTenant(Digest),
    /// Nothing at all.
    #[error("the repository has no release")]
    Nothing,
    /// A piece that the signed list lacks, or names with another length or hash.
    #[error("the release's {0} is not what the repository's signed list of targets names")]
    Unlike(String),
    /// The runtime.
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
}

impl FetchError {
    /// The exit code that goes with it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Store(error) => store_exit(error),
            Self::Place(_) => Exit::Usage,
            Self::Read { .. } => Exit::Unreachable,
            Self::Clock { .. } => Exit::HostLacks,
            Self::Tuf { error, .. } => tuf_exit(error),
            Self::Nothing => Exit::Unreachable,
            Self::Metadata(_)
            | Self::Manifest { .. }
            | Self::Limit(_)
            | Self::OtherTenant(_)
            | Self::Unlike(_) => Exit::NotVerified,
            Self::Runtime(_) => Exit::Failed,
        }
    }
}

/// What a failure of the store is for whoever installs.
pub(crate) fn store_exit(error: &StoreError) -> Exit {
    if let StoreError::Io { source, .. } = error {
        return if is_full(source) { Exit::HostLacks } else { Exit::Failed };
    }
    if matches!(error, StoreError::Busy(_)) { Exit::Failed } else { Exit::NotVerified }
}

/// A full disk and a file that is not there are told from what does not verify.
fn tuf_exit(error: &tough::error::Error) -> Exit {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<TransportError>()
            && error.kind() == TransportErrorKind::FileNotFound
        {
            return Exit::Unreachable;
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return if is_full(error) { Exit::HostLacks } else { Exit::Unreachable };
        }
        cause = error.source();
    }
    Exit::NotVerified
}

/// The newest release of a tenant, as a repository offers it. Its pieces are not fetched yet.
pub(crate) struct Offer {
    runtime: tokio::runtime::Runtime,
    repository: Repository,
    verified: Verified,
    /// The metadata that vouches for it, as received.
    pub(crate) metadata: Metadata,
    /// What the release is.
    pub(crate) manifest: Manifest,
    /// The same, as received.
    pub(crate) manifest_bytes: Vec<u8>,
}

impl Offer {
    /// Asks the repository at `place`. `known` are the roots that an earlier release came with.
    pub(crate) fn newest(
        store: &Store,
        pin: &Digest,
        place: &str,
        known: Vec<Vec<u8>>,
    ) -> Result<Self, FetchError> {
        let base = base(place)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(FetchError::Runtime)?;
        let memory = prepare(store)?;
        let transport = Recorder::new(&base)?;
        let (roots, newest) = match TrustedRoot::follow(&known, pin) {
            Ok(_) => (known.clone(), known.last().cloned().unwrap_or_default()),
            Err(_) => {
                let first = transport.read(&root_file(1))?;
                TrustedRoot::follow(std::slice::from_ref(&first), pin).map_err(FetchError::Metadata)?;
                (vec![first.clone()], first)
            }
        };
        for (version, root) in (1..).zip(roots) {
            transport.record(root_file(version), root);
        }
        let loader = RepositoryLoader::new(&newest, transport.base.clone(), join(&base, TARGETS)?);
        let loader = loader.transport(transport.clone()).datastore(memory);
        let refused =
            |error| FetchError::Tuf { what: "the repository's metadata".into(), error: Box::new(error) };
        let repository = runtime.block_on(loader.load()).map_err(refused)?;

        // From here on this is what a start will verify again, by the same code.
        let Ok(metadata) = gather(|name| Ok::<_, std::convert::Infallible>(transport.recorded(name)));
        let verified = verify(&metadata, pin).map_err(FetchError::Metadata)?;
        let (manifest, manifest_bytes) = choose(&runtime, &repository, &verified, store.tenant())?;
        Ok(Self { runtime, repository, verified, metadata, manifest, manifest_bytes })
    }

    /// The metadata's files.
    pub(crate) fn metadata_files(&self) -> impl Iterator<Item = (String, &[u8])> {
        self.metadata.files(self.verified.versions())
    }

    /// The published keysets that follow version `known`, without a gap. Whose they are, their own signatures say.
    pub(crate) fn keysets_after(&self, known: u64) -> Result<Vec<Vec<u8>>, FetchError> {
        let mut keysets = Vec::new();
        for name in (known.saturating_add(1)..).map(keyset_target) {
            let Some(target) = self.verified.target(&name) else { break };
            if target.bytes > MAX_ENVELOPE as u64 {
                return Err(FetchError::Limit(name));
            }
            keysets.push(read(&self.runtime, &self.repository, &name, &name)?);
        }
        Ok(keysets)
    }

    /// Whether the signed list names just this piece.
    pub(crate) fn lists(&self, piece: &Piece) -> Result<(), FetchError> {
        let name = piece_target(&self.manifest.image.profile, piece);
        let listed = Target { bytes: piece.bytes, sha256: piece.sha256 };
        if self.verified.target(&name) == Some(listed) {
            Ok(())
        } else {
            Err(FetchError::Unlike(piece.name.clone()))
        }
    }

    /// Fetches a piece into the directory `to`, under the returned name.
    pub(crate) fn fetch(&self, piece: &Piece, to: &Path) -> Result<PathBuf, FetchError> {
        let name = piece_target(&self.manifest.image.profile, piece);
        let refused =
            |error| FetchError::Tuf { what: format!("the release's {}", piece.name), error: Box::new(error) };
        let target = TargetName::new(name.as_str()).map_err(refused)?;
        self.runtime.block_on(self.repository.save_target(&target, to, Prefix::None)).map_err(refused)?;
        Ok(to.join(name))
    }
}

/// The newest among the tenant's releases.
fn choose(
    runtime: &tokio::runtime::Runtime,
    repository: &Repository,
    verified: &Verified,
    tenant: Digest,
) -> Result<(Manifest, Vec<u8>), FetchError> {
    let offered: Vec<_> = verified.targets().filter(|(name, _)| name.ends_with(MANIFEST_SUFFIX)).collect();
    if offered.len() > MAX_OFFERED {
        return Err(FetchError::Limit(format!("number of releases ({})", offered.len())));
    }
    let mut newest: Option<(Manifest, Vec<u8>)> = None;
    let mut others = false;
    for (name, target) in offered {
        if target.bytes > MAX_MANIFEST as u64 {
            return Err(FetchError::Limit(name.to_owned()));
        }
        let bytes = read(runtime, repository, name, &format!("the release's {MANIFEST} ({name})"))?;
        let wrong = |source| FetchError::Manifest { name: name.to_owned(), source };
        let manifest = Manifest::parse(&bytes).map_err(wrong)?;
        if manifest.tenant != tenant {
            others = true;
        } else if newest.as_ref().is_none_or(|(newest, _)| newest.version < manifest.version) {
            newest = Some((manifest, bytes));
        }
    }
    newest.ok_or(if others { FetchError::OtherTenant(tenant) } else { FetchError::Nothing })
}

/// A small target as a whole; `what` it is called in an error.
fn read(
    runtime: &tokio::runtime::Runtime,
    repository: &Repository,
    name: &str,
    what: &str,
) -> Result<Vec<u8>, FetchError> {
    let refused = |error| FetchError::Tuf { what: what.to_owned(), error: Box::new(error) };
    let target = TargetName::new(name).map_err(refused)?;
    let read = async {
        match repository.read_target(&target).await? {
            Some(stream) => stream.into_vec().await,
            None => Ok(Vec::new()),
        }
    };
    runtime.block_on(read).map_err(refused)
}

/// Checks that a clock that says `now` is not behind the build of a release, both in Unix seconds. By such a
/// clock metadata that expired would still be fresh.
pub(crate) fn clock_is_not_behind(now: u64, built_at: u64) -> Result<(), FetchError> {
    if now.saturating_add(CLOCK_SLACK_S) < built_at {
        Err(FetchError::Clock { now, built_at })
    } else {
        Ok(())
    }
}

/// Makes `tough`'s memory ready, but for its memory of time.
fn prepare(store: &Store) -> Result<PathBuf, FetchError> {
    let memory = store.fetched();
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&memory);
    made.map_err(io_error("make the directory", &memory))?;
    let time = memory.join(LATEST_TIME);
    match fs::remove_file(&time) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &time)(error).into()),
        _ => Ok(memory),
    }
}

/// The repository's URL, with a slash at its end.
fn base(place: &str) -> Result<Url, FetchError> {
    let wrong = || FetchError::Place(place.chars().take(160).collect());
    let mut url = match Url::parse(place) {
        Ok(url) if url.scheme() == "file" => url,
        Ok(_) => return Err(wrong()),
        Err(_) => {
            let path =
                fs::canonicalize(place).map_err(|source| FetchError::Read { path: place.into(), source })?;
            Url::from_directory_path(path).map_err(|()| wrong())?
        }
    };
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

fn join(base: &Url, directory: &str) -> Result<Url, FetchError> {
    base.join(&format!("{directory}/")).map_err(|_| FetchError::Place(base.to_string()))
}

/// Files of a repository in the file system; of its metadata every byte is kept as received.
#[derive(Debug, Clone)]
struct Recorder {
    base: Url,
    seen: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Recorder {
    fn new(repository: &Url) -> Result<Self, FetchError> {
        Ok(Self { base: join(repository, METADATA)?, seen: Arc::default() })
    }

    fn record(&self, name: String, bytes: Vec<u8>) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name, bytes);
    }

    fn recorded(&self, name: &str) -> Option<Vec<u8>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// One metadata file.
    fn read(&self, name: &str) -> Result<Vec<u8>, FetchError> {
        let url = self.base.join(name).map_err(|_| FetchError::Place(self.base.to_string()))?;
        let path = url.to_file_path().map_err(|()| FetchError::Place(self.base.to_string()))?;
        limited(&path).map_err(|source| FetchError::Read { path, source })
    }
}

#[async_trait]
impl Transport for Recorder {
    async fn fetch(&self, url: Url) -> Result<TransportStream, TransportError> {
        let Some(name) = url.as_str().strip_prefix(self.base.as_str()).map(str::to_owned) else {
            return FilesystemTransport.fetch(url).await;
        };
        let Ok(path) = url.to_file_path() else {
            return Err(TransportError::new(TransportErrorKind::UnsupportedUrlScheme, url));
        };
        let bytes = limited(&path).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            let kind = if missing { TransportErrorKind::FileNotFound } else { TransportErrorKind::Other };
            TransportError::new_with_cause(kind, &url, error)
        })?;
        self.record(name, bytes.clone());
        Ok(Box::pin(Once(Some(bytes.into()))))
    }
}

/// A metadata file, of which never more than the limit is read.
fn limited(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_ROLE as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_ROLE {
        let words = format!("it has more than {MAX_ROLE} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, words));
    }
    Ok(bytes)
}

/// A stream of one chunk.
struct Once(Option<Bytes>);

impl Stream for Once {
    type Item = Result<Bytes, TransportError>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.take().map(Ok))
    }
}
