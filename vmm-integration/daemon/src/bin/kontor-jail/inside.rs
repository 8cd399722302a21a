//! The first process of the jail, until it becomes the program.

use crate::{
    arguments::{Profile, Start, Task},
    layout::{Bind, LIBRARIES, Layout, MODULES},
};
use kontor_jail::{
    JailError, chain, counts_threads_apart, drop_capabilities, restrict,
    seccomp::{self, Filter, Line},
    sys::{self, Exec, Tight},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsRawFd, OwnedFd},
    fs::{Mode, mkdir, rmdir},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    process::{
        Resource, Rlimit, Signal, chdir, pivot_root, set_parent_process_death_signal, setrlimit, setsid,
        umask,
    },
};
use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// A directory that every host has, over which the new root is made. What lies in it stays to be found under [`OLD`].
const BASE: &str = "/tmp";
/// The host's root in the jail, until it is taken away.
const OLD: &str = "/old";
/// A thread's stack. The C library reserves as much for each, also of those that hardly use any.
const STACK: u64 = 2 << 20;

/// Becomes the program. What is returned was told to `tell` already.
pub(crate) fn enter(task: &Task, layout: &Layout, parent: &OwnedFd, tell: &OwnedFd) -> JailError {
    let error = match prepare(task, layout, parent, tell) {
        Ok(never) => match never {},
        Err(Stop::Done) => std::process::exit(0),
        Err(Stop::Failed(error)) => error,
    };
    let _ = rustix::io::write(tell, chain(&error).as_bytes());
    std::process::exit(1)
}

enum Stop {
    /// There is nothing to become.
    Done,
    Failed(JailError),
}

impl From<JailError> for Stop {
    fn from(error: JailError) -> Self {
        Self::Failed(error)
    }
}

fn prepare(task: &Task, layout: &Layout, parent: &OwnedFd, tell: &OwnedFd) -> Result<Infallible, Stop> {
    let failed = |doing: &'static str| JailError::at::<Errno>(doing);
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("be tied to the parent"))?;
    // Had it ended before that, its descriptor would say so.
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(parent, PollFlags::IN)], Some(&at_once));
    if ended.map_err(failed("look after the parent"))? != 0 {
        return Err(failed("be tied to the parent")(Errno::SRCH).into());
    }
    setsid().map_err(failed("leave the session"))?;
    umask(Mode::from_raw_mode(0o077));
    rustix::system::sethostname(b"jail").map_err(failed("name the host"))?;
    sys::leave_keyring().map_err(JailError::at("leave the keyring"))?;
    root(layout)?;
    if let Task::Start(start) = task {
        limits(start)?;
    }
    drop_capabilities()?;
    rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    restrict(&layout.grants())?;
    let Task::Start(start) = task else { return Err(Stop::Done) };
    become_program(start, tell).map_err(Into::into)
}

/// A new root with what `layout` names and nothing else.
fn root(layout: &Layout) -> Result<(), JailError> {
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    mount_change("/", private).map_err(JailError::at("keep mounts to this process"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", BASE, "tmpfs", flags, c"mode=0755,size=1m")
        .map_err(JailError::at("make an empty root"))?;
    let below = Path::new(BASE).join(&OLD[1..]);
    let directory = Mode::from_raw_mode(0o755);
    mkdir(&below, directory).map_err(JailError::at("make an empty root"))?;
    pivot_root(BASE, &below).map_err(JailError::at("enter the empty root"))?;
    chdir("/").map_err(JailError::at("enter the empty root"))?;
    let groups = [
        (&layout.programs, Tight::ReadOnly),
        (&layout.libraries, Tight::ReadOnly),
        (&layout.data, Tight::Data),
    ];
    for (binds, how) in groups {
        binds.iter().try_for_each(|bind| place(bind, how))?;
    }
    if let Some(device) = &layout.device {
        place(&Bind { from: device.clone(), to: device.clone() }, Tight::Device)?;
    }
    mkdir("/proc", directory).map_err(JailError::at("make /proc"))?;
    // Processes of this namespace, nothing of the host.
    mount("proc", "/proc", "proc", flags | MountFlags::NOEXEC, c"subset=pid").map_err(JailError::at(
        "mount a /proc of its own, which hosts refuse that hide a part of theirs (containers do)",
    ))?;
    unmount(OLD, UnmountFlags::DETACH).map_err(JailError::at("leave the host's root"))?;
    rmdir(OLD).map_err(JailError::at("leave the host's root"))?;
    sys::tighten(Path::new("/"), Tight::Data).map_err(JailError::at("make the root read-only"))
}

/// Shows one file of the host in the jail.
fn place(bind: &Bind, how: Tight) -> Result<(), JailError> {
    let doing = || format!("show {} in the jail", bind.from.display());
    let failed = |error: io::Error| JailError { doing: doing(), source: error };
    if let Some(parent) = bind.to.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    // Two names may stand for one place: then it is there already.
    if bind.to.exists() {
        return Ok(());
    }
    fs::File::create(&bind.to).map_err(failed)?;
    let from: PathBuf = Path::new(OLD).join(bind.from.strip_prefix("/").unwrap_or(&bind.from));
    mount_bind(from, &bind.to).map_err(|error| failed(error.into()))?;
    sys::tighten(&bind.to, how).map_err(failed)
}

fn limits(start: &Start) -> Result<(), JailError> {
    let mut limits = vec![
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Stack, STACK),
        (Resource::Nofile, start.files),
    ];
    limits.extend(start.memory.map(|memory| (Resource::As, memory)));
    limits.extend(counts_threads_apart().then_some((Resource::Nproc, start.threads)));
    for (resource, most) in limits {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(JailError::at("set limits"))?;
    }
    Ok(())
}

fn become_program(start: &Start, tell: &OwnedFd) -> Result<Infallible, JailError> {
    let text = |word: &OsStr| CString::new(word.as_bytes()).map_err(JailError::at("read the command line"));
    let program = text(start.program.as_os_str())?;
    let mut arguments = vec![program.clone()];
    for word in &start.arguments {
        arguments.push(text(word)?);
    }
    let environment = [
        format!("LD_LIBRARY_PATH={LIBRARIES}"),
        format!("QEMU_MODULE_DIR={MODULES}"),
        // Each arena is a reservation of address space, which is limited.
        "MALLOC_ARENA_MAX=2".to_owned(),
    ];
    let environment = environment.map(|line| text(OsStr::new(&line)));
    let environment = environment.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut keep = vec![0, 1, 2, tell.as_raw_fd()];
    keep.extend(&start.keep);
    // SAFETY: from here on only `tell` is used, which is kept and closes on exec.
    unsafe { sys::close_all_but(&keep) }.map_err(JailError::at("close descriptors"))?;
    if let Some(filter) = filter(start.profile) {
        sys::install(&filter, Exec::Once).map_err(JailError::at("filter system calls"))?;
    }
    let source = sys::execute(&program, &arguments, &environment);
    Err(JailError { doing: format!("start {}", start.program.display()), source })
}

/// The relay filters itself, more tightly than a program can be that is still to be loaded.
fn filter(profile: Profile) -> Option<Filter> {
    let ioctl: Line = match profile {
        Profile::Qemu => seccomp::QEMU_IOCTL,
        Profile::QemuKvm => seccomp::QEMU_KVM_IOCTL,
        Profile::Relay => return None,
    };
    Some(Filter::new(&[seccomp::QEMU, &[ioctl]].concat()))
}
