use super::*;
use crate::host::Accelerator;

const ROOT: [u8; 32] = [7; 32];
const ZERO: Duration = Duration::ZERO;

fn second(at: u64) -> Duration {
    Duration::from_secs(at)
}

fn session() -> Session {
    Session::new(Times::new(Accelerator::Kvm), ROOT, ZERO)
}

fn actions(session: &mut Session) -> Vec<Action> {
    std::iter::from_fn(|| session.poll_action()).collect()
}

fn guest(session: &mut Session, message: FromGuest, now: Duration) {
    session.handle(Input::Guest(message), now);
}

fn hello() -> FromGuest {
    FromGuest::Hello { oldest: 1, newest: 1, features: 0 }
}

fn state(state: BootState) -> FromGuest {
    FromGuest::State { state, at_ms: 1 }
}

fn challenge(seq: u64) -> Challenge {
    let nonce = [seq.to_le_bytes()[0]; 32];
    Challenge { nonce, boot_key: [2; 32], seq, verity_root: ROOT, keyset_version: 1 }
}

fn granted() -> Input {
    Input::Office(Answer::Lease(Box::new(Granted {
        parts: Parts { lease: b"lease".to_vec(), ..Parts::default() },
        gateways: vec![(1, vec!["192.0.2.1:51820".parse().unwrap()])],
        lease: LeaseNote { issued_at: 1000, not_after: 1600, revision: 3 },
        off_after: second(660),
    })))
}

/// A session that is past `Hello`, with nothing left to do.
fn greeted() -> Session {
    let mut session = session();
    guest(&mut session, hello(), second(1));
    assert_eq!(actions(&mut session), [Action::Tell(FromHost::Hello { version: 1, features: 0 })]);
    session
}

fn leased() -> Session {
    let mut session = greeted();
    guest(&mut session, state(BootState::Early), second(2));
    guest(&mut session, state(BootState::Verified), second(3));
    guest(&mut session, FromGuest::Challenge(challenge(0)), second(3));
    assert_eq!(actions(&mut session), [Action::Ask(challenge(0))]);
    session.handle(granted(), second(4));
    actions(&mut session);
    session
}

fn running() -> Session {
    let mut session = leased();
    for reached in [
        BootState::Leased,
        BootState::TunnelUp,
        BootState::Admitted,
        BootState::StateOpen,
        BootState::Session,
    ] {
        guest(&mut session, state(reached), second(5));
    }
    guest(&mut session, FromGuest::Ready, second(6));
    assert_eq!(session.state(), State::Running);
    session
}

fn stopped(session: &Session) -> (StopReason, Witness) {
    let stop = session.stop().expect("a stop was decided");
    (stop.reason, stop.witness)
}

#[test]
fn lease_reaches_the_relay_before_the_guest() {
    let mut session = greeted();
    guest(&mut session, FromGuest::Challenge(challenge(0)), second(3));
    actions(&mut session);
    session.handle(granted(), second(4));
    let parts = LeaseParts { lease: b"lease".to_vec(), ..LeaseParts::default() };
    assert_eq!(
        actions(&mut session),
        [
            Action::Gateways(vec![(1, vec!["192.0.2.1:51820".parse().unwrap()])]),
            Action::Tell(FromHost::Lease(parts)),
        ]
    );
}

#[test]
fn states_are_recorded_on_the_hosts_clock() {
    let session = running();
    let at: Vec<_> = session.reached().iter().map(|(state, at)| (state.name(), at.as_secs())).collect();
    assert_eq!(at[..3], [("early", 2), ("verified", 3), ("leased", 5)]);
    assert_eq!(session.ready_at(), Some(second(6)));
    assert_eq!(session.lease().map(|lease| lease.not_after), Some(1600));
}

#[test]
fn stop_powers_the_guest_off_then_quits_then_kills() {
    let mut session = running();
    session.handle(Input::Stop, second(10));
    assert_eq!(actions(&mut session), [Action::Tell(FromHost::PowerOff)]);
    for expected in [Action::Quit, Action::Kill] {
        let due = session.next_timeout().unwrap();
        session.handle_timeout(due - Duration::from_millis(1));
        assert_eq!(actions(&mut session), []);
        session.handle_timeout(due);
        assert_eq!(actions(&mut session), [expected]);
    }
    session.handle(Input::Closed("signal 9".into()), second(60));
    assert!(session.is_ended());
    assert_eq!(stopped(&session), (StopReason::Requested, Witness::Host));
    assert_eq!(session.next_timeout(), None);
}

#[test]
fn what_the_newest_rules_forbid_is_powered_off_at_once_also_when_its_lease_runs() {
    for mut session in [greeted(), running()] {
        let seq = u64::from(session.state() == State::Running);
        guest(&mut session, FromGuest::Challenge(challenge(seq)), second(100));
        assert_eq!(actions(&mut session), [Action::Ask(challenge(seq))]);
        session.handle(Input::Office(Answer::Forbidden("a test image".into())), second(101));
        assert_eq!(actions(&mut session), [Action::Tell(FromHost::PowerOff)]);
        assert_eq!(stopped(&session), (StopReason::Forbidden, Witness::Host));
        assert_eq!(session.stop().unwrap().detail, "a test image");
        guest(&mut session, FromGuest::Stop(StopReason::Requested), second(102));
        session.handle(Input::Closed("exit 0".into()), second(103));
        assert_eq!(stopped(&session), (StopReason::Forbidden, Witness::Host));
    }
}

#[test]
fn guest_that_powers_off_when_asked_is_requested_whatever_it_says() {
    let mut session = running();
    session.handle(Input::Stop, second(10));
    guest(&mut session, FromGuest::Stop(StopReason::Internal), second(11));
    session.handle(Input::Closed("exit 0".into()), second(12));
    assert_eq!(stopped(&session), (StopReason::Requested, Witness::Host));
}

#[test]
fn guests_own_reason_is_kept_and_it_has_time_to_power_off() {
    let mut session = greeted();
    guest(&mut session, FromGuest::Stop(StopReason::RootCorrupt), second(2));
    assert_eq!(actions(&mut session), []);
    session.handle(Input::Closed("exit 0".into()), second(3));
    assert_eq!(stopped(&session), (StopReason::RootCorrupt, Witness::Guest));
}

#[test]
fn guest_that_says_stop_and_does_not_is_made_to() {
    let mut session = greeted();
    guest(&mut session, FromGuest::Stop(StopReason::NoDisk), second(2));
    let due = session.next_timeout().unwrap();
    session.handle_timeout(due);
    assert_eq!(actions(&mut session), [Action::Quit]);
}

#[test]
fn guest_may_not_claim_what_only_a_host_sees() {
    for reason in [
        StopReason::KernelPanic,
        StopReason::Vanished,
        StopReason::Garbage,
        StopReason::Silent,
        StopReason::Forbidden,
    ] {
        let mut session = greeted();
        guest(&mut session, FromGuest::Stop(reason), second(2));
        assert_eq!(stopped(&session), (StopReason::Garbage, Witness::Host));
    }
}

#[test]
fn death_without_a_word_is_inferred() {
    let mut session = running();
    session.handle(Input::Closed("signal 9".into()), second(9));
    assert_eq!(stopped(&session), (StopReason::Vanished, Witness::Inferred));
    assert_eq!(session.stop().unwrap().detail, "signal 9");
}

#[test]
fn qemus_word_for_the_end_is_kept_as_detail() {
    let mut session = running();
    session.handle(Input::WentOff("guest-reset".into()), second(9));
    assert!(session.stop().is_none());
    session.handle(Input::Closed("exit status: 0".into()), second(9));
    assert_eq!(session.stop().unwrap().detail, "guest-reset, exit status: 0");
}

#[test]
fn panic_is_inferred_and_the_guests_own_word_is_worth_more() {
    let mut session = running();
    session.handle(Input::Panicked("Kernel panic - not syncing: x".into()), second(9));
    assert_eq!(actions(&mut session), []);
    assert_eq!(stopped(&session), (StopReason::KernelPanic, Witness::Inferred));
    guest(&mut session, FromGuest::Stop(StopReason::Internal), second(9));
    assert_eq!(stopped(&session), (StopReason::Internal, Witness::Guest));
}

#[test]
fn guest_that_hangs_after_a_panic_is_ended() {
    let mut session = running();
    session.handle(Input::Panicked("x".into()), second(9));
    let due = session.next_timeout().unwrap();
    session.handle_timeout(due);
    assert_eq!(actions(&mut session), [Action::Quit]);
    assert_eq!(stopped(&session).0, StopReason::KernelPanic);
}

#[test]
fn garbage_of_either_channel_ends_qemu_at_once() {
    let broke = Input::GuestBroke(FrameError::Malformed(3));
    for input in [broke, Input::UplinkBroke("an uplink frame of 3 bytes".into())] {
        let mut session = running();
        session.handle(input, second(9));
        assert_eq!(actions(&mut session), [Action::Quit]);
        assert_eq!(stopped(&session), (StopReason::Garbage, Witness::Host));
    }
}

#[test]
fn each_broken_rule_is_garbage() {
    type Rule = (&'static str, fn() -> Session, FromGuest);
    let rules: [Rule; 9] = [
        ("first frame", session, state(BootState::Early)),
        ("first frame is a stop", session, FromGuest::Stop(StopReason::NoDisk)),
        ("second hello", greeted, hello()),
        ("state again", leased, state(BootState::Verified)),
        ("state back", leased, state(BootState::Early)),
        ("leased without a lease", greeted, state(BootState::Leased)),
        ("ready too early", leased, FromGuest::Ready),
        ("state when running", running, state(BootState::Session)),
        ("challenge for another root", greeted, {
            FromGuest::Challenge(Challenge { verity_root: [0; 32], ..challenge(0) })
        }),
    ];
    for (name, make, message) in rules {
        let mut session = make();
        guest(&mut session, message, second(7));
        assert_eq!(session.stop().map(|stop| stop.reason), Some(StopReason::Garbage), "{name}");
        assert_eq!(actions(&mut session), [Action::Quit], "{name}");
    }
}

#[test]
fn versions_that_do_not_meet_stop_the_guest() {
    for (oldest, newest) in [(0, 0), (2, 5), (2, 1)] {
        let mut session = session();
        guest(&mut session, FromGuest::Hello { oldest, newest, features: 0 }, ZERO);
        assert_eq!(stopped(&session), (StopReason::BadControl, Witness::Host));
    }
    let mut session = session();
    guest(&mut session, FromGuest::Hello { oldest: 0, newest: 9, features: u64::MAX }, ZERO);
    assert!(session.stop().is_none());
}

#[test]
fn silence_in_any_state_stops_the_guest() {
    let mut before_hello = session();
    let due = before_hello.next_timeout().unwrap();
    before_hello.handle_timeout(due);
    assert_eq!(stopped(&before_hello), (StopReason::Silent, Witness::Host));
    assert_eq!(actions(&mut before_hello), [Action::Quit]);

    let mut session = leased();
    let order = [
        BootState::Leased,
        BootState::TunnelUp,
        BootState::Admitted,
        BootState::StateOpen,
        BootState::Session,
    ];
    for reached in order {
        guest(&mut session, state(reached), second(5));
        assert_eq!(session.next_timeout(), Some(second(5) + Times::new(Accelerator::Kvm).after(reached)));
    }
    session.handle_timeout(session.next_timeout().unwrap());
    assert_eq!(session.stop().unwrap().detail, "nothing more came after session");
}

#[test]
fn talk_without_progress_is_silence_too() {
    let mut session = greeted();
    let due = session.next_timeout();
    guest(&mut session, FromGuest::Challenge(challenge(0)), second(50));
    session.handle(Input::Office(Answer::Refused("not today".into())), second(51));
    assert_eq!(session.next_timeout(), due);
}

#[test]
fn an_emulated_guest_has_more_time() {
    let emulated = Session::new(Times::new(Accelerator::Tcg), ROOT, ZERO);
    assert!(emulated.next_timeout() > session().next_timeout());
}

#[test]
fn running_guest_is_silent_as_long_as_its_lease_and_the_lapse_last() {
    let mut session = running();
    let lapse = second(3 + 660 + 120);
    assert_eq!(session.next_timeout(), Some(lapse));
    // A renewal moves it: what counts is when it was asked for.
    guest(&mut session, FromGuest::Challenge(challenge(1)), second(300));
    session.handle(granted(), second(310));
    assert_eq!(session.next_timeout(), Some(second(300 + 660 + 120)));
    actions(&mut session);
    session.handle_timeout(second(300 + 660 + 120));
    assert_eq!(stopped(&session), (StopReason::LeaseExpired, Witness::Host));
    assert_eq!(actions(&mut session), [Action::Tell(FromHost::PowerOff)]);
}

#[test]
fn office_that_gives_no_lease_is_told_to_the_guest_and_remembered() {
    for answer in [Answer::Refused("revoked".into()), Answer::Unreachable("no route".into())] {
        let mut session = greeted();
        guest(&mut session, FromGuest::Challenge(challenge(0)), second(3));
        actions(&mut session);
        session.handle(Input::Office(answer), second(4));
        assert_eq!(actions(&mut session), [Action::Tell(FromHost::Refused)]);
        assert!(session.stop().is_none() && session.office_words().is_some());
    }
}

#[test]
fn answer_that_does_not_verify_stops_a_boot_and_not_a_renewal() {
    let mut boot = greeted();
    guest(&mut boot, FromGuest::Challenge(challenge(0)), second(3));
    actions(&mut boot);
    boot.handle(Input::Office(Answer::NotVerified("the lease is of another tenant".into())), second(4));
    assert_eq!(stopped(&boot), (StopReason::BadLease, Witness::Host));
    assert_eq!(actions(&mut boot), [Action::Tell(FromHost::PowerOff)]);

    let mut renewal = running();
    guest(&mut renewal, FromGuest::Challenge(challenge(1)), second(300));
    actions(&mut renewal);
    renewal.handle(Input::Office(Answer::NotVerified("x".into())), second(301));
    assert_eq!(actions(&mut renewal), [Action::Tell(FromHost::Refused)]);
    assert!(renewal.stop().is_none());
}

#[test]
fn guest_is_told_of_each_sleep_of_the_host() {
    for mut session in [greeted(), leased(), running()] {
        let due = session.next_timeout();
        for _ in 0..2 {
            session.handle(Input::Woken, second(100));
            assert_eq!(actions(&mut session), [Action::Tell(FromHost::Woken)]);
        }
        assert_eq!(session.next_timeout(), due);
    }
    // Not before it has said hello, nor on its way out.
    let mut early = session();
    early.handle(Input::Woken, second(1));
    assert_eq!(actions(&mut early), []);
    let mut stopping = running();
    stopping.handle(Input::Stop, second(10));
    actions(&mut stopping);
    stopping.handle(Input::Woken, second(11));
    assert_eq!(actions(&mut stopping), []);
}

#[test]
fn death_of_the_relay_stops_the_guest() {
    let mut session = running();
    session.handle(Input::RelayEnded("exit status 1".into()), second(9));
    assert_eq!(actions(&mut session), [Action::Tell(FromHost::PowerOff)]);
    assert_eq!(stopped(&session), (StopReason::UplinkFailed, Witness::Host));
}

#[test]
fn stop_before_hello_quits_and_stop_now_kills() {
    let mut early = session();
    early.handle(Input::Stop, ZERO);
    assert_eq!(actions(&mut early), [Action::Quit]);
    early.handle(Input::StopNow, ZERO);
    assert_eq!(actions(&mut early), [Action::Kill]);
    assert_eq!(stopped(&early).0, StopReason::Requested);
}

#[test]
fn nothing_is_done_for_a_guest_on_its_way_out() {
    let mut session = running();
    session.handle(Input::Stop, second(10));
    actions(&mut session);
    guest(&mut session, FromGuest::Challenge(challenge(1)), second(11));
    session.handle(granted(), second(11));
    session.handle(Input::GuestBroke(FrameError::Malformed(1)), second(11));
    assert_eq!(actions(&mut session), []);
    session.handle(Input::Closed("exit 0".into()), second(12));
    guest(&mut session, FromGuest::Stop(StopReason::Internal), second(13));
    session.handle_timeout(second(1000));
    assert_eq!(actions(&mut session), []);
}

#[test]
fn details_are_cut_at_their_limit() {
    assert_eq!(cut("ä".repeat(DETAIL_MAX)), "ä".repeat(DETAIL_MAX));
    assert_eq!(cut("ä".repeat(DETAIL_MAX + 1)), "ä".repeat(DETAIL_MAX));
}
