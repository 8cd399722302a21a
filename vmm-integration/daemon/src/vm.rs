//! One virtual machine: its processes and channels around the [`Session`] that decides.
//!
//! ```text
//!            ┌ control ─ reader ─┐
//!   QEMU ────┼ console ─ reader ─┤
//!            └ QMP ───── reader ─┼──► inputs ──► run: Session ──► actions ──► QEMU, relay, office
//!   relay ───────────── task ────┤               (one owner, one queue)
//!   office ──────────── task ────┘
//! ```
//!
//! The end of QEMU is one input, sent once the process is reaped and every stream of it was read to its
//! end, so that no last word is lost and none comes later.

use crate::{
    console::Console,
    exit::{Exit, chain},
    lease::Asker,
    office::LeaseSource,
    probe,
    qemu::{self, Inherited, Machine},
    qmp,
    relay::{Order, Relay, RelayStartError},
    session::{Action, Input, Session, Times},
    slots::Ready,
    status::{Release, Status},
    tail::last_words,
    tap,
};
use kontor_relay::message::Counters;
use kontor_wire::{
    Decoder,
    control::{FromGuest, FromHost, MAX_FROM_GUEST},
    encode,
};
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
    process::Child,
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until, timeout},
};

/// Inputs that may wait. A reader whose input does not fit waits, and with it its peer.
const INPUTS_MAX: usize = 32;
/// Frames that may wait for a guest that does not read.
const FRAMES_MAX: usize = 8;
/// Orders that may wait for the relay.
const ORDERS_MAX: usize = 8;
/// How long the streams of an ended QEMU may take to be read. They are closed; this is for bugs only.
const DRAIN: Duration = Duration::from_secs(5);
const CHUNK_MAX: usize = 16 * 1024;

/// Everything that was decided before the first process runs.
#[derive(Debug)]
pub struct Plan {
    /// The machine.
    pub machine: Machine,
    /// The verified release.
    pub ready: Ready,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// The relay's program.
    pub relay: PathBuf,
    /// Where the console is written.
    pub console_log: PathBuf,
    /// Where the probe channel is served, if the release has one.
    pub probe_socket: Option<PathBuf>,
    /// Where the uplink is recorded.
    pub tap: Option<PathBuf>,
    /// How long the guest may take.
    pub times: Times,
}

/// Why a machine was not started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A channel.
    #[error("make the channels of the work VM")]
    Channels(#[source] io::Error),
    /// The console log.
    #[error("open the console log")]
    ConsoleLog(#[source] io::Error),
    /// The tap.
    #[error("open the tap {path}")]
    Tap {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The probe's socket.
    #[error("serve the probe channel on {path}")]
    Probe {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The relay.
    #[error(transparent)]
    Relay(#[from] RelayStartError),
    /// QEMU.
    #[error("start QEMU ({program}); is it installed?")]
    Qemu {
        /// Its program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl VmError {
    /// The exit code that goes with it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Qemu { source, .. } | Self::Relay(RelayStartError::Program { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Exit::HostLacks
            }
            Self::Channels(_)
            | Self::ConsoleLog(_)
            | Self::Tap { .. }
            | Self::Probe { .. }
            | Self::Relay(_)
            | Self::Qemu { .. } => Exit::Failed,
        }
    }
}

/// What others want of the machine.
#[derive(Debug)]
pub enum Command {
    /// Power it off.
    Stop,
    /// End it at once.
    StopNow,
    /// Bring the relay's counters in the status up to date, then drop this.
    Refresh(oneshot::Sender<()>),
}

/// Starts the machine and stays with it until nothing is left of it. Every change is published in
/// `status`; times in it count from `started`.
///
/// Children die with the thread that starts them, so this has to run on the main thread.
///
/// # Errors
/// [`VmError`] when it could not be started; then nothing is left of it either.
pub async fn run<O: LeaseSource>(
    plan: Plan,
    asker: Asker<O>,
    started: Instant,
    mut commands: mpsc::Receiver<Command>,
    status: &watch::Sender<Status>,
) -> Result<(), VmError> {
    let verity_root = plan.ready.manifest.image.verity.root_hash.0;
    status.send_modify(|status| {
        status.accel = Some(plan.machine.accelerator);
        status.emulated = plan.machine.accelerator.is_emulation();
        status.release = Some(release(&plan.ready));
    });
    let (inputs_tx, mut inputs) = mpsc::channel(INPUTS_MAX);
    let times = plan.times;
    let mut vm = Vm::start(plan, inputs_tx.clone()).await?;
    let mut session = Session::new(times, verity_root, started.elapsed());
    let (mut refreshing, mut refreshed) = (Vec::new(), false);
    loop {
        while let Some(action) = session.poll_action() {
            match action {
                Action::Ask(challenge) => {
                    let (asker, inputs) = (asker.clone(), inputs_tx.clone());
                    vm.asking.spawn(async move {
                        let answer = asker.ask(challenge).await;
                        let _ = inputs.send(Input::Office(answer)).await;
                    });
                }
                Action::Tell(message) => vm.tell(&message),
                Action::Gateways(table) => vm.order(Order::Gateways(table)),
                Action::Quit => vm.quit().await,
                Action::Kill => vm.kill(),
            }
        }
        let counters = *vm.counters.borrow_and_update();
        status.send_if_modified(|status| {
            let before = status.clone();
            status.follow(&session);
            status.relay = counters;
            *status != before
        });
        if std::mem::take(&mut refreshed) || vm.relay.is_finished() {
            refreshing.clear();
        }
        if session.is_ended() {
            break;
        }
        let due = session.next_timeout().map(|due| started + due);
        tokio::select! {
            input = inputs.recv() => match input {
                Some(input) => {
                    note(&input);
                    session.handle(input, started.elapsed());
                }
                None => unreachable!("this function holds a sender"),
            },
            command = commands.recv() => match command {
                Some(Command::Refresh(done)) => {
                    refreshing.push(done);
                    vm.order(Order::Report);
                }
                Some(Command::Stop) => session.handle(Input::Stop, started.elapsed()),
                // Whoever could have stopped it orderly is gone.
                Some(Command::StopNow) | None => session.handle(Input::StopNow, started.elapsed()),
            },
            _ = vm.counters.changed(), if !vm.relay.is_finished() => refreshed = true,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                session.handle_timeout(started.elapsed());
            }
        }
    }
    let counters = vm.end(inputs).await;
    status.send_modify(|status| status.relay = counters);
    if let Some(stop) = session.stop() {
        tracing::info!(reason = stop.reason.name(), witness = ?stop.witness, detail = stop.detail, "the work VM ended");
    }
    Ok(())
}

fn release(ready: &Ready) -> Release {
    let manifest = &ready.manifest;
    Release { name: manifest.image.release.clone(), version: manifest.version, test: manifest.image.test }
}

fn note(input: &Input) {
    match input {
        Input::Guest(FromGuest::State { state, at_ms }) => {
            tracing::info!(state = state.name(), guest_ms = at_ms, "the guest reached a state");
        }
        Input::Guest(FromGuest::Challenge(challenge)) => {
            tracing::debug!(seq = challenge.seq, "the guest asks for a lease");
        }
        Input::Guest(_) | Input::Stop | Input::StopNow => {}
        Input::Office(_) => tracing::debug!("the office was asked"),
        Input::GuestBroke(error) => tracing::warn!(%error, "the guest sent what is no frame"),
        Input::UplinkBroke(words) => tracing::warn!(words, "the guest broke the rules of the uplink"),
        Input::Panicked(words) => tracing::warn!(words, "the guest's kernel panicked"),
        Input::RelayEnded(words) => tracing::error!(words, "the relay ended"),
        Input::Closed(words) => tracing::debug!(words, "QEMU ended"),
    }
}

/// The processes and channels of a machine that runs.
struct Vm {
    frames: mpsc::Sender<Vec<u8>>,
    qmp: OwnedWriteHalf,
    kill: mpsc::Sender<()>,
    orders: mpsc::Sender<Order>,
    relay: JoinHandle<()>,
    counters: watch::Receiver<Option<Counters>>,
    asking: JoinSet<()>,
    helpers: JoinSet<()>,
    probe_socket: Option<PathBuf>,
}

impl Vm {
    async fn start(plan: Plan, inputs: mpsc::Sender<Input>) -> Result<Self, VmError> {
        let Plan { machine, ready, qemu: program, relay, console_log, probe_socket, tap, times: _ } = plan;
        let console_file = Console::open(&console_log).map_err(VmError::ConsoleLog)?;
        let (console, console_theirs) = pair()?;
        let (qmp, qmp_theirs) = pair()?;
        let (control, control_theirs) = pair()?;
        let (uplink_theirs, relays) = uplink(tap)?;
        let mut helpers = JoinSet::new();
        let probe_socket = probe_socket.filter(|_| machine.probe);
        let probe_theirs = match &probe_socket {
            Some(path) => {
                let listener = probe::listen(path)
                    .map_err(|source| VmError::Probe { path: path.clone(), source })?;
                let (probe, theirs) = pair()?;
                helpers.spawn(probe::serve(listener, probe));
                Some(theirs)
            }
            None => None,
        };
        let machine = Machine { probe: probe_theirs.is_some(), ..machine };

        let relay = Relay::start(&relay, relays.into()).await?;
        let inherited = Inherited {
            kernel: ready.kernel.into(),
            initrd: ready.initrd.into(),
            root: ready.root.into(),
            console: console_theirs,
            qmp: qmp_theirs,
            control: control_theirs,
            uplink: uplink_theirs.into(),
            probe: probe_theirs,
        };
        let mut child = match qemu::start(&program, &machine, inherited) {
            Ok(child) => child,
            Err(source) => {
                relay.end().await;
                return Err(VmError::Qemu { program, source });
            }
        };
        tracing::info!(pid = child.id(), accelerator = machine.accelerator.name(), "QEMU was started");

        let (orders, orders_rx) = mpsc::channel(ORDERS_MAX);
        let (counters_tx, counters) = watch::channel(None);
        let relay = tokio::spawn(relay.run(orders_rx, inputs.clone(), counters_tx));

        let (from_guest, to_guest) = control.into_split();
        let (frames, frames_rx) = mpsc::channel(FRAMES_MAX);
        helpers.spawn(write_control(to_guest, frames_rx));
        let (from_qmp, mut qmp) = qmp.into_split();
        if let Err(error) = qmp::begin(&mut qmp).await {
            tracing::warn!(%error, "QEMU's control channel cannot be used");
        }
        let words = child.stderr.take();
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
        Ok(Self {
            frames,
            qmp,
            kill,
            orders,
            relay,
            counters,
            asking: JoinSet::new(),
            helpers,
            probe_socket,
        })
    }

    fn tell(&self, message: &FromHost) {
        if self.frames.try_send(encode(message)).is_err() {
            tracing::warn!("the guest does not read its control channel");
        }
    }

    fn order(&self, order: Order) {
        if let Err(error) = self.orders.try_send(order) {
            tracing::debug!(%error, "the relay takes no order");
        }
    }

    async fn quit(&mut self) {
        if let Err(error) = qmp::quit(&mut self.qmp).await {
            tracing::debug!(%error, "QEMU does not listen any more");
        }
    }

    fn kill(&self) {
        // When it does not fit, one is on its way already.
        let _ = self.kill.try_send(());
    }

    /// QEMU is gone; takes the rest down. Returns the relay's last counters.
    async fn end(mut self, inputs: mpsc::Receiver<Input>) -> Option<Counters> {
        // Nobody listens any more: a task that has something to say must not wait for it.
        drop(inputs);
        self.asking.shutdown().await;
        self.order(Order::Shutdown);
        if let Err(error) = (&mut self.relay).await {
            tracing::error!(%error, "the relay's task failed");
        }
        self.helpers.shutdown().await;
        if let Some(path) = &self.probe_socket {
            let _ = std::fs::remove_file(path);
        }
        *self.counters.borrow()
    }
}

/// A stream to QEMU: kontord's end and the other.
fn pair() -> Result<(UnixStream, OwnedFd), VmError> {
    let make = || {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs.into()))
    };
    make().map_err(VmError::Channels)
}

/// The uplink: QEMU's end and the relay's, with the tap between them where one is wanted.
fn uplink(tap: Option<PathBuf>) -> Result<(StdUnixStream, StdUnixStream), VmError> {
    let (qemu, relay) = StdUnixStream::pair().map_err(VmError::Channels)?;
    let Some(path) = tap else { return Ok((qemu, relay)) };
    let (tapped, relays) = StdUnixStream::pair().map_err(VmError::Channels)?;
    tap::insert(&path, relay, tapped).map_err(|source| VmError::Tap { path, source })?;
    Ok((qemu, relays))
}

/// Waits for QEMU's end, or brings it about; then until everything it sent was read.
async fn watch_qemu(
    mut child: Child,
    mut kill: mpsc::Receiver<()>,
    mut streams: JoinSet<()>,
    words: JoinHandle<String>,
    inputs: mpsc::Sender<Input>,
) {
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(()) = kill.recv() => {
                if let Err(error) = child.start_kill() {
                    tracing::error!(%error, "QEMU cannot be killed");
                }
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
            match decoder.next::<FromGuest>() {
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
    loop {
        let count = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        match console.push(&chunk[..count]) {
            Ok(None) => {}
            Ok(Some(words)) => {
                if inputs.send(Input::Panicked(words)).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!(%error, "the console log cannot be written"),
        }
    }
}
