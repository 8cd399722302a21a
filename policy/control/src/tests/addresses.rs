use super::{gateway, id, pool};
use crate::{Addresses, Pool};
use kontor_bundle::Gateway;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// A gateway whose own addresses are these.
fn own(v4: &str, v6: &str) -> Gateway {
    Gateway { v4: v4.parse().unwrap(), v6: v6.parse().unwrap(), ..gateway(1) }
}

fn v4(addresses: &mut Addresses, device: &str, at: &[(Pool, &Gateway)]) -> Option<String> {
    addresses.assign(&id(device), at).map(|assigned| assigned[0].v4.to_string())
}

#[test]
fn devices_have_different_addresses_and_keep_them() {
    let (pool, gateway) = (pool(1, "10.71.0.0/16", "fd71::/64"), gateway(1));
    let mut addresses = Addresses::default();
    let at = [(pool, &gateway)];
    assert_eq!(v4(&mut addresses, "a", &at).unwrap(), "10.71.0.2");
    assert_eq!(v4(&mut addresses, "b", &at).unwrap(), "10.71.0.3");
    assert_eq!(v4(&mut addresses, "a", &at).unwrap(), "10.71.0.2");
    assert_eq!(addresses.index(&id("b")), Some(1));
    assert_eq!(addresses.index(&id("c")), None);
}

#[test]
fn addresses_survive_being_stored() {
    let (pool, gateway) = (pool(1, "10.71.0.0/16", "fd71::/64"), gateway(1));
    let mut addresses = Addresses::default();
    v4(&mut addresses, "a", &[(pool, &gateway)]);
    let text = serde_json::to_string(&addresses).unwrap();
    assert_eq!(text, r#"{"a":0}"#);
    assert_eq!(serde_json::from_str::<Addresses>(&text).unwrap(), addresses);
}

#[test]
fn gateways_own_address_is_nobodys() {
    let pool = pool(1, "10.71.0.0/29", "fd71::/64");
    for gateway in [own("10.71.0.3", "fd71::1"), own("10.71.0.1", "fd71::3")] {
        let mut addresses = Addresses::default();
        let at = [(pool, &gateway)];
        let assigned: Vec<_> = ["a", "b", "c"].map(|device| v4(&mut addresses, device, &at).unwrap()).into();
        assert_eq!(assigned, ["10.71.0.2", "10.71.0.4", "10.71.0.5"]);
    }
}

#[test]
fn device_whose_address_became_a_gateways_moves() {
    let pool = pool(1, "10.71.0.0/29", "fd71::/64");
    let mut addresses = Addresses::default();
    let (before, after) = (own("10.71.0.1", "fd71::1"), own("10.71.0.2", "fd71::1"));
    assert_eq!(v4(&mut addresses, "a", &[(pool, &before)]).unwrap(), "10.71.0.2");
    assert_eq!(v4(&mut addresses, "a", &[(pool, &after)]).unwrap(), "10.71.0.3");
}

#[test]
fn full_pool_has_no_address() {
    // .0 is the network, .1 the gateway, .7 the broadcast address.
    let (pool, gateway) = (pool(1, "10.71.0.0/29", "fd71::/64"), gateway(1));
    let mut addresses = Addresses::default();
    let at = [(pool, &gateway)];
    let assigned: Vec<_> =
        ["a", "b", "c", "d", "e", "f"].map(|device| v4(&mut addresses, device, &at)).into();
    assert_eq!(assigned[4].as_deref(), Some("10.71.0.6"));
    assert_eq!(assigned[5], None);
    assert_eq!(v4(&mut addresses, "e", &at).as_deref(), Some("10.71.0.6"), "who has one keeps it");
}

#[test]
fn smallest_of_all_pools_decides() {
    let (wide, narrow) = (pool(1, "10.71.0.0/16", "fd71::/64"), pool(2, "10.72.0.0/16", "fd72::/126"));
    let (first, second) = (gateway(1), gateway(2));
    let mut addresses = Addresses::default();
    let at = [(wide, &first), (narrow, &second)];
    assert_eq!(v4(&mut addresses, "a", &at).unwrap(), "10.71.0.2");
    assert_eq!(v4(&mut addresses, "b", &at).unwrap(), "10.71.0.3");
    assert_eq!(v4(&mut addresses, "c", &at), None, "fd72::3 is the last");
}

#[test]
fn tiny_pools_at_the_end_of_the_address_space_have_no_address() {
    let gateway = gateway(1);
    for (v4_net, v6_net) in [
        ("255.255.255.255/32", "fd71::/64"),
        ("10.71.0.0/31", "fd71::/64"),
        ("10.71.0.0/16", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"),
    ] {
        let at = [(pool(1, v4_net, v6_net), &gateway)];
        assert_eq!(v4(&mut Addresses::default(), "a", &at), None, "{v4_net} {v6_net}");
    }
}

proptest! {
    #[test]
    fn no_two_devices_share_an_address(order in proptest::collection::vec(0..40_u8, 0..120), prefix in 26..31_u8) {
        let (pool, gateway) = (pool(1, &format!("10.71.0.0/{prefix}"), "fd71::/64"), own("10.71.0.5", "fd71::1"));
        let mut addresses = Addresses::default();
        for device in &order {
            let name = format!("d{device}");
            if let Some(address) = v4(&mut addresses, &name, &[(pool, &gateway)]) {
                let address: std::net::Ipv4Addr = address.parse().unwrap();
                prop_assert!(pool.v4.contains(&address) && address != gateway.v4 && address != pool.v4.broadcast());
            }
        }
        let indices: Vec<_> = (0..40).filter_map(|device| addresses.index(&id(&format!("d{device}")))).collect();
        prop_assert_eq!(indices.iter().collect::<BTreeSet<_>>().len(), indices.len());
    }
}
