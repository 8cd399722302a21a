//! Names that people give: short, of few characters, so that they are safe in a path, a log line and a
//! table, and so that no two of them look alike.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Most characters of a name.
pub const MAX_NAME: usize = 64;

/// Text that is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}: 1 to {MAX_NAME} characters of a-z, 0-9 and {extra:?} are expected")]
pub struct NameError {
    what: &'static str,
    extra: &'static str,
    text: String,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $extra:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text, $what, $extra)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                check(&text, $what, $extra)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name! {
    /// One enrolled work VM on one host.
    DeviceId, "device id", "-"
}
name! {
    /// The group of devices that one bundle is for.
    Line, "line", "-"
}
name! {
    /// Which share of a state disk's key the office holds.
    ShareId, "share id", "-"
}
name! {
    /// Who holds a signing key. Thresholds count persons, not keys.
    Person, "person", "-._@+"
}

fn check(text: &str, what: &'static str, extra: &'static str) -> Result<(), NameError> {
    let fits = (1..=MAX_NAME).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || extra.as_bytes().contains(&b));
    if fits {
        Ok(())
    } else {
        Err(NameError { what, extra, text: text.chars().take(MAX_NAME + 16).collect() })
    }
}
