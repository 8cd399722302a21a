//! How often a device may ask.

use kontor_trust::DeviceId;
use std::{collections::BTreeMap, time::Duration};

/// Requests of a device that may come at once.
pub const BURST: u32 = 16;
/// After how long one more may come. kontord asks no more often than every 4 s for long.
pub const INTERVAL: Duration = Duration::from_secs(3);

/// What the devices that asked lately have left.
#[derive(Debug, Default)]
pub struct Rates {
    /// When each device's allowance is whole again. A device whose allowance is whole is not in it.
    full_at: BTreeMap<DeviceId, Duration>,
}

impl Rates {
    /// Counts a request of `device` at `now` (since any fixed moment).
    ///
    /// # Errors
    /// How long the device has to wait, when it asks too often; this request is then not counted.
    pub fn take(&mut self, device: &DeviceId, now: Duration) -> Result<(), Duration> {
        self.full_at.retain(|_, full_at| *full_at > now);
        let full_at = self.full_at.get(device).copied().unwrap_or(now) + INTERVAL;
        match (full_at - now).checked_sub(INTERVAL * BURST) {
            None | Some(Duration::ZERO) => {
                self.full_at.insert(device.clone(), full_at);
                Ok(())
            }
            Some(wait) => Err(wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BURST, INTERVAL, Rates};
    use std::time::Duration;

    #[test]
    fn burst_passes_and_one_more_waits() {
        let (mut rates, now) = (Rates::default(), Duration::from_secs(7));
        let [anna, emil] = ["anna-1", "emil-1"].map(|name| name.parse().unwrap());
        for _ in 0..BURST {
            rates.take(&anna, now).unwrap();
        }
        assert_eq!(rates.take(&anna, now), Err(INTERVAL));
        assert_eq!(rates.take(&anna, now), Err(INTERVAL), "a refused request does not count");
        assert_eq!(rates.take(&emil, now), Ok(()), "another device has its own allowance");
        assert_eq!(rates.take(&anna, now + INTERVAL), Ok(()));
        assert_eq!(rates.take(&anna, now + INTERVAL), Err(INTERVAL));
    }

    #[test]
    fn device_with_a_whole_allowance_is_forgotten() {
        let mut rates = Rates::default();
        for n in 0..100_u32 {
            rates.take(&format!("laptop-{n}").parse().unwrap(), INTERVAL * n).unwrap();
        }
        assert_eq!(rates.full_at.len(), 1);
    }
}
