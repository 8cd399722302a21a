//! Trials of the thread itself: start, page, large file, a gateway or control that is away, the end.

use super::{Outcome, Stage, words};
use crate::{
    build::Backend,
    leaks,
    office::{INTRANET_NAME, LARGE_FILE, LARGE_FILE_LEN, TITLE},
    run::Result,
    scene::{PATIENCE, read_page, running},
};
use std::path::Path;

pub(super) fn starts(stage: &mut Stage) -> Outcome {
    stage.probe = None;
    stage.quiet()?;
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

pub(super) fn uplink_device(stage: &mut Stage) -> Outcome {
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

pub(super) fn page_is_read(stage: &mut Stage) -> Outcome {
    let (title, _) = read_page(stage.probe()?).map_err(words)?;
    if title == TITLE { Ok(()) } else { Err(format!("the page's title is {title:?}").into()) }
}

pub(super) fn large_file(stage: &mut Stage) -> Outcome {
    fetch_large_file(stage, "")
}

/// Fetches the large file in the work VM in one go and compares its digest.
pub(super) fn fetch_large_file(stage: &mut Stage, options: &str) -> Outcome {
    let site = stage.scene()?.office.path("site").join(LARGE_FILE);
    let expected = digest(&site).map_err(words)?;
    let fetch = format!(
        "/usr/bin/curl -sS --max-time 120 {options} http://{INTRANET_NAME}/{LARGE_FILE} | /usr/bin/sha256sum"
    );
    let printed = stage.probe()?.must(1000, &["/bin/sh", "-c", &fetch], PATIENCE * 3).map_err(words)?;
    if printed.starts_with(&expected) {
        return Ok(());
    }
    Err(format!("of {LARGE_FILE_LEN} bytes with digest {expected} came {printed}").into())
}

pub(super) fn canary(stage: &mut Stage) -> Outcome {
    let made = leaks::CANARY.make(stage.probe()?, leaks::CANARY_NUMBER).map_err(words)?;
    stage.canary = Some(made);
    Ok(())
}

/// SHA-256 of a file, in lower-case hexadecimal digits.
pub(super) fn digest(path: &Path) -> Result<String> {
    let printed = crate::run::quietly(std::process::Command::new("sha256sum").arg(path))?;
    let digits: Vec<u8> = printed.into_iter().take(64).collect();
    hex::decode(digits)
        .map(hex::encode)
        .map_err(|e| crate::run::Error::Unexpected(format!("sha256sum printed no digest: {e}")))
}

pub(super) fn gateway_restart(stage: &mut Stage) -> Outcome {
    stage.probe()?;
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
pub(super) fn control_restart(stage: &mut Stage) -> Outcome {
    stage.probe()?;
    stage.scene()?.office.kill_control().map_err(words)?;
    let read = page_is_read(stage);
    stage.scene()?.office.start_control().map_err(words)?;
    read
}

pub(super) fn closes(stage: &mut Stage) -> Outcome {
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

pub(super) fn captures(stage: &mut Stage) -> Outcome {
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
