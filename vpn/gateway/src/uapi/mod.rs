//! WireGuard's cross-platform userspace configuration protocol (wireguard.com/xplatform), by which wg(8) reads and
//! changes an interface.
//!
//! ```text
//! wg → interface    get=1 ⏎ ⏎                         set=1 ⏎ key=value ⏎ … ⏎
//! interface → wg    key=value ⏎ … errno=0 ⏎ ⏎         errno=0 ⏎ ⏎
//! ```
//!
//! [`Decoder`] reads requests, [`State`] is written as an answer, [`Socket`] is the place where both happen, and a
//! [`Device`] is what is read and changed. [`Model`] is a device that only remembers. A request is read whole before
//! anything of it is done: one that is wrong anywhere changes nothing.
//!
//! Whoever may open the socket may read the keys, so only its owner may. What comes through it is bounded all the same,
//! and no bytes panic.

mod answer;
mod model;
mod request;
mod socket;

use std::net::SocketAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use kontor_vpn::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

pub use model::Model;
pub use request::{
    ALLOWED_IPS_MAX, Decoder, Interfaces, LINE_MAX, NoInterfaces, PEERS_MAX, Request, RequestError,
};
pub use rustix::io::Errno;
pub use socket::{CONNECTIONS_MAX, DIRECTORY, End, PATIENCE, Socket, SocketError};

/// An interface that can be read and changed.
pub trait Device {
    /// Everything there is to know; the error reaches the caller as its number.
    fn get(&mut self) -> Result<State, Errno>;

    /// Changes what is named, in the order of [`Set`]'s fields; all of it, or nothing and an error.
    ///
    /// A peer with the interface's own public key is passed over, as the kernel does. An address that is allowed to
    /// one peer is taken from the one that had it. `EADDRINUSE` says that the port is taken.
    fn set(&mut self, set: Set) -> Result<(), Errno>;
}

/// Thirty-two secret bytes, cleared when they are dropped. On the heap, so that a move leaves no copy.
#[derive(Clone)]
pub struct Secret(Box<Zeroizing<[u8; KEY_LEN]>>);

impl Secret {
    /// Takes a copy: the caller clears its own.
    pub fn new(bytes: &[u8; KEY_LEN]) -> Self {
        let mut secret = Self(Box::default());
        secret.0.copy_from_slice(bytes);
        secret
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// As a private key of X25519.
    pub fn to_private_key(&self) -> StaticSecret {
        StaticSecret::from(*self.as_bytes())
    }

    /// All zero, which the protocol uses for none.
    fn is_none(&self) -> bool {
        self.0.iter().fold(0, |all, byte| all | byte) == 0
    }
}

/// What is to happen to something that may be there or not.
#[derive(Clone, Default)]
pub enum Change<T> {
    /// Nothing.
    #[default]
    Keep,
    /// It goes.
    Remove,
    /// This takes its place.
    Put(T),
}

/// A request to change an interface: what comes first is done first.
#[derive(Clone, Default)]
pub struct Set {
    /// The interface's private key.
    pub private_key: Change<Secret>,
    /// The UDP port to listen on, 0 for any that is free.
    pub listen_port: Option<u16>,
    /// The mark of outgoing datagrams, 0 for none.
    pub fwmark: Option<u32>,
    /// All peers go before the ones below come.
    pub replace_peers: bool,
    /// Peers in the order to change them; one may be there more than once.
    pub peers: Vec<SetPeer>,
}

/// What is to happen to one peer.
#[derive(Clone)]
pub struct SetPeer {
    /// Who it is.
    pub public_key: PublicKey,
    /// It goes, and nothing else is done.
    pub remove: bool,
    /// Nothing is done if it is not there; without this it is made.
    pub update_only: bool,
    /// The key that is mixed in (Noise's psk2).
    pub preshared_key: Change<Secret>,
    /// Where it is. None: as it was.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between datagrams that keep a path open, 0 for none.
    pub persistent_keepalive_s: Option<u16>,
    /// All its allowed addresses go before the changes below.
    pub replace_allowed_ips: bool,
    /// Changes of its allowed addresses, in order, without host bits.
    pub allowed_ips: Vec<AllowedIp>,
}

impl SetPeer {
    /// A peer of which nothing is to change; it is made if it is not there.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: Change::Keep,
            endpoint: None,
            persistent_keepalive_s: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// A change of a peer's allowed addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedIp {
    /// It is this peer's from now on, and no other's.
    Add(IpNet),
    /// It is this peer's no longer; nothing happens if it was not.
    Remove(IpNet),
}

/// Everything about an interface.
#[derive(Clone, Default)]
pub struct State {
    /// Its private key.
    pub private_key: Option<Secret>,
    /// The UDP port that it listens on, 0 if it does not.
    pub listen_port: u16,
    /// The mark of outgoing datagrams, 0 for none.
    pub fwmark: u32,
    /// Its peers.
    pub peers: Vec<StatePeer>,
}

/// Everything about a peer.
#[derive(Clone)]
pub struct StatePeer {
    /// Who it is.
    pub public_key: PublicKey,
    /// The key that is mixed in.
    pub preshared_key: Option<Secret>,
    /// Where it was last seen, or is said to be.
    pub endpoint: Option<SocketAddr>,
    /// When the session in use was agreed upon.
    pub last_handshake: Option<SystemTime>,
    /// Bytes sent to it, as they left.
    pub tx_bytes: u64,
    /// Bytes received from it that were authentic.
    pub rx_bytes: u64,
    /// Seconds between datagrams that keep a path open, 0 for none.
    pub persistent_keepalive_s: u16,
    /// Addresses that are routed to it, and that it may send from.
    pub allowed_ips: Vec<IpNet>,
}

impl StatePeer {
    /// A peer of which nothing is known but its key.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            last_handshake: None,
            tx_bytes: 0,
            rx_bytes: 0,
            persistent_keepalive_s: 0,
            allowed_ips: Vec::new(),
        }
    }
}

/// Bytes of a key.
pub const KEY_LEN: usize = 32;
