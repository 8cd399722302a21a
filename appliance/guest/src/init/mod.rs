//! `kontor-init`: the guest's PID 1, from the initrd to the power switch.
//!
//! [`boot`] is the way up, [`supervise`] the time in between, of which [`life`] decides how long it lasts, [`stop`]
//! the way down. It is one thread
//! with one event loop, parses no packet, and starts no program but the tunnel and, in test images, the
//! probe.

mod boot;
mod control;
mod events;
#[cfg(test)]
mod fixture;
mod lease;
mod life;
mod lockdown;
mod log;
mod modules;
pub(crate) mod ports;
mod post;
mod resolv;
mod root;
mod stop;
mod supervise;
mod tenant;
pub(crate) mod uevent;
mod uplink;
mod verity;

use crate::sys;
use boot::{Early, Session};
use control::Control;
use events::Events;
use kontor_wire::control::PORT;
use log::say;
use std::io;
use stop::Stop;
use uevent::Uevents;

/// Runs as PID 1; elsewhere it does nothing.
///
/// # Errors
/// `PermissionDenied` when this process is not PID 1.
pub fn run() -> io::Result<std::convert::Infallible> {
    if !rustix::process::getpid().is_init() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "kontor-init runs as PID 1 only"));
    }
    stop::install_panic_hook();
    let why = match connect() {
        Ok((uevents, mut events)) => match boot(uevents, &mut events) {
            Ok(session) => session.keep(&mut events),
            Err(why) => why,
        },
        Err(why) => why,
    };
    stop::stop(&why)
}

/// Everything up to the first words with the host.
fn connect() -> Result<(Uevents, Events), Stop> {
    root::mount_early().map_err(Stop::Files)?;
    log::open();
    say!("kontor-init {}", env!("CARGO_PKG_VERSION"));
    let system = |doing| move |source| Stop::System { doing, source };
    sys::occupy_inherited().map_err(system("keep the inherited descriptors' numbers"))?;
    let children = sys::child_signals().map_err(system("listen to children"))?;
    let uevents = Uevents::listen().map_err(system("listen to the kernel"))?;
    let port = ports::open_named(&uevents, PORT, ports::APPEAR_MAX)
        .map_err(system("open the control channel"))?
        .ok_or(Stop::Control(control::ControlError::NoHello))?;
    stop::keep_for_last_words(port.try_clone().map_err(system("keep the control channel"))?);
    let control = Control::connect(port).map_err(Stop::Control)?;
    Ok((uevents, Events::new(control, Some(children))?))
}

fn boot(uevents: Uevents, events: &mut Events) -> Result<Session, Stop> {
    let verified = Early::reached(uevents, events)?.verify(events)?;
    let tunnel_up = verified.lease(events)?.connect(events)?;
    tunnel_up.greet(events)?.open_state(events)?.begin(events)
}
