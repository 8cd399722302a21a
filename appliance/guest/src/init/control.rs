//! The guest's end of the control channel: frames of `kontor_wire::control` over a virtio-serial port.
//!
//! A port whose host end is not open yet takes no byte and reports a hang-up at once, again and again;
//! so waiting is done on edges (epoll), never on levels.

use crate::clock::{Moment, timespec};
use kontor_wire::control::{FromGuest, FromHost, MAX_FROM_HOST, VERSION};
use kontor_wire::{Decoder, FrameError, encode};
use rustix::event::epoll;
use rustix::io::{Errno, read, write};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How long the host may take to open its end and to answer the guest's `Hello`.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long the host may take no byte.
const STALL_MAX: Duration = Duration::from_secs(5);
/// How long a host may take to close the channel once it was told why the guest stops.
const LINGER: Duration = Duration::from_millis(200);
/// Bytes read at a time: a page is what the port gives.
const CHUNK: usize = 4096;

/// What is wrong with the control channel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the host closed its end")]
    Gone,
    #[error("the host took no byte for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("the host did not say hello within {} s", HELLO_MAX.as_secs())]
    NoHello,
    #[error("the host wants to speak version {0}")]
    Version(u16),
    #[error("the host said {0} out of turn")]
    OutOfTurn(&'static str),
    #[error("the host sent what is no message")]
    Frame(#[source] FrameError),
    #[error("the port of the control channel")]
    Port(#[source] io::Error),
}

impl From<Errno> for ControlError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::CONNRESET | Errno::NODEV => Self::Gone,
            other => Self::Port(other.into()),
        }
    }
}

/// An open channel over which both sides have said hello.
#[derive(Debug)]
pub(crate) struct Control {
    port: OwnedFd,
    decoder: Decoder,
}

impl Control {
    /// Says hello and hears it from the host.
    pub(crate) fn connect(port: OwnedFd) -> Result<Self, ControlError> {
        let mut control = Self { port, decoder: Decoder::new(MAX_FROM_HOST) };
        let end = Moment::now().after(HELLO_MAX);
        let hello = FromGuest::Hello { oldest: VERSION, newest: VERSION, features: 0 };
        match write_all(control.port.as_fd(), &encode(&hello), HELLO_MAX) {
            Err(ControlError::Stalled(_)) => return Err(ControlError::NoHello),
            other => other?,
        }
        let edges = Edges::of(control.port.as_fd())?;
        loop {
            match control.receive()? {
                Some(FromHost::Hello { version: VERSION, .. }) => return Ok(control),
                Some(FromHost::Hello { version, .. }) => return Err(ControlError::Version(version)),
                Some(other) => return Err(ControlError::OutOfTurn(name(&other))),
                None if !edges.wait_until(end)? => return Err(ControlError::NoHello),
                None => {}
            }
        }
    }

    /// Sends one message, whole.
    pub(crate) fn send(&self, message: &FromGuest) -> Result<(), ControlError> {
        write_all(self.port.as_fd(), &encode(message), STALL_MAX)
    }

    /// The next message, `None` when more bytes must come first.
    pub(crate) fn receive(&mut self) -> Result<Option<FromHost>, ControlError> {
        let mut chunk = [0; CHUNK];
        loop {
            if let Some(message) = self.decoder.next_message().map_err(ControlError::Frame)? {
                return Ok(Some(message));
            }
            let room = self.decoder.room().min(CHUNK);
            match read(&self.port, &mut chunk[..room]) {
                Ok(0) => return Err(ControlError::Gone),
                Ok(count) => {
                    self.decoder.push(&chunk[..count]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

/// Sends the guest's last message over any descriptor of the channel, and gives the host a moment to
/// take it: it closes its end when it has. Errors are nobody's to handle any more.
pub(crate) fn send_last(port: BorrowedFd<'_>, message: &FromGuest) {
    let end = Moment::now().after(LINGER);
    if write_all(port, &encode(message), LINGER).is_err() {
        return;
    }
    let Ok(edges) = Edges::of(port) else { return };
    let mut chunk = [0; CHUNK];
    loop {
        match read(port, &mut chunk) {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR) if Moment::now() < end => {}
            Err(Errno::AGAIN) if matches!(edges.wait_until(end), Ok(true)) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

fn write_all(port: BorrowedFd<'_>, bytes: &[u8], limit: Duration) -> Result<(), ControlError> {
    let mut rest = bytes;
    let mut edges = None;
    let end = Moment::now().after(limit);
    while !rest.is_empty() {
        match write(port, rest) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let edges = match &edges {
                    Some(edges) => edges,
                    None => edges.insert(Edges::of(port)?),
                };
                if !edges.wait_until(end)? {
                    return Err(ControlError::Stalled(limit));
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reports each change of a port once.
struct Edges(OwnedFd);

impl Edges {
    fn of(port: BorrowedFd<'_>) -> Result<Self, ControlError> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&set, port, epoll::EventData::new_u64(0), flags)?;
        Ok(Self(set))
    }

    /// Waits for the next change; `false` when none came before `end`.
    fn wait_until(&self, end: Moment) -> Result<bool, ControlError> {
        loop {
            let left = end.since(Moment::now());
            if left.is_zero() {
                return Ok(false);
            }
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
            match epoll::wait(&self.0, &mut events, Some(&timespec(left))) {
                Ok(count) if count > 0 => return Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The message's name, without its content.
pub(crate) fn name(message: &FromHost) -> &'static str {
    match message {
        FromHost::Hello { .. } => "Hello",
        FromHost::Lease(_) => "Lease",
        FromHost::Refused => "Refused",
        FromHost::Nudge => "Nudge",
        FromHost::PowerOff => "PowerOff",
        FromHost::Woken => "Woken",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use kontor_wire::control::MAX_FROM_GUEST;
    use kontor_wire::reason::StopReason;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// The host's end of a channel, for tests.
    pub(crate) struct Host {
        pub(crate) stream: UnixStream,
        decoder: Decoder,
    }

    impl Host {
        pub(crate) fn pair() -> (Self, OwnedFd) {
            let (host, guest) = UnixStream::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            (Self { stream: host, decoder: Decoder::new(MAX_FROM_GUEST) }, guest.into())
        }

        pub(crate) fn send(&mut self, message: &FromHost) {
            self.stream.write_all(&encode(message)).unwrap();
        }

        pub(crate) fn receive(&mut self) -> FromGuest {
            loop {
                if let Some(message) = self.decoder.next_message().unwrap() {
                    return message;
                }
                let mut chunk = [0; 64];
                let count = self.stream.read(&mut chunk).unwrap();
                assert!(count > 0, "the guest closed its end");
                self.decoder.push(&chunk[..count]);
            }
        }

        /// A channel over which hello was said.
        pub(crate) fn connected() -> (Self, Control) {
            let (mut host, guest) = Self::pair();
            host.send(&FromHost::Hello { version: VERSION, features: 0 });
            let control = Control::connect(guest).unwrap();
            assert!(matches!(host.receive(), FromGuest::Hello { .. }));
            (host, control)
        }
    }

    #[test]
    fn both_sides_say_hello() {
        let (mut host, guest) = Host::pair();
        host.send(&FromHost::Hello { version: VERSION, features: 0 });
        Control::connect(guest).unwrap();
        assert_eq!(host.receive(), FromGuest::Hello { oldest: VERSION, newest: VERSION, features: 0 });
    }

    #[test]
    fn host_of_another_version_is_refused() {
        let (mut host, guest) = Host::pair();
        host.send(&FromHost::Hello { version: VERSION + 1, features: 0 });
        assert!(matches!(Control::connect(guest), Err(ControlError::Version(2))));
    }

    #[test]
    fn host_that_does_not_begin_with_hello_is_refused() {
        let (mut host, guest) = Host::pair();
        host.send(&FromHost::Nudge);
        assert!(matches!(Control::connect(guest), Err(ControlError::OutOfTurn("Nudge"))));
    }

    #[test]
    fn host_that_sends_no_message_is_refused() {
        let (mut host, guest) = Host::pair();
        host.stream.write_all(&[1, 0, 0, 0, 99]).unwrap();
        assert!(matches!(Control::connect(guest), Err(ControlError::Frame(_))));
        let (mut host, guest) = Host::pair();
        host.stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(Control::connect(guest), Err(ControlError::Frame(_))));
    }

    #[test]
    fn host_that_closes_its_end_is_noticed() {
        let (host, mut control) = Host::connected();
        drop(host);
        assert!(matches!(control.receive(), Err(ControlError::Gone)));
        assert!(matches!(control.send(&FromGuest::Ready), Err(ControlError::Gone)));
    }

    #[test]
    fn message_waits_until_the_host_has_taken_the_ones_before() {
        let (mut host, control) = Host::connected();
        let stuffed = FromGuest::Stop(StopReason::Requested);
        let messages = 400_000 / encode(&stuffed).len();
        let reader = std::thread::spawn(move || {
            for _ in 0..messages {
                assert_eq!(host.receive(), FromGuest::Stop(StopReason::Requested));
            }
        });
        for _ in 0..messages {
            control.send(&stuffed).unwrap();
        }
        reader.join().unwrap();
    }

    #[test]
    fn last_message_arrives_and_waits_for_the_host_to_close() {
        let (mut host, control) = Host::connected();
        let reader = std::thread::spawn(move || {
            assert_eq!(host.receive(), FromGuest::Stop(StopReason::NoLease));
        });
        let began = Moment::now();
        send_last(control.as_fd(), &FromGuest::Stop(StopReason::NoLease));
        reader.join().unwrap();
        assert!(Moment::now().since(began) < LINGER * 10);
    }
}
