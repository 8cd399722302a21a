//! Root in the work VM turns to the uplink itself: what the relay makes of it, and what becomes of the work VM.

use super::{
    LOOK_EVERY, Outcome, Stage,
    thread::{closes, fetch_large_file, page_is_read, starts},
    words,
};
use crate::{
    build::Backend,
    leaks::{MARKER_LEN, MARKER_PREFIX, Made},
    office::{GATEWAY_ID, INTRANET_NAME, LARGE_FILE},
    run::{Result as Ran, at},
    scene::{PATIENCE, running},
    world::{self, HOME_ADDRESS, HOME_LINK, Host},
};
use libtest_mimic::Failed;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    collections::HashSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// A trial's name and what it does.
type Named = (&'static str, fn(&mut Stage) -> Outcome);

/// Each starts a work VM of its own and sees it stop.
pub(super) const TRIALS: &[Named] = &[
    ("page_is_read_through_the_second_gateway_when_the_first_is_down", second_gateway),
    ("home_pc_that_gets_another_address_in_mid_transfer_keeps_its_tunnel", moved),
    ("killed_tunnel_ends_the_work_vm_in_mid_transfer_with_the_reason", killed_tunnel),
    ("killed_qemu_takes_the_relay_with_it_at_once", killed_qemu),
    ("root_who_drives_the_uplink_alone_gets_nothing_past_the_relay", alone),
    ("flood_of_garbage_is_stopped_with_the_reason", |stage| flood(stage, "flood-of-garbage", GARBAGE)),
    ("flood_for_other_gateways_is_stopped_with_the_reason", |stage| flood(stage, "flood-of-others", OTHERS)),
    ("flood_of_handshakes_is_stopped_with_the_reason", |stage| {
        flood(stage, "flood-of-initiations", HANDSHAKES)
    }),
];

const GARBAGE: &str = "without the shape of WireGuard";
const OTHERS: &str = "datagrams for a gateway that is not known";
const HANDSHAKES: &str = "handshake initiations above the limit";
/// Markers of this file begin with this number, behind those of the leaks.
const FIRST_MARKER: usize = 9_000;

/// Between QEMU and relay goes what the tunnel has sealed: no marker, not even the canary's, is to be read.
pub(super) fn tap(stage: &mut Stage) -> Outcome {
    let tap = stage.scene()?.home.tap().map_err(words)?;
    let seen = markers(&tap);
    let status = stage.scene()?.home.status().map_err(words)?;
    let up = &status["relay"]["up"];
    let dropped = ["unknown_gateway", "malformed", "not_wireguard", "above_rate", "initiations_above_rate"];
    // The large file came through it too.
    let whole = u64::try_from(tap.len()).unwrap_or_default()
        > status["relay"]["down"]["bytes"].as_u64().unwrap_or(u64::MAX);
    if seen.is_empty() && whole && dropped.iter().all(|name| up[name] == 0) {
        return Ok(());
    }
    Err(format!("{} markers in the tap of {} bytes; {}", seen.len(), tap.len(), status["relay"]).into())
}

/// The first gateway does not answer: after three seconds the second is asked, and carries.
fn second_gateway(stage: &mut Stage) -> Outcome {
    let office = &mut stage.scene()?.office;
    office.kill_gateway().map_err(words)?;
    office.start_spare().map_err(words)?;
    let read = starts(stage).and_then(|()| page_is_read(stage)).and_then(|()| closes(stage));
    let office = &mut stage.scene()?.office;
    office.kill_spare().map_err(words)?;
    office.start_gateway().map_err(words)?;
    read
}

/// The home PC's address, by which the gateway knows the tunnel, goes while a file comes. The work VM, its tunnel
/// and its session stay.
fn moved(stage: &mut Stage) -> Outcome {
    const OTHER_ADDRESS: &str = "10.44.1.77";
    starts(stage)?;
    page_is_read(stage)?;
    let moving = std::thread::spawn(|| {
        await_part_of_the_file()?;
        world::move_home(HOME_ADDRESS, OTHER_ADDRESS)
    });
    let fetched = fetch_large_file(stage, "--limit-rate 1M");
    let moved = moving.join().map_err(|_| "the move panicked")?.map_err(words);
    let outcome = fetched.and(moved).and_then(|()| page_is_read(stage)).and_then(|()| closes(stage));
    let back = world::move_home(OTHER_ADDRESS, HOME_ADDRESS).map_err(words);
    outcome.and(back)
}

/// Waits until the home PC has received as much as is no page and not yet the large file.
fn await_part_of_the_file() -> Ran<()> {
    const PART: u64 = 2 << 20;
    Host::Home.enter().map_err(at("enter", Path::new(&Host::Home.namespace())))?;
    let table = Path::new("/proc/thread-self/net/dev");
    let received = || -> Ran<u64> {
        let table = fs::read_to_string(table).map_err(at("read", table))?;
        let line =
            table.lines().find_map(|line| line.trim_start().strip_prefix(HOME_LINK)?.strip_prefix(':'));
        Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_default())
    };
    let (before, limit) = (received()?, Instant::now() + PATIENCE);
    while received()? < before + PART && Instant::now() < limit {
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// The tunnel is gone while a file comes: nothing goes on without it, and the host hears why.
fn killed_tunnel(stage: &mut Stage) -> Outcome {
    const KILL: &str = r#"for my $c (glob '/proc/[0-9]*/comm') { open(my $f, '<', $c) or next;
        kill 'KILL', (split m{/}, $c)[2] if <$f> eq qq(kontor-tunnel\n) }"#;
    starts(stage)?;
    let script = format!(
        "/usr/bin/curl -sS --limit-rate 200000 -o /tmp/part http://{INTRANET_NAME}/{LARGE_FILE} & \
         while [ ! -s /tmp/part ]; do :; done; /usr/bin/perl -e '{}'",
        KILL.replace('\'', r"'\''")
    );
    // The work VM may be gone before the answer is.
    let _ = stage.probe()?.run(0, &["/bin/sh", "-c", &script], b"", PATIENCE);
    stopped(stage, "process-died", "").map(drop)
}

/// The relay ends with the machine that it serves, whichever of the two sees it first.
fn killed_qemu(stage: &mut Stage) -> Outcome {
    const AT_ONCE: Duration = Duration::from_secs(3);
    starts(stage)?;
    let relays = running("kontor-relay");
    for pid in running("qemu-system").into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
        kill_process(pid, Signal::KILL).map_err(|e| e.to_string())?;
    }
    let limit = Instant::now() + AT_ONCE;
    while !running("kontor-relay").is_empty() {
        if Instant::now() > limit {
            return Err(format!("{relays:?} still run {} s later", AT_ONCE.as_secs()).into());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let ended = if relays.len() == 1 { Ok(()) } else { Err(format!("relays: {relays:?}").into()) };
    stopped(stage, "vanished", "").and(ended)
}

/// Root holds the first process still, kills the tunnel and drives the device in its place.
fn alone(stage: &mut Stage) -> Outcome {
    starts(stage)?;
    drive(stage, "everything")?;
    let counted = |status: &Value| {
        let up = &status["relay"]["up"];
        ["unknown_gateway", "malformed", "not_wireguard"].map(|name| up[name].as_u64().unwrap_or_default())
    };
    match stage.plan.uplink {
        // The first process goes on when root is done, and finds its channel to the host gone.
        Backend::Port => {
            let status = stopped(stage, "vanished", "")?;
            if counted(&status) == [4, 4, 6] { Ok(()) } else { Err(format!("counted {status}").into()) }
        }
        // It goes on and misses the tunnel; nothing was sent.
        Backend::Vfio => {
            let status = stopped(stage, "process-died", "")?;
            if counted(&status) == [0, 0, 0] { Ok(()) } else { Err(format!("counted {status}").into()) }
        }
    }
}

fn flood(stage: &mut Stage, how: &'static str, detail: &str) -> Outcome {
    if stage.plan.uplink == Backend::Vfio {
        eprintln!("skipped: nobody but the tunnel comes to drive a vfio device");
        return Ok(());
    }
    starts(stage)?;
    drive(stage, how)?;
    stopped(stage, "garbage", detail)?;
    // The gateway has not suffered.
    starts(stage)?;
    page_is_read(stage)?;
    closes(stage)
}

/// Runs the attempt in place of the tunnel. Its marker is looked for in what the scene records.
fn drive(stage: &mut Stage, how: &'static str) -> Outcome {
    let marker = format!("{MARKER_PREFIX}{:04}", FIRST_MARKER + stage.made.len());
    let gateway = GATEWAY_ID.to_string();
    let argv = ["/usr/lib/kontor/kontor-probe", "uplink", how, &marker, &gateway];
    let said = match stage.probe()?.run(0, &argv, b"", PATIENCE) {
        Ok(output) => String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned(),
        // The channel is a port too, and goes with the uplink's.
        Err(_) => "the channel ended".to_owned(),
    };
    // Initiations that pass for handshakes carry no marker.
    let marked = stage.plan.uplink == Backend::Port && how != "flood-of-initiations";
    let limit = Instant::now() + PATIENCE;
    let seen = loop {
        let tap = stage.scene()?.home.tap().map_err(words)?;
        let seen = markers(&tap).contains(marker.as_bytes());
        if seen || !marked || Instant::now() > limit {
            break seen;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    stage.made.push(Made { name: how, marker, said: said.clone() });
    let held =
        stage.plan.uplink == Backend::Port || said.contains("busy") && said.contains("waits for the holder");
    if seen == marked && held && !said.contains("OPENED") {
        return Ok(());
    }
    Err(format!("{how}: {said}; the marker is in the tap: {seen}").into())
}

/// Every marker that stands in `bytes`.
fn markers(bytes: &[u8]) -> HashSet<&[u8]> {
    bytes.windows(MARKER_LEN).filter(|window| window.starts_with(MARKER_PREFIX.as_bytes())).collect()
}

/// Waits until the work VM has stopped; `Err` when it is for another reason, or leaves processes.
fn stopped(stage: &mut Stage, reason: &str, detail: &str) -> Result<Value, Failed> {
    stage.probe = None;
    let limit = Instant::now() + PATIENCE;
    let status = loop {
        let status = stage.scene()?.home.status().map_err(words)?;
        if status["state"] == "stopped" || Instant::now() > limit {
            break status;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let stop = &status["stop"];
    let left: Vec<u32> = ["qemu-system", "kontor-relay"].into_iter().flat_map(running).collect();
    let says = stop["detail"].as_str().unwrap_or_default().contains(detail);
    if stop["reason"] == reason && says && left.is_empty() {
        return Ok(status);
    }
    Err(format!("{stop}, {left:?} still run; expected {reason} {detail}").into())
}
