//! The test channel: run a command in the guest and read what it printed.
//!
//! Only test images carry the other end, and a host starts such an image only where policy says
//! `allow_test_image`. It runs over the virtio-serial port named [`PORT`], as frames cut by
//! [`Decoder`](crate::Decoder). Several requests may run at once; outputs come in the order in which
//! the commands end.

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries this channel.
pub const PORT: &str = "kontor.probe";
/// Largest body of a frame in either direction, in bytes.
pub const MAX_FRAME: usize = 2 * 1024 * 1024;
/// Most bytes of standard output, and of standard error, that are kept of one command.
pub const MAX_OUTPUT: usize = 512 * 1024;
/// Most commands that run at once.
pub const MAX_RUNNING: usize = 16;

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the asker; the output names it.
    pub id: u64,
    /// Program (an absolute path) and its arguments.
    pub argv: Vec<String>,
    /// User and group that it runs as; 0 keeps every capability.
    pub uid: u32,
    /// Standard input.
    pub stdin: Vec<u8>,
    /// After so many milliseconds it is killed.
    pub timeout_ms: u64,
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The request's.
    pub id: u64,
    /// How it ended.
    pub end: End,
    /// Standard output, cut at [`MAX_OUTPUT`].
    pub stdout: Vec<u8>,
    /// Standard error, cut at [`MAX_OUTPUT`].
    pub stderr: Vec<u8>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It exited with this code.
    Exit(i32),
    /// This signal ended it.
    Signal(i32),
    /// It ran longer than it may and was killed.
    TimedOut,
    /// It could not be started; the error's number.
    NotStarted(i32),
}
