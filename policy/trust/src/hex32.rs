//! 32 bytes as 64 lower-case hexadecimal digits, for `#[serde(with = "kontor_trust::hex32")]`: nonces
//! and public keys that are neither a [`Digest`](crate::Digest) nor a signing key.

use serde::{Deserialize, Deserializer, Serializer, de};

/// Writes the digits.
///
/// # Errors
/// What the serializer answers.
pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex::encode(bytes))
}

/// Reads exactly 64 lower-case digits.
///
/// # Errors
/// Anything else.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
    let text = String::deserialize(deserializer)?;
    decode(&text).ok_or_else(|| de::Error::custom("64 lower-case hexadecimal digits are expected"))
}

/// 32 bytes from 64 lower-case digits; `None` for any other text.
#[must_use]
pub fn decode(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
    (lower && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}
