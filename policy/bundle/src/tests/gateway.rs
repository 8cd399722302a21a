//! What only the gateway checks.

use super::{NOW, Scene, key, own};
use crate::lease::{CLOCK_SKEW_S, GatewayMemory, LeaseError, OwnGateway, for_gateway};
use kontor_trust::{EnvelopeError, RequestKind, sign};

fn at(scene: &Scene, now: u64) -> Result<crate::lease::Checked, LeaseError> {
    scene.gateway_with(&scene.admit(), now, &own(), GatewayMemory::default())
}

fn remembering(memory: GatewayMemory) -> Result<crate::lease::Checked, LeaseError> {
    let scene = Scene::new();
    scene.gateway_with(&scene.admit(), NOW, &own(), memory)
}

fn own_with(own: &OwnGateway) -> Result<crate::lease::Checked, LeaseError> {
    let scene = Scene::new();
    scene.gateway_with(&scene.admit(), NOW, own, GatewayMemory::default())
}

#[test]
fn request_signed_by_another_host_is_refused() {
    let scene = Scene::new();
    let mut admit = scene.admit();
    for signers in [&[][..], &[&key()], &[&scene.keys.lease], &[&scene.keys.enrol]] {
        admit.request = sign::<RequestKind>(&scene.request.payload(), signers);
        let error = scene.gateway(&admit).unwrap_err();
        assert!(
            matches!(
                error,
                LeaseError::Envelope {
                    kind: "request",
                    source: EnvelopeError::BelowThreshold { persons: 0, .. }
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn stolen_control_admits_no_key_of_its_own() {
    // It can sign leases; what it lacks is a request by the host.
    let mut scene = Scene::new();
    let honest = scene.admit().request;
    scene.lease.boot_key = [99; 32];
    let mut admit = scene.admit();
    assert!(matches!(scene.gateway(&admit), Err(LeaseError::OtherBootKey)));
    scene.request.boot_key = [99; 32];
    admit.request = sign::<RequestKind>(&scene.request.payload(), &[&scene.keys.lease]);
    assert!(matches!(scene.gateway(&admit), Err(LeaseError::Envelope { kind: "request", .. })));
    admit.request = honest;
    assert!(matches!(scene.gateway(&admit), Err(LeaseError::OtherBootKey)));
}

#[test]
fn tampered_byte_of_the_request_is_refused() {
    let scene = Scene::new();
    let mut admit = scene.admit();
    for at in 0..admit.request.len() {
        admit.request[at] ^= 1;
        assert!(scene.gateway(&admit).is_err(), "byte {at}");
        admit.request[at] ^= 1;
    }
}

#[test]
fn answer_to_another_request_is_refused() {
    let scene = Scene::new();
    let mut admit = scene.admit();
    let mut other = scene.request.clone();
    other.release = "smoke-2".to_owned();
    admit.request = sign::<RequestKind>(&other.payload(), &[&scene.keys.host]);
    let error = scene.gateway(&admit).unwrap_err();
    assert!(matches!(error, LeaseError::OtherRequest), "{error:?}");
}

#[test]
fn lease_runs_from_a_minute_before_its_issue_to_its_end() {
    let scene = Scene::new();
    for now in [NOW - CLOCK_SKEW_S, NOW, NOW + 3_599] {
        assert!(at(&scene, now).is_ok(), "{now}");
    }
    let early = at(&scene, NOW - CLOCK_SKEW_S - 1).unwrap_err();
    assert!(matches!(early, LeaseError::NotYet { issued_at: NOW, .. }), "{early:?}");
    for now in [NOW + 3_600, NOW + 3_601, u64::MAX] {
        let late = at(&scene, now).unwrap_err();
        assert!(matches!(late, LeaseError::Expired { .. }), "{late:?}");
    }
    assert!(matches!(at(&scene, 0), Err(LeaseError::NotYet { .. })));
}

#[test]
fn lease_that_does_not_name_this_gateway_is_refused() {
    let mut scene = Scene::new();
    scene.lease.gateways.remove(0);
    let error = at(&scene, NOW).unwrap_err();
    assert!(matches!(error, LeaseError::NotNamed(1)), "{error:?}");
    let error = own_with(&OwnGateway { id: 3, ..own() }).unwrap_err();
    assert!(matches!(error, LeaseError::NotNamed(3)), "{error:?}");
}

#[test]
fn spare_gateway_believes_the_lease_too() {
    assert!(own_with(&OwnGateway { id: 2, ..own() }).is_ok());
}

#[test]
fn address_outside_the_pool_is_refused() {
    let error = own_with(&OwnGateway { pool_v4: "10.78.0.0/16".parse().unwrap(), ..own() }).unwrap_err();
    assert!(matches!(error, LeaseError::ForeignAddress(ip) if ip.is_ipv4()), "{error:?}");
    let error = own_with(&OwnGateway { pool_v6: "fd78::/64".parse().unwrap(), ..own() }).unwrap_err();
    assert!(matches!(error, LeaseError::ForeignAddress(ip) if ip.is_ipv6()), "{error:?}");
}

#[test]
fn address_of_the_gateway_itself_is_refused() {
    let mut scene = Scene::new();
    scene.lease.gateways[0].v4 = scene.bundle.gateways[0].v4;
    assert!(matches!(at(&scene, NOW), Err(LeaseError::ForeignAddress(ip)) if ip.is_ipv4()));
    let mut scene = Scene::new();
    scene.lease.gateways[0].v6 = scene.bundle.gateways[0].v6;
    assert!(matches!(at(&scene, NOW), Err(LeaseError::ForeignAddress(ip)) if ip.is_ipv6()));
}

#[test]
fn older_device_record_is_refused() {
    for serial in [0, 4, 5] {
        assert!(remembering(GatewayMemory { serial: Some(serial), ..GatewayMemory::default() }).is_ok());
    }
    let error = remembering(GatewayMemory { serial: Some(6), ..GatewayMemory::default() }).unwrap_err();
    assert!(matches!(error, LeaseError::OldSerial { record: 5, known: 6 }), "{error:?}");
}

#[test]
fn replayed_lease_is_refused() {
    assert!(remembering(GatewayMemory { issued_at: Some(NOW - 1), ..GatewayMemory::default() }).is_ok());
    for known in [NOW, NOW + 1] {
        let error =
            remembering(GatewayMemory { issued_at: Some(known), ..GatewayMemory::default() }).unwrap_err();
        assert!(matches!(error, LeaseError::OldIssue { lease: NOW, known: k } if k == known), "{error:?}");
    }
}

#[test]
fn challenge_that_does_not_rise_is_refused() {
    for seq in [0, 1] {
        assert!(remembering(GatewayMemory { seq: Some(seq), ..GatewayMemory::default() }).is_ok());
    }
    for known in [2, 3] {
        let error = remembering(GatewayMemory { seq: Some(known), ..GatewayMemory::default() }).unwrap_err();
        assert!(matches!(error, LeaseError::OldSeq { lease: 2, known: k } if k == known), "{error:?}");
    }
}

#[test]
fn older_revision_is_refused() {
    for revision in [6, 7] {
        assert!(remembering(GatewayMemory { revision: Some(revision), ..GatewayMemory::default() }).is_ok());
    }
    let error = remembering(GatewayMemory { revision: Some(8), ..GatewayMemory::default() }).unwrap_err();
    assert!(matches!(error, LeaseError::OldRevision { lease: 7, known: 8 }), "{error:?}");
}

#[test]
fn memory_is_not_asked_about_what_does_not_verify() {
    let scene = Scene::new();
    let mut admit = scene.admit();
    admit.request.clear();
    let answer = for_gateway(&scene.floor, &admit, NOW, &own(), |_, _, _| panic!("asked"));
    assert!(matches!(answer, Err(LeaseError::Envelope { kind: "request", .. })));
}
