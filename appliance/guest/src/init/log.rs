//! One line per step on the console, which the host records. Never a secret, never a packet.

use crate::clock::Moment;
use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static CONSOLE: OnceLock<File> = OnceLock::new();

/// Opens the console; without one, lines are lost and nothing else happens.
pub(crate) fn open() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/console") {
        // Whoever came first opened the same console.
        let _ = CONSOLE.set(file);
    }
}

/// Writes one line. Errors are nobody's to handle: there is no other place to say so.
pub(crate) fn line(text: Arguments<'_>) {
    if let Some(mut console) = CONSOLE.get() {
        let line = format!("kontor-init {:>6} {text}\r\n", Moment::now().millis());
        let _ = console.write_all(line.as_bytes());
    }
}

/// Says what is done, as `format!` does.
macro_rules! say {
    ($($argument:tt)*) => { $crate::init::log::line(format_args!($($argument)*)) };
}
pub(crate) use say;
