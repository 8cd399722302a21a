//! An office of a test's own: a tenant with its keys, and what it signs.

use std::net::{Ipv4Addr, Ipv6Addr};

use kontor_bundle::lease::Admit;
use kontor_bundle::{Access, Bundle, Destination, Gateway, Settings};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, Lease, LeaseGateway, LeaseKind,
    Member, PublicKey, Request, RequestKind, Role, Roles, SecretKey, StateMode, sign,
};

pub(crate) const GATEWAY: u8 = 1;
pub(crate) const LINE: &str = "sales";

/// A tenant with one key for each role.
pub(crate) struct Tenant {
    root: SecretKey,
    policy: SecretKey,
    enrol: SecretKey,
    pub(crate) lease: SecretKey,
    /// Signs for everything that no test asks about.
    other: SecretKey,
    /// The host key of every device.
    host: SecretKey,
    pub(crate) id: Digest,
    /// All keysets, the first one first.
    pub(crate) keysets: Vec<Vec<u8>>,
}

/// One boot of one device, and the lease that it gets.
#[derive(Clone)]
pub(crate) struct Boot {
    pub(crate) device: &'static str,
    pub(crate) serial: u64,
    pub(crate) boot_key: [u8; 32],
    pub(crate) seq: u64,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    pub(crate) gateway: u8,
    pub(crate) issued_at: u64,
    pub(crate) life_s: u64,
}

/// SHA-256 of the payload of a lease that this office issued.
pub(crate) fn lease_hash(admit: &Admit) -> [u8; 32] {
    use base64::Engine;
    let envelope: serde_json::Value = serde_json::from_slice(&admit.lease).unwrap();
    let payload = envelope["payload"].as_str().unwrap();
    Digest::of(&base64::engine::general_purpose::STANDARD.decode(payload).unwrap()).0
}

fn key() -> SecretKey {
    SecretKey::generate().unwrap()
}

fn role(person: &str, key: PublicKey) -> Role {
    Role { threshold: 1, keys: vec![Member { person: person.parse().unwrap(), key }] }
}

impl Tenant {
    pub(crate) fn new() -> Self {
        let mut tenant = Self {
            root: key(),
            policy: key(),
            enrol: key(),
            lease: key(),
            other: key(),
            host: key(),
            id: Digest([0; 32]),
            keysets: Vec::new(),
        };
        let payload = tenant.keyset(1).payload();
        tenant.id = Digest::of(&payload);
        tenant.keysets.push(sign::<KeysetKind>(&payload, &[&tenant.root]));
        tenant
    }

    /// Takes control's key away from it: the next keyset names another one.
    pub(crate) fn replace_lease_key(&mut self) {
        self.lease = key();
        self.add_keyset();
    }

    /// Makes the next keyset.
    pub(crate) fn add_keyset(&mut self) {
        let version = self.keysets.len() as u64 + 1;
        let payload = self.keyset(version).payload();
        self.keysets.push(sign::<KeysetKind>(&payload, &[&self.root]));
    }

    fn keyset(&self, version: u64) -> Keyset {
        let other = role("other", self.other.public());
        Keyset {
            tenant: (version > 1).then_some(self.id),
            version,
            root: role("root", self.root.public()),
            roles: Roles {
                policy: role("policy", self.policy.public()),
                command: other.clone(),
                destroy: other,
                enrol: role("enrol", self.enrol.public()),
                lease: role("control", self.lease.public()),
            },
            control_spki: Vec::new(),
        }
    }

    /// A bundle for gateways with this key, that lets devices reach these destinations.
    pub(crate) fn bundle(&self, revision: u64, key: [u8; 32], destinations: Vec<Destination>) -> Bundle {
        Bundle {
            tenant: self.id,
            line: LINE.parse().unwrap(),
            revision,
            min_release: 0,
            lease_s_max: 3600,
            apply_s: 60,
            silence_s: 60,
            lapse_off_s: 60,
            gateways: vec![Gateway {
                id: GATEWAY,
                key,
                endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
                v4: "10.9.0.1".parse().unwrap(),
                v6: "fd09::1".parse().unwrap(),
            }],
            settings: Settings {
                allow_emulation: true,
                allow_test_image: true,
                memory_mib: 512,
                resolvers: Vec::new(),
            },
            access: Access { destinations },
        }
    }

    /// What control tells a gateway of a boot.
    pub(crate) fn admit(&self, boot: &Boot, bundle: &Bundle) -> Admit {
        let device = Device {
            tenant: self.id,
            device: boot.device.parse().unwrap(),
            enrolment: Digest([1; 32]),
            serial: boot.serial,
            state: DeviceState::Active,
            host_key: self.host.public(),
            line: LINE.parse().unwrap(),
            share_id: "share".parse().unwrap(),
        };
        let keyset_version = self.keysets.len() as u64;
        let request = Request {
            tenant: self.id,
            device: device.device.clone(),
            enrolment: device.enrolment,
            nonce: [2; 32],
            boot_key: boot.boot_key,
            seq: boot.seq,
            verity_root: Digest([3; 32]),
            release: "release".into(),
            keyset_version,
        };
        let lease = Lease {
            tenant: self.id,
            device: device.device.clone(),
            enrolment: device.enrolment,
            request: Digest::of(&request.payload()),
            nonce: request.nonce,
            boot_key: boot.boot_key,
            seq: boot.seq,
            keyset_version,
            line: device.line.clone(),
            revision: bundle.revision,
            bundle: Digest::of(&bundle.payload()),
            verity_root: request.verity_root,
            gateways: vec![LeaseGateway { id: boot.gateway, v4: boot.v4, v6: boot.v6 }],
            issued_at: boot.issued_at,
            not_after: boot.issued_at + boot.life_s,
            state: StateMode::Ephemeral,
        };
        Admit {
            keysets: self.keysets.clone(),
            device: sign::<DeviceKind>(&device.payload(), &[&self.enrol]),
            request: sign::<RequestKind>(&request.payload(), &[&self.host]),
            bundle: sign::<BundleKind>(&bundle.payload(), &[&self.policy]),
            lease: sign::<LeaseKind>(&lease.payload(), &[&self.lease]),
        }
    }
}
