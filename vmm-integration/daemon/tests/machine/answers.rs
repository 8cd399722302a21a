//! What the office answers, and what becomes of the boot.

use crate::{ended, run_with, stopped, world::Setup};

pub(crate) fn office_that_refuses_is_quoted() {
    let (world, ran) = run_with(&Setup { mode: "refused", ..Setup::new("ready") });
    ended(&ran, 5, "The office: the device is revoked");
    assert_eq!(stopped(&world), ("no-lease".into(), false));
}

pub(crate) fn office_that_does_not_work_is_unreachable() {
    let (world, ran) = run_with(&Setup { mode: "broken", ..Setup::new("ready") });
    ended(&ran, 5, "the office answers with HTTP status 500 Internal Server Error");
    assert_eq!(stopped(&world), ("no-lease".into(), false));
}

pub(crate) fn office_with_another_key_gets_no_request() {
    let (world, ran) = run_with(&Setup { mode: "stranger", ..Setup::new("ready") });
    ended(&ran, 5, "somebody else answers as the office");
    assert_eq!(stopped(&world), ("no-lease".into(), false));
    assert!(world.status()["office"].as_str().unwrap().contains("tell IT"));
}

pub(crate) fn answer_that_does_not_verify_stops_the_boot() {
    let (world, ran) = run_with(&Setup { mode: "bent", ..Setup::new("ready") });
    ended(&ran, 3, "did not verify");
    assert_eq!(stopped(&world), ("bad-lease".into(), false));
    assert_eq!(world.status()["lease"], serde_json::Value::Null);
}
