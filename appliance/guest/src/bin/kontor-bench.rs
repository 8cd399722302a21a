//! PID 1 of initrds made for measuring.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Err(error) = kontor_guest::bench::run();
    let _ = writeln!(std::io::stderr(), "kontor-bench: {error}");
    ExitCode::from(2)
}
