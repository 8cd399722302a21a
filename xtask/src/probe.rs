//! The asking end of the test channel: runs commands in the work VM.

use crate::run::{Error, Result};
use kontor_wire::{
    Decoder, encode,
    probe::{End, MAX_FRAME, Output, Request},
};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::Mutex,
    time::Duration,
};

/// A connection to the probe of a running work VM. Commands run one at a time.
pub(crate) struct Probe {
    inner: Mutex<Inner>,
}

struct Inner {
    stream: UnixStream,
    decoder: Decoder,
    next_id: u64,
}

impl Probe {
    /// Connects to the socket that `kontord` serves.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(Error::Probe)?;
        let inner = Inner { stream, decoder: Decoder::new(MAX_FRAME), next_id: 1 };
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// Runs `argv` as `uid` for at most `limit`.
    pub(crate) fn run(&self, uid: u32, argv: &[&str], stdin: &[u8], limit: Duration) -> Result<Output> {
        /// What starting and killing a process may cost in an emulated machine.
        const SLACK: Duration = Duration::from_secs(30);
        let mut inner = self.inner.lock().map_err(|_| Error::Unexpected("a probe panicked".into()))?;
        let id = inner.next_id;
        inner.next_id += 1;
        let request = Request {
            id,
            argv: argv.iter().map(|&a| a.to_owned()).collect(),
            uid,
            stdin: stdin.to_vec(),
            timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        };
        inner.stream.set_read_timeout(Some(limit + SLACK)).map_err(Error::Probe)?;
        inner.stream.write_all(&encode(&request)).map_err(Error::Probe)?;
        loop {
            let answer: Option<Output> = inner
                .decoder
                .next_message()
                .map_err(|e| Error::Probe(io::Error::new(io::ErrorKind::InvalidData, e)))?;
            match answer {
                Some(output) if output.id == id => return Ok(output),
                Some(_) => {}
                None => inner.fill()?,
            }
        }
    }

    /// Like [`Probe::run`]; anything but exit code 0 is an error that shows what was printed.
    pub(crate) fn must(&self, uid: u32, argv: &[&str], limit: Duration) -> Result<String> {
        let output = self.run(uid, argv, b"", limit)?;
        if output.end == End::Exit(0) {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Unexpected(format!(
            "{} in the work VM: {:?}: {}{}",
            argv.join(" "),
            output.end,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )))
    }
}

impl Inner {
    fn fill(&mut self) -> Result<()> {
        let mut chunk = [0; 16 * 1024];
        let room = chunk.len().min(self.decoder.room());
        let count = self.stream.read(&mut chunk[..room]).map_err(Error::Probe)?;
        if count == 0 {
            return Err(Error::Probe(io::ErrorKind::UnexpectedEof.into()));
        }
        self.decoder.push(&chunk[..count]);
        Ok(())
    }
}
