//! Signals as a descriptor, and all of this crate's `unsafe`.
//!
//! Why `unsafe` at all: no safe wrapper of `signalfd` is among our dependencies.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};

/// Blocks SIGTERM and SIGINT in this thread, and in those that it starts later; gives a descriptor that becomes
/// readable when one of them arrives.
pub(crate) fn termination() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set that it is given, and cannot fail with a good pointer.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: `set` is an initialised set, and `signal` is a signal.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` is an initialised set; the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `set` is an initialised set.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made `fd`, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
