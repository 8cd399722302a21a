//! `control.toml`.

use ipnet::{Ipv4Net, Ipv6Net};
use kontor_bundle::{MAX_GATEWAYS, MAX_LIFE_S};
use kontor_control::Pool;
use kontor_trust::Digest;
use serde::Deserialize;
use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

/// Most addresses that are listened on.
const MAX_LISTEN: usize = 8;

/// What IT configures.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Where hosts reach control.
    pub(crate) listen: Vec<SocketAddr>,
    /// Life of a lease in seconds, unless a bundle allows less.
    pub(crate) lease_s: u64,
    /// The tenant that the first keyset must found; whatever it founds, when absent.
    pub(crate) tenant: Option<Digest>,
    /// The gateways, in the order in which guests shall try them.
    #[serde(default, rename = "gateway")]
    pub(crate) gateways: Vec<GatewayConfig>,
}

/// A gateway that control tells about leases.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GatewayConfig {
    /// Its number in bundles.
    pub(crate) id: u8,
    /// Its socket for admissions.
    pub(crate) admission: PathBuf,
    /// The IPv4 addresses that its guests have.
    pub(crate) pool_v4: Ipv4Net,
    /// The IPv6 addresses that its guests have.
    pub(crate) pool_v6: Ipv6Net,
}

/// Why the configuration is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("it does not parse")]
    Parse(#[source] toml::de::Error),
    #[error("listen has {0} addresses, it must have 1 to {MAX_LISTEN}")]
    Listen(usize),
    #[error("lease_s is {0}, it must be 1 to {MAX_LIFE_S}")]
    Life(u64),
    #[error("it has {0} gateways, it must have 1 to {MAX_GATEWAYS}")]
    Gateways(usize),
    #[error("gateway {0} is listed twice")]
    Repeated(u8),
}

impl Config {
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(ConfigError::Parse)?;
        if !(1..=MAX_LISTEN).contains(&config.listen.len()) {
            return Err(ConfigError::Listen(config.listen.len()));
        }
        if !(1..=MAX_LIFE_S).contains(&config.lease_s) {
            return Err(ConfigError::Life(config.lease_s));
        }
        if !(1..=MAX_GATEWAYS).contains(&config.gateways.len()) {
            return Err(ConfigError::Gateways(config.gateways.len()));
        }
        let mut ids = BTreeSet::new();
        match config.gateways.iter().find(|gateway| !ids.insert(gateway.id)) {
            Some(gateway) => Err(ConfigError::Repeated(gateway.id)),
            None => Ok(config),
        }
    }

    pub(crate) fn pools(&self) -> Vec<Pool> {
        let pool =
            |gateway: &GatewayConfig| Pool { id: gateway.id, v4: gateway.pool_v4, v6: gateway.pool_v6 };
        self.gateways.iter().map(pool).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Config, ConfigError, MAX_GATEWAYS, MAX_LIFE_S, MAX_LISTEN};

    fn config(lease_s: u64, gateways: impl IntoIterator<Item = usize>) -> Result<Config, ConfigError> {
        let mut text = format!("listen = [\"[::]:443\"]\nlease_s = {lease_s}\n");
        for id in gateways {
            text += &format!(
                "[[gateway]]\nid = {id}\nadmission = \"/g\"\npool_v4 = \"10.0.0.0/8\"\npool_v6 = \"fd00::/64\"\n"
            );
        }
        Config::parse(&text)
    }

    #[test]
    fn there_are_1_to_8_addresses_to_listen_on() {
        let listening = |count| {
            let gateway = "[[gateway]]\nid = 1\nadmission = \"/g\"\npool_v4 = \"10.0.0.0/8\"\npool_v6 = \"fd00::/64\"\n";
            let listen = vec!["\"[::]:443\""; count].join(",");
            Config::parse(&format!("listen = [{listen}]\nlease_s = 60\n{gateway}"))
        };
        assert!(listening(MAX_LISTEN).is_ok());
        assert!(matches!(listening(MAX_LISTEN + 1), Err(ConfigError::Listen(9))));
        assert!(matches!(listening(0), Err(ConfigError::Listen(0))));
    }

    #[test]
    fn life_is_a_second_to_a_day() {
        assert!(config(1, [1]).is_ok());
        assert!(config(MAX_LIFE_S, [1]).is_ok());
        for wrong in [0, MAX_LIFE_S + 1] {
            assert!(matches!(config(wrong, [1]), Err(ConfigError::Life(found)) if found == wrong));
        }
    }

    #[test]
    fn there_are_1_to_8_gateways_with_different_ids() {
        assert!(config(60, 0..MAX_GATEWAYS).is_ok());
        assert!(matches!(config(60, 0..=MAX_GATEWAYS), Err(ConfigError::Gateways(9))));
        assert!(matches!(config(60, []), Err(ConfigError::Gateways(0))));
        assert!(matches!(config(60, [1, 2, 1]), Err(ConfigError::Repeated(1))));
    }
}
