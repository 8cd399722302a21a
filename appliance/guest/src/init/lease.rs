//! The guest's part of the lease (`lease.md` 6, 17, 18): a boot key and a nonce that exist only here, a
//! question, and the check of the answer.
//!
//! ```text
//! BootKey ──challenge──► Fresh ──verify (consumes it)──► Granted ─┐
//! BootSecret ────────────────────────────────────────────────────┴──► Configure for the tunnel
//! ```
//!
//! A renewal (`lease.md` 21) asks again with the same key and the next number; that is why the key
//! counts its challenges, and why the answer to one challenge can never pass for the answer to another.

use crate::clock::Moment;
use crate::link::Configure;
use kontor_bundle::lease::{Asked, Checked, LeaseError, MAX_WAIT_S, Parts, for_guest};
use kontor_trust::{Digest, TrustedKeyset};
use kontor_wire::control::{Challenge, LeaseParts};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// How often the tunnel shows that it is alive, in seconds: as WireGuard advises behind address
/// translation.
const KEEPALIVE_S: u16 = 25;

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
    ends: Moment,
}

impl BootKey {
    /// A new pair; waits until the kernel's generator is seeded.
    pub(crate) fn generate() -> io::Result<(Self, BootSecret)> {
        let secret = StaticSecret::from(*Zeroizing::new(random()?));
        let public = PublicKey::from(&secret).to_bytes();
        Ok((Self { public, next_seq: 0 }, BootSecret(secret)))
    }

    /// Asks for a lease of the image with this root hash; `floor` is the newest keyset in it.
    pub(crate) fn challenge(
        &mut self,
        verity_root: Digest,
        floor: &TrustedKeyset,
    ) -> io::Result<(Challenge, Fresh)> {
        let (nonce, boot_key, seq) = (random()?, self.public, self.next_seq);
        self.next_seq += 1;
        let keyset_version = floor.version();
        let challenge = Challenge { nonce, boot_key, seq, verity_root: verity_root.0, keyset_version };
        let asked = Asked { nonce, boot_key, seq, verity_root };
        Ok((challenge, Fresh { asked, asked_at: Moment::now() }))
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
        Ok(Granted { checked, ends })
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

    /// The inner addresses at the primary gateway, which is the first that the lease names.
    pub(crate) fn addresses(&self) -> Option<(Ipv4Addr, Ipv6Addr)> {
        self.checked.lease.gateways.first().map(|gateway| (gateway.v4, gateway.v6))
    }

    /// What the tunnel is told: the gateway's key from the bundle, and this boot's own. The secret is
    /// given away and exists in this process no more once the result is dropped.
    pub(crate) fn configure(&self, secret: BootSecret) -> Option<Configure> {
        let own = self.checked.lease.gateways.first()?;
        let gateway = self.checked.bundle.gateways.iter().find(|gateway| gateway.id == own.id)?;
        Some(Configure {
            private_key: secret.0.to_bytes(),
            gateway: gateway.id,
            gateway_key: gateway.key,
            v4: own.v4,
            v6: own.v6,
            keepalive_s: KEEPALIVE_S,
        })
    }
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
mod tests {
    use super::*;
    use crate::init::fixture::{GATEWAY, GATEWAY_KEY, ISSUED_AT, LIFE_S, Office, V4, V6};

    const ROOT: Digest = Digest([3; 32]);

    fn asked(office: &Office) -> (BootSecret, Challenge, Fresh) {
        let (mut key, secret) = BootKey::generate().unwrap();
        let (challenge, fresh) = key.challenge(ROOT, &office.floor()).unwrap();
        (secret, challenge, fresh)
    }

    #[test]
    fn answer_to_the_challenge_configures_the_tunnel() {
        let office = Office::new();
        let (secret, challenge, fresh) = asked(&office);
        let granted = fresh.verify(office.answer(&challenge), &office.floor(), ISSUED_AT).unwrap();
        assert_eq!(granted.addresses(), Some((V4, V6)));
        let configure = granted.configure(secret).unwrap();
        assert_eq!((configure.gateway, configure.gateway_key), (GATEWAY, GATEWAY_KEY));
        assert_eq!((configure.v4, configure.v6), (V4, V6));
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
        let (first, _) = key.challenge(ROOT, &office.floor()).unwrap();
        let (second, fresh) = key.challenge(ROOT, &office.floor()).unwrap();
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

    #[test]
    fn lease_of_another_office_is_refused() {
        let (office, other) = (Office::new(), Office::new());
        let (_, challenge, fresh) = asked(&office);
        let foreign = fresh.verify(other.answer(&challenge), &office.floor(), ISSUED_AT);
        assert!(matches!(foreign, Err(LeaseError::Envelope { .. })));
    }
}
