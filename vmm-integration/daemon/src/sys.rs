//! The one place with unsafe code: what is done in a child process before it becomes its program.

use rustix::process::{Pid, Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit};
use std::{io, os::unix::process::CommandExt, process::Command};

/// Limits of a child process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Descriptors.
    pub(crate) files: u64,
    /// Address space in bytes.
    pub(crate) address_space: u64,
}

/// Lets the child die with this process. The signal is tied to the *thread* that starts the child, so
/// children are started by the main thread only, which is what the one-threaded runtime does.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: between fork and exec, `tie` makes two system calls; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(move || tie(parent)) };
}

/// Additionally takes from the child what it has no use for: privileges by exec, core files, writing
/// to any file, and what is above its limits.
pub(crate) fn confine(command: &mut Command, limits: Limits) {
    let parent = getpid();
    let confine = move || {
        tie(parent)?;
        rustix::thread::set_no_new_privs(true)?;
        for (resource, most) in [
            (Resource::Core, 0),
            (Resource::Fsize, 0),
            (Resource::Nofile, limits.files),
            (Resource::As, limits.address_space),
        ] {
            setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec, `confine` makes system calls on numbers that it owns; it takes no
    // lock and allocates nothing.
    unsafe { command.pre_exec(confine) };
}

fn tie(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the line above.
    if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
}
