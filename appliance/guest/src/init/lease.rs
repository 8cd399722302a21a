//! The guest's part of the lease (`lease.md` 6, 17, 18): a boot key and a nonce that exist only here, a
//! question, and the check of the answer; then (19) whether the gateway knows anything newer.
//!
//! ```text
//! BootKey ──challenge──► Fresh ──verify (consumes it)──► Granted ─┐
//! BootSecret ────────────────────────────────────────────────────┴──► Configure for the tunnel
//! ```
//!
//! A renewal (`lease.md` 21) asks again with the same key and the next number; that is why the key
//! counts its challenges, and why the answer to one challenge can never pass for the answer to another.

use crate::clock::Moment;
use crate::link::{Configure, Way};
use kontor_bundle::Gateway;
use kontor_bundle::lease::{Asked, Checked, LeaseError, MAX_WAIT_S, Parts, for_guest};
use kontor_trust::{Digest, LeaseGateway, TrustedKeyset};
use kontor_wire::control::{Challenge, LeaseParts};
use kontor_wire::post::Newest;
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// How often the tunnel shows that it is alive, in seconds: as WireGuard advises behind address
/// translation.
const KEEPALIVE_S: u16 = 25;

/// How far the gateway's clock may be from the guest's, in seconds.
const CLOCK_MAX_S: u64 = 120;

/// The public key of this boot's tunnel and the number of the next challenge for it.
#[derive(Debug)]
pub(crate) struct BootKey {
    public: [u8; 32],
    next_seq: u64,
}

/// The private key to it, until the tunnel has it.
pub(crate) struct BootSecret(StaticSecret);

/// One open challenge. It is used up by the first answer, good or bad.
#[derive(Debug)]
pub(crate) struct Fresh {
    asked: Asked,
    asked_at: Moment,
}

/// A lease that is this boot's, and until when it lasts by the guest's own clock.
#[derive(Debug)]
pub(crate) struct Granted {
    checked: Checked,
    /// The gateway that is used, one that the lease names; before there is a session, the first.
    gateway: Option<u8>,
    asked_at: Moment,
    ends: Moment,
}

/// What the gateway knows otherwise than the lease says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stale {
    #[error("the gateway admits another lease")]
    Lease,
    #[error("the lease is under keyset {lease}, the gateway knows {gateway}")]
    Keyset { lease: u64, gateway: u64 },
    #[error("the lease is for another line than the gateway knows")]
    Line,
    #[error("the lease is on revision {lease}, the gateway knows {gateway}")]
    Revision { lease: u64, gateway: u64 },
    #[error("the gateway's clock is {0} s away")]
    Clock(u64),
}

/// Why a lease does not take the place of the one before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewError {
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error("the renewed lease is on an older keyset or revision than the one before")]
    Older,
    #[error("the renewed lease is for another gateway or address, which takes a new start")]
    Moved,
}

impl BootKey {
    /// A new pair; waits until the kernel's generator is seeded.
    pub(crate) fn generate() -> io::Result<(Self, BootSecret)> {
        let secret = StaticSecret::from(*Zeroizing::new(random()?));
        let public = PublicKey::from(&secret).to_bytes();
        Ok((Self { public, next_seq: 0 }, BootSecret(secret)))
    }

    /// Asks at `now` for a lease of the image with this root hash; `floor` is the newest keyset in it.
    pub(crate) fn challenge(
        &mut self,
        verity_root: Digest,
        floor: &TrustedKeyset,
        now: Moment,
    ) -> io::Result<(Challenge, Fresh)> {
        let (nonce, boot_key, seq) = (random()?, self.public, self.next_seq);
        self.next_seq += 1;
        let keyset_version = floor.version();
        let challenge = Challenge { nonce, boot_key, seq, verity_root: verity_root.0, keyset_version };
        let asked = Asked { nonce, boot_key, seq, verity_root };
        Ok((challenge, Fresh { asked, asked_at: now }))
    }
}

impl Fresh {
    /// When an answer comes too late.
    pub(crate) fn until(&self) -> Moment {
        self.asked_at.after(Duration::from_secs(MAX_WAIT_S))
    }

    /// Checks the answer. `built_at` is the Unix time of the image's build.
    pub(crate) fn verify(
        self,
        untrusted: LeaseParts,
        floor: &TrustedKeyset,
        built_at: u64,
    ) -> Result<Granted, LeaseError> {
        let LeaseParts { keysets, device, bundle, lease } = untrusted;
        let untrusted = Parts { keysets, device, bundle, lease };
        let checked = for_guest(floor, &untrusted, &self.asked, built_at)?;
        let ends = self.asked_at.after(Duration::from_secs(checked.life_s()));
        let gateway = checked.lease.gateways.first().map(|gateway| gateway.id);
        Ok(Granted { checked, gateway, asked_at: self.asked_at, ends })
    }
}

impl Granted {
    /// What was verified.
    pub(crate) fn checked(&self) -> &Checked {
        &self.checked
    }

    /// When the lease runs out: counted from the question, so never later than for the gateway.
    pub(crate) fn ends(&self) -> Moment {
        self.ends
    }

    /// When it was asked for.
    pub(crate) fn asked_at(&self) -> Moment {
        self.asked_at
    }

    /// How long it lasts.
    pub(crate) fn life(&self) -> Duration {
        Duration::from_secs(self.checked.life_s())
    }

    /// How long the gateway may be silent.
    pub(crate) fn silence(&self) -> Duration {
        Duration::from_secs(self.checked.bundle.silence_s)
    }

    /// How long after its end the power goes off.
    pub(crate) fn lapse_off(&self) -> Duration {
        Duration::from_secs(self.checked.bundle.lapse_off_s)
    }

    /// The same with the gateway that the session is with.
    pub(crate) fn via(self, gateway: u8) -> Self {
        Self { gateway: Some(gateway), ..self }
    }

    /// The same through the gateway of `before`, where it can take the place of that without a new start and
    /// brings nothing old back.
    pub(crate) fn follow(self, before: &Self) -> Result<Self, RenewError> {
        let (lease, old) = (&self.checked.lease, &before.checked.lease);
        if (lease.keyset_version, lease.revision) < (old.keyset_version, old.revision)
            || lease.revision < old.revision
        {
            return Err(RenewError::Older);
        }
        let way = |granted: &Self| {
            let (own, gateway) = granted.way()?;
            Some((own.clone(), gateway.key, gateway.v4))
        };
        let renewed = Self { gateway: before.gateway, ..self };
        let same = way(&renewed).is_some_and(|new| way(before) == Some(new));
        if same { Ok(renewed) } else { Err(RenewError::Moved) }
    }

    /// The gateway that is used: what the lease gives there, and what the bundle says of it.
    fn way(&self) -> Option<(&LeaseGateway, &Gateway)> {
        let own = self.checked.lease.gateways.iter().find(|own| Some(own.id) == self.gateway)?;
        self.checked.bundle.gateway(own.id).map(|gateway| (own, gateway))
    }

    /// Compares the lease at `now` with the newest that the gateway knows.
    pub(crate) fn compare(&self, newest: &Newest, now: Moment) -> Result<(), Stale> {
        let Checked { lease, lease_hash, .. } = &self.checked;
        let clock = lease.issued_at.saturating_add(now.since(self.asked_at).as_secs());
        if newest.lease_hash != lease_hash.0 {
            Err(Stale::Lease)
        } else if newest.keyset_version != lease.keyset_version {
            Err(Stale::Keyset { lease: lease.keyset_version, gateway: newest.keyset_version })
        } else if newest.line != lease.line.as_str() {
            Err(Stale::Line)
        } else if newest.revision != lease.revision {
            Err(Stale::Revision { lease: lease.revision, gateway: newest.revision })
        } else if newest.now.abs_diff(clock) > CLOCK_MAX_S {
            Err(Stale::Clock(newest.now.abs_diff(clock)))
        } else {
            Ok(())
        }
    }

    /// Where the gateway's post is: its own inner address, from the bundle.
    pub(crate) fn post(&self) -> Option<Ipv4Addr> {
        self.way().map(|(_, gateway)| gateway.v4)
    }

    /// The inner addresses at the gateway.
    pub(crate) fn addresses(&self) -> Option<(Ipv4Addr, Ipv6Addr)> {
        self.way().map(|(own, _)| (own.v4, own.v6))
    }

    /// What the tunnel is told: the keys of the lease's gateways from the bundle, and this boot's own. The
    /// secret is given away and exists in this process no more once the result is dropped.
    pub(crate) fn configure(&self, secret: BootSecret) -> Option<Configure> {
        let named = self.checked.lease.gateways.iter();
        let gateways: Vec<Way> = named
            .filter_map(|own| self.checked.bundle.gateway(own.id))
            .map(|gateway| Way { gateway: gateway.id, key: gateway.key })
            .collect();
        if gateways.is_empty() {
            return None;
        }
        Some(Configure { private_key: secret.0.to_bytes(), gateways, keepalive_s: KEEPALIVE_S })
    }
}

/// A number that nobody can guess, for jitter; the same one should the kernel refuse, which only makes guests
/// less different from each other.
pub(crate) fn jitter() -> u32 {
    random().map_or(0, |[a, b, c, d, ..]| u32::from_le_bytes([a, b, c, d]))
}

fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::init::fixture::{
        GATEWAY, GATEWAY_KEY, ISSUED_AT, LIFE_S, Office, SPARE, SPARE_KEY, SPARE_POST, SPARE_V4, V4, V6,
    };

    const ROOT: Digest = Digest([3; 32]);

    /// What a gateway says at `now` of a lease that is the newest.
    pub(crate) fn newest(granted: &Granted, now: Moment) -> Newest {
        let Checked { lease, lease_hash, .. } = granted.checked();
        Newest {
            lease_hash: lease_hash.0,
            keyset_version: lease.keyset_version,
            line: lease.line.to_string(),
            revision: lease.revision,
            now: lease.issued_at + now.since(granted.asked_at()).as_secs(),
        }
    }

    impl Granted {
        /// The same with another end.
        pub(crate) fn ending(self, ends: Moment) -> Self {
            Self { ends, ..self }
        }
    }

    fn asked(office: &Office) -> (BootSecret, Challenge, Fresh) {
        let (mut key, secret) = BootKey::generate().unwrap();
        let (challenge, fresh) = key.challenge(ROOT, &office.floor(), Moment::now()).unwrap();
        (secret, challenge, fresh)
    }

    #[test]
    fn answer_to_the_challenge_configures_the_tunnel() {
        let office = Office::new();
        let (secret, challenge, fresh) = asked(&office);
        let granted = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap();
        assert_eq!(granted.addresses(), Some((V4, V6)));
        let configure = granted.configure(secret).unwrap();
        assert_eq!(configure.gateways, [Way { gateway: GATEWAY, key: GATEWAY_KEY }]);
        let secret = StaticSecret::from(configure.private_key);
        assert_eq!(PublicKey::from(&secret).to_bytes(), challenge.boot_key);
    }

    #[test]
    fn lease_lasts_from_the_question_on() {
        let office = Office::new();
        let before = Moment::now();
        let (_, challenge, fresh) = asked(&office);
        let after = Moment::now();
        let granted = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap();
        let life = Duration::from_secs(LIFE_S);
        assert!(before.after(life) <= granted.ends() && granted.ends() <= after.after(life));
    }

    #[test]
    fn each_challenge_has_its_own_nonce_and_the_next_number_for_the_same_key() {
        let office = Office::new();
        let (mut key, _) = BootKey::generate().unwrap();
        let (first, _) = key.challenge(ROOT, &office.floor(), Moment::now()).unwrap();
        let (second, fresh) = key.challenge(ROOT, &office.floor(), Moment::now()).unwrap();
        assert_eq!((first.seq, second.seq), (0, 1));
        assert_eq!(first.boot_key, second.boot_key);
        assert_ne!(first.nonce, second.nonce);
        assert_eq!((second.verity_root, second.keyset_version), (ROOT.0, 1));
        let stale = fresh.verify(office.answer(&first), &office.floor(), ISSUED_AT);
        assert!(matches!(stale, Err(LeaseError::OtherNonce)));
    }

    #[test]
    fn two_boots_share_neither_key_nor_nonce() {
        let office = Office::new();
        let ((_, one, _), (_, other, _)) = (asked(&office), asked(&office));
        assert_ne!(one.boot_key, other.boot_key);
        assert_ne!(one.nonce, other.nonce);
    }

    #[test]
    fn answer_to_something_else_is_refused() {
        let office = Office::new();
        let refused = |change: fn(&mut kontor_trust::Lease)| {
            let (_, challenge, fresh) = asked(&office);
            fresh.verify(office.answer_with(&challenge, change), &office.floor(), ISSUED_AT).unwrap_err()
        };
        assert!(matches!(refused(|lease| lease.boot_key = [1; 32]), LeaseError::OtherBootKey));
        assert!(matches!(refused(|lease| lease.seq = 7), LeaseError::OtherSeq { .. }));
        assert!(matches!(refused(|lease| lease.verity_root = Digest([8; 32])), LeaseError::OtherRoot));
        assert!(matches!(refused(|lease| lease.not_after += 1), LeaseError::Life { .. }));
    }

    #[test]
    fn lease_older_than_the_image_is_refused() {
        let office = Office::new();
        let (_, challenge, fresh) = asked(&office);
        let old = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT + 1);
        assert!(matches!(old, Err(LeaseError::BeforeBuild { .. })));
    }

    fn granted(office: &Office) -> Granted {
        let (_, challenge, fresh) = asked(office);
        fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap()
    }

    #[test]
    fn each_difference_from_what_the_gateway_knows_is_stale() {
        let granted = granted(&Office::new());
        let now = granted.asked_at().after(Duration::from_secs(10));
        let newest = newest(&granted, now);
        assert_eq!(granted.compare(&newest, now), Ok(()));
        let stale = |change: &dyn Fn(&mut Newest)| {
            let mut changed = newest.clone();
            change(&mut changed);
            granted.compare(&changed, now)
        };
        assert_eq!(stale(&|newest| newest.lease_hash[0] ^= 1), Err(Stale::Lease));
        let keyset = |gateway| Err(Stale::Keyset { lease: 1, gateway });
        assert_eq!(stale(&|newest| newest.keyset_version = 2), keyset(2));
        assert_eq!(stale(&|newest| newest.keyset_version = 0), keyset(0));
        assert_eq!(stale(&|newest| newest.line = "other".into()), Err(Stale::Line));
        assert_eq!(stale(&|newest| newest.revision = 4), Err(Stale::Revision { lease: 3, gateway: 4 }));
        for sign in [1, -1] {
            let off =
                |by: i64| stale(&move |newest| newest.now = newest.now.saturating_add_signed(sign * by));
            assert_eq!(off(120), Ok(()));
            assert_eq!(off(121), Err(Stale::Clock(121)));
        }
    }

    #[test]
    fn renewal_to_another_place_or_back_in_time_does_not_follow() {
        let office = Office::new();
        let before = granted(&office);
        assert!(granted(&office).follow(&before).is_ok());
        let (_, challenge, fresh) = asked(&office);
        let answer = office.answer_with(&challenge, |lease| {
            lease.gateways[0].v4 = Ipv4Addr::new(10, 90, 0, 8);
        });
        let moved = fresh.verify(answer, &office.floor(), ISSUED_AT).unwrap();
        assert!(matches!(moved.follow(&before), Err(RenewError::Moved)));
        let (_, challenge, fresh) = asked(&office);
        let newer = fresh.verify(office.answer_on(4, &challenge), &office.floor(), ISSUED_AT).unwrap();
        let newer = newer.follow(&before).unwrap();
        assert!(matches!(before.follow(&newer), Err(RenewError::Older)));
    }

    #[test]
    fn lease_of_two_gateways_is_used_and_renewed_through_the_one_that_answered() {
        let office = Office::with_spare();
        let (secret, challenge, fresh) = asked(&office);
        let granted = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap();
        let configure = granted.configure(secret).unwrap();
        let ways = [(GATEWAY, GATEWAY_KEY), (SPARE, SPARE_KEY)];
        assert_eq!(configure.gateways, ways.map(|(gateway, key)| Way { gateway, key }));
        assert_eq!(granted.addresses(), Some((V4, V6)));
        let granted = granted.via(SPARE);
        assert_eq!(granted.addresses(), Some((SPARE_V4, V6)));
        assert_eq!(granted.post(), Some(SPARE_POST));
        // The renewed lease names the primary first, and is used through the spare all the same.
        let (_, challenge, fresh) = asked(&office);
        let renewed = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap();
        let renewed = renewed.follow(&granted).unwrap();
        assert_eq!(renewed.addresses(), Some((SPARE_V4, V6)));
        // One that does not name it is no way on, and none that a session was ever with is invented.
        let (_, challenge, fresh) = asked(&office);
        let answer = office.answer_with(&challenge, |lease| lease.gateways.truncate(1));
        let without = fresh.verify(answer, &office.floor(), ISSUED_AT).unwrap();
        assert!(matches!(without.follow(&renewed), Err(RenewError::Moved)));
        assert_eq!(renewed.via(77).addresses(), None);
    }

    #[test]
    fn lease_of_another_office_is_refused() {
        let (office, other) = (Office::new(), Office::new());
        let (_, challenge, fresh) = asked(&office);
        let foreign = fresh.verify(other.answer(&challenge), &office.floor(), ISSUED_AT);
        assert!(matches!(foreign, Err(LeaseError::Envelope { .. })));
    }
}
