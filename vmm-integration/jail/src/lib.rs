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
