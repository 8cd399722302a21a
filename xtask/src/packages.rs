//! The Debian packages that the tasks need. Nothing of the project is installed by them.

use crate::run::{Error, Result, openly, quietly};
use std::process::Command;

/// What building, the office of the demo and the work VM need.
const NEEDED: &[&str] = &[
    "busybox",
    "ca-certificates",
    "dnsmasq-base",
    "gcc",
    "iproute2",
    "iputils-ping",
    "libc6-dev",
    "mmdebstrap",
    "mount",
    "procps",
    "qemu-system-x86",
    "uidmap",
    "util-linux",
    "wireguard-tools",
    "xz-utils",
];

/// Installs what is missing: as root itself, otherwise by `sudo`; names it where neither works.
pub(crate) fn ensure() -> Result<()> {
    let missing: Vec<&str> = NEEDED.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing Debian packages: {}", missing.join(" "));
    let lists_exist = || -> Result<()> { openly(apt()?.args(["-q", "update"])) };
    let install = || -> Result<()> {
        openly(apt()?.args(["-q", "install", "-y", "--no-install-recommends"]).args(&missing))
    };
    lists_exist().and_then(|()| install()).map_err(|cause| {
        eprintln!("{}", crate::run::chain(&cause));
        Error::Packages(missing.join(" "))
    })
}

fn installed(name: &str) -> bool {
    let query = quietly(Command::new("dpkg-query").args(["-W", "-f=${Status}", name]));
    query.is_ok_and(|status| status == b"install ok installed")
}

fn apt() -> Result<Command> {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("apt-get")
    } else {
        quietly(Command::new("sudo").arg("--version"))?;
        let mut sudo = Command::new("sudo");
        sudo.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}
