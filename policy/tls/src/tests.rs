//! Handshakes in memory.

use crate::{Stranger, client, peer, server, stranger};
use kontor_trust::{Digest, SecretKey};
use rustls::{
    ClientConfig, ClientConnection, Error, ServerConfig, ServerConnection,
    crypto::ring,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName},
    server::AlwaysResolvesServerRawPublicKeys,
    sign::CertifiedKey,
};
use std::{io, sync::Arc};

fn key() -> SecretKey {
    SecretKey::generate().expect("the test machine has randomness")
}

/// Both ends after as much of a handshake as there is, and the first error of either.
fn handshake(
    client: ClientConfig,
    server: ServerConfig,
) -> (ClientConnection, ServerConnection, Option<Error>, Option<Error>) {
    let name = ServerName::try_from("control.example").unwrap();
    let mut host = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut control = ServerConnection::new(Arc::new(server)).unwrap();
    let (mut of_host, mut of_control) = (None, None);
    for _ in 0..8 {
        let mut wire = Vec::new();
        while host.wants_write() {
            host.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while of_control.is_none() && control.read_tls(&mut wire).unwrap_or(0) > 0 {
            of_control = control.process_new_packets().err();
        }
        let mut wire = Vec::new();
        while control.wants_write() {
            control.write_tls(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        while of_host.is_none() && host.read_tls(&mut wire).unwrap_or(0) > 0 {
            of_host = host.process_new_packets().err();
        }
    }
    (host, control, of_host, of_control)
}

#[test]
fn both_ends_learn_the_others_key() {
    let (host_key, control_key) = (key(), key());
    let pins = [Digest([1; 32]), control_key.public().pin()];
    let config = client(&host_key, &pins).unwrap();
    let (host, control, of_host, of_control) = handshake(config, server(&control_key).unwrap());
    assert_eq!((of_host, of_control), (None, None));
    assert!(!host.is_handshaking() && !control.is_handshaking());
    assert_eq!(peer(&host), Some(control_key.public()));
    assert_eq!(peer(&control), Some(host_key.public()));
    assert_eq!(control.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
}

#[test]
fn control_with_a_key_that_is_not_pinned_is_refused_by_name() {
    let (host_key, control_key) = (key(), key());
    for pins in [&[][..], &[key().public().pin()]] {
        let config = client(&host_key, pins).unwrap();
        let (_, control, of_host, _) = handshake(config, server(&control_key).unwrap());
        let error = io::Error::new(io::ErrorKind::InvalidData, of_host.expect("a refusal"));
        assert_eq!(stranger(&error), Some(Stranger(control_key.public().pin())));
        assert_eq!(peer(&control), None, "the host showed its key to a stranger");
    }
}

#[test]
fn control_that_shows_a_pinned_key_and_holds_another_is_refused() {
    let (host_key, control_key, thief) = (key(), key(), key());
    let signer = ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(thief.to_pkcs8())).unwrap();
    let shown = CertificateDer::from(control_key.public().spki().to_vec());
    let mut config = server(&thief).unwrap();
    let resolver = AlwaysResolvesServerRawPublicKeys::new(Arc::new(CertifiedKey::new(vec![shown], signer)));
    config.cert_resolver = Arc::new(resolver);
    let pins = [control_key.public().pin()];
    let (_, _, of_host, _) = handshake(client(&host_key, &pins).unwrap(), config);
    let error = io::Error::other(of_host.expect("a refusal"));
    assert_eq!(stranger(&error), None);
}

#[test]
fn host_that_shows_a_key_and_holds_another_is_refused() {
    let (host_key, control_key, thief) = (key(), key(), key());
    let pins = [control_key.public().pin()];
    let signer = ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(thief.to_pkcs8())).unwrap();
    let shown = CertificateDer::from(host_key.public().spki().to_vec());
    let mut config = client(&thief, &pins).unwrap();
    config.client_auth_cert_resolver = Arc::new(rustls::client::AlwaysResolvesClientRawPublicKeys::new(
        Arc::new(CertifiedKey::new(vec![shown], signer)),
    ));
    let (_, control, _, of_control) = handshake(config, server(&control_key).unwrap());
    assert!(of_control.is_some() && control.is_handshaking());
}

#[test]
fn host_without_a_key_is_refused() {
    let control_key = key();
    let pins = [control_key.public().pin()];
    let mut config = client(&key(), &pins).unwrap();
    config.client_auth_cert_resolver = Arc::new(Keyless);
    let (_, control, _, of_control) = handshake(config, server(&control_key).unwrap());
    assert!(of_control.is_some() && control.is_handshaking());
}

#[derive(Debug)]
struct Keyless;

impl rustls::client::ResolvesClientCert for Keyless {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }

    fn has_certs(&self) -> bool {
        true
    }
}
