//! `cargo xtask bench`: what is compared is run in turn, again and again, on one machine in one run; what is
//! reported are medians and their spread, and ratios of each turn.

pub(crate) mod boot;
mod peer;
pub(crate) mod uplink;
mod vm;

use crate::{
    build,
    run::{Error, Result, at},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// Turns of a run.
const ROUNDS: usize = 5;

/// How often a machine is booted until it is believed that it does not boot.
const BOOTS_MAX: usize = 3;

/// What a person asks for.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Choice {
    /// One short turn, to see that everything works; its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// What executes the guests; without this, KVM where it runs a guest.
    #[arg(long, value_enum)]
    accel: Option<Accel>,
}

impl Choice {
    /// One short turn under emulation, which every machine can do.
    pub(crate) fn smoke() -> Self {
        Self { quick: true, accel: Some(Accel::Tcg) }
    }

    fn rounds(self) -> usize {
        if self.quick { 1 } else { ROUNDS }
    }
}

/// What executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accel {
    Kvm,
    Tcg,
}

impl Accel {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What the benchmarks boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pieces {
    /// The image's kernel.
    kernel: PathBuf,
    /// An initrd that measures uplinks.
    uplink: PathBuf,
    /// An initrd whose init does nothing.
    empty: PathBuf,
}

impl Pieces {
    /// Has them made.
    fn make(bin: &Path) -> Result<Self> {
        let out = build::bench(bin)?;
        let at = |name| out.join(name);
        Ok(Self { kernel: at("kernel"), uplink: at("uplink.initrd"), empty: at("empty.initrd") })
    }
}

/// Boots a machine, and where that fails once more, and says so: a kernel that patches itself while another
/// processor runs it does not always survive emulation (seen with QEMU 7.2: `Oops: int3` within the first second).
fn boot<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..BOOTS_MAX {
        match attempt() {
            Ok(booted) => return Ok(booted),
            Err(error) => eprintln!("   once more, because a boot failed: {}", crate::run::chain(&error)),
        }
    }
    attempt()
}

/// Median and range of what was measured in each turn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Of some figures; none without any.
    fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().filter(|figure| figure.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted.get((sorted.len() - 1) / 2)?, sorted.get(sorted.len() / 2)?);
        Some(Self { median: f64::midpoint(*low, *high), min, max })
    }

    /// As a person reads it: `2.31 (1.90-2.70)`.
    fn text(self, digits: usize) -> String {
        let Self { median, min, max } = self;
        format!("{median:.digits$} ({min:.digits$}-{max:.digits$})")
    }
}

/// The programs and the kernel that were measured.
#[derive(Debug, Clone, Serialize)]
struct Setting {
    accel: Accel,
    qemu: String,
    processors: usize,
    rounds: usize,
    quick: bool,
}

impl Setting {
    fn new(choice: Choice, accel: Accel) -> Result<Self> {
        let version = crate::run::quietly(std::process::Command::new(vm::QEMU).arg("--version"))?;
        let qemu = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().trim().to_owned();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { accel, qemu, processors, rounds: choice.rounds(), quick: choice.quick })
    }

    fn text(&self) -> String {
        let Self { accel, qemu, processors, rounds, quick } = self;
        let emulated = match accel {
            Accel::Tcg => "; instructions are EMULATED: only ratios mean anything",
            Accel::Kvm => "",
        };
        let quick = if *quick { "; QUICK: no figure means anything" } else { "" };
        format!("{qemu}, {}, {processors} processors, {rounds} turns{emulated}{quick}", accel.name())
    }
}

/// Writes a report for people to standard error, and where it is wanted one for programs.
fn publish(report: &impl Serialize, text: &str, json: Option<&Path>) -> Result<()> {
    eprintln!("{text}");
    let Some(target) = json else { return Ok(()) };
    let mut bytes = serde_json::to_vec_pretty(report)
        .map_err(|source| Error::Json { what: "the report".into(), source })?;
    bytes.push(b'\n');
    if target == Path::new("-") {
        std::io::stdout().lock().write_all(&bytes).map_err(at("write the report", target))
    } else {
        fs::write(target, bytes).map_err(at("write the report", target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_is_tried_three_times_and_no_more() {
        let tried = |good_at: usize| {
            let mut times = 0;
            let result = boot(|| {
                times += 1;
                if times == good_at { Ok(times) } else { Err(Error::Unexpected("panic".into())) }
            });
            (result.ok(), times)
        };
        assert_eq!((tried(1), tried(3), tried(4)), ((Some(1), 1), (Some(3), 3), (None, 3)));
    }

    #[test]
    fn median_stands_in_the_middle_and_range_at_the_ends() {
        let spread = |figures: &[f64]| Spread::of(figures.iter().copied());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]).map(|s| s.median), Some(2.5));
        assert_eq!(spread(&[7.0, f64::INFINITY, f64::NAN]).map(|s| (s.median, s.max)), Some((7.0, 7.0)));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn spread_is_written_with_its_range() {
        let spread = Spread { median: 2.314, min: 1.9, max: 2.7 };
        assert_eq!(spread.text(2), "2.31 (1.90-2.70)");
        assert_eq!(spread.text(0), "2 (2-3)");
    }
}
