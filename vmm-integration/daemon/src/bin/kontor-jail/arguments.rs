//! The command line.

use kontor_jail::JailError;
use rustix::fd::RawFd;
use std::{ffi::OsString, io, path::PathBuf};

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Start(Start),
    Check,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) task: Task,
}

/// Which program is jailed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// QEMU, emulating.
    Qemu,
    /// QEMU with KVM.
    QemuKvm,
    /// The relay, which closes the last doors itself.
    Relay,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) profile: Profile,
    /// kontord's end is at the other side of this.
    pub(crate) report: RawFd,
    /// Descriptors that the program keeps besides 0, 1 and 2.
    pub(crate) keep: Vec<RawFd>,
    /// Most bytes of address space; `None` where a control group holds the limit.
    pub(crate) memory: Option<u64>,
    /// Most descriptors.
    pub(crate) files: u64,
    /// Most threads, this program's own among them.
    pub(crate) threads: u64,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
}

impl Arguments {
    pub(crate) fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Self, JailError> {
        let wrong = |what: String| JailError {
            doing: "read the command line".into(),
            source: io::Error::new(io::ErrorKind::InvalidInput, what),
        };
        let profile = match words.next().as_deref().and_then(|word| word.to_str()) {
            Some("check") => return Ok(Self { task: Task::Check }),
            Some("qemu") => Profile::Qemu,
            Some("qemu-kvm") => Profile::QemuKvm,
            Some("relay") => Profile::Relay,
            other => return Err(wrong(format!("{other:?} is no profile"))),
        };
        let (mut report, mut keep, mut memory, mut files, mut threads) = (None, Vec::new(), None, None, None);
        loop {
            let name = words.next().ok_or_else(|| wrong("it has no program".into()))?;
            if name == "--" {
                break;
            }
            let value = words.next().and_then(|word| word.to_str()?.parse::<u64>().ok());
            let value = value.ok_or_else(|| wrong(format!("{} takes a number", name.display())))?;
            let descriptor = || {
                RawFd::try_from(value).ok().filter(|fd| *fd > 2).ok_or_else(|| wrong("no descriptor".into()))
            };
            match name.to_str() {
                Some("--report") => report = Some(descriptor()?),
                Some("--keep") => keep.push(descriptor()?),
                Some("--memory") => memory = Some(value),
                Some("--files") => files = Some(value),
                Some("--threads") => threads = Some(value),
                _ => return Err(wrong(format!("{} is no option", name.display()))),
            }
        }
        let report = report.ok_or_else(|| wrong("--report is missing".into()))?;
        let files = files.ok_or_else(|| wrong("--files is missing".into()))?;
        let threads = threads.ok_or_else(|| wrong("--threads is missing".into()))?;
        let program = words.next().ok_or_else(|| wrong("it has no program".into()))?.into();
        let arguments = words.collect();
        let start = Start { profile, report, keep, memory, files, threads, program, arguments };
        Ok(Self { task: Task::Start(start) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, JailError> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn command_line_of_kontord_is_read() {
        let start = Start {
            profile: Profile::Qemu,
            report: 11,
            keep: vec![3, 4],
            memory: Some(1000),
            files: 512,
            threads: 128,
            program: "/usr/bin/q".into(),
            arguments: vec!["-a".into(), "--".into()],
        };
        let line =
            "qemu --report 11 --keep 3 --keep 4 --memory 1000 --files 512 --threads 128 -- /usr/bin/q -a --";
        assert_eq!(parse(line).unwrap(), Arguments { task: Task::Start(start) });
        assert_eq!(parse("check").unwrap(), Arguments { task: Task::Check });
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for line in [
            "",
            "firefox --report 3 --files 1 --threads 1 -- /x",
            "qemu --report 3 --threads 1 -- /x",
            "qemu --files 3 --threads 1 -- /x",
            "qemu --report 3 --files 3 -- /x",
            "qemu --report 2 --files 3 --threads 1 -- /x",
            "qemu --report 3 --files 3 --threads 1 --",
            "qemu --report 3 --files 3 --threads 1 /x",
            "qemu --report 3 --files x --threads 1 -- /x",
            "qemu --root /",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
