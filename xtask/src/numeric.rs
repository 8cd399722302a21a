//! From root to a numeric uid that nobody has.
//!
//! Root installs packages; all else runs as the ordinary user that this module makes, without an account:
//! in a mount namespace of its own, where that user has a line in the accounts files, a range of subordinate
//! ids, and the trees that building needs, wherever they lie.
//!
//! ```text
//!   on disk, for root                  in the new mount namespace, for the numeric uid
//!   /root              0700 root       an empty tmpfs, so that what lies below can be reached
//!   /root/checkout          root       the same files, owned by the numeric uid (an idmapped mount)
//!   /root/.cargo            root       likewise; its programs read-only, like the toolchains
//!   /etc/passwd             root       a copy with one line more
//!   /etc/subuid         missing        shown by an overlay over /etc, with that line
//!   /dev/kvm           0600 root       a node of the same device, for everybody
//! ```
//!
//! What the numeric uid writes into a tree belongs on disk to whom the tree belongs: the next run, by
//! whoever, finds its own files. Source: mount_setattr(2), "ID-mapped mounts".

use crate::{
    build, run,
    run::{Error, Result, at, os},
    sys,
};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
        move_mount, open_tree, unmount,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    env,
    ffi::{CString, OsString},
    fs,
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{MetadataExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where numeric ids are looked for: behind what systemd gives to containers, before what it calls foreign.
/// Source: systemd's UIDS-GIDS.
const FIRST: u32 = 0x7000_0000;
const END: u32 = 0x7ff0_0000;
/// Ids of one numeric user: itself, and in the upper half its subordinate ids.
const BLOCK: u32 = 0x2_0000;
const SUBORDINATE: u32 = 0x1_0000;

/// What building and running needs of the caller's files.
struct Tree {
    path: PathBuf,
    access: Access,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Write,
    Read,
}

/// The trees as mounts under the numeric uid, not yet at their places.
struct Prepared {
    id: u32,
    trees: Vec<(PathBuf, OwnedFd)>,
}

/// Runs this program again with `arguments` under an unused numeric uid, with its standard output going to
/// `output` where that is given. Returns only where the machine does not have what this takes, with the reason.
pub(crate) fn replace(arguments: Vec<OsString>, output: Option<fs::File>) -> Result<Error> {
    let prepared = match prepare() {
        Ok(prepared) => prepared,
        Err(error) => return Ok(error),
    };
    let id = prepared.id;
    eprintln!("everything from here on runs under the unused uid {id}, not as root");
    attach(prepared)?;
    let own = env::current_exe().map_err(at("find", Path::new("this program")))?;
    let mut command = Command::new(&own);
    command.args(arguments).uid(id).gid(id);
    // Not by the old directory, which lies outside of the mounts.
    command.current_dir(env::current_dir().ok().filter(|here| open_to_all(here)).unwrap_or_else(build::root));
    if !open_to_all(&env::temp_dir()) {
        command.env_remove("TMPDIR");
    }
    if let Some(output) = output {
        command.stdout(output);
    }
    let source = command.exec();
    Err(Error::Start(run::text(&command), source))
}

/// All that may fail for want of something; changes nothing that is seen.
fn prepare() -> Result<Prepared> {
    let read = |path: &str| match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(at("read", Path::new(path))(error)),
    };
    let accounts = [read("/etc/passwd")?, read("/etc/group")?];
    let ranges = [read("/etc/subuid")?, read("/etc/subgid")?];
    let id = unused(&accounts, &ranges)
        .ok_or_else(|| Error::Unexpected("every range of numeric uids is taken".into()))?;
    let wanted = trees()?;
    sys::leave_mount_namespace().map_err(|source| Error::Start("a mount namespace".into(), source))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(os("keep mounts private"))?;
    let mut maps: BTreeMap<(u32, u32), OwnedFd> = BTreeMap::new();
    let mut trees = Vec::new();
    for Tree { path, access } in wanted {
        let metadata = path.metadata().map_err(at("look at", &path))?;
        let map = match maps.entry((metadata.uid(), metadata.gid())) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(id_map(metadata.uid(), metadata.gid(), id)?),
        };
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(CWD, &path, flags).map_err(|e| at("open the tree of", &path)(e.into()))?;
        sys::map_mount(&tree, map.as_fd(), access == Access::Read).map_err(at(
            "show under another owner (idmapped mounts; the file system may lack them)",
            &path,
        ))?;
        trees.push((path, tree));
    }
    Ok(Prepared { id, trees })
}

/// Puts everything in its place.
fn attach(Prepared { id, trees }: Prepared) -> Result<()> {
    let closed: BTreeSet<PathBuf> = trees.iter().filter_map(|(path, _)| closed_ancestor(path)).collect();
    for path in &closed {
        mount("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755")
            .map_err(|e| at("cover", path)(e.into()))?;
    }
    for (path, tree) in trees {
        fs::create_dir_all(&path).map_err(at("create", &path))?;
        move_mount(tree, c"", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|e| at("mount", &path)(e.into()))?;
    }
    let scratch = tempfile::tempdir().map_err(at("make a directory in", &env::temp_dir()))?;
    let own = scratch.path();
    mount("tmpfs", own, "tmpfs", MountFlags::NOSUID, c"mode=755").map_err(|e| at("mount", own)(e.into()))?;
    let placed = place_files(own, id);
    // What was bound from there stays.
    unmount(own, UnmountFlags::DETACH).map_err(|e| at("unmount", own)(e.into()))?;
    placed
}

fn place_files(own: &Path, id: u32) -> Result<()> {
    let home = env::var("HOME").unwrap_or_else(|_| "/".into());
    let (first, count) = (id + SUBORDINATE, BLOCK - SUBORDINATE);
    let lines = [
        ("/etc/passwd", format!("kontor-{id}:x:{id}:{id}::{home}:/bin/sh\n")),
        ("/etc/group", format!("kontor-{id}:x:{id}:\n")),
        ("/etc/subuid", format!("kontor-{id}:{first}:{count}\n")),
        ("/etc/subgid", format!("kontor-{id}:{first}:{count}\n")),
    ];
    // A machine on which no account ever had subordinate ids may lack the last two.
    let missing: Vec<&str> = lines.iter().filter_map(|(file, _)| file.strip_prefix("/etc/")).collect();
    let missing: Vec<&str> =
        missing.into_iter().filter(|name| !Path::new("/etc").join(name).exists()).collect();
    if !missing.is_empty() {
        add_files(own, Path::new("/etc"), &missing)?;
    }
    for (file, line) in lines {
        let file = Path::new(file);
        let mut text = fs::read_to_string(file).map_err(at("read", file))?;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let copy = own.join(file.file_name().unwrap_or_default());
        fs::write(&copy, text + &line).map_err(at("write", &copy))?;
        bind(&copy, file)?;
    }
    for device in ["/dev/kvm", "/dev/net/tun"].map(Path::new) {
        let Ok(metadata) = device.metadata() else { continue };
        let node = own.join(device.file_name().unwrap_or_default());
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::empty(), metadata.rdev())
            .map_err(|e| at("make the device", &node)(e.into()))?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).map_err(at("open to all", &node))?;
        bind(&node, device)?;
    }
    Ok(())
}

/// Shows empty files called `missing` in `directory`, on which nothing is written: an overlay whose upper layer lies
/// in `own`. What is mounted below `directory`, such as a container's `resolv.conf`, stays in sight.
fn add_files(own: &Path, directory: &Path, missing: &[&str]) -> Result<()> {
    let [upper, work] = ["upper", "work"].map(|name| own.join(name));
    for layer in [&upper, &work] {
        fs::create_dir(layer).map_err(at("create", layer))?;
    }
    let mode = directory.metadata().map_err(at("look at", directory))?.permissions();
    fs::set_permissions(&upper, mode).map_err(at("set the mode of", &upper))?;
    for name in missing {
        let file = upper.join(name);
        fs::write(&file, b"").map_err(at("create", &file))?;
    }
    let table = Path::new("/proc/self/mountinfo");
    let table = fs::read(table).map_err(at("read", table))?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let mut kept = Vec::new();
    for path in mounted_below(&table, directory) {
        let tree = open_tree(CWD, &path, flags).map_err(|e| at("open the tree of", &path)(e.into()))?;
        kept.push((path, tree));
    }
    let layers =
        format!("lowerdir={},upperdir={},workdir={}", directory.display(), upper.display(), work.display());
    let layers = CString::new(layers).map_err(|e| at("name", own)(e.into()))?;
    mount("overlay", directory, "overlay", MountFlags::empty(), layers.as_c_str())
        .map_err(|e| at("mount an overlay over", directory)(e.into()))?;
    for (path, tree) in kept {
        move_mount(tree, c"", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|e| at("mount", &path)(e.into()))?;
    }
    Ok(())
}

/// The places below `directory` where something is mounted, without those that lie below another of them.
/// `table` is of the form of `/proc/self/mountinfo` (proc(5)).
fn mounted_below(table: &[u8], directory: &Path) -> BTreeSet<PathBuf> {
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| {
        let point = line.split(|byte| *byte == b' ').nth(4)?;
        Some(PathBuf::from(OsString::from_vec(unescaped(point))))
    });
    let below: BTreeSet<PathBuf> =
        points.filter(|point| point.starts_with(directory) && point != directory).collect();
    let outermost = |point: &&PathBuf| !point.ancestors().skip(1).any(|above| below.contains(above));
    below.iter().filter(outermost).cloned().collect()
}

/// Bytes in which a space, a tab, a line's end and a backslash are three octal digits behind a backslash.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((first, behind)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| behind.get(..3)).flatten();
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &behind[3..] } else { behind };
    }
    bytes
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    rustix::mount::mount_bind(from, to).map_err(|e| at("mount over", to)(e.into()))
}

/// The trees, with those that lie in another one behind it.
fn trees() -> Result<Vec<Tree>> {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let named =
        |variable: &str, usual: &str| env::var_os(variable).map_or_else(|| home.join(usual), PathBuf::from);
    let cargo = named("CARGO_HOME", ".cargo");
    let mut wanted = vec![
        (build::root(), Access::Write),
        (build::root().join("target"), Access::Write),
        (build::cache()?, Access::Write),
        (cargo.clone(), Access::Write),
    ];
    wanted.extend(env::var_os("CARGO_TARGET_DIR").map(|path| (PathBuf::from(path), Access::Write)));
    for (path, _) in &wanted {
        fs::create_dir_all(path).map_err(at("create", path))?;
    }
    let read_only = [cargo.join("bin"), named("RUSTUP_HOME", ".rustup")];
    wanted.extend(read_only.into_iter().filter(|path| path.is_dir()).map(|path| (path, Access::Read)));
    let mut trees = BTreeMap::new();
    for (path, access) in wanted {
        trees.insert(path.canonicalize().map_err(at("find", &path))?, access);
    }
    Ok(trees.into_iter().map(|(path, access)| Tree { path, access }).collect())
}

/// A user namespace that says: what `uid` and `gid` own on disk, `id` owns in the mount.
fn id_map(uid: u32, gid: u32, id: u32) -> Result<OwnedFd> {
    let mut command = Command::new("unshare");
    command.args(["--user", "--", "sh", "-c", "echo; exec cat"]);
    let words = run::text(&command);
    let failed = |source| Error::Start(words.clone(), source);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let mut made = || -> std::io::Result<OwnedFd> {
        // A line says that the namespace is there; it lasts until the pipe is closed.
        let stdout = child.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
        BufReader::new(stdout).read_line(&mut String::new())?;
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        fs::write(process.join("uid_map"), format!("{uid} {id} 1"))?;
        fs::write(process.join("gid_map"), format!("{gid} {id} 1"))?;
        Ok(fs::File::open(process.join("ns/user"))?.into())
    };
    let namespace = made().map_err(failed);
    drop(child.stdin.take());
    child.wait().map_err(failed)?;
    namespace
}

/// The first id of a block that no account and no range of subordinate ids touches.
fn unused(accounts: &[String], ranges: &[String]) -> Option<u32> {
    let number = |line: &str, at: usize| line.split(':').nth(at)?.trim().parse::<u64>().ok();
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for line in accounts.iter().flat_map(|text| text.lines()) {
        // passwd(5) has two ids, group(5) has one and then names.
        taken.extend([number(line, 2), number(line, 3)].into_iter().flatten().map(|id| (id, id + 1)));
    }
    for line in ranges.iter().flat_map(|text| text.lines()) {
        taken.extend(
            number(line, 1).zip(number(line, 2)).map(|(first, count)| (first, first.saturating_add(count))),
        );
    }
    let step = usize::try_from(BLOCK).ok()?;
    (FIRST..END).step_by(step).find(|first| {
        let (first, end) = (u64::from(*first), u64::from(*first) + u64::from(BLOCK));
        taken.iter().all(|(from, to)| *to <= first || end <= *from)
    })
}

/// The outermost directory on the way to `path` that only some may enter.
fn closed_ancestor(path: &Path) -> Option<PathBuf> {
    let mut ways: Vec<&Path> = path.ancestors().skip(1).collect();
    ways.reverse();
    ways.into_iter().find(|way| !open_to_all(way)).map(Path::to_owned)
}

/// Whether everybody may enter a directory, as far as its own permissions go.
fn open_to_all(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(accounts: &[&str], ranges: &[&str]) -> Option<u32> {
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        unused(&owned(accounts), &owned(ranges))
    }

    #[test]
    fn first_block_is_taken_where_nobody_has_it() {
        let ordinary = "root:x:0:0:root:/root:/bin/bash\nanna:x:1000:1000::/home/anna:/bin/sh\n";
        assert_eq!(found(&[ordinary, "root:x:0:\n"], &["anna:100000:65536\n"]), Some(FIRST));
        assert_eq!(found(&[], &[]), Some(FIRST));
    }

    #[test]
    fn block_that_an_account_or_a_range_touches_is_passed_over() {
        let last = format!("x:x:{}:0::/:/bin/sh\n", FIRST + BLOCK - 1);
        let beyond = format!("x:x:{}:0::/:/bin/sh\n", FIRST + BLOCK);
        assert_eq!(found(&[&last], &[]), Some(FIRST + BLOCK));
        assert_eq!(found(&[&beyond], &[]), Some(FIRST));
        let group = format!("x:x:{FIRST}:a,b\n");
        assert_eq!(found(&["", &group], &[]), Some(FIRST + BLOCK));
        let into = format!("anna:{}:{}\n", FIRST - 10, 11);
        let before = format!("anna:{}:{}\n", FIRST - 10, 10);
        assert_eq!(found(&[], &[&into]), Some(FIRST + BLOCK));
        assert_eq!(found(&[], &[&before]), Some(FIRST));
    }

    #[test]
    fn nothing_is_found_where_everything_is_taken() {
        let all = format!("anna:{FIRST}:{}\n", u64::from(END - FIRST));
        assert_eq!(found(&[], &[&all]), None);
    }

    /// Set for the process that has mounts of its own.
    const INSIDE: &str = "KONTOR_TEST_OF_ADDED_FILES";

    #[test]
    fn added_files_are_seen_by_this_process_alone_and_what_is_mounted_there_stays() {
        let test =
            "numeric::tests::added_files_are_seen_by_this_process_alone_and_what_is_mounted_there_stays";
        let Some(dir) = env::var_os(INSIDE) else {
            let dir = tempfile::tempdir().unwrap();
            for name in ["own", "etc", "etc/inner dir"] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            fs::write(dir.path().join("etc/there"), "kept").unwrap();
            let mut command = Command::new("unshare");
            command.args(["--user", "--map-root-user", "--mount", "--"]).arg(env::current_exe().unwrap());
            let output = command.args(["--exact", test]).env(INSIDE, dir.path()).output().unwrap();
            let words = [output.stdout, output.stderr].concat();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&words));
            let outside: Vec<_> = fs::read_dir(dir.path().join("etc")).unwrap().collect();
            assert_eq!(outside.len(), 2, "{outside:?}");
            return;
        };
        let [own, etc] = ["own", "etc"].map(|name| Path::new(&dir).join(name));
        for path in [&own, &etc.join("inner dir")] {
            mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
        }
        fs::write(etc.join("inner dir/file"), "mounted").unwrap();
        add_files(&own, &etc, &["subuid", "subgid"]).unwrap();
        let read = |name: &str| fs::read_to_string(etc.join(name)).unwrap();
        assert_eq!(["subuid", "subgid", "there", "inner dir/file"].map(read), ["", "", "kept", "mounted"]);
        unmount(&own, UnmountFlags::DETACH).unwrap();
        assert_eq!(["subuid", "there"].map(read), ["", "kept"]);
    }

    #[test]
    fn places_with_mounts_are_found_below_a_directory() {
        let table = b"21 1 0:19 / / rw - ext4 /dev/vda rw\n\
            22 21 0:20 / /etc/a\\040b rw - tmpfs tmpfs rw\n\
            23 22 0:21 / /etc/a\\040b/c rw - tmpfs tmpfs rw\n\
            24 21 0:22 / /etc rw - tmpfs tmpfs rw\n\
            25 21 0:23 / /etcetera rw - tmpfs tmpfs rw\n\
            26 24 0:24 / /etc/d\\134 rw - tmpfs tmpfs rw\n\
            broken\n";
        let found = mounted_below(table, Path::new("/etc"));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["/etc/a b", "/etc/d\\"].map(PathBuf::from));
        assert_eq!(unescaped(b"\\04\\999\\"), b"\\04\\999\\");
    }

    #[test]
    fn outermost_closed_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        let closed = open.join("closed");
        fs::create_dir_all(closed.join("in/there")).unwrap();
        for (path, mode) in
            [(dir.path(), 0o755), (&open, 0o755), (&closed, 0o700), (&closed.join("in"), 0o700)]
        {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(closed_ancestor(&closed.join("in/there")), Some(closed.clone()));
        assert_ne!(closed_ancestor(&closed), Some(closed));
    }
}
