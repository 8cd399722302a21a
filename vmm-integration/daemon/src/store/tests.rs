use super::*;
use crate::fixture::{Tenant, device_id};

#[test]
fn keysets_have_numbers_up_to_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Digest([1; 32]), device_id()).unwrap();
    assert!(store.keyset_path(MAX_STORED_KEYSETS).is_ok());
    let refused = store.keyset_path(MAX_STORED_KEYSETS + 1);
    assert!(matches!(refused, Err(StoreError::KeysetNumber(10_001))));
}

/// A store that was provisioned, and a change of everything in it: two keysets, the second of which takes the
/// old documents' signers away, another line, a record and a bundle for it.
struct Rotation {
    _dir: tempfile::TempDir,
    store: Store,
    /// Every keyset: the first, one with the same signers, one with others.
    keysets: Vec<Vec<u8>>,
    steps: Vec<Step>,
}

const OLD: (u64, u64, &str, u64) = (1, 4, "sales", 9);
const NEW: (u64, u64, &str, u64) = (3, 5, "support", 2);

impl Rotation {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut tenant = Tenant::new();
        let store = Store::open(dir.path(), tenant.id, device_id()).unwrap();
        let host_key = store.make_host_key().unwrap().public();
        let endpoint = "192.0.2.1:51820".parse().unwrap();
        let id = tenant.id;
        let papers = |tenant: &Tenant, (_, serial, line, revision): (u64, u64, &str, u64)| {
            let line: Line = line.parse().unwrap();
            let device = tenant.device(host_key, |device| {
                (device.tenant, device.serial, device.line) = (id, serial, line.clone());
            });
            let bundle = tenant.bundle(endpoint, |bundle| {
                (bundle.tenant, bundle.revision, bundle.line) = (id, revision, line);
            });
            (device, bundle)
        };
        let (device, bundle) = papers(&tenant, OLD);
        store.provision(&tenant.keysets, &device, &bundle).unwrap();

        tenant.advance();
        let signers = Tenant::new();
        tenant.advance_with(|keyset| keyset.roles = signers.newest().keyset().roles.clone());
        let (device, bundle) = papers(&signers, NEW);
        let chain = chain(store.keyset().unwrap(), &tenant.keysets).unwrap();
        let keyset = newest(&chain);
        let (verified_device, device) = store.check_device(keyset, &device, &host_key).unwrap();
        let (verified_bundle, bundle) = store.check_bundle(keyset, &bundle, &device).unwrap();
        let seen = store.memory().unwrap().after(keyset, &device, &bundle);
        let documents = Documents::new(&verified_device, &verified_bundle);
        let steps = store.change(&chain, documents, seen).unwrap();
        Self { _dir: dir, store, keysets: tenant.keysets, steps }
    }

    fn seen(&self) -> (u64, u64, String, u64) {
        let Records { keyset, device, bundle } =
            self.store.records(&self.store.host_key().unwrap().public()).unwrap();
        assert_eq!(device.line, bundle.line);
        (keyset.version(), device.serial, device.line.to_string(), bundle.revision)
    }
}

#[test]
fn kill_at_any_step_of_a_change_leaves_the_old_documents_or_the_new_ones() {
    let steps = Rotation::new().steps.len();
    assert_eq!(steps, 3);
    for done in 0..=steps {
        let rotation = Rotation::new();
        let Rotation { store, steps, .. } = &rotation;
        store.write(&steps[..done]).unwrap();
        // The next one was begun: half of it lies beside.
        if let Some((path, bytes)) = steps.get(done) {
            fs::write(path.with_extension("new"), &bytes[..bytes.len() / 2]).unwrap();
        }
        let (keyset, serial, line, revision) = if done == steps.len() { NEW } else { OLD };
        assert_eq!(rotation.seen(), (keyset, serial, line.to_owned(), revision), "after {done} steps");
        // The change is made again, whole.
        store.write(&steps[..]).unwrap();
        assert_eq!(rotation.seen().0, NEW.0);
    }
}

#[test]
fn keyset_of_a_change_that_was_never_completed_is_written_over_by_the_next() {
    let rotation = Rotation::new();
    rotation.store.write(&rotation.steps[..1]).unwrap();
    fs::write(&rotation.steps[0].0, "anything").unwrap();
    assert_eq!(rotation.seen().0, OLD.0);
    rotation.store.write(&rotation.steps).unwrap();
    assert_eq!(rotation.seen().0, NEW.0);
}

#[test]
fn keyset_that_came_alone_is_stored_unless_it_disowns_the_documents() {
    let rotation = Rotation::new();
    let Rotation { store, keysets, .. } = &rotation;
    assert!(store.adopt(&[]).unwrap());
    assert!(!store.adopt(&keysets[1..]).unwrap());
    assert_eq!(rotation.seen().0, OLD.0);
    assert!(store.adopt(&keysets[..2]).unwrap());
    assert_eq!(rotation.seen().0, 2);
    assert_eq!(store.memory().unwrap().keyset_version, 2);
    let error = store.adopt(&[b"{}".to_vec()]).unwrap_err();
    assert!(matches!(error, StoreError::Keyset { version: 3, .. }), "{error}");
    // Without documents there is nothing to adopt it for.
    let dir = tempfile::tempdir().unwrap();
    let bare = Store::open(dir.path(), store.tenant(), device_id()).unwrap();
    assert!(bare.adopt(keysets).unwrap());
    assert!(bare.keyset().unwrap_err().is_missing());
}

#[test]
fn each_line_has_a_memory_of_its_own() {
    let rotation = Rotation::new();
    rotation.store.write(&rotation.steps).unwrap();
    let memory = rotation.store.memory().unwrap();
    for (_, _, line, revision) in [OLD, NEW] {
        assert_eq!(memory.revision(&line.parse().unwrap()), revision, "{line}");
    }
    assert_eq!(memory.revision(&"another".parse().unwrap()), 0);
}
