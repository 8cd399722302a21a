//! The work VM's only wire, outside of the VM: uplink frames become datagrams for the company's
//! gateways, and datagrams of those gateways become uplink frames.
//!
//! ```text
//! QEMU ──stream or packets── Relay ──UDP, connected── gateways        kontord ──SEQPACKET── Relay
//! ```
//!
//! * [`message`]: what kontord and the relay say to each other.
//! * [`Relay`]: the loop. It trusts kontord, and no byte of the guest or of the network: it has no
//!   socket but those that kontord connected, opens nothing, waits for no single peer, and its buffers
//!   are made once.
#![forbid(unsafe_code)]

mod bucket;
mod down;
mod gateways;
pub mod message;
mod relay;
mod socket;
mod up;

pub use bucket::Rate;
pub use gateways::TableError;
pub use relay::{End, Limits, REFUSED_INITIATION, Relay, RelayError, Wires};
pub use socket::Uplink;
