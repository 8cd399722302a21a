//! What the host can do for a virtual machine.

use crate::sys;
use serde::{Deserialize, Serialize};
use std::{
    fs::OpenOptions,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's emulator, which its authors do not call a security boundary.
    Tcg,
}

impl Accelerator {
    /// KVM where this process may use it, otherwise the emulator.
    #[must_use]
    pub fn best(kvm: &Path) -> Self {
        let device = OpenOptions::new().read(true).write(true).open(kvm);
        match device.and_then(|device| sys::kvm_version(&device)) {
            Ok(KVM_VERSION) => Self::Kvm,
            Ok(_) | Err(_) => Self::Tcg,
        }
    }

    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// Whether instructions are emulated.
    #[must_use]
    pub fn is_emulation(self) -> bool {
        match self {
            Self::Kvm => false,
            Self::Tcg => true,
        }
    }
}

/// The host's clock, in Unix seconds.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What came of trying KVM with a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trial {
    /// The guest answered as it must.
    Works,
    /// QEMU ended, or the guest answered something else.
    Fails,
    /// Nothing came in time: a guest does not run there, or the host had too much to do.
    Silent,
}

/// What is known of KVM in this boot of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvmVerdict {
    /// The last trial.
    pub trial: Trial,
    /// How many trials in a row were silent.
    silences: u32,
    /// When the last trial ended, in seconds after the host's boot.
    at_s: u64,
}

impl KvmVerdict {
    /// What is known after one more trial, which ended `now_s` seconds after the host's boot.
    pub(crate) fn after(before: Option<Self>, trial: Trial, now_s: u64) -> Self {
        let silences = match trial {
            Trial::Silent => before.map_or(0, |before| before.silences).saturating_add(1),
            Trial::Works | Trial::Fails => 0,
        };
        Self { trial, silences, at_s: now_s }
    }

    /// Whether a start at `now_s` takes it for granted. A silent trial does not prove much, and costs its whole
    /// patience: it is made again after a while, a few times.
    pub(crate) fn stands(&self, now_s: u64) -> bool {
        match self.trial {
            Trial::Works | Trial::Fails => true,
            Trial::Silent => self.silences >= SILENCES_MAX || now_s < self.at_s.saturating_add(RETRY_S),
        }
    }
}

/// Seconds since the host's boot, those of its sleep counted.
pub(crate) fn uptime_s() -> u64 {
    u64::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec).unwrap_or_default()
}

/// Silent trials in a row after which starts try no more in this boot.
const SILENCES_MAX: u32 = 3;
/// Seconds after a silent trial in which starts do not try again.
const RETRY_S: u64 = 600;

/// Where the kernel offers KVM.
pub const KVM: &str = "/dev/kvm";
/// The one version of KVM's interface that there ever was (Linux, Documentation/virt/kvm/api.rst).
const KVM_VERSION: i32 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_trial_is_made_again_after_a_while_and_not_for_ever() {
        let mut verdict = KvmVerdict::after(None, Trial::Silent, 100);
        for _ in 1..SILENCES_MAX {
            let at = verdict.at_s;
            assert!(verdict.stands(at + RETRY_S - 1));
            assert!(!verdict.stands(at + RETRY_S));
            verdict = KvmVerdict::after(Some(verdict), Trial::Silent, at + RETRY_S);
        }
        assert!(verdict.stands(u64::MAX));
        let verdict = KvmVerdict::after(Some(verdict), Trial::Works, 9000);
        assert!(verdict.stands(u64::MAX));
        let verdict = KvmVerdict::after(Some(verdict), Trial::Silent, 9000);
        assert!(!verdict.stands(9000 + RETRY_S));
        assert!(KvmVerdict::after(None, Trial::Fails, 1).stands(u64::MAX));
    }

    #[test]
    fn what_is_no_kvm_is_not_taken_for_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/dev/null"), Path::new("/does/not/exist")] {
            assert_eq!(Accelerator::best(path), Accelerator::Tcg, "{}", path.display());
        }
    }
}
