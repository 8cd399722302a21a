//! What `kontor-init` reads from the kernel's command line.
//!
//! ```text
//! kontor.verity=ROOT_HASH,SALT,DATA_BLOCKS    hash and salt in hex; blocks of 4096 bytes
//! kontor.built=SECONDS                        Unix time of the image's build: no lease is older
//! kontor.test=1                               a test image: the probe channel is served
//! ```
//!
//! The line stands in the signed manifest, so it is as trusted as the kernel. Words that do not begin
//! with `kontor.` are the kernel's business; an unknown word that does is refused.

use crate::{Digest, Verity};
use std::fmt;

/// The parsed `kontor.` words of a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// How to open the root image.
    pub verity: Verity,
    /// Unix time of the build, in seconds.
    pub built_at: u64,
    /// Whether the probe channel is served.
    pub test: bool,
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// A word that must be there is not.
    #[error("{0} is missing from the command line")]
    Missing(&'static str),
    /// A word appears twice.
    #[error("{0} appears twice on the command line")]
    Repeated(&'static str),
    /// A word beginning with `kontor.` has a name or a value that is not understood.
    #[error("{0:?} on the command line is not understood")]
    Unknown(String),
}

impl CommandLine {
    /// Reads `/proc/cmdline`.
    ///
    /// # Errors
    /// [`CommandLineError`] names the word.
    pub fn parse(line: &str) -> Result<Self, CommandLineError> {
        let (mut verity, mut built_at, mut test) = (None, None, None);
        for word in line.split_ascii_whitespace().filter(|w| w.starts_with("kontor.")) {
            let unknown = || CommandLineError::Unknown(word.chars().take(160).collect());
            let (name, value) = word.split_once('=').ok_or_else(unknown)?;
            match name {
                "kontor.verity" => {
                    once(&mut verity, parse_verity(value).ok_or_else(unknown)?, "kontor.verity")?
                }
                "kontor.built" => {
                    once(&mut built_at, value.parse().map_err(|_| unknown())?, "kontor.built")?;
                }
                "kontor.test" if value == "1" => once(&mut test, true, "kontor.test")?,
                _ => return Err(unknown()),
            }
        }
        Ok(Self {
            verity: verity.ok_or(CommandLineError::Missing("kontor.verity"))?,
            built_at: built_at.ok_or(CommandLineError::Missing("kontor.built"))?,
            test: test.unwrap_or(false),
        })
    }
}

/// The words as they stand on the line, the inverse of [`CommandLine::parse`].
impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verity { root_hash, salt, data_blocks } = &self.verity;
        write!(
            f,
            "kontor.verity={root_hash},{},{data_blocks} kontor.built={}",
            hex::encode(salt),
            self.built_at
        )?;
        if self.test { f.write_str(" kontor.test=1") } else { Ok(()) }
    }
}

fn once<T>(slot: &mut Option<T>, value: T, name: &'static str) -> Result<(), CommandLineError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(CommandLineError::Repeated(name)),
    }
}

fn parse_verity(value: &str) -> Option<Verity> {
    let mut parts = value.split(',');
    let root_hash: Digest = parts.next()?.parse().ok()?;
    let Digest(salt) = parts.next()?.parse().ok()?;
    let data_blocks = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Verity { root_hash, salt, data_blocks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> CommandLine {
        let verity = Verity { root_hash: Digest([0xab; 32]), salt: [0x01; 32], data_blocks: 7000 };
        CommandLine { verity, built_at: 1_763_900_000, test: true }
    }

    #[test]
    fn the_kernels_words_are_passed_over() {
        let text = format!("console=ttyS0 quiet {} panic=-1\n", line());
        assert_eq!(CommandLine::parse(&text), Ok(line()));
    }

    #[test]
    fn unknown_word_of_ours_is_refused() {
        let text = format!("{} kontor.debug=1", line());
        assert_eq!(CommandLine::parse(&text), Err(CommandLineError::Unknown("kontor.debug=1".into())));
    }

    #[test]
    fn repeated_word_is_refused() {
        let text = format!("{} kontor.built=3", line());
        assert_eq!(CommandLine::parse(&text), Err(CommandLineError::Repeated("kontor.built")));
    }

    #[test]
    fn missing_word_is_named() {
        assert_eq!(CommandLine::parse("quiet"), Err(CommandLineError::Missing("kontor.verity")));
    }

    #[test]
    fn verity_with_a_short_salt_is_refused() {
        let text = format!("kontor.verity={},00,1 kontor.built=1", Digest([0; 32]));
        assert!(matches!(CommandLine::parse(&text), Err(CommandLineError::Unknown(_))));
    }
}
