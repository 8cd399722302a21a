//! What all sides check.

use super::{Keys, Scene, all_refuse, gateway, key, lease_gateway};
use crate::{
    BundleError, BundleFault, MAX_LIFE_S,
    lease::{Admit, LeaseError, MAX_KEYSETS},
};
use kontor_trust::{
    BundleKind, DeviceKind, DeviceState, Digest, DocumentError, EnvelopeError, KeysetError, KeysetKind,
    LeaseKind, MAX_ENVELOPE, RequestKind, RoleKind, SecretKey, sign,
};

#[test]
fn good_lease_is_believed_by_all() {
    let scene = Scene::new();
    for answer in scene.all(|_| {}) {
        let checked = answer.unwrap();
        assert_eq!(checked.lease, scene.lease);
        assert_eq!(checked.device, scene.device);
        assert_eq!(checked.bundle, scene.bundle);
        assert_eq!(checked.keyset.version(), 1);
        assert_eq!(checked.lease_hash, Digest::of(&scene.lease.payload()));
        assert_eq!(checked.bundle_hash, Digest::of(&scene.bundle.payload()));
        assert_eq!(checked.life_s(), 3_600);
    }
}

#[test]
fn checked_lease_keeps_its_envelopes_as_received() {
    let scene = Scene::new();
    let mut admit = scene.admit();
    admit.bundle.push(b'\n');
    let checked = scene.gateway(&admit).unwrap();
    assert_eq!(checked.verified_device.envelope(), admit.device);
    assert_eq!(checked.verified_bundle.envelope(), admit.bundle);
    assert_eq!(checked.verified_lease.envelope(), admit.lease);
}

type Part = fn(&mut Admit) -> &mut Vec<u8>;
const DEVICE: Part = |admit| &mut admit.device;
const BUNDLE: Part = |admit| &mut admit.bundle;
const LEASE: Part = |admit| &mut admit.lease;
const PARTS: [(&str, Part); 3] = [("device", DEVICE), ("bundle", BUNDLE), ("lease", LEASE)];

#[test]
fn tampered_byte_anywhere_is_refused() {
    let scene = Scene::new();
    for (name, part) in PARTS {
        let mut admit = scene.admit();
        for at in 0..part(&mut admit).len() {
            part(&mut admit)[at] ^= 1;
            assert!(scene.guest(&admit).is_err(), "guest: {name}, byte {at}");
            assert!(scene.host(&admit).is_err(), "host: {name}, byte {at}");
            assert!(scene.gateway(&admit).is_err(), "gateway: {name}, byte {at}");
            part(&mut admit)[at] ^= 1;
        }
        assert!(scene.gateway(&admit).is_ok());
    }
}

#[test]
fn empty_part_is_refused() {
    for (name, part) in PARTS {
        all_refuse!(
            Scene::new().all(|admit| part(admit).clear()),
            LeaseError::Envelope { kind, source: EnvelopeError::Shape(_) } if kind == name
        );
    }
}

#[test]
fn too_large_part_is_refused() {
    for (name, part) in PARTS {
        let padded = |length: usize| Scene::new().all(|admit| part(admit).resize(length, b' '));
        assert!(padded(MAX_ENVELOPE).into_iter().all(|answer| answer.is_ok()));
        all_refuse!(
            padded(MAX_ENVELOPE + 1),
            LeaseError::Envelope { kind, source: EnvelopeError::TooLarge(_) } if kind == name
        );
    }
}

/// The same payload, signed by others.
fn resigned<K: RoleKind>(payload: &[u8], keys: &[&SecretKey]) -> Vec<u8> {
    sign::<K>(payload, keys)
}

#[test]
fn part_signed_by_nobody_or_by_a_stranger_is_refused() {
    let scene = Scene::new();
    let stranger = key();
    for signers in [&[][..], &[&stranger]] {
        let refuse = |name: &str, bend: &dyn Fn(&mut Admit)| {
            all_refuse!(
                scene.all(bend),
                LeaseError::Envelope { kind, source: EnvelopeError::BelowThreshold { persons: 0, .. } } if kind == name
            );
        };
        refuse("device", &|admit| admit.device = resigned::<DeviceKind>(&scene.device.payload(), signers));
        refuse("bundle", &|admit| admit.bundle = resigned::<BundleKind>(&scene.bundle.payload(), signers));
        refuse("lease", &|admit| admit.lease = resigned::<LeaseKind>(&scene.lease.payload(), signers));
    }
}

#[test]
fn stolen_control_signs_no_device_and_no_bundle() {
    let scene = Scene::new();
    let control = [&scene.keys.lease];
    all_refuse!(
        scene.all(|admit| admit.device = resigned::<DeviceKind>(&scene.device.payload(), &control)),
        LeaseError::Envelope { kind: "device", .. }
    );
    all_refuse!(
        scene.all(|admit| admit.bundle = resigned::<BundleKind>(&scene.bundle.payload(), &control)),
        LeaseError::Envelope { kind: "bundle", .. }
    );
}

#[test]
fn policy_and_enrol_keys_sign_no_lease() {
    let scene = Scene::new();
    for other in [&scene.keys.policy, &scene.keys.enrol, &scene.keys.root, &scene.keys.host] {
        all_refuse!(
            scene.all(|admit| admit.lease = resigned::<LeaseKind>(&scene.lease.payload(), &[other])),
            LeaseError::Envelope { kind: "lease", source: EnvelopeError::BelowThreshold { persons: 0, .. } }
        );
    }
}

#[test]
fn part_signed_twice_by_one_key_is_refused() {
    let scene = Scene::new();
    let twice = [&scene.keys.policy, &scene.keys.policy];
    all_refuse!(
        scene.all(|admit| admit.bundle = resigned::<BundleKind>(&scene.bundle.payload(), &twice)),
        LeaseError::Envelope { kind: "bundle", source: EnvelopeError::RepeatedKey(_) }
    );
}

#[test]
fn part_of_another_kind_is_refused() {
    let scene = Scene::new();
    all_refuse!(
        scene.all(|admit| std::mem::swap(&mut admit.device, &mut admit.bundle)),
        LeaseError::Envelope { kind: "device", source: EnvelopeError::Kind { .. } }
    );
    all_refuse!(
        scene.all(|admit| admit.lease = admit.device.clone()),
        LeaseError::Envelope { kind: "lease", source: EnvelopeError::Kind { .. } }
    );
    all_refuse!(
        scene.all(|admit| admit.bundle = sign::<RequestKind>(&scene.bundle.payload(), &[&scene.keys.policy])),
        LeaseError::Envelope { kind: "bundle", source: EnvelopeError::Kind { .. } }
    );
}

#[test]
fn parts_of_another_tenant_are_refused() {
    let (scene, other) = (Scene::new(), Scene::new());
    all_refuse!(
        scene.all(|admit| *admit = other.admit()),
        LeaseError::Envelope { kind: "device", source: EnvelopeError::BelowThreshold { persons: 0, .. } }
    );
}

#[test]
fn document_that_names_another_tenant_is_refused() {
    let elsewhere = Digest([1; 32]);
    all_refuse!(
        Scene::with(|before| before.device.tenant = elsewhere).all(|_| {}),
        LeaseError::OtherTenant { kind: "device" }
    );
    all_refuse!(
        Scene::with(|before| before.bundle.tenant = elsewhere).all(|_| {}),
        LeaseError::OtherTenant { kind: "bundle" }
    );
    let mut scene = Scene::new();
    scene.lease.tenant = elsewhere;
    all_refuse!(scene.all(|_| {}), LeaseError::OtherTenant { kind: "lease" });
}

#[test]
fn malformed_document_is_refused_though_signed() {
    let scene = Scene::new();
    let parse = |bend: &dyn Fn(&mut Admit)| scene.all(bend);
    all_refuse!(
        parse(&|admit| admit.device = sign::<DeviceKind>(b"{}", &[&scene.keys.enrol])),
        LeaseError::Document(DocumentError::Parse { kind: "device", .. })
    );
    all_refuse!(
        parse(&|admit| admit.lease = sign::<LeaseKind>(b"{}", &[&scene.keys.lease])),
        LeaseError::Document(DocumentError::Parse { kind: "lease", .. })
    );
    let mut scene = Scene::with(|before| before.bundle.gateways.clear());
    scene.lease.gateways.truncate(1);
    all_refuse!(
        scene.all(|_| {}),
        LeaseError::Bundle(BundleError::Fault(BundleFault::Bounds { field: "gateways", .. }))
    );
}

#[test]
fn revoked_device_is_refused() {
    all_refuse!(
        Scene::with(|before| before.device.state = DeviceState::Revoked).all(|_| {}),
        LeaseError::Revoked
    );
}

#[test]
fn lease_for_another_device_is_refused() {
    let mut scene = Scene::new();
    scene.lease.device = "laptop-8".parse().unwrap();
    all_refuse!(scene.all(|_| {}), LeaseError::OtherDevice);
}

#[test]
fn lease_for_another_enrolment_is_refused() {
    let mut scene = Scene::new();
    scene.lease.enrolment.0[31] ^= 1;
    all_refuse!(scene.all(|_| {}), LeaseError::OtherEnrolment);
}

#[test]
fn lease_for_another_line_is_refused() {
    let mut scene = Scene::new();
    scene.lease.line = "board".parse().unwrap();
    all_refuse!(scene.all(|_| {}), LeaseError::OtherLine);
}

#[test]
fn bundle_of_another_line_is_refused() {
    all_refuse!(
        Scene::with(|before| before.bundle.line = "board".parse().unwrap()).all(|_| {}),
        LeaseError::BundleLine
    );
}

#[test]
fn lease_for_another_bundle_is_refused() {
    let scene = Scene::new();
    let mut wider = scene.bundle.clone();
    wider.settings.allow_emulation = true;
    all_refuse!(
        scene.all(|admit| admit.bundle = sign::<BundleKind>(&wider.payload(), &[&scene.keys.policy])),
        LeaseError::OtherBundle
    );
}

#[test]
fn lease_with_another_revision_than_its_bundle_is_refused() {
    for revision in [6, 8] {
        let mut scene = Scene::new();
        scene.lease.revision = revision;
        all_refuse!(
            scene.all(|_| {}),
            LeaseError::BundleRevision { lease, bundle: 7 } if lease == revision
        );
    }
}

#[test]
fn life_is_at_least_a_second_and_at_most_what_the_bundle_allows() {
    let with = |life: i64| {
        let mut scene = Scene::new();
        scene.lease.not_after = scene.lease.issued_at.checked_add_signed(life).unwrap();
        scene
    };
    for life in [1, 3_600] {
        let scene = with(life);
        assert!(scene.all(|_| {}).into_iter().all(|answer| answer.is_ok()), "{life}");
    }
    for life in [-1, 0, 3_601] {
        let scene = with(life);
        let admit = scene.admit();
        for answer in [scene.guest(&admit), scene.host(&admit), scene.gateway(&admit)] {
            assert!(matches!(answer, Err(LeaseError::Life { most_s: 3_600, .. })), "{life}: {answer:?}");
        }
    }
}

#[test]
fn life_is_at_most_a_day() {
    let mut scene = Scene::with(|before| before.bundle.lease_s_max = MAX_LIFE_S);
    scene.lease.not_after = scene.lease.issued_at + MAX_LIFE_S;
    assert!(scene.all(|_| {}).into_iter().all(|answer| answer.is_ok()));
    scene.lease.not_after += 1;
    all_refuse!(scene.all(|_| {}), LeaseError::Life { most_s: MAX_LIFE_S, .. });
    scene.lease.not_after = u64::MAX;
    all_refuse!(scene.all(|_| {}), LeaseError::Life { .. });
}

#[test]
fn gateway_that_the_bundle_does_not_have_is_refused() {
    let mut scene = Scene::new();
    scene.lease.gateways.push(lease_gateway(3));
    all_refuse!(scene.all(|_| {}), LeaseError::UnknownGateway(3));
    let scene = Scene::with(|before| before.bundle.gateways = vec![gateway(1)]);
    all_refuse!(scene.all(|_| {}), LeaseError::UnknownGateway(2));
}

#[test]
fn answer_to_another_challenge_is_refused() {
    let mut scene = Scene::new();
    scene.lease.nonce[0] ^= 1;
    all_refuse!(scene.all(|_| {}), LeaseError::OtherNonce);

    let mut scene = Scene::new();
    scene.lease.seq = 3;
    let admit = scene.admit();
    for answer in [scene.guest(&admit), scene.host(&admit), scene.gateway(&admit)] {
        assert!(matches!(answer, Err(LeaseError::OtherSeq { lease: 3, asked: 2 })), "{answer:?}");
    }
}

#[test]
fn lease_for_another_boot_key_is_refused() {
    let mut scene = Scene::new();
    scene.lease.boot_key[31] ^= 0x80;
    all_refuse!(scene.all(|_| {}), LeaseError::OtherBootKey);
}

#[test]
fn lease_for_another_image_is_refused() {
    let mut scene = Scene::new();
    scene.lease.verity_root.0[0] ^= 1;
    all_refuse!(scene.all(|_| {}), LeaseError::OtherRoot);
}

#[test]
fn newer_keysets_are_followed() {
    let mut scene = Scene::new();
    let second = scene.keys.next(&scene.floor);
    let third = scene.keys.next(&second);
    scene.keysets = [&scene.floor, &second, &third].map(|keyset| keyset.envelope().to_vec()).into();
    scene.lease.keyset_version = 3;
    for answer in scene.all(|_| {}) {
        assert_eq!(answer.unwrap().keyset.hash(), third.hash());
    }
}

#[test]
fn lease_made_under_another_keyset_than_the_newest_is_refused() {
    let mut scene = Scene::new();
    scene.lease.keyset_version = 2;
    all_refuse!(scene.all(|_| {}), LeaseError::KeysetVersion { lease: 2, newest: 1 });

    let mut scene = Scene::new();
    scene.keysets = vec![scene.keys.next(&scene.floor).envelope().to_vec()];
    all_refuse!(scene.all(|_| {}), LeaseError::KeysetVersion { lease: 1, newest: 2 });

    // A withheld keyset does not make those forget it who have it.
    let mut scene = Scene::new();
    scene.floor = scene.keys.next(&scene.floor);
    all_refuse!(scene.all(|_| {}), LeaseError::KeysetVersion { lease: 1, newest: 2 });
}

#[test]
fn wrong_chain_is_refused() {
    let mut scene = Scene::new();
    let second = scene.keys.next(&scene.floor);
    let third = scene.keys.next(&second);
    scene.lease.keyset_version = 3;
    scene.keysets = vec![third.envelope().to_vec()];
    all_refuse!(scene.all(|_| {}), LeaseError::Keyset(KeysetError::Version { expected: 2, found: 3 }));

    let foreign = Keys::new();
    scene.keysets = vec![foreign.next(&foreign.first()).envelope().to_vec()];
    all_refuse!(scene.all(|_| {}), LeaseError::Keyset(KeysetError::Previous { previous: 1, .. }));

    let mut forged = second.keyset().clone();
    forged.control_spki.push(Digest([1; 32]));
    scene.keysets = vec![sign::<KeysetKind>(&forged.payload(), &[&scene.keys.lease])];
    all_refuse!(scene.all(|_| {}), LeaseError::Keyset(KeysetError::Previous { previous: 1, .. }));

    scene.keysets = vec![b"{}".to_vec()];
    all_refuse!(scene.all(|_| {}), LeaseError::Keyset(KeysetError::Envelope(EnvelopeError::Shape(_))));
}

#[test]
fn lease_comes_with_at_most_8_keysets() {
    let mut scene = Scene::new();
    scene.keysets = vec![scene.floor.envelope().to_vec(); MAX_KEYSETS];
    assert!(scene.all(|_| {}).into_iter().all(|answer| answer.is_ok()));
    scene.keysets.push(scene.floor.envelope().to_vec());
    all_refuse!(scene.all(|_| {}), LeaseError::TooManyKeysets(9));
}

#[test]
fn parts_travel_as_base64() {
    let scene = Scene::new();
    let admit = Admit { keysets: vec![vec![0, 255]], ..scene.admit() };
    let text = serde_json::to_string(&admit).unwrap();
    assert!(text.starts_with(r#"{"keysets":["AP8="],"device":""#), "{text}");
    assert_eq!(serde_json::from_str::<Admit>(&text).unwrap(), admit);
    assert!(serde_json::from_str::<Admit>(&text.replacen('{', r#"{"extra":1,"#, 1)).is_err());
    assert!(serde_json::from_str::<Admit>(&text.replacen("AP8=", "AP8", 1)).is_err());
    let parts = super::parts(&admit);
    assert_eq!(
        serde_json::from_str::<crate::lease::Parts>(&serde_json::to_string(&parts).unwrap()).unwrap(),
        parts
    );
}
