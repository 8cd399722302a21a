//! Allowed IPs that overlap.

use super::*;

/// Two peers that know where each other is, and speak when they have something to say.
fn foreign(number: u8, other: u8, start: Start<SocketAddr>, now: Instant) -> (Tunnel<SocketAddr>, PeerId) {
    let mut tunnel = Tunnel::new(config(number), now).unwrap();
    let peer = PeerConfig {
        public_key: PublicKey::from(&secret(other)),
        routes: Routes::Allowed,
        start,
        keepalive_s: None,
    };
    let id = tunnel.add_peer(&peer, now).unwrap();
    (tunnel, id)
}

#[test]
fn peer_does_not_speak_for_a_network_within_its_own_that_is_anothers() {
    let now = start();
    let (mut hub, first) = foreign(GATEWAY, 1, Start::Listen, now);
    let second = PeerConfig {
        public_key: PublicKey::from(&secret(2)),
        routes: Routes::Allowed,
        start: Start::Listen,
        keepalive_s: None,
    };
    let second = hub.add_peer(&second, now).unwrap();
    assert!(hub.allow(first, "10.9.0.0/16".parse().unwrap()));
    assert!(hub.allow(second, "10.9.0.2/32".parse().unwrap()));
    let (mut spoke, office) = foreign(1, GATEWAY, Start::Ask(OFFICE), now);
    assert!(spoke.allow(office, "0.0.0.0/0".parse().unwrap()));

    // Nothing is said until there is something to send.
    assert!(drain(&mut spoke).is_empty());
    assert_eq!(spoke.handle_packet(&packet(v4(1), SERVER_V4, 64), &mut [0; DATAGRAM_MAX], now), Ok(None));
    let [(to, initiation)] = drain(&mut spoke).try_into().unwrap();
    assert_eq!((to, open(&mut hub, HOME, &initiation, now)), (OFFICE, Ok(None)));
    let [(_, answer)] = drain(&mut hub).try_into().unwrap();
    assert_eq!(open(&mut spoke, OFFICE, &answer, now), Ok(None));
    for (_, waited) in drain(&mut spoke) {
        let _ = open(&mut hub, HOME, &waited, now).unwrap();
    }
    let mut up = |hub: &mut Tunnel<SocketAddr>, source: IpAddr| {
        let (_, datagram) = seal(&mut spoke, &packet(source, SERVER_V4, 64), now);
        open(hub, HOME, &datagram, now).map(|received| received.unwrap().0)
    };
    assert_eq!(up(&mut hub, v4(1)), Ok(first));
    assert_eq!(up(&mut hub, v4(2)), Err(DropReason::Source));
    assert_eq!(up(&mut hub, SERVER_V4), Err(DropReason::Source));
    assert_eq!((hub.peer_by_address(v4(2)), hub.peer_by_address(v4(3))), (Some(second), Some(first)));
    assert!(hub.remove_peer(second));
    assert_eq!(up(&mut hub, v4(2)), Ok(first));
    hub.disallow(first, "10.9.0.0/16".parse().unwrap());
    assert_eq!(up(&mut hub, v4(1)), Err(DropReason::Source));
}

#[test]
fn peer_with_addresses_of_its_own_is_allowed_no_others() {
    let mut pair = Pair::connected();
    assert!(!pair.gateway.allow(pair.home, "10.0.0.0/8".parse().unwrap()));
    assert_eq!(pair.gateway.peer_by_address(SERVER_V4), None);
}
