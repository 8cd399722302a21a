use super::{Scene, bundle, destination, gateway, key};
use crate::{
    AccessFault, Bundle, BundleError, BundleFault, Draft, MAX_DESTINATIONS, MAX_ENDPOINTS, MAX_GATEWAYS,
    MAX_LIFE_S, MAX_MEMORY_MIB, MAX_RESOLVERS, MAX_TIMER_S, MIN_MEMORY_MIB, Protocol,
};
use kontor_trust::{BundleKind, Digest, sign};

const TENANT: Digest = Digest([1; 32]);

fn with(bend: impl FnOnce(&mut Bundle)) -> Result<(), BundleFault> {
    let mut bundle = bundle(TENANT);
    bend(&mut bundle);
    bundle.check()
}

fn parse(payload: &[u8]) -> Result<Bundle, BundleError> {
    let scene = Scene::new();
    let envelope = sign::<BundleKind>(payload, &[&scene.keys.policy]);
    Bundle::parse(&scene.floor.verify(&envelope).unwrap())
}

#[test]
fn bundle_is_read_as_it_was_written() {
    let bundle = bundle(TENANT);
    assert_eq!(parse(&bundle.payload()).unwrap(), bundle);
    assert_eq!(bundle.gateway(2), Some(&gateway(2)));
    assert_eq!(bundle.gateway(3), None);
}

#[test]
fn bundle_with_a_missing_unknown_or_repeated_field_is_refused() {
    let text = String::from_utf8(bundle(TENANT).payload()).unwrap();
    let fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut bent = vec![
        text.replacen('{', r#"{"extra":1,"#, 1),
        text.replacen(r#""settings":{"#, r#""settings":{"extra":1,"#, 1),
        text.replacen(r#""access":{"#, r#""access":{"extra":1,"#, 1),
        text.replacen(r#"{"id":1"#, r#"{"extra":1,"id":1"#, 1),
        text.replacen(r#"{"to":"#, r#"{"extra":1,"to":"#, 1),
        text.replacen(r#""memory_mib":"#, r#""memory_mib":1,"memory_mib":"#, 1),
        text.clone() + "{}",
    ];
    for (field, content) in &fields {
        let mut without = fields.clone();
        without.remove(field);
        bent.push(serde_json::to_string(&without).unwrap());
        bent.push(text.replacen('{', &format!("{{{field:?}:{content},"), 1));
    }
    for payload in bent {
        assert_ne!(payload, text);
        assert!(matches!(parse(payload.as_bytes()), Err(BundleError::Parse(_))), "{payload}");
    }
}

#[test]
fn unusable_bundle_is_refused_though_signed() {
    let mut unusable = bundle(TENANT);
    unusable.revision = 0;
    let error = parse(&unusable.payload()).unwrap_err();
    assert!(matches!(error, BundleError::Fault(BundleFault::Bounds { field: "revision", .. })), "{error:?}");
}

/// That `set` accepts `least` and `most` and refuses their neighbours.
fn bounds(field: &'static str, least: u64, most: u64, set: fn(&mut Bundle, u64)) {
    for value in [least, most] {
        assert_eq!(with(|bundle| set(bundle, value)), Ok(()), "{field} {value}");
    }
    for value in [least.checked_sub(1), most.checked_add(1)].into_iter().flatten() {
        let found = with(|bundle| set(bundle, value));
        assert_eq!(found, Err(BundleFault::Bounds { field, value, least, most }), "{field} {value}");
    }
}

#[test]
fn numbers_have_bounds() {
    bounds("revision", 1, u64::MAX, |bundle, value| bundle.revision = value);
    bounds("lease_s_max", 1, MAX_LIFE_S, |bundle, value| bundle.lease_s_max = value);
    bounds("apply_s", 1, MAX_TIMER_S, |bundle, value| bundle.apply_s = value);
    bounds("silence_s", 1, MAX_TIMER_S, |bundle, value| bundle.silence_s = value);
    bounds("lapse_off_s", 0, MAX_TIMER_S, |bundle, value| bundle.lapse_off_s = value);
    bounds("settings.memory_mib", MIN_MEMORY_MIB.into(), MAX_MEMORY_MIB.into(), |bundle, value| {
        bundle.settings.memory_mib = value.try_into().unwrap();
    });
}

#[test]
fn lists_have_bounds() {
    bounds("gateways", 1, MAX_GATEWAYS as u64, |bundle, n| {
        bundle.gateways = (0..n).map(|id| gateway(id.try_into().unwrap())).collect();
    });
    bounds("gateways.endpoints", 1, MAX_ENDPOINTS as u64, |bundle, n| {
        bundle.gateways[0].endpoints =
            (1..=u16::try_from(n).unwrap()).map(|port| ([198, 51, 100, 1], port).into()).collect();
    });
    bounds("settings.resolvers", 0, MAX_RESOLVERS as u64, |bundle, n| {
        bundle.settings.resolvers = vec![[10, 0, 0, 53].into(); n.try_into().unwrap()];
    });
}

#[test]
fn table_has_at_most_1024_destinations() {
    let destinations = |n| vec![destination("10.0.0.0/8", Protocol::Any, None); n];
    assert_eq!(with(|bundle| bundle.access.destinations = Vec::new()), Ok(()));
    assert_eq!(with(|bundle| bundle.access.destinations = destinations(MAX_DESTINATIONS)), Ok(()));
    assert_eq!(
        with(|bundle| bundle.access.destinations = destinations(MAX_DESTINATIONS + 1)),
        Err(BundleFault::Access(AccessFault::TooMany(MAX_DESTINATIONS + 1)))
    );
}

#[test]
fn full_table_fits_into_an_envelope() {
    let mut bundle = bundle(TENANT);
    bundle.access.destinations = vec![destination("10.0.0.0/8", Protocol::Tcp, None); MAX_DESTINATIONS];
    assert!(sign::<BundleKind>(&bundle.payload(), &[&key()]).len() <= kontor_trust::MAX_ENVELOPE);
}

#[test]
fn gateway_listed_twice_is_refused() {
    let found = with(|bundle| bundle.gateways[1].id = 1);
    assert_eq!(found, Err(BundleFault::RepeatedGateway(1)));
    let found = with(|bundle| bundle.gateways[1].key = bundle.gateways[0].key);
    assert_eq!(found, Err(BundleFault::RepeatedKey(2)));
}

#[test]
fn endpoint_listed_twice_is_refused() {
    let endpoint = gateway(1).endpoints[0];
    for at in [0, 1] {
        let found = with(|bundle| bundle.gateways[at].endpoints.push(endpoint));
        assert_eq!(found, Err(BundleFault::RepeatedEndpoint(endpoint)));
    }
}

#[test]
fn endpoint_that_nobody_can_reach_is_refused() {
    for text in ["192.0.2.1:0", "0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[ff02::1]:1"] {
        let endpoint = text.parse().unwrap();
        let found = with(|bundle| bundle.gateways[0].endpoints = vec![endpoint]);
        assert_eq!(found, Err(BundleFault::Endpoint(endpoint)));
    }
}

fn access(to: &str, protocol: Protocol, ports: Option<[u16; 2]>) -> Result<(), BundleFault> {
    with(|bundle| bundle.access.destinations = vec![destination(to, protocol, ports)])
}

#[test]
fn destination_with_host_bits_is_refused() {
    for to in ["10.0.0.1/8", "fd00::1/64"] {
        assert_eq!(
            access(to, Protocol::Any, None),
            Err(BundleFault::Access(AccessFault::HostBits(to.parse().unwrap())))
        );
    }
    for to in ["10.0.0.1/32", "0.0.0.0/0", "::/0", "fd00::1/128"] {
        assert_eq!(access(to, Protocol::Any, None), Ok(()));
    }
}

#[test]
fn ports_belong_to_tcp_and_udp() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for ports in [None, Some([0, 65_535]), Some([80, 80])] {
            assert_eq!(access("10.0.0.0/8", protocol, ports), Ok(()));
        }
        let found = access("10.0.0.0/8", protocol, Some([81, 80]));
        let to = "10.0.0.0/8".parse().unwrap();
        assert_eq!(found, Err(BundleFault::Access(AccessFault::PortRange { to, first: 81, last: 80 })));
    }
    for protocol in [Protocol::Icmp, Protocol::Any] {
        let found = access("10.0.0.0/8", protocol, Some([80, 80]));
        let to = "10.0.0.0/8".parse().unwrap();
        assert_eq!(found, Err(BundleFault::Access(AccessFault::PortsWithoutProtocol(to))));
    }
}

#[test]
fn draft_in_toml_is_the_bundle() {
    let text = format!(
        r#"
        tenant = "{TENANT}"
        line = "sales"
        revision = 7
        min_release = 1
        lease_s_max = 3600
        apply_s = 60
        silence_s = 180
        lapse_off_s = 600

        [[gateways]]
        id = 1
        key = "{one}"
        endpoints = ["192.0.2.1:51820"]
        v4 = "10.77.0.1"
        v6 = "fd77::1"

        [[gateways]]
        id = 2
        key = "{two}"
        endpoints = ["192.0.2.2:51820"]
        v4 = "10.77.0.1"
        v6 = "fd77::1"

        [settings]
        allow_emulation = false
        allow_test_image = false
        memory_mib = 2048
        resolvers = ["10.0.0.53"]

        [[access.destinations]]
        to = "10.0.0.0/8"
        protocol = "tcp"
        ports = [80, 443]
        "#,
        one = "01".repeat(32),
        two = "02".repeat(32),
    );
    let draft: Draft = toml::from_str(&text).unwrap();
    assert_eq!(draft.unsigned(), &bundle(TENANT));
    assert_eq!(draft.payload().unwrap(), bundle(TENANT).payload());
    let unusable: Draft = toml::from_str(&text.replace("revision = 7", "revision = 0")).unwrap();
    assert!(matches!(unusable.payload(), Err(BundleFault::Bounds { field: "revision", .. })));
    assert!(toml::from_str::<Draft>(&format!("extra = 1\n{text}")).is_err());
}
