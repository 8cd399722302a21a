//! What is left to the tunnel once it has its descriptors: moving bytes and knowing the time.
//!
//! A filter of system calls (seccomp) names what may be called; anything else ends the process at once.
//! Opening a file, executing something, a socket, another process or another's memory are not on the
//! list, and no memory becomes executable.

use crate::sys;
use rustix::process::{DumpableBehavior, geteuid, set_dumpable_behavior};
use std::io;

/// What the loop, the allocator and the end of the process need.
const ALLOWED: [libc::c_long; 25] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// It was started as root.
    #[error("the tunnel does not run as root")]
    Root,
    /// The kernel refused.
    #[error("give up all power")]
    Refused(#[source] io::Error),
}

/// Gives up what init gave all the same, and everything that the loop does not need. Nothing can be
/// opened afterwards.
pub(super) fn confine() -> Result<(), ConfineError> {
    if geteuid().is_root() {
        return Err(ConfineError::Root);
    }
    sys::give_up_capabilities().map_err(ConfineError::Refused)?;
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    hidden.map_err(|error| ConfineError::Refused(error.into()))?;
    sys::install_filter(&filter()).map_err(ConfineError::Refused)
}

/// The filter in the kernel's classic BPF, over
///
/// ```text
///  0..4    number of the system call
///  4..8    architecture
/// 16..64   six arguments of 8 bytes
/// ```
fn filter() -> Vec<libc::sock_filter> {
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    /// Lower half of `mmap`'s third argument.
    const PROTECTION: u32 = 32;
    /// `AUDIT_ARCH_X86_64` (linux/audit.h)
    const X86_64: u32 = 0xC000_003E;
    let allowed = u8::try_from(ALLOWED.len()).expect("jumps reach over the list");

    let mut program = vec![
        load(ARCHITECTURE),
        // Any other architecture: past everything, to the end of the process.
        jump_if(libc::BPF_JEQ, X86_64, 0, allowed + 4),
        load(NUMBER),
    ];
    for (call, behind) in ALLOWED.iter().zip((0..allowed).rev()) {
        program.push(jump_if(libc::BPF_JEQ, number(*call), behind + 4, 0));
    }
    program.extend([
        jump_if(libc::BPF_JEQ, number(libc::SYS_mmap), 0, 2),
        load(PROTECTION),
        jump_if(libc::BPF_JSET, u32::try_from(libc::PROT_EXEC).expect("a bit"), 0, 1),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        answer(libc::SECCOMP_RET_ALLOW),
    ]);
    program
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).expect("system calls have small numbers")
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

fn jump_if(test: u32, value: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | test | libc::BPF_K, value, then, otherwise)
}

fn answer(value: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).expect("classic BPF"), jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer, by running the program over one call.
    fn verdict(architecture: u32, call: libc::c_long, third: u64) -> u32 {
        let mut data = [0; 64];
        data[0..4].copy_from_slice(&number(call).to_le_bytes());
        data[4..8].copy_from_slice(&architecture.to_le_bytes());
        data[32..40].copy_from_slice(&third.to_le_bytes());
        let program = filter();
        let (mut at, mut loaded) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let skip = |holds: bool| usize::from(if holds { jt } else { jf });
            match u32::from(code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    let offset = usize::try_from(k).unwrap();
                    loaded = u32::from_le_bytes(*data[offset..].first_chunk().unwrap());
                }
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += skip(loaded == k),
                code if code == libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K => at += skip(loaded & k != 0),
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const X86_64: u32 = 0xC000_003E;
    const I386: u32 = 0x4000_0003;

    #[test]
    fn each_call_on_the_list_passes() {
        for call in ALLOWED {
            assert_eq!(verdict(X86_64, call, 7), libc::SECCOMP_RET_ALLOW, "call {call}");
        }
    }

    #[test]
    fn every_other_call_ends_the_process() {
        for call in (0..600).filter(|call| *call != libc::SYS_mmap && !ALLOWED.contains(call)) {
            assert_eq!(verdict(X86_64, call, 0), libc::SECCOMP_RET_KILL_PROCESS, "call {call}");
        }
        for call in
            [libc::SYS_openat, libc::SYS_execve, libc::SYS_socket, libc::SYS_clone, libc::SYS_mprotect]
        {
            assert!(!ALLOWED.contains(&call));
        }
    }

    #[test]
    fn memory_is_mapped_but_not_to_execute() {
        let map = |protection: i32| verdict(X86_64, libc::SYS_mmap, u64::try_from(protection).unwrap());
        assert_eq!(map(libc::PROT_READ | libc::PROT_WRITE), libc::SECCOMP_RET_ALLOW);
        assert_eq!(map(libc::PROT_READ | libc::PROT_EXEC), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn calls_of_another_architecture_end_the_process() {
        for call in 0..400 {
            assert_eq!(verdict(I386, call, 0), libc::SECCOMP_RET_KILL_PROCESS);
        }
        // The x32 variant of a call carries bit 30 in its number.
        assert_eq!(verdict(X86_64, libc::SYS_read | 0x4000_0000, 0), libc::SECCOMP_RET_KILL_PROCESS);
    }
}
