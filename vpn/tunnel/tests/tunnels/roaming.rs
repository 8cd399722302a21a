//! Peers whose address changes.

use super::*;

#[test]
fn endpoint_moves_with_an_authenticated_packet() {
    let mut pair = Pair::connected();
    let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    assert!(open(&mut pair.gateway, HOTEL, &datagram, pair.now).unwrap().is_some());
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOTEL));
    let (to, _) = seal(&mut pair.gateway, &packet(SERVER_V4, v4(VM), 64), pair.now);
    assert_eq!(to, HOTEL);
}

#[test]
fn repeated_datagram_moves_no_endpoint() {
    let mut pair = Pair::connected();
    let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    assert!(open(&mut pair.gateway, HOME, &datagram, pair.now).is_ok());
    assert_eq!(open(&mut pair.gateway, HOTEL, &datagram, pair.now), Err(DropReason::Replayed));
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
}

#[test]
fn initiation_is_answered_where_it_came_from_and_moves_no_endpoint() {
    let mut pair = Pair::connected();
    pair.vm.reconnect(pair.office, pair.now);
    let (_, hello) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOTEL, &hello, pair.now), Ok(None));
    let (to, answer) = drain(&mut pair.gateway).remove(0);
    assert_eq!(to, HOTEL);
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
    assert_eq!(open(&mut pair.vm, OFFICE, &answer, pair.now), Ok(None));
    let (_, keepalive) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOTEL, &keepalive, pair.now), Ok(None));
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOTEL));
}
