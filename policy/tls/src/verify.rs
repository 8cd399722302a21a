//! Whether the other end holds the key that it shows, and whether that is a key to speak with.

use kontor_trust::{Digest, PublicKey};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::{io, sync::Arc};

/// Somebody with a key that is not pinned answered instead of control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the key with the pin {0} is none that the keyset names for the office's control")]
pub struct Stranger(pub Digest);

/// The stranger that a handshake failed for, if it did for that.
#[must_use]
pub fn stranger(error: &io::Error) -> Option<Stranger> {
    let Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) =
        error.get_ref()?.downcast_ref()?
    else {
        return None;
    };
    cause.downcast_ref().copied()
}

/// Takes the pinned keys only.
#[derive(Debug)]
pub(crate) struct Pinned {
    pins: Vec<Digest>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Takes every key.
#[derive(Debug)]
pub(crate) struct Anybody {
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    pub(crate) fn new(provider: &CryptoProvider, pins: &[Digest]) -> Self {
        Self { pins: pins.to_vec(), algorithms: provider.signature_verification_algorithms }
    }
}

impl Anybody {
    pub(crate) fn new(provider: &CryptoProvider) -> Self {
        Self { algorithms: provider.signature_verification_algorithms }
    }
}

/// The key that is shown: exactly one, and an Ed25519 key.
fn shown(end: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<PublicKey, Error> {
    let key = PublicKey::from_spki(end).filter(|_| more.is_empty());
    key.ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))
}

/// What is the same on both ends: a handshake of version 1.3, signed with the bare Ed25519 key that is shown.
macro_rules! signed_with_the_key_that_is_shown {
    () => {
        /// Version 1.2 is never offered.
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(PeerIncompatible::Tls12NotOffered.into())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let key = SubjectPublicKeyInfoDer::from(key.as_ref());
            verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pin = shown(end, more)?.pin();
        if self.pins.contains(&pin) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Stranger(pin))))))
    }

    signed_with_the_key_that_is_shown!();
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        shown(end, more).map(|_| ClientCertVerified::assertion())
    }

    signed_with_the_key_that_is_shown!();
}
