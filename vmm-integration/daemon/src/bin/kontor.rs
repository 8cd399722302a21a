//! `kontor`: the employee's command line. It asks kontord and shows what it says.

use clap::{Parser, Subcommand};
use kontor_daemon::{
    exit::{Exit, chain},
    status::{State, Status},
    verbs::{Answer, Done, MAX_ANSWER, Request},
};
use kontor_manual::Section;
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Where kontord serves when nothing else is said.
const SOCKET: &str = "/run/kontor/kontord.sock";

/// Your work VM
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something did not verify, \
    4 this PC lacks something, 5 somebody could not be reached."
)]
struct Cli {
    /// kontord's socket; KONTOR_SOCKET says the same
    #[arg(long, global = true)]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Command {
    /// Start the work VM
    Start {
        /// Without a window
        #[arg(long)]
        headless: bool,
    },
    /// Power the work VM off
    Stop,
    /// Show where the work VM stands
    Status {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Show what the work VM's console said
    Logs,
    /// Show what is missing on this PC
    Doctor,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("kontord does not serve on {path}; is it running?")]
    Connect { path: PathBuf, source: io::Error },
    #[error("speak with kontord")]
    Talk(#[source] io::Error),
    #[error("kontord's answer is not understood; are both of the same version?")]
    Answer(#[source] serde_json::Error),
    #[error("kontord ended in the middle of its answer")]
    Cut,
    #[error("write to standard output")]
    Stdout(#[source] io::Error),
}

impl Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Connect { .. } => Exit::Unreachable,
            Self::Talk(_) | Self::Answer(_) | Self::Cut | Self::Stdout(_) => Exit::Failed,
        }
    }
}

fn main() -> ExitCode {
    let Cli { socket, command } = kontor_manual::parse(env!("CARGO_BIN_NAME"), Section::Commands);
    let socket = socket.or_else(|| std::env::var_os("KONTOR_SOCKET").map(PathBuf::from));
    match run(command, &socket.unwrap_or_else(|| SOCKET.into())) {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("kontor: {}", chain(&error));
            error.exit().into()
        }
    }
}

fn run(command: Command, socket: &Path) -> Result<Exit, Error> {
    let (request, json) = match command {
        Command::Start { headless } => (Request::Start { headless }, false),
        Command::Stop => (Request::Stop {}, false),
        Command::Status { json } => (Request::Status {}, json),
        Command::Logs => (Request::Logs {}, false),
        Command::Doctor => (Request::Doctor {}, false),
    };
    let mut stream =
        UnixStream::connect(socket).map_err(|source| Error::Connect { path: socket.into(), source })?;
    let mut line = serde_json::to_vec(&request).map_err(Error::Answer)?;
    line.push(b'\n');
    match stream.write_all(&line) {
        // kontord may have answered without reading; what it says is worth more than this.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(Error::Talk(error)),
        Ok(()) | Err(_) => {}
    }
    let mut answers = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let limit = u64::try_from(MAX_ANSWER).unwrap_or(u64::MAX);
        (&mut answers).take(limit).read_until(b'\n', &mut line).map_err(Error::Talk)?;
        if line.last() != Some(&b'\n') {
            return Err(Error::Cut);
        }
        let answer = serde_json::from_slice(&line).map_err(Error::Answer)?;
        if let Some(done) = show(answer, json).map_err(Error::Stdout)? {
            return Ok(done.exit);
        }
    }
}

/// Shows one line of the answer. Returns the last one.
fn show(answer: Answer, json: bool) -> io::Result<Option<Done>> {
    let mut out = io::stdout().lock();
    match answer {
        Answer::State(reached) => writeln!(out, "{} {}", seconds(reached.at_ms), reached.state)?,
        Answer::Note(words) => writeln!(out, "{words}")?,
        Answer::Status(status) if json => {
            serde_json::to_writer(&mut out, &status)?;
            writeln!(out)?;
        }
        Answer::Status(status) => show_status(&mut out, &status)?,
        Answer::Log(text) => out.write_all(text.as_bytes())?,
        Answer::Check(check) => {
            let mark = if check.ok { "ok     " } else { "missing" };
            writeln!(out, "{mark}  {}: {}", check.name, check.words)?;
        }
        Answer::Done(done) => {
            if done.exit != Exit::Ok && !done.words.is_empty() {
                eprintln!("kontor: {}", done.words);
            } else if !done.words.is_empty() {
                writeln!(out, "{}", done.words)?;
            }
            return out.flush().map(|()| Some(done));
        }
    }
    out.flush()?;
    Ok(None)
}

fn seconds(ms: u64) -> String {
    format!("{:>4}.{} s ", ms / 1000, ms / 100 % 10)
}

fn show_status(out: &mut impl Write, status: &Status) -> io::Result<()> {
    let state = match status.state {
        State::Off | State::Stopped => "off",
        State::NotStarted => "off; it could not be started",
        State::Starting => "starting",
        State::Booting => "booting",
        State::Running => "running",
        State::Stopping => "on its way out",
    };
    writeln!(out, "The work VM is {state}.")?;
    for reached in &status.states {
        writeln!(out, "  {} {}", seconds(reached.at_ms), reached.state)?;
    }
    if let Some(at_ms) = status.ready_at_ms {
        writeln!(out, "  {} ready", seconds(at_ms))?;
    }
    if let Some(release) = &status.release {
        let test = if release.test { ", a test image" } else { "" };
        writeln!(out, "Release: {} (version {}{test})", release.name, release.version)?;
    }
    if let Some(lease) = &status.lease {
        writeln!(out, "Policy: revision {}", lease.revision)?;
    }
    if let Some(relay) = &status.relay {
        let (up, down) = (relay.up.bytes / 1024, relay.down.bytes / 1024);
        writeln!(out, "Through the tunnel: {up} KiB sent, {down} KiB received")?;
    }
    if let (Some(jail), Some(uplink)) = (&status.jail, status.uplink) {
        let memory = jail.memory_mib;
        let processors = match jail.cpus {
            Some(cpus) => format!("at most {cpus} processors"),
            None => "no limit on the processor".to_owned(),
        };
        let threads = match jail.threads {
            Some(threads) => format!("at most {threads} threads"),
            None => "no limit on threads (Linux has one from 5.14 on)".to_owned(),
        };
        let (limit, uplink) = (&jail.limit, uplink.name());
        writeln!(
            out,
            "Jailed: at most {memory} MiB of memory ({limit}), {processors}, {threads}. Uplink: {uplink}"
        )?;
    }
    if status.emulated {
        writeln!(out, "EMULATED: slow, and no security boundary.")?;
    }
    if status.user_mode {
        writeln!(out, "USER MODE: the keys are no safer than your other files.")?;
    }
    if let Some(words) = &status.office {
        writeln!(out, "The office said: {words}")?;
    }
    if let Some(stop) = &status.stop {
        let inferred = if stop.inferred { " (concluded by Kontor)" } else { "" };
        writeln!(out, "{}{inferred}", stop.words)?;
        if !stop.detail.is_empty() {
            writeln!(out, "Detail: {}", stop.detail)?;
        }
    }
    if let Some(failure) = &status.not_started {
        writeln!(out, "{}", failure.words)?;
    }
    Ok(())
}
