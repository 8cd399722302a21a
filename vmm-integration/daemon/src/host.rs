//! What the host can do for a virtual machine.

use serde::{Deserialize, Serialize};
use std::{fs::OpenOptions, path::Path};

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
        match OpenOptions::new().read(true).write(true).open(kvm) {
            Ok(_) => Self::Kvm,
            Err(_) => Self::Tcg,
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

/// Where the kernel offers KVM.
pub const KVM: &str = "/dev/kvm";
