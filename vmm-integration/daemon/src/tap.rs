//! A recording of all bytes between QEMU and relay, for development.
//!
//! ```text
//! record:  0      direction: 0 guest → relay, 1 relay → guest
//!          1..9   microseconds since the tap was opened, little endian
//!          9..13  length, little endian
//!          13..   that many bytes, as they were read: of a stream what came at once, else one datagram
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::{
        fs::OpenOptionsExt,
        net::{UnixDatagram, UnixStream},
    },
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
};

/// Bytes in front of the recorded ones.
pub const HEADER_LEN: usize = 13;
/// Most bytes of one record.
const CHUNK_MAX: usize = 64 * 1024;

/// More than a datagram of the uplink has, so that none is cut.
const DATAGRAM_MAX: usize = 128 * 1024;

/// Where bytes went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the relay.
    Up,
    /// From the relay to the guest.
    Down,
}

/// Some bytes of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    /// Where they went.
    pub direction: Direction,
    /// When, in microseconds since the tap was opened.
    pub at_us: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// The records of a tap file. Ends at the first that is cut or no record.
pub fn records(mut file: &[u8]) -> impl Iterator<Item = Record<'_>> {
    std::iter::from_fn(move || {
        let (header, rest) = file.split_first_chunk::<HEADER_LEN>()?;
        let direction = match header[0] {
            0 => Direction::Up,
            1 => Direction::Down,
            2..=u8::MAX => return None,
        };
        let at_us = u64::from_le_bytes(*header[1..].first_chunk()?);
        let length = u32::from_le_bytes(*header[9..].first_chunk()?);
        let (bytes, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
        file = rest;
        Some(Record { direction, at_us, bytes })
    })
}

/// Opens the recording, and carries bytes between `qemu` and `relay` in tasks of their own until either
/// closes.
pub(crate) fn insert(path: &Path, qemu: UnixStream, relay: UnixStream) -> io::Result<()> {
    let tap = Tap::open(path)?;
    let (from_qemu, to_qemu) = tokio_stream(qemu)?.into_split();
    let (from_relay, to_relay) = tokio_stream(relay)?.into_split();
    tokio::spawn(carry(from_qemu, to_relay, Direction::Up, Arc::clone(&tap)));
    tokio::spawn(carry(from_relay, to_qemu, Direction::Down, tap));
    Ok(())
}

/// The same where both are SEQPACKET sockets. An end is not carried: the other side is open until `tasks` end.
pub(crate) fn insert_datagrams(
    path: &Path,
    qemu: UnixDatagram,
    relay: UnixDatagram,
    tasks: &mut JoinSet<()>,
) -> io::Result<()> {
    let tap = Tap::open(path)?;
    let shared = |socket: UnixDatagram| {
        socket.set_nonblocking(true)?;
        tokio::net::UnixDatagram::from_std(socket).map(Arc::new)
    };
    let (qemu, relay) = (shared(qemu)?, shared(relay)?);
    tasks.spawn(carry_datagrams(Arc::clone(&qemu), Arc::clone(&relay), Direction::Up, Arc::clone(&tap)));
    tasks.spawn(carry_datagrams(relay, qemu, Direction::Down, tap));
    Ok(())
}

fn tokio_stream(stream: UnixStream) -> io::Result<tokio::net::UnixStream> {
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

struct Tap {
    file: Mutex<File>,
    opened: Instant,
}

impl Tap {
    fn open(path: &Path) -> io::Result<Arc<Self>> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(Arc::new(Self { file: Mutex::new(file), opened: Instant::now() }))
    }

    fn record(&self, direction: Direction, bytes: &[u8]) -> io::Result<()> {
        let mut record = Vec::with_capacity(HEADER_LEN + bytes.len());
        record.push(match direction {
            Direction::Up => 0,
            Direction::Down => 1,
        });
        let at_us = u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX);
        record.extend_from_slice(&at_us.to_le_bytes());
        record.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        record.extend_from_slice(bytes);
        self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&record)
    }
}

async fn carry(
    mut from: tokio::net::unix::OwnedReadHalf,
    mut to: tokio::net::unix::OwnedWriteHalf,
    direction: Direction,
    tap: Arc<Tap>,
) {
    let mut chunk = vec![0; CHUNK_MAX];
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        // What is not recorded does not pass: a recording that misses bytes would prove nothing.
        if let Err(error) = tap.record(direction, &chunk[..count]) {
            tracing::error!(%error, "the tap cannot be written; the uplink is closed");
            break;
        }
        if to.write_all(&chunk[..count]).await.is_err() {
            break;
        }
    }
    // Dropping `to` closes this direction only; the other one ends by itself.
    let _ = to.shutdown().await;
}

async fn carry_datagrams(
    from: Arc<tokio::net::UnixDatagram>,
    to: Arc<tokio::net::UnixDatagram>,
    direction: Direction,
    tap: Arc<Tap>,
) {
    let mut datagram = vec![0; DATAGRAM_MAX];
    while let Ok(count @ 1..) = from.recv(&mut datagram).await {
        if let Err(error) = tap.record(direction, &datagram[..count]) {
            tracing::error!(%error, "the tap cannot be written; the uplink is closed");
            break;
        }
        if to.send(&datagram[..count]).await.is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[tokio::test]
    async fn both_directions_are_carried_and_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tap");
        let ((mut guest, qemu), (mut relay, inner)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        insert(&path, qemu, inner).unwrap();
        let done = tokio::task::spawn_blocking(move || {
            guest.write_all(b"upward").unwrap();
            let mut up = [0; 6];
            relay.read_exact(&mut up).unwrap();
            relay.write_all(b"downward").unwrap();
            let mut down = [0; 8];
            guest.read_exact(&mut down).unwrap();
            (up, down)
        });
        assert_eq!(done.await.unwrap(), (*b"upward", *b"downward"));
        let file = std::fs::read(&path).unwrap();
        let seen: Vec<_> = records(&file).map(|record| (record.direction, record.bytes)).collect();
        assert_eq!(seen, [(Direction::Up, &b"upward"[..]), (Direction::Down, &b"downward"[..])]);
    }

    fn packets() -> (UnixDatagram, UnixDatagram) {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (one.into(), other.into())
    }

    #[tokio::test]
    async fn datagrams_stay_whole_and_each_is_a_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tap");
        let ((guest, qemu), (relay, inner)) = (packets(), packets());
        let mut tasks = JoinSet::new();
        insert_datagrams(&path, qemu, inner, &mut tasks).unwrap();
        let done = tokio::task::spawn_blocking(move || {
            let (mut one, mut two, mut down) = ([0; 9], [0; 9], [0; 9]);
            guest.send(b"one").unwrap();
            guest.send(b"two").unwrap();
            let up = (relay.recv(&mut one).unwrap(), relay.recv(&mut two).unwrap());
            relay.send(b"down").unwrap();
            (up, guest.recv(&mut down).unwrap())
        });
        assert_eq!(done.await.unwrap(), ((3, 3), 4));
        let file = std::fs::read(&path).unwrap();
        let seen: Vec<_> = records(&file).map(|record| (record.direction, record.bytes)).collect();
        assert_eq!(
            seen,
            [(Direction::Up, &b"one"[..]), (Direction::Up, &b"two"[..]), (Direction::Down, &b"down"[..])]
        );
    }

    #[test]
    fn cut_or_wrong_record_ends_the_reading() {
        let whole = [&[1][..], &7_u64.to_le_bytes(), &2_u32.to_le_bytes(), b"ab"].concat();
        assert_eq!(
            records(&whole).collect::<Vec<_>>(),
            [Record { direction: Direction::Down, at_us: 7, bytes: b"ab" }]
        );
        assert_eq!(records(&whole[..whole.len() - 1]).count(), 0);
        assert_eq!(records(&[[2].as_slice(), &whole[1..]].concat()).count(), 0);
    }
}
