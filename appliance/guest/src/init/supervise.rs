//! The session's life: what each event means once the guest is ready, and what it means to the steps
//! before that for which it is not meant.

use super::control::name;
use super::events::{Event, Events};
use super::log::say;
use super::stop::{End, Stop};
use crate::clock::Moment;
use crate::link::{FromTunnel, ToTunnel};
use kontor_wire::control::FromHost;
use rustix::process::{Pid, WaitStatus};
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
            Event::Tunnel(message @ (FromTunnel::Ready | FromTunnel::Up | FromTunnel::Down)) => {
                say!("tunnel: {message:?}");
                Ok(())
            }
            // Whoever set a deadline looks at it before this.
            Event::Late => Ok(()),
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

/// Keeps the session until something ends it; the tunnel is closed then.
pub(crate) fn run(events: &mut Events, mut watched: Watched, ends: Moment) -> Stop {
    loop {
        let outcome = match events.next(Some(ends)) {
            Ok(Event::Late) => Err(Stop::LeaseExpired),
            Ok(event) => watched.handle(event),
            Err(error) => Err(error.into()),
        };
        if let Err(stop) = outcome {
            close_tunnel(events, &mut watched);
            return stop;
        }
    }
}

/// Lets the tunnel forget its keys and end; whoever does not is killed with everybody else.
fn close_tunnel(events: &mut Events, watched: &mut Watched) {
    let until = Moment::now().after(CLOSE_MAX);
    if watched.tunnel.is_none() || events.tell_tunnel(&ToTunnel::Close).is_err() {
        return;
    }
    while watched.tunnel.is_some() {
        match events.next(Some(until)) {
            Ok(Event::Late) | Err(_) => return,
            // Why the guest stops is decided.
            Ok(event) => drop(watched.handle(event)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::control::tests::Host;
    use crate::link::{Link, TunnelFault};
    use kontor_wire::control::LeaseParts;
    use kontor_wire::reason::StopReason;
    use std::process::Command;

    fn ended(script: &str) -> (Pid, WaitStatus) {
        let mut child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let ended = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        // Reaped already, which is how PID 1 learns of it.
        drop(child.try_wait());
        ended.unwrap().unwrap()
    }

    fn far() -> Moment {
        Moment::now().after(Duration::from_secs(20))
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
        let stop = run(&mut events, Watched::default(), far());
        assert!(matches!(stop, Stop::Requested), "{stop}");
    }

    #[test]
    fn lease_that_nobody_asked_for_ends_the_session() {
        for message in [FromHost::Lease(LeaseParts::default()), FromHost::Refused] {
            let (mut host, control) = Host::connected();
            let mut events = Events::new(control, None).unwrap();
            host.send(&message);
            let stop = run(&mut events, Watched::default(), far());
            assert_eq!(stop.reason(), StopReason::BadControl, "{stop}");
        }
    }

    #[test]
    fn end_of_the_lease_ends_the_session() {
        let (_host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        let ends = Moment::now().after(Duration::from_millis(30));
        let stop = run(&mut events, Watched::default(), ends);
        assert_eq!(stop.reason(), StopReason::LeaseExpired, "{stop}");
        assert!(Moment::now() >= ends);
    }

    #[test]
    fn host_that_is_gone_ends_the_session() {
        let (host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        drop(host);
        let stop = run(&mut events, Watched::default(), far());
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
        let stop = run(&mut events, Watched::default(), far());
        assert_eq!(stop.reason(), StopReason::UplinkFailed, "{stop}");
    }
}
