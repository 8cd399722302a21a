//! A small internet on this machine, for as long as one process lives.
//!
//! ```text
//!   home (the employee's PC)      net (a router)             office
//!   10.44.1.2 ───────────── 10.44.1.1   203.0.113.1 ───────────── 203.0.113.2
//!                           a neighbour's address                 intranet 10.88.0.10 (behind the gateway)
//!                           on the home LAN
//! ```
//!
//! All three are network namespaces inside one outer user, mount and process-id namespace, which
//! `unshare` makes: when its first process ends, the kernel ends everything in it.

use crate::{
    build::Plan,
    run::{Result, at, quietly},
};
use rustix::{
    fs::Mode,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use std::{
    env, fs, io,
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

/// What the inside is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    Demo,
    Suite,
    BenchBoot,
}

/// One of the three hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    Home,
    Net,
    Office,
}

/// The interface by which packets leave the employee's PC.
pub(crate) const HOME_LINK: &str = "home0";
/// The home router's hardware address: what bears it as its source comes into the PC, all else leaves.
pub(crate) const ROUTER_HARDWARE: [u8; 6] = [0x02, 0, 0, 0x10, 0x44, 0x01];
/// The employee's PC on its LAN.
pub(crate) const HOME_ADDRESS: &str = "10.44.1.2";
/// The home router, which is also every other device on the employee's LAN.
pub(crate) const LAN_NEIGHBOUR: &str = "10.44.1.1";
/// The gateway as the internet sees it.
pub(crate) const OFFICE_ADDRESS: &str = "203.0.113.2";
/// The intranet's web server, reachable only through the gateway.
pub(crate) const INTRANET_ADDRESS: &str = "10.88.0.10";

impl Host {
    const ALL: [Self; 3] = [Self::Home, Self::Net, Self::Office];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Net => "net",
            Self::Office => "office",
        }
    }

    /// The file that stands for the host's network namespace.
    pub(crate) fn namespace(self) -> String {
        format!("/run/netns/{}", self.name())
    }

    /// Moves the calling thread to this host's network for good.
    pub(crate) fn enter(self) -> io::Result<()> {
        let namespace = fs::File::open(self.namespace())?;
        Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// A command that will run on this host, as root of the outer namespace.
    pub(crate) fn command(self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace())).arg("--").arg(program.as_ref());
        command
    }

    /// A command that will run on this host as `user` with no more than `power`.
    pub(crate) fn command_of(self, user: User, power: Power, program: impl AsRef<Path>) -> Command {
        let inner = user.command(power, program);
        let mut command = self.command(inner.get_program());
        command.args(inner.get_args());
        command
    }

    fn ip(self, arguments: &str) -> Result<()> {
        quietly(self.command("ip").args(arguments.split_ascii_whitespace())).map(drop)
    }
}

/// Where a run keeps its files: memory of the outer mount namespace, gone with it.
pub(crate) const SCRATCH: &str = "/run/kontor";

/// Who a service runs as. Where the outer namespace has one uid only, all are its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum User {
    Gateway,
    Control,
    Web,
    Resolver,
    /// Of the home PC: `kontord` and `kontor`.
    Employee,
}

/// What little of root's power a service needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    None,
    /// Interfaces and routes.
    NetAdmin,
    /// Ports below 1024.
    LowPorts,
}

impl User {
    /// The uid, which is the gid too, in the outer namespace.
    fn id(self) -> u32 {
        match self {
            Self::Gateway => 201,
            Self::Control => 202,
            Self::Web => 203,
            Self::Resolver => 204,
            Self::Employee => 1001,
        }
    }

    /// A command of this user's with no more than `power`.
    pub(crate) fn command(self, power: Power, program: impl AsRef<Path>) -> Command {
        let program = program.as_ref();
        if !separate() {
            return Command::new(program);
        }
        let id = self.id().to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id]);
        // The gateway's socket is open to its group.
        match self {
            Self::Control => command.arg(format!("--groups={}", Self::Gateway.id())),
            Self::Gateway | Self::Web | Self::Resolver | Self::Employee => command.arg("--clear-groups"),
        };
        let powers = match power {
            Power::None => "-all",
            Power::NetAdmin => "-all,+net_admin",
            Power::LowPorts => "-all,+net_bind_service",
        };
        // A person may start programs that make them more; a service may not.
        let sets = ["--inh-caps", "--ambient-caps", "--bounding-set"];
        for set in &sets[..if self == Self::Employee { 2 } else { 3 }] {
            command.arg(format!("{set}={powers}"));
        }
        command.arg("--");
        let beside = program.canonicalize().ok().filter(|path| path.parent() == Some(own_directory()));
        match beside.as_deref().and_then(Path::file_name) {
            Some(name) => command.arg(Path::new(PROGRAMS).join(name)),
            None => command.arg(program),
        };
        command
    }

    /// Makes a file, or a directory and all in it, this user's.
    pub(crate) fn owns(self, path: &Path) -> Result<()> {
        if !separate() {
            return Ok(());
        }
        let id = self.id();
        quietly(Command::new("chown").arg("-R").arg(format!("{id}:{id}")).arg(path)).map(drop)
    }
}

/// Where the users of the outer namespace find the programs: the directory itself may lie in somebody's home.
const PROGRAMS: &str = "/run/kontor-programs";

/// Where this program lies, and those of the project beside it.
fn own_directory() -> &'static Path {
    static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
        let own = env::current_exe().unwrap_or_default();
        own.parent().map(Path::to_owned).unwrap_or_default()
    });
    &DIRECTORY
}

/// Whether the outer namespace, in which this process is, has uids enough, and the programs are open to all.
fn separate() -> bool {
    static SEPARATE: LazyLock<bool> = LazyLock::new(|| {
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let count = |line: &str| line.split_ascii_whitespace().nth(2)?.parse::<u64>().ok();
        let mapped: u64 = map.lines().filter_map(count).sum();
        let open = own_directory().metadata().is_ok_and(|m| m.permissions().mode() & 0o005 == 0o005);
        mapped > u64::from(User::Employee.id()) && open
    });
    *SEPARATE
}

/// The command that runs this program again as `role` inside the outer namespaces. They end with this process,
/// however it ends.
pub(crate) fn command(role: Role, plan: &Plan, rest: &[String]) -> Result<Command> {
    // Not this process's own file: building the workspace may have replaced it.
    let own = plan.bin.join("xtask");
    let role = match role {
        Role::Demo => "demo",
        Role::Suite => "suite",
        Role::BenchBoot => "bench-boot",
    };
    // The first process of a process-id namespace hears no SIGINT, and `unshare` waits for it.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig=KILL", "--", "unshare"]).args(USERS);
    if has_range() {
        command.arg(RANGE);
    }
    command.args(["--net", "--mount", "--ipc", "--uts", "--pid"]);
    command.args(["--mount-proc", "--fork", "--kill-child=SIGKILL", "--"]);
    command.arg(own).args(["inside", role, Plan::STDIN, "--"]).args(rest).stdin(plan.as_stdin()?);
    let search = env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{search}:{SYSTEM_PATH}"));
    Ok(command)
}

/// Where Debian keeps programs that an ordinary user's `PATH` leaves out.
const SYSTEM_PATH: &str = "/usr/sbin:/sbin";
const USERS: [&str; 2] = ["--user", "--map-root-user"];
/// Maps the caller's subordinate ids too (subuid(5)), by the programs of the package `uidmap`.
const RANGE: &str = "--map-auto";

/// Whether the caller has subordinate ids. Without, all in the outer namespace runs under one uid.
fn has_range() -> bool {
    quietly(Command::new("unshare").args(USERS).arg(RANGE).arg("true")).is_ok()
}

/// Gives the employee's PC the address `to` on its LAN in place of `from`, as another router would. In between it
/// has no way out.
pub(crate) fn move_home(from: &str, to: &str) -> Result<()> {
    let home = Host::Home;
    home.ip(&format!("address del {from}/24 dev {HOME_LINK}"))?;
    home.ip(&format!("address add {to}/24 dev {HOME_LINK}"))?;
    home.ip(&format!("route add default via {LAN_NEIGHBOUR}"))
}

/// Makes the three hosts and their links. Call it once, inside.
pub(crate) fn make() -> Result<()> {
    quietly(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"]))?;
    // What is made here is for all its users, whatever the caller's habits.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    for directory in [SCRATCH, PROGRAMS].map(Path::new) {
        fs::create_dir(directory).map_err(at("create", directory))?;
    }
    quietly(Command::new("mount").arg("--bind").arg(own_directory()).arg(PROGRAMS))?;
    for host in Host::ALL {
        quietly(Command::new("ip").args(["netns", "add", host.name()]))?;
        host.ip("link set lo up")?;
    }
    let net = Host::Net;
    net.ip("link add lan0 type veth peer name home0 netns /run/netns/home")?;
    net.ip("link add wan0 type veth peer name office0 netns /run/netns/office")?;
    let hardware = ROUTER_HARDWARE.map(|b| format!("{b:02x}")).join(":");
    net.ip(&format!("link set lan0 address {hardware}"))?;
    net.ip("address add 10.44.1.1/24 dev lan0")?;
    net.ip("address add 203.0.113.1/24 dev wan0")?;
    net.ip("link set lan0 up")?;
    net.ip("link set wan0 up")?;
    quietly(net.command("sysctl").args(["-qw", "net.ipv4.ip_forward=1"]))?;
    Host::Home.ip("address add 10.44.1.2/24 dev home0")?;
    Host::Home.ip("link set home0 up")?;
    Host::Home.ip("route add default via 10.44.1.1")?;
    let office = Host::Office;
    office.ip("address add 203.0.113.2/24 dev office0")?;
    office.ip("link set office0 up")?;
    office.ip("route add default via 203.0.113.1")?;
    office.ip("address add 10.88.0.10/32 dev lo")?;
    office.ip("address add fd88::10/128 dev lo")
}
