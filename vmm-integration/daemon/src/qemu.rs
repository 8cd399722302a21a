//! QEMU's command line, as data, and its start.
//!
//! Everything that QEMU works with is inherited as a descriptor of a fixed number, so that its command
//! line names no file of the host, and so that nobody else can reach these channels:
//!
//! ```text
//! 3 kernel   4 initrd          sealed memory, read through /proc/self/fd
//! 5 root                       the root image, read-only
//! 6 console  7 QMP  8 kontor.control  9 the uplink  10 kontor.probe        socketpairs
//! ```

use crate::{
    control_group::{Delegated, Group, Place, Share, TASKS_MAX},
    host::Accelerator,
    jail::{Inmate, JailNote, Jailed, Limits, Profile},
};
use kontor_wire::{control, probe, uplink};
use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    path::Path,
};

const KERNEL: RawFd = 3;
const INITRD: RawFd = 4;
const ROOT: RawFd = 5;
const CONSOLE: RawFd = 6;
const QMP: RawFd = 7;
const CONTROL: RawFd = 8;
const UPLINK: RawFd = 9;
const PROBE: RawFd = 10;

/// Descriptors that QEMU may have: the ones above, and an eventfd for each virtio queue.
const FILES_MAX: u64 = 512;
/// The emulator's buffer of translated code, in MiB.
const CODE_BUFFER_MIB: u64 = 64;
/// Memory or address space beside the guest's memory and that buffer, in MiB: libraries, heap, thread stacks.
const OVERHEAD_MIB: u64 = 512;

/// Which device the guest's uplink is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// A virtio-serial port: a stream of frames.
    #[default]
    Port,
    /// A network device behind a virtual IOMMU, which the guest drives from user space: Ethernet frames.
    Vfio,
}

impl Backend {
    /// Its name in configuration and status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Vfio => "vfio",
        }
    }
}

/// What the virtual machine is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// What executes its instructions.
    pub accelerator: Accelerator,
    /// Its processors.
    pub cpus: usize,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// The kernel's command line, from the verified manifest.
    pub cmdline: String,
    /// Which device its uplink is.
    pub uplink: Backend,
    /// Whether it has the probe channel's port.
    pub probe: bool,
}

/// QEMU's ends of everything that it works with.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) kernel: OwnedFd,
    pub(crate) initrd: OwnedFd,
    /// None: a machine without a disk.
    pub(crate) root: Option<OwnedFd>,
    pub(crate) console: OwnedFd,
    pub(crate) qmp: OwnedFd,
    pub(crate) control: OwnedFd,
    pub(crate) uplink: OwnedFd,
    pub(crate) probe: Option<OwnedFd>,
}

impl Machine {
    /// QEMU's arguments; without `disk`, those of a machine that has none.
    #[must_use]
    pub fn arguments(&self, disk: bool) -> Vec<String> {
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm".to_owned(), "host"),
            Accelerator::Tcg => (format!("tcg,thread=multi,tb-size={CODE_BUFFER_MIB}"), "max"),
        };
        let mut line = vec![
            // Nothing but what is named here: no default device, no configuration file.
            "-nodefaults".to_owned(),
            "-no-user-config".into(),
            "-no-reboot".into(),
            "-display".into(),
            "none".into(),
            // Where its jail has the firmware.
            "-L".into(),
            kontor_jail::FIRMWARE.into(),
            // The guest's memory is in no core file and shared with no other process.
            "-machine".into(),
            self.board(),
            "-accel".into(),
            accelerator,
            "-cpu".into(),
            cpu.into(),
            "-smp".into(),
            self.cpus.to_string(),
            "-m".into(),
            self.memory_mib.to_string(),
            // No sleep states: a guest either runs or is off.
            "-global".into(),
            "ICH9-LPC.disable_s3=1".into(),
            "-global".into(),
            "ICH9-LPC.disable_s4=1".into(),
            "-kernel".into(),
            format!("/proc/self/fd/{KERNEL}"),
            "-initrd".into(),
            format!("/proc/self/fd/{INITRD}"),
            "-append".into(),
            self.cmdline(),
        ];
        let mut option = |name: &str, value: String| line.extend([name.to_owned(), value]);
        if self.uplink == Backend::Vfio {
            // The IOMMU stands before the devices behind it, which is the uplink alone: what the guest's
            // kernel drives stays without.
            option("-device", "intel-iommu,intremap=on,caching-mode=on".into());
            option("-netdev", format!("dgram,id=uplink,local.type=fd,local.str={UPLINK}"));
            option("-device", network_device());
        }
        if disk {
            option("-add-fd", format!("fd={ROOT},set=1"));
            option(
                "-blockdev",
                "driver=file,node-name=root-file,filename=/dev/fdset/1,read-only=on,locking=off".into(),
            );
            option("-blockdev", "driver=raw,node-name=root,file=root-file,read-only=on".into());
            option("-device", "virtio-blk-pci,drive=root,disable-legacy=on".into());
        }
        option("-chardev", format!("socket,id=console,fd={CONSOLE}"));
        option("-device", "isa-serial,chardev=console".into());
        option("-chardev", format!("socket,id=qmp,fd={QMP}"));
        option("-mon", "chardev=qmp,mode=control".into());
        option("-device", "virtio-serial-pci,id=ports,max_ports=4,disable-legacy=on".into());
        let mut port = |id: &str, fd: RawFd, name: &str| {
            option("-chardev", format!("socket,id={id},fd={fd}"));
            option("-device", format!("virtserialport,bus=ports.0,chardev={id},name={name}"));
        };
        port("control", CONTROL, control::PORT);
        if self.uplink == Backend::Port {
            port("uplink", UPLINK, uplink::PORT);
        }
        if self.probe {
            port("probe", PROBE, probe::PORT);
        }
        option("-object", "rng-builtin,id=rng".into());
        option("-device", "virtio-rng-pci,rng=rng,disable-legacy=on".into());
        option("-device", "pvpanic".into());
        line
    }

    fn board(&self) -> String {
        let mut board = "q35,vmport=off,dump-guest-core=off,mem-merge=off".to_owned();
        if self.uplink == Backend::Vfio && self.accelerator == Accelerator::Kvm {
            // KVM's own interrupt controller cannot remap what a device behind the IOMMU sends.
            board.push_str(",kernel-irqchip=split");
        }
        board
    }

    fn cmdline(&self) -> String {
        let mut line = self.cmdline.clone();
        if self.accelerator == Accelerator::Tcg {
            // Without it the kernel sometimes finds the emulated timer too slow and panics.
            line.push_str(" no_timer_check");
        }
        if self.uplink == Backend::Vfio {
            line.push_str(" intel_iommu=on");
        }
        line
    }
}

/// The uplink's device: of virtio 1, and with addresses of the IOMMU's.
fn network_device() -> String {
    let hardware = uplink::GUEST_HARDWARE.map(|byte| format!("{byte:02x}")).join(":");
    format!("virtio-net-pci,netdev=uplink,mac={hardware},disable-legacy=on,iommu_platform=on,romfile=")
}

impl Inherited {
    fn numbered(self) -> Vec<(OwnedFd, RawFd)> {
        let fixed = [
            (self.kernel, KERNEL),
            (self.initrd, INITRD),
            (self.console, CONSOLE),
            (self.qmp, QMP),
            (self.control, CONTROL),
            (self.uplink, UPLINK),
        ];
        let optional = [self.root.map(|fd| (fd, ROOT)), self.probe.map(|fd| (fd, PROBE))];
        fixed.into_iter().chain(optional.into_iter().flatten()).collect()
    }
}

/// Starts `program` as the machine, in a jail made by `jailer`. It dies with kontord, and when the returned
/// value is dropped.
pub(crate) fn start(
    jailer: &Path,
    program: &Path,
    machine: &Machine,
    group: Option<Group>,
    inherited: Inherited,
) -> io::Result<Jailed> {
    let arguments = machine.arguments(inherited.root.is_some()).into_iter().map(Into::into).collect();
    let profile = match machine.accelerator {
        Accelerator::Kvm => Profile::QemuKvm,
        Accelerator::Tcg => Profile::Qemu,
    };
    let address_space = group.is_none().then(|| machine.most_memory_mib() << 20);
    let limits = Limits { files: FILES_MAX, threads: TASKS_MAX, address_space };
    let descriptors = inherited.numbered();
    let inmate = Inmate { profile, program: program.into(), arguments, descriptors, limits, group };
    Jailed::start(jailer, inmate)
}

impl Machine {
    /// Most memory of QEMU, or most address space, in MiB.
    fn most_memory_mib(&self) -> u64 {
        u64::from(self.memory_mib) + CODE_BUFFER_MIB + OVERHEAD_MIB
    }

    /// What holds its QEMU.
    pub(crate) fn jail(&self, group: Option<&Group>) -> JailNote {
        let limit = if group.is_some() { "cgroup" } else { "address-space" };
        let cpus = group.filter(|group| group.limits_cpu()).map(|_| self.cpus);
        let limited = group.is_some_and(Group::limits_tasks) || kontor_jail::counts_threads_apart();
        let threads = limited.then_some(TASKS_MAX);
        JailNote { limit: limit.into(), memory_mib: self.most_memory_mib(), cpus, threads }
    }

    /// A control group for it. Where none can be made, the address space is limited instead.
    pub(crate) fn group(&self, delegated: Option<&Delegated>, place: Place) -> Option<Group> {
        let share = Share { memory_bytes: self.most_memory_mib() << 20, cpus: self.cpus };
        let made = delegated?.group(place, share);
        made.inspect_err(|error| tracing::warn!(%error, "QEMU gets no control group")).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let cmdline = "quiet kontor.built=1".into();
        let uplink = Backend::Port;
        Machine { accelerator: Accelerator::Kvm, cpus: 2, memory_mib: 512, cmdline, uplink, probe: false }
    }

    /// The value behind each `name`.
    fn values<'a>(line: &'a [String], name: &str) -> Vec<&'a str> {
        line.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn machine_without_a_disk_has_no_block_device() {
        let line = machine().arguments(false);
        assert!(values(&line, "-blockdev").is_empty() && values(&line, "-add-fd").is_empty());
        assert!(!values(&line, "-device").iter().any(|device| device.starts_with("virtio-blk")));
    }

    #[test]
    fn devices_are_these_and_no_others() {
        let line = machine().arguments(true);
        assert_eq!(
            values(&line, "-device"),
            [
                "virtio-blk-pci,drive=root,disable-legacy=on",
                "isa-serial,chardev=console",
                "virtio-serial-pci,id=ports,max_ports=4,disable-legacy=on",
                "virtserialport,bus=ports.0,chardev=control,name=kontor.control",
                "virtserialport,bus=ports.0,chardev=uplink,name=kontor.uplink",
                "virtio-rng-pci,rng=rng,disable-legacy=on",
                "pvpanic",
            ]
        );
        assert_eq!(line[..5], ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        for network in ["-netdev", "-nic", "-net", "-drive", "-hda", "-cdrom", "-vnc", "-serial"] {
            assert!(!line.iter().any(|word| word == network), "{network}");
        }
    }

    #[test]
    fn network_device_stands_behind_the_iommu_and_takes_the_ports_place() {
        let port = machine().arguments(true);
        let vfio = Machine { uplink: Backend::Vfio, ..machine() }.arguments(true);
        assert_eq!(
            values(&vfio, "-device")[..2],
            [
                "intel-iommu,intremap=on,caching-mode=on",
                "virtio-net-pci,netdev=uplink,mac=02:4b:54:52:00:01,disable-legacy=on,iommu_platform=on,romfile=",
            ]
        );
        assert_eq!(values(&vfio, "-netdev"), ["dgram,id=uplink,local.type=fd,local.str=9"]);
        let others: Vec<_> =
            values(&port, "-device").into_iter().filter(|d| !d.contains("kontor.uplink")).collect();
        assert_eq!(values(&vfio, "-device")[2..], others);
        assert!(!values(&vfio, "-chardev").iter().any(|chardev| chardev.contains("fd=9")));
        assert!(!port.iter().any(|word| word.contains("iommu") || word.contains("net")));
    }

    #[test]
    fn interrupts_of_the_network_device_are_remapped_by_qemu_under_kvm() {
        let vfio = Machine { uplink: Backend::Vfio, ..machine() };
        assert!(values(&vfio.arguments(true), "-machine")[0].ends_with(",kernel-irqchip=split"));
        assert_eq!(values(&vfio.arguments(true), "-append"), ["quiet kontor.built=1 intel_iommu=on"]);
        let emulated = Machine { accelerator: Accelerator::Tcg, ..vfio }.arguments(true);
        assert!(!values(&emulated, "-machine")[0].contains("irqchip"));
        assert_eq!(values(&emulated, "-append"), ["quiet kontor.built=1 no_timer_check intel_iommu=on"]);
        assert!(!values(&machine().arguments(true), "-machine")[0].contains("irqchip"));
    }

    #[test]
    fn every_channel_is_an_inherited_descriptor() {
        let line = Machine { probe: true, ..machine() }.arguments(true);
        assert_eq!(
            values(&line, "-chardev"),
            [
                "socket,id=console,fd=6",
                "socket,id=qmp,fd=7",
                "socket,id=control,fd=8",
                "socket,id=uplink,fd=9",
                "socket,id=probe,fd=10",
            ]
        );
        assert_eq!(values(&line, "-kernel"), ["/proc/self/fd/3"]);
        assert_eq!(values(&line, "-initrd"), ["/proc/self/fd/4"]);
        assert_eq!(values(&line, "-add-fd"), ["fd=5,set=1"]);
        assert!(values(&line, "-blockdev").iter().all(|node| node.contains("read-only=on")));
    }

    #[test]
    fn command_line_is_the_manifests_but_for_the_emulators_word() {
        assert_eq!(values(&machine().arguments(true), "-append"), ["quiet kontor.built=1"]);
        let emulated = Machine { accelerator: Accelerator::Tcg, ..machine() }.arguments(true);
        assert_eq!(values(&emulated, "-append"), ["quiet kontor.built=1 no_timer_check"]);
        assert_eq!(values(&emulated, "-accel"), ["tcg,thread=multi,tb-size=64"]);
    }

    #[test]
    fn probe_port_is_there_only_when_wanted() {
        assert!(!machine().arguments(true).iter().any(|word| word.contains("probe")));
    }
}
