//! The rules for a guest's challenges (`lease.md` 6, 7 and 21): one open at a time, for the root that was
//! started, numbered without a gap, a nonce never used again, and not too many.

use kontor_wire::control::Challenge;
use std::time::Duration;

/// Challenges that may come at once.
const BURST: u32 = 8;
/// After how long one more may come. A guest waits 5 s at least before it asks again.
const INTERVAL: Duration = Duration::from_secs(4);

/// A rule that the guest broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("a challenge while another is open")]
    Open,
    #[error("a challenge for another root than the started one")]
    Root,
    #[error("a challenge with the number {found} instead of {expected}")]
    Number { expected: u64, found: u64 },
    #[error("a challenge with a nonce that was used before")]
    Nonce,
    #[error("more challenges than a guest may send")]
    TooMany,
}

#[derive(Debug)]
pub(super) struct Challenges {
    verity_root: [u8; 32],
    last: Option<Challenge>,
    /// Since when one is open; once closed, when it was opened.
    opened_at: Duration,
    open: bool,
    /// When the allowance is whole again.
    full_at: Duration,
    /// When a guest without a newer lease must be off.
    off_at: Option<Duration>,
}

impl Challenges {
    pub(super) fn new(verity_root: [u8; 32]) -> Self {
        let zero = Duration::ZERO;
        Self { verity_root, last: None, opened_at: zero, open: false, full_at: zero, off_at: None }
    }

    pub(super) fn open(&mut self, challenge: &Challenge, now: Duration) -> Result<(), Broken> {
        if self.open {
            return Err(Broken::Open);
        }
        if challenge.verity_root != self.verity_root {
            return Err(Broken::Root);
        }
        let same_key = self.last.as_ref().filter(|last| last.boot_key == challenge.boot_key);
        let expected = same_key.map_or(0, |last| last.seq.saturating_add(1));
        if challenge.seq != expected {
            return Err(Broken::Number { expected, found: challenge.seq });
        }
        if self.last.as_ref().is_some_and(|last| last.nonce == challenge.nonce) {
            return Err(Broken::Nonce);
        }
        let full_at = self.full_at.max(now) + INTERVAL;
        if full_at - now > INTERVAL * BURST {
            return Err(Broken::TooMany);
        }
        self.full_at = full_at;
        self.last = Some(challenge.clone());
        (self.open, self.opened_at) = (true, now);
        Ok(())
    }

    /// The open challenge was answered. Returns when it was opened.
    pub(super) fn close(&mut self) -> Duration {
        self.open = false;
        self.opened_at
    }

    pub(super) fn off_at_most(&mut self, at: Duration) {
        self.off_at = Some(at);
    }

    pub(super) fn off_at(&self) -> Option<Duration> {
        self.off_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: [u8; 32] = [1; 32];
    const NOW: Duration = Duration::from_secs(100);

    fn challenge(key: u8, seq: u64, nonce: u8) -> Challenge {
        Challenge { nonce: [nonce; 32], boot_key: [key; 32], seq, verity_root: ROOT, keyset_version: 1 }
    }

    fn answered(challenges: &mut Challenges, challenge: &Challenge, now: Duration) -> Result<(), Broken> {
        challenges.open(challenge, now)?;
        challenges.close();
        Ok(())
    }

    #[test]
    fn numbers_rise_by_one_for_a_key_and_begin_at_zero_for_a_new_one() {
        let mut challenges = Challenges::new(ROOT);
        assert_eq!(answered(&mut challenges, &challenge(1, 0, 1), NOW), Ok(()));
        assert_eq!(answered(&mut challenges, &challenge(1, 1, 2), NOW), Ok(()));
        assert_eq!(
            answered(&mut challenges, &challenge(1, 3, 3), NOW),
            Err(Broken::Number { expected: 2, found: 3 })
        );
        assert_eq!(
            answered(&mut challenges, &challenge(2, 2, 3), NOW),
            Err(Broken::Number { expected: 0, found: 2 })
        );
        assert_eq!(answered(&mut challenges, &challenge(2, 0, 3), NOW), Ok(()));
    }

    #[test]
    fn second_open_challenge_is_refused() {
        let mut challenges = Challenges::new(ROOT);
        challenges.open(&challenge(1, 0, 1), NOW).unwrap();
        assert_eq!(challenges.open(&challenge(1, 1, 2), NOW), Err(Broken::Open));
        assert_eq!(challenges.close(), NOW);
        assert_eq!(challenges.open(&challenge(1, 1, 2), NOW), Ok(()));
    }

    #[test]
    fn other_root_and_repeated_nonce_are_refused() {
        let mut challenges = Challenges::new(ROOT);
        let other = Challenge { verity_root: [2; 32], ..challenge(1, 0, 1) };
        assert_eq!(challenges.open(&other, NOW), Err(Broken::Root));
        answered(&mut challenges, &challenge(1, 0, 1), NOW).unwrap();
        assert_eq!(challenges.open(&challenge(1, 1, 1), NOW), Err(Broken::Nonce));
    }

    #[test]
    fn a_burst_passes_and_one_more_has_to_wait() {
        let mut challenges = Challenges::new(ROOT);
        for (seq, nonce) in (0..u64::from(BURST)).zip(0..) {
            answered(&mut challenges, &challenge(1, seq, nonce), NOW).unwrap();
        }
        let next = challenge(1, u64::from(BURST), 99);
        assert_eq!(answered(&mut challenges, &next, NOW), Err(Broken::TooMany));
        assert_eq!(answered(&mut challenges, &next, NOW + INTERVAL), Ok(()));
    }
}
