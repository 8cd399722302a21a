//! The clock is an argument: a day of leases takes no time here.

use super::*;
use crate::init::fixture::{ISSUED_AT, LIFE_S, Office};
use crate::init::lease::tests::newest;
use crate::init::lease::{BootKey, Stale};
use kontor_trust::Lease;
use kontor_wire::control::Challenge;
use kontor_wire::post::{Newest, Refusal};
use kontor_wire::reason::StopReason;

const ROOT: Digest = Digest([3; 32]);

/// A boot with its office and its time.
struct World {
    office: Office,
    key: BootKey,
    life: Life,
    now: Moment,
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

impl World {
    /// A boot whose lease was asked for now.
    fn new(random: fn() -> u32) -> Self {
        let now = Moment::now();
        let office = Office::new();
        let (mut key, _) = BootKey::generate().unwrap();
        let (challenge, fresh) = key.challenge(ROOT, &office.floor(), now).unwrap();
        let granted = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap();
        Self { office, key, life: Life::new(granted, random, now), now }
    }

    /// The same, confirmed by the gateway.
    fn admitted(random: fn() -> u32) -> Self {
        let mut world = Self::new(random);
        world.life.timeout(world.now).unwrap();
        assert!(matches!(world.actions()[..], [Action::Call(..)]));
        world.confirm();
        assert!(world.life.is_admitted());
        assert_eq!(world.actions(), []);
        world
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.life.poll_action()).collect()
    }

    /// Lets time pass with the gateway heard all along.
    fn pass(&mut self, span: Duration) {
        self.now = self.now.after(span);
        self.life.heard(self.now);
        self.life.timeout(self.now).unwrap();
    }

    fn newest(&self) -> Newest {
        newest(self.life.expected(), self.now)
    }

    fn answer(&mut self, newest: Newest) -> Result<(), Stop> {
        self.life.answered(Ok(FromPost::Admitted(newest)), self.now)
    }

    fn confirm(&mut self) {
        let newest = self.newest();
        self.answer(newest).unwrap();
    }

    /// Does what [`Action::Ask`] asks for.
    fn ask(&mut self) -> Challenge {
        assert_eq!(self.actions(), [Action::Ask]);
        let (challenge, fresh) = self.key.challenge(ROOT, &self.office.floor(), self.now).unwrap();
        self.life.asked(fresh, self.now);
        challenge
    }

    fn lease_with(&mut self, challenge: &Challenge, change: impl FnOnce(&mut Lease)) {
        let answer = self.office.answer_with(challenge, change);
        self.life.leased(answer, &self.office.floor(), ISSUED_AT, self.now).unwrap();
    }

    fn lease(&mut self, challenge: &Challenge) {
        self.lease_with(challenge, |_| {});
    }

    fn rests_for(&self) -> Duration {
        let Renewal::Resting { at } = &self.life.renewal else { panic!("{:?}", self.life.renewal) };
        at.since(self.now)
    }

    fn half(&self) -> Duration {
        seconds(LIFE_S / 2)
    }
}

#[test]
fn gateway_that_confirms_admits_the_boot() {
    World::admitted(|| 0);
}

#[test]
fn first_hello_that_finds_anything_else_stops_the_boot_as_stale() {
    let changes: [fn(&mut Newest); 5] = [
        |newest| newest.lease_hash = [0; 32],
        |newest| newest.keyset_version += 1,
        |newest| newest.line = "other".into(),
        |newest| newest.revision += 1,
        |newest| newest.now += 121,
    ];
    for change in changes {
        let mut world = World::new(|| 0);
        let mut newest = world.newest();
        change(&mut newest);
        let stop = world.answer(newest).unwrap_err();
        assert_eq!(stop.reason(), StopReason::Stale, "{stop}");
        assert!(!world.life.is_admitted());
    }
}

#[test]
fn first_hello_is_repeated_for_a_while() {
    let mut world = World::new(|| 0);
    let end = world.now.after(GREET_MAX);
    let mut calls = 0;
    let stop = loop {
        match world.life.timeout(world.now) {
            Ok(()) => {}
            Err(stop) => break stop,
        }
        for action in world.actions() {
            if let Action::Call(..) = action {
                calls += 1;
                // Refused, unreachable, or nothing at all.
                match calls % 3 {
                    0 => world.life.answered(Err(CallError::HungUp), world.now).unwrap(),
                    1 => world.life.answered(Ok(FromPost::Refused(Refusal::NoLease)), world.now).unwrap(),
                    _ => {}
                }
            }
        }
        world.now = world.life.next_timeout();
    };
    assert_eq!(stop.reason(), StopReason::NoTunnel);
    assert_eq!(world.now, end);
    assert!(calls > 6, "{calls}");
}

#[test]
fn lease_is_renewed_at_half_of_its_life_a_tenth_more_or_less() {
    let tenth = seconds(LIFE_S / 20);
    let early = World::admitted(|| 0);
    assert_eq!(early.rests_for(), early.half() - tenth);
    let late = World::admitted(|| u32::MAX);
    assert_eq!(late.rests_for(), late.half() + tenth);
}

#[test]
fn renewed_lease_counts_once_the_gateway_confirms_it() {
    let mut world = World::admitted(|| 0);
    let first = world.life.lease().checked().lease_hash;
    let first_end = world.life.lease().ends();
    world.pass(world.rests_for());
    let asked_at = world.now;
    let challenge = world.ask();
    assert_eq!(challenge.seq, 1);
    world.now = world.now.after(seconds(2));
    world.lease(&challenge);
    let [Action::Call(_, renewed)] = world.actions()[..] else { panic!("no call") };
    assert_ne!(renewed, first);
    assert_eq!((world.life.lease().checked().lease_hash, world.life.lease().ends()), (first, first_end));
    world.confirm();
    assert_eq!(world.actions(), [Action::Adopt]);
    assert_eq!(world.life.lease().checked().lease_hash, renewed);
    assert_eq!(world.life.lease().ends(), asked_at.after(seconds(LIFE_S)));
}

#[test]
fn many_renewals_follow_each_other() {
    let mut world = World::admitted(|| u32::MAX / 2);
    for seq in 1..=48 {
        world.pass(world.rests_for());
        let challenge = world.ask();
        assert_eq!(challenge.seq, seq);
        world.lease(&challenge);
        assert!(matches!(world.actions()[..], [Action::Call(..)]));
        world.confirm();
        assert_eq!(world.actions(), [Action::Adopt]);
    }
}

#[test]
fn gateway_that_does_not_know_the_new_lease_yet_is_asked_again() {
    let mut world = World::admitted(|| 0);
    world.pass(world.rests_for());
    let challenge = world.ask();
    world.lease(&challenge);
    world.actions();
    world.life.answered(Ok(FromPost::Refused(Refusal::OtherLease)), world.now).unwrap();
    world.pass(CALL_PAUSE);
    assert!(matches!(world.actions()[..], [Action::Call(..)]));
    world.confirm();
    assert_eq!(world.actions(), [Action::Adopt]);
}

#[test]
fn renewal_that_fails_in_any_way_is_tried_again_after_5_to_30_seconds() {
    type Failure = (&'static str, fn(&mut World, Challenge));
    let failures: [Failure; 6] = [
        ("refused", |world, _| world.life.refused(world.now).unwrap()),
        ("bad", |world, challenge| world.lease_with(&challenge, |lease| lease.nonce = [0; 32])),
        ("elsewhere", |world, challenge| {
            world.lease_with(&challenge, |lease| lease.gateways[0].v4 = [10, 90, 0, 8].into());
        }),
        ("late", |world, challenge| {
            world.pass(seconds(60));
            world.lease(&challenge);
        }),
        ("stale", |world, challenge| {
            world.lease(&challenge);
            let newest = world.newest();
            world.answer(Newest { revision: newest.revision + 1, ..newest }).unwrap();
        }),
        ("never confirmed", |world, challenge| {
            world.lease(&challenge);
            world.pass(CONFIRM_MAX);
        }),
    ];
    let edges: [(fn() -> u32, Duration); 2] = [(|| 0, RETRY_MIN), (|| u32::MAX, RETRY_MAX)];
    for (random, expected) in edges {
        for (name, fail) in &failures {
            let mut world = World::admitted(random);
            let first = world.life.lease().checked().lease_hash;
            world.pass(world.rests_for());
            let challenge = world.ask();
            fail(&mut world, challenge);
            world.actions();
            assert_eq!(world.rests_for(), expected, "{name}");
            assert_eq!(world.life.lease().checked().lease_hash, first, "{name}");
            world.pass(expected);
            assert!(world.actions().contains(&Action::Ask), "{name}");
        }
    }
}

#[test]
fn waits_shrink_towards_the_end_but_not_below_what_the_host_allows() {
    let mut world = World::admitted(|| u32::MAX);
    world.pass(world.rests_for());
    world.ask();
    world.pass(seconds(LIFE_S) - (world.half() + seconds(LIFE_S / 20)) - seconds(20));
    world.life.refused(world.now).unwrap();
    assert_eq!(world.rests_for(), seconds(10));
    world.pass(seconds(10));
    world.actions();
    world.life.renewal = Renewal::Overdue;
    world.life.refused(world.now).unwrap();
    assert_eq!(world.rests_for(), RETRY_MIN);
}

#[test]
fn nudge_brings_the_renewal_forward_but_not_too_often() {
    let mut world = World::admitted(|| 0);
    world.life.nudge(world.now);
    assert_eq!(world.rests_for(), RETRY_MIN);
    world.pass(RETRY_MIN);
    let challenge = world.ask();
    // One that comes while a lease is asked for is not forgotten.
    world.life.nudge(world.now);
    world.lease(&challenge);
    world.confirm();
    assert_eq!(world.rests_for(), RETRY_MIN);
}

#[test]
fn lease_that_ends_closes_the_tunnel_and_later_the_power() {
    let mut world = World::admitted(|| 0);
    world.pass(seconds(LIFE_S) - Duration::from_millis(1));
    assert_eq!(world.ask().seq, 1);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.actions(), [Action::CloseTunnel]);
    let off_at = world.now.after(world.life.lease().lapse_off());
    assert_eq!(world.life.next_timeout(), off_at);
    // What the host still says changes nothing.
    world.life.refused(world.now).unwrap();
    world.life.timeout(world.now).unwrap();
    let stop = world.life.timeout(off_at).unwrap_err();
    assert_eq!(stop.reason(), StopReason::LeaseExpired);
}

#[test]
fn host_that_never_answers_costs_the_lease() {
    let mut world = World::admitted(|| 0);
    world.pass(world.rests_for());
    world.ask();
    let end = world.life.lease().ends();
    while world.now < end {
        let due = world.life.next_timeout();
        world.pass(due.since(world.now));
        assert!(!world.actions().contains(&Action::Ask));
    }
    assert!(world.life.lapse.is_some());
}

#[test]
fn silence_provokes_calls_and_then_closes_the_tunnel() {
    let mut world = World::admitted(|| 0);
    let silence = world.life.lease().silence();
    let (mut calls, silent_at) = (0, world.now.after(silence));
    while world.now < silent_at {
        world.now = world.life.next_timeout();
        world.life.timeout(world.now).unwrap();
        for action in world.actions() {
            match action {
                Action::Call(..) => calls += 1,
                Action::HangUp => {}
                other @ (Action::Ask | Action::Adopt | Action::Reconnect) => panic!("{other:?}"),
                Action::CloseTunnel => assert_eq!(world.now, silent_at),
            }
        }
    }
    assert!(calls > 2, "{calls}");
    let off_at = world.life.next_timeout();
    assert_eq!(off_at, silent_at.after(world.life.lease().lapse_off()));
    assert_eq!(world.life.timeout(off_at).unwrap_err().reason(), StopReason::NoTunnel);
}

#[test]
fn calls_against_silence_wait_as_long_as_something_comes() {
    let mut world = World::admitted(|| 0);
    for _ in 0..100 {
        world.pass(seconds(10));
        assert_eq!(world.actions(), []);
    }
    world.now = world.now.after(world.life.lease().silence() / SILENCE_PARTS);
    world.life.timeout(world.now).unwrap();
    assert!(matches!(world.actions()[..], [Action::Call(..)]));
    // The answer to it says that something newer waits.
    let newest = world.newest();
    world.answer(Newest { revision: newest.revision + 1, ..newest }).unwrap();
    assert_eq!(world.rests_for(), Duration::ZERO);
}

#[test]
fn lease_or_refusal_that_was_not_asked_for_breaks_the_rules() {
    let mut world = World::admitted(|| 0);
    assert!(matches!(world.life.refused(world.now), Err(Stop::Unasked("Refused"))));
    let unasked = world.life.leased(LeaseParts::default(), &world.office.floor(), ISSUED_AT, world.now);
    assert!(matches!(unasked, Err(Stop::Unasked("Lease"))));
    // And a stale word is worth a stop only before the boot is admitted.
    assert!(matches!(Stop::Stale(Stale::Lease).reason(), StopReason::Stale));
}

#[test]
fn waking_drops_the_sessions_and_renews_before_the_silence_of_the_sleep_counts() {
    let mut world = World::admitted(|| 0);
    // Longer than silence may last, and in the first half of the lease.
    world.now = world.now.after(seconds(600));
    assert!(world.now >= world.life.silent_at() && world.now < world.life.lease().ends());
    world.life.woken(world.now);
    assert_eq!(world.actions(), [Action::Reconnect]);
    world.life.timeout(world.now).unwrap();
    assert!(matches!(world.actions()[..], [Action::Ask, Action::Call(..)]));
    assert!(world.life.next_timeout() > world.now);
}

#[test]
fn call_under_way_is_given_up_when_the_machine_wakes() {
    let mut world = World::new(|| 0);
    world.life.timeout(world.now).unwrap();
    assert!(matches!(world.actions()[..], [Action::Call(..)]));
    world.now = world.now.after(seconds(1));
    world.life.woken(world.now);
    assert_eq!(world.actions(), [Action::Reconnect, Action::HangUp]);
    world.life.timeout(world.now).unwrap();
    assert!(matches!(world.actions()[..], [Action::Call(..)]));
}

#[test]
fn sleep_beyond_the_leases_end_ends_the_session() {
    let mut world = World::admitted(|| 0);
    world.now = world.now.after(seconds(LIFE_S));
    world.life.woken(world.now);
    assert_eq!(world.actions(), []);
    world.life.timeout(world.now).unwrap();
    assert_eq!(world.actions(), [Action::CloseTunnel]);
    world.life.woken(world.now);
    assert_eq!(world.actions(), []);
}
