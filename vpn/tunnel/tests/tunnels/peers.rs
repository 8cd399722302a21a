//! Adding and removing peers.

use super::*;

fn gateway() -> (Tunnel<SocketAddr>, Instant) {
    let now = start();
    (Tunnel::new(Config { peers_max: 2, ..config(GATEWAY) }, now).unwrap(), now)
}

fn peer(number: u8, routes: Routes) -> PeerConfig<SocketAddr> {
    PeerConfig {
        public_key: PublicKey::from(&secret(number)),
        routes,
        start: Start::Listen,
        keepalive_s: None,
    }
}

#[test]
fn removed_peer_is_gone_with_its_session_and_may_come_back() {
    let mut pair = Pair::connected();
    let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    assert!(pair.gateway.remove_peer(pair.home));
    assert!(!pair.gateway.remove_peer(pair.home));
    assert_eq!(pair.gateway.status(pair.home), None);
    assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::UnknownSession));
    let down = packet(SERVER_V4, v4(VM), 64);
    assert_eq!(refusal(&mut pair.gateway, &down, pair.now), DropReason::NoRoute);
    assert!(pair.gateway.add_peer(&peer(VM, own(VM)), pair.now).is_ok());
}

#[test]
fn key_and_addresses_belong_to_one_peer() {
    let (mut gateway, now) = gateway();
    let id = gateway.add_peer(&peer(1, own(1)), now).unwrap();
    assert_eq!(gateway.peer_by_key(&PublicKey::from(&secret(1))), Some(id));
    assert_eq!(gateway.peer_by_address(v4(1)), Some(id));
    assert_eq!(gateway.peer_by_address(v6(1)), Some(id));
    assert_eq!(gateway.peer_by_address(v6(2)), None);
    assert_eq!(gateway.add_peer(&peer(1, own(2)), now), Err(AddPeerError::Key));
    let (IpAddr::V4(taken), IpAddr::V6(free)) = (v4(1), v6(2)) else { unreachable!() };
    assert_eq!(
        gateway.add_peer(&peer(2, Routes::Own { v4: taken, v6: free }), now),
        Err(AddPeerError::Address(v4(1)))
    );
    let (IpAddr::V4(free), IpAddr::V6(taken)) = (v4(2), v6(1)) else { unreachable!() };
    assert_eq!(
        gateway.add_peer(&peer(2, Routes::Own { v4: free, v6: taken }), now),
        Err(AddPeerError::Address(v6(1)))
    );
    assert!(gateway.add_peer(&peer(2, own(2)), now).is_ok());
}

#[test]
fn peer_for_everything_is_alone() {
    let (mut vm, now) = gateway();
    let id = vm.add_peer(&peer(1, Routes::Everything), now).unwrap();
    assert_eq!(vm.peer_by_address(SERVER_V4), Some(id));
    assert_eq!(vm.add_peer(&peer(2, own(2)), now), Err(AddPeerError::Everything));
    assert_eq!(vm.add_peer(&peer(2, Routes::Everything), now), Err(AddPeerError::Everything));
    assert!(vm.remove_peer(id));
    assert_eq!(vm.peer_by_address(SERVER_V4), None);
    assert!(vm.add_peer(&peer(2, own(2)), now).is_ok());
    assert_eq!(vm.add_peer(&peer(3, Routes::Everything), now), Err(AddPeerError::Everything));
}

#[test]
fn limit_on_peers_holds_at_its_edge() {
    let (mut gateway, now) = gateway();
    assert!(gateway.add_peer(&peer(1, own(1)), now).is_ok());
    assert!(gateway.add_peer(&peer(2, own(2)), now).is_ok());
    assert_eq!(gateway.add_peer(&peer(3, own(3)), now), Err(AddPeerError::TooMany(2)));
    assert!(Tunnel::<u8>::new(Config { peers_max: PEERS_MAX, ..config(1) }, now).is_ok());
    assert_eq!(
        Tunnel::<u8>::new(Config { peers_max: PEERS_MAX + 1, ..config(1) }, now).err(),
        Some(ConfigError::Peers(PEERS_MAX + 1))
    );
}

#[test]
fn limits_on_the_mtu_hold_at_their_edges() {
    let now = start();
    for (mtu, taken) in [(MTU_MIN - 1, false), (MTU_MIN, true), (MTU_MAX, true), (MTU_MAX + 1, false)] {
        let result = Tunnel::<u8>::new(Config { mtu, ..config(1) }, now);
        assert_eq!(result.err(), (!taken).then_some(ConfigError::Mtu(mtu)));
    }
}

#[test]
fn key_that_anybody_could_speak_for_is_refused() {
    let (mut gateway, now) = gateway();
    let mut low_order = [0; 32];
    for first in [0, 1] {
        low_order[0] = first;
        let config = PeerConfig { public_key: PublicKey::from(low_order), ..peer(1, own(1)) };
        assert_eq!(gateway.add_peer(&config, now), Err(AddPeerError::BadKey));
    }
    assert_eq!(gateway.add_peer(&peer(GATEWAY, own(1)), now), Err(AddPeerError::BadKey));
}
