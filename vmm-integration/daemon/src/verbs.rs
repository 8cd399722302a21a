//! The few verbs that the employee's programs have, over a unix socket: one JSON line asks, JSON lines
//! answer, the last of which is `done`. One request for each connection.
//!
//! ```text
//! {"verb":"start","headless":true}   {"verb":"stop"}   {"verb":"status"}   {"verb":"logs"}   {"verb":"doctor"}
//!
//! {"state":{"state":"early","at_ms":812}}     {"status":{…}}     {"log":"…"}     {"check":{…}}
//! {"done":{"exit":0,"words":"…","reason":null,"inferred":false}}
//! ```
//!
//! The socket is the owner's alone, and its uid is checked again for each connection. A client that goes
//! away stops nothing; one that asks nothing, or does not read, is let go.

use crate::{
    daemon::Daemon,
    exit::Exit,
    lines::next_line,
    status::{Reached, Status},
};
use rustix::{
    fs::{Mode, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen as listen_on, socket_with},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::unix::{fs::FileTypeExt, net::UnixListener as StdUnixListener},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    sync::Semaphore,
    time::timeout,
};

/// Most bytes of a request.
pub const MAX_REQUEST: usize = 4096;
/// Most bytes of a line of an answer.
pub const MAX_ANSWER: usize = 256 * 1024;
/// Most clients at a time.
const CLIENTS_MAX: usize = 16;
/// Clients that may wait to be taken.
const BACKLOG: i32 = 16;
/// How long a client may take to ask, and to read a line.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same for somebody who may not ask.
const STRANGERS_PATIENCE: Duration = Duration::from_secs(1);

/// What may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Start the work VM and follow it until its session runs.
    Start {
        /// Without a window.
        #[serde(default)]
        headless: bool,
    },
    /// Power it off.
    Stop {},
    /// Where it stands.
    Status {},
    /// What its console said.
    Logs {},
    /// What is missing.
    Doctor {},
}

/// A line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// A boot state was reached.
    State(Reached),
    /// Something worth knowing.
    Note(String),
    /// Where the work VM stands.
    Status(Box<Status>),
    /// A part of the console log.
    Log(String),
    /// One of the doctor's findings.
    Check(Check),
    /// The last line.
    Done(Done),
}

/// One of the doctor's findings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, and what to do.
    pub words: String,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// For the caller's own exit.
    pub exit: Exit,
    /// What happened and what to do next.
    pub words: String,
    /// Why the work VM stopped, if that is how it ended.
    pub reason: Option<String>,
    /// Whether the host only concludes that reason.
    pub inferred: bool,
}

impl Done {
    /// It went well.
    #[must_use]
    pub fn ok(words: impl Into<String>) -> Self {
        Self::new(Exit::Ok, words)
    }

    /// It ended with `exit`.
    #[must_use]
    pub fn new(exit: Exit, words: impl Into<String>) -> Self {
        Self { exit, words: words.into(), reason: None, inferred: false }
    }
}

/// Binds a socket that only this user may use. One that an earlier process left behind is replaced; the
/// caller has made sure that nobody serves it.
pub(crate) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux makes the file with the mode that the socket has when it is bound: it is never open to
    // others, not even between two system calls.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen_on(&socket, BACKLOG)?;
    UnixListener::from_std(StdUnixListener::from(socket))
}

/// Listens for the owner's requests.
///
/// # Errors
/// When the socket cannot be made, or something else is in its place.
pub fn listen(path: &Path, owner: u32) -> io::Result<UnixListener> {
    let listener = bind_private(path)?;
    if owner != rustix::process::geteuid().as_raw() {
        std::os::unix::fs::chown(path, Some(owner), None)?;
    }
    Ok(listener)
}

/// Serves clients until the listener fails.
///
/// # Errors
/// The listener's.
pub async fn serve(listener: UnixListener, owner: u32, daemon: Arc<Daemon>) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        let (client, _) = listener.accept().await?;
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            if let Err(error) = serve_one(client, owner, &daemon).await {
                tracing::debug!(%error, "a client was let go");
            }
            drop(place);
        });
    }
}

async fn serve_one(client: UnixStream, owner: u32, daemon: &Arc<Daemon>) -> io::Result<()> {
    let uid = client.peer_cred()?.uid();
    let (from, to) = client.into_split();
    let (mut from, mut to) = (BufReader::new(from), Answers(to));
    if uid != owner {
        tracing::warn!(uid, owner, "a stranger was refused");
        to.done(Done::new(Exit::HostLacks, format!("only the user {owner} may ask"))).await?;
        // A socket that is closed with something unread takes its answer back.
        let _ = timeout(STRANGERS_PATIENCE, next_line(&mut from, MAX_REQUEST)).await;
        return Ok(());
    }
    let line = match timeout(PATIENCE, next_line(&mut from, MAX_REQUEST)).await {
        Ok(Ok(Some(line))) => line,
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => return to.done(Done::new(Exit::Usage, error.to_string())).await,
        Err(_) => return to.done(Done::new(Exit::Usage, "nothing was asked in time")).await,
    };
    match serde_json::from_slice(&line) {
        Ok(request) => {
            tracing::debug!(?request, "asked");
            let done = daemon.answer(request, &mut to).await?;
            to.done(done).await
        }
        Err(error) => to.done(Done::new(Exit::Usage, format!("this is no request: {error}"))).await,
    }
}

/// The way back to a client.
#[derive(Debug)]
pub(crate) struct Answers(OwnedWriteHalf);

impl Answers {
    pub(crate) async fn say(&mut self, answer: &Answer) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        timeout(PATIENCE, self.0.write_all(&line)).await?
    }

    async fn done(&mut self, done: Done) -> io::Result<()> {
        self.say(&Answer::Done(done)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_these_and_no_others() {
        let parse = |text: &str| serde_json::from_str::<Request>(text).ok();
        assert_eq!(parse(r#"{"verb":"start","headless":true}"#), Some(Request::Start { headless: true }));
        assert_eq!(parse(r#"{"verb":"start"}"#), Some(Request::Start { headless: false }));
        assert_eq!(parse(r#"{"verb":"status"}"#), Some(Request::Status {}));
        for wrong in [
            r#"{"verb":"status","all":true}"#,
            r#"{"verb":"start","headless":1}"#,
            r#"{"verb":"exec"}"#,
            "{}",
            "stop",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn answers_are_lines_of_one_key() {
        let done = Answer::Done(Done::ok("ready"));
        let text = r#"{"done":{"exit":0,"words":"ready","reason":null,"inferred":false}}"#;
        assert_eq!(serde_json::to_string(&done).unwrap(), text);
        let state = Answer::State(Reached { state: "early".into(), at_ms: 812 });
        assert_eq!(serde_json::to_string(&state).unwrap(), r#"{"state":{"state":"early","at_ms":812}}"#);
    }
}
