//! `cargo xtask bench uplink`: the tunnel's uplinks and the kernel's own way, each in a guest of its own, in turn.
//!
//! ```text
//!  guest: kontor-bench ─ port | vfio | virtio_net + UDP ─ QEMU ─ socket ─ this program
//! ```
//!
//! Datagrams go as fast as they are taken, one way at a time. Nothing is encrypted, and no packet leaves this
//! program: what is measured is the way between, and what it costs the host.

use super::{
    Choice, Pieces, Setting, Spread, boot,
    peer::{Passed, Peer},
    publish,
    vm::{self, Vm, Way},
};
use crate::{
    build, packages,
    run::{Error, Result},
};
use kontor_guest::bench::{DATAGRAM_MAX, Order};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt::Write,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

/// Lengths of datagrams: a small one, and the largest that all ways carry in one packet of 1500 bytes.
const LENGTHS: [usize; 2] = [64, DATAGRAM_MAX];
/// How long datagrams flow before they are counted, so that emulated code is translated.
const WARM_UP: Duration = Duration::from_millis(150);
/// How long they are counted.
const WINDOW: Duration = Duration::from_millis(500);
/// The same for a run that only sees whether it works.
const QUICK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(100));
/// How long the guest may take to say what it did.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// From whom to whom, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Out,
    In,
}

/// What is measured at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Case {
    direction: Direction,
    bytes: usize,
    trains: bool,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        let directions = [Direction::Out, Direction::In].into_iter();
        directions.flat_map(|direction| {
            LENGTHS.into_iter().flat_map(move |bytes| {
                [false, true].into_iter().map(move |trains| Self { direction, bytes, trains })
            })
        })
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Sample {
    datagrams_per_s: f64,
    megabytes_per_s: f64,
    /// Processor time of QEMU, guest and all, for a million datagrams.
    qemu_s_per_million: f64,
    qemu_s_per_gigabyte: f64,
    /// Processor time of this program's end.
    peer_s_per_million: f64,
    /// Time that the guest's processors were busy, by the guest's clock.
    guest_s_per_million: f64,
    datagrams_per_frame: f64,
    /// Part of the datagrams that did not arrive.
    lost: f64,
}

/// A field of a sample.
type Field = fn(&Sample) -> f64;

#[derive(Serialize)]
struct Line {
    way: Way,
    #[serde(flatten)]
    case: Case,
    datagrams_per_s: Option<Spread>,
    megabytes_per_s: Option<Spread>,
    qemu_s_per_million: Option<Spread>,
    qemu_s_per_gigabyte: Option<Spread>,
    peer_s_per_million: Option<Spread>,
    guest_s_per_million: Option<Spread>,
    datagrams_per_frame: Option<Spread>,
    lost: Option<Spread>,
}

/// Of each turn, how many times as much.
#[derive(Serialize)]
struct Ratio {
    of: Way,
    to: Way,
    #[serde(flatten)]
    case: Case,
    rate: Option<Spread>,
    /// Processor time of QEMU per datagram: less is better.
    qemu: Option<Spread>,
}

#[derive(Serialize)]
struct Report {
    what: &'static str,
    #[serde(flatten)]
    setting: Setting,
    window_ms: u128,
    lines: Vec<Line>,
    ratios: Vec<Ratio>,
}

/// What the turns gave, each in its place.
type Samples = BTreeMap<(Case, Way), Vec<Sample>>;

/// Builds what is missing, measures and reports.
pub(crate) fn run(choice: Choice, json: Option<&Path>) -> Result<ExitCode> {
    packages::ensure()?;
    measure(&build::programs()?, choice, json)
}

/// The same with programs that are built already.
pub(crate) fn measure(bin: &Path, choice: Choice, json: Option<&Path>) -> Result<ExitCode> {
    let pieces = Pieces::make(bin)?;
    let accel = vm::accel(&pieces, choice.accel)?;
    let (warm_up, window) = if choice.quick { QUICK } else { (WARM_UP, WINDOW) };
    let mut samples = Samples::new();
    for round in 0..choice.rounds() {
        let mut order = Way::ALL;
        // Nobody is always the first.
        order.rotate_left(round % Way::ALL.len());
        for way in order {
            eprintln!("   turn {} of {}: {}", round + 1, choice.rounds(), way.name());
            let (mut vm, end) = boot(|| Vm::boot(&pieces, accel, way))?;
            let mut peer = Peer::new(way, end)?;
            for case in Case::all() {
                let sample = sample(&mut vm, &mut peer, case, warm_up, window)?;
                samples.entry((case, way)).or_default().push(sample);
            }
            vm.off()?;
        }
    }
    let report = Report {
        what: "uplink",
        setting: Setting::new(choice, accel)?,
        window_ms: window.as_millis(),
        lines: samples.iter().map(|((case, way), samples)| Line::new(*way, *case, samples)).collect(),
        ratios: ratios(&samples),
    };
    publish(&report, &report.text(), json)?;
    Ok(ExitCode::SUCCESS)
}

/// What passed and what it took since a moment.
struct Mark {
    passed: Passed,
    qemu_s: f64,
    own_s: f64,
    at: Instant,
}

impl Mark {
    fn now(vm: &Vm, peer: &Peer) -> Result<Self> {
        let (qemu_s, own_s) = (vm.cpu_s()?, vm::cpu_s("/proc/self/stat")?);
        Ok(Self { passed: peer.passed, qemu_s, own_s, at: Instant::now() })
    }
}

fn sample(vm: &mut Vm, peer: &mut Peer, case: Case, warm_up: Duration, window: Duration) -> Result<Sample> {
    let Case { direction, bytes, trains } = case;
    peer.set(bytes, trains)?;
    let length = u16::try_from(bytes).map_err(|_| Error::Unexpected("a datagram too long".into()))?;
    let first = peer.passed;
    let flow = |peer: &mut Peer, end: Instant| match direction {
        Direction::Out => peer.take_until(end, None),
        Direction::In => peer.give_until(end),
    };
    match direction {
        Direction::Out => vm.order(Order::Send { bytes: length, trains })?,
        Direction::In => {
            vm.order(Order::Receive { bytes: length, trains })?;
            vm.ready()?;
        }
    }
    flow(peer, Instant::now() + warm_up)?;
    let before = Mark::now(vm, peer)?;
    flow(peer, before.at + window)?;
    let after = Mark::now(vm, peer)?;
    if direction == Direction::In {
        peer.finish()?;
    }
    vm.order(Order::Stop)?;
    peer.take_until(Instant::now() + ANSWER_MAX, Some(vm.reports()))?;
    let (guests, busy_ms) = vm.done()?;
    peer.drain()?;
    let all = (peer.passed.datagrams - first.datagrams) as f64;
    let (counted, guests) = ((after.passed.datagrams - before.passed.datagrams) as f64, guests as f64);
    let (sent, came) = match direction {
        Direction::Out => (guests, all),
        Direction::In => (all, guests),
    };
    let lost = 1.0 - came / sent;
    // What the guest did not receive did not pass.
    let passed = if direction == Direction::In { counted * came / sent } else { counted };
    let million = passed / 1e6;
    let gigabytes = passed * bytes as f64 / 1e9;
    let elapsed = (after.at - before.at).as_secs_f64();
    let qemu_s = after.qemu_s - before.qemu_s;
    let frames = (after.passed.frames - before.passed.frames) as f64;
    Ok(Sample {
        datagrams_per_s: passed / elapsed,
        megabytes_per_s: gigabytes * 1e3 / elapsed,
        qemu_s_per_million: qemu_s / million,
        qemu_s_per_gigabyte: qemu_s / gigabytes,
        peer_s_per_million: (after.own_s - before.own_s) / million,
        guest_s_per_million: busy_ms as f64 / 1e3 / (guests / 1e6),
        datagrams_per_frame: counted / frames,
        lost,
    })
}

impl Line {
    fn new(way: Way, case: Case, samples: &[Sample]) -> Self {
        let spread = |field: Field| Spread::of(samples.iter().map(field));
        Self {
            way,
            case,
            datagrams_per_s: spread(|s| s.datagrams_per_s),
            megabytes_per_s: spread(|s| s.megabytes_per_s),
            qemu_s_per_million: spread(|s| s.qemu_s_per_million),
            qemu_s_per_gigabyte: spread(|s| s.qemu_s_per_gigabyte),
            peer_s_per_million: spread(|s| s.peer_s_per_million),
            guest_s_per_million: spread(|s| s.guest_s_per_million),
            datagrams_per_frame: spread(|s| s.datagrams_per_frame),
            lost: spread(|s| s.lost),
        }
    }
}

fn ratios(samples: &Samples) -> Vec<Ratio> {
    let pairs = [(Way::Port, Way::Kernel), (Way::Vfio, Way::Kernel), (Way::Port, Way::Vfio)];
    let mut ratios = Vec::new();
    for case in Case::all() {
        for (of, to) in pairs {
            let (Some(ofs), Some(tos)) = (samples.get(&(case, of)), samples.get(&(case, to))) else {
                continue;
            };
            let spread = |field: Field| Spread::of(ofs.iter().zip(tos).map(|(of, to)| field(of) / field(to)));
            let (rate, qemu) = (spread(|s| s.datagrams_per_s), spread(|s| s.qemu_s_per_million));
            ratios.push(Ratio { of, to, case, rate, qemu });
        }
    }
    ratios
}

impl Case {
    fn text(self) -> String {
        let direction = match self.direction {
            Direction::Out => "out",
            Direction::In => "in ",
        };
        let trains = if self.trains { "trains" } else { "single" };
        format!("{direction} {:>4} B {trains}", self.bytes)
    }
}

impl Report {
    fn text(&self) -> String {
        let shown = |spread: Option<Spread>, digits| spread.map_or_else(String::new, |s| s.text(digits));
        let median = |spread: Option<Spread>, digits: usize| {
            spread.map_or_else(String::new, |Spread { median, .. }| format!("{median:.digits$}"))
        };
        let mut text = format!("\nUplinks: {}\nMedians; in brackets the range.\n\n", self.setting.text());
        let head = ["way", "datagrams/s", "MB/s", "QEMU s/M", "s/GB", "guest s/M", "per frame", "lost"];
        let [way, rate, mega, million, giga, guest, frame, lost] = head;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:18} {way:7} {rate:>24} {mega:>6} {million:>9} {giga:>7} {guest:>9} {frame:>9} {lost:>6}",
            "direction"
        );
        for line in &self.lines {
            let _ = writeln!(
                text,
                "{:18} {:7} {:>24} {:>6} {:>9} {:>7} {:>9} {:>9} {:>6}",
                line.case.text(),
                line.way.name(),
                shown(line.datagrams_per_s, 0),
                median(line.megabytes_per_s, 1),
                median(line.qemu_s_per_million, 1),
                median(line.qemu_s_per_gigabyte, 1),
                median(line.guest_s_per_million, 1),
                median(line.datagrams_per_frame, 1),
                median(line.lost, 3),
            );
        }
        text.push_str(
            "\nHow many times as much, of each turn; QEMU's processor time per datagram: less is better.\n\n",
        );
        for Ratio { of, to, case, rate, qemu } in &self.ratios {
            let (rate, qemu) = (shown(*rate, 2), shown(*qemu, 2));
            let names = format!("{} / {}", of.name(), to.name());
            let _ = writeln!(text, "{:18} {names:15} rate {rate:20} processor time {qemu}", case.text());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rate: f64) -> Sample {
        Sample {
            datagrams_per_s: rate,
            megabytes_per_s: 1.0,
            qemu_s_per_million: 10.0 / rate,
            qemu_s_per_gigabyte: 1.0,
            peer_s_per_million: 1.0,
            guest_s_per_million: 1.0,
            datagrams_per_frame: 1.0,
            lost: 0.0,
        }
    }

    #[test]
    fn every_case_is_there_once() {
        let all: Vec<Case> = Case::all().collect();
        let mut distinct = all.clone();
        distinct.dedup();
        assert_eq!((all.len(), distinct.len()), (8, 8));
    }

    #[test]
    fn ratios_are_those_of_each_turn() {
        let case = Case { direction: Direction::Out, bytes: 64, trains: false };
        let samples = Samples::from([
            ((case, Way::Port), vec![sample(2.0), sample(30.0)]),
            ((case, Way::Kernel), vec![sample(1.0), sample(10.0)]),
        ]);
        let ratios = ratios(&samples);
        let [Ratio { of: Way::Port, to: Way::Kernel, rate: Some(rate), qemu: Some(qemu), .. }] = &ratios[..]
        else {
            panic!("one pair was measured")
        };
        assert_eq!((rate.median, rate.min, rate.max), (2.5, 2.0, 3.0));
        assert_eq!((qemu.min, qemu.max), (1.0 / 3.0, 0.5));
    }
}
