//! DSSE envelopes (`secure-systems-lab/dsse`, protocol version 1).
//!
//! ```text
//! envelope   {"payload": base64, "payloadType": text, "signatures": [{"keyid": hex, "sig": base64}, …]}
//! signed     "DSSEv1" SP len(type) SP type SP len(payload) SP payload        lengths in decimal ASCII
//! ```
//!
//! Narrower than the specification where that closes a door: base64 is the standard alphabet with
//! padding, a key id is required and is the SHA-256 of the public key, and a wrong signature by a key
//! that is known spoils the envelope instead of being passed over. Signatures by unknown keys are
//! passed over, because a keyset is signed by the roots of two generations.

use crate::{Digest, Kind, PublicKey, SecretKey, Verified, keys::SIGNATURE_BYTES};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, marker::PhantomData};

/// Most bytes of an envelope.
pub const MAX_ENVELOPE: usize = 64 * 1024;
/// Most signatures in an envelope.
pub const MAX_SIGNATURES: usize = 32;

/// Why an envelope is not believed.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// More than [`MAX_ENVELOPE`] bytes.
    #[error("the envelope has {0} bytes, the limit is {MAX_ENVELOPE}")]
    TooLarge(usize),
    /// Not the JSON of an envelope.
    #[error("this is no envelope")]
    Shape(#[source] serde_json::Error),
    /// Another kind of document.
    #[error("the envelope holds {found:?} where {expected:?} is expected")]
    Kind {
        /// The payload type that is expected.
        expected: &'static str,
        /// The payload type that it names.
        found: String,
    },
    /// More than [`MAX_SIGNATURES`] signatures.
    #[error("the envelope has {0} signatures, the limit is {MAX_SIGNATURES}")]
    TooManySignatures(usize),
    /// The payload is not base64.
    #[error("the envelope's payload is not base64")]
    Payload(#[source] base64::DecodeError),
    /// A signature is not the base64 of 64 bytes.
    #[error("the signature of key {0} is not the base64 of {SIGNATURE_BYTES} bytes")]
    SignatureShape(Digest),
    /// A key id appears twice.
    #[error("key {0} signs the envelope twice")]
    RepeatedKey(Digest),
    /// A key that is known did not make the signature that bears its name.
    #[error("the signature of key {0} is wrong")]
    WrongSignature(Digest),
    /// Too few persons of the role signed.
    #[error("{persons} persons of the role signed, {threshold} are needed")]
    BelowThreshold {
        /// How many distinct persons signed.
        persons: usize,
        /// How many are needed.
        threshold: u32,
    },
}

/// Makes an envelope of kind `K` around `payload`, signed by each of `keys`.
///
/// The payload's content and the size are not looked at; whoever signs should verify the result as its
/// readers will.
///
/// # Panics
/// Never: the envelope is made of text and numbers, which always serialize.
#[must_use]
pub fn sign<K: Kind>(payload: &[u8], keys: &[&SecretKey]) -> Vec<u8> {
    let message = pre_authentication(K::PAYLOAD_TYPE, payload);
    let signatures = keys
        .iter()
        .map(|key| Signature { keyid: key.public().id(), sig: STANDARD.encode(key.sign(&message)) })
        .collect();
    let envelope =
        Envelope { payload: STANDARD.encode(payload), payload_type: K::PAYLOAD_TYPE.to_owned(), signatures };
    serde_json::to_vec(&envelope).expect("text and numbers serialize")
}

/// An envelope of the right size, shape and kind whose signatures were not looked at yet.
pub(crate) struct Opened<'a, K> {
    pub(crate) envelope: &'a [u8],
    pub(crate) payload: Vec<u8>,
    message: Vec<u8>,
    signatures: Vec<(Digest, [u8; SIGNATURE_BYTES])>,
    kind: PhantomData<fn() -> K>,
}

impl<'a, K: Kind> Opened<'a, K> {
    /// Checks size, shape and kind, cheapest first.
    pub(crate) fn open(untrusted: &'a [u8]) -> Result<Self, EnvelopeError> {
        if untrusted.len() > MAX_ENVELOPE {
            return Err(EnvelopeError::TooLarge(untrusted.len()));
        }
        let envelope: Envelope = serde_json::from_slice(untrusted).map_err(EnvelopeError::Shape)?;
        if envelope.payload_type != K::PAYLOAD_TYPE {
            let found = envelope.payload_type.chars().take(80).collect();
            return Err(EnvelopeError::Kind { expected: K::PAYLOAD_TYPE, found });
        }
        if envelope.signatures.len() > MAX_SIGNATURES {
            return Err(EnvelopeError::TooManySignatures(envelope.signatures.len()));
        }
        let mut seen = BTreeSet::new();
        let mut signatures = Vec::with_capacity(envelope.signatures.len());
        for Signature { keyid, sig } in envelope.signatures {
            if !seen.insert(keyid) {
                return Err(EnvelopeError::RepeatedKey(keyid));
            }
            let bytes = STANDARD.decode(sig).ok().and_then(|bytes| bytes.try_into().ok());
            signatures.push((keyid, bytes.ok_or(EnvelopeError::SignatureShape(keyid))?));
        }
        let payload = STANDARD.decode(envelope.payload).map_err(EnvelopeError::Payload)?;
        let message = pre_authentication(K::PAYLOAD_TYPE, &payload);
        Ok(Self { envelope: untrusted, payload, message, signatures, kind: PhantomData })
    }

    /// Checks that `threshold` distinct holders among `known` keys signed. A holder may have several
    /// keys and still counts once.
    pub(crate) fn require<'k, H: Ord>(
        &self,
        known: impl Iterator<Item = (H, &'k PublicKey)> + Clone,
        threshold: u32,
    ) -> Result<(), EnvelopeError> {
        let mut persons = BTreeSet::new();
        for (keyid, signature) in &self.signatures {
            let Some((holder, key)) = known.clone().find(|(_, key)| key.id() == *keyid) else { continue };
            if !key.signed(&self.message, signature) {
                return Err(EnvelopeError::WrongSignature(*keyid));
            }
            persons.insert(holder);
        }
        let enough = u32::try_from(persons.len()).is_ok_and(|persons| persons >= threshold);
        // A threshold of zero would let an unsigned envelope through, whatever a keyset says.
        if enough && !persons.is_empty() {
            Ok(())
        } else {
            Err(EnvelopeError::BelowThreshold { persons: persons.len(), threshold })
        }
    }

    /// Turns the envelope into a [`Verified`] if [`require`](Self::require) is met.
    pub(crate) fn verify<'k, H: Ord>(
        self,
        known: impl Iterator<Item = (H, &'k PublicKey)> + Clone,
        threshold: u32,
    ) -> Result<Verified<K>, EnvelopeError> {
        self.require(known, threshold)?;
        Ok(Verified::vouch(self))
    }
}

/// The bytes under the signature: DSSE's pre-authentication encoding.
fn pre_authentication(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    payload: String,
    #[serde(rename = "payloadType")]
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    keyid: Digest,
    sig: String,
}

#[cfg(test)]
mod tests {
    use super::pre_authentication;

    #[test]
    fn signed_bytes_are_those_of_the_specification() {
        // The example of the DSSE protocol document.
        let expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world";
        assert_eq!(pre_authentication("http://example.com/HelloWorld", b"hello world"), expected);
        assert_eq!(pre_authentication("", b""), b"DSSEv1 0  0 ");
    }
}
