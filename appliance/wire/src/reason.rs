//! Why a work VM stopped. Coarse on purpose: the detail stays on the side that saw it.

use serde::{Deserialize, Serialize};

/// The closed list of reasons that cross between guest and host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StopReason {
    /// The host asked for it.
    Requested,
    /// The kernel's command line lacks what the guest needs, or holds what it does not know.
    BadCommandLine,
    /// A kernel module of the image did not load.
    NoModule,
    /// No disk appeared. Also the answer of a guest that is started without one to probe for KVM.
    NoDisk,
    /// The root image does not match its root hash.
    RootCorrupt,
    /// The kernel refused lockdown, or a module could still be loaded.
    NotLockedDown,
    /// The tenant segment is missing or does not verify.
    BadTenant,
    /// There is no usable uplink.
    NoUplink,
    /// The uplink device misbehaved.
    UplinkFailed,
    /// The host speaks no version of the control channel that the guest speaks, or broke its rules.
    BadControl,
    /// No lease came in time.
    NoLease,
    /// What came as a lease does not verify, or is for something else.
    BadLease,
    /// The gateway could not be reached.
    NoTunnel,
    /// The gateway knows something newer than the lease.
    Stale,
    /// The lease ran out.
    LeaseExpired,
    /// A process that the session cannot do without died.
    ProcessDied,
    /// Something that has no reason of its own.
    Internal,
    /// Inferred by the host: the guest's kernel panicked.
    KernelPanic,
    /// Inferred by the host: the virtual machine ended without saying why.
    Vanished,
    /// Seen by the host: the guest sent what is no message.
    Garbage,
    /// Seen by the host: the guest stayed silent for too long.
    Silent,
    /// Seen by the host: the office's newest rules forbid what runs.
    Forbidden,
}

impl StopReason {
    /// Stable name for machines, as in `kontor status --json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::BadCommandLine => "bad-command-line",
            Self::NoModule => "no-module",
            Self::NoDisk => "no-disk",
            Self::RootCorrupt => "root-corrupt",
            Self::NotLockedDown => "not-locked-down",
            Self::BadTenant => "bad-tenant",
            Self::NoUplink => "no-uplink",
            Self::UplinkFailed => "uplink-failed",
            Self::BadControl => "bad-control",
            Self::NoLease => "no-lease",
            Self::BadLease => "bad-lease",
            Self::NoTunnel => "no-tunnel",
            Self::Stale => "stale",
            Self::LeaseExpired => "lease-expired",
            Self::ProcessDied => "process-died",
            Self::Internal => "internal",
            Self::KernelPanic => "kernel-panic",
            Self::Vanished => "vanished",
            Self::Garbage => "garbage",
            Self::Silent => "silent",
            Self::Forbidden => "forbidden",
        }
    }

    /// What happened and what to do next, for the employee.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Requested => "The work VM was closed.",
            Self::BadCommandLine => {
                "The installed release and this version of Kontor do not fit; install an update."
            }
            Self::NoModule => "The installed release lacks a part of its kernel; ask IT for another release.",
            Self::NoDisk => "The work VM found no disk; start it again, and tell IT if it stays so.",
            Self::RootCorrupt => "The installed release is damaged and was not used; install it again.",
            Self::NotLockedDown => "The work VM could not lock itself down and stopped; tell IT.",
            Self::BadTenant => "The installed release is not signed for your company; install it again.",
            Self::NoUplink => "The work VM found no way out; start it again, and tell IT if it stays so.",
            Self::UplinkFailed => "The work VM's uplink failed; start it again, and tell IT if it stays so.",
            Self::BadControl => "The work VM and Kontor do not understand each other; install an update.",
            Self::NoLease => "The office did not answer; check your network and start again.",
            Self::BadLease => "The office's answer did not verify, so it was not used; tell IT.",
            Self::NoTunnel => "The office's gateway did not answer; check your network and start again.",
            Self::Stale => "The office has newer rules than the ones offered; start again.",
            Self::LeaseExpired => {
                "The office could not be reached to stay connected; check your network and start again."
            }
            Self::ProcessDied => "A part of the work VM failed; start it again.",
            Self::Internal => "The work VM failed; start it again, and tell IT if it stays so.",
            Self::KernelPanic => {
                "The work VM's system stopped itself, as it does when its disk is changed; tell IT."
            }
            Self::Vanished => "The work VM ended without a word; start it again.",
            Self::Garbage => "The work VM broke the rules of its channel and was stopped; tell IT.",
            Self::Silent => "The work VM did not answer any more and was stopped; start it again.",
            Self::Forbidden => {
                "Your company's newest rules do not allow this work VM here; install an update, or ask IT."
            }
        }
    }
}
