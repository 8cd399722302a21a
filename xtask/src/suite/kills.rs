//! `kill -9` of each process that the work VM needs, while a file comes through the tunnel: what goes on, what
//! stops and for which reason, and that nothing stays behind that hinders the next start.
//!
//! ```text
//! control    nothing happens
//! gateway    started again, the same transfer goes on
//! relay      the work VM is stopped: uplink-failed
//! QEMU       concluded: vanished
//! kontord    QEMU and relay end with it; the next kontord says so
//! ```

use super::{
    LOOK_EVERY, Outcome, Stage,
    thread::{closes, digest, page_is_read, starts},
    words,
};
use crate::{
    build::Backend,
    office::{INTRANET_NAME, LARGE_FILE},
    probe::Probe,
    scene::{PATIENCE, running},
};
use kontor_wire::probe::Output;
use libtest_mimic::Failed;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde_json::Value;
use std::{os::fd::OwnedFd, thread, time::Instant};

/// Bytes per second of the transfers here.
const RATE: u64 = 400_000;
/// A transfer is in its middle when so many bytes have come, and far from its end.
const MIDDLE: u64 = 500_000;
/// Processes on the PC that live and die with kontord.
const ITS_OWN: [&str; 2] = ["qemu-system", "kontor-relay"];
/// How long a process that was killed, and those that go with it, may take to be gone.
const GONE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

type Named = (&'static str, fn(&mut Stage) -> Outcome);

/// What is tried with work VMs of this uplink. The office and kontord do not see which one it is, so their ends are
/// tried with one of the two.
pub(super) fn trials(uplink: Backend) -> Vec<Named> {
    let mut trials: Vec<Named> = match uplink {
        Backend::Port => vec![
            ("killed_control_does_not_disturb_a_transfer", control),
            ("transfer_goes_on_after_the_gateway_was_killed_and_started_again", gateway),
        ],
        Backend::Vfio => Vec::new(),
    };
    trials.push(("killed_relay_stops_the_work_vm_in_mid_transfer_with_the_reason", relay));
    trials.push(("killed_qemu_is_told_in_mid_transfer_as_vanished", qemu));
    if uplink == Backend::Port {
        trials.push(("killed_kontord_takes_the_work_vm_with_it_and_the_next_one_says_so", kontord));
    }
    trials.push(("work_vm_starts_after_all_kills_and_closes", |stage| {
        runs(stage)?;
        page_is_read(stage)?;
        closes(stage)
    }));
    trials
}

/// Control is asked for leases, not for packets.
fn control(stage: &mut Stage) -> Outcome {
    runs(stage)?;
    let output = in_mid_transfer(stage, |stage| stage.scene()?.office.kill_control().map_err(words))?;
    stage.scene()?.office.start_control().map_err(words)?;
    arrived(stage, output)
}

/// The gateway has forgotten its sessions, not its peers: the work VM begins a new session by itself.
fn gateway(stage: &mut Stage) -> Outcome {
    runs(stage)?;
    let output = in_mid_transfer(stage, |stage| {
        let office = &mut stage.scene()?.office;
        office.kill_gateway().map_err(words)?;
        office.start_gateway().map_err(words)
    })?;
    arrived(stage, output)?;
    page_is_read(stage)
}

fn relay(stage: &mut Stage) -> Outcome {
    killed_with_the_work_vm(stage, "kontor-relay", "uplink-failed", false)
}

fn qemu(stage: &mut Stage) -> Outcome {
    killed_with_the_work_vm(stage, "qemu-system", "vanished", true)
}

/// Kills a process without which there is no work VM; then the next one works.
fn killed_with_the_work_vm(stage: &mut Stage, name: &str, reason: &str, inferred: bool) -> Outcome {
    runs(stage)?;
    let mut told = Value::Null;
    let output = in_mid_transfer(stage, |stage| {
        let all = ITS_OWN.into_iter().flat_map(held).collect::<Vec<_>>();
        for process in held(name) {
            pidfd_send_signal(&process, Signal::KILL).map_err(|e| format!("kill {name}: {e}"))?;
        }
        all.iter().try_for_each(gone)?;
        told = stopped(stage)?;
        Ok(())
    });
    stage.probe = None;
    let stop = &told["stop"];
    let signal = stop["detail"].as_str().is_some_and(|detail| detail.contains("signal: 9"));
    if stop["reason"] != reason || stop["inferred"] != inferred || !signal {
        return Err(format!("{name} was killed, and the status says {told}").into());
    }
    // The channel to the transfer went with the work VM.
    if let Ok(Ok(output)) = output {
        return Err(format!("the transfer ended with {output:?}").into());
    }
    runs(stage)?;
    page_is_read(stage)
}

/// Nobody is left who could take them down: the kernel does.
fn kontord(stage: &mut Stage) -> Outcome {
    runs(stage)?;
    let output = in_mid_transfer(stage, |stage| {
        let all = ["kontord"].into_iter().chain(ITS_OWN).flat_map(held).collect::<Vec<_>>();
        stage.scene()?.home.kill_kontord().map_err(words)?;
        all.iter().try_for_each(gone)
    });
    stage.probe = None;
    let home = &mut stage.scene()?.home;
    home.start_kontord().map_err(words)?;
    if let Ok(Ok(output)) = output {
        return Err(format!("the transfer ended with {output:?}").into());
    }
    let status = stopped(stage)?;
    let stop = &status["stop"];
    let told = stop["detail"].as_str().is_some_and(|detail| detail.contains("kontord was killed"));
    if stop["reason"] != "vanished" || stop["inferred"] != true || !told {
        return Err(format!("the next kontord's status says {status}").into());
    }
    runs(stage)?;
    page_is_read(stage)
}

/// A work VM runs: the one of the trial before, or a new one.
fn runs(stage: &mut Stage) -> Outcome {
    if stage.probe.is_some() { Ok(()) } else { starts(stage) }
}

/// Fetches the large file in the work VM, and in the middle of that does `what`. Returns how the transfer ended; an
/// error is `what`'s, the stage then is without a work VM.
fn in_mid_transfer(
    stage: &mut Stage,
    what: impl FnOnce(&mut Stage) -> Outcome,
) -> Result<crate::run::Result<Output>, Failed> {
    let before = received(stage)?;
    let probe = stage.probe.take().ok_or("the work VM does not run")?;
    let outcome = thread::scope(|scope| {
        let transfer = scope.spawn(|| fetch(&probe));
        let limit = Instant::now() + PATIENCE;
        while received(stage)? < before + MIDDLE {
            if transfer.is_finished() || Instant::now() > limit {
                return Err(format!("{} bytes came", received(stage)? - before).into());
            }
            thread::sleep(LOOK_EVERY);
        }
        if transfer.is_finished() {
            return Err("the transfer was done too early".into());
        }
        what(stage)?;
        transfer.join().map_err(|_| Failed::from("the transfer panicked"))
    })?;
    if outcome.is_ok() {
        stage.probe = Some(probe);
    }
    Ok(outcome)
}

/// The digest of the large file, as it comes to a program in the work VM.
fn fetch(probe: &Probe) -> crate::run::Result<Output> {
    let script = format!(
        "/usr/bin/curl -sS --limit-rate {RATE} --max-time 170 http://{INTRANET_NAME}/{LARGE_FILE} | /usr/bin/sha256sum"
    );
    probe.run(1000, &["/bin/sh", "-c", &script], b"", PATIENCE * 3)
}

fn arrived(stage: &mut Stage, output: crate::run::Result<Output>) -> Outcome {
    let expected = digest(&stage.scene()?.office.path("site").join(LARGE_FILE)).map_err(words)?;
    let output = output.map_err(words)?;
    if output.stdout.starts_with(expected.as_bytes()) {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Err(format!("expected {expected}, in the work VM: {:?} {text}", output.end).into())
}

/// Bytes that the relay has passed to the work VM.
fn received(stage: &mut Stage) -> Result<u64, Failed> {
    let status = stage.scene()?.home.status().map_err(words)?;
    Ok(status["relay"]["down"]["bytes"].as_u64().unwrap_or_default())
}

/// Waits until the work VM has stopped. It left no process.
fn stopped(stage: &mut Stage) -> Result<Value, Failed> {
    let limit = Instant::now() + PATIENCE;
    let status = loop {
        let status = stage.scene()?.home.status().map_err(words)?;
        if status["state"] == "stopped" || Instant::now() > limit {
            break status;
        }
        thread::sleep(LOOK_EVERY);
    };
    let left: Vec<u32> = ITS_OWN.into_iter().flat_map(running).collect();
    if status["state"] == "stopped" && left.is_empty() {
        return Ok(status);
    }
    Err(format!("status {status}; {left:?} still run").into())
}

/// Every process of this name, by descriptors that stand for no other process later.
pub(super) fn held(name: &str) -> Vec<OwnedFd> {
    let pids = running(name).into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    pids.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
}

fn gone(process: &OwnedFd) -> Outcome {
    let mut one = [PollFd::new(process, PollFlags::IN)];
    match poll(&mut one, Some(&GONE)) {
        Ok(1..) => Ok(()),
        Ok(0) => Err("a process lives on".into()),
        Err(errno) => Err(format!("wait for a process: {errno}").into()),
    }
}
