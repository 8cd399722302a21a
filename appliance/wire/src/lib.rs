//! Everything that crosses between the work VM and its host, and what it says to the gateway.
//!
//! * [`control`]: the framed messages between `kontor-init` and `kontord`.
//! * [`uplink`]: the frames between `kontor-tunnel` and `kontor-relay`.
//! * [`post`]: what `kontor-init` and the gateway say to each other inside the tunnel.
//! * [`probe`]: the test channel; only test images carry its other end.
//! * [`wireguard`]: what a datagram in such a frame looks like.
//! * [`reason`]: why a work VM stopped, as a closed list.
//!
//! Neither side trusts a byte of the other: every length has a named limit, every parser returns an
//! error instead of panicking, and no buffer grows beyond its limit.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod control;
mod frame;
pub mod post;
pub mod probe;
pub mod reason;
pub mod uplink;
pub mod wireguard;

pub use frame::{Decoder, FrameError, encode};
