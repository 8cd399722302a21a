//! What `kontor status --json` shows.

use crate::{
    exit::Exit,
    host::Accelerator,
    jail::JailNote,
    qemu::Backend,
    session::{LeaseNote, Session, Stop, Witness},
};
use kontor_relay::message::Counters;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Where the work VM stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// None was started since kontord runs, and the last one before that was seen to its end.
    Off,
    /// The release is being verified, relay and QEMU are being started.
    Starting,
    /// The guest boots.
    Booting,
    /// The session runs.
    Running,
    /// It is on its way out.
    Stopping,
    /// It ended.
    Stopped,
    /// It was not started.
    NotStarted,
}

/// Where the work VM stands, and how it came there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Now.
    pub state: State,
    /// When QEMU was started, in milliseconds since the start.
    pub qemu_at_ms: Option<u64>,
    /// Boot states that were reached, in order.
    pub states: Vec<Reached>,
    /// When the session ran, in milliseconds since the start.
    pub ready_at_ms: Option<u64>,
    /// What executes the guest.
    pub accel: Option<Accelerator>,
    /// Whether instructions are emulated, which is no security boundary.
    pub emulated: bool,
    /// What holds QEMU; nothing runs without.
    pub jail: Option<JailNote>,
    /// Which device the work VM's uplink is.
    pub uplink: Option<Backend>,
    /// The started release.
    pub release: Option<Release>,
    /// The lease in use.
    pub lease: Option<LeaseNote>,
    /// What the office said when it last gave no lease.
    pub office: Option<String>,
    /// What passed the relay.
    pub relay: Option<Counters>,
    /// Why the machine stopped, or is about to.
    pub stop: Option<StopNote>,
    /// Why it was not started.
    pub not_started: Option<Failure>,
    /// Whether kontord runs as the employee, who could then read the keys. For development only.
    pub user_mode: bool,
}

/// A boot state and when it was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Its name.
    pub state: String,
    /// Milliseconds since the start, on the host's clock.
    pub at_ms: u64,
}

/// Which release was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Its name.
    pub name: String,
    /// The version of its manifest.
    pub version: u64,
    /// Whether it carries the probe channel.
    pub test: bool,
}

/// Why a machine stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopNote {
    /// The reason's name.
    pub reason: String,
    /// What happened and what to do next.
    pub words: String,
    /// Whether the host concludes it, because the guest did not say why.
    pub inferred: bool,
    /// What exactly happened, for IT; may be empty.
    pub detail: String,
    /// The exit code that goes with it.
    pub exit: Exit,
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What happened and what to do next.
    pub words: String,
    /// The exit code that goes with it.
    pub exit: Exit,
}

impl Status {
    /// Nothing was started yet.
    #[must_use]
    pub fn off(user_mode: bool) -> Self {
        Self {
            state: State::Off,
            qemu_at_ms: None,
            states: Vec::new(),
            ready_at_ms: None,
            accel: None,
            emulated: false,
            jail: None,
            uplink: None,
            release: None,
            lease: None,
            office: None,
            relay: None,
            stop: None,
            not_started: None,
            user_mode,
        }
    }

    /// Takes over what the session knows.
    pub(crate) fn follow(&mut self, session: &Session) {
        self.state = session.state();
        let reached = session.reached().iter();
        self.states = reached
            .map(|(state, at)| Reached { state: state.name().to_owned(), at_ms: milliseconds(*at) })
            .collect();
        self.ready_at_ms = session.ready_at().map(milliseconds);
        self.lease = session.lease();
        self.office = session.office_words().map(str::to_owned);
        self.stop = session.stop().map(StopNote::from);
    }

    /// Whether a virtual machine exists, or is about to.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        match self.state {
            State::Starting | State::Booting | State::Running | State::Stopping => true,
            State::Off | State::Stopped | State::NotStarted => false,
        }
    }
}

impl From<&Stop> for StopNote {
    fn from(stop: &Stop) -> Self {
        Self {
            reason: stop.reason.name().to_owned(),
            words: stop.reason.words().to_owned(),
            inferred: stop.witness == Witness::Inferred,
            detail: stop.detail.clone(),
            exit: stop.reason.into(),
        }
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
