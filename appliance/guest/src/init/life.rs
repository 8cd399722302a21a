//! The life of a boot's leases (`lease.md` 19 and 21 to 23), decided. No IO and no clock: what happens and `now`
//! go in, [`Action`]s come out.
//!
//! ```text
//!   first Hello ──admitted──► Resting ──half-life, Nudge──► Asking ──lease──► Confirming ──admitted──┐
//!       │                        ▲  ▲                         │ refused, bad      │ stale, no answer │
//!       │ stale, no answer       │  └──────── 5 to 30 s ──────┴───────────────────┘                  │
//!       ▼                        └────────── the new lease replaces the old one ─────────────────────┘
//!     Stop                 the lease's end, or silence ──► Lapsed ──lapse_off_s──► Stop
//! ```
//!
//! A new lease counts from the moment the gateway has confirmed it through the tunnel; until then the old one
//! and its end hold. While no packet comes in, a `Hello` is what provokes one.

use super::lease::{Fresh, Granted, RenewError};
use super::log::say;
use super::post::CallError;
use super::stop::Stop;
use crate::chain;
use crate::clock::Moment;
use kontor_trust::{Digest, TrustedKeyset};
use kontor_wire::control::LeaseParts;
use kontor_wire::post::{FromPost, PORT};
use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::time::Duration;

/// How long the first `Hello` of a boot may take, with all its repetitions.
const GREET_MAX: Duration = Duration::from_secs(20);
/// How long the gateway may take to confirm a renewed lease: control tells it at the same time as the host.
const CONFIRM_MAX: Duration = Duration::from_secs(10);
/// How long one call may take.
const CALL_MAX: Duration = Duration::from_secs(4);
/// Between two calls that are to achieve the same.
const CALL_PAUSE: Duration = Duration::from_millis(500);
/// Least time between two challenges, and until one is tried again.
const RETRY_MIN: Duration = Duration::from_secs(5);
/// Most time until a challenge is tried again.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// A call because of silence is made after this part of the time that silence may last, and again after as long.
const SILENCE_PARTS: u32 = 4;

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send a challenge to the host, and say so by [`Life::asked`].
    Ask,
    /// Call the post; how that ends comes back by [`Life::answered`].
    Call(SocketAddrV4, Digest),
    /// Give the call up.
    HangUp,
    /// The lease in force is a new one: set what follows from it.
    Adopt,
    /// Drop the tunnel's sessions and open a new one.
    Reconnect,
    /// Close the tunnel for good.
    CloseTunnel,
}

/// Where the next lease stands.
#[derive(Debug)]
enum Renewal {
    /// It is asked for then.
    Resting { at: Moment },
    /// It is about to be asked for.
    Due,
    /// It was asked for.
    Asking(Fresh),
    /// It was asked for too long ago: the answer, which the host still owes, will not be used.
    Overdue,
    /// It came, and the gateway has to confirm it.
    Confirming { lease: Box<Granted>, until: Moment },
}

/// Where the calls to the post stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Calls {
    /// None is needed before then.
    Next { at: Moment },
    /// One is under way, and is given up then.
    Under { until: Moment },
}

/// Why there is no tunnel any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lapse {
    Expired,
    Silent,
}

/// The leases of one boot, from the first session with the gateway on.
#[derive(Debug)]
pub(crate) struct Life {
    lease: Granted,
    /// Until when the first `Hello` must be answered; none once it was.
    greet_until: Option<Moment>,
    renewal: Renewal,
    calls: Calls,
    nudged: bool,
    /// When something of the gateway's last came.
    heard_at: Moment,
    /// When the last challenge was sent.
    asked_at: Moment,
    /// Why and when the power goes off.
    lapse: Option<(Lapse, Moment)>,
    random: fn() -> u32,
    actions: VecDeque<Action>,
}

impl Life {
    /// A boot that has this lease and, since `now`, a session with the gateway.
    pub(crate) fn new(lease: Granted, random: fn() -> u32, now: Moment) -> Self {
        let asked_at = lease.asked_at();
        let mut life = Self {
            lease,
            greet_until: Some(now.after(GREET_MAX)),
            renewal: Renewal::Resting { at: now },
            calls: Calls::Next { at: now },
            nudged: false,
            heard_at: now,
            asked_at,
            lapse: None,
            random,
            actions: VecDeque::new(),
        };
        life.rest();
        life
    }

    /// The next thing to do. Drain this after everything else.
    pub(crate) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The lease in force.
    pub(crate) fn lease(&self) -> &Granted {
        &self.lease
    }

    /// Whether the gateway has confirmed this boot.
    pub(crate) fn is_admitted(&self) -> bool {
        self.greet_until.is_none()
    }

    /// When [`Life::timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Moment {
        if let Some((_, off_at)) = self.lapse {
            return off_at;
        }
        let calls = match self.calls {
            Calls::Next { at: moment } | Calls::Under { until: moment } => moment,
        };
        let renewal = match &self.renewal {
            Renewal::Resting { at } if self.is_admitted() => Some(*at),
            Renewal::Asking(fresh) => Some(fresh.until()),
            Renewal::Confirming { until, .. } => Some(*until),
            Renewal::Resting { .. } | Renewal::Due | Renewal::Overdue => None,
        };
        let ends = [self.lease.ends(), self.silent_at(), calls];
        ends.into_iter().chain(renewal).chain(self.greet_until).min().unwrap_or(calls)
    }

    /// Some of what [`Life::next_timeout`] waited for has come.
    pub(crate) fn timeout(&mut self, now: Moment) -> Result<(), Stop> {
        if let Some((why, off_at)) = self.lapse {
            return if now < off_at { Ok(()) } else { Err(why.stop()) };
        }
        if now >= self.lease.ends() {
            self.lapse(Lapse::Expired, now);
            return Ok(());
        }
        if now >= self.silent_at() {
            self.lapse(Lapse::Silent, now);
            return Ok(());
        }
        if let Calls::Under { until } = self.calls
            && now >= until
        {
            self.actions.push_back(Action::HangUp);
            self.answered(Err(CallError::Late), now)?;
        }
        if self.greet_until.is_some_and(|until| now >= until) {
            return Err(Stop::NoTunnel);
        }
        match &self.renewal {
            Renewal::Resting { at } if self.is_admitted() && now >= *at => {
                self.renewal = Renewal::Due;
                self.actions.push_back(Action::Ask);
            }
            Renewal::Asking(fresh) if now >= fresh.until() => {
                say!("the host has not answered the challenge in time");
                self.renewal = Renewal::Overdue;
            }
            Renewal::Confirming { until, .. } if now >= *until => {
                say!("the gateway did not confirm the renewed lease in time");
                self.retry(now);
            }
            Renewal::Resting { .. }
            | Renewal::Due
            | Renewal::Asking(_)
            | Renewal::Overdue
            | Renewal::Confirming { .. } => {}
        }
        if let Calls::Next { at } = self.calls
            && now >= at
        {
            self.call(now);
        }
        Ok(())
    }

    /// Something came from the gateway.
    pub(crate) fn heard(&mut self, now: Moment) {
        self.heard_at = now;
        if let (Calls::Next { .. }, true, Renewal::Resting { .. }) =
            (self.calls, self.is_admitted(), &self.renewal)
        {
            self.calls = Calls::Next { at: now.after(self.silence_part()) };
        }
    }

    /// Something newer waits at the office.
    pub(crate) fn nudge(&mut self, now: Moment) {
        match &mut self.renewal {
            Renewal::Resting { at } => *at = (*at).min(now.max(self.asked_at.after(RETRY_MIN))),
            Renewal::Due | Renewal::Asking(_) | Renewal::Overdue | Renewal::Confirming { .. } => {
                self.nudged = true;
            }
        }
    }

    /// The machine has slept, or its host has (`lease.md` 21): a new session, a new lease, and a silence that begins now. The
    /// lease's end stays where it was.
    pub(crate) fn woken(&mut self, now: Moment) {
        if self.lapse.is_some() || now >= self.lease.ends() {
            return;
        }
        self.heard_at = now;
        self.actions.push_back(Action::Reconnect);
        if let Calls::Under { .. } = self.calls {
            self.actions.push_back(Action::HangUp);
        }
        self.calls = Calls::Next { at: now };
        self.nudge(now);
    }

    /// The challenge was sent.
    pub(crate) fn asked(&mut self, fresh: Fresh, now: Moment) {
        self.asked_at = now;
        self.renewal = Renewal::Asking(fresh);
    }

    /// The host has no lease for the challenge.
    pub(crate) fn refused(&mut self, now: Moment) -> Result<(), Stop> {
        match &self.renewal {
            Renewal::Asking(_) | Renewal::Overdue => {
                say!("the host has no new lease");
                self.retry(now);
                Ok(())
            }
            Renewal::Resting { .. } | Renewal::Due | Renewal::Confirming { .. } => {
                if self.lapse.is_some() {
                    Ok(())
                } else {
                    Err(Stop::Unasked("Refused"))
                }
            }
        }
    }

    /// The host has an answer to the challenge.
    pub(crate) fn leased(
        &mut self,
        untrusted: LeaseParts,
        floor: &TrustedKeyset,
        built_at: u64,
        now: Moment,
    ) -> Result<(), Stop> {
        if self.lapse.is_some() {
            return Ok(());
        }
        match std::mem::replace(&mut self.renewal, Renewal::Overdue) {
            Renewal::Asking(fresh) if now < fresh.until() => {
                let granted = fresh.verify(untrusted, floor, built_at).map_err(RenewError::from);
                match granted.and_then(|lease| lease.follow(&self.lease)) {
                    Ok(lease) => {
                        let until = now.after(CONFIRM_MAX);
                        self.renewal = Renewal::Confirming { lease: Box::new(lease), until };
                        self.call(now);
                    }
                    Err(error) => {
                        say!("a renewed lease is not to be believed: {}", chain(&error));
                        self.retry(now);
                    }
                }
                Ok(())
            }
            Renewal::Asking(_) | Renewal::Overdue => {
                self.retry(now);
                Ok(())
            }
            Renewal::Resting { .. } | Renewal::Due | Renewal::Confirming { .. } => {
                Err(Stop::Unasked("Lease"))
            }
        }
    }

    /// A call has ended.
    pub(crate) fn answered(&mut self, outcome: Result<FromPost, CallError>, now: Moment) -> Result<(), Stop> {
        if self.lapse.is_some() {
            return Ok(());
        }
        let expected = self.expected();
        let compared = match outcome {
            Ok(FromPost::Admitted(newest)) => expected.compare(&newest, now),
            Ok(FromPost::Refused(refusal)) => {
                say!("post: {refusal}");
                self.calls = Calls::Next { at: now.after(CALL_PAUSE) };
                return Ok(());
            }
            Err(error) => {
                say!("post: {}", chain(&error));
                self.calls = Calls::Next { at: now.after(CALL_PAUSE) };
                return Ok(());
            }
        };
        self.calls = Calls::Next { at: now.after(self.silence_part()) };
        match compared {
            Ok(()) => {
                self.greet_until = None;
                self.confirm();
                Ok(())
            }
            Err(stale) if !self.is_admitted() => Err(Stop::Stale(stale)),
            Err(stale) => {
                say!("post: {stale}");
                match &self.renewal {
                    Renewal::Confirming { .. } => self.retry(now),
                    Renewal::Resting { .. } | Renewal::Due | Renewal::Asking(_) | Renewal::Overdue => {
                        self.nudge(now);
                    }
                }
                Ok(())
            }
        }
    }

    /// The lease that the gateway is asked about.
    fn expected(&self) -> &Granted {
        match &self.renewal {
            Renewal::Confirming { lease, .. } => lease,
            Renewal::Resting { .. } | Renewal::Due | Renewal::Asking(_) | Renewal::Overdue => &self.lease,
        }
    }

    /// A lease that was waiting for the gateway's word replaces the one before.
    fn confirm(&mut self) {
        match std::mem::replace(&mut self.renewal, Renewal::Overdue) {
            Renewal::Confirming { lease, .. } => {
                self.lease = *lease;
                self.actions.push_back(Action::Adopt);
                self.rest();
            }
            other @ (Renewal::Resting { .. } | Renewal::Due | Renewal::Asking(_) | Renewal::Overdue) => {
                self.renewal = other;
            }
        }
    }

    fn call(&mut self, now: Moment) {
        if let Calls::Under { .. } = self.calls {
            self.actions.push_back(Action::HangUp);
        }
        let lease = self.expected();
        let (post, hash) = (lease.post(), lease.checked().lease_hash);
        self.calls = Calls::Under { until: now.after(CALL_MAX) };
        // A lease that was checked names a gateway of its bundle.
        self.actions.extend(post.map(|post| Action::Call(SocketAddrV4::new(post, PORT), hash)));
    }

    /// Waits for the half of the lease's life, a tenth of it more or less.
    fn rest(&mut self) {
        let half = self.lease.life() / 2;
        let at = self.lease.asked_at().after(half - half / 10 + self.part_of(half / 5));
        let at = if std::mem::take(&mut self.nudged) { self.asked_at.after(RETRY_MIN).min(at) } else { at };
        self.renewal = Renewal::Resting { at };
    }

    /// Waits before the next challenge: 5 to 30 s, less where the lease ends before that.
    fn retry(&mut self, now: Moment) {
        self.nudged = false;
        let most = (self.lease.ends().since(now) / 2).clamp(RETRY_MIN, RETRY_MAX);
        let at = now.after(RETRY_MIN + self.part_of(most.saturating_sub(RETRY_MIN)));
        self.renewal = Renewal::Resting { at };
    }

    /// Somewhere from nothing to all of `span`.
    fn part_of(&self, span: Duration) -> Duration {
        span.mul_f64(f64::from((self.random)()) / f64::from(u32::MAX))
    }

    fn silent_at(&self) -> Moment {
        self.heard_at.after(self.lease.silence())
    }

    fn silence_part(&self) -> Duration {
        self.lease.silence() / SILENCE_PARTS
    }

    fn lapse(&mut self, why: Lapse, now: Moment) {
        say!("{}: the tunnel is closed", why.stop());
        if let Calls::Under { .. } = self.calls {
            self.actions.push_back(Action::HangUp);
        }
        self.actions.push_back(Action::CloseTunnel);
        self.lapse = Some((why, now.after(self.lease.lapse_off())));
    }
}

impl Lapse {
    fn stop(self) -> Stop {
        match self {
            Self::Expired => Stop::LeaseExpired,
            Self::Silent => Stop::Silent,
        }
    }
}

#[cfg(test)]
mod tests;
