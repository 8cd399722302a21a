//! The relay's process, and kontord's end of the channel to it.

use crate::{
    jail::{Inmate, Jailed, Limits, NO_JAIL, Profile},
    session::Input,
    tail::{clean, last_words},
};
use kontor_relay::message::{self, Counters, FromDaemon, FromRelay, MAX_MESSAGE, MessageError};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, socketpair, sockopt};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::UnixDatagram as StdUnixDatagram,
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};
use tokio::{
    net::UnixDatagram,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

const UPLINK: RawFd = 3;
const CONTROL: RawFd = 4;
const UDP4: RawFd = 5;
const UDP6: RawFd = 6;

/// Descriptors while the relay's program is loaded; it lowers this itself.
const FILES_MAX: u64 = 16;
/// Threads: its own and its jailer's.
const THREADS_MAX: u64 = 2;
/// Address space: its buffers, its libraries.
const ADDRESS_SPACE: u64 = 256 << 20;
/// Bytes that the kernel may hold for each UDP socket and direction, as far as the host allows.
const UDP_BUFFER: usize = 2 << 20;
/// From its start to `Ready`.
const START: Duration = Duration::from_secs(10);
/// From `Shutdown` to its end.
const END: Duration = Duration::from_secs(3);

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayStartError {
    /// Its sockets.
    #[error("open the relay's sockets")]
    Sockets(#[source] io::Error),
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
        let (control, theirs) = control_pair().map_err(RelayStartError::Sockets)?;
        let udp4 =
            udp(AddressFamily::INET, Ipv4Addr::UNSPECIFIED.into()).map_err(RelayStartError::Sockets)?;
        // A host without IPv6 has no such socket.
        let udp6 = udp(AddressFamily::INET6, Ipv6Addr::UNSPECIFIED.into()).ok();
        let mut descriptors = vec![(uplink, UPLINK), (theirs, CONTROL), (udp4, UDP4)];
        descriptors.extend(udp6.map(|socket| (socket, UDP6)));
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
        loop {
            let heard = tokio::select! {
                heard = self.hear() => heard,
                order = orders.recv() => {
                    let last = matches!(order, Some(Order::Shutdown) | None);
                    self.tell(order.unwrap_or(Order::Shutdown)).await;
                    if last {
                        orders.close();
                        break;
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

    async fn tell(&self, order: Order) {
        let message = match order {
            Order::Gateways(table) => FromDaemon::Gateways(table),
            Order::Report => FromDaemon::Report,
            Order::Shutdown => FromDaemon::Shutdown,
        };
        let sent = match message::encode(&message) {
            Ok(packet) => self.control.send(&packet).await.map(|_| ()),
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "the relay does not listen any more");
        }
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

/// A socket that any gateway can be reached through. A v6 socket carries v6 only.
fn udp(family: AddressFamily, address: IpAddr) -> io::Result<OwnedFd> {
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    for set in [sockopt::set_socket_recv_buffer_size, sockopt::set_socket_send_buffer_size] {
        set(&socket, UDP_BUFFER)?;
    }
    bind(&socket, &SocketAddr::new(address, 0))?;
    Ok(socket)
}

fn spawn(jailer: &Path, program: &Path, descriptors: Vec<(OwnedFd, RawFd)>) -> io::Result<Jailed> {
    let udp6 = descriptors.iter().any(|(_, fd)| *fd == UDP6).then_some(["--udp6", "6"]);
    let line =
        ["--uplink", "3", "--control", "4", "--udp4", "5"].into_iter().chain(udp6.into_iter().flatten());
    let arguments = line.map(Into::into).collect();
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
        relay.tell(Order::Report).await;
        let last = FromRelay::Counters(Counters::default());
        rustix::net::send(&theirs, &message::encode(&last).unwrap(), rustix::net::SendFlags::empty())
            .unwrap();
        drop(theirs);
        assert_eq!(relay.hear().await.unwrap(), Some(last));
        assert_eq!(relay.hear().await.unwrap(), None);
        assert!(relay.end().await.0.unwrap().success());
    }
}
