//! From a profile to a lock: asks the archives which packages it takes today.

use crate::{
    Failure,
    apt::{Mirrors, PrivateApt},
    cache::Cache,
    files, host,
    lock::{FORMAT, Lock, Wish},
    profile::{Profile, Source},
    progress::Progress,
    tools,
};
use std::path::Path;

/// Resolves the profile and writes the lock to `out`.
pub(crate) fn lock(
    source: &Source,
    profile: &Profile,
    mirrors: Mirrors,
    out: &Path,
    progress: &Progress,
) -> Result<Lock, Failure> {
    let host = host::programs(source)?;
    let cache = Cache::open()?;
    let scratch = cache.scratch()?;
    let apt = PrivateApt::new(scratch.path(), mirrors.or_of_host()?)?;
    {
        let _step = progress.step("fetch and verify the archives' indices");
        apt.update(&profile.archives)?;
    }
    let _step = progress.step("choose packages");
    let (releases, built_at) = apt.releases(&profile.archives)?;
    let mut wanted = vec![ESSENTIAL];
    wanted.extend(profile.packages.iter().map(String::as_str));
    let lock = Lock {
        format: FORMAT,
        profile: profile.name.clone(),
        built_at,
        wish: Wish::of(profile),
        host,
        releases,
        kernel: apt.kernel(&profile.kernel)?,
        root: apt.resolve(&wanted)?,
        tool: apt.resolve(&tools::WANTED)?,
    };
    let text = lock.to_text();
    // What is written is what a build will read.
    let reread = Lock::parse(&text, out, profile)?;
    debug_assert_eq!(reread, lock);
    files::replace(out, text.as_bytes())?;
    Ok(reread)
}

/// Debian's essential packages. apt counts itself among them, which no image needs.
const ESSENTIAL: &str = "?and(?architecture(amd64),?essential,?not(?exact-name(apt)))";
