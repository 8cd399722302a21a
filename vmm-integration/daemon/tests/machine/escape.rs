//! What a QEMU that was taken over would try. Run by the stub in QEMU's place; each attempt is told with how the
//! kernel answered it.

use libc::{c_char, c_int, c_long};
use std::{io, ptr};

/// A name, and the result of a system call: below zero when it was refused.
type Attempt = (&'static str, fn() -> c_long);

fn open(path: &'static [u8], flags: c_int) -> c_long {
    // SAFETY: every path here ends with a zero.
    c_long::from(unsafe { libc::open(path.as_ptr().cast(), flags) })
}

fn socket(family: c_int, kind: c_int) -> c_long {
    // SAFETY: numbers only.
    c_long::from(unsafe { libc::socket(family, kind, 0) })
}

/// A call that takes numbers, or whose pointers may be null: it is refused before it looks at them.
fn call(number: c_long, arguments: [c_long; 5]) -> c_long {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the filter refuses each of these calls; one that passed would be given numbers and null pointers,
    // and fails the test.
    unsafe { libc::syscall(number, a, b, c, d, e) }
}

fn execute(path: &'static [u8]) -> c_long {
    let words: [*const c_char; 2] = [path.as_ptr().cast(), ptr::null()];
    // SAFETY: the path ends with a zero, both lists with null.
    c_long::from(unsafe { libc::execve(path.as_ptr().cast(), words.as_ptr(), words[1..].as_ptr()) })
}

const ATTEMPTS: &[Attempt] = &[
    ("open /etc/passwd", || open(b"/etc/passwd\0", libc::O_RDONLY)),
    ("open the host's root", || open(b"/old/etc/passwd\0", libc::O_RDONLY)),
    ("list the root", || open(b"/\0", libc::O_RDONLY | libc::O_DIRECTORY)),
    ("open /sys", || open(b"/sys/kernel/uevent_seqnum\0", libc::O_RDONLY)),
    ("open /dev/kvm", || open(b"/dev/kvm\0", libc::O_RDWR)),
    ("open /dev/null", || open(b"/dev/null\0", libc::O_RDWR)),
    ("open /proc/sys", || open(b"/proc/sys/kernel/core_pattern\0", libc::O_RDONLY)),
    ("open /proc/kallsyms", || open(b"/proc/kallsyms\0", libc::O_RDONLY)),
    ("open a process outside", || open(b"/proc/2/status\0", libc::O_RDONLY)),
    ("open the root image anew", || open(b"/proc/self/fd/5\0", libc::O_RDONLY)),
    ("open the root image for writing", || open(b"/proc/self/fd/5\0", libc::O_RDWR)),
    ("make a file", || open(b"/x\0", libc::O_RDWR | libc::O_CREAT)),
    ("write its own program", || open(b"/proc/self/exe\0", libc::O_RDWR)),
    ("open by handle", || call(libc::SYS_open_by_handle_at, [5, 0, 0, 0, 0])),
    ("socket unix", || socket(libc::AF_UNIX, libc::SOCK_STREAM)),
    ("socket inet", || socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("socket inet datagrams", || socket(libc::AF_INET, libc::SOCK_DGRAM)),
    ("socket inet6", || socket(libc::AF_INET6, libc::SOCK_STREAM)),
    ("socket vsock", || socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("socket netlink", || socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("socket packet", || socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("socket alg", || socket(libc::AF_ALG, libc::SOCK_SEQPACKET)),
    ("connect an inherited socket", || call(libc::SYS_connect, [6, 0, 0, 0, 0])),
    ("bind an inherited socket", || call(libc::SYS_bind, [6, 0, 0, 0, 0])),
    ("execute itself", || execute(b"/proc/self/exe\0")),
    ("execute a shell", || execute(b"/bin/sh\0")),
    ("execute the loader", || execute(b"/lib64/ld-linux-x86-64.so.2\0")),
    ("execute inherited memory", || execute(b"/proc/self/fd/3\0")),
    ("execute by descriptor", || call(libc::SYS_execveat, [3, 0, 0, 0, c_long::from(libc::AT_EMPTY_PATH)])),
    ("make memory to execute", || call(libc::SYS_memfd_create, [0; 5])),
    ("fork", || call(libc::SYS_clone, [c_long::from(libc::SIGCHLD), 0, 0, 0, 0])),
    ("vfork", || call(libc::SYS_vfork, [0; 5])),
    ("be traced", || call(libc::SYS_ptrace, [0; 5])),
    ("trace", || call(libc::SYS_ptrace, [16, 1, 0, 0, 0])),
    ("read another's memory", || call(libc::SYS_process_vm_readv, [2, 0, 0, 0, 0])),
    ("kill everybody", || call(libc::SYS_kill, [-1, 9, 0, 0, 0])),
    ("kill an outside process", || call(libc::SYS_tgkill, [2, 2, 9, 0, 0])),
    ("open a process", || call(libc::SYS_pidfd_open, [2, 0, 0, 0, 0])),
    ("mount", || call(libc::SYS_mount, [0; 5])),
    ("mount anew", || call(libc::SYS_fsopen, [0; 5])),
    ("change the root", || call(libc::SYS_chroot, [0; 5])),
    ("unshare user", || call(libc::SYS_unshare, [c_long::from(libc::CLONE_NEWUSER), 0, 0, 0, 0])),
    ("enter a namespace", || call(libc::SYS_setns, [3, 0, 0, 0, 0])),
    ("bpf", || call(libc::SYS_bpf, [0; 5])),
    ("io_uring", || call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0])),
    ("userfaultfd", || call(libc::SYS_userfaultfd, [0; 5])),
    ("perf", || call(libc::SYS_perf_event_open, [0; 5])),
    ("keyctl", || call(libc::SYS_keyctl, [0; 5])),
    ("another filter", || call(libc::SYS_seccomp, [1, 8, 0, 0, 0])),
    ("become dumpable", || call(libc::SYS_prctl, [c_long::from(libc::PR_SET_DUMPABLE), 1, 0, 0, 0])),
    ("ioctl of KVM", || call(libc::SYS_ioctl, [6, 0xae00, 0, 0, 0])),
    ("push a terminal's input", || call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0])),
    ("change the clock", || call(libc::SYS_clock_settime, [0; 5])),
    ("load a module", || call(libc::SYS_finit_module, [3, 0, 0, 0, 0])),
];

/// Tries everything; one line for each attempt.
pub(crate) fn attempts() -> Vec<String> {
    let answer = |(name, attempt): &Attempt| match attempt() {
        result if result < 0 => format!("refused: {name}: {}", io::Error::last_os_error()),
        result => format!("PASSED: {name}: {result}"),
    };
    ATTEMPTS.iter().map(answer).collect()
}

/// How many there are.
pub(crate) fn count() -> usize {
    ATTEMPTS.len()
}
