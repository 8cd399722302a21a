//! One virtual machine's life, decided. No IO and no clock: inputs and `now` go in, [`Action`]s come out.
//!
//! ```text
//! Booting ──Ready──► Running
//!    │                  │         a stop was decided: by the employee, the guest, a broken rule,
//!    └────────┬─────────┘         a time that ran out, or a sign of the guest's death
//!             ▼
//!   Ending(PowerOff ──► Quit ──► Kill) ──Closed──► Ended
//! ```
//!
//! Nothing the guest says is believed further than this file: states rise, a lease is asked for one
//! challenge at a time, and whoever breaks a rule or is silent for too long is stopped. What the host can
//! only conclude (a panic, a death without a word) is marked as inferred.

mod challenges;
mod times;

pub use times::Times;

use crate::status::State;
use challenges::Challenges;
use kontor_bundle::lease::Parts;
use kontor_wire::{
    FrameError,
    control::{BootState, Challenge, FromGuest, FromHost, LeaseParts, VERSION},
    reason::StopReason,
};
use std::{collections::VecDeque, net::SocketAddr, time::Duration};

/// Most characters of a detail.
const DETAIL_MAX: usize = 400;

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// A frame of the guest.
    Guest(FromGuest),
    /// Bytes of the guest that are no frame.
    GuestBroke(FrameError),
    /// The guest's kernel gave up, as the words say.
    Panicked(String),
    /// QEMU reports that the machine went off, with its own word for why.
    WentOff(String),
    /// The guest broke the rules of the uplink, as the relay says.
    UplinkBroke(String),
    /// The relay ended, as the words say.
    RelayEnded(String),
    /// The answer to the last [`Action::Ask`].
    Office(Answer),
    /// The host has slept, and is awake again.
    Woken,
    /// Somebody wants the machine stopped.
    Stop,
    /// Somebody wants it gone now.
    StopNow,
    /// QEMU is gone and everything that it sent was read. The words say how it ended.
    Closed(String),
}

/// What came of asking the office.
#[derive(Debug)]
pub enum Answer {
    /// A lease that the host found good.
    Lease(Box<Granted>),
    /// The office says no, in these words.
    Refused(String),
    /// The office did not answer, in these words.
    Unreachable(String),
    /// The answer is not what it must be.
    NotVerified(String),
    /// The answer is good, and its bundle forbids what runs.
    Forbidden(String),
}

/// A lease and what the host does about it.
#[derive(Debug)]
pub struct Granted {
    /// For the guest, as received.
    pub parts: Parts,
    /// For the relay.
    pub gateways: Vec<(u8, Vec<SocketAddr>)>,
    /// Which it is.
    pub lease: LeaseNote,
    /// How long after its issue the guest must have powered off, unless there is a newer one.
    pub off_after: Duration,
}

/// Which lease is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LeaseNote {
    /// When it was issued, in Unix seconds by the office's clock.
    pub issued_at: u64,
    /// When it ends.
    pub not_after: u64,
    /// The revision of the bundle.
    pub revision: u64,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this to the guest.
    Tell(FromHost),
    /// Ask the office for a lease; the answer comes back as [`Input::Office`].
    Ask(Challenge),
    /// Give the relay this table.
    Gateways(Vec<(u8, Vec<SocketAddr>)>),
    /// Ask QEMU to end.
    Quit,
    /// Kill QEMU.
    Kill,
}

/// Who knows why the machine stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Witness {
    /// The guest said so.
    Guest,
    /// The host saw it, or did it.
    Host,
    /// The host concludes it.
    Inferred,
}

/// Why the machine stopped, or is about to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// The coarse reason.
    pub reason: StopReason,
    /// Who says so.
    pub witness: Witness,
    /// What exactly happened, for IT; may be empty.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Booting,
    Running,
    Ending(Ending),
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The guest powers off by itself.
    PowerOff,
    /// QEMU was asked to end.
    Quit,
    /// QEMU was killed.
    Kill,
}

/// The state machine of one virtual machine.
#[derive(Debug)]
pub struct Session {
    times: Times,
    phase: Phase,
    greeted: bool,
    reached: Vec<(BootState, Duration)>,
    ready_at: Option<Duration>,
    challenges: Challenges,
    lease: Option<LeaseNote>,
    office_words: Option<String>,
    stop: Option<Stop>,
    /// QEMU's word for why the machine went off.
    went_off: Option<String>,
    /// When the present wait is over.
    deadline: Option<Duration>,
    actions: VecDeque<Action>,
}

impl Session {
    /// A machine that was started at `now` with the root hash `verity_root`.
    #[must_use]
    pub fn new(times: Times, verity_root: [u8; 32], now: Duration) -> Self {
        let deadline = Some(now + times.for_hello());
        Self {
            times,
            phase: Phase::Booting,
            greeted: false,
            reached: Vec::new(),
            ready_at: None,
            challenges: Challenges::new(verity_root),
            lease: None,
            office_words: None,
            stop: None,
            went_off: None,
            deadline,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do. Drain this after every `handle_*`.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Session::handle_timeout`] is due.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        self.deadline
    }

    /// The states reached, each with its time.
    #[must_use]
    pub fn reached(&self) -> &[(BootState, Duration)] {
        &self.reached
    }

    /// When the session ran.
    #[must_use]
    pub fn ready_at(&self) -> Option<Duration> {
        self.ready_at
    }

    /// The lease in use.
    #[must_use]
    pub fn lease(&self) -> Option<LeaseNote> {
        self.lease
    }

    /// What the office said when it last gave no lease.
    #[must_use]
    pub fn office_words(&self) -> Option<&str> {
        self.office_words.as_deref()
    }

    /// Why the machine stopped, or is about to.
    #[must_use]
    pub fn stop(&self) -> Option<&Stop> {
        self.stop.as_ref()
    }

    /// Whether nothing is left of the machine.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Takes one input.
    pub fn handle(&mut self, input: Input, now: Duration) {
        match input {
            Input::Closed(how) => self.close(&how),
            Input::WentOff(word) => self.went_off = Some(word),
            Input::StopNow => self.stop_now(now),
            // On the way out only the end matters, and the guest's own word on it.
            Input::Guest(FromGuest::Stop(reason)) if self.is_ending() => self.reconsider(reason),
            Input::Guest(_)
            | Input::GuestBroke(_)
            | Input::UplinkBroke(_)
            | Input::Panicked(_)
            | Input::RelayEnded(_)
            | Input::Office(_)
            | Input::Woken
            | Input::Stop
                if self.stop.is_some() => {}
            Input::Guest(message) => self.handle_guest(message, now),
            Input::GuestBroke(error) => self.broke(error.to_string(), now),
            Input::UplinkBroke(words) => self.broke(words, now),
            Input::Panicked(words) => {
                self.decide(StopReason::KernelPanic, Witness::Inferred, words);
                self.end(Ending::PowerOff, self.times.panicked(), now);
            }
            Input::RelayEnded(words) => {
                self.decide(StopReason::UplinkFailed, Witness::Host, words);
                self.power_off(now);
            }
            Input::Office(answer) => self.handle_answer(answer, now),
            // One that has not said hello has nothing yet that the sleep could have made stale.
            Input::Woken if self.greeted => self.actions.push_back(Action::Tell(FromHost::Woken)),
            Input::Woken => {}
            Input::Stop => {
                self.decide(StopReason::Requested, Witness::Host, String::new());
                self.power_off(now);
            }
        }
    }

    /// The time that was waited for has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.phase {
            Phase::Booting => {
                let last = self.reached.last().map_or("start", |(state, _)| state.name());
                self.decide(StopReason::Silent, Witness::Host, format!("nothing more came after {last}"));
                self.quit(now);
            }
            Phase::Running => {
                let words = "the guest runs on although its lease ran out";
                self.decide(StopReason::LeaseExpired, Witness::Host, words.into());
                self.power_off(now);
            }
            Phase::Ending(Ending::PowerOff) => self.quit(now),
            Phase::Ending(Ending::Quit) => self.kill(now),
            Phase::Ending(Ending::Kill) | Phase::Ended => self.deadline = None,
        }
    }

    fn handle_guest(&mut self, message: FromGuest, now: Duration) {
        if !self.greeted && !matches!(message, FromGuest::Hello { .. }) {
            return self.broke("the first frame is no Hello".into(), now);
        }
        match message {
            FromGuest::Hello { oldest, newest, features: _ } => self.greet(oldest, newest, now),
            FromGuest::State { state, at_ms: _ } => self.reach(state, now),
            FromGuest::Challenge(challenge) => match self.challenges.open(&challenge, now) {
                Ok(()) => self.actions.push_back(Action::Ask(challenge)),
                Err(broken) => self.broke(broken.to_string(), now),
            },
            FromGuest::Ready => self.ready(now),
            FromGuest::Stop(reason) if is_the_hosts(reason) => {
                self.broke(format!("the guest claims {}", reason.name()), now);
            }
            FromGuest::Stop(reason) => {
                self.decide(reason, Witness::Guest, String::new());
                self.end(Ending::PowerOff, self.times.power_off(), now);
            }
        }
    }

    fn greet(&mut self, oldest: u16, newest: u16, now: Duration) {
        if self.greeted {
            return self.broke("a second Hello".into(), now);
        }
        if !(oldest..=newest).contains(&VERSION) {
            let words = format!("the guest speaks versions {oldest} to {newest}, kontord {VERSION}");
            self.decide(StopReason::BadControl, Witness::Host, words);
            return self.quit(now);
        }
        self.greeted = true;
        self.actions.push_back(Action::Tell(FromHost::Hello { version: VERSION, features: 0 }));
    }

    fn reach(&mut self, state: BootState, now: Duration) {
        if self.phase != Phase::Booting || self.reached.last().is_some_and(|(last, _)| state <= *last) {
            return self.broke(format!("the state {} out of order", state.name()), now);
        }
        if state >= BootState::Leased && self.lease.is_none() {
            return self.broke(format!("the state {} without a lease", state.name()), now);
        }
        self.reached.push((state, now));
        self.deadline = Some(now + self.times.after(state));
    }

    fn ready(&mut self, now: Duration) {
        let last = self.reached.last().map(|(state, _)| *state);
        if self.phase != Phase::Booting || last != Some(BootState::Session) {
            return self.broke("Ready out of order".into(), now);
        }
        self.phase = Phase::Running;
        self.ready_at = Some(now);
        self.deadline = self.challenges.off_at();
    }

    fn handle_answer(&mut self, answer: Answer, now: Duration) {
        let asked_at = self.challenges.close();
        let (words, verified) = match answer {
            Answer::Lease(granted) => {
                let Granted { parts, gateways, lease, off_after } = *granted;
                self.challenges.off_at_most(asked_at + off_after + self.times.lapse_grace());
                self.lease = Some(lease);
                self.office_words = None;
                if self.phase == Phase::Running {
                    self.deadline = self.challenges.off_at();
                }
                let Parts { keysets, device, bundle, lease } = parts;
                self.actions.push_back(Action::Gateways(gateways));
                let parts = LeaseParts { keysets, device, bundle, lease };
                self.actions.push_back(Action::Tell(FromHost::Lease(parts)));
                return;
            }
            Answer::Refused(words) | Answer::Unreachable(words) => (words, true),
            Answer::NotVerified(words) => (words, false),
            // The company says so under its policy's signature: now, not when the lease ends.
            Answer::Forbidden(words) => {
                self.office_words = Some(cut(words.clone()));
                self.decide(StopReason::Forbidden, Witness::Host, words);
                return self.power_off(now);
            }
        };
        self.office_words = Some(cut(words.clone()));
        if verified || self.lease.is_some() {
            self.actions.push_back(Action::Tell(FromHost::Refused));
        } else {
            self.decide(StopReason::BadLease, Witness::Host, words);
            self.power_off(now);
        }
    }

    /// The guest's own word is worth more than a conclusion, not more than what the host saw.
    fn reconsider(&mut self, reason: StopReason) {
        if self.stop.as_ref().is_some_and(|stop| stop.witness == Witness::Inferred) && !is_the_hosts(reason) {
            self.stop = None;
            self.decide(reason, Witness::Guest, String::new());
        }
    }

    fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Ending(_))
    }

    fn broke(&mut self, words: String, now: Duration) {
        self.decide(StopReason::Garbage, Witness::Host, words);
        self.quit(now);
    }

    /// The first reason stays.
    fn decide(&mut self, reason: StopReason, witness: Witness, detail: String) {
        let detail = cut(detail);
        self.stop.get_or_insert(Stop { reason, witness, detail });
    }

    fn power_off(&mut self, now: Duration) {
        if self.greeted {
            self.actions.push_back(Action::Tell(FromHost::PowerOff));
            self.end(Ending::PowerOff, self.times.power_off(), now);
        } else {
            self.quit(now);
        }
    }

    fn quit(&mut self, now: Duration) {
        self.actions.push_back(Action::Quit);
        self.end(Ending::Quit, self.times.quit(), now);
    }

    fn kill(&mut self, now: Duration) {
        self.actions.push_back(Action::Kill);
        self.end(Ending::Kill, self.times.kill(), now);
    }

    fn stop_now(&mut self, now: Duration) {
        if self.phase != Phase::Ended {
            self.decide(StopReason::Requested, Witness::Host, String::new());
            self.kill(now);
        }
    }

    fn end(&mut self, how: Ending, wait: Duration, now: Duration) {
        self.phase = Phase::Ending(how);
        self.deadline = Some(now + wait);
    }

    fn close(&mut self, how: &str) {
        let reported = self.went_off.take().map(|word| format!("{word}, ")).unwrap_or_default();
        self.decide(StopReason::Vanished, Witness::Inferred, format!("{reported}{how}"));
        self.phase = Phase::Ended;
        self.deadline = None;
    }

    /// Where the machine stands.
    #[must_use]
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Booting => State::Booting,
            Phase::Running => State::Running,
            Phase::Ending(_) => State::Stopping,
            Phase::Ended => State::Stopped,
        }
    }
}

/// Reasons that only a host can see.
fn is_the_hosts(reason: StopReason) -> bool {
    match reason {
        StopReason::KernelPanic
        | StopReason::Vanished
        | StopReason::Garbage
        | StopReason::Silent
        | StopReason::Forbidden => true,
        StopReason::Requested
        | StopReason::BadCommandLine
        | StopReason::NoModule
        | StopReason::NoDisk
        | StopReason::RootCorrupt
        | StopReason::NotLockedDown
        | StopReason::BadTenant
        | StopReason::NoUplink
        | StopReason::UplinkFailed
        | StopReason::BadControl
        | StopReason::NoLease
        | StopReason::BadLease
        | StopReason::NoTunnel
        | StopReason::Stale
        | StopReason::LeaseExpired
        | StopReason::ProcessDied
        | StopReason::Internal => false,
    }
}

fn cut(words: String) -> String {
    match words.char_indices().nth(DETAIL_MAX) {
        Some((end, _)) => words[..end].to_owned(),
        None => words,
    }
}

#[cfg(test)]
mod tests;
