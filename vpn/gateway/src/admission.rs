//! The door for control: a Unix stream socket, one line in, one line out.
//!
//! ```text
//! control → gateway    {"admit": {…}} newline                                  at most LINE_MAX bytes
//! gateway → control    {"admitted": true} newline, or {"refused": words} newline
//! ```
//!
//! Each connection has one line and [`PATIENCE`]; there is one at a time. Control is not trusted: what it
//! brings is verified in `office`, and all that it can do here is to bring it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kontor_bundle::lease::Admit;
use kontor_trust::DeviceId;
use kontor_vpn::AddPeerError;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::office::{AdmitError, Office, Outcome};
use crate::plane::{Order, unix_now};

/// What control says.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ToGateway {
    Admit(Admit),
}

/// What it is answered.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum FromGateway {
    Admitted(bool),
    Refused(String),
}

/// The thread that lets peers in.
pub(crate) struct Doorman {
    pub(crate) listener: UnixListener,
    pub(crate) office: Arc<Mutex<Office>>,
    pub(crate) plane: Orders,
}

/// One thread's way to the data path, which learns when it is dropped.
pub(crate) struct Orders {
    /// Until this is dropped.
    orders: Option<SyncSender<Order>>,
    /// The data path's eventfd.
    wake: OwnedFd,
}

/// The data path has ended.
#[derive(Debug)]
pub(crate) struct Ended;

impl Orders {
    /// A way, and its other end; `wake` is an eventfd that is written after each order and at the end.
    pub(crate) fn new(wake: OwnedFd) -> (Self, Receiver<Order>) {
        let (orders, received) = mpsc::sync_channel(ORDERS_MAX);
        (Self { orders: Some(orders), wake }, received)
    }

    pub(crate) fn order(&self, order: Order) -> Result<(), Ended> {
        self.orders.as_ref().ok_or(Ended)?.send(order).map_err(|_| Ended)?;
        self.wake();
        Ok(())
    }

    fn wake(&self) {
        // The counter is full only if the data path has much to wake up for.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Orders {
    fn drop(&mut self) {
        self.orders = None;
        self.wake();
    }
}

/// Why a connection ended without an admission.
#[derive(Debug, thiserror::Error)]
enum TalkError {
    #[error("read the line")]
    Read(#[source] io::Error),
    #[error("the line is longer than {LINE_MAX} bytes, or not complete after {} ms", PATIENCE.as_millis())]
    Line,
    #[error("the line does not parse")]
    Parse(#[source] serde_json::Error),
    #[error(transparent)]
    Admit(#[from] AdmitError),
    #[error("the gateway has no place for the peer")]
    Peer(#[source] AddPeerError),
    #[error("the gateway ends")]
    Ending,
}

/// Why there is no door.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error("another process listens on {0}")]
    Taken(PathBuf),
    #[error("listen on {path}")]
    Listen { path: PathBuf, source: io::Error },
}

/// Listens on `path`, in the place of a process that is gone. Whoever finds the socket may connect: it is made
/// beside and renamed when it listens and has its mode. One process at a time.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    if UnixStream::connect(path).is_ok() {
        return Err(ListenError::Taken(path.to_owned()));
    }
    let beside = path.with_extension(files::BESIDE);
    let open = || {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&beside)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(DOOR_MODE))?;
        fs::rename(&beside, path)?;
        Ok(listener)
    };
    open().map_err(|source| ListenError::Listen { path: path.to_owned(), source })
}

impl From<Ended> for TalkError {
    fn from(Ended: Ended) -> Self {
        Self::Ending
    }
}

impl Doorman {
    /// Serves until the data path is gone.
    pub(crate) fn run(self) {
        let mut review_due = false;
        loop {
            if review_due {
                match self.await_review() {
                    Ok(still_due) => review_due = still_due,
                    Err(Ended) => return,
                }
                if review_due && !self.is_called() {
                    continue;
                }
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Of descriptors or memory there is none: that passes, or somebody looks into it.
                    tracing::warn!(%error, "a connection could not be taken");
                    std::thread::sleep(BREATH);
                    continue;
                }
            };
            match self.talk(&stream) {
                Ok(due) => review_due |= due,
                Err(TalkError::Ending) => return,
                Err(error) => {
                    let words = chain(&error);
                    tracing::info!(reason = words, "refused");
                    answer(&stream, &FromGateway::Refused(words));
                }
            }
        }
    }

    /// Tries again to verify what is remembered under the newest keyset, and says whether that is still due.
    fn await_review(&self) -> Result<bool, Ended> {
        let mut office = self.office.lock().map_err(|_| Ended)?;
        let reviewed = office.review_if_due(unix_now());
        drop(office);
        match reviewed {
            Ok(removed) => {
                self.remove(removed)?;
                Ok(false)
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "what is remembered is not reviewed yet");
                Ok(true)
            }
        }
    }

    /// Whether somebody connects before it is time to try a review again.
    fn is_called(&self) -> bool {
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&REVIEW_INTERVAL)).is_ok_and(|ready| ready > 0)
    }

    fn remove(&self, devices: Vec<DeviceId>) -> Result<(), Ended> {
        for device in devices {
            tracing::debug!(%device, "no longer borne out by the newest keyset");
            self.plane.order(Order::Remove(device))?;
        }
        Ok(())
    }

    /// Takes one line; says whether a review is due after it.
    fn talk(&self, stream: &UnixStream) -> Result<bool, TalkError> {
        let line = read_line(stream, Instant::now() + PATIENCE)?;
        let ToGateway::Admit(untrusted) = serde_json::from_slice(&line).map_err(TalkError::Parse)?;
        // Whoever panicked with it has left it half changed.
        let mut office = self.office.lock().map_err(|_| TalkError::Ending)?;
        let Outcome { admission, removed, review_due } = office.admit(&untrusted, unix_now())?;
        drop(office);
        self.remove(removed)?;
        tracing::debug!(device = %admission.device, v4 = %admission.v4, v6 = %admission.v6, "checked");
        let (sender, receiver) = mpsc::sync_channel(1);
        self.plane.order(Order::Admit(Box::new(admission), sender))?;
        receiver.recv().map_err(|_| TalkError::Ending)?.map_err(TalkError::Peer)?;
        tracing::info!("admitted");
        answer(stream, &FromGateway::Admitted(true));
        Ok(review_due)
    }
}

/// Bytes up to a newline, or what there was before the end.
fn read_line(mut stream: &UnixStream, until: Instant) -> Result<Vec<u8>, TalkError> {
    let mut line = Vec::new();
    let mut chunk = [0; CHUNK_LEN];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TalkError::Line);
        }
        stream.set_read_timeout(Some(left)).map_err(TalkError::Read)?;
        let len = match stream.read(&mut chunk) {
            Ok(0) => return Err(TalkError::Line),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(TalkError::Line),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(TalkError::Read(error)),
        };
        let end = chunk[..len].iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(&chunk[..end.unwrap_or(len)]);
        if line.len() >= LINE_MAX {
            return Err(TalkError::Line);
        }
        if end.is_some() {
            return Ok(line);
        }
    }
}

/// Answers, if the other side still listens.
fn answer(mut stream: &UnixStream, answer: &FromGateway) {
    let mut line = serde_json::to_vec(answer).expect("text serializes");
    line.push(b'\n');
    let written = stream.set_write_timeout(Some(PATIENCE)).and_then(|()| stream.write_all(&line));
    if let Err(error) = written {
        tracing::debug!(%error, "an answer did not arrive");
    }
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words
}

/// Most bytes of a line, its newline counted.
const LINE_MAX: usize = 512 * 1024;
/// How long a connection may take to say its line, or to hear its answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries where the kernel has nothing to give.
const BREATH: Duration = Duration::from_millis(100);
const CHUNK_LEN: usize = 16 * 1024;
/// Between two tries to read what is remembered for a review.
const REVIEW_INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Most orders of one thread that wait for the data path.
const ORDERS_MAX: usize = 16;
/// Control runs as another user of the socket's group.
const DOOR_MODE: u32 = 0o660;

#[cfg(test)]
mod tests {
    use rustix::event::EventfdFlags;

    use super::*;

    fn read_of(bytes: &[u8]) -> Result<Vec<u8>, TalkError> {
        let (mut near, far) = UnixStream::pair().unwrap();
        let bytes = bytes.to_vec();
        let writer = std::thread::spawn(move || {
            let _ = near.write_all(&bytes);
        });
        let line = read_line(&far, Instant::now() + Duration::from_secs(10));
        drop(far);
        writer.join().unwrap();
        line
    }

    #[test]
    fn line_of_the_greatest_length_is_read_and_of_one_more_is_not() {
        let mut line = vec![b'x'; LINE_MAX - 1];
        line.push(b'\n');
        assert_eq!(read_of(&line).unwrap().len(), LINE_MAX - 1);
        line.insert(0, b'x');
        assert!(matches!(read_of(&line), Err(TalkError::Line)));
    }

    #[test]
    fn line_without_an_end_is_none() {
        assert!(matches!(read_of(b"{\"admit\":"), Err(TalkError::Line)));
        assert!(matches!(read_of(b""), Err(TalkError::Line)));
        let (_near, far) = UnixStream::pair().unwrap();
        let until = Instant::now() + Duration::from_millis(20);
        assert!(matches!(read_line(&far, until), Err(TalkError::Line)));
    }

    #[test]
    fn message_that_is_unknown_does_not_parse() {
        for text in ["{}", "{\"remove\":{}}", "[]", "{\"admit\":{}}", "{\"admit\":{\"lease\":1}}"] {
            assert!(serde_json::from_str::<ToGateway>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn answers_are_one_line_of_json() {
        let text = |answer: &FromGateway| serde_json::to_string(answer).unwrap();
        assert_eq!(text(&FromGateway::Admitted(true)), r#"{"admitted":true}"#);
        assert_eq!(text(&FromGateway::Refused("no".into())), r#"{"refused":"no"}"#);
    }

    #[test]
    fn socket_of_a_process_that_is_gone_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admission.sock");
        let first = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(ListenError::Taken(_))));
        drop(first);
        let _second = listen(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, DOOR_MODE);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn socket_that_a_process_was_killed_over_does_not_hinder_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admission.sock");
        drop(UnixListener::bind(path.with_extension(files::BESIDE)).unwrap());
        assert!(listen(&path).is_ok());
    }

    #[test]
    fn end_of_a_thread_wakes_the_data_path_which_finds_its_way_closed() {
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (orders, received) = Orders::new(wake.try_clone().unwrap());
        assert!(matches!(received.try_recv(), Err(mpsc::TryRecvError::Empty)));
        drop(orders);
        assert_eq!(rustix::io::read(&wake, &mut [0; 8]), Ok(8));
        assert!(matches!(received.try_recv(), Err(mpsc::TryRecvError::Disconnected)));
    }
}
