//! How long the guest may take for what. They are backstops: a guest that works has its own, shorter
//! times, and says why it stops.

use crate::host::Accelerator;
use kontor_wire::control::BootState;
use std::time::Duration;

/// From QEMU's start to `Hello`.
const HELLO: Duration = Duration::from_secs(60);
/// From a state to the next.
const AFTER_EARLY: Duration = Duration::from_secs(60);
const AFTER_VERIFIED: Duration = Duration::from_secs(180);
const AFTER_LEASED: Duration = Duration::from_secs(60);
const AFTER_TUNNEL_UP: Duration = Duration::from_secs(60);
const AFTER_ADMITTED: Duration = Duration::from_secs(60);
const AFTER_STATE_OPEN: Duration = Duration::from_secs(60);
const AFTER_SESSION: Duration = Duration::from_secs(60);
/// How much slower an emulated guest may be.
const EMULATED: u32 = 3;

/// From `PowerOff`, or the guest's own `Stop`, to the end of QEMU.
const POWER_OFF: Duration = Duration::from_secs(20);
/// From a kernel's panic to the end of QEMU: it resets at once.
const PANICKED: Duration = Duration::from_secs(5);
/// From QEMU's `quit` to its end.
const QUIT: Duration = Duration::from_secs(3);
/// From the kill to the end.
const KILL: Duration = Duration::from_secs(5);
/// How long after its time a guest that should have powered off is stopped.
const LAPSE_GRACE: Duration = Duration::from_secs(120);

/// The times of one machine.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    factor: u32,
    divisor: u32,
}

impl Times {
    /// The times that fit what executes the guest.
    #[must_use]
    pub fn new(accelerator: Accelerator) -> Self {
        Self { factor: if accelerator.is_emulation() { EMULATED } else { 1 }, divisor: 1 }
    }

    /// The same times, each divided by `divisor`: for tests with real processes.
    #[must_use]
    pub fn divided_by(self, divisor: u32) -> Self {
        Self { divisor: self.divisor * divisor.max(1), ..self }
    }

    pub(super) fn for_hello(&self) -> Duration {
        HELLO * self.factor / self.divisor
    }

    pub(super) fn after(&self, state: BootState) -> Duration {
        let wait = match state {
            BootState::Early => AFTER_EARLY,
            BootState::Verified => AFTER_VERIFIED,
            BootState::Leased => AFTER_LEASED,
            BootState::TunnelUp => AFTER_TUNNEL_UP,
            BootState::Admitted => AFTER_ADMITTED,
            BootState::StateOpen => AFTER_STATE_OPEN,
            BootState::Session => AFTER_SESSION,
        };
        wait * self.factor / self.divisor
    }

    pub(super) fn power_off(&self) -> Duration {
        POWER_OFF / self.divisor
    }

    pub(super) fn panicked(&self) -> Duration {
        PANICKED / self.divisor
    }

    pub(super) fn quit(&self) -> Duration {
        QUIT / self.divisor
    }

    pub(super) fn kill(&self) -> Duration {
        KILL / self.divisor
    }

    pub(super) fn lapse_grace(&self) -> Duration {
        LAPSE_GRACE / self.divisor
    }
}
