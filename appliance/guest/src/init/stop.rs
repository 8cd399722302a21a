//! Why the guest stops, and how it does.
//!
//! Whatever happens, the host hears one reason of the closed list and then the power goes off. The
//! detail goes to the console only.

use super::control::{ControlError, send_last};
use super::events::EventsError;
use super::lease::Stale;
use super::lockdown::LockdownError;
use super::log::say;
use super::modules::ModuleError;
use super::root::{RootError, unmount_state};
use super::tenant::TenantError;
use super::uplink::UplinkError;
use super::verity::VerityError;
use crate::chain;
use crate::clock::Moment;
use crate::link::{LinkError, TunnelFault};
use crate::sys::signal_everyone;
use kontor_bundle::lease::LeaseError;
use kontor_release::CommandLineError;
use kontor_wire::control::FromGuest;
use kontor_wire::reason::StopReason;
use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions, WaitStatus, wait};
use rustix::system::{RebootCommand, reboot};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

/// How long processes may take to end when they are asked to.
const TERM_MAX: Duration = Duration::from_secs(3);
/// How long the kernel may take to end them when they are not asked.
const KILL_MAX: Duration = Duration::from_secs(2);
/// How often it is looked whether they have ended.
const REAP_EVERY: Duration = Duration::from_millis(10);

/// What ended the boot or the session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stop {
    #[error("the host asked for it")]
    Requested,
    #[error("the control channel")]
    Control(#[source] ControlError),
    #[error("the host sent {0}, which it was not asked for")]
    Unasked(&'static str),
    #[error("the kernel's command line")]
    CommandLine(#[source] CommandLineError),
    #[error("a kernel module")]
    Module(#[source] ModuleError),
    #[error("no disk appeared")]
    NoDisk,
    #[error("the root image's hashes")]
    Verity(#[source] VerityError),
    #[error("the root image")]
    Image(#[source] RootError),
    #[error("the tenant")]
    Tenant(#[source] TenantError),
    #[error("prepare the file systems")]
    Files(#[source] RootError),
    #[error("lock the kernel down")]
    Lockdown(#[source] LockdownError),
    #[error("there is no uplink")]
    NoUplink,
    #[error("the uplink")]
    Uplink(#[source] UplinkError),
    #[error("no lease came in time")]
    NoLease,
    #[error("the host has no lease")]
    Refused,
    #[error("the lease is not to be believed")]
    Lease(#[source] LeaseError),
    #[error("the gateway did not answer in time")]
    NoTunnel,
    #[error("the tunnel gave up")]
    Tunnel(#[source] TunnelFault),
    #[error("the socket to the tunnel")]
    Link(#[source] LinkError),
    #[error("the tunnel's process ended ({0})")]
    TunnelDied(End),
    #[error("something newer than the lease is known")]
    Stale(#[source] Stale),
    #[error("nothing came from the gateway for too long")]
    Silent,
    #[error("the lease ran out")]
    LeaseExpired,
    #[error("{doing}")]
    System { doing: &'static str, source: io::Error },
}

impl Stop {
    /// What the host is told.
    pub(crate) fn reason(&self) -> StopReason {
        match self {
            Self::Requested => StopReason::Requested,
            Self::Control(_) | Self::Unasked(_) => StopReason::BadControl,
            Self::CommandLine(_) => StopReason::BadCommandLine,
            Self::Module(_) => StopReason::NoModule,
            Self::NoDisk => StopReason::NoDisk,
            Self::Verity(_) | Self::Image(_) => StopReason::RootCorrupt,
            Self::Tenant(_) => StopReason::BadTenant,
            Self::Lockdown(_) => StopReason::NotLockedDown,
            Self::NoUplink | Self::Uplink(_) => StopReason::NoUplink,
            Self::NoLease | Self::Refused => StopReason::NoLease,
            Self::Lease(_) => StopReason::BadLease,
            Self::NoTunnel | Self::Silent => StopReason::NoTunnel,
            Self::Stale(_) => StopReason::Stale,
            Self::Tunnel(TunnelFault::Uplink) => StopReason::UplinkFailed,
            Self::Tunnel(
                TunnelFault::Start | TunnelFault::Link | TunnelFault::Tun | TunnelFault::GatewayKey,
            )
            | Self::Link(_)
            | Self::TunnelDied(_) => StopReason::ProcessDied,
            Self::LeaseExpired => StopReason::LeaseExpired,
            Self::Files(_) | Self::System { .. } => StopReason::Internal,
        }
    }
}

impl From<EventsError> for Stop {
    fn from(error: EventsError) -> Self {
        match error {
            EventsError::Control(error) => Self::Control(error),
            EventsError::Tunnel(error) => Self::Link(error),
            EventsError::Wait(source) => Self::System { doing: "wait for events", source },
        }
    }
}

/// How a process ended, for people.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End(pub(crate) WaitStatus);

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0.exit_status(), self.0.terminating_signal()) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => write!(f, "status {:#x}", self.0.as_raw()),
        }
    }
}

/// The control port: whoever stops the guest, from wherever, says why over it.
static LAST_WORDS: OnceLock<OwnedFd> = OnceLock::new();

/// From now on the host hears why the guest stops.
pub(crate) fn keep_for_last_words(port: OwnedFd) {
    // Called once; a second port would be the same channel.
    let _ = LAST_WORDS.set(port);
}

/// Makes a bug end like everything else: one reason, power off.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        say!("bug: {info}");
        tell(StopReason::Internal);
        power_off();
    }));
}

fn tell(reason: StopReason) {
    if let Some(port) = LAST_WORDS.get() {
        send_last(port.as_fd(), &FromGuest::Stop(reason));
    }
}

/// Ends every process, tells the host why, and turns the power off.
pub(crate) fn stop(why: &Stop) -> ! {
    say!("stop ({}): {}", why.reason().name(), chain(why));
    end_processes();
    if let Err(error) = unmount_state() {
        say!("{}", chain(&error));
    }
    rustix::fs::sync();
    tell(why.reason());
    power_off()
}

fn end_processes() {
    for (signal, limit) in [(Signal::TERM, TERM_MAX), (Signal::KILL, KILL_MAX)] {
        match signal_everyone(signal) {
            Ok(()) => {}
            // Nobody is left.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => return,
            Err(error) => say!("end the processes: {error}"),
        }
        if reap_all(limit) {
            return;
        }
    }
    say!("some processes did not end");
}

/// Reaps until nobody is left (`true`) or the time is over. PID 1 inherits every orphan, so a process
/// whose parent has ended is waited for too.
fn reap_all(limit: Duration) -> bool {
    let end = Moment::now().after(limit);
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) if Moment::now() < end => std::thread::sleep(REAP_EVERY),
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

/// The last thing that happens. When the kernel refuses, ending PID 1 makes it panic, which ends the
/// machine as well.
fn power_off() -> ! {
    let refused = reboot(RebootCommand::PowerOff);
    say!("power off: {refused:?}");
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_reason() {
        let io = || io::Error::other("test");
        let cases = [
            (Stop::Requested, StopReason::Requested),
            (Stop::Control(ControlError::Gone), StopReason::BadControl),
            (Stop::Unasked("Lease"), StopReason::BadControl),
            (Stop::CommandLine(CommandLineError::Missing("kontor.verity")), StopReason::BadCommandLine),
            (Stop::Module(ModuleError::TooMany), StopReason::NoModule),
            (Stop::NoDisk, StopReason::NoDisk),
            (Stop::Verity(VerityError::Size(1)), StopReason::RootCorrupt),
            (Stop::Tenant(TenantError::Id), StopReason::BadTenant),
            (Stop::Lockdown(LockdownError::Lockdown(io())), StopReason::NotLockedDown),
            (Stop::NoUplink, StopReason::NoUplink),
            (Stop::Uplink(UplinkError::List(io())), StopReason::NoUplink),
            (Stop::NoLease, StopReason::NoLease),
            (Stop::Refused, StopReason::NoLease),
            (Stop::Lease(LeaseError::OtherNonce), StopReason::BadLease),
            (Stop::NoTunnel, StopReason::NoTunnel),
            (Stop::Tunnel(TunnelFault::Uplink), StopReason::UplinkFailed),
            (Stop::Tunnel(TunnelFault::Tun), StopReason::ProcessDied),
            (Stop::Stale(Stale::Line), StopReason::Stale),
            (Stop::Silent, StopReason::NoTunnel),
            (Stop::LeaseExpired, StopReason::LeaseExpired),
            (Stop::System { doing: "test", source: io() }, StopReason::Internal),
        ];
        for (stop, reason) in cases {
            assert_eq!(stop.reason(), reason, "{stop}");
        }
    }

    #[test]
    fn tunnels_socket_is_not_the_hosts_fault() {
        let stop = Stop::from(EventsError::Tunnel(LinkError::Malformed));
        assert_eq!(stop.reason(), StopReason::ProcessDied);
    }
}
