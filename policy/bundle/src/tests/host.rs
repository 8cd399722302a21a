//! What only the host checks.

use super::{NOW, Scene};
use crate::lease::{HOST_SKEW_S, HostMemory, LeaseError};

#[test]
fn lease_at_the_edge_of_what_was_seen_is_believed() {
    let scene = Scene::new();
    let revisions = [(scene.lease.line.clone(), 7)].into();
    let serial = scene.device.serial;
    let memory = HostMemory { keyset_version: 1, serial, revisions, issued_at: NOW };
    assert!(scene.host_with(&scene.admit(), &memory).is_ok());
}

#[test]
fn lease_that_brings_back_an_old_keyset_is_refused() {
    let scene = Scene::new();
    let memory = HostMemory { keyset_version: 2, ..HostMemory::default() };
    let error = scene.host_with(&scene.admit(), &memory).unwrap_err();
    assert!(matches!(error, LeaseError::OldKeyset { lease: 1, known: 2 }), "{error:?}");
}

#[test]
fn lease_that_brings_back_an_older_revision_is_refused() {
    let scene = Scene::new();
    let known = |line: &str| [(line.parse().unwrap(), 8)].into();
    let memory = HostMemory { revisions: known(scene.lease.line.as_str()), ..HostMemory::default() };
    let error = scene.host_with(&scene.admit(), &memory).unwrap_err();
    assert!(matches!(error, LeaseError::OldRevision { lease: 7, known: 8 }), "{error:?}");
    // Each line has numbers of its own.
    let memory = HostMemory { revisions: known("another-line"), ..HostMemory::default() };
    assert!(scene.host_with(&scene.admit(), &memory).is_ok());
}

#[test]
fn lease_that_brings_back_an_older_device_record_is_refused() {
    let scene = Scene::new();
    let known = scene.device.serial + 1;
    let memory = HostMemory { serial: known, ..HostMemory::default() };
    let error = scene.host_with(&scene.admit(), &memory).unwrap_err();
    assert!(matches!(error, LeaseError::OldSerial { known: found, .. } if found == known), "{error:?}");
}

#[test]
fn time_of_the_last_lease_counts_unless_it_is_in_the_hosts_future() {
    let scene = Scene::new();
    let seen = |issued_at| HostMemory { issued_at, ..HostMemory::default() };
    let believed = |issued_at, now| scene.host_with(&scene.admit(), &seen(issued_at).as_of(now)).is_ok();
    // A clock that is right, one that is far ahead, and one at the edge.
    for now in [NOW, NOW + 200_000_000, NOW + 1 - HOST_SKEW_S] {
        assert!(!believed(NOW + 1, now), "{now}");
        assert!(believed(NOW, now), "{now}");
    }
    // One that is far behind, and a control that wrote what it liked.
    for (issued_at, now) in
        [(NOW + 1, NOW - HOST_SKEW_S), (NOW + 1, 0), (NOW + 1_000_000_000, NOW), (u64::MAX, NOW)]
    {
        assert!(believed(issued_at, now), "{issued_at} at {now}");
    }
    // What is that little ahead ends by itself.
    assert!(!believed(NOW + HOST_SKEW_S, NOW));
    assert!(!believed(u64::MAX, u64::MAX));
}

#[test]
fn lease_from_before_the_last_one_is_refused() {
    let scene = Scene::new();
    let memory = HostMemory { issued_at: NOW + 1, ..HostMemory::default() };
    let error = scene.host_with(&scene.admit(), &memory).unwrap_err();
    assert!(matches!(error, LeaseError::OldIssue { lease: NOW, .. }), "{error:?}");
}

#[test]
fn answer_to_another_request_is_refused() {
    // Everything that a lease repeats is the same; the request differs in what it does not repeat.
    let mut scene = Scene::new();
    let admit = scene.admit();
    scene.request.release = "smoke-2".to_owned();
    let error = scene.host(&admit).unwrap_err();
    assert!(matches!(error, LeaseError::OtherRequest), "{error:?}");
}

#[test]
fn lease_made_under_an_older_keyset_than_the_image_has_is_refused() {
    let scene = Scene::with(|before| before.request.keyset_version = 2);
    let error = scene.host(&scene.admit()).unwrap_err();
    assert!(matches!(error, LeaseError::OldKeyset { lease: 1, known: 2 }), "{error:?}");
}

#[test]
fn lease_for_another_device_than_the_request_is_refused() {
    // Record and lease are of laptop-7.
    let scene = Scene::with(|before| before.request.device = "laptop-8".parse().unwrap());
    let error = scene.host(&scene.admit()).unwrap_err();
    assert!(matches!(error, LeaseError::OtherDevice), "{error:?}");
}

#[test]
fn lease_for_another_enrolment_than_the_request_is_refused() {
    let scene = Scene::with(|before| before.request.enrolment.0[0] ^= 1);
    let error = scene.host(&scene.admit()).unwrap_err();
    assert!(matches!(error, LeaseError::OtherEnrolment), "{error:?}");
}

#[test]
fn lease_for_another_tenant_than_the_request_is_refused() {
    let scene = Scene::with(|before| before.request.tenant.0[0] ^= 1);
    let error = scene.host(&scene.admit()).unwrap_err();
    assert!(matches!(error, LeaseError::OtherTenant { kind: "request" }), "{error:?}");
}
