//! Notices that the host has slept. A work VM cannot: its clocks stand still meanwhile or jump, but all together.
//!
//! `CLOCK_BOOTTIME` goes on in a sleep and `CLOCK_MONOTONIC` does not (clock_gettime(2)): their difference is how
//! long the host has slept since its boot. That it may have grown, a timer tells which the kernel cancels when the
//! real-time clock is not what it was (`TFD_TIMER_CANCEL_ON_SET`, timerfd_create(2)), as after every sleep.

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::{fmt, io, os::fd::OwnedFd, time::Duration};
use tokio::net::unix::pipe::Receiver;

/// Shorter than any sleep, longer than it takes to read two clocks.
const SLEEP_MIN: Duration = Duration::from_secs(1);
/// In seconds after 1970, as far away as the kernel can count in nanoseconds.
const NEVER: i64 = i64::MAX / 1_000_000_000;

/// Waits for the end of the host's next sleep.
pub struct Sleep {
    /// Waited for and read as a pipe is.
    clock: Receiver,
    slept: Box<dyn Fn() -> Duration + Send>,
    /// How much of it is known.
    known: Duration,
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep").field("known", &self.known).finish_non_exhaustive()
    }
}

impl Sleep {
    /// Of this host, by its kernel's clocks. What it has slept so far is known. Needs a runtime.
    ///
    /// # Errors
    /// When there is no timer to be had.
    pub fn of_host() -> io::Result<Self> {
        Self::told_by(cancelled_timer()?, slept)
    }

    /// Of a host that has slept for `slept` in all its life. Whenever `clock` is readable, it may have grown; up
    /// to eight bytes of it are read then, and it must not block.
    ///
    /// # Errors
    /// When `clock` cannot be waited for.
    pub fn told_by(clock: OwnedFd, slept: impl Fn() -> Duration + Send + 'static) -> io::Result<Self> {
        let (clock, known) = (Receiver::from_owned_fd_unchecked(clock)?, slept());
        Ok(Self { clock, slept: Box::new(slept), known })
    }

    /// Resolves once for each sleep, when it is over. Nothing is lost where this is dropped before.
    pub(crate) async fn over(&mut self) {
        loop {
            let slept = (self.slept)();
            if slept >= self.known.saturating_add(SLEEP_MIN) {
                self.known = slept;
                return;
            }
            match self.clock.readable().await {
                // A timer that was cancelled is an error, and nothing to read is one. What counts is how long it
                // slept.
                Ok(()) => drop(self.clock.try_read(&mut [0; 8])),
                // The runtime ends.
                Err(_) => std::future::pending().await,
            }
        }
    }
}

/// A timer that is cancelled when the real-time clock is set, and due in a time that does not come.
fn cancelled_timer() -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
    let it_value = Timespec { tv_sec: NEVER, tv_nsec: 0 };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(&timer, flags, &Itimerspec { it_interval, it_value })?;
    Ok(timer)
}

fn slept() -> Duration {
    let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
    // In this order time that passes in between does not look like sleep.
    let all = read(ClockId::Boottime);
    all.saturating_sub(read(ClockId::Monotonic))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(60);
    const BRIEFLY: Duration = Duration::from_millis(20);

    /// A host whose sleep is told by a pipe.
    fn host() -> (Sleep, Arc<AtomicU64>, OwnedFd) {
        let millis = Arc::new(AtomicU64::new(5000));
        let (reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)
                .unwrap();
        let own = millis.clone();
        let sleep = Sleep::told_by(reader, move || Duration::from_millis(own.load(Ordering::Relaxed)));
        (sleep.unwrap(), millis, writer)
    }

    #[tokio::test]
    async fn each_sleep_is_told_once() {
        let (mut sleep, millis, clock) = host();
        for slept in [6000, 7000, 1_000_000] {
            assert!(timeout(BRIEFLY, sleep.over()).await.is_err());
            let waiting = tokio::spawn(async move {
                sleep.over().await;
                sleep
            });
            tokio::task::yield_now().await;
            millis.store(slept, Ordering::Relaxed);
            rustix::io::write(&clock, &[1]).unwrap();
            sleep = timeout(SOON, waiting).await.unwrap().unwrap();
        }
        // One that nobody waited for, and of whose end nobody tells.
        millis.store(2_000_000, Ordering::Relaxed);
        timeout(SOON, sleep.over()).await.unwrap();
        assert!(timeout(BRIEFLY, sleep.over()).await.is_err());
    }

    #[tokio::test]
    async fn clock_that_is_set_is_no_sleep() {
        let (mut sleep, millis, clock) = host();
        for slept in [5000, 5000 + 999, 0] {
            millis.store(slept, Ordering::Relaxed);
            rustix::io::write(&clock, &[1; 8]).unwrap();
            assert!(timeout(BRIEFLY, sleep.over()).await.is_err(), "{slept}");
        }
    }

    #[tokio::test]
    async fn host_that_is_awake_has_not_slept() {
        let mut sleep = Sleep::of_host().unwrap();
        assert!(timeout(BRIEFLY, sleep.over()).await.is_err());
    }
}
