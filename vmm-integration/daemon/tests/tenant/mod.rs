//! A company with its keys, one device of it, and an office that answers requests: good, until a test
//! bends it.

use kontor_bundle::{Access, Bundle, Gateway, Settings, lease::Parts};
use kontor_trust::{
    BundleKind, Device, DeviceId, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, Lease, LeaseGateway,
    LeaseKind, Member, PublicKey, Request, Role, Roles, SecretKey, StateMode, TrustedKeyset, sign,
    verify_request,
};
use std::{fs, net::SocketAddr, path::Path};

/// When leases are issued, in Unix seconds.
pub(crate) const NOW: u64 = 1_800_000_000;
/// The gateway's number.
pub(crate) const GATEWAY: u8 = 7;

/// The files of the keys.
const KEYS: [&str; 5] = ["root", "policy", "enrol", "lease", "control"];

pub(crate) struct Tenant {
    root: SecretKey,
    policy: SecretKey,
    enrol: SecretKey,
    lease: SecretKey,
    /// What control shows on the network.
    pub(crate) control: SecretKey,
    pub(crate) id: Digest,
    /// Envelopes, version 1 first.
    pub(crate) keysets: Vec<Vec<u8>>,
}

fn key() -> SecretKey {
    SecretKey::generate().unwrap()
}

fn one(person: &str, key: &SecretKey) -> Role {
    Role { threshold: 1, keys: vec![Member { person: person.parse().unwrap(), key: key.public() }] }
}

pub(crate) fn device_id() -> DeviceId {
    "laptop-7".parse().unwrap()
}

impl Tenant {
    pub(crate) fn new() -> Self {
        Self::of([key(), key(), key(), key(), key()])
    }

    fn of([root, policy, enrol, lease, control]: [SecretKey; 5]) -> Self {
        let keyset = Keyset {
            tenant: None,
            version: 1,
            root: one("anna", &root),
            roles: Roles {
                policy: one("dora", &policy),
                command: one("dora", &policy),
                destroy: one("dora", &policy),
                enrol: one("emil", &enrol),
                lease: one("control", &lease),
            },
            control_spki: vec![control.public().pin()],
        };
        let payload = keyset.payload();
        let keysets = vec![sign::<KeysetKind>(&payload, &[&root])];
        Self { root, policy, enrol, lease, control, id: Digest::of(&payload), keysets }
    }

    /// Writes the keys down, for [`Tenant::read`] in another process.
    pub(crate) fn write(&self, dir: &Path) {
        let keys = [&self.root, &self.policy, &self.enrol, &self.lease, &self.control];
        for (name, key) in KEYS.into_iter().zip(keys) {
            fs::write(dir.join(name), key.to_pkcs8()).unwrap();
        }
    }

    pub(crate) fn read(dir: &Path) -> Self {
        Self::of(KEYS.map(|name| SecretKey::from_pkcs8(&fs::read(dir.join(name)).unwrap()).unwrap()))
    }

    pub(crate) fn newest(&self) -> TrustedKeyset {
        TrustedKeyset::first(&self.keysets[0], &self.id).unwrap().follow(&self.keysets).unwrap()
    }

    /// Makes the next keyset, with nothing else changed.
    pub(crate) fn advance(&mut self) {
        self.advance_with(|_| {});
    }

    /// Makes the next keyset.
    pub(crate) fn advance_with(&mut self, bend: impl FnOnce(&mut Keyset)) {
        let mut keyset = self.newest().keyset().clone();
        keyset.tenant = Some(self.id);
        keyset.version += 1;
        bend(&mut keyset);
        self.keysets.push(sign::<KeysetKind>(&keyset.payload(), &[&self.root]));
    }

    pub(crate) fn device(&self, host_key: PublicKey, bend: impl FnOnce(&mut Device)) -> Vec<u8> {
        let mut device = Device {
            tenant: self.id,
            device: device_id(),
            enrolment: Digest([3; 32]),
            serial: 1,
            state: DeviceState::Active,
            host_key,
            line: "office".parse().unwrap(),
            share_id: "s1".parse().unwrap(),
        };
        bend(&mut device);
        sign::<DeviceKind>(&device.payload(), &[&self.enrol])
    }

    pub(crate) fn bundle(&self, endpoint: SocketAddr, bend: impl FnOnce(&mut Bundle)) -> Vec<u8> {
        let mut bundle = Bundle {
            tenant: self.id,
            line: "office".parse().unwrap(),
            revision: 1,
            min_release: 1,
            lease_s_max: 3600,
            apply_s: 60,
            silence_s: 60,
            lapse_off_s: 60,
            gateways: vec![Gateway {
                id: GATEWAY,
                key: [9; 32],
                endpoints: vec![endpoint],
                v4: [10, 88, 0, 1].into(),
                v6: "fd88::1".parse().unwrap(),
            }],
            settings: Settings {
                allow_emulation: true,
                allow_test_image: true,
                memory_mib: 256,
                resolvers: Vec::new(),
            },
            access: Access { destinations: Vec::new() },
        };
        bend(&mut bundle);
        sign::<BundleKind>(&bundle.payload(), &[&self.policy])
    }

    /// Answers `request` as an office would.
    pub(crate) fn lease(
        &self,
        request: &[u8],
        device: &[u8],
        bundle: &[u8],
        bend: impl FnOnce(&mut Lease),
    ) -> Parts {
        let newest = self.newest();
        let record = Device::parse(&newest.verify::<DeviceKind>(device).unwrap()).unwrap();
        let request = verify_request(request, &record.host_key).unwrap();
        let asked = Request::parse(&request).unwrap();
        let verified_bundle = newest.verify::<BundleKind>(bundle).unwrap();
        let revision = Bundle::parse(&verified_bundle).unwrap().revision;
        let mut lease = Lease {
            tenant: self.id,
            device: asked.device,
            enrolment: asked.enrolment,
            request: request.hash(),
            nonce: asked.nonce,
            boot_key: asked.boot_key,
            seq: asked.seq,
            keyset_version: newest.version(),
            line: record.line,
            revision,
            bundle: verified_bundle.hash(),
            verity_root: asked.verity_root,
            gateways: vec![LeaseGateway {
                id: GATEWAY,
                v4: [10, 88, 1, 1].into(),
                v6: "fd88::1:1".parse().unwrap(),
            }],
            issued_at: NOW,
            not_after: NOW + 600,
            state: StateMode::Ephemeral,
        };
        bend(&mut lease);
        Parts {
            keysets: self.keysets.clone(),
            device: device.to_vec(),
            bundle: bundle.to_vec(),
            lease: sign::<LeaseKind>(&lease.payload(), &[&self.lease]),
        }
    }
}
