//! The tests that need a real work VM: one machine for all that can share it.

use crate::{
    build::{Backend, Plan},
    leaks,
    office::{INTRANET_NAME, LARGE_FILE, LARGE_FILE_LEN, TITLE},
    probe::Probe,
    run::{Result, chain},
    scene::{LEASE_S, PATIENCE, Scene, read_page, running},
    world,
};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// How long leases live in the second scene, in seconds.
const SHORT_LEASE_S: u64 = 20;
/// Bytes per second of a transfer that outlasts three renewals of such leases.
const SLOWLY: u64 = 200_000;
/// How long a transfer has to last for that.
const SLOW_TRANSFER: Duration = Duration::from_secs(35);
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
    let scene = Scene::open(&plan, LEASE_S)?;
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
    add("tampered_pieces_are_refused_and_named", tampered_pieces);
    add("tampered_metadata_of_the_release_is_refused_and_named", tampered_metadata);
    add("tampered_repository_is_refused_and_the_installed_release_stays", tampered_repository);
    add("work_vm_starts_and_reaches_its_session", starts);
    add("uplink_is_the_device_asked_for_and_the_other_is_not_there", uplink_device);
    add("qemu_and_relay_are_jailed", jailed);
    add("page_is_read_through_the_tunnel", page_is_read);
    add("large_file_arrives_whole", large_file);
    add("page_is_not_read_while_the_gateway_is_down_and_is_again_after", gateway_restart);
    add("page_is_read_while_control_is_down", control_restart);
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
    add("page_is_still_read_after_all_attempts", page_is_read);
    add("canary_is_let_through", canary);
    add("work_vm_closes_when_asked_and_leaves_no_process", closes);
    add("changed_root_image_stops_the_work_vm", changed_root);
    add("work_vm_starts_again", starts);
    add("captures_hold_no_marker_and_only_tunnel_packets", captures);
    add("work_vm_starts_under_a_short_lease", starts_under_a_short_lease);
    add("transfer_outlasts_three_renewals", transfer_outlasts_renewals);
    add("work_vm_without_control_runs_to_the_end_of_its_lease", ends_with_its_lease);
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

fn starts(stage: &mut Stage) -> Outcome {
    let scene = stage.scene()?;
    scene.home.start().map_err(words)?;
    let status = scene.home.status().map_err(words)?;
    let probe = scene.home.probe().map_err(words)?;
    stage.probe = Some(probe);
    let reached: Vec<&str> =
        status["states"].as_array().into_iter().flatten().filter_map(|s| s["state"].as_str()).collect();
    if status["state"] == "running" && reached.last() == Some(&"session") {
        return Ok(());
    }
    Err(format!("status says {status}").into())
}

fn uplink_device(stage: &mut Stage) -> Outcome {
    const LOOK: &str = "cat /sys/class/virtio-ports/*/name; cat /sys/bus/pci/drivers/vfio-pci/0*/device; \
        ls /sys/kernel/iommu_groups; ls /sys/class/net";
    let seen = stage.probe()?.must(0, &["/bin/sh", "-c", &format!("{{ {LOOK}; }} 2>/dev/null")], PATIENCE);
    let seen = seen.map_err(words)?;
    let has = |word: &str| seen.lines().any(|line| line == word);
    // The network device of virtio 1; IOMMU groups are numbered from 0.
    let vfio = (has("0x1041"), has("0"));
    let right = match stage.plan.uplink {
        Backend::Port => has("kontor.uplink") && vfio == (false, false),
        Backend::Vfio => !has("kontor.uplink") && vfio == (true, true),
    };
    let interfaces = seen.lines().rev().take(2).collect::<Vec<_>>();
    if right && interfaces == ["lo", "kontor0"] { Ok(()) } else { Err(format!("seen: {seen}").into()) }
}

fn jailed(stage: &mut Stage) -> Outcome {
    let uplink = stage.plan.uplink.name();
    crate::suite_jail::confined(&stage.scene()?.home, uplink)
}

fn page_is_read(stage: &mut Stage) -> Outcome {
    let (title, _) = read_page(stage.probe()?).map_err(words)?;
    if title == TITLE { Ok(()) } else { Err(format!("the page's title is {title:?}").into()) }
}

fn large_file(stage: &mut Stage) -> Outcome {
    fetch_large_file(stage, "")
}

/// Fetches the large file in the work VM in one go and compares its digest.
fn fetch_large_file(stage: &mut Stage, options: &str) -> Outcome {
    let site = stage.scene()?.office.path("site").join(LARGE_FILE);
    let expected = hex::encode(sha256(&site).map_err(words)?);
    let fetch = format!(
        "/usr/bin/curl -sS --max-time 120 {options} http://{INTRANET_NAME}/{LARGE_FILE} | /usr/bin/sha256sum"
    );
    let printed = stage.probe()?.must(1000, &["/bin/sh", "-c", &fetch], PATIENCE * 3).map_err(words)?;
    if printed.starts_with(&expected) {
        return Ok(());
    }
    Err(format!("of {LARGE_FILE_LEN} bytes with digest {expected} came {printed}").into())
}

fn canary(stage: &mut Stage) -> Outcome {
    let made = leaks::CANARY.make(stage.probe()?, leaks::ATTEMPTS.len()).map_err(words)?;
    stage.canary = Some(made);
    Ok(())
}

fn sha256(path: &Path) -> Result<Vec<u8>> {
    let printed = crate::run::quietly(std::process::Command::new("sha256sum").arg(path))?;
    let digits: Vec<u8> = printed.into_iter().take(64).collect();
    hex::decode(digits)
        .map_err(|e| crate::run::Error::Unexpected(format!("sha256sum printed no digest: {e}")))
}

fn gateway_restart(stage: &mut Stage) -> Outcome {
    stage.scene()?.office.kill_gateway().map_err(words)?;
    let url = format!("http://{INTRANET_NAME}/");
    let without = ["/usr/bin/curl", "-sS", "--fail", "--max-time", "5", &url];
    let outcome = stage.probe().map(|p| p.must(1000, &without, PATIENCE).is_ok());
    stage.scene()?.office.start_gateway().map_err(words)?;
    if outcome? {
        return Err("the page was read without a gateway".into());
    }
    let again = [
        "/usr/bin/curl",
        "-sS",
        "--fail",
        "--retry",
        "20",
        "--retry-all-errors",
        "--retry-delay",
        "1",
        "--max-time",
        "5",
        &url,
    ];
    stage.probe()?.must(1000, &again, PATIENCE * 2).map_err(words)?;
    Ok(())
}

/// Control is needed for a lease, not for a packet.
fn control_restart(stage: &mut Stage) -> Outcome {
    stage.scene()?.office.kill_control().map_err(words)?;
    let read = page_is_read(stage);
    stage.scene()?.office.start_control().map_err(words)?;
    read
}

fn closes(stage: &mut Stage) -> Outcome {
    stage.probe = None;
    let output = stage.scene()?.home.kontor(&["stop"]).map_err(words)?;
    if !output.status.success() {
        return Err(format!("kontor stop: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    for name in ["qemu-system", "kontor-relay"] {
        let left = running(name);
        if !left.is_empty() {
            return Err(format!("{name} still runs: {left:?}").into());
        }
    }
    Ok(())
}

/// A byte changed in a piece that is verified before the start: exit code 3, and the piece is named.
fn tampered_pieces(stage: &mut Stage) -> Outcome {
    let scene = stage.scene()?;
    for piece in ["kernel", "initrd", "segment"] {
        let file = scene.home.slot_file(piece).map_err(words)?;
        flip(&file, 1000.min(length(&file)? / 2))?;
        let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
        flip(&file, 1000.min(length(&file)? / 2))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !said.contains(piece) {
            return Err(format!("changed {piece}: {} {said}", output.status).into());
        }
    }
    Ok(())
}

/// A byte changed in what vouches for the installed release: exit code 3, and the file is named.
fn tampered_metadata(stage: &mut Stage) -> Outcome {
    let scene = stage.scene()?;
    for (name, said) in [
        ("manifest.json", "manifest.json"),
        ("tuf/1.root.json", "1.root.json"),
        ("tuf/timestamp.json", "timestamp.json"),
        ("tuf/1.snapshot.json", "1.snapshot.json"),
        ("tuf/1.targets.json", "1.targets.json"),
    ] {
        let file = scene.home.slot_file(name).map_err(words)?;
        flip(&file, length(&file)? / 2)?;
        let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
        flip(&file, length(&file)? / 2)?;
        let heard = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !heard.contains(said) {
            return Err(format!("changed {name}: {} {heard}", output.status).into());
        }
    }
    Ok(())
}

/// A byte changed in each file of the repository: nothing is installed, exit code 3, and the part is named.
fn tampered_repository(stage: &mut Stage) -> Outcome {
    let scene = stage.scene()?;
    let repository = scene.office.repository();
    let installed = std::fs::read(scene.home.slot_file("manifest.json").map_err(words)?).ok();
    let mut files = Vec::new();
    for directory in ["metadata", "targets"] {
        let entries = std::fs::read_dir(repository.join(directory)).map_err(|e| e.to_string())?;
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A keyset is no part of a release, and the slot keeps the first root.
        if name.contains("keyset-") || name == "1.root.json" {
            continue;
        }
        // `1.snapshot.json` is the role snapshot, `DIGEST.smoke.root.img` the piece root.img.
        let part = match name.strip_suffix(".json").and_then(|stem| stem.split('.').next_back()) {
            Some(role) if file.parent() == Some(&repository.join("metadata")) => role.to_owned(),
            _ => name.splitn(3, '.').last().unwrap_or_default().to_owned(),
        };
        flip(&file, length(&file)? / 2)?;
        let output = scene.home.install(&repository).map_err(words)?;
        flip(&file, length(&file)? / 2)?;
        let heard = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(3) || !heard.contains(&part) {
            return Err(format!("changed {name}: {} {heard}", output.status).into());
        }
    }
    let now = std::fs::read(scene.home.slot_file("manifest.json").map_err(words)?).ok();
    if installed.is_none() || installed != now {
        return Err("the installed release changed".into());
    }
    let output = scene.home.install(&repository).map_err(words)?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("the whole repository: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Bytes changed in the root image, which is verified as it is read: the work VM stops itself, and
/// the host says that it was dm-verity.
fn changed_root(stage: &mut Stage) -> Outcome {
    const BLOCK: u64 = 4096;
    let scene = stage.scene()?;
    let file = scene.home.slot_file("root.img").map_err(words)?;
    let manifest = std::fs::read(scene.home.slot_file("manifest.json").map_err(words)?)?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    let blocks = manifest["image"]["verity"]["data_blocks"].as_u64().ok_or("no data blocks")?;
    let cases: [(&str, Vec<u64>); 3] = [
        ("its first block", vec![BLOCK / 2]),
        ("its hash tree", vec![blocks * BLOCK + 100]),
        // The file system's own structures stand at the beginning; what a program is read from, behind.
        ("the data of its files", (blocks / 8..blocks).map(|block| block * BLOCK + 100).collect()),
    ];
    for (what, offsets) in cases {
        offsets.iter().try_for_each(|offset| flip(&file, *offset))?;
        let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
        offsets.iter().try_for_each(|offset| flip(&file, *offset))?;
        let stop = scene.home.status().map_err(words)?["stop"].clone();
        let verity = stop["detail"].as_str().is_some_and(|detail| detail.contains("dm-verity"));
        if output.status.code() != Some(3) || stop["reason"] != "kernel-panic" || !verity {
            return Err(format!("changed in {what}: {} {stop}", output.status).into());
        }
    }
    Ok(())
}

fn length(file: &Path) -> std::result::Result<u64, Failed> {
    Ok(std::fs::metadata(file).map_err(|e| format!("{}: {e}", file.display()))?.len())
}

/// Inverts the byte of `file` at `offset`; twice restores it.
fn flip(file: &Path, offset: u64) -> Outcome {
    use std::os::unix::fs::FileExt;
    let failed = |e: std::io::Error| Failed::from(format!("{}: {e}", file.display()));
    let open = std::fs::OpenOptions::new().read(true).write(true).open(file).map_err(failed)?;
    let mut byte = [0];
    open.read_exact_at(&mut byte, offset).map_err(failed)?;
    open.write_all_at(&[!byte[0]], offset).map_err(failed)
}

fn captures(stage: &mut Stage) -> Outcome {
    stage.probe = None;
    let Some(scene) = stage.scene.take() else { return Err("the scene is closed".into()) };
    let recording = scene.close().map_err(words)?;
    let tally = crate::capture::tally(&recording.link);
    if tally.tunnel_frames == 0 || tally.control_frames == 0 || tally.other_frames > 0 {
        return Err(format!("{tally:?}").into());
    }
    if !stage.canary.as_ref().is_some_and(|canary| canary.sang(&recording)) {
        return Err("the recordings miss what they must show".into());
    }
    let leaked: Vec<&str> = stage.made.iter().filter(|m| !m.stopped(&recording)).map(|m| m.name).collect();
    if leaked.is_empty() { Ok(()) } else { Err(format!("captured: {leaked:?}").into()) }
}

/// The first scene is over: a second one, in the same hosts, with leases that live for seconds.
fn starts_under_a_short_lease(stage: &mut Stage) -> Outcome {
    stage.probe = None;
    if let Some(first) = stage.scene.take() {
        first.close().map_err(words)?;
    }
    let scratch = stage.plan.scratch.join("short");
    std::fs::create_dir(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
    let plan = Plan { scratch, ..stage.plan.clone() };
    stage.scene = Some(Scene::open(&plan, SHORT_LEASE_S).map_err(words)?);
    starts(stage)
}

fn transfer_outlasts_renewals(stage: &mut Stage) -> Outcome {
    let admitted = |stage: &mut Stage| {
        Ok::<_, Failed>(stage.scene()?.office.gateway_said("admitted").map_err(words)?.len())
    };
    let (before, begin) = (admitted(stage)?, Instant::now());
    fetch_large_file(stage, &format!("--limit-rate {SLOWLY}"))?;
    let (renewals, lasted) = (admitted(stage)? - before, begin.elapsed());
    if renewals >= 3 && lasted >= SLOW_TRANSFER {
        return Ok(());
    }
    Err(format!("{renewals} renewals in {} s", lasted.as_secs()).into())
}

/// Control is gone: the lease in force is used to its end, then both sides let go and say why.
fn ends_with_its_lease(stage: &mut Stage) -> Outcome {
    stage.scene()?.office.kill_control().map_err(words)?;
    let status = stage.scene()?.home.status().map_err(words)?;
    let not_after = status["lease"]["not_after"].as_u64().ok_or("no lease in the status")?;
    page_is_read(stage)?;
    let scene = stage.scene()?;
    let limit = Instant::now() + Duration::from_secs(SHORT_LEASE_S) + PATIENCE;
    let removed = loop {
        let removed = scene.office.gateway_said("peers removed").map_err(words)?;
        if !removed.is_empty() || Instant::now() > limit {
            break removed;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    if removed.last().is_none_or(|line| !line.contains("peers=0")) || unix_now() < not_after {
        return Err(format!("the gateway said {removed:?}, the lease ends at {not_after}").into());
    }
    let status = loop {
        let status = scene.home.status().map_err(words)?;
        if status["state"] == "stopped" || Instant::now() > limit {
            break status;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let stop = &status["stop"];
    if status["state"] == "stopped" && stop["reason"] == "lease-expired" && stop["inferred"] == false {
        return Ok(());
    }
    Err(format!("status says {status}").into())
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
