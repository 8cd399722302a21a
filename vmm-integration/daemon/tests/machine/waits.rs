//! Time: a host that sleeps, a guest that is silent, deaf or slow. The machines run in this process, with clocks and
//! waits of its own.

use crate::{
    PATIENCE, tenant,
    world::{Setup, World},
};
use kontor_daemon::{
    daemon::plan,
    lease::Asker,
    office::HttpsOffice,
    session::Times,
    sleep::Sleep,
    status::{State, Status},
    store::Store,
    vm,
};
use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// What a machine in this process is made of, and who asks for its leases.
fn own_machine(world: &World) -> (vm::Plan, Asker<HttpsOffice>) {
    let config = kontor_daemon::config::Config::read(&world.path("kontord.toml")).unwrap();
    let store = Store::open(&config.state, config.tenant, config.device.clone()).unwrap();
    let plan = plan(&config, &store, kontor_daemon::host::Accelerator::Tcg).unwrap();
    let office = HttpsOffice::new(config.office.clone(), store.clone());
    let running =
        kontor_daemon::lease::Running::of(&plan.ready.manifest, kontor_daemon::host::Accelerator::Tcg);
    (plan, Asker { store, office, running, clock: || tenant::NOW })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn guest_is_told_when_the_host_has_slept_and_gets_a_new_lease() {
    let world = World::installed(&Setup::new("waking"));
    let (plan, asker) = own_machine(&world);
    let console = plan.console_log.clone();
    let slept = Arc::new(AtomicU64::new(77));
    let own = Arc::clone(&slept);
    let status = runtime().block_on(async {
        let (clock, set) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&clock, true).unwrap();
        let sleep = Sleep::told_by(clock.into(), move || Duration::from_secs(own.load(Ordering::Relaxed)));
        let status = watch::Sender::new(Status::off(true));
        // Held to the machine's end, which its own would be a reason for.
        let (_commands, orders) = mpsc::channel(1);
        let mut watching = status.subscribe();
        let asleep = async {
            watching.wait_for(|status| status.state == State::Running).await.unwrap();
            slept.store(600, Ordering::Relaxed);
            rustix::io::write(&set, &[0]).unwrap();
        };
        let life = vm::run(plan, asker, sleep.unwrap(), Instant::now(), orders, &status);
        let (ran, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(life, asleep) }).await.unwrap();
        ran.unwrap();
        status.borrow().clone()
    });
    assert_eq!(status.stop.unwrap().reason, "requested");
    let log = fs::read_to_string(console).unwrap();
    assert!(log.contains("told: Woken") && log.contains("renewed") && !log.contains("not renewed"), "{log}");
}

/// A machine in this process, whose times are a fraction of the real ones.
fn hurried(scenario: &'static str, divisor: u32) -> Status {
    let world = World::installed(&Setup::new(scenario));
    let (mut plan, asker) = own_machine(&world);
    plan.times = Times::new(kontor_daemon::host::Accelerator::Kvm).divided_by(divisor);
    runtime().block_on(async {
        let sleep = Sleep::of_host().unwrap();
        let status = watch::Sender::new(Status::off(true));
        let (commands, orders) = mpsc::channel(1);
        let mut watching = status.subscribe();
        let stop = tokio::spawn(async move {
            let decided = |status: &Status| matches!(status.state, State::Running | State::Stopped);
            watching.wait_for(decided).await.unwrap();
            let _ = commands.send(vm::Command::Stop).await;
            // Held until the machine has ended: the end of its commands would be a reason to kill it.
            watching.wait_for(|status| status.state == State::Stopped).await.is_ok()
        });
        vm::run(plan, asker, sleep, Instant::now(), orders, &status).await.unwrap();
        assert!(stop.await.unwrap());
        status.borrow().clone()
    })
}

pub(crate) fn silent_guest_is_stopped() {
    let stop = hurried("silent", 100).stop.unwrap();
    assert_eq!((stop.reason.as_str(), stop.inferred), ("silent", false));
    assert_eq!(stop.detail, "nothing more came after start");
}

pub(crate) fn guest_and_qemu_that_are_deaf_are_killed() {
    assert_eq!(hurried("deaf", 100).stop.unwrap().reason, "silent");
}

pub(crate) fn guest_that_does_not_power_off_is_made_to() {
    let status = hurried("stubborn", 20);
    assert_eq!(status.stop.unwrap().reason, "requested");
    assert!(status.ready_at_ms.is_some());
}
