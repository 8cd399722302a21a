//! `kontord`'s configuration: one TOML file.
//!
//! ```toml
//! state = "/var/lib/kontor"                # directory; must exist or be makeable
//! socket = "/run/kontor/kontord.sock"
//! tenant = "64 hexadecimal digits"
//! device = "laptop-7"
//! office = "control.example.com:443"       # a name is resolved by this PC; an IPv6 address is in brackets
//! release_root = "64 hexadecimal digits"   # SHA-256 of the release repository's first root
//! owner = 1000                             # uid of the employee; without it kontord's own
//! qemu = "qemu-system-x86_64"
//! kvm = "/dev/kvm"
//! uplink = "port"                          # or "vfio": the device that the work VM's uplink is
//! relay = "/usr/libexec/kontor/kontor-relay"   # without it: beside kontord
//! jail = "/usr/libexec/kontor/kontor-jail"     # without it: beside kontord
//!
//! # Development only:
//! probe_socket = "/tmp/probe.sock"         # served for test images
//! tap = "/tmp/uplink.tap"                  # all bytes between QEMU and relay
//! ```

use crate::{host::KVM, office::OfficeAddress, qemu::Backend};
use kontor_trust::{DeviceId, Digest};
use serde::Deserialize;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Most bytes of a configuration file.
pub const MAX_CONFIG: u64 = 64 * 1024;

/// The configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory of everything that is kept; a device's part is `<state>/<tenant>/<device>`.
    pub state: PathBuf,
    /// Socket on which `kontor` is served.
    pub socket: PathBuf,
    /// The tenant.
    pub tenant: Digest,
    /// The device.
    pub device: DeviceId,
    /// Hash of the release repository's first root, from which every release is verified.
    pub release_root: Digest,
    /// Where control answers requests for leases.
    pub office: OfficeAddress,
    /// uid that may use the socket; kontord's own when absent.
    pub owner: Option<u32>,
    /// The emulator: a path, or a name that is looked up.
    #[serde(default = "default_qemu")]
    pub qemu: PathBuf,
    /// The device of KVM.
    #[serde(default = "default_kvm")]
    pub kvm: PathBuf,
    /// The relay; beside kontord's own program when absent.
    pub relay: Option<PathBuf>,
    /// The jailer; beside kontord's own program when absent.
    pub jail: Option<PathBuf>,
    /// Which device the work VM's uplink is.
    #[serde(default)]
    pub uplink: Backend,
    /// Development: where the probe channel of a test image is served.
    pub probe_socket: Option<PathBuf>,
    /// Development: where all bytes between QEMU and relay are recorded.
    pub tap: Option<PathBuf>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("read the configuration {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Longer than [`MAX_CONFIG`].
    #[error("the configuration {0} is longer than {MAX_CONFIG} bytes")]
    TooLong(PathBuf),
    /// Its content.
    #[error("understand the configuration {path}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The place of the relay or the jailer cannot be derived.
    #[error("find kontord's own program, to look for others beside it")]
    OwnProgram(#[source] io::Error),
}

impl Config {
    /// Reads the file.
    ///
    /// # Errors
    /// [`ConfigError`] says what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.into(), source };
        if fs::metadata(path).map_err(failed)?.len() > MAX_CONFIG {
            return Err(ConfigError::TooLong(path.into()));
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
    }

    /// The relay's program.
    ///
    /// # Errors
    /// [`ConfigError::OwnProgram`].
    pub fn relay(&self) -> Result<PathBuf, ConfigError> {
        beside(self.relay.as_deref(), "kontor-relay")
    }

    /// The jailer's program.
    ///
    /// # Errors
    /// [`ConfigError::OwnProgram`].
    pub fn jail(&self) -> Result<PathBuf, ConfigError> {
        beside(self.jail.as_deref(), "kontor-jail")
    }
}

/// The configured path, or else `name` beside kontord's own program.
fn beside(configured: Option<&Path>, name: &str) -> Result<PathBuf, ConfigError> {
    match configured {
        Some(path) => Ok(path.into()),
        None => {
            let own = std::env::current_exe().map_err(ConfigError::OwnProgram)?;
            Ok(own.with_file_name(name))
        }
    }
}

fn default_kvm() -> PathBuf {
    KVM.into()
}

fn default_qemu() -> PathBuf {
    "qemu-system-x86_64".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kontord.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    fn minimal() -> String {
        format!(
            "state = '/s'\nsocket = '/k.sock'\ntenant = '{}'\ndevice = 'laptop-7'\nrelease_root = '{}'\noffice = 'control.example:443'\n",
            Digest([7; 32]),
            Digest([8; 32])
        )
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let config = read(&minimal()).unwrap();
        assert_eq!(config.qemu, Path::new("qemu-system-x86_64"));
        assert_eq!(config.relay().unwrap().file_name().unwrap(), "kontor-relay");
        assert_eq!(config.uplink, Backend::Port);
        assert_eq!((config.owner, config.probe_socket, config.tap), (None, None, None));
    }

    #[test]
    fn uplink_is_one_of_two() {
        let with = |uplink: &str| read(&format!("{}uplink = '{uplink}'", minimal()));
        assert_eq!(with("vfio").unwrap().uplink, Backend::Vfio);
        assert_eq!(with("port").unwrap().uplink, Backend::Port);
        assert!(matches!(with("tap"), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn unknown_field_is_refused() {
        assert!(matches!(read(&format!("{}\nviewer = 'x'", minimal())), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn office_that_is_no_address_is_refused() {
        for wrong in ["control.example", "control.example:", ":443", "a b:443", "control.example:70000"] {
            let text = minimal().replace("control.example:443", wrong);
            assert!(matches!(read(&text), Err(ConfigError::Parse { .. })), "{wrong}");
        }
    }

    #[test]
    fn configuration_at_the_limit_passes_and_a_longer_one_is_refused() {
        let mut text = minimal();
        text.push('#');
        text.push_str(&"x".repeat(usize::try_from(MAX_CONFIG).unwrap() - text.len()));
        assert!(read(&text).is_ok());
        text.push('x');
        assert!(matches!(read(&text), Err(ConfigError::TooLong(_))));
    }
}
