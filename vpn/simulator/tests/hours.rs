//! Hours of tunnels. Each seed is its own world; a failing one is named by its panic.

use kontor_vpn_simulator::{End, Network, World};
use std::time::Duration;

const SEEDS: u64 = 4;
const HOUR: Duration = Duration::from_secs(3600);
const OFTEN: Option<Duration> = Some(Duration::from_millis(500));
/// A session carries nothing after so long (WireGuard paper, 6.1: Reject-After-Time).
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// The side that began renews after so long (Rekey-After-Time).
const REKEY_AFTER: Duration = Duration::from_secs(120);
/// An initiation is repeated after 5 seconds and a little (Rekey-Timeout); half of all get through at worst.
const RECOVERY: Duration = Duration::from_secs(60);

const GOOD: Network = Network { lost: 0, repeated: 0, delay_ms: (20, 20) };
const BAD: Network = Network { lost: 100, repeated: 30, delay_ms: (10, 900) };
const WORSE: Network = Network { lost: 300, repeated: 100, delay_ms: (10, 1500) };

/// A clock belongs to a thread: each world has its own.
fn each_seed(test: fn(u64)) {
    for seed in 0..SEEDS {
        let world =
            std::thread::Builder::new().name(format!("seed {seed}")).spawn(move || test(seed)).unwrap();
        assert!(world.join().is_ok(), "seed {seed}");
    }
}

#[test]
fn good_network_loses_nothing_in_six_hours_and_sessions_are_renewed_in_time() {
    each_seed(|seed| {
        let mut world = World::new(seed, GOOD, None);
        world.pass(6 * HOUR, OFTEN);
        world.pass(Duration::from_secs(1), None);
        assert_eq!(world.seen.arrived, world.seen.sent);
        // One session in each two minutes, and a few seconds for what came just before.
        let sessions = world.seen.sessions;
        assert!((150..=181).contains(&sessions), "{sessions} sessions");
        assert!(world.seen.oldest_session < REKEY_AFTER + Duration::from_secs(10), "{:?}", world.seen);
    });
}

#[test]
fn bad_network_loses_about_its_share_and_never_the_session() {
    for network in [BAD, WORSE] {
        let run = move |seed| {
            let mut world = World::new(seed, network, Some(25));
            world.pass(Duration::from_secs(30), None);
            let mut longest = Duration::ZERO;
            while world.elapsed() < 4 * HOUR {
                world.pass(Duration::from_secs(1), OFTEN);
                for end in [End::Vm, End::Gateway] {
                    let arrival = world.seen.last_arrival.get(&end).copied().unwrap_or_default();
                    longest = longest.max(world.elapsed() - arrival);
                }
            }
            let share = world.seen.arrived * 1000 / world.seen.sent;
            assert!(share + 50 > 1000 - network.lost, "{share} of 1000 arrived: {:?}", world.seen);
            assert!(world.seen.oldest_session <= REJECT_AFTER, "{:?}", world.seen);
            assert!(longest < RECOVERY, "nothing arrived for {longest:?}");
        };
        for seed in 0..SEEDS {
            assert!(std::thread::spawn(move || run(seed)).join().is_ok(), "seed {seed} on {network:?}");
        }
    }
}

#[test]
fn tunnel_that_was_cut_for_a_while_comes_back_however_long_it_was() {
    each_seed(|seed| {
        let mut world = World::new(seed, BAD, Some(25));
        world.pass(Duration::from_secs(300), OFTEN);
        for cut_s in [10, 100, 170, 200, 600, 3600, 6 * 3600] {
            world.cut(true);
            world.pass(Duration::from_secs(cut_s), OFTEN);
            world.cut(false);
            let (back, before) = (world.elapsed(), world.seen.arrived);
            world.pass(RECOVERY, OFTEN);
            assert!(world.seen.arrived > before, "not back {RECOVERY:?} after {cut_s} s without a network");
            for end in [End::Vm, End::Gateway] {
                assert!(
                    world.seen.last_arrival.get(&end).is_some_and(|at| *at > back),
                    "{end:?} hears nothing"
                );
            }
            world.pass(Duration::from_secs(120), OFTEN);
        }
    });
}

#[test]
fn recorded_datagram_opens_nothing_at_any_later_time() {
    each_seed(|seed| {
        let mut world = World::new(seed, GOOD, None);
        world.pass(Duration::from_secs(60), OFTEN);
        let recorded = world.seen.recorded.clone().expect("something arrived");
        for _ in 0..40 {
            assert!(!world.inject(&recorded), "after {:?}", world.elapsed());
            world.pass(Duration::from_secs(30), OFTEN);
        }
    });
}

#[test]
fn silent_tunnel_has_a_new_session_when_it_is_needed() {
    each_seed(|seed| {
        let mut world = World::new(seed, GOOD, None);
        world.pass(Duration::from_secs(60), OFTEN);
        let sessions = world.seen.sessions;
        // Three times Reject-After-Time: all keys are forgotten.
        world.pass(REJECT_AFTER * 4, None);
        world.pass(Duration::from_secs(30), OFTEN);
        world.pass(Duration::from_secs(1), None);
        assert!(world.established() && world.seen.sessions > sessions, "{:?}", world.seen);
        assert_eq!(world.seen.arrived, world.seen.sent);
        assert!(world.seen.oldest_session <= REJECT_AFTER, "{:?}", world.seen);
    });
}
