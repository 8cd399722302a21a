//! A rate limit: so many units at once, refilled at a steady rate (GCRA, ITU-T I.371).

use std::time::Duration;

/// How much may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units that come back each second; at least one.
    pub per_s: u32,
    /// Units that may pass at once after a rest.
    pub burst: u32,
}

#[derive(Debug)]
pub(crate) struct Bucket {
    interval: Duration,
    tolerance: Duration,
    /// When the bucket will be full again.
    full_at: Duration,
}

impl Bucket {
    pub(crate) fn new(rate: Rate) -> Self {
        let interval = Duration::from_secs(1) / rate.per_s.max(1);
        Self { interval, tolerance: interval * rate.burst, full_at: Duration::ZERO }
    }

    /// Takes `units` at the time `now`, or nothing when there are not so many.
    pub(crate) fn take(&mut self, units: u32, now: Duration) -> bool {
        let full_at = self.full_at.max(now) + self.interval * units;
        let passes = full_at - now <= self.tolerance;
        if passes {
            self.full_at = full_at;
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn burst_passes_and_one_more_does_not() {
        let mut bucket = Bucket::new(Rate { per_s: 10, burst: 4 });
        assert!((0..4).all(|_| bucket.take(1, SECOND)));
        assert!(!bucket.take(1, SECOND));
    }

    #[test]
    fn units_come_back_at_the_rate() {
        let mut bucket = Bucket::new(Rate { per_s: 10, burst: 4 });
        assert!(bucket.take(4, SECOND));
        assert!(!bucket.take(1, SECOND + Duration::from_millis(99)));
        assert!(bucket.take(1, SECOND + Duration::from_millis(100)));
        assert!(!bucket.take(1, SECOND + Duration::from_millis(100)));
    }

    #[test]
    fn refused_take_costs_nothing() {
        let mut bucket = Bucket::new(Rate { per_s: 1, burst: 4 });
        assert!(!bucket.take(5, SECOND));
        assert!(bucket.take(4, SECOND));
    }

    #[test]
    fn long_rest_gives_no_more_than_the_burst() {
        let mut bucket = Bucket::new(Rate { per_s: 1, burst: 4 });
        assert!(bucket.take(4, SECOND));
        assert!(!bucket.take(5, SECOND * 1000));
    }
}
