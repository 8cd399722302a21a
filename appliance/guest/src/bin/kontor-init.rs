//! The guest's PID 1.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Err(error) = kontor_guest::init::run();
    // Whoever started this outside a guest reads it, or does not.
    let _ = writeln!(std::io::stderr(), "kontor-init: {error}");
    ExitCode::from(2)
}
