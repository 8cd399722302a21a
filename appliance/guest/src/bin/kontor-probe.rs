//! Runs commands in the guest for tests; in test images only.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match kontor_guest::probe::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the console; without one there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "kontor-probe: {}\r", kontor_guest::chain(&error));
            ExitCode::FAILURE
        }
    }
}
