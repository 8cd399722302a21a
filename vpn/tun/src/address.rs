//! An IPv6 address that is usable at once.
//!
//! The `ioctl` for it leaves an address *tentative* until a worker of the kernel has looked for duplicates, also on an
//! interface without neighbours; until then nothing can be bound to it or sent from it. Only rtnetlink can say
//! that there is nothing to look for. One request, one answer (`linux/netlink.h`, `linux/if_addr.h`), all in
//! host order:
//!
//! ```text
//!  0..4   length, 52            16      family          24..28  length and type of IFA_LOCAL
//!  4..6   RTM_NEWADDR           17      prefix length   28..44  address
//!  6..8   flags                 18      (flags, old)    44..48  length and type of IFA_FLAGS
//!  8..12  sequence number       19      scope           48..52  flags
//! 12..16  port (0: the kernel)  20..24  interface
//!
//!  answer: 16 bytes of header of type NLMSG_ERROR, then 0 or an error number below it
//! ```
//!
//! The answer is not all: such an address can be bound to at once, but the *local route*, without which a packet
//! to it is dropped, is made later, again by that worker. So the news of routes is listened to until it is there
//! (`linux/rtnetlink.h`): RTM_NEWROUTE, `struct rtmsg` with RTN_LOCAL, the address in RTA_DST.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Adds an IPv6 address to the interface with this index; when this returns the kernel takes packets for it.
///
/// # Errors
/// The kernel's; `TimedOut` when the address has no local route after [`PATIENCE`].
pub(crate) fn add(index: u32, address: Ipv6Addr, prefix_len: u8) -> io::Result<()> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    // No protocol is NETLINK_ROUTE, which is 0.
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, RTMGRP_IPV6_ROUTE))?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &request(index, address, prefix_len), SendFlags::empty(), &kernel)?;
    let end = Instant::now() + PATIENCE;
    let (mut is_added, mut is_local) = (false, false);
    let mut buffer = [0; ANSWER_MAX];
    while !(is_added && is_local) {
        wait(&socket, end)?;
        let (len, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        for message in messages(&buffer[..len]) {
            match message {
                Message::Answer(0) => is_added = true,
                Message::Answer(error) => return Err(Errno::from_raw_os_error(error.wrapping_neg()).into()),
                Message::LocalRoute(to) => is_local |= to == address,
                Message::Other => {}
            }
        }
    }
    Ok(())
}

/// Waits until there is something to receive.
fn wait(socket: &OwnedFd, end: Instant) -> io::Result<()> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the address has no local route")),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn request(index: u32, address: Ipv6Addr, prefix_len: u8) -> Vec<u8> {
    let mut request = Vec::with_capacity(usize::from(REQUEST_LEN));
    request.extend(u32::from(REQUEST_LEN).to_ne_bytes());
    request.extend(RTM_NEWADDR.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([AF_INET6, prefix_len, 0, RT_SCOPE_UNIVERSE]);
    request.extend(index.to_ne_bytes());
    request.extend([ATTRIBUTE_HEADER_LEN + 16, IFA_LOCAL].map(u16::to_ne_bytes).concat());
    request.extend(address.octets());
    request.extend([ATTRIBUTE_HEADER_LEN + 4, IFA_FLAGS].map(u16::to_ne_bytes).concat());
    request.extend(IFA_F_NODAD.to_ne_bytes());
    request
}

/// What the kernel says.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// The error number in the answer, 0 or negative.
    Answer(i32),
    /// Packets to this address are taken from now on.
    LocalRoute(Ipv6Addr),
    Other,
}

/// The messages of one datagram, as far as they are whole.
fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while let Some(len) = number4(bytes, 0).and_then(|len| usize::try_from(len).ok()) {
        let Some(message) = bytes.get(..len).filter(|message| message.len() >= HEADER_LEN) else { break };
        messages.push(read(message).unwrap_or(Message::Other));
        bytes = bytes.get(len.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    }
    messages
}

fn read(message: &[u8]) -> Option<Message> {
    match number2(message, 4)? {
        NLMSG_ERROR => Some(Message::Answer(number4(message, HEADER_LEN)?.cast_signed())),
        RTM_NEWROUTE if *message.get(ROUTE_KIND_AT)? == RTN_LOCAL => {
            let mut attributes = message.get(ROUTE_ATTRIBUTES_AT..)?;
            loop {
                let len = usize::from(number2(attributes, 0)?);
                let attribute = attributes.get(usize::from(ATTRIBUTE_HEADER_LEN)..len)?;
                if number2(attributes, 2)? == RTA_DST {
                    let address: [u8; 16] = attribute.try_into().ok()?;
                    return Some(Message::LocalRoute(address.into()));
                }
                attributes = attributes.get(len.next_multiple_of(ALIGNMENT)..)?;
            }
        }
        _ => None,
    }
}

fn number2(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

fn number4(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

/// How long the kernel's worker may take: it waits for the lock of all interfaces.
const PATIENCE: Duration = Duration::from_secs(10);
const REQUEST_LEN: u16 = 52;
/// The answer repeats the request behind its own 20 bytes; a route takes some 200.
const ANSWER_MAX: usize = 4096;
const HEADER_LEN: usize = 16;
const ALIGNMENT: usize = 4;
/// `rtm_type` of `struct rtmsg`, and what comes behind that structure.
const ROUTE_KIND_AT: usize = HEADER_LEN + 7;
const ROUTE_ATTRIBUTES_AT: usize = HEADER_LEN + 12;
const ATTRIBUTE_HEADER_LEN: u16 = 4;
const AF_INET6: u8 = 10;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTMGRP_IPV6_ROUTE: u32 = 0x400;
const RTN_LOCAL: u8 = 2;
const RTA_DST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const RT_SCOPE_UNIVERSE: u8 = 0;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_as_long_as_it_says() {
        let request = request(3, Ipv6Addr::LOCALHOST, 128);
        assert_eq!(request.len(), usize::from(REQUEST_LEN));
        assert_eq!(request[..4], u32::from(REQUEST_LEN).to_ne_bytes());
        assert_eq!(request[28..44], Ipv6Addr::LOCALHOST.octets());
    }

    fn message(kind: u16, content: &[u8]) -> Vec<u8> {
        let len = u32::try_from(HEADER_LEN + content.len()).unwrap();
        [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], content].concat()
    }

    /// A route of this kind, with another attribute before its destination.
    fn route(kind: u8, to: Ipv6Addr) -> Vec<u8> {
        let table = [&[8, 0, 15, 0][..], &[255, 0, 0, 0]].concat();
        let destination = [&[20, 0, 1, 0][..], &to.octets()].concat();
        message(
            RTM_NEWROUTE,
            &[&[AF_INET6, 128, 0, 0, 0, 0, 0, kind, 0, 0, 0, 0][..], &table, &destination].concat(),
        )
    }

    #[test]
    fn answers_and_local_routes_are_found_among_others() {
        let to = Ipv6Addr::LOCALHOST;
        let answer = message(NLMSG_ERROR, &(-17_i32).to_ne_bytes());
        let datagram = [route(1, to), answer.clone(), route(RTN_LOCAL, to)].concat();
        let all = [Message::Other, Message::Answer(-17), Message::LocalRoute(to)];
        assert_eq!(messages(&datagram), all);
        assert_eq!(messages(&[]), []);
        assert_eq!(messages(&answer[..answer.len() - 1]), []);
    }

    #[test]
    fn what_is_cut_off_is_passed_over() {
        let whole = route(RTN_LOCAL, Ipv6Addr::LOCALHOST);
        for len in HEADER_LEN..whole.len() {
            let mut cut = whole[..len].to_vec();
            cut[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
            assert_eq!(messages(&cut), [Message::Other]);
        }
        // A length of nothing goes no further.
        assert_eq!(messages(&[0; 64]), []);
    }
}
