//! One virtual machine: its processes and channels around the [`Session`] that decides.
//!
//! ```text
//!            ┌ control ─ reader ─┐
//!   QEMU ────┼ console ─ reader ─┤
//!            └ QMP ───── reader ─┼──► inputs ──► run: Session ──► actions ──► QEMU, relay, office
//!   relay ───────────── task ────┤               (one owner, one queue)
//!   office ──────────── task ────┘
//! ```
//! Beside them it listens to those who command, to the clock, and for the end of the host's sleep.
//!
//! The end of QEMU is one input, sent once the process is reaped and every stream of it was read to its
//! end, so that no last word is lost and none comes later.

mod machine;
mod trial;

use crate::{
    control_group::{Delegated, Place},
    exit::Exit,
    lease::Asker,
    office::LeaseSource,
    qemu::Machine,
    relay::{Order, RelayStartError},
    session::{Action, Input, Session, Times},
    sleep::Sleep,
    slots::Ready,
    status::{Release, Status, milliseconds},
    store::is_full,
};
use kontor_relay::message::Counters;
use kontor_wire::control::FromGuest;
use machine::Vm;
use std::{io, path::PathBuf};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};
pub(crate) use trial::kvm_runs_a_guest;

/// Inputs that may wait. A reader whose input does not fit waits, and with it its peer.
const INPUTS_MAX: usize = 32;

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
    /// The jailer's program.
    pub jail: PathBuf,
    /// Where it may have a control group.
    pub delegated: Option<Delegated>,
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
    #[error("open the console log {path}")]
    ConsoleLog {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
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
    /// QEMU's jail.
    #[error("QEMU cannot be jailed, and Kontor starts it no other way: {0}")]
    NoJail(String),
    /// Somebody wanted it stopped before QEMU ran.
    #[error("the work VM was stopped before it ran")]
    Stopped,
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
            Self::NoJail(_) | Self::Relay(RelayStartError::NoJail(_)) => Exit::HostLacks,
            Self::ConsoleLog { source, .. } | Self::Tap { source, .. } | Self::Probe { source, .. }
                if is_full(source) =>
            {
                Exit::HostLacks
            }
            Self::Stopped => Exit::Ok,
            Self::Channels(_)
            | Self::ConsoleLog { .. }
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
/// `status`; times in it count from `started`. When the host has slept, as `sleep` says, the guest is told.
///
/// Children die with the thread that starts them, so this has to run on the main thread.
///
/// # Errors
/// [`VmError`] when it could not be started; then nothing is left of it either.
pub async fn run<O: LeaseSource>(
    plan: Plan,
    asker: Asker<O>,
    mut sleep: Sleep,
    started: Instant,
    mut commands: mpsc::Receiver<Command>,
    status: &watch::Sender<Status>,
) -> Result<(), VmError> {
    let verity_root = plan.ready.manifest.image.verity.root_hash.0;
    let group = plan.machine.group(plan.delegated.as_ref(), Place::WorkVm);
    status.send_modify(|status| {
        status.accel = Some(plan.machine.accelerator);
        status.jail = Some(plan.machine.jail(group.as_ref()));
        status.uplink = Some(plan.machine.uplink);
        status.emulated = plan.machine.accelerator.is_emulation();
        status.release = Some(release(&plan.ready));
    });
    let (inputs_tx, mut inputs) = mpsc::channel(INPUTS_MAX);
    let times = plan.times;
    let mut vm = tokio::select! {
        vm = Vm::start(plan, group, inputs_tx.clone()) => vm?,
        // What was started ends with the start that is given up here.
        () = stopped(&mut commands) => return Err(VmError::Stopped),
    };
    let qemu_at = vm.qemu_begun().saturating_duration_since(started);
    status.send_modify(|status| status.qemu_at_ms = Some(milliseconds(qemu_at)));
    let mut session = Session::new(times, verity_root, started.elapsed());
    let (mut refreshing, mut refreshed) = (Vec::new(), false);
    loop {
        while let Some(action) = session.poll_action() {
            match action {
                Action::Ask(challenge) => {
                    let (asker, inputs) = (asker.clone(), inputs_tx.clone());
                    vm.spawn(async move {
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
        if session.is_ended() {
            break;
        }
        publish(&session, vm.counters(), status);
        if std::mem::take(&mut refreshed) || !vm.has_relay() {
            refreshing.clear();
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
            () = vm.counters_changed() => refreshed = true,
            () = sleep.over() => {
                note(&Input::Woken);
                session.handle(Input::Woken, started.elapsed());
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                session.handle_timeout(started.elapsed());
            }
        }
    }
    // Whoever sees the end sees one after which nothing is left.
    let counters = vm.end(inputs).await;
    publish(&session, counters, status);
    if let Some(stop) = session.stop() {
        tracing::info!(reason = stop.reason.name(), witness = ?stop.witness, detail = stop.detail, "the work VM ended");
    }
    Ok(())
}

/// Resolves when somebody wants no machine any more. There is nothing to refresh yet.
pub(crate) async fn stopped(commands: &mut mpsc::Receiver<Command>) {
    while let Some(Command::Refresh(_)) = commands.recv().await {}
}

fn publish(session: &Session, counters: Option<Counters>, status: &watch::Sender<Status>) {
    status.send_if_modified(|status| {
        let before = status.clone();
        status.follow(session);
        status.relay = counters;
        *status != before
    });
}

fn release(ready: &Ready) -> Release {
    let manifest = &ready.manifest;
    Release { name: manifest.image.release.clone(), version: manifest.version, test: manifest.image.test }
}

fn note(input: &Input) {
    match input {
        Input::Guest(FromGuest::State { state, at_ms }) => {
            tracing::debug!(state = state.name(), guest_ms = at_ms, "the guest reached a state");
        }
        Input::Guest(FromGuest::Challenge(challenge)) => {
            tracing::debug!(seq = challenge.seq, "the guest asks for a lease");
        }
        Input::Guest(_) | Input::Stop | Input::StopNow => {}
        Input::Woken => tracing::info!("the host has slept"),
        Input::WentOff(word) => tracing::debug!(word, "the machine went off"),
        Input::Office(_) => tracing::debug!("the office was asked"),
        Input::GuestBroke(error) => tracing::warn!(%error, "the guest sent what is no frame"),
        Input::UplinkBroke(words) => tracing::warn!(words, "the guest broke the rules of the uplink"),
        Input::Panicked(words) => tracing::warn!(words, "the guest's kernel panicked"),
        Input::RelayEnded(words) => tracing::error!(words, "the relay ended"),
        Input::Closed(words) => tracing::debug!(words, "QEMU ended"),
    }
}
