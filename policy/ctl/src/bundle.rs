//! `kontorctl bundle`.

use crate::{
    Exit, Failure,
    files::{self, PUBLIC},
    keydir::KeyDir,
    say,
};
use clap::{Args, Subcommand};
use kontor_bundle::{Bundle, BundleError, BundleFault, Draft};
use kontor_trust::BundleKind;
use std::{
    path::{Path, PathBuf},
    string::FromUtf8Error,
};

/// Most bytes of a bundle's source.
const MAX_SOURCE: usize = 1024 * 1024;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Check a bundle's source and sign it.
    Sign(Sign),
    /// Check a signed bundle and print it.
    Inspect {
        #[command(flatten)]
        keys: KeyDir,
        /// The signed bundle.
        file: PathBuf,
    },
}

#[derive(Args)]
pub(crate) struct Sign {
    #[command(flatten)]
    keys: KeyDir,
    /// The bundle's source, TOML.
    #[arg(long = "in", value_name = "FILE")]
    source: PathBuf,
    /// File to write the signed bundle to.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    #[error("{path} is not UTF-8")]
    Text { path: PathBuf, source: FromUtf8Error },
    #[error("{path} does not parse")]
    Source { path: PathBuf, source: toml::de::Error },
    #[error("{path} cannot be used")]
    Fault { path: PathBuf, source: BundleFault },
    #[error("the bundle is signed, but cannot be used")]
    Malformed(#[source] BundleError),
    #[error("{path} is of another tenant than the keys")]
    OtherTenant { path: PathBuf },
}

impl SignError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Text { .. } | Self::Source { .. } | Self::Fault { .. } => Exit::Usage,
            Self::Malformed(_) | Self::OtherTenant { .. } => Exit::NotVerified,
        }
    }
}

impl Verb {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Sign(sign) => sign.run(),
            Self::Inspect { keys, file } => {
                let keyset = keys.keyset()?;
                let verified = keys.verified::<BundleKind>(&keyset, &file)?;
                let bundle = Bundle::parse(&verified).map_err(SignError::Malformed)?;
                if bundle.tenant != keyset.tenant() {
                    return Err(SignError::OtherTenant { path: file }.into());
                }
                say(String::from_utf8_lossy(verified.payload()))
            }
        }
    }
}

impl Sign {
    fn run(self) -> Result<(), Failure> {
        let keyset = self.keys.keyset()?;
        let draft = draft(&self.source)?;
        let unsigned = draft.unsigned();
        if unsigned.tenant != keyset.tenant() {
            return Err(SignError::OtherTenant { path: self.source }.into());
        }
        let payload =
            draft.payload().map_err(|source| SignError::Fault { path: self.source.clone(), source })?;
        let verified = self.keys.sign::<BundleKind>(&keyset, &payload)?;
        files::replace(&self.out, verified.envelope(), PUBLIC)?;
        say(format_args!("bundle {} revision {} {}", unsigned.line, unsigned.revision, verified.hash()))
    }
}

fn draft(path: &Path) -> Result<Draft, Failure> {
    let text = String::from_utf8(files::read(path, MAX_SOURCE)?)
        .map_err(|source| SignError::Text { path: path.to_owned(), source })?;
    Ok(toml::from_str(&text).map_err(|source| SignError::Source { path: path.to_owned(), source })?)
}
