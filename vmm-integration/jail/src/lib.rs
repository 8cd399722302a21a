//! The jail around QEMU and the relay: what a process that faces the guest can reach.
//!
//! ```text
//! kontord ── kontor-jail ──┬── QEMU          each PID 1 of its own pid namespace
//!         ── kontor-jail ──┴── kontor-relay
//! ```
//!
//! `kontor-jail` (the program of this crate) makes the namespaces and the empty root, starts one program in
//! them, and stays as its parent: it dies with kontord, takes the program with it, and ends as the program
//! ended. The relay, which needs nothing more once it runs, then closes the last doors itself with
//! [`seal_relay`].
//!
//! Trusted are kontord's arguments and the host's own files. Not trusted is the program in the jail from
//! its first instruction on.

mod capabilities;
pub mod libraries;
mod rules;
pub mod seccomp;
pub mod sys;

pub use capabilities::drop_all as drop_capabilities;
pub use rules::{Grants, restrict};

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use seccomp::Filter;
use std::io;

/// Where QEMU's firmware lies in a jail, as its `-L` has to say.
pub const FIRMWARE: &str = "/firmware";

/// What keeps a jail from being made, or a process from entering it.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct JailError {
    /// What was tried.
    pub doing: String,
    /// Why it did not work.
    #[source]
    pub source: io::Error,
}

impl JailError {
    /// For `map_err`: names what was tried.
    pub fn at<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        move |source| Self { doing, source: source.into() }
    }
}

/// Whether RLIMIT_NPROC holds for the threads of one jail: from Linux 5.14 on they are counted for each user
/// namespace (kernel commit 21d1c5e386bc). Before, all threads of the uid on the host count together, and a
/// limit that is low enough for a jail would be reached by what else that user runs.
#[must_use]
pub fn counts_threads_apart() -> bool {
    is_since_5_14(&rustix::system::uname().release().to_string_lossy())
}

fn is_since_5_14(release: &str) -> bool {
    let digits =
        |word: &str| word.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u32>();
    let mut words = release.split('.');
    let (Some(major), Some(minor)) = (words.next(), words.next()) else { return false };
    matches!((digits(major), digits(minor)), (Ok(major), Ok(minor)) if (major, minor) >= (5, 14))
}

/// An error with all its causes, as one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        words.push_str(": ");
        words.push_str(&next.to_string());
        cause = next.source();
    }
    words
}

/// Takes from the calling process, which has one thread, all but its open descriptors: no file, no
/// program, no TCP port, no other process, and no descriptor from number `files` on. For the relay, once it has
/// everything that it works with.
///
/// # Errors
/// [`JailError`] names what the kernel refused; the process must then not go on.
pub fn seal_relay(files: u64) -> Result<(), JailError> {
    rustix::thread::set_no_new_privs(true).map_err(JailError::at("give up new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(JailError::at("keep memory out of reach"))?;
    restrict(&Grants::default())?;
    let limit = Rlimit { current: Some(files), maximum: Some(files) };
    setrlimit(Resource::Nofile, limit).map_err(JailError::at("limit descriptors"))?;
    let filter = Filter::new(seccomp::RELAY);
    sys::install(&filter, sys::Exec::Never).map_err(JailError::at("filter system calls"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_counted_apart_since_linux_5_14() {
        for release in ["5.14.0", "5.14.0-362.el9.x86_64", "6.1.0-13-amd64", "6.18", "10.0-rc1"] {
            assert!(is_since_5_14(release), "{release}");
        }
        for release in ["5.13.19", "5.4.0-200-generic", "4.18.0", "5", "", "x.y.z", "5.x"] {
            assert!(!is_since_5_14(release), "{release}");
        }
    }
}
