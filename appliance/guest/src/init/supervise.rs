//! The session's life: what each event means once there is a tunnel, and what it means to the steps before
//! that for which it is not meant. How long the session lasts, [`Life`] decides; here is done what it says.

use super::control::name;
use super::events::{Event, Events};
use super::lease::{BootKey, Granted};
use super::life::{Action, Life};
use super::log::say;
use super::stop::{End, Stop};
use crate::clock::Moment;
use crate::link::{FromTunnel, ToTunnel};
use kontor_release::CommandLine;
use kontor_trust::TrustedKeyset;
use kontor_wire::control::{FromGuest, FromHost};
use rustix::process::{Pid, Signal, WaitStatus, kill_process};
use std::time::Duration;

/// How long the tunnel may take to close.
const CLOSE_MAX: Duration = Duration::from_millis(500);

/// The processes that are watched, and how long they may live.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// The session cannot do without it.
    pub(crate) tunnel: Option<Pid>,
    /// Tests cannot.
    pub(crate) probe: Option<Pid>,
}

impl Watched {
    /// What an event means when nothing in particular is waited for.
    pub(crate) fn handle(&mut self, event: Event) -> Result<(), Stop> {
        match event {
            Event::Host(message) => Self::host(&message),
            Event::Child(pid, status) => self.child(pid, status),
            Event::Tunnel(FromTunnel::Failed(fault)) => Err(Stop::Tunnel(fault)),
            Event::Tunnel(message @ (FromTunnel::Ready | FromTunnel::Up(_) | FromTunnel::Down)) => {
                say!("tunnel: {message:?}");
                Ok(())
            }
            // Whoever set a deadline, waits for the gateway or calls it looks at these before this.
            Event::Late | Event::Stood | Event::Post(_) | Event::Tunnel(FromTunnel::Heard) => Ok(()),
        }
    }

    fn host(message: &FromHost) -> Result<(), Stop> {
        match message {
            FromHost::PowerOff => Err(Stop::Requested),
            // Policy moves at the next start.
            FromHost::Nudge => {
                say!("host: something newer waits at the office");
                Ok(())
            }
            // Where nothing waits for a lease or the gateway, there is nothing yet that a sleep makes stale.
            FromHost::Woken => Ok(()),
            FromHost::Hello { .. } | FromHost::Lease(_) | FromHost::Refused => {
                Err(Stop::Unasked(name(message)))
            }
        }
    }

    fn child(&mut self, pid: Pid, status: WaitStatus) -> Result<(), Stop> {
        if self.tunnel == Some(pid) {
            self.tunnel = None;
            return Err(Stop::TunnelDied(End(status)));
        }
        if self.probe == Some(pid) {
            self.probe = None;
            say!("the probe ended ({})", End(status));
        }
        Ok(())
    }
}

/// What the leases of a boot are asked for with, and what follows from them.
pub(crate) struct Lessee<'a> {
    pub(crate) key: &'a mut BootKey,
    pub(crate) line: &'a CommandLine,
    pub(crate) floor: &'a TrustedKeyset,
    /// Sets the clock and whatever else a lease in force decides.
    pub(crate) adopt: fn(&Granted) -> Result<(), Stop>,
}

/// Until when [`attend`] goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// The gateway has confirmed the boot.
    Admitted,
    /// Something ends it.
    TheEnd,
}

/// Does what keeps the boot's lease alive, and sees to everything else that happens.
pub(crate) fn attend(
    events: &mut Events,
    watched: &mut Watched,
    life: &mut Life,
    lessee: &mut Lessee<'_>,
    until: Until,
) -> Result<(), Stop> {
    loop {
        while let Some(action) = life.poll_action() {
            act(action, events, watched, life, lessee)?;
        }
        if until == Until::Admitted && life.is_admitted() {
            return Ok(());
        }
        let event = events.next(Some(life.next_timeout()))?;
        let now = Moment::now();
        match event {
            Event::Late => life.timeout(now)?,
            Event::Stood => {
                say!("the machine stood still");
                life.woken(now);
            }
            Event::Host(FromHost::Woken) => {
                say!("host: it has slept");
                life.woken(now);
            }
            Event::Post(outcome) => life.answered(outcome, now)?,
            Event::Tunnel(FromTunnel::Heard) => life.heard(now),
            Event::Host(FromHost::Nudge) => life.nudge(now),
            Event::Host(FromHost::Refused) => life.refused(now)?,
            Event::Host(FromHost::Lease(untrusted)) => {
                life.leased(untrusted, lessee.floor, lessee.line.built_at, now)?;
            }
            Event::Host(FromHost::Hello { .. } | FromHost::PowerOff)
            | Event::Tunnel(
                FromTunnel::Ready | FromTunnel::Up(_) | FromTunnel::Down | FromTunnel::Failed(_),
            )
            | Event::Child(..) => watched.handle(event)?,
        }
    }
}

fn act(
    action: Action,
    events: &mut Events,
    watched: &mut Watched,
    life: &mut Life,
    lessee: &mut Lessee<'_>,
) -> Result<(), Stop> {
    match action {
        Action::Ask => {
            let now = Moment::now();
            let (challenge, fresh) = lessee
                .key
                .challenge(lessee.line.verity.root_hash, lessee.floor, now)
                .map_err(|source| Stop::System { doing: "make a challenge", source })?;
            events.tell_host(&FromGuest::Challenge(challenge))?;
            life.asked(fresh, now);
        }
        Action::Call(to, lease_hash) => {
            if let Err(error) = events.call(to, &lease_hash) {
                life.answered(Err(error), Moment::now())?;
            }
        }
        Action::HangUp => events.hang_up(),
        Action::Reconnect => events.tell_tunnel(&ToTunnel::Reconnect)?,
        Action::Adopt => {
            let lease = life.lease().checked();
            say!("lease of {}, revision {}", lease.lease_hash, lease.lease.revision);
            (lessee.adopt)(life.lease())?;
        }
        Action::CloseTunnel => {
            close_tunnel(events, watched)?;
            if let Some(pid) = watched.tunnel.take() {
                // Ended already, or ended now.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
    Ok(())
}

/// Keeps the session until something ends it; the tunnel is closed then.
pub(crate) fn run(
    events: &mut Events,
    mut watched: Watched,
    mut life: Life,
    lessee: &mut Lessee<'_>,
) -> Stop {
    let stop = match attend(events, &mut watched, &mut life, lessee, Until::TheEnd) {
        Ok(()) => Stop::LeaseExpired,
        Err(stop) => stop,
    };
    // Why the guest stops is decided.
    drop(close_tunnel(events, &mut watched));
    stop
}

/// Lets the tunnel forget its keys and end. `Err` when the host has asked for the guest's end meanwhile.
fn close_tunnel(events: &mut Events, watched: &mut Watched) -> Result<(), Stop> {
    let until = Moment::now().after(CLOSE_MAX);
    if watched.tunnel.is_none() || events.tell_tunnel(&ToTunnel::Close).is_err() {
        return Ok(());
    }
    while watched.tunnel.is_some() {
        match events.next(Some(until)) {
            Ok(Event::Late) => return Ok(()),
            Ok(Event::Host(FromHost::PowerOff)) => return Err(Stop::Requested),
            // Its end is what is waited for; of the rest nothing matters any more.
            Ok(event) => drop(watched.handle(event)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::control::tests::Host;
    use crate::init::fixture::{ISSUED_AT, Office};
    use crate::link::{Link, TunnelFault};
    use kontor_release::{Digest, Verity};
    use kontor_wire::control::LeaseParts;
    use kontor_wire::reason::StopReason;
    use std::process::Command;

    const FAR_MS: u64 = 15_000;

    fn ended(script: &str) -> (Pid, WaitStatus) {
        let mut child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let ended = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        // Reaped already, which is how PID 1 learns of it.
        drop(child.try_wait());
        ended.unwrap().unwrap()
    }

    /// A session whose lease has `left_ms` to go.
    fn run_for(events: &mut Events, left_ms: u64) -> Stop {
        let office = Office::new();
        let (mut key, _) = BootKey::generate().unwrap();
        let verity = Verity { root_hash: Digest([3; 32]), salt: [0; 32], data_blocks: 1 };
        let line = CommandLine { verity, built_at: ISSUED_AT, test: false };
        let floor = office.floor();
        let (challenge, fresh) = key.challenge(line.verity.root_hash, &floor, Moment::now()).unwrap();
        let granted = fresh.verify(office.answer(&challenge), &floor, ISSUED_AT).unwrap();
        let watched = Watched::default();
        let mut lessee = Lessee { key: &mut key, line: &line, floor: &floor, adopt: |_| Ok(()) };
        let life = Life::new(
            granted.ending(Moment::now().after(Duration::from_millis(left_ms))),
            || 0,
            Moment::now(),
        );
        run(events, watched, life, &mut lessee)
    }

    #[test]
    fn tunnels_death_ends_the_session_whatever_its_code() {
        for script in ["exit 0", "exit 3", "kill -9 $$"] {
            let (pid, status) = ended(script);
            let mut watched = Watched { tunnel: Some(pid), probe: None };
            let stop = watched.handle(Event::Child(pid, status)).unwrap_err();
            assert_eq!(stop.reason(), StopReason::ProcessDied, "{script}");
        }
    }

    #[test]
    fn death_of_the_probe_or_of_an_orphan_does_not() {
        let (pid, status) = ended("exit 1");
        let mut watched = Watched { tunnel: None, probe: Some(pid) };
        assert!(watched.handle(Event::Child(pid, status)).is_ok());
        assert_eq!(watched.probe, None);
        assert!(watched.handle(Event::Child(pid, status)).is_ok());
    }

    #[test]
    fn host_that_asks_for_it_ends_the_session() {
        let (mut host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        host.send(&FromHost::Nudge);
        host.send(&FromHost::PowerOff);
        let stop = run_for(&mut events, FAR_MS);
        assert!(matches!(stop, Stop::Requested), "{stop}");
    }

    #[test]
    fn sessions_are_dropped_when_the_host_says_that_it_has_slept() {
        let (mut host, control) = Host::connected();
        let (init, tunnel) = Link::pair().unwrap();
        let mut events = Events::new(control, None).unwrap();
        events.add_tunnel(init).unwrap();
        host.send(&FromHost::Woken);
        host.send(&FromHost::PowerOff);
        let stop = run_for(&mut events, FAR_MS);
        assert!(matches!(stop, Stop::Requested), "{stop}");
        assert!(matches!(tunnel.receive().unwrap(), Some(ToTunnel::Reconnect)));
    }

    #[test]
    fn lease_that_nobody_asked_for_ends_the_session() {
        for message in [FromHost::Lease(LeaseParts::default()), FromHost::Refused] {
            let (mut host, control) = Host::connected();
            let mut events = Events::new(control, None).unwrap();
            host.send(&message);
            let stop = run_for(&mut events, FAR_MS);
            assert_eq!(stop.reason(), StopReason::BadControl, "{stop}");
        }
    }

    #[test]
    fn end_of_the_lease_ends_the_session() {
        let (_host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        let ends = Moment::now().after(Duration::from_millis(30));
        let stop = run_for(&mut events, 30);
        assert_eq!(stop.reason(), StopReason::LeaseExpired, "{stop}");
        assert!(Moment::now() >= ends);
    }

    #[test]
    fn host_that_is_gone_ends_the_session() {
        let (host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        drop(host);
        let stop = run_for(&mut events, FAR_MS);
        assert_eq!(stop.reason(), StopReason::BadControl, "{stop}");
    }

    #[test]
    fn tunnel_that_gives_up_ends_the_session_and_one_that_is_down_does_not() {
        let (_host, control) = Host::connected();
        let (init, tunnel) = Link::pair().unwrap();
        let mut events = Events::new(control, None).unwrap();
        events.add_tunnel(init).unwrap();
        tunnel.send(&FromTunnel::Down).unwrap();
        tunnel.send(&FromTunnel::Failed(TunnelFault::Uplink)).unwrap();
        let stop = run_for(&mut events, FAR_MS);
        assert_eq!(stop.reason(), StopReason::UplinkFailed, "{stop}");
    }
}
