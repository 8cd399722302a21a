//! A tenant with all its keys, and the ways to misuse them.

mod documents;
mod dsse;
mod fuzz;
mod keys;
mod keyset;

use crate::{
    BundleKind, Device, DeviceState, Digest, Keyset, KeysetKind, Lease, LeaseGateway, Line, Member,
    PublicKey, Request, Role, Roles, SecretKey, StateMode, TrustedKeyset, sign,
};

/// Keys of a tenant: three roots of whom two must sign, two policy keys of whom one must, and one key for
/// every other role.
pub(super) struct Office {
    pub(super) roots: Vec<SecretKey>,
    pub(super) policy: Vec<SecretKey>,
    pub(super) command: SecretKey,
    pub(super) enrol: SecretKey,
    pub(super) lease: SecretKey,
}

pub(super) fn key() -> SecretKey {
    SecretKey::generate().expect("the test machine has randomness")
}

pub(super) fn member(person: &str, key: &SecretKey) -> Member {
    Member { person: person.parse().expect("a good name"), key: key.public() }
}

pub(super) fn role(threshold: u32, members: &[(&str, &SecretKey)]) -> Role {
    Role { threshold, keys: members.iter().map(|(person, key)| member(person, key)).collect() }
}

impl Office {
    pub(super) fn new() -> Self {
        let keys = |n| (0..n).map(|_| key()).collect();
        Self { roots: keys(3), policy: keys(2), command: key(), enrol: key(), lease: key() }
    }

    /// The first keyset, unsigned.
    pub(super) fn keyset(&self) -> Keyset {
        let [anna, bert, carl] = [&self.roots[0], &self.roots[1], &self.roots[2]];
        Keyset {
            tenant: None,
            version: 1,
            root: role(2, &[("anna", anna), ("bert", bert), ("carl", carl)]),
            roles: Roles {
                policy: role(1, &[("dora", &self.policy[0]), ("emil", &self.policy[1])]),
                command: role(1, &[("dora", &self.command)]),
                destroy: role(1, &[("dora", &self.command)]),
                enrol: role(1, &[("emil", &self.enrol)]),
                lease: role(1, &[("control", &self.lease)]),
            },
            control_spki: vec![Digest([7; 32])],
        }
    }

    /// `keyset` signed by the roots with these numbers.
    pub(super) fn sign(&self, keyset: &Keyset, roots: &[usize]) -> Vec<u8> {
        let keys: Vec<_> = roots.iter().map(|n| &self.roots[*n]).collect();
        sign::<KeysetKind>(&keyset.payload(), &keys)
    }

    pub(super) fn first(&self) -> TrustedKeyset {
        let keyset = self.keyset();
        TrustedKeyset::first(&self.sign(&keyset, &[0, 1]), &Digest::of(&keyset.payload()))
            .expect("a good keyset")
    }

    /// What follows `last` when nothing but the version changes, unsigned.
    pub(super) fn next(last: &TrustedKeyset) -> Keyset {
        let mut keyset = last.keyset().clone();
        keyset.version += 1;
        keyset.tenant = Some(last.tenant());
        keyset
    }

    /// An envelope of some bundle.
    pub(super) fn bundle(&self, signers: &[&SecretKey]) -> Vec<u8> {
        sign::<BundleKind>(br#"{"any":"text"}"#, signers)
    }
}

pub(super) fn device(tenant: Digest, host_key: PublicKey) -> Device {
    Device {
        tenant,
        device: "laptop-7".parse().expect("a good name"),
        enrolment: Digest([3; 32]),
        serial: 1,
        state: DeviceState::Active,
        host_key,
        line: line(),
        share_id: "share-1".parse().expect("a good name"),
    }
}

pub(super) fn line() -> Line {
    "sales".parse().expect("a good name")
}

pub(super) fn request(tenant: Digest) -> Request {
    Request {
        tenant,
        device: "laptop-7".parse().expect("a good name"),
        enrolment: Digest([3; 32]),
        nonce: [4; 32],
        boot_key: [5; 32],
        seq: 0,
        verity_root: Digest([6; 32]),
        release: "smoke-1".to_owned(),
        keyset_version: 1,
    }
}

pub(super) fn lease(tenant: Digest) -> Lease {
    Lease {
        tenant,
        device: "laptop-7".parse().expect("a good name"),
        enrolment: Digest([3; 32]),
        request: Digest([8; 32]),
        nonce: [4; 32],
        boot_key: [5; 32],
        seq: 0,
        keyset_version: 1,
        line: line(),
        revision: 1,
        bundle: Digest([9; 32]),
        verity_root: Digest([6; 32]),
        gateways: vec![lease_gateway(1)],
        issued_at: 1_000,
        not_after: 2_000,
        state: StateMode::Ephemeral,
    }
}

pub(super) fn lease_gateway(id: u8) -> LeaseGateway {
    LeaseGateway { id, v4: [10, 77, 0, 2].into(), v6: "fd77::2".parse().expect("an address") }
}
