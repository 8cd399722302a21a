//! What a QEMU that was taken over would try. Run by the stub in QEMU's place; each attempt is told with how the
//! kernel answered it. And what a relay would.

use crate::stub::KEEPALIVE;
use libc::{c_char, c_int, c_long, c_void};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketType, sockopt},
};
use std::{
    io::{self, IoSlice},
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    ptr,
};

/// A name, and the result of a system call: below zero when it was refused. What the filter refuses fails
/// with `EPERM` before its arguments are looked at; all that is refused otherwise says how.
type Attempt = (&'static str, Refusal, fn() -> c_long);

/// How an attempt has to fail.
#[derive(Clone, Copy)]
enum Refusal {
    /// By the filter.
    Filter,
    /// A second exec, for which there is no listener any more.
    Exec,
    /// There is no such thing in the jail, or it may not be touched.
    Elsewhere,
    /// Likewise, or first because it runs: the kernel asks for that before it asks whether the mount is for reading.
    Running,
}
use Refusal::{Elsewhere, Exec, Filter, Running};

impl Refusal {
    fn is(self, errno: i32) -> bool {
        match self {
            Self::Filter => errno == libc::EPERM,
            Self::Exec => errno == libc::ENOSYS,
            Self::Elsewhere => [libc::ENOENT, libc::EACCES, libc::EROFS, libc::ESRCH].contains(&errno),
            Self::Running => Elsewhere.is(errno) || errno == libc::ETXTBSY,
        }
    }
}

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

/// The address of a name of a socket's, of which only the family is read.
fn unix() -> c_long {
    const FAMILY: [u8; 4] = libc::AF_UNIX.to_le_bytes();
    FAMILY.as_ptr() as c_long
}

fn execute(path: &'static [u8]) -> c_long {
    let words: [*const c_char; 2] = [path.as_ptr().cast(), ptr::null()];
    // SAFETY: the path ends with a zero, both lists with null.
    c_long::from(unsafe { libc::execve(path.as_ptr().cast(), words.as_ptr(), words[1..].as_ptr()) })
}

const ATTEMPTS: &[Attempt] = &[
    ("open /etc/passwd", Elsewhere, || open(b"/etc/passwd\0", libc::O_RDONLY)),
    ("open the host's root", Elsewhere, || open(b"/old/etc/passwd\0", libc::O_RDONLY)),
    ("list the root", Elsewhere, || open(b"/\0", libc::O_RDONLY | libc::O_DIRECTORY)),
    ("open /sys", Elsewhere, || open(b"/sys/kernel/uevent_seqnum\0", libc::O_RDONLY)),
    ("open /dev/kvm", Elsewhere, || open(b"/dev/kvm\0", libc::O_RDWR)),
    ("open /dev/null", Elsewhere, || open(b"/dev/null\0", libc::O_RDWR)),
    ("open /proc/sys", Elsewhere, || open(b"/proc/sys/kernel/core_pattern\0", libc::O_RDONLY)),
    ("open /proc/kallsyms", Elsewhere, || open(b"/proc/kallsyms\0", libc::O_RDONLY)),
    ("open a process outside", Elsewhere, || open(b"/proc/2/status\0", libc::O_RDONLY)),
    ("open the root image anew", Elsewhere, || open(b"/proc/self/fd/5\0", libc::O_RDONLY)),
    ("open the root image for writing", Elsewhere, || open(b"/proc/self/fd/5\0", libc::O_RDWR)),
    ("make a file", Elsewhere, || open(b"/x\0", libc::O_RDWR | libc::O_CREAT)),
    ("write its own program", Running, || open(b"/proc/self/exe\0", libc::O_RDWR)),
    ("write its loader", Elsewhere, || open(b"/lib64/ld-linux-x86-64.so.2\0", libc::O_RDWR)),
    ("open by handle", Filter, || call(libc::SYS_open_by_handle_at, [5, 0, 0, 0, 0])),
    ("socket unix", Filter, || socket(libc::AF_UNIX, libc::SOCK_STREAM)),
    ("socket inet", Filter, || socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("socket inet datagrams", Filter, || socket(libc::AF_INET, libc::SOCK_DGRAM)),
    ("socket inet6", Filter, || socket(libc::AF_INET6, libc::SOCK_STREAM)),
    ("socket vsock", Filter, || socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("socket netlink", Filter, || socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("socket packet", Filter, || socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("socket alg", Filter, || socket(libc::AF_ALG, libc::SOCK_SEQPACKET)),
    ("connect an inherited socket", Filter, || call(libc::SYS_connect, [6, unix(), 2, 0, 0])),
    // With such a name the kernel finds one itself.
    ("bind an inherited socket", Filter, || call(libc::SYS_bind, [6, unix(), 2, 0, 0])),
    ("execute itself", Exec, || execute(b"/proc/self/exe\0")),
    ("execute a shell", Exec, || execute(b"/bin/sh\0")),
    ("execute the loader", Exec, || execute(b"/lib64/ld-linux-x86-64.so.2\0")),
    ("execute inherited memory", Exec, || execute(b"/proc/self/fd/3\0")),
    ("execute by descriptor", Filter, || {
        call(libc::SYS_execveat, [3, 0, 0, 0, c_long::from(libc::AT_EMPTY_PATH)])
    }),
    ("make memory to execute", Filter, || call(libc::SYS_memfd_create, [0; 5])),
    ("fork", Filter, || call(libc::SYS_clone, [c_long::from(libc::SIGCHLD), 0, 0, 0, 0])),
    ("vfork", Filter, || call(libc::SYS_vfork, [0; 5])),
    ("be traced", Filter, || call(libc::SYS_ptrace, [0; 5])),
    ("trace", Filter, || call(libc::SYS_ptrace, [16, 1, 0, 0, 0])),
    ("read another's memory", Filter, || call(libc::SYS_process_vm_readv, [1, 0, 0, 0, 0])),
    ("kill everybody", Filter, || call(libc::SYS_kill, [-1, 9, 0, 0, 0])),
    // The process itself is the only one that it can name.
    ("signal itself", Filter, || call(libc::SYS_kill, [1, 0, 0, 0, 0])),
    ("kill an outside process", Elsewhere, || call(libc::SYS_tgkill, [2, 2, 9, 0, 0])),
    ("open a process", Filter, || call(libc::SYS_pidfd_open, [1, 0, 0, 0, 0])),
    ("mount", Filter, || call(libc::SYS_mount, [0; 5])),
    ("mount anew", Filter, || call(libc::SYS_fsopen, [0; 5])),
    ("change the root", Filter, || call(libc::SYS_chroot, [0; 5])),
    ("unshare user", Filter, || call(libc::SYS_unshare, [c_long::from(libc::CLONE_NEWUSER), 0, 0, 0, 0])),
    ("enter a namespace", Filter, || call(libc::SYS_setns, [3, 0, 0, 0, 0])),
    ("bpf", Filter, || call(libc::SYS_bpf, [0; 5])),
    ("io_uring", Filter, || call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0])),
    ("userfaultfd", Filter, || call(libc::SYS_userfaultfd, [0; 5])),
    ("perf", Filter, || call(libc::SYS_perf_event_open, [0; 5])),
    ("keyctl", Filter, || call(libc::SYS_keyctl, [0; 5])),
    ("another filter", Filter, || call(libc::SYS_seccomp, [1, 8, 0, 0, 0])),
    ("become dumpable", Filter, || call(libc::SYS_prctl, [c_long::from(libc::PR_SET_DUMPABLE), 1, 0, 0, 0])),
    ("ioctl of KVM", Filter, || call(libc::SYS_ioctl, [6, 0xae00, 0, 0, 0])),
    ("push a terminal's input", Filter, || call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0])),
    ("change the clock", Filter, || call(libc::SYS_clock_settime, [0; 5])),
    ("load a module", Filter, || call(libc::SYS_finit_module, [3, 0, 0, 0, 0])),
];

/// Tries everything; one line for each attempt.
pub(crate) fn attempts() -> Vec<String> {
    let answer = |(name, refusal, attempt): &Attempt| match attempt() {
        result if result < 0 => {
            let error = io::Error::last_os_error();
            let expected = error.raw_os_error().is_some_and(|errno| refusal.is(errno));
            format!("{}: {name}: {error}", if expected { "refused" } else { "FAILED OTHERWISE" })
        }
        result => format!("PASSED: {name}: {result}"),
    };
    ATTEMPTS.iter().map(answer).collect()
}

/// Sends to the abstract name and to the file by the uplink's socket; how that was answered.
pub(crate) fn send_away(abstract_name: &str, file: &str) -> Vec<String> {
    let addresses = [
        rustix::net::SocketAddrUnix::new_abstract_name(abstract_name.as_bytes()).unwrap(),
        rustix::net::SocketAddrUnix::new(file).unwrap(),
    ];
    // SAFETY: kontord gave the uplink this number, and the stub holds it open as long as it lives.
    let uplink = unsafe { std::os::fd::BorrowedFd::borrow_raw(9) };
    let answer = |address| rustix::net::sendto(uplink, b"away", rustix::net::SendFlags::DONTWAIT, address);
    addresses.iter().map(|address| format!("sent: {:?}", answer(address))).collect()
}

/// Sends to a stranger's address that lies where a filter that looks at the low half of a pointer sees nothing.
fn send_by_high_pointer(socket: &OwnedFd, stranger: SocketAddr) -> Result<(), Errno> {
    const LOW_HALF_ZERO: usize = 1 << 32;
    let SocketAddr::V4(address) = stranger else { return Err(Errno::AFNOSUPPORT) };
    let name = libc::sockaddr_in {
        sin_family: libc::AF_INET.try_into().unwrap(),
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
    );
    // SAFETY: fresh memory, at a place where there is none yet, or an error.
    let place = unsafe { libc::mmap(LOW_HALF_ZERO as *mut c_void, 4096, access, flags, -1, 0) };
    assert_eq!(place as usize, LOW_HALF_ZERO);
    // SAFETY: a page has room for it, and is aligned for everything.
    unsafe { place.cast::<libc::sockaddr_in>().write(name) };
    let length = size_of::<libc::sockaddr_in>().try_into().unwrap();
    // SAFETY: the kernel reads the datagram and the name, both of the lengths given.
    let sent =
        unsafe { libc::sendto(socket.as_raw_fd(), KEEPALIVE.as_ptr().cast(), 32, 0, place.cast(), length) };
    if sent < 0 { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap()) } else { Ok(()) }
}

/// Tries to reach the stranger by a socket that is connected to a gateway, then the gateway, which echoes. What came
/// of it, on one line.
pub(crate) fn reach(socket: &OwnedFd, stranger: u16) -> String {
    let stranger = SocketAddr::from((Ipv4Addr::LOCALHOST, stranger));
    let datagram = [IoSlice::new(&KEEPALIVE)];
    let none = &mut SendAncillaryBuffer::default();
    let sendmmsg = call(libc::SYS_sendmmsg, [socket.as_raw_fd().into(), 0, 0, 0, 0]);
    let attempts = [
        ("sendto", rustix::net::sendto(socket, &KEEPALIVE, SendFlags::empty(), &stranger).map(drop)),
        ("sendto by a high pointer", send_by_high_pointer(socket, stranger)),
        (
            "sendmsg",
            rustix::net::sendmsg_addr(socket, &stranger, &datagram, none, SendFlags::empty()).map(drop),
        ),
        (
            "sendmsg without an address",
            rustix::net::sendmsg(socket, &datagram, none, SendFlags::empty()).map(drop),
        ),
        ("sendmmsg", if sendmmsg < 0 { Err(Errno::PERM) } else { Ok(()) }),
        ("connect", rustix::net::connect(socket, &stranger)),
        ("disconnect", rustix::net::connect_unspec(socket)),
        ("bind", rustix::net::bind(socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))),
        ("set an option", sockopt::set_socket_broadcast(socket, true)),
        ("another socket", rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).map(drop)),
    ];
    let count = attempts.len();
    let passed: Vec<_> = attempts.iter().filter(|(_, answer)| *answer != Err(Errno::PERM)).collect();
    let sent = rustix::net::send(socket, &KEEPALIVE, SendFlags::empty());
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    let answered = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&patience)) == Ok(1)
        && rustix::net::recv(socket, &mut [0; 99], RecvFlags::DONTWAIT).is_ok_and(|(length, _)| length == 32);
    format!("tried {count}, not refused: {passed:?}; gateway: {sent:?}, answers: {answered}")
}

/// How many there are.
pub(crate) fn count() -> usize {
    ATTEMPTS.len()
}
