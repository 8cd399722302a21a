//! `kontor-probe`: runs commands in the guest for tests, and sends what they printed.
//!
//! Only test images carry it. It trusts its host with everything, that is its purpose; it still keeps
//! every bound of `kontor_wire::probe`, so that a test which goes wrong is seen and not suffered.
//!
//! One thread, one event loop. Everything is watched on edges, and each round asks every source until
//! it has nothing more. No request is taken while as many run, or wait to be sent, as may.

use crate::clock::{Moment, timespec};
use crate::sys;
use kontor_wire::probe::{End, MAX_FRAME, MAX_OUTPUT, MAX_RUNNING, Output, Request};
use kontor_wire::{Decoder, FrameError, encode};
use rustix::event::epoll::{self, EventFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Bytes read at a time.
const CHUNK: usize = 16 * 1024;
/// What commands get as their environment, besides a home.
const ENVIRONMENT: [(&str, &str); 2] = [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The parent passed no port.
    #[error("take the probe's port")]
    Port(#[source] io::Error),
    /// The host sent what is no request.
    #[error("a request")]
    Request(#[source] FrameError),
    /// A system call that should not fail did.
    #[error("serve the probe's port")]
    System(#[source] io::Error),
}

impl From<io::Error> for ProbeError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl From<Errno> for ProbeError {
    fn from(error: Errno) -> Self {
        Self::System(error.into())
    }
}

/// Serves the port that was inherited, for as long as the guest runs.
///
/// # Errors
/// [`ProbeError`] when the host breaks the protocol or the kernel refuses.
pub fn run() -> Result<(), ProbeError> {
    let port = sys::inherited(0).map_err(ProbeError::Port)?;
    Server::new(port)?.serve(Closed::MayOpenAgain)
}

/// What it means that the host's end is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closed {
    /// The host may open it (again): a virtio-serial port.
    MayOpenAgain,
    /// There will be no more requests.
    #[cfg(test)]
    ForGood,
}

/// What came from the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Took {
    Request,
    Nothing,
    Hangup,
}

/// Whether the port's other end is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Open,
    Closed,
}

struct Server {
    set: OwnedFd,
    port: OwnedFd,
    decoder: Decoder,
    running: Vec<Running>,
    /// Encoded outputs, and how much of the first is sent.
    waiting: VecDeque<Vec<u8>>,
    sent: usize,
}

/// A command on its way.
struct Running {
    id: u64,
    child: Child,
    /// Readable once the process has ended; held to be watched.
    _ended: OwnedFd,
    stdin: Option<Feed>,
    stdout: Option<Capture<ChildStdout>>,
    stderr: Option<Capture<ChildStderr>>,
    until: Moment,
    timed_out: bool,
}

struct Feed {
    pipe: ChildStdin,
    bytes: Vec<u8>,
    written: usize,
}

struct Capture<P> {
    pipe: P,
    kept: Vec<u8>,
    open: bool,
}

impl Server {
    fn new(port: OwnedFd) -> Result<Self, ProbeError> {
        fcntl_setfl(&port, fcntl_getfl(&port)? | OFlags::NONBLOCK)?;
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        watch(&set, port.as_fd())?;
        let decoder = Decoder::new(MAX_FRAME);
        Ok(Self { set, port, decoder, running: Vec::new(), waiting: VecDeque::new(), sent: 0 })
    }

    fn serve(&mut self, closed: Closed) -> Result<(), ProbeError> {
        loop {
            match self.round()? {
                Took::Request => continue,
                Took::Nothing => {}
                Took::Hangup => {
                    self.forget_everything();
                    match closed {
                        Closed::MayOpenAgain => {}
                        #[cfg(test)]
                        Closed::ForGood => return Ok(()),
                    }
                }
            }
            self.wait()?;
        }
    }

    /// Everything that can be done without waiting, but for requests: of those one.
    fn round(&mut self) -> Result<Took, ProbeError> {
        self.pump_commands()?;
        match self.send()? {
            Peer::Open => self.take_request(),
            Peer::Closed => Ok(Took::Hangup),
        }
    }

    /// Waits for the next change, or for a command's time to be over.
    fn wait(&self) -> Result<(), ProbeError> {
        let next =
            self.running.iter().filter(|running| !running.timed_out).map(|running| running.until).min();
        let left = next.map(|until| timespec(until.since(Moment::now())));
        let nothing = epoll::Event { flags: EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        match epoll::wait(&self.set, &mut [nothing; 8], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn has_room(&self) -> bool {
        self.running.len() + self.waiting.len() < MAX_RUNNING
    }

    fn take_request(&mut self) -> Result<Took, ProbeError> {
        let mut chunk = [0; CHUNK];
        while self.has_room() {
            if let Some(request) = self.decoder.next_message().map_err(ProbeError::Request)? {
                self.begin(request);
                return Ok(Took::Request);
            }
            let room = self.decoder.room().min(CHUNK);
            match rustix::io::read(&self.port, &mut chunk[..room]) {
                Ok(0) => return Ok(Took::Hangup),
                Ok(count) => {
                    self.decoder.push(&chunk[..count]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Took::Nothing)
    }

    fn begin(&mut self, request: Request) {
        let id = request.id;
        match Running::start(request, &self.set) {
            Ok(running) => self.running.push(running),
            Err(error) => {
                let end = End::NotStarted(error.raw_os_error().unwrap_or(Errno::INVAL.raw_os_error()));
                self.waiting.push_back(encode(&Output { id, end, stdout: Vec::new(), stderr: Vec::new() }));
            }
        }
    }

    /// Moves what can be moved, ends what is over, queues what has ended.
    fn pump_commands(&mut self) -> Result<(), ProbeError> {
        let now = Moment::now();
        let mut position = 0;
        while let Some(running) = self.running.get_mut(position) {
            match running.pump(now)? {
                Some(output) => {
                    self.waiting.push_back(encode(&output));
                    self.running.swap_remove(position);
                }
                None => position += 1,
            }
        }
        Ok(())
    }

    fn send(&mut self) -> Result<Peer, ProbeError> {
        while let Some(frame) = self.waiting.front() {
            match rustix::io::write(&self.port, &frame[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => continue,
                // The host does not read, or is not there: reading tells which.
                Err(Errno::AGAIN) => break,
                Err(Errno::PIPE) => return Ok(Peer::Closed),
                Err(error) => return Err(error.into()),
            }
            if self.sent == frame.len() {
                self.waiting.pop_front();
                self.sent = 0;
            }
        }
        Ok(Peer::Open)
    }

    /// Whoever asked is gone: what was asked is of no use to the next.
    fn forget_everything(&mut self) {
        for mut running in self.running.drain(..) {
            running.kill();
            // Reaps it; it was killed, so this takes no time.
            let _ = running.child.wait();
        }
        self.waiting.clear();
        self.sent = 0;
        self.decoder = Decoder::new(MAX_FRAME);
    }
}

impl Running {
    fn start(request: Request, set: &OwnedFd) -> io::Result<Self> {
        let Request { id, argv, uid, stdin, timeout_ms } = request;
        let until = Moment::now().after(Duration::from_millis(timeout_ms));
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let (program, arguments) = argv.split_first().ok_or_else(invalid)?;
        if !program.starts_with('/') {
            return Err(invalid());
        }
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(ENVIRONMENT).current_dir("/").process_group(0);
        command.env("HOME", if uid == 0 { "/root" } else { "/home/user" });
        if uid != rustix::process::getuid().as_raw() {
            command.uid(uid).gid(uid);
        }
        let stdin_kind = if stdin.is_empty() { Stdio::null() } else { Stdio::piped() };
        command.stdin(stdin_kind).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let watched = watch_child(&mut child, stdin, set);
        if watched.is_err() {
            // It cannot be watched, so it may not run.
            child.kill()?;
            child.wait()?;
        }
        let (ended, stdin, stdout, stderr) = watched?;
        Ok(Self { id, child, _ended: ended, stdin, stdout, stderr, until, timed_out: false })
    }

    fn pump(&mut self, now: Moment) -> io::Result<Option<Output>> {
        // Asked before the pipes are emptied: nothing that the command printed comes after its end.
        let ended = self.child.try_wait()?;
        if self.stdin.as_mut().is_some_and(|feed| !feed.pump()) {
            self.stdin = None;
        }
        if let Some(capture) = &mut self.stdout {
            capture.pump();
        }
        if let Some(capture) = &mut self.stderr {
            capture.pump();
        }
        let Some(status) = ended else {
            if now >= self.until && !self.timed_out {
                self.timed_out = true;
                self.kill();
            }
            return Ok(None);
        };
        let end = if self.timed_out { End::TimedOut } else { end_of(status) };
        let stdout = self.stdout.take().map(|capture| capture.kept).unwrap_or_default();
        let stderr = self.stderr.take().map(|capture| capture.kept).unwrap_or_default();
        Ok(Some(Output { id: self.id, end, stdout, stderr }))
    }

    /// Kills the command and everything that it started and did not move out of its group.
    fn kill(&mut self) {
        // It has ended by itself when this fails.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
    }
}

type Streams = (OwnedFd, Option<Feed>, Option<Capture<ChildStdout>>, Option<Capture<ChildStderr>>);

fn watch_child(child: &mut Child, bytes: Vec<u8>, set: &OwnedFd) -> io::Result<Streams> {
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    watch(set, ended.as_fd())?;
    let stdin = child.stdin.take().map(|pipe| ready(set, pipe)).transpose()?;
    let stdout = child.stdout.take().map(|pipe| ready(set, pipe)).transpose()?;
    let stderr = child.stderr.take().map(|pipe| ready(set, pipe)).transpose()?;
    Ok((
        ended,
        stdin.map(|pipe| Feed { pipe, bytes, written: 0 }),
        stdout.map(|pipe| Capture { pipe, kept: Vec::new(), open: true }),
        stderr.map(|pipe| Capture { pipe, kept: Vec::new(), open: true }),
    ))
}

/// This end of a pipe, watched and without blocking.
fn ready<P: AsFd>(set: &OwnedFd, pipe: P) -> io::Result<P> {
    fcntl_setfl(&pipe, fcntl_getfl(&pipe)? | OFlags::NONBLOCK)?;
    watch(set, pipe.as_fd())?;
    Ok(pipe)
}

fn watch(set: &OwnedFd, source: BorrowedFd<'_>) -> io::Result<()> {
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
    Ok(epoll::add(set, source, epoll::EventData::new_u64(0), flags)?)
}

impl Feed {
    /// Writes what the command takes; `false` once it has all, or takes no more.
    fn pump(&mut self) -> bool {
        while let Some(rest) = self.bytes.get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.pipe.write(rest) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        false
    }
}

impl<P: Read> Capture<P> {
    /// Reads what there is; what is beyond the limit is read too, so that the command does not hang.
    fn pump(&mut self) {
        let mut chunk = [0; CHUNK];
        while self.open {
            match self.pipe.read(&mut chunk) {
                Ok(0) => self.open = false,
                Ok(count) => {
                    let room = MAX_OUTPUT - self.kept.len();
                    self.kept.extend_from_slice(&chunk[..count.min(room)]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.open = false,
            }
        }
    }
}

fn end_of(status: ExitStatus) -> End {
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Exit(code),
        (None, Some(signal)) => End::Signal(signal),
        (None, None) => End::Exit(status.into_raw()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    /// A served port, and the test's end of it.
    struct Asker {
        stream: UnixStream,
        decoder: Decoder,
        server: Option<JoinHandle<Result<(), ProbeError>>>,
    }

    impl Asker {
        fn new() -> Self {
            let (stream, port) = UnixStream::pair().unwrap();
            let server = std::thread::spawn(move || Server::new(port.into())?.serve(Closed::ForGood));
            Self { stream, decoder: Decoder::new(MAX_FRAME), server: Some(server) }
        }

        fn ask(&mut self, request: &Request) {
            self.stream.write_all(&encode(request)).unwrap();
        }

        fn answer(&mut self) -> Output {
            loop {
                if let Some(output) = self.decoder.next_message().unwrap() {
                    return output;
                }
                let mut chunk = [0; CHUNK];
                let room = self.decoder.room().min(CHUNK);
                let count = self.stream.read(&mut chunk[..room]).unwrap();
                assert!(count > 0, "the server closed its end");
                self.decoder.push(&chunk[..count]);
            }
        }

        fn run(&mut self, request: &Request) -> Output {
            self.ask(request);
            self.answer()
        }

        fn close(mut self) -> Result<(), ProbeError> {
            self.stream.shutdown(std::net::Shutdown::Both).unwrap();
            self.server.take().unwrap().join().unwrap()
        }
    }

    fn shell(id: u64, script: &str) -> Request {
        Request {
            id,
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            uid: rustix::process::getuid().as_raw(),
            stdin: Vec::new(),
            timeout_ms: 20_000,
        }
    }

    #[test]
    fn output_and_code_of_a_command_come_back() {
        let mut asker = Asker::new();
        let output = asker.run(&shell(7, "echo out; echo err >&2; exit 3"));
        let expected = Output { id: 7, end: End::Exit(3), stdout: b"out\n".into(), stderr: b"err\n".into() };
        assert_eq!(output, expected);
        asker.close().unwrap();
    }

    #[test]
    fn standard_input_is_fed_beyond_what_a_pipe_holds() {
        let mut asker = Asker::new();
        let stdin = vec![b'x'; 300_000];
        let output = asker.run(&Request { stdin, ..shell(1, "wc -c") });
        assert_eq!(output.stdout, b"300000\n");
    }

    #[test]
    fn command_that_reads_no_input_ends_all_the_same() {
        let mut asker = Asker::new();
        let output = asker.run(&Request { stdin: vec![0; 300_000], ..shell(1, "exit 4") });
        assert_eq!(output.end, End::Exit(4));
    }

    #[test]
    fn output_is_cut_at_its_limit_and_the_command_still_ends() {
        let mut asker = Asker::new();
        let output = asker.run(&shell(1, &format!("head -c {} /dev/zero", MAX_OUTPUT + 100_000)));
        assert_eq!((output.end, output.stdout.len()), (End::Exit(0), MAX_OUTPUT));
        let output = asker.run(&shell(2, &format!("head -c {MAX_OUTPUT} /dev/zero | tee /dev/stderr")));
        assert_eq!((output.stdout.len(), output.stderr.len()), (MAX_OUTPUT, MAX_OUTPUT));
    }

    #[test]
    fn command_that_runs_too_long_is_killed_with_its_children() {
        let mut asker = Asker::new();
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        let script = format!("mkfifo {0}; (cat {0}; echo leaked) & echo begun; wait", fifo.display());
        let output = asker.run(&Request { timeout_ms: 2_000, ..shell(1, &script) });
        assert_eq!((output.end, output.stdout), (End::TimedOut, b"begun\n".to_vec()));
        // Its child read from the pipe; with the child gone, nobody does.
        let open = rustix::fs::open(&fifo, OFlags::WRONLY | OFlags::NONBLOCK, rustix::fs::Mode::empty());
        assert_eq!(open.unwrap_err(), Errno::NXIO);
    }

    #[test]
    fn signal_that_ended_a_command_is_named() {
        let mut asker = Asker::new();
        assert_eq!(asker.run(&shell(1, "kill -15 $$")).end, End::Signal(15));
    }

    #[test]
    fn command_that_cannot_be_started_says_why() {
        let mut asker = Asker::new();
        let cases: [(&[&str], Errno); 4] = [
            (&["/nowhere"], Errno::NOENT),
            (&["/etc/passwd"], Errno::ACCESS),
            (&["sh"], Errno::INVAL),
            (&[], Errno::INVAL),
        ];
        for (argv, errno) in cases {
            let argv = argv.iter().map(|&word| word.to_owned()).collect();
            let output = asker.run(&Request { argv, ..shell(1, "") });
            assert_eq!(output.end, End::NotStarted(errno.raw_os_error()));
        }
    }

    #[test]
    fn background_process_does_not_hold_up_the_answer() {
        let mut asker = Asker::new();
        let output = asker.run(&Request { timeout_ms: 60_000, ..shell(1, "sleep 30 & echo $!") });
        assert_eq!(output.end, End::Exit(0));
        let pid: i32 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn as_many_commands_as_allowed_run_at_once_and_the_next_waits() {
        let mut asker = Asker::new();
        let directory = tempfile::tempdir().unwrap();
        let gate = directory.path().join("gate");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &gate,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let started = |n: usize| directory.path().join(format!("started-{n}"));
        // A pipe with a writer: whoever reads from it waits until the writer is gone.
        let writer = std::fs::OpenOptions::new().read(true).write(true).open(&gate).unwrap();
        for n in 0..=MAX_RUNNING {
            let script = format!("exec <{}; touch {}; exec cat", gate.display(), started(n).display());
            asker.ask(&shell(u64::try_from(n).unwrap(), &script));
        }
        while !(0..MAX_RUNNING).all(|n| started(n).exists()) {
            std::thread::yield_now();
        }
        assert!(!started(MAX_RUNNING).exists());
        drop(writer);
        let mut ids: Vec<u64> = (0..MAX_RUNNING).map(|_| asker.answer().id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..u64::try_from(MAX_RUNNING).unwrap()).collect::<Vec<_>>());
        // Opens once the last command reads.
        drop(std::fs::OpenOptions::new().write(true).open(&gate).unwrap());
        assert_eq!(asker.answer().id, u64::try_from(MAX_RUNNING).unwrap());
    }

    #[test]
    fn what_is_no_request_ends_the_server() {
        let mut asker = Asker::new();
        asker.stream.write_all(&[1, 0, 0, 0, 0]).unwrap();
        let server = asker.server.take().unwrap();
        assert!(matches!(server.join().unwrap(), Err(ProbeError::Request(_))));
    }

    #[test]
    fn asker_that_goes_away_takes_its_commands_with_it() {
        let mut asker = Asker::new();
        let directory = tempfile::tempdir().unwrap();
        let begun = directory.path().join("begun");
        asker.ask(&shell(1, &format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 60", begun.display())));
        while !begun.exists() {
            std::thread::yield_now();
        }
        let pid: i32 = std::fs::read_to_string(&begun).unwrap().trim().parse().unwrap();
        asker.close().unwrap();
        assert!(rustix::process::test_kill_process(Pid::from_raw(pid).unwrap()).is_err());
    }

    #[test]
    fn commands_of_root_can_run_as_another_user() {
        if !rustix::process::getuid().is_root() {
            // Not passed: only root can become somebody else.
            eprintln!("skipped: needs root");
            return;
        }
        let mut asker = Asker::new();
        let output = asker.run(&Request { uid: 1000, ..shell(1, "id -u; id -g; id -G") });
        assert_eq!(output.stdout, b"1000\n1000\n1000\n");
    }
}
