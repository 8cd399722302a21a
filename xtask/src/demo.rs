//! `cargo xtask demo`: an office and a work VM on this machine, and a report of what happened.

use crate::{
    build::{self, Backend, Plan},
    capture, leaks,
    office::{MEMORY_MIB, TITLE},
    packages,
    report::{ImageSize, Leak, Memory, Page, Report, Step, Uplink},
    run::{Error, Result, at},
    scene::{LEASE_S, Scene, read_page, resident_kib, running},
    world::{self, Role},
};
use serde_json::Value;
use std::{
    fs,
    io::Write,
    path::Path,
    process::{ExitCode, Stdio},
};

/// Outside: builds, then runs [`inside`].
pub(crate) fn run(json: Option<&Path>, uplink: Backend) -> Result<ExitCode> {
    packages::ensure()?;
    let bin = build::programs()?;
    let image = build::image(&bin)?;
    let plan = Plan {
        bin,
        image,
        uplink,
        scratch: world::SCRATCH.into(),
        json: json.is_some().then(|| STDOUT.into()),
    };
    let mut command = world::command(Role::Demo, &plan, &[])?;
    // The errors and the report for people go where ours go.
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| Error::Start("the outer namespaces".into(), source))?;
    if let Some(target) = json.filter(|_| !output.stdout.is_empty()) {
        write(target, &output.stdout)?;
    }
    Ok(if output.status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Names standard output in the place of a file.
pub(crate) const STDOUT: &str = "-";

/// Writes a report that the inside printed.
pub(crate) fn write(target: &Path, bytes: &[u8]) -> Result<()> {
    let written = if target == Path::new(STDOUT) {
        std::io::stdout().lock().write_all(bytes)
    } else {
        fs::write(target, bytes)
    };
    written.map_err(at("write the report", target))
}

/// Inside the outer namespaces.
pub(crate) fn inside(plan: &Path) -> Result<ExitCode> {
    let plan = Plan::read(plan)?;
    let step = |text: &str| eprintln!("   {text}");
    step("founding an office, enrolling a home PC");
    world::make()?;
    let scene = Scene::open(&plan, LEASE_S)?;
    step("starting the work VM");
    scene.home.start()?;
    let status = scene.home.status()?;
    let probe = scene.home.probe()?;
    step("reading the intranet's page in the work VM");
    let page = match read_page(&probe) {
        Ok((title, time)) => {
            Page { ok: title == TITLE, title, ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX) }
        }
        Err(error) => {
            eprintln!("{}", crate::run::chain(&error));
            Page { ok: false, title: String::new(), ms: 0 }
        }
    };
    let mut made = Vec::new();
    for (number, attempt) in leaks::ATTEMPTS.iter().enumerate() {
        step(&format!("trying to leak: {}", attempt.name));
        made.push(attempt.make(&probe, number)?);
    }
    let canary = leaks::CANARY.make(&probe, leaks::CANARY_NUMBER)?;
    let memory = memory(&scene);
    step("closing");
    drop(probe);
    scene.home.kontor(&["stop"])?;
    let recording = scene.close()?;
    if !canary.sang(&recording) {
        return Err(Error::Unexpected(format!("the recordings miss what they must show: {}", canary.said)));
    }
    let leaks = made
        .into_iter()
        .map(|m| Leak { name: m.name.into(), stopped: m.stopped(&recording), by: m.said })
        .collect();
    let report = Report {
        page,
        boot: steps(&status),
        leaks,
        uplink: Uplink { backend: plan.uplink.name().into(), tally: capture::tally(&recording.link) },
        image: image_size(&plan.image)?,
        memory,
        accel: status["accel"].as_str().unwrap_or("unknown").to_owned(),
    };
    if let Some(file) = &plan.json {
        let mut bytes = serde_json::to_vec_pretty(&report)
            .map_err(|source| Error::Json { what: "the report".into(), source })?;
        bytes.push(b'\n');
        write(file, &bytes)?;
    }
    eprintln!("{}", report.text());
    Ok(if report.good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn steps(status: &Value) -> Vec<Step> {
    let states = status["states"].as_array().map(Vec::as_slice).unwrap_or_default();
    states
        .iter()
        .map(|s| Step {
            step: s["state"].as_str().unwrap_or_default().to_owned(),
            ms: s["at_ms"].as_u64().unwrap_or_default(),
        })
        .collect()
}

/// What a running work VM takes of the host's memory.
pub(crate) fn memory(scene: &Scene) -> Memory {
    Memory {
        guest_mib: MEMORY_MIB,
        kontord_kib: scene.home.kontord_pid().and_then(resident_kib).unwrap_or_default(),
        relay_kib: running("kontor-relay").first().copied().and_then(resident_kib).unwrap_or_default(),
    }
}

pub(crate) fn image_size(image: &Path) -> Result<ImageSize> {
    let file = image.join("image.json");
    let bytes = fs::read(&file).map_err(at("read", &file))?;
    let image: Value =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { what: "image.json".into(), source })?;
    let bytes = ["kernel", "initrd", "root"].iter().filter_map(|p| image[p]["bytes"].as_u64()).sum();
    Ok(ImageSize { bytes, root_hash: image["verity"]["root_hash"].as_str().unwrap_or_default().to_owned() })
}
