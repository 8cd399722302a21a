//! One request, one answer.
//!
//! ```text
//! host → control    a request's envelope
//! control → host    {"lease": {"keysets": [base64], "device": …, "bundle": …, "lease": …}} newline
//!                   or {"refused": words} newline
//!                   or {"revoked": {"keysets": [base64], "device": …}} newline
//! ```

use crate::{
    Exit,
    admission::tell,
    chain,
    config::Config,
    store::{Chain, Store, StoreError},
};
use kontor_bundle::lease::{Notice, Parts};
use kontor_control::{IssueError, Issued, Office, OfficeFault, Pool, Rates, Refusal};
use kontor_trust::{PublicKey, SecretKey, untrusted_device};
use serde::Serialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{sync::Mutex, task::spawn_blocking};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("the clock is before 1970: set it")]
    Clock,
    #[error("control.key is not pinned by the keyset: hosts would not speak with it")]
    NotPinned,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Office(#[from] OfficeFault),
    #[error("the work on the answer broke off")]
    Broken,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Lease(Parts),
    Refused(String),
    Revoked(Notice),
}

/// Answers requests from a directory.
pub(crate) struct Desk {
    dir: PathBuf,
    since: Instant,
    /// One request after the other is decided, since each reads and writes what control remembers.
    rates: Arc<Mutex<Rates>>,
}

/// What control serves with.
pub(crate) struct Front {
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) tls_key: SecretKey,
}

impl Desk {
    /// Reads and checks every file of the directory once.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Front), AnswerError> {
        let store = Store::open(dir)?;
        let papers = Papers::read(&store)?;
        let tls_key = store.tls_key()?;
        if !papers.chain.newest.keyset().control_spki.contains(&tls_key.public().pin()) {
            return Err(AnswerError::NotPinned);
        }
        let pools = papers.config.pools();
        let office = papers.office(&pools);
        office.check_lease_key()?;
        store.check_documents(&office)?;
        store.memory()?;
        let desk = Self { dir: dir.to_owned(), since: Instant::now(), rates: Arc::default() };
        Ok((desk, Front { listen: papers.config.listen, tls_key }))
    }

    /// The line that answers a request which came from the holder of `peer`.
    pub(crate) async fn answer(&self, peer: PublicKey, request: Vec<u8>) -> Result<Vec<u8>, AnswerError> {
        let answer = match self.decide(peer, request).await {
            Ok((config, Issued { parts, admit, lease })) => {
                let named = |id| config.gateways.iter().find(|gateway| gateway.id == id);
                let gateways: Vec<_> =
                    lease.gateways.iter().filter_map(|gateway| named(gateway.id)).collect();
                for (gateway, told) in tell(&admit, &gateways).await {
                    if let Err(error) = told {
                        tracing::warn!(gateway, device = %lease.device, "not admitted: {}", chain(&error));
                    }
                }
                Answer::Lease(parts)
            }
            Err(Failure::Refused(refusal)) => {
                tracing::info!(%peer, "refused: {}", chain(&refusal));
                Answer::Refused(chain(&refusal))
            }
            Err(Failure::Revoked(notice)) => {
                tracing::info!(%peer, "refused: {}", Refusal::Revoked);
                Answer::Revoked(notice)
            }
            Err(Failure::Answer(error)) => return Err(error),
        };
        let mut line = serde_json::to_vec(&answer).expect("text serializes");
        line.push(b'\n');
        Ok(line)
    }

    async fn decide(&self, peer: PublicKey, request: Vec<u8>) -> Result<(Config, Issued), Failure> {
        let mut rates = Arc::clone(&self.rates).lock_owned().await;
        let (dir, since) = (self.dir.clone(), self.since);
        let deciding = spawn_blocking(move || issue(&dir, &mut rates, since, &peer, &request));
        deciding.await.unwrap_or(Err(Failure::Answer(AnswerError::Broken)))
    }
}

enum Failure {
    Refused(Refusal),
    Revoked(Notice),
    Answer(AnswerError),
}

impl<E: Into<AnswerError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Answer(error.into())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<IssueError> for Failure {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::Refused(refusal) => Self::Refused(refusal),
            IssueError::Office(fault) => Self::Answer(fault.into()),
        }
    }
}

/// What every answer rests on.
struct Papers {
    config: Config,
    chain: Chain,
    lease_key: SecretKey,
}

impl Papers {
    fn read(store: &Store) -> Result<Self, StoreError> {
        let config = store.config()?;
        let chain = store.chain(&config)?;
        Ok(Self { config, chain, lease_key: store.lease_key()? })
    }

    fn office<'a>(&'a self, pools: &'a [Pool]) -> Office<'a> {
        Office {
            keyset: &self.chain.newest,
            chain: &self.chain.envelopes,
            lease_key: &self.lease_key,
            lease_s: self.config.lease_s,
            pools,
        }
    }
}

/// Issues the lease and remembers it; the store is free again when this returns.
fn issue(
    dir: &Path,
    rates: &mut Rates,
    since: Instant,
    peer: &PublicKey,
    request: &[u8],
) -> Result<(Config, Issued), Failure> {
    let device = untrusted_device(request).ok_or(Refusal::NoRequest)?;
    let store = Store::open(dir)?;
    let record = store.device(&device)?.ok_or(Refusal::UnknownDevice)?;
    let papers = Papers::read(&store)?;
    let pools = papers.config.pools();
    let office = papers.office(&pools);
    let who = match office.identify(peer, request, &record) {
        // The host stops at once if the enrol role says so, and not on control's word alone.
        Err(IssueError::Refused(Refusal::Revoked)) => {
            return Err(Failure::Revoked(Notice { keysets: office.links().to_vec(), device: record }));
        }
        who => who?,
    };
    let wait = |wait: Duration| Refusal::TooOften(wait.as_secs() + 1);
    rates.take(&who.device().device, since.elapsed()).map_err(wait)?;
    let bundle = store.bundle(&who.device().line)?.ok_or(Refusal::NoBundle)?;
    let mut memory = store.memory()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| AnswerError::Clock)?.as_secs();
    let issued = office.issue(&who, &bundle, &mut memory, now)?;
    store.remember(&memory)?;
    Ok((papers.config, issued))
}

impl AnswerError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Store(StoreError::Keyset { .. } | StoreError::Document { .. }) => Exit::NotVerified,
            Self::Office(
                OfficeFault::Envelope { .. }
                | OfficeFault::Device(_)
                | OfficeFault::Bundle(_)
                | OfficeFault::Misplaced(_)
                | OfficeFault::LeaseKey
                | OfficeFault::SelfCheck(_),
            )
            | Self::NotPinned => Exit::NotVerified,
            Self::Broken => Exit::Bug,
            Self::Clock | Self::Office(OfficeFault::NoGateway | OfficeFault::Clock) => Exit::Lacks,
            Self::Store(
                StoreError::Lock { .. }
                | StoreError::Read { .. }
                | StoreError::Write { .. }
                | StoreError::TooLarge { .. }
                | StoreError::Config { .. }
                | StoreError::Memory { .. }
                | StoreError::Open { .. }
                | StoreError::Key { .. }
                | StoreError::LongChain { .. }
                | StoreError::Full { .. }
                | StoreError::Name { .. },
            ) => Exit::Lacks,
        }
    }
}
