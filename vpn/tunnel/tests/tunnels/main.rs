//! Tunnels in memory, one against the other.
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod allowed;
mod clock;
mod data;
mod handshake;
mod hostile;
mod peers;
mod roaming;
mod waiting;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use kontor_vpn::{
    AddPeerError, Config, ConfigError, DATAGRAM_MAX, DropReason, HANDSHAKES_PER_S, MTU_MAX, MTU_MIN,
    OVERHEAD, PEERS_MAX, PeerConfig, PeerId, PublicKey, Routes, Start, StaticSecret, Tunnel,
};
use proptest::prelude::*;

const OFFICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 51820);
const HOME: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 40000);
const HOTEL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)), 40001);
const SERVER_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 80));
const SERVER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x80));
const UDP: u8 = 17;
const PACKET_MAX: usize = MTU_MAX as usize;

/// The one reading of the clock; the time of a test then goes on as the test says.
#[expect(clippy::disallowed_methods, reason = "a test is where time comes from")]
fn start() -> Instant {
    Instant::now()
}

fn secret(number: u8) -> StaticSecret {
    StaticSecret::from([number; 32])
}

fn config(number: u8) -> Config {
    Config {
        private_key: secret(number),
        mtu: MTU_MAX,
        handshakes_per_s_max: HANDSHAKES_PER_S,
        peers_max: 8,
        seed: [number; 32],
    }
}

fn own(number: u8) -> Routes {
    Routes::Own {
        v4: Ipv4Addr::new(10, 9, 0, number),
        v6: Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(number)),
    }
}

fn v4(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 9, 0, number).into()
}

fn v6(number: u8) -> IpAddr {
    Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(number)).into()
}

/// A packet of `len` bytes whose content is easy to tell from padding.
fn packet(source: IpAddr, destination: IpAddr, len: usize) -> Vec<u8> {
    let mut packet = vec![0xA5; len];
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet[..12].fill(0);
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
            packet[9] = UDP;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[..8].fill(0);
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
            packet[6] = UDP;
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
        }
        _ => panic!("a packet has one family"),
    }
    packet
}

type Datagram = (SocketAddr, Vec<u8>);

fn drain(tunnel: &mut Tunnel<SocketAddr>) -> Vec<Datagram> {
    let mut out = [0; DATAGRAM_MAX];
    let mut datagrams = Vec::new();
    while let Some(transmit) = tunnel.poll_transmit(&mut out) {
        datagrams.push((transmit.to, out[..transmit.len].to_vec()));
    }
    datagrams
}

fn seal(tunnel: &mut Tunnel<SocketAddr>, packet: &[u8], now: Instant) -> Datagram {
    let mut out = [0; DATAGRAM_MAX];
    let transmit = tunnel.handle_packet(packet, &mut out, now).unwrap().expect("there is a session");
    (transmit.to, out[..transmit.len].to_vec())
}

fn refusal(tunnel: &mut Tunnel<SocketAddr>, packet: &[u8], now: Instant) -> DropReason {
    tunnel.handle_packet(packet, &mut [0; DATAGRAM_MAX], now).unwrap_err()
}

/// The packet in a datagram and the peer that it is from.
fn open(
    tunnel: &mut Tunnel<SocketAddr>,
    from: SocketAddr,
    datagram: &[u8],
    now: Instant,
) -> Result<Option<(PeerId, Vec<u8>)>, DropReason> {
    let mut out = [0; DATAGRAM_MAX];
    let received = tunnel.handle_datagram(from, datagram, &mut out, now)?;
    Ok(received.map(|received| (received.peer, received.packet.to_vec())))
}

/// A work VM and its gateway, and the two ends' words for each other.
struct Pair {
    vm: Tunnel<SocketAddr>,
    gateway: Tunnel<SocketAddr>,
    /// The gateway, in the VM.
    office: PeerId,
    /// The VM, in the gateway.
    home: PeerId,
    now: Instant,
}

const VM: u8 = 1;
const GATEWAY: u8 = 100;

impl Pair {
    fn strangers() -> Self {
        Self::made_of(config(VM), config(GATEWAY), None)
    }

    fn made_of(vm: Config, gateway: Config, keepalive_s: Option<u16>) -> Self {
        let now = start();
        let (vm_key, gateway_key) = (PublicKey::from(&vm.private_key), PublicKey::from(&gateway.private_key));
        let mut vm = Tunnel::new(vm, now).unwrap();
        let mut gateway = Tunnel::new(gateway, now).unwrap();
        let home = gateway
            .add_peer(
                &PeerConfig { public_key: vm_key, routes: own(VM), start: Start::Listen, keepalive_s: None },
                now,
            )
            .unwrap();
        let office = vm
            .add_peer(
                &PeerConfig {
                    public_key: gateway_key,
                    routes: Routes::Everything,
                    start: Start::Connect(OFFICE),
                    keepalive_s,
                },
                now,
            )
            .unwrap();
        Self { vm, gateway, office, home, now }
    }

    fn connected() -> Self {
        let mut pair = Self::strangers();
        pair.shake_hands();
        pair
    }

    /// Carries what both want to send until both are silent.
    fn shake_hands(&mut self) {
        loop {
            let up = drain(&mut self.vm);
            for (to, datagram) in &up {
                assert_eq!(*to, OFFICE);
                let _ = open(&mut self.gateway, HOME, datagram, self.now);
            }
            let down = drain(&mut self.gateway);
            for (to, datagram) in &down {
                assert_eq!(*to, HOME);
                let _ = open(&mut self.vm, OFFICE, datagram, self.now);
            }
            if up.is_empty() && down.is_empty() {
                break;
            }
        }
    }

    /// Sends a packet from the VM to the office and says what came out there.
    fn up(&mut self, packet: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
        let (_, datagram) = seal(&mut self.vm, packet, self.now);
        let received = open(&mut self.gateway, HOME, &datagram, self.now)?;
        Ok(received.map(|(peer, packet)| {
            assert_eq!(peer, self.home);
            packet
        }))
    }

    fn down(&mut self, packet: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
        let (to, datagram) = seal(&mut self.gateway, packet, self.now);
        assert_eq!(to, HOME);
        let received = open(&mut self.vm, OFFICE, &datagram, self.now)?;
        Ok(received.map(|(peer, packet)| {
            assert_eq!(peer, self.office);
            packet
        }))
    }
}

/// A datagram of a VM's initiation: the first thing that a new tunnel says.
fn initiation(number: u8, now: Instant) -> Vec<u8> {
    let mut vm = Tunnel::new(config(number), now).unwrap();
    vm.add_peer(
        &PeerConfig {
            public_key: PublicKey::from(&secret(GATEWAY)),
            routes: Routes::Everything,
            start: Start::Connect(OFFICE),
            keepalive_s: None,
        },
        now,
    )
    .unwrap();
    drain(&mut vm).remove(0).1
}

/// A VM whose kernel lies: boringtun's own `Tunn` with nothing of ours around it.
struct Rogue(Tunn);

impl Rogue {
    /// Takes the place of the pair's VM.
    fn connected(pair: &mut Pair) -> Self {
        let gateway = PublicKey::from(&secret(GATEWAY));
        let mut tunn = Tunn::new(secret(VM), gateway, None, None, 7, None);
        let mut scratch = [0; DATAGRAM_MAX];
        let hello = message(tunn.format_handshake_initiation(&mut scratch, false));
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
        let (_, answer) = drain(&mut pair.gateway).remove(0);
        let confirmation = message(tunn.decapsulate(None, &answer, &mut scratch));
        assert_eq!(open(&mut pair.gateway, HOME, &confirmation, pair.now), Ok(None));
        Self(tunn)
    }

    fn seal(&mut self, plaintext: &[u8]) -> Vec<u8> {
        message(self.0.encapsulate(plaintext, &mut [0; DATAGRAM_MAX]))
    }
}

fn message(result: TunnResult<'_>) -> Vec<u8> {
    let TunnResult::WriteToNetwork(message) = result else {
        panic!("{result:?}");
    };
    message.to_vec()
}
