//! A recording of all bytes between QEMU and relay, for development.
//!
//! ```text
//! record:  0      direction: 0 guest → relay, 1 relay → guest
//!          1..9   microseconds since the tap was opened, little endian
//!          9..13  length, little endian
//!          13..   that many bytes, as they were read from the stream
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::{fs::OpenOptionsExt, net::UnixStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes in front of the recorded ones.
pub const HEADER_LEN: usize = 13;
/// Most bytes of one record.
const CHUNK_MAX: usize = 64 * 1024;

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
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let tap = Arc::new(Tap { file: Mutex::new(file), opened: Instant::now() });
    let (from_qemu, to_qemu) = tokio_stream(qemu)?.into_split();
    let (from_relay, to_relay) = tokio_stream(relay)?.into_split();
    tokio::spawn(carry(from_qemu, to_relay, Direction::Up, Arc::clone(&tap)));
    tokio::spawn(carry(from_relay, to_qemu, Direction::Down, tap));
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
