//! What takes minutes of a peer's life. boringtun reads its own clock here, so these take real time.

use super::*;

/// Runs both ends in real time until `done` is satisfied or the time is over.
fn run(pair: &mut Pair, for_s: u64, mut done: impl FnMut(&mut Pair, usize) -> bool) -> bool {
    let end = start() + Duration::from_secs(for_s);
    let mut keepalives = 0;
    while start() < end {
        let due = pair.vm.next_timeout().into_iter().chain(pair.gateway.next_timeout()).min().unwrap();
        std::thread::sleep(due.saturating_duration_since(start()));
        pair.now = start();
        pair.vm.handle_timers(pair.now);
        pair.gateway.handle_timers(pair.now);
        loop {
            let (up, down) = (drain(&mut pair.vm), drain(&mut pair.gateway));
            if up.is_empty() && down.is_empty() {
                break;
            }
            for (_, datagram) in up {
                keepalives += usize::from(datagram.len() == OVERHEAD);
                let _ = open(&mut pair.gateway, HOME, &datagram, pair.now);
            }
            for (_, datagram) in down {
                let _ = open(&mut pair.vm, OFFICE, &datagram, pair.now);
            }
        }
        if done(pair, keepalives) {
            return true;
        }
    }
    false
}

#[test]
fn keepalives_go_out_without_traffic() {
    let mut pair = Pair::made_of(config(VM), config(GATEWAY), Some(1));
    pair.shake_hands();
    let before = pair.gateway.status(pair.home).unwrap().last_received;
    assert!(run(&mut pair, 10, |_, keepalives| keepalives >= 2));
    assert!(pair.gateway.status(pair.home).unwrap().last_received > before);
    assert_eq!(pair.gateway.status(pair.home).unwrap().traffic.rx_packets, 0);
}

#[test]
#[ignore = "takes 20 s of boringtun's own clock"]
fn lost_gateway_is_asked_again_after_fifteen_seconds_and_answers() {
    let mut pair = Pair::connected();
    let vm_key = pair.vm.public_key();
    // A gateway that was restarted: the same peer, no session, nobody knows where it is.
    pair.gateway.remove_peer(pair.home);
    let again = PeerConfig { public_key: vm_key, routes: own(VM), start: Start::Listen, keepalive_s: None };
    pair.home = pair.gateway.add_peer(&again, pair.now).unwrap();
    let begin = start();
    assert!(run(&mut pair, 30, |pair, _| {
        let up = packet(v4(VM), SERVER_V4, 64);
        let (_, datagram) = seal(&mut pair.vm, &up, pair.now);
        open(&mut pair.gateway, HOME, &datagram, pair.now).is_ok()
    }));
    let took = start() - begin;
    println!("a session again after {took:?}");
    assert!((15..20).contains(&took.as_secs()));
}

#[test]
#[ignore = "takes 2 minutes of boringtun's own clock"]
fn session_is_renewed_after_two_minutes_without_a_lost_packet() {
    let mut pair = Pair::connected();
    let first = pair.vm.status(pair.office).unwrap().last_handshake;
    assert!(run(&mut pair, 130, |pair, _| {
        let up = packet(v4(VM), SERVER_V4, 64);
        assert_eq!(pair.up(&up), Ok(Some(up)));
        let down = packet(SERVER_V4, v4(VM), 64);
        assert_eq!(pair.down(&down), Ok(Some(down)));
        pair.vm.status(pair.office).unwrap().last_handshake > first
    }));
    let renewed = pair.vm.status(pair.office).unwrap().last_handshake.unwrap();
    println!("renewed after {:?}", renewed - first.unwrap());
    assert!((120..125).contains(&(renewed - first.unwrap()).as_secs()));
}

#[test]
#[ignore = "takes 4 minutes of boringtun's own clock"]
fn work_vm_that_lost_its_gateway_never_gives_up() {
    let mut pair = Pair::strangers();
    let mut sent = Vec::new();
    let begin = start();
    while start() - begin < Duration::from_secs(240) {
        let due = pair.vm.next_timeout().unwrap();
        std::thread::sleep(due.saturating_duration_since(start()));
        pair.vm.handle_timers(start());
        sent.extend(drain(&mut pair.vm).iter().map(|_| (start() - begin).as_millis()));
    }
    println!("initiations at {sent:?} ms");
    assert!(sent.iter().any(|at| *at > 200_000));
}
