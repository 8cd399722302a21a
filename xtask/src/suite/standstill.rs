//! A trial of a work VM that stands still: its host sleeps, or has no time for it. Its clocks jump when it goes on.

use super::{
    LOOK_EVERY, Outcome, Stage,
    kills::held,
    thread::{closes, page_is_read, starts},
    words,
};
use crate::{
    office::SILENCE_S,
    scene::{LEASE_S, PATIENCE},
};
use libtest_mimic::Failed;
use rustix::process::{Signal, pidfd_send_signal};
use std::{
    thread,
    time::{Duration, Instant},
};

/// The revisions of two bundles that no other trial comes near.
const REVISIONS: [u64; 2] = [100, 101];
/// For how long no packet may come here before the tunnel is closed, in seconds.
const BRIEF_SILENCE_S: u64 = 10;
/// Longer than that, and than what is still no standstill.
const STANDSTILL: Duration = Duration::from_secs(20);

/// Nothing came for longer than silence may last, but the work VM could not have heard it: it takes up the tunnel
/// again, and asks for a new lease at once.
pub(super) fn longer_than_silence(stage: &mut Stage) -> Outcome {
    stage.quiet()?;
    stage.scene()?.office.sign_bundle(REVISIONS[0], LEASE_S, BRIEF_SILENCE_S).map_err(words)?;
    starts(stage)?;
    page_is_read(stage)?;
    let before = lease(stage)?;
    signal(Signal::STOP)?;
    // Nothing happens meanwhile that could be waited for.
    thread::sleep(STANDSTILL);
    signal(Signal::CONT)?;
    page_is_read(stage)?;
    let limit = Instant::now() + PATIENCE;
    while lease(stage)? == before {
        if Instant::now() > limit {
            return Err("the lease was not renewed".into());
        }
        thread::sleep(LOOK_EVERY);
    }
    page_is_read(stage)?;
    stage.scene()?.office.sign_bundle(REVISIONS[1], LEASE_S, SILENCE_S).map_err(words)?;
    closes(stage)
}

/// When the lease in use was issued, and under which revision.
fn lease(stage: &mut Stage) -> Result<(u64, u64), Failed> {
    let status = stage.scene()?.home.status().map_err(words)?;
    let field = |name: &str| status["lease"][name].as_u64();
    let both = field("issued_at").zip(field("revision"));
    let lease = both.filter(|(_, revision)| status["state"] == "running" && *revision == REVISIONS[0]);
    lease.ok_or_else(|| format!("status says {status}").into())
}

fn signal(signal: Signal) -> Outcome {
    let processes = held("qemu-system");
    if processes.is_empty() {
        return Err("no QEMU runs".into());
    }
    let sent = processes.iter().try_for_each(|process| pidfd_send_signal(process, signal));
    sent.map_err(|errno| format!("signal QEMU: {errno}").into())
}
