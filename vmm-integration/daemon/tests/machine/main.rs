//! `kontord` and `kontor` as processes, with a QEMU and a relay's program that this same executable plays,
//! and an office in it. See `stub.rs` for what the guests do, `world.rs` for the PC, and
//! the other files for the trials.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod answers;
mod channels;
mod checks;
mod clients;
mod ends;
mod escape;
#[path = "../https/mod.rs"]
mod https;
mod install;
mod jail;
mod life;
#[path = "../repository/mod.rs"]
#[expect(dead_code, reason = "the slots' own tests use all of it")]
mod repository;
mod stub;
#[path = "../tenant/mod.rs"]
mod tenant;
mod waits;
mod world;

use libtest_mimic::{Arguments, Trial};
use std::{io::Write, path::Path, process::ExitCode, time::Duration};
use world::{Ran, Setup, World};

/// Nothing here takes so long: a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("-nodefaults") => stub::qemu(arguments),
        Some("--uplink") => stub::relay(&arguments),
        _ => {}
    }
    let check = std::process::Command::new(env!("CARGO_BIN_EXE_kontor-jail")).arg("check").output().unwrap();
    let words = String::from_utf8_lossy(&check.stderr).into_owned();
    if !check.status.success() && words.contains("user namespaces") {
        let mut out = std::io::stdout();
        writeln!(out, "skipped: nobody may make user namespaces here: {}", words.trim()).unwrap();
        return ExitCode::SUCCESS;
    }
    macro_rules! trials {
        ($($module:ident: $($test:ident),* $(,)?;)*) => {
            vec![$($(Trial::test(stringify!($test), || { $module::$test(); Ok(()) })),*),*]
        };
    }
    let trials = trials! {
        life:
            boot_reaches_ready_and_stop_powers_off,
            renewed_lease_moves_the_end,
            second_start_follows_the_first,
            machine_starts_again_after_a_stop,
            start_right_behind_a_stop_waits_for_it,
            start_with_a_window_is_not_there_yet,
            terminated_kontord_leaves_nothing_behind,
            second_signal_hurries,
            killed_kontord_takes_everything_with_it;
        jail:
            qemu_gets_its_descriptors_and_nothing_else,
            qemu_cannot_get_out_of_its_jail,
            qemu_reaches_no_socket_of_the_host_by_its_uplink,
            relay_that_was_taken_over_reaches_the_gateways_and_nobody_else,
            qemu_has_no_more_threads_than_its_jail_gives_it,
            jailed_processes_are_confined_and_stay_apart,
            host_without_user_namespaces_starts_nothing,
            jailer_that_hangs_is_ended_by_a_stop;
        ends:
            garbage_of_the_guest_stops_it,
            garbage_on_the_uplink_stops_the_guest,
            guests_own_reason_is_shown,
            kernel_panic_on_the_console_is_inferred,
            kernel_panic_by_device_is_inferred,
            killed_qemu_is_inferred_as_vanished,
            qemu_that_does_not_start_is_told_with_its_words,
            killed_relay_stops_the_guest,
            flood_on_every_channel_is_stopped_and_does_not_fill_memory;
        waits:
            guest_is_told_when_the_host_has_slept_and_gets_a_new_lease,
            silent_guest_is_stopped,
            guest_and_qemu_that_are_deaf_are_killed,
            guest_that_does_not_power_off_is_made_to;
        answers:
            office_that_refuses_is_quoted,
            office_that_does_not_work_is_unreachable,
            office_with_another_key_gets_no_request,
            answer_that_does_not_verify_stops_the_boot;
        checks:
            emulation_and_test_images_need_the_policy,
            release_below_the_floor_is_not_started,
            release_that_needs_more_memory_is_not_started,
            changed_release_is_not_started_and_the_piece_is_named,
            what_is_missing_is_said,
            doctor_says_what_is_missing_and_what_is_well,
            stop_ends_a_start_that_tries_kvm,
            start_waits_for_the_doctors_trial_of_kvm_and_takes_its_result;
        install:
            keyset_that_the_repository_has_is_installed_with_the_release,
            install_killed_at_any_file_leaves_a_whole_release_and_the_next_one_works;
        channels:
            probe_of_a_test_image_is_served_byte_for_byte,
            probe_of_another_image_is_not_there,
            tap_records_both_directions,
            logs_are_safe_to_print;
        clients:
            garbage_on_the_socket_is_answered_and_survived,
            crowd_of_silent_clients_holds_nobody_off_for_good,
            strangers_are_refused,
            one_kontord_for_a_device,
            kontor_without_kontord_says_so;
    };
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn run(scenario: &'static str) -> (World, Ran) {
    run_with(&Setup::new(scenario))
}

fn run_with(setup: &Setup) -> (World, Ran) {
    let world = World::new(setup);
    let ran = world.start();
    (world, ran)
}

/// The reason of the last stop and whether it is inferred.
fn stopped(world: &World) -> (String, bool) {
    let status = world.status();
    assert_eq!(status["state"], "stopped", "{status}");
    let stop = &status["stop"];
    (stop["reason"].as_str().unwrap().to_owned(), stop["inferred"].as_bool().unwrap())
}

#[track_caller]
fn ended(ran: &Ran, code: i32, words: &str) {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    assert!(format!("{}{}", ran.out, ran.err).contains(words), "{ran:?}");
}

fn make_fifo(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}
