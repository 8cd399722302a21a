//! The tests that need a real work VM: one machine for all that can share it.

use crate::{
    build::Plan,
    leaks,
    office::{INTRANET_NAME, LARGE_FILE, LARGE_FILE_LEN, TITLE},
    probe::Probe,
    run::{Result, chain},
    scene::{PATIENCE, Scene, read_page, running},
};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The scene and what lives in it between trials.
struct Stage {
    scene: Option<Scene>,
    probe: Option<Probe>,
    made: Vec<leaks::Made>,
}

type Shared = Arc<Mutex<Stage>>;
type Outcome = std::result::Result<(), Failed>;

/// Runs every trial in order; each may rely on those before it having left the work VM running.
pub(crate) fn inside(plan: &Path, rest: Vec<String>) -> Result<ExitCode> {
    let plan = Plan::read(plan)?;
    let scene = Scene::open(&plan)?;
    let shared = Arc::new(Mutex::new(Stage { scene: Some(scene), probe: None, made: Vec::new() }));
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
    add("page_is_read_through_the_tunnel", page_is_read);
    add("large_file_arrives_whole", large_file);
    add("page_is_not_read_while_the_gateway_is_down_and_is_again_after", gateway_restart);
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
    add("work_vm_closes_when_asked_and_leaves_no_process", closes);
    add("changed_root_image_stops_the_work_vm", changed_root);
    add("work_vm_starts_again", starts);
    add("captures_hold_no_marker_and_only_tunnel_packets", captures);
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

fn page_is_read(stage: &mut Stage) -> Outcome {
    let (title, _) = read_page(stage.probe()?).map_err(words)?;
    if title == TITLE { Ok(()) } else { Err(format!("the page's title is {title:?}").into()) }
}

fn large_file(stage: &mut Stage) -> Outcome {
    let site = stage.scene()?.office.path("site").join(LARGE_FILE);
    let expected = hex::encode(sha256(&site).map_err(words)?);
    let fetch =
        format!("/usr/bin/curl -sS --max-time 120 http://{INTRANET_NAME}/{LARGE_FILE} | /usr/bin/sha256sum");
    let printed = stage.probe()?.must(1000, &["/bin/sh", "-c", &fetch], PATIENCE * 3).map_err(words)?;
    if printed.starts_with(&expected) {
        return Ok(());
    }
    Err(format!("of {LARGE_FILE_LEN} bytes with digest {expected} came {printed}").into())
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

/// A byte changed in the root image, which is verified as it is read: the work VM stops itself.
fn changed_root(stage: &mut Stage) -> Outcome {
    let scene = stage.scene()?;
    let file = scene.home.slot_file("root.img").map_err(words)?;
    flip(&file, 1030)?;
    let output = scene.home.kontor(&["start", "--headless"]).map_err(words)?;
    flip(&file, 1030)?;
    if output.status.code() != Some(3) {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("changed root image: {} {said}", output.status).into());
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
    let tally = crate::capture::tally(&recording.link, crate::office::GATEWAY_PORT);
    if tally.tunnel_frames == 0 || tally.other_frames > 0 {
        return Err(format!("{tally:?}").into());
    }
    let leaked: Vec<&str> = stage.made.iter().filter(|m| !m.stopped(&recording)).map(|m| m.name).collect();
    if leaked.is_empty() { Ok(()) } else { Err(format!("captured: {leaked:?}").into()) }
}
