//! One request, one answer.
//!
//! ```text
//! host → control    a request's envelope on standard input, to its end
//! control → host    {"lease": {"keysets": [base64], "device": …, "bundle": …, "lease": …}} newline
//!                   or {"refused": words} newline
//! ```

use crate::{
    Exit,
    admission::tell,
    chain,
    config::Config,
    store::{Store, StoreError},
};
use kontor_bundle::lease::Parts;
use kontor_control::{IssueError, Issued, Office, OfficeFault, Refusal};
use kontor_trust::{MAX_ENVELOPE, untrusted_device};
use serde::Serialize;
use std::{
    io::{self, Read, Write},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("read the request from standard input")]
    Input(#[source] io::Error),
    #[error("write the answer to standard output")]
    Output(#[source] io::Error),
    #[error("the clock is before 1970: set it")]
    Clock,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Office(#[from] OfficeFault),
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Lease(Parts),
    Refused(String),
}

/// Reads the request, answers it.
pub(crate) fn run(dir: &Path) -> Result<(), AnswerError> {
    let mut request = Vec::new();
    // One byte more than an envelope may have, so that a longer one is refused rather than cut.
    let limit = MAX_ENVELOPE as u64 + 1;
    io::stdin().lock().take(limit).read_to_end(&mut request).map_err(AnswerError::Input)?;
    let answer = match issue(dir, &request) {
        Ok((config, Issued { parts, admit, lease })) => {
            let named = |id| config.gateways.iter().find(|gateway| gateway.id == id);
            let gateways: Vec<_> = lease.gateways.iter().filter_map(|gateway| named(gateway.id)).collect();
            for (gateway, told) in tell(&admit, &gateways) {
                if let Err(error) = told {
                    tracing::warn!(gateway, device = %lease.device, "not admitted: {}", chain(&error));
                }
            }
            Answer::Lease(parts)
        }
        Err(Failure::Refused(refusal)) => {
            tracing::info!("refused: {}", chain(&refusal));
            Answer::Refused(chain(&refusal))
        }
        Err(Failure::Answer(error)) => return Err(error),
    };
    let mut line = serde_json::to_vec(&answer).expect("text serializes");
    line.push(b'\n');
    let mut output = io::stdout().lock();
    output.write_all(&line).and_then(|()| output.flush()).map_err(AnswerError::Output)
}

enum Failure {
    Refused(Refusal),
    Answer(AnswerError),
}

impl<E: Into<AnswerError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Answer(error.into())
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

/// Issues the lease and remembers it; the store is free again when this returns.
fn issue(dir: &Path, request: &[u8]) -> Result<(Config, Issued), Failure> {
    let Some(device) = untrusted_device(request) else { return Err(Failure::Refused(Refusal::NoRequest)) };
    let store = Store::open(dir)?;
    let config = store.config()?;
    let chain = store.chain(&config)?;
    let lease_key = store.lease_key()?;
    let office = Office {
        keyset: &chain.newest,
        chain: &chain.envelopes,
        lease_key: &lease_key,
        lease_s: config.lease_s,
        pools: &config.pools(),
    };
    let Some(record) = store.device(&device)? else { return Err(Failure::Refused(Refusal::UnknownDevice)) };
    let who = office.identify(request, &record)?;
    let Some(bundle) = store.bundle(&who.device().line)? else {
        return Err(Failure::Refused(Refusal::NoBundle));
    };
    let mut memory = store.memory()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| AnswerError::Clock)?.as_secs();
    let issued = office.issue(&who, &bundle, &mut memory, now)?;
    store.remember(&memory)?;
    Ok((config, issued))
}

impl AnswerError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Input(_) | Self::Output(_) => Exit::Unreachable,
            Self::Store(StoreError::Keyset { .. }) => Exit::NotVerified,
            Self::Office(
                OfficeFault::Envelope { .. }
                | OfficeFault::Device(_)
                | OfficeFault::Bundle(_)
                | OfficeFault::Misplaced(_)
                | OfficeFault::SelfCheck(_),
            ) => Exit::NotVerified,
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
                | StoreError::LongChain { .. },
            ) => Exit::Lacks,
        }
    }
}
