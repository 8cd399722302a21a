//! An office with one device, and what it answers.

mod addresses;
mod issue;
mod memory;

use crate::{Identified, IssueError, Issued, Memory, Office, Pool};
use kontor_bundle::{Access, Bundle, Gateway, Settings};
use kontor_trust::{
    BundleKind, Device, DeviceId, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, Member, Request,
    RequestKind, Role, Roles, SecretKey, TrustedKeyset, sign,
};

/// When everything happens, in Unix seconds.
pub(super) const NOW: u64 = 1_800_000_000;
/// Life of a lease in seconds.
pub(super) const LEASE_S: u64 = 3_600;

pub(super) fn key() -> SecretKey {
    SecretKey::generate().expect("the test machine has randomness")
}

pub(super) fn id(name: &str) -> DeviceId {
    name.parse().expect("a good name")
}

fn one(person: &str, key: &SecretKey) -> Role {
    let person = person.parse().expect("a good name");
    Role { threshold: 1, keys: vec![Member { person, key: key.public() }] }
}

pub(super) fn pool(id: u8, v4: &str, v6: &str) -> Pool {
    Pool { id, v4: v4.parse().expect("a network"), v6: v6.parse().expect("a network") }
}

pub(super) fn gateway(id: u8) -> Gateway {
    Gateway {
        id,
        key: [id; 32],
        endpoints: vec![([192, 0, 2, id], 51_820).into()],
        v4: [10, 70 + id, 0, 1].into(),
        v6: format!("fd7{id}::1").parse().expect("an address"),
    }
}

pub(super) fn request(tenant: Digest) -> Request {
    Request {
        tenant,
        device: id("laptop-7"),
        enrolment: Digest([3; 32]),
        nonce: [4; 32],
        boot_key: [5; 32],
        seq: 0,
        verity_root: Digest([6; 32]),
        release: "smoke-1".to_owned(),
        keyset_version: 1,
    }
}

/// Everything that an answer depends on, to be bent before it is asked for.
pub(super) struct Town {
    pub(super) root: SecretKey,
    pub(super) policy: SecretKey,
    pub(super) enrol: SecretKey,
    pub(super) lease: SecretKey,
    pub(super) host: SecretKey,
    pub(super) newest: TrustedKeyset,
    pub(super) chain: Vec<Vec<u8>>,
    pub(super) pools: Vec<Pool>,
    pub(super) lease_s: u64,
    pub(super) device: Device,
    pub(super) bundle: Bundle,
    pub(super) memory: Memory,
}

impl Town {
    pub(super) fn new() -> Self {
        let [root, policy, enrol, lease, host] = [key(), key(), key(), key(), key()];
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
            control_spki: Vec::new(),
        };
        let first = sign::<KeysetKind>(&keyset.payload(), &[&root]);
        let newest = TrustedKeyset::dangerous_unpinned(&first).expect("a good keyset");
        let tenant = newest.tenant();
        let device = Device {
            tenant,
            device: id("laptop-7"),
            enrolment: Digest([3; 32]),
            serial: 5,
            state: DeviceState::Active,
            host_key: host.public(),
            line: "sales".parse().expect("a good name"),
            share_id: "share-1".parse().expect("a good name"),
        };
        Self {
            root,
            policy,
            enrol,
            lease,
            host,
            newest,
            chain: vec![first],
            pools: vec![pool(1, "10.71.0.0/16", "fd71::/64"), pool(2, "10.72.0.0/16", "fd72::/64")],
            lease_s: LEASE_S,
            device,
            bundle: bundle(tenant),
            memory: Memory::default(),
        }
    }

    /// Makes the next keyset with nothing changed.
    pub(super) fn next_keyset(&mut self) {
        let mut keyset = self.newest.keyset().clone();
        keyset.tenant = Some(self.newest.tenant());
        keyset.version += 1;
        let envelope = sign::<KeysetKind>(&keyset.payload(), &[&self.root]);
        self.newest = self.newest.advance(&envelope).expect("a good keyset");
        self.chain.push(envelope);
    }

    pub(super) fn tenant(&self) -> Digest {
        self.newest.tenant()
    }

    pub(super) fn signed(&self, request: &Request) -> Vec<u8> {
        sign::<RequestKind>(&request.payload(), &[&self.host])
    }

    pub(super) fn identify(&self, untrusted: &[u8]) -> Result<Identified, IssueError> {
        let record = sign::<DeviceKind>(&self.device.payload(), &[&self.enrol]);
        self.office().identify(&self.host.public(), untrusted, &record)
    }

    /// The answer to `request`, signed by the host.
    pub(super) fn answer(&mut self, request: &Request, now: u64) -> Result<Issued, IssueError> {
        let who = self.identify(&self.signed(request))?;
        let bundle = sign::<BundleKind>(&self.bundle.payload(), &[&self.policy]);
        let mut memory = std::mem::take(&mut self.memory);
        let answer = self.office().issue(&who, &bundle, &mut memory, now);
        self.memory = memory;
        answer
    }

    pub(super) fn office(&self) -> Office<'_> {
        Office {
            keyset: &self.newest,
            chain: &self.chain,
            lease_key: &self.lease,
            lease_s: self.lease_s,
            pools: &self.pools,
        }
    }
}

pub(super) fn bundle(tenant: Digest) -> Bundle {
    Bundle {
        tenant,
        line: "sales".parse().expect("a good name"),
        revision: 7,
        min_release: 1,
        lease_s_max: 2 * LEASE_S,
        apply_s: 60,
        silence_s: 180,
        lapse_off_s: 600,
        gateways: vec![gateway(1), gateway(2), gateway(3)],
        settings: Settings {
            allow_emulation: false,
            allow_test_image: false,
            memory_mib: 2_048,
            resolvers: Vec::new(),
        },
        access: Access { destinations: Vec::new() },
    }
}
