//! Who is let in: the checks of a lease, and what has to be remembered before they count.
//!
//! ```text
//! Admit ─► kontor_bundle::lease::for_gateway ─► own key, free addresses ─► on disk ─► Admission ─► a peer
//! ```
//!
//! The order matters: a peer is made only after the disk has what makes its lease old. Nothing in an [`Admit`] is
//! believed before its signatures were checked, and control's word alone admits nobody.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use kontor_bundle::lease::{self, Admit, Checked, GatewayMemory, LeaseError, OwnGateway};
use kontor_bundle::{Bundle, BundleError};
use kontor_trust::{
    BundleKind, Device, DeviceId, DeviceKind, Digest, DocumentError, EnvelopeError, KeysetError, Lease,
    LeaseKind, Line, TrustedKeyset,
};

use kontor_wire::post;

use crate::filter::Table;
use crate::store::{Store, StoreError, StoredDevice, StoredLine, StoredOpen};

/// The gateway's identity, and all that it remembers.
pub(crate) struct Office {
    own: Identity,
    keyset: TrustedKeyset,
    store: Store,
    devices: BTreeMap<DeviceId, Known>,
    lines: BTreeMap<Line, KnownLine>,
    /// Whether what is remembered has not been verified under `keyset` yet.
    review_due: bool,
}

/// What a gateway is called, and what it has.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) gateway: OwnGateway,
    /// Its X25519 key, which the bundle names too.
    pub(crate) public_key: [u8; 32],
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

/// A peer to be made, or to go on for longer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Admission {
    pub(crate) device: DeviceId,
    pub(crate) boot_key: [u8; 32],
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    /// Unix seconds.
    pub(crate) not_after: u64,
    pub(crate) line: Line,
    /// Of the lease's bundle.
    pub(crate) revision: u64,
    pub(crate) table: Arc<Table>,
    pub(crate) newest: Newest,
    /// Whether this boot was answered at the post already.
    pub(crate) is_open: bool,
}

/// The newest bundle of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Newest {
    pub(crate) revision: u64,
    pub(crate) table: Arc<Table>,
    /// How long a peer may stay on an older one, in seconds.
    pub(crate) apply_s: u64,
}

/// What follows from one lease.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) admission: Admission,
    /// Devices whose documents a newer keyset, which came with the lease, no longer bears out.
    pub(crate) removed: Vec<DeviceId>,
    /// Whether what is remembered could not be read for that, so that [`Office::review_if_due`] has to do it.
    pub(crate) review_due: bool,
}

/// What is remembered of a device.
struct Known {
    serial: u64,
    issued_at: u64,
    boot_key: [u8; 32],
    seq: u64,
    /// Whether a `Hello` of this boot was answered at the post.
    is_open: bool,
    /// Its addresses and until when it has them, as long as its documents verify.
    lease: Option<KnownLease>,
}

struct KnownLease {
    hash: Digest,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    not_after: u64,
    line: Line,
    revision: u64,
    keyset_version: u64,
}

/// What a `Hello` comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// For the guest.
    pub(crate) newest: post::Newest,
    /// The peer that the line's table opens for now: one of this device with this boot key. None where it was
    /// open before, or where the lease is not on the newest keyset and revision.
    pub(crate) opens: Option<(DeviceId, [u8; 32])>,
}

/// What is remembered of a line.
struct KnownLine {
    revision: u64,
    hash: Digest,
    /// As long as the bundle verifies.
    newest: Option<Newest>,
}

/// Why a lease admits nobody.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdmitError {
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error("the bundle gives this gateway another key than its own")]
    OtherKey,
    #[error("the lease gives the address {0}, which is this gateway's own")]
    OwnAddress(IpAddr),
    #[error("the lease gives the address {0}, which another device has")]
    AddressTaken(IpAddr),
    #[error(
        "revision {revision} of line {line} was seen with another content: a changed bundle is a new revision"
    )]
    Fork { line: Line, revision: u64 },
    #[error("the gateway cannot remember the lease")]
    Store(#[source] StoreError),
}

/// Why what is remembered cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("the first keyset does not verify")]
    First(#[source] KeysetError),
    #[error("stored keyset {version} does not verify")]
    Keyset { version: u64, source: KeysetError },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a stored document counts no longer.
#[derive(Debug, thiserror::Error)]
enum RestoreError {
    #[error("a signature")]
    Envelope(#[from] EnvelopeError),
    #[error("a document")]
    Document(#[from] DocumentError),
    #[error("the bundle")]
    Bundle(#[from] BundleError),
    #[error("it names no address of this gateway's")]
    Addresses,
}

impl Office {
    /// Reads what was remembered; gives the leases that still run at `now` (Unix seconds).
    pub(crate) fn open(
        own: Identity,
        untrusted_first: &[u8],
        tenant: &Digest,
        store: Store,
        now: u64,
    ) -> Result<(Self, Vec<Admission>), OpenError> {
        let mut keyset = TrustedKeyset::first(untrusted_first, tenant).map_err(OpenError::First)?;
        while let Some(version) = keyset.version().checked_add(1) {
            let Some(envelope) = store.keyset(version)? else { break };
            keyset = keyset.advance(&envelope).map_err(|source| OpenError::Keyset { version, source })?;
        }
        let mut office =
            Self { own, keyset, store, devices: BTreeMap::new(), lines: BTreeMap::new(), review_due: false };
        for (line, stored) in office.store.lines()? {
            let newest = office.restore_line(&stored).inspect_err(|error| {
                tracing::warn!(%error, "a stored bundle counts no longer");
                tracing::debug!(%line, "of this line");
            });
            let StoredLine { revision, hash, .. } = stored;
            office.lines.insert(line, KnownLine { revision, hash, newest: newest.ok() });
        }
        let mut admissions = Vec::new();
        let answered: BTreeMap<DeviceId, StoredOpen> = office.store.open_boots()?.into_iter().collect();
        for (device, stored) in office.store.devices()? {
            let is_open = answered.get(&device).is_some_and(|open| open.boot_key == stored.boot_key);
            let restored = office.restore_device(&stored).inspect_err(|error| {
                tracing::warn!(%error, "a stored lease counts no longer");
                tracing::debug!(%device, "of this device");
            });
            let (lease, admission) = match restored {
                Ok((lease, admission)) => (Some(lease), Some(Admission { is_open, ..admission })),
                Err(_) => (None, None),
            };
            office.devices.insert(device, Known { is_open, lease, ..Known::new(&stored) });
            admissions.extend(admission.filter(|admission| now < admission.not_after));
        }
        Ok((office, admissions))
    }

    /// Checks a lease at `now` (Unix seconds) and remembers it.
    pub(crate) fn admit(&mut self, untrusted: &Admit, now: u64) -> Result<Outcome, AdmitError> {
        let checked =
            lease::for_gateway(&self.keyset, untrusted, now, &self.own.gateway, |device, boot, line| {
                self.recall(device, boot, line)
            })?;
        let (v4, v6) = self.addresses(&checked, now)?;
        let bundle_hash = checked.bundle_hash;
        let line = &checked.lease.line;
        let known = self.lines.get(line).filter(|known| known.revision == checked.lease.revision);
        if known.is_some_and(|known| known.hash != bundle_hash) {
            return Err(AdmitError::Fork { line: line.clone(), revision: checked.lease.revision });
        }
        let lease = KnownLease::new(&checked.lease, checked.lease_hash, v4, v6);
        let is_open = self.remember(&checked, untrusted, lease).map_err(AdmitError::Store)?;
        if self.keyset.version() != checked.keyset.version() {
            self.keyset = checked.keyset.clone();
            self.review_due = true;
        }
        // The lease is good all the same, and the caller tries again.
        let removed = self.review_if_due(now).unwrap_or_else(|error| {
            tracing::warn!(%error, "what is remembered is not reviewed yet");
            Vec::new()
        });
        let table = Arc::new(Table::new(&checked.bundle.access));
        let admission = Admission { is_open, ..self.admission(&checked.lease, v4, v6, table) };
        Ok(Outcome { admission, removed, review_due: self.review_due })
    }

    /// Verifies all that is remembered under the newest keyset, if that was not done yet, and gives the devices
    /// that fail.
    pub(crate) fn review_if_due(&mut self, now: u64) -> Result<Vec<DeviceId>, StoreError> {
        if !self.review_due {
            return Ok(Vec::new());
        }
        let removed = self.review(now)?;
        self.review_due = false;
        Ok(removed)
    }

    /// Answers the `Hello` of whoever has the inner address `from`, at `now` (Unix seconds). That a boot was
    /// answered is on disk before this returns, so that a restart does not shut it out.
    pub(crate) fn greet(
        &mut self,
        from: IpAddr,
        lease_hash: &Digest,
        now: u64,
    ) -> Result<Greeting, post::Refusal> {
        let running = |known: &Known| known.lease.as_ref().is_some_and(|lease| lease.admits(from, now));
        let found = self.devices.iter_mut().find(|(_, known)| running(known));
        let Some((device, known)) = found else { return Err(post::Refusal::NoLease) };
        let Some(lease) = &known.lease else { return Err(post::Refusal::NoLease) };
        if lease.hash != *lease_hash {
            return Err(post::Refusal::OtherLease);
        }
        let newest = post::Newest {
            lease_hash: lease.hash.0,
            keyset_version: self.keyset.version(),
            line: lease.line.to_string(),
            revision: self.lines.get(&lease.line).map_or(lease.revision, |line| line.revision),
            now,
        };
        let is_newest = (lease.keyset_version, lease.revision) == (newest.keyset_version, newest.revision);
        if known.is_open || !is_newest {
            return Ok(Greeting { newest, opens: None });
        }
        let boot_key = known.boot_key;
        if let Err(error) = self.store.put_open(device, &StoredOpen { boot_key }) {
            tracing::warn!(%error, "a boot that was answered cannot be remembered");
            return Err(post::Refusal::Broken);
        }
        known.is_open = true;
        Ok(Greeting { newest, opens: Some((device.clone(), boot_key)) })
    }

    fn recall(&self, device: &DeviceId, boot_key: &[u8; 32], line: &Line) -> GatewayMemory {
        let known = self.devices.get(device);
        GatewayMemory {
            serial: known.map(|known| known.serial),
            issued_at: known.map(|known| known.issued_at),
            seq: known.filter(|known| known.boot_key == *boot_key).map(|known| known.seq),
            revision: self.lines.get(line).map(|known| known.revision),
        }
    }

    /// The addresses that the lease gives here, if they are free or this device's.
    fn addresses(&self, checked: &Checked, now: u64) -> Result<(Ipv4Addr, Ipv6Addr), AdmitError> {
        let id = self.own.gateway.id;
        let named = checked.lease.gateways.iter().find(|gateway| gateway.id == id);
        let (Some(named), Some(gateway)) = (named, checked.bundle.gateway(id)) else {
            return Err(LeaseError::NotNamed(id).into());
        };
        if gateway.key != self.own.public_key {
            return Err(AdmitError::OtherKey);
        }
        let (v4, v6) = (named.v4, named.v6);
        if v4 == self.own.v4 {
            return Err(AdmitError::OwnAddress(v4.into()));
        }
        if v6 == self.own.v6 {
            return Err(AdmitError::OwnAddress(v6.into()));
        }
        let others = self.devices.iter().filter(|(device, _)| **device != checked.lease.device);
        let leases = others.filter_map(|(_, known)| known.lease.as_ref());
        for lease in leases.filter(|lease| now < lease.not_after) {
            if lease.v4 == v4 {
                return Err(AdmitError::AddressTaken(v4.into()));
            }
            if lease.v6 == v6 {
                return Err(AdmitError::AddressTaken(v6.into()));
            }
        }
        Ok((v4, v6))
    }

    /// Writes down what the lease brought: keysets, a newer bundle, and last the lease itself. Says whether
    /// its boot was answered at the post already.
    fn remember(
        &mut self,
        checked: &Checked,
        untrusted: &Admit,
        known_lease: KnownLease,
    ) -> Result<bool, StoreError> {
        let mut newest = self.keyset.clone();
        for link in &untrusted.keysets {
            // The whole chain was followed before; each link is followed again to have its own envelope.
            if let Ok(next) = newest.follow(std::slice::from_ref(link))
                && next.version() > newest.version()
            {
                self.store.put_keyset(next.version(), next.envelope())?;
                newest = next;
            }
        }
        let Lease { device, line, revision, issued_at, boot_key, seq, .. } = &checked.lease;
        if self.lines.get(line).is_none_or(|known| known.revision < *revision || known.newest.is_none()) {
            let bundle = String::from_utf8_lossy(checked.verified_bundle.envelope()).into_owned();
            let hash = checked.bundle_hash;
            self.store.put_line(line, &StoredLine { revision: *revision, hash, bundle })?;
            let newest = Some(Newest::of(&checked.bundle));
            self.lines.insert(line.clone(), KnownLine { revision: *revision, hash, newest });
        }
        let admit = Admit { keysets: Vec::new(), ..untrusted.clone() };
        let serial = checked.device.serial;
        let stored = StoredDevice { serial, issued_at: *issued_at, boot_key: *boot_key, seq: *seq, admit };
        self.store.put_device(device, &stored)?;
        let earlier = self.devices.get(device).filter(|known| known.boot_key == *boot_key);
        let is_open = earlier.is_some_and(|known| known.is_open);
        let known = Known { is_open, lease: Some(known_lease), ..Known::new(&stored) };
        self.devices.insert(device.clone(), known);
        Ok(is_open)
    }

    /// Verifies all that is remembered under a newer keyset, and gives the devices that fail.
    fn review(&mut self, now: u64) -> Result<Vec<DeviceId>, StoreError> {
        // All is read before anything changes.
        let (lines, devices) = (self.store.lines()?, self.store.devices()?);
        for (line, stored) in lines {
            let newest = self.restore_line(&stored).ok();
            if let Some(known) = self.lines.get_mut(&line) {
                known.newest = newest;
            }
        }
        let mut removed = Vec::new();
        for (device, stored) in devices {
            if self.restore_device(&stored).is_err()
                && let Some(known) = self.devices.get_mut(&device)
                && known.lease.take().is_some_and(|lease| now < lease.not_after)
            {
                removed.push(device);
            }
        }
        Ok(removed)
    }

    fn restore_line(&self, stored: &StoredLine) -> Result<Newest, RestoreError> {
        let verified = self.keyset.verify::<BundleKind>(stored.bundle.as_bytes())?;
        Ok(Newest::of(&Bundle::parse(&verified)?))
    }

    /// Whether a stored lease would still be believed, apart from its time.
    fn restore_device(&self, stored: &StoredDevice) -> Result<(KnownLease, Admission), RestoreError> {
        let admit = &stored.admit;
        Device::parse(&self.keyset.verify::<DeviceKind>(&admit.device)?)?;
        let verified = self.keyset.verify::<LeaseKind>(&admit.lease)?;
        let lease = Lease::parse(&verified)?;
        let bundle = Bundle::parse(&self.keyset.verify::<BundleKind>(&admit.bundle)?)?;
        let own = &self.own.gateway;
        let named = lease.gateways.iter().find(|gateway| gateway.id == own.id);
        let named = named
            .filter(|named| own.pool_v4.contains(&named.v4) && own.pool_v6.contains(&named.v6))
            .filter(|named| named.v4 != self.own.v4 && named.v6 != self.own.v6)
            .ok_or(RestoreError::Addresses)?;
        let known = KnownLease::new(&lease, verified.hash(), named.v4, named.v6);
        Ok((known, self.admission(&lease, named.v4, named.v6, Arc::new(Table::new(&bundle.access)))))
    }

    fn admission(&self, lease: &Lease, v4: Ipv4Addr, v6: Ipv6Addr, table: Arc<Table>) -> Admission {
        let newest = self.lines.get(&lease.line).and_then(|known| known.newest.clone());
        // One table, not two equal ones, where the lease is on the newest revision.
        let newest =
            newest.unwrap_or(Newest { revision: lease.revision, table: Arc::clone(&table), apply_s: 0 });
        let table = if newest.revision == lease.revision { Arc::clone(&newest.table) } else { table };
        Admission {
            device: lease.device.clone(),
            boot_key: lease.boot_key,
            v4,
            v6,
            not_after: lease.not_after,
            line: lease.line.clone(),
            revision: lease.revision,
            table,
            newest,
            is_open: false,
        }
    }
}

impl Newest {
    fn of(bundle: &Bundle) -> Self {
        Self {
            revision: bundle.revision,
            table: Arc::new(Table::new(&bundle.access)),
            apply_s: bundle.apply_s,
        }
    }
}

impl Known {
    /// What must be surpassed; nothing else yet.
    fn new(stored: &StoredDevice) -> Self {
        let StoredDevice { serial, issued_at, boot_key, seq, .. } = *stored;
        Self { serial, issued_at, boot_key, seq, is_open: false, lease: None }
    }
}

impl KnownLease {
    fn new(lease: &Lease, hash: Digest, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        let Lease { not_after, revision, keyset_version, .. } = *lease;
        Self { hash, v4, v6, not_after, line: lease.line.clone(), revision, keyset_version }
    }

    fn admits(&self, from: IpAddr, now: u64) -> bool {
        let own = match from {
            IpAddr::V4(address) => address == self.v4,
            IpAddr::V6(address) => address == self.v6,
        };
        own && now < self.not_after
    }
}

#[cfg(test)]
mod tests {
    use kontor_bundle::{Destination, Protocol};
    use tempfile::TempDir;

    use super::*;
    use crate::fixture::{Boot, GATEWAY, Tenant, lease_hash};

    const NOW: u64 = 1_000_000;
    const OWN_KEY: [u8; 32] = [9; 32];

    struct World {
        tenant: Tenant,
        dir: TempDir,
    }

    fn identity() -> Identity {
        let pool_v4 = "10.9.0.0/16".parse().unwrap();
        let pool_v6 = "fd09::/64".parse().unwrap();
        Identity {
            gateway: OwnGateway { id: GATEWAY, pool_v4, pool_v6 },
            public_key: OWN_KEY,
            v4: "10.9.0.2".parse().unwrap(),
            v6: "fd09::2".parse().unwrap(),
        }
    }

    fn boot(device: &'static str, address: u8) -> Boot {
        Boot {
            device,
            serial: 1,
            boot_key: [address; 32],
            seq: 0,
            v4: Ipv4Addr::new(10, 9, 1, address),
            v6: Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 1, u16::from(address)),
            gateway: GATEWAY,
            issued_at: NOW,
            life_s: 600,
        }
    }

    impl World {
        fn new() -> Self {
            Self { tenant: Tenant::new(), dir: tempfile::tempdir().unwrap() }
        }

        fn open(&self, now: u64) -> Result<(Office, Vec<Admission>), OpenError> {
            let store = Store::open(self.dir.path())?;
            Office::open(identity(), &self.tenant.keysets[0], &self.tenant.id, store, now)
        }

        fn office(&self) -> Office {
            self.open(NOW).unwrap().0
        }

        fn bundle(&self, revision: u64) -> Bundle {
            self.tenant.bundle(revision, OWN_KEY, Vec::new())
        }

        fn admit(&self, office: &mut Office, boot: &Boot, revision: u64) -> Result<Outcome, AdmitError> {
            office.admit(&self.tenant.admit(boot, &self.bundle(revision)), boot.issued_at)
        }
    }

    #[test]
    fn good_lease_is_admitted_with_its_addresses_and_its_end() {
        let world = World::new();
        let outcome = world.admit(&mut world.office(), &boot("pc", 7), 1).unwrap();
        let Admission { device, boot_key, v4, not_after, revision, table, newest, .. } = outcome.admission;
        assert_eq!((device.as_str(), boot_key, v4), ("pc", [7; 32], Ipv4Addr::new(10, 9, 1, 7)));
        assert_eq!((not_after, revision, newest.revision), (NOW + 600, 1, 1));
        assert!(Arc::ptr_eq(&table, &newest.table));
        assert!(outcome.removed.is_empty());
    }

    #[test]
    fn repeated_lease_is_refused_also_after_a_restart() {
        let world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        let again = world.admit(&mut office, &boot("pc", 7), 1).unwrap_err();
        assert!(matches!(again, AdmitError::Lease(LeaseError::OldIssue { .. })), "{again}");
        let again = world.admit(&mut world.office(), &boot("pc", 7), 1).unwrap_err();
        assert!(matches!(again, AdmitError::Lease(LeaseError::OldIssue { .. })), "{again}");
    }

    #[test]
    fn memory_of_serial_challenge_and_revision_survives_a_restart() {
        let world = World::new();
        let first = Boot { serial: 3, seq: 5, ..boot("pc", 7) };
        world.admit(&mut world.office(), &first, 4).unwrap();
        let later = Boot { issued_at: NOW + 1, ..first.clone() };
        let mut office = world.office();
        let refused = |office: &mut Office, boot: &Boot, revision| {
            let refused = world.admit(office, boot, revision).unwrap_err();
            let AdmitError::Lease(error) = refused else { panic!("{refused}") };
            error
        };
        let old_serial = refused(&mut office, &Boot { serial: 2, seq: 6, ..later.clone() }, 4);
        assert!(matches!(old_serial, LeaseError::OldSerial { record: 2, known: 3 }));
        let old_seq = refused(&mut office, &later, 4);
        assert!(matches!(old_seq, LeaseError::OldSeq { lease: 5, known: 5 }));
        let old_revision = refused(&mut office, &Boot { seq: 6, ..later.clone() }, 3);
        assert!(matches!(old_revision, LeaseError::OldRevision { lease: 3, known: 4 }));
        let other_boot = Boot { seq: 0, boot_key: [8; 32], ..later };
        assert!(world.admit(&mut office, &other_boot, 4).is_ok());
    }

    #[test]
    fn leases_that_still_run_are_found_after_a_restart_and_no_others() {
        let world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        world.admit(&mut office, &Boot { life_s: 10, ..boot("laptop", 8) }, 1).unwrap();
        let (_, admissions) = world.open(NOW + 9).unwrap();
        assert_eq!(admissions.len(), 2);
        let (_, admissions) = world.open(NOW + 10).unwrap();
        let devices: Vec<_> = admissions.iter().map(|admission| admission.device.as_str()).collect();
        assert_eq!(devices, ["pc"]);
        assert_eq!(admissions[0].not_after, NOW + 600);
        assert!(world.open(NOW + 600).unwrap().1.is_empty());
    }

    #[test]
    fn address_of_a_running_lease_is_another_devices_only_when_that_has_ended() {
        let world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        let thief = Boot { device: "laptop", boot_key: [8; 32], ..boot("pc", 7) };
        let refused = world.admit(&mut office, &thief, 1).unwrap_err();
        assert!(matches!(refused, AdmitError::AddressTaken(IpAddr::V4(_))), "{refused}");
        let thief = Boot { v4: boot("laptop", 8).v4, ..thief };
        let refused = world.admit(&mut world.office(), &thief, 1).unwrap_err();
        assert!(matches!(refused, AdmitError::AddressTaken(IpAddr::V6(_))), "{refused}");
        let heir = Boot { issued_at: NOW + 600, ..thief };
        assert!(world.admit(&mut office, &heir, 1).is_ok());
    }

    #[test]
    fn gateways_own_address_is_no_peers() {
        let world = World::new();
        let Identity { v4, v6, .. } = identity();
        for boot in [Boot { v4, ..boot("pc", 7) }, Boot { v6, ..boot("pc", 7) }] {
            let refused = world.admit(&mut world.office(), &boot, 1).unwrap_err();
            assert!(matches!(refused, AdmitError::OwnAddress(_)), "{refused}");
        }
    }

    #[test]
    fn bundle_that_gives_this_gateway_another_key_is_refused() {
        let world = World::new();
        let bundle = world.tenant.bundle(1, [8; 32], Vec::new());
        let admit = world.tenant.admit(&boot("pc", 7), &bundle);
        assert!(matches!(world.office().admit(&admit, NOW), Err(AdmitError::OtherKey)));
    }

    #[test]
    fn refused_lease_leaves_no_trace() {
        let world = World::new();
        let mut office = world.office();
        let bundle = world.tenant.bundle(9, [8; 32], Vec::new());
        let admit = world.tenant.admit(&Boot { serial: 9, ..boot("pc", 7) }, &bundle);
        assert!(office.admit(&admit, NOW).is_err());
        assert!(world.admit(&mut office, &boot("pc", 7), 1).is_ok());
    }

    #[test]
    fn two_bundles_of_one_revision_are_a_fork() {
        let world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        let destination =
            Destination { to: "10.0.0.0/8".parse().unwrap(), protocol: Protocol::Any, ports: None };
        let other = world.tenant.bundle(1, OWN_KEY, vec![destination]);
        for mut office in [office, world.office()] {
            let admit = world.tenant.admit(&boot("laptop", 8), &other);
            let refused = office.admit(&admit, NOW).unwrap_err();
            assert!(matches!(refused, AdmitError::Fork { revision: 1, .. }), "{refused}");
        }
    }

    #[test]
    fn newest_bundle_of_a_line_goes_with_older_leases_after_a_restart() {
        let world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        world.admit(&mut office, &boot("laptop", 8), 2).unwrap();
        let (_, admissions) = world.open(NOW).unwrap();
        let revisions: Vec<_> =
            admissions.iter().map(|admission| (admission.revision, admission.newest.revision)).collect();
        assert_eq!(revisions, [(2, 2), (1, 2)]);
    }

    #[test]
    fn newer_keyset_removes_what_its_roles_no_longer_bear_out() {
        let mut world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        world.tenant.add_keyset();
        let outcome = world.admit(&mut office, &boot("laptop", 8), 1).unwrap();
        assert!(outcome.removed.is_empty());
        let stolen = world.tenant.admit(&Boot { issued_at: NOW + 1, ..boot("pc", 7) }, &world.bundle(1));
        world.tenant.replace_lease_key();
        let outcome = world.admit(&mut office, &boot("desk", 9), 1).unwrap();
        let removed: Vec<_> = outcome.removed.iter().map(DeviceId::as_str).collect();
        assert_eq!(removed, ["laptop", "pc"]);
        for mut office in [office, world.office()] {
            let refused = office.admit(&stolen, NOW + 1).unwrap_err();
            assert!(matches!(refused, AdmitError::Lease(LeaseError::Envelope { .. })), "{refused}");
        }
        let (_, admissions) = world.open(NOW).unwrap();
        let devices: Vec<_> = admissions.iter().map(|admission| admission.device.as_str()).collect();
        assert_eq!(devices, ["desk"]);
    }

    #[test]
    fn review_that_could_not_read_is_due_until_it_could() {
        let mut world = World::new();
        let mut office = world.office();
        world.admit(&mut office, &boot("pc", 7), 1).unwrap();
        world.tenant.replace_lease_key();
        let obstacle = world.dir.path().join("lines/unknown line.json");
        std::fs::write(&obstacle, "{}").unwrap();
        let outcome = world.admit(&mut office, &boot("desk", 9), 1).unwrap();
        assert!(outcome.review_due && outcome.removed.is_empty());
        assert!(matches!(office.review_if_due(NOW), Err(StoreError::Name(_))));
        std::fs::remove_file(obstacle).unwrap();
        let removed = office.review_if_due(NOW).unwrap();
        assert_eq!(removed.iter().map(DeviceId::as_str).collect::<Vec<_>>(), ["pc"]);
        assert!(office.review_if_due(NOW).unwrap().is_empty());
        assert!(!world.admit(&mut office, &boot("laptop", 8), 1).unwrap().review_due);
    }

    #[test]
    fn each_keyset_of_a_chain_is_remembered() {
        let mut world = World::new();
        world.tenant.add_keyset();
        world.tenant.add_keyset();
        world.admit(&mut world.office(), &boot("pc", 7), 1).unwrap();
        assert_eq!(world.office().keyset.version(), 3);
    }

    fn hash(world: &World, boot: &Boot, revision: u64) -> Digest {
        Digest(lease_hash(&world.tenant.admit(boot, &world.bundle(revision))))
    }

    #[test]
    fn hello_with_the_lease_opens_the_boot_once_also_across_a_restart_and_a_renewal() {
        let world = World::new();
        let mut office = world.office();
        let first = boot("pc", 7);
        assert!(!world.admit(&mut office, &first, 1).unwrap().admission.is_open);
        let known = hash(&world, &first, 1);
        for from in [IpAddr::V4(first.v4), IpAddr::V6(first.v6)] {
            let mut office = world.office();
            let greeting = office.greet(from, &known, NOW + 5).unwrap();
            assert_eq!(
                greeting.newest,
                post::Newest {
                    lease_hash: known.0,
                    keyset_version: 1,
                    line: "sales".into(),
                    revision: 1,
                    now: NOW + 5
                }
            );
        }
        // The first of them opened it, and that is known after a restart.
        let (mut office, admissions) = world.open(NOW).unwrap();
        assert!(admissions[0].is_open);
        assert_eq!(office.greet(first.v4.into(), &known, NOW).unwrap().opens, None);
        let renewed = Boot { seq: 1, issued_at: NOW + 1, ..first.clone() };
        assert!(world.admit(&mut office, &renewed, 1).unwrap().admission.is_open);
        assert_eq!(office.greet(first.v4.into(), &known, NOW + 1), Err(post::Refusal::OtherLease));
        assert!(office.greet(first.v4.into(), &hash(&world, &renewed, 1), NOW + 1).is_ok());
        // Another boot of the device begins shut.
        let next = Boot { boot_key: [8; 32], issued_at: NOW + 2, ..first };
        assert!(!world.admit(&mut office, &next, 1).unwrap().admission.is_open);
        let greeting = office.greet(next.v4.into(), &hash(&world, &next, 1), NOW + 2).unwrap();
        assert_eq!(greeting.opens, Some(("pc".parse().unwrap(), [8; 32])));
    }

    #[test]
    fn hello_of_nobody_or_with_another_lease_or_after_the_end_is_refused() {
        let world = World::new();
        let mut office = world.office();
        let first = boot("pc", 7);
        world.admit(&mut office, &first, 1).unwrap();
        let known = hash(&world, &first, 1);
        let neighbour = boot("laptop", 8).v4.into();
        assert_eq!(office.greet(neighbour, &known, NOW), Err(post::Refusal::NoLease));
        assert_eq!(office.greet(first.v4.into(), &Digest([1; 32]), NOW), Err(post::Refusal::OtherLease));
        assert!(office.greet(first.v4.into(), &known, NOW + 599).is_ok());
        assert_eq!(office.greet(first.v4.into(), &known, NOW + 600), Err(post::Refusal::NoLease));
    }

    #[test]
    fn lease_below_the_newest_revision_or_keyset_is_told_so_and_not_opened() {
        let mut world = World::new();
        let mut office = world.office();
        let first = boot("pc", 7);
        world.admit(&mut office, &first, 1).unwrap();
        let known = hash(&world, &first, 1);
        world.admit(&mut office, &boot("laptop", 8), 2).unwrap();
        let greeting = office.greet(first.v4.into(), &known, NOW).unwrap();
        assert_eq!((greeting.newest.revision, greeting.opens), (2, None));

        let mut office = world.office();
        let next = Boot { issued_at: NOW + 1, seq: 1, ..first };
        world.admit(&mut office, &next, 2).unwrap();
        let known = hash(&world, &next, 2);
        world.tenant.add_keyset();
        world.admit(&mut office, &boot("desk", 9), 2).unwrap();
        let greeting = office.greet(next.v4.into(), &known, NOW + 1).unwrap();
        assert_eq!((greeting.newest.keyset_version, greeting.opens), (2, None));
    }

    #[test]
    fn first_keyset_of_another_tenant_opens_nothing() {
        let world = World::new();
        let store = Store::open(world.dir.path()).unwrap();
        let other = Tenant::new();
        let opened = Office::open(identity(), &other.keysets[0], &world.tenant.id, store, NOW);
        assert!(matches!(opened, Err(OpenError::First(_))));
    }
}
