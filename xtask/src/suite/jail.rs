//! What holds the QEMU and the relay of a work VM that runs, as the host sees it.

use crate::{scene::running, workvm::HomePc};
use libtest_mimic::Failed;
use std::{fs, path::PathBuf};

/// Namespaces that a jailed process has for itself.
const SPACES: [&str; 7] = ["user", "mnt", "net", "ipc", "uts", "pid", "cgroup"];
/// Lines of `/proc/PID/status`.
const HELD: [&str; 6] = [
    "NoNewPrivs:\t1",
    "Seccomp:\t2",
    "CapInh:\t0000000000000000",
    "CapEff:\t0000000000000000",
    "CapBnd:\t0000000000000000",
    "CapAmb:\t0000000000000000",
];

/// Looks at both processes while the work VM runs.
pub(crate) fn confined(home: &HomePc, uplink: &str) -> Result<(), Failed> {
    let status = home.status().map_err(|error| error.to_string())?;
    if status["uplink"] != uplink || status["jail"]["limit"] != "address-space" {
        return Err(format!("status says {status}").into());
    }
    for (name, part) in [("qemu-system", "/firmware/bios-256k.bin"), ("kontor-relay", "/kontor-relay")] {
        let [pid] = running(name)[..] else {
            return Err(format!("{name}: {:?}", running(name)).into());
        };
        process(pid).and_then(|()| mounts(pid, part)).map_err(|words| format!("{name}: {words}"))?;
    }
    let [qemu] = running("qemu-system")[..] else { return Err("QEMU is gone".into()) };
    descriptors(qemu).map_err(Into::into)
}

fn process(pid: u32) -> Result<(), String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|error| error.to_string())?;
    if let Some(line) = HELD.iter().find(|line| !status.contains(**line)) {
        return Err(format!("{line} is not in {status}"));
    }
    // The last of its numbers is the one in its own namespace.
    let first = status.lines().find(|line| line.starts_with("NSpid:"));
    if first.and_then(|line| line.split_whitespace().last()) != Some("1") {
        return Err(format!("it is not the first process of its namespace: {first:?}"));
    }
    for space in SPACES {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).map_err(|e| e.to_string());
        if of(&pid.to_string())? == of("self")? {
            return Err(format!("its namespace {space} is the host's"));
        }
    }
    Ok(())
}

/// Every mount is read-only but /proc, which shows its own processes only; `part` is one of them.
fn mounts(pid: u32, part: &str) -> Result<(), String> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).map_err(|error| error.to_string())?;
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, _, _, _, place, options, ..] = fields[..] else { return Err(format!("a mount {line}")) };
        let tight = options.contains("nosuid") && options.contains("nodev");
        let proc = place == "/proc" && line.contains(" proc proc rw,subset=pid");
        let file = place != "/"
            && !proc
            && fs::metadata(format!("/proc/{pid}/root{place}")).is_ok_and(|m| m.is_dir());
        if !tight || file || !(proc || options.starts_with("ro,")) {
            return Err(format!("a mount {line}"));
        }
    }
    if table.contains(part) { Ok(()) } else { Err(format!("{part} is not in {table}")) }
}

/// Three standard descriptors, the ones that kontord handed over, and what QEMU makes of nothing.
fn descriptors(pid: u32) -> Result<(), String> {
    let directory = PathBuf::from(format!("/proc/{pid}/fd"));
    for entry in fs::read_dir(directory).map_err(|error| error.to_string())? {
        let path = entry.map_err(|error| error.to_string())?.path();
        let target = fs::read_link(&path).map_err(|error| error.to_string())?.to_string_lossy().into_owned();
        let known =
            ["socket:", "anon_inode:", "pipe:", "/memfd:"].iter().any(|kind| target.starts_with(kind));
        if !known && target != "/dev/null" && !target.ends_with("/root.img") {
            return Err(format!("its descriptor {} is {target}", path.display()));
        }
    }
    Ok(())
}
