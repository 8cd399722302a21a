//! Other programs: run in a known environment, with errors that say what to install.

use crate::exit::Exit;
use std::{
    ffi::OsStr,
    io,
    path::Path,
    process::{Command, Output, Stdio},
};

/// A program of the host and the Debian package that brings it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

/// A program that could not be run, or ended badly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("this host has no {program} (install the Debian package {package})")]
    Missing { program: String, package: &'static str },
    #[error("run {program}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program} failed ({status}):\n{last_words}")]
    Failed { program: String, status: std::process::ExitStatus, last_words: String },
}

impl CommandError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Missing { .. } => Exit::HostLacks,
            Self::Run { .. } => Exit::Bug,
            Self::Failed { last_words, .. } if last_words.contains("No space left on device") => {
                Exit::HostLacks
            }
            Self::Failed { .. } => Exit::Bug,
        }
    }

    /// What the program said before it failed; empty for other errors.
    pub(crate) fn last_words(&self) -> &str {
        match self {
            Self::Failed { last_words, .. } => last_words,
            Self::Missing { .. } | Self::Run { .. } => "",
        }
    }
}

/// One run of a [`Program`]. The environment begins empty but for what every program needs, so that
/// neither a locale nor a variable of the caller reaches the image.
pub(crate) struct Run {
    program: String,
    package: &'static str,
    command: Command,
}

impl Run {
    pub(crate) fn new(program: Program) -> Self {
        Self::of_path(Path::new(program.name), program.package)
    }

    /// A program by path, such as one of the tool tree.
    pub(crate) fn of_path(path: &Path, package: &'static str) -> Self {
        let mut command = Command::new(path);
        let search = std::env::var("PATH").unwrap_or_default();
        command.env_clear().env("PATH", format!("{search}:{SYSTEM_PATH}"));
        command.env("LC_ALL", "C.UTF-8").env("TZ", "UTC").stdin(Stdio::null());
        for name in KEPT {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        Self { program: path.display().to_string(), package, command }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn directory(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Sends standard output to a file instead of returning it.
    pub(crate) fn output_to(mut self, file: std::fs::File) -> Self {
        self.command.stdout(file);
        self
    }

    /// Starts the program; the caller waits with [`Running::wait`].
    pub(crate) fn start(mut self) -> Result<Running, CommandError> {
        self.command.stdout(Stdio::null()).stderr(Stdio::piped());
        match self.command.spawn() {
            Ok(child) => Ok(Running { program: self.program, child }),
            Err(source) => Err(cannot_run(self.program, self.package, source)),
        }
    }

    /// Runs to the end; standard output, unless it was sent elsewhere.
    pub(crate) fn bytes(mut self) -> Result<Vec<u8>, CommandError> {
        match self.command.output() {
            Ok(output) => judge(self.program, output),
            Err(source) => Err(cannot_run(self.program, self.package, source)),
        }
    }

    /// Runs to the end; standard output as text.
    pub(crate) fn text(self) -> Result<String, CommandError> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    /// Runs to the end; the first line of standard output.
    pub(crate) fn first_line(self) -> Result<String, CommandError> {
        Ok(self.text()?.lines().next().unwrap_or_default().trim().to_owned())
    }
}

/// A program that runs while the caller watches something else.
pub(crate) struct Running {
    program: String,
    child: std::process::Child,
}

impl Running {
    /// Waits, and calls `watch` every now and then meanwhile.
    pub(crate) fn wait(mut self, watch: impl Fn()) -> Result<(), CommandError> {
        let program = self.program.clone();
        let mut stderr = self.child.stderr.take().expect("start() asked for a pipe");
        std::thread::scope(|scope| {
            // The pipe is drained by a thread, or a talkative program would wait for us.
            let words = scope.spawn(move || {
                let mut words = Vec::new();
                io::copy(&mut stderr, &mut words).map(|_| words)
            });
            while !words.is_finished() {
                watch();
                std::thread::sleep(WATCH);
            }
            let words = words.join().expect("copying a pipe does not panic");
            let ended = words.and_then(|stderr| {
                let status = self.child.wait()?;
                Ok(Output { status, stdout: Vec::new(), stderr })
            });
            match ended {
                Ok(output) => judge(program, output).map(drop),
                Err(source) => Err(CommandError::Run { program, source }),
            }
        })
    }
}

fn cannot_run(program: String, package: &'static str, source: io::Error) -> CommandError {
    if source.kind() == io::ErrorKind::NotFound {
        CommandError::Missing { program, package }
    } else {
        CommandError::Run { program, source }
    }
}

fn judge(program: String, output: Output) -> Result<Vec<u8>, CommandError> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = words.lines().collect();
    let last_words = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    Err(CommandError::Failed { program, status: output.status, last_words })
}

/// Where Debian keeps programs that an ordinary user's `PATH` leaves out.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables that say where things are, not how they look.
const KEPT: [&str; 9] = [
    "HOME",
    "TMPDIR",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
];
/// Lines of a failed program's stderr that are shown.
const LAST_LINES: usize = 40;
/// How often a watched program is looked at.
const WATCH: std::time::Duration = std::time::Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Program = Program { name: "sh", package: "dash" };

    #[test]
    fn missing_program_names_the_package() {
        let error =
            Run::new(Program { name: "kontor-no-such", package: "some-package" }).bytes().unwrap_err();
        assert_eq!(error.exit(), Exit::HostLacks);
        assert!(error.to_string().contains("some-package"), "{error}");
    }

    #[test]
    fn failure_shows_the_last_lines_only() {
        let script = format!("for i in $(seq {}); do echo line $i >&2; done; exit 3", LAST_LINES + 1);
        let error = Run::new(SH).args(["-c", &script]).bytes().unwrap_err();
        assert!(!error.last_words().contains("line 1\n"), "{error}");
        assert!(error.last_words().starts_with("line 2\n"), "{error}");
    }

    #[test]
    fn callers_variables_stay_outside() {
        // `cargo test` sets this one.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let text =
            Run::new(SH).args(["-c", "echo \"$CARGO_MANIFEST_DIR|$LC_ALL|$TZ\""]).first_line().unwrap();
        assert_eq!(text, "|C.UTF-8|UTC");
    }

    #[test]
    fn watched_program_is_waited_for_and_judged() {
        let start = |script| Run::new(SH).args(["-c", script]).start().unwrap();
        start("exit 0").wait(|| ()).unwrap();
        let error = start("echo No space left on device >&2; exit 1").wait(|| ()).unwrap_err();
        assert_eq!(error.exit(), Exit::HostLacks);
    }
}
