//! `kontor-control`: answers a boot's request for a lease from a directory of files.
//!
//! ```text
//! DIR/control.toml            lease_s, [[gateway]] id, admission, pool_v4, pool_v6; tenant (optional pin)
//! DIR/keysets/00000001.json   the keysets, from the first to the newest
//! DIR/devices/DEVICE.json     the device records
//! DIR/bundles/LINE.json       each line's newest bundle
//! DIR/lease.key               control's key of the lease role, PKCS#8, for the owner only
//! DIR/addresses.json          device → index in the pools          } written here,
//! DIR/answered.json           device → its last boots and lease    } under DIR/lock
//! ```
//!
//! Trusted is who can write in DIR. The request on standard input is not.
#![forbid(unsafe_code)]

mod admission;
mod answer;
mod config;
mod store;

use clap::{Parser, Subcommand};
use std::{error::Error, panic::catch_unwind, path::PathBuf, process::ExitCode};
use tracing_subscriber::EnvFilter;

/// Kontor's office service.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 answered, 1 bug, 2 usage, 3 a stored file does not verify, \
                                 4 a file is missing or cannot be used, 5 standard output was closed."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Read one request from standard input, issue a lease, tell the gateways, and write the answer as one
    /// line of JSON. A refusal is an answer too.
    Answer {
        /// Directory of the office's files.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

/// What the caller learns from the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Bug = 1,
    NotVerified = 3,
    Lacks = 4,
    Unreachable = 5,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    let Verb::Answer { dir } = Arguments::parse().verb;
    // A panic has printed itself by then; only its exit code is ours to choose.
    match catch_unwind(|| answer::run(&dir)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            tracing::error!("{}", chain(&error));
            ExitCode::from(error.exit() as u8)
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
