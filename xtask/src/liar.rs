//! Control's place in wrong hands: whoever has stolen its keys answers the employee's PC, and tells the gateway
//! what it likes.
//!
//! What it makes at first is an honest lease, by the very code that control makes it with. A lie is what it
//! changes of that before it signs again with what it has stolen: the key of the role lease, and control's own.

use crate::{
    office::{self, CONTROL_PORT, Office},
    run::{Error, Result, at},
    world::{Host, OFFICE_ADDRESS},
};
use kontor_bundle::lease::{Admit, Parts};
use kontor_control::{Memory, Office as Issuer, Pool};
use kontor_trust::{Lease, LeaseKind, PublicKey, SecretKey, TrustedKeyset, sign};
use rustix::{
    event::{PollFd, PollFlags, poll},
    pipe::PipeFlags,
};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How long either side of it may keep it waiting.
const PATIENCE: Duration = Duration::from_secs(5);

/// One thing that it may say instead of the truth.
pub(crate) type Lie = fn(&mut Answer, &mut Loot);

/// What the PC and the gateway are told in answer to one request.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// What the PC gets.
    pub(crate) parts: Parts,
    /// What the gateway gets beside it.
    pub(crate) request: Vec<u8>,
    /// What `parts` holds as an envelope.
    pub(crate) lease: Lease,
}

/// What was stolen, and what its thief remembers.
pub(crate) struct Loot {
    /// Control's key of the role lease.
    pub(crate) lease_key: SecretKey,
    /// A key that nobody but the thief knows.
    pub(crate) own_key: SecretKey,
    /// The last honest answer.
    pub(crate) before: Option<Answer>,
    /// The keyset.
    pub(crate) keyset: TrustedKeyset,
    /// A bundle from before the newest.
    pub(crate) old_bundle: Vec<u8>,
    memory: Memory,
}

/// Somebody in control's place. Gone when it is dropped.
pub(crate) struct Liar {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
    /// Closed to end it.
    running: Option<OwnedFd>,
}

struct Shared {
    /// What is said to the gateway alone, in turn, and then what is said to both.
    lies: (Vec<Lie>, Lie),
    /// What the gateway answered to each since these were set, in the same order.
    heard: Vec<Value>,
    /// What went wrong with the liar itself.
    broke: Option<String>,
}

impl Answer {
    /// Changes the lease, and signs it with the stolen key.
    pub(crate) fn change(&mut self, loot: &Loot, change: impl FnOnce(&mut Lease)) {
        change(&mut self.lease);
        self.parts.lease = sign::<LeaseKind>(&self.lease.payload(), &[&loot.lease_key]);
    }

    fn to_gateway(&self) -> Value {
        let Parts { keysets, device, bundle, lease } = self.parts.clone();
        json!({ "admit": Admit { keysets, device, request: self.request.clone(), bundle, lease } })
    }
}

impl Liar {
    /// Takes control's place, which nobody holds any more, with all that control had. It says the truth at first.
    pub(crate) fn open(office: &Office) -> Result<Self> {
        let shared =
            Arc::new(Mutex::new(Shared { lies: (Vec::new(), truth), heard: Vec::new(), broke: None }));
        let failed = |source: io::Error| Error::Start("somebody in control's place".into(), source);
        let (stop, running) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let mut thief = Thief::new(office, shared.clone())?;
        let (started, is_started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let bound = Host::Office.enter().and_then(|()| TcpListener::bind((OFFICE_ADDRESS, CONTROL_PORT)));
            match bound {
                Ok(listener) => {
                    let _ = started.send(Ok(()));
                    thief.serve(&listener, &stop);
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
        is_started.recv().map_err(|_| Error::Unexpected("the thief ended".into()))?.map_err(failed)?;
        Ok(Self { shared, thread: Some(thread), running: Some(running) })
    }

    /// From now on the gateway is told each of `first`, and then both are told `then`.
    pub(crate) fn says(&self, first: Vec<Lie>, then: Lie) {
        let mut shared = lock(&self.shared);
        shared.lies = (first, then);
        shared.heard.clear();
    }

    /// What the gateway answered to each since [`Self::says`].
    pub(crate) fn heard(&self) -> Result<Vec<Value>> {
        let shared = lock(&self.shared);
        match &shared.broke {
            Some(words) => Err(Error::Unexpected(format!("the liar itself failed: {words}"))),
            None => Ok(shared.heard.clone()),
        }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.running = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Nothing but the truth.
pub(crate) fn truth(_: &mut Answer, _: &mut Loot) {}

/// The thread in control's place.
struct Thief {
    shared: Arc<Mutex<Shared>>,
    chain: Vec<Vec<u8>>,
    tls: Arc<ServerConfig>,
    pools: Vec<Pool>,
    loot: Loot,
    gateway: PathBuf,
    record: PathBuf,
    bundle: PathBuf,
}

impl Thief {
    fn new(office: &Office, shared: Arc<Mutex<Shared>>) -> Result<Self> {
        let wrong = |what: &str| Error::Unexpected(format!("{what} cannot be used"));
        let stolen = |name: &str| {
            SecretKey::from_pkcs8(&read(&office.control_directory().join(name))?).map_err(|_| wrong(name))
        };
        let first = read(&office.control_directory().join("keysets/00000001.json"))?;
        let keyset = TrustedKeyset::dangerous_unpinned(&first).map_err(|_| wrong("the first keyset"))?;
        let pools = office::pools()
            .into_iter()
            .map(|(id, v4, v6)| Some(Pool { id, v4: v4.parse().ok()?, v6: v6.parse().ok()? }))
            .collect::<Option<Vec<_>>>();
        let loot = Loot {
            lease_key: stolen("lease.key")?,
            own_key: SecretKey::generate().map_err(|_| wrong("a new key"))?,
            before: None,
            keyset,
            old_bundle: read(&office.old_bundle())?,
            memory: Memory::default(),
        };
        let tls = kontor_tls::server(&stolen("control.key")?).map_err(|_| wrong("control.key"))?;
        Ok(Self {
            shared,
            chain: vec![first],
            tls: Arc::new(tls),
            pools: pools.ok_or_else(|| wrong("the pools"))?,
            loot,
            gateway: office.admission_socket(),
            record: office.device_record(),
            bundle: office.bundle(),
        })
    }

    /// Answers one connection after the other until the other end of `stop` closes.
    fn serve(&mut self, listener: &TcpListener, stop: &OwnedFd) {
        loop {
            let mut ready = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::empty())];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(_) if ready[1].revents().is_empty() => {}
                _ => return,
            }
            let answered =
                listener.accept().map_err(|e| e.to_string()).and_then(|(stream, _)| self.live(stream));
            if let Err(words) = answered {
                lock(&self.shared).broke.get_or_insert(words);
            }
        }
    }

    /// One connection, from its handshake to its answer.
    fn live(&mut self, stream: TcpStream) -> std::result::Result<(), String> {
        let words = |error: io::Error| error.to_string();
        stream.set_read_timeout(Some(PATIENCE)).map_err(words)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(words)?;
        let connection = ServerConnection::new(self.tls.clone()).map_err(|e| e.to_string())?;
        let mut stream = BufReader::new(StreamOwned::new(connection, stream));
        let request = read_request(&mut stream).map_err(words)?;
        let peer = kontor_tls::peer(&stream.get_ref().conn).ok_or("a host without a key")?;
        let parts = self.answer(&peer, &request)?;
        let body = json!({ "lease": parts }).to_string();
        let mut stream = stream.into_inner();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
        write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).map_err(words)?;
        stream.conn.send_close_notify();
        stream.flush().map_err(words)
    }

    /// What the host is told; the gateway was told before.
    fn answer(&mut self, peer: &PublicKey, request: &[u8]) -> std::result::Result<Parts, String> {
        let words = |error: Error| crate::run::chain(&error);
        let record = read(&self.record).map_err(words)?;
        let bundle = read(&self.bundle).map_err(words)?;
        let issuer = Issuer {
            keyset: &self.loot.keyset,
            chain: &self.chain,
            lease_key: &self.loot.lease_key,
            lease_s: crate::scene::LEASE_S,
            pools: &self.pools,
        };
        let who = issuer.identify(peer, request, &record).map_err(|e| format!("{e:?}"))?;
        let issued = issuer.issue(&who, &bundle, &mut self.loot.memory, unix_now());
        let issued = issued.map_err(|e| format!("{e:?}"))?;
        let honest = Answer { parts: issued.parts, request: request.to_vec(), lease: issued.lease };
        let (first, then) = lock(&self.shared).lies.clone();
        let mut told = honest.clone();
        for lie in first.into_iter().chain([then]) {
            told = honest.clone();
            lie(&mut told, &mut self.loot);
            let heard = tell(&self.gateway, &told.to_gateway()).map_err(|e| e.to_string())?;
            lock(&self.shared).heard.push(heard);
        }
        if std::ptr::fn_addr_eq(then, truth as Lie) {
            self.loot.before = Some(honest);
        }
        Ok(told.parts)
    }
}

/// Tells the gateway one thing, as control does, and hears its answer.
fn tell(gateway: &Path, line: &Value) -> io::Result<Value> {
    let mut stream = UnixStream::connect(gateway)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// The body of one HTTP request whose head says how long it is.
fn read_request(stream: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut length = 0;
    let mut line = String::new();
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
            None if line.trim_end().is_empty() => break,
            Some(_) | None => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(body)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(at("read", path))
}

pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
