//! What kontord and the relay say to each other: one postcard message in each SEQPACKET packet.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Largest message in bytes: [`MAX_GATEWAYS`] need less than half of it.
pub const MAX_MESSAGE: usize = 2048;
/// Most gateways in one table.
pub const MAX_GATEWAYS: usize = 8;
/// Most characters of [`FromRelay::Garbage`].
pub const MAX_WORDS: usize = 200;

/// What kontord says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDaemon {
    /// The gateways; replaces the table. The packet brings a socket (SCM_RIGHTS) for each that has an endpoint,
    /// in the same order.
    Gateways(Vec<Gateway>),
    /// Asks for [`FromRelay::Counters`].
    Report,
    /// The relay ends.
    Shutdown,
}

/// A gateway, and the way to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// Its id in the bundle.
    pub id: u8,
    /// What its socket is connected to; `None` where the host has no way to it.
    pub endpoint: Option<SocketAddr>,
}

/// What the relay says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromRelay {
    /// The relay runs; its table is empty.
    Ready,
    /// What has passed so far; also the last message before an end that is no error.
    Counters(Counters),
    /// The guest broke the rules of the uplink too often, last like this; the relay ends.
    Garbage(String),
}

/// What has passed, and what was dropped for which reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// From the guest to the gateways.
    pub up: Up,
    /// From the gateways to the guest.
    pub down: Down,
}

/// From the guest to the gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Up {
    /// Frames of which every datagram was sent or dropped.
    pub frames: u64,
    /// Datagrams sent.
    pub datagrams: u64,
    /// Their payload in bytes.
    pub bytes: u64,
    /// Frames dropped: they break the format.
    pub malformed: u64,
    /// Frames dropped: they name a gateway that is not in the table.
    pub unknown_gateway: u64,
    /// Frames dropped: a datagram in them has not WireGuard's shape.
    pub not_wireguard: u64,
    /// Frames dropped: more datagrams than the rate limit.
    pub above_rate: u64,
    /// Frames dropped: more handshake initiations than their own limit.
    pub initiations_above_rate: u64,
    /// Datagrams dropped: the host's network refused them, or has no way to the gateway.
    pub send_failed: u64,
}

/// From the gateways to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Down {
    /// Datagrams framed for the guest.
    pub datagrams: u64,
    /// Their payload in bytes.
    pub bytes: u64,
    /// Datagrams dropped: not from the gateway's endpoint. They came before their socket was connected.
    pub wrong_source: u64,
    /// Datagrams dropped: they have not WireGuard's shape.
    pub not_wireguard: u64,
    /// Datagrams dropped: the guest does not read.
    pub guest_full: u64,
}

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes between kontord and relay are no message")]
pub struct MessageError(usize);

/// Writes a message.
///
/// # Errors
/// [`MessageError`] when it is longer than [`MAX_MESSAGE`].
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, MessageError> {
    let bytes = postcard::to_allocvec(message).map_err(|_| MessageError(0))?;
    if bytes.len() > MAX_MESSAGE { Err(MessageError(bytes.len())) } else { Ok(bytes) }
}

/// Reads a message.
///
/// # Errors
/// [`MessageError`] when the packet is too long, is no `M`, or holds more than one.
pub fn decode<M: serde::de::DeserializeOwned>(packet: &[u8]) -> Result<M, MessageError> {
    let error = MessageError(packet.len());
    if packet.len() > MAX_MESSAGE {
        return Err(error);
    }
    match postcard::take_from_bytes(packet) {
        Ok((message, [])) => Ok(message),
        Ok(_) | Err(_) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_table_fits() {
        let endpoint: SocketAddr = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap();
        let gateway = |id: u8| Gateway { id: 255 - id, endpoint: Some(endpoint) };
        let table = (0..8).map(gateway).collect::<Vec<_>>();
        assert_eq!(table.len(), MAX_GATEWAYS);
        let message = FromDaemon::Gateways(table);
        let packet = encode(&message).unwrap();
        assert!(packet.len() < MAX_MESSAGE / 2);
        assert_eq!(decode::<FromDaemon>(&packet), Ok(message));
    }

    #[test]
    fn longest_words_fit_and_a_longer_message_is_refused() {
        assert!(encode(&FromRelay::Garbage("\u{10ffff}".repeat(MAX_WORDS))).is_ok());
        let fits = FromRelay::Garbage("x".repeat(MAX_MESSAGE - 3));
        assert_eq!(encode(&fits).unwrap().len(), MAX_MESSAGE);
        let longer = FromRelay::Garbage("x".repeat(MAX_MESSAGE - 2));
        assert_eq!(encode(&longer), Err(MessageError(MAX_MESSAGE + 1)));
        let packet = postcard::to_allocvec(&longer).unwrap();
        assert_eq!(decode::<FromRelay>(&packet), Err(MessageError(MAX_MESSAGE + 1)));
    }

    #[test]
    fn two_messages_in_one_packet_are_refused() {
        let packet = [encode(&FromDaemon::Report).unwrap(), encode(&FromDaemon::Report).unwrap()].concat();
        assert_eq!(decode::<FromDaemon>(&packet), Err(MessageError(2)));
    }
}
