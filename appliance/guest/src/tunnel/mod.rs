//! `kontor-tunnel`: WireGuard between the TUN interface and the uplink.
//!
//! ```text
//!   TUN (4) ──packet──► kontor_vpn::Tunnel ──datagram──► uplink (3) ──frame──► relay
//!           ◄─packet───                    ◄─datagram──             ◄─frame───
//!                            ▲ configure, close
//!                            │ up, down, failed
//!                        kontor-init (5)
//! ```
//!
//! The uplink is a virtio-serial port, or two descriptors of VFIO, the second of them behind the others (6).
//!
//! It starts with these descriptors and no power, gives up what is left of it before it reads a byte
//! ([`confine`]), and trusts no byte of the uplink. One thread; nothing blocks but the wait for the next event.

mod confine;
mod engine;
pub(crate) mod uplink;

use crate::link::{FromTunnel, Link, TunnelFault};
use crate::{sys, vfio};
use confine::{ConfineError, confine};
use engine::{Engine, EngineError, Summary};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use uplink::{Port, Uplink, VfioError, open_vfio};

/// What the uplink's descriptors are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A virtio-serial port.
    Port,
    /// A network device behind VFIO: its container, and the device itself.
    Vfio,
}

/// The argument that says [`Backend::Vfio`]; without any it is [`Backend::Port`].
pub(crate) const VFIO: &str = "vfio";

impl Backend {
    /// Reads the process's arguments; `None` when there is one that is not known.
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        match (arguments.next().as_deref(), arguments.next()) {
            (None, _) => Some(Self::Port),
            (Some(VFIO), None) => Some(Self::Vfio),
            (Some(_), _) => None,
        }
    }
}

/// Why the process ends; the coarse part goes to init, this to the console.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// A descriptor is missing.
    #[error("take the descriptors that init passes")]
    Inherit(#[source] io::Error),
    /// The kernel refused what it never should.
    #[error("prepare")]
    Prepare(#[source] io::Error),
    /// The network device is not there as it should be.
    #[error("open the uplink's device")]
    Vfio(#[source] VfioError),
    /// Power that it was started with could not be given up.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// Something failed while it ran.
    #[error(transparent)]
    Run(#[from] EngineError),
}

/// Runs until init closes it, or something fails. What was lost meanwhile is in the answer.
///
/// # Errors
/// [`TunnelError`]; init has been told the coarse reason then.
pub fn run(backend: Backend) -> Result<Summary, TunnelError> {
    let [uplink, tun, link] = [sys::inherited(0), sys::inherited(1), sys::inherited(2)];
    let device = match backend {
        Backend::Port => None,
        Backend::Vfio => Some(sys::inherited(3)),
    };
    let link = Link::inherited(link.map_err(TunnelError::Inherit)?);
    let result = open(uplink, tun, device).and_then(|(uplink, tun)| match uplink {
        Opened::Port(port) => serve(&link, port, tun),
        Opened::Vfio(device) => serve(&link, *device, tun),
    });
    if let Err(error) = &result {
        // Init sees the process end in any case.
        let _ = link.send(&FromTunnel::Failed(error.fault()));
    }
    result
}

/// The uplink's device, open.
enum Opened {
    Port(Port),
    Vfio(Box<uplink::Vfio>),
}

fn open(
    uplink: io::Result<OwnedFd>,
    tun: io::Result<OwnedFd>,
    device: Option<io::Result<OwnedFd>>,
) -> Result<(Opened, OwnedFd), TunnelError> {
    let uplink = uplink.map_err(TunnelError::Inherit)?;
    let tun = tun.map_err(TunnelError::Inherit)?;
    let opened = match device {
        None => {
            sys::do_not_block(uplink.as_fd()).map_err(TunnelError::Prepare)?;
            Opened::Port(Port::new(uplink))
        }
        Some(device) => {
            let device = vfio::Device::inherited(device.map_err(TunnelError::Inherit)?);
            let container = vfio::Container::inherited(uplink);
            let opened = open_vfio(container, device).map_err(TunnelError::Vfio)?;
            Opened::Vfio(Box::new(opened))
        }
    };
    Ok((opened, tun))
}

fn serve(link: &Link, uplink: impl Uplink, tun: OwnedFd) -> Result<Summary, TunnelError> {
    for file in [tun.as_fd(), link.as_fd()] {
        sys::do_not_block(file).map_err(TunnelError::Prepare)?;
    }
    let engine = Engine::new(link, uplink, tun)?;
    // Not a byte was read so far, and the uplink's device not spoken to.
    confine()?;
    Ok(engine.run()?)
}

impl TunnelError {
    fn fault(&self) -> TunnelFault {
        match self {
            Self::Inherit(_) | Self::Prepare(_) | Self::Confine(_) => TunnelFault::Start,
            Self::Vfio(_) => TunnelFault::Uplink,
            Self::Run(error) => error.fault(),
        }
    }
}

impl EngineError {
    fn fault(&self) -> TunnelFault {
        match self {
            Self::Uplink(_) => TunnelFault::Uplink,
            Self::Tun(_) => TunnelFault::Tun,
            Self::Link(_) | Self::Configured => TunnelFault::Link,
            Self::Config(_) | Self::Random(_) | Self::Wait(_) => TunnelFault::Start,
            Self::Gateway(_) => TunnelFault::GatewayKey,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::engine::tests::{Ends, World};
    use super::*;
    use crate::link::ToTunnel;
    use command_fds::{CommandFdExt, FdMapping};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, Command, Stdio};

    /// Says to this test program, started again, that it is the tunnel's process.
    const ROLE: &str = "KONTOR_GUEST_TEST_ROLE";
    const NOBODY: u32 = 65_534;

    /// Not a test: the tunnel's process of those below, which start this program again for it.
    #[test]
    #[ignore = "started by other tests"]
    fn process() {
        match std::env::var(ROLE).as_deref() {
            Ok("tunnel") => std::process::exit(i32::from(run(Backend::Port).is_err())),
            Ok("opens a file") => {
                confine().unwrap();
                drop(std::fs::File::open("/dev/null"));
                std::process::exit(0);
            }
            Ok(_) | Err(_) => {}
        }
    }

    /// Starts the process as nobody; `None`, which is no pass, where that is not possible.
    fn start(role: &str, ends: Ends) -> Option<Child> {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: needs root to become somebody without power");
            return None;
        }
        let link = std::os::fd::AsFd::as_fd(&ends.link).try_clone_to_owned().unwrap();
        let files = [ends.uplink, ends.tun, link];
        let mappings =
            files.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--ignored", "tunnel::tests::process"]).env(ROLE, role);
        command.uid(NOBODY).gid(NOBODY).stdout(Stdio::null()).stderr(Stdio::null());
        command.fd_mappings(mappings.collect()).unwrap();
        match command.spawn() {
            Ok(child) => Some(child),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: nobody may not execute this test program");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn process_without_any_power_carries_packets() {
        let (mut world, ends) = World::new();
        let Some(mut child) = start("tunnel", ends) else { return };
        assert_eq!(world.heard(), FromTunnel::Ready);
        // The thread that the test program runs the tunnel in; another one waits for it.
        let powers =
            ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"];
        let threads = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        let mut statuses =
            threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
        assert!(statuses.any(|status| powers.iter().all(|line| status.contains(line))));
        world.shake_hands();
        world.exchange();
        world.init.send(&ToTunnel::Close).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    #[test]
    fn process_that_opens_a_file_is_killed() {
        let (_world, ends) = World::new();
        let Some(mut child) = start("opens a file", ends) else { return };
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGSYS));
    }

    #[test]
    fn only_the_known_argument_is_taken() {
        let of = |words: &[&str]| Backend::from_arguments(words.iter().map(|word| (*word).to_owned()));
        assert_eq!(of(&[]), Some(Backend::Port));
        assert_eq!(of(&["vfio"]), Some(Backend::Vfio));
        assert_eq!((of(&["port"]), of(&["vfio", "vfio"]), of(&[""])), (None, None, None));
    }

    #[test]
    fn root_is_refused() {
        if rustix::process::getuid().is_root() {
            assert!(matches!(confine(), Err(ConfineError::Root)));
        }
    }
}
