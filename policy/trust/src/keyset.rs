//! The keyset: who may sign what, and how one version follows the last.
//!
//! ```text
//! tenant = H(keyset 1) ──► 1 ──► 2 ──► 3      keyset N is signed by k roots of N-1 and by k roots of N
//! ```
//!
//! A version says who its roots are, so version 1 vouches for itself; what makes it *this* tenant's is its
//! hash. For the same reason it cannot name its tenant, and every later one must.

use crate::{
    Digest, EnvelopeError, KeysetKind, Kind, PublicKey, RoleKind, Verified, dsse::Opened, names::Person,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Most keys of a role.
pub const MAX_MEMBERS: usize = 32;
/// Most pins of control's TLS key.
pub const MAX_CONTROL_SPKI: usize = 8;

/// One version of the list of who may sign what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keyset {
    /// SHA-256 of version 1's payload; absent in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<Digest>,
    /// From 1, rising by one.
    pub version: u64,
    /// Who may make the next version.
    pub root: Role,
    /// Who may sign documents.
    pub roles: Roles,
    /// SHA-256 of the public keys (`SubjectPublicKeyInfo`) that control's TLS may use.
    pub control_spki: Vec<Digest>,
}

/// The roles below the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roles {
    /// Signs bundles.
    pub policy: Role,
    /// Signs commands.
    pub command: Role,
    /// Signs commands that destroy data.
    pub destroy: Role,
    /// Signs device records.
    pub enrol: Role,
    /// Signs leases: control's own key, so it may be in no other role.
    pub lease: Role,
}

/// Some persons with their keys, and how many of the persons must sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    /// How many distinct persons must sign; at least 1.
    pub threshold: u32,
    /// The keys, at most [`MAX_MEMBERS`]; a person may have several.
    pub keys: Vec<Member>,
}

/// A key and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Who holds the key.
    pub person: Person,
    /// The key.
    pub key: PublicKey,
}

/// What makes a keyset unusable, whoever signed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysetFault {
    /// More than [`MAX_MEMBERS`] keys.
    #[error("role {role} has {keys} keys, the limit is {MAX_MEMBERS}")]
    TooManyKeys {
        /// Which role.
        role: &'static str,
        /// How many keys it has.
        keys: usize,
    },
    /// A threshold of 0, or one that the role's persons cannot reach.
    #[error("role {role} needs {threshold} of {persons} persons")]
    Threshold {
        /// Which role.
        role: &'static str,
        /// What it asks for.
        threshold: u32,
        /// How many distinct persons it has.
        persons: usize,
    },
    /// A key twice in one role.
    #[error("role {role} lists key {key} twice")]
    RepeatedKey {
        /// Which role.
        role: &'static str,
        /// The key.
        key: PublicKey,
    },
    /// One key under two names: one holder would count as two.
    #[error("key {0} is listed for two persons")]
    SharedKey(PublicKey),
    /// Control's key in another role: a stolen control would have that role's power.
    #[error("key {0} of role lease is in another role as well")]
    LeaseKeyElsewhere(PublicKey),
    /// More than [`MAX_CONTROL_SPKI`] pins.
    #[error("{0} pins of control's key, the limit is {MAX_CONTROL_SPKI}")]
    TooManyPins(usize),
}

/// Why a keyset is not believed.
#[derive(Debug, thiserror::Error)]
pub enum KeysetError {
    /// The envelope, or the signatures by its own roots.
    #[error("the keyset's envelope")]
    Envelope(#[source] EnvelopeError),
    /// The signatures by the roots of the version before.
    #[error("the roots of keyset {previous} do not vouch for the next")]
    Previous {
        /// The version before.
        previous: u64,
        /// What is wrong with the signatures.
        #[source]
        source: EnvelopeError,
    },
    /// Not the JSON of a keyset.
    #[error("the keyset does not parse")]
    Parse(#[source] serde_json::Error),
    /// It contradicts itself.
    #[error("the keyset is unusable")]
    Fault(#[source] KeysetFault),
    /// The first keyset is not the one that the tenant is named after.
    #[error("the first keyset hashes to {found}, the tenant is {expected}")]
    NotTheFirst {
        /// The tenant.
        expected: Digest,
        /// The hash of what came.
        found: Digest,
    },
    /// Not the next version.
    #[error("a keyset of version {found} came where {expected} is next")]
    Version {
        /// The version that is next.
        expected: u64,
        /// The version that came.
        found: u64,
    },
    /// A later keyset names another tenant or none, or the first one names any.
    #[error("the keyset is of another tenant")]
    Tenant,
    /// Two different keysets of the same version.
    #[error("there are two different keysets of version {0}")]
    Fork(u64),
}

impl Keyset {
    /// The bytes to be signed.
    ///
    /// # Panics
    /// Never: a keyset is made of text and numbers, which always serialize.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("text and numbers serialize")
    }

    /// Checks everything that can be wrong with a keyset by itself.
    ///
    /// # Errors
    /// The first [`KeysetFault`] found.
    pub fn check(&self) -> Result<(), KeysetFault> {
        if self.control_spki.len() > MAX_CONTROL_SPKI {
            return Err(KeysetFault::TooManyPins(self.control_spki.len()));
        }
        let mut holders = BTreeMap::new();
        for (name, role) in self.named_roles() {
            role.check(name)?;
            for member in &role.keys {
                if *holders.entry(member.key).or_insert(&member.person) != &member.person {
                    return Err(KeysetFault::SharedKey(member.key));
                }
            }
        }
        let others = self.named_roles().into_iter().filter(|(name, _)| *name != LEASE);
        let others: BTreeSet<_> = others.flat_map(|(_, role)| role.keys.iter().map(|m| m.key)).collect();
        match self.roles.lease.keys.iter().find(|member| others.contains(&member.key)) {
            Some(member) => Err(KeysetFault::LeaseKeyElsewhere(member.key)),
            None => Ok(()),
        }
    }

    fn named_roles(&self) -> [(&'static str, &Role); 6] {
        let Roles { policy, command, destroy, enrol, lease } = &self.roles;
        [
            ("root", &self.root),
            ("policy", policy),
            ("command", command),
            ("destroy", destroy),
            ("enrol", enrol),
            (LEASE, lease),
        ]
    }

    fn parse(payload: &[u8]) -> Result<Self, KeysetError> {
        let keyset: Self = serde_json::from_slice(payload).map_err(KeysetError::Parse)?;
        keyset.check().map_err(KeysetError::Fault)?;
        Ok(keyset)
    }
}

impl Role {
    fn check(&self, role: &'static str) -> Result<(), KeysetFault> {
        if self.keys.len() > MAX_MEMBERS {
            return Err(KeysetFault::TooManyKeys { role, keys: self.keys.len() });
        }
        let mut seen = BTreeSet::new();
        if let Some(member) = self.keys.iter().find(|member| !seen.insert(member.key)) {
            return Err(KeysetFault::RepeatedKey { role, key: member.key });
        }
        let persons = self.keys.iter().map(|m| &m.person).collect::<BTreeSet<_>>().len();
        let reachable = usize::try_from(self.threshold).is_ok_and(|threshold| threshold <= persons);
        if self.threshold == 0 || !reachable {
            return Err(KeysetFault::Threshold { role, threshold: self.threshold, persons });
        }
        Ok(())
    }

    fn holders(&self) -> impl Iterator<Item = (&Person, &PublicKey)> + Clone {
        self.keys.iter().map(|member| (&member.person, &member.key))
    }

    fn require<K: Kind>(&self, opened: &Opened<'_, K>) -> Result<(), EnvelopeError> {
        opened.require(self.holders(), self.threshold)
    }
}

/// A keyset whose chain from the tenant's first was checked.
#[derive(Debug, Clone)]
pub struct TrustedKeyset {
    tenant: Digest,
    keyset: Keyset,
    document: Verified<KeysetKind>,
}

impl TrustedKeyset {
    /// Version 1, which must be the keyset that `tenant` is the hash of.
    ///
    /// # Errors
    /// [`KeysetError`] says what is wrong with `untrusted`.
    pub fn first(untrusted: &[u8], tenant: &Digest) -> Result<Self, KeysetError> {
        let opened = Opened::<KeysetKind>::open(untrusted).map_err(KeysetError::Envelope)?;
        let found = Digest::of(&opened.payload);
        if found != *tenant {
            return Err(KeysetError::NotTheFirst { expected: *tenant, found });
        }
        let keyset = Keyset::parse(&opened.payload)?;
        if keyset.version != 1 {
            return Err(KeysetError::Version { expected: 1, found: keyset.version });
        }
        if keyset.tenant.is_some() {
            return Err(KeysetError::Tenant);
        }
        keyset.root.require(&opened).map_err(KeysetError::Envelope)?;
        Ok(Self { tenant: *tenant, keyset, document: Verified::vouch(opened) })
    }

    /// Version 1, taken for the first keyset of whatever tenant it founds. Only for those who hold the
    /// tenant's own files and have nothing to be pinned to; everybody else calls [`first`](Self::first).
    ///
    /// # Errors
    /// [`KeysetError`] says what is wrong with `untrusted`.
    pub fn dangerous_unpinned(untrusted: &[u8]) -> Result<Self, KeysetError> {
        let opened = Opened::<KeysetKind>::open(untrusted).map_err(KeysetError::Envelope)?;
        Self::first(untrusted, &Digest::of(&opened.payload))
    }

    /// The next version.
    ///
    /// # Errors
    /// [`KeysetError`] says what is wrong with `untrusted`.
    pub fn advance(&self, untrusted: &[u8]) -> Result<Self, KeysetError> {
        let opened = Opened::<KeysetKind>::open(untrusted).map_err(KeysetError::Envelope)?;
        self.follow_opened(opened)
    }

    /// Walks a chain of keysets in rising order. Those older than this one are passed over without a
    /// look at their signatures; one of the same version must be this one.
    ///
    /// # Errors
    /// [`KeysetError`] of the first link that is wrong.
    pub fn follow(&self, untrusted: &[Vec<u8>]) -> Result<Self, KeysetError> {
        let mut newest = self.clone();
        for link in untrusted {
            let opened = Opened::<KeysetKind>::open(link).map_err(KeysetError::Envelope)?;
            let version = version_of(&opened.payload)?;
            if version > newest.version() {
                newest = newest.follow_opened(opened)?;
            } else if version == newest.version() && Digest::of(&opened.payload) != newest.hash() {
                return Err(KeysetError::Fork(version));
            }
        }
        Ok(newest)
    }

    /// Checks a document of kind `K` against the role that signs such.
    ///
    /// # Errors
    /// [`EnvelopeError`] says what is wrong with `untrusted`.
    pub fn verify<K: RoleKind>(&self, untrusted: &[u8]) -> Result<Verified<K>, EnvelopeError> {
        let role = K::role(&self.keyset.roles);
        Opened::<K>::open(untrusted)?.verify(role.holders(), role.threshold)
    }

    /// The tenant: SHA-256 of the first keyset's payload.
    #[must_use]
    pub fn tenant(&self) -> Digest {
        self.tenant
    }

    /// This keyset's version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.keyset.version
    }

    /// What it says.
    #[must_use]
    pub fn keyset(&self) -> &Keyset {
        &self.keyset
    }

    /// SHA-256 of its payload.
    #[must_use]
    pub fn hash(&self) -> Digest {
        self.document.hash()
    }

    /// Its envelope as it was received, to be stored and forwarded.
    #[must_use]
    pub fn envelope(&self) -> &[u8] {
        self.document.envelope()
    }

    fn follow_opened(&self, opened: Opened<'_, KeysetKind>) -> Result<Self, KeysetError> {
        // The last roots' signatures come before anything that the payload says.
        let previous = self.version();
        self.keyset.root.require(&opened).map_err(|source| KeysetError::Previous { previous, source })?;
        let keyset = Keyset::parse(&opened.payload)?;
        if keyset.tenant != Some(self.tenant) {
            return Err(KeysetError::Tenant);
        }
        if previous.checked_add(1) != Some(keyset.version) {
            return Err(KeysetError::Version { expected: previous.saturating_add(1), found: keyset.version });
        }
        keyset.root.require(&opened).map_err(KeysetError::Envelope)?;
        Ok(Self { tenant: self.tenant, keyset, document: Verified::vouch(opened) })
    }
}

/// The version that a keyset claims, before any signature was checked: enough to pass over old links.
fn version_of(untrusted_payload: &[u8]) -> Result<u64, KeysetError> {
    let keyset: Keyset = serde_json::from_slice(untrusted_payload).map_err(KeysetError::Parse)?;
    Ok(keyset.version)
}

const LEASE: &str = "lease";
