//! The tests that need a real work VM: one machine for all that can share it.

mod disk;
mod jail;
mod kills;
mod lease;
mod tamper;
mod thread;
mod uplink;

use crate::{
    build::Plan,
    leaks,
    probe::Probe,
    run::{Result, chain},
    scene::{LEASE_S, Scene},
    world,
};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Between two looks at something that takes seconds.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The scene and what lives in it between trials.
struct Stage {
    plan: Plan,
    scene: Option<Scene>,
    probe: Option<Probe>,
    made: Vec<leaks::Made>,
    canary: Option<leaks::Made>,
}

type Shared = Arc<Mutex<Stage>>;
type Outcome = std::result::Result<(), Failed>;

/// Runs every trial in order; each may rely on those before it having left the work VM running.
pub(crate) fn inside(plan: &Path, rest: Vec<String>) -> Result<ExitCode> {
    let plan = Plan::read(plan)?;
    world::make()?;
    let mut scene = Scene::open(&plan, LEASE_S)?;
    scene.home.record_uplink()?;
    let stage = Stage { plan, scene: Some(scene), probe: None, made: Vec::new(), canary: None };
    let shared = Arc::new(Mutex::new(stage));
    let mut arguments = Arguments::from_iter(
        std::iter::once("suite".to_owned()).chain(rest.into_iter().skip_while(|a| a == "--")),
    );
    arguments.test_threads = Some(1);
    let conclusion = libtest_mimic::run(&arguments, trials(&shared));
    Ok(conclusion.exit_code())
}

fn trials(shared: &Shared) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut add = |name: &str, test: fn(&mut Stage) -> Outcome| {
        let shared = shared.clone();
        trials.push(Trial::test(name, move || test(&mut lock(&shared))));
    };
    add("tampered_pieces_are_refused_and_named", tamper::tampered_pieces);
    add("tampered_metadata_of_the_release_is_refused_and_named", tamper::tampered_metadata);
    add("tampered_repository_is_refused_and_the_installed_release_stays", tamper::tampered_repository);
    add("work_vm_starts_and_reaches_its_session", thread::starts);
    add("uplink_is_the_device_asked_for_and_the_other_is_not_there", thread::uplink_device);
    add("qemu_and_relay_are_jailed", |stage| {
        let uplink = stage.plan.uplink.name();
        jail::confined(&stage.scene()?.home, uplink)
    });
    add("page_is_read_through_the_tunnel", thread::page_is_read);
    add("large_file_arrives_whole", thread::large_file);
    add("page_is_not_read_while_the_gateway_is_down_and_is_again_after", thread::gateway_restart);
    add("page_is_read_while_control_is_down", thread::control_restart);
    for (number, attempt) in leaks::ATTEMPTS.iter().enumerate() {
        let shared = shared.clone();
        trials.push(Trial::test(format!("leak_{}", attempt.name.replace('-', "_")), move || {
            let mut stage = lock(&shared);
            let made = attempt.make(stage.probe()?, number).map_err(words)?;
            let quiet = crate::scene::Recording { link: Vec::new(), office: Vec::new() };
            let open_door = !made.stopped(&quiet);
            let said = made.said.clone();
            stage.made.push(made);
            if open_door { Err(said.into()) } else { Ok(()) }
        }));
    }
    let mut add = |name: &str, test: fn(&mut Stage) -> Outcome| {
        let shared = shared.clone();
        trials.push(Trial::test(name, move || test(&mut lock(&shared))));
    };
    add("page_is_still_read_after_all_attempts", thread::page_is_read);
    add("canary_is_let_through", thread::canary);
    add("tap_before_the_relay_holds_no_marker_in_clear", uplink::tap);
    add("work_vm_closes_when_asked_and_leaves_no_process", thread::closes);
    for (name, trial) in uplink::TRIALS {
        add(name, *trial);
    }
    let uplink = lock(shared).plan.uplink;
    for (name, trial) in kills::trials(uplink) {
        add(name, trial);
    }
    if uplink == crate::build::Backend::Port {
        add("state_on_a_full_disk_is_never_half_written_and_works_again_with_room", disk::state);
        add("release_is_not_published_by_halves_on_a_full_disk", disk::repository);
    }
    add("changed_root_image_stops_the_work_vm", tamper::changed_root);
    add("work_vm_starts_again", thread::starts);
    add("captures_hold_no_marker_and_only_tunnel_packets", thread::captures);
    add("work_vm_starts_under_a_short_lease", lease::starts_under_a_short_lease);
    add("transfer_outlasts_three_renewals", lease::transfer_outlasts_renewals);
    add("work_vm_without_control_runs_to_the_end_of_its_lease", lease::ends_with_its_lease);
    trials
}

fn lock(shared: &Shared) -> MutexGuard<'_, Stage> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn words(error: crate::run::Error) -> Failed {
    chain(&error).into()
}

impl Stage {
    fn scene(&mut self) -> std::result::Result<&mut Scene, Failed> {
        self.scene.as_mut().ok_or_else(|| "the scene is closed".into())
    }

    fn probe(&mut self) -> std::result::Result<&Probe, Failed> {
        self.probe.as_ref().ok_or_else(|| "the work VM did not start".into())
    }
}
