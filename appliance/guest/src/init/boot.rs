//! The boot, step by step. Each state is a value that the next step consumes, so that no step can be
//! left out or taken twice; each is reported to the host when it is reached.
//!
//! ```text
//! Early     the host was heard; modules, disk, dm-verity, tenant, root, locks
//!   ▼
//! Verified  boot key, challenge, lease, clock, resolvers
//!   ▼
//! Leased    kontor-tunnel, addresses and routes at the gateway that answers first
//!   ▼
//! TunnelUp  hello at the gateway's post
//!   ▼
//! Admitted  state
//!   ▼
//! StateOpen session, or the probe of a test image
//!   ▼
//! Session   ready
//! ```
//!
//! Trusted are the kernel's command line and the initrd, which the host hashed against the signed
//! manifest. The host is not: what it sends is verified or obeyed only where it could have the same
//! by pulling the plug.

use super::events::{Event, Events};
use super::lease::{BootKey, BootSecret, Granted, jitter};
use super::life::Life;
use super::log::say;
use super::stop::Stop;
use super::supervise::{Lessee, Until, Watched, attend};
use super::uevent::Uevents;
use super::uplink::{Uplink, has_uplink_device};
use super::{lockdown, modules, ports, resolv, root, supervise, tenant, verity};
use crate::clock::{Moment, set_wall_clock};
use crate::link::{FromTunnel, Link, ToTunnel};
use crate::sys::{Power, start};
use kontor_release::CommandLine;
use kontor_trust::TrustedKeyset;
use kontor_wire::control::{BootState, FromGuest, FromHost};
use kontor_wire::probe;
use rustix::fs::{major, minor, stat};
use rustix::process::Pid;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// The disk with the root image.
const DISK: &str = "/dev/vda";
/// How long its node may take to appear once the device is there.
const DISK_MAX: Duration = Duration::from_secs(10);
/// Virtio devices by the drivers' bus: they were all found when the first process began.
const VIRTIO_BUS: &str = "/sys/bus/virtio/devices";
/// What a block device says of itself there (virtio 1.2, section 5: device id 2).
const VIRTIO_BLOCK: &str = "0x0002";
/// The tunnel's program in the root image.
const TUNNEL: &str = "/usr/lib/kontor/kontor-tunnel";
/// User and group that it runs as.
const TUNNEL_ID: u32 = 990;
/// Descriptors that it may have open: three streams, three inherited, what its event loop needs.
const TUNNEL_FILES: u64 = 16;
/// How long the first handshake may take, the start of the process included.
const TUNNEL_MAX: Duration = Duration::from_secs(30);
/// The probe's program in a test image.
const PROBE: &str = "/usr/lib/kontor/kontor-probe";
/// The tunnel's interface.
const INTERFACE: &str = "kontor0";
/// Its largest packet in bytes: what fits a datagram of 1500 over IPv6, less WireGuard's 80.
const MTU: u16 = 1420;
/// Most bytes of the kernel's command line (`COMMAND_LINE_SIZE` of x86).
const COMMAND_LINE_MAX: u64 = 2048;

/// The host was heard, nothing else is done.
pub(crate) struct Early {
    uevents: Uevents,
}

/// Everything that runs from now on was verified.
pub(crate) struct Verified {
    line: CommandLine,
    floor: TrustedKeyset,
    uplink: Uplink,
    /// Held so that the interface, and with it every route, outlives the tunnel's process.
    tun: OwnedFd,
    uevents: Uevents,
}

/// The office lets this boot in.
pub(crate) struct Leased {
    before: Verified,
    key: BootKey,
    secret: BootSecret,
    granted: Granted,
}

/// There is a session with the gateway.
pub(crate) struct TunnelUp {
    before: Verified,
    key: BootKey,
    life: Life,
    watched: Watched,
}

/// The gateway knows nothing newer than this boot's lease.
pub(crate) struct Admitted(TunnelUp);

/// There is a place for what the user writes.
pub(crate) struct StateOpen(TunnelUp);

/// The user can work.
pub(crate) struct Session(TunnelUp);

impl Early {
    /// The first state.
    pub(crate) fn reached(uevents: Uevents, events: &Events) -> Result<Self, Stop> {
        report(events, BootState::Early)?;
        Ok(Self { uevents })
    }

    /// Makes the verified image the root and locks the kernel down.
    pub(crate) fn verify(self, events: &Events) -> Result<Verified, Stop> {
        let line = command_line()?;
        let mut directories = vec![modules::DIRECTORY];
        if has_uplink_device().map_err(Stop::Uplink)? {
            directories.push(modules::VFIO_DIRECTORY);
        }
        for directory in directories {
            let (count, passed_over) = modules::load_all(directory).map_err(Stop::Module)?;
            say!("modules: {count}, {passed_over} of them not for this machine");
        }

        let floor = tenant::load(Path::new(tenant::DIRECTORY)).map_err(Stop::Tenant)?;
        say!("tenant {}, keyset {}", floor.tenant(), floor.version());

        let disk = self.disk()?;
        let device = verity::open_root(&line.verity, disk).map_err(Stop::Verity)?;
        root::mount_image(&device).map_err(Stop::Image)?;
        root::switch().map_err(Stop::Files)?;
        root::mount_late().map_err(Stop::Files)?;
        say!("root {} on {}", line.verity.root_hash, device.display());

        lockdown::lock().map_err(Stop::Lockdown)?;
        say!("locked down");

        set_host_name()?;
        kontor_tun::up("lo").map_err(system("bring lo up"))?;
        let tun = kontor_tun::create(INTERFACE).map_err(system("make the tunnel's interface"))?;
        let uplink = Uplink::open(&self.uevents).map_err(Stop::Uplink)?.ok_or(Stop::NoUplink)?;
        say!("uplink: {}", uplink.name());
        report(events, BootState::Verified)?;
        Ok(Verified { line, floor, uplink, tun, uevents: self.uevents })
    }

    /// Where the disk is. A machine without one is told at once: that is how a host tries its KVM.
    fn disk(&self) -> Result<(u32, u32), Stop> {
        if !has_block_device(Path::new(VIRTIO_BUS)).map_err(system("list the virtio devices"))? {
            return Err(Stop::NoDisk);
        }
        let look = || match stat(DISK) {
            Ok(found) => Ok(Some((major(found.st_rdev), minor(found.st_rdev)))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        };
        self.uevents.until(DISK_MAX, look).map_err(system("look for the disk"))?.ok_or(Stop::NoDisk)
    }
}

fn has_block_device(bus: &Path) -> io::Result<bool> {
    for device in std::fs::read_dir(bus)? {
        let kind = std::fs::read_to_string(device?.path().join("device"))?;
        if kind.trim_end() == VIRTIO_BLOCK {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Verified {
    /// Asks for a lease and checks the answer.
    pub(crate) fn lease(self, events: &mut Events) -> Result<Leased, Stop> {
        let (mut key, secret) = BootKey::generate().map_err(system("make the boot key"))?;
        let granted =
            ask(events, &mut key, &self.line, &self.floor, &mut Watched::default()).inspect(|granted| {
                let lease = &granted.checked().lease;
                say!(
                    "lease of {} for {}, revision {}",
                    granted.checked().lease_hash,
                    lease.device,
                    lease.revision
                );
            })?;
        adopt(&granted)?;
        report(events, BootState::Leased)?;
        Ok(Leased { before: self, key, secret, granted })
    }
}

/// Sets what a lease in force decides: the clock, the resolvers.
fn adopt(granted: &Granted) -> Result<(), Stop> {
    let checked = granted.checked();
    set_wall_clock(checked.lease.issued_at).map_err(system("set the clock"))?;
    resolv::write(Path::new(resolv::PATH), &checked.bundle.settings.resolvers)
        .map_err(system("write the resolvers"))
}

/// The first challenge of a boot and its answer (`lease.md` 6 to 18).
fn ask(
    events: &mut Events,
    key: &mut BootKey,
    line: &CommandLine,
    floor: &TrustedKeyset,
    watched: &mut Watched,
) -> Result<Granted, Stop> {
    let (challenge, fresh) =
        key.challenge(line.verity.root_hash, floor, Moment::now()).map_err(system("make a challenge"))?;
    events.tell_host(&FromGuest::Challenge(challenge))?;
    let until = fresh.until();
    loop {
        match events.next(Some(until))? {
            Event::Host(FromHost::Lease(untrusted)) => {
                return fresh.verify(untrusted, floor, line.built_at).map_err(Stop::Lease);
            }
            Event::Host(FromHost::Refused) => return Err(Stop::Refused),
            Event::Late => return Err(Stop::NoLease),
            event
            @ (Event::Host(_) | Event::Child(..) | Event::Tunnel(_) | Event::Post(_) | Event::Stood) => {
                watched.handle(event)?
            }
        }
    }
}

impl Leased {
    /// Gives the interface its addresses and the tunnel its key, and waits for the gateway.
    pub(crate) fn connect(self, events: &mut Events) -> Result<TunnelUp, Stop> {
        let Self { before, key, secret, granted } = self;
        // The gateway makes no peer of a lease that ended.
        let ends = granted.ends();
        let until = Moment::now().after(TUNNEL_MAX).min(ends);
        let none =
            || Stop::System { doing: "find the lease's gateway", source: io::ErrorKind::NotFound.into() };
        let configure = granted.configure(secret).ok_or_else(none)?;

        let (link, theirs) = Link::pair().map_err(system("make the tunnel's socket"))?;
        let (arguments, files) = before.uplink.passed(before.tun.as_fd(), theirs.as_fd());
        let power = Power::None { id: TUNNEL_ID, files_max: TUNNEL_FILES };
        let pid = start(TUNNEL, arguments, &files, power).map_err(system("start the tunnel"))?;
        let mut watched = Watched { tunnel: pid_of(pid), probe: None };
        drop(theirs);
        events.add_tunnel(link)?;

        let mut waiting = Some(ToTunnel::Configure(configure));
        let gateway = loop {
            match events.next(Some(until))? {
                Event::Tunnel(FromTunnel::Ready) => match waiting.take() {
                    Some(message) => events.tell_tunnel(&message)?,
                    None => return Err(Stop::Link(crate::link::LinkError::Malformed)),
                },
                Event::Tunnel(FromTunnel::Up(gateway)) => break gateway,
                Event::Late if until == ends => return Err(Stop::LeaseExpired),
                Event::Late => return Err(Stop::NoTunnel),
                event @ (Event::Host(_)
                | Event::Child(..)
                | Event::Tunnel(_)
                | Event::Post(_)
                | Event::Stood) => {
                    watched.handle(event)?;
                }
            }
        };
        say!("the session is with gateway {gateway}");
        let granted = granted.via(gateway);
        let (v4, v6) = granted.addresses().ok_or_else(none)?;
        set_up_interface(v4.into(), v6.into()).map_err(system("set the tunnel's interface up"))?;
        report(events, BootState::TunnelUp)?;
        let life = Life::new(granted, jitter, Moment::now());
        Ok(TunnelUp { before, key, life, watched })
    }
}

impl TunnelUp {
    /// Says hello at the gateway's post and compares what it knows (`lease.md` 19).
    pub(crate) fn greet(mut self, events: &mut Events) -> Result<Admitted, Stop> {
        let Self { before: Verified { line, floor, .. }, key, life, watched } = &mut self;
        let mut lessee = Lessee { key, line, floor, adopt };
        attend(events, watched, life, &mut lessee, Until::Admitted)?;
        report(events, BootState::Admitted)?;
        Ok(Admitted(self))
    }
}

impl Admitted {
    /// Mounts memory in place of a state disk: what the user writes is gone at power-off.
    pub(crate) fn open_state(self, events: &Events) -> Result<StateOpen, Stop> {
        root::mount_state().map_err(Stop::Files)?;
        report(events, BootState::StateOpen)?;
        Ok(StateOpen(self.0))
    }
}

impl StateOpen {
    /// Starts what the image is for.
    pub(crate) fn begin(self, events: &Events) -> Result<Session, Stop> {
        let Self(mut up) = self;
        if up.before.line.test {
            up.watched.probe = start_probe(&up.before.uevents)?;
        }
        report(events, BootState::Session)?;
        events.tell_host(&FromGuest::Ready)?;
        say!("ready");
        Ok(Session(up))
    }
}

impl Session {
    /// Keeps the session until something ends it.
    pub(crate) fn keep(self, events: &mut Events) -> Stop {
        let Self(TunnelUp { before, mut key, life, watched }) = self;
        let Verified { line, floor, .. } = &before;
        supervise::run(events, watched, life, &mut Lessee { key: &mut key, line, floor, adopt })
    }
}

/// Serves the probe channel where the host has one.
fn start_probe(uevents: &Uevents) -> Result<Option<Pid>, Stop> {
    let port =
        ports::open_named(uevents, probe::PORT, Duration::ZERO).map_err(system("open the probe's port"))?;
    let Some(port) = port else {
        say!("a test image without a port for its probe");
        return Ok(None);
    };
    let pid = start(PROBE, &[], &[port.as_fd()], Power::Inherited).map_err(system("start the probe"))?;
    say!("the probe is served");
    Ok(pid_of(pid))
}

fn command_line() -> Result<CommandLine, Stop> {
    use std::io::Read;
    let mut text = String::new();
    let file = std::fs::File::open("/proc/cmdline").map_err(system("read the command line"))?;
    file.take(COMMAND_LINE_MAX).read_to_string(&mut text).map_err(system("read the command line"))?;
    CommandLine::parse(&text).map_err(Stop::CommandLine)
}

fn set_host_name() -> Result<(), Stop> {
    let name = std::fs::read("/etc/hostname").map_err(system("read the host's name"))?;
    rustix::system::sethostname(name.trim_ascii())
        .map_err(|error| Stop::System { doing: "set the host's name", source: error.into() })
}

fn set_up_interface(v4: std::net::IpAddr, v6: std::net::IpAddr) -> io::Result<()> {
    kontor_tun::configure(INTERFACE, &[v4.into(), v6.into()], MTU)?;
    kontor_tun::up(INTERFACE)?;
    for everywhere in ["0.0.0.0/0", "::/0"] {
        kontor_tun::add_route(INTERFACE, everywhere.parse().expect("a network"))?;
    }
    Ok(())
}

fn pid_of(raw: u32) -> Option<Pid> {
    i32::try_from(raw).ok().and_then(Pid::from_raw)
}

fn report(events: &Events, state: BootState) -> Result<(), Stop> {
    let at_ms = Moment::now().millis();
    say!("state {}", state.name());
    Ok(events.tell_host(&FromGuest::State { state, at_ms })?)
}

fn system(doing: &'static str) -> impl FnOnce(io::Error) -> Stop {
    move |source| Stop::System { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::control::tests::Host;
    use crate::init::fixture::{ISSUED_AT, Office, V4};
    use kontor_release::{Digest, Verity};
    use kontor_wire::reason::StopReason;

    fn line() -> CommandLine {
        let verity = Verity { root_hash: Digest([3; 32]), salt: [0; 32], data_blocks: 1 };
        CommandLine { verity, built_at: ISSUED_AT, test: false }
    }

    #[test]
    fn block_device_is_found_among_others_and_its_absence_is_seen() {
        let bus = tempfile::tempdir().unwrap();
        assert!(!has_block_device(bus.path()).unwrap());
        for (name, kind) in [("virtio0", "0x0003\n"), ("virtio1", "0x0002\n")] {
            std::fs::create_dir(bus.path().join(name)).unwrap();
            std::fs::write(bus.path().join(name).join("device"), kind).unwrap();
            assert_eq!(has_block_device(bus.path()).unwrap(), name == "virtio1");
        }
    }

    /// Asks for a lease while `answer` plays the host.
    fn asked(answer: impl FnOnce(&mut Host, &Office) + Send) -> Result<Granted, Stop> {
        let office = Office::new();
        let (mut host, control) = Host::connected();
        let mut events = Events::new(control, None).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| answer(&mut host, &office));
            let (mut key, _) = BootKey::generate().unwrap();
            ask(&mut events, &mut key, &line(), &office.floor(), &mut Watched::default())
        })
    }

    fn challenge(host: &mut Host) -> kontor_wire::control::Challenge {
        let received = host.receive();
        let FromGuest::Challenge(challenge) = received else { panic!("{received:?} instead of a challenge") };
        challenge
    }

    #[test]
    fn lease_for_the_challenge_is_taken() {
        let granted = asked(|host, office| {
            let challenge = challenge(host);
            assert_eq!((challenge.seq, challenge.verity_root, challenge.keyset_version), (0, [3; 32], 1));
            // Word of something newer does not disturb the question, nor does the host's sleep.
            host.send(&FromHost::Nudge);
            host.send(&FromHost::Woken);
            host.send(&FromHost::Lease(office.answer(&challenge)));
        });
        assert_eq!(granted.unwrap().addresses().unwrap().0, V4);
    }

    #[test]
    fn first_answer_uses_the_challenge_up_even_when_it_is_bad() {
        let refused = asked(|host, office| {
            let challenge = challenge(host);
            host.send(&FromHost::Lease(office.answer_with(&challenge, |lease| lease.nonce = [0; 32])));
            host.send(&FromHost::Lease(office.answer(&challenge)));
        });
        assert_eq!(refused.unwrap_err().reason(), StopReason::BadLease);
    }

    #[test]
    fn host_without_a_lease_ends_the_boot() {
        let refused = asked(|host, _| {
            challenge(host);
            host.send(&FromHost::Refused);
        });
        assert_eq!(refused.unwrap_err().reason(), StopReason::NoLease);
    }

    #[test]
    fn power_off_is_obeyed_while_a_lease_is_awaited() {
        let stopped = asked(|host, _| {
            challenge(host);
            host.send(&FromHost::PowerOff);
        });
        assert_eq!(stopped.unwrap_err().reason(), StopReason::Requested);
    }

    #[test]
    fn host_that_goes_away_while_a_lease_is_awaited_ends_the_boot() {
        let stopped = asked(|host, _| {
            challenge(host);
            host.stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
        assert_eq!(stopped.unwrap_err().reason(), StopReason::BadControl);
    }
}
