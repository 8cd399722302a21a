//! `cargo xtask bench boot`: from QEMU's start to the tunnel, and how long the same kernel takes to an init that
//! does nothing, in a machine with the same command line, in turn.
//!
//! The office, kontord and the relay are real ([`crate::scene`]). For the other boot QEMU's own command line is
//! read from the running process and used again, each descriptor in it made anew, with another initrd.

use super::{
    Accel, Choice, Pieces, Setting, Spread, boot, publish,
    vm::{cpu_s, device_pair},
};
use crate::{
    build::{self, Backend, Plan},
    demo, packages,
    report::{ImageSize, Memory},
    run::{Error, Result, at},
    scene::{LEASE_S, Scene},
    world::{self, Role},
};
use command_fds::{CommandFdExt, FdMapping};
use kontor_guest::bench::{EMPTY, HERE, ROLE};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Write,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

/// How many times as long as an empty boot a start may take at most.
const RATIO_MAX: f64 = 1.5;
/// How long an empty init may take to say that it is there.
const EMPTY_MAX: Duration = Duration::from_secs(120);
/// What kontord gives QEMU first.
const FIRST_ARGUMENT: &str = "-nodefaults";
/// The state that is waited for.
const TUNNEL_UP: &str = "tunnel-up";

/// What the inside is told beside the plan.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    pieces: Pieces,
    rounds: usize,
    quick: bool,
}

#[derive(Serialize)]
struct Report {
    what: &'static str,
    #[serde(flatten)]
    setting: Setting,
    uplink: &'static str,
    /// Milliseconds from QEMU's start to each state of the boot.
    steps: Vec<Step>,
    /// Milliseconds from QEMU's start to an init that does nothing.
    empty_ms: Option<Spread>,
    /// Tunnel up, as many times as long as the empty boot of the same turn.
    ratio: Option<Spread>,
    ratio_max: f64,
    /// Processor time of QEMU from its start to the session, in seconds; others' work on the machine counts less
    /// in it than in the time that passes.
    session_cpu_s: Option<Spread>,
    /// The same to an init that does nothing.
    empty_cpu_s: Option<Spread>,
    cpu_ratio: Option<Spread>,
    /// Milliseconds from the order to start to QEMU's start: the release is verified.
    before_qemu_ms: Option<Spread>,
    image: ImageSize,
    memory: Memory,
}

#[derive(Serialize)]
struct Step {
    step: String,
    ms: Option<Spread>,
}

/// One start, in milliseconds.
struct Start {
    before_qemu: f64,
    /// Since QEMU's start.
    states: Vec<(String, f64)>,
    /// Seconds of processor time.
    cpu_s: f64,
}

/// One empty boot: milliseconds, and seconds of processor time.
struct Empty {
    ms: f64,
    cpu_s: f64,
}

impl Start {
    fn state(&self, name: &str) -> Option<f64> {
        self.states.iter().find(|(state, _)| state == name).map(|(_, ms)| *ms)
    }
}

/// Outside: builds, then runs [`inside`].
pub(crate) fn run(choice: Choice, uplink: Backend, json: Option<&Path>) -> Result<ExitCode> {
    packages::ensure()?;
    let bin = build::programs()?;
    let image = build::image(&bin)?;
    let pieces = Pieces::make(&bin)?;
    let scratch = world::SCRATCH.into();
    let plan = Plan { bin, image, uplink, scratch, json: json.is_some().then(|| demo::STDOUT.into()) };
    let orders = Orders { pieces, rounds: choice.rounds(), quick: choice.quick };
    let orders = serde_json::to_string(&orders).map_err(of_orders)?;
    let output = world::command(Role::BenchBoot, &plan, &[orders])?
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| Error::Start("the outer namespaces".into(), source))?;
    if let Some(target) = json.filter(|_| !output.stdout.is_empty()) {
        demo::write(target, &output.stdout)?;
    }
    Ok(if output.status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn of_orders(source: serde_json::Error) -> Error {
    Error::Json { what: "the orders".into(), source }
}

/// Inside the outer namespaces.
pub(crate) fn inside(plan: &Path, rest: &[String]) -> Result<ExitCode> {
    let plan = Plan::read(plan)?;
    let orders = rest.iter().find(|word| *word != "--").map_or("", String::as_str);
    let Orders { pieces, rounds, quick } = serde_json::from_str(orders).map_err(of_orders)?;
    world::make()?;
    let scene = Scene::open(&plan, LEASE_S)?;
    let (mut starts, mut empties, mut ratios, mut cpu_ratios) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut seen = None;
    for round in 0..rounds {
        eprintln!("   turn {} of {rounds}", round + 1);
        let (start, line, memory, accel) = boot(|| start(&scene))?;
        let empty = boot(|| empty(&line, &pieces, &plan.image))?;
        let up = start.state(TUNNEL_UP);
        let up = up.ok_or_else(|| Error::Unexpected(format!("the work VM was never {TUNNEL_UP}")))?;
        ratios.push(up / empty.ms);
        cpu_ratios.push(start.cpu_s / empty.cpu_s);
        empties.push(empty);
        starts.push(start);
        seen = Some((memory, accel));
    }
    scene.close()?;
    let (memory, accel) = seen.ok_or_else(|| Error::Unexpected("not one turn".into()))?;
    let choice = Choice { quick, accel: Some(accel) };
    let names: Vec<&str> = starts
        .first()
        .map_or_else(Vec::new, |start: &Start| start.states.iter().map(|(name, _)| name.as_str()).collect());
    let step = |name: &&str| {
        let ms = Spread::of(starts.iter().filter_map(|start| start.state(name)));
        Step { step: (*name).to_owned(), ms }
    };
    let report = Report {
        what: "boot",
        setting: Setting::new(choice, accel)?,
        uplink: plan.uplink.name(),
        steps: names.iter().map(step).collect(),
        empty_ms: Spread::of(empties.iter().map(|empty: &Empty| empty.ms)),
        ratio: Spread::of(ratios),
        ratio_max: RATIO_MAX,
        session_cpu_s: Spread::of(starts.iter().map(|start| start.cpu_s)),
        empty_cpu_s: Spread::of(empties.iter().map(|empty| empty.cpu_s)),
        cpu_ratio: Spread::of(cpu_ratios),
        before_qemu_ms: Spread::of(starts.iter().map(|start| start.before_qemu)),
        image: demo::image_size(&plan.image)?,
        memory,
    };
    publish(&report, &report.text(), plan.json.as_deref())?;
    let good = quick || report.ratio.is_some_and(|ratio| ratio.median <= RATIO_MAX);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts the work VM and stops it; QEMU's command line, memory and what executed it are found meanwhile.
fn start(scene: &Scene) -> Result<(Start, Vec<String>, Memory, Accel)> {
    scene.home.start()?;
    let status = scene.home.status()?;
    let (cpu_s, line) = qemu()?;
    let memory = demo::memory(scene);
    scene.home.kontor(&["stop"])?;
    let missing = |what: &str| Error::Unexpected(format!("no {what} in kontor status: {status}"));
    let before_qemu = status["qemu_at_ms"].as_f64().ok_or_else(|| missing("qemu_at_ms"))?;
    let states = status["states"].as_array().ok_or_else(|| missing("states"))?;
    let state = |state: &serde_json::Value| {
        Some((state["state"].as_str()?.to_owned(), state["at_ms"].as_f64()? - before_qemu))
    };
    let states = states.iter().filter_map(state).collect();
    let accel = if status["accel"] == "kvm" { Accel::Kvm } else { Accel::Tcg };
    Ok((Start { before_qemu, states, cpu_s }, line, memory, accel))
}

/// Processor time and arguments of the QEMU that runs. Whoever started it may have its arguments too, but not its
/// time.
fn qemu() -> Result<(f64, Vec<String>)> {
    let proc = Path::new("/proc");
    let entries = fs::read_dir(proc).map_err(at("list", proc))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let machine = |pid: u32| {
        // It may have ended since it was listed.
        let mut line = arguments(pid).ok()?;
        let first = line.iter().position(|word| word == FIRST_ARGUMENT)?;
        Some((cpu_s(&format!("/proc/{pid}/stat")).ok()?, line.split_off(first)))
    };
    let found = pids.filter_map(machine).max_by(|(one, _), (other, _)| one.total_cmp(other));
    found.ok_or_else(|| Error::Unexpected("QEMU does not run".into()))
}

/// The arguments of a running process.
fn arguments(pid: u32) -> Result<Vec<String>> {
    let file = PathBuf::from(format!("/proc/{pid}/cmdline"));
    let bytes = fs::read(&file).map_err(at("read", &file))?;
    let words = bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let mut words: Vec<String> = words.skip(1).collect();
    // What is behind the last NUL.
    words.pop();
    Ok(words)
}

/// What a descriptor on QEMU's command line has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kernel,
    Initrd,
    Root,
    Stream,
    Device,
    Console,
}

/// The descriptors on QEMU's command line.
fn descriptors(line: &[String]) -> Vec<(i32, Kind)> {
    let number = |text: &str, before: &str| -> Option<i32> {
        let (_, rest) = text.split_once(before)?;
        rest.split(',').next()?.parse().ok()
    };
    line.windows(2)
        .filter_map(|pair| {
            let (name, value) = (pair[0].as_str(), pair[1].as_str());
            Some(match name {
                "-kernel" => (number(value, "/proc/self/fd/")?, Kind::Kernel),
                "-initrd" => (number(value, "/proc/self/fd/")?, Kind::Initrd),
                "-add-fd" => (number(value, "fd=")?, Kind::Root),
                "-chardev" if value.contains("id=console,") => (number(value, ",fd=")?, Kind::Console),
                "-chardev" => (number(value, ",fd=")?, Kind::Stream),
                "-netdev" => (number(value, "local.str=")?, Kind::Device),
                _ => return None,
            })
        })
        .collect()
}

/// Boots an empty init with QEMU's command line `line`, until it says that it is there.
fn empty(line: &[String], pieces: &Pieces, image: &Path) -> Result<Empty> {
    let mut line = line.to_vec();
    let append = line.iter().position(|word| word == "-append").and_then(|at| line.get_mut(at + 1));
    let append = append.ok_or_else(|| Error::Unexpected("QEMU without a kernel's command line".into()))?;
    append.push_str(&format!(" {ROLE}={EMPTY}"));
    let file = |path: &Path| File::open(path).map(OwnedFd::from).map_err(at("open", path));
    let failed = |source| Error::Start("an empty machine".into(), source);
    // The host's ends stay open as long as the machine runs.
    let (mut mappings, mut ends, mut console) = (Vec::new(), Vec::<OwnedFd>::new(), None);
    for (number, kind) in descriptors(&line) {
        let theirs = match kind {
            Kind::Kernel => file(&pieces.kernel)?,
            Kind::Initrd => file(&pieces.empty)?,
            Kind::Root => file(&image.join("root.img"))?,
            Kind::Device => {
                let (ours, theirs) = device_pair().map_err(failed)?;
                ends.push(ours.into());
                theirs
            }
            Kind::Stream => {
                let (ours, theirs) = UnixStream::pair().map_err(failed)?;
                ends.push(ours.into());
                theirs.into()
            }
            Kind::Console => {
                let (ours, theirs) = UnixStream::pair().map_err(failed)?;
                ours.set_read_timeout(Some(EMPTY_MAX)).map_err(failed)?;
                console = Some(ours);
                theirs.into()
            }
        };
        mappings.push(FdMapping { parent_fd: theirs, child_fd: number });
    }
    let console = console.ok_or_else(|| Error::Unexpected("QEMU without a console".into()))?;
    let mut command = Command::new(super::vm::QEMU);
    command.args(&line).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    command.fd_mappings(mappings).map_err(|e| failed(io::Error::other(e)))?;
    let begin = Instant::now();
    let mut qemu = command.spawn().map_err(failed)?;
    // QEMU's ends are its alone, so that its end is seen.
    drop(command);
    let mut lines = BufReader::new(console).lines().map_while(io::Result::ok);
    let here = lines.any(|line| line.contains(HERE));
    let ms = begin.elapsed().as_secs_f64() * 1e3;
    // An ended process that nobody waited for has its times still.
    let cpu_s = cpu_s(&format!("/proc/{}/stat", qemu.id()));
    if !here {
        // It may have ended by itself.
        let _ = qemu.kill();
    }
    qemu.wait().map_err(failed)?;
    drop(ends);
    if here {
        Ok(Empty { ms, cpu_s: cpu_s? })
    } else {
        Err(Error::Unexpected("an empty init said nothing".into()))
    }
}

impl Report {
    fn text(&self) -> String {
        let shown = |spread: Option<Spread>, digits| spread.map_or_else(String::new, |s| s.text(digits));
        let mut text = format!(
            "\nBoot: {}, uplink {}\nMedians; in brackets the range.\n\n",
            self.setting.text(),
            self.uplink
        );
        // Writing to a string does not fail.
        let _ = writeln!(text, "ms from QEMU's start");
        let _ = writeln!(text, "  {:20} {}", "an empty init", shown(self.empty_ms, 0));
        for Step { step, ms } in &self.steps {
            let _ = writeln!(text, "  {step:20} {}", shown(*ms, 0));
        }
        let _ = writeln!(text, "\ntunnel up / empty init  {} (at most {RATIO_MAX})", shown(self.ratio, 2));
        let _ = writeln!(
            text,
            "processor time          {} s to the session, {} s to an empty init, {} times as much",
            shown(self.session_cpu_s, 2),
            shown(self.empty_cpu_s, 2),
            shown(self.cpu_ratio, 2)
        );
        let _ = writeln!(text, "ms before QEMU's start  {}", shown(self.before_qemu_ms, 0));
        let Memory { guest_mib, kontord_kib, relay_kib } = self.memory;
        let _ = writeln!(text, "image                   {:.1} MB", self.image.bytes as f64 / 1e6);
        let _ = writeln!(text, "guest's memory          {guest_mib} MiB");
        let resident = (kontord_kib + relay_kib) as f64 * 1024.0 / 1e6;
        let _ = writeln!(text, "kontord and relay       {resident:.1} MB resident");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_found_on_the_command_line() {
        let line = "-kernel /proc/self/fd/3 -initrd /proc/self/fd/4 -netdev dgram,id=uplink,local.type=fd,local.str=9 \
                    -add-fd fd=5,set=1 -blockdev driver=file,filename=/dev/fdset/1 -chardev socket,id=console,fd=6 \
                    -chardev socket,id=qmp,fd=7 -mon chardev=qmp,mode=control";
        let line: Vec<String> = line.split_ascii_whitespace().map(str::to_owned).collect();
        assert_eq!(
            descriptors(&line),
            [
                (3, Kind::Kernel),
                (4, Kind::Initrd),
                (9, Kind::Device),
                (5, Kind::Root),
                (6, Kind::Console),
                (7, Kind::Stream)
            ]
        );
    }

    #[test]
    fn arguments_of_a_process_are_its_words() {
        let own: Vec<String> = std::env::args().skip(1).collect();
        assert_eq!(arguments(std::process::id()).unwrap(), own);
    }
}
