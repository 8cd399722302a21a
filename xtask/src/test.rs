//! `cargo xtask test`: every stage, its time, and the counts as the last line.

use crate::{
    build::{self, Backend, Plan},
    clean::{self, End},
    manual, packages, reproducible,
    run::{self, Error, Result},
    world,
};
use std::{
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

/// What a stage, or all of them, came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// What stages hand to later ones.
#[derive(Default)]
struct Context {
    all: bool,
    /// Slow stages run too: all were asked for, or one by its name.
    slow: bool,
    /// The only one, where not each is tried.
    uplink: Option<Backend>,
    bin: Option<PathBuf>,
    image: Option<PathBuf>,
}

type Stage = (&'static str, fn(&mut Context) -> Result<Counts>);

const STAGES: &[Stage] = &[
    ("packages", |_| packages::ensure().map(|()| Counts::one())),
    ("fmt", fmt),
    ("clippy", clippy),
    ("units", units),
    ("simulator", simulator),
    ("programs", programs),
    ("manual", manual),
    ("image", image),
    ("reproducible", reproducible),
    ("vm", vm),
    ("demo", demo),
    ("bench", bench),
    ("deny", deny),
];

/// Not of the workspace: it switches on a clock that a program sets.
const SIMULATOR: &str = "vpn/simulator/Cargo.toml";

/// Runs the stages whose name holds `only`, all of them without.
pub(crate) fn run(all: bool, only: Option<&str>, uplink: Option<Backend>) -> Result<ExitCode> {
    let mut context = Context { all, slow: all || only.is_some(), uplink, ..Context::default() };
    let mut total = Counts::default();
    let mut times = Vec::new();
    let chosen: Vec<&Stage> =
        STAGES.iter().filter(|(name, _)| only.is_none_or(|only| name.contains(only))).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = STAGES.iter().map(|(name, _)| *name).collect();
        return Err(Error::Unexpected(format!("no stage has such a name; there are: {}", names.join(", "))));
    }
    for (name, stage) in chosen {
        eprintln!("── {name}");
        let begin = Instant::now();
        let counts = stage(&mut context).unwrap_or_else(|error| {
            eprintln!("{name}: {}", run::chain(&error));
            Counts { failed: 1, ..Counts::default() }
        });
        times.push((name, begin.elapsed(), counts));
        total.add(counts);
    }
    report(&times, total).map_err(|source| Error::Start("write the counts".into(), source))?;
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(times: &[(&&str, Duration, Counts)], total: Counts) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nstage          time   passed failed skipped")?;
    for (name, time, counts) in times {
        let Counts { passed, failed, skipped } = counts;
        writeln!(out, "{name:<12} {:>6.1} s  {passed:>6} {failed:>6} {skipped:>7}", time.as_secs_f64())?;
    }
    let all: Duration = times.iter().map(|(_, time, _)| *time).sum();
    writeln!(out, "all          {:>6.1} s\n", all.as_secs_f64())?;
    writeln!(out, "{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped)
}

impl Counts {
    fn one() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Reads what one line of a Rust test harness adds.
    fn read_line(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else { return };
        for part in result.split([';', '.']) {
            let mut words = part.split_ascii_whitespace();
            let (Some(number), Some(what)) = (words.next(), words.next()) else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

/// Runs a test harness, shows what it prints, and counts.
fn counted(command: &mut Command) -> Result<Counts> {
    let words = run::text(command);
    let start = |source| Error::Start(words.clone(), source);
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(start)?;
    let stdout = child.stdout.take().ok_or_else(|| Error::Unexpected("no standard output".into()))?;
    let mut counts = Counts::default();
    // A test that cannot run on this machine prints `skipped: REASON`; its harness counts it as passed.
    let mut skipped = 0;
    for line in BufReader::new(stdout).lines() {
        let line = line.map_err(start)?;
        eprintln!("{line}");
        skipped += u64::from(line.starts_with("skipped: "));
        counts.read_line(&line);
    }
    counts.passed = counts.passed.saturating_sub(skipped);
    counts.skipped += skipped;
    let status = child.wait().map_err(start)?;
    if !status.success() && counts.failed == 0 {
        return Err(Error::Failed { command: words, status, output: String::new() });
    }
    Ok(counts)
}

fn fmt(_: &mut Context) -> Result<Counts> {
    for manifest in ["Cargo.toml", SIMULATOR] {
        run::openly(build::cargo().args(["fmt", "--all", "--check", "--manifest-path", manifest]))?;
    }
    Ok(Counts::one())
}

fn clippy(_: &mut Context) -> Result<Counts> {
    let arguments = ["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"];
    run::openly(build::cargo().args(arguments)).map(|()| Counts::one())
}

fn units(context: &mut Context) -> Result<Counts> {
    let mut command = build::cargo();
    let mut counts = counted(
        command
            .args(["test", "--workspace", "--locked", "--no-fail-fast", "--", "--show-output"])
            .stdin(Stdio::null()),
    )?;
    if context.all {
        // The tunnel against boringtun's own clock: minutes of waiting.
        let mut slow = build::cargo();
        let slow = counted(
            slow.args(["test", "--package", "kontor-vpn", "--locked", "--", "--ignored"])
                .stdin(Stdio::null()),
        )?;
        counts.add(slow);
        counts.skipped = counts.skipped.saturating_sub(slow.passed + slow.failed);
    }
    Ok(counts)
}

/// Hours of the tunnel on a bad network, by a clock of its own: apart from the workspace, which has no such clock.
fn simulator(_: &mut Context) -> Result<Counts> {
    let mut test = build::cargo();
    test.args(["test", "--locked", "--manifest-path", SIMULATOR, "--target-dir"]);
    counted(test.arg(build::root().join("target/simulator")).stdin(Stdio::null()))
}

fn programs(context: &mut Context) -> Result<Counts> {
    context.bin = Some(build::programs()?);
    Ok(Counts::one())
}

fn manual(context: &mut Context) -> Result<Counts> {
    let passed = manual::check(&context.bin()?)?;
    Ok(Counts { passed, ..Counts::default() })
}

fn image(context: &mut Context) -> Result<Counts> {
    let bin = context.bin()?;
    context.image = Some(build::image(&bin)?);
    Ok(Counts::one())
}

fn reproducible(context: &mut Context) -> Result<Counts> {
    if !context.slow {
        eprintln!("skipped: builds everything in the image once more; cargo xtask test --all does");
        return Ok(Counts { skipped: 1, ..Counts::default() });
    }
    let (bin, image) = (context.bin()?, context.image()?);
    reproducible::twice(&bin, &image).map(|()| Counts::one())
}

/// The suite, in one work VM for each uplink.
fn vm(context: &mut Context) -> Result<Counts> {
    let mut counts = Counts::default();
    let only = context.uplink;
    for uplink in Backend::ALL.into_iter().filter(|each| only.is_none_or(|only| only == *each)) {
        eprintln!("   uplink {}", uplink.name());
        let plan = Plan {
            bin: context.bin()?,
            image: context.image()?,
            uplink,
            scratch: world::SCRATCH.into(),
            json: None,
        };
        counts.add(counted(&mut world::command(world::Role::Suite, &plan, &[])?)?);
    }
    Ok(counts)
}

/// The demo, to its end and not: each leaves nothing.
fn demo(context: &mut Context) -> Result<Counts> {
    let own = context.bin()?.join("xtask");
    context.image()?;
    let mut counts = Counts::default();
    for end in [End::Itself, End::Interrupted, End::Killed] {
        clean::demo(&own, end)?;
        eprintln!("a demo ({end:?}) leaves nothing");
        counts.add(Counts::one());
    }
    Ok(counts)
}

/// That the uplinks can be measured; the figures of so short a run mean nothing.
fn bench(context: &mut Context) -> Result<Counts> {
    crate::bench::uplink::measure(&context.bin()?, crate::bench::Choice::smoke(), None).map(|_| Counts::one())
}

/// Licences, sources and bans of every dependency. The tool is built once into the cache.
fn deny(_: &mut Context) -> Result<Counts> {
    const VERSION: &str = "0.20.2";
    let root = build::cache()?.join(format!("cargo-deny-{VERSION}"));
    let tool = root.join("bin/cargo-deny");
    if !tool.exists() {
        let mut install = build::cargo();
        install.args(["install", "cargo-deny", "--locked", "--version", VERSION, "--root"]).arg(&root);
        run::openly(&mut install)?;
    }
    let mut check = Command::new(&tool);
    check.current_dir(build::root()).args(["--workspace", "check", "bans", "licenses", "sources"]);
    run::openly(&mut check).map(|()| Counts::one())
}

impl Context {
    fn bin(&mut self) -> Result<PathBuf> {
        match &self.bin {
            Some(bin) => Ok(bin.clone()),
            None => build::programs().inspect(|bin| self.bin = Some(bin.clone())),
        }
    }

    fn image(&mut self) -> Result<PathBuf> {
        if let Some(image) = &self.image {
            return Ok(image.clone());
        }
        let bin = self.bin()?;
        build::image(&bin).inspect(|image| self.image = Some(image.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harness_lines_are_counted() {
        let mut counts = Counts::default();
        counts.read_line(
            "test result: ok. 11 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.02s",
        );
        counts.read_line("test a ... ok");
        counts.read_line("test result: FAILED. 3 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!(counts, Counts { passed: 14, failed: 4, skipped: 2 });
    }
}
