//! The control group (version 2) that holds QEMU's memory, processor and tasks, where kontord was given a
//! directory of them for itself, as systemd's `Delegate=yes` does.
//!
//! ```text
//! kontord.service      the delegated directory; systemd marks it by the attribute user.delegate = 1
//! ├── kontord          kontord, which must not be where controllers are handed out
//! ├── qemu             the work VM's QEMU and its jailer, while there is one
//! └── trial            those of a trial of KVM, while there is one
//! ```
//!
//! The mark is asked for, and not whether the directory can be written: to root every one can.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where kontord itself goes.
const OWN: &str = "kontord";
/// How long the processes of a group may take to be gone after they were killed.
const EMPTIED: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };
/// Processes and threads of QEMU and its jailer: its processors, and 64 at most that read the disk. The jail
/// itself has the same limit.
pub(crate) const TASKS_MAX: u64 = 128;
/// The time in which a processor's share is counted, in microseconds.
const PERIOD_US: u64 = 100_000;

/// A directory of control groups that is kontord's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegated {
    root: PathBuf,
    /// Whether processor time can be limited, and the number of tasks.
    cpu: bool,
    tasks: bool,
}

/// What QEMU may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: usize,
}

/// Whose QEMU a group is for. There is one of each at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    WorkVm,
    /// What KVM is tried with. A work VM may be started, or run, meanwhile.
    Trial,
}

impl Place {
    const ALL: [Self; 2] = [Self::WorkVm, Self::Trial];

    fn name(self) -> &'static str {
        match self {
            Self::WorkVm => "qemu",
            Self::Trial => "trial",
        }
    }
}

/// A control group that goes when this is dropped, with whatever is still in it.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
    limits_cpu: bool,
    limits_tasks: bool,
}

impl Delegated {
    /// The directory that this process was given, or `None`. What an earlier kontord left there is ended and removed.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn take() -> io::Result<Option<Self>> {
        let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}"));
        match own_directory(&read("mountinfo")?, &read("cgroup")?) {
            Some(own) => Self::at(&own, is_delegated),
            None => Ok(None),
        }
    }

    /// The same for a process whose control group is `own`; `is_delegated` says which ones were given away.
    fn at(own: &Path, is_delegated: impl Fn(&Path) -> bool) -> io::Result<Option<Self>> {
        // With `DelegateSubgroup=kontord` systemd has put kontord below already. A parent is not looked at
        // otherwise: it may be that of a whole user, who has another manager for it.
        let parent = own.parent().filter(|_| own.ends_with(OWN));
        let Some(root) = [Some(own), parent].into_iter().flatten().find(|path| is_delegated(path)) else {
            return Ok(None);
        };
        let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
        let has = |name: &str| controllers.split_ascii_whitespace().any(|word| word == name);
        if !has("memory") {
            return Ok(None);
        }
        let delegated = Self { root: root.to_owned(), cpu: has("cpu"), tasks: has("pids") };
        if root == own {
            let below = root.join(OWN);
            make(&below)?;
            fs::write(below.join("cgroup.procs"), std::process::id().to_string())?;
        }
        Place::ALL.iter().try_for_each(|place| remove(&root.join(place.name())))?;
        let wanted = [("+memory", true), (" +cpu", delegated.cpu), (" +pids", delegated.tasks)];
        let wanted: String = wanted.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
        fs::write(root.join("cgroup.subtree_control"), wanted)?;
        Ok(Some(delegated))
    }

    /// A group for the QEMU of `place`; of one that is still there nothing is left.
    pub(crate) fn group(&self, place: Place, share: Share) -> io::Result<Group> {
        let path = self.root.join(place.name());
        remove(&path)?;
        make(&path)?;
        let group = Group { path, limits_cpu: self.cpu, limits_tasks: self.tasks };
        let set = |file: &str, value: String| fs::write(group.path.join(file), value);
        set("memory.max", share.memory_bytes.to_string())?;
        // What the guest has in memory is not written to the PC's disk.
        set("memory.swap.max", "0".into())?;
        if self.cpu {
            let most = PERIOD_US.saturating_mul(share.cpus as u64);
            set("cpu.max", format!("{most} {PERIOD_US}"))?;
        }
        if self.tasks {
            set("pids.max", TASKS_MAX.to_string())?;
        }
        Ok(group)
    }
}

impl Group {
    /// Whoever writes `0` to this is in the group from then on.
    pub(crate) fn door(&self) -> io::Result<fs::File> {
        fs::OpenOptions::new().write(true).open(self.path.join("cgroup.procs"))
    }

    /// Whether it limits the processor too.
    pub(crate) fn limits_cpu(&self) -> bool {
        self.limits_cpu
    }

    /// Whether it limits the number of tasks.
    pub(crate) fn limits_tasks(&self) -> bool {
        self.limits_tasks
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a control group is left");
        }
    }
}

/// The directory of the calling process' group, from its lists of mounts and of groups.
fn own_directory(mounts: &str, groups: &str) -> Option<PathBuf> {
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    if group.split('/').any(|name| name == "..") {
        // It is outside what this process may see.
        return None;
    }
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (shown, at) = (place.next()?, place.next()?);
        // A name with a blank in it is written in another way; nobody mounts them there.
        let plain = kind.starts_with("cgroup2 ") && !at.contains('\\');
        let below = Path::new(group).strip_prefix(shown).ok()?;
        plain.then(|| if below == Path::new("") { at.into() } else { Path::new(at).join(below) })
    })
}

fn is_delegated(path: &Path) -> bool {
    let mut value = [0; 8];
    rustix::fs::getxattr(path, "user.delegate", &mut value)
        .is_ok_and(|length| value.starts_with(b"1") && length == 1)
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Removes a group; if there are processes in it, they are killed.
fn remove(path: &Path) -> io::Result<()> {
    let gone = |removed: io::Result<()>| match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match gone(fs::remove_dir(path)) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        removed => return removed,
    }
    let mut events = fs::File::open(path.join("cgroup.events"))?;
    fs::write(path.join("cgroup.kill"), "1")?;
    loop {
        let mut words = String::new();
        io::Seek::rewind(&mut events)?;
        io::Read::read_to_string(&mut events, &mut words)?;
        if words.lines().any(|line| line == "populated 0") {
            return gone(fs::remove_dir(path));
        }
        // The kernel says when the file changes.
        if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&EMPTIED))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    const MOUNTS: &str = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
        29 22 0:25 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";

    #[test]
    fn own_directory_is_below_the_mount_of_version_2() {
        let service = Some(PathBuf::from("/sys/fs/cgroup/system.slice/kontord.service"));
        assert_eq!(own_directory(MOUNTS, "0::/system.slice/kontord.service\n"), service);
        assert_eq!(own_directory(MOUNTS, "4:memory:/a\n0::/\n"), Some("/sys/fs/cgroup".into()));
        // A part of the tree is mounted, as in a container.
        let part = MOUNTS.replace("0:26 /", "0:26 /box");
        assert_eq!(own_directory(&part, "0::/box/a\n"), Some("/sys/fs/cgroup/a".into()));
        assert_eq!(own_directory(&part, "0::/boxes/a\n"), None);
        assert_eq!(own_directory(MOUNTS, "4:memory:/a\n"), None);
        assert_eq!(own_directory(MOUNTS, "0::/../a\n"), None);
        assert_eq!(own_directory("", "0::/a\n"), None);
        assert_eq!(own_directory("x - cgroup2\n - cgroup2 x", "0::/a\n"), None);
    }

    /// What looks like kontord's directory.
    fn looks_like(controllers: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
        dir
    }

    #[test]
    fn kontord_goes_below_and_hands_out_what_it_was_given() {
        let dir = looks_like("cpuset cpu io memory pids\n");
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        let delegated = Delegated::at(dir.path(), |path| path == dir.path()).unwrap().unwrap();
        assert_eq!(read("kontord/cgroup.procs"), std::process::id().to_string());
        assert_eq!(read("cgroup.subtree_control"), "+memory +cpu +pids");
        let group = delegated.group(Place::WorkVm, Share { memory_bytes: 3 << 20, cpus: 2 }).unwrap();
        // A trial is beside it and takes nothing from it.
        let trial = delegated.group(Place::Trial, Share { memory_bytes: 1 << 20, cpus: 1 }).unwrap();
        assert!(group.limits_cpu() && trial.limits_cpu() && group.limits_tasks());
        for (file, value) in [
            ("qemu/memory.max", "3145728"),
            ("qemu/memory.swap.max", "0"),
            ("qemu/cpu.max", "200000 100000"),
            ("qemu/pids.max", "128"),
            ("trial/memory.max", "1048576"),
            ("trial/cpu.max", "100000 100000"),
        ] {
            assert_eq!(read(file), value, "{file}");
        }
    }

    #[test]
    fn kontord_that_was_put_below_stays_there() {
        let dir = looks_like("memory");
        let own = dir.path().join("kontord");
        assert_eq!(Delegated::at(&dir.path().join("other"), |path| path == dir.path()).unwrap(), None);
        let delegated = Delegated::at(&own, |path| path == dir.path()).unwrap().unwrap();
        assert!(!own.exists());
        assert_eq!(fs::read_to_string(dir.path().join("cgroup.subtree_control")).unwrap(), "+memory");
        let group = delegated.group(Place::WorkVm, Share { memory_bytes: 1, cpus: 1 }).unwrap();
        assert!(!group.limits_cpu() && !group.limits_tasks() && !dir.path().join("qemu/cpu.max").exists());
    }

    #[test]
    fn directory_without_the_mark_or_the_memory_is_left_alone() {
        for (controllers, marked) in [("cpu memory pids", false), ("cpu pids", true), ("", true)] {
            let dir = looks_like(controllers);
            assert_eq!(Delegated::at(dir.path(), |path| marked && path == dir.path()).unwrap(), None);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{controllers}");
        }
    }

    /// A group of the kernel's, where one may be made; whether it has the memory's controller.
    fn real() -> Option<(PathBuf, bool)> {
        let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap();
        let Some(own) = own_directory(&read("mountinfo"), &read("cgroup")) else {
            eprintln!("skipped: no control groups of version 2 here");
            return None;
        };
        let path = own.join(format!("kontor-test-{}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            eprintln!("skipped: no control group can be made in {}: {error}", own.display());
            return None;
        }
        let controllers = fs::read_to_string(path.join("cgroup.controllers")).unwrap();
        Some((path, controllers.split_ascii_whitespace().any(|name| name == "memory")))
    }

    #[test]
    fn group_of_the_kernel_is_entered_and_removed_with_what_is_in_it() {
        let Some((path, has_memory)) = real() else { return };
        let below = path.join(Place::WorkVm.name());
        fs::create_dir(&below).unwrap();
        assert!(!is_delegated(&path));
        let marked = rustix::fs::setxattr(&path, "user.delegate", b"1", rustix::fs::XattrFlags::empty());
        assert_eq!(is_delegated(&path), marked.is_ok());
        let group = Group { path: below.clone(), limits_cpu: false, limits_tasks: false };
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped());
        crate::sys::confine(&mut command, 3, Some(group.door().unwrap()));
        let mut child = command.spawn().unwrap();
        let inside = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
        assert!(inside.lines().any(|line| line.starts_with("0::") && line.ends_with("/qemu")), "{inside}");
        drop(group);
        assert!(!below.exists());
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
            Some(libc::SIGKILL)
        );
        if has_memory && marked.is_ok() {
            let delegated = Delegated { root: path.clone(), cpu: false, tasks: false };
            fs::write(path.join("cgroup.subtree_control"), "+memory").unwrap();
            let group = delegated.group(Place::WorkVm, Share { memory_bytes: 64 << 20, cpus: 1 }).unwrap();
            assert_eq!(fs::read_to_string(below.join("memory.max")).unwrap().trim(), "67108864");
            drop(group);
        } else {
            eprintln!("skipped in part: the memory is not among the controllers of {}", path.display());
        }
        remove(&path).unwrap();
    }
}
