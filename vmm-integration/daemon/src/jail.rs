//! Starting a program in a jail, by `kontor-jail` (see its own text), and the line by which it hangs.

use crate::{control_group::Group, sys};
use command_fds::{CommandFdExt, FdMapping};
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    process::{Child, ChildStderr},
    time::{Instant, timeout, timeout_at},
};

/// How long it may take to make a jail.
const ENTERED: Duration = Duration::from_secs(20);
/// How long a jailer may take to say its last words and end, once it was told to.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Most bytes of what the jailer reports: a process id and a line's end.
const REPORT_MAX: usize = 16;
/// What the jailer ends with where there is no jail.
pub(crate) const NO_JAIL: i32 = 125;

/// Which jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Qemu,
    QemuKvm,
    Relay,
}

/// What is jailed.
#[derive(Debug)]
pub(crate) struct Inmate {
    pub(crate) profile: Profile,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    /// Its descriptors beside 0 to 2, and their numbers.
    pub(crate) descriptors: Vec<(OwnedFd, RawFd)>,
    pub(crate) limits: Limits,
    /// A control group to be in.
    pub(crate) group: Option<Group>,
}

/// What it may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Descriptors.
    pub(crate) files: u64,
    /// Threads, the jailer's one among them.
    pub(crate) threads: u64,
    /// Address space in bytes; `None` where a control group limits the memory.
    pub(crate) address_space: Option<u64>,
}

/// How the work VM's QEMU is held, for the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailNote {
    /// What limits its memory: `cgroup` (a control group) or `address-space` (RLIMIT_AS).
    pub limit: String,
    /// How much memory that is, in MiB.
    pub memory_mib: u64,
    /// How many processors it may keep busy; `None` where nothing limits that.
    pub cpus: Option<usize>,
    /// How many threads it and its jailer may have; `None` where nothing limits that.
    pub threads: Option<u64>,
}

/// A jailed program and its jailer.
#[derive(Debug)]
pub(crate) struct Jailed {
    jailer: Child,
    /// When this closes, the jailer ends the program.
    line: Option<UnixStream>,
    /// When a jailer that was told to end, and has not, is killed. It may hang before it ever looks at the line.
    killed_at: Option<Instant>,
    /// Where both are.
    group: Option<Group>,
}

/// A first descriptor behind those that are handed over.
fn report_number(inmate: &Inmate) -> RawFd {
    inmate.descriptors.iter().map(|(_, number)| *number).max().unwrap_or(2) + 1
}

impl Jailed {
    /// Starts `jailer` with `inmate`. Both die with this process, and when the returned value is dropped.
    pub(crate) fn start(jailer: &Path, inmate: Inmate) -> io::Result<Self> {
        let (line, report) = StdUnixStream::pair()?;
        line.set_nonblocking(true)?;
        let report_at = report_number(&inmate);
        let profile = match inmate.profile {
            Profile::Qemu => "qemu",
            Profile::QemuKvm => "qemu-kvm",
            Profile::Relay => "relay",
        };
        let mut command = Command::new(jailer);
        command.args([profile, "--report", &report_at.to_string()]);
        for (_, number) in &inmate.descriptors {
            command.args(["--keep", &number.to_string()]);
        }
        if let Some(bytes) = inmate.limits.address_space {
            command.args(["--memory", &bytes.to_string()]);
        }
        command
            .args(["--files", &inmate.limits.files.to_string()])
            .args(["--threads", &inmate.limits.threads.to_string(), "--"])
            .arg(find(&inmate.program)?)
            .args(inmate.arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let descriptors = inmate.descriptors.into_iter().chain([(report.into(), report_at)]);
        let mapping = |(parent_fd, child_fd)| FdMapping { parent_fd, child_fd };
        command.fd_mappings(descriptors.map(mapping).collect()).map_err(io::Error::other)?;
        let door = inmate.group.as_ref().map(Group::door).transpose()?;
        sys::confine(&mut command, report_at + 1, door);
        let jailer = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
        let line = Some(UnixStream::from_std(line)?);
        Ok(Self { jailer, line, killed_at: None, group: inmate.group })
    }

    /// Waits until the program runs; its process id, or `None` when there is none: then the jailer ends
    /// and says why.
    pub(crate) async fn entered(&mut self) -> Option<u32> {
        let line = self.line.as_mut()?;
        let report = async {
            let mut report = Vec::new();
            while report.last() != Some(&b'\n') && report.len() < REPORT_MAX {
                report.push(line.read_u8().await.ok()?);
            }
            std::str::from_utf8(&report).ok()?.trim_end().parse().ok()
        };
        timeout(ENTERED, report).await.ok().flatten()
    }

    /// What program and jailer write on standard error.
    pub(crate) fn take_words(&mut self) -> Option<ChildStderr> {
        self.jailer.stderr.take()
    }

    /// Has the program ended at once; [`wait`](Self::wait) then tells of its end. A jailer that is about to say
    /// why there is no program has [`LAST_WORDS`] for it.
    pub(crate) fn kill(&mut self) {
        self.line = None;
        self.killed_at.get_or_insert_with(|| Instant::now() + LAST_WORDS);
    }

    /// Waits for the end; the jailer ends as the program did.
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(killed_at) = self.killed_at
            && timeout_at(killed_at, self.jailer.wait()).await.is_err()
        {
            tracing::warn!("a jailer does not end and is killed");
            // What it started dies with it.
            self.jailer.start_kill()?;
        }
        let status = self.jailer.wait().await;
        // What the jailer could not take with it ends here.
        self.group = None;
        status
    }
}

#[cfg(test)]
impl Jailed {
    /// A program in the jailer's place.
    pub(crate) fn unjailed(words: &[&str]) -> Self {
        let mut command = tokio::process::Command::new(words[0]);
        let jailer = command.args(&words[1..]).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        Self { jailer, line: None, killed_at: None, group: None }
    }
}

/// Whether a jail can be made here.
///
/// # Errors
/// The jailer's words, or why there is none.
pub(crate) async fn check(jailer: &Path) -> Result<(), String> {
    let mut command = tokio::process::Command::new(jailer);
    command.arg("check").env_clear().stdin(Stdio::null()).kill_on_drop(true);
    match timeout(ENTERED, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(crate::tail::clean(&output.stderr).trim().to_owned()),
        Ok(Err(error)) => Err(format!("{} does not run: {error}; install Kontor again", jailer.display())),
        Err(_) => Err(format!("{} does not answer", jailer.display())),
    }
}

/// The file that a name or path stands for: in the jail nothing is looked up.
fn find(program: &Path) -> io::Result<PathBuf> {
    if program.components().count() > 1 {
        let path = std::path::absolute(program)?;
        return if path.is_file() { Ok(path) } else { Err(io::ErrorKind::NotFound.into()) };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}
