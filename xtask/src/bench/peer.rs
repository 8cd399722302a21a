//! The host's end of an uplink, as near to the relay as it goes without a network behind it: it takes and gives
//! frames one system call at a time, looks at every header, and counts datagrams.

use super::vm::{End, Way};
use crate::run::{Error, Result};
use kontor_guest::bench::{GUEST, HOST, UDP_PORT};
use kontor_wire::uplink::{
    ETHERNET_LEN, Frame, GUEST_TO_RELAY, GatewayId, HEADER_LEN, MAX_FRAME, MAX_SEGMENTS, PortDecoder,
    RELAY_TO_GUEST, encode_port, header,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    time::{Duration, Instant},
};

/// Longest payload of a frame that the guest's buffers for its network device take.
const DEVICE_PAYLOAD_MAX: usize = 2048 - 12 - ETHERNET_LEN - HEADER_LEN;
/// Frames that are given at once to the port, where they are not trains.
const FRAMES: usize = 32;
/// How long nothing may come before it is believed that nothing is under way any more.
const QUIET: Duration = Duration::from_millis(50);
/// The gateway that all frames come from.
const GATEWAY: GatewayId = GatewayId(0);

/// What passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) datagrams: u64,
    pub(super) frames: u64,
}

/// The host's end.
pub(super) struct Peer {
    carrier: Carrier,
    /// All that passed, either way.
    pub(super) passed: Passed,
    buffer: Box<[u8]>,
    /// Length of the datagrams that count.
    bytes: usize,
    /// What is given to the guest again and again.
    load: Load,
}

enum Carrier {
    Port(UnixStream, PortDecoder),
    Device(UnixDatagram),
    Kernel(UnixDatagram, Hardware),
}

/// Bytes, what they count for, and how many of them are given already.
#[derive(Default)]
struct Load {
    bytes: Vec<u8>,
    counts: Passed,
    given: usize,
}

/// The guest's network device, once it has asked for ours.
#[derive(Default)]
struct Hardware(Option<[u8; 6]>);

fn failed(source: io::Error) -> Error {
    Error::Start("use the uplink".into(), source)
}

fn closed() -> Error {
    Error::Unexpected("the guest's uplink is closed".into())
}

impl Peer {
    pub(super) fn new(way: Way, end: End) -> Result<Self> {
        let carrier = match (way, end) {
            (Way::Port, End::Stream(stream)) => {
                stream.set_nonblocking(true).map_err(failed)?;
                Carrier::Port(stream, PortDecoder::new())
            }
            (way, End::Device(socket)) => {
                socket.set_nonblocking(true).map_err(failed)?;
                if way == Way::Vfio {
                    Carrier::Device(socket)
                } else {
                    Carrier::Kernel(socket, Hardware::default())
                }
            }
            (_, End::Stream(_)) => return Err(Error::Unexpected("a stream is the port's alone".into())),
        };
        let buffer = vec![0; ETHERNET_LEN + MAX_FRAME + 1].into_boxed_slice();
        Ok(Self { carrier, passed: Passed::default(), buffer, bytes: 0, load: Load::default() })
    }

    /// From now on datagrams have so many bytes; those that are given go as trains, or do not.
    pub(super) fn set(&mut self, bytes: usize, trains: bool) -> Result<()> {
        self.bytes = bytes;
        let train =
            |payload_max: usize| if trains { (payload_max / bytes).clamp(1, MAX_SEGMENTS) } else { 1 };
        let rule = |error| Error::Unexpected(format!("a frame: {error}"));
        let mut load = Load::default();
        match &self.carrier {
            Carrier::Port(..) => {
                let segments = train(MAX_FRAME - HEADER_LEN);
                let frames = if trains { 1 } else { FRAMES };
                for _ in 0..frames {
                    let payload = vec![0xA5; segments * bytes];
                    encode_port(GATEWAY, bytes, &payload, &mut load.bytes).map_err(rule)?;
                }
                load.counts = Passed { datagrams: (segments * frames) as u64, frames: frames as u64 };
            }
            Carrier::Device(_) => {
                let segments = train(DEVICE_PAYLOAD_MAX);
                let payload = vec![0xA5; segments * bytes];
                let inner = header(GATEWAY, bytes, &payload).map_err(rule)?;
                load.bytes = [&RELAY_TO_GUEST[..], &inner, &payload].concat();
                load.counts = Passed { datagrams: segments as u64, frames: 1 };
            }
            Carrier::Kernel(_, Hardware(guest)) => {
                load.bytes = packet(guest.unwrap_or([0xFF; 6]), &vec![0xA5; bytes]);
                load.counts = Passed { datagrams: 1, frames: 1 };
            }
        }
        self.load = load;
        Ok(())
    }

    /// Takes what comes until `end`, or until `reports` can be read.
    pub(super) fn take_until(&mut self, end: Instant, reports: Option<&UnixStream>) -> Result<()> {
        loop {
            let idle = !self.take()?;
            let now = Instant::now();
            if now >= end
                || reports.is_some_and(|reports| is_ready(reports.as_fd(), PollFlags::IN, Duration::ZERO))
            {
                return Ok(());
            }
            if idle {
                let others = reports.map(|reports| (reports.as_fd(), PollFlags::IN));
                wait((self.fd(), PollFlags::IN), others, end - now).map_err(failed)?;
            }
        }
    }

    /// Takes what is still under way, until nothing comes any more.
    pub(super) fn drain(&mut self) -> Result<()> {
        while is_ready(self.fd(), PollFlags::IN, QUIET) {
            while self.take()? {}
        }
        Ok(())
    }

    /// Gives datagrams until `end`.
    pub(super) fn give_until(&mut self, end: Instant) -> Result<()> {
        loop {
            let full = !self.give()?;
            let now = Instant::now();
            if now >= end {
                return Ok(());
            }
            if full {
                wait((self.fd(), PollFlags::OUT), None, end - now).map_err(failed)?;
            }
        }
    }

    /// Finishes what was given in part; half a frame would make nonsense of what comes next.
    pub(super) fn finish(&mut self) -> Result<()> {
        while self.load.given > 0 {
            if !self.give()? {
                wait((self.fd(), PollFlags::OUT), None, Duration::from_secs(1)).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.carrier {
            Carrier::Port(stream, _) => stream.as_fd(),
            Carrier::Device(socket) | Carrier::Kernel(socket, _) => socket.as_fd(),
        }
    }

    /// Takes one portion; `false` when there is none.
    fn take(&mut self) -> Result<bool> {
        let (passed, bytes) = (&mut self.passed, self.bytes);
        let mut count = |frame: &Frame<'_>| {
            passed.frames += 1;
            passed.datagrams += frame.segments().filter(|segment| segment.len() == bytes).count() as u64;
        };
        match &mut self.carrier {
            Carrier::Port(stream, decoder) => match stream.read(decoder.space()) {
                Ok(0) => Err(closed()),
                Ok(length) => {
                    decoder.advance(length);
                    let rule = |error| Error::Unexpected(format!("the guest's frame: {error}"));
                    while let Some(frame) = decoder.next_frame().map_err(rule)? {
                        count(&frame);
                    }
                    Ok(true)
                }
                Err(error) => idle(error),
            },
            Carrier::Device(socket) => match socket.recv(&mut self.buffer) {
                Ok(0) => Err(closed()),
                Ok(length) => {
                    // Before a guest drives its device, the kernel may have said something by it.
                    if let Ok(frame) = Frame::parse_ethernet(&self.buffer[..length], &GUEST_TO_RELAY) {
                        count(&frame);
                    }
                    Ok(true)
                }
                Err(error) => idle(error),
            },
            Carrier::Kernel(socket, hardware) => match socket.recv(&mut self.buffer) {
                Ok(0) => Err(closed()),
                Ok(length) => {
                    let frame = &self.buffer[..length];
                    if let Some(payload) = udp_payload(frame) {
                        passed.frames += 1;
                        passed.datagrams += u64::from(payload.len() == bytes);
                    } else if let Some((asker, answer)) = arp_answer(frame) {
                        hardware.0 = Some(asker);
                        socket.send(&answer).map_err(failed)?;
                    }
                    Ok(true)
                }
                Err(error) => idle(error),
            },
        }
    }

    /// Gives one portion; `false` when there is no room.
    fn give(&mut self) -> Result<bool> {
        let Load { bytes, counts, given } = &mut self.load;
        let result = match &mut self.carrier {
            Carrier::Port(stream, _) => stream.write(&bytes[*given..]),
            Carrier::Device(socket) | Carrier::Kernel(socket, _) => socket.send(bytes),
        };
        match result {
            Ok(count) => {
                *given += count;
                if *given == bytes.len() {
                    *given = 0;
                    self.passed.frames += counts.frames;
                    self.passed.datagrams += counts.datagrams;
                }
                Ok(true)
            }
            Err(error) => idle(error),
        }
    }
}

fn idle(error: io::Error) -> Result<bool> {
    let later = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
    if later || error.raw_os_error() == Some(libc::ENOBUFS) { Ok(false) } else { Err(failed(error)) }
}

fn is_ready(file: BorrowedFd<'_>, flags: PollFlags, limit: Duration) -> bool {
    let mut files = [PollFd::new(&file, flags)];
    poll(&mut files, Some(&timespec(limit))).is_ok_and(|count| count > 0)
}

fn timespec(span: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: span.subsec_nanos().into(),
    }
}

type Watched<'f> = (BorrowedFd<'f>, PollFlags);

fn wait(first: Watched<'_>, second: Option<Watched<'_>>, limit: Duration) -> io::Result<()> {
    let mut files = vec![PollFd::from_borrowed_fd(first.0, first.1)];
    files.extend(second.map(|(file, flags)| PollFd::from_borrowed_fd(file, flags)));
    match poll(&mut files, Some(&timespec(limit))) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The host's address on the kernel's way.
const HOST_HARDWARE: [u8; 6] = [0x02, b'K', b'T', b'R', 0, 3];
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// Bytes of the headers of IPv4 without options, and of UDP.
const IPV4_LEN: usize = 20;
const UDP_LEN: usize = 8;

/// What a UDP datagram to [`UDP_PORT`] in an Ethernet frame carries.
fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    let (ethernet, packet) = frame.split_at_checked(ETHERNET_LEN)?;
    let (ip, datagram) = packet.split_at_checked(IPV4_LEN)?;
    let (udp, payload) = datagram.split_at_checked(UDP_LEN)?;
    let is_udp =
        ethernet[12..] == IPV4 && ip[0] == 0x45 && ip[9] == 17 && udp[2..4] == UDP_PORT.to_be_bytes();
    let length = usize::from(u16::from_be_bytes([udp[4], udp[5]])).checked_sub(UDP_LEN)?;
    payload.get(..length).filter(|_| is_udp)
}

/// The asker's hardware address and the answer to a question for [`HOST`]'s (RFC 826).
fn arp_answer(frame: &[u8]) -> Option<([u8; 6], Vec<u8>)> {
    let (ethernet, arp) = frame.split_at_checked(ETHERNET_LEN)?;
    let arp = arp.get(..28)?;
    let asks = ethernet[12..] == ARP && arp[6..8] == [0, 1] && arp[24..28] == HOST.octets();
    let asker: [u8; 6] = arp[8..14].try_into().ok()?;
    let answer = [
        &asker[..],
        &HOST_HARDWARE,
        &ARP,
        &arp[..6],
        &[0, 2],
        &HOST_HARDWARE,
        &HOST.octets(),
        &asker,
        &arp[14..18],
    ];
    asks.then(|| (asker, answer.concat()))
}

/// A UDP datagram from [`HOST`] to [`GUEST`], with its checksums, in an Ethernet frame.
fn packet(guest: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let (total, udp) = (length(IPV4_LEN + UDP_LEN + payload.len()), length(UDP_LEN + payload.len()));
    let [port_high, port_low] = UDP_PORT.to_be_bytes();
    let mut ip = [0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ip[12..16].copy_from_slice(&HOST.octets());
    ip[16..20].copy_from_slice(&GUEST.octets());
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let mut datagram =
        [&[port_high, port_low, port_high, port_low, udp[0], udp[1], 0, 0][..], payload].concat();
    let pseudo = [&ip[12..20], &[0, 17, udp[0], udp[1]], &datagram].concat();
    let sum = checksum(&pseudo).to_be_bytes();
    datagram[6..8].copy_from_slice(&sum);
    [&guest[..], &HOST_HARDWARE, &IPV4, &ip, &datagram].concat()
}

/// The internet's checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = words.sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::{super::vm::device_pair, *};

    #[test]
    fn packet_has_the_checksums_of_its_parts_and_is_read_back() {
        let packet = packet([1; 6], &[7; 33]);
        assert_eq!(checksum(&packet[14..34]), 0);
        let pseudo = [&packet[26..34], &[0, 17, 0, 41], &packet[34..]].concat();
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!(udp_payload(&packet), Some(&[7; 33][..]));
        assert_eq!(udp_payload(&packet[..40]), None);
    }

    #[test]
    fn question_for_the_hosts_address_is_answered_and_no_other() {
        let question = |for_whom: [u8; 4]| {
            let arp = [0, 1, 8, 0, 6, 4, 0, 1];
            let asker = [5; 6];
            [&[0xFF; 6][..], &asker, &ARP, &arp, &asker, &GUEST.octets(), &[0; 6], &for_whom].concat()
        };
        let (asker, answer) = arp_answer(&question(HOST.octets())).unwrap();
        assert_eq!((asker, answer.len()), ([5; 6], 42));
        assert_eq!(
            (&answer[20..22], &answer[28..32], &answer[38..]),
            (&[0, 2][..], &HOST.octets()[..], &GUEST.octets()[..])
        );
        assert!(arp_answer(&question([192, 0, 2, 9])).is_none());
    }

    #[test]
    fn device_whose_other_end_closed_is_said_to_be_closed() {
        for way in [Way::Vfio, Way::Kernel] {
            let (ours, theirs) = device_pair().unwrap();
            let mut peer = Peer::new(way, End::Device(ours)).unwrap();
            assert!(!peer.take().unwrap());
            drop(theirs);
            assert!(matches!(peer.take(), Err(Error::Unexpected(words)) if words.contains("closed")));
        }
    }

    #[test]
    fn what_is_given_to_the_port_is_whole_frames_that_count_as_they_say() {
        for (trains, frames, datagrams) in [(false, 32, 32), (true, 1, 45)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut peer = Peer::new(Way::Port, End::Stream(ours)).unwrap();
            peer.set(1452, trains).unwrap();
            assert!(peer.give().unwrap());
            peer.finish().unwrap();
            assert_eq!(peer.passed, Passed { datagrams, frames });
            let (mut decoder, mut seen) = (PortDecoder::new(), 0);
            while seen < datagrams {
                let count = theirs.read(decoder.space()).unwrap();
                decoder.advance(count);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen += frame.segments().count() as u64;
                }
            }
            assert_eq!(seen, datagrams);
        }
    }
}
