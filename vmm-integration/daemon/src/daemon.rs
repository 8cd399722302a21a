//! kontord: one device, at most one virtual machine at a time, and the verbs on both.

use crate::{
    config::{Config, ConfigError},
    console,
    control_group::Delegated,
    doctor,
    exit::{Exit, chain},
    fetch::store_exit,
    host::{Accelerator, KvmVerdict, Trial, unix_now, uptime_s},
    lease::{Asker, Running},
    office::HttpsOffice,
    qemu,
    session::{Stop, Times, Witness},
    sleep::Sleep,
    slots::{self, Ready, SlotError},
    status::{Failure, State, Status, StopNote},
    store::{CutShort, Store, StoreError},
    verbs::{Answer, Answers, Done, Request},
    vm::{self, Command, Plan, VmError},
};
use kontor_bundle::Bundle;
use kontor_release::Manifest;
use kontor_wire::reason::StopReason;
use std::{io, sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Most processors of a work VM.
const CPUS_MAX: usize = 4;
/// Most processors of an emulated one. Linux patches its own code while it boots, and QEMU's emulator now and then
/// lets another processor run into the middle of that: one boot of a hundred with two processors ended in
/// `Oops: int3`.
const CPUS_EMULATED_MAX: usize = 1;
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
        "no guest runs on KVM here, and the policy does not allow emulation; enable virtualisation in the firmware, and see kontor doctor"
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
            Self::Store(error) => store_exit(error),
            Self::Slot(SlotError::Empty)
            | Self::OldRelease { .. }
            | Self::TestImage
            | Self::NoKvm
            | Self::Memory { .. } => Exit::HostLacks,
            Self::Slot(error) => error.exit(),
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
    delegated: Option<Delegated>,
    life: Mutex<Life>,
    /// Held by whoever tries KVM, a start or the doctor: what one finds out the next need not try.
    trying: Mutex<()>,
}

#[derive(Debug)]
enum Life {
    /// None was started yet.
    Idle,
    /// The last that was started; it may have ended.
    Machine { machine: Machine, task: JoinHandle<()> },
    /// kontord ends; none is started any more.
    Closing,
}

/// What one needs to steer and follow a machine.
#[derive(Debug, Clone)]
struct Machine {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
}

impl Daemon {
    /// A service without a machine; `delegated` is where control groups may be made.
    #[must_use]
    pub fn new(config: Config, store: Store, user_mode: bool, delegated: Option<Delegated>) -> Self {
        Self { config, store, user_mode, delegated, life: Mutex::new(Life::Idle), trying: Mutex::new(()) }
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

    /// Starts a machine unless one runs, and follows it until its session runs or it ended.
    async fn start(self: &Arc<Self>, to: &mut Answers) -> io::Result<Done> {
        let mut status = match self.machine().await {
            Ok(machine) => machine.status,
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
                return Ok(Done::new(Exit::Failed, "kontord failed; see its log"));
            }
        }
    }

    /// The machine that runs, or else a new one. One on its way out is waited for.
    async fn machine(self: &Arc<Self>) -> Result<Machine, Done> {
        loop {
            let mut life = self.life.lock().await;
            let leaving = match &mut *life {
                Life::Closing => return Err(Done::new(Exit::Failed, "kontord ends")),
                Life::Idle => None,
                Life::Machine { task, .. } if task.is_finished() => None,
                Life::Machine { machine, .. } => match machine.status.borrow().state {
                    State::Starting | State::Booting | State::Running => return Ok(machine.clone()),
                    State::Stopping => Some(machine.clone()),
                    State::Off | State::Stopped | State::NotStarted => None,
                },
            };
            match leaving {
                Some(mut machine) => {
                    drop(life);
                    // An error says that it is gone, too.
                    let _ = machine.status.wait_for(|status| !status.is_alive()).await;
                }
                None => {
                    let (machine, task) = self.begin();
                    *life = Life::Machine { machine: machine.clone(), task };
                    return Ok(machine);
                }
            }
        }
    }

    fn begin(self: &Arc<Self>) -> (Machine, JoinHandle<()>) {
        let starting = Status { state: State::Starting, ..Status::off(self.user_mode) };
        let (status_tx, status) = watch::channel(starting);
        let (commands, orders) = mpsc::channel(COMMANDS_MAX);
        let task = tokio::spawn(Arc::clone(self).live(orders, status_tx));
        (Machine { commands, status }, task)
    }

    /// One machine, from the checks before it to its end.
    async fn live(self: Arc<Self>, commands: mpsc::Receiver<Command>, status: watch::Sender<Status>) {
        if let Err(error) = self.run(commands, &status).await {
            let words = chain(&error);
            tracing::warn!(words, "the work VM was not started");
            let failure = Failure { words, exit: error.exit() };
            status.send_modify(|status| {
                status.state = State::NotStarted;
                status.not_started = Some(failure);
            });
        }
    }

    async fn run(
        &self,
        mut commands: mpsc::Receiver<Command>,
        status: &watch::Sender<Status>,
    ) -> Result<(), StartError> {
        let started = Instant::now();
        self.store.require_room()?;
        let mut plan = self.plan(Accelerator::best(&self.config.kvm)).await?;
        if !plan.machine.accelerator.is_emulation() {
            let works = tokio::select! {
                works = self.kvm_works(&plan) => works?,
                () = vm::stopped(&mut commands) => return Err(VmError::Stopped.into()),
            };
            if !works {
                plan = self.plan(Accelerator::Tcg).await?;
            }
        }
        let asker = Asker {
            store: self.store.clone(),
            office: HttpsOffice::new(self.config.office.clone(), self.store.clone()),
            running: Running::of(&plan.ready.manifest, plan.machine.accelerator),
            clock: unix_now,
        };
        let sleep = Sleep::of_host().map_err(VmError::Channels)?;
        self.store.mark_running()?;
        let ran = vm::run(plan, asker, sleep, started, commands, status).await;
        // Nothing is awaited in between, so whoever is told of the end finds the mark gone.
        if let Err(error) = self.store.clear_running() {
            tracing::warn!(words = chain(&error), "the work VM's end is not taken note of");
        }
        Ok(ran?)
    }

    async fn plan(&self, accelerator: Accelerator) -> Result<Plan, StartError> {
        let (config, store) = (self.config.clone(), self.store.clone());
        let planning = tokio::task::spawn_blocking(move || plan(&config, &store, accelerator));
        let plan = planning.await.map_err(|error| VmError::Channels(io::Error::other(error)))??;
        Ok(Plan { delegated: self.delegated.clone(), ..plan })
    }

    /// Whether KVM runs a guest. Tried once in each boot of the host, and again after a while if nothing
    /// came of it.
    async fn kvm_works(&self, plan: &Plan) -> Result<bool, StartError> {
        let known = || self.store.kvm_verdict().filter(|verdict| verdict.stands(uptime_s()));
        let trial = match known() {
            Some(verdict) => verdict.trial,
            None => self.try_kvm(&plan.ready, known).await?,
        };
        Ok(trial == Trial::Works)
    }

    /// Tries KVM, unless `known` has a verdict by the time that nobody else tries.
    async fn try_kvm(
        &self,
        ready: &Ready,
        known: impl Fn() -> Option<KvmVerdict>,
    ) -> Result<Trial, StartError> {
        let _one_at_a_time = match self.trying.try_lock() {
            Ok(first) => first,
            Err(_) => {
                tracing::debug!("a trial of KVM is waited for");
                self.trying.lock().await
            }
        };
        if let Some(verdict) = known() {
            return Ok(verdict.trial);
        }
        let jailer = self.config.jail()?;
        let trial = vm::kvm_runs_a_guest(&jailer, &self.config.qemu, self.delegated.as_ref(), ready).await?;
        tracing::info!(?trial, "KVM was tried with a guest");
        let verdict = KvmVerdict::after(self.store.kvm_verdict(), trial, uptime_s());
        self.store.remember_kvm_verdict(verdict)?;
        Ok(trial)
    }

    /// For the doctor: tries KVM unless it is known to work, or a machine runs, which the trial would compete with.
    pub(crate) async fn try_kvm_again(&self) -> Result<(), StartError> {
        let before = self.store.kvm_verdict();
        let works = before.is_some_and(|verdict| verdict.trial == Trial::Works);
        if works || self.is_alive().await || Accelerator::best(&self.config.kvm).is_emulation() {
            return Ok(());
        }
        let (config, store) = (self.config.clone(), self.store.clone());
        let opening = tokio::task::spawn_blocking(move || slots::open(&store, &config.release_root));
        let ready = opening.await.map_err(|error| VmError::Channels(io::Error::other(error)))??;
        // Whatever was found out since then is fresh enough.
        let known = || self.store.kvm_verdict().filter(|verdict| Some(*verdict) != before);
        self.try_kvm(&ready, known).await.map(|_| ())
    }

    /// The machine that was started last.
    async fn last(&self) -> Option<Machine> {
        match &*self.life.lock().await {
            Life::Machine { machine, .. } => Some(machine.clone()),
            Life::Idle | Life::Closing => None,
        }
    }

    /// Whether a machine runs, or is about to.
    pub(crate) async fn is_alive(&self) -> bool {
        self.last().await.is_some_and(|machine| machine.status.borrow().is_alive())
    }

    async fn stop(&self) -> Done {
        let Some(mut machine) = self.last().await.filter(|machine| machine.status.borrow().is_alive()) else {
            return Done::ok("the work VM does not run");
        };
        // An error says that it has ended meanwhile.
        let _ = machine.commands.send(Command::Stop).await;
        match machine.status.wait_for(|status| !status.is_alive()).await {
            Ok(status) => Done { exit: Exit::Ok, ..outcome(&status) },
            Err(_) => Done::new(Exit::Failed, "kontord failed; see its log"),
        }
    }

    /// The status with fresh counters.
    async fn status(&self) -> Status {
        let Some(machine) = self.last().await else { return self.before() };
        if machine.status.borrow().is_alive() {
            let (done, refreshed) = oneshot::channel();
            let _ = machine.commands.try_send(Command::Refresh(done));
            let _ = timeout(COUNTERS, refreshed).await;
        }
        let status = machine.status.borrow();
        status.clone()
    }

    /// The status before any machine was started: how the last one ended, if kontord did not see it.
    fn before(&self) -> Status {
        let off = Status::off(self.user_mode);
        let Some(cut_short) = self.store.cut_short() else { return off };
        let detail = match cut_short {
            CutShort::Kontord => "kontord was killed while the work VM ran, and took it down with it",
            CutShort::Host => "the PC went off while the work VM ran",
        };
        let (reason, witness) = (StopReason::Vanished, Witness::Inferred);
        let stop = StopNote::from(&Stop { reason, witness, detail: detail.to_owned() });
        Status { state: State::Stopped, stop: Some(stop), ..off }
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
        let life = std::mem::replace(&mut *self.life.lock().await, Life::Closing);
        let Life::Machine { machine: Machine { commands, .. }, mut task } = life else { return };
        let _ = commands.send(Command::Stop).await;
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
pub fn plan(config: &Config, store: &Store, accelerator: Accelerator) -> Result<Plan, StartError> {
    let key = store.host_key()?;
    let records = store.records(&key.public())?;
    let manifest = slots::describe(store, &config.release_root)?;
    allowed(&records.bundle, &manifest, accelerator)?;
    let settings = &records.bundle.settings;
    let cpus_max = if accelerator.is_emulation() { CPUS_EMULATED_MAX } else { CPUS_MAX };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from).min(cpus_max);
    let ready = slots::open(store, &config.release_root)?;
    // What was decided above was decided about this very release, or it is not started.
    if ready.manifest != manifest {
        return Err(SlotError::Changed.into());
    }
    let machine = qemu::Machine {
        accelerator,
        cpus,
        memory_mib: settings.memory_mib,
        cmdline: ready.manifest.image.cmdline.clone(),
        uplink: config.uplink,
        probe: ready.manifest.image.test,
    };
    Ok(Plan {
        machine,
        ready,
        qemu: config.qemu.clone(),
        relay: config.relay()?,
        jail: config.jail()?,
        delegated: None,
        console_log: store.console_log(),
        probe_socket: config.probe_socket.clone(),
        tap: config.tap.clone(),
        times: Times::new(accelerator),
    })
}

/// Whether the policy lets this release start.
pub(crate) fn allowed(
    bundle: &Bundle,
    manifest: &Manifest,
    accelerator: Accelerator,
) -> Result<(), StartError> {
    let (settings, image) = (&bundle.settings, &manifest.image);
    Running::of(manifest, accelerator).allowed_by(bundle)?;
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
