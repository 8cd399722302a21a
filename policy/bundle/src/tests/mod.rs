//! A tenant, one boot of one device, and the lease for it: good, until a test bends it.

mod bundle;
mod fuzz;
mod gateway;
mod guest;
mod host;
mod lease;

use crate::{
    Access, Bundle, Destination, Gateway, Protocol, Settings,
    lease::{Admit, Asked, Checked, GatewayMemory, HostMemory, LeaseError, OwnGateway, Parts},
};
use kontor_trust::{
    BundleKind, Device, DeviceKind, DeviceState, Digest, Keyset, KeysetKind, Lease, LeaseGateway, LeaseKind,
    Member, Request, RequestKind, Role, Roles, SecretKey, StateMode, TrustedKeyset, sign, verify_request,
};

/// When everything happens, in Unix seconds.
pub(super) const NOW: u64 = 1_800_000_000;

pub(super) fn key() -> SecretKey {
    SecretKey::generate().expect("the test machine has randomness")
}

fn one(person: &str, key: &SecretKey) -> Role {
    let person = person.parse().expect("a good name");
    Role { threshold: 1, keys: vec![Member { person, key: key.public() }] }
}

/// Keys of everybody.
pub(super) struct Keys {
    pub(super) root: SecretKey,
    pub(super) policy: SecretKey,
    pub(super) enrol: SecretKey,
    pub(super) lease: SecretKey,
    pub(super) host: SecretKey,
}

impl Keys {
    pub(super) fn new() -> Self {
        Self { root: key(), policy: key(), enrol: key(), lease: key(), host: key() }
    }

    fn keyset(&self) -> Keyset {
        Keyset {
            tenant: None,
            version: 1,
            root: one("anna", &self.root),
            roles: Roles {
                policy: one("dora", &self.policy),
                command: one("dora", &self.policy),
                destroy: one("dora", &self.policy),
                enrol: one("emil", &self.enrol),
                lease: one("control", &self.lease),
            },
            control_spki: Vec::new(),
        }
    }

    pub(super) fn first(&self) -> TrustedKeyset {
        let payload = self.keyset().payload();
        let envelope = sign::<KeysetKind>(&payload, &[&self.root]);
        TrustedKeyset::first(&envelope, &Digest::of(&payload)).expect("a good keyset")
    }

    /// The version after `last`, with nothing else changed.
    pub(super) fn next(&self, last: &TrustedKeyset) -> TrustedKeyset {
        let mut keyset = last.keyset().clone();
        keyset.tenant = Some(last.tenant());
        keyset.version += 1;
        last.advance(&sign::<KeysetKind>(&keyset.payload(), &[&self.root])).expect("a good keyset")
    }
}

/// What the documents say before a lease refers to them.
pub(super) struct Before {
    pub(super) device: Device,
    pub(super) request: Request,
    pub(super) bundle: Bundle,
}

/// A boot and its lease.
pub(super) struct Scene {
    pub(super) keys: Keys,
    pub(super) floor: TrustedKeyset,
    pub(super) keysets: Vec<Vec<u8>>,
    pub(super) device: Device,
    pub(super) request: Request,
    pub(super) bundle: Bundle,
    pub(super) lease: Lease,
}

impl Scene {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    /// A scene whose documents are bent before a lease is made that fits them.
    pub(super) fn with(bend: impl FnOnce(&mut Before)) -> Self {
        let keys = Keys::new();
        let floor = keys.first();
        let tenant = floor.tenant();
        let host_key = keys.host.public();
        let mut before =
            Before { device: device(tenant, host_key), request: request(tenant), bundle: bundle(tenant) };
        bend(&mut before);
        let Before { device, request, bundle } = before;
        let lease = lease(&device, &request, &bundle);
        Self { keys, floor, keysets: Vec::new(), device, request, bundle, lease }
    }

    pub(super) fn admit(&self) -> Admit {
        Admit {
            keysets: self.keysets.clone(),
            device: sign::<DeviceKind>(&self.device.payload(), &[&self.keys.enrol]),
            request: sign::<RequestKind>(&self.request.payload(), &[&self.keys.host]),
            bundle: sign::<BundleKind>(&self.bundle.payload(), &[&self.keys.policy]),
            lease: sign::<LeaseKind>(&self.lease.payload(), &[&self.keys.lease]),
        }
    }

    pub(super) fn asked(&self) -> Asked {
        let Request { nonce, boot_key, seq, verity_root, .. } = self.request;
        Asked { nonce, boot_key, seq, verity_root }
    }

    /// The three sides' answers to what `bend` makes of the envelopes.
    pub(super) fn all(&self, bend: impl FnOnce(&mut Admit)) -> [Result<Checked, LeaseError>; 3] {
        let mut admit = self.admit();
        bend(&mut admit);
        [self.guest(&admit), self.host(&admit), self.gateway(&admit)]
    }

    pub(super) fn guest(&self, admit: &Admit) -> Result<Checked, LeaseError> {
        crate::lease::for_guest(&self.floor, &parts(admit), &self.asked(), NOW - 1_000)
    }

    pub(super) fn host(&self, admit: &Admit) -> Result<Checked, LeaseError> {
        self.host_with(admit, &HostMemory::default())
    }

    pub(super) fn host_with(&self, admit: &Admit, memory: &HostMemory) -> Result<Checked, LeaseError> {
        let request = sign::<RequestKind>(&self.request.payload(), &[&self.keys.host]);
        let request = verify_request(&request, &self.keys.host.public()).expect("its own request");
        crate::lease::for_host(&self.floor, &parts(admit), &request, memory)
    }

    pub(super) fn gateway(&self, admit: &Admit) -> Result<Checked, LeaseError> {
        self.gateway_with(admit, NOW, &own(), GatewayMemory::default())
    }

    pub(super) fn gateway_with(
        &self,
        admit: &Admit,
        now: u64,
        own: &OwnGateway,
        memory: GatewayMemory,
    ) -> Result<Checked, LeaseError> {
        crate::lease::for_gateway(&self.floor, admit, now, own, |device, boot_key, line| {
            assert_eq!(
                (device, boot_key, line),
                (&self.lease.device, &self.lease.boot_key, &self.lease.line)
            );
            memory
        })
    }
}

pub(super) fn parts(admit: &Admit) -> Parts {
    let Admit { keysets, device, request: _, bundle, lease } = admit.clone();
    Parts { keysets, device, bundle, lease }
}

pub(super) fn own() -> OwnGateway {
    OwnGateway {
        id: 1,
        pool_v4: "10.77.0.0/16".parse().expect("a network"),
        pool_v6: "fd77::/64".parse().expect("a network"),
    }
}

fn device(tenant: Digest, host_key: kontor_trust::PublicKey) -> Device {
    Device {
        tenant,
        device: "laptop-7".parse().expect("a good name"),
        enrolment: Digest([3; 32]),
        serial: 5,
        state: DeviceState::Active,
        host_key,
        line: "sales".parse().expect("a good name"),
        share_id: "share-1".parse().expect("a good name"),
    }
}

fn request(tenant: Digest) -> Request {
    Request {
        tenant,
        device: "laptop-7".parse().expect("a good name"),
        enrolment: Digest([3; 32]),
        nonce: [4; 32],
        boot_key: [5; 32],
        seq: 2,
        verity_root: Digest([6; 32]),
        release: "smoke-1".to_owned(),
        keyset_version: 1,
    }
}

pub(super) fn bundle(tenant: Digest) -> Bundle {
    Bundle {
        tenant,
        line: "sales".parse().expect("a good name"),
        revision: 7,
        min_release: 1,
        lease_s_max: 3_600,
        apply_s: 60,
        silence_s: 180,
        lapse_off_s: 600,
        gateways: vec![gateway(1), gateway(2)],
        settings: Settings {
            allow_emulation: false,
            allow_test_image: false,
            memory_mib: 2_048,
            resolvers: vec!["10.0.0.53".parse().expect("an address")],
        },
        access: Access { destinations: vec![destination("10.0.0.0/8", Protocol::Tcp, Some([80, 443]))] },
    }
}

pub(super) fn gateway(id: u8) -> Gateway {
    Gateway {
        id,
        key: [id; 32],
        endpoints: vec![([192, 0, 2, id], 51_820).into()],
        v4: [10, 77, 0, 1].into(),
        v6: "fd77::1".parse().expect("an address"),
    }
}

pub(super) fn destination(to: &str, protocol: Protocol, ports: Option<[u16; 2]>) -> Destination {
    Destination { to: to.parse().expect("a network"), protocol, ports }
}

fn lease(device: &Device, request: &Request, bundle: &Bundle) -> Lease {
    Lease {
        tenant: device.tenant,
        device: device.device.clone(),
        enrolment: device.enrolment,
        request: Digest::of(&request.payload()),
        nonce: request.nonce,
        boot_key: request.boot_key,
        seq: request.seq,
        keyset_version: 1,
        line: device.line.clone(),
        revision: bundle.revision,
        bundle: Digest::of(&bundle.payload()),
        verity_root: request.verity_root,
        gateways: vec![lease_gateway(1), lease_gateway(2)],
        issued_at: NOW,
        not_after: NOW + 3_600,
        state: StateMode::Ephemeral,
    }
}

pub(super) fn lease_gateway(id: u8) -> LeaseGateway {
    LeaseGateway { id, v4: [10, 77, 0, 2].into(), v6: "fd77::2".parse().expect("an address") }
}

/// Asserts that each side refuses for the same reason.
macro_rules! all_refuse {
    ($answers:expr, $pattern:pat $(if $guard:expr)?) => {
        for (side, answer) in ["guest", "host", "gateway"].into_iter().zip($answers) {
            match answer {
                Err($pattern) $(if $guard)? => {}
                other => panic!("the {side} says {other:?}"),
            }
        }
    };
}
use all_refuse;
