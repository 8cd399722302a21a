//! Mounts: the kernel's own file systems, the root image, and the memory in place of everything that
//! a system writes to. Nothing that can be written can be executed, is a device or raises an identity.

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid, chmod, chown, fstat, open, openat, statat, symlink,
    unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use rustix::process::{chdir, chroot};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// Where the initrd has a place for the root image.
const NEW_ROOT: &str = "/root";
/// How deep the initrd's directories may lie in each other.
const DEPTH_MAX: usize = 8;
/// User and group of the session.
pub(crate) const USER: u32 = 1000;

/// Why a mount, or what belongs to one, failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {path}")]
pub(crate) struct RootError {
    doing: &'static str,
    path: String,
    source: Errno,
}

fn failed(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(Errno) -> RootError {
    let path = path.as_ref().display().to_string();
    move |source| RootError { doing, path, source }
}

/// A file system that the kernel makes up.
struct Virtual {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    data: &'static CStr,
}

const SEALED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// What the initrd mounts, and takes along into the root image. Users see only their own processes.
const EARLY: [Virtual; 3] = [
    Virtual { kind: "proc", at: "/proc", flags: SEALED, data: c"hidepid=invisible" },
    Virtual { kind: "sysfs", at: "/sys", flags: SEALED, data: c"" },
    Virtual {
        kind: "devtmpfs",
        at: "/dev",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: c"mode=0755,size=1m,nr_inodes=8k",
    },
];

/// What comes on top of them once the root image is the root.
const LATE: [Virtual; 2] = [
    Virtual { kind: "securityfs", at: "/sys/kernel/security", flags: SEALED, data: c"" },
    Virtual {
        kind: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: c"mode=0600,ptmxmode=0666",
    },
];

/// Memory that a path is mounted with: never more than the named part of the guest's.
struct Memory {
    at: &'static str,
    options: &'static CStr,
}

const MEMORY: [Memory; 5] = [
    Memory { at: "/run", options: c"mode=0755,size=10%,nr_inodes=16k" },
    Memory { at: "/tmp", options: c"mode=1777,size=25%,nr_inodes=64k" },
    Memory { at: "/var", options: c"mode=0755,size=10%,nr_inodes=16k" },
    Memory { at: "/root", options: c"mode=0700,size=1%,nr_inodes=1k" },
    Memory { at: "/dev/shm", options: c"mode=1777,size=25%,nr_inodes=16k" },
];

/// The state's place when it is not kept: gone at power-off.
const STATE: Memory = Memory { at: "/home", options: c"mode=0755,size=50%,nr_inodes=256k" };

/// A directory that programs expect on the memory above.
struct Place {
    at: &'static str,
    mode: u32,
    owner: u32,
}

const PLACES: [Place; 9] = [
    Place { at: "/run/kontor", mode: 0o755, owner: 0 },
    Place { at: "/run/lock", mode: 0o755, owner: 0 },
    Place { at: "/run/user", mode: 0o755, owner: 0 },
    Place { at: "/run/user/1000", mode: 0o700, owner: USER },
    Place { at: "/var/cache", mode: 0o755, owner: 0 },
    Place { at: "/var/lib", mode: 0o755, owner: 0 },
    Place { at: "/var/log", mode: 0o755, owner: 0 },
    Place { at: "/var/tmp", mode: 0o1777, owner: 0 },
    Place { at: "/var/spool", mode: 0o755, owner: 0 },
];

/// Links in `/dev` that programs expect: where, and to what.
const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Mounts what the first steps need.
pub(crate) fn mount_early() -> Result<(), RootError> {
    EARLY.iter().try_for_each(mount_virtual)
}

/// Mounts the root image, which `device` verifies, beside the initrd.
pub(crate) fn mount_image(device: &Path) -> Result<(), RootError> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount(device, NEW_ROOT, "erofs", flags, None).map_err(failed("mount", device))
}

/// Makes the mounted image the root and frees the initrd's memory.
pub(crate) fn switch() -> Result<(), RootError> {
    for early in &EARLY {
        let to = format!("{NEW_ROOT}{}", early.at);
        mount_move(early.at, to.as_str()).map_err(failed("move", early.at))?;
    }
    let old = open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open", "/"))?;
    chdir(NEW_ROOT).map_err(failed("enter", NEW_ROOT))?;
    mount_move(".", "/").map_err(failed("move", NEW_ROOT))?;
    chroot(".").map_err(failed("change the root to", NEW_ROOT))?;
    chdir("/").map_err(failed("enter", "/"))?;
    let device = fstat(&old).map_err(failed("look at", "the initrd"))?.st_dev;
    empty(old.as_fd(), device, 0).map_err(failed("empty", "the initrd"))
}

/// Removes everything below `directory` that lies on `device`, without following a link.
fn empty(directory: BorrowedFd<'_>, device: u64, depth: usize) -> Result<(), Errno> {
    if depth == DEPTH_MAX {
        return Err(Errno::LOOP);
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_dev != device {
            continue;
        }
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let inner = openat(directory, name, flags, Mode::empty())?;
            empty(inner.as_fd(), device, depth + 1)?;
            match unlinkat(directory, name, AtFlags::REMOVEDIR) {
                // The place of the root image keeps what is mounted on it.
                Ok(()) | Err(Errno::BUSY | Errno::NOTEMPTY) => {}
                Err(error) => return Err(error),
            }
        } else {
            unlinkat(directory, name, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// Mounts the rest, and memory wherever a system writes.
pub(crate) fn mount_late() -> Result<(), RootError> {
    for at in ["/dev/pts", "/dev/shm"] {
        make_directory(at, 0o755)?;
    }
    LINKS.iter().try_for_each(|(at, to)| symlink(*to, *at).map_err(failed("make", at)))?;
    LATE.iter().try_for_each(mount_virtual)?;
    MEMORY.iter().try_for_each(mount_memory)?;
    PLACES.iter().try_for_each(make_place)
}

/// Mounts the state: memory, with a home for the user.
pub(crate) fn mount_state() -> Result<(), RootError> {
    mount_memory(&STATE)?;
    make_place(&Place { at: "/home/user", mode: 0o700, owner: USER })
}

/// Unmounts the state, so that it is whole.
pub(crate) fn unmount_state() -> Result<(), RootError> {
    match unmount(STATE.at, UnmountFlags::empty()) {
        // Not mounted yet.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("unmount", STATE.at)(error)),
    }
}

fn mount_virtual(Virtual { kind, at, flags, data }: &Virtual) -> Result<(), RootError> {
    mount(*kind, *at, *kind, *flags, *data).map_err(failed("mount", at))
}

fn mount_memory(Memory { at, options }: &Memory) -> Result<(), RootError> {
    mount("tmpfs", *at, "tmpfs", SEALED, *options).map_err(failed("mount memory at", at))
}

fn make_place(Place { at, mode, owner }: &Place) -> Result<(), RootError> {
    make_directory(at, *mode)?;
    chmod(*at, Mode::from_raw_mode(*mode)).map_err(failed("set the mode of", at))?;
    chown(*at, Some(Uid::from_raw(*owner)), Some(Gid::from_raw(*owner))).map_err(failed("give away", at))
}

fn make_directory(at: &str, mode: u32) -> Result<(), RootError> {
    match rustix::fs::mkdir(at, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(failed("make", at)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn emptying_removes_everything_and_follows_no_link() {
        let kept = tempfile::tempdir().unwrap();
        fs::write(kept.path().join("file"), b"kept").unwrap();
        let old = tempfile::tempdir().unwrap();
        fs::create_dir_all(old.path().join("a/b/c")).unwrap();
        fs::write(old.path().join("a/b/file"), b"gone").unwrap();
        std::os::unix::fs::symlink(kept.path(), old.path().join("a/link")).unwrap();

        let directory = fs::File::open(old.path()).unwrap();
        let device = fstat(&directory).unwrap().st_dev;
        empty(directory.as_fd(), device, 0).unwrap();

        assert_eq!(fs::read_dir(old.path()).unwrap().count(), 0);
        assert_eq!(fs::read(kept.path().join("file")).unwrap(), b"kept");
    }

    #[test]
    fn emptying_stays_on_its_device() {
        let old = tempfile::tempdir().unwrap();
        fs::write(old.path().join("file"), b"elsewhere").unwrap();
        let directory = fs::File::open(old.path()).unwrap();
        let device = fstat(&directory).unwrap().st_dev;
        empty(directory.as_fd(), device + 1, 0).unwrap();
        assert_eq!(fs::read_dir(old.path()).unwrap().count(), 1);
    }

    #[test]
    fn deepest_directories_are_emptied_and_deeper_ones_refused() {
        let deep = |levels: usize| -> Result<(), Errno> {
            let old = tempfile::tempdir().unwrap();
            fs::create_dir_all(old.path().join("d/".repeat(levels))).unwrap();
            let directory = fs::File::open(old.path()).unwrap();
            let device = fstat(&directory).unwrap().st_dev;
            empty(directory.as_fd(), device, 0)
        };
        assert_eq!(deep(DEPTH_MAX - 1), Ok(()));
        assert_eq!(deep(DEPTH_MAX), Err(Errno::LOOP));
    }

    #[test]
    fn whatever_can_be_written_can_not_be_executed() {
        assert!(SEALED.contains(MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV));
        for Memory { options, .. } in MEMORY.iter().chain([&STATE]) {
            let options = options.to_str().unwrap();
            assert!(options.contains("size=") && options.contains("nr_inodes="), "{options}");
        }
    }
}
