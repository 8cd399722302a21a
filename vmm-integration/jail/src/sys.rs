//! The one place with unsafe code: system calls that no safe interface has.

use crate::{JailError, seccomp::Filter};
use libc::{c_long, c_uint};
use rustix::{
    fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    process::Pid,
};
use std::{ffi::CString, io, mem, path::Path, ptr, sync::mpsc, thread};

/// Whether the process may become another program after the filter is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exec {
    /// No.
    Never,
    /// Once. The kernel asks a listener about each attempt. A thread of this very process answers the first
    /// and is ended by it, and the listener closes with it; whoever tries again is told `ENOSYS`, for good.
    Once,
}

/// Filters the system calls of the calling thread, and of what it becomes, for good.
///
/// # Errors
/// What the kernel says; without `no_new_privs` it refuses.
pub fn install(filter: &Filter, exec: Exec) -> io::Result<()> {
    let log = libc::SECCOMP_FILTER_FLAG_LOG;
    match exec {
        Exec::Never => set_filter(filter, log).map(drop),
        Exec::Once => {
            let (hand_over, taken) = mpsc::channel::<OwnedFd>();
            // It was there before the filter, so it may do what the filter forbids.
            thread::spawn(move || taken.recv().map(|listener| allow_one(&listener)));
            let number = set_filter(&filter.asking_for_exec(), log | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
            let number = RawFd::try_from(number).map_err(io::Error::other)?;
            // SAFETY: the kernel has just made this descriptor and nobody else owns it. It closes on exec.
            let listener = unsafe { OwnedFd::from_raw_fd(number) };
            hand_over.send(listener).map_err(io::Error::other)
        }
    }
}

fn set_filter(filter: &Filter, flags: libc::c_ulong) -> io::Result<c_long> {
    let length = u16::try_from(filter.program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: filter.program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` steps behind `filter`, which outlives the call, and writes nothing.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })
}

/// Waits for the first call that the filter asks about, and lets it go on.
fn allow_one(listener: &OwnedFd) -> io::Result<()> {
    // SAFETY: both are plain data for which zero is a value; the kernel asks for a zeroed request.
    let mut request: libc::seccomp_notif = unsafe { mem::zeroed() };
    // SAFETY: as above.
    let mut answer: libc::seccomp_notif_resp = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes one `seccomp_notif`.
    check(c_long::from(unsafe {
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut request)
    }))?;
    answer.id = request.id;
    answer.flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).map_err(io::Error::other)?;
    // SAFETY: the kernel reads one `seccomp_notif_resp`.
    check(c_long::from(unsafe {
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer)
    }))
    .map(drop)
}

/// Becomes `program` with `arguments` and an environment. Returns only when that failed.
#[must_use]
pub fn execute(program: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |words: &[CString]| -> Vec<*const libc::c_char> {
        words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both lists end with null and point to strings that outlive the call.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Splits the calling process, which has one thread. `None` in the child.
///
/// # Errors
/// What the kernel says.
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: this process has one thread, so that no lock is held by one that the child lacks.
    let pid = check(c_long::from(unsafe { libc::fork() }))?;
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw))
}

/// Leaves the namespaces named by the flags for new ones.
///
/// # Errors
/// What the kernel says.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: descriptors stay shared: `UnshareFlags::FILES` is not among the callers' flags, and would only
    // copy the table of this process's one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Closes every descriptor but those in `keep`.
///
/// # Errors
/// What the kernel says.
///
/// # Safety
/// Nothing in this process may use a descriptor that is not in `keep` afterwards.
pub unsafe fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<c_uint> = keep.iter().filter_map(|fd| c_uint::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 0;
    for fd in keep.into_iter().map(Some).chain([None]) {
        let last = match fd {
            Some(fd) => fd.checked_sub(1),
            None => Some(c_uint::MAX),
        };
        if let Some(last) = last.filter(|last| *last >= first) {
            // SAFETY: the caller vouches for it.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
        }
        first = fd.map_or(c_uint::MAX, |fd| fd + 1);
    }
    Ok(())
}

/// What one may not do through a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tight {
    /// Write, execute as another user, use devices.
    ReadOnly,
    /// The same, and execute.
    Data,
    /// Write, execute; a device may be used.
    Device,
}

/// Tightens the mount at `path`; what it already forbids stays forbidden.
///
/// # Errors
/// What the kernel says.
pub fn tighten(path: &Path, how: Tight) -> io::Result<()> {
    let common = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    let attributes = common
        | match how {
            Tight::ReadOnly => libc::MOUNT_ATTR_NODEV,
            Tight::Data => libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
            Tight::Device => libc::MOUNT_ATTR_NOEXEC,
        };
    let request = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: path and request outlive the call, and the kernel writes to neither.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            0,
            &raw const request,
            mem::size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// Leaves the caller's keyring for an empty one. A kernel without keyrings has none to leave.
///
/// # Errors
/// What the kernel says.
pub fn leave_keyring() -> io::Result<()> {
    const JOIN_SESSION_KEYRING: c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is read or written.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0, 0, 0, 0) }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        answer => answer.map(drop),
    }
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes over an inherited descriptor.
///
/// # Errors
/// When no such descriptor is open.
///
/// # Safety
/// Nobody else in this process may own it.
pub unsafe fn take(number: RawFd) -> Result<OwnedFd, JailError> {
    // SAFETY: the borrow ends with this statement.
    let open = rustix::io::fcntl_getfd(unsafe { rustix::fd::BorrowedFd::borrow_raw(number) });
    open.map_err(JailError::at(format!("take descriptor {number}")))?;
    // SAFETY: it is open, and the caller vouches for the rest.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
