//! What root in the guest can do to the uplink, for tests; in test images only.
//!
//! init and tunnel have the device open, which nobody else can have open then, and no process attaches to
//! another. What is left is to take the device from both: init, which would end the guest, is held still by a
//! frozen control group; the tunnel is killed; and the device's driver is told to let go of it and to take it
//! again, as new. Of a `port` that succeeds, and what is sent then only the relay can judge. The `vfio` driver
//! does not let go of a device that is open.

use crate::clock::{Moment, timespec};
use crate::init::{ports, uevent::Uevents};
use kontor_wire::uplink::{HEADER_LEN, MAX_DATAGRAM, MAX_FRAME, MAX_SEGMENTS, PORT, VERSION};
use kontor_wire::wireguard::{INITIATION_LEN, KEEPALIVE_LEN};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, write};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, create_dir_all, read_dir, read_link, read_to_string};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Bytes of a marker.
const MARKER_LEN: usize = 16;
/// How long a flood goes on, unless the host ends the guest first.
const FLOOD: Duration = Duration::from_secs(20);
/// How long the device may take no byte before that is given up.
const STUCK: Duration = Duration::from_secs(5);
/// Frames in one write of a flood.
const AT_ONCE: usize = 16;
/// The first process.
const INIT: i32 = 1;
/// Name of the tunnel's process.
const TUNNEL: &str = "kontor-tunnel";
/// Where the control groups are mounted for it.
const GROUPS: &str = "/run/attempt";
const PORTS: &str = "/sys/class/virtio-ports";
const PORT_DRIVER: &str = "/sys/bus/virtio/drivers/virtio_console";
const VFIO_DRIVER: &str = "/sys/bus/pci/drivers/vfio-pci";
const VFIO: &str = "/dev/vfio";
/// How long a driver may take to let go of its device.
const LET_GO: Duration = Duration::from_secs(3);
/// How long the port may take to come back.
const COME_BACK: Duration = Duration::from_secs(10);
/// The argument of the process that goes on when the channel to the host is gone.
const DETACHED: &str = "detached";

/// Why an attempt did not come to the point of sending.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The command line.
    #[error("usage: kontor-probe uplink HOW MARKER GATEWAY")]
    Usage,
    /// A step on the way.
    #[error("{doing}")]
    System {
        /// Which step.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is no port, or it did not come back.
    #[error("there is no port of the uplink's")]
    NoPort,
}

fn system(doing: &'static str) -> impl FnOnce(io::Error) -> AttemptError {
    move |source| AttemptError::System { doing, source }
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// WireGuard's shape, for gateways that there are not.
    OtherGateways,
    /// Frames that break the format.
    Malformed,
    /// Longer than anything of the tunnel's.
    Oversized,
    /// A gateway's frame with what is not WireGuard's.
    NotWireGuard,
    /// All of those.
    Everything,
    /// [`How::NotWireGuard`] without end.
    FloodOfGarbage,
    /// WireGuard's shape for a gateway that there is not, without end.
    FloodOfOthers,
    /// Handshake initiations for the gateway, without end.
    FloodOfInitiations,
}

impl How {
    const ALL: [(&'static str, Self); 8] = [
        ("other-gateways", Self::OtherGateways),
        ("malformed", Self::Malformed),
        ("oversized", Self::Oversized),
        ("not-wireguard", Self::NotWireGuard),
        ("everything", Self::Everything),
        ("flood-of-garbage", Self::FloodOfGarbage),
        ("flood-of-others", Self::FloodOfOthers),
        ("flood-of-initiations", Self::FloodOfInitiations),
    ];

    /// Frames without the length in front.
    fn frames(self, marker: [u8; MARKER_LEN], gateway: u8) -> Vec<Vec<u8>> {
        let transport = |length: usize| filled(4, length, &marker);
        let one = |gateway: u8, datagram: &[u8]| frame(VERSION, gateway, datagram.len(), datagram);
        let other = gateway.wrapping_add(100);
        match self {
            Self::OtherGateways => {
                // Not the next numbers, which may be other gateways of the company.
                let others = [50, 100, 150, 200].map(|more| gateway.wrapping_add(more));
                others.into_iter().map(|other| one(other, &transport(96))).collect()
            }
            Self::Malformed => vec![
                frame(9, gateway, 96, &transport(96)),
                frame(VERSION, gateway, 0, &transport(96)),
                frame(VERSION, gateway, 1000, &transport(96)),
                frame(VERSION, gateway, MARKER_LEN, &marker.repeat(MAX_SEGMENTS + 1)),
            ],
            Self::Oversized => {
                let train = transport(MAX_FRAME - HEADER_LEN);
                vec![one(gateway, &transport(MAX_DATAGRAM)), frame(VERSION, gateway, 1500, &train)]
            }
            Self::NotWireGuard => {
                let mut reserved = transport(96);
                reserved[2] = 1;
                let words = [b"GET / HTTP/1.1\r\nHost: ", &marker[..], b"\r\n\r\n"].concat();
                let all = [marker.repeat(6), words, reserved, transport(97)];
                all.into_iter().map(|datagram| one(gateway, &datagram)).collect()
            }
            Self::Everything => {
                let all = [Self::OtherGateways, Self::Malformed, Self::Oversized, Self::NotWireGuard];
                all.into_iter().flat_map(|how| how.frames(marker, gateway)).collect()
            }
            Self::FloodOfGarbage => Self::NotWireGuard.frames(marker, gateway),
            Self::FloodOfOthers => {
                let train = transport(KEEPALIVE_LEN).repeat(MAX_SEGMENTS);
                vec![frame(VERSION, other, KEEPALIVE_LEN, &train); AT_ONCE]
            }
            // Some of these pass, as a handshake would, so there is no marker in them.
            Self::FloodOfInitiations => {
                vec![one(gateway, &filled(1, INITIATION_LEN, &[0xA5; MARKER_LEN])); AT_ONCE]
            }
        }
    }

    fn is_flood(self) -> bool {
        matches!(self, Self::FloodOfGarbage | Self::FloodOfOthers | Self::FloodOfInitiations)
    }
}

/// WireGuard's header of type `kind`, and the marker again and again.
fn filled(kind: u8, length: usize, marker: &[u8; MARKER_LEN]) -> Vec<u8> {
    [kind, 0, 0, 0].into_iter().chain(marker.iter().copied().cycle()).take(length).collect()
}

fn frame(version: u8, gateway: u8, segment: usize, payload: &[u8]) -> Vec<u8> {
    let [low, high] = u16::try_from(segment).unwrap_or(u16::MAX).to_le_bytes();
    [&[version, gateway, low, high], payload].concat()
}

/// Does what the command line says; returns what came of it.
///
/// # Errors
/// [`AttemptError`] when it did not come to the point of sending.
pub fn run(arguments: &[String]) -> Result<String, AttemptError> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (how, marker, gateway, detached) = match words[..] {
        ["uplink", how, marker, gateway] => (how, marker, gateway, false),
        ["uplink", how, marker, gateway, DETACHED] => (how, marker, gateway, true),
        _ => return Err(AttemptError::Usage),
    };
    let how = How::ALL.iter().find(|(name, _)| *name == how).ok_or(AttemptError::Usage)?.1;
    let marker = marker.as_bytes().try_into().map_err(|_| AttemptError::Usage)?;
    let gateway = gateway.parse().map_err(|_| AttemptError::Usage)?;
    let groups = open_groups().map_err(system("list the IOMMU groups"))?;
    if groups.is_empty() && !detached {
        // The channel to the host is a port of the same device.
        return detach(arguments).map_err(system("go on alone"));
    }
    let frozen = Frozen::init().map_err(system("hold init still"))?;
    for pid in named(TUNNEL).map_err(system("look for the tunnel"))? {
        kill_process(pid, Signal::KILL).map_err(|e| system("kill the tunnel")(e.into()))?;
    }
    let said = if groups.is_empty() {
        send_alone(&how.frames(marker, gateway), how.is_flood())
    } else {
        Ok(take_vfio(&groups))
    };
    frozen.thaw().map_err(system("let init go on"))?;
    said
}

/// Starts this program once more, out of reach of whoever started this one.
fn detach(arguments: &[String]) -> io::Result<String> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).arg(DETACHED).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    Ok("it goes on alone".to_owned())
}

/// Takes the port anew and sends; of a flood again and again.
fn send_alone(frames: &[Vec<u8>], flood: bool) -> Result<String, AttemptError> {
    let uevents = Uevents::listen().map_err(system("hear of devices"))?;
    let device = port_device().map_err(system("look for the port"))?.ok_or(AttemptError::NoPort)?;
    for verb in ["unbind", "bind"] {
        let file = Path::new(PORT_DRIVER).join(verb);
        std::fs::write(file, &device).map_err(system("have the port's driver take it anew"))?;
    }
    let port = ports::open_named(&uevents, PORT, COME_BACK).map_err(system("open the port"))?;
    let port = port.ok_or(AttemptError::NoPort)?;
    let (begin, mut sent) = (Moment::now(), 0);
    loop {
        send(&port, frames).map_err(system("send"))?;
        sent += frames.len();
        if !flood || Moment::now().since(begin) > FLOOD {
            return Ok(format!("the port took {sent} frames"));
        }
    }
}

/// The device that the uplink's port is a part of, as its bus names it.
fn port_device() -> io::Result<Option<String>> {
    for entry in read_dir(PORTS)? {
        let path = entry?.path();
        if read_to_string(path.join("name")).is_ok_and(|name| name.trim_end() == PORT) {
            let device = read_link(path.join("device"))?;
            return Ok(device.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

/// Files of IOMMU groups.
fn open_groups() -> io::Result<Vec<PathBuf>> {
    match read_dir(VFIO) {
        Ok(entries) => {
            let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
            Ok(paths.filter(|path| path != &Path::new(VFIO).join("vfio")).collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Tries to open each group, and to have the driver let go of the device.
fn take_vfio(groups: &[PathBuf]) -> String {
    let mut said: Vec<String> = groups
        .iter()
        .map(|path| match open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(_) => format!("{}: OPENED", path.display()),
            Err(error) => format!("{}: {error}", path.display()),
        })
        .collect();
    for entry in read_dir(VFIO_DRIVER).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("0000:") {
            continue;
        }
        // In a thread of its own: the driver may wait for the holder for good.
        let (done, waiting) = std::sync::mpsc::channel();
        let address = name.clone();
        std::thread::spawn(move || {
            let written = std::fs::write(Path::new(VFIO_DRIVER).join("unbind"), address);
            // Nobody may listen any more.
            let _ = done.send(written);
        });
        said.push(match waiting.recv_timeout(LET_GO) {
            Ok(Ok(())) => format!("{name}: OPENED to another driver"),
            Ok(Err(error)) => format!("{name}: {error}"),
            Err(_) => format!("{name}: its driver waits for the holder"),
        });
    }
    said.join(", ")
}

/// init, held still by a control group.
struct Frozen(PathBuf);

impl Frozen {
    fn init() -> io::Result<Self> {
        create_dir_all(GROUPS)?;
        mount("none", GROUPS, "cgroup2", MountFlags::empty(), None)?;
        let group = Path::new(GROUPS).join("held");
        create_dir_all(&group)?;
        std::fs::write(group.join("cgroup.procs"), INIT.to_string())?;
        std::fs::write(group.join("cgroup.freeze"), "1")?;
        let mut events = File::open(group.join("cgroup.events"))?;
        let mut text = String::new();
        loop {
            events.rewind()?;
            text.clear();
            events.read_to_string(&mut text)?;
            if text.lines().any(|line| line == "frozen 1") {
                return Ok(Self(group));
            }
            wait(events.as_fd(), PollFlags::PRI)?;
        }
    }

    fn thaw(self) -> io::Result<()> {
        std::fs::write(self.0.join("cgroup.freeze"), "0")
    }
}

/// Processes of this name.
fn named(name: &str) -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let comm = read_to_string(entry.path().join("comm")).unwrap_or_default();
        found.extend(pid.filter(|_| comm.trim_end() == name));
    }
    Ok(found)
}

/// Sends all of `frames`, each behind its length.
fn send(port: &OwnedFd, frames: &[Vec<u8>]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for frame in frames {
        bytes.extend_from_slice(&u16::try_from(frame.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(frame);
    }
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match write(port, rest) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::AGAIN) => wait(port.as_fd(), PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn wait(file: std::os::fd::BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(&file, flags)], Some(&timespec(STUCK)))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kontor_wire::uplink::Frame;
    use kontor_wire::wireguard::Shape;

    const MARKER: [u8; MARKER_LEN] = *b"kontor-leak-0042";
    const GATEWAY: u8 = 1;

    fn holds(bytes: &[u8]) -> bool {
        bytes.windows(MARKER_LEN).any(|window| window == MARKER)
    }

    /// Whether a relay that knows only [`GATEWAY`] would send any of it on.
    fn passes(bytes: &[u8]) -> bool {
        let Ok(frame) = Frame::parse(bytes) else { return false };
        frame.gateway().0 == GATEWAY && frame.segments().all(|datagram| Shape::of(datagram).is_some())
    }

    #[test]
    fn every_attempt_is_what_it_says_and_carries_the_marker() {
        for (name, how) in How::ALL {
            let frames = how.frames(MARKER, GATEWAY);
            assert!(!frames.is_empty() && frames.iter().all(|frame| frame.len() <= MAX_FRAME), "{name}");
            let initiations = how == How::FloodOfInitiations;
            assert!(frames.iter().all(|frame| holds(frame) != initiations), "{name}");
            assert!(frames.iter().all(|frame| passes(frame) == initiations), "{name}");
        }
    }

    #[test]
    fn malformed_frames_do_not_parse_and_the_others_do() {
        let parses = |how: How| {
            let frames = how.frames(MARKER, GATEWAY);
            frames.iter().filter(|frame| Frame::parse(frame).is_ok()).count()
        };
        assert_eq!(
            (parses(How::Malformed), parses(How::OtherGateways), parses(How::NotWireGuard)),
            (0, 4, 4)
        );
    }

    #[test]
    fn command_line_that_is_not_understood_is_refused() {
        for line in ["uplink", "uplink malformed short 1", "uplink nothing kontor-leak-0042 1", "downlink"] {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert!(matches!(run(&words), Err(AttemptError::Usage)), "{line}");
        }
    }
}
