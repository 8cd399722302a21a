//! `kontord`: the service that owns a device's keys, slots, QEMU and relay.

use clap::{Args, Parser, Subcommand};
use kontor_daemon::{
    config::{Config, ConfigError},
    control_group::Delegated,
    daemon::Daemon,
    exit::{Exit, chain},
    slots::{self, SlotError},
    store::{Store, StoreError},
    verbs,
};
use kontor_manual::Section;
use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};
use tokio::signal::unix::{SignalKind, signal};

/// The service behind the work VM
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve `kontor` until a signal ends it
    Run {
        #[command(flatten)]
        common: Common,
        /// Run as the employee, for development: the keys are then no safer than the employee's files
        #[arg(long)]
        user: bool,
    },
    /// Print this host's public key for the device, making the key first where there is none
    HostKey {
        #[command(flatten)]
        common: Common,
    },
    /// Verify and store what the device needs before its first start
    Provision {
        #[command(flatten)]
        common: Common,
        /// Keysets in rising order, the first of the tenant first
        #[arg(long, required = true, num_args = 1..)]
        keyset: Vec<PathBuf>,
        /// The device record
        #[arg(long)]
        device: PathBuf,
        /// The bundle of the device's line
        #[arg(long)]
        bundle: PathBuf,
    },
    /// Fetch the newest release, verify and install it
    Install {
        #[command(flatten)]
        common: Common,
        /// The release repository: a directory, or a file: URL
        #[arg(long, value_name = "DIR_OR_URL")]
        repo: String,
    },
}

#[derive(Debug, Args)]
struct Common {
    /// The configuration file
    #[arg(long)]
    config: PathBuf,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("install a release from {repo}")]
    Install { repo: String, source: SlotError },
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("name the employee's uid as `owner` in the configuration, or run with --user")]
    NoOwner,
    #[error("with --user the owner is the user who runs kontord; remove `owner` from the configuration")]
    OwnerInUserMode,
    #[error("serve kontor on {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("write to standard output")]
    Stdout(#[source] io::Error),
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
}

impl Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Config(_) | Self::NoOwner | Self::OwnerInUserMode => Exit::Usage,
            Self::Store(error) if error.is_missing() || error.is_full() => Exit::HostLacks,
            Self::Store(StoreError::Busy(_) | StoreError::Io { .. }) => Exit::Failed,
            Self::Store(_) => Exit::NotVerified,
            Self::Install { source, .. } => source.exit(),
            Self::Read { .. } => Exit::Usage,
            Self::Socket { .. } | Self::Stdout(_) | Self::Runtime(_) => Exit::Failed,
        }
    }
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KONTOR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    let cli: Cli = kontor_manual::parse(env!("CARGO_BIN_NAME"), Section::Services);
    match dispatch(cli.command) {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            tracing::error!("{}", chain(&error));
            error.exit().into()
        }
    }
}

fn dispatch(command: Command) -> Result<(), Error> {
    match command {
        Command::Run { common, user } => run(&common, user),
        Command::HostKey { common } => {
            let (_, store) = open(&common)?;
            say(&store.make_host_key()?.public().to_string())
        }
        Command::Provision { common, keyset, device, bundle } => {
            let (_, store) = open(&common)?;
            let keysets = keyset.iter().map(|path| document(path)).collect::<Result<Vec<_>, _>>()?;
            let records = store.provision(&keysets, &document(&device)?, &document(&bundle)?)?;
            let (keyset, revision) = (records.keyset.version(), records.bundle.revision);
            say(&format!("stored: keyset {keyset}, device {}, bundle {revision}", records.device.device))
        }
        Command::Install { common, repo } => {
            let (config, store) = open(&common)?;
            let installed = slots::install(&store, &config.release_root, &repo)
                .map_err(|source| Error::Install { repo, source })?;
            say(&format!("installed: {} (version {})", installed.image.release, installed.version))
        }
    }
}

fn open(common: &Common) -> Result<(Config, Store), Error> {
    let config = Config::read(&common.config)?;
    let store = Store::open(&config.state, config.tenant, config.device.clone())?;
    Ok((config, store))
}

fn document(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}

fn say(line: &str) -> Result<(), Error> {
    writeln!(io::stdout().lock(), "{line}").map_err(Error::Stdout)
}

fn run(common: &Common, user: bool) -> Result<(), Error> {
    let (config, store) = open(common)?;
    let own = rustix::process::geteuid().as_raw();
    let owner = match (config.owner, user) {
        (Some(owner), false) => owner,
        (None, true) => own,
        (None, false) => return Err(Error::NoOwner),
        (Some(_), true) => return Err(Error::OwnerInUserMode),
    };
    let _claim = store.claim()?;
    let socket = config.socket.clone();
    let delegated = Delegated::take().unwrap_or_else(|error| {
        tracing::warn!(%error, "control groups cannot be used");
        None
    });
    let daemon = Arc::new(Daemon::new(config, store, user, delegated));
    // One thread: children die with the thread that started them, so it has to be the one that stays.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let served = runtime.block_on(serve(&socket, owner, daemon));
    let _ = fs::remove_file(&socket);
    served.map_err(|source| Error::Socket { path: socket, source })
}

async fn serve(socket: &Path, owner: u32, daemon: Arc<Daemon>) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = verbs::listen(socket, owner)?;
    tracing::info!(socket = %socket.display(), "kontord is ready");
    let served = tokio::select! {
        served = verbs::serve(listener, owner, Arc::clone(&daemon)) => served,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    tracing::info!("kontord ends");
    let hurry = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    daemon.close(hurry).await;
    served
}
