//! From a profile and a lock to an image.
//!
//! ```text
//! lock ──► packages ─┬─► tools ─► kernel, modules ────────┐
//!                    └─► root tree (tar, cached)          ├─► initrd
//! source tree ──► kontor-init, -tunnel, -probe ───────────┤
//!                                                         └─► root tree + files ─► erofs ─► + hash tree
//! ```

use crate::{
    Failure,
    apt::Mirrors,
    assemble::{self, Placed},
    cache::Cache,
    date, fetch,
    files::{self, FileError},
    guest::Guest,
    host, initrd,
    kernel::Kernel,
    lock::Lock,
    out::Output,
    profile::{Profile, Source},
    progress::Progress,
    root_image,
    rootfs::BaseTree,
    sbom,
    tools::Tools,
};
use kontor_release::{CommandLine, FORMAT, Image, Piece, Verity};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

/// What a build is told.
pub(crate) struct Request<'a> {
    pub(crate) source: &'a Source,
    pub(crate) profile: &'a Profile,
    pub(crate) lock: &'a Path,
    pub(crate) mirrors: Mirrors,
    pub(crate) host_programs: HostPrograms,
    pub(crate) out: &'a Path,
}

/// What happens when the host's compiler or its tools are not those that the lock names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HostPrograms {
    /// Build all the same, and say what differs: the image may not be the one that others get.
    Any,
    /// Refuse.
    Locked,
}

/// Builds the image and puts it at the place asked for.
pub(crate) fn build(request: &Request<'_>, progress: &Progress) -> Result<Image, Failure> {
    let Request { source, profile, .. } = request;
    let output = Output::begin(request.out)?;
    let (lock, lock_text) = Lock::load(request.lock, profile)?;
    let host = host::programs(source)?;
    compare_host(&lock, &host, request.host_programs, progress)?;
    let cache = Cache::open()?;
    fetch::fetch(lock.debs(), &cache, &request.mirrors, progress)?;
    let crates = sbom::crates(source)?;
    // The compiler and mmdebstrap keep one processor busy each, and need nothing of each other.
    let (guest, trees) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| Guest::build(source, &crates, &cache, progress));
        let trees = trees(&lock, profile, &host, &cache, progress);
        (guest.join().expect("the build thread does not panic"), trees)
    });
    let (guest, Trees { tools, kernel, base }) = (guest?, trees?);

    let staging = output.path();
    let write = |name: &str, bytes: &[u8]| -> Result<Piece, FileError> {
        files::write_new(&staging.join(name), bytes)?;
        piece(staging, name)
    };
    let verity = {
        let _step = progress.step("make the root image");
        let scratch = cache.scratch()?;
        let tar = scratch.path().join("tree.tar");
        write_tree(&base, profile, &lock, &guest, &tar)?;
        root_image::make(&tar, &staging.join(ROOT), lock.built_at, &tools)?
    };
    let step = progress.step("pack the initrd and list the parts");
    let initrd = write(INITRD, &initrd::pack(guest.init, kernel.modules()?)?)?;
    // No link: whoever changes the image must not change the cache.
    files::copy_new(&kernel.image(), &staging.join(KERNEL))?;
    let release = format!("{}-{}", profile.name, date::compact(lock.built_at));
    let bom = sbom::document(&lock, &release, &host, &crates.list);
    let image = Image {
        format: FORMAT,
        profile: profile.name.clone(),
        release,
        built_at: lock.built_at,
        test: profile.test,
        memory_mib_min: profile.memory_mib_min,
        cmdline: command_line(&verity, &lock, profile),
        verity,
        kernel: piece(staging, KERNEL)?,
        initrd,
        root: piece(staging, ROOT)?,
        sbom: write(SBOM, &bom)?,
        lock: write(LOCK, lock_text.as_bytes())?,
    };
    let mut text = serde_json::to_vec_pretty(&image).expect("text and numbers serialize");
    text.push(b'\n');
    files::write_new(&staging.join(IMAGE), &text)?;
    output.publish()?;
    drop(step);
    Ok(image)
}

struct Trees {
    tools: Tools,
    kernel: Kernel,
    base: BaseTree,
}

fn trees(
    lock: &Lock,
    profile: &Profile,
    host: &BTreeMap<String, String>,
    cache: &Cache,
    progress: &Progress,
) -> Result<Trees, Failure> {
    let tools = Tools::unpack(lock, cache, progress)?;
    let kernel = Kernel::unpack(lock, profile, &tools, cache, progress)?;
    let base = BaseTree::make(lock, profile, host, cache, progress)?;
    Ok(Trees { tools, kernel, base })
}

fn write_tree(
    base: &BaseTree,
    profile: &Profile,
    lock: &Lock,
    guest: &Guest,
    to: &Path,
) -> Result<(), Failure> {
    let program = |name: &str, content| Placed { path: format!("{PROGRAMS}/{name}"), mode: 0o755, content };
    let mut programs = vec![program("kontor-tunnel", &guest.tunnel[..])];
    if profile.test {
        programs.push(program("kontor-probe", &guest.probe[..]));
    }
    let packages: BTreeSet<String> = lock.root.iter().map(|deb| deb.name.clone()).collect();
    let file = File::create_new(to).map_err(FileError::at("write", to))?;
    let mut out = BufWriter::new(file);
    assemble::assemble(&base.read()?, profile, lock.built_at, &programs, &packages, &mut out)?;
    out.flush().map_err(FileError::at("write", to))?;
    Ok(())
}

fn compare_host(
    lock: &Lock,
    host: &BTreeMap<String, String>,
    wanted: HostPrograms,
    progress: &Progress,
) -> Result<(), Failure> {
    let differences = host::differences(&lock.host, host);
    if differences.is_empty() {
        return Ok(());
    }
    let differences = differences.join("; ");
    match wanted {
        HostPrograms::Locked => Err(Failure::OtherHost(differences)),
        HostPrograms::Any => {
            progress.note(&format!("not the lock's programs, so maybe not the lock's image: {differences}"));
            Ok(())
        }
    }
}

/// The kernel's command line: everything locked down, and our own words.
fn command_line(verity: &Verity, lock: &Lock, profile: &Profile) -> String {
    let own = CommandLine { verity: verity.clone(), built_at: lock.built_at, test: profile.test };
    format!("{KERNEL_WORDS} {own}")
}

fn piece(directory: &Path, name: &str) -> Result<Piece, FileError> {
    let (bytes, sha256) = files::measure(&directory.join(name))?;
    Ok(Piece { name: name.to_owned(), bytes, sha256 })
}

const KERNEL_WORDS: &str =
    "console=ttyS0 quiet panic=-1 lockdown=confidentiality module.sig_enforce=1 random.trust_cpu=on";
/// Where our programs lie in the root image.
const PROGRAMS: &str = "/usr/lib/kontor";
pub(crate) const IMAGE: &str = "image.json";
const KERNEL: &str = "kernel";
pub(crate) const INITRD: &str = "initrd";
pub(crate) const ROOT: &str = "root.img";
const SBOM: &str = "sbom.cdx.json";
pub(crate) const LOCK: &str = "lock.toml";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lock::tests::lock, profile::tests::smoke};
    use kontor_trust::Digest;

    #[test]
    fn command_line_is_read_back_by_the_guest_and_locks_the_kernel_down() {
        let verity = Verity { root_hash: Digest([1; 32]), salt: [2; 32], data_blocks: 3 };
        let line = command_line(&verity, &lock(), &smoke());
        let own = CommandLine { verity, built_at: lock().built_at, test: true };
        assert_eq!(CommandLine::parse(&line), Ok(own));
        assert!(line.contains("lockdown=confidentiality") && line.contains("module.sig_enforce=1"));
    }
}
