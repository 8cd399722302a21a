//! The tests that need a real work VM: one machine for all that can share it.

mod disk;
mod jail;
mod kills;
mod lease;
mod lies;
mod refusals;
mod standstill;
mod tamper;
mod thread;
mod uplink;

use crate::{
    build::{Backend, Plan},
    leaks,
    liar::Liar,
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
    /// Where control's place is somebody else's.
    liar: Option<Liar>,
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
    let stage = Stage { plan, liar: None, scene: Some(scene), probe: None, made: Vec::new(), canary: None };
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
    let mut add = |name: &str, test: fn(&mut Stage) -> Outcome| trials.push(trial(shared, name, test));
    add("tampered_pieces_are_refused_and_named", tamper::tampered_pieces);
    add("tampered_metadata_of_the_release_is_refused_and_named", tamper::tampered_metadata);
    add("tampered_documents_of_the_host_are_refused_and_named", tamper::tampered_documents);
    add("tampered_repository_is_refused_and_the_installed_release_stays", tamper::tampered_repository);
    add("work_vm_starts_and_reaches_its_session", thread::starts);
    add("uplink_is_the_device_asked_for_and_the_other_is_not_there", thread::uplink_device);
    add("qemu_and_relay_are_jailed", |stage| {
        stage.probe()?;
        let uplink = stage.plan.uplink.name();
        jail::confined(&stage.scene()?.home, uplink)
    });
    add("page_is_read_through_the_tunnel", thread::page_is_read);
    add("large_file_arrives_whole", thread::large_file);
    add("page_is_not_read_while_the_gateway_is_down_and_is_again_after", thread::gateway_restart);
    add("page_is_read_while_control_is_down", thread::control_restart);
    for (number, attempt) in leaks::ATTEMPTS.iter().enumerate() {
        trials.push(trial(shared, &format!("leak_{}", attempt.name.replace('-', "_")), move |stage| {
            let made = attempt.make(stage.probe()?, number).map_err(words)?;
            let quiet = crate::scene::Recording { link: Vec::new(), office: Vec::new() };
            let open_door = !made.stopped(&quiet);
            let said = made.said.clone();
            stage.made.push(made);
            if open_door { Err(said.into()) } else { Ok(()) }
        }));
    }
    let mut add = |name: &str, test: fn(&mut Stage) -> Outcome| trials.push(trial(shared, name, test));
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
    if uplink == Backend::Port {
        add("state_on_a_full_disk_is_never_half_written_and_works_again_with_room", disk::state);
        add("release_is_not_published_by_halves_on_a_full_disk", disk::repository);
        refusals(shared, &mut trials);
        lies(shared, &mut trials);
        let name = "work_vm_goes_on_after_it_stood_still_for_longer_than_silence";
        trials.push(trial(shared, name, standstill::longer_than_silence));
    }
    let mut add = |name: &str, test: fn(&mut Stage) -> Outcome| trials.push(trial(shared, name, test));
    add("changed_root_image_stops_the_work_vm", tamper::changed_root);
    add("work_vm_starts_again", thread::starts);
    add("captures_hold_no_marker_and_only_tunnel_packets", thread::captures);
    add("work_vm_starts_under_a_short_lease", lease::starts_under_a_short_lease);
    add("transfer_outlasts_three_renewals", lease::transfer_outlasts_renewals);
    add("work_vm_without_control_runs_to_the_end_of_its_lease", lease::ends_with_its_lease);
    trials
}

/// What the commands do not take. Which device the uplink is makes no difference to it.
fn refusals(shared: &Shared, trials: &mut Vec<Trial>) {
    let mut add = |name: &str, test: fn(&mut Stage) -> Outcome| trials.push(trial(shared, name, test));
    add("refused_is_a_bundle_that_policy_did_not_sign_or_has_replaced", refusals::bundles);
    add("refused_is_a_release_that_too_few_vouch_for", refusals::releases);
    add("refused_is_a_release_of_others_or_older_than_the_last", refusals::releases_of_others);
    add("refused_is_an_office_of_which_a_byte_was_changed", tamper::tampered_office);
    add("refused_is_metadata_that_expired_but_what_it_vouched_for_starts", refusals::expired);
}

/// What a stolen control tries. Which device the uplink is makes no difference to it.
fn lies(shared: &Shared, trials: &mut Vec<Trial>) {
    trials.push(trial(
        shared,
        "stolen_control_is_believed_where_it_tells_the_truth",
        lies::truth_is_believed,
    ));
    trials.push(trial(
        shared,
        "stolen_control_hears_the_gateway_refuse_every_lie",
        lies::gateway_refuses_all,
    ));
    for case in lies::CASES.iter().skip(1).filter(|case| case.is_told_to_the_host()) {
        let name = format!("stolen_control_brings_no_{}", case.name);
        trials.push(trial(shared, &name, |stage| lies::is_refused(stage, case)));
    }
    trials.push(trial(
        shared,
        "stolen_control_with_a_lease_far_ahead_stops_no_installing",
        lies::future_stops_no_installing,
    ));
    trials.push(trial(shared, "stolen_control_leaves_nothing_behind_that_hinders", lies::honest_again));
}

/// A trial that says, where it fails, what all who took part said last.
fn trial(shared: &Shared, name: &str, test: impl FnOnce(&mut Stage) -> Outcome + Send + 'static) -> Trial {
    let shared = shared.clone();
    Trial::test(name, move || {
        let mut stage = lock(&shared);
        test(&mut stage).map_err(|failed| {
            let evidence = stage.scene.as_ref().map(Scene::evidence).unwrap_or_default();
            format!("{}\n{evidence}", failed.message().unwrap_or_default()).into()
        })
    })
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

    /// The probe of the running work VM, which is started where it does not run.
    fn probe(&mut self) -> std::result::Result<&Probe, Failed> {
        if self.probe.is_none() || !self.runs()? {
            thread::starts(self)?;
        }
        self.probe.as_ref().ok_or_else(|| "the work VM has no probe".into())
    }

    fn runs(&mut self) -> std::result::Result<bool, Failed> {
        Ok(self.scene()?.home.status().map_err(words)?["state"] == "running")
    }

    /// For trials that start a work VM themselves: none runs.
    fn quiet(&mut self) -> Outcome {
        if self.runs()? { thread::closes(self) } else { Ok(()) }
    }
}
