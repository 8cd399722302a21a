//! The guest's own clock: time since its kernel started, suspensions included.
//!
//! The host runs this clock and can turn it as it likes; it bounds waiting, it proves nothing.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::io;
use std::time::Duration;

/// A moment of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Duration);

impl Moment {
    /// This moment.
    pub(crate) fn now() -> Self {
        let time = clock_gettime(ClockId::Boottime);
        // Neither part of CLOCK_BOOTTIME is ever negative.
        let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        Self(Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0)))
    }

    /// `span` later.
    pub(crate) fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }

    /// How long it is from `earlier` to this moment, nothing when it is not earlier.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Milliseconds since the kernel started.
    pub(crate) fn millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

/// How long the machine has slept since its kernel started: one clock goes on in a suspension, the other does
/// not.
pub(crate) fn slept() -> Duration {
    let moment = |id| {
        let time = clock_gettime(id);
        let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
    };
    let awake = moment(ClockId::Monotonic);
    moment(ClockId::Boottime).saturating_sub(awake)
}

/// Notices that the machine has slept.
#[derive(Debug)]
pub(crate) struct Sleep {
    known: Duration,
}

/// Shorter than any sleep, longer than it takes to read two clocks.
const SLEEP_MIN: Duration = Duration::from_secs(1);

impl Sleep {
    /// A machine that has slept for so long in all its life, which is known.
    pub(crate) fn new(slept: Duration) -> Self {
        Self { known: slept }
    }

    /// Whether it has slept since the last time that this was true.
    pub(crate) fn notice(&mut self, slept: Duration) -> bool {
        let new = slept >= self.known + SLEEP_MIN;
        if new {
            self.known = slept;
        }
        new
    }
}

/// Time to wait as poll and epoll take it.
pub(crate) fn timespec(span: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(span.subsec_nanos()),
    }
}

/// Sets the clock that people and certificates read, in Unix seconds.
pub(crate) fn set_wall_clock(unix_s: u64) -> io::Result<()> {
    let tv_sec = i64::try_from(unix_s).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec: 0 })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sleep_is_noticed_once_and_the_reading_of_the_clocks_is_none() {
        let seconds = Duration::from_secs;
        let mut sleep = Sleep::new(seconds(100));
        assert!(!sleep.notice(seconds(100)));
        assert!(!sleep.notice(seconds(100) + SLEEP_MIN - Duration::from_nanos(1)));
        assert!(sleep.notice(seconds(100) + SLEEP_MIN));
        assert!(!sleep.notice(seconds(100) + SLEEP_MIN));
        assert!(sleep.notice(seconds(5000)));
        // Less than before is no sleep, whatever the host does to its clocks.
        assert!(!sleep.notice(Duration::ZERO));
        assert!(!Sleep::new(slept()).notice(slept()));
    }

    #[test]
    fn moments_go_forward_and_never_below_zero() {
        let earlier = Moment::now();
        let later = earlier.after(Duration::from_millis(1500));
        assert_eq!(later.since(earlier), Duration::from_millis(1500));
        assert_eq!(earlier.since(later), Duration::ZERO);
        assert_eq!(later.millis() - earlier.millis(), 1500);
    }
}
