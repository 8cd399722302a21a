use super::{LEASE_S, NOW, Town, id, key, pool, request};
use crate::{CLOCK_BACK_S_MAX, IssueError, Issued, OfficeFault, Refusal};
use kontor_bundle::lease::{
    Asked, GatewayMemory, HostMemory, LeaseError, MAX_KEYSETS, OwnGateway, for_gateway, for_guest, for_host,
};
use kontor_trust::{
    BundleKind, DeviceKind, DeviceState, Digest, EnvelopeError, KeysetKind, Request, RequestKind, StateMode,
    TrustedKeyset, sign, verify_request,
};

/// That guest, host and both gateways believe the answer, each starting from the first keyset.
fn believed(town: &Town, request: &Request, issued: &Issued, now: u64) {
    let floor = TrustedKeyset::first(&town.chain[0], &town.tenant()).unwrap();
    let Request { nonce, boot_key, seq, verity_root, .. } = *request;
    for_guest(&floor, &issued.parts, &Asked { nonce, boot_key, seq, verity_root }, 0).unwrap();
    let verified = verify_request(&town.signed(request), &town.host.public()).unwrap();
    for_host(&floor, &issued.parts, &verified, &HostMemory::default()).unwrap();
    for gateway in &issued.lease.gateways {
        let pool = town.pools.iter().find(|pool| pool.id == gateway.id).unwrap();
        let own = OwnGateway { id: pool.id, pool_v4: pool.v4, pool_v6: pool.v6 };
        for_gateway(&floor, &issued.admit, now, &own, |_, _, _| GatewayMemory::default()).unwrap();
    }
}

#[test]
fn lease_is_believed_by_guest_host_and_gateways() {
    let mut town = Town::new();
    let request = request(town.tenant());
    let issued = town.answer(&request, NOW).unwrap();
    believed(&town, &request, &issued, NOW);
    let lease = &issued.lease;
    assert_eq!((lease.issued_at, lease.not_after), (NOW, NOW + LEASE_S));
    assert_eq!((lease.revision, lease.keyset_version, lease.state), (7, 1, StateMode::Ephemeral));
    let gateways: Vec<_> =
        lease.gateways.iter().map(|g| (g.id, g.v4.to_string(), g.v6.to_string())).collect();
    assert_eq!(
        gateways,
        [(1, "10.71.0.2".into(), "fd71::2".into()), (2, "10.72.0.2".into(), "fd72::2".into())]
    );
}

#[test]
fn host_and_gateway_get_the_same_documents() {
    let mut town = Town::new();
    let request = request(town.tenant());
    let Issued { parts, admit, .. } = town.answer(&request, NOW).unwrap();
    assert_eq!((parts.keysets, parts.device), (admit.keysets, admit.device));
    assert_eq!((parts.bundle, parts.lease), (admit.bundle, admit.lease));
    assert_eq!(admit.request, town.signed(&request));
}

#[test]
fn renewal_keeps_the_addresses() {
    let mut town = Town::new();
    let mut request = request(town.tenant());
    let first = town.answer(&request, NOW).unwrap().lease;
    request.seq = 1;
    request.nonce = [44; 32];
    let second = town.answer(&request, NOW + 10).unwrap();
    believed(&town, &request, &second, NOW + 10);
    assert_eq!(second.lease.gateways, first.gateways);
    assert!(second.lease.issued_at > first.issued_at);
}

#[test]
fn lease_within_the_same_second_is_dated_later() {
    let mut town = Town::new();
    let mut request = request(town.tenant());
    for seq in 0..3 {
        request.seq = seq;
        assert_eq!(town.answer(&request, NOW).unwrap().lease.issued_at, NOW + seq);
    }
}

#[test]
fn clock_that_went_back_issues_nothing() {
    let mut town = Town::new();
    let mut request = request(town.tenant());
    town.answer(&request, NOW).unwrap();
    request.seq = 1;
    assert_eq!(town.answer(&request, NOW + 1 - CLOCK_BACK_S_MAX).unwrap().lease.issued_at, NOW + 1);
    request.seq = 2;
    let error = town.answer(&request, NOW + 1 - CLOCK_BACK_S_MAX).unwrap_err();
    assert!(matches!(error, IssueError::Office(OfficeFault::Clock)), "{error:?}");
}

#[test]
fn life_is_the_shorter_of_configuration_and_bundle() {
    let mut town = Town::new();
    town.bundle.lease_s_max = 60;
    let request = request(town.tenant());
    let lease = town.answer(&request, NOW).unwrap().lease;
    assert_eq!(lease.life_s(), Some(60));
}

#[test]
fn only_gateways_of_configuration_and_bundle_are_named() {
    let mut town = Town::new();
    town.pools = vec![
        pool(9, "10.79.0.0/16", "fd79::/64"),
        pool(3, "10.73.0.0/16", "fd73::/64"),
        pool(1, "10.71.0.0/16", "fd71::/64"),
        pool(2, "10.72.0.0/16", "fd72::/64"),
    ];
    let request = request(town.tenant());
    let lease = town.answer(&request, NOW).unwrap().lease;
    assert_eq!(lease.gateways.iter().map(|gateway| gateway.id).collect::<Vec<_>>(), [3, 1]);
}

#[test]
fn office_without_a_gateway_of_the_bundle_issues_nothing() {
    let mut town = Town::new();
    town.pools = vec![pool(9, "10.79.0.0/16", "fd79::/64")];
    let request = request(town.tenant());
    let error = town.answer(&request, NOW).unwrap_err();
    assert!(matches!(error, IssueError::Office(OfficeFault::NoGateway)), "{error:?}");
}

#[test]
fn device_without_a_free_address_is_refused() {
    let mut town = Town::new();
    town.pools = vec![pool(1, "10.71.0.0/30", "fd71::/64")];
    let mut request = request(town.tenant());
    assert!(town.answer(&request, NOW).is_ok(), "10.71.0.2 is free");
    town.device.device = id("laptop-8");
    request.device = id("laptop-8");
    request.boot_key = [55; 32];
    let error = town.answer(&request, NOW).unwrap_err();
    assert!(matches!(error, IssueError::Refused(Refusal::NoAddress)), "{error:?}");
}

fn refusal(town: &mut Town, request: &Request) -> Refusal {
    match town.answer(request, NOW) {
        Err(IssueError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn request_that_is_not_the_devices_is_refused() {
    let mut town = Town::new();
    let good = request(town.tenant());
    let other = Request { tenant: Digest([1; 32]), ..good.clone() };
    assert!(matches!(refusal(&mut town, &other), Refusal::OtherTenant));
    let other = Request { device: id("laptop-8"), ..good.clone() };
    assert!(matches!(refusal(&mut town, &other), Refusal::OtherDevice));
    let other = Request { enrolment: Digest([1; 32]), ..good.clone() };
    assert!(matches!(refusal(&mut town, &other), Refusal::OtherEnrolment));
    assert!(town.answer(&good, NOW).is_ok());
}

#[test]
fn request_not_signed_by_the_host_is_refused() {
    let town = Town::new();
    let payload = request(town.tenant()).payload();
    for signers in [&[][..], &[&key()], &[&town.lease]] {
        let error = town.identify(&sign::<RequestKind>(&payload, signers)).err().unwrap();
        assert!(
            matches!(
                error,
                IssueError::Refused(Refusal::Signature(EnvelopeError::BelowThreshold { persons: 0, .. }))
            ),
            "{error:?}"
        );
    }
}

#[test]
fn connection_that_is_not_made_with_the_host_key_is_refused() {
    let town = Town::new();
    let untrusted = town.signed(&request(town.tenant()));
    let record = sign::<DeviceKind>(&town.device.payload(), &[&town.enrol]);
    assert!(town.office().identify(&town.host.public(), &untrusted, &record).is_ok());
    for peer in [key().public(), town.lease.public(), town.enrol.public()] {
        let error = town.office().identify(&peer, &untrusted, &record).err().unwrap();
        assert!(matches!(error, IssueError::Refused(Refusal::OtherPeer)), "{error:?}");
    }
}

#[test]
fn tampered_byte_of_the_request_is_refused() {
    let town = Town::new();
    let mut envelope = town.signed(&request(town.tenant()));
    assert!(town.identify(&envelope).is_ok());
    for at in 0..envelope.len() {
        envelope[at] ^= 1;
        assert!(matches!(town.identify(&envelope), Err(IssueError::Refused(_))), "byte {at}");
        envelope[at] ^= 1;
    }
}

#[test]
fn malformed_request_is_refused_though_signed() {
    let town = Town::new();
    let error = town.identify(&sign::<RequestKind>(b"{}", &[&town.host])).err().unwrap();
    assert!(matches!(error, IssueError::Refused(Refusal::Malformed(_))), "{error:?}");
}

#[test]
fn revoked_device_is_refused() {
    let mut town = Town::new();
    town.device.state = DeviceState::Revoked;
    let request = request(town.tenant());
    assert!(matches!(refusal(&mut town, &request), Refusal::Revoked));
}

#[test]
fn replayed_request_is_refused() {
    let mut town = Town::new();
    let request = Request { seq: 4, ..request(town.tenant()) };
    town.answer(&request, NOW).unwrap();
    assert!(matches!(refusal(&mut town, &request), Refusal::Replayed { found: 4, last: 4 }));
    let older = Request { seq: 3, nonce: [44; 32], ..request.clone() };
    assert!(matches!(refusal(&mut town, &older), Refusal::Replayed { found: 3, last: 4 }));
    assert!(town.answer(&Request { seq: 5, ..request.clone() }, NOW).is_ok());
    assert!(town.answer(&Request { seq: 0, boot_key: [55; 32], ..request }, NOW).is_ok(), "another boot");
}

#[test]
fn boot_key_of_another_device_is_refused() {
    let mut town = Town::new();
    let mut request = request(town.tenant());
    town.answer(&request, NOW).unwrap();
    town.device.device = id("laptop-8");
    request.device = id("laptop-8");
    assert!(matches!(refusal(&mut town, &request), Refusal::BootKeyTaken));
}

#[test]
fn image_with_a_newer_keyset_is_refused() {
    let mut town = Town::new();
    let request = Request { keyset_version: 2, ..request(town.tenant()) };
    assert!(matches!(refusal(&mut town, &request), Refusal::NewerKeyset { image: 2, newest: 1 }));
}

#[test]
fn answer_leads_from_the_images_keyset_to_the_newest() {
    let mut town = Town::new();
    for _ in 0..MAX_KEYSETS {
        town.next_keyset();
    }
    // Versions 2 to 9 fit into the answer: an image of version 1 can follow.
    let request = request(town.tenant());
    let issued = town.answer(&request, NOW).unwrap();
    assert_eq!((issued.parts.keysets.len(), issued.lease.keyset_version), (8, 9));
    believed(&town, &request, &issued, NOW);

    town.next_keyset();
    let next = Request { seq: 1, ..request };
    assert!(matches!(refusal(&mut town, &next), Refusal::OldImage { image: 1, oldest: 2 }));
    assert!(town.answer(&Request { keyset_version: 2, ..next.clone() }, NOW).is_ok());
    assert!(matches!(refusal(&mut town, &Request { keyset_version: 0, ..next }), Refusal::OldImage { .. }));
}

fn fault<T>(answer: Result<T, IssueError>) -> OfficeFault {
    match answer {
        Err(IssueError::Office(fault)) => fault,
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn stored_device_record_is_checked() {
    let town = Town::new();
    let untrusted = town.signed(&request(town.tenant()));
    let forged = sign::<DeviceKind>(&town.device.payload(), &[&town.lease]);
    let found = fault(town.office().identify(&town.host.public(), &untrusted, &forged));
    assert!(matches!(found, OfficeFault::Envelope { kind: "device", .. }), "{found:?}");
    let malformed = sign::<DeviceKind>(b"{}", &[&town.enrol]);
    assert!(matches!(
        fault(town.office().identify(&town.host.public(), &untrusted, &malformed)),
        OfficeFault::Device(_)
    ));

    let mut town = Town::new();
    town.device.tenant = Digest([1; 32]);
    let untrusted = town.signed(&request(town.tenant()));
    assert!(matches!(fault(town.identify(&untrusted)), OfficeFault::Misplaced("device")));
}

#[test]
fn stored_bundle_is_checked() {
    let town = Town::new();
    let who = town.identify(&town.signed(&request(town.tenant()))).unwrap();
    let issue = |bundle: &[u8]| fault(town.office().issue(&who, bundle, &mut town.memory.clone(), NOW));
    let forged = sign::<BundleKind>(&town.bundle.payload(), &[&town.lease]);
    assert!(matches!(issue(&forged), OfficeFault::Envelope { kind: "bundle", .. }));
    assert!(matches!(issue(&sign::<BundleKind>(b"{}", &[&town.policy])), OfficeFault::Bundle(_)));
    for bend in [(|bundle| bundle.tenant = Digest([1; 32])) as fn(&mut kontor_bundle::Bundle), |bundle| {
        bundle.line = "board".parse().unwrap()
    }] {
        let mut bundle = town.bundle.clone();
        bend(&mut bundle);
        let signed = sign::<BundleKind>(&bundle.payload(), &[&town.policy]);
        assert!(matches!(issue(&signed), OfficeFault::Misplaced("bundle")));
    }
}

#[test]
fn lease_key_that_is_not_in_the_keyset_issues_nothing() {
    let mut town = Town::new();
    town.lease = key();
    let request = request(town.tenant());
    let found = fault(town.answer(&request, NOW));
    let OfficeFault::SelfCheck(cause) = found else { panic!("{found:?}") };
    assert!(matches!(*cause, LeaseError::Envelope { kind: "lease", .. }), "{cause:?}");
    // Nothing was issued, so the same request is answered once the key is right.
    assert_eq!(town.memory.past.last_seq(&id("laptop-7"), &[5; 32]), None);
}

#[test]
fn newer_keyset_dismisses_the_stolen_lease_key() {
    let mut town = Town::new();
    let new = key();
    let mut keyset = town.newest.keyset().clone();
    keyset.tenant = Some(town.tenant());
    keyset.version = 2;
    keyset.roles.lease.keys[0].key = new.public();
    let envelope = sign::<KeysetKind>(&keyset.payload(), &[&town.root]);
    town.newest = town.newest.advance(&envelope).unwrap();
    town.chain.push(envelope);
    let request = request(town.tenant());
    assert!(matches!(fault(town.answer(&request, NOW)), OfficeFault::SelfCheck(_)));
    town.lease = new;
    let issued = town.answer(&request, NOW).unwrap();
    believed(&town, &request, &issued, NOW);
}
