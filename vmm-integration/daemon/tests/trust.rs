//! What kontord believes: stored documents, and the office's answers.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod tenant;

use kontor_bundle::lease::{Checked, LeaseError, Notice, Parts, for_host};
use kontor_daemon::{
    host::Accelerator,
    lease::{Asker, Running},
    office::{LeaseSource, OfficeError, Reply},
    session::Answer,
    store::{Memory, Store, StoreError},
};
use kontor_trust::{
    Device, DeviceState, Digest, Lease, Line, Request, RequestKind, Verified, sign, verify_request,
};
use kontor_wire::control::Challenge;
use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tenant::{NOW, Tenant, device_id};

struct World {
    dir: tempfile::TempDir,
    tenant: Tenant,
    store: Store,
    device: Vec<u8>,
    bundle: Vec<u8>,
}

/// What is remembered of the one line.
fn revisions(revision: u64) -> BTreeMap<Line, u64> {
    [("office".parse().unwrap(), revision)].into()
}

fn endpoint() -> SocketAddr {
    "192.0.2.1:51820".parse().unwrap()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tenant = Tenant::new();
        let store = Store::open(dir.path(), tenant.id, device_id()).unwrap();
        let key = store.make_host_key().unwrap().public();
        let (device, bundle) = (tenant.device(key, |_| {}), tenant.bundle(endpoint(), |_| {}));
        Self { dir, tenant, store, device, bundle }
    }

    fn provisioned() -> Self {
        let world = Self::new();
        world.provision().unwrap();
        world
    }

    fn provision(&self) -> Result<(), StoreError> {
        self.store.provision(&self.tenant.keysets, &self.device, &self.bundle).map(|_| ())
    }

    fn records(&self) -> Result<(), StoreError> {
        self.store.records(&self.store.host_key()?.public()).map(|_| ())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(self.tenant.id.to_string()).join("laptop-7").join(name)
    }

    /// The stored device record and bundle.
    fn documents(&self) -> (Vec<u8>, Vec<u8>) {
        let memory: serde_json::Value =
            serde_json::from_slice(&fs::read(self.file("memory.json")).unwrap()).unwrap();
        let envelope = |name: &str| memory["documents"][name].as_str().unwrap().as_bytes().to_vec();
        (envelope("device"), envelope("bundle"))
    }

    /// Puts a document into the store as one does who may write there.
    fn put(&self, name: &str, envelope: &[u8]) {
        let path = self.file("memory.json");
        let mut memory: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        memory["documents"][name] = std::str::from_utf8(envelope).unwrap().into();
        fs::write(path, memory.to_string()).unwrap();
    }

    fn bend_device(&mut self, bend: impl FnOnce(&mut Device)) {
        self.device = self.tenant.device(self.store.host_key().unwrap().public(), bend);
    }
}

#[test]
fn provisioned_documents_are_stored_as_they_came_and_verify() {
    let world = World::provisioned();
    world.records().unwrap();
    assert_eq!(world.documents(), (world.device.clone(), world.bundle.clone()));
    assert_eq!(fs::read(world.file("keysets/00000001.json")).unwrap(), world.tenant.keysets[0]);
    let memory = world.store.memory().unwrap();
    assert_eq!(memory, Memory { keyset_version: 1, serial: 1, revisions: revisions(1), ..Memory::default() });
    // Again is no step back.
    world.provision().unwrap();
}

#[test]
fn host_key_is_made_once_and_for_the_owner_only() {
    let world = World::new();
    let first = world.store.host_key().unwrap().public();
    assert_eq!(world.store.make_host_key().unwrap().public(), first);
    let path = world.file("host.key");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(world.store.host_key(), Err(StoreError::KeyMode(_))));
}

#[test]
fn directories_are_for_the_owner_only() {
    let world = World::new();
    let mode = fs::metadata(world.file("")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn documents_of_another_company_are_refused() {
    let world = World::new();
    let other = World::new();
    let key = world.store.host_key().unwrap().public();
    let provision = |keysets: &[Vec<u8>], device: &[u8], bundle: &[u8]| {
        world.store.provision(keysets, device, bundle).unwrap_err()
    };
    let theirs = &other.tenant;
    let error = provision(&theirs.keysets, &world.device, &world.bundle);
    assert!(matches!(error, StoreError::Keyset { version: 1, .. }), "{error:?}");
    let error = provision(&world.tenant.keysets, &theirs.device(key, |_| {}), &world.bundle);
    assert!(matches!(error, StoreError::DeviceEnvelope(_)), "{error:?}");
    let error = provision(&world.tenant.keysets, &world.device, &other.bundle);
    assert!(matches!(error, StoreError::BundleEnvelope(_)), "{error:?}");
    assert!(matches!(world.records(), Err(error) if error.is_missing()));
}

#[test]
fn device_record_has_to_be_for_this_device_and_key() {
    let mut world = World::new();
    world.bend_device(|device| device.device = "laptop-8".parse().unwrap());
    assert!(matches!(world.provision(), Err(StoreError::OtherDevice { .. })));
    world.bend_device(|device| device.tenant = Digest([0; 32]));
    assert!(matches!(world.provision(), Err(StoreError::OtherTenant("device record"))));
    world.bend_device(|device| device.host_key.0[0] ^= 1);
    assert!(matches!(world.provision(), Err(StoreError::OtherKey { .. })));
    world.bend_device(|device| device.state = DeviceState::Revoked);
    assert!(matches!(world.provision(), Err(StoreError::Revoked)));
    world.bend_device(|device| device.line = "other".parse().unwrap());
    assert!(matches!(world.provision(), Err(StoreError::OtherLine)));
    world.bend_device(|_| {});
    world.bundle = world.tenant.bundle(endpoint(), |bundle| bundle.tenant = Digest([0; 32]));
    assert!(matches!(world.provision(), Err(StoreError::OtherTenant("bundle"))));
}

#[test]
fn what_is_older_than_what_was_seen_is_refused() {
    let mut world = World::new();
    world.bundle = world.tenant.bundle(endpoint(), |bundle| bundle.revision = 5);
    world.bend_device(|device| device.serial = 5);
    world.provision().unwrap();
    let old = world.tenant.bundle(endpoint(), |bundle| bundle.revision = 4);
    let new = std::mem::replace(&mut world.bundle, old.clone());
    assert!(matches!(world.provision(), Err(StoreError::Older { what: "bundle", found: 4, known: 5 })));
    world.bundle = new;
    world.bend_device(|device| device.serial = 4);
    assert!(matches!(world.provision(), Err(StoreError::Older { what: "device record", .. })));
    // Nor is an old document that was put back by hand.
    world.put("bundle", &old);
    assert!(matches!(world.records(), Err(StoreError::Older { what: "stored bundle", .. })));
}

#[test]
fn chain_of_keysets_grows_and_none_of_its_links_may_be_missing() {
    let mut world = World::provisioned();
    world.tenant.advance();
    world.tenant.advance();
    world.provision().unwrap();
    assert_eq!(world.store.keyset().unwrap().version(), 3);
    for name in ["keysets/00000003.json", "keysets/00000002.json"] {
        let path = world.file(name);
        let link = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(matches!(world.records(), Err(StoreError::Older { what: "stored keyset", .. })), "{name}");
        fs::write(&path, link).unwrap();
    }
    world.records().unwrap();
    fs::write(world.file("keysets/00000002.json"), &world.tenant.keysets[2]).unwrap();
    assert!(matches!(world.records(), Err(StoreError::Keyset { version: 2, .. })));
}

#[test]
fn lost_or_damaged_keysets_are_stored_anew_when_all_are_given() {
    let mut world = World::provisioned();
    world.tenant.advance();
    world.tenant.advance();
    world.provision().unwrap();
    let lose = |name: &str| fs::remove_file(world.file(name)).unwrap();
    let cases = [
        ("keysets/00000001.json", None),
        ("keysets/00000002.json", None),
        ("keysets/00000003.json", None),
        ("keysets/00000001.json", Some("{}")),
        ("keysets/00000002.json", Some("")),
    ];
    let before = world.store.memory().unwrap();
    for (name, damage) in cases {
        match damage {
            None => lose(name),
            Some(content) => fs::write(world.file(name), content).unwrap(),
        }
        assert!(world.records().is_err());
        // Less than was seen is no way back, nor is a chain without its beginning or with a gap.
        let all = &world.tenant.keysets;
        for given in [&all[..1], &all[..2], &all[1..], &[all[0].clone(), all[2].clone()]] {
            let error = world.store.provision(given, &world.device, &world.bundle).unwrap_err();
            assert!(matches!(error, StoreError::KeysetsLost { known: 3, .. }), "{name}: {error:?}");
            assert!(error.to_string().contains("every keyset, from the first to version 3"), "{error}");
        }
        assert!(world.records().is_err());
        world.provision().unwrap();
        world.records().unwrap();
        assert_eq!(world.store.memory().unwrap(), before);
    }
    // All at once, and with a newer one.
    for version in 1..=3 {
        lose(&format!("keysets/0000000{version}.json"));
    }
    world.tenant.advance();
    world.provision().unwrap();
    world.records().unwrap();
    assert_eq!(world.store.keyset().unwrap().version(), 4);
}

#[test]
fn keysets_of_another_company_replace_no_lost_one() {
    let world = World::provisioned();
    fs::remove_file(world.file("keysets/00000001.json")).unwrap();
    let other = Tenant::new();
    let error = world.store.provision(&other.keysets, &world.device, &world.bundle).unwrap_err();
    assert!(matches!(error, StoreError::KeysetsLost { known: 1, .. }), "{error:?}");
    assert!(!world.file("keysets/00000001.json").exists());
}

#[test]
fn serial_begins_again_for_a_host_that_was_enrolled_anew_and_for_no_other() {
    let mut world = World::new();
    world.bend_device(|device| device.serial = 5);
    world.provision().unwrap();
    fs::remove_file(world.file("host.key")).unwrap();
    world.store.make_host_key().unwrap();
    world.bend_device(|device| device.serial = 2);
    world.provision().unwrap();
    assert_eq!(world.store.memory().unwrap().serial, 2);
    world.records().unwrap();
    world.bend_device(|device| device.serial = 1);
    assert!(matches!(world.provision(), Err(StoreError::Older { what: "device record", .. })));
    // Nor when those who sign records have changed since.
    let others = Tenant::new();
    world.tenant.advance_with(|keyset| keyset.roles = others.newest().keyset().roles.clone());
    let (key, id) = (world.store.host_key().unwrap().public(), world.tenant.id);
    world.device = others.device(key, |device| device.tenant = id);
    world.bundle = others.bundle(endpoint(), |bundle| bundle.tenant = id);
    assert!(matches!(world.provision(), Err(StoreError::Older { what: "device record", .. })));
    world.device = others.device(key, |device| (device.tenant, device.serial) = (id, 2));
    world.provision().unwrap();
}

#[test]
fn changed_stored_document_is_refused() {
    let world = World::provisioned();
    for name in ["keysets/00000001.json", "memory.json"] {
        let path = world.file(name);
        let good = fs::read(&path).unwrap();
        // A byte in each tenth of it.
        for at in (0..10).map(|tenth| good.len() * tenth / 10) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert!(world.records().is_err(), "byte {at} of {name}");
        }
        fs::write(&path, good).unwrap();
    }
    world.records().unwrap();
}

#[test]
fn device_belongs_to_one_kontord_at_a_time() {
    let world = World::new();
    let claim = world.store.claim().unwrap();
    assert!(matches!(world.store.claim(), Err(StoreError::Busy(_))));
    drop(claim);
    assert!(world.store.claim().is_ok());
}

type Respond = dyn Fn(&[u8]) -> Result<Reply, OfficeError> + Send + Sync;

/// An office in this process.
#[derive(Clone)]
struct Office {
    respond: Arc<Respond>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl LeaseSource for Office {
    async fn answer(&self, request: Vec<u8>) -> Result<Reply, OfficeError> {
        let reply = (self.respond)(&request);
        self.seen.lock().unwrap().push(request);
        reply
    }
}

fn asker(
    world: &World,
    respond: impl Fn(&[u8]) -> Result<Reply, OfficeError> + Send + Sync + 'static,
) -> Asker<Office> {
    let office = Office { respond: Arc::new(respond), seen: Arc::default() };
    Asker { store: world.store.clone(), office, running: running(), clock: || NOW }
}

/// A test image under emulation.
fn running() -> Running {
    Running { release: "smoke-1".into(), version: 1, test: true, accelerator: Accelerator::Tcg }
}

/// An office that answers well but for `bend`, and with `bundle` instead of the stored one.
fn bent(world: &World, bundle: Vec<u8>, bend: fn(&mut Lease)) -> Asker<Office> {
    let dir = tempfile::tempdir().unwrap();
    world.tenant.write(dir.path());
    let mut tenant = Tenant::read(dir.path());
    tenant.keysets.clone_from(&world.tenant.keysets);
    let device = world.device.clone();
    asker(world, move |request| Ok(Reply::Lease(tenant.lease(request, &device, &bundle, bend))))
}

fn challenge() -> Challenge {
    Challenge { nonce: [1; 32], boot_key: [2; 32], seq: 0, verity_root: [4; 32], keyset_version: 9 }
}

async fn refused(asker: Asker<Office>) -> String {
    match asker.ask(challenge()).await {
        Answer::NotVerified(words) => words,
        other @ (Answer::Lease(_) | Answer::Refused(_) | Answer::Unreachable(_) | Answer::Forbidden(_)) => {
            panic!("{other:?}")
        }
    }
}

#[tokio::test]
async fn newer_policy_that_forbids_what_runs_gives_no_lease_and_is_kept() {
    type Forbid = fn(&mut kontor_bundle::Bundle);
    let cases: [(Forbid, &str); 3] = [
        (|bundle| bundle.settings.allow_test_image = false, "test image"),
        (|bundle| bundle.settings.allow_emulation = false, "emulation"),
        (|bundle| bundle.min_release = 2, "release"),
    ];
    for (forbid, words) in cases {
        let world = World::provisioned();
        let bundle = world.tenant.bundle(endpoint(), |bundle| {
            bundle.revision = 2;
            forbid(bundle);
        });
        let answer = bent(&world, bundle.clone(), |_| {}).ask(challenge()).await;
        let Answer::Forbidden(said) = answer else { panic!("{answer:?}") };
        assert!(said.contains("forbids what runs") && said.contains(words), "{said}");
        assert_eq!(world.documents().1, bundle);
    }
}

#[tokio::test]
async fn good_answer_is_on_disk_before_anybody_acts_on_it() {
    let mut world = World::provisioned();
    world.tenant.advance();
    let bundle = world.tenant.bundle(endpoint(), |bundle| bundle.revision = 2);
    let asker = bent(&world, bundle.clone(), |_| {});
    let Answer::Lease(granted) = asker.ask(challenge()).await else { panic!("no lease") };
    assert_eq!(granted.lease.revision, 2);
    assert_eq!(granted.gateways, [(tenant::GATEWAY, vec![endpoint()])]);
    assert_eq!(granted.off_after.as_secs(), 600 + 60);
    assert_eq!(granted.parts.bundle, bundle);
    let memory = world.store.memory().unwrap();
    let seen = Memory { keyset_version: 2, serial: 1, revisions: revisions(2), ..Memory::default() };
    assert_eq!(memory, Memory { issued_at: NOW, ..seen });
    assert_eq!(world.documents().1, bundle);
    world.records().unwrap();
}

#[tokio::test]
async fn request_is_signed_by_the_host_key_and_says_what_the_guest_asked() {
    let world = World::provisioned();
    let asker = bent(&world, world.bundle.clone(), |_| {});
    asker.ask(challenge()).await;
    let envelope = asker.office.seen.lock().unwrap().pop().unwrap();
    let host_key = world.store.host_key().unwrap().public();
    let request = Request::parse(&verify_request(&envelope, &host_key).unwrap()).unwrap();
    assert_eq!((request.nonce, request.boot_key, request.seq), ([1; 32], [2; 32], 0));
    assert_eq!((request.verity_root, request.release.as_str()), (Digest([4; 32]), "smoke-1"));
    assert_eq!((request.tenant, request.device), (world.tenant.id, device_id()));
    // The guest's image has a newer keyset than this host: the chain has to begin at the host's.
    assert_eq!(request.keyset_version, 1);
}

#[tokio::test]
async fn lease_that_answers_something_else_is_refused() {
    let world = World::provisioned();
    type Bend = (&'static str, fn(&mut Lease));
    let bends: [Bend; 6] = [
        ("nonce", |lease| lease.nonce[0] ^= 1),
        ("key", |lease| lease.boot_key[0] ^= 1),
        ("request", |lease| lease.request.0[0] ^= 1),
        ("device", |lease| lease.device = "laptop-8".parse().unwrap()),
        ("life", |lease| lease.not_after = lease.issued_at + 3601),
        ("gateway", |lease| lease.gateways[0].id ^= 1),
    ];
    for (name, bend) in bends {
        let words = refused(bent(&world, world.bundle.clone(), bend)).await;
        assert!(words.starts_with("check the office's answer: "), "{name}: {words}");
    }
    assert_eq!(world.store.memory().unwrap().issued_at, 0);
}

#[tokio::test]
async fn answer_older_than_what_was_seen_is_refused() {
    let world = World::provisioned();
    let newer = world.tenant.bundle(endpoint(), |bundle| bundle.revision = 3);
    assert!(matches!(bent(&world, newer.clone(), |_| {}).ask(challenge()).await, Answer::Lease(_)));
    let words = refused(bent(&world, world.bundle.clone(), |_| {})).await;
    assert!(words.contains("revision"), "{words}");
    refused(bent(&world, newer.clone(), |lease| lease.issued_at -= 1)).await;
    assert!(matches!(bent(&world, newer, |_| {}).ask(challenge()).await, Answer::Lease(_)));
}

/// A request of the stored enrolment, as the store's documents are now.
fn request(world: &World) -> Verified<RequestKind> {
    let key = world.store.host_key().unwrap();
    let records = world.store.records(&key.public()).unwrap();
    let request = Request {
        tenant: world.tenant.id,
        device: device_id(),
        enrolment: records.device.enrolment,
        nonce: [1; 32],
        boot_key: [2; 32],
        seq: 0,
        verity_root: Digest([4; 32]),
        release: "smoke-1".into(),
        keyset_version: 1,
    };
    verify_request(&sign::<RequestKind>(&request.payload(), &[&key]), &key.public()).unwrap()
}

/// A lease that was found good by what is stored now.
fn checked(world: &World) -> (Checked, Vec<Vec<u8>>) {
    let request = request(world);
    let parts = world.tenant.lease(request.envelope(), &world.device, &world.bundle, |_| {});
    let (floor, memory) = (world.store.keyset().unwrap(), world.store.memory().unwrap().for_leases(NOW));
    (for_host(&floor, &parts, &request, &memory).unwrap(), parts.keysets)
}

#[test]
fn what_was_stored_while_the_office_was_asked_is_not_overwritten_by_something_older() {
    type Between = fn(&mut World);
    type Refused = fn(StoreError) -> bool;
    let cases: [(&str, Between, Refused); 6] = [
        (
            "a newer bundle",
            |world| world.bundle = world.tenant.bundle(endpoint(), |bundle| bundle.revision = 2),
            |error| matches!(error, StoreError::Meanwhile(LeaseError::OldRevision { lease: 1, known: 2 })),
        ),
        (
            "a newer record",
            |world| world.bend_device(|device| device.serial = 2),
            |error| matches!(error, StoreError::Meanwhile(LeaseError::OldSerial { record: 1, known: 2 })),
        ),
        (
            "a newer keyset",
            |world| world.tenant.advance(),
            |error| matches!(error, StoreError::Meanwhile(LeaseError::OldKeyset { lease: 1, known: 2 })),
        ),
        (
            "a later lease",
            |world| {
                let request = request(world);
                let later = |lease: &mut Lease| lease.issued_at = NOW + 1;
                let parts = world.tenant.lease(request.envelope(), &world.device, &world.bundle, later);
                let floor = world.store.keyset().unwrap();
                let memory = world.store.memory().unwrap().for_leases(NOW);
                let checked = for_host(&floor, &parts, &request, &memory).unwrap();
                world.store.remember(&checked, &parts.keysets, NOW).unwrap();
            },
            |error| matches!(error, StoreError::Meanwhile(LeaseError::OldIssue { lease: NOW, .. })),
        ),
        (
            "another enrolment",
            |world| world.bend_device(|device| device.enrolment = Digest([8; 32])),
            |error| matches!(error, StoreError::EnrolledAnew),
        ),
        (
            "another key",
            |world| {
                fs::remove_file(world.file("host.key")).unwrap();
                world.store.make_host_key().unwrap();
                world.bend_device(|_| {});
            },
            |error| matches!(error, StoreError::EnrolledAnew),
        ),
    ];
    for (name, between, refused) in cases {
        let mut world = World::provisioned();
        let (checked, keysets) = checked(&world);
        between(&mut world);
        world.provision().unwrap();
        let before = fs::read(world.file("memory.json")).unwrap();
        let error = world.store.remember(&checked, &keysets, NOW).unwrap_err();
        assert!(refused(error), "{name}");
        assert_eq!(fs::read(world.file("memory.json")).unwrap(), before, "{name}");
        world.records().unwrap();
    }
}

#[test]
fn what_was_stored_while_the_office_was_asked_and_is_not_newer_hinders_nothing() {
    let world = World::provisioned();
    let (checked, keysets) = checked(&world);
    world.provision().unwrap();
    world.store.remember(&checked, &keysets, NOW).unwrap();
    assert_eq!(world.store.memory().unwrap().issued_at, NOW);
    // The same again, as when control's clock stands still.
    world.store.remember(&checked, &keysets, NOW).unwrap();
    world.records().unwrap();
}

#[tokio::test]
async fn control_that_wrote_a_time_far_ahead_shuts_nobody_out() {
    let world = World::provisioned();
    let asker = |bend| bent(&world, world.bundle.clone(), bend);
    let far = asker(|lease| {
        (lease.issued_at, lease.not_after) =
            (lease.issued_at + 1_000_000_000, lease.not_after + 1_000_000_000);
    });
    // No gateway makes a peer of it, but the host cannot know.
    assert!(matches!(far.ask(challenge()).await, Answer::Lease(_)));
    assert_eq!(world.store.memory().unwrap().issued_at, NOW + 1_000_000_000);
    assert!(matches!(asker(|_| {}).ask(challenge()).await, Answer::Lease(_)));
    assert_eq!(world.store.memory().unwrap().issued_at, NOW);
    refused(asker(|lease| lease.issued_at -= 1)).await;
}

#[tokio::test]
async fn hosts_clock_at_2030_and_back_stops_nothing() {
    let world = World::provisioned();
    for clock in [|| NOW + 100_000_000, || NOW, || 0] {
        let asker = Asker { clock, ..bent(&world, world.bundle.clone(), |_| {}) };
        assert!(matches!(asker.ask(challenge()).await, Answer::Lease(_)));
    }
}

#[tokio::test]
async fn lease_of_another_company_is_refused() {
    let world = World::provisioned();
    let parts = Parts { keysets: vec![b"{}".to_vec()], ..Parts::default() };
    refused(asker(&world, move |_| Ok(Reply::Lease(parts.clone())))).await;
    let (device, bundle) = (world.device.clone(), world.bundle.clone());
    // Everything is right but the lease's signer.
    let other = Tenant::new();
    let dir = tempfile::tempdir().unwrap();
    world.tenant.write(dir.path());
    let own = Tenant::read(dir.path());
    refused(asker(&world, move |request| {
        let mut parts = own.lease(request, &device, &bundle, |_| {});
        let key = verify_host(request, &own, &device);
        let theirs = other.device(key, |_| {});
        parts.lease = other.lease(request, &theirs, &other.bundle(endpoint(), |_| {}), |_| {}).lease;
        Ok(Reply::Lease(parts))
    }))
    .await;
}

fn verify_host(request: &[u8], tenant: &Tenant, device: &[u8]) -> kontor_trust::PublicKey {
    let record = Device::parse(&tenant.newest().verify(device).unwrap()).unwrap();
    verify_request(request, &record.host_key).unwrap();
    record.host_key
}

#[tokio::test]
async fn office_that_says_no_or_nothing_is_told_apart() {
    let world = World::provisioned();
    let no = asker(&world, |_| Ok(Reply::Refused("revoked".into())));
    assert!(matches!(no.ask(challenge()).await, Answer::Refused(words) if words == "revoked"));
    let late = asker(&world, |_| Err(OfficeError::Late));
    assert!(matches!(late.ask(challenge()).await, Answer::Unreachable(_)));
}

#[tokio::test]
async fn revocation_counts_on_the_enrol_roles_word_and_not_on_controls() {
    let mut world = World::provisioned();
    let answer = async |world: &World, keysets: &[Vec<u8>], device: &[u8]| {
        let notice = Notice { keysets: keysets.to_vec(), device: device.to_vec() };
        asker(world, move |_| Ok(Reply::Revoked(notice.clone()))).ask(challenge()).await
    };
    let key = world.store.host_key().unwrap().public();
    let revoked = |device: &mut Device| (device.serial, device.state) = (2, DeviceState::Revoked);
    let record = world.tenant.device(key, revoked);
    // Also in words that a newer keyset's persons signed, which did not arrive yet.
    world.tenant.advance();
    for keysets in [&[][..], &world.tenant.keysets] {
        let answer = answer(&world, keysets, &record).await;
        assert!(matches!(&answer, Answer::Forbidden(words) if words.contains("revoked")), "{answer:?}");
    }
    let other = Tenant::new();
    for (device, words) in [
        (world.device.clone(), "its record does not"),
        (other.device(key, revoked), "not signed as it must be"),
        (world.tenant.device(key, |device| device.state = DeviceState::Revoked), "seen before"),
        (
            world.tenant.device(key, |device| {
                revoked(device);
                device.device = "laptop-8".parse().unwrap();
            }),
            "is for laptop-8",
        ),
        (b"{}".to_vec(), "not signed as it must be"),
    ] {
        if words == "seen before" {
            world.bend_device(|device| device.serial = 2);
            world.provision().unwrap();
        }
        let answer = answer(&world, &[], &device).await;
        assert!(matches!(&answer, Answer::NotVerified(said) if said.contains(words)), "{words}: {answer:?}");
    }
    let many = vec![world.tenant.keysets[0].clone(); 9];
    assert!(matches!(answer(&world, &many, &record).await, Answer::NotVerified(_)));
    // Nothing of it was kept.
    world.records().unwrap();
}

#[tokio::test]
async fn revoked_device_that_is_told_so_does_not_ask_again() {
    let mut world = World::provisioned();
    world.bend_device(|device| device.state = DeviceState::Revoked);
    world.put("device", &world.device);
    let asker = bent(&world, world.bundle.clone(), |_| {});
    assert!(matches!(asker.ask(challenge()).await, Answer::NotVerified(words) if words.contains("revoked")));
    assert!(asker.office.seen.lock().unwrap().is_empty());
}
