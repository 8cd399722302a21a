//! A work VM's end of the tunnel.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use kontor_vpn::{
    Config, DATAGRAM_MAX, HANDSHAKES_PER_S, MTU_MAX, PeerConfig, PeerId, PublicKey, Routes, Start,
    StaticSecret, Tunnel,
};

use kontor_wire::post::{FromPost, MAX_FROM_GATEWAY, PORT, ToPost};
use kontor_wire::{Decoder, encode};

use crate::net::{self, ACK, FIN, RST, SYN};
use crate::office::Boot;
use crate::process::{Gateway, PATIENCE};

pub(crate) struct Vm {
    tunnel: Tunnel<SocketAddr>,
    peer: PeerId,
    socket: UdpSocket,
    gateway: SocketAddr,
    v4: IpAddr,
    v6: IpAddr,
    handshakes: usize,
    last_handshake: Option<Instant>,
}

fn secret(number: u8) -> StaticSecret {
    StaticSecret::from([number; 32])
}

/// The boot key with this number.
pub(crate) fn public_key(number: u8) -> [u8; 32] {
    *PublicKey::from(&secret(number)).as_bytes()
}

/// Whether a packet is an echo reply.
pub(crate) fn is_pong(packet: &[u8]) -> bool {
    match packet[0] >> 4 {
        4 => packet[9] == 1 && packet[20] == 0,
        _ => packet[6] == 58 && packet[40] == 129,
    }
}

impl Vm {
    /// The VM of a boot whose key has the number that its address ends in.
    pub(crate) fn new(gateway: &Gateway, boot: &Boot) -> Self {
        Self::with_key(gateway, boot, boot.v4.octets()[3])
    }

    pub(crate) fn with_key(gateway: &Gateway, boot: &Boot, number: u8) -> Self {
        let now = Instant::now();
        let config = Config {
            private_key: secret(number),
            mtu: MTU_MAX,
            handshakes_per_s_max: HANDSHAKES_PER_S,
            peers_max: 1,
            seed: [number; 32],
        };
        let mut tunnel = Tunnel::new(config, now).unwrap();
        let config = PeerConfig {
            public_key: PublicKey::from(gateway.public_key()),
            routes: Routes::Everything,
            start: Start::Connect(gateway.listen()),
            keepalive_s: Some(25),
        };
        let peer = tunnel.add_peer(&config, now).unwrap();
        Self {
            tunnel,
            peer,
            socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
            gateway: gateway.listen(),
            v4: boot.v4.into(),
            v6: boot.v6.into(),
            handshakes: 0,
            last_handshake: None,
        }
    }

    /// The VM's address of the same family.
    pub(crate) fn address(&self, like: IpAddr) -> IpAddr {
        if like.is_ipv4() { self.v4 } else { self.v6 }
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    pub(crate) fn handshakes(&self) -> usize {
        self.handshakes
    }

    /// Waits for the first session.
    pub(crate) fn connect(&mut self) {
        assert!(self.run(|vm, _| vm.handshakes > 0), "no session");
    }

    /// Says hello at the gateway's post (`post` is one of its inner addresses), over as little of TCP as there can be.
    pub(crate) fn hello(&mut self, post: IpAddr, lease_hash: [u8; 32]) -> FromPost {
        let ends = (self.address(post), post);
        let first = 1000;
        self.send_packet(&net::tcp(ends, PORT, (SYN, first, 0), b""));
        let segment = |packet: &[u8]| net::read_tcp(packet, PORT).is_some_and(|(flags, ..)| flags & ACK != 0);
        let packet = self.receive(segment).expect("the post accepts");
        let (flags, theirs, _) = net::read_tcp(&packet, PORT).unwrap();
        assert_eq!(flags, SYN | ACK);
        let hello = encode(&ToPost::Hello { lease_hash });
        self.send_packet(&net::tcp(ends, PORT, (ACK, first + 1, theirs + 1), &hello));
        let mut decoder = Decoder::new(MAX_FROM_GATEWAY);
        let mut expected = theirs + 1;
        loop {
            let packet = self.receive(segment).expect("the post answers");
            let (flags, number, content) = net::read_tcp(&packet, PORT).unwrap();
            if number != expected {
                continue;
            }
            decoder.push(content);
            expected += u32::try_from(content.len()).unwrap();
            if flags & FIN != 0 {
                // Nothing more comes after this, not even from the kernel's timers.
                let sent = first + 1 + u32::try_from(hello.len()).unwrap();
                self.send_packet(&net::tcp(ends, PORT, (RST | ACK, sent, expected + 1), b""));
                return decoder.next_message().unwrap().expect("an answer");
            }
        }
    }

    /// Forgets its session and makes another.
    pub(crate) fn reconnect(&mut self) {
        let before = self.handshakes;
        self.tunnel.reconnect(self.peer, Instant::now());
        assert!(self.run(|vm, _| vm.handshakes > before), "no session");
    }

    pub(crate) fn move_to_another_port(&mut self) {
        self.socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    }

    /// Whether a ping is answered.
    pub(crate) fn ping(&mut self, server: IpAddr) -> bool {
        self.send_ping(server);
        self.receive(|packet| is_pong(packet) && packet[0] >> 4 == if server.is_ipv4() { 4 } else { 6 })
            .is_some()
    }

    pub(crate) fn send_ping(&mut self, server: IpAddr) {
        self.send_packet(&net::ping(self.address(server), server));
    }

    pub(crate) fn send_udp(&mut self, server: IpAddr, port: u16, content: &[u8]) {
        self.send_packet(&net::udp(self.address(server), server, port, content));
    }

    pub(crate) fn send_packet(&mut self, packet: &[u8]) {
        let mut out = [0; DATAGRAM_MAX];
        let transmit = self.tunnel.handle_packet(packet, &mut out, Instant::now()).unwrap();
        let transmit = transmit.expect("there is a session");
        self.socket.send_to(&out[..transmit.len], transmit.to).unwrap();
    }

    /// The next packet that `wanted` likes; `None` when none comes in time.
    pub(crate) fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let mut found = None;
        self.run(|_, packet| {
            found = packet.filter(|packet| wanted(packet)).map(<[u8]>::to_vec);
            found.is_some()
        });
        found
    }

    /// Sends what the tunnel wants to send.
    pub(crate) fn flush(&mut self) {
        let mut out = [0; DATAGRAM_MAX];
        while let Some(transmit) = self.tunnel.poll_transmit(&mut out) {
            self.socket.send_to(&out[..transmit.len], transmit.to).unwrap();
        }
    }

    /// Whether nothing has come that was not received yet.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let received = self.socket.recv(&mut [0; DATAGRAM_MAX]);
        self.socket.set_nonblocking(false).unwrap();
        received.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Runs the tunnel until `done` says so after a datagram, false when it does not in time.
    fn run(&mut self, mut done: impl FnMut(&Self, Option<&[u8]>) -> bool) -> bool {
        let end = Instant::now() + PATIENCE;
        let (mut datagram, mut out) = ([0; DATAGRAM_MAX], [0; DATAGRAM_MAX]);
        loop {
            let now = Instant::now();
            if now >= end {
                return false;
            }
            self.tunnel.handle_timers(now);
            self.flush();
            let due = self.tunnel.next_timeout().unwrap_or(end).min(end);
            let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(wait)).unwrap();
            let Ok((len, from)) = self.socket.recv_from(&mut datagram) else { continue };
            assert_eq!(from, self.gateway);
            let received = self.tunnel.handle_datagram(from, &datagram[..len], &mut out, Instant::now());
            let packet = received.ok().flatten().map(|received| received.packet.to_vec());
            self.flush();
            let last = self.tunnel.status(self.peer).unwrap().last_handshake;
            if last != self.last_handshake {
                self.last_handshake = last;
                self.handshakes += 1;
            }
            if done(self, packet.as_deref()) {
                return true;
            }
        }
    }
}
