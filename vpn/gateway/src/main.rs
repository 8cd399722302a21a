//! `kontor-gateway`: the office end of the tunnel.
//!
//! Three threads: the data path (`plane`), which holds all peers, admission, which verifies leases (`office`)
//! and remembers them (`store`) before it has a peer made, and the post, which guests say hello to through the
//! tunnel before anything else of theirs passes. CAP_NET_ADMIN is needed to make the TUN, and dropped
//! with everything else before the first byte from outside is read.
//!
//! Trusted: the settings, the state directory and the tenant's hash in the settings. Not trusted: control, peers, the
//! network.

mod admission;
mod config;
mod files;
mod filter;
#[cfg(test)]
#[path = "../tests/support/office.rs"]
mod fixture;
mod key;
mod office;
mod packet;
mod peers;
mod plane;
mod post;
mod socket;
mod store;
mod sys;
mod wg;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use clap::{Parser, Subcommand};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kontor_gateway::uapi::SocketError;
use kontor_manual::Section;
use kontor_trust::MAX_ENVELOPE;
use kontor_tun::Offloads;
use kontor_vpn::{PublicKey, Tunnel};
use rustix::event::EventfdFlags;
use rustix::thread::{CapabilitySet, CapabilitySets};
use tracing_subscriber::EnvFilter;

use admission::{Doorman, ListenError, Orders};
use config::{Config, ConfigError};
use files::FileError;
use key::KeyError;
use office::{Identity, Office, OpenError};
use peers::Peers;
use plane::{Leases, Plane};
use post::Post;
use socket::Sockets;
use store::{Store, StoreError};
use wg::WgError;

/// The office end of the tunnel.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the gateway until SIGTERM or SIGINT.
    Run {
        /// Settings (TOML).
        #[arg(long)]
        config: PathBuf,
    },
    /// Makes a WireGuard interface that wg(8) configures, without an office, until SIGTERM, SIGINT or the removal of
    /// its socket in /var/run/wireguard. Neither preshared keys nor marks yet.
    Wg {
        /// Name of the interface.
        interface: String,
        /// Stays in the foreground, which is the only way yet.
        #[arg(long, required = true)]
        foreground: bool,
    },
    /// Makes the gateway's key and prints its public half, which belongs into the bundles.
    Key {
        /// File to make, readable by its owner only.
        #[arg(long)]
        out: PathBuf,
    },
}

/// Why the gateway does not run, or runs no longer.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("read the first keyset")]
    FirstKeyset(#[source] FileError),
    #[error("what the gateway remembers cannot be used")]
    Open(#[from] OpenError),
    #[error("what the gateway remembers cannot be used")]
    Store(#[from] StoreError),
    #[error("the settings make no tunnel")]
    Tunnel(#[source] kontor_vpn::ConfigError),
    #[error("listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("keep the state to itself")]
    Lock(#[source] FileError),
    #[error("another gateway runs with the state in {0}")]
    Running(PathBuf),
    #[error("{step} the interface {tun} (this needs CAP_NET_ADMIN and /dev/net/tun)")]
    Tun { step: &'static str, tun: String, source: io::Error },
    #[error("{0}")]
    Kernel(&'static str, #[source] io::Error),
    #[error("the data path ended")]
    Plane(#[source] io::Error),
    #[error(transparent)]
    Wg(#[from] WgError),
    #[error("write to standard output")]
    Output(#[source] io::Error),
}

impl RunError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Tunnel(_) | Self::Wg(WgError::Socket(SocketError::Name(_))) => USAGE,
            Self::Open(OpenError::First(_) | OpenError::Keyset { .. }) => NOT_VERIFIED,
            Self::Key(_)
            | Self::FirstKeyset(_)
            | Self::Open(OpenError::Store(_))
            | Self::Store(_)
            | Self::Bind { .. }
            | Self::Listen(_)
            | Self::Lock(_)
            | Self::Running(_)
            | Self::Tun { .. }
            | Self::Wg(_)
            | Self::Kernel(..) => HOST_LACKS,
            Self::Plane(_) | Self::Output(_) => BUG,
        }
    }
}

fn main() -> ExitCode {
    let arguments: Arguments = kontor_manual::parse(env!("CARGO_BIN_NAME"), Section::Services);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_DEFAULT));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    let result = match arguments.command {
        Command::Run { config } => run(&config),
        Command::Wg { interface, foreground: _ } => wg::run(&interface).map_err(RunError::from),
        Command::Key { out } => make_key(&out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", admission::chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn make_key(out: &Path) -> Result<(), RunError> {
    let public = key::generate(out)?;
    writeln!(io::stdout().lock(), "{}", key::public_text(&public)).map_err(RunError::Output)
}

fn run(path: &Path) -> Result<(), RunError> {
    let config = Config::load(path)?;
    // Before there is a second thread, which inherits the mask.
    let signals = sys::termination().map_err(|source| RunError::Kernel("catch signals", source))?;
    let private_key = key::load(&config.key)?;
    let public_key = *PublicKey::from(&private_key).as_bytes();
    let untrusted_first = files::read(&config.keyset, MAX_ENVELOPE).map_err(RunError::FirstKeyset)?;
    let own = Identity { gateway: config.own(), public_key, v4: config.v4, v6: config.v6 };
    let store = Store::open(&config.state)?;
    // Until the end: what is done with the state and with the socket is done by one process at a time.
    let lock = files::lock(&config.state.join(LOCK)).map_err(RunError::Lock)?;
    let _lock = lock.ok_or_else(|| RunError::Running(config.state.clone()))?;
    let (office, admissions) = Office::open(own, &untrusted_first, &config.tenant, store, plane::unix_now())?;
    let seed = random().map_err(|source| RunError::Kernel("read randomness", source))?;
    let tunnel = kontor_vpn::Config {
        private_key,
        mtu: config.mtu,
        handshakes_per_s_max: config.handshakes_per_s_max,
        peers_max: config.peers_max,
        seed,
    };
    let mut tunnel = Tunnel::new(tunnel, Instant::now()).map_err(RunError::Tunnel)?;
    let sockets =
        Sockets::bind(&config.listen).map_err(|(address, source)| RunError::Bind { address, source })?;
    let tun = open_tun(&config)?;
    let own = [config.v4.into(), config.v6.into()];
    let desks = post::listen(&own).map_err(|(address, source)| RunError::Bind { address, source })?;
    let listener = admission::listen(&config.admission)?;
    drop_privileges().map_err(|source| RunError::Kernel("drop privileges", source))?;

    let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| RunError::Kernel("make an eventfd", errno.into()))?;
    let way = || match wake.try_clone() {
        Ok(wake) => Ok(Orders::new(wake)),
        Err(source) => Err(RunError::Kernel("copy an eventfd", source)),
    };
    let ((doormans, of_doorman), (posts, of_post)) = (way()?, way()?);
    let mut leases =
        Leases { peers: Peers::default(), pools: config.pools(), orders: vec![of_doorman, of_post] };
    for admission in admissions {
        let device = admission.device.clone();
        if let Err(error) = leases.peers.admit(admission, &mut tunnel, Instant::now(), plane::unix_now()) {
            tracing::warn!(%error, "a remembered peer could not be made");
            tracing::debug!(%device, "of this device");
        }
    }
    let office = Arc::new(Mutex::new(office));
    let doorman = Doorman { listener, office: Arc::clone(&office), plane: doormans };
    start("admission", move || doorman.run())?;
    let post = Post::new(desks, office, posts);
    start("post", move || post.run())?;
    tracing::info!(peers = leases.peers.len(), "ready");
    let plane = Plane::new(tunnel, leases, sockets, tun, wake, signals);
    let result = plane.run().map_err(RunError::Plane);
    let core = plane.core();
    tracing::info!(peers = core.judge.peers.len(), drops = %core.drops(), "ends");
    // A next process would replace it as well.
    let _ = std::fs::remove_file(&config.admission);
    result
}

/// Bytes that nobody else knows. The kernel gives up to 256 at once.
fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())? {
        32 => Ok(bytes),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), RunError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map(drop).map_err(|source| RunError::Kernel("start a thread", source))
}

fn open_tun(config: &Config) -> Result<(OwnedFd, Offloads), RunError> {
    let tun = config.tun.as_str();
    let error = |step| move |source| RunError::Tun { step, tun: tun.to_owned(), source };
    let made = kontor_tun::create_offloading(tun).map_err(error("make"))?;
    let addresses = [IpNet::from(Ipv4Net::from(config.v4)), IpNet::from(Ipv6Net::from(config.v6))];
    kontor_tun::configure(tun, &addresses, config.mtu).map_err(error("configure"))?;
    kontor_tun::up(tun).map_err(error("bring up"))?;
    for pool in [IpNet::V4(config.pool_v4), IpNet::V6(config.pool_v6)] {
        kontor_tun::add_route(tun, pool).map_err(error("route through"))?;
    }
    Ok(made)
}

/// Gives up every capability, for this thread and those that it starts later, and the way to get one back.
fn drop_privileges() -> io::Result<()> {
    let none = CapabilitySet::empty();
    rustix::thread::set_no_new_privs(true)?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    Ok(())
}

/// boringtun calls a peer that is switched off an error.
const LOG_DEFAULT: &str = "info,boringtun=off";
/// Locked as long as a gateway uses the state directory.
const LOCK: &str = "lock";
const BUG: u8 = 1;
const USAGE: u8 = 2;
const NOT_VERIFIED: u8 = 3;
const HOST_LACKS: u8 = 4;
const EXIT_CODES: &str = "Exit codes: 0 ok, 1 bug, 2 usage or settings, 3 a keyset does not verify, 4 the host lacks \
something (a file, the interface, an address).";
