//! Everything that PID 1 waits for, in one place: the host, its children, the tunnel, the
//! gateway's post, the time.

use super::control::{Control, ControlError};
use super::post::{Call, CallError};
use crate::clock::{Moment, timespec};
use crate::link::{FromTunnel, Link, LinkError, ToTunnel};
use kontor_trust::Digest;
use kontor_wire::control::{FromGuest, FromHost};
use kontor_wire::post::FromPost;
use rustix::event::epoll;
use rustix::io::{Errno, read};
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// One thing that happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// The host said something.
    Host(FromHost),
    /// A process ended and was reaped; orphans of others come here too.
    Child(Pid, WaitStatus),
    /// The tunnel said something.
    Tunnel(FromTunnel),
    /// The call to the gateway's post has ended.
    Post(Result<FromPost, CallError>),
    /// The machine stood still for [`STILL_MIN`] or longer, and a moment that was waited for came meanwhile.
    Stood,
    /// The moment that was waited for has come.
    Late,
}

/// Why nothing can be waited for any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventsError {
    #[error("the control channel")]
    Control(#[source] ControlError),
    #[error("the tunnel's socket")]
    Tunnel(#[source] LinkError),
    #[error("wait for events")]
    Wait(#[source] io::Error),
}

impl From<Errno> for EventsError {
    fn from(error: Errno) -> Self {
        Self::Wait(error.into())
    }
}

/// The sources of events, asked in turn.
#[derive(Debug)]
pub(crate) struct Events {
    set: OwnedFd,
    control: Control,
    /// Readable when children ended; only PID 1 reaps, so elsewhere there is none.
    children: Option<OwnedFd>,
    tunnel: Option<Link>,
    call: Option<Call>,
    /// When the machine was last seen to run.
    ran_at: Moment,
    now: fn() -> Moment,
}

/// How late a moment has to be noticed for the machine to have stood still: its host slept, or had no time for it.
/// More than a busy host keeps a machine waiting.
const STILL_MIN: Duration = Duration::from_secs(5);

impl Events {
    /// Waits for the host, and for children when `children` says when there are some.
    pub(crate) fn new(control: Control, children: Option<OwnedFd>) -> Result<Self, EventsError> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (ran_at, now) = (Moment::now(), Moment::now as fn() -> Moment);
        let events = Self { set, control, children, tunnel: None, call: None, ran_at, now };
        events.watch(events.control.as_fd())?;
        if let Some(children) = &events.children {
            events.watch(children.as_fd())?;
        }
        Ok(events)
    }

    fn watch(&self, source: BorrowedFd<'_>) -> Result<(), EventsError> {
        Ok(epoll::add(&self.set, source, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?)
    }

    /// From now on waits for the tunnel too.
    pub(crate) fn add_tunnel(&mut self, link: Link) -> Result<(), EventsError> {
        self.watch(link.as_fd())?;
        self.tunnel = Some(link);
        Ok(())
    }

    /// Calls the gateway's post; how that ends comes as an event. A call before it is given up.
    pub(crate) fn call(&mut self, to: SocketAddrV4, lease_hash: &Digest) -> Result<(), CallError> {
        let call = Call::begin(to, lease_hash)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&self.set, &call, epoll::EventData::new_u64(0), edges)?;
        self.call = Some(call);
        Ok(())
    }

    /// Gives the call up.
    pub(crate) fn hang_up(&mut self) {
        self.call = None;
    }

    /// Says something to the host.
    pub(crate) fn tell_host(&self, message: &FromGuest) -> Result<(), EventsError> {
        self.control.send(message).map_err(EventsError::Control)
    }

    /// Says something to the tunnel.
    pub(crate) fn tell_tunnel(&self, message: &ToTunnel) -> Result<(), EventsError> {
        let link = self.tunnel.as_ref().ok_or(EventsError::Tunnel(LinkError::Gone))?;
        link.send(message).map_err(EventsError::Tunnel)
    }

    /// The next event; [`Event::Late`] at `until` even when others wait, so that nobody can hold up a
    /// deadline by talking; but [`Event::Stood`] before it, once, as a deadline that passed while the machine stood
    /// still is another thing.
    pub(crate) fn next(&mut self, until: Option<Moment>) -> Result<Event, EventsError> {
        loop {
            let now = (self.now)();
            let ran_at = std::mem::replace(&mut self.ran_at, now);
            if until.is_some_and(|until| stood_still(until, ran_at, now)) {
                return Ok(Event::Stood);
            }
            let left = until.map(|until| until.since(now));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Event::Late);
            }
            if let Some(event) = self.take()? {
                return Ok(event);
            }
            let nothing =
                epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
            match epoll::wait(&self.set, &mut [nothing; 4], left.map(timespec).as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What has happened already: what the tunnel still said comes before its end.
    fn take(&mut self) -> Result<Option<Event>, EventsError> {
        if let Some(link) = &self.tunnel {
            match link.receive() {
                Ok(Some(message)) => return Ok(Some(Event::Tunnel(message))),
                Ok(None) => {}
                Err(LinkError::Gone) => {
                    // That it ended comes as a child's end.
                    epoll::delete(&self.set, link)?;
                    self.tunnel = None;
                }
                Err(error) => return Err(EventsError::Tunnel(error)),
            }
        }
        if let Some(children) = &self.children {
            clear(children.as_fd())?;
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => return Ok(Some(Event::Child(pid, status))),
                Ok(None) | Err(Errno::CHILD | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(outcome) = self.call.as_mut().and_then(Call::proceed) {
            self.call = None;
            return Ok(Some(Event::Post(outcome)));
        }
        self.control.receive().map(|message| message.map(Event::Host)).map_err(EventsError::Control)
    }
}

/// Whether the machine stood still since it was seen to run at `ran_at`, past the moment `until`.
fn stood_still(until: Moment, ran_at: Moment, now: Moment) -> bool {
    now.since(until.max(ran_at)) >= STILL_MIN
}

/// Takes the pending signals, so that the descriptor is readable again only after the next one.
fn clear(signals: BorrowedFd<'_>) -> Result<(), EventsError> {
    /// `struct signalfd_siginfo`
    const RECORD: usize = 128;
    let mut records = [0; 4 * RECORD];
    loop {
        match read(signals, &mut records) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::control::tests::Host;
    use std::time::Duration;

    fn soon() -> Option<Moment> {
        Some(Moment::now().after(Duration::from_secs(20)))
    }

    #[test]
    fn host_and_tunnel_are_both_heard() {
        let (mut host, control) = Host::connected();
        let (init, tunnel) = Link::pair().unwrap();
        let mut events = Events::new(control, None).unwrap();
        events.add_tunnel(init).unwrap();
        host.send(&FromHost::Nudge);
        tunnel.send(&FromTunnel::Up(1)).unwrap();
        assert!(matches!(events.next(soon()).unwrap(), Event::Tunnel(FromTunnel::Up(1))));
        assert!(matches!(events.next(soon()).unwrap(), Event::Host(FromHost::Nudge)));
    }

    #[test]
    fn deadline_comes_although_the_host_talks() {
        let (mut host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        host.send(&FromHost::Nudge);
        assert!(matches!(events.next(Some(Moment::now())).unwrap(), Event::Late));
    }

    #[test]
    fn end_of_a_call_is_heard_and_one_that_was_given_up_is_not() {
        let (mut host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        let desk = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let std::net::SocketAddr::V4(address) = desk.local_addr().unwrap() else { panic!("no IPv4 address") };
        events.call(address, &Digest([1; 32])).unwrap();
        drop(desk.accept().unwrap());
        assert!(matches!(events.next(soon()).unwrap(), Event::Post(Err(_))));
        events.call(address, &Digest([1; 32])).unwrap();
        events.hang_up();
        drop(desk.accept().unwrap());
        host.send(&FromHost::Nudge);
        assert!(matches!(events.next(soon()).unwrap(), Event::Host(FromHost::Nudge)));
    }

    #[test]
    fn standstill_is_told_once_and_before_the_deadline_that_passed_in_it() {
        let (mut host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        host.send(&FromHost::Nudge);
        let passed = Some(Moment::now());
        assert!(matches!(events.next(passed).unwrap(), Event::Late));
        events.now = || Moment::now().after(STILL_MIN + Duration::from_secs(600));
        assert!(matches!(events.next(passed).unwrap(), Event::Stood));
        assert!(matches!(events.next(passed).unwrap(), Event::Late));
        let soon = Some((events.now)().after(Duration::from_secs(20)));
        assert!(matches!(events.next(soon).unwrap(), Event::Host(FromHost::Nudge)));
    }

    #[test]
    fn machine_stood_still_when_it_is_late_by_more_than_it_was_seen_to_run() {
        let begin = Moment::now();
        let at = |seconds| begin.after(Duration::from_secs(seconds));
        let just_short = at(100).after(STILL_MIN - Duration::from_nanos(1));
        assert!(stood_still(at(100), at(90), at(100).after(STILL_MIN)));
        assert!(!stood_still(at(100), at(90), just_short));
        // Also when the deadline was over already.
        assert!(stood_still(at(10), at(100), at(100).after(STILL_MIN)));
        assert!(!stood_still(at(10), at(100), just_short));
        // Where nothing was missed there is nothing to tell.
        assert!(!stood_still(at(1000), at(100), at(900)));
        assert!(!stood_still(at(100), at(90), at(0)));
    }

    #[test]
    fn deadline_comes_in_silence() {
        let (_host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        let until = Moment::now().after(Duration::from_millis(20));
        assert!(matches!(events.next(Some(until)).unwrap(), Event::Late));
        assert!(Moment::now() >= until);
    }

    #[test]
    fn last_word_of_a_tunnel_is_heard_and_its_silence_waits_for_the_rest() {
        let (mut host, control) = Host::connected();
        let (init, tunnel) = Link::pair().unwrap();
        let mut events = Events::new(control, None).unwrap();
        events.add_tunnel(init).unwrap();
        tunnel.send(&FromTunnel::Down).unwrap();
        drop(tunnel);
        assert!(matches!(events.next(soon()).unwrap(), Event::Tunnel(FromTunnel::Down)));
        host.send(&FromHost::PowerOff);
        assert!(matches!(events.next(soon()).unwrap(), Event::Host(FromHost::PowerOff)));
        assert!(matches!(events.tell_tunnel(&ToTunnel::Close), Err(EventsError::Tunnel(LinkError::Gone))));
    }
}
