//! Whether a demo leaves anything behind, however it ends: a process, a mount, a file. Namespaces last as long
//! as a process or a mount keeps them.

use crate::run::{Error, Result, at, os, text};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group, set_child_subreaper, wait,
};
use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
    time::{Duration, Instant},
};

/// How a demo ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// When it is done, and good.
    Itself,
    /// In the middle, by a person's Ctrl-C.
    Interrupted,
    /// In the middle, without a chance to do anything.
    Killed,
}

/// How long killed processes may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What the demo says when the work VM is about to run.
const MIDDLE: &str = "starting the work VM";

/// Runs a demo that ends so, and looks for what it left.
pub(crate) fn demo(own: &Path, end: End) -> Result<()> {
    // What loses its parent becomes this process's child: nothing can hide.
    set_child_subreaper(Some(getpid())).map_err(os("adopt what a demo leaves"))?;
    let before = mounts()?;
    let scratch = tempfile::tempdir().map_err(at("make a directory in", &std::env::temp_dir()))?;
    let mut command = Command::new(own);
    command.arg("demo").env("TMPDIR", scratch.path()).stdin(Stdio::null()).process_group(0);
    let words = text(&command);
    let failed = |source| Error::Start(words.clone(), source);
    match end {
        End::Itself => {
            let status = command.status().map_err(failed)?;
            if !status.success() {
                return Err(Error::Failed { command: words, status, output: String::new() });
            }
        }
        End::Interrupted | End::Killed => {
            let mut child = command.stderr(Stdio::piped()).spawn().map_err(failed)?;
            // Kept: who writes to a closed pipe would end by that.
            let _stderr = until_the_middle(&mut child)?;
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| Error::Unexpected("a process without an id".into()))?;
            match end {
                // A terminal tells all of the foreground.
                End::Interrupted => kill_process_group(pid, Signal::INT),
                End::Killed | End::Itself => kill_process(pid, Signal::KILL),
            }
            .map_err(os("end the demo"))?;
            child.wait().map_err(failed)?;
        }
    }
    none_left()?;
    let left = fs::read_dir(scratch.path()).map_err(at("list", scratch.path()))?.count();
    if left > 0 || mounts()? != before {
        return Err(Error::Unexpected(format!("a demo ({end:?}) left {left} files, or a mount")));
    }
    Ok(())
}

/// Reads what the demo says until its work VM is about to run.
fn until_the_middle(child: &mut Child) -> Result<BufReader<ChildStderr>> {
    let stderr = child.stderr.take().ok_or_else(|| Error::Unexpected("no standard error".into()))?;
    let (mut stderr, mut line) = (BufReader::new(stderr), String::new());
    let failed = |source| Error::Start("read what the demo says".into(), source);
    while stderr.read_line(&mut line).map_err(failed)? > 0 {
        if line.contains(MIDDLE) {
            return Ok(stderr);
        }
        line.clear();
    }
    Err(Error::Unexpected("the demo ended before its work VM ran".into()))
}

/// Waits until no child of this process is left.
fn none_left() -> Result<()> {
    let limit = Instant::now() + GONE_WITHIN;
    loop {
        match wait(WaitOptions::NOHANG) {
            Err(rustix::io::Errno::CHILD) => return Ok(()),
            Ok(Some(_)) => {}
            Ok(None) if Instant::now() < limit => std::thread::sleep(LOOK_EVERY),
            Ok(None) => return Err(Error::Unexpected(format!("processes are left: {}", children()))),
            Err(errno) => return Err(os("wait for what is left")(errno)),
        }
    }
}

/// Names of this process's children.
fn children() -> String {
    let own = getpid().as_raw_nonzero();
    let listed = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
    let name =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    listed.split_ascii_whitespace().map(name).collect::<Vec<_>>().join(", ")
}

/// Mounts of ours, or of network namespaces.
fn mounts() -> Result<Vec<String>> {
    let file = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(file).map_err(at("read", file))?;
    let ours = mounts.lines().filter(|line| line.contains("kontor") || line.contains("netns"));
    Ok(ours.map(str::to_owned).collect())
}
