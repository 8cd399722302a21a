//! The gateway's own settings. What peers may do is not among them: that is in signed bundles.
//!
//! ```toml
//! id = 1                                   # its number in bundles and leases
//! listen = ["192.0.2.1:51820", "[2001:db8::1]:51820"]
//! key = "/etc/kontor/gateway.key"          # made by `kontor-gateway key`
//! tun = "kontor0"
//! v4 = "10.9.0.1"                          # its own inner addresses
//! v6 = "fd09::1"
//! pool_v4 = "10.9.0.0/16"                  # its peers'
//! pool_v6 = "fd09::/64"
//! admission = "/run/kontor-gateway/admission.sock"
//! state = "/var/lib/kontor-gateway"
//! tenant = "…64 hexadecimal digits…"
//! keyset = "/etc/kontor/keyset-00000001.json"
//! mtu = 1420                               # optional, and so are those below
//! peers_max = 10000
//! handshakes_per_s_max = 500
//! ```

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};
use kontor_bundle::lease::OwnGateway;
use kontor_trust::Digest;
use serde::Deserialize;

use crate::files::{self, FileError};
use crate::filter::Pools;

/// The gateway's own settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) id: u8,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) key: PathBuf,
    pub(crate) tun: String,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    pub(crate) pool_v4: Ipv4Net,
    pub(crate) pool_v6: Ipv6Net,
    pub(crate) admission: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) tenant: Digest,
    pub(crate) keyset: PathBuf,
    #[serde(default = "default_mtu")]
    pub(crate) mtu: u16,
    #[serde(default = "default_peers_max")]
    pub(crate) peers_max: usize,
    #[serde(default = "default_handshakes")]
    pub(crate) handshakes_per_s_max: u64,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("read the settings")]
    Read(#[source] FileError),
    #[error("the settings in {path} do not parse")]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("the settings in {path} name {0} addresses to listen on; 1 to {LISTEN_MAX} can be", path = .1.display())]
    Listen(usize, PathBuf),
    #[error("the settings in {path} name {listen} twice")]
    RepeatedListen { path: PathBuf, listen: SocketAddr },
    #[error("the settings in {path} name the pool {pool}, which has host bits; {meant} may be meant")]
    HostBits { path: PathBuf, pool: String, meant: String },
}

impl Config {
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = files::read(path, BYTES_MAX).map_err(ConfigError::Read)?;
        let config: Self =
            toml::from_slice(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        if !(1..=LISTEN_MAX).contains(&self.listen.len()) {
            return Err(ConfigError::Listen(self.listen.len(), path.to_owned()));
        }
        let mut seen = BTreeSet::new();
        if let Some(listen) = self.listen.iter().find(|listen| !seen.insert(**listen)) {
            return Err(ConfigError::RepeatedListen { path: path.to_owned(), listen: *listen });
        }
        let pools = [
            (
                self.pool_v4 == self.pool_v4.trunc(),
                self.pool_v4.to_string(),
                self.pool_v4.trunc().to_string(),
            ),
            (
                self.pool_v6 == self.pool_v6.trunc(),
                self.pool_v6.to_string(),
                self.pool_v6.trunc().to_string(),
            ),
        ];
        match pools.into_iter().find(|(whole, ..)| !whole) {
            Some((_, pool, meant)) => Err(ConfigError::HostBits { path: path.to_owned(), pool, meant }),
            None => Ok(()),
        }
    }

    pub(crate) fn own(&self) -> OwnGateway {
        OwnGateway { id: self.id, pool_v4: self.pool_v4, pool_v6: self.pool_v6 }
    }

    pub(crate) fn pools(&self) -> Pools {
        Pools { v4: self.pool_v4, v6: self.pool_v6, own_v4: self.v4, own_v6: self.v6 }
    }
}

fn default_mtu() -> u16 {
    kontor_vpn::MTU_MAX
}

fn default_peers_max() -> usize {
    PEERS_MAX
}

fn default_handshakes() -> u64 {
    kontor_vpn::HANDSHAKES_PER_S
}

/// Most bytes of the file.
const BYTES_MAX: usize = 64 * 1024;
/// Most addresses to listen on.
pub(crate) const LISTEN_MAX: usize = 16;
/// Peers unless told otherwise: about 11 KB of memory each.
const PEERS_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn text(listen: &str, pool_v4: &str) -> String {
        format!(
            r#"
            id = 1
            listen = [{listen}]
            key = "gateway.key"
            tun = "kontor0"
            v4 = "10.9.0.1"
            v6 = "fd09::1"
            pool_v4 = "{pool_v4}"
            pool_v6 = "fd09::/64"
            admission = "admission.sock"
            state = "state"
            tenant = "{}"
            keyset = "keyset.json"
            "#,
            "00".repeat(32)
        )
    }

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn settings_parse_and_the_rest_has_defaults() {
        let config = load(&text("\"0.0.0.0:51820\"", "10.9.0.0/16")).unwrap();
        assert_eq!((config.mtu, config.peers_max, config.handshakes_per_s_max), (1420, 10_000, 500));
        assert_eq!(config.own().id, 1);
    }

    #[test]
    fn unknown_setting_is_refused() {
        let text = text("\"0.0.0.0:51820\"", "10.9.0.0/16") + "\nallow_all = true";
        assert!(matches!(load(&text), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn limit_on_addresses_holds_at_its_edges() {
        let listen = |count: usize| {
            (1..=count).map(|port| format!("\"127.0.0.1:{port}\"")).collect::<Vec<_>>().join(",")
        };
        assert!(load(&text(&listen(LISTEN_MAX), "10.9.0.0/16")).is_ok());
        for count in [0, LISTEN_MAX + 1] {
            assert!(matches!(load(&text(&listen(count), "10.9.0.0/16")), Err(ConfigError::Listen(..))));
        }
    }

    #[test]
    fn repeated_address_and_pool_with_host_bits_are_refused() {
        let twice = "\"127.0.0.1:1\", \"127.0.0.1:1\"";
        assert!(matches!(load(&text(twice, "10.9.0.0/16")), Err(ConfigError::RepeatedListen { .. })));
        let one = "\"127.0.0.1:1\"";
        assert!(matches!(load(&text(one, "10.9.0.1/16")), Err(ConfigError::HostBits { .. })));
    }
}
