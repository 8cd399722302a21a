//! From the gateways to the guest: what comes at once goes in trains, where it fits together. A buffer of
//! [`BUFFER_MAX`] bytes; what does not fit is dropped, as any router would.

use crate::{gateways::Table, message::Down};
use kontor_wire::{
    uplink::{GatewayId, HEADER_LEN, MAX_FRAME, PORT_PREFIX_LEN, Packer, RELAY_TO_GUEST},
    wireguard::Shape,
};
use rustix::io::{Errno, writev};
use std::{
    io::{self, IoSlice},
    os::unix::net::UnixDatagram,
};

/// Most bytes that wait for the guest.
pub(crate) const BUFFER_MAX: usize = 256 * 1024;

#[derive(Debug)]
pub(crate) struct DownPath {
    datagram: Box<[u8]>,
    frames: Vec<u8>,
    packer: Packer,
    /// How much of `frames` the guest's side has taken.
    taken: usize,
    counters: Down,
}

impl DownPath {
    /// Makes frames of at most `frame_max` bytes.
    pub(crate) fn new(frame_max: usize) -> Self {
        Self {
            packer: Packer::new(frame_max),
            datagram: vec![0; MAX_FRAME].into_boxed_slice(),
            frames: Vec::with_capacity(BUFFER_MAX),
            taken: 0,
            counters: Down::default(),
        }
    }

    pub(crate) fn counters(&self) -> Down {
        self.counters
    }

    /// Whether frames wait for the guest.
    pub(crate) fn waiting(&self) -> bool {
        self.taken < self.frames.len()
    }

    /// Receives at most `datagrams_max` datagrams from each gateway.
    pub(crate) fn receive(&mut self, datagrams_max: usize, table: &Table) {
        for link in table.links() {
            for _ in 0..datagrams_max {
                // A socket reports here what an earlier datagram met (an ICMP message): that is no
                // reason to stop, and neither is anything else short of having nothing left.
                match link.receive(&mut self.datagram) {
                    Ok(Some(length)) => self.push(link.gateway, length),
                    Ok(None) => self.counters.wrong_source += 1,
                    Err(Errno::AGAIN) => break,
                    Err(_) => {}
                }
            }
        }
    }

    fn push(&mut self, gateway: GatewayId, length: usize) {
        if Shape::of(&self.datagram[..length]).is_none() {
            self.counters.not_wireguard += 1;
            return;
        }
        let need = PORT_PREFIX_LEN + HEADER_LEN + length;
        if self.frames.len() + need > BUFFER_MAX {
            self.packer.close();
            self.frames.drain(..self.taken);
            self.taken = 0;
        }
        if self.frames.len() + need > BUFFER_MAX {
            self.counters.guest_full += 1;
            return;
        }
        match self.packer.push(gateway, &self.datagram[..length], &mut self.frames) {
            Ok(()) => {
                self.counters.datagrams += 1;
                self.counters.bytes += length as u64;
            }
            // What has the shape fits a frame.
            Err(_) => self.counters.not_wireguard += 1,
        }
    }

    /// Writes as much as the guest's side takes.
    pub(crate) fn flush(&mut self, uplink: &mut impl io::Write) -> io::Result<()> {
        self.packer.close();
        while self.waiting() {
            match uplink.write(&self.frames[self.taken..]) {
                Ok(count) => self.taken += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.frames.clear();
        self.taken = 0;
        Ok(())
    }

    /// Sends frame by frame, each in an Ethernet frame, as much as the guest's side takes.
    pub(crate) fn flush_ethernet(&mut self, uplink: &UnixDatagram) -> io::Result<()> {
        self.packer.close();
        while let Some((prefix, rest)) = self.frames[self.taken..].split_first_chunk::<PORT_PREFIX_LEN>() {
            // Frames are pushed whole.
            let frame = &rest[..usize::from(u16::from_le_bytes(*prefix))];
            let parts = [IoSlice::new(&RELAY_TO_GUEST), IoSlice::new(frame)];
            // No `sendmsg`: its address is one that no filter sees, so the relay may not call it.
            match writev(uplink, &parts) {
                Ok(_) => self.taken += PORT_PREFIX_LEN + frame.len(),
                Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.frames.clear();
        self.taken = 0;
        Ok(())
    }
}
