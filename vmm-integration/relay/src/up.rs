//! From the guest to the gateways.
//!
//! Frames wait in the decoder (two at most) and, when a gateway's socket has no room, what is left of one frame
//! waits in [`Pending`]; until that is gone nothing more is read, so that the guest feels it.

use crate::{
    bucket::Bucket,
    gateways::Table,
    message::{MAX_WORDS, Up},
    relay::{Limits, REFUSED_INITIATION},
};
use kontor_wire::{
    uplink::{ETHERNET_LEN, Frame, FrameError, GUEST_TO_RELAY, GatewayId, MAX_FRAME, PortDecoder},
    wireguard::Shape,
};
use rustix::io::Errno;
use std::{io, os::unix::net::UnixDatagram, time::Duration};

#[derive(Debug)]
pub(crate) struct UpPath {
    decoder: PortDecoder,
    /// One Ethernet frame, where the guest sends such.
    datagram: Box<[u8]>,
    sender: Sender,
    breaches: Breaches,
}

/// How the guest broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Breach {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a datagram of {0} bytes without the shape of WireGuard")]
    NotWireGuard(usize),
    #[error("a flood: {0} datagrams for a gateway that is not known")]
    Gateway(u32),
    #[error("a flood: {0} datagrams above the limit")]
    Datagrams(u32),
    #[error("a flood: {0} handshake initiations above the limit")]
    Initiations(u32),
}

/// How often it may.
#[derive(Debug)]
struct Breaches {
    malformed: Bucket,
    refused: Bucket,
}

impl Breaches {
    /// Whether this one is one too many.
    fn is_too_much(&mut self, breach: Breach, now: Duration) -> bool {
        let passes = match breach {
            Breach::Frame(_) | Breach::NotWireGuard(_) => self.malformed.take(1, now),
            Breach::Gateway(count) | Breach::Datagrams(count) => self.refused.take(count, now),
            Breach::Initiations(count) => self.refused.take(count.saturating_mul(REFUSED_INITIATION), now),
        };
        !passes
    }

    /// How the turn ends, if it does with this.
    fn turn(&mut self, fate: Fate, now: Duration) -> Option<Turn> {
        match fate {
            Fate::Done => None,
            Fate::Blocked(gateway) => Some(Turn::Blocked(gateway)),
            Fate::Refused(breach) => {
                let words = || breach.to_string().chars().take(MAX_WORDS).collect();
                self.is_too_much(breach, now).then(|| Turn::Garbage(words()))
            }
        }
    }
}

/// How a turn ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing whole is left to send.
    Drained,
    /// The socket of this gateway has no room.
    Blocked(GatewayId),
    /// The guest closed the uplink.
    Closed,
    /// The rules were broken too often; the last time like this.
    Garbage(String),
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// Every datagram is dealt with.
    Done,
    /// The socket of this gateway has no room for the rest.
    Blocked(GatewayId),
    /// It is dropped.
    Refused(Breach),
}

impl UpPath {
    pub(crate) fn new(limits: &Limits) -> Self {
        let pending = Pending { payload: Vec::with_capacity(MAX_FRAME), segment: 0, gateway: GatewayId(0) };
        let (datagrams, initiations) = (Bucket::new(limits.datagrams), Bucket::new(limits.initiations));
        let sender = Sender { pending, datagrams, initiations, counters: Up::default() };
        let datagram = vec![0; ETHERNET_LEN + MAX_FRAME + 1].into_boxed_slice();
        let breaches =
            Breaches { malformed: Bucket::new(limits.malformed), refused: Bucket::new(limits.refused) };
        Self { decoder: PortDecoder::new(), datagram, sender, breaches }
    }

    pub(crate) fn counters(&self) -> Up {
        self.sender.counters
    }

    /// Sends what waits, then reads at most `reads_max` times and sends that.
    pub(crate) fn turn(
        &mut self,
        uplink: &mut impl io::Read,
        reads_max: usize,
        table: &Table,
        now: Duration,
    ) -> io::Result<Turn> {
        if let Some(gateway) = self.sender.resume(table) {
            return Ok(Turn::Blocked(gateway));
        }
        for _ in 0..reads_max {
            match self.drain(table, now) {
                Turn::Drained => {}
                turn @ (Turn::Blocked(_) | Turn::Closed | Turn::Garbage(_)) => return Ok(turn),
            }
            match uplink.read(self.decoder.space()) {
                Ok(0) => return Ok(Turn::Closed),
                Ok(count) => self.decoder.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Drained),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Turn::Closed),
                Err(error) => return Err(error),
            }
        }
        Ok(self.drain(table, now))
    }

    /// The same where each packet of `uplink` is an Ethernet frame.
    pub(crate) fn turn_ethernet(
        &mut self,
        uplink: &UnixDatagram,
        reads_max: usize,
        table: &Table,
        now: Duration,
    ) -> io::Result<Turn> {
        if let Some(gateway) = self.sender.resume(table) {
            return Ok(Turn::Blocked(gateway));
        }
        for _ in 0..reads_max {
            let length = match uplink.recv(&mut self.datagram) {
                Ok(0) => return Ok(Turn::Closed),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Drained),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Turn::Closed),
                Err(error) => return Err(error),
            };
            // One byte more than the longest has room, so that what was cut shows as too long.
            let fate = match Frame::parse_ethernet(&self.datagram[..length], &GUEST_TO_RELAY) {
                Ok(frame) => self.sender.frame(&frame, table, now),
                Err(error) => self.sender.malformed(error),
            };
            if let Some(turn) = self.breaches.turn(fate, now) {
                return Ok(turn);
            }
        }
        Ok(Turn::Drained)
    }

    /// Sends every whole frame that was read.
    fn drain(&mut self, table: &Table, now: Duration) -> Turn {
        loop {
            let fate = match self.decoder.next_frame() {
                Ok(None) => return Turn::Drained,
                Ok(Some(frame)) => self.sender.frame(&frame, table, now),
                Err(error) => self.sender.malformed(error),
            };
            if let Some(turn) = self.breaches.turn(fate, now) {
                return turn;
            }
        }
    }
}

#[derive(Debug)]
struct Sender {
    pending: Pending,
    datagrams: Bucket,
    initiations: Bucket,
    counters: Up,
}

/// What is left of a frame. Its gateway is looked up when it is sent: a gateway that has left
/// the table meanwhile gets nothing.
#[derive(Debug)]
struct Pending {
    payload: Vec<u8>,
    segment: usize,
    gateway: GatewayId,
}

impl Sender {
    fn frame(&mut self, frame: &Frame<'_>, table: &Table, now: Duration) -> Fate {
        let (mut count, mut initiations) = (0, 0);
        for datagram in frame.segments() {
            match Shape::of(datagram) {
                Some(Shape::Initiation) => initiations += 1,
                Some(Shape::Response | Shape::CookieReply | Shape::Transport) => {}
                None => {
                    self.counters.not_wireguard += 1;
                    return Fate::Refused(Breach::NotWireGuard(datagram.len()));
                }
            }
            count += 1;
        }
        if table.row(frame.gateway()).is_none() {
            self.counters.unknown_gateway += 1;
            return Fate::Refused(Breach::Gateway(count));
        }
        if !self.datagrams.take(count, now) {
            self.counters.above_rate += 1;
            return Fate::Refused(Breach::Datagrams(count));
        }
        if initiations > 0 && !self.initiations.take(initiations, now) {
            self.counters.initiations_above_rate += 1;
            return Fate::Refused(Breach::Initiations(initiations));
        }
        let (payload, segment, gateway) = (frame.payload(), frame.segment_len(), frame.gateway());
        let (sent, blocked) = send(&mut self.counters, gateway, segment, payload, table);
        let Some(gateway) = blocked else { return Fate::Done };
        self.pending.payload.extend_from_slice(&payload[sent..]);
        self.pending.segment = segment;
        self.pending.gateway = gateway;
        Fate::Blocked(gateway)
    }

    fn malformed(&mut self, error: FrameError) -> Fate {
        self.counters.malformed += 1;
        Fate::Refused(Breach::Frame(error))
    }

    fn resume(&mut self, table: &Table) -> Option<GatewayId> {
        let Pending { payload, segment, gateway } = &mut self.pending;
        if payload.is_empty() {
            return None;
        }
        let (sent, blocked) = send(&mut self.counters, *gateway, *segment, payload, table);
        payload.drain(..sent);
        blocked
    }
}

/// Sends the datagrams of `payload` in order. Returns how many bytes are dealt with, and the gateway when its
/// socket has no room for the rest.
fn send(
    counters: &mut Up,
    gateway: GatewayId,
    segment: usize,
    payload: &[u8],
    table: &Table,
) -> (usize, Option<GatewayId>) {
    let Some(row) = table.row(gateway) else {
        counters.unknown_gateway += 1;
        return (payload.len(), None);
    };
    let mut done = 0;
    for datagram in payload.chunks(segment) {
        match row.send(datagram) {
            Ok(()) => {
                counters.datagrams += 1;
                counters.bytes += datagram.len() as u64;
            }
            Err(Errno::AGAIN) => return (done, Some(gateway)),
            Err(_) => counters.send_failed += 1,
        }
        done += datagram.len();
    }
    counters.frames += 1;
    (done, None)
}
