//! What really went over a link: `tcpdump` writes, this reads and classifies.
//!
//! The file is the classic capture format (pcap, magic `a1b2c3d4`, little endian here): a header of 24
//! bytes, then records of 16 bytes of header (seconds, microseconds, captured length, true length)
//! and the packet.

use crate::{
    run::{Error, Result, at},
    world::{Host, OFFICE_ADDRESS},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

/// A running capture.
pub(crate) struct Capture {
    child: Child,
    file: PathBuf,
}

/// One captured Ethernet frame.
pub(crate) type Packet = Vec<u8>;

/// What left the employee's PC.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub(crate) struct Tally {
    /// WireGuard datagrams to or from the gateway.
    pub(crate) tunnel_frames: u64,
    /// Everything else but what two directly joined hosts say to find each other (ARP).
    pub(crate) other_frames: u64,
    /// What the other frames were, a few of them.
    pub(crate) others: Vec<String>,
}

impl Capture {
    /// Starts to record `interface` of `host`; returns once the recording runs.
    pub(crate) fn start(host: Host, interface: &str, file: &Path) -> Result<Self> {
        let mut command = host.command("tcpdump");
        command
            .args(["-i", interface, "-n", "-s", "0", "-B", "65536", "-U", "--immediate-mode", "-w"])
            .arg(file);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Start("tcpdump".into(), source))?;
        let stderr = child.stderr.take().ok_or_else(|| Error::Unexpected("tcpdump has no stderr".into()))?;
        let mut said = String::new();
        let mut lines = BufReader::new(stderr);
        while !said.contains("listening on") {
            let before = said.len();
            lines.read_line(&mut said).map_err(|source| Error::Start("tcpdump".into(), source))?;
            if said.len() == before {
                return Err(Error::Unexpected(format!("tcpdump did not start: {}", said.trim())));
            }
        }
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Ok(Self { child, file: file.to_owned() })
    }

    /// Ends the recording; returns what was recorded.
    pub(crate) fn stop(mut self) -> Result<Vec<Packet>> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Error::Unexpected("tcpdump has no process id".into()))?;
        kill_process(pid, Signal::INT).map_err(|e| Error::Start("stop tcpdump".into(), e.into()))?;
        self.child.wait().map_err(|source| Error::Start("tcpdump".into(), source))?;
        read(&self.file)
    }
}

/// Reads a capture file.
pub(crate) fn read(file: &Path) -> Result<Vec<Packet>> {
    const MAGIC: [u8; 4] = 0xa1b2_c3d4_u32.to_le_bytes();
    const FILE_HEADER: usize = 24;
    const RECORD_HEADER: usize = 16;
    let bytes = fs::read(file).map_err(at("read the capture", file))?;
    if bytes.get(..4) != Some(&MAGIC[..]) {
        return Err(Error::Unexpected(format!("{} is no capture file", file.display())));
    }
    let mut rest = bytes.get(FILE_HEADER..).unwrap_or_default();
    let mut packets = Vec::new();
    while let Some((header, body)) = rest.split_at_checked(RECORD_HEADER) {
        let captured = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let Some((packet, next)) = body.split_at_checked(captured) else { break };
        packets.push(packet.to_owned());
        rest = next;
    }
    Ok(packets)
}

/// Sorts the packets of the employee's link.
pub(crate) fn tally(packets: &[Packet], gateway_port: u16) -> Tally {
    let mut tally = Tally::default();
    for packet in packets {
        match describe(packet, gateway_port) {
            Seen::Tunnel => tally.tunnel_frames += 1,
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
    Neighbours,
    Other(String),
}

/// What an Ethernet frame is. The two ends of a veth pair ask for each other's hardware address (ARP,
/// IPv6 neighbour discovery) on the host's own account; that is the host's kernel, not the work VM.
fn describe(packet: &[u8], gateway_port: u16) -> Seen {
    const IPV4: [u8; 2] = [0x08, 0x00];
    const IPV6: [u8; 2] = [0x86, 0xdd];
    const ARP: [u8; 2] = [0x08, 0x06];
    const ICMPV6: u8 = 58;
    const UDP: u8 = 17;
    let ethertype = packet.get(12..14).unwrap_or_default();
    let ip = packet.get(14..).unwrap_or_default();
    if ethertype == ARP {
        return Seen::Neighbours;
    }
    if ethertype == IPV6 {
        // Neighbour discovery and multicast listener reports carry link-local or unspecified sources.
        let link_local = ip.get(8..10) == Some(&[0xfe, 0x80]) || ip.get(8..24) == Some(&[0; 16]);
        let hop_by_hop_or_icmp = matches!(ip.get(6), Some(0 | &ICMPV6));
        if link_local && hop_by_hop_or_icmp {
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
    let outward = Some(destination) == office && port(2) == gateway_port;
    let inward = Some(source) == office && port(0) == gateway_port;
    if ip.get(9) == Some(&UDP) && wireguard && (outward || inward) {
        return Seen::Tunnel;
    }
    let protocol = ip.get(9).copied().unwrap_or_default();
    Seen::Other(format!(
        "IPv4 {source} -> {destination}, protocol {protocol}, ports {} -> {}",
        port(0),
        port(2)
    ))
}

/// Whether any packet holds `marker`.
pub(crate) fn holds(packets: &[Packet], marker: &[u8]) -> bool {
    packets.iter().any(|p| p.windows(marker.len()).any(|w| w == marker))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 51820;

    fn udp(destination: [u8; 4], port: u16, payload: &[u8]) -> Packet {
        let mut packet = vec![0; 12];
        packet.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 44, 1, 2]);
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
        let tally = tally(&packets, PORT);
        assert_eq!((tally.tunnel_frames, tally.other_frames), (1, 3));
    }

    #[test]
    fn marker_is_found_anywhere() {
        let packets = [udp([1, 2, 3, 4], 5, b"....sixteen bytes at")];
        assert!(holds(&packets, b"sixteen bytes at"));
        assert!(!holds(&packets, b"sixteen bytes aT"));
    }
}
