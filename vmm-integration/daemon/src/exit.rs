//! Exit codes of `kontor` and `kontord`.

pub use kontor_jail::chain;
use kontor_wire::reason::StopReason;
use serde::{Deserialize, Serialize};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum Exit {
    /// It did what it says.
    Ok,
    /// A bug, or something that has no code of its own.
    Failed,
    /// The command line or the configuration is wrong.
    Usage,
    /// Something did not verify.
    NotVerified,
    /// The host lacks something, or policy does not allow what it has.
    HostLacks,
    /// Somebody could not be reached.
    Unreachable,
}

impl From<Exit> for u8 {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::NotVerified => 3,
            Exit::HostLacks => 4,
            Exit::Unreachable => 5,
        }
    }
}

/// A number that is no exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no exit code")]
pub struct NoExit(u8);

impl TryFrom<u8> for Exit {
    type Error = NoExit;

    fn try_from(code: u8) -> Result<Self, NoExit> {
        match code {
            0 => Ok(Self::Ok),
            1 => Ok(Self::Failed),
            2 => Ok(Self::Usage),
            3 => Ok(Self::NotVerified),
            4 => Ok(Self::HostLacks),
            5 => Ok(Self::Unreachable),
            6..=u8::MAX => Err(NoExit(code)),
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(u8::from(exit))
    }
}

impl From<StopReason> for Exit {
    fn from(reason: StopReason) -> Self {
        match reason {
            StopReason::Requested => Self::Ok,
            StopReason::RootCorrupt
            | StopReason::NotLockedDown
            | StopReason::BadTenant
            | StopReason::BadLease
            | StopReason::Stale
            | StopReason::KernelPanic => Self::NotVerified,
            StopReason::BadCommandLine
            | StopReason::NoModule
            | StopReason::NoDisk
            | StopReason::NoUplink
            | StopReason::BadControl
            | StopReason::Forbidden => Self::HostLacks,
            StopReason::NoLease | StopReason::NoTunnel | StopReason::LeaseExpired => Self::Unreachable,
            StopReason::UplinkFailed
            | StopReason::ProcessDied
            | StopReason::Internal
            | StopReason::Vanished
            | StopReason::Garbage
            | StopReason::Silent => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_read_back() {
        for code in 0..6 {
            assert_eq!(Exit::try_from(code).map(u8::from), Ok(code));
        }
        assert_eq!(Exit::try_from(6), Err(NoExit(6)));
    }
}
