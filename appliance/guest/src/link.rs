//! What `kontor-init` and `kontor-tunnel` say to each other: postcard messages, one per packet of a
//! `SOCK_SEQPACKET` socketpair that both inherit from the start.
//!
//! ```text
//! init                            tunnel
//!              ◄───────────────  Ready
//!   Configure  ───────────────►
//!              ◄───────────────  Up | Down     (each time the session comes or goes; always of one gateway)
//!              ◄───────────────  Heard         (now and then while the gateway's messages come in)
//!              ◄───────────────  Failed        then the tunnel exits
//!   Reconnect  ───────────────►
//!   Close      ───────────────►                then the tunnel exits
//! ```

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Most bytes of one message.
const MESSAGE_MAX: usize = 512;

/// What the tunnel is told.
#[derive(Serialize, Deserialize)]
pub(crate) enum ToTunnel {
    /// Open a session with the first gateway that answers.
    Configure(Configure),
    /// Forget every session and open a new one with the same gateway.
    Reconnect,
    /// Forget the keys and end.
    Close,
}

/// One end of a session and the ways to the other.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub(crate) struct Configure {
    /// X25519, this boot's own.
    pub(crate) private_key: [u8; 32],
    /// The gateways, best first: a primary and perhaps a spare.
    #[zeroize(skip)]
    pub(crate) gateways: Vec<Way>,
    /// Seconds of silence after which a keepalive is sent.
    #[zeroize(skip)]
    pub(crate) keepalive_s: u16,
}

/// A gateway, from the bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Way {
    /// Its number, for the uplink's frames.
    pub(crate) gateway: u8,
    /// Its X25519 public key.
    pub(crate) key: [u8; 32],
}

/// What the tunnel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromTunnel {
    /// It holds no power any more and waits to be configured.
    Ready,
    /// There is a session with this gateway.
    Up(u8),
    /// There is no session any more.
    Down,
    /// Since the last time it said so, a message came that proved to be the gateway's.
    Heard,
    /// It cannot go on.
    Failed(TunnelFault),
}

/// Why the tunnel cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum TunnelFault {
    #[error("the tunnel was started with powers or without its descriptors")]
    Start,
    #[error("the tunnel did not understand what it was told")]
    Link,
    #[error("the uplink failed")]
    Uplink,
    #[error("the TUN interface failed")]
    Tun,
    #[error("the gateway's key is none")]
    GatewayKey,
}

/// What went wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the other side is gone")]
    Gone,
    #[error("a message between init and tunnel is malformed")]
    Malformed,
    #[error("the socket between init and tunnel")]
    Socket(#[source] io::Error),
}

/// One end of the socketpair.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

impl Link {
    /// Both ends; neither blocks.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(one), Self(other)))
    }

    /// The end that was inherited.
    pub(crate) fn inherited(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends one message. The socket holds far more of them than are ever under way.
    pub(crate) fn send<M: Serialize>(&self, message: &M) -> Result<(), LinkError> {
        let mut buffer = Zeroizing::new([0; MESSAGE_MAX]);
        let bytes = postcard::to_slice(message, buffer.as_mut_slice()).map_err(|_| LinkError::Malformed)?;
        match send(&self.0, bytes, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(LinkError::Gone),
            Err(error) => Err(LinkError::Socket(error.into())),
        }
    }

    /// Takes one message, `None` when none waits.
    pub(crate) fn receive<M: DeserializeOwned>(&self) -> Result<Option<M>, LinkError> {
        // One byte more, so that a message that is too long shows.
        let mut buffer = Zeroizing::new([0; MESSAGE_MAX + 1]);
        let length = loop {
            match recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Err(LinkError::Gone),
                Ok((length, _)) => break length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(LinkError::Socket(error.into())),
            }
        };
        let bytes = buffer.get(..length).filter(|_| length <= MESSAGE_MAX).ok_or(LinkError::Malformed)?;
        match postcard::take_from_bytes(bytes) {
            Ok((message, [])) => Ok(Some(message)),
            Ok(_) | Err(_) => Err(LinkError::Malformed),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configure() -> Configure {
        Configure {
            private_key: [7; 32],
            gateways: vec![Way { gateway: 3, key: [8; 32] }, Way { gateway: 4, key: [9; 32] }],
            keepalive_s: 25,
        }
    }

    #[test]
    fn configuration_arrives_whole() {
        let (init, tunnel) = Link::pair().unwrap();
        assert!(tunnel.receive::<ToTunnel>().unwrap().is_none());
        init.send(&ToTunnel::Configure(configure())).unwrap();
        let Some(ToTunnel::Configure(arrived)) = tunnel.receive().unwrap() else {
            panic!("no configuration")
        };
        assert_eq!((arrived.private_key, arrived.keepalive_s), ([7; 32], 25));
        assert_eq!(arrived.gateways, [Way { gateway: 3, key: [8; 32] }, Way { gateway: 4, key: [9; 32] }]);
    }

    #[test]
    fn other_side_that_is_gone_is_noticed_by_both_directions() {
        let (init, tunnel) = Link::pair().unwrap();
        drop(tunnel);
        assert!(matches!(init.receive::<FromTunnel>(), Err(LinkError::Gone)));
        assert!(matches!(init.send(&ToTunnel::Close), Err(LinkError::Gone)));
    }

    #[test]
    fn malformed_message_is_refused() {
        let (init, tunnel) = Link::pair().unwrap();
        for bytes in [vec![9], vec![0, 0], vec![0; MESSAGE_MAX + 1]] {
            send(&tunnel, &bytes, SendFlags::NOSIGNAL).unwrap();
            assert!(
                matches!(init.receive::<FromTunnel>(), Err(LinkError::Malformed)),
                "{} bytes",
                bytes.len()
            );
        }
    }
}
