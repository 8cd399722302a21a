//! What travels with a lease; in JSON each document is the base64 of its envelope.

use serde::{Deserialize, Serialize};

/// What control answers a host: a lease and all that is needed to verify it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// The last keysets in rising order, at most [`MAX_KEYSETS`](super::MAX_KEYSETS).
    #[serde(with = "base64_list")]
    pub keysets: Vec<Vec<u8>>,
    /// The device record.
    #[serde(with = "base64_text")]
    pub device: Vec<u8>,
    /// The bundle of the device's line.
    #[serde(with = "base64_text")]
    pub bundle: Vec<u8>,
    /// The lease.
    #[serde(with = "base64_text")]
    pub lease: Vec<u8>,
}

/// What control answers the host of a revoked device: the enrol role's word for it, not control's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// The last keysets in rising order, at most [`MAX_KEYSETS`](super::MAX_KEYSETS).
    #[serde(with = "base64_list")]
    pub keysets: Vec<Vec<u8>>,
    /// The device record.
    #[serde(with = "base64_text")]
    pub device: Vec<u8>,
}

/// What control tells a gateway: what it answers a host, and the request that the lease answers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admit {
    /// The last keysets in rising order, at most [`MAX_KEYSETS`](super::MAX_KEYSETS).
    #[serde(with = "base64_list")]
    pub keysets: Vec<Vec<u8>>,
    /// The device record.
    #[serde(with = "base64_text")]
    pub device: Vec<u8>,
    /// The request.
    #[serde(with = "base64_text")]
    pub request: Vec<u8>,
    /// The bundle of the device's line.
    #[serde(with = "base64_text")]
    pub bundle: Vec<u8>,
    /// The lease.
    #[serde(with = "base64_text")]
    pub lease: Vec<u8>,
}

mod base64_text {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

mod base64_list {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(list: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|bytes| STANDARD.encode(bytes)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| STANDARD.decode(text).map_err(de::Error::custom)).collect()
    }
}
