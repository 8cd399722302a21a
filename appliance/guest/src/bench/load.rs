//! Sending as fast as an uplink takes it, and counting what comes: rounds like those of the tunnel's engine,
//! without the cryptography between.

use super::{BenchError, DATAGRAM_MAX, Order, Orders, Report, system};
use crate::clock::timespec;
use crate::tunnel::uplink::{Rest, Uplink};
use kontor_wire::uplink::{GatewayId, MIN_DATAGRAM};
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Datagrams of one round, as the tunnel takes packets from its interface.
const ROUND: usize = 64;
/// Where the time of the processors stands.
const STAT: &str = "/proc/stat";
/// Milliseconds of the unit there (`USER_HZ` is 100).
const TICK_MS: u64 = 10;

/// How long nothing may come before it is believed that nothing is under way any more.
const QUIET: Duration = Duration::from_millis(100);

/// What a round did: datagrams, and whether there may be more to do without waiting for an event.
pub(super) type Round = io::Result<(u64, Rest)>;

/// Something that carries datagrams. Nothing here blocks.
pub(super) trait Drive {
    /// From now on datagrams have so many bytes, and may go or come as trains, or may not.
    fn set(&mut self, bytes: usize, trains: bool) -> io::Result<()>;
    /// Sends a round of datagrams like this one, as far as they are taken.
    fn send(&mut self, datagram: &[u8]) -> Round;
    /// Takes a batch of what has come, and counts the datagrams of the length that was set.
    fn receive(&mut self) -> Round;
    /// What to wait on, for each change once.
    fn events(&self) -> BorrowedFd<'_>;
}

/// An uplink of the tunnel's.
pub(super) struct Tunnels<U> {
    uplink: U,
    bytes: usize,
    trains: bool,
}

impl<U: Uplink> Tunnels<U> {
    pub(super) fn begin(mut uplink: U) -> Result<Self, BenchError> {
        uplink.begin().map_err(system("begin with the uplink"))?;
        Ok(Self { uplink, bytes: 0, trains: false })
    }
}

impl<U: Uplink> Drive for Tunnels<U> {
    fn set(&mut self, bytes: usize, trains: bool) -> io::Result<()> {
        (self.bytes, self.trains) = (bytes, trains);
        Ok(())
    }

    fn send(&mut self, datagram: &[u8]) -> Round {
        self.receive()?;
        let mut sent = 0;
        for number in 0..ROUND {
            if !self.uplink.has_room() {
                break;
            }
            // A train is for one gateway: where each datagram is for another than the one before, there is none.
            let to = if self.trains { 0 } else { u8::from(number % 2 == 1) };
            self.uplink.push(GatewayId(to), datagram);
            sent += 1;
        }
        self.uplink.send_batch()?;
        Ok((sent, if self.uplink.has_room() { Rest::More } else { Rest::None }))
    }

    fn receive(&mut self) -> Round {
        let (mut count, bytes) = (0, self.bytes);
        let rest = self.uplink.recv_batch(&mut |_, datagram| count += u64::from(datagram.len() == bytes))?;
        self.uplink.send_batch()?;
        Ok((count, rest))
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.uplink.readable()
    }
}

/// Waits for changes of some descriptors.
pub(super) struct Edges(OwnedFd);

impl Edges {
    pub(super) fn of(files: &[BorrowedFd<'_>]) -> Result<Self, BenchError> {
        let fail = |error: Errno| system("watch")(error.into());
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(fail)?;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        for file in files {
            epoll::add(&set, file, epoll::EventData::new_u64(0), flags).map_err(fail)?;
        }
        Ok(Self(set))
    }

    /// Whether something happened within `limit`.
    pub(super) fn wait(&self, limit: Option<Duration>) -> Result<bool, BenchError> {
        let nothing = epoll::Event { flags: EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        match epoll::wait(&self.0, &mut [nothing; 4], limit.map(timespec).as_ref()) {
            Ok(count) => Ok(count > 0),
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(system("wait")(error.into())),
        }
    }
}

/// Sends datagrams until the host stops it.
pub(super) fn send(
    drive: &mut dyn Drive,
    orders: &mut Orders,
    bytes: u16,
    trains: bool,
) -> Result<(), BenchError> {
    let datagram = [0x5A; DATAGRAM_MAX];
    let length = length(bytes)?;
    drive.set(length, trains).map_err(system("set the uplink up"))?;
    let before = busy_ms()?;
    let datagrams = until_stopped(drive, orders, |drive| drive.send(&datagram[..length]))?;
    orders.tell(&Report::Done { datagrams, busy_ms: busy_ms()?.saturating_sub(before) })
}

/// Counts datagrams until the host stops it, and then what was under way.
pub(super) fn receive(
    drive: &mut dyn Drive,
    orders: &mut Orders,
    bytes: u16,
    trains: bool,
) -> Result<(), BenchError> {
    drive.set(length(bytes)?, trains).map_err(system("set the uplink up"))?;
    orders.tell(&Report::Ready)?;
    let before = busy_ms()?;
    let mut datagrams = until_stopped(drive, orders, |drive| drive.receive())?;
    let busy_ms = busy_ms()?.saturating_sub(before);
    let edges = Edges::of(&[drive.events()])?;
    loop {
        let mut come = 0;
        loop {
            let (count, rest) = drive.receive().map_err(system("receive"))?;
            come += count;
            if rest == Rest::None {
                break;
            }
        }
        datagrams += come;
        if !edges.wait(Some(QUIET))? && come == 0 {
            return orders.tell(&Report::Done { datagrams, busy_ms });
        }
    }
}

fn length(bytes: u16) -> Result<usize, BenchError> {
    let length = usize::from(bytes);
    if (MIN_DATAGRAM..=DATAGRAM_MAX).contains(&length) { Ok(length) } else { Err(BenchError::OutOfTurn) }
}

/// Does `round` after `round`; how many datagrams that were.
fn until_stopped(
    drive: &mut dyn Drive,
    orders: &mut Orders,
    mut round: impl FnMut(&mut dyn Drive) -> Round,
) -> Result<u64, BenchError> {
    let edges = Edges::of(&[orders.port.as_fd(), drive.events()])?;
    let mut datagrams = 0;
    loop {
        let (count, rest) = round(drive).map_err(system("use the uplink"))?;
        datagrams += count;
        match orders.next()? {
            None => edges.wait((rest == Rest::More).then_some(Duration::ZERO)).map(drop)?,
            Some(Order::Stop) => return Ok(datagrams),
            Some(Order::Send { .. } | Order::Receive { .. } | Order::Off) => {
                return Err(BenchError::OutOfTurn);
            }
        }
    }
}

/// Milliseconds since the start in which processors were not idle.
fn busy_ms() -> Result<u64, BenchError> {
    let text = std::fs::read_to_string(STAT).map_err(system("read the processors' time"))?;
    busy_ticks(&text).map(|ticks| ticks * TICK_MS).ok_or(BenchError::Missing("processors' time"))
}

/// `cpu user nice system idle iowait irq softirq steal …` (proc(5)), in ticks.
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = fields.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
    Some(user + nice + system + irq + softirq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_the_processors_is_read_without_what_was_idle() {
        assert_eq!(busy_ticks("cpu  1 2 4 800 1600 8 16 32 0 0\ncpu0 9\n"), Some(31));
        assert_eq!(busy_ticks("cpu  1 2 4\n"), None);
        assert_eq!(busy_ticks(""), None);
    }

    #[test]
    fn lengths_that_an_uplink_carries_are_taken_and_no_others() {
        let taken = |bytes: usize| length(u16::try_from(bytes).unwrap()).is_ok();
        assert!(taken(MIN_DATAGRAM) && taken(DATAGRAM_MAX));
        assert!(!taken(MIN_DATAGRAM - 1) && !taken(DATAGRAM_MAX + 1));
    }
}
