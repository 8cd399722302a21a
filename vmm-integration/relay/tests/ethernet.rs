//! The relay on an uplink of datagrams, each of them an Ethernet frame.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod wires;

use kontor_relay::{
    End, Limits, Rate, Relay, RelayError, Uplink, Wires,
    message::{FromDaemon, FromRelay},
};
use kontor_wire::uplink::{Frame, GUEST_TO_RELAY, GatewayId, MAX_FRAME, RELAY_TO_GUEST, header};
use std::{
    net::{SocketAddr, UdpSocket},
    os::unix::net::UnixDatagram,
    thread::{self, JoinHandle},
};
use wires::{Daemon, GATEWAY, PATIENCE, daemon, localhost, packets, receive, transport};

struct World {
    guest: UnixDatagram,
    daemon: Daemon,
    gateway: UdpSocket,
    relay_v4: SocketAddr,
    relay: JoinHandle<Result<End, RelayError>>,
}

impl World {
    fn with(limits: Limits) -> Self {
        let (guest, uplink) = packets();
        let (guest, uplink) = (UnixDatagram::from(guest), UnixDatagram::from(uplink));
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        uplink.set_nonblocking(true).unwrap();
        let ((daemon, control), gateway) = (daemon(), localhost());
        let wires = Wires { uplink: Uplink::Ethernet(uplink), control };
        let relay = thread::spawn(move || Relay::new(wires, limits).run());
        assert_eq!(daemon.hear(), FromRelay::Ready);
        let relay_v4 = daemon.connect(&gateway);
        Self { guest, daemon, gateway, relay_v4, relay }
    }

    fn guest_sends(&self, segment: usize, payload: &[u8]) {
        let inner = header(GatewayId(GATEWAY), segment, payload).unwrap();
        self.guest.send(&[&GUEST_TO_RELAY[..], &inner, payload].concat()).unwrap();
    }

    fn gateway_receives(&self) -> Vec<u8> {
        receive(&self.gateway).0
    }

    fn guest_receives(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let length = self.guest.recv(&mut bytes).unwrap();
        let frame = Frame::parse_ethernet(&bytes[..length], &RELAY_TO_GUEST).unwrap();
        assert_eq!(frame.gateway(), GatewayId(GATEWAY));
        frame.payload().to_vec()
    }
}

#[test]
fn datagrams_go_to_the_gateway_and_come_back() {
    let world = World::with(Limits::default());
    for length in [32, 144, 1452] {
        world.guest_sends(length, &transport(length, 1));
        assert_eq!(world.gateway_receives(), transport(length, 1));
        world.gateway.send_to(&transport(length, 2), world.relay_v4).unwrap();
        assert_eq!(world.guest_receives(), transport(length, 2));
    }
    assert_eq!((world.daemon.counters().up.frames, world.daemon.counters().down.datagrams), (3, 3));
    world.daemon.say(&FromDaemon::Shutdown);
    assert_eq!(world.relay.join().unwrap().unwrap(), End::Shutdown);
}

#[test]
fn train_is_taken_apart() {
    let world = World::with(Limits::default());
    let train = [transport(96, 1), transport(96, 2), transport(48, 3)];
    world.guest_sends(96, &train.concat());
    let received = [world.gateway_receives(), world.gateway_receives(), world.gateway_receives()];
    assert_eq!(received, train);
}

#[test]
fn datagram_that_has_not_wireguards_shape_goes_neither_way() {
    let world = World::with(Limits::default());
    world.guest_sends(96, &[3; 96]);
    world.guest_sends(96, &transport(96, 4));
    assert_eq!(world.gateway_receives(), transport(96, 4));
    world.gateway.send_to(&[3; 96], world.relay_v4).unwrap();
    world.gateway.send_to(&transport(96, 5), world.relay_v4).unwrap();
    assert_eq!(world.guest_receives(), transport(96, 5));
    assert_eq!(
        (world.daemon.counters().up.not_wireguard, world.daemon.counters().down.not_wireguard),
        (1, 1)
    );
}

#[test]
fn frame_of_another_type_or_between_others_is_counted_and_goes_nowhere() {
    let world = World::with(Limits::default());
    let inner = [&header(GatewayId(GATEWAY), 96, &transport(96, 3)).unwrap()[..], &transport(96, 3)].concat();
    let mut arp = [&GUEST_TO_RELAY[..], &inner].concat();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    world.guest.send(&arp).unwrap();
    world.guest.send(&[&RELAY_TO_GUEST[..], &inner].concat()).unwrap();
    world.guest.send(&inner).unwrap();
    world.guest.send(&[&GUEST_TO_RELAY[..], &[1; MAX_FRAME + 1]].concat()).unwrap();
    world.guest_sends(96, &transport(96, 4));
    assert_eq!(world.gateway_receives(), transport(96, 4));
    assert_eq!((world.daemon.counters().up.malformed, world.daemon.counters().up.frames), (4, 1));
}

#[test]
fn guest_that_goes_ends_the_relay() {
    let world = World::with(Limits::default());
    drop(world.guest);
    assert_eq!(world.relay.join().unwrap().unwrap(), End::UplinkClosed);
}

#[test]
fn one_malformed_frame_too_many_ends_the_relay() {
    let limits = Limits { malformed: Rate { per_s: 0, burst: 2 }, ..Limits::default() };
    let world = World::with(limits);
    for _ in 0..3 {
        world.guest.send(&[0xff; 60]).unwrap();
    }
    assert_eq!(
        world.daemon.hear(),
        FromRelay::Garbage("an Ethernet frame that is none of the uplink's".into())
    );
    assert_eq!(world.relay.join().unwrap().unwrap(), End::Garbage);
}

#[test]
fn guest_that_does_not_read_costs_its_own_datagrams_only() {
    let world = World::with(Limits::default());
    let dropped = loop {
        for _ in 0..100 {
            world.gateway.send_to(&transport(1408, 9), world.relay_v4).unwrap();
        }
        let dropped = world.daemon.counters().down.guest_full;
        if dropped > 0 {
            break dropped;
        }
    };
    assert!(dropped > 0);
    // The other direction still works, and what was kept arrives.
    world.guest_sends(96, &transport(96, 5));
    assert_eq!(world.gateway_receives(), transport(96, 5));
    assert_eq!(world.guest_receives(), transport(1408, 9));
}
