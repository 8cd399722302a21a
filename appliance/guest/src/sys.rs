//! The `unsafe` of the guest but for the uplink's device ([`crate::vfio`]): the few system calls that neither
//! the standard library nor rustix offers in a safe form. Nothing here decides anything.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{Resource, Rlimit, setrlimit, umask};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Number of the first descriptor that a program of ours inherits behind the three standard ones.
pub(crate) const FIRST_INHERITED: RawFd = 3;
/// Most descriptors that a program of ours inherits.
pub(crate) const MAX_INHERITED: usize = 4;

/// Which inherited descriptors were handed out already, one bit each.
static TAKEN: AtomicU32 = AtomicU32::new(0);

/// Takes the `index`th descriptor that the parent passed, counted from [`FIRST_INHERITED`].
/// To be called before the process opens anything, so that the number is the parent's.
pub(crate) fn inherited(index: usize) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(index).ok().filter(|_| index < MAX_INHERITED);
    let number = number.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))? + FIRST_INHERITED;
    let bit = 1 << index;
    if TAKEN.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    // SAFETY: only borrowed to ask whether it is open; a closed number gives an error, not harm.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed)?;
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open, was passed to this process to own, and TAKEN sees to it that
    // each number becomes an owner only once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What a started program may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    /// Everything that this process may.
    Inherited,
    /// This user and group alone, no capability, no way to one, no second process, few descriptors.
    None {
        /// User and group.
        id: u32,
        /// Descriptors it may have open, inherited ones included.
        files_max: u64,
    },
}

/// Starts `program` with `arguments` and without environment, with `files` as its descriptors from
/// [`FIRST_INHERITED`] on. It reads from nowhere; what it says on standard error goes to the console.
///
/// The caller keeps the numbers `FIRST_INHERITED..FIRST_INHERITED + MAX_INHERITED` occupied
/// ([`occupy_inherited`]), so that neither `files` nor anything of the standard library stands there.
pub(crate) fn start(
    program: &str,
    arguments: &[&str],
    files: &[BorrowedFd<'_>],
    power: Power,
) -> io::Result<u32> {
    if files.len() > MAX_INHERITED {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sources: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new(program);
    let console = OpenOptions::new().write(true).open("/dev/console");
    command.args(arguments).env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(console.map_or_else(|_| Stdio::null(), Stdio::from));
    // SAFETY: between fork and exec the closure makes system calls on memory that exists already; it
    // neither allocates nor takes a lock (this process has one thread besides).
    unsafe {
        command.pre_exec(move || {
            for (source, target) in sources.iter().zip(FIRST_INHERITED..) {
                // dup2 clears close-on-exec, which is its purpose here.
                check(libc::dup2(*source, target))?;
            }
            rustix::process::setsid()?;
            setrlimit(Resource::Core, limit(0))?;
            match power {
                Power::Inherited => Ok(()),
                Power::None { id, files_max } => give_up_power(id, files_max),
            }
        });
    }
    Ok(command.spawn()?.id())
}

/// Opens `/dev/null` at every number that programs inherit at, so that nothing else comes to stand there.
pub(crate) fn occupy_inherited() -> io::Result<()> {
    let limit = FIRST_INHERITED + RawFd::try_from(MAX_INHERITED).expect("a handful");
    loop {
        let file = std::fs::File::open("/dev/null")?;
        if file.as_raw_fd() >= limit {
            return Ok(());
        }
        std::mem::forget(file);
    }
}

fn give_up_power(id: u32, files_max: u64) -> io::Result<()> {
    umask(rustix::fs::Mode::from_raw_mode(0o077));
    setrlimit(Resource::Nofile, limit(files_max))?;
    for capability in 0..u64::BITS {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        let dropped = check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability)) });
        match dropped {
            Ok(()) => {}
            // The first number that the kernel does not know is behind the last capability.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 => break,
            Err(error) => return Err(error),
        }
    }
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    clear_ambient_capability_set()?;
    set_thread_groups(&[])?;
    let (uid, gid) = (rustix::fs::Uid::from_raw(id), rustix::fs::Gid::from_raw(id));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    give_up_capabilities()?;
    // Behind the change of user: the limit counts that user's processes, and this one is the only one.
    setrlimit(Resource::Nproc, limit(1))?;
    Ok(())
}

/// Drops every capability of this thread and forbids to gain any by executing something.
pub(crate) fn give_up_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    set_no_new_privs(true)?;
    Ok(())
}

/// Makes a descriptor not block, for every process that has it.
pub(crate) fn do_not_block(file: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fcntl_setfl(file, fcntl_getfl(file)? | OFlags::NONBLOCK)?)
}

/// Puts this thread, and all that it starts, behind a filter of system calls. Needs `no_new_privs`.
pub(crate) fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
    // SAFETY: the kernel copies the `len` instructions that `filter` points to and writes none; they
    // outlive the call.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) })
}

/// Sets an option of a UDP socket whose value is a number (udp(7)).
pub(crate) fn set_udp_option(
    socket: BorrowedFd<'_>,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads `length` bytes, which is the size of `value`, and writes none.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, name, (&raw const value).cast(), length)
    })
}

fn limit(value: u64) -> Rlimit {
    Rlimit { current: Some(value), maximum: Some(value) }
}

/// Blocks SIGCHLD for this process and gives a descriptor that is readable while one is pending.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that the following calls read; all pointers are to
    // this frame and outlive the calls.
    unsafe {
        check(libc::sigemptyset(set.as_mut_ptr()))?;
        check(libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD))?;
        check(libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()))?;
        let signals = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(signals)?;
        // SAFETY (ownership): signalfd made this descriptor just now.
        Ok(OwnedFd::from_raw_fd(signals))
    }
}

/// Sends a signal to every process but this one. For PID 1 alone.
pub(crate) fn signal_everyone(signal: rustix::process::Signal) -> io::Result<()> {
    if !rustix::process::getpid().is_init() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // SAFETY: kill touches no memory of this process.
    check(unsafe { libc::kill(-1, signal.as_raw()) })
}

/// Most bytes of a device-mapper target's parameters, the closing NUL included.
pub(crate) const DM_PARAMS: usize = 512;

/// `struct dm_ioctl` (linux/dm-ioctl.h), followed by room for one target.
#[repr(C)]
pub(crate) struct DmCall {
    pub(crate) version: [u32; 3],
    pub(crate) data_size: u32,
    pub(crate) data_start: u32,
    pub(crate) target_count: u32,
    pub(crate) open_count: i32,
    pub(crate) flags: u32,
    pub(crate) event_nr: u32,
    pub(crate) padding: u32,
    pub(crate) dev: u64,
    pub(crate) name: [u8; 128],
    pub(crate) uuid: [u8; 129],
    pub(crate) data: [u8; 7],
    pub(crate) target: DmTarget,
}

/// `struct dm_target_spec` (linux/dm-ioctl.h) and the text behind it.
#[repr(C)]
pub(crate) struct DmTarget {
    pub(crate) sector_start: u64,
    pub(crate) length: u64,
    pub(crate) status: i32,
    pub(crate) next: u32,
    pub(crate) target_type: [u8; 16],
    pub(crate) params: [u8; DM_PARAMS],
}

/// Bytes of `struct dm_ioctl` alone: where the target begins.
pub(crate) const DM_HEADER_LEN: usize = 312;
const _: () = assert!(std::mem::offset_of!(DmCall, target) == DM_HEADER_LEN);
const _: () = assert!(std::mem::offset_of!(DmTarget, params) == 40);

/// The device-mapper requests in use (linux/dm-ioctl.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DmCommand {
    /// `DM_DEV_CREATE`
    Create = 3,
    /// `DM_DEV_SUSPEND`, which resumes a device when the flag of that name is not set.
    Suspend = 6,
    /// `DM_TABLE_LOAD`
    TableLoad = 9,
}

/// One request to `/dev/mapper/control`; the kernel's answer stands in `call` afterwards.
pub(crate) fn device_mapper(
    control: BorrowedFd<'_>,
    command: DmCommand,
    call: &mut DmCall,
) -> io::Result<()> {
    /// `_IOWR(DM_IOCTL, 0, struct dm_ioctl)`
    const REQUEST: libc::Ioctl = 0xC138_FD00;
    call.data_size = u32::try_from(size_of::<DmCall>()).expect("below a page");
    // SAFETY: the kernel reads and writes `data_size` bytes, which is the size of `call`; each bit
    // pattern is a valid DmCall.
    check(unsafe {
        libc::ioctl(control.as_raw_fd(), REQUEST | command as libc::Ioctl, std::ptr::from_mut(call))
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptor_is_taken_only_once_and_only_within_the_limit() {
        assert_eq!(inherited(MAX_INHERITED).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let last = MAX_INHERITED - 1;
        drop(inherited(last).map(std::mem::forget));
        assert_eq!(inherited(last).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn only_pid_1_may_signal_everyone() {
        let refused = signal_everyone(rustix::process::Signal::CONT).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
}
