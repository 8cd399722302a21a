//! A virtual machine that boots a kernel and an initrd, with devices like those of a work VM.

use super::{Accel, Pieces};
use crate::run::{Error, Result};
use command_fds::{CommandFdExt, FdMapping};
use kontor_guest::bench::{EMPTY, FRAME_MAX, HERE, Order, PORT, ROLE, Report};
use kontor_wire::{Decoder, encode};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// The machine's program.
pub(super) const QEMU: &str = "qemu-system-x86_64";
/// Memory of a guest in MiB, as the smallest work VM has it.
const MEMORY_MIB: u32 = 128;
/// Processors of a guest, at most: as an emulated work VM has them.
const PROCESSORS_MAX: usize = 2;
/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest without anything to do may take under KVM.
const KVM_PATIENCE: Duration = Duration::from_secs(10);
/// Ticks of `/proc/PID/stat` in a second (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;

const ORDERS_FD: i32 = 3;
const UPLINK_FD: i32 = 4;

/// Which way datagrams take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Way {
    /// The kernel's driver and a UDP socket.
    Kernel,
    /// A virtio-serial port.
    Port,
    /// A network device behind an IOMMU, driven by the program.
    Vfio,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Kernel, Self::Port, Self::Vfio];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kernel => kontor_guest::bench::KERNEL,
            Self::Port => "port",
            Self::Vfio => "vfio",
        }
    }
}

/// The host's end of the uplink.
pub(super) enum End {
    Stream(UnixStream),
    /// Each packet is an Ethernet frame; an empty one says that QEMU closed its end.
    Device(UnixDatagram),
}

/// A guest that awaits orders.
pub(super) struct Vm {
    qemu: Child,
    orders: UnixStream,
    decoder: Decoder,
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Start(what.to_owned(), source)
}

/// The host's and QEMU's end of a network device: SEQPACKET, as kontord makes it.
pub(super) fn device_pair() -> io::Result<(UnixDatagram, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((ours.into(), theirs))
}

/// QEMU's arguments but for kernel, initrd and channels.
fn machine(accel: Accel, iommu: bool) -> Vec<String> {
    let (accelerator, cpu) = match accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg,thread=multi", "max"),
    };
    let split = if iommu && accel == Accel::Kvm { ",kernel-irqchip=split" } else { "" };
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(PROCESSORS_MAX);
    let board = format!("q35,vmport=off,dump-guest-core=off,mem-merge=off{split}");
    let words = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", &board];
    let rest = ["-accel", accelerator, "-cpu", cpu, "-smp", &processors.to_string()].map(str::to_owned);
    let memory = ["-m", &MEMORY_MIB.to_string()].map(str::to_owned);
    words.map(str::to_owned).into_iter().chain(rest).chain(memory).collect()
}

fn command_line(accel: Accel, role: &str, iommu: bool) -> String {
    let emulated = if accel == Accel::Tcg { " no_timer_check" } else { "" };
    let iommu = if iommu { " intel_iommu=on" } else { "" };
    format!("console=ttyS0 quiet panic=-1 random.trust_cpu=on{emulated}{iommu} {ROLE}={role}")
}

impl Vm {
    /// Boots a guest that drives `way`; returns it once it awaits orders.
    pub(super) fn boot(pieces: &Pieces, accel: Accel, way: Way) -> Result<(Self, End)> {
        let pairs = || -> io::Result<(UnixStream, OwnedFd, End, OwnedFd)> {
            let (orders, orders_theirs) = UnixStream::pair()?;
            let (end, theirs) = match way {
                Way::Port => UnixStream::pair().map(|(ours, theirs)| (End::Stream(ours), theirs.into()))?,
                Way::Kernel | Way::Vfio => device_pair().map(|(ours, theirs)| (End::Device(ours), theirs))?,
            };
            orders.set_read_timeout(Some(PATIENCE))?;
            Ok((orders, orders_theirs.into(), end, theirs))
        };
        let (orders, orders_theirs, end, uplink_theirs) = pairs().map_err(failed("make channels"))?;
        let iommu = way == Way::Vfio;
        let mut command = Command::new(QEMU);
        command.args(machine(accel, iommu));
        command.arg("-kernel").arg(&pieces.kernel).arg("-initrd").arg(&pieces.uplink);
        command.args(["-append", &command_line(accel, way.name(), iommu)]);
        command.args(["-chardev", "stdio,id=console", "-device", "isa-serial,chardev=console"]);
        let net = format!("dgram,id=uplink,local.type=fd,local.str={UPLINK_FD}");
        match way {
            Way::Vfio => {
                let device = "virtio-net-pci,netdev=uplink,disable-legacy=on,iommu_platform=on,romfile=";
                command.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
                command.args(["-netdev", &net, "-device", device]);
            }
            Way::Kernel => {
                let device = "virtio-net-pci,netdev=uplink,disable-legacy=on,romfile=";
                command.args(["-netdev", &net, "-device", device]);
            }
            Way::Port => {}
        }
        command.args(["-device", "virtio-serial-pci,id=ports,max_ports=4,disable-legacy=on"]);
        let mut port = |id: &str, fd: i32, name: &str| {
            command.args(["-chardev", &format!("socket,id={id},fd={fd}")]);
            command.args(["-device", &format!("virtserialport,bus=ports.0,chardev={id},name={name}")]);
        };
        port("orders", ORDERS_FD, PORT);
        if way == Way::Port {
            port("uplink", UPLINK_FD, kontor_wire::uplink::PORT);
        }
        let mappings = vec![
            FdMapping { parent_fd: orders_theirs, child_fd: ORDERS_FD },
            FdMapping { parent_fd: uplink_theirs, child_fd: UPLINK_FD },
        ];
        command.fd_mappings(mappings).map_err(|e| failed("pass descriptors")(io::Error::other(e)))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let qemu = command.spawn().map_err(failed(QEMU))?;
        let mut vm = Self { qemu, orders, decoder: Decoder::new(FRAME_MAX) };
        vm.ready()?;
        Ok((vm, end))
    }

    /// Orders something.
    pub(super) fn order(&mut self, order: Order) -> Result<()> {
        self.orders.write_all(&encode(&order)).map_err(failed("order the guest"))
    }

    /// The channel on which the guest reports.
    pub(super) fn reports(&self) -> &UnixStream {
        &self.orders
    }

    /// The guest's next report.
    fn report(&mut self) -> Result<Report> {
        loop {
            let next = self.decoder.next_message();
            let next = next.map_err(|e| Error::Unexpected(format!("the guest's report: {e}")))?;
            match next {
                Some(Report::Failed(words)) => return Err(Error::Unexpected(format!("the guest: {words}"))),
                Some(report) => return Ok(report),
                None => {}
            }
            let mut chunk = [0; FRAME_MAX];
            let room = self.decoder.room().min(chunk.len());
            match self.orders.read(&mut chunk[..room]).map_err(failed("hear the guest"))? {
                0 => return Err(Error::Unexpected("the guest went off".into())),
                count => self.decoder.push(&chunk[..count]),
            };
        }
    }

    /// Waits until the guest is ready.
    pub(super) fn ready(&mut self) -> Result<()> {
        match self.report()? {
            Report::Ready => Ok(()),
            other @ (Report::Done { .. } | Report::Failed(_)) => {
                Err(Error::Unexpected(format!("the guest reports {other:?}")))
            }
        }
    }

    /// Waits until the guest is done: datagrams, and milliseconds that its processors were busy.
    pub(super) fn done(&mut self) -> Result<(u64, u64)> {
        match self.report()? {
            Report::Done { datagrams, busy_ms } => Ok((datagrams, busy_ms)),
            other @ (Report::Ready | Report::Failed(_)) => {
                Err(Error::Unexpected(format!("the guest reports {other:?}")))
            }
        }
    }

    /// Seconds of processor time that the machine has used.
    pub(super) fn cpu_s(&self) -> Result<f64> {
        cpu_s(&format!("/proc/{}/stat", self.qemu.id()))
    }

    /// Turns the power off and waits for the end.
    pub(super) fn off(mut self) -> Result<()> {
        self.order(Order::Off)?;
        self.qemu.wait().map_err(failed("wait for QEMU")).map(drop)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has ended already where all went well.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// User and system time in a file like `/proc/PID/stat` (proc(5)), in seconds.
pub(super) fn cpu_s(file: &str) -> Result<f64> {
    let text = fs::read_to_string(file).map_err(failed(file))?;
    ticks(&text).map(|ticks| ticks / TICKS_PER_S).ok_or_else(|| Error::Unexpected(format!("{file}: {text}")))
}

fn ticks(stat: &str) -> Option<f64> {
    // The second field is the program's name, with anything in it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// KVM where it runs a guest, else emulation: `/dev/kvm` alone says nothing.
pub(super) fn accel(pieces: &Pieces, wanted: Option<Accel>) -> Result<Accel> {
    if let Some(accel) = wanted {
        return Ok(accel);
    }
    if !Path::new("/dev/kvm").exists() {
        return Ok(Accel::Tcg);
    }
    let mut command = Command::new(QEMU);
    command.args(machine(Accel::Kvm, false)).arg("-kernel").arg(&pieces.kernel);
    command.arg("-initrd").arg(&pieces.empty).args(["-append", &command_line(Accel::Kvm, EMPTY, false)]);
    command.args(["-chardev", "stdio,id=console", "-device", "isa-serial,chardev=console"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut qemu = command.spawn().map_err(failed(QEMU))?;
    let (told, heard) = std::sync::mpsc::channel();
    if let Some(console) = qemu.stdout.take() {
        std::thread::spawn(move || {
            let lines = BufReader::new(console).lines().map_while(io::Result::ok);
            // Nobody listens any more when it comes too late.
            let _ = told.send(lines.into_iter().any(|line| line.contains(HERE)));
        });
    }
    let runs = heard.recv_timeout(KVM_PATIENCE).unwrap_or(false);
    // It may have ended by itself.
    let _ = qemu.kill();
    qemu.wait().map_err(failed("wait for QEMU"))?;
    Ok(if runs { Accel::Kvm } else { Accel::Tcg })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 3 4 20 0 1 0 9";
        assert_eq!(ticks(stat), Some(300.0));
        assert_eq!(ticks("7 (a) S 1"), None);
        assert!(cpu_s("/proc/self/stat").unwrap() >= 0.0);
    }
}
