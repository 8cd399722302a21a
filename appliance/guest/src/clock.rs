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
    fn moments_go_forward_and_never_below_zero() {
        let earlier = Moment::now();
        let later = earlier.after(Duration::from_millis(1500));
        assert_eq!(later.since(earlier), Duration::from_millis(1500));
        assert_eq!(earlier.since(later), Duration::ZERO);
        assert_eq!(later.millis() - earlier.millis(), 1500);
    }
}
