//! What must hold for any bytes that a peer can send.
//!
//! Each function takes bytes and panics when its promise is broken. `tests/replay.rs` runs them on the
//! files below `corpus/`; the package in `targets/` lets libFuzzer search for more:
//!
//! ```text
//! cargo +nightly fuzz run --fuzz-dir fuzz/targets control fuzz/corpus/control
//! ```
#![forbid(unsafe_code)]

use kontor_gateway::uapi::{
    Decoder as UapiDecoder, Device as _, Model, NoInterfaces, Request as UapiRequest,
};
use kontor_release::{Image, Manifest};
use kontor_trust::{
    BundleKind, Device, DeviceKind, Digest, Lease, LeaseKind, PublicKey, Request, TrustedKeyset,
    verify_request,
};
use kontor_wire::{
    Decoder,
    control::{FromGuest, FromHost, MAX_FROM_GUEST, MAX_FROM_HOST},
    encode, probe,
    uplink::{HEADER_LEN, MAX_SEGMENTS, PORT_PREFIX_LEN, PortDecoder, encode_port},
    wireguard::{COOKIE_REPLY_LEN, INITIATION_LEN, KEEPALIVE_LEN, LONGEST, RESPONSE_LEN, Shape},
};
use serde::{Serialize, de::DeserializeOwned};

/// A first keyset, the root of trust of [`documents`].
const KEYSET: &[u8] = include_bytes!("../fixtures/keyset.json");
/// Its tenant.
const TENANT: &str = include_str!("../fixtures/tenant");

/// A target: its name, which is its corpus's folder, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("control", control),
    ("port", port),
    ("wireguard", wireguard),
    ("probe", probe),
    ("documents", documents),
    ("uapi", uapi),
];

/// A control channel's stream, in both directions.
pub fn control(bytes: &[u8]) {
    stream::<FromGuest>(bytes, MAX_FROM_GUEST);
    stream::<FromHost>(bytes, MAX_FROM_HOST);
}

/// A probe channel's stream, in both directions.
pub fn probe(bytes: &[u8]) {
    stream::<probe::Request>(bytes, probe::MAX_FRAME);
    stream::<probe::Output>(bytes, probe::MAX_FRAME);
}

/// What is understood is written again as what was understood, and the decoder never holds more than
/// its limit.
fn stream<M: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8], limit: usize) {
    let mut decoder = Decoder::new(limit);
    let mut rest = bytes;
    while !rest.is_empty() {
        assert!(decoder.room() > 0, "a decoder without a whole frame has room");
        let taken = decoder.push(rest);
        rest = &rest[taken..];
        loop {
            match decoder.next_message::<M>() {
                Ok(Some(message)) => {
                    let mut again = Decoder::new(limit);
                    again.push(&encode(&message));
                    assert_eq!(again.next_message(), Ok(Some(message)));
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// The uplink's stream on the `port` backend: every frame obeys the rules and is written again as the
/// bytes that it was read from.
pub fn port(bytes: &[u8]) {
    let mut decoder = PortDecoder::new();
    let (mut rest, mut at) = (bytes, 0);
    while !rest.is_empty() {
        let space = decoder.space();
        let count = space.len().min(rest.len());
        space[..count].copy_from_slice(&rest[..count]);
        decoder.advance(count);
        rest = &rest[count..];
        loop {
            let announced = bytes
                .get(at..at + PORT_PREFIX_LEN)
                .map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])));
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    assert!((1..=MAX_SEGMENTS).contains(&frame.segments().count()));
                    let mut again = Vec::new();
                    encode_port(frame.gateway(), frame.segment_len(), frame.payload(), &mut again)
                        .expect("a frame that was read can be written");
                    assert_eq!(again, bytes[at..at + PORT_PREFIX_LEN + HEADER_LEN + frame.payload().len()]);
                }
                Ok(None) => break,
                Err(_) => {}
            }
            at += PORT_PREFIX_LEN + announced;
        }
    }
}

/// A datagram at the relay: what passes says nothing but its type in front, and has a length of that type.
pub fn wireguard(bytes: &[u8]) {
    let Some(shape) = Shape::of(bytes) else { return };
    let (kind, fitting) = match shape {
        Shape::Initiation => (1, bytes.len() == INITIATION_LEN),
        Shape::Response => (2, bytes.len() == RESPONSE_LEN),
        Shape::CookieReply => (3, bytes.len() == COOKIE_REPLY_LEN),
        Shape::Transport => (4, (KEEPALIVE_LEN..=LONGEST).contains(&bytes.len())),
    };
    assert_eq!(bytes[..4], [kind, 0, 0, 0]);
    assert!(fitting, "{shape:?} of {} bytes", bytes.len());
}

/// Signed documents and release descriptions: nothing that nobody of the tenant signed is believed.
pub fn documents(bytes: &[u8]) {
    let tenant: Digest = TENANT.trim().parse().expect("the fixture's tenant");
    let trusted = TrustedKeyset::first(KEYSET, &tenant).expect("the fixture's keyset");
    if let Ok(first) = TrustedKeyset::first(bytes, &tenant) {
        assert_eq!(first.keyset(), trusted.keyset());
    }
    if let Ok(next) = trusted.advance(bytes) {
        assert!(next.version() <= trusted.version() + 1);
    }
    if let Ok(device) = trusted.verify::<DeviceKind>(bytes) {
        let _ = Device::parse(&device);
    }
    if let Ok(lease) = trusted.verify::<LeaseKind>(bytes) {
        let _ = Lease::parse(&lease);
    }
    let _ = trusted.verify::<BundleKind>(bytes);
    if let Ok(request) = verify_request(bytes, &PublicKey([1; 32])) {
        let _ = Request::parse(&request);
    }
    let _ = (Manifest::parse(bytes), Image::parse(bytes));
}

/// The gateway's configuration socket: what a device says of itself after any changes makes another one like it.
pub fn uapi(bytes: &[u8]) {
    let mut model = Model::default();
    for request in uapi_requests(bytes) {
        if let UapiRequest::Set(set) = request {
            assert_eq!(model.set(set), Ok(()));
        }
    }
    let text = model.0.text();
    let told = text.lines().filter(|line| !UAPI_READ_ONLY.iter().any(|key| line.starts_with(key)));
    let lines: String = told.flat_map(|line| [line, "\n"]).collect();
    let mut again = Model::default();
    for request in uapi_requests(format!("set=1\n{lines}\n").as_bytes()) {
        let UapiRequest::Set(set) = request else { panic!("set was said") };
        assert_eq!(again.set(set), Ok(()));
    }
    assert_eq!(*again.0.text(), *text);
}

/// The requests that are right.
fn uapi_requests(bytes: &[u8]) -> Vec<UapiRequest> {
    let mut decoder = UapiDecoder::new();
    let (mut rest, mut requests) = (bytes, Vec::new());
    while !rest.is_empty() {
        let (taken, request) = decoder.push(rest, &NoInterfaces);
        assert!(taken > 0, "a decoder takes what it is given");
        rest = &rest[taken..];
        requests.extend(request.and_then(Result::ok));
    }
    requests
}

/// What is told of a peer and cannot be set.
const UAPI_READ_ONLY: &[&str] =
    &["last_handshake_time_sec=", "last_handshake_time_nsec=", "tx_bytes=", "rx_bytes="];
