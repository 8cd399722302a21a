//! What a cookie is bound to.
//!
//! The protocol binds a cookie to the sender's address *and port* (WireGuard paper, 5.4.7). boringtun takes an
//! address only, so it gets one that is made of both under a key: whoever sees the cookie of one
//! endpoint has none for another.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr};

use ring::hmac;

/// Stands for `endpoint` where boringtun wants an address.
pub(crate) fn source<E: Hash>(key: &hmac::Key, endpoint: &E) -> IpAddr {
    let mut absorb = Absorb(hmac::Context::with_key(key));
    absorb.0.update(LABEL);
    endpoint.hash(&mut absorb);
    let tag = absorb.0.sign();
    let mut octets = [0; 16];
    octets.copy_from_slice(&tag.as_ref()[..16]);
    Ipv6Addr::from(octets).into()
}

/// Hands all that an endpoint is to the MAC.
struct Absorb(hmac::Context);

impl Hasher for Absorb {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Nobody asks: the MAC is the result.
    fn finish(&self) -> u64 {
        0
    }
}

const LABEL: &[u8] = b"cookie";

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn cookies_of_two_ports_of_one_address_differ() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
        let endpoints = ["192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1", "[2001:db8::1]:1", "[2001:db8::1]:2"];
        let sources: std::collections::BTreeSet<_> =
            endpoints.iter().map(|endpoint| source(&key, &endpoint.parse::<SocketAddr>().unwrap())).collect();
        assert_eq!(sources.len(), endpoints.len());
        let other = hmac::Key::new(hmac::HMAC_SHA256, &[8; 32]);
        let endpoint: SocketAddr = endpoints[0].parse().unwrap();
        assert_eq!(source(&key, &endpoint), source(&key, &endpoint));
        assert_ne!(source(&key, &endpoint), source(&other, &endpoint));
    }
}
