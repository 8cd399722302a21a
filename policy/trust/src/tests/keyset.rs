use super::{Office, key, member, role};
use crate::{
    Digest, EnvelopeError, Keyset, KeysetError, KeysetFault, KeysetKind, LeaseKind, MAX_CONTROL_SPKI,
    MAX_MEMBERS, SecretKey, TrustedKeyset, sign,
};

/// The first keyset after `change`, signed by enough roots, pinned to itself.
fn founded(office: &Office, change: impl FnOnce(&mut Keyset)) -> Result<TrustedKeyset, KeysetError> {
    let mut keyset = office.keyset();
    change(&mut keyset);
    TrustedKeyset::first(&office.sign(&keyset, &[0, 1]), &Digest::of(&keyset.payload()))
}

fn fault(office: &Office, change: impl FnOnce(&mut Keyset)) -> KeysetFault {
    match founded(office, change) {
        Err(KeysetError::Fault(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn first_keyset_founds_its_tenant() {
    let office = Office::new();
    let first = office.first();
    assert_eq!(first.tenant(), Digest::of(&office.keyset().payload()));
    assert_eq!((first.version(), first.hash()), (1, first.tenant()));
    assert_eq!(first.keyset(), &office.keyset());
}

#[test]
fn first_keyset_of_another_tenant_is_refused() {
    let (office, other) = (Office::new(), Office::new());
    let envelope = other.sign(&other.keyset(), &[0, 1]);
    let error = TrustedKeyset::first(&envelope, &office.first().tenant()).unwrap_err();
    assert!(
        matches!(error, KeysetError::NotTheFirst { expected, .. } if expected == office.first().tenant())
    );
}

#[test]
fn first_keyset_without_enough_roots_is_refused() {
    let office = Office::new();
    let keyset = office.keyset();
    let tenant = Digest::of(&keyset.payload());
    for (roots, persons) in [(&[][..], 0), (&[0], 1), (&[2], 1)] {
        let error = TrustedKeyset::first(&office.sign(&keyset, roots), &tenant).unwrap_err();
        assert!(
            matches!(error, KeysetError::Envelope(EnvelopeError::BelowThreshold { persons: p, threshold: 2 }) if p == persons),
            "{error:?}"
        );
    }
    let policy = sign::<KeysetKind>(&keyset.payload(), &[&office.policy[0], &office.policy[1]]);
    let error = TrustedKeyset::first(&policy, &tenant).unwrap_err();
    assert!(matches!(error, KeysetError::Envelope(EnvelopeError::BelowThreshold { persons: 0, .. })));
}

#[test]
fn first_keyset_is_signed_by_any_two_roots() {
    let office = Office::new();
    let keyset = office.keyset();
    for roots in [&[0, 1][..], &[1, 2], &[2, 0], &[0, 1, 2]] {
        assert!(TrustedKeyset::dangerous_unpinned(&office.sign(&keyset, roots)).is_ok(), "{roots:?}");
    }
}

#[test]
fn first_keyset_names_no_tenant_and_has_version_1() {
    let office = Office::new();
    let error = founded(&office, |keyset| keyset.tenant = Some(Digest([1; 32]))).unwrap_err();
    assert!(matches!(error, KeysetError::Tenant), "{error:?}");
    for version in [0, 2, u64::MAX] {
        let error = founded(&office, |keyset| keyset.version = version).unwrap_err();
        assert!(
            matches!(error, KeysetError::Version { expected: 1, found } if found == version),
            "{error:?}"
        );
    }
}

#[test]
fn next_keyset_is_signed_by_old_and_new_roots() {
    let mut office = Office::new();
    let first = office.first();
    office.roots.extend([key(), key()]);
    let mut next = Office::next(&first);
    next.root =
        role(2, &[("bert", &office.roots[1]), ("xena", &office.roots[3]), ("yuri", &office.roots[4])]);

    let second = first.advance(&office.sign(&next, &[0, 1, 3])).unwrap();
    assert_eq!((second.version(), second.tenant()), (2, first.tenant()));
    assert_eq!(second.keyset(), &next);

    let old_only = first.advance(&office.sign(&next, &[0, 1])).unwrap_err();
    assert!(
        matches!(old_only, KeysetError::Envelope(EnvelopeError::BelowThreshold { persons: 1, threshold: 2 })),
        "{old_only:?}"
    );
    let new_only = first.advance(&office.sign(&next, &[1, 3, 4])).unwrap_err();
    assert!(
        matches!(
            new_only,
            KeysetError::Previous {
                previous: 1,
                source: EnvelopeError::BelowThreshold { persons: 1, threshold: 2 }
            }
        ),
        "{new_only:?}"
    );
}

#[test]
fn dismissed_root_signs_no_further_keyset() {
    let mut office = Office::new();
    let first = office.first();
    office.roots.push(key());
    let mut next = Office::next(&first);
    next.root = role(2, &[("bert", &office.roots[1]), ("xena", &office.roots[3])]);
    let second = first.advance(&office.sign(&next, &[0, 1, 3])).unwrap();
    let error = second.advance(&office.sign(&Office::next(&second), &[0, 2])).unwrap_err();
    assert!(matches!(error, KeysetError::Previous { previous: 2, .. }), "{error:?}");
}

#[test]
fn dismissed_role_key_signs_nothing_any_more() {
    let office = Office::new();
    let first = office.first();
    let new = key();
    let mut next = Office::next(&first);
    next.roles.lease = role(1, &[("control", &new)]);
    let second = first.advance(&office.sign(&next, &[0, 1])).unwrap();
    let stolen = sign::<LeaseKind>(b"{}", &[&office.lease]);
    assert!(first.verify::<LeaseKind>(&stolen).is_ok());
    assert!(matches!(
        second.verify::<LeaseKind>(&stolen),
        Err(EnvelopeError::BelowThreshold { persons: 0, .. })
    ));
}

#[test]
fn skipped_version_is_refused() {
    let office = Office::new();
    let first = office.first();
    for version in [0, 1, 3, u64::MAX] {
        let mut next = Office::next(&first);
        next.version = version;
        let error = first.advance(&office.sign(&next, &[0, 1])).unwrap_err();
        assert!(
            matches!(error, KeysetError::Version { expected: 2, found } if found == version),
            "{error:?}"
        );
    }
    let mut third = Office::next(&first);
    third.version = 3;
    let error = first.follow(&[office.sign(&third, &[0, 1])]).unwrap_err();
    assert!(matches!(error, KeysetError::Version { expected: 2, found: 3 }), "{error:?}");
}

#[test]
fn next_keyset_of_another_tenant_or_none_is_refused() {
    let office = Office::new();
    let first = office.first();
    for tenant in [None, Some(Digest([1; 32]))] {
        let mut next = Office::next(&first);
        next.tenant = tenant;
        let error = first.advance(&office.sign(&next, &[0, 1])).unwrap_err();
        assert!(matches!(error, KeysetError::Tenant), "{error:?}");
    }
}

#[test]
fn chain_is_followed_and_old_links_are_passed_over() {
    let office = Office::new();
    let first = office.first();
    let second = first.advance(&office.sign(&Office::next(&first), &[0, 1])).unwrap();
    let third = second.advance(&office.sign(&Office::next(&second), &[1, 2])).unwrap();
    let chain: Vec<Vec<u8>> = [&first, &second, &third].map(|link| link.envelope().to_vec()).into();
    for floor in [&first, &second, &third] {
        assert_eq!(floor.follow(&chain).unwrap().hash(), third.hash());
    }
    assert_eq!(second.follow(&chain[2..]).unwrap().version(), 3);
    assert_eq!(third.follow(&[]).unwrap().version(), 3);
    assert_eq!(third.follow(&chain[..1]).unwrap().version(), 3, "a floor never sinks");
}

#[test]
fn chain_with_a_missing_or_swapped_link_is_refused() {
    let office = Office::new();
    let first = office.first();
    let second = first.advance(&office.sign(&Office::next(&first), &[0, 1])).unwrap();
    let third = second.advance(&office.sign(&Office::next(&second), &[1, 2])).unwrap();
    let [second, third] = [second, third].map(|link| link.envelope().to_vec());
    for chain in [vec![third.clone()], vec![third, second]] {
        let error = first.follow(&chain).unwrap_err();
        assert!(matches!(error, KeysetError::Version { expected: 2, found: 3 }), "{error:?}");
    }
}

#[test]
fn fork_is_refused() {
    let office = Office::new();
    let first = office.first();
    let second = first.advance(&office.sign(&Office::next(&first), &[0, 1])).unwrap();
    let mut other = Office::next(&first);
    other.control_spki.clear();
    let error = second.follow(&[office.sign(&other, &[0, 1])]).unwrap_err();
    assert!(matches!(error, KeysetError::Fork(2)), "{error:?}");
    let both = [second.envelope().to_vec(), office.sign(&other, &[0, 1])];
    assert!(matches!(first.follow(&both), Err(KeysetError::Fork(2))));
}

#[test]
fn every_flipped_bit_of_the_next_keyset_is_noticed() {
    let office = Office::new();
    let first = office.first();
    let good = office.sign(&Office::next(&first), &[0, 1]);
    for bit in (0..good.len() * 8).step_by(3) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(first.advance(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn threshold_of_zero_is_refused() {
    let fault = fault(&Office::new(), |keyset| keyset.roles.policy.threshold = 0);
    assert_eq!(fault, KeysetFault::Threshold { role: "policy", threshold: 0, persons: 2 });
}

#[test]
fn threshold_that_the_persons_cannot_reach_is_refused() {
    let office = Office::new();
    let found = fault(&office, |keyset| keyset.root.threshold = 4);
    assert_eq!(found, KeysetFault::Threshold { role: "root", threshold: 4, persons: 3 });
    // Two keys, but one person.
    let found = fault(&office, |keyset| {
        keyset.roles.policy = role(2, &[("dora", &office.policy[0]), ("dora", &office.policy[1])]);
    });
    assert_eq!(found, KeysetFault::Threshold { role: "policy", threshold: 2, persons: 1 });
}

#[test]
fn role_without_keys_is_refused() {
    let found = fault(&Office::new(), |keyset| keyset.roles.enrol.keys.clear());
    assert_eq!(found, KeysetFault::Threshold { role: "enrol", threshold: 1, persons: 0 });
}

#[test]
fn key_listed_twice_in_a_role_is_refused() {
    let office = Office::new();
    let key = office.policy[0].public();
    let found = fault(&office, |keyset| keyset.roles.policy.keys.push(member("dora", &office.policy[0])));
    assert_eq!(found, KeysetFault::RepeatedKey { role: "policy", key });
}

#[test]
fn key_of_two_persons_is_refused() {
    let office = Office::new();
    let key = office.enrol.public();
    let found = fault(&office, |keyset| keyset.roles.policy.keys.push(member("dora", &office.enrol)));
    assert_eq!(found, KeysetFault::SharedKey(key));
}

#[test]
fn lease_key_in_another_role_is_refused() {
    let office = Office::new();
    let key = office.lease.public();
    let roles: [fn(&mut Keyset) -> &mut crate::Role; 5] = [
        |keyset| &mut keyset.root,
        |keyset| &mut keyset.roles.policy,
        |keyset| &mut keyset.roles.command,
        |keyset| &mut keyset.roles.destroy,
        |keyset| &mut keyset.roles.enrol,
    ];
    for role in roles {
        let found = fault(&office, |keyset| role(keyset).keys.push(member("control", &office.lease)));
        assert_eq!(found, KeysetFault::LeaseKeyElsewhere(key));
    }
}

#[test]
fn role_has_at_most_32_keys() {
    let office = Office::new();
    let strangers: Vec<SecretKey> = (0..MAX_MEMBERS).map(|_| key()).collect();
    let crowd = |n: usize| strangers[..n].iter().map(|key| member("crowd", key)).collect();
    assert!(founded(&office, |keyset| keyset.roles.command.keys = crowd(MAX_MEMBERS)).is_ok());
    let found = fault(&office, |keyset| {
        keyset.roles.command.keys = crowd(MAX_MEMBERS);
        keyset.roles.command.keys.push(member("dora", &office.command));
    });
    assert_eq!(found, KeysetFault::TooManyKeys { role: "command", keys: MAX_MEMBERS + 1 });
}

#[test]
fn keyset_has_at_most_8_pins() {
    let office = Office::new();
    let pins = |n: usize| vec![Digest([1; 32]); n];
    assert!(founded(&office, |keyset| keyset.control_spki = pins(MAX_CONTROL_SPKI)).is_ok());
    let found = fault(&office, |keyset| keyset.control_spki = pins(MAX_CONTROL_SPKI + 1));
    assert_eq!(found, KeysetFault::TooManyPins(MAX_CONTROL_SPKI + 1));
}

#[test]
fn keyset_with_an_unknown_or_repeated_field_is_refused() {
    let office = Office::new();
    let good = String::from_utf8(office.keyset().payload()).unwrap();
    for bad in [
        good.replacen('{', r#"{"extra":1,"#, 1),
        good.replacen('{', r#"{"version":1,"#, 1),
        good.replacen(r#""roles":{"#, r#""roles":{"extra":{"threshold":1,"keys":[]},"#, 1),
        good.replacen(r#""person":"#, r#""extra":1,"person":"#, 1),
        format!("{good}{good}"),
        "{}".to_owned(),
        String::new(),
    ] {
        let envelope = sign::<KeysetKind>(bad.as_bytes(), &[&office.roots[0], &office.roots[1]]);
        let error = TrustedKeyset::dangerous_unpinned(&envelope).unwrap_err();
        assert!(matches!(error, KeysetError::Parse(_)), "{bad}: {error:?}");
    }
}
