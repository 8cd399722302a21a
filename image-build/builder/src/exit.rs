//! How the program ends.

/// The documented exit codes. `compare` uses 1 for "they differ".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// A bug of ours or of a tool that we ran; from `compare`: the directories differ.
    Bug = 1,
    /// A wrong argument, profile or lock.
    Usage = 2,
    /// A hash or a signature does not fit.
    NotVerified = 3,
    /// The host lacks a program, a package or disk space.
    HostLacks = 4,
    /// A mirror does not answer, or does not have what is asked for.
    Unreachable = 5,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
