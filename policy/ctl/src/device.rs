//! `kontorctl device`.

use crate::{
    Exit, Failure,
    files::{self, PUBLIC},
    keydir::KeyDir,
    say,
};
use clap::{Args, Subcommand};
use kontor_trust::{
    Device, DeviceId, DeviceKind, DeviceState, Digest, DocumentError, Line, PublicKey, ShareId,
};
use ring::rand::{SecureRandom, SystemRandom};
use std::path::PathBuf;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Sign the record of a device: enrolled, changed, or revoked.
    Record(Record),
    /// Check a signed record and print it.
    Inspect {
        #[command(flatten)]
        keys: KeyDir,
        /// The signed record.
        file: PathBuf,
    },
}

#[derive(Args)]
pub(crate) struct Record {
    #[command(flatten)]
    keys: KeyDir,
    /// Name of the device: a-z, 0-9 and -.
    #[arg(long, value_name = "ID")]
    device: DeviceId,
    /// The line whose policy is for it.
    #[arg(long)]
    line: Line,
    /// Public key of its host, as `kontord host-key` prints it.
    #[arg(long, value_name = "HEX")]
    host_key: PublicKey,
    /// Number of this record; must be above that of the device's last one.
    #[arg(long, value_name = "N")]
    serial: u64,
    /// The enrolment, when the device stays enrolled; a new random one when absent.
    #[arg(long, value_name = "HEX")]
    enrolment: Option<Digest>,
    /// Which share of its state disk's key the office holds.
    #[arg(long, value_name = "ID", default_value = "share-1")]
    share_id: ShareId,
    /// Revoke the device: it gets no lease any more.
    #[arg(long, requires = "enrolment")]
    revoked: bool,
    /// File to write the signed record to.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Why there is no record.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("the operating system gave no randomness for an enrolment")]
    Random,
    #[error("the record is signed, but malformed")]
    Malformed(#[source] DocumentError),
    #[error("the record is of another tenant")]
    OtherTenant,
}

impl RecordError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Random => Exit::Lacks,
            Self::Malformed(_) | Self::OtherTenant => Exit::NotVerified,
        }
    }
}

impl Verb {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Record(record) => record.run(),
            Self::Inspect { keys, file } => {
                let keyset = keys.keyset()?;
                let verified = keys.verified::<DeviceKind>(&keyset, &file)?;
                let device = Device::parse(&verified).map_err(RecordError::Malformed)?;
                if device.tenant != keyset.tenant() {
                    return Err(RecordError::OtherTenant.into());
                }
                say(String::from_utf8_lossy(verified.payload()))
            }
        }
    }
}

impl Record {
    fn run(self) -> Result<(), Failure> {
        let keyset = self.keys.keyset()?;
        let enrolment = match self.enrolment {
            Some(enrolment) => enrolment,
            None => random()?,
        };
        let device = Device {
            tenant: keyset.tenant(),
            device: self.device,
            enrolment,
            serial: self.serial,
            state: if self.revoked { DeviceState::Revoked } else { DeviceState::Active },
            host_key: self.host_key,
            line: self.line,
            share_id: self.share_id,
        };
        let verified = self.keys.sign::<DeviceKind>(&keyset, &device.payload())?;
        files::replace(&self.out, verified.envelope(), PUBLIC)?;
        say(format_args!("device {} serial {} enrolment {enrolment}", device.device, device.serial))
    }
}

fn random() -> Result<Digest, RecordError> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| RecordError::Random)?;
    Ok(Digest(bytes))
}
