//! The relay's process, and kontord's end of the channel to it.

use crate::{
    jail::{Inmate, Jailed, Limits, NO_JAIL, Profile},
    links::{Links, Watch},
    session::Input,
    tail::{clean, last_words},
};
use kontor_relay::message::{self, Counters, FromDaemon, FromRelay, MAX_GATEWAYS, MAX_MESSAGE, MessageError};
use rustix::{
    cmsg_space,
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
        sendmsg, socketpair,
    },
};
use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    net::SocketAddr,
    os::{
        fd::{BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixDatagram as StdUnixDatagram,
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};
use tokio::{
    io::Interest,
    net::UnixDatagram,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

const UPLINK: RawFd = 3;
const CONTROL: RawFd = 4;

/// Descriptors while the relay's program is loaded; it lowers this itself.
const FILES_MAX: u64 = 32;
/// Threads: its own and its jailer's.
const THREADS_MAX: u64 = 2;
/// Address space: its buffers, its libraries.
const ADDRESS_SPACE: u64 = 256 << 20;
/// From its start to `Ready`.
const START: Duration = Duration::from_secs(10);
/// From `Shutdown` to its end.
const END: Duration = Duration::from_secs(3);

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayStartError {
    /// The channel to it.
    #[error("make the relay's channel")]
    Channel(#[source] io::Error),
    /// Its program.
    #[error("start the relay {program}")]
    Program {
        /// Which program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its jail.
    #[error("the relay cannot be jailed, and Kontor starts it no other way: {0}")]
    NoJail(String),
    /// It ended before it was ready.
    #[error("the relay ended at once: {0}")]
    Ended(String),
    /// It did not become ready in time.
    #[error("the relay is not ready after {} s", START.as_secs())]
    Late,
}

/// What the relay is told.
#[derive(Debug)]
pub(crate) enum Order {
    Gateways(Vec<(u8, Vec<SocketAddr>)>),
    Report,
    Shutdown,
}

/// A relay that runs.
#[derive(Debug)]
pub(crate) struct Relay {
    child: Jailed,
    control: UnixDatagram,
    words: JoinHandle<String>,
}

impl Relay {
    /// Starts the relay on `uplink` and waits until it is ready.
    pub(crate) async fn start(
        jailer: &Path,
        program: &Path,
        uplink: OwnedFd,
    ) -> Result<Self, RelayStartError> {
        let (control, theirs) = control_pair().map_err(RelayStartError::Channel)?;
        let descriptors = vec![(uplink, UPLINK), (theirs, CONTROL)];
        let source = |source| RelayStartError::Program { program: program.into(), source };
        let mut child = spawn(jailer, program, descriptors).map_err(source)?;
        let pid = child.entered().await;
        let words = match child.take_words() {
            Some(stderr) => tokio::spawn(last_words(stderr, "relay")),
            None => tokio::spawn(async { String::new() }),
        };
        let mut relay = Self { child, control, words };
        let Some(pid) = pid else {
            relay.child.kill();
            let (status, words) = relay.end().await;
            return Err(match status.and_then(|status| status.code()) {
                Some(NO_JAIL) => RelayStartError::NoJail(words),
                Some(_) | None => RelayStartError::Ended(words),
            });
        };
        tracing::debug!(pid, "the relay was started");
        match timeout(START, relay.hear()).await {
            Ok(Ok(Some(FromRelay::Ready))) => Ok(relay),
            Ok(_) => Err(RelayStartError::Ended(relay.end().await.1)),
            Err(_) => Err(RelayStartError::Late),
        }
    }

    /// Serves `orders` and reports to `inputs` until the relay has ended.
    pub(crate) async fn run(
        self,
        mut orders: mpsc::Receiver<Order>,
        inputs: mpsc::Sender<Input>,
        counters: watch::Sender<Option<Counters>>,
    ) {
        let (mut links, mut watch) = (Links::default(), Watch::new());
        loop {
            let heard = tokio::select! {
                heard = self.hear() => heard,
                order = orders.recv() => {
                    match order {
                        Some(Order::Gateways(gateways)) => {
                            if links.want(gateways) {
                                self.hand(&links).await;
                            }
                        }
                        Some(Order::Report) => self.tell(&FromDaemon::Report, &[]).await,
                        Some(Order::Shutdown) | None => {
                            self.tell(&FromDaemon::Shutdown, &[]).await;
                            orders.close();
                            break;
                        }
                    }
                    continue;
                }
                () = watch.changed() => {
                    if links.look_again() {
                        tracing::info!("the network has changed, and the relay gets other sockets");
                        self.hand(&links).await;
                    }
                    continue;
                }
            };
            match heard {
                Ok(Some(FromRelay::Ready)) => {}
                Ok(Some(FromRelay::Counters(now))) => drop(counters.send_replace(Some(now))),
                Ok(Some(FromRelay::Garbage(words))) => {
                    let input = Input::UplinkBroke(clean(words.as_bytes()));
                    let _ = inputs.send(input).await;
                }
                Ok(None) | Err(_) => break,
            }
        }
        // What it still has to say, which ends with its last counters.
        while let Ok(Ok(Some(heard))) = timeout(END, self.hear()).await {
            if let FromRelay::Counters(now) = heard {
                counters.send_replace(Some(now));
            }
        }
        let (status, words) = self.end().await;
        // It ends well when the machine is gone, or was told to: then there is nothing to report.
        if !status.is_some_and(|status| status.success()) {
            let _ = inputs.send(Input::RelayEnded(words)).await;
        }
    }

    async fn hand(&self, links: &Links) {
        self.tell(&FromDaemon::Gateways(links.table()), &links.sockets()).await;
    }

    async fn tell(&self, message: &FromDaemon, sockets: &[BorrowedFd<'_>]) {
        let sent = match message::encode(message) {
            Ok(packet) => self.send(&packet, sockets).await,
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "the relay does not listen any more");
        }
    }

    async fn send(&self, packet: &[u8], sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        let attempt = || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_GATEWAYS))];
            let mut rights = SendAncillaryBuffer::new(&mut space);
            if !sockets.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(sockets)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            Ok(sendmsg(&self.control, &[IoSlice::new(packet)], &mut rights, flags).map(drop)?)
        };
        self.control.async_io(Interest::WRITABLE, attempt).await
    }

    /// What the relay says next, `None` once it has closed the channel.
    async fn hear(&self) -> Result<Option<FromRelay>, HearError> {
        let mut packet = [0; MAX_MESSAGE + 1];
        loop {
            match self.control.recv(&mut packet).await {
                Ok(0) => return Ok(None),
                Ok(length) => return Ok(Some(message::decode(&packet[..length])?)),
                // The relay has closed its end without reading all: this is said once, and before what
                // it had sent itself, which is still to be read.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reaps the process; kills it when it does not end.
    pub(crate) async fn end(mut self) -> (Option<ExitStatus>, String) {
        let waited = timeout(END, self.child.wait()).await;
        let status = match waited {
            Ok(status) => status.ok(),
            Err(_) => {
                tracing::warn!("the relay does not end and is killed");
                self.child.kill();
                if let Err(error) = self.child.wait().await {
                    tracing::error!(%error, "the relay cannot be killed");
                }
                None
            }
        };
        let words = self.words.await.unwrap_or_default();
        let how = status.map_or_else(|| "it was killed".to_owned(), |status| status.to_string());
        (status, format!("the relay ended ({how}) {words}").trim_end().to_owned())
    }
}

#[derive(Debug, thiserror::Error)]
enum HearError {
    #[error("listen to the relay")]
    Io(#[from] io::Error),
    #[error("understand the relay")]
    Message(#[from] MessageError),
}

/// A SEQPACKET pair. tokio has no type of its own for these sockets; the calls that its datagram type
/// makes, `send` and `recv`, are the ones they take, and the end of the stream is an empty packet.
fn control_pair() -> io::Result<(UnixDatagram, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((UnixDatagram::from_std(StdUnixDatagram::from(ours))?, theirs))
}

fn spawn(jailer: &Path, program: &Path, descriptors: Vec<(OwnedFd, RawFd)>) -> io::Result<Jailed> {
    let arguments = ["--uplink", "3", "--control", "4"].map(Into::into).to_vec();
    let limits = Limits { files: FILES_MAX, threads: THREADS_MAX, address_space: Some(ADDRESS_SPACE) };
    let profile = Profile::Relay;
    let inmate = Inmate { profile, program: program.into(), arguments, descriptors, limits, group: None };
    Jailed::start(jailer, inmate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn last_words_of_a_relay_that_did_not_read_all_are_heard() {
        let (control, theirs) = control_pair().unwrap();
        let child = Jailed::unjailed(&["true"]);
        let relay = Relay { child, control, words: tokio::spawn(async { String::new() }) };
        relay.tell(&FromDaemon::Report, &[]).await;
        let last = FromRelay::Counters(Counters::default());
        rustix::net::send(&theirs, &message::encode(&last).unwrap(), rustix::net::SendFlags::empty())
            .unwrap();
        drop(theirs);
        assert_eq!(relay.hear().await.unwrap(), Some(last));
        assert_eq!(relay.hear().await.unwrap(), None);
        assert!(relay.end().await.0.unwrap().success());
    }
}
