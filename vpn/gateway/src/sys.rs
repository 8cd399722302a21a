//! Signals as a descriptor, trains of datagrams in one call, and all of this crate's `unsafe`.
//!
//! Why `unsafe` at all: no safe wrapper of `signalfd`, of `UDP_SEGMENT` or of `recvmmsg` is among our dependencies (see
//! `docs/decisions/0020-segments-of-datagrams.md`). The kernel is given plain bytes in buffers that outlive the call; what it
//! writes into them is read as bytes.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

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

/// Lets a socket give datagrams of one sender that came together as one message, on kernels that can.
pub(crate) fn receive_trains(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    let size = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: UDP_GRO takes one `int`, which `on` is for as long as the call lasts.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_GRO, ptr::from_ref(&on).cast(), size)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends datagrams of `segment` bytes each, the last perhaps shorter, in one call.
pub(crate) fn send_train(
    socket: BorrowedFd<'_>,
    to: SocketAddr,
    train: &[u8],
    segment: u16,
) -> io::Result<()> {
    let (mut name, name_len) = Name::new(to);
    let mut control = Control::segment(segment);
    let mut part = libc::iovec { iov_base: train.as_ptr().cast_mut().cast(), iov_len: train.len() };
    // SAFETY: a `msghdr` is plain data, and all zero is one without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = ptr::from_mut(&mut name).cast();
    message.msg_namelen = name_len;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = ptr::from_mut(&mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points at `name`, `part`, `train` and `control`, with their lengths, all of which live until
    // the call has returned; the kernel writes into none of them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Messages that one call receives, each of them up to 64 datagrams.
pub(crate) struct Inbox {
    bytes: Box<[u8]>,
    names: [Name; MESSAGES_MAX],
    controls: [Control; MESSAGES_MAX],
    lens: [usize; MESSAGES_MAX],
    count: usize,
}

/// Datagrams of one sender.
pub(crate) struct Train<'i> {
    pub(crate) from: SocketAddr,
    pub(crate) bytes: &'i [u8],
    /// Bytes of each but the last.
    pub(crate) segment: usize,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; MESSAGES_MAX * MESSAGE_LEN].into_boxed_slice(),
            names: [Name::default(); MESSAGES_MAX],
            controls: [Control::default(); MESSAGES_MAX],
            lens: [0; MESSAGES_MAX],
            count: 0,
        }
    }

    /// Receives what is there, up to [`MESSAGES_MAX`] messages, in the place of what was in the inbox.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.count = 0;
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MESSAGES_MAX];
        // SAFETY: a `mmsghdr` is plain data, and all zero is one without anything.
        let mut messages: [libc::mmsghdr; MESSAGES_MAX] = unsafe { std::mem::zeroed() };
        let buffers = self.bytes.chunks_exact_mut(MESSAGE_LEN);
        for (number, buffer) in buffers.enumerate() {
            parts[number] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            self.controls[number] = Control::default();
            let header = &mut messages[number].msg_hdr;
            header.msg_name = ptr::from_mut(&mut self.names[number]).cast();
            header.msg_namelen = NAME_LEN;
            header.msg_iov = &raw mut parts[number];
            header.msg_iovlen = 1;
            header.msg_control = ptr::from_mut(&mut self.controls[number]).cast();
            header.msg_controllen = size_of::<Control>();
        }
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: there are `MESSAGES_MAX` messages; each points at its part of `parts`, and that at its own piece of
        // `bytes`, at its name and its control, with their lengths. All of them live until the call has returned, and
        // any bytes that the kernel writes there are good ones.
        let count = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), MESSAGES, flags, ptr::null_mut())
        };
        self.count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (len, message) in self.lens.iter_mut().zip(&messages[..self.count]) {
            let whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            *len = if whole { message.msg_len as usize } else { 0 };
        }
        Ok(())
    }

    /// Whether there may be more than what the last call took.
    pub(crate) fn is_full(&self) -> bool {
        self.count == MESSAGES_MAX
    }

    /// What the last call took; empty messages are none.
    pub(crate) fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        let buffers = self.bytes.chunks_exact(MESSAGE_LEN);
        let all = buffers.zip(&self.names).zip(&self.controls).zip(&self.lens).take(self.count);
        all.filter_map(|(((buffer, name), control), len)| {
            let bytes = buffer.get(..*len).filter(|bytes| !bytes.is_empty())?;
            let segment = control.segment_len().filter(|segment| *segment > 0).unwrap_or(bytes.len());
            Some(Train { from: name.address()?, bytes, segment })
        })
    }
}

/// A socket's address as the kernel has it: `struct sockaddr_in` or `struct sockaddr_in6`.
#[derive(Clone, Copy, Default)]
#[repr(C, align(8))]
struct Name([u8; NAME_LEN as usize]);

impl Name {
    fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
        let mut name = [0; NAME_LEN as usize];
        name[2..4].copy_from_slice(&address.port().to_be_bytes());
        let (family, len) = match address {
            SocketAddr::V4(address) => {
                name[4..8].copy_from_slice(&address.ip().octets());
                (AF_INET, 16)
            }
            SocketAddr::V6(address) => {
                name[4..8].copy_from_slice(&address.flowinfo().to_be_bytes());
                name[8..24].copy_from_slice(&address.ip().octets());
                name[24..28].copy_from_slice(&address.scope_id().to_ne_bytes());
                (AF_INET6, NAME_LEN)
            }
        };
        name[..2].copy_from_slice(&family.to_ne_bytes());
        (Self(name), len)
    }

    fn address(&self) -> Option<SocketAddr> {
        let [f0, f1, p0, p1, a, b, c, d, rest @ ..] = &self.0;
        let port = u16::from_be_bytes([*p0, *p1]);
        match u16::from_ne_bytes([*f0, *f1]) {
            AF_INET => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(*a, *b, *c, *d)), port)),
            AF_INET6 => {
                let (address, scope) = rest.split_first_chunk::<16>()?;
                let scope = u32::from_ne_bytes(*scope.first_chunk()?);
                Some(SocketAddrV6::new(Ipv6Addr::from(*address), port, 0, scope).into())
            }
            _ => None,
        }
    }
}

/// One control message: `struct cmsghdr` with up to eight bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Control {
    len: usize,
    level: libc::c_int,
    kind: libc::c_int,
    data: [u8; 8],
}

impl Control {
    fn segment(segment: u16) -> Self {
        let mut data = [0; 8];
        data[..2].copy_from_slice(&segment.to_ne_bytes());
        Self { len: CONTROL_HEADER + 2, level: libc::SOL_UDP, kind: libc::UDP_SEGMENT, data }
    }

    /// What UDP_GRO says: an `int`.
    fn segment_len(&self) -> Option<usize> {
        let is_it = (self.level, self.kind) == (libc::SOL_UDP, libc::UDP_GRO);
        let [a, b, c, d, ..] = self.data;
        let len = i32::from_ne_bytes([a, b, c, d]);
        (is_it && self.len >= CONTROL_HEADER + 4).then(|| usize::try_from(len).ok()).flatten()
    }
}

/// `sa_family_t` of `AF_INET` and `AF_INET6` in `linux/socket.h`.
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const NAME_LEN: libc::socklen_t = 28;
const CONTROL_HEADER: usize = 16;
/// Messages in an inbox.
const MESSAGES: libc::c_uint = 8;
const MESSAGES_MAX: usize = MESSAGES as usize;
/// Bytes of one: what the kernel puts together at most.
const MESSAGE_LEN: usize = 65_536;

const _: () = assert!(size_of::<libc::sockaddr_in6>() == NAME_LEN as usize);
const _: () = assert!(size_of::<libc::sockaddr_in>() == 16);
const _: () = assert!(size_of::<libc::cmsghdr>() == CONTROL_HEADER);
const _: () = assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
const _: () = assert!(align_of::<Name>() >= align_of::<libc::sockaddr_in6>());
