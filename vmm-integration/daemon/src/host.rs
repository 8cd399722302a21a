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

/// Where the kernel offers KVM.
pub const KVM: &str = "/dev/kvm";
/// The one version of KVM's interface that there ever was (Linux, Documentation/virt/kvm/api.rst).
const KVM_VERSION: i32 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kvm_is_not_taken_for_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/dev/null"), Path::new("/does/not/exist")] {
            assert_eq!(Accelerator::best(path), Accelerator::Tcg, "{}", path.display());
        }
    }
}
