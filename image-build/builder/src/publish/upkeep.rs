//! What a repository needs between releases: fresh snapshot and timestamp, and new roots.
//!
//! ```text
//! whoever has snapshot and timestamp key   refresh   the same list of targets, fetchable for longer
//! persons of the root, old and new         root      who may sign what from now on; waits in pending.root.json
//! ```

use super::{Outcome, PublishError, after, new_key, signers};
use crate::{Failure, date, repository::Repository};
use kontor_repository::{RootDraft, Signer};
use kontor_trust::PublicKey;
use std::path::{Path, PathBuf};

/// Who signs from now on. A role without a key here keeps those that it has.
pub(crate) struct RootRequest<'a> {
    /// The repository.
    pub(crate) repository: &'a Path,
    /// Key files, and directories with such.
    pub(crate) keys: &'a [PathBuf],
    /// Root keys.
    pub(crate) root: Vec<PublicKey>,
    /// Keys of those who vouch for releases.
    pub(crate) targets: Vec<PublicKey>,
    /// The snapshot's key.
    pub(crate) snapshot: Option<PublicKey>,
    /// The timestamp's key.
    pub(crate) timestamp: Option<PublicKey>,
    /// Life of the root in days.
    pub(crate) days: u32,
}

impl RootRequest<'_> {
    fn names_keys(&self) -> bool {
        let one = self.snapshot.or(self.timestamp);
        one.is_some() || !self.root.is_empty() || !self.targets.is_empty()
    }
}

/// Makes a key for one of the repository's roles. Returns its public half.
pub(crate) fn key(out: &Path) -> Result<PublicKey, Failure> {
    Ok(new_key(out)?.public())
}

/// Makes what is published fetchable for `days` days more. Needs the keys of snapshot and timestamp only.
pub(crate) fn refresh(repository: &Path, keys: &[PathBuf], days: u32) -> Result<Outcome, Failure> {
    Ok(refresh_inner(repository, keys, days)?)
}

fn refresh_inner(dir: &Path, keys: &[PathBuf], days: u32) -> Result<Outcome, PublishError> {
    let signers = signers(keys)?;
    let repository = Repository::open(dir)?;
    let current = repository.current().ok_or_else(|| PublishError::Nothing(dir.into()))?;
    let targets = repository.published(current)?;
    let targets_until = kontor_repository::Draft::parse(&targets).map_err(PublishError::Waiting)?.expires();
    if targets_until <= after(0)? {
        return Err(PublishError::Expired(date::iso8601(targets_until)));
    }
    let until = after(days)?;
    let signers: Vec<&Signer> = signers.iter().collect();
    let sealed = kontor_repository::refresh(repository.root(), &targets, current, until, &signers)?;
    repository.refresh(&sealed)?;
    Ok(Outcome::Refreshed { timestamp: current.versions().timestamp.saturating_add(1), until, targets_until })
}

/// Makes the next root, or signs the one that waits. Readers follow it once enough of the old root keys and enough
/// of its own have signed.
pub(crate) fn new_root(request: &RootRequest<'_>) -> Result<Outcome, Failure> {
    Ok(new_root_inner(request)?)
}

fn new_root_inner(request: &RootRequest<'_>) -> Result<Outcome, PublishError> {
    let signers = signers(request.keys)?;
    let repository = Repository::open(request.repository)?;
    let previous = repository.root();
    let mut draft = match repository.pending_root()? {
        Some(_) if request.names_keys() => return Err(PublishError::RootWaits(request.repository.into())),
        Some(waiting) => waiting,
        None => {
            let mut staff = previous.staff().ok_or(PublishError::Staff)?;
            if !request.root.is_empty() {
                staff.root = request.root.clone();
            }
            if !request.targets.is_empty() {
                staff.targets = request.targets.clone();
            }
            staff.snapshot = request.snapshot.unwrap_or(staff.snapshot);
            staff.timestamp = request.timestamp.unwrap_or(staff.timestamp);
            RootDraft::new(previous, &staff, after(request.days)?)?
        }
    };
    let added = draft.sign(previous, &signers.iter().collect::<Vec<_>>())?;
    let version = draft.version();
    match draft.check(previous) {
        Ok(()) => {
            repository.add_root(&draft)?;
            Ok(Outcome::Root { version })
        }
        Err(kontor_repository::RoleError::Signatures(_)) if added == 0 => Err(PublishError::NoRootSigned),
        Err(error @ kontor_repository::RoleError::Signatures(_)) => {
            repository.wait_root(&draft)?;
            let lacks =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Ok(Outcome::RootWaits { version, lacks })
        }
        Err(error) => Err(PublishError::Root(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Scene;
    use super::*;
    use crate::exit::Exit;
    use kontor_repository::RoleError;
    use std::fs;

    const DAILY: [&str; 2] = ["keys/snapshot.key", "keys/timestamp.key"];

    impl Scene {
        fn paths(&self, names: &[&str]) -> Vec<PathBuf> {
            names.iter().map(|name| self.path(name)).collect()
        }

        fn refresh(&self, keys: &[&str], days: u32) -> Result<Outcome, Failure> {
            refresh(&self.path("repo"), &self.paths(keys), days)
        }

        fn root(&self, keys: &[&str], change: impl FnOnce(&mut RootRequest<'_>)) -> Result<Outcome, Failure> {
            let mut request = RootRequest {
                repository: &self.path("repo"),
                keys: &self.paths(keys),
                root: Vec::new(),
                targets: Vec::new(),
                snapshot: None,
                timestamp: None,
                days: 30,
            };
            change(&mut request);
            new_root(&request)
        }
    }

    #[test]
    fn refresh_needs_the_daily_keys_only_and_changes_no_list() {
        let scene = Scene::new();
        assert!(matches!(scene.refused(scene.refresh(&DAILY, 7)), PublishError::Nothing(_)));
        scene.publish().unwrap();
        let list = || fs::read(scene.path("repo/metadata/1.targets.json")).unwrap();
        let before = list();
        let outcome = scene.refresh(&DAILY, 7).unwrap();
        let Outcome::Refreshed { timestamp: 2, until, targets_until } = outcome else { panic!("{outcome}") };
        assert!(until > targets_until);
        assert_eq!(list(), before);
        assert!(matches!(scene.refresh(&DAILY, 7).unwrap(), Outcome::Refreshed { timestamp: 3, .. }));
        let repository = Repository::open(&scene.path("repo")).unwrap();
        let versions = repository.current().unwrap().versions();
        assert_eq!((versions.targets, versions.snapshot, versions.timestamp), (1, 3, 3));
    }

    #[test]
    fn refresh_without_one_of_its_keys_changes_nothing() {
        let scene = Scene::new();
        scene.publish().unwrap();
        let before = scene.timestamp();
        for keys in [&DAILY[..1], &DAILY[1..], &["keys/root-1.key", "keys/targets-ci.key"]] {
            let error = scene.refused(scene.refresh(keys, 7));
            assert_eq!(error.exit(), Exit::NotVerified, "{error}");
            assert_eq!(scene.timestamp(), before);
        }
    }

    #[test]
    fn refresh_leaves_what_waits_for_signatures() {
        let scene = Scene::new();
        scene.publish().unwrap();
        scene.sign(2);
        scene.with(super::super::publish, &["keys/targets-ci.key"]).unwrap();
        scene.refresh(&DAILY, 7).unwrap();
        assert!(scene.waits());
        let rebuilder = ["keys/targets-rebuilder.key", DAILY[0], DAILY[1]];
        let outcome = scene.with(super::super::cosign, &rebuilder).unwrap();
        assert!(matches!(outcome, Outcome::Published { version: 2, timestamp: 3, .. }), "{outcome}");
    }

    #[test]
    fn new_root_waits_for_old_and_new_persons_and_what_it_disowns_is_signed_anew() {
        let scene = Scene::new();
        scene.publish().unwrap();
        let keys = ["root-4", "timestamp-2"].map(|name| key(&scene.path(&format!("{name}.key"))).unwrap());
        let root = Repository::open(&scene.path("repo")).unwrap().root().staff().unwrap().root;
        let outcome = scene.root(&["keys/root-1.key", "keys/targets-ci.key"], |request| {
            request.timestamp = Some(keys[1]);
        });
        let outcome = outcome.unwrap();
        assert!(matches!(outcome, Outcome::RootWaits { version: 2, .. }), "{outcome}");
        assert!(!scene.path("repo/metadata/2.root.json").exists());
        let error = scene.refused(scene.root(&["keys/root-1.key"], |_| {}));
        assert!(matches!(error, PublishError::NoRootSigned), "{error}");
        let named = [root[0], root[1], keys[0]];
        let error = scene.refused(scene.root(&["keys/root-2.key"], |request| request.root = named.to_vec()));
        assert!(matches!(error, PublishError::RootWaits(_)), "{error}");
        let outcome = scene.root(&["keys/root-2.key"], |_| {}).unwrap();
        assert!(matches!(outcome, Outcome::Root { version: 2 }), "{outcome}");
        assert!(!scene.path("repo/pending.root.json").exists());

        // The old timestamp's key is good for nothing any more; the new one mends it.
        assert!(scene.refresh(&DAILY, 7).is_err());
        let outcome = scene.refresh(&["keys/snapshot.key", "timestamp-2.key"], 7).unwrap();
        assert!(matches!(outcome, Outcome::Refreshed { timestamp: 2, .. }), "{outcome}");

        // Other persons: two of the old and two of the new, of whom one may be the same.
        let outcome =
            scene.root(&["keys/root-1.key", "root-4.key"], |request| request.root = named[1..].to_vec());
        let outcome = outcome.unwrap();
        assert!(matches!(outcome, Outcome::RootWaits { version: 3, .. }), "{outcome}");
        let outcome = scene.root(&["keys/root-2.key"], |_| {}).unwrap();
        assert!(matches!(outcome, Outcome::Root { version: 3 }), "{outcome}");
        let error = scene.refused(scene.root(&["keys/root-1.key", "keys/root-3.key"], |_| {}));
        assert!(matches!(error, PublishError::NoRootSigned), "{error}");
    }

    #[test]
    fn list_that_a_new_root_disowns_is_published_again() {
        let scene = Scene::new();
        scene.publish().unwrap();
        let targets = ["ci-2", "rebuilder-2"].map(|name| key(&scene.path(&format!("new/{name}.key"))));
        assert!(targets.iter().all(Result::is_err), "there is no such directory");
        fs::create_dir(scene.path("new")).unwrap();
        let targets =
            ["ci-2", "rebuilder-2"].map(|name| key(&scene.path(&format!("new/{name}.key"))).unwrap());
        let roots = ["keys/root-1.key", "keys/root-3.key"];
        scene.root(&roots, |request| request.targets = targets.to_vec()).unwrap();
        let error = scene.refused(scene.refresh(&DAILY, 7));
        assert_eq!(error.exit(), Exit::NotVerified, "{error}");
        let outcome = scene.with(super::super::publish, &["new", DAILY[0], DAILY[1]]).unwrap();
        assert!(matches!(outcome, Outcome::Published { version: 1, timestamp: 2, .. }), "{outcome}");
        scene.refresh(&DAILY, 7).unwrap();
    }

    #[test]
    fn root_with_a_role_that_could_never_sign_or_a_key_twice_is_refused() {
        let scene = Scene::new();
        let one = key(&scene.path("one.key")).unwrap();
        let roots = ["keys/root-1.key", "keys/root-2.key"];
        let error = scene.refused(scene.root(&roots, |request| request.targets = vec![one]));
        assert_eq!(error.exit(), Exit::Usage, "{error}");
        let twice = [one, one];
        let error = scene.refused(scene.root(&roots, |request| request.targets = twice.to_vec()));
        assert!(matches!(error, PublishError::Root(RoleError::RepeatedKey(_))), "{error}");
        assert!(!scene.path("repo/pending.root.json").exists());
    }
}
