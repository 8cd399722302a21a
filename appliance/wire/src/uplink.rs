//! Uplink frames: the only thing that leaves the work VM.
//!
//! ```text
//!  0      version (1)
//!  1      gateway id, as the lease names it
//!  2..4   segment length, little endian: the payload is one datagram, or a train of datagrams of
//!         this length (the last may be shorter; at most 64 segments)
//!  4..    payload
//! ```
//!
//! On the `port` backend each frame stands behind its length (`u16`, little endian); [`PortDecoder`]
//! cuts that stream. On `vfio` it is the payload of an Ethernet frame of EtherType [`ETHERTYPE`] between
//! two fixed addresses ([`GUEST_TO_RELAY`], [`RELAY_TO_GUEST`]): nothing there is to be found out.

/// Name of the virtio-serial port that carries frames on the `port` backend.
pub const PORT: &str = "kontor.uplink";
/// Private EtherType of frames on the `vfio` backend (IEEE 802, local experimental 1).
pub const ETHERTYPE: u16 = 0x88B5;
/// The guest's end on the `vfio` backend: a locally administered address (IEEE 802).
pub const GUEST_HARDWARE: [u8; 6] = [0x02, b'K', b'T', b'R', 0, 1];
/// The relay's end on the `vfio` backend.
pub const RELAY_HARDWARE: [u8; 6] = [0x02, b'K', b'T', b'R', 0, 2];
/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// Header of every Ethernet frame that the guest sends.
pub const GUEST_TO_RELAY: [u8; ETHERNET_LEN] = ethernet(RELAY_HARDWARE, GUEST_HARDWARE);
/// Header of every Ethernet frame that the relay sends.
pub const RELAY_TO_GUEST: [u8; ETHERNET_LEN] = ethernet(GUEST_HARDWARE, RELAY_HARDWARE);
/// The one version of the frame so far.
pub const VERSION: u8 = 1;
/// Bytes in front of the payload.
pub const HEADER_LEN: usize = 4;
/// Most datagrams in one frame, as UDP_SEGMENT takes them.
pub const MAX_SEGMENTS: usize = 64;
/// Largest frame in bytes, header included: what the `port` backend's length can say.
pub const MAX_FRAME: usize = u16::MAX as usize;
/// Largest frame in bytes on the `vfio` backend: what a buffer of 2048 holds behind the headers of virtio-net
/// (12) and Ethernet.
pub const MAX_FRAME_VFIO: usize = 2048 - 12 - ETHERNET_LEN;
/// Bytes of the length in front of a frame on the `port` backend.
pub const PORT_PREFIX_LEN: usize = 2;
/// Largest datagram in bytes: UDP's limit over IPv4 (RFC 768, RFC 791), which fits one frame.
pub const MAX_DATAGRAM: usize = 65_507;
/// Smallest datagram in bytes: WireGuard's keepalive, a transport message without content.
pub const MIN_DATAGRAM: usize = crate::wireguard::KEEPALIVE_LEN;

/// Which of the bundle's gateways a frame is for, or comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GatewayId(pub u8);

/// A frame that obeys every rule above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    gateway: GatewayId,
    segment: usize,
    payload: &'a [u8],
}

/// Why bytes are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than the header, or longer than [`MAX_FRAME`].
    #[error("an uplink frame of {0} bytes")]
    Length(usize),
    /// An Ethernet frame of another EtherType, or between other addresses.
    #[error("an Ethernet frame that is none of the uplink's")]
    Ethernet,
    /// A version that is not spoken.
    #[error("an uplink frame of version {0}")]
    Version(u8),
    /// A segment length of zero, below [`MIN_DATAGRAM`], or longer than the payload.
    #[error("an uplink frame with segments of {segment} bytes and {payload} bytes of payload")]
    Segment {
        /// The announced segment length.
        segment: usize,
        /// The payload's length.
        payload: usize,
    },
    /// More than [`MAX_SEGMENTS`] segments.
    #[error("an uplink frame of {0} segments")]
    Segments(usize),
}

impl<'a> Frame<'a> {
    /// Reads the frame in an Ethernet frame whose header is `header` ([`GUEST_TO_RELAY`],
    /// [`RELAY_TO_GUEST`]).
    ///
    /// # Errors
    /// [`FrameError`] names the rule that is broken.
    pub fn parse_ethernet(bytes: &'a [u8], header: &[u8; ETHERNET_LEN]) -> Result<Self, FrameError> {
        Self::parse(bytes.strip_prefix(header.as_slice()).ok_or(FrameError::Ethernet)?)
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// [`FrameError`] names the rule that is broken.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        if bytes.len() > MAX_FRAME {
            return Err(FrameError::Length(bytes.len()));
        }
        let Some(([version, gateway, low, high], payload)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Err(FrameError::Length(bytes.len()));
        };
        if *version != VERSION {
            return Err(FrameError::Version(*version));
        }
        let segment = usize::from(u16::from_le_bytes([*low, *high]));
        Self::check(segment, payload)?;
        Ok(Self { gateway: GatewayId(*gateway), segment, payload })
    }

    fn check(segment: usize, payload: &[u8]) -> Result<(), FrameError> {
        if !(MIN_DATAGRAM..=MAX_DATAGRAM).contains(&segment) || segment > payload.len() {
            return Err(FrameError::Segment { segment, payload: payload.len() });
        }
        let count = payload.len().div_ceil(segment);
        if count > MAX_SEGMENTS {
            return Err(FrameError::Segments(count));
        }
        Ok(())
    }

    /// The gateway that this frame is for, or comes from.
    #[must_use]
    pub fn gateway(&self) -> GatewayId {
        self.gateway
    }

    /// Length in bytes of every datagram but the last.
    #[must_use]
    pub fn segment_len(&self) -> usize {
        self.segment
    }

    /// All datagrams, one behind the other.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The datagrams in order; at least one, at most [`MAX_SEGMENTS`].
    pub fn segments(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.payload.chunks(self.segment)
    }
}

const fn ethernet(to: [u8; 6], from: [u8; 6]) -> [u8; ETHERNET_LEN] {
    let [high, low] = ETHERTYPE.to_be_bytes();
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (to, from);
    [a, b, c, d, e, f, g, h, i, j, k, l, high, low]
}

/// Header of a frame whose payload is one datagram of `segment` bytes, or a train of such.
///
/// # Errors
/// [`FrameError`] when a frame of that header and `payload` bytes would not parse.
pub fn header(gateway: GatewayId, segment: usize, payload: &[u8]) -> Result<[u8; HEADER_LEN], FrameError> {
    if HEADER_LEN + payload.len() > MAX_FRAME {
        return Err(FrameError::Length(HEADER_LEN + payload.len()));
    }
    Frame::check(segment, payload)?;
    let length =
        u16::try_from(segment).map_err(|_| FrameError::Segment { segment, payload: payload.len() })?;
    let [low, high] = length.to_le_bytes();
    Ok([VERSION, gateway.0, low, high])
}

/// Appends a frame as the `port` backend carries it: length, header, payload.
///
/// # Errors
/// [`FrameError`] when the frame would not parse; `out` is then unchanged.
pub fn encode_port(
    gateway: GatewayId,
    segment: usize,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let header = header(gateway, segment, payload)?;
    let length = HEADER_LEN + payload.len();
    out.extend_from_slice(&u16::try_from(length).map_err(|_| FrameError::Length(length))?.to_le_bytes());
    out.extend_from_slice(&header);
    out.extend_from_slice(payload);
    Ok(())
}

/// Appends datagrams as the `port` backend carries them, and puts those that follow each other into one train
/// where they fit together: one gateway, one length, of which the last may fall short.
#[derive(Debug)]
pub struct Packer {
    frame_max: usize,
    open: Option<Train>,
}

/// The frame at the end of the stream, which may grow.
#[derive(Debug, Clone, Copy)]
struct Train {
    /// Where its length stands.
    at: usize,
    gateway: GatewayId,
    segment: usize,
    segments: usize,
}

impl Packer {
    /// Makes frames of at most `frame_max` bytes, header included, or [`MAX_FRAME`].
    #[must_use]
    pub fn new(frame_max: usize) -> Self {
        Self { frame_max: frame_max.min(MAX_FRAME), open: None }
    }

    /// Whether the next datagram would join the frame at the end of `out`.
    #[must_use]
    pub fn joins(&self, gateway: GatewayId, datagram: &[u8], out: &[u8]) -> bool {
        self.open.is_some_and(|train| {
            let frame = out.len() - train.at - PORT_PREFIX_LEN + datagram.len();
            train.gateway == gateway
                && (MIN_DATAGRAM..=train.segment).contains(&datagram.len())
                && train.segments < MAX_SEGMENTS
                && frame <= self.frame_max
        })
    }

    /// Appends a datagram to `out`, where nobody else wrote or took anything since [`Packer::close`].
    ///
    /// # Errors
    /// [`FrameError`] when no frame can carry it; `out` is then unchanged.
    pub fn push(&mut self, gateway: GatewayId, datagram: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
        if let Some(train) = self.open.filter(|_| self.joins(gateway, datagram, out)) {
            out.extend_from_slice(datagram);
            let length = out.len() - train.at - PORT_PREFIX_LEN;
            let length = u16::try_from(length).map_err(|_| FrameError::Length(length))?;
            out[train.at..train.at + PORT_PREFIX_LEN].copy_from_slice(&length.to_le_bytes());
            let whole = datagram.len() == train.segment;
            self.open = whole.then_some(Train { segments: train.segments + 1, ..train });
            return Ok(());
        }
        if HEADER_LEN + datagram.len() > self.frame_max {
            return Err(FrameError::Length(HEADER_LEN + datagram.len()));
        }
        let at = out.len();
        encode_port(gateway, datagram.len(), datagram, out)?;
        self.open = Some(Train { at, gateway, segment: datagram.len(), segments: 1 });
        Ok(())
    }

    /// The next datagram begins a frame of its own.
    pub fn close(&mut self) {
        self.open = None;
    }
}

/// Cuts the `port` backend's byte stream into frames. Holds at most two frames of the largest size.
#[derive(Debug)]
pub struct PortDecoder {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for PortDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl PortDecoder {
    const CAPACITY: usize = 2 * (PORT_PREFIX_LEN + MAX_FRAME);

    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: vec![0; Self::CAPACITY].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Where the next bytes of the stream go: read into it, then call [`PortDecoder::advance`].
    /// Never empty once [`PortDecoder::next_frame`] has returned `None`.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// Says that `count` bytes were read into [`PortDecoder::space`].
    ///
    /// # Panics
    /// When `count` is more than the space: a bug of the caller, not of the peer.
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.buffer.len() - self.end, "no more is read than there is space");
        self.end += count;
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`] when the frame is malformed. The frame is passed over: its length still says
    /// where the next one begins, so the caller decides whether to go on.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let available = &self.buffer[self.start..self.end];
        let Some((prefix, rest)) = available.split_first_chunk::<PORT_PREFIX_LEN>() else { return Ok(None) };
        let length = usize::from(u16::from_le_bytes(*prefix));
        let Some(frame) = rest.get(..length) else { return Ok(None) };
        self.start += PORT_PREFIX_LEN + length;
        Frame::parse(frame).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(gateway: u8, segment: u16, payload: &[u8]) -> Vec<u8> {
        let [low, high] = segment.to_le_bytes();
        [&[VERSION, gateway, low, high], payload].concat()
    }

    #[test]
    fn one_datagram_is_a_frame_of_one_segment() {
        let bytes = frame(3, 148, &[5; 148]);
        let parsed = Frame::parse(&bytes).unwrap();
        assert_eq!(parsed.gateway(), GatewayId(3));
        assert_eq!(parsed.segments().collect::<Vec<_>>(), vec![&[5; 148][..]]);
    }

    #[test]
    fn last_segment_of_a_train_may_be_shorter() {
        let bytes = frame(0, 100, &[1; 250]);
        let lengths: Vec<usize> = Frame::parse(&bytes).unwrap().segments().map(<[u8]>::len).collect();
        assert_eq!(lengths, [100, 100, 50]);
    }

    #[test]
    fn each_broken_rule_is_named() {
        assert_eq!(Frame::parse(&[1, 0, 0]), Err(FrameError::Length(3)));
        assert_eq!(Frame::parse(&[2, 0, 32, 0, 0]), Err(FrameError::Version(2)));
        assert_eq!(
            Frame::parse(&frame(0, 0, &[0; 40])),
            Err(FrameError::Segment { segment: 0, payload: 40 })
        );
        assert_eq!(
            Frame::parse(&frame(0, 31, &[0; 40])),
            Err(FrameError::Segment { segment: 31, payload: 40 })
        );
        assert_eq!(
            Frame::parse(&frame(0, 41, &[0; 40])),
            Err(FrameError::Segment { segment: 41, payload: 40 })
        );
        assert_eq!(Frame::parse(&frame(0, 32, &vec![0; 32 * 65])), Err(FrameError::Segments(65)));
        assert!(Frame::parse(&frame(0, 32, &vec![0; 32 * 64])).is_ok());
        assert_eq!(Frame::parse(&vec![1; MAX_FRAME + 1]), Err(FrameError::Length(MAX_FRAME + 1)));
    }

    #[test]
    fn ethernet_frame_is_taken_only_between_the_two_ends_and_of_the_one_type() {
        let inner = frame(3, 148, &[5; 148]);
        let good = [&GUEST_TO_RELAY[..], &inner].concat();
        assert_eq!(Frame::parse_ethernet(&good, &GUEST_TO_RELAY), Frame::parse(&inner));
        assert_eq!(Frame::parse_ethernet(&good, &RELAY_TO_GUEST), Err(FrameError::Ethernet));
        for at in 0..ETHERNET_LEN {
            let mut other = good.clone();
            other[at] ^= 1;
            assert_eq!(Frame::parse_ethernet(&other, &GUEST_TO_RELAY), Err(FrameError::Ethernet));
        }
        let short = &GUEST_TO_RELAY[..ETHERNET_LEN - 1];
        assert_eq!(Frame::parse_ethernet(short, &GUEST_TO_RELAY), Err(FrameError::Ethernet));
        assert_eq!(GUEST_TO_RELAY[12..], [0x88, 0xB5]);
        // Locally administered and no group address.
        assert!([GUEST_HARDWARE, RELAY_HARDWARE].iter().all(|address| address[0] & 3 == 2));
    }

    #[test]
    fn largest_datagram_fits_and_a_larger_one_is_refused() {
        let mut out = Vec::new();
        encode_port(GatewayId(1), MAX_DATAGRAM, &vec![0; MAX_DATAGRAM], &mut out).unwrap();
        assert!(Frame::parse(&out[PORT_PREFIX_LEN..]).is_ok());
        let before = out.len();
        let larger = vec![0; MAX_DATAGRAM + 1];
        assert!(encode_port(GatewayId(1), larger.len(), &larger, &mut out).is_err());
        assert_eq!(out.len(), before);
    }

    #[test]
    fn malformed_frame_is_passed_over_and_the_next_one_is_read() {
        let mut stream = vec![3, 0, 9, 9, 9];
        encode_port(GatewayId(7), 40, &[4; 40], &mut stream).unwrap();
        let mut decoder = PortDecoder::new();
        decoder.space()[..stream.len()].copy_from_slice(&stream);
        decoder.advance(stream.len());
        assert_eq!(decoder.next_frame(), Err(FrameError::Length(3)));
        assert_eq!(decoder.next_frame().unwrap().unwrap().gateway(), GatewayId(7));
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(!decoder.space().is_empty());
    }

    /// The frames of a stream: gateway, segment length, and the datagrams in it.
    fn frames(stream: &[u8]) -> Vec<(u8, usize, Vec<Vec<u8>>)> {
        let mut decoder = PortDecoder::new();
        decoder.space()[..stream.len()].copy_from_slice(stream);
        decoder.advance(stream.len());
        let mut all = Vec::new();
        while let Some(frame) = decoder.next_frame().unwrap() {
            let datagrams = frame.segments().map(<[u8]>::to_vec).collect();
            all.push((frame.gateway().0, frame.segment_len(), datagrams));
        }
        all
    }

    fn packed(frame_max: usize, datagrams: &[(u8, Vec<u8>)]) -> Vec<(u8, usize, usize)> {
        let (mut packer, mut out) = (Packer::new(frame_max), Vec::new());
        for (gateway, datagram) in datagrams {
            packer.push(GatewayId(*gateway), datagram, &mut out).unwrap();
        }
        frames(&out).into_iter().map(|(gateway, segment, all)| (gateway, segment, all.len())).collect()
    }

    #[test]
    fn equal_datagrams_for_one_gateway_become_a_train_that_a_shorter_one_ends() {
        let of = |gateway, length| (gateway, vec![7; length]);
        let datagrams = [of(1, 100), of(1, 100), of(1, 40), of(1, 40), of(1, 100), of(2, 100), of(1, 100)];
        let expected = [(1, 100, 3), (1, 40, 1), (1, 100, 1), (2, 100, 1), (1, 100, 1)];
        assert_eq!(packed(MAX_FRAME, &datagrams), expected);
    }

    #[test]
    fn train_is_as_long_as_a_frame_and_no_longer() {
        let many = vec![(1, vec![7; 32]); MAX_SEGMENTS + 1];
        assert_eq!(packed(MAX_FRAME, &many), [(1, 32, MAX_SEGMENTS), (1, 32, 1)]);
        let large = vec![(1, vec![7; 1452]); 46];
        assert_eq!(packed(MAX_FRAME, &large), [(1, 1452, 45), (1, 1452, 1)]);
        let three = vec![(1, vec![7; 100]); 3];
        assert_eq!(packed(HEADER_LEN + 300, &three), [(1, 100, 3)]);
        assert_eq!(packed(HEADER_LEN + 299, &three), [(1, 100, 2), (1, 100, 1)]);
        let (mut packer, mut out) = (Packer::new(HEADER_LEN + 99), Vec::new());
        assert!(packer.push(GatewayId(1), &[7; 100], &mut out).is_err() && out.is_empty());
    }

    #[test]
    fn closed_frame_does_not_grow() {
        let (mut packer, mut out) = (Packer::new(MAX_FRAME), Vec::new());
        packer.push(GatewayId(1), &[7; 100], &mut out).unwrap();
        packer.close();
        packer.push(GatewayId(1), &[7; 100], &mut out).unwrap();
        assert_eq!(frames(&out).len(), 2);
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_out_in_order(
            datagrams in prop::collection::vec((0_u8..3, 32_usize..40, any::<u8>(), any::<bool>()), 1..200),
            frame_max in 50_usize..600,
        ) {
            let (mut packer, mut out) = (Packer::new(frame_max), Vec::new());
            let mut expected = Vec::new();
            for (gateway, length, fill, close) in datagrams {
                let datagram = vec![fill; length];
                packer.push(GatewayId(gateway), &datagram, &mut out).unwrap();
                expected.push((gateway, datagram));
                if close {
                    packer.close();
                }
            }
            let seen: Vec<(u8, Vec<u8>)> = frames(&out)
                .into_iter()
                .flat_map(|(gateway, _, all)| all.into_iter().map(move |datagram| (gateway, datagram)))
                .collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(frame) = Frame::parse(&bytes) {
                let total: usize = frame.segments().map(<[u8]>::len).sum();
                prop_assert_eq!(total, frame.payload().len());
                prop_assert!(frame.segments().count() <= MAX_SEGMENTS);
            }
        }

        #[test]
        fn frames_survive_any_split(
            frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 32..200)), 1..20),
            cut in 1usize..500,
        ) {
            let mut stream = Vec::new();
            for (gateway, payload) in &frames {
                encode_port(GatewayId(*gateway), payload.len(), payload, &mut stream).unwrap();
            }
            let mut decoder = PortDecoder::new();
            let mut seen = Vec::new();
            for chunk in stream.chunks(cut) {
                decoder.space()[..chunk.len()].copy_from_slice(chunk);
                decoder.advance(chunk.len());
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push((frame.gateway().0, frame.payload().to_vec()));
                }
            }
            prop_assert_eq!(seen, frames);
        }
    }
}
