use super::{Office, key};
use crate::{
    BundleKind, DeviceKind, EnvelopeError, Keyset, KeysetKind, Kind, LeaseKind, MAX_ENVELOPE, MAX_SIGNATURES,
    RequestKind, SecretKey, sign, verify_request,
};
use serde_json::{Value, json};

/// An envelope as JSON, to be bent.
fn json(envelope: &[u8]) -> Value {
    serde_json::from_slice(envelope).unwrap()
}

fn bytes(envelope: &Value) -> Vec<u8> {
    serde_json::to_vec(envelope).unwrap()
}

#[test]
fn signed_document_is_believed_and_kept_as_received() {
    let office = Office::new();
    let mut envelope = office.bundle(&[&office.policy[0]]);
    envelope.extend_from_slice(b" \n");
    let verified = office.first().verify::<BundleKind>(&envelope).unwrap();
    assert_eq!(verified.envelope(), envelope);
    assert_eq!(verified.payload(), br#"{"any":"text"}"#);
    assert_eq!(verified.hash(), crate::Digest::of(verified.payload()));
}

#[test]
fn payload_of_any_bytes_is_signed_and_believed() {
    let office = Office::new();
    let payload: Vec<u8> = (0..=255).collect();
    let envelope = sign::<BundleKind>(&payload, &[&office.policy[0]]);
    assert_eq!(office.first().verify::<BundleKind>(&envelope).unwrap().payload(), payload);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let office = Office::new();
    let keyset = office.first();
    let good = office.bundle(&[&office.policy[0]]);
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(keyset.verify::<BundleKind>(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn cut_envelope_is_refused() {
    let office = Office::new();
    let keyset = office.first();
    let good = office.bundle(&[&office.policy[0]]);
    for length in 0..good.len() {
        let error = keyset.verify::<BundleKind>(&good[..length]).unwrap_err();
        assert!(matches!(error, EnvelopeError::Shape(_)), "{length}: {error:?}");
    }
}

#[test]
fn unsigned_document_is_refused() {
    let office = Office::new();
    let error = office.first().verify::<BundleKind>(&office.bundle(&[])).unwrap_err();
    assert!(matches!(error, EnvelopeError::BelowThreshold { persons: 0, threshold: 1 }), "{error:?}");
}

#[test]
fn document_signed_by_a_stranger_is_refused() {
    let office = Office::new();
    let error = office.first().verify::<BundleKind>(&office.bundle(&[&key()])).unwrap_err();
    assert!(matches!(error, EnvelopeError::BelowThreshold { persons: 0, threshold: 1 }), "{error:?}");
}

#[test]
fn document_signed_by_another_role_is_refused() {
    let office = Office::new();
    let keyset = office.first();
    for other in [&office.roots[0], &office.enrol, &office.lease, &office.command] {
        let error = keyset.verify::<BundleKind>(&office.bundle(&[other])).unwrap_err();
        assert!(matches!(error, EnvelopeError::BelowThreshold { persons: 0, .. }), "{error:?}");
    }
    let lease = sign::<LeaseKind>(b"{}", &[&office.policy[0]]);
    assert!(matches!(keyset.verify::<LeaseKind>(&lease), Err(EnvelopeError::BelowThreshold { .. })));
    let device = sign::<DeviceKind>(b"{}", &[&office.lease]);
    assert!(matches!(keyset.verify::<DeviceKind>(&device), Err(EnvelopeError::BelowThreshold { .. })));
}

#[test]
fn document_of_another_kind_is_refused() {
    let office = Office::new();
    let error = office.first().verify::<LeaseKind>(&office.bundle(&[&office.lease])).unwrap_err();
    let expected = LeaseKind::PAYLOAD_TYPE;
    assert!(
        matches!(&error, EnvelopeError::Kind { expected: e, found } if *e == expected && found == BundleKind::PAYLOAD_TYPE),
        "{error:?}"
    );
}

#[test]
fn document_relabelled_as_another_kind_is_refused() {
    // The policy key's signature over a bundle, offered as a device record of an office where one key has
    // both roles.
    let mut office = Office::new();
    office.enrol = SecretKey::from_pkcs8(office.policy[0].to_pkcs8()).unwrap();
    let mut keyset = office.keyset();
    keyset.roles.enrol = super::role(1, &[("dora", &office.enrol)]);
    let keyset = crate::TrustedKeyset::dangerous_unpinned(&office.sign(&keyset, &[0, 1])).unwrap();
    let mut envelope = json(&office.bundle(&[&office.policy[0]]));
    envelope["payloadType"] = DeviceKind::PAYLOAD_TYPE.into();
    let error = keyset.verify::<DeviceKind>(&bytes(&envelope)).unwrap_err();
    assert!(matches!(error, EnvelopeError::WrongSignature(_)), "{error:?}");
}

#[test]
fn bundle_with_repeated_key_id_is_refused() {
    let office = Office::new();
    let policy = &office.policy[0];
    let error = office.first().verify::<BundleKind>(&office.bundle(&[policy, policy])).unwrap_err();
    assert!(matches!(error, EnvelopeError::RepeatedKey(id) if id == policy.public().id()), "{error:?}");
}

#[test]
fn repeated_key_id_of_a_stranger_is_refused_too() {
    let office = Office::new();
    let stranger = key();
    let envelope = office.bundle(&[&stranger, &office.policy[0], &stranger]);
    assert!(matches!(office.first().verify::<BundleKind>(&envelope), Err(EnvelopeError::RepeatedKey(_))));
}

#[test]
fn wrong_signature_beside_a_good_one_is_refused() {
    let office = Office::new();
    let mut envelope = json(&office.bundle(&[&office.policy[0], &office.policy[1]]));
    envelope["signatures"][1]["sig"] = envelope["signatures"][0]["sig"].clone();
    let error = office.first().verify::<BundleKind>(&bytes(&envelope)).unwrap_err();
    assert!(
        matches!(error, EnvelopeError::WrongSignature(id) if id == office.policy[1].public().id()),
        "{error:?}"
    );
}

#[test]
fn signature_of_a_stranger_beside_a_good_one_is_passed_over() {
    let office = Office::new();
    let envelope = office.bundle(&[&key(), &office.policy[0]]);
    assert!(office.first().verify::<BundleKind>(&envelope).is_ok());
}

/// A tenant whose bundles need two persons: dora with the keys 0 and 1, emil with key 2.
fn two_of_two() -> (Office, Keyset) {
    let mut office = Office::new();
    office.policy.push(key());
    let [a, b, c] = [&office.policy[0], &office.policy[1], &office.policy[2]];
    let mut keyset = office.keyset();
    keyset.roles.policy = super::role(2, &[("dora", a), ("dora", b), ("emil", c)]);
    (office, keyset)
}

#[test]
fn threshold_is_met_by_two_persons() {
    let (office, keyset) = two_of_two();
    let keyset = crate::TrustedKeyset::dangerous_unpinned(&office.sign(&keyset, &[0, 1])).unwrap();
    for signers in [[0, 2], [1, 2], [2, 0]] {
        let envelope = office.bundle(&signers.map(|n: usize| &office.policy[n]));
        assert!(keyset.verify::<BundleKind>(&envelope).is_ok(), "{signers:?}");
    }
}

#[test]
fn one_person_with_two_keys_counts_once() {
    let (office, keyset) = two_of_two();
    let keyset = crate::TrustedKeyset::dangerous_unpinned(&office.sign(&keyset, &[0, 1])).unwrap();
    let envelope = office.bundle(&[&office.policy[0], &office.policy[1]]);
    let error = keyset.verify::<BundleKind>(&envelope).unwrap_err();
    assert!(matches!(error, EnvelopeError::BelowThreshold { persons: 1, threshold: 2 }), "{error:?}");
}

#[test]
fn one_of_two_persons_is_too_few() {
    let (office, keyset) = two_of_two();
    let keyset = crate::TrustedKeyset::dangerous_unpinned(&office.sign(&keyset, &[0, 1])).unwrap();
    let error = keyset.verify::<BundleKind>(&office.bundle(&[&office.policy[2]])).unwrap_err();
    assert!(matches!(error, EnvelopeError::BelowThreshold { persons: 1, threshold: 2 }), "{error:?}");
}

#[test]
fn envelope_has_at_most_64_kib() {
    let office = Office::new();
    let keyset = office.first();
    let mut envelope = office.bundle(&[&office.policy[0]]);
    envelope.resize(MAX_ENVELOPE, b' ');
    assert!(keyset.verify::<BundleKind>(&envelope).is_ok());
    envelope.push(b' ');
    let error = keyset.verify::<BundleKind>(&envelope).unwrap_err();
    assert!(matches!(error, EnvelopeError::TooLarge(n) if n == MAX_ENVELOPE + 1), "{error:?}");
}

#[test]
fn envelope_has_at_most_32_signatures() {
    let office = Office::new();
    let keyset = office.first();
    let mut keys: Vec<SecretKey> = (1..MAX_SIGNATURES).map(|_| key()).collect();
    let signers: Vec<_> = keys.iter().chain([&office.policy[0]]).collect();
    assert!(keyset.verify::<BundleKind>(&office.bundle(&signers)).is_ok());
    keys.push(key());
    let signers: Vec<_> = keys.iter().chain([&office.policy[0]]).collect();
    let error = keyset.verify::<BundleKind>(&office.bundle(&signers)).unwrap_err();
    assert!(matches!(error, EnvelopeError::TooManySignatures(n) if n == MAX_SIGNATURES + 1), "{error:?}");
}

#[test]
fn unknown_field_is_refused() {
    let office = Office::new();
    let keyset = office.first();
    let mut outer = json(&office.bundle(&[&office.policy[0]]));
    outer["extra"] = json!(1);
    let mut inner = json(&office.bundle(&[&office.policy[0]]));
    inner["signatures"][0]["extra"] = json!(1);
    for envelope in [outer, inner] {
        assert!(matches!(keyset.verify::<BundleKind>(&bytes(&envelope)), Err(EnvelopeError::Shape(_))));
    }
}

#[test]
fn repeated_field_is_refused() {
    let office = Office::new();
    let keyset = office.first();
    let good = String::from_utf8(office.bundle(&[&office.policy[0]])).unwrap();
    for field in ["payload", "payloadType"] {
        let twice = good.replacen('{', &format!(r#"{{"{field}":"","#), 1);
        assert!(
            matches!(keyset.verify::<BundleKind>(twice.as_bytes()), Err(EnvelopeError::Shape(_))),
            "{field}"
        );
    }
    let twice = good.replacen(r#""signatures":"#, r#""signatures":[],"signatures":"#, 1);
    assert!(matches!(keyset.verify::<BundleKind>(twice.as_bytes()), Err(EnvelopeError::Shape(_))));
    let twice = good.replacen(r#""sig":"#, r#""sig":"","sig":"#, 1);
    assert!(matches!(keyset.verify::<BundleKind>(twice.as_bytes()), Err(EnvelopeError::Shape(_))));
}

#[test]
fn base64_of_another_alphabet_or_without_padding_is_refused() {
    let office = Office::new();
    let keyset = office.first();
    for payload in ["a-_b", "YQ", "YR==", "Y Q=", "!"] {
        let mut envelope = json(&office.bundle(&[&office.policy[0]]));
        envelope["payload"] = payload.into();
        let error = keyset.verify::<BundleKind>(&bytes(&envelope)).unwrap_err();
        assert!(matches!(error, EnvelopeError::Payload(_)), "{payload}: {error:?}");
    }
    for sig in ["", "YWJj", "!"] {
        let mut envelope = json(&office.bundle(&[&office.policy[0]]));
        envelope["signatures"][0]["sig"] = sig.into();
        let error = keyset.verify::<BundleKind>(&bytes(&envelope)).unwrap_err();
        assert!(matches!(error, EnvelopeError::SignatureShape(_)), "{sig}: {error:?}");
    }
}

#[test]
fn key_id_that_is_no_hash_is_refused() {
    let office = Office::new();
    let id = office.policy[0].public().id().to_string();
    for wrong in ["", "dora", &id[1..], &id.to_uppercase()] {
        if wrong == id {
            continue;
        }
        let mut envelope = json(&office.bundle(&[&office.policy[0]]));
        envelope["signatures"][0]["keyid"] = wrong.into();
        let error = office.first().verify::<BundleKind>(&bytes(&envelope)).unwrap_err();
        assert!(matches!(error, EnvelopeError::Shape(_)), "{wrong}: {error:?}");
    }
}

#[test]
fn request_is_believed_by_its_host_key_only() {
    let (host, other) = (key(), key());
    let envelope = sign::<RequestKind>(b"{}", &[&host]);
    assert!(verify_request(&envelope, &host.public()).is_ok());
    let error = verify_request(&envelope, &other.public()).unwrap_err();
    assert!(matches!(error, EnvelopeError::BelowThreshold { persons: 0, threshold: 1 }), "{error:?}");
}

#[test]
fn keyset_is_no_document_of_a_role() {
    let office = Office::new();
    let envelope = sign::<KeysetKind>(b"{}", &[&office.policy[0]]);
    assert!(matches!(office.first().verify::<BundleKind>(&envelope), Err(EnvelopeError::Kind { .. })));
}
