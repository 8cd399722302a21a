//! An IPv6 address that is usable at once.
//!
//! The `ioctl` for it leaves an address *tentative* until a worker of the kernel has looked for duplicates, also on an
//! interface without neighbours; until then nothing can be bound to it or sent from it. Only rtnetlink can say
//! that there is nothing to look for. One request, one answer (`linux/netlink.h`, `linux/if_addr.h`), all in host order:
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

use std::io;
use std::net::Ipv6Addr;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Adds an IPv6 address to the interface with this index.
pub(crate) fn add(index: u32, address: Ipv6Addr, prefix_len: u8) -> io::Result<()> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    // No protocol is NETLINK_ROUTE, which is 0.
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &request(index, address, prefix_len), SendFlags::empty(), &kernel)?;
    let mut buffer = [0; ANSWER_MAX];
    let (len, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
    match answer(&buffer[..len]) {
        Some(0) => Ok(()),
        Some(error) => Err(Errno::from_raw_os_error(error.wrapping_neg()).into()),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer makes no sense")),
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

/// The error number in an answer, 0 or negative.
fn answer(bytes: &[u8]) -> Option<i32> {
    let kind = bytes.get(4..6)?.first_chunk().copied().map(u16::from_ne_bytes)?;
    let error = bytes.get(16..20)?.first_chunk().copied().map(i32::from_ne_bytes)?;
    (kind == NLMSG_ERROR).then_some(error)
}

const REQUEST_LEN: u16 = 52;
/// The answer repeats the request behind its own 20 bytes.
const ANSWER_MAX: usize = 256;
const ATTRIBUTE_HEADER_LEN: u16 = 4;
const AF_INET6: u8 = 10;
const RTM_NEWADDR: u16 = 20;
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

    #[test]
    fn answer_that_is_cut_off_or_of_another_type_is_none() {
        let mut bytes = [0; 20];
        bytes[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        bytes[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(answer(&bytes), Some(-17));
        assert_eq!(answer(&bytes[..19]), None);
        assert_eq!(answer(&[]), None);
        bytes[4] = 3;
        assert_eq!(answer(&bytes), None);
    }
}
