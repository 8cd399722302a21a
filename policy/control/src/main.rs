//! `kontor-control`: answers boots' requests for leases over HTTPS, from a directory of files.
//!
//! ```text
//! DIR/control.toml            listen, lease_s, [[gateway]] id, admission, pool_v4, pool_v6; tenant (optional pin)
//! DIR/keysets/00000001.json   the keysets, from the first to the newest
//! DIR/devices/DEVICE.json     the device records
//! DIR/bundles/LINE.json       each line's newest bundle
//! DIR/lease.key               control's key of the lease role   } PKCS#8,
//! DIR/control.key             the key that hosts know it by     } for the owner only
//! DIR/addresses.json          device → index in the pools          } written here,
//! DIR/answered.json           device → its last boots and lease    } under DIR/lock
//! ```
//!
//! Trusted is who can write in DIR. Records and bundles may be added and replaced there while control
//! runs; each answer reads what it needs. Not trusted is everybody who connects: what is known of them is
//! the key that they proved.
#![forbid(unsafe_code)]

mod admission;
mod answer;
mod config;
mod hall;
mod serve;
mod store;

use clap::{Parser, Subcommand};
use kontor_manual::Section;
use std::{error::Error, panic::catch_unwind, path::PathBuf, process::ExitCode};
use tracing_subscriber::EnvFilter;

/// Kontor's office service.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 ended by a signal, 1 bug, 2 usage, 3 a stored file does not verify, \
                                 4 a file or an address is missing or cannot be used."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Answer requests until a signal ends it: check them, issue leases, tell the gateways. Says on standard
    /// error when it is ready.
    Serve {
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
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    let arguments: Arguments = kontor_manual::parse(env!("CARGO_BIN_NAME"), Section::Services);
    let Verb::Serve { dir } = arguments.verb;
    // A panic has printed itself by then; only its exit code is ours to choose.
    match catch_unwind(|| serve::run(&dir)) {
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
