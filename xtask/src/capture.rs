//! What really went over a link, and what each packet is.

use crate::{
    office::{CONTROL_PORT, GATEWAY_PORT, SPARE_PORT},
    run::{Error, Result},
    sys::{PacketRing, RETIRE_MS},
    world::{Host, OFFICE_ADDRESS, ROUTER_HARDWARE},
};
use memchr::memmem;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pipe::PipeFlags,
};
use std::{io, net::Ipv4Addr, os::fd::OwnedFd, sync::mpsc, thread::JoinHandle};

/// A running capture. Packets are kept in memory: a run here moves some tens of megabytes.
pub(crate) struct Capture {
    thread: JoinHandle<io::Result<Vec<Packet>>>,
    /// Closed to end the recording.
    running: OwnedFd,
}

/// One captured Ethernet frame.
pub(crate) type Packet = Vec<u8>;

/// What left the employee's PC.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub(crate) struct Tally {
    /// WireGuard datagrams to the gateways.
    pub(crate) tunnel_frames: u64,
    /// TCP to the office's control.
    pub(crate) control_frames: u64,
    /// Everything else but what two directly joined hosts say to find each other (ARP).
    pub(crate) other_frames: u64,
    /// What the other frames were, a few of them.
    pub(crate) others: Vec<String>,
}

impl Capture {
    /// Starts to record `interface` of `host`, or all its interfaces; returns once the recording runs.
    pub(crate) fn start(host: Host, interface: Option<&'static str>) -> Result<Self> {
        let failed = |source: io::Error| Error::Start("a capture".into(), source);
        let (stop, running) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let (started, is_started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (ring, outcome) = match open(host, interface) {
                Ok(ring) => (Some(ring), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // Whoever waits for this cannot have gone away.
            let _ = started.send(outcome);
            ring.map_or(Ok(Vec::new()), |ring| record(ring, &stop))
        });
        let outcome = is_started.recv().map_err(|_| Error::Unexpected("a capture ended".into()))?;
        outcome.map_err(failed)?;
        Ok(Self { thread, running })
    }

    /// Ends the recording; returns what was recorded. A recording with holes is an error.
    pub(crate) fn stop(self) -> Result<Vec<Packet>> {
        drop(self.running);
        let packets = self.thread.join().map_err(|_| Error::Unexpected("a capture panicked".into()))?;
        packets.map_err(|source| Error::Start("a capture".into(), source))
    }
}

/// A ring in the host's network namespace; the calling thread moves there for good.
fn open(host: Host, interface: Option<&str>) -> io::Result<PacketRing> {
    use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};
    host.enter()?;
    let index = interface.map(|name| {
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        name_to_index(any, name)
    });
    PacketRing::open(index.transpose()?)
}

/// Receives until the other end of `stop` closes, and then until the last block was handed over.
fn record(mut ring: PacketRing, stop: &OwnedFd) -> io::Result<Vec<Packet>> {
    let last_blocks = Timespec { tv_sec: 0, tv_nsec: 10 * 1_000_000 * i64::from(RETIRE_MS) };
    let mut packets = Vec::new();
    let mut stopping = false;
    loop {
        let mut ready = [PollFd::new(&ring, PollFlags::IN), PollFd::new(stop, PollFlags::empty())];
        let polled = if stopping { &mut ready[..1] } else { &mut ready[..] };
        let count = poll(polled, stopping.then_some(&last_blocks))?;
        let stopped = !stopping && !ready[1].revents().is_empty();
        while ring.take(&mut packets) {}
        if stopping && count == 0 {
            break;
        }
        stopping |= stopped;
    }
    match ring.lost()? {
        0 => Ok(packets),
        lost => Err(io::Error::other(format!("{lost} packets were not recorded"))),
    }
}

/// Sorts the packets that left by the employee's link; those that came in are passed over.
pub(crate) fn tally(packets: &[Packet]) -> Tally {
    let mut tally = Tally::default();
    for packet in packets.iter().filter(|p| p.get(6..12) != Some(&ROUTER_HARDWARE[..])) {
        match describe(packet) {
            Seen::Tunnel => tally.tunnel_frames += 1,
            Seen::Control => tally.control_frames += 1,
            Seen::Neighbours => {}
            Seen::Other(words) => {
                tally.other_frames += 1;
                if tally.others.len() < 10 {
                    tally.others.push(words);
                }
            }
        }
    }
    tally
}

enum Seen {
    Tunnel,
    Control,
    Neighbours,
    Other(String),
}

/// What an Ethernet frame is. Two kinds are the host kernel's own doing, not the work VM's: the two ends
/// of a veth pair ask for each other's hardware address (ARP, IPv6 neighbour discovery), and a datagram of
/// the gateway's that comes when the relay has gone is answered by "port unreachable" (RFC 792).
fn describe(packet: &[u8]) -> Seen {
    const IPV4: [u8; 2] = [0x08, 0x00];
    const IPV6: [u8; 2] = [0x86, 0xdd];
    const ARP: [u8; 2] = [0x08, 0x06];
    const ICMPV6: u8 = 58;
    /// Multicast listener discovery and neighbour discovery (RFC 2710, 4861, 9777).
    const NEIGHBOUR_MESSAGES: &[u8] = &[130, 131, 132, 133, 134, 135, 136, 137, 143];
    const ICMP: u8 = 1;
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let ethertype = packet.get(12..14).unwrap_or_default();
    let ip = packet.get(14..).unwrap_or_default();
    if ethertype == ARP {
        return Seen::Neighbours;
    }
    if ethertype == IPV6 {
        // Multicast listener discovery stands behind a hop-by-hop header of 8 bytes.
        let message = match ip.get(6) {
            Some(&ICMPV6) => ip.get(40),
            Some(0) if ip.get(40) == Some(&ICMPV6) => ip.get(48),
            Some(_) | None => None,
        };
        if message.is_some_and(|message| NEIGHBOUR_MESSAGES.contains(message)) {
            return Seen::Neighbours;
        }
        return Seen::Other(format!("IPv6, next header {}", ip.get(6).copied().unwrap_or_default()));
    }
    if ethertype != IPV4 {
        return Seen::Other(format!("EtherType {}", hex::encode(ethertype)));
    }
    let address = |at: usize| {
        ip.get(at..at + 4).map_or(Ipv4Addr::UNSPECIFIED, |b| Ipv4Addr::new(b[0], b[1], b[2], b[3]))
    };
    let (source, destination) = (address(12), address(16));
    let header = usize::from(ip.first().copied().unwrap_or_default() & 15) * 4;
    let port =
        |at: usize| ip.get(header + at..header + at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    let wireguard =
        ip.get(header + 8..header + 12).is_some_and(|b| (1..=4).contains(&b[0]) && b[1..] == [0, 0, 0]);
    let office: Option<Ipv4Addr> = OFFICE_ADDRESS.parse().ok();
    let to_office = Some(destination) == office;
    let quoted = ip.get(header + 8..).unwrap_or_default();
    let unreachable_port = ip.get(9) == Some(&ICMP) && ip.get(header..header + 2) == Some(&[3, 3]);
    let gateways_datagram = quoted.get(12..16) == ip.get(16..20)
        && quoted.get(9) == Some(&UDP)
        && [GATEWAY_PORT, SPARE_PORT].iter().any(|port| quoted.get(20..22) == Some(&port.to_be_bytes()));
    if unreachable_port && gateways_datagram && to_office {
        return Seen::Neighbours;
    }
    let protocol = ip.get(9).copied().unwrap_or_default();
    match (protocol, port(2)) {
        (UDP, GATEWAY_PORT | SPARE_PORT) if to_office && wireguard => return Seen::Tunnel,
        (TCP, CONTROL_PORT) if to_office => return Seen::Control,
        _ => {}
    }
    Seen::Other(format!(
        "IPv4 {source} -> {destination}, protocol {protocol}, ports {} -> {}",
        port(0),
        port(2)
    ))
}

/// Whether any packet holds `marker`.
pub(crate) fn holds(packets: &[Packet], marker: &[u8]) -> bool {
    let finder = memmem::Finder::new(marker);
    packets.iter().any(|packet| finder.find(packet).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = GATEWAY_PORT;

    fn udp(destination: [u8; 4], port: u16, payload: &[u8]) -> Packet {
        ip(17, destination, port, payload)
    }

    fn ip(protocol: u8, destination: [u8; 4], port: u16, payload: &[u8]) -> Packet {
        let mut packet = vec![0; 12];
        packet.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 44, 1, 2]);
        packet.extend(destination);
        packet.extend([0x10, 0x00]);
        packet.extend(port.to_be_bytes());
        packet.extend([0, 0, 0, 0]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn only_wireguard_messages_to_the_gateway_count_as_tunnel() {
        let office = [203, 0, 113, 2];
        let packets = [
            udp(office, PORT, &[4, 0, 0, 0, 9]),
            udp(office, PORT, b"hello"),
            udp(office, 53, &[4, 0, 0, 0]),
            udp([10, 44, 1, 1], PORT, &[4, 0, 0, 0]),
        ];
        let tally = tally(&packets);
        assert_eq!((tally.tunnel_frames, tally.control_frames, tally.other_frames), (1, 0, 3));
    }

    #[test]
    fn only_tcp_to_controls_port_counts_as_control() {
        let office = [203, 0, 113, 2];
        let packets = [
            ip(6, office, CONTROL_PORT, b"hello"),
            ip(6, office, 80, b"hello"),
            ip(6, [10, 44, 1, 1], CONTROL_PORT, b"hello"),
            udp(office, CONTROL_PORT, b"hello"),
        ];
        let tally = tally(&packets);
        assert_eq!((tally.tunnel_frames, tally.control_frames, tally.other_frames), (0, 1, 3));
    }

    #[test]
    fn what_comes_in_does_not_count_as_having_left() {
        let mut incoming = udp([10, 44, 1, 2], 9, b"hello");
        incoming[6..12].copy_from_slice(&ROUTER_HARDWARE);
        assert_eq!(tally(&[incoming]).other_frames, 0);
    }

    #[test]
    fn unreachable_port_counts_unless_it_is_about_the_gateways_datagram() {
        let unreachable = |quoted_port: u16| {
            let mut packet = udp([203, 0, 113, 2], 0, &[]);
            packet.truncate(34);
            packet[23] = 1;
            packet.extend([3, 3, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17, 0, 0]);
            packet.extend([203, 0, 113, 2, 10, 44, 1, 2]);
            packet.extend(quoted_port.to_be_bytes());
            packet
        };
        assert_eq!(tally(&[unreachable(GATEWAY_PORT)]).other_frames, 0);
        assert_eq!(tally(&[unreachable(53)]).other_frames, 1);
    }

    #[test]
    fn marker_is_found_anywhere() {
        let packets = [udp([1, 2, 3, 4], 5, b"....sixteen bytes at")];
        assert!(holds(&packets, b"sixteen bytes at"));
        assert!(!holds(&packets, b"sixteen bytes aT"));
    }
}
