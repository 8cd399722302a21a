//! The processes and channels of one machine.

use super::{Plan, VmError};
use crate::{
    console::Console,
    control_group::Group,
    exit::chain,
    jail::{Jailed, NO_JAIL},
    probe,
    qemu::{self, Backend, Inherited, Machine},
    qmp,
    relay::{Order, Relay},
    session::Input,
    tail::last_words,
    tap,
    verbs::bind_private,
};
use kontor_relay::message::Counters;
use kontor_wire::{
    Decoder,
    control::{FromGuest, FromHost, MAX_FROM_GUEST},
    encode,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::PathBuf,
    process::ExitStatus,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, timeout},
};

/// Frames that may wait for a guest that does not read.
const FRAMES_MAX: usize = 8;
/// Orders that may wait for the relay.
const ORDERS_MAX: usize = 8;
/// How long the streams of an ended QEMU may take to be read. They are closed; this is for bugs only.
const DRAIN: Duration = Duration::from_secs(5);
const CHUNK_MAX: usize = 16 * 1024;

/// The processes and channels of a machine that runs.
pub(super) struct Vm {
    frames: mpsc::Sender<Vec<u8>>,
    qmp: OwnedWriteHalf,
    kill: mpsc::Sender<()>,
    orders: mpsc::Sender<Order>,
    relay: JoinHandle<()>,
    counters: watch::Receiver<Option<Counters>>,
    /// What was begun for the machine and ends with it.
    tasks: JoinSet<()>,
    probe_socket: Option<PathBuf>,
    qemu_begun: Instant,
}

impl Vm {
    pub(super) async fn start(
        plan: Plan,
        group: Option<Group>,
        inputs: mpsc::Sender<Input>,
    ) -> Result<Self, VmError> {
        let Plan { machine, ready, qemu: program, relay, jail, console_log, probe_socket, tap, .. } = plan;
        let console_file = match Console::open(&console_log) {
            Ok(file) => file,
            Err(source) => return Err(VmError::ConsoleLog { path: console_log, source }),
        };
        let (console, console_theirs) = pair()?;
        let (qmp, qmp_theirs) = pair()?;
        let (control, control_theirs) = pair()?;
        let mut tasks = JoinSet::new();
        let (uplink_theirs, relays) = uplink(machine.uplink, tap, &mut tasks)?;
        let probe_socket = probe_socket.filter(|_| machine.probe);
        let probe_theirs = match &probe_socket {
            Some(path) => {
                let listener =
                    bind_private(path).map_err(|source| VmError::Probe { path: path.clone(), source })?;
                let (probe, theirs) = pair()?;
                tasks.spawn(probe::serve(listener, probe));
                Some(theirs)
            }
            None => None,
        };
        let machine = Machine { probe: probe_theirs.is_some(), ..machine };

        let relay = Relay::start(&jail, &relay, relays).await?;
        let inherited = Inherited {
            kernel: ready.kernel.into(),
            initrd: ready.initrd.into(),
            root: Some(ready.root.into()),
            console: console_theirs,
            qmp: qmp_theirs,
            control: control_theirs,
            uplink: uplink_theirs,
            probe: probe_theirs,
        };
        let qemu_begun = Instant::now();
        let mut child = match qemu::start(&jail, &program, &machine, group, inherited) {
            Ok(child) => child,
            Err(source) => {
                relay.end().await;
                return Err(VmError::Qemu { program, source });
            }
        };
        let Some(pid) = child.entered().await else {
            relay.end().await;
            return Err(no_jail(child, program).await);
        };
        tracing::info!(pid, accelerator = machine.accelerator.name(), "QEMU was started");

        let (orders, orders_rx) = mpsc::channel(ORDERS_MAX);
        let (counters_tx, counters) = watch::channel(None);
        let relay = tokio::spawn(relay.run(orders_rx, inputs.clone(), counters_tx));

        let (from_guest, to_guest) = control.into_split();
        let (frames, frames_rx) = mpsc::channel(FRAMES_MAX);
        tasks.spawn(write_control(to_guest, frames_rx));
        let (from_qmp, mut qmp) = qmp.into_split();
        if let Err(error) = qmp::begin(&mut qmp).await {
            tracing::warn!(%error, "QEMU's control channel cannot be used");
        }
        let words = child.take_words();
        let mut streams = JoinSet::new();
        streams.spawn(read_control(from_guest, inputs.clone()));
        streams.spawn(read_console(console, console_file, inputs.clone()));
        streams.spawn(qmp::listen(from_qmp, inputs.clone()));
        let words = tokio::spawn(async move {
            match words {
                Some(stderr) => last_words(stderr, "qemu").await,
                None => String::new(),
            }
        });
        let (kill, kill_rx) = mpsc::channel(1);
        tokio::spawn(watch_qemu(child, kill_rx, streams, words, inputs));
        Ok(Self { frames, qmp, kill, orders, relay, counters, tasks, probe_socket, qemu_begun })
    }

    /// Runs `task` until it or the machine ends.
    pub(super) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        // The ones that ended are taken note of, so that their number stays small.
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(task);
    }

    /// When QEMU was started.
    pub(super) fn qemu_begun(&self) -> Instant {
        self.qemu_begun
    }

    pub(super) fn has_relay(&self) -> bool {
        !self.relay.is_finished()
    }

    pub(super) fn counters(&self) -> Option<Counters> {
        *self.counters.borrow()
    }

    /// Resolves when the relay has reported.
    pub(super) async fn counters_changed(&mut self) {
        if self.counters.changed().await.is_err() {
            std::future::pending().await
        }
    }

    pub(super) fn tell(&self, message: &FromHost) {
        if self.frames.try_send(encode(message)).is_err() {
            tracing::warn!("the guest does not read its control channel");
        }
    }

    pub(super) fn order(&self, order: Order) {
        if let Err(error) = self.orders.try_send(order) {
            tracing::debug!(%error, "the relay takes no order");
        }
    }

    pub(super) async fn quit(&mut self) {
        if let Err(error) = qmp::quit(&mut self.qmp).await {
            tracing::debug!(%error, "QEMU does not listen any more");
        }
    }

    pub(super) fn kill(&self) {
        // When it does not fit, one is on its way already.
        let _ = self.kill.try_send(());
    }

    /// QEMU is gone; takes the rest down. Returns the relay's last counters.
    pub(super) async fn end(mut self, inputs: mpsc::Receiver<Input>) -> Option<Counters> {
        // Nobody listens any more: a task that has something to say must not wait for it.
        drop(inputs);
        self.tasks.shutdown().await;
        self.order(Order::Shutdown);
        if let Err(error) = (&mut self.relay).await {
            tracing::error!(%error, "the relay's task failed");
        }
        if let Some(path) = &self.probe_socket {
            let _ = std::fs::remove_file(path);
        }
        *self.counters.borrow()
    }
}

/// A stream to QEMU: kontord's end and the other.
pub(super) fn pair() -> Result<(UnixStream, OwnedFd), VmError> {
    let make = || {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs.into()))
    };
    make().map_err(VmError::Channels)
}

/// The uplink: QEMU's end and the relay's, with the tap between them where one is wanted.
fn uplink(
    backend: Backend,
    tap: Option<PathBuf>,
    tasks: &mut JoinSet<()>,
) -> Result<(OwnedFd, OwnedFd), VmError> {
    let pair = || {
        let ends: (OwnedFd, OwnedFd) = match backend {
            Backend::Port => StdUnixStream::pair().map(|(one, other)| (one.into(), other.into()))?,
            // No datagrams: such a socket sends to any other of the host that one names, whatever namespace
            // the sender is in, because it was made in this one.
            Backend::Vfio => {
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?
            }
        };
        Ok(ends)
    };
    let (qemu, relay) = pair().map_err(VmError::Channels)?;
    let Some(path) = tap else { return Ok((qemu, relay)) };
    let (tapped, relays) = pair().map_err(VmError::Channels)?;
    let inserted = match backend {
        Backend::Port => tap::insert(&path, relay.into(), tapped.into()),
        Backend::Vfio => tap::insert_datagrams(&path, relay.into(), tapped.into(), tasks),
    };
    inserted.map_err(|source| VmError::Tap { path, source })?;
    Ok((qemu, relays))
}

/// Waits for QEMU's end, or brings it about; then until everything it sent was read.
async fn watch_qemu(
    mut child: Jailed,
    mut kill: mpsc::Receiver<()>,
    mut streams: JoinSet<()>,
    words: JoinHandle<String>,
    inputs: mpsc::Sender<Input>,
) {
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(()) = kill.recv() => {
                child.kill();
            }
        }
    };
    let drained = timeout(DRAIN, async {
        while streams.join_next().await.is_some() {}
        words.await.unwrap_or_default()
    });
    let words = drained.await.unwrap_or_else(|_| {
        tracing::error!("the channels of an ended QEMU are still open");
        String::new()
    });
    let _ = inputs.send(Input::Closed(ending(status, &words))).await;
}

/// Why a jailer did not start QEMU. One that hangs is ended.
pub(super) async fn no_jail(mut child: Jailed, program: PathBuf) -> VmError {
    child.kill();
    let stderr = child.take_words();
    let words = async {
        match stderr {
            Some(stderr) => last_words(stderr, "jail").await,
            None => String::new(),
        }
    };
    let (words, ended) = tokio::join!(words, child.wait());
    match ended {
        Ok(status) if status.code() == Some(NO_JAIL) => VmError::NoJail(words),
        Ok(status) => VmError::Qemu { program, source: io::Error::other(format!("{status} {words}")) },
        Err(source) => VmError::Qemu { program, source },
    }
}

fn ending(status: io::Result<ExitStatus>, words: &str) -> String {
    let how = match status {
        Ok(status) => status.to_string(),
        Err(error) => chain(&error),
    };
    format!("QEMU ended ({how}) {words}").trim_end().to_owned()
}

/// Cuts what the guest sends into frames; after garbage it only waits for the end.
async fn read_control(mut from: OwnedReadHalf, inputs: mpsc::Sender<Input>) {
    let mut decoder = Decoder::new(MAX_FROM_GUEST);
    let mut chunk = [0; MAX_FROM_GUEST];
    loop {
        let room = decoder.room().min(chunk.len());
        let count = match from.read(&mut chunk[..room]).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        decoder.push(&chunk[..count]);
        loop {
            match decoder.next_message::<FromGuest>() {
                Ok(Some(message)) => {
                    if inputs.send(Input::Guest(message)).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    let _ = inputs.send(Input::GuestBroke(error)).await;
                    return drain(from).await;
                }
            }
        }
    }
}

async fn drain(mut from: OwnedReadHalf) {
    let mut chunk = [0; CHUNK_MAX];
    while let Ok(1..) = from.read(&mut chunk).await {}
}

async fn write_control(mut to: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}

async fn read_console(mut from: UnixStream, mut console: Console, inputs: mpsc::Sender<Input>) {
    let mut chunk = [0; CHUNK_MAX];
    // Each is said once: how often the guest writes is the guest's to choose.
    let (mut complained, mut panicked) = (false, false);
    loop {
        let count = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let (panic, written) = console.push(&chunk[..count]);
        if let Err(error) = written
            && !std::mem::replace(&mut complained, true)
        {
            tracing::warn!(%error, "the console log cannot be written");
        }
        if let Some(words) = panic
            && !std::mem::replace(&mut panicked, true)
            && inputs.send(Input::Panicked(words)).await.is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing here takes so long: a test that waits for it has failed.
    const PATIENCE: Duration = Duration::from_secs(30);

    async fn without_jail(script: &str) -> VmError {
        let jailer = Jailed::unjailed(&["sh", "-c", script]);
        timeout(PATIENCE, no_jail(jailer, "qemu".into())).await.unwrap()
    }

    #[tokio::test]
    async fn jailer_that_hangs_is_ended() {
        let VmError::Qemu { source, .. } = without_jail("kill -STOP $$").await else {
            panic!("another error")
        };
        assert!(source.to_string().contains("signal: 9"), "{source}");
    }

    #[tokio::test]
    async fn jailer_that_says_why_is_heard() {
        let VmError::NoJail(words) = without_jail("echo no namespaces >&2; exit 125").await else {
            panic!("another error")
        };
        assert_eq!(words, "no namespaces");
    }
}
