use super::*;
use kontor_release::Digest;
use kontor_trust::{PublicKey, SecretKey};
use std::{collections::BTreeMap, convert::Infallible, num::NonZeroU64};

/// Long past: nothing here looks at expiry.
const EXPIRES: u64 = 1_000_000_000;

struct Company {
    root: [Signer; 3],
    targets: [Signer; 2],
    snapshot: Signer,
    timestamp: Signer,
    staff: Staff,
    first: Vec<u8>,
}

fn signer() -> (Signer, PublicKey) {
    let secret = SecretKey::generate().unwrap();
    (Signer::new(&secret).unwrap(), secret.public())
}

impl Company {
    fn new() -> Self {
        let ([a, b, c], [ci, rebuilder]) = ([(); 3].map(|()| signer()), [(); 2].map(|()| signer()));
        let (snapshot, timestamp) = (signer(), signer());
        let staff = Staff {
            root: vec![a.1, b.1, c.1],
            root_threshold: 2,
            targets: vec![ci.1, rebuilder.1],
            targets_threshold: 2,
            snapshot: snapshot.1,
            timestamp: timestamp.1,
        };
        let first = new_root(NonZeroU64::MIN, &staff, EXPIRES, &[&a.0, &b.0]).unwrap();
        Self {
            root: [a.0, b.0, c.0],
            targets: [ci.0, rebuilder.0],
            snapshot: snapshot.0,
            timestamp: timestamp.0,
            staff,
            first,
        }
    }

    fn pin(&self) -> Digest {
        Digest::of(&self.first)
    }

    fn trusted(&self, roots: &[Vec<u8>]) -> TrustedRoot {
        TrustedRoot::follow(roots, &self.pin()).unwrap()
    }

    fn draft(&self, previous: Option<&Verified>) -> Draft {
        let target = Target { bytes: 5, sha256: Digest::of(b"hello") };
        Draft::new(previous, &BTreeMap::from([("smoke.kernel".to_owned(), target)]), EXPIRES).unwrap()
    }

    fn everyone(&self) -> Vec<&Signer> {
        self.root.iter().chain(&self.targets).chain([&self.snapshot, &self.timestamp]).collect()
    }

    /// A repository's state after `previous`, with these roots.
    fn after(&self, previous: Option<&Verified>, roots: Vec<Vec<u8>>) -> Metadata {
        let root = self.trusted(&roots);
        let mut draft = self.draft(previous);
        draft.sign(&root, &self.everyone()).unwrap();
        let sealed = seal(&root, &draft, previous, EXPIRES, &self.everyone()).unwrap();
        Metadata {
            roots,
            timestamp: sealed.timestamp,
            snapshot: sealed.snapshot.1,
            targets: sealed.targets.1,
        }
    }

    fn metadata(&self) -> Metadata {
        self.after(None, vec![self.first.clone()])
    }

    fn next_root(&self, staff: &Staff, signers: &[&Signer]) -> Vec<u8> {
        new_root(NonZeroU64::new(2).unwrap(), staff, EXPIRES, signers).unwrap()
    }
}

/// The file that a refusal names, and its reason.
fn refused(metadata: &Metadata, pin: &Digest) -> (String, RoleError) {
    match verify(metadata, pin).unwrap_err() {
        MetadataError::Role { file, source } => (file, source),
        other
        @ (MetadataError::NoRoot | MetadataError::TooManyRoots(_) | MetadataError::OtherRoot { .. }) => {
            panic!("{other}")
        }
    }
}

#[test]
fn whole_metadata_verifies_long_after_it_expired() {
    let company = Company::new();
    let verified = verify(&company.metadata(), &company.pin()).unwrap();
    assert_eq!(verified.versions(), Versions { root: 1, timestamp: 1, snapshot: 1, targets: 1 });
    let target = verified.target("smoke.kernel").unwrap();
    assert_eq!(target, Target { bytes: 5, sha256: Digest::of(b"hello") });
    assert_eq!(verified.target("smoke.initrd"), None);
}

#[test]
fn versions_follow_what_is_published() {
    let company = Company::new();
    let first = verify(&company.metadata(), &company.pin()).unwrap();
    let second = company.after(Some(&first), vec![company.first.clone()]);
    let second = verify(&second, &company.pin()).unwrap();
    assert_eq!(second.versions(), Versions { root: 1, timestamp: 2, snapshot: 2, targets: 2 });
}

#[test]
fn every_changed_byte_is_refused_and_the_file_is_named() {
    type Part = (&'static str, fn(&mut Metadata) -> &mut Vec<u8>);
    let parts: [Part; 3] = [
        ("timestamp.json", |metadata| &mut metadata.timestamp),
        ("1.snapshot.json", |metadata| &mut metadata.snapshot),
        ("1.targets.json", |metadata| &mut metadata.targets),
    ];
    let company = Company::new();
    let good = company.metadata();
    for (name, part) in parts {
        let length = part(&mut good.clone()).len();
        // One bit gives another digit or letter; eight give no text at all.
        for (at, bits) in (0..length).flat_map(|at| [(at, 0x01), (at, 0xff)]) {
            let mut bad = good.clone();
            part(&mut bad)[at] ^= bits;
            assert_eq!(refused(&bad, &company.pin()).0, name, "byte {at}");
        }
    }
    for at in 0..good.roots[0].len() {
        let mut bad = good.clone();
        bad.roots[0][at] ^= 0xff;
        let error = verify(&bad, &company.pin()).unwrap_err();
        assert!(matches!(error, MetadataError::OtherRoot { .. }), "byte {at}: {error}");
    }
}

#[test]
fn missing_file_is_named() {
    let company = Company::new();
    let good = company.metadata();
    let bad = Metadata { timestamp: Vec::new(), ..good.clone() };
    assert!(matches!(refused(&bad, &company.pin()), (file, RoleError::Absent) if file == "timestamp.json"));
    let bad = Metadata { snapshot: Vec::new(), ..good.clone() };
    assert!(matches!(refused(&bad, &company.pin()), (file, RoleError::Absent) if file == "1.snapshot.json"));
    let bad = Metadata { targets: Vec::new(), ..good.clone() };
    assert!(matches!(refused(&bad, &company.pin()), (file, RoleError::Absent) if file == "1.targets.json"));
    let bad = Metadata { roots: Vec::new(), ..good };
    assert!(matches!(verify(&bad, &company.pin()), Err(MetadataError::NoRoot)));
}

#[test]
fn another_companys_repository_is_refused() {
    let (company, other) = (Company::new(), Company::new());
    let error = verify(&other.metadata(), &company.pin()).unwrap_err();
    assert!(matches!(error, MetadataError::OtherRoot { .. }), "{error}");
    // Their roles below our root.
    let mixed = Metadata { roots: vec![company.first.clone()], ..other.metadata() };
    let (file, error) = refused(&mixed, &company.pin());
    assert!(
        matches!((file.as_str(), &error), ("timestamp.json", RoleError::Signatures(_))),
        "{file}: {error}"
    );
}

#[test]
fn role_of_another_state_is_refused() {
    let company = Company::new();
    let old = company.metadata();
    let verified = verify(&old, &company.pin()).unwrap();
    let new = company.after(Some(&verified), old.roots.clone());
    let bad = Metadata { targets: old.targets, ..new.clone() };
    assert!(matches!(refused(&bad, &company.pin()), (file, RoleError::Hash(_)) if file == "2.targets.json"));
    let bad = Metadata { snapshot: old.snapshot, ..new };
    assert!(matches!(refused(&bad, &company.pin()), (file, RoleError::Hash(_)) if file == "2.snapshot.json"));
}

#[test]
fn list_of_targets_needs_two_persons_to_be_sealed() {
    let company = Company::new();
    let root = company.trusted(std::slice::from_ref(&company.first));
    let mut draft = company.draft(None);
    let seal = |draft: &Draft| seal(&root, draft, None, EXPIRES, &company.everyone());
    assert!(matches!(seal(&draft), Err(SignError::Role(_, RoleError::Signatures(_)))));
    assert_eq!(draft.sign(&root, &[&company.targets[0]]).unwrap(), 1);
    // The same person again counts nothing, nor does one who does not vouch for releases.
    let again = [&company.targets[0], &company.root[0], &company.snapshot];
    assert_eq!(draft.sign(&root, &again).unwrap(), 0);
    assert!(matches!(seal(&draft), Err(SignError::Role(_, RoleError::Signatures(_)))));
    // The other signs what the first wrote down.
    let mut draft = Draft::parse(&draft.to_bytes().unwrap()).unwrap();
    assert_eq!(draft.sign(&root, &[&company.targets[1]]).unwrap(), 1);
    seal(&draft).unwrap();
}

#[test]
fn timestamp_of_another_key_is_not_sealed() {
    let company = Company::new();
    let root = company.trusted(std::slice::from_ref(&company.first));
    let mut draft = company.draft(None);
    draft.sign(&root, &company.everyone()).unwrap();
    let without: Vec<&Signer> = company.targets.iter().chain([&company.snapshot]).collect();
    assert!(matches!(seal(&root, &draft, None, EXPIRES, &without), Err(SignError::Role("the timestamp", _))));
}

/// The state of a repository whose targets have the signatures of `bend`, below good snapshot and timestamp.
fn bent(company: &Company, bend: impl FnOnce(&mut serde_json::Value)) -> Metadata {
    // A lax company with the same keys lets anything through; its upper roles are the same company's.
    let good = company.metadata();
    let mut targets: serde_json::Value = serde_json::from_slice(&good.targets).unwrap();
    bend(&mut targets["signatures"]);
    let targets = serde_json::to_vec(&targets).unwrap();
    let (snapshot, timestamp) = crate::sign::over(
        &company.trusted(&good.roots),
        &targets,
        EXPIRES,
        &[&company.snapshot, &company.timestamp],
    )
    .unwrap();
    Metadata { roots: good.roots, timestamp, snapshot, targets }
}

#[test]
fn targets_below_the_threshold_are_refused() {
    let company = Company::new();
    verify(&bent(&company, |_| {}), &company.pin()).unwrap();
    let one = bent(&company, |signatures| drop(signatures.as_array_mut().unwrap().pop()));
    let none = bent(&company, |signatures| signatures.as_array_mut().unwrap().clear());
    for bad in [one, none] {
        let (file, error) = refused(&bad, &company.pin());
        assert!(matches!((file.as_str(), &error), ("1.targets.json", RoleError::Signatures(_))), "{error}");
    }
}

#[test]
fn one_signer_twice_is_not_two() {
    let company = Company::new();
    let twice = bent(&company, |signatures| signatures[1] = signatures[0].clone());
    let (file, error) = refused(&twice, &company.pin());
    assert!(matches!((file.as_str(), &error), ("1.targets.json", RoleError::Signatures(_))), "{error}");
    // Nor is a key that the root names twice for the same role.
    let mut staff = company.staff.clone();
    staff.targets[1] = staff.targets[0];
    let bad = company.next_root(&staff, &[&company.root[0], &company.root[1]]);
    let root = TrustedRoot::follow(&[company.first.clone(), bad], &company.pin()).unwrap_err();
    let MetadataError::Role { file, source } = root else { panic!("{root}") };
    assert!(matches!((file.as_str(), &source), ("2.root.json", RoleError::RepeatedKey(_))), "{source}");
}

#[test]
fn wrong_signature_is_refused() {
    let company = Company::new();
    let swapped = bent(&company, |signatures| {
        let first = signatures[0]["sig"].take();
        signatures[0]["sig"] = std::mem::replace(&mut signatures[1]["sig"], first);
    });
    assert!(matches!(refused(&swapped, &company.pin()).1, RoleError::Signatures(_)));
}

#[test]
fn root_is_followed_by_one_that_the_old_and_the_new_persons_signed() {
    let company = Company::new();
    let (newcomer, key) = signer();
    let staff =
        Staff { root: vec![company.staff.root[1], company.staff.root[2], key], ..company.staff.clone() };
    let [a, b, c] = &company.root;
    let follow = |signers: &[&Signer]| {
        let roots = [company.first.clone(), company.next_root(&staff, signers)];
        TrustedRoot::follow(&roots, &company.pin())
    };
    assert_eq!(follow(&[b, c]).unwrap().version(), 2);
    assert_eq!(follow(&[a, b, &newcomer]).unwrap().version(), 2);
    // Two of the new alone, two of the old alone, one of both.
    for signers in [&[c, &newcomer][..], &[a, b], &[b]] {
        let error = follow(signers).unwrap_err();
        let MetadataError::Role { file, source } = error else { panic!("{error}") };
        assert!(matches!((file.as_str(), &source), ("2.root.json", RoleError::Signatures(_))), "{source}");
    }
}

#[test]
fn root_of_another_version_than_the_next_is_refused() {
    let company = Company::new();
    let third =
        new_root(NonZeroU64::new(3).unwrap(), &company.staff, EXPIRES, &[&company.root[0], &company.root[1]]);
    let error = TrustedRoot::follow(&[company.first.clone(), third.unwrap()], &company.pin()).unwrap_err();
    let MetadataError::Role { source, .. } = error else { panic!("{error}") };
    assert!(matches!(source, RoleError::Version { found: 3, expected: 2 }), "{source}");
}

#[test]
fn chain_of_roots_has_a_limit() {
    let company = Company::new();
    let signers = [&company.root[0], &company.root[1]];
    let link =
        |version| new_root(NonZeroU64::new(version).unwrap(), &company.staff, EXPIRES, &signers).unwrap();
    let mut roots = vec![company.first.clone()];
    roots.extend((2..=MAX_ROOTS as u64).map(link));
    assert_eq!(TrustedRoot::follow(&roots, &company.pin()).unwrap().version(), MAX_ROOTS as u64);
    roots.push(link(MAX_ROOTS as u64 + 1));
    let error = TrustedRoot::follow(&roots, &company.pin()).unwrap_err();
    assert!(matches!(error, MetadataError::TooManyRoots(257)), "{error}");
}

#[test]
fn file_above_the_limit_is_refused() {
    let company = Company::new();
    let mut metadata = company.metadata();
    // Spaces behind the value are still JSON.
    metadata.timestamp.resize(MAX_ROLE, b' ');
    verify(&metadata, &company.pin()).unwrap();
    metadata.timestamp.push(b' ');
    assert!(matches!(refused(&metadata, &company.pin()).1, RoleError::TooLong(_)));
}

#[test]
fn delegation_is_refused() {
    let company = Company::new();
    let mut draft: serde_json::Value =
        serde_json::from_slice(&company.draft(None).to_bytes().unwrap()).unwrap();
    let key = signer().1;
    draft["signed"]["delegations"] = serde_json::json!({ "keys": {}, "roles": [{
        "name": "group", "keyids": [key.id().to_string()], "threshold": 1, "paths": ["*"], "terminating": false,
    }]});
    let error = Draft::parse(&serde_json::to_vec(&draft).unwrap()).unwrap_err();
    assert!(matches!(error, RoleError::Delegation), "{error}");
}

#[test]
fn metadata_is_gathered_as_it_was_written_out() {
    let company = Company::new();
    let metadata = company.metadata();
    let versions = verify(&metadata, &company.pin()).unwrap().versions();
    let files: BTreeMap<String, Vec<u8>> =
        metadata.files(versions).map(|(name, bytes)| (name, bytes.to_vec())).collect();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["1.root.json", "1.snapshot.json", "1.targets.json", "timestamp.json"]);
    let Ok(gathered) = gather(|name| Ok::<_, Infallible>(files.get(name).cloned()));
    assert_eq!(gathered, metadata);
    let Ok(nothing) = gather(|_| Ok::<_, Infallible>(None));
    assert_eq!(nothing, Metadata::default());
}

#[test]
fn refreshed_list_is_the_same_under_newer_names() {
    let company = Company::new();
    let metadata = company.metadata();
    let root = company.trusted(&metadata.roots);
    let previous = verify(&metadata, &company.pin()).unwrap();
    let daily = [&company.snapshot, &company.timestamp];
    let sealed = refresh(&root, &metadata.targets, &previous, EXPIRES, &daily).unwrap();
    assert_eq!(sealed.targets, (1, metadata.targets.clone()));
    let (snapshot, timestamp) = (sealed.snapshot.1, sealed.timestamp);
    let next = Metadata { snapshot, timestamp, ..metadata.clone() };
    let next = verify(&next, &company.pin()).unwrap();
    assert_eq!(next.versions(), Versions { root: 1, timestamp: 2, snapshot: 2, targets: 1 });
    // Neither without one of the keys, nor for another list than the one that is out.
    for signers in [&daily[..1], &daily[1..]] {
        assert!(refresh(&root, &metadata.targets, &previous, EXPIRES, signers).is_err());
    }
    let other = company.after(Some(&previous), metadata.roots.clone());
    let error = refresh(&root, &other.targets, &previous, EXPIRES, &daily).unwrap_err();
    assert!(matches!(error, SignError::Role(_, RoleError::Version { found: 2, expected: 1 })), "{error}");
}

#[test]
fn next_root_waits_until_the_old_and_the_new_persons_signed_it() {
    let company = Company::new();
    let old = company.trusted(std::slice::from_ref(&company.first));
    let ([d, e], timestamp) = ([(); 2].map(|()| signer()), signer());
    let mut staff = old.staff().unwrap();
    assert_eq!(staff, company.staff);
    staff.root = vec![staff.root[2], d.1, e.1];
    staff.timestamp = timestamp.1;
    let mut draft = RootDraft::new(&old, &staff, EXPIRES).unwrap();
    assert_eq!((draft.version(), draft.expires(), draft.staff().as_ref()), (2, EXPIRES, Some(&staff)));
    // Two of the old, of whom one stays, are not two of the new.
    assert_eq!(draft.sign(&old, &[&company.root[0], &company.root[2], &company.snapshot]).unwrap(), 2);
    assert!(matches!(draft.check(&old), Err(RoleError::Signatures(_))));
    let mut draft = RootDraft::parse(&draft.to_bytes().unwrap()).unwrap();
    assert_eq!(draft.sign(&old, &[&company.root[0], &d.0]).unwrap(), 1);
    draft.check(&old).unwrap();
    let roots = [company.first.clone(), draft.to_bytes().unwrap()];
    assert_eq!(company.trusted(&roots).staff(), Some(staff));
    // The new alone are not enough.
    let mut draft = RootDraft::new(&old, &company.staff, EXPIRES).unwrap();
    draft.sign(&old, &[&company.root[0]]).unwrap();
    assert!(draft.check(&old).is_err());
}

#[test]
fn root_that_could_never_sign_is_not_made() {
    let company = Company::new();
    let old = company.trusted(std::slice::from_ref(&company.first));
    let [first, second, _] = company.staff.root[..] else { panic!() };
    for (root, root_threshold) in [(vec![first], 2), (vec![first, second], 0)] {
        let staff = Staff { root, root_threshold, ..company.staff.clone() };
        let error = RootDraft::new(&old, &staff, EXPIRES).unwrap_err();
        assert!(matches!(error, SignError::Threshold { .. }), "{error}");
    }
}
