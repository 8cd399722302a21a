//! The post (`lease.md` 19): TCP on the gateway's own inner addresses, which guests reach through the tunnel.
//! The messages are those of `kontor_wire::post`.
//!
//! ```text
//! accept ─► one Hello ─► Office::greet ─► the line's table opens ─► one answer ─► close
//! ```
//!
//! Who speaks is known by the address that a connection comes from: the tunnel lets no peer send from another's,
//! and answers to a pool's address go nowhere but into its peer's tunnel. What is said is not trusted: one frame
//! of a few bytes, [`PATIENCE`], [`PER_PEER_MAX`] connections of one address and [`CONNECTIONS_MAX`] of all;
//! whoever comes on top of that is hung up on. Nothing here blocks but the wait for the next event.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use kontor_trust::Digest;
use kontor_wire::post::{FromPost, MAX_FROM_GUEST, PORT, ToPost};
use kontor_wire::{Decoder, FrameError, encode};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::admission::{Ended, Orders};
use crate::office::{Greeting, Office};
use crate::plane::{Order, unix_now};

/// The thread that answers guests.
pub(crate) struct Post {
    desks: Vec<TcpListener>,
    office: Arc<Mutex<Office>>,
    plane: Orders,
    connections: Vec<Connection>,
}

struct Connection {
    stream: TcpStream,
    from: IpAddr,
    decoder: Decoder,
    until: Instant,
}

/// How far a connection is.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// More bytes must come first.
    Part,
    /// The whole of it.
    Hello([u8; 32]),
    /// The other side hung up, or sent what is no `Hello`.
    Nothing,
}

/// Listens on the gateway's own addresses.
pub(crate) fn listen(own: &[IpAddr]) -> Result<Vec<TcpListener>, (SocketAddr, io::Error)> {
    own.iter()
        .map(|ip| {
            let address = SocketAddr::new(*ip, PORT);
            let listener = TcpListener::bind(address).map_err(|source| (address, source))?;
            listener.set_nonblocking(true).map_err(|source| (address, source))?;
            Ok(listener)
        })
        .collect()
}

impl Post {
    pub(crate) fn new(desks: Vec<TcpListener>, office: Arc<Mutex<Office>>, plane: Orders) -> Self {
        Self { desks, office, plane, connections: Vec::new() }
    }

    /// Serves until the data path is gone.
    pub(crate) fn run(mut self) {
        loop {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "the post cannot wait for guests");
                return;
            }
            self.accept();
            if self.serve().is_err() {
                return;
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let now = Instant::now();
        let due = self.connections.iter().map(|connection| connection.until).min();
        let timeout = due.map(|due| Timespec::try_from(due.saturating_duration_since(now)));
        let timeout = timeout.transpose().map_err(io::Error::other)?;
        let desks = self.desks.iter().map(AsFd::as_fd);
        let streams = self.connections.iter().map(|connection| connection.stream.as_fd());
        let mut fds: Vec<_> =
            desks.chain(streams).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn accept(&mut self) {
        for desk in &self.desks {
            loop {
                match desk.accept() {
                    Ok((stream, address)) => {
                        let from = address.ip().to_canonical();
                        if has_room(&self.connections, from) && stream.set_nonblocking(true).is_ok() {
                            let until = Instant::now() + PATIENCE;
                            let decoder = Decoder::new(MAX_FROM_GUEST);
                            self.connections.push(Connection { stream, from, decoder, until });
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        // Of descriptors or memory there is none: that passes, or somebody looks into it.
                        tracing::warn!(%error, "a guest's connection could not be taken");
                        std::thread::sleep(BREATH);
                        break;
                    }
                }
            }
        }
    }

    fn serve(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        let mut kept = Vec::with_capacity(self.connections.len());
        for mut connection in std::mem::take(&mut self.connections) {
            match connection.hear() {
                Heard::Part if now < connection.until => kept.push(connection),
                Heard::Part | Heard::Nothing => {}
                Heard::Hello(lease_hash) => {
                    let answer = self.answer(connection.from, lease_hash)?;
                    connection.say(&answer);
                }
            }
        }
        self.connections = kept;
        Ok(())
    }

    /// What a guest is told; its table is open when this returns `Admitted`.
    fn answer(&self, from: IpAddr, lease_hash: [u8; 32]) -> Result<FromPost, Ended> {
        // Whoever panicked with it has left it half changed.
        let mut office = self.office.lock().map_err(|_| Ended)?;
        let greeted = office.greet(from, &Digest(lease_hash), unix_now());
        drop(office);
        match greeted {
            Ok(Greeting { newest, opens }) => {
                if let Some((device, boot_key)) = opens {
                    tracing::debug!(%device, "has said hello");
                    let (sender, receiver) = mpsc::sync_channel(1);
                    self.plane.order(Order::Open(device, boot_key, sender))?;
                    receiver.recv().map_err(|_| Ended)?;
                }
                Ok(FromPost::Admitted(newest))
            }
            Err(refusal) => {
                tracing::debug!(%from, %refusal, "a hello is refused");
                Ok(FromPost::Refused(refusal))
            }
        }
    }
}

/// Whether one more connection from this address is taken.
fn has_room(connections: &[Connection], from: IpAddr) -> bool {
    connections.len() < CONNECTIONS_MAX
        && connections.iter().filter(|connection| connection.from == from).count() < PER_PEER_MAX
}

impl Connection {
    fn hear(&mut self) -> Heard {
        let mut chunk = [0; CHUNK_LEN];
        loop {
            match self.decoder.next_message() {
                Ok(Some(ToPost::Hello { lease_hash })) => return Heard::Hello(lease_hash),
                Ok(None) => {}
                Err(FrameError::TooLong { .. } | FrameError::Malformed(_)) => return Heard::Nothing,
            }
            let room = self.decoder.room().min(CHUNK_LEN);
            match self.stream.read(&mut chunk[..room]) {
                Ok(0) => return Heard::Nothing,
                Ok(len) => {
                    self.decoder.push(&chunk[..len]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Heard::Part,
                Err(_) => return Heard::Nothing,
            }
        }
    }

    /// Answers, if the other side still listens. An answer is smaller than any socket's buffer.
    fn say(mut self, answer: &FromPost) {
        if let Err(error) = self.stream.write_all(&encode(answer)) {
            tracing::debug!(%error, "a guest did not take its answer");
        }
    }
}

/// Most connections at once.
const CONNECTIONS_MAX: usize = 256;
/// Most of them from one inner address.
const PER_PEER_MAX: usize = 2;
/// How long a connection may take to say its `Hello`.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries where the kernel has nothing to give.
const BREATH: Duration = Duration::from_millis(100);
const CHUNK_LEN: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(desk: &TcpListener) -> (TcpStream, Connection) {
        let guest = TcpStream::connect(desk.local_addr().unwrap()).unwrap();
        let (stream, address) = desk.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let decoder = Decoder::new(MAX_FROM_GUEST);
        (guest, Connection { stream, from: address.ip(), decoder, until: Instant::now() + PATIENCE })
    }

    fn desk() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// What a connection is once it is decided.
    fn heard(connection: &mut Connection) -> Heard {
        loop {
            match connection.hear() {
                Heard::Part => std::thread::yield_now(),
                decided @ (Heard::Hello(_) | Heard::Nothing) => return decided,
            }
        }
    }

    #[test]
    fn hello_is_heard_in_any_pieces() {
        let desk = desk();
        let (mut guest, mut connection) = pair(&desk);
        for byte in encode(&ToPost::Hello { lease_hash: [7; 32] }) {
            assert_eq!(connection.hear(), Heard::Part);
            guest.write_all(&[byte]).unwrap();
        }
        assert_eq!(heard(&mut connection), Heard::Hello([7; 32]));
    }

    #[test]
    fn what_is_no_hello_is_hung_up_on() {
        let desk = desk();
        let longer = (u32::try_from(MAX_FROM_GUEST).unwrap() + 1).to_le_bytes();
        for bytes in [&longer[..], &[1, 0, 0, 0, 9], &[255; 40]] {
            let (mut guest, mut connection) = pair(&desk);
            guest.write_all(bytes).unwrap();
            assert_eq!(heard(&mut connection), Heard::Nothing, "{bytes:?}");
        }
        let (guest, mut connection) = pair(&desk);
        drop(guest);
        assert_eq!(heard(&mut connection), Heard::Nothing);
    }

    #[test]
    fn connections_are_limited_for_one_address_and_for_all() {
        let desk = desk();
        let from = |last: usize| IpAddr::from(u32::try_from(last).unwrap().to_be_bytes());
        let (mut guests, mut connections) = (Vec::new(), Vec::new());
        for number in 0..CONNECTIONS_MAX {
            let own = from(number / PER_PEER_MAX);
            assert!(has_room(&connections, own));
            let (guest, connection) = pair(&desk);
            connections.push(Connection { from: own, ..connection });
            guests.push(guest);
            assert_eq!(
                has_room(&connections, own),
                number % PER_PEER_MAX == 0 && number + 1 < CONNECTIONS_MAX
            );
        }
        assert!(!has_room(&connections, from(CONNECTIONS_MAX)));
        connections.pop();
        assert!(has_room(&connections, from(CONNECTIONS_MAX)));
    }
}
