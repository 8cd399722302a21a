//! The socket at `/var/run/wireguard/NAME.sock`, where wg(8) finds an interface.
//!
//! It is made with its mode, in a directory that only root or its own user can write to, so nobody can put a link in
//! its place; it is removed at the end. When somebody else removes it, the interface shall end (xplatform).
//!
//! One thread serves all connections as they come; none can keep the others from being served, nor the interface from
//! ending.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use zeroize::{Zeroize, Zeroizing};

use super::answer::{end_of_get, end_of_set};
use super::{Decoder, Device, Interfaces, Request};

/// Where wg(8) looks.
pub const DIRECTORY: &str = "/var/run/wireguard";
/// Most connections at once; further ones wait.
pub const CONNECTIONS_MAX: usize = 16;
/// How long a connection may take for a request, and to take the answer.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A socket that is there, and is gone when this is dropped.
pub struct Socket {
    listener: UnixListener,
    directory: OwnedFd,
    name: String,
    /// Device and inode of the socket, which nobody else's has.
    identity: (u64, u64),
    watch: OwnedFd,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel would not take it, or it is no name of a file.
    #[error("{0:?} is no name of an interface: 1 to {NAME_MAX} visible characters without '/' are")]
    Name(String),
    /// The directory is not there and cannot be made, or is a link.
    #[error("open the directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else could change what lies in it.
    #[error("{0} can be written by others than root and the owner of this process")]
    OpenDirectory(PathBuf),
    /// Another process serves this interface.
    #[error("another process listens on {0}")]
    Taken(PathBuf),
    /// Something lies there that is not to be removed.
    #[error("{0} is there and is no socket")]
    NoSocket(PathBuf),
    /// The socket was not made.
    #[error("listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why nobody is served any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was told to stop.
    Stopped,
    /// The socket was removed, or is another's: the interface shall end.
    Removed,
}

impl Socket {
    /// Makes the socket of an interface, in the place of one that nobody listens on. The directory is made if it is not
    /// there, its parent is not.
    ///
    /// Two that begin at the same moment can both succeed; the one that lost its socket learns it by
    /// [`End::Removed`]. The kernel gives an interface's name to one process at a time, so it comes first.
    pub fn bind(directory: &Path, interface: &str) -> Result<Self, SocketError> {
        let visible = interface.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        if !(1..=NAME_MAX).contains(&interface.len()) || !visible || interface.starts_with('.') {
            return Err(SocketError::Name(interface.to_owned()));
        }
        let opened = open_directory(directory)?;
        let name = format!("{interface}.sock");
        let path = directory.join(&name);
        make_room(&opened, &name, &path)?;
        let listen = || -> io::Result<Self> {
            let listener = listen(&path)?;
            let stat = rustix::fs::statat(&opened, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            let changes = WatchFlags::ATTRIB | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
            inotify::add_watch(&watch, &path, changes | WatchFlags::DONT_FOLLOW)?;
            Ok(Self { listener, directory: opened, name, identity: (stat.st_dev, stat.st_ino), watch })
        };
        listen().map_err(|source| SocketError::Listen { path: path.clone(), source })
    }

    /// Serves until `stop` is readable or the socket is gone.
    pub fn serve(&self, device: &mut dyn Device, stop: BorrowedFd<'_>) -> io::Result<End> {
        let mut connections: Vec<Connection> = Vec::new();
        // While nothing can be accepted for want of descriptors or memory.
        let mut pause: Option<Instant> = None;
        loop {
            // Before it waits: the socket may be gone since before it was watched.
            if !self.is_there() {
                return Ok(End::Removed);
            }
            let now = Instant::now();
            connections.retain(|connection| connection.deadline > now);
            pause = pause.filter(|end| *end > now);
            let accepts = connections.len() < CONNECTIONS_MAX && pause.is_none();
            let deadlines = connections.iter().map(|connection| connection.deadline).chain(pause);
            let ready = self.wait(stop, accepts, &connections, deadlines.min())?;
            if ready.stop {
                return Ok(End::Stopped);
            }
            let mut is_ready = ready.connections.into_iter();
            connections.retain_mut(|connection| {
                is_ready.next() != Some(true)
                    || connection.progress(device).unwrap_or_else(|error| {
                        tracing::debug!(%error, "a connection of the configuration socket ended");
                        false
                    })
            });
            if ready.listener {
                match self.listener.accept() {
                    Ok((stream, _)) => match stream.set_nonblocking(true) {
                        Ok(()) => connections.push(Connection::new(stream)),
                        Err(error) => tracing::warn!(%error, "a connection could not be taken"),
                    },
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be taken");
                        pause = Some(Instant::now() + BREATH);
                    }
                }
            }
        }
    }

    fn wait(
        &self,
        stop: BorrowedFd<'_>,
        accepts: bool,
        connections: &[Connection],
        until: Option<Instant>,
    ) -> io::Result<Ready> {
        let listens = if accepts { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::new(&self.watch, PollFlags::IN),
            PollFd::new(&self.listener, listens),
        ];
        fds.extend(connections.iter().map(|connection| PollFd::new(&connection.stream, connection.awaits())));
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let [stop, watch, listener] = [ready.next(), ready.next(), ready.next()].map(|is| is == Some(true));
        let connections = ready.collect();
        if watch {
            self.forget_changes()?;
        }
        Ok(Ready { stop, listener, connections })
    }

    /// Reads what changed, so that the next change is seen; what it was is looked up where it lies.
    fn forget_changes(&self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 512];
        let mut reader = inotify::Reader::new(&self.watch, &mut buffer);
        loop {
            match reader.next() {
                Ok(_) => {}
                Err(Errno::WOULDBLOCK) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether the socket that has the name is this one.
    fn is_there(&self) -> bool {
        let stat = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.is_there() {
            // Where it fails it is found stale the next time.
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Socket").field(&self.name).finish()
    }
}

/// What poll(2) found.
struct Ready {
    stop: bool,
    listener: bool,
    connections: Vec<bool>,
}

/// Opens a directory that nobody else can write to, and makes it where there is none.
fn open_directory(path: &Path) -> Result<OwnedFd, SocketError> {
    let failed = |source| SocketError::Directory { path: path.to_owned(), source };
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let directory = File::from(opened);
    let metadata = directory.metadata().map_err(failed)?;
    let own = rustix::process::geteuid().as_raw();
    if ![ROOT, own].contains(&metadata.uid()) || metadata.mode() & OTHERS_WRITE != 0 {
        return Err(SocketError::OpenDirectory(path.to_owned()));
    }
    Ok(directory.into())
}

/// Removes a socket that nobody listens on.
fn make_room(directory: &OwnedFd, name: &str, path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Listen { path: path.to_owned(), source };
    let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(failed(errno.into())),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => return Err(SocketError::Taken(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(failed(error)),
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file gets the socket's mode (unix(7) leaves it out): there is no moment at which others could connect.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// One caller. It says a request, hears the answer, and may go on.
struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    /// Read, but of a later request.
    unread: Zeroizing<Vec<u8>>,
    answer: Zeroizing<Vec<u8>>,
    /// Bytes of the answer that are on their way.
    sent: usize,
    deadline: Instant,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            unread: Zeroizing::new(Vec::with_capacity(CHUNK_LEN)),
            answer: Zeroizing::default(),
            sent: 0,
            deadline: Instant::now() + PATIENCE,
        }
    }

    fn awaits(&self) -> PollFlags {
        if self.sent < self.answer.len() { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Does what can be done without waiting, up to [`READS_MAX`]; says whether there may be more.
    fn progress(&mut self, device: &mut dyn Device) -> io::Result<bool> {
        let mut chunk = Zeroizing::new([0; CHUNK_LEN]);
        let mut reads = 0;
        loop {
            while self.sent < self.answer.len() {
                match self.stream.write(&self.answer[self.sent..]) {
                    Ok(len) => self.sent += len,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if self.read_request(device) {
                continue;
            }
            if reads == READS_MAX {
                return Ok(true);
            }
            reads += 1;
            match self.stream.read(&mut *chunk) {
                // What was not complete is not done.
                Ok(0) => return Ok(false),
                Ok(len) => self.unread.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes what is there up to a request's end, and says whether there was one.
    fn read_request(&mut self, device: &mut dyn Device) -> bool {
        let (taken, request) = self.decoder.push(&self.unread, &OfThisSystem);
        let left = self.unread.len() - taken;
        self.unread.copy_within(taken.., 0);
        self.unread[left..].zeroize();
        self.unread.truncate(left);
        let Some(request) = request else { return false };
        self.answer = answer(request, device);
        self.sent = 0;
        self.deadline = Instant::now() + PATIENCE;
        true
    }
}

fn answer(request: Result<Request, super::RequestError>, device: &mut dyn Device) -> Zeroizing<Vec<u8>> {
    let end = match request {
        Ok(Request::Get) => match device.get() {
            Ok(state) => {
                let text = state.text();
                let end = end_of_get(Ok(()));
                let mut answer = Zeroizing::new(Vec::with_capacity(text.len() + end.len()));
                answer.extend_from_slice(text.as_bytes());
                answer.extend_from_slice(end.as_bytes());
                return answer;
            }
            Err(errno) => end_of_get(Err(errno)),
        },
        Ok(Request::Set(set)) => end_of_set(device.set(set)),
        Err(error) => {
            tracing::info!(%error, "a request at the configuration socket is refused");
            end_of_set(Err(error.errno()))
        }
    };
    Zeroizing::new(end.into_bytes())
}

/// The interfaces of this process's network namespace.
struct OfThisSystem;

impl Interfaces for OfThisSystem {
    fn index(&self, name: &str) -> Option<u32> {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
        rustix::net::netdevice::name_to_index(socket.as_fd(), name).ok()
    }
}

/// Most characters of an interface's name (`linux/if.h`).
const NAME_MAX: usize = 15;
const ROOT: u32 = 0;
/// As wireguard-go makes it: who may not open the sockets may see that they are there.
const DIRECTORY_MODE: u32 = 0o755;
/// Permission bits that the directory must not have.
const OTHERS_WRITE: u32 = 0o022;
/// The owner alone.
const SOCKET_MODE: u32 = 0o600;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;
/// How long nothing is accepted after it failed.
const BREATH: Duration = Duration::from_millis(100);
/// Bytes read at once.
const CHUNK_LEN: usize = 4096;
/// Chunks that one caller may say before it is another's turn.
const READS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};

    use super::super::{Model, Set, State};
    use super::*;

    /// A directory that nobody else can write to.
    fn directory() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    /// Serves `device` while `client` talks to it; gives the device and how it ended.
    fn served<D: Device + Send>(
        dir: &Path,
        mut device: D,
        client: impl FnOnce(UnixStream) -> Option<UnixStream>,
    ) -> (D, End) {
        let socket = Socket::bind(dir, "wg0").unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let end = std::thread::scope(|scope| {
            let serving = scope.spawn(|| socket.serve(&mut device, stopped.as_fd()).unwrap());
            let stream = UnixStream::connect(dir.join("wg0.sock")).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let kept = client(stream);
            drop(stop);
            let end = serving.join().unwrap();
            drop(kept);
            end
        });
        (device, end)
    }

    fn read_until_end(stream: &mut UnixStream) -> String {
        let mut text = String::new();
        while !text.ends_with("\n\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            text.push(char::from(byte[0]));
        }
        text
    }

    #[test]
    fn several_requests_are_answered_on_one_connection() {
        let dir = directory();
        let (model, end) = served(dir.path(), Model::default(), |mut stream| {
            stream.write_all(b"set=1\nlisten_port=7\n\nget=1\n\n").unwrap();
            assert_eq!(read_until_end(&mut stream), "errno=0\n\n");
            assert_eq!(read_until_end(&mut stream), "listen_port=7\nerrno=0\n\n");
            stream.write_all(b"set=1\nlisten_port=8\nlisten_port=x\n\n").unwrap();
            assert_eq!(read_until_end(&mut stream), "errno=-22\n\n");
            stream.write_all(b"get=1\n\n").unwrap();
            assert_eq!(read_until_end(&mut stream), "listen_port=7\nerrno=0\n\n");
            Some(stream)
        });
        assert_eq!((model.0.listen_port, end), (7, End::Stopped));
    }

    #[test]
    fn request_that_is_cut_off_changes_nothing() {
        let dir = directory();
        let (model, _) = served(dir.path(), Model::default(), |mut stream| {
            stream.write_all(b"set=1\nlisten_port=7\n").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
            None
        });
        assert_eq!(model.0.listen_port, 0);
    }

    #[test]
    fn caller_that_says_nothing_keeps_nobody_from_being_served() {
        let dir = directory();
        served(dir.path(), Model::default(), |silent| {
            let mut other = UnixStream::connect(dir.path().join("wg0.sock")).unwrap();
            other.write_all(b"get=1\n\n").unwrap();
            assert_eq!(read_until_end(&mut other), "errno=0\n\n");
            Some(silent)
        });
    }

    #[test]
    fn connection_over_the_limit_waits_until_another_ends() {
        let dir = directory();
        served(dir.path(), Model::default(), |first| {
            let connect = || UnixStream::connect(dir.path().join("wg0.sock")).unwrap();
            let mut taken: Vec<UnixStream> = (1..CONNECTIONS_MAX).map(|_| connect()).collect();
            let mut late = connect();
            late.write_all(b"get=1\n\n").unwrap();
            // The last of those that have a place is served, so all of them have theirs.
            let last = taken.last_mut().unwrap();
            last.write_all(b"get=1\n\n").unwrap();
            assert_eq!(read_until_end(last), "errno=0\n\n");
            late.set_nonblocking(true).unwrap();
            assert_eq!(late.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            late.set_nonblocking(false).unwrap();
            drop(first);
            assert_eq!(read_until_end(&mut late), "errno=0\n\n");
            None
        });
    }

    #[test]
    fn answer_that_nobody_takes_is_no_obstacle_to_the_end() {
        let dir = directory();
        let mut state = State::default();
        let peer = super::super::StatePeer::new([1; 32].into());
        state.peers = vec![peer; 20_000];
        let (_, end) = served(dir.path(), Model(state), |mut stream| {
            stream.write_all(b"get=1\n\n").unwrap();
            let mut some = [0; 10];
            stream.read_exact(&mut some).unwrap();
            assert_eq!(&some, b"public_key");
            Some(stream)
        });
        assert_eq!(end, End::Stopped);
    }

    /// A device that fails.
    struct Broken;

    impl Device for Broken {
        fn get(&mut self) -> Result<State, Errno> {
            Err(Errno::IO)
        }

        fn set(&mut self, _: Set) -> Result<(), Errno> {
            Err(Errno::ADDRINUSE)
        }
    }

    #[test]
    fn errors_of_the_device_are_told() {
        let dir = directory();
        served(dir.path(), Broken, |mut stream| {
            stream.write_all(b"get=1\n\nset=1\n\nget=2\n\n").unwrap();
            assert_eq!(read_until_end(&mut stream), "errno=5\n\n");
            assert_eq!(read_until_end(&mut stream), "errno=-98\n\n");
            assert_eq!(read_until_end(&mut stream), "errno=-71\n\n");
            None
        });
    }

    #[test]
    fn socket_that_somebody_removes_is_an_end() {
        let dir = directory();
        let path = dir.path().join("wg0.sock");
        let socket = Socket::bind(dir.path(), "wg0").unwrap();
        let (_stop, stopped) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| socket.serve(&mut Model::default(), stopped.as_fd()).unwrap());
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"get=1\n\n").unwrap();
            read_until_end(&mut stream);
            fs::remove_file(&path).unwrap();
            assert_eq!(serving.join().unwrap(), End::Removed);
        });
        // Another's is left alone.
        let other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn socket_is_its_owners_alone_and_goes_with_it() {
        let dir = directory();
        let below = dir.path().join("wireguard");
        let socket = Socket::bind(&below, "wg0").unwrap();
        let path = below.join("wg0.sock");
        let metadata = path.symlink_metadata().unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert_eq!(below.metadata().unwrap().mode() & 0o777, 0o755);
        drop(socket);
        assert!(path.symlink_metadata().is_err());
    }

    #[test]
    fn stale_socket_gives_way_and_one_that_is_served_does_not() {
        let dir = directory();
        let path = dir.path().join("wg0.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _socket = Socket::bind(dir.path(), "wg0").unwrap();
        assert!(matches!(Socket::bind(dir.path(), "wg0"), Err(SocketError::Taken(_))));
        assert!(Socket::bind(dir.path(), "wg1").is_ok());
    }

    #[test]
    fn link_is_never_followed() {
        let dir = directory();
        let elsewhere = directory();
        let path = dir.path().join("wg0.sock");
        // To a socket that nobody listens on, to one that is served, to nothing.
        drop(UnixListener::bind(elsewhere.path().join("stale")).unwrap());
        let _served = UnixListener::bind(elsewhere.path().join("served")).unwrap();
        for name in ["stale", "served", "none"] {
            let target = elsewhere.path().join(name);
            let existed = target.exists();
            symlink(&target, &path).unwrap();
            assert!(matches!(Socket::bind(dir.path(), "wg0"), Err(SocketError::NoSocket(_))), "{name}");
            assert_eq!(target.exists(), existed);
            fs::remove_file(&path).unwrap();
        }
        fs::write(&path, "text").unwrap();
        assert!(matches!(Socket::bind(dir.path(), "wg0"), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"text");
        let link = elsewhere.path().join("link");
        symlink(dir.path(), &link).unwrap();
        assert!(matches!(Socket::bind(&link, "wg1"), Err(SocketError::Directory { .. })));
    }

    #[test]
    fn directory_that_others_can_write_to_is_refused() {
        let dir = directory();
        for mode in [0o775, 0o757, 0o1777] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let refused = Socket::bind(dir.path(), "wg0");
            assert!(matches!(refused, Err(SocketError::OpenDirectory(_))), "{mode:o}");
        }
        let nowhere = dir.path().join("none/wireguard");
        assert!(matches!(Socket::bind(&nowhere, "wg0"), Err(SocketError::Directory { .. })));
    }

    #[test]
    fn name_at_the_limit_is_taken_and_others_are_refused() {
        let dir = directory();
        assert!(Socket::bind(dir.path(), "kontor012345678").is_ok());
        for name in ["", "kontor0123456789", "a/b", "..", ".", "a b", "a\0", "tün"] {
            assert!(matches!(Socket::bind(dir.path(), name), Err(SocketError::Name(_))), "{name:?}");
        }
    }
}
