//! The lists of system calls, as data, and the filter that the kernel is given.
//!
//! Everything that is not listed fails with `EPERM`; `clone3`, whose flags no filter can see, with `ENOSYS`,
//! so that the C library takes `clone`. See decision 0012 for how the lists were grown.

#![expect(
    clippy::cast_possible_truncation,
    reason = "constants of the C library, each of which fits the filter's field"
)]

use libc::c_long;

/// What a system call's arguments may be.
#[derive(Debug, Clone, Copy)]
pub enum Arguments {
    /// Anything.
    Any,
    /// The argument of this number is one of these values. Only the low 32 bits of it are looked at, so only
    /// arguments are listed of which the kernel takes no more.
    OneOf(u8, &'static [u32]),
    /// The argument of this number is a null pointer.
    Null(u8),
}

/// One line of a list.
pub type Line = (c_long, Arguments);

use Arguments::{Any, Null, OneOf};

/// Flags with which the C library starts a thread: the same memory, files, signals and process.
const THREAD: u32 = 0x003d_0f00;

/// What QEMU needs under either accelerator.
pub const QEMU: &[Line] = &[
    // Events, time, locks.
    (libc::SYS_futex, Any),
    (libc::SYS_ppoll, Any),
    (libc::SYS_poll, Any),
    (libc::SYS_epoll_create1, Any),
    (libc::SYS_epoll_ctl, Any),
    (libc::SYS_epoll_wait, Any),
    (libc::SYS_epoll_pwait, Any),
    (libc::SYS_eventfd2, Any),
    (libc::SYS_signalfd4, Any),
    (libc::SYS_timerfd_create, Any),
    (libc::SYS_timerfd_settime, Any),
    (libc::SYS_clock_nanosleep, Any),
    (libc::SYS_clock_gettime, Any),
    (libc::SYS_clock_getres, Any),
    (libc::SYS_gettimeofday, Any),
    (libc::SYS_nanosleep, Any),
    (libc::SYS_restart_syscall, Any),
    // Bytes of inherited descriptors.
    (libc::SYS_read, Any),
    (libc::SYS_readv, Any),
    (libc::SYS_pread64, Any),
    (libc::SYS_preadv, Any),
    (libc::SYS_write, Any),
    (libc::SYS_writev, Any),
    (libc::SYS_sendmsg, Any),
    (libc::SYS_sendto, Any),
    (libc::SYS_recvmsg, Any),
    (libc::SYS_recvfrom, Any),
    (libc::SYS_shutdown, Any),
    (libc::SYS_getsockname, Any),
    (libc::SYS_getpeername, Any),
    (libc::SYS_getsockopt, Any),
    (libc::SYS_setsockopt, Any),
    (libc::SYS_lseek, Any),
    (libc::SYS_close, Any),
    (libc::SYS_dup, Any),
    (libc::SYS_fcntl, Any),
    (libc::SYS_fdatasync, Any),
    // Files of the jail.
    (libc::SYS_openat, Any),
    (libc::SYS_newfstatat, Any),
    (libc::SYS_fstat, Any),
    (libc::SYS_statx, Any),
    (libc::SYS_fstatfs, Any),
    (libc::SYS_access, Any),
    (libc::SYS_faccessat2, Any),
    (libc::SYS_readlink, Any),
    (libc::SYS_readlinkat, Any),
    (libc::SYS_getcwd, Any),
    // Memory. The emulator's code buffer is writable and executable.
    (libc::SYS_brk, Any),
    (libc::SYS_mmap, Any),
    (libc::SYS_mprotect, Any),
    (libc::SYS_mremap, Any),
    (libc::SYS_munmap, Any),
    (libc::SYS_madvise, Any),
    (libc::SYS_membarrier, Any),
    (libc::SYS_mlock, Any),
    (libc::SYS_munlock, Any),
    // Threads and what they know of themselves.
    (libc::SYS_clone, OneOf(0, &[THREAD])),
    (libc::SYS_set_robust_list, Any),
    (libc::SYS_rseq, Any),
    (libc::SYS_set_tid_address, Any),
    (libc::SYS_arch_prctl, Any),
    (
        libc::SYS_prctl,
        OneOf(
            0,
            &[
                libc::PR_SET_NAME as u32,
                libc::PR_GET_NAME as u32,
                libc::PR_SET_TIMERSLACK as u32,
                libc::PR_MCE_KILL as u32,
                libc::PR_SET_VMA as u32,
            ],
        ),
    ),
    // The limits of another process are out of reach: there is none.
    (libc::SYS_prlimit64, Any),
    (libc::SYS_getrlimit, Any),
    (libc::SYS_sched_getaffinity, Any),
    (libc::SYS_sched_yield, Any),
    (libc::SYS_getcpu, Any),
    (libc::SYS_sysinfo, Any),
    (libc::SYS_uname, Any),
    (libc::SYS_getpid, Any),
    (libc::SYS_gettid, Any),
    (libc::SYS_getuid, Any),
    (libc::SYS_geteuid, Any),
    (libc::SYS_getgid, Any),
    (libc::SYS_getegid, Any),
    (libc::SYS_getrandom, Any),
    // Signals, of this process to itself: there is no other in its namespace.
    (libc::SYS_rt_sigaction, Any),
    (libc::SYS_rt_sigprocmask, Any),
    (libc::SYS_rt_sigreturn, Any),
    (libc::SYS_rt_sigtimedwait, Any),
    (libc::SYS_rt_sigpending, Any),
    (libc::SYS_sigaltstack, Any),
    (libc::SYS_tgkill, Any),
    (libc::SYS_exit, Any),
    (libc::SYS_exit_group, Any),
];

/// What QEMU asks of its descriptors: whether and how they block.
pub const QEMU_IOCTL: Line = (libc::SYS_ioctl, OneOf(1, &[libc::FIONBIO as u32, libc::TCGETS as u32]));

/// The same under KVM. The numbers are those that stand in QEMU 7.2's own machine code for x86, each an
/// `_IO*(0xAE, …)` of `<linux/kvm.h>`.
pub const QEMU_KVM_IOCTL: Line = (
    libc::SYS_ioctl,
    OneOf(
        1,
        &[
            libc::FIONBIO as u32,
            libc::TCGETS as u32,
            0x4004_ae86,
            0x4004_ae8b,
            0x4004_ae99,
            0x4008_ae48,
            0x4008_ae6a,
            0x4008_ae89,
            0x4008_ae90,
            0x4008_ae93,
            0x4008_ae9c,
            0x4010_ae42,
            0x4010_ae67,
            0x4010_ae68,
            0x4010_aeab,
            0x4010_aeac,
            0x4018_aebd,
            0x4018_aee1,
            0x4018_aee2,
            0x4018_aee3,
            0x4020_ae46,
            0x4020_ae76,
            0x4020_aea5,
            0x4030_ae7b,
            0x4040_ae77,
            0x4040_ae79,
            0x4040_ae9e,
            0x4040_aea0,
            0x4048_ae9b,
            0x4068_aea3,
            0x4070_aea0,
            0x4080_aea2,
            0x4080_aebf,
            0x4090_ae82,
            0x4138_ae84,
            0x4140_aecd,
            0x4188_aea7,
            0x4188_aec6,
            0x41a0_ae8d,
            0x4400_ae8f,
            // QEMU computes the numbers of XSAVE's: no search for constants finds them.
            0x5000_aea5,
            0x8004_ae98,
            0x8008_ae9d,
            0x8010_aebb,
            0x8010_aebc,
            0x8030_ae7c,
            0x8040_ae9f,
            0x8070_ae9f,
            0x8080_aea1,
            0x8090_ae81,
            0x8138_ae83,
            0x8140_aecc,
            0x8188_aea6,
            0x81a0_ae8c,
            0x8208_ae63,
            0x8400_ae8e,
            0x9000_aea4,
            0x9000_aecf,
            0x0000_ae00,
            0x0000_ae01,
            0x0000_ae03,
            0x0000_ae04,
            0x0000_ae41,
            0x0000_ae44,
            0x0000_ae47,
            0x0000_ae60,
            0x0000_ae64,
            0x0000_ae71,
            0x0000_ae80,
            0x0000_ae9a,
            0x0000_aea2,
            0x0000_aea3,
            0x0000_aead,
            0x0000_aeb7,
            0x0000_aec7,
            0x0000_aece,
            0xc004_ae02,
            0xc004_ae0a,
            0xc008_ae05,
            0xc008_ae88,
            0xc008_aeba,
            0xc008_aec1,
            0xc00c_aee0,
            0xc018_aec0,
            0xc028_ae92,
            0xc048_ae65,
            0xc080_aebe,
            0xc208_ae62,
        ],
    ),
);

/// What the relay needs once it runs: its sockets, time, and memory for its tables. It names no address: not to
/// `sendto`, not by an option of a socket (a source route is one), and not to `sendmsg` and `sendmmsg`, whose
/// address lies behind a pointer and is seen by no filter. So its sockets send to where they were connected.
pub const RELAY: &[Line] = &[
    (libc::SYS_read, Any),
    (libc::SYS_readv, Any),
    (libc::SYS_write, Any),
    (libc::SYS_writev, Any),
    (libc::SYS_recvfrom, Any),
    (libc::SYS_recvmsg, Any),
    (libc::SYS_recvmmsg, Any),
    (libc::SYS_sendto, Null(4)),
    (libc::SYS_getsockopt, Any),
    (libc::SYS_getsockname, Any),
    (libc::SYS_fcntl, OneOf(1, &[libc::F_GETFD as u32, libc::F_GETFL as u32, libc::F_SETFL as u32])),
    (libc::SYS_ioctl, OneOf(1, &[libc::FIONBIO as u32])),
    (libc::SYS_shutdown, Any),
    (libc::SYS_close, Any),
    (libc::SYS_poll, Any),
    (libc::SYS_ppoll, Any),
    (libc::SYS_epoll_ctl, Any),
    (libc::SYS_epoll_wait, Any),
    (libc::SYS_epoll_pwait, Any),
    (libc::SYS_epoll_pwait2, Any),
    (libc::SYS_timerfd_settime, Any),
    (libc::SYS_clock_gettime, Any),
    (libc::SYS_clock_nanosleep, Any),
    (libc::SYS_gettimeofday, Any),
    (libc::SYS_restart_syscall, Any),
    (libc::SYS_futex, Any),
    (libc::SYS_brk, Any),
    (libc::SYS_mmap, Any),
    (libc::SYS_mremap, Any),
    (libc::SYS_munmap, Any),
    (libc::SYS_madvise, Any),
    (libc::SYS_mprotect, Any),
    (libc::SYS_getrandom, Any),
    (libc::SYS_getpid, Any),
    (libc::SYS_gettid, Any),
    // A panic: its words, then SIGABRT to itself.
    (libc::SYS_rt_sigaction, Any),
    (libc::SYS_rt_sigprocmask, Any),
    (libc::SYS_rt_sigreturn, Any),
    (libc::SYS_sigaltstack, Any),
    (libc::SYS_tgkill, Any),
    (libc::SYS_exit, Any),
    (libc::SYS_exit_group, Any),
];

/// A filter that can be installed.
#[derive(Debug, Clone)]
pub struct Filter {
    pub(crate) program: Vec<libc::sock_filter>,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Where `struct seccomp_data` has the call's number, the architecture, the arguments.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;
/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Calls of the x32 interface have this bit.
const X32: u32 = 0x4000_0000;

const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn step(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

impl Filter {
    /// A filter that lets `lines` pass.
    #[must_use]
    pub fn new(lines: &[Line]) -> Self {
        let mut program = vec![
            step(LOAD, ARCHITECTURE_AT, 0, 0),
            step(IF_EQUAL, ARCHITECTURE, 1, 0),
            step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
            step(LOAD, NUMBER_AT, 0, 0),
            step(IF_AT_LEAST, X32, 0, 1),
            step(RETURN, REFUSED, 0, 0),
            step(IF_EQUAL, number(libc::SYS_clone3), 0, 1),
            step(RETURN, UNKNOWN, 0, 0),
        ];
        for (call, arguments) in lines {
            match arguments {
                Any => {
                    program.push(step(IF_EQUAL, number(*call), 0, 1));
                    program.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
                }
                OneOf(argument, values) => {
                    // Behind the number's test: load, two steps for each value, the refusal.
                    let mut body = vec![step(LOAD, low_half(*argument), 0, 0)];
                    for value in *values {
                        body.push(step(IF_EQUAL, *value, 0, 1));
                        body.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
                    }
                    body.push(step(RETURN, REFUSED, 0, 0));
                    // Such a body is too long for a conditional jump, so it is jumped over by another step.
                    let over = u32::try_from(body.len()).unwrap_or(u32::MAX);
                    program.push(step(IF_EQUAL, number(*call), 1, 0));
                    program.push(step((libc::BPF_JMP | libc::BPF_JA) as u16, over, 0, 0));
                    program.extend(body);
                }
                Null(argument) => program.extend([
                    step(IF_EQUAL, number(*call), 0, 6),
                    step(LOAD, low_half(*argument), 0, 0),
                    step(IF_EQUAL, 0, 0, 3),
                    step(LOAD, low_half(*argument) + 4, 0, 0),
                    step(IF_EQUAL, 0, 0, 1),
                    step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
                    step(RETURN, REFUSED, 0, 0),
                ]),
            }
        }
        program.push(step(RETURN, REFUSED, 0, 0));
        Self { program }
    }

    /// The same, but a program may be executed once: see [`crate::sys::Exec::Once`].
    #[must_use]
    pub(crate) fn asking_for_exec(&self) -> Self {
        let mut program = self.program.clone();
        let last = program.pop();
        program.push(step(IF_EQUAL, number(libc::SYS_execve), 0, 1));
        program.push(step(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0));
        program.extend(last);
        Self { program }
    }
}

/// Where the low 32 bits of an argument stand; the high ones stand behind them.
fn low_half(argument: u8) -> u32 {
    ARGUMENTS_AT + 8 * u32::from(argument)
}

fn number(call: c_long) -> u32 {
    // Every number of the table is small and positive; one that is not would match no call.
    u32::try_from(call).unwrap_or(u32::MAX)
}
