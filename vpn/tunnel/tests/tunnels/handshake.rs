//! From the first initiation to a session, and what it costs to be asked for one.

use super::*;

/// Runs a VM that nobody answers, and says when it sent what.
fn unanswered(ms: u64) -> Vec<(u64, Vec<u8>)> {
    let now = start();
    let mut vm = Tunnel::new(config(VM), now).unwrap();
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
    let mut sent: Vec<_> = drain(&mut vm).into_iter().map(|(_, datagram)| (0, datagram)).collect();
    let end = now + Duration::from_millis(ms);
    while let Some(due) = vm.next_timeout().filter(|due| *due <= end) {
        vm.handle_timers(due);
        let at = u64::try_from((due - now).as_millis()).unwrap();
        sent.extend(drain(&mut vm).into_iter().map(|(_, datagram)| (at, datagram)));
    }
    sent
}

#[test]
fn initiations_go_out_every_quarter_of_a_second_for_three_seconds() {
    let times: Vec<_> = unanswered(10_000).into_iter().map(|(at, _)| at).collect();
    assert_eq!(times, (0..=12).map(|step| step * 250).collect::<Vec<_>>());
}

#[test]
fn every_second_initiation_repeats_the_one_before() {
    let sent = unanswered(3_000);
    for pair in sent.chunks(2) {
        if let [first, again] = pair {
            assert_eq!(first.1, again.1);
        }
    }
    let new: std::collections::BTreeSet<_> = sent.iter().map(|(_, datagram)| datagram).collect();
    assert_eq!(new.len(), 7);
}

#[test]
fn path_with_a_round_trip_of_nearly_a_second_gets_a_session() {
    let mut pair = Pair::strangers();
    let begin = pair.now;
    let (_, hello) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, begin), Ok(None));
    let (_, answer) = drain(&mut pair.gateway).remove(0);
    for ms in [250, 500, 750] {
        pair.vm.handle_timers(begin + Duration::from_millis(ms));
        assert_eq!(drain(&mut pair.vm).len(), 1);
    }
    let arrival = begin + Duration::from_millis(990);
    assert_eq!(open(&mut pair.vm, OFFICE, &answer, arrival), Ok(None));
    assert!(pair.vm.status(pair.office).unwrap().established);
    assert_eq!(pair.vm.status(pair.office).unwrap().last_handshake, Some(arrival));
}

#[test]
fn no_initiation_follows_a_session() {
    let mut pair = Pair::connected();
    for ms in (250..5_000).step_by(250) {
        pair.vm.handle_timers(pair.now + Duration::from_millis(ms));
        assert_eq!(drain(&mut pair.vm), [], "after {ms} ms");
    }
}

#[test]
fn peer_admitted_after_the_first_initiation_gets_a_session_with_its_repetition() {
    let mut pair = Pair::strangers();
    let vm_key = pair.vm.public_key();
    assert!(pair.gateway.remove_peer(pair.home));
    let (_, hello) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::UnknownPeer));
    let admitted =
        PeerConfig { public_key: vm_key, routes: own(VM), start: Start::Listen, keepalive_s: None };
    pair.home = pair.gateway.add_peer(&admitted, pair.now).unwrap();
    pair.now += Duration::from_millis(250);
    pair.vm.handle_timers(pair.now);
    pair.shake_hands();
    assert!(pair.gateway.status(pair.home).unwrap().established);
}

#[test]
fn both_sides_may_begin_at_once() {
    let mut pair = Pair::connected();
    pair.vm.reconnect(pair.office, pair.now);
    pair.gateway.reconnect(pair.home, pair.now);
    let (up, down) = (drain(&mut pair.vm), drain(&mut pair.gateway));
    for (_, datagram) in up {
        assert_eq!(open(&mut pair.gateway, HOME, &datagram, pair.now), Ok(None));
    }
    for (_, datagram) in down {
        assert_eq!(open(&mut pair.vm, OFFICE, &datagram, pair.now), Ok(None));
    }
    pair.shake_hands();
    let up = packet(v4(VM), SERVER_V4, 64);
    assert_eq!(pair.up(&up), Ok(Some(up)));
    let down = packet(SERVER_V4, v4(VM), 64);
    assert_eq!(pair.down(&down), Ok(Some(down)));
}

#[test]
fn reconnection_forgets_the_session_and_makes_another() {
    let mut pair = Pair::connected();
    let (_, old) = seal(&mut pair.gateway, &packet(SERVER_V4, v4(VM), 64), pair.now);
    pair.vm.reconnect(pair.office, pair.now);
    assert!(!pair.vm.status(pair.office).unwrap().established);
    assert_eq!(open(&mut pair.vm, OFFICE, &old, pair.now), Err(DropReason::UnknownSession));
    pair.shake_hands();
    let up = packet(v4(VM), SERVER_V4, 64);
    assert_eq!(pair.up(&up), Ok(Some(up)));
}

#[test]
fn sender_under_load_is_let_in_with_a_cookie() {
    let loaded = Config { handshakes_per_s_max: 0, ..config(GATEWAY) };
    let mut pair = Pair::made_of(config(VM), loaded, None);
    let (_, hello) = drain(&mut pair.vm).remove(0);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Err(DropReason::Load));
    let (to, cookie) = drain(&mut pair.gateway).remove(0);
    assert_eq!((to, cookie.len()), (HOME, 64));
    assert_eq!(open(&mut pair.vm, OFFICE, &cookie, pair.now), Ok(None));
    pair.now += Duration::from_millis(250);
    pair.vm.handle_timers(pair.now);
    let (_, hello) = drain(&mut pair.vm).remove(0);
    let mut elsewhere = HOME;
    elsewhere.set_port(HOME.port() + 1);
    assert_eq!(open(&mut pair.gateway, elsewhere, &hello, pair.now), Err(DropReason::Load));
    drain(&mut pair.gateway);
    assert_eq!(open(&mut pair.gateway, HOME, &hello, pair.now), Ok(None));
    let (_, answer) = drain(&mut pair.gateway).remove(0);
    assert_eq!(open(&mut pair.vm, OFFICE, &answer, pair.now), Ok(None));
    assert!(pair.vm.status(pair.office).unwrap().established);
}

#[test]
fn limit_on_handshakes_holds_at_its_edge() {
    let now = start();
    let limit = 3;
    let mut gateway = Tunnel::new(Config { handshakes_per_s_max: limit, ..config(GATEWAY) }, now).unwrap();
    let reasons: Vec<_> =
        (0..=limit).map(|_| open(&mut gateway, HOME, &initiation(3, now), now).unwrap_err()).collect();
    let (last, first) = reasons.split_last().unwrap();
    assert!(first.iter().all(|reason| *reason == DropReason::UnknownPeer));
    assert_eq!(*last, DropReason::Load);
}

#[test]
fn session_indices_tell_nothing_of_other_peers() {
    let now = start();
    let mut upper = std::collections::BTreeSet::new();
    for seed in 0..4_u8 {
        let mut vm = Tunnel::new(Config { seed: [seed; 32], ..config(VM) }, now).unwrap();
        for number in 2..6 {
            let id = vm
                .add_peer(
                    &PeerConfig {
                        public_key: PublicKey::from(&secret(number)),
                        routes: own(number),
                        start: Start::Connect(OFFICE),
                        keepalive_s: None,
                    },
                    now,
                )
                .unwrap();
            assert!(vm.status(id).is_some());
        }
        for (_, datagram) in drain(&mut vm) {
            upper.insert(u32::from_le_bytes(datagram[4..8].try_into().unwrap()) >> 8);
        }
    }
    assert_eq!(upper.len(), 16);
    let neighbours = upper.iter().zip(upper.iter().skip(1)).filter(|(a, b)| *b - *a == 1).count();
    assert_eq!(neighbours, 0);
}
