//! The guest's own programs: static, and the same bytes wherever the source tree lies.

use crate::{
    cache::{self, Cache, Entry, Kind},
    command::{CommandError, Program, Run},
    exit::Exit,
    files::{self, FileError},
    host::RUSTC,
    profile::Source,
    progress::Progress,
    sbom::Crates,
};
use std::path::PathBuf;

/// The guest's programs, in memory.
pub(crate) struct Guest {
    pub(crate) init: Vec<u8>,
    pub(crate) tunnel: Vec<u8>,
    pub(crate) probe: Vec<u8>,
}

/// The guest's programs could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("{0} is not the static program that the guest needs")]
    NotStatic(&'static str),
}

impl GuestError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::File(error) => error.exit(),
            Self::Command(error) => error.exit(),
            Self::NotStatic(_) => Exit::Bug,
        }
    }
}

impl Guest {
    /// Builds the programs of an image, which consist of `crates`.
    pub(crate) fn build(
        source: &Source,
        crates: &Crates,
        cache: &Cache,
        progress: &Progress,
    ) -> Result<Self, GuestError> {
        let _step = progress.step("compile the guest's programs");
        let programs = ["kontor-init", "kontor-tunnel", "kontor-probe"];
        let [init, tunnel, probe] = Self::compile(programs, source, crates, cache)?;
        Ok(Self { init, tunnel, probe })
    }

    /// Builds the program of measurements, which no image holds.
    pub(crate) fn bench(
        source: &Source,
        crates: &Crates,
        cache: &Cache,
        progress: &Progress,
    ) -> Result<Vec<u8>, GuestError> {
        let _step = progress.step("compile the program of measurements");
        let [bench] = Self::compile(["kontor-bench"], source, crates, cache)?;
        Ok(bench)
    }

    /// Builds programs. Cargo decides what is still good from the last time.
    fn compile<const N: usize>(
        programs: [&'static str; N],
        source: &Source,
        crates: &Crates,
        cache: &Cache,
    ) -> Result<[Vec<u8>; N], GuestError> {
        let compiler = Run::new(RUSTC).directory(source.root()).arg("-vV").text()?;
        let sysroot = Run::new(RUSTC).directory(source.root()).args(["--print", "sysroot"]).first_line()?;
        let here = source.root().display().to_string();
        // Not all of Cargo.lock: what other programs of the source tree depend on does not matter here.
        let parts = [compiler, here.clone()].into_iter();
        let key = cache::key(RECIPE, parts.chain(crates.list.iter().map(ToString::to_string)));
        let target: Entry = cache.entry(Kind::Guest, &key, |_| Ok::<_, FileError>(()))?;
        // A path in a binary would say where it was built, and be another one elsewhere. The last that
        // fits counts.
        let mut moves =
            vec![(here, "/kontor"), (sysroot, "/rust"), (target.path().display().to_string(), "/target")];
        moves.extend(crates.registries.iter().map(|path| (path.display().to_string(), "/crates")));
        let mut flags: Vec<String> =
            ["-Ctarget-feature=+crt-static", "-Clink-arg=-Wl,--build-id=none"].map(str::to_owned).to_vec();
        flags.extend(moves.iter().map(|(from, to)| format!("--remap-path-prefix={from}={to}")));
        let c_flags: Vec<String> =
            moves.iter().map(|(from, to)| format!("-ffile-prefix-map={from}={to}")).collect();
        cargo(source)
            .args(["build", "--quiet", "--locked", "--package", PACKAGE])
            .args(programs.iter().flat_map(|name| ["--bin", name]))
            .args(["--profile", PROFILE, "--target", TARGET])
            .env("CARGO_TARGET_DIR", target.path())
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_INCREMENTAL", "0")
            .env("CFLAGS", c_flags.join(" "))
            .bytes()?;
        let built = target.path().join(TARGET).join(PROFILE);
        let read = |name: &'static str| {
            let bytes = files::read(&PathBuf::from(&built).join(name), MAX_PROGRAM)?;
            if is_static(&bytes) { Ok(bytes) } else { Err(GuestError::NotStatic(name)) }
        };
        let mut all = [const { Vec::new() }; N];
        for (name, program) in programs.into_iter().zip(&mut all) {
            *program = read(name)?;
        }
        Ok(all)
    }
}

/// Cargo in the source tree, with those of the caller's variables that say how to reach a registry.
pub(crate) fn cargo(source: &Source) -> Run {
    let reaches = |name: &str| REGISTRY.iter().any(|prefix| name.starts_with(prefix));
    let run = Run::new(Program { name: "cargo", package: "rustup" }).directory(source.root());
    let variables = std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(reaches));
    variables.fold(run, |run, (name, value)| run.env(name, value))
}

/// Whether an ELF program (System V ABI, chapters 4 and 5) needs no loader: no `PT_INTERP`.
fn is_static(program: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| {
        let field = program.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let interpreter = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let kinds = (0..count).map(|i| number(table.checked_add(i * size)?, 4));
        kinds.collect::<Option<Vec<_>>>().map(|kinds| kinds.contains(&PT_INTERP))
    };
    program.starts_with(b"\x7fELF\x02\x01") && interpreter() == Some(false)
}

const PT_INTERP: usize = 3;
const RECIPE: &str = "guest 1";
const PROFILE: &str = "sealed";
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
pub(crate) const PACKAGE: &str = "kontor-guest";
const REGISTRY: [&str; 4] = ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];
/// Most bytes of one of our programs.
const MAX_PROGRAM: u64 = 64 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_no_static_program_and_rubbish_is_no_program() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(!is_static(&own));
        for bad in [&b""[..], b"\x7fELF\x02\x01", &own[..60]] {
            assert!(!is_static(bad));
        }
    }

    #[test]
    fn program_without_an_interpreter_is_static() {
        let mut program = vec![0; 64 + 56];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (program[32], program[54], program[56]) = (64, 56, 1);
        program[64] = 1;
        assert!(is_static(&program));
        program[64] = 3;
        assert!(!is_static(&program));
        program[56] = 2;
        assert!(!is_static(&program), "a table that ends early");
    }
}
