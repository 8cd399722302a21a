//! Running programs, and what can go wrong with that.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{what}: {path}")]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("start {0}")]
    Start(String, #[source] io::Error),
    #[error("{0}")]
    Kernel(&'static str, #[source] io::Error),
    #[error("{command} ended with {status}{output}")]
    Failed { command: String, status: ExitStatus, output: String },
    #[error("{command} did not end within {} s", limit.as_secs())]
    Late { command: String, limit: Duration },
    #[error("this machine lacks the Debian packages: {0}; install them with: apt-get install {0}")]
    Packages(String),
    #[error("{0}")]
    Lacks(String),
    #[error("{0}")]
    Unexpected(String),
    #[error("talk to the work VM's probe")]
    Probe(#[source] io::Error),
    #[error("{what} is not the JSON that was expected")]
    Json {
        what: String,
        #[source]
        source: serde_json::Error,
    },
}

impl Error {
    pub(crate) fn exit_code(&self) -> u8 {
        if matches!(self, Self::Packages(_) | Self::Lacks(_)) { 4 } else { 1 }
    }
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

/// The error and all its causes, on one line.
pub(crate) fn chain(error: &Error) -> String {
    let mut text = format!("error: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// For `map_err` on file operations.
pub(crate) fn at<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { what, path: path.to_owned(), source }
}

/// For `map_err` on what rustix asks the kernel for.
pub(crate) fn os(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
    move |errno| Error::Kernel(what, errno.into())
}

/// The command as a person would type it.
pub(crate) fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs `command` to its end; its output is shown only when it fails.
pub(crate) fn quietly(command: &mut Command) -> Result<Vec<u8>> {
    let output =
        command.stdin(Stdio::null()).output().map_err(|source| Error::Start(text(command), source))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let tail = [output.stdout.as_slice(), b"\n", output.stderr.as_slice()].concat();
    let tail = format!("\n{}", String::from_utf8_lossy(&tail).trim());
    Err(Error::Failed { command: text(command), status: output.status, output: tail })
}

/// Runs `command` to its end with its output going where ours goes.
pub(crate) fn openly(command: &mut Command) -> Result<()> {
    let status =
        command.stdin(Stdio::null()).status().map_err(|source| Error::Start(text(command), source))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed { command: text(command), status, output: String::new() })
}

/// Runs `command` to its end, whatever that is. One that takes longer than `limit` is killed, and an error.
pub(crate) fn within(limit: Duration, command: &mut Command) -> Result<Output> {
    let words = text(command);
    let failed = |source| Error::Start(words.clone(), source);
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = piped.spawn().map_err(failed)?;
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
    let reader = std::thread::spawn(move || child.wait_with_output());
    let end = Instant::now() + limit;
    let in_time = loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|e| failed(io::Error::other(e)))?;
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => break false,
            Ok(_) => break true,
            Err(error) => return Err(failed(error.into())),
        }
    };
    if !in_time {
        // Gone already, or gone now.
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
    let output = reader.join().map_err(|_| Error::Unexpected("the reader of a program panicked".into()))?;
    if in_time { output.map_err(failed) } else { Err(Error::Late { command: words, limit }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_ends_in_time_is_told_with_all_that_it_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "head -c 200000 /dev/zero; echo no >&2; exit 3"]);
        let output = within(Duration::from_secs(60), &mut command).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 200_000));
        assert_eq!(output.stderr, b"no\n");
    }

    #[test]
    fn program_that_does_not_end_is_killed() {
        let begin = Instant::now();
        let late = within(Duration::from_millis(50), Command::new("sleep").arg("600"));
        assert!(matches!(&late, Err(Error::Late { command, .. }) if command == "sleep 600"), "{late:?}");
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}
