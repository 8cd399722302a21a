//! `kontor-bench`: what benchmarks run in the guest. It goes into initrds that are made for measuring and into
//! no image.
//!
//! It is PID 1, and the only program there is. The kernel hands it words of its command line as environment
//! ([`ROLE`]): with [`EMPTY`] it says that it runs and turns the power off; with the name of an uplink it drives
//! that as the host orders, over a virtio-serial port of its own ([`PORT`]).
//!
//! `port` and `vfio` are the tunnel's own uplinks, as [`crate::tunnel`] has them. `kernel` is what they stand in
//! for: the kernel's driver of the same network device, its IP stack, and one UDP socket.

mod load;
mod socket;

use crate::init::{
    modules,
    ports::{self, APPEAR_MAX},
    root,
    uevent::Uevents,
    uplink::Uplink,
};
use crate::tunnel::uplink::{Port, open_vfio};
use kontor_wire::{Decoder, FrameError, encode};
use load::Drive;
use rustix::system::{RebootCommand, reboot};
use serde::{Deserialize, Serialize};
use std::{
    convert::Infallible,
    io::{self, Write},
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
};

/// Word of the kernel's command line, and so variable of the environment, that says what to do.
pub const ROLE: &str = "kontor_bench";
/// Role of an init that does nothing.
pub const EMPTY: &str = "empty";
/// Role of the kernel's own driver and IP stack. The others are the uplinks' names.
pub const KERNEL: &str = "kernel";
/// What an empty init says on the console.
pub const HERE: &str = "kontor-bench: here";
/// Name of the port over which the host orders.
pub const PORT: &str = "kontor.bench";
/// Largest frame on that port, either way.
pub const FRAME_MAX: usize = 256;
/// Largest datagram that can be ordered: what fits an Ethernet frame in each of the ways that are compared.
pub const DATAGRAM_MAX: usize = 1452;
/// The guest's address where the kernel's IP stack is measured; its prefix has 30 bits.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The host's address there.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// UDP port of both.
pub const UDP_PORT: u16 = 51820;

/// From the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Send datagrams of so many bytes until told to stop.
    Send {
        /// Bytes of each, from [`kontor_wire::uplink::MIN_DATAGRAM`] to [`DATAGRAM_MAX`].
        bytes: u16,
        /// Whether several may go as one.
        trains: bool,
    },
    /// Count datagrams of so many bytes until told to stop.
    Receive {
        /// Bytes of each.
        bytes: u16,
        /// Whether several may come as one.
        trains: bool,
    },
    /// End what was ordered before.
    Stop,
    /// Turn the power off.
    Off,
}

/// To the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The uplink is open; orders are awaited. After [`Order::Receive`]: datagrams are.
    Ready,
    /// What was ordered has ended.
    Done {
        /// Datagrams sent or received.
        datagrams: u64,
        /// Milliseconds in which a processor of the guest was not idle.
        busy_ms: u64,
    },
    /// It does not go on.
    Failed(String),
}

/// Why there is nothing to measure.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error("{doing}")]
    System { doing: &'static str, source: io::Error },
    #[error("there is no {0}")]
    Missing(&'static str),
    #[error("no such role")]
    Role,
    #[error("the host's orders")]
    Orders(#[source] FrameError),
    #[error("an order out of turn")]
    OutOfTurn,
    #[error("prepare the uplink: {0}")]
    Uplink(String),
}

/// What the guest's own modules say of their errors, in words.
fn words(error: impl std::error::Error) -> BenchError {
    BenchError::Uplink(crate::chain(&error))
}

fn system(doing: &'static str) -> impl FnOnce(io::Error) -> BenchError {
    move |source| BenchError::System { doing, source }
}

/// Runs as PID 1; elsewhere it does nothing.
///
/// # Errors
/// `PermissionDenied` when this process is not PID 1.
pub fn run() -> io::Result<Infallible> {
    if !rustix::process::getpid().is_init() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "kontor-bench runs as PID 1 only"));
    }
    let mut console = io::stderr();
    let role = std::env::var(ROLE).unwrap_or_default();
    if role == EMPTY {
        let _ = writeln!(console, "{HERE}\r");
    } else if let Err(error) = serve(&role) {
        let _ = writeln!(console, "kontor-bench: {}\r", crate::chain(&error));
    }
    reboot(RebootCommand::PowerOff)?;
    Err(io::Error::other("the power stays on"))
}

fn serve(role: &str) -> Result<(), BenchError> {
    root::mount_early().map_err(words)?;
    let uevents = Uevents::listen().map_err(system("listen to the kernel"))?;
    let port = ports::open_named(&uevents, PORT, APPEAR_MAX).map_err(system("open the orders' port"))?;
    let mut orders = Orders::new(port.ok_or(BenchError::Missing("port for orders"))?);
    let served = open(role, &uevents).and_then(|mut drive| {
        orders.tell(&Report::Ready)?;
        while let Some(order) = orders.wait()? {
            match order {
                Order::Send { bytes, trains } => load::send(&mut *drive, &mut orders, bytes, trains)?,
                Order::Receive { bytes, trains } => load::receive(&mut *drive, &mut orders, bytes, trains)?,
                Order::Stop => return Err(BenchError::OutOfTurn),
                Order::Off => break,
            }
        }
        Ok(())
    });
    if let Err(error) = &served {
        orders.tell(&Report::Failed(crate::chain(error).chars().take(WORDS_MAX).collect()))?;
    }
    served
}

/// What is measured, open.
fn open(role: &str, uevents: &Uevents) -> Result<Box<dyn Drive>, BenchError> {
    modules::load_all(modules::DIRECTORY).map_err(words)?;
    if role == KERNEL {
        return Ok(Box::new(socket::open(uevents)?));
    }
    match Uplink::open(uevents).map_err(words)?.ok_or(BenchError::Missing("uplink"))? {
        found if found.name() != role => Err(BenchError::Role),
        Uplink::Port(port) => Ok(Box::new(load::Tunnels::begin(Port::new(port))?)),
        Uplink::Vfio(container, device) => {
            Ok(Box::new(load::Tunnels::begin(open_vfio(container, device).map_err(words)?)?))
        }
    }
}

/// Longest text of a [`Report::Failed`] in characters.
const WORDS_MAX: usize = 200;

/// The port over which the host orders.
struct Orders {
    port: OwnedFd,
    decoder: Decoder,
}

impl Orders {
    fn new(port: OwnedFd) -> Self {
        Self { port, decoder: Decoder::new(FRAME_MAX) }
    }

    /// The next order, if there is one.
    fn next(&mut self) -> Result<Option<Order>, BenchError> {
        loop {
            if let Some(order) = self.decoder.next_message().map_err(BenchError::Orders)? {
                return Ok(Some(order));
            }
            let mut chunk = [0; FRAME_MAX];
            let room = self.decoder.room().min(chunk.len());
            match rustix::io::read(&self.port, &mut chunk[..room]) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Ok(count) => {
                    self.decoder.push(&chunk[..count]);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(system("read the orders")(error.into())),
            }
        }
    }

    /// Waits for the next order.
    fn wait(&mut self) -> Result<Option<Order>, BenchError> {
        let edges = load::Edges::of(&[self.port.as_fd()])?;
        loop {
            match self.next()? {
                None => edges.wait(None).map(drop)?,
                order => return Ok(order),
            }
        }
    }

    fn tell(&self, report: &Report) -> Result<(), BenchError> {
        // Shorter than what the port holds, and the host reads each before it orders again.
        let bytes = encode(report);
        match rustix::io::write(&self.port, &bytes) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(system("report")(io::ErrorKind::WriteZero.into())),
            Err(error) => Err(system("report")(error.into())),
        }
    }
}
