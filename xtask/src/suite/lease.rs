//! Trials under leases that live for seconds: renewal without a gap, and the end.

use super::{
    LOOK_EVERY, Outcome, Stage,
    thread::{fetch_large_file, page_is_read, starts},
    words,
};
use crate::{
    build::Plan,
    liar::unix_now,
    scene::{PATIENCE, Scene},
};
use libtest_mimic::Failed;
use std::time::{Duration, Instant};

/// How long leases live here, in seconds.
const SHORT_LEASE_S: u64 = 20;
/// Bytes per second of a transfer that outlasts three renewals of such leases.
const SLOWLY: u64 = 200_000;
/// How long a transfer has to last for that.
const SLOW_TRANSFER: Duration = Duration::from_secs(35);

/// The first scene is over: a second one, in the same hosts, with leases that live for seconds.
pub(super) fn starts_under_a_short_lease(stage: &mut Stage) -> Outcome {
    (stage.probe, stage.liar) = (None, None);
    if let Some(first) = stage.scene.take() {
        first.close().map_err(words)?;
    }
    let scratch = stage.plan.scratch.join("short");
    // There is one already where its work VM did not start or ended.
    let _ = std::fs::remove_dir_all(&scratch);
    std::fs::create_dir(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
    let plan = Plan { scratch, ..stage.plan.clone() };
    stage.scene = Some(Scene::open(&plan, SHORT_LEASE_S).map_err(words)?);
    starts(stage)
}

/// For trials that need the second scene, should they run without the one before.
fn under_a_short_lease(stage: &mut Stage) -> Outcome {
    if stage.scene.as_ref().is_some_and(|scene| scene.lease_s == SHORT_LEASE_S) && stage.runs()? {
        return Ok(());
    }
    starts_under_a_short_lease(stage)
}

pub(super) fn transfer_outlasts_renewals(stage: &mut Stage) -> Outcome {
    under_a_short_lease(stage)?;
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
pub(super) fn ends_with_its_lease(stage: &mut Stage) -> Outcome {
    under_a_short_lease(stage)?;
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
