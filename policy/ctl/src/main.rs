//! `kontorctl`: IT's command line. Makes and reads keysets, device records and bundles.
//!
//! ```text
//! DIR/id                      the tenant, 64 hexadecimal digits          }
//! DIR/keysets/00000001.json   the keysets, from the first to the newest  } what --keys names
//! DIR/root-1.key …            PKCS#8, for the owner only                 }
//! DIR/lease.key control.key   to be moved to control                     }
//! ```
//!
//! Trusted is who can write in DIR; `--tenant` pins what it must be about. Whatever is signed here is
//! checked as its readers will check it before it is written.
#![forbid(unsafe_code)]

mod bundle;
mod device;
mod files;
mod keydir;
mod keyset;

use clap::{Parser, Subcommand};
use kontor_manual::Section;
use std::{
    error::Error,
    fmt::Display,
    io::{self, Write},
    panic::catch_unwind,
    process::ExitCode,
};

/// Keysets, device records and bundles of a tenant.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 bug, 2 usage, 3 something does not verify, \
                                 4 a file is missing or cannot be used, 5 standard output was closed."
)]
struct Arguments {
    #[command(subcommand)]
    noun: Noun,
}

#[derive(Subcommand)]
enum Noun {
    /// Who may sign what.
    #[command(subcommand)]
    Keyset(keyset::Verb),
    /// The records of enrolled work VMs.
    #[command(subcommand)]
    Device(device::Verb),
    /// Policy.
    #[command(subcommand)]
    Bundle(bundle::Verb),
}

/// What the caller learns from the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Bug = 1,
    Usage = 2,
    NotVerified = 3,
    Lacks = 4,
    Unreachable = 5,
}

/// Why nothing was done, and the exit code that says so.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    File(#[from] files::FileError),
    #[error(transparent)]
    Key(#[from] keydir::KeyDirError),
    #[error(transparent)]
    Keyset(#[from] keyset::InitError),
    #[error(transparent)]
    Device(#[from] device::RecordError),
    #[error(transparent)]
    Bundle(#[from] bundle::SignError),
    #[error("write to standard output")]
    Output(#[source] io::Error),
}

impl Failure {
    fn exit(&self) -> Exit {
        match self {
            Self::File(_) => Exit::Lacks,
            Self::Key(error) => error.exit(),
            Self::Keyset(error) => error.exit(),
            Self::Device(error) => error.exit(),
            Self::Bundle(error) => error.exit(),
            Self::Output(_) => Exit::Unreachable,
        }
    }
}

fn main() -> ExitCode {
    let Arguments { noun } = kontor_manual::parse(env!("CARGO_BIN_NAME"), Section::Commands);
    let run = || match noun {
        Noun::Keyset(verb) => verb.run(),
        Noun::Device(verb) => verb.run(),
        Noun::Bundle(verb) => verb.run(),
    };
    // A panic has printed itself by then; only its exit code is ours to choose.
    match catch_unwind(run) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            // When standard error is closed there is nobody left to tell.
            let _ = writeln!(io::stderr(), "kontorctl: {}", chain(&failure));
            ExitCode::from(failure.exit() as u8)
        }
        Err(_) => ExitCode::from(Exit::Bug as u8),
    }
}

/// The error and all its causes, as one line.
fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

/// Writes a line to standard output.
fn say(line: impl Display) -> Result<(), Failure> {
    writeln!(io::stdout().lock(), "{line}").map_err(Failure::Output)
}
