//! Packets through a session: both families, lengths, padding, routes.

use super::*;

#[test]
fn packets_of_both_families_pass_both_ways() {
    let mut pair = Pair::connected();
    for (mine, theirs) in [(v4(VM), SERVER_V4), (v6(VM), SERVER_V6)] {
        let up = packet(mine, theirs, 100);
        assert_eq!(pair.up(&up), Ok(Some(up)));
        let down = packet(theirs, mine, 100);
        assert_eq!(pair.down(&down), Ok(Some(down)));
    }
    let status = pair.gateway.status(pair.home).unwrap();
    assert!(status.established);
    assert_eq!(status.endpoint, Some(HOME));
    assert_eq!(status.last_handshake, Some(pair.now));
    let traffic = status.traffic;
    assert_eq!((traffic.rx_packets, traffic.rx_bytes), (2, 200));
    assert_eq!((traffic.tx_packets, traffic.tx_bytes), (2, 200));
    assert_eq!(pair.vm.status(pair.office).unwrap().traffic, traffic);
    assert!(pair.gateway.drops().iter().chain(pair.vm.drops().iter()).all(|(_, count)| count == 0));
}

#[test]
fn plaintext_is_padded_to_sixteen_bytes_on_the_wire_and_trimmed_behind_it() {
    let mut pair = Pair::connected();
    for len in 20..=PACKET_MAX {
        let sent = packet(v4(VM), SERVER_V4, len);
        let (_, datagram) = seal(&mut pair.vm, &sent, pair.now);
        assert_eq!(datagram.len(), len.next_multiple_of(16).min(PACKET_MAX) + OVERHEAD, "{len} bytes");
        let (_, received) = open(&mut pair.gateway, HOME, &datagram, pair.now).unwrap().unwrap();
        assert_eq!(received, sent);
    }
}

#[test]
fn no_packet_is_longer_or_padded_beyond_the_mtu() {
    let mtu = MTU_MIN + 4;
    let mut pair = Pair::made_of(Config { mtu, ..config(VM) }, config(GATEWAY), None);
    pair.shake_hands();
    let longest = usize::from(mtu);
    for (len, padded) in [(longest, longest), (longest - 1, longest), (longest - 4, longest - 4)] {
        let (_, datagram) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, len), pair.now);
        assert_eq!(datagram.len(), padded + OVERHEAD);
    }
    let too_long = packet(v4(VM), SERVER_V4, longest + 1);
    assert_eq!(refusal(&mut pair.vm, &too_long, pair.now), DropReason::TooLong);
    assert_eq!(pair.vm.drops().get(DropReason::TooLong), 1);
}

#[test]
fn bytes_behind_a_packet_are_not_sent() {
    let mut pair = Pair::connected();
    let sent = packet(v4(VM), SERVER_V4, 40);
    let mut with_tail = sent.clone();
    with_tail.extend([0xEE; 60]);
    let (_, datagram) = seal(&mut pair.vm, &with_tail, pair.now);
    assert_eq!(datagram.len(), 48 + OVERHEAD);
    assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now).unwrap().unwrap().1, sent);
}

#[test]
fn packet_that_is_none_is_dropped_on_either_side() {
    let mut pair = Pair::connected();
    for broken in [&[][..], &[0x45; 19], &[0x60; 39], &[0x00; 64], &[0xFF; 64]] {
        assert_eq!(refusal(&mut pair.vm, broken, pair.now), DropReason::Malformed);
    }
    // boringtun itself, without our check in front, stands for a peer that sends such things.
    let mut rogue = Rogue::connected(&mut pair);
    for broken in [&[0x45; 19][..], &[0x60; 39], &[0xFF; 64], &[0; 16]] {
        let datagram = rogue.seal(broken);
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Malformed));
    }
    // A total length below the header's passes boringtun, and not us.
    let mut short = packet(v4(VM), SERVER_V4, 64);
    short[2..4].copy_from_slice(&19_u16.to_be_bytes());
    let datagram = rogue.seal(&short);
    assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Malformed));
    let datagram = rogue.seal(&packet(v4(VM), SERVER_V4, 64));
    assert!(open(&mut pair.gateway, HOME, &datagram, pair.now).unwrap().is_some());
}

#[test]
fn packet_for_nobody_is_dropped() {
    let mut pair = Pair::connected();
    let stray = packet(SERVER_V4, v4(2), 64);
    assert_eq!(refusal(&mut pair.gateway, &stray, pair.now), DropReason::NoRoute);
}
