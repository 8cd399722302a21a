//! kontord: one device, at most one virtual machine at a time, and the verbs on both.

use crate::{
    config::{Config, ConfigError},
    console, doctor,
    exit::{Exit, chain},
    host::{Accelerator, KVM},
    lease::Asker,
    office::CommandOffice,
    qemu::Machine,
    session::Times,
    slots::{self, SlotError},
    status::{Failure, State, Status},
    store::{Store, StoreError},
    verbs::{Answer, Answers, Done, Request},
    vm::{self, Command, Plan, VmError},
};
use kontor_bundle::Bundle;
use kontor_release::Manifest;
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Most processors of a work VM.
const CPUS_MAX: usize = 4;
/// Most processors of an emulated one: more of them only compete for the host's.
const CPUS_EMULATED_MAX: usize = 2;
/// Commands that may wait for the virtual machine.
const COMMANDS_MAX: usize = 4;
/// How long `status` waits for the relay's counters.
const COUNTERS: Duration = Duration::from_millis(500);
/// Most bytes of the log in one line of an answer.
const LOG_CHUNK: usize = 16 * 1024;

/// Why a work VM was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Keys and documents.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The release.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A release below the policy's floor.
    #[error("the installed release {version} is older than the policy allows ({floor}); install an update")]
    OldRelease {
        /// The release's version.
        version: u64,
        /// The bundle's `min_release`.
        floor: u64,
    },
    /// A test release where policy does not allow it.
    #[error("the installed release is a test image, and the policy does not allow one; install another")]
    TestImage,
    /// No KVM where policy does not allow emulation.
    #[error(
        "this host has no usable {KVM}, and the policy does not allow emulation; enable virtualisation in the firmware"
    )]
    NoKvm,
    /// The policy gives less memory than the release runs in.
    #[error("the release needs {needed} MiB of memory, the policy gives it {given}; tell IT")]
    Memory {
        /// The release's least.
        needed: u32,
        /// The bundle's.
        given: u32,
    },
    /// The processes.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl StartError {
    /// The exit code that goes with it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Store(error) | Self::Slot(SlotError::Store(error)) if error.is_missing() => Exit::HostLacks,
            Self::Slot(SlotError::Empty)
            | Self::OldRelease { .. }
            | Self::TestImage
            | Self::NoKvm
            | Self::Memory { .. } => Exit::HostLacks,
            Self::Store(_) | Self::Slot(_) => Exit::NotVerified,
            Self::Config(_) => Exit::Usage,
            Self::Vm(error) => error.exit(),
        }
    }
}

/// The service for one device.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    store: Store,
    user_mode: bool,
    status: watch::Sender<Status>,
    vm: Mutex<Life>,
}

#[derive(Debug)]
enum Life {
    /// No machine runs.
    Idle,
    /// One does, or did until a moment ago.
    Machine { commands: mpsc::Sender<Command>, task: JoinHandle<()> },
    /// kontord ends; none is started any more.
    Closing,
}

impl Daemon {
    /// A service without a machine.
    #[must_use]
    pub fn new(config: Config, store: Store, user_mode: bool) -> Self {
        let status = watch::Sender::new(Status::off(user_mode));
        Self { config, store, user_mode, status, vm: Mutex::new(Life::Idle) }
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Answers one request; the returned line is the last.
    pub(crate) async fn answer(self: &Arc<Self>, request: Request, to: &mut Answers) -> io::Result<Done> {
        match request {
            Request::Start { headless: true } => self.start(to).await,
            Request::Start { headless: false } => Ok(Done::new(
                Exit::HostLacks,
                "there is no window yet; start the work VM without one: kontor start --headless",
            )),
            Request::Stop {} => Ok(self.stop().await),
            Request::Status {} => {
                to.say(&Answer::Status(Box::new(self.status().await))).await?;
                Ok(Done::ok(""))
            }
            Request::Logs {} => self.logs(to).await,
            Request::Doctor {} => self.doctor(to).await,
        }
    }

    /// Starts the machine unless one runs, and follows it until its session runs or it ended.
    async fn start(self: &Arc<Self>, to: &mut Answers) -> io::Result<Done> {
        let mut status = match self.spawn().await {
            Ok(status) => status,
            Err(done) => return Ok(done),
        };
        let mut told = 0;
        loop {
            let now = status.borrow_and_update().clone();
            for reached in now.states.get(told..).unwrap_or_default() {
                to.say(&Answer::State(reached.clone())).await?;
            }
            told = now.states.len();
            match now.state {
                State::Running => return Ok(Done::ok("ready")),
                State::Off | State::Stopped | State::NotStarted => return Ok(outcome(&now)),
                State::Starting | State::Booting | State::Stopping => {}
            }
            if status.changed().await.is_err() {
                return Ok(Done::new(Exit::Failed, "kontord ends"));
            }
        }
    }

    /// Brings a machine to life, if there is none. One on its way out is waited for.
    async fn spawn(self: &Arc<Self>) -> Result<watch::Receiver<Status>, Done> {
        let mut status = self.status.subscribe();
        loop {
            let mut life = self.vm.lock().await;
            let state = status.borrow_and_update().state;
            match &mut *life {
                Life::Closing => return Err(Done::new(Exit::Failed, "kontord ends")),
                Life::Machine { .. } if matches!(state, State::Stopping) => {
                    drop(life);
                    let _ = status.wait_for(|status| !status.is_alive()).await;
                    continue;
                }
                Life::Machine { .. } if status.borrow().is_alive() => return Ok(status),
                Life::Machine { task, .. } => {
                    // It has published its end, which is the last that it does.
                    let _ = task.await;
                }
                Life::Idle => {}
            }
            self.status.send_replace(Status { state: State::Starting, ..Status::off(self.user_mode) });
            let (commands, orders) = mpsc::channel(COMMANDS_MAX);
            let task = tokio::spawn(Arc::clone(self).live(orders));
            *life = Life::Machine { commands, task };
            return Ok(self.status.subscribe());
        }
    }

    /// One machine, from the checks before it to its end.
    async fn live(self: Arc<Self>, commands: mpsc::Receiver<Command>) {
        let started = Instant::now();
        if let Err(error) = self.run(started, commands).await {
            let words = chain(&error);
            tracing::warn!(words, "the work VM was not started");
            let failure = Failure { words, exit: error.exit() };
            self.status.send_modify(|status| {
                status.state = State::NotStarted;
                status.not_started = Some(failure);
            });
        }
    }

    async fn run(&self, started: Instant, commands: mpsc::Receiver<Command>) -> Result<(), StartError> {
        let (config, store) = (self.config.clone(), self.store.clone());
        let planning = tokio::task::spawn_blocking(move || plan(&config, &store, Path::new(KVM)));
        let plan = planning.await.map_err(|error| VmError::Channels(io::Error::other(error)))??;
        let asker = Asker {
            store: self.store.clone(),
            office: CommandOffice::new(self.config.office_command.clone()),
            release: plan.ready.manifest.image.release.clone(),
        };
        Ok(vm::run(plan, asker, started, commands, &self.status).await?)
    }

    async fn command(&self, command: Command) {
        if let Life::Machine { commands, .. } = &*self.vm.lock().await {
            // Full: the same was asked several times already. Closed: it has ended.
            let _ = commands.try_send(command);
        }
    }

    async fn stop(&self) -> Done {
        let mut status = self.status.subscribe();
        if !status.borrow().is_alive() {
            return Done::ok("the work VM does not run");
        }
        self.command(Command::Stop).await;
        match status.wait_for(|status| !status.is_alive()).await {
            Ok(status) => Done { exit: Exit::Ok, ..outcome(&status) },
            Err(_) => Done::new(Exit::Failed, "kontord ends"),
        }
    }

    /// The status with fresh counters.
    async fn status(&self) -> Status {
        if matches!(self.status.borrow().state, State::Booting | State::Running) {
            let (done, refreshed) = oneshot::channel();
            self.command(Command::Refresh(done)).await;
            let _ = timeout(COUNTERS, refreshed).await;
        }
        self.status.borrow().clone()
    }

    async fn logs(&self, to: &mut Answers) -> io::Result<Done> {
        let path = self.store.console_log();
        let log = match tokio::task::spawn_blocking(move || console::read(&path)).await {
            Ok(Ok(log)) => log,
            Ok(Err(error)) => return Ok(Done::new(Exit::Failed, format!("read the console log: {error}"))),
            Err(error) => return Ok(Done::new(Exit::Failed, error.to_string())),
        };
        for chunk in log.chunks(LOG_CHUNK) {
            to.say(&Answer::Log(String::from_utf8_lossy(chunk).into_owned())).await?;
        }
        Ok(Done::ok(""))
    }

    async fn doctor(self: &Arc<Self>, to: &mut Answers) -> io::Result<Done> {
        let checks = doctor::examine(self).await;
        let exit = checks.iter().find(|check| !check.ok).map_or(Exit::Ok, |_| Exit::HostLacks);
        for check in checks {
            to.say(&Answer::Check(check)).await?;
        }
        Ok(Done::new(exit, ""))
    }

    /// Takes the machine down and starts no other. `hurry` resolves when it must not take long any more.
    pub async fn close(&self, hurry: impl Future<Output = ()>) {
        let life = std::mem::replace(&mut *self.vm.lock().await, Life::Closing);
        let Life::Machine { commands, mut task } = life else { return };
        let _ = commands.try_send(Command::Stop);
        tokio::select! {
            _ = &mut task => {}
            () = hurry => {
                let _ = commands.send(Command::StopNow).await;
                let _ = task.await;
            }
        }
    }
}

/// Verifies everything that a start rests on, and decides what the machine is made of.
///
/// # Errors
/// [`StartError`] says what does not verify, is missing or not allowed.
pub fn plan(config: &Config, store: &Store, kvm: &Path) -> Result<Plan, StartError> {
    let key = store.host_key()?;
    let records = store.records(&key.public())?;
    let manifest = slots::describe(store, &config.release_root)?;
    allowed(&records.bundle, &manifest)?;
    let settings = &records.bundle.settings;
    let accelerator = Accelerator::best(kvm);
    if accelerator.is_emulation() && !settings.allow_emulation {
        return Err(StartError::NoKvm);
    }
    let cpus_max = if accelerator.is_emulation() { CPUS_EMULATED_MAX } else { CPUS_MAX };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from).min(cpus_max);
    let ready = slots::open(store, &config.release_root)?;
    // What was decided above was decided about this very release, or it is not started.
    if ready.manifest != manifest {
        return Err(SlotError::Changed.into());
    }
    let machine = Machine {
        accelerator,
        cpus,
        memory_mib: settings.memory_mib,
        cmdline: ready.manifest.image.cmdline.clone(),
        probe: ready.manifest.image.test,
    };
    Ok(Plan {
        machine,
        ready,
        qemu: config.qemu.clone(),
        relay: config.relay()?,
        console_log: store.console_log(),
        probe_socket: config.probe_socket.clone(),
        tap: config.tap.clone(),
        times: Times::new(accelerator),
    })
}

/// Whether the policy lets this release start.
pub(crate) fn allowed(bundle: &Bundle, manifest: &Manifest) -> Result<(), StartError> {
    let (settings, image) = (&bundle.settings, &manifest.image);
    if manifest.version < bundle.min_release {
        return Err(StartError::OldRelease { version: manifest.version, floor: bundle.min_release });
    }
    if image.test && !settings.allow_test_image {
        return Err(StartError::TestImage);
    }
    if settings.memory_mib < image.memory_mib_min {
        return Err(StartError::Memory { needed: image.memory_mib_min, given: settings.memory_mib });
    }
    Ok(())
}

/// How a machine that does not run any more ended.
fn outcome(status: &Status) -> Done {
    if let Some(failure) = &status.not_started {
        return Done::new(failure.exit, failure.words.clone());
    }
    let Some(stop) = &status.stop else { return Done::new(Exit::Failed, "the work VM does not run") };
    let mut words = stop.words.clone();
    if stop.inferred {
        words.push_str(" (Kontor concludes this; the work VM itself did not say.)");
    }
    if !stop.detail.is_empty() {
        words.push_str(" Detail: ");
        words.push_str(&stop.detail);
    }
    if let Some(office) = &status.office {
        words.push_str(" The office: ");
        words.push_str(office);
    }
    Done { exit: stop.exit, words, reason: Some(stop.reason.clone()), inferred: stop.inferred }
}
