//! TLS between a host and control: version 1.3, both ends known by their keys, nothing else believed.
//!
//! ```text
//! host                                              control
//! host key ── raw public key (RFC 7250) ──►  any Ed25519 key whose half the peer proves;
//!                                            whose device it is, the record says (lease.md 8)
//! a key that the keyset pins  ◄── raw public key ── control's key
//! ```
//!
//! An end shows its bare `SubjectPublicKeyInfo` and signs the handshake with the other half. There is no
//! certificate: no name, no date and no issuer that anybody would have to check or ignore. Sessions are
//! never resumed, so that each connection is a proof of both keys. Signatures and key exchange are
//! `ring`'s.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod verify;

pub use verify::{Stranger, stranger};

use kontor_trust::{Digest, PublicKey, SecretKey};
use rustls::{
    ClientConfig, CommonState, ServerConfig,
    client::{AlwaysResolvesClientRawPublicKeys, Resumption},
    crypto::ring,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage},
    sign::CertifiedKey,
    version::TLS13,
};
use std::sync::Arc;

/// What is spoken inside.
const ALPN: &[u8] = b"http/1.1";

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[error("set up TLS with this key")]
pub struct SetupError(#[from] rustls::Error);

/// Control's end. It lets in everybody who proves an Ed25519 key; [`peer`] says which.
///
/// # Errors
/// [`SetupError`] when `ring` does not take the key.
pub fn server(key: &SecretKey) -> Result<ServerConfig, SetupError> {
    let provider = Arc::new(ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verify::Anybody::new(&provider)))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(shown(key)?)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The host's end. It speaks only with a key whose [`pin`](PublicKey::pin) is among `pins`.
///
/// # Errors
/// [`SetupError`] when `ring` does not take the key.
pub fn client(key: &SecretKey, pins: &[Digest]) -> Result<ClientConfig, SetupError> {
    let provider = Arc::new(ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verify::Pinned::new(&provider, pins)))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(shown(key)?)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The key that the other end of a finished handshake proved.
#[must_use]
pub fn peer(connection: &CommonState) -> Option<PublicKey> {
    let [key] = connection.peer_certificates()? else { return None };
    PublicKey::from_spki(key)
}

/// A key as `rustls` shows it: the "certificate" is the bare public key.
fn shown(key: &SecretKey) -> Result<Arc<CertifiedKey>, SetupError> {
    let signer = ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(key.to_pkcs8()))?;
    let spki = CertificateDer::from(key.public().spki().to_vec());
    Ok(Arc::new(CertifiedKey::new(vec![spki], signer)))
}

#[cfg(test)]
mod tests;
