//! `kontor-jail PROFILE --report FD --keep FD… --memory BYTES --files N --threads N -- PROGRAM ARGUMENT…` starts a program in a
//! jail and ends as it ended. `kontor-jail check` says whether this host lets one be made.
//!
//! On the descriptor `--report` it says `PID\n` once the program runs; when that descriptor's other end closes,
//! it ends the program. What goes wrong before is told on standard error with exit code 125.

mod arguments;
mod inside;
mod layout;

use arguments::{Arguments, Task};
use kontor_jail::{JailError, chain, drop_capabilities, sys};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsRawFd, OwnedFd},
    io::{retry_on_intr, write},
    pipe::{PipeFlags, pipe_with},
    process::{
        Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getegid, geteuid, getpid,
        kill_process, pidfd_open, pidfd_send_signal, set_dumpable_behavior, set_parent_process_death_signal,
        setrlimit, waitpid,
    },
    thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    process::ExitCode,
};

/// The jail could not be made.
const NO_JAIL: u8 = 125;
/// uid and gid of a jailed program when kontord is root: of the range that nobody hands out
/// (systemd's UIDS-GIDS: 1879048192 to 2147483647 are unused).
const STRANGER: u32 = 1_879_067_220;
/// What such a program sees as its own uid and gid.
const INSIDE: u32 = 1;

fn main() -> ExitCode {
    let outcome = Arguments::parse(std::env::args_os().skip(1)).and_then(|arguments| run(&arguments));
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kontor-jail: {}", chain(&error));
            ExitCode::from(NO_JAIL)
        }
    }
}

fn run(arguments: &Arguments) -> Result<u8, JailError> {
    let layout = layout::Layout::of(&arguments.task)?;
    let kontord = match &arguments.task {
        // SAFETY: the number comes from kontord, which gave it to nobody else; nothing is opened yet that
        // owns it.
        Task::Start(start) => Some(unsafe { sys::take(start.report) }?),
        Task::Check => None,
    };
    // A core file, and whatever program the host hands one to, gets nothing of this process and its child.
    fs::write("/proc/self/coredump_filter", "0").map_err(JailError::at("keep memory out of core files"))?;
    become_stranger(layout.device.as_deref())?;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let namespaces = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP
        | UnshareFlags::NEWPID;
    sys::unshare(namespaces).map_err(JailError::at(FORBIDDEN))?;
    let map = |file: &str, line: String| {
        fs::write(format!("/proc/self/{file}"), line).map_err(JailError::at(FORBIDDEN))
    };
    map("setgroups", "deny".into())?;
    map("uid_map", format!("{INSIDE} {uid} 1"))?;
    map("gid_map", format!("{INSIDE} {gid} 1"))?;

    // The privilege to die with kontord was lost with the uid.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(JailError::at("be tied to kontord"))?;
    let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(JailError::at("watch this process"))?;
    let (told, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(JailError::at("make a pipe"))?;
    match sys::fork().map_err(JailError::at("make the first process of the namespace"))? {
        Some(child) => {
            drop((tell, own));
            outside(child, told, kontord)
        }
        None => {
            drop(told);
            Err(inside::enter(&arguments.task, &layout, &own, &tell))
        }
    }
}

const FORBIDDEN: &str = "make user namespaces, without which nothing can be jailed on this host; allow them (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns)";

/// Root gives itself away: what is jailed then is nobody's. Where that uid is not mapped, this is no root that
/// the host knows, and it stays what it is.
fn become_stranger(device: Option<&Path>) -> Result<(), JailError> {
    use rustix::{
        process::DumpableBehavior,
        process::{Gid, Uid},
    };
    if !geteuid().is_root() || !maps("/proc/self/uid_map") || !maps("/proc/self/gid_map") {
        return Ok(());
    }
    let failed = || JailError::at::<rustix::io::Errno>("become an unused user");
    // The group of KVM's device is what lets an ordinary user open it.
    let group = device
        .and_then(|path| fs::metadata(path).ok())
        .map(|metadata| metadata.gid())
        .filter(|gid| *gid != 0);
    let groups: Vec<Gid> = group.into_iter().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(STRANGER), Gid::from_raw(STRANGER));
    set_thread_groups(&groups).map_err(failed())?;
    set_thread_res_gid(gid, gid, gid).map_err(failed())?;
    set_thread_res_uid(uid, uid, uid).map_err(failed())?;
    // Else the files by which a user namespace is set up belong to root.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(failed())
}

/// Whether the stranger's number is one of this namespace's.
fn maps(file: &str) -> bool {
    fs::read_to_string(file).unwrap_or_default().lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().filter_map(|word| word.parse::<u64>().ok());
        let (Some(first), Some(_), Some(count)) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        (first..first.saturating_add(count)).contains(&u64::from(STRANGER))
    })
}

/// The jailed program's parent: waits for its end or kontord's.
fn outside(child: Pid, told: OwnedFd, kontord: Option<OwnedFd>) -> Result<u8, JailError> {
    let failed = || JailError::at::<rustix::io::Errno>("follow the jailed program");
    let program = pidfd_open(child, PidfdFlags::empty()).map_err(failed())?;
    let mut words = String::new();
    // Nothing is said, and the pipe closes, when the program is executed.
    fs::File::from(told).read_to_string(&mut words).map_err(JailError::at("listen to the jailed program"))?;
    if !words.is_empty() {
        let _ = waitpid(Some(child), WaitOptions::empty());
        return Err(JailError { doing: "enter the jail".into(), source: io::Error::other(words) });
    }
    let Some(kontord) = kontord else { return ended(child) };
    let mut keep = vec![2, kontord.as_raw_fd(), program.as_raw_fd()];
    keep.sort_unstable();
    // SAFETY: this function uses only these two from here on, and panics and errors write to 2.
    unsafe { sys::close_all_but(&keep) }.map_err(JailError::at("close descriptors"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed())?;
    drop_capabilities()?;
    if retry_on_intr(|| write(&kontord, format!("{}\n", child.as_raw_nonzero()).as_bytes())).is_err() {
        let _ = pidfd_send_signal(&program, Signal::KILL);
        return ended(child);
    }
    loop {
        let mut fds = [PollFd::new(&program, PollFlags::IN), PollFd::new(&kontord, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, None)).map_err(failed())?;
        if fds.iter().all(|fd| fd.revents().is_empty()) {
            continue;
        }
        if !fds[1].revents().is_empty() {
            // kontord says nothing: it has closed its end.
            let _ = pidfd_send_signal(&program, Signal::KILL);
        }
        return ended(child);
    }
}

/// Waits for the child and ends as it did.
fn ended(child: Pid) -> Result<u8, JailError> {
    let status: Option<WaitStatus> = retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()))
        .map_err(JailError::at("wait for the jailed program"))?
        .map(|(_, status)| status);
    let signal = status.and_then(WaitStatus::terminating_signal).and_then(Signal::from_named_raw);
    if let Some(signal) = signal {
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        setrlimit(Resource::Core, none).map_err(JailError::at("leave no core file"))?;
        kill_process(getpid(), signal).map_err(JailError::at("end as the jailed program ended"))?;
    }
    let code = status.and_then(WaitStatus::exit_status).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}
