//! Packets that wait for a session.

use super::*;

const WAITING_MAX: usize = 16;

#[test]
fn packets_wait_for_the_session_and_keep_their_order() {
    let mut pair = Pair::strangers();
    let packets: Vec<_> = (0..WAITING_MAX).map(|n| packet(v4(VM), SERVER_V4, 40 + n)).collect();
    for packet in &packets {
        assert_eq!(pair.vm.handle_packet(packet, &mut [0; DATAGRAM_MAX], pair.now), Ok(None));
    }
    let one_more = packet(v4(VM), SERVER_V4, 40);
    assert_eq!(refusal(&mut pair.vm, &one_more, pair.now), DropReason::Waiting);
    let (_, hello) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
    let (_, answer) = drain(&mut pair.gateway).remove(0);
    assert_eq!(open(&mut pair.vm, OFFICE, &answer, pair.now), Ok(None));
    let arrived: Vec<_> = drain(&mut pair.vm)
        .iter()
        .filter_map(|(_, datagram)| open(&mut pair.gateway, HOME, datagram, pair.now).unwrap())
        .map(|(_, packet)| packet)
        .collect();
    assert_eq!(arrived, packets);
    assert!(pair.vm.handle_packet(&one_more, &mut [0; DATAGRAM_MAX], pair.now).unwrap().is_some());
}

#[test]
fn gateway_sends_nothing_to_a_peer_that_has_not_spoken() {
    let mut pair = Pair::strangers();
    let down = packet(SERVER_V4, v4(VM), 64);
    assert_eq!(refusal(&mut pair.gateway, &down, pair.now), DropReason::NoEndpoint);
    assert_eq!(drain(&mut pair.gateway), []);
}

#[test]
fn gateway_whose_session_is_gone_begins_one_for_a_packet() {
    let mut pair = Pair::connected();
    pair.gateway.reconnect(pair.home, pair.now);
    let down = packet(SERVER_V4, v4(VM), 64);
    assert_eq!(pair.gateway.handle_packet(&down, &mut [0; DATAGRAM_MAX], pair.now), Ok(None));
    let (_, hello) = drain(&mut pair.gateway).remove(0);
    assert_eq!(open(&mut pair.vm, OFFICE, &hello, pair.now), Ok(None));
    let (_, answer) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOME, &answer, pair.now), Ok(None));
    let arrived: Vec<_> = drain(&mut pair.gateway)
        .iter()
        .filter_map(|(_, datagram)| open(&mut pair.vm, OFFICE, datagram, pair.now).unwrap())
        .map(|(_, packet)| packet)
        .collect();
    assert_eq!(arrived, [down]);
}

#[test]
fn answers_nobody_fetches_are_counted_once_there_is_no_room() {
    let loaded = Config { handshakes_per_s_max: 0, ..config(GATEWAY) };
    let mut pair = Pair::made_of(config(VM), loaded, None);
    let (_, hello) = drain(&mut pair.vm).remove(0);
    for _ in 0..64 {
        assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::Load));
    }
    assert_eq!(pair.gateway.drops().get(DropReason::NoRoom), 0);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::Load));
    assert_eq!(pair.gateway.drops().get(DropReason::NoRoom), 1);
    assert_eq!(drain(&mut pair.gateway).len(), 64);
}
