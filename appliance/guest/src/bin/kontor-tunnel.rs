//! Between the TUN interface and the uplink.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Standard error is the console; without one there is nobody to tell.
    match kontor_guest::tunnel::run() {
        Ok(summary) => {
            let _ = writeln!(std::io::stderr(), "kontor-tunnel: {summary}\r");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "kontor-tunnel: {}\r", kontor_guest::chain(&error));
            ExitCode::FAILURE
        }
    }
}
