//! `wg`: a WireGuard interface that wg(8) configures, without an office: the same data path, and every packet of an
//! allowed address passes.
//!
//! What is set is remembered as wg(8) understands it ([`Model`]); what differs from before is then done to the tunnel.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use kontor_gateway::uapi::{self, Device, Errno, Model, Set, State, StatePeer};
use kontor_vpn::{
    Config, ConfigError, HANDSHAKES_PER_S, MTU_MAX, PEERS_MAX, PeerConfig, PeerId, PublicKey, Routes, Start,
    StaticSecret, Tunnel,
};
use rustix::event::EventfdFlags;

use crate::filter::{Direction, Refusal};
use crate::plane::{self, Core, Judge, Plane};
use crate::socket::{Endpoint, Sockets};
use crate::{random, sys};

/// Why there is no interface, or none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WgError {
    #[error("{step} the interface {name} (this needs CAP_NET_ADMIN and /dev/net/tun)")]
    Tun { step: &'static str, name: String, source: io::Error },
    #[error(transparent)]
    Socket(#[from] uapi::SocketError),
    #[error("open a UDP port")]
    Port(#[source] io::Error),
    #[error("make the tunnel")]
    Tunnel(#[source] ConfigError),
    #[error("{0}")]
    Kernel(&'static str, #[source] io::Error),
    #[error("the data path ended")]
    Plane(#[source] io::Error),
}

/// Allowed addresses are the tunnel's matter; nothing else is asked.
struct Everyone;

impl Judge for Everyone {
    fn check(&self, _: PeerId, _: &[u8], _: Direction) -> Result<(), Refusal> {
        Ok(())
    }

    fn tend(&mut self, _: &mut Tunnel<Endpoint>) -> io::Result<Option<Duration>> {
        Ok(None)
    }
}

/// Runs the interface until a signal comes or its socket is removed.
pub(crate) fn run(name: &str) -> Result<(), WgError> {
    let kernel = |what| move |source| WgError::Kernel(what, source);
    let signals = sys::termination().map_err(kernel("catch signals"))?;
    let tun = |step| move |source| WgError::Tun { step, name: name.to_owned(), source };
    let made = kontor_tun::create_offloading(name).map_err(tun("make"))?;
    kontor_tun::configure(name, &[], MTU_MAX).map_err(tun("configure"))?;
    let socket = uapi::Socket::bind(Path::new(uapi::DIRECTORY), name)?;
    let sockets = Sockets::bind_port(0).map_err(WgError::Port)?;
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let eventfd = || rustix::event::eventfd(0, flags).map_err(io::Error::from);
    let (wake, stop) =
        eventfd().and_then(|wake| Ok((wake, eventfd()?))).map_err(kernel("make an eventfd"))?;
    // Until there is a key, one that nobody knows and no peer.
    let tunnel = tunnel(StaticSecret::from(random().map_err(kernel("read randomness"))?))?;
    let mut model = Model::default();
    model.0.listen_port = sockets.port();
    let plane = Plane::new(tunnel, Everyone, sockets, made, wake, signals);
    std::thread::scope(|scope| {
        let (plane, socket, stop) = (&plane, &socket, &stop);
        let serve = move || {
            let mut interface = Interface { model, plane, peers: BTreeMap::new() };
            let ended = socket.serve(&mut interface, stop.as_fd());
            // It was removed, or cannot go on: so does the interface.
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)?;
            ended
        };
        let thread = std::thread::Builder::new().name("configuration".to_owned()).spawn_scoped(scope, serve);
        let thread = thread.map_err(kernel("start a thread"))?;
        tracing::info!(%name, "ready");
        let result = plane.run().map_err(WgError::Plane);
        plane::ring(stop).map_err(kernel("stop a thread"))?;
        match thread.join() {
            Ok(Ok(end)) => tracing::info!(?end, drops = %plane.core().drops(), "ends"),
            Ok(Err(source)) => return Err(WgError::Kernel("serve the configuration socket", source)),
            Err(_) => {
                return Err(WgError::Kernel(
                    "serve the configuration socket",
                    io::Error::other("it panicked"),
                ));
            }
        }
        result
    })
}

fn tunnel(private_key: StaticSecret) -> Result<Tunnel<Endpoint>, WgError> {
    let seed = random().map_err(|source| WgError::Kernel("read randomness", source))?;
    let config = Config {
        private_key,
        mtu: MTU_MAX,
        handshakes_per_s_max: HANDSHAKES_PER_S,
        peers_max: PEERS_MAX,
        seed,
    };
    Tunnel::new(config, Instant::now()).map_err(WgError::Tunnel)
}

/// The interface as wg(8) sees it.
struct Interface<'p> {
    model: Model,
    plane: &'p Plane<Everyone>,
    /// Those of the model that the tunnel has: all, once there is a private key.
    peers: BTreeMap<[u8; 32], PeerId>,
}

impl Device for Interface<'_> {
    fn get(&mut self) -> Result<State, Errno> {
        let mut state = self.model.get()?;
        let core = self.plane.core();
        let (now, wall) = (Instant::now(), SystemTime::now());
        for peer in &mut state.peers {
            let id = self.peers.get(peer.public_key.as_bytes());
            let Some(status) = id.and_then(|id| core.tunnel.status(*id)) else { continue };
            peer.endpoint = status.endpoint.map(|endpoint| endpoint.address).or(peer.endpoint);
            let age = status.last_handshake.map(|at| now.saturating_duration_since(at));
            peer.last_handshake = age.and_then(|age| wall.checked_sub(age));
            (peer.tx_bytes, peer.rx_bytes) = (status.traffic.tx_bytes, status.traffic.rx_bytes);
        }
        Ok(state)
    }

    fn set(&mut self, set: Set) -> Result<(), Errno> {
        let mut wanted = self.model.clone();
        wanted.set(set)?;
        if wanted.0.fwmark != 0 || wanted.0.peers.iter().any(|peer| peer.preshared_key.is_some()) {
            return Err(Errno::OPNOTSUPP);
        }
        if wanted.0.peers.len() > PEERS_MAX {
            return Err(Errno::NOSPC);
        }
        if wanted.0.listen_port != self.model.0.listen_port {
            let sockets = Sockets::bind_port(wanted.0.listen_port)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            wanted.0.listen_port = sockets.port();
            self.plane.rebind(sockets);
        }
        let key = |model: &Model| model.0.private_key.as_ref().map(|key| *key.as_bytes());
        let mut core = self.plane.core();
        if key(&wanted) != key(&self.model) {
            let secret = wanted.0.private_key.as_ref().map(uapi::Secret::to_private_key);
            let secret =
                secret.map_or_else(|| random().map(StaticSecret::from), Ok).map_err(|_| Errno::IO)?;
            core.tunnel = tunnel(secret).map_err(|_| Errno::IO)?;
            self.peers.clear();
            self.model.0.peers.clear();
        }
        if wanted.0.private_key.is_some() {
            self.apply(&wanted.0, &mut core);
        }
        self.model = wanted;
        drop(core);
        plane::ring(&self.plane.wake).map_err(|_| Errno::IO)
    }
}

impl Interface<'_> {
    /// Does to the tunnel what makes it have `wanted`'s peers.
    fn apply(&mut self, wanted: &State, core: &mut Core<Everyone>) {
        let now = Instant::now();
        let by_key = |peers: &[StatePeer]| -> BTreeMap<[u8; 32], StatePeer> {
            peers.iter().map(|peer| (*peer.public_key.as_bytes(), peer.clone())).collect()
        };
        let (before, after) = (by_key(&self.model.0.peers), by_key(&wanted.peers));
        for (key, id) in std::mem::take(&mut self.peers) {
            let same = before.get(&key).zip(after.get(&key)).is_some_and(|(before, after)| {
                (before.endpoint, before.persistent_keepalive_s)
                    == (after.endpoint, after.persistent_keepalive_s)
            });
            if same {
                self.peers.insert(key, id);
            } else {
                core.tunnel.remove_peer(id);
            }
        }
        for (key, peer) in &after {
            let made = self.peers.get(key).copied();
            let Some(id) = made.or_else(|| add(&mut core.tunnel, peer, now)) else { continue };
            let before = made.and_then(|_| before.get(key)).map_or(&[][..], |before| &before.allowed_ips);
            for gone in before.iter().filter(|network| !peer.allowed_ips.contains(network)) {
                core.tunnel.disallow(id, *gone);
            }
            self.peers.insert(*key, id);
        }
        // Last, when nobody has any longer what another one gets.
        for (key, peer) in &after {
            if let Some(id) = self.peers.get(key) {
                for network in &peer.allowed_ips {
                    core.tunnel.allow(*id, *network);
                }
            }
        }
    }
}

fn add(tunnel: &mut Tunnel<Endpoint>, peer: &StatePeer, now: Instant) -> Option<PeerId> {
    let endpoint = |address: SocketAddr| Endpoint { socket: Sockets::of_family(&address), address };
    let config = PeerConfig {
        public_key: peer.public_key,
        routes: Routes::Allowed,
        start: peer.endpoint.map_or(Start::Listen, |address| Start::Ask(endpoint(address))),
        keepalive_s: Some(peer.persistent_keepalive_s).filter(|seconds| *seconds > 0),
    };
    match tunnel.add_peer(&config, now) {
        Ok(id) => Some(id),
        Err(error) => {
            tracing::warn!(peer = %hex(&peer.public_key), %error, "a peer could not be made");
            None
        }
    }
}

fn hex(key: &PublicKey) -> String {
    hex::encode(key.as_bytes())
}
