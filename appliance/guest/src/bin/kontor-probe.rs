//! Runs commands in the guest for tests; in test images only.
//!
//! `kontor-probe` serves its port. `kontor-probe uplink HOW MARKER GATEWAY` tries what root can do
//! with the uplink, and prints what came of it.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = if arguments.is_empty() {
        kontor_guest::probe::run().map_err(|error| kontor_guest::chain(&error))
    } else {
        kontor_guest::attempt::run(&arguments).map_err(|error| kontor_guest::chain(&error)).map(|said| {
            // Whoever asked reads it, or is gone.
            let _ = writeln!(std::io::stdout(), "{said}");
        })
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(words) => {
            // Standard error is the console; without one there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "kontor-probe: {words}\r");
            ExitCode::FAILURE
        }
    }
}
