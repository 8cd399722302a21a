//! The one place with unsafe code: what is done in a child process before it becomes its program, and
//! what no safe interface has: a question to the kernel, the runtime's watch over a descriptor.

use libc::{CLOSE_RANGE_CLOEXEC, c_int, close_range};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use std::{
    ffi::c_void,
    fs::File,
    io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Lets the child die with this process, and takes privileges by exec from it. It keeps the descriptors below
/// `first_closed`. The signal of death is tied to the *thread* that starts the child, so children are
/// started by the main thread only, which is what the one-threaded runtime does.
///
/// `group` is the door of a control group that it enters before anything else.
pub(crate) fn confine(command: &mut Command, first_closed: RawFd, group: Option<File>) {
    let parent = getpid();
    let confine = move || {
        if let Some(group) = &group {
            rustix::io::write(group, b"0")?;
        }
        tie(parent)?;
        rustix::thread::set_no_new_privs(true)?;
        keep_below(first_closed)
    };
    // SAFETY: as above.
    unsafe { command.pre_exec(confine) };
}

/// Closes every descriptor from `first` on when the child becomes its program. What this process opened
/// is closed then anyway; what it was started with may not be.
fn keep_below(first: RawFd) -> io::Result<()> {
    let first = u32::try_from(first).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = c_int::try_from(CLOSE_RANGE_CLOEXEC).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the flag only marks descriptors; nothing is closed that somebody in this process owns.
    match unsafe { close_range(first, u32::MAX, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn tie(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the line above.
    if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
}

/// A descriptor in non-blocking mode of which the runtime tells when there is something to read.
pub(crate) fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and the same descriptor, for as long as it lives; it is moved into the value
    // and shared by nobody.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(io::Error::from)
}

/// Asks the device of KVM for the version of its interface.
pub(crate) fn kvm_version(device: &File) -> io::Result<i32> {
    // SAFETY: `KvmVersion` describes a request without an argument.
    unsafe { ioctl(device, KvmVersion) }.map_err(io::Error::from)
}

/// `KVM_GET_API_VERSION`, `_IO(0xAE, 0)`.
struct KvmVersion;

// SAFETY: the request takes no argument, so the kernel reads and writes no memory of this process; its
// answer is the call's return value. Other devices may know the same number as another request, and all of
// those without an argument are as harmless to this process.
unsafe impl Ioctl for KvmVersion {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xAE, 0)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}
