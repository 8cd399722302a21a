//! Between the TUN interface and the uplink.

use kontor_guest::tunnel::Backend;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Standard error is the console; without one there is nobody to tell.
    let Some(backend) = Backend::from_arguments(std::env::args().skip(1)) else {
        let _ = writeln!(std::io::stderr(), "kontor-tunnel [vfio]\r");
        return ExitCode::FAILURE;
    };
    match kontor_guest::tunnel::run(backend) {
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
