//! A network namespace, and packets for it.

use std::fs;
use std::net::IpAddr;

use rustix::thread::UnshareFlags;

/// Makes user and network namespaces in which this process may do what it likes, with `lo` up.
pub(crate) fn enter_namespace() -> Result<(), String> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    // SAFETY: this process has one thread, and no descriptor of another namespace.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET) }
        .map_err(|errno| format!("no namespaces here: {errno}"))?;
    let write = |path: &str, text: String| fs::write(path, text).map_err(|error| format!("{path}: {error}"));
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| format!("/dev/net/tun: {error}"))?;
    kontor_tun::up("lo").map_err(|error| format!("lo: {error}"))
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SOURCE_PORT: u16 = 5555;

/// An echo request.
pub(crate) fn ping(source: IpAddr, destination: IpAddr) -> Vec<u8> {
    let (protocol, kind) = if source.is_ipv4() { (ICMP, 8) } else { (ICMPV6, 128) };
    let echo = [&[kind, 0, 0, 0, 0, 1, 0, 2][..], b"how are you?"].concat();
    packet(source, destination, protocol, echo, 2)
}

/// A datagram.
pub(crate) fn udp(source: IpAddr, destination: IpAddr, port: u16, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + content.len()).unwrap();
    let header = [SOURCE_PORT.to_be_bytes(), port.to_be_bytes(), len.to_be_bytes(), [0; 2]].concat();
    packet(source, destination, UDP, [&header, content].concat(), 6)
}

/// Flags of a TCP segment (RFC 9293, 3.1).
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// A TCP segment from [`SOURCE_PORT`].
pub(crate) fn tcp(
    (source, destination): (IpAddr, IpAddr),
    port: u16,
    (flags, sequence, acknowledged): (u8, u32, u32),
    content: &[u8],
) -> Vec<u8> {
    let ports = [SOURCE_PORT.to_be_bytes(), port.to_be_bytes()].concat();
    let numbers = [sequence.to_be_bytes(), acknowledged.to_be_bytes()].concat();
    // Five words of header, a window, then checksum and urgent pointer.
    let rest = [0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    packet(source, destination, TCP, [&ports, &numbers, &rest[..], content].concat(), 16)
}

/// What a TCP segment of `port` says: its flags, its number and its content.
pub(crate) fn read_tcp(packet: &[u8], port: u16) -> Option<(u8, u32, &[u8])> {
    let (protocol, segment) = match packet[0] >> 4 {
        4 => (packet[9], &packet[20..]),
        _ => (packet[6], &packet[40..]),
    };
    if protocol != TCP || segment[..2] != port.to_be_bytes() {
        return None;
    }
    let sequence = u32::from_be_bytes(segment[4..8].try_into().unwrap());
    Some((segment[13], sequence, &segment[usize::from(segment[12] >> 4) * 4..]))
}

/// A packet around `payload`, with the payload's checksum put at `checksum_at`.
fn packet(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    mut payload: Vec<u8>,
    checksum_at: usize,
) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap();
    let (mut header, addresses) = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let addresses = [source.octets(), destination.octets()].concat();
            let [high, low] = (20 + len).to_be_bytes();
            (vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0], addresses)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let addresses = [source.octets(), destination.octets()].concat();
            let [high, low] = len.to_be_bytes();
            (vec![0x60, 0, 0, 0, high, low, protocol, 64], addresses)
        }
        _ => panic!("a packet has one family"),
    };
    header.extend(&addresses);
    if source.is_ipv4() {
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);
    }
    let pseudo = if protocol == ICMP {
        Vec::new()
    } else {
        [&addresses[..], &[0, protocol], &len.to_be_bytes()].concat()
    };
    let sum = checksum(&[&pseudo[..], &payload].concat());
    payload[checksum_at..checksum_at + 2].copy_from_slice(&sum);
    header.extend(payload);
    header
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}
