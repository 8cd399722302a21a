//! From the tree that the packages make to the tree of the image: removals, users, the profile's files
//! and our programs. Tar in, tar out.

use crate::{
    date,
    files::FileError,
    profile::{Profile, User},
    tar::{self, Kind, Member, TarError, Writer},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::Path,
};

/// A tree that cannot become the profile's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AssembleError {
    #[error("read the root tree")]
    Tar(#[source] TarError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the profile removes {0}, which is not in the tree")]
    NothingToRemove(String),
    #[error("the profile removes {0}, but {1} is a hard link to it")]
    StillLinked(String, String),
    #[error("{0} lies below {1}, which is no directory in the tree: name the real path")]
    NotADirectory(String, String),
    #[error("the profile's user {user} has the name or number of one in {file}")]
    UserTaken { user: String, file: &'static str },
    #[error("the tree has no {0}, or it is not text")]
    NoAccounts(&'static str),
    #[error("the root tree has kernel modules ({0}); all modules belong in the initrd")]
    Modules(String),
    #[error("the tree lacks the package {0}, which the lock names")]
    PackageMissing(String),
}

/// A file that goes into the tree.
pub(crate) struct Placed<'a> {
    pub(crate) path: String,
    pub(crate) mode: u32,
    pub(crate) content: &'a [u8],
}

/// Writes the image's tree. `programs` are our own; `packages` must all be installed in `base`.
pub(crate) fn assemble(
    base: &[u8],
    profile: &Profile,
    built_at: u64,
    programs: &[Placed<'_>],
    packages: &BTreeSet<String>,
    out: impl Write,
) -> Result<(), AssembleError> {
    let members = tar::read(base).map_err(AssembleError::Tar)?;
    check_packages(&members, packages)?;
    let added = Added::new(&members, profile, built_at, programs)?;
    let kept = keep(members, profile, &added)?;
    if let Some(module) = kept.iter().find(|m| m.path.starts_with(MODULES)) {
        return Err(AssembleError::Modules(module.path.clone()));
    }
    let mut places: Vec<Place<'_>> = kept.iter().map(|m| (m.path.as_str(), Item::Kept(m))).collect();
    places.extend(added.0.iter().map(|(path, node)| (path.as_str(), Item::Added(node))));
    let parents = missing_parents(&places)?;
    places.extend(parents.iter().map(|path| (path.as_str(), Item::Added(&PARENT))));
    // A directory before what lies in it, a hard link after everything that it may be a link to.
    let is_link = |item: &Item<'_>| matches!(item, Item::Kept(m) if m.kind == Kind::HardLink);
    places.sort_by_cached_key(|(path, item)| (is_link(item), path.split('/').collect::<Vec<_>>()));
    let write = || {
        let mut tar = Writer::new(out, built_at);
        for (path, item) in &places {
            match item {
                Item::Kept(member) => tar.copy(member)?,
                Item::Added(Node::Directory { mode }) => tar.directory(path, *mode)?,
                Item::Added(Node::File { owner, content }) => tar.file(path, *owner, content)?,
                Item::Added(Node::Link { to }) => tar.link(path, to)?,
            }
        }
        tar.finish()
    };
    write().map_err(FileError::at("write the tree of", Path::new(&profile.name)))?;
    Ok(())
}

/// A path of the tree and what is there.
type Place<'a> = (&'a str, Item<'a>);

enum Item<'a> {
    Kept(&'a Member<'a>),
    Added(&'a Node),
}

impl Item<'_> {
    fn is_directory(&self) -> bool {
        match self {
            Self::Kept(member) => member.kind == Kind::Directory,
            Self::Added(node) => matches!(node, Node::Directory { .. }),
        }
    }
}

/// Directories that something lies in, but that nobody makes.
fn missing_parents(places: &[Place<'_>]) -> Result<BTreeSet<String>, AssembleError> {
    let directories: BTreeMap<&str, bool> =
        places.iter().map(|(p, item)| (*p, item.is_directory())).collect();
    let mut missing = BTreeSet::new();
    for (path, _) in places {
        for parent in Path::new(path).ancestors().skip(1).filter_map(Path::to_str) {
            match directories.get(parent) {
                Some(true) => (),
                None => {
                    missing.insert(parent.to_owned());
                }
                Some(false) => {
                    return Err(AssembleError::NotADirectory((*path).to_owned(), parent.to_owned()));
                }
            }
        }
    }
    Ok(missing)
}

/// What is put into the tree, by path.
struct Added(BTreeMap<String, Node>);

enum Node {
    Directory { mode: u32 },
    File { owner: (u32, u32, u32), content: Vec<u8> },
    Link { to: String },
}

impl Added {
    fn new(
        members: &[Member<'_>],
        profile: &Profile,
        built_at: u64,
        programs: &[Placed<'_>],
    ) -> Result<Self, AssembleError> {
        let mut nodes = BTreeMap::new();
        for directory in &profile.directories {
            nodes.insert(directory.path.clone(), Node::Directory { mode: directory.mode });
        }
        for file in &profile.files {
            let content = file.text.clone().into_bytes();
            nodes.insert(file.path.clone(), Node::File { owner: (file.mode, 0, 0), content });
        }
        for link in &profile.links {
            nodes.insert(link.path.clone(), Node::Link { to: link.to.clone() });
        }
        for program in programs {
            let content = program.content.to_vec();
            nodes.insert(program.path.clone(), Node::File { owner: (program.mode, 0, 0), content });
        }
        if !profile.users.is_empty() {
            nodes.extend(accounts(members, &profile.users, built_at / date::DAY)?);
        }
        Ok(Self(nodes))
    }
}

/// The members that stay: not removed, not replaced.
fn keep<'a>(
    members: Vec<Member<'a>>,
    profile: &Profile,
    added: &Added,
) -> Result<Vec<Member<'a>>, AssembleError> {
    let mut unused: BTreeSet<&str> = profile.remove.iter().map(String::as_str).collect();
    let (mut kept, mut gone) = (Vec::new(), BTreeSet::new());
    for member in members {
        let removed: Vec<_> = profile.remove.iter().filter(|rule| is_below(&member.path, rule)).collect();
        unused.retain(|rule| !removed.iter().any(|used| used == rule));
        if removed.is_empty() && !added.0.contains_key(&member.path) {
            kept.push(member);
        } else {
            gone.insert(member.path);
        }
    }
    if let Some(rule) = unused.first() {
        return Err(AssembleError::NothingToRemove((*rule).to_owned()));
    }
    let linked = |m: &&Member<'_>| m.kind == Kind::HardLink && gone.contains(&m.target);
    match kept.iter().find(linked) {
        Some(member) => Err(AssembleError::StillLinked(member.target.clone(), member.path.clone())),
        None => Ok(kept),
    }
}

fn is_below(path: &str, rule: &str) -> bool {
    let (top, with_top) = match rule.strip_suffix("/*") {
        Some(top) => (top, false),
        None => (rule, true),
    };
    match path.strip_prefix(top) {
        Some("") => with_top,
        Some(rest) => rest.starts_with('/'),
        None => false,
    }
}

/// The tree's accounts files with the profile's users in them.
fn accounts(
    members: &[Member<'_>],
    users: &[User],
    day: u64,
) -> Result<BTreeMap<String, Node>, AssembleError> {
    let find = |file: &str| members.iter().find(|m| m.path == file && m.kind == Kind::File);
    let shadowed = find(SHADOW).is_some();
    let mut nodes = BTreeMap::new();
    for (file, line) in ACCOUNTS {
        let Some(member) = find(file) else {
            // Without a shadow file, passwd and group alone say that nobody has a password.
            if file == SHADOW || file == GSHADOW {
                continue;
            }
            return Err(AssembleError::NoAccounts(file));
        };
        let text = std::str::from_utf8(member.content).map_err(|_| AssembleError::NoAccounts(file))?;
        let password = if shadowed { "x" } else { "*" };
        let content = with_users(file, text, users, |user| line(user, password, day))?.into_bytes();
        let owner = (member.mode, member.uid, member.gid);
        nodes.insert(file.to_owned(), Node::File { owner, content });
    }
    Ok(nodes)
}

/// An accounts file with a line for each of `users`.
fn with_users(
    file: &'static str,
    text: &str,
    users: &[User],
    line: impl Fn(&User) -> String,
) -> Result<String, AssembleError> {
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for entry in text.lines() {
        let mut fields = entry.split(':');
        names.insert(fields.next().unwrap_or_default());
        // passwd and group have the number third; shadow has a date there, which is no number of a user.
        if file != SHADOW && file != GSHADOW {
            numbers.insert(fields.nth(1).unwrap_or_default());
        }
    }
    let mut text = text.trim_end().to_owned() + "\n";
    for user in users {
        if names.contains(user.name.as_str()) || numbers.contains(user.id.to_string().as_str()) {
            return Err(AssembleError::UserTaken { user: user.name.clone(), file });
        }
        text += &line(user);
    }
    Ok(text)
}

fn check_packages(members: &[Member<'_>], packages: &BTreeSet<String>) -> Result<(), AssembleError> {
    let status = members.iter().find(|m| m.path == "/var/lib/dpkg/status").map_or(&[][..], |m| m.content);
    let stanzas = crate::deb822::parse(&String::from_utf8_lossy(status));
    let installed: BTreeSet<&str> = stanzas
        .iter()
        .filter(|s| s.get("Status") == Some("install ok installed"))
        .filter_map(|s| s.get("Package"))
        .collect();
    match packages.iter().find(|name| !installed.contains(name.as_str())) {
        Some(name) => Err(AssembleError::PackageMissing(name.clone())),
        None => Ok(()),
    }
}

/// A directory that nobody described.
const PARENT: Node = Node::Directory { mode: 0o755 };
const SHADOW: &str = "/etc/shadow";
const GSHADOW: &str = "/etc/gshadow";
const MODULES: &str = "/usr/lib/modules/";
/// The accounts files (passwd(5), group(5), shadow(5), gshadow(5)) and what a user's line is in each:
/// no password that could be typed, changed on the day of the build.
type Line = fn(&User, &str, u64) -> String;
const ACCOUNTS: [(&str, Line); 4] = [
    ("/etc/passwd", |u, password, _| {
        format!("{}:{password}:{}:{}::{}:{}\n", u.name, u.id, u.id, u.home, u.shell)
    }),
    ("/etc/group", |u, password, _| format!("{}:{password}:{}:\n", u.name, u.id)),
    (SHADOW, |u, _, day| format!("{}:!*:{day}::::::\n", u.name)),
    (GSHADOW, |u, _, _| format!("{}:!::\n", u.name)),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{profile::tests::smoke, tar::tests::archive};

    const STATUS: &str =
        "Package: curl\nStatus: install ok installed\n\nPackage: half\nStatus: install ok unpacked\n";

    fn base() -> Vec<u8> {
        archive(|tar| {
            tar.directory("/", 0o755)?;
            tar.link("/lib", "usr/lib")?;
            for path in ["/dev", "/etc", "/etc/apt", "/usr", "/usr/lib", "/var", "/var/lib", "/var/lib/dpkg"]
            {
                tar.directory(path, 0o755)?;
            }
            tar.file("/dev/null", (0o666, 0, 0), b"")?;
            tar.file("/etc/apt/sources.list", (0o644, 0, 0), b"deb copy:/tmp/secret ./")?;
            tar.file("/etc/hostname", (0o755, 0, 0), b"builder\n")?;
            tar.file("/etc/passwd", (0o644, 0, 0), b"root:x:0:0:root:/root:/bin/bash\n")?;
            tar.file("/etc/group", (0o644, 0, 0), b"root:x:0:\n")?;
            tar.file("/etc/shadow", (0o640, 0, 42), b"root:*:1000:0:99999:7:::\n")?;
            tar.file("/etc/gshadow", (0o640, 0, 42), b"root:*::\n")?;
            tar.file("/var/lib/dpkg/status", (0o644, 0, 0), STATUS.as_bytes())
        })
    }

    fn profile() -> Profile {
        Profile { remove: vec!["/dev/*".into(), "/etc/apt".into()], ..smoke() }
    }

    fn run(profile: &Profile, packages: &[&str]) -> Result<Vec<u8>, AssembleError> {
        let programs =
            [Placed { path: "/usr/lib/kontor/kontor-tunnel".into(), mode: 0o755, content: b"\x7fELF" }];
        let packages = packages.iter().map(|p| (*p).to_owned()).collect();
        let mut out = Vec::new();
        assemble(&base(), profile, 86_400 * 20_000, &programs, &packages, &mut out)?;
        Ok(out)
    }

    fn content(archive: &[u8], path: &str) -> String {
        let members = tar::read(archive).unwrap();
        let found: Vec<_> = members.iter().filter(|m| m.path == path).collect();
        assert_eq!(found.len(), 1, "{path}");
        String::from_utf8(found[0].content.to_vec()).unwrap()
    }

    #[test]
    fn nothing_of_the_build_machine_is_left() {
        let tree = run(&profile(), &["curl"]).unwrap();
        assert_eq!(content(&tree, "/etc/hostname"), "work\n");
        let members = tar::read(&tree).unwrap();
        assert!(members.iter().all(|m| !m.path.starts_with("/etc/apt") && !m.path.starts_with("/dev/")));
        assert!(members.iter().any(|m| m.path == "/dev"));
        let resolv = members.iter().find(|m| m.path == "/etc/resolv.conf").unwrap();
        assert_eq!((resolv.kind, resolv.target.as_str()), (Kind::SymbolicLink, "/run/kontor/resolv.conf"));
    }

    #[test]
    fn users_are_appended_and_shadow_keeps_its_owner() {
        let tree = run(&profile(), &[]).unwrap();
        assert_eq!(
            content(&tree, "/etc/passwd"),
            "root:x:0:0:root:/root:/bin/bash\n\
             kontor-tunnel:x:990:990::/nonexistent:/usr/sbin/nologin\n\
             user:x:1000:1000::/home/user:/bin/bash\n"
        );
        assert!(content(&tree, "/etc/shadow").ends_with("user:!*:20000::::::\n"));
        let members = tar::read(&tree).unwrap();
        let shadow = members.iter().find(|m| m.path == "/etc/shadow").unwrap();
        assert_eq!((shadow.mode, shadow.uid, shadow.gid), (0o640, 0, 42));
    }

    #[test]
    fn tree_without_a_shadow_file_gets_none_and_still_nobody_has_a_password() {
        let users = smoke().users;
        let base = archive(|tar| {
            tar.file("/etc/passwd", (0o644, 0, 0), b"root:*:0:0:root:/root:/bin/bash\n")?;
            tar.file("/etc/group", (0o644, 0, 0), b"root:*:0:\n")
        });
        let nodes = accounts(&tar::read(&base).unwrap(), &users, 1).unwrap();
        assert_eq!(nodes.keys().collect::<Vec<_>>(), ["/etc/group", "/etc/passwd"]);
        let Node::File { content, .. } = &nodes["/etc/passwd"] else { panic!("a file") };
        assert!(String::from_utf8_lossy(content).ends_with("user:*:1000:1000::/home/user:/bin/bash\n"));
        assert!(matches!(accounts(&[], &users, 1), Err(AssembleError::NoAccounts("/etc/passwd"))));
    }

    #[test]
    fn missing_parents_of_a_program_are_made() {
        let tree = run(&profile(), &[]).unwrap();
        let members = tar::read(&tree).unwrap();
        let at = |path: &str| members.iter().position(|m| m.path == path).unwrap();
        assert!(at("/usr/lib/kontor") < at("/usr/lib/kontor/kontor-tunnel"));
        assert_eq!(members[at("/usr/lib/kontor/kontor-tunnel")].mode, 0o755);
    }

    #[test]
    fn same_input_gives_the_same_bytes() {
        assert_eq!(run(&profile(), &[]).unwrap(), run(&profile(), &[]).unwrap());
    }

    #[test]
    fn file_below_a_link_is_refused() {
        let mut profile = profile();
        profile.directories.push(crate::profile::Directory { path: "/lib/x".into(), mode: 0o755 });
        let error = run(&profile, &[]).unwrap_err();
        assert!(matches!(error, AssembleError::NotADirectory(_, parent) if parent == "/lib"));
    }

    #[test]
    fn file_in_the_place_of_a_full_directory_is_refused() {
        let mut profile = profile();
        profile.files[0].path = "/var/lib".into();
        let error = run(&profile, &[]).unwrap_err();
        assert!(matches!(error, AssembleError::NotADirectory(_, parent) if parent == "/var/lib"));
    }

    #[test]
    fn directories_come_first_and_hard_links_last() {
        let base = archive(|tar| {
            tar.file("/z/target", (0o644, 0, 0), b"x")?;
            tar.directory("/z", 0o755)
        });
        let profile = Profile { remove: Vec::new(), users: Vec::new(), ..smoke() };
        let mut out = Vec::new();
        assemble(&base, &profile, 1, &[], &BTreeSet::new(), &mut out).unwrap();
        let members = tar::read(&out).unwrap();
        assert_eq!(members[0].path, "/");
        let at = |path: &str| members.iter().position(|m| m.path == path).unwrap();
        assert!(at("/z") < at("/z/target"));
    }

    #[test]
    fn removal_that_matches_nothing_is_refused() {
        let mut profile = profile();
        profile.remove.push("/etc/apt-typo".into());
        assert!(matches!(run(&profile, &[]), Err(AssembleError::NothingToRemove(_))));
    }

    #[test]
    fn user_whose_number_is_taken_is_refused() {
        let mut profile = profile();
        profile.users[0].id = 0;
        let error = run(&profile, &[]).unwrap_err();
        assert!(matches!(error, AssembleError::UserTaken { file: "/etc/passwd", .. }));
    }

    #[test]
    fn locked_package_that_is_not_installed_is_named() {
        for missing in ["half", "absent"] {
            let error = run(&profile(), &["curl", missing]).unwrap_err();
            assert!(matches!(error, AssembleError::PackageMissing(name) if name == missing));
        }
    }

    #[test]
    fn kernel_modules_in_the_root_are_refused() {
        let mut profile = profile();
        profile.directories.push(crate::profile::Directory { path: "/usr/lib/modules".into(), mode: 0o755 });
        assert!(run(&profile, &[]).is_ok());
        let modules = archive(|tar| {
            tar.directory("/", 0o755)?;
            tar.file("/usr/lib/modules/tun.ko", (0o644, 0, 0), b"")
        });
        let profile = Profile { remove: Vec::new(), users: Vec::new(), ..smoke() };
        let error = assemble(&modules, &profile, 1, &[], &BTreeSet::new(), Vec::new()).unwrap_err();
        assert!(matches!(error, AssembleError::Modules(_)), "{error}");
    }
}
