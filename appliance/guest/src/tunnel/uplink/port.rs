//! The uplink over a virtio-serial port: a byte stream of frames, each behind its length
//! (`kontor_wire::uplink`).
//!
//! A port whose host end is closed takes no byte and gives none. Frames that were cut by that are
//! forgotten on both sides, so that the next host begins with a whole one.

use super::{Losses, Rest, Uplink};
use kontor_wire::uplink::{GatewayId, HEADER_LEN, MAX_FRAME, PORT_PREFIX_LEN, Packer, PortDecoder};
use rustix::io::{Errno, read, write};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most bytes that wait for the port: a few dozen datagrams, so that what is late is dropped and not
/// made later.
const QUEUE_MAX: usize = 64 * 1024;
/// Room that one more datagram needs at most.
const FRAME_MAX: usize = PORT_PREFIX_LEN + HEADER_LEN + kontor_vpn::DATAGRAM_MAX;
/// Reads in one batch; each gives about a page.
const READS_MAX: usize = 16;

/// One end of the stream.
pub(crate) struct Port {
    port: OwnedFd,
    decoder: PortDecoder,
    queue: Vec<u8>,
    packer: Packer,
    /// Bytes of the queue that the port has taken.
    written: usize,
    losses: Losses,
}

impl Port {
    /// Takes a port that does not block.
    pub(crate) fn new(port: OwnedFd) -> Self {
        let queue = Vec::with_capacity(QUEUE_MAX);
        let (decoder, packer) = (PortDecoder::new(), Packer::new(MAX_FRAME));
        Self { port, decoder, queue, packer, written: 0, losses: Losses::default() }
    }

    fn waiting(&self) -> usize {
        self.queue.len() - self.written
    }

    /// The host's end is closed: what was under way is lost.
    fn forget(&mut self) {
        self.decoder = PortDecoder::new();
        self.queue.clear();
        self.packer.close();
        self.written = 0;
    }
}

impl Uplink for Port {
    fn recv_batch(&mut self, take: &mut dyn FnMut(GatewayId, &[u8])) -> io::Result<Rest> {
        for _ in 0..READS_MAX {
            match read(&self.port, self.decoder.space()) {
                Ok(0) => {
                    self.forget();
                    return Ok(Rest::None);
                }
                Ok(count) => self.decoder.advance(count),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Rest::None),
                Err(error) => return Err(error.into()),
            }
            loop {
                match self.decoder.next_frame() {
                    Ok(Some(frame)) => frame.segments().for_each(|segment| take(frame.gateway(), segment)),
                    Ok(None) => break,
                    Err(_) => self.losses.malformed += 1,
                }
            }
        }
        Ok(Rest::More)
    }

    fn has_room(&self) -> bool {
        self.waiting() + FRAME_MAX <= QUEUE_MAX
    }

    fn push(&mut self, to: GatewayId, datagram: &[u8]) {
        let frame = PORT_PREFIX_LEN + HEADER_LEN + datagram.len();
        if self.waiting() + frame > QUEUE_MAX {
            self.losses.dropped += 1;
            return;
        }
        if self.queue.len() + frame > QUEUE_MAX {
            self.packer.close();
            self.queue.drain(..self.written);
            self.written = 0;
        }
        if self.packer.push(to, datagram, &mut self.queue).is_err() {
            self.losses.dropped += 1;
        }
    }

    fn send_batch(&mut self) -> io::Result<()> {
        // Whatever the port has begun to take does not grow any more.
        self.packer.close();
        while self.waiting() > 0 {
            match write(&self.port, &self.queue[self.written..]) {
                Ok(count) => self.written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.queue.clear();
        self.written = 0;
        Ok(())
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }

    fn losses(&self) -> Losses {
        self.losses
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kontor_wire::uplink::{MAX_SEGMENTS, encode_port};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const GATEWAY: GatewayId = GatewayId(4);

    fn pair() -> (UnixStream, Port) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (host, Port::new(guest.into()))
    }

    fn received(port: &mut Port) -> Vec<(u8, Vec<u8>)> {
        let mut datagrams = Vec::new();
        while port.recv_batch(&mut |from, bytes| datagrams.push((from.0, bytes.to_vec()))).unwrap()
            == Rest::More
        {}
        datagrams
    }

    #[test]
    fn datagram_is_sent_as_one_frame() {
        let (mut host, mut port) = pair();
        port.push(GATEWAY, &[7; 148]);
        port.send_batch().unwrap();
        let mut expected = Vec::new();
        encode_port(GATEWAY, 148, &[7; 148], &mut expected).unwrap();
        let mut bytes = vec![0; expected.len()];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn datagrams_of_one_batch_go_as_a_train_and_those_of_the_next_as_another() {
        let (mut host, mut port) = pair();
        let mut expected = Vec::new();
        for count in [3, 2] {
            for _ in 0..count {
                port.push(GATEWAY, &[7; 148]);
            }
            port.send_batch().unwrap();
            encode_port(GATEWAY, 148, &[7; 148].repeat(count), &mut expected).unwrap();
        }
        let mut bytes = vec![0; expected.len()];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn train_is_taken_apart() {
        let (mut host, mut port) = pair();
        let payload: Vec<u8> = (0..MAX_SEGMENTS).flat_map(|n| vec![u8::try_from(n).unwrap(); 40]).collect();
        let mut bytes = Vec::new();
        encode_port(GATEWAY, 40, &payload[..payload.len() - 5], &mut bytes).unwrap();
        host.write_all(&bytes).unwrap();
        let datagrams = received(&mut port);
        assert_eq!(datagrams.len(), MAX_SEGMENTS);
        assert_eq!(datagrams[1], (4, vec![1; 40]));
        assert_eq!(datagrams.last().unwrap().1.len(), 35);
    }

    #[test]
    fn frame_that_arrives_in_parts_is_taken_when_it_is_whole() {
        let (mut host, mut port) = pair();
        let mut bytes = Vec::new();
        encode_port(GATEWAY, 500, &[9; 500], &mut bytes).unwrap();
        let (first, second) = bytes.split_at(3);
        host.write_all(first).unwrap();
        assert!(received(&mut port).is_empty());
        host.write_all(second).unwrap();
        assert_eq!(received(&mut port), [(4, vec![9; 500])]);
    }

    #[test]
    fn malformed_frame_is_counted_and_the_next_one_taken() {
        let (mut host, mut port) = pair();
        let mut bytes = vec![2, 0, 1, 1];
        encode_port(GATEWAY, 32, &[9; 32], &mut bytes).unwrap();
        host.write_all(&bytes).unwrap();
        assert_eq!(received(&mut port), [(4, vec![9; 32])]);
        assert_eq!(port.losses().malformed, 1);
    }

    #[test]
    fn largest_frame_passes() {
        let (mut host, mut port) = pair();
        let mut bytes = Vec::new();
        let payload = vec![1; MAX_FRAME - HEADER_LEN];
        encode_port(GATEWAY, 1400, &payload, &mut bytes).unwrap();
        let writer = std::thread::spawn(move || host.write_all(&bytes).map(|()| host));
        let mut length = 0;
        while length < payload.len() {
            port.recv_batch(&mut |_, bytes| length += bytes.len()).unwrap();
        }
        assert_eq!(length, payload.len());
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn queue_is_bounded_what_is_beyond_is_dropped_and_the_rest_arrives_whole() {
        let (mut host, mut port) = pair();
        let datagram = [5; kontor_vpn::DATAGRAM_MAX];
        // Until the socket is full, then until the queue is.
        while port.has_room() {
            port.push(GATEWAY, &datagram);
            port.send_batch().unwrap();
        }
        assert_eq!(port.losses().dropped, 0);
        assert!(port.queue.len() <= QUEUE_MAX);
        for _ in 0..3 {
            port.push(GATEWAY, &datagram);
        }
        assert!((2..=3).contains(&port.losses().dropped), "{:?}", port.losses());

        let mut decoder = PortDecoder::new();
        let mut frames = 0;
        while port.waiting() > 0 {
            let count = host.read(decoder.space()).unwrap();
            decoder.advance(count);
            while let Some(frame) = decoder.next_frame().unwrap() {
                assert!(frame.segments().all(|segment| segment == datagram));
                frames += frame.segments().count();
            }
            port.send_batch().unwrap();
        }
        assert!(frames > QUEUE_MAX / FRAME_MAX - 2);
        assert!(port.has_room());
    }

    #[test]
    fn datagram_that_no_frame_can_carry_is_dropped() {
        let (_host, mut port) = pair();
        port.push(GATEWAY, &[0; 31]);
        assert_eq!((port.losses().dropped, port.waiting()), (1, 0));
    }

    #[test]
    fn what_was_under_way_is_forgotten_when_the_host_closes() {
        let (mut host, mut port) = pair();
        host.write_all(&[200, 0, 1]).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        port.push(GATEWAY, &[5; 100]);
        assert_eq!(port.recv_batch(&mut |_, _| panic!("no frame came")).unwrap(), Rest::None);
        assert_eq!(port.waiting(), 0);
    }
}
