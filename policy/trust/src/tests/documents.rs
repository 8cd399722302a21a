use super::{Office, device, key, lease, lease_gateway, request};
use crate::{
    Device, DeviceKind, DeviceState, Digest, DocumentError, Kind, Lease, LeaseKind, MAX_LEASE_GATEWAYS,
    MAX_RELEASE, Request, RequestKind, RoleKind, SecretKey, StateMode, sign, untrusted_device,
    verify_request,
};

const TENANT: Digest = Digest([1; 32]);

fn parse_device(payload: &[u8]) -> Result<Device, DocumentError> {
    parse(payload, |office| &office.enrol, Device::parse)
}

fn parse_lease(payload: &[u8]) -> Result<Lease, DocumentError> {
    parse(payload, |office| &office.lease, Lease::parse)
}

fn parse_request(payload: &[u8]) -> Result<Request, DocumentError> {
    let host = key();
    let envelope = sign::<RequestKind>(payload, &[&host]);
    Request::parse(&verify_request(&envelope, &host.public()).unwrap())
}

fn parse<K: RoleKind, T>(
    payload: &[u8],
    signer: impl FnOnce(&Office) -> &SecretKey,
    parse: impl FnOnce(&crate::Verified<K>) -> Result<T, DocumentError>,
) -> Result<T, DocumentError> {
    let office = Office::new();
    let envelope = sign::<K>(payload, &[signer(&office)]);
    parse(&office.first().verify::<K>(&envelope).unwrap())
}

#[test]
fn documents_are_read_as_they_were_written() {
    let record = device(TENANT, key().public());
    assert_eq!(parse_device(&record.payload()).unwrap(), record);
    let revoked = Device { state: DeviceState::Revoked, ..record };
    assert_eq!(parse_device(&revoked.payload()).unwrap(), revoked);
    assert_eq!(parse_request(&request(TENANT).payload()).unwrap(), request(TENANT));
    for state in [StateMode::Create, StateMode::Open, StateMode::Ephemeral] {
        let lease = Lease { state, ..lease(TENANT) };
        assert_eq!(parse_lease(&lease.payload()).unwrap(), lease);
    }
}

#[test]
fn device_record_is_written_as_documented() {
    let record = device(TENANT, crate::PublicKey([2; 32]));
    let expected = format!(
        r#"{{"tenant":"{}","device":"laptop-7","enrolment":"{}","serial":1,"state":"active","host_key":"{}","line":"sales","share_id":"share-1"}}"#,
        "01".repeat(32),
        "03".repeat(32),
        "02".repeat(32),
    );
    assert_eq!(String::from_utf8(record.payload()).unwrap(), expected);
}

/// Every field taken out, one put in, one repeated, something behind.
fn bent(payload: &[u8]) -> Vec<String> {
    let text = String::from_utf8(payload.to_vec()).unwrap();
    let value: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut bent = vec![
        text.replacen('{', r#"{"extra":1,"#, 1),
        format!("{text}1"),
        String::new(),
        "[]".to_owned(),
        "null".to_owned(),
        "\u{feff}".to_owned() + &text,
    ];
    for (field, content) in &value {
        let mut without = value.clone();
        without.remove(field);
        bent.push(serde_json::to_string(&without).unwrap());
        let mut empty = value.clone();
        empty.insert(field.clone(), serde_json::Value::Null);
        bent.push(serde_json::to_string(&empty).unwrap());
        bent.push(text.replacen('{', &format!("{{{field:?}:{content},"), 1));
    }
    bent
}

#[test]
fn documents_with_a_missing_unknown_or_repeated_field_are_refused() {
    for payload in bent(&device(TENANT, key().public()).payload()) {
        assert!(
            matches!(
                parse_device(payload.as_bytes()),
                Err(DocumentError::Parse { kind: DeviceKind::NAME, .. })
            ),
            "{payload}"
        );
    }
    for payload in bent(&request(TENANT).payload()) {
        assert!(
            matches!(
                parse_request(payload.as_bytes()),
                Err(DocumentError::Parse { kind: RequestKind::NAME, .. })
            ),
            "{payload}"
        );
    }
    for payload in bent(&lease(TENANT).payload()) {
        assert!(
            matches!(
                parse_lease(payload.as_bytes()),
                Err(DocumentError::Parse { kind: LeaseKind::NAME, .. })
            ),
            "{payload}"
        );
    }
}

#[test]
fn lease_has_1_to_8_gateways() {
    let with = |n: usize| {
        let gateways = (0..n).map(|id| lease_gateway(id.try_into().unwrap())).collect();
        parse_lease(&Lease { gateways, ..lease(TENANT) }.payload())
    };
    assert!(matches!(with(0), Err(DocumentError::Field { field: "gateways", .. })));
    assert!(with(1).is_ok());
    assert!(with(MAX_LEASE_GATEWAYS).is_ok());
    assert!(matches!(with(MAX_LEASE_GATEWAYS + 1), Err(DocumentError::Field { field: "gateways", .. })));
}

#[test]
fn lease_with_a_gateway_twice_is_refused() {
    let gateways = vec![lease_gateway(1), lease_gateway(2), lease_gateway(1)];
    let error = parse_lease(&Lease { gateways, ..lease(TENANT) }.payload()).unwrap_err();
    assert!(matches!(error, DocumentError::Field { kind: "lease", field: "gateways" }), "{error:?}");
}

#[test]
fn lease_that_ends_before_it_begins_has_no_life() {
    assert_eq!(lease(TENANT).life_s(), Some(1_000));
    assert_eq!(Lease { not_after: 1_000, ..lease(TENANT) }.life_s(), None);
    assert_eq!(Lease { not_after: 999, ..lease(TENANT) }.life_s(), None);
}

#[test]
fn name_of_a_release_has_1_to_128_printable_characters() {
    let with =
        |release: &str| parse_request(&Request { release: release.to_owned(), ..request(TENANT) }.payload());
    assert!(with("a").is_ok());
    assert!(with(&"a".repeat(MAX_RELEASE)).is_ok());
    for wrong in ["", &"a".repeat(MAX_RELEASE + 1), "a\nb", "\u{1b}[2J", "ä"] {
        assert!(matches!(with(wrong), Err(DocumentError::Field { field: "release", .. })), "{wrong:?}");
    }
}

#[test]
fn claimed_device_is_read_without_a_signature() {
    let payload = request(TENANT).payload();
    assert_eq!(untrusted_device(&sign::<RequestKind>(&payload, &[])).unwrap().as_str(), "laptop-7");
    assert_eq!(untrusted_device(&sign::<LeaseKind>(&payload, &[])), None);
    assert_eq!(untrusted_device(&sign::<RequestKind>(b"{}", &[])), None);
    assert_eq!(untrusted_device(b""), None);
}
