//! Ed25519 keys (RFC 8032), the secret half as PKCS#8 version 2 (RFC 5958, RFC 8410).
//!
//! A [`SecretKey`] is wiped from memory when it is dropped and has no `Debug`. The expanded key that
//! `ring` makes for the moment of one signature is `ring`'s, which does not wipe it.

use crate::{Digest, hex32};
use ring::{
    rand::SystemRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use zeroize::Zeroizing;

/// Bytes of a signature.
pub(crate) const SIGNATURE_BYTES: usize = 64;

/// Bytes of a `SubjectPublicKeyInfo`.
pub const SPKI_BYTES: usize = SPKI_HEAD.len() + 32;
/// The DER before the 32 bytes of the key: SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING }.
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// An Ed25519 public key; 64 lower-case hexadecimal digits in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

/// Text that is no public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no public key (64 lower-case hexadecimal digits)")]
pub struct PublicKeyError(String);

impl PublicKey {
    /// The name of this key in an envelope: the SHA-256 of its 32 bytes.
    #[must_use]
    pub fn id(&self) -> Digest {
        Digest::of(&self.0)
    }

    /// The key as X.509 and TLS write it (`SubjectPublicKeyInfo`, RFC 8410).
    #[must_use]
    pub fn spki(&self) -> [u8; SPKI_BYTES] {
        let mut der = [0; SPKI_BYTES];
        let (head, key) = der.split_at_mut(SPKI_HEAD.len());
        head.copy_from_slice(&SPKI_HEAD);
        key.copy_from_slice(&self.0);
        der
    }

    /// Reads what [`spki`](Self::spki) writes; `None` for anything else.
    #[must_use]
    pub fn from_spki(der: &[u8]) -> Option<Self> {
        der.strip_prefix(&SPKI_HEAD)?.try_into().ok().map(Self)
    }

    /// What a keyset pins control's TLS key by: the SHA-256 of its [`spki`](Self::spki).
    #[must_use]
    pub fn pin(&self) -> Digest {
        Digest::of(&self.spki())
    }

    /// Whether `signature` over `message` is by this key.
    pub(crate) fn signed(&self, message: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(message, signature).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = PublicKeyError;

    fn from_str(text: &str) -> Result<Self, PublicKeyError> {
        hex32::decode(text).map(Self).ok_or_else(|| PublicKeyError(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for PublicKey {
    type Error = PublicKeyError;

    fn try_from(text: String) -> Result<Self, PublicKeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

/// An Ed25519 secret key.
pub struct SecretKey {
    pkcs8: Zeroizing<Vec<u8>>,
    public: PublicKey,
}

/// Why there is no secret key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The operating system gave no randomness.
    #[error("the operating system gave no randomness for a key")]
    Random,
    /// The bytes are no Ed25519 key in PKCS#8 version 2, or its two halves do not belong together.
    #[error("this is no Ed25519 key in PKCS#8 version 2")]
    Pkcs8,
}

impl SecretKey {
    /// A new key from the operating system's randomness.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn generate() -> Result<Self, KeyError> {
        // `ring`'s own copy of the document is on its stack and is not wiped.
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| KeyError::Random)?;
        Self::from_pkcs8(document.as_ref())
    }

    /// Reads the DER of PKCS#8 version 2.
    ///
    /// # Errors
    /// [`KeyError::Pkcs8`].
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let pair = Ed25519KeyPair::from_pkcs8(der).map_err(|_| KeyError::Pkcs8)?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| KeyError::Pkcs8)?;
        Ok(Self { pkcs8: Zeroizing::new(der.to_vec()), public: PublicKey(public) })
    }

    /// The DER of PKCS#8 version 2, to be stored.
    #[must_use]
    pub fn to_pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let pair = Ed25519KeyPair::from_pkcs8(&self.pkcs8).expect("was read once before");
        pair.sign(message).as_ref().try_into().expect("Ed25519 signatures have 64 bytes")
    }
}
