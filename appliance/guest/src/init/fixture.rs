//! An office for tests: keys, a keyset, a device, a bundle, and leases for whoever asks.

use kontor_bundle::{Access, Bundle, Gateway, Settings};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, Lease, LeaseGateway, LeaseKind,
    Member, Role, Roles, SecretKey, StateMode, TrustedKeyset, sign,
};
use kontor_wire::control::{Challenge, LeaseParts};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Unix time at which the office issues its leases.
pub(crate) const ISSUED_AT: u64 = 1_764_000_000;
/// How long they last.
pub(crate) const LIFE_S: u64 = 3600;
/// The office's first gateway.
pub(crate) const GATEWAY: u8 = 5;
/// Its key.
pub(crate) const GATEWAY_KEY: [u8; 32] = [9; 32];
/// The guest's addresses there.
pub(crate) const V4: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 7);
pub(crate) const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 7);

/// Its second one, where it has one.
pub(crate) const SPARE: u8 = 6;
pub(crate) const SPARE_KEY: [u8; 32] = [10; 32];
/// The guest's IPv4 address there, and the one of its post.
pub(crate) const SPARE_V4: Ipv4Addr = Ipv4Addr::new(10, 91, 0, 7);
pub(crate) const SPARE_POST: Ipv4Addr = Ipv4Addr::new(10, 91, 0, 1);

pub(crate) struct Office {
    root: SecretKey,
    enrol: SecretKey,
    policy: SecretKey,
    lease: SecretKey,
    /// The first keyset's envelope.
    pub(crate) keyset: Vec<u8>,
    pub(crate) tenant: Digest,
    device: Device,
    has_spare: bool,
}

impl Office {
    /// One with two gateways.
    pub(crate) fn with_spare() -> Self {
        Self { has_spare: true, ..Self::new() }
    }

    pub(crate) fn new() -> Self {
        let key = || SecretKey::generate().unwrap();
        let (root, enrol, policy, lease) = (key(), key(), key(), key());
        let keyset = Keyset {
            tenant: None,
            version: 1,
            root: role(&root),
            roles: roles(&enrol, &policy, &lease),
            control_spki: Vec::new(),
        };
        let tenant = Digest::of(&keyset.payload());
        let device = Device {
            tenant,
            device: "anna-1".parse().unwrap(),
            enrolment: Digest([2; 32]),
            serial: 1,
            state: DeviceState::Active,
            host_key: key().public(),
            line: "desks".parse().unwrap(),
            share_id: "share-1".parse().unwrap(),
        };
        let keyset = sign::<KeysetKind>(&keyset.payload(), &[&root]);
        Self { root, enrol, policy, lease, keyset, tenant, device, has_spare: false }
    }

    /// The second keyset, with the same keys.
    pub(crate) fn second_keyset(&self) -> Vec<u8> {
        let keyset = Keyset {
            tenant: Some(self.tenant),
            version: 2,
            root: role(&self.root),
            roles: roles(&self.enrol, &self.policy, &self.lease),
            control_spki: Vec::new(),
        };
        sign::<KeysetKind>(&keyset.payload(), &[&self.root])
    }

    /// What the image of a guest of this office starts from.
    pub(crate) fn floor(&self) -> TrustedKeyset {
        TrustedKeyset::first(&self.keyset, &self.tenant).unwrap()
    }

    /// A good answer to the challenge.
    pub(crate) fn answer(&self, challenge: &Challenge) -> LeaseParts {
        self.answer_with(challenge, |_| {})
    }

    /// An answer whose lease was changed before it was signed.
    pub(crate) fn answer_with(&self, challenge: &Challenge, change: impl FnOnce(&mut Lease)) -> LeaseParts {
        self.answer_under(&self.bundle(), challenge, change)
    }

    /// A good answer on another revision of the bundle.
    pub(crate) fn answer_on(&self, revision: u64, challenge: &Challenge) -> LeaseParts {
        self.answer_under(&Bundle { revision, ..self.bundle() }, challenge, |_| {})
    }

    fn answer_under(
        &self,
        bundle: &Bundle,
        challenge: &Challenge,
        change: impl FnOnce(&mut Lease),
    ) -> LeaseParts {
        let mut lease = Lease {
            tenant: self.tenant,
            device: self.device.device.clone(),
            enrolment: self.device.enrolment,
            request: Digest([4; 32]),
            nonce: challenge.nonce,
            boot_key: challenge.boot_key,
            seq: challenge.seq,
            keyset_version: 1,
            line: self.device.line.clone(),
            revision: bundle.revision,
            bundle: Digest::of(&bundle.payload()),
            verity_root: Digest(challenge.verity_root),
            gateways: vec![LeaseGateway { id: GATEWAY, v4: V4, v6: V6 }],
            issued_at: ISSUED_AT,
            not_after: ISSUED_AT + LIFE_S,
            state: StateMode::Ephemeral,
        };
        if self.has_spare {
            lease.gateways.push(LeaseGateway { id: SPARE, v4: SPARE_V4, v6: V6 });
        }
        change(&mut lease);
        LeaseParts {
            keysets: Vec::new(),
            device: sign::<DeviceKind>(&self.device.payload(), &[&self.enrol]),
            bundle: sign::<BundleKind>(&bundle.payload(), &[&self.policy]),
            lease: sign::<LeaseKind>(&lease.payload(), &[&self.lease]),
        }
    }

    fn bundle(&self) -> Bundle {
        let spare = self.has_spare.then(|| Gateway {
            id: SPARE,
            key: SPARE_KEY,
            endpoints: vec!["192.0.2.2:51820".parse().unwrap()],
            v4: SPARE_POST,
            v6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
        });
        let mut bundle = Bundle {
            tenant: self.tenant,
            line: self.device.line.clone(),
            revision: 3,
            min_release: 1,
            lease_s_max: LIFE_S,
            apply_s: 60,
            silence_s: 60,
            lapse_off_s: 1,
            gateways: vec![Gateway {
                id: GATEWAY,
                key: GATEWAY_KEY,
                endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
                v4: Ipv4Addr::new(10, 90, 0, 1),
                v6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
            }],
            settings: Settings {
                allow_emulation: true,
                allow_test_image: true,
                memory_mib: 512,
                resolvers: vec!["10.90.0.53".parse().unwrap()],
            },
            access: Access { destinations: Vec::new() },
        };
        bundle.gateways.extend(spare);
        bundle
    }
}

fn role(key: &SecretKey) -> Role {
    Role { threshold: 1, keys: vec![Member { person: "someone".parse().unwrap(), key: key.public() }] }
}

fn roles(enrol: &SecretKey, policy: &SecretKey, lease: &SecretKey) -> Roles {
    let control = Member { person: "control".parse().unwrap(), key: lease.public() };
    Roles {
        policy: role(policy),
        command: role(policy),
        destroy: role(policy),
        enrol: role(enrol),
        lease: Role { threshold: 1, keys: vec![control] },
    }
}
