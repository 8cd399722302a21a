//! What is missing for a start, in words.

use crate::{
    config::ConfigError,
    daemon::Daemon,
    exit::chain,
    fetch::clock_is_not_behind,
    host::{Accelerator, KvmVerdict, Trial, unix_now},
    office::HttpsOffice,
    qemu::Backend,
    slots,
    verbs::Check,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{process::Command, time::timeout};

/// How long QEMU may take to say its version, or its devices.
const QEMU_ANSWER: Duration = Duration::from_secs(10);
/// The oldest QEMU that has everything its command line asks for.
const QEMU_OLDEST: (u32, u32) = (7, 2);
/// The devices of every machine.
const DEVICES: [&str; 6] =
    ["isa-serial", "pvpanic", "virtio-blk-pci", "virtio-rng-pci", "virtio-serial-pci", "virtserialport"];
/// Those of the uplink as a network device.
const DEVICES_VFIO: [&str; 2] = ["intel-iommu", "virtio-net-pci"];
/// Free bytes that the state directory needs beside the release: logs, metadata, a file that is replaced.
const SPACE_MIN: u64 = 64 << 20;
/// Memory in MiB that a work VM takes beside its own.
const MEMORY_BESIDE_MIB: u64 = 192;

pub(crate) async fn examine(daemon: &Arc<Daemon>) -> Vec<Check> {
    let config = daemon.config();
    let mut checks = vec![
        found("qemu", qemu_version(&config.qemu).await),
        found("qemu's devices", qemu_devices(&config.qemu, config.uplink).await),
        jail(&config.jail()).await,
    ];
    if let Err(error) = daemon.try_kvm_again().await {
        tracing::debug!(error = chain(&error), "KVM was not tried");
    }
    let alive = daemon.is_alive().await;
    let on_disk = {
        let daemon = Arc::clone(daemon);
        tokio::task::spawn_blocking(move || on_disk(&daemon, alive)).await
    };
    checks.extend(on_disk.unwrap_or_else(|error| vec![found("kontord", Err(error.to_string()))]));
    if checks.iter().any(|check| check.name == DOCUMENTS && check.ok) {
        let office = HttpsOffice::new(config.office.clone(), daemon.store().clone());
        let reached = office.reach().await.map_err(|error| chain(&error));
        checks.push(found("office", reached.map(|()| format!("{} answers", config.office))));
    }
    checks
}

/// The check of keyset, device record and bundle.
const DOCUMENTS: &str = "documents";

fn found(name: &str, result: Result<String, String>) -> Check {
    let ok = result.is_ok();
    Check { name: name.to_owned(), ok, words: result.unwrap_or_else(|words| words) }
}

/// What QEMU prints when it is asked this.
async fn qemu(program: &Path, question: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(question).stdin(Stdio::null()).kill_on_drop(true);
    match timeout(QEMU_ANSWER, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(Ok(output)) => Err(format!("{} does not run ({})", program.display(), output.status)),
        Ok(Err(error)) => Err(format!("{} does not run: {error}; install QEMU", program.display())),
        Err(_) => Err(format!("{} does not answer", program.display())),
    }
}

async fn qemu_version(program: &Path) -> Result<String, String> {
    let text = qemu(program, &["--version"]).await?;
    let line = text.lines().next().unwrap_or_default();
    let (major, minor) = QEMU_OLDEST;
    match version(line) {
        Some(version) if version < QEMU_OLDEST => {
            Err(format!("{line} is too old; install QEMU {major}.{minor} or newer"))
        }
        Some(_) => Ok(line.to_owned()),
        None => Err(format!("{} does not say what version of QEMU it is", program.display())),
    }
}

/// The version in "QEMU emulator version 7.2.22 (…)".
fn version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.split_once("version ")?.1.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

async fn qemu_devices(program: &Path, uplink: Backend) -> Result<String, String> {
    let text = qemu(program, &["-device", "help"]).await?;
    let missing = missing_devices(&text, uplink);
    if missing.is_empty() {
        Ok(format!("{} has every device that is needed", program.display()))
    } else {
        let (program, missing) = (program.display(), missing.join(", "));
        Err(format!("{program} lacks {missing}; install a QEMU that is built with them"))
    }
}

/// Devices that QEMU's own list does not have.
fn missing_devices(list: &str, uplink: Backend) -> Vec<&'static str> {
    let uplinks: &[&str] = match uplink {
        Backend::Port => &[],
        Backend::Vfio => &DEVICES_VFIO,
    };
    let has = |device: &str| list.contains(&format!("name \"{device}\""));
    DEVICES.iter().chain(uplinks).copied().filter(|device| !has(device)).collect()
}

async fn jail(path: &Result<PathBuf, ConfigError>) -> Check {
    let result = match path {
        Ok(path) => crate::jail::check(path).await,
        Err(error) => Err(chain(error)),
    };
    found("jail", result.map(|()| "QEMU and the relay can be jailed".to_owned()))
}

fn on_disk(daemon: &Daemon, alive: bool) -> Vec<Check> {
    let (config, store) = (daemon.config(), daemon.store());
    let root = rustix::process::geteuid().is_root();
    let mut checks = vec![
        found("namespaces", namespaces(root, |setting| fs::read_to_string(setting).ok())),
        found("relay", relay(config.relay().map_err(|error| chain(&error)))),
    ];

    let key = store.host_key();
    let key_words = match &key {
        Ok(key) => Ok(format!("the host key is {}", key.public())),
        Err(error) if error.is_missing() => Err("there is no host key; run kontord host-key".to_owned()),
        Err(error) => Err(chain(error)),
    };
    checks.push(found("host key", key_words));

    let records = match key {
        Ok(key) => store.records(&key.public()).map_err(|error| {
            let words = chain(&error);
            if error.is_missing() { format!("{words}; run kontord provision") } else { words }
        }),
        Err(_) => Err("they cannot be checked without the host key".to_owned()),
    };
    let release = slots::verify_all(store, &config.release_root);
    checks.push(found(
        DOCUMENTS,
        records.as_ref().map_err(Clone::clone).map(|records| {
            let (keyset, revision) = (records.keyset.version(), records.bundle.revision);
            format!("keyset {keyset}, device {}, bundle {revision} verify", records.device.device)
        }),
    ));
    checks.push(found(
        "release",
        release
            .as_ref()
            .map_err(|error| format!("{}; run kontord install", chain(error)))
            .map(|manifest| format!("{} (version {}) is whole", manifest.image.release, manifest.version)),
    ));
    let emulation = records.as_ref().is_ok_and(|records| records.bundle.settings.allow_emulation);
    checks.push(found("kvm", kvm(&daemon.config().kvm, store.kvm_verdict(), emulation)));
    if let (Ok(records), Ok(manifest)) = (&records, &release) {
        let fits = crate::daemon::allowed(&records.bundle, manifest, Accelerator::Kvm);
        checks.push(found(
            "policy",
            fits.map_err(|error| chain(&error)).map(|()| "it allows this release".to_owned()),
        ));
    }
    let pieces = release.as_ref().map_or(0, |manifest| manifest.pieces().map(|piece| piece.bytes).sum());
    checks.push(found("disk", space(&config.state, pieces)));
    // A machine that runs has its memory already.
    if let (Ok(records), false) = (&records, alive) {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        checks.push(found("memory", memory(&meminfo, records.bundle.settings.memory_mib)));
    }
    let built_at = release.as_ref().map_or(0, |manifest| manifest.image.built_at);
    checks.push(found("clock", clock(unix_now(), built_at)));
    checks
}

fn relay(path: Result<PathBuf, String>) -> Result<String, String> {
    let path = path?;
    if path.is_file() {
        Ok(format!("{} is there", path.display()))
    } else {
        Err(format!("{} is missing; install Kontor again", path.display()))
    }
}

fn kvm(path: &Path, verdict: Option<KvmVerdict>, emulation: bool) -> Result<String, String> {
    let device = path.display();
    let words = match (Accelerator::best(path), verdict.map(|verdict| verdict.trial)) {
        (Accelerator::Kvm, Some(Trial::Works)) => return Ok(format!("a guest runs on {device}")),
        (Accelerator::Kvm, None) => return Ok(format!("{device} can be used; no guest was tried on it yet")),
        (Accelerator::Kvm, Some(Trial::Fails)) => format!(
            "{device} opens, but a guest does not run on it; on a virtual machine ask for nested virtualisation"
        ),
        (Accelerator::Kvm, Some(Trial::Silent)) => format!(
            "{device} opens, but a guest that was tried on it did not answer: either none runs there, or this PC \
             had too much to do; close other programs and run kontor doctor again"
        ),
        (Accelerator::Tcg, _) => no_kvm(path),
    };
    if emulation {
        Ok(format!("{words}; the policy allows emulation, which is slow and no security boundary"))
    } else {
        Err(words)
    }
}

/// Why KVM cannot be used at all.
fn no_kvm(path: &Path) -> String {
    let device = path.display();
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => format!(
            "{device} does not exist; enable virtualisation in the firmware, and load the module kvm_intel or kvm_amd"
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            format!("{device} may not be used by kontord's user; add it to the group kvm")
        }
        Err(error) => format!("{device} cannot be opened: {error}"),
        Ok(_) => format!("{device} is not the kernel's KVM"),
    }
}

/// Whether this user may make namespaces of its own, as what confines a work VM's processes does.
/// `read` reads a setting.
fn namespaces(root: bool, read: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let is = |setting: &str, value: &str| read(setting).is_some_and(|text| text.trim() == value);
    for (setting, value, only_users) in [
        ("/proc/sys/user/max_user_namespaces", "0", false),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", true),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", true),
    ] {
        if is(setting, value) && !(only_users && root) {
            return Err(format!("{setting} is {value}, which forbids user namespaces; ask IT to change it"));
        }
    }
    if read("/proc/sys/user/max_user_namespaces").is_none() {
        return Err("this kernel has no user namespaces; install Debian's own".to_owned());
    }
    Ok("user namespaces may be made".to_owned())
}

/// Whether the state directory has room for one more release of `release` bytes.
fn space(dir: &Path, release: u64) -> Result<String, String> {
    let free = rustix::fs::statvfs(dir).map_err(|errno| format!("look at {}: {errno}", dir.display()))?;
    enough(
        "MiB of disk",
        dir.display().to_string(),
        free.f_bavail.saturating_mul(free.f_frsize),
        release + SPACE_MIN,
    )
}

/// Whether there is memory for a machine of `machine_mib`.
fn memory(meminfo: &str, machine_mib: u32) -> Result<String, String> {
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|text| text.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let kib = kib.ok_or_else(|| "/proc/meminfo does not say how much memory is free".to_owned())?;
    let needed = (u64::from(machine_mib) + MEMORY_BESIDE_MIB) << 20;
    enough("MiB of memory", "this PC".to_owned(), kib << 10, needed)
}

fn enough(what: &str, place: String, free: u64, needed: u64) -> Result<String, String> {
    let (free_mib, needed_mib) = (free >> 20, needed.div_ceil(1 << 20));
    if free < needed {
        Err(format!("{place} has {free_mib} {what} left, {needed_mib} are needed; free some"))
    } else {
        Ok(format!("{place} has {free_mib} {what} left"))
    }
}

/// Whether a clock that says `now` lets a release be installed; one that was built at `built_at` is there.
fn clock(now: u64, built_at: u64) -> Result<String, String> {
    let behind = clock_is_not_behind(now, built_at).map_err(|error| chain(&error));
    behind.map(|()| "it is not behind the installed release".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_of_qemu_is_found_and_compared() {
        assert_eq!(version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0"), Some((10, 0)));
        assert!(version("QEMU emulator version 10.0").unwrap() > QEMU_OLDEST);
        assert!(version("QEMU emulator version 6.9.1").unwrap() < QEMU_OLDEST);
        for text in ["", "version", "QEMU emulator version x.y", "QEMU emulator version 7"] {
            assert_eq!(version(text), None, "{text}");
        }
    }

    #[test]
    fn devices_that_the_list_lacks_are_named() {
        let all: String =
            DEVICES.iter().chain(&DEVICES_VFIO).map(|name| format!("name \"{name}\", bus PCI\n")).collect();
        assert!(missing_devices(&all, Backend::Vfio).is_empty());
        let without = all.replace("name \"intel-iommu\"", "name \"amd-iommu\"");
        assert!(missing_devices(&without, Backend::Port).is_empty());
        assert_eq!(missing_devices(&without, Backend::Vfio), ["intel-iommu"]);
        assert_eq!(missing_devices("", Backend::Port), DEVICES);
    }

    #[test]
    fn each_way_to_forbid_namespaces_is_told_by_its_setting() {
        let settings = |changed: &'static str, to: &'static str| {
            move |setting: &str| {
                let usual = [
                    ("/proc/sys/user/max_user_namespaces", "15000\n"),
                    ("/proc/sys/kernel/unprivileged_userns_clone", "1\n"),
                    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "0\n"),
                ];
                let (_, value) = usual.into_iter().find(|(name, _)| *name == setting)?;
                Some(if setting.ends_with(changed) { to } else { value }.to_owned())
            }
        };
        assert!(namespaces(false, settings("none", "")).is_ok());
        for (changed, to, for_root) in [
            ("max_user_namespaces", "0\n", true),
            ("unprivileged_userns_clone", "0\n", false),
            ("apparmor_restrict_unprivileged_userns", "1\n", false),
        ] {
            assert!(namespaces(false, settings(changed, to)).unwrap_err().contains(changed));
            assert_eq!(namespaces(true, settings(changed, to)).is_err(), for_root, "{changed}");
        }
        assert!(namespaces(true, |_| None).is_err());
    }

    #[test]
    fn room_and_memory_are_enough_at_the_edge() {
        assert!(enough("MiB", "here".into(), 1 << 20, 1 << 20).is_ok());
        assert!(enough("MiB", "here".into(), (1 << 20) - 1, 1 << 20).unwrap_err().contains("1 are needed"));
        let meminfo = |mib: u64| format!("MemTotal: 9 kB\nMemAvailable:   {} kB\n", mib << 10);
        assert!(memory(&meminfo(512 + MEMORY_BESIDE_MIB), 512).is_ok());
        assert!(memory(&meminfo(511 + MEMORY_BESIDE_MIB), 512).is_err());
        assert!(memory("MemTotal: 9 kB", 512).is_err());
        assert!(space(Path::new("/proc/self"), u64::MAX - SPACE_MIN).is_err());
    }

    #[test]
    fn clock_may_be_two_days_behind() {
        use crate::fetch::CLOCK_SLACK_S;
        assert!(clock(0, CLOCK_SLACK_S).is_ok());
        assert!(clock(0, CLOCK_SLACK_S + 1).unwrap_err().contains("2 days"));
        assert!(clock(u64::MAX, 1).is_ok());
    }

    #[test]
    fn kvm_that_is_missing_forbidden_or_something_else_is_told_apart() {
        assert!(no_kvm(Path::new("/does/not/exist")).contains("does not exist"));
        assert!(no_kvm(Path::new("/dev/null")).contains("is not the kernel's KVM"));
        assert!(no_kvm(Path::new("/")).contains("cannot be opened"));
        assert!(kvm(Path::new("/dev/null"), None, true).unwrap().contains("allows emulation"));
        assert!(kvm(Path::new("/dev/null"), None, false).is_err());
    }
}
