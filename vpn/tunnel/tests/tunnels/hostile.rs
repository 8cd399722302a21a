//! What a peer or a stranger sends that it must not.

use super::*;

/// A gateway with a second VM beside the pair's.
fn with_neighbour(pair: &mut Pair) -> PeerId {
    let neighbour = PeerConfig {
        public_key: PublicKey::from(&secret(2)),
        routes: own(2),
        start: Start::Listen,
        keepalive_s: None,
    };
    pair.gateway.add_peer(&neighbour, pair.now).unwrap()
}

#[test]
fn packet_from_an_address_that_is_not_the_peers_own_is_dropped() {
    let mut pair = Pair::connected();
    with_neighbour(&mut pair);
    for (source, destination) in
        [(v4(2), SERVER_V4), (v6(2), SERVER_V6), (SERVER_V4, v4(2)), (v4(0), SERVER_V4)]
    {
        assert_eq!(pair.up(&packet(source, destination, 64)), Err(DropReason::Source));
    }
    assert_eq!(pair.gateway.drops().get(DropReason::Source), 4);
    assert_eq!(pair.gateway.status(pair.home).unwrap().traffic.rx_packets, 0);
}

#[test]
fn work_vm_takes_any_source_from_its_gateway() {
    let mut pair = Pair::connected();
    let down = packet("8.8.8.8".parse().unwrap(), v4(VM), 64);
    assert_eq!(pair.down(&down), Ok(Some(down)));
}

#[test]
fn stranger_gets_no_answer() {
    let mut pair = Pair::strangers();
    let hello = initiation(3, pair.now);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::UnknownPeer));
    assert_eq!(drain(&mut pair.gateway), []);
}

#[test]
fn repeated_datagram_is_dropped() {
    let mut pair = Pair::connected();
    let (_, first) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    let (_, second) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    assert!(open(&mut pair.gateway, HOME, &second, pair.now).unwrap().is_some(), "out of order");
    assert!(open(&mut pair.gateway, HOME, &first, pair.now).unwrap().is_some());
    for datagram in [first, second] {
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Replayed));
    }
}

#[test]
fn repeated_initiation_gets_no_answer_and_moves_nothing() {
    let mut pair = Pair::strangers();
    let (_, hello) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
    assert_eq!(drain(&mut pair.gateway).len(), 1);
    assert_eq!(open(&mut pair.gateway, HOTEL, &hello, pair.now), Err(DropReason::Replayed));
    assert_eq!(drain(&mut pair.gateway), []);
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, None);
}

#[test]
fn counter_at_the_end_of_its_range_is_refused() {
    let mut pair = Pair::connected();
    let (_, genuine) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    let limit = u64::MAX - (1 << 13);
    for counter in [limit, limit + 1, u64::MAX - 1023, u64::MAX] {
        let mut datagram = genuine.clone();
        datagram[8..16].copy_from_slice(&counter.to_le_bytes());
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Replayed));
    }
    let mut datagram = genuine.clone();
    datagram[8..16].copy_from_slice(&(limit - 1).to_le_bytes());
    assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Err(DropReason::Forged));
    assert!(open(&mut pair.gateway, HOME, &genuine, pair.now).unwrap().is_some());
}

#[test]
fn garbage_of_every_length_is_dropped() {
    let mut pair = Pair::connected();
    let (_, genuine) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    let session: [u8; 4] = genuine[4..8].try_into().unwrap();
    for len in 0..=DATAGRAM_MAX {
        for kind in 0..6_u8 {
            let mut garbage = vec![0xA5; len];
            for (at, byte) in [kind, 0, 0, 0].into_iter().chain(session).chain(session).enumerate() {
                if at < len {
                    garbage[at] = byte;
                }
            }
            assert!(open(&mut pair.gateway, HOTEL, &garbage, pair.now).is_err(), "{kind} of {len}");
            assert!(open(&mut pair.vm, HOTEL, &garbage, pair.now).is_err(), "{kind} of {len}");
        }
    }
    assert_eq!(drain(&mut pair.gateway), []);
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
    assert!(open(&mut pair.gateway, HOME, &genuine, pair.now).unwrap().is_some());
}

#[test]
fn datagram_of_the_greatest_length_is_read_and_of_one_more_is_not() {
    let mut pair = Pair::connected();
    let (_, longest) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, PACKET_MAX), pair.now);
    assert_eq!(longest.len(), DATAGRAM_MAX);
    let mut longer = longest.clone();
    longer.push(0);
    assert_eq!(open(&mut pair.gateway, HOME, &longer, pair.now), Err(DropReason::TooLong));
    assert!(open(&mut pair.gateway, HOME, &longest, pair.now).unwrap().is_some());
}

#[test]
fn each_changed_byte_of_a_data_message_makes_it_none() {
    let mut pair = Pair::connected();
    let (_, genuine) = seal(&mut pair.vm, &packet(v4(VM), SERVER_V4, 64), pair.now);
    for at in 0..genuine.len() {
        let mut changed = genuine.clone();
        changed[at] ^= 1;
        assert!(open(&mut pair.gateway, HOTEL, &changed, pair.now).is_err(), "byte {at}");
    }
    assert_eq!(pair.gateway.status(pair.home).unwrap().endpoint, Some(HOME));
    assert!(open(&mut pair.gateway, HOME, &genuine, pair.now).unwrap().is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_dropped(datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 64)) {
        let mut pair = Pair::connected();
        for datagram in datagrams {
            prop_assert!(open(&mut pair.gateway, HOTEL, &datagram, pair.now).is_err());
        }
    }

    #[test]
    fn any_changes_to_a_handshake_never_panic(flips in prop::collection::vec((0..148_usize, any::<u8>()), 1..8)) {
        let mut pair = Pair::strangers();
        let (_, mut hello) = drain(&mut pair.vm).remove(0);
        for (at, byte) in flips {
            hello[at] ^= byte;
        }
        let _ = open(&mut pair.gateway, HOME, &hello, pair.now);
        let _ = drain(&mut pair.gateway);
    }
}
