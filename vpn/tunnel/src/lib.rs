//! WireGuard at both ends of the tunnel: bytes in, bytes out.
//!
//! A [`Tunnel`] is one WireGuard device. It opens no socket and no interface: the caller hands it
//! datagrams and packets as they come, with the time, and sends what it hands back. `E` is whatever
//! the caller sends datagrams to: a socket address at a gateway, the number of a gateway in a work VM.
//!
//! ```
//! # use std::time::Instant;
//! # use kontor_vpn::{DATAGRAM_MAX, Tunnel};
//! # fn send(_: u8, _: &[u8]) {}
//! # fn to_tun(_: &[u8]) {}
//! fn on_datagram(tunnel: &mut Tunnel<u8>, gateway: u8, datagram: &[u8], now: Instant) {
//!     let mut out = [0; DATAGRAM_MAX];
//!     if let Ok(Some(received)) = tunnel.handle_datagram(gateway, datagram, &mut out, now) {
//!         to_tun(received.packet);
//!     }
//!     while let Some(transmit) = tunnel.poll_transmit(&mut out) {
//!         send(transmit.to, &out[..transmit.len]);
//!     }
//! }
//! ```
//!
//! After each `handle_*`, or after a batch of them, comes [`Tunnel::poll_transmit`] until it has nothing
//! more, and then sleep until [`Tunnel::next_timeout`]. No call allocates for a packet in a session.
//!
//! What it trusts: nothing in a datagram. What goes beyond boringtun 0.7.1, whose `Tunn` is inside:
//! one limiter for all peers, cookies bound to the whole endpoint, padding, a bound on packets that wait,
//! the source of each packet, no move of an endpoint by a replayed initiation, and no counter
//! that boringtun would overflow on.
//!
//! boringtun reads the clock by itself (CLOCK_BOOTTIME, and the wall clock once per peer for the
//! time in its handshakes); everything else takes `now`.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod allowed;
mod cookie;
mod drops;
mod effects;
mod inner;
mod outbox;
mod peer;
mod tunnel;

pub use drops::{DropReason, Drops};
pub use peer::{PeerConfig, PeerStatus, Routes, Start, Traffic};
pub use tunnel::{AddPeerError, Config, ConfigError, PeerId, Received, Transmit, Tunnel};
pub use x25519_dalek::{PublicKey, StaticSecret};

/// Largest MTU in bytes of the interface in front of a tunnel: what fits 1500 bytes of IPv6, 80 of them
/// for the tunnel.
pub const MTU_MAX: u16 = 1420;
/// Smallest MTU in bytes: IPv6's (RFC 8200, 5).
pub const MTU_MIN: u16 = 1280;
/// Bytes that a data message adds to its packet.
pub const OVERHEAD: usize = 32;
/// Largest datagram in bytes; every buffer for one has this size.
pub const DATAGRAM_MAX: usize = MTU_MAX as usize + OVERHEAD;
/// Handshake messages per second that a tunnel answers without asking for a cookie, unless told otherwise.
pub const HANDSHAKES_PER_S: u64 = 500;
/// Most peers of any tunnel: the numbers of their sessions stay hard to guess.
pub const PEERS_MAX: usize = 65_536;
