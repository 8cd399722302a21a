//! A passed signature check, as a type.

use crate::{Digest, Kind, dsse::Opened};
use std::{fmt, marker::PhantomData};

/// A document of kind `K` whose signatures were checked. Only this crate's verifying functions make one.
pub struct Verified<K> {
    envelope: Vec<u8>,
    payload: Vec<u8>,
    hash: Digest,
    kind: PhantomData<fn() -> K>,
}

impl<K: Kind> Verified<K> {
    /// To be called once the signatures of `opened` were found good, and nowhere else.
    pub(crate) fn vouch(opened: Opened<'_, K>) -> Self {
        let hash = Digest::of(&opened.payload);
        Self { envelope: opened.envelope.to_vec(), payload: opened.payload, hash, kind: PhantomData }
    }
}

impl<K> Verified<K> {
    /// SHA-256 of the payload: the name by which other documents mean this one.
    #[must_use]
    pub fn hash(&self) -> Digest {
        self.hash
    }

    /// The envelope, byte for byte as it was received: what is stored and forwarded.
    #[must_use]
    pub fn envelope(&self) -> &[u8] {
        &self.envelope
    }

    /// The signed bytes.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }
}

impl<K> Clone for Verified<K> {
    fn clone(&self) -> Self {
        Self {
            envelope: self.envelope.clone(),
            payload: self.payload.clone(),
            hash: self.hash,
            kind: PhantomData,
        }
    }
}

impl<K: Kind> fmt::Debug for Verified<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verified<{}>({})", K::NAME, self.hash)
    }
}
