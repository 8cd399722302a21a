//! The control channel between `kontor-init` (guest) and `kontord` (host).
//!
//! It runs over the virtio-serial port named [`PORT`], as frames cut by [`Decoder`](crate::Decoder).
//!
//! ```text
//! guest                                   host
//!   Hello{versions, features}  ─────────►
//!                              ◄─────────  Hello{version, features}
//!   State(Early … )            ─────────►      (each state once, in order)
//!   Challenge                  ─────────►
//!                              ◄─────────  Lease | Refused
//!   State(Leased … Session)    ─────────►
//!   Ready                      ─────────►
//!                              ◄─────────  Nudge | Woken | PowerOff
//!   Stop(reason)               ─────────►      then the guest powers off
//! ```
//!
//! Enumerations here only ever grow at their end, because postcard writes the position of a variant.

use crate::reason::StopReason;
use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries this channel.
pub const PORT: &str = "kontor.control";
/// The one version of this protocol so far.
pub const VERSION: u16 = 1;
/// Largest body of a frame that the guest may send, in bytes.
pub const MAX_FROM_GUEST: usize = 4 * 1024;
/// Largest body of a frame that the host may send, in bytes: a lease with its chain.
pub const MAX_FROM_HOST: usize = 1024 * 1024;
/// Most keysets that one answer carries.
pub const MAX_KEYSETS: usize = 8;
/// Most bytes of one signed document (`lease.md`, notation).
pub const MAX_DOCUMENT: usize = 64 * 1024;

/// What the guest says to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// First frame: every protocol version that this guest speaks, newest last, and its features.
    Hello {
        /// Oldest version spoken.
        oldest: u16,
        /// Newest version spoken.
        newest: u16,
        /// Feature bits; none is defined yet.
        features: u64,
    },
    /// A boot state was reached.
    State {
        /// Which.
        state: BootState,
        /// Milliseconds since the guest's kernel started, by its own (untrusted) clock.
        at_ms: u64,
    },
    /// The guest asks for a lease (`lease.md` 6 and 21).
    Challenge(Challenge),
    /// The session runs.
    Ready,
    /// The guest powers off now, for this reason.
    Stop(StopReason),
}

/// What the host says to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// Answer to the guest's `Hello`.
    Hello {
        /// The version both will speak.
        version: u16,
        /// Feature bits; none is defined yet.
        features: u64,
    },
    /// The office's answer to the last [`Challenge`], as it was received.
    Lease(LeaseParts),
    /// No lease is to be had for the last [`Challenge`]; the guest may ask again later.
    Refused,
    /// Something newer waits at the office: send a new [`Challenge`] (`lease.md` 25).
    Nudge,
    /// Power off in an orderly way.
    PowerOff,
    /// The host has slept: drop every session of the tunnel, and send a new [`Challenge`] (`lease.md` 21). May come
    /// at any time after `Hello`.
    Woken,
}

/// One request for freshness: what the lease that answers it must name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// 32 random bytes of this challenge.
    pub nonce: [u8; 32],
    /// X25519 public key that this boot's tunnel uses (`B`).
    pub boot_key: [u8; 32],
    /// Rises by one with each challenge for the same `boot_key`, from 0.
    pub seq: u64,
    /// Root hash of the dm-verity device that the guest runs from.
    pub verity_root: [u8; 32],
    /// Version of the keyset in the guest's image: the oldest link it accepts a chain from.
    pub keyset_version: u64,
}

/// A lease and all that is needed to verify it; each field a DSSE envelope as received.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeaseParts {
    /// Keysets newer than the challenge's, in rising order; at most [`MAX_KEYSETS`].
    pub keysets: Vec<Vec<u8>>,
    /// The device record.
    pub device: Vec<u8>,
    /// The bundle of the device's line.
    pub bundle: Vec<u8>,
    /// The lease.
    pub lease: Vec<u8>,
}

/// How far the guest has come. Each state implies all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum BootState {
    /// `kontor-init` runs from the initrd and speaks to the host.
    Early,
    /// The root file system is mounted through dm-verity and is the root; no module loads any more.
    Verified,
    /// A lease for this boot was verified.
    Leased,
    /// The tunnel's first handshake is done.
    TunnelUp,
    /// The gateway confirmed that lease, keyset and bundle are the newest.
    Admitted,
    /// The state disk, or the tmpfs in its place, is mounted.
    StateOpen,
    /// The session's processes run.
    Session,
}

impl BootState {
    /// The state's name as people read it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Early => "early",
            Self::Verified => "verified",
            Self::Leased => "leased",
            Self::TunnelUp => "tunnel-up",
            Self::Admitted => "admitted",
            Self::StateOpen => "state-open",
            Self::Session => "session",
        }
    }
}
