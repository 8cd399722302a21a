//! Where leases come from: control, over HTTPS.
//!
//! ```text
//! kontord → control    POST /v1/lease, the request's envelope          TLS 1.3 with the host key, towards
//! control → kontord    {"lease":{"keysets":[base64 …],"device":base64,   a key that the stored keyset pins
//!                       "bundle":base64,"lease":base64}}
//!                      {"refused":"words"}
//!                      {"revoked":{"keysets":[base64 …],"device":base64}}
//! ```
//!
//! Nothing of the answer is believed here; [`lease`](crate::lease) checks it. Each request has a
//! connection of its own, and everything that may take time has a limit with a name.

use crate::{
    store::{Store, StoreError},
    tail::clean,
};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use kontor_bundle::lease::{MAX_KEYSETS, Notice, Parts};
use kontor_tls::{SetupError, Stranger, stranger};
use kontor_trust::MAX_ENVELOPE;
use rustls::{ClientConfig, pki_types::ServerName};
use serde::Deserialize;
use std::{error::Error, fmt, io, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Most bytes of an answer: every envelope of a lease at its longest, in base64, and the JSON around.
pub const MAX_ANSWER: usize = (MAX_KEYSETS + 3) * MAX_ENVELOPE.div_ceil(3) * 4 + 1024;
/// How long an answer may take, from the name to the last byte. A guest waits a minute.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long the host may take to resolve the office's name.
const RESOLVE: Duration = Duration::from_secs(5);
/// How long one address of the office may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(4);
/// How long the handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Most addresses of the office that are tried.
const ADDRESSES_MAX: usize = 8;
/// Most bytes of an answer's head.
const HEAD_MAX: usize = 8 * 1024;
/// Most characters of the office's words that are passed on.
const WORDS_MAX: usize = 200;

/// Where control answers: a name or an address, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct OfficeAddress {
    /// As it was written.
    text: String,
    name: ServerName<'static>,
}

/// Text that is no such address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address of an office: write name:port, a.b.c.d:port or [v6]:port")]
pub struct OfficeAddressError(String);

impl FromStr for OfficeAddress {
    type Err = OfficeAddressError;

    fn from_str(text: &str) -> Result<Self, OfficeAddressError> {
        let read = || {
            let (host, port) = text.rsplit_once(':')?;
            port.parse::<u16>().ok().filter(|port| *port != 0)?;
            let name = match text.parse::<SocketAddr>() {
                Ok(address) => ServerName::from(address.ip()),
                Err(_) if host.contains(':') => return None,
                Err(_) => ServerName::try_from(host.to_owned()).ok()?,
            };
            Some(Self { text: text.to_owned(), name })
        };
        read().ok_or_else(|| OfficeAddressError(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for OfficeAddress {
    type Error = OfficeAddressError;

    fn try_from(text: String) -> Result<Self, OfficeAddressError> {
        text.parse()
    }
}

impl fmt::Display for OfficeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What the office says to a request.
#[derive(Debug)]
pub enum Reply {
    /// A lease, not yet checked.
    Lease(Parts),
    /// No, in these words.
    Refused(String),
    /// The device is revoked, says a record that is not yet checked.
    Revoked(Notice),
}

/// Why the office says nothing.
#[derive(Debug, thiserror::Error)]
pub enum OfficeError {
    /// The key to show, or the keys to expect.
    #[error("prepare to speak with the office")]
    Store(#[from] StoreError),
    /// The same.
    #[error("prepare to speak with the office")]
    Setup(#[from] SetupError),
    /// Its name.
    #[error("find the office {0}: is this PC online?")]
    Resolve(OfficeAddress, #[source] io::Error),
    /// None of its addresses accepts a connection.
    #[error("reach the office {0}: is this PC online?")]
    Connect(OfficeAddress, #[source] io::Error),
    /// Somebody else answers in its place.
    #[error("somebody else answers as the office {0}: no lease is taken from there; tell IT")]
    Stranger(OfficeAddress, #[source] Stranger),
    /// The handshake, for another reason. Who refuses this host's key does so here or in [`Self::Speak`].
    #[error("agree on a secure connection with the office {0}")]
    Handshake(OfficeAddress, #[source] io::Error),
    /// The connection broke.
    #[error("speak with the office {0}")]
    Speak(OfficeAddress, #[source] Box<dyn Error + Send + Sync>),
    /// It took longer than [`PATIENCE`], or a part of it longer than that may take.
    #[error("the office did not answer in time")]
    Late,
    /// An answer that is not about the request.
    #[error("the office answers with HTTP status {0}; tell IT")]
    Status(StatusCode),
    /// The answer is longer than [`MAX_ANSWER`].
    #[error("the office's answer is longer than {MAX_ANSWER} bytes")]
    TooLong,
    /// What it answered is no answer.
    #[error("understand the office's answer")]
    Parse(#[source] serde_json::Error),
}

/// Somebody who answers requests for leases.
pub trait LeaseSource: Clone + Send + Sync + 'static {
    /// Answers one request.
    fn answer(&self, request: Vec<u8>) -> impl Future<Output = Result<Reply, OfficeError>> + Send;
}

/// Control.
#[derive(Debug, Clone)]
pub struct HttpsOffice {
    address: OfficeAddress,
    store: Store,
    patience: Duration,
}

impl HttpsOffice {
    /// Control at `address`, which is told from others by what `store` holds.
    #[must_use]
    pub fn new(address: OfficeAddress, store: Store) -> Self {
        Self { address, store, patience: PATIENCE }
    }

    async fn ask(&self, request: Vec<u8>) -> Result<Reply, OfficeError> {
        let stream = self.open().await?;
        let (status, body) = self.post(stream, request).await?;
        if status != StatusCode::OK {
            return Err(OfficeError::Status(status));
        }
        parse(&body)
    }

    /// Whether the office answers, and is the office.
    pub(crate) async fn reach(&self) -> Result<(), OfficeError> {
        let opened = timeout(self.patience, self.open()).await.unwrap_or(Err(OfficeError::Late));
        opened.map(|_| ())
    }

    async fn open(&self) -> Result<TlsStream<TcpStream>, OfficeError> {
        let pins = self.store.keyset()?.keyset().control_spki.clone();
        let config = kontor_tls::client(&self.store.host_key()?, &pins)?;
        self.secure(self.connect().await?, config).await
    }

    async fn connect(&self) -> Result<TcpStream, OfficeError> {
        let resolve = timeout(RESOLVE, lookup_host(&self.address.text)).await;
        let addresses = resolve.map_err(|_| OfficeError::Late)?;
        let addresses = addresses.map_err(|error| OfficeError::Resolve(self.address.clone(), error))?;
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses.take(ADDRESSES_MAX) {
            match timeout(CONNECT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(OfficeError::Connect(self.address.clone(), last))
    }

    async fn secure(
        &self,
        stream: TcpStream,
        config: ClientConfig,
    ) -> Result<TlsStream<TcpStream>, OfficeError> {
        let connector = TlsConnector::from(Arc::new(config));
        let handshake = timeout(HANDSHAKE, connector.connect(self.address.name.clone(), stream)).await;
        handshake.map_err(|_| OfficeError::Late)?.map_err(|error| match stranger(&error) {
            Some(stranger) => OfficeError::Stranger(self.address.clone(), stranger),
            None => OfficeError::Handshake(self.address.clone(), error),
        })
    }

    async fn post(
        &self,
        stream: TlsStream<TcpStream>,
        request: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), OfficeError> {
        let broke = |error: hyper::Error| OfficeError::Speak(self.address.clone(), error.into());
        let mut http = http1::Builder::new();
        let (mut sender, connection) =
            http.max_buf_size(HEAD_MAX).handshake(TokioIo::new(stream)).await.map_err(broke)?;
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/lease")
            .header(header::HOST, &self.address.text)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(request)))
            .expect("a host and a port make a header");
        let exchange = async {
            let (head, body) = sender.send_request(request).await.map_err(broke)?.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    OfficeError::TooLong
                } else {
                    OfficeError::Speak(self.address.clone(), error)
                }
            })?;
            Ok((head.status, body.to_bytes()))
        };
        // Polled beside the exchange, which hears of its errors, and dropped with it.
        tokio::select! {
            answer = exchange => answer,
            never = async { let _ = connection.await; std::future::pending().await } => never,
        }
    }
}

impl LeaseSource for HttpsOffice {
    async fn answer(&self, request: Vec<u8>) -> Result<Reply, OfficeError> {
        timeout(self.patience, self.ask(request)).await.unwrap_or(Err(OfficeError::Late))
    }
}

fn parse(answer: &[u8]) -> Result<Reply, OfficeError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Answer {
        Lease(Parts),
        Refused(String),
        Revoked(Notice),
    }
    match serde_json::from_slice(answer).map_err(OfficeError::Parse)? {
        Answer::Lease(parts) => Ok(Reply::Lease(parts)),
        Answer::Revoked(notice) => Ok(Reply::Revoked(notice)),
        Answer::Refused(words) => {
            let words: String = words.chars().take(WORDS_MAX).collect();
            Ok(Reply::Refused(clean(words.as_bytes())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::OfficeAddress;
    use rustls::pki_types::ServerName;

    #[test]
    fn office_is_a_name_or_an_address_with_a_port() {
        for text in ["control.example:443", "localhost:1", "192.0.2.1:443", "[2001:db8::1]:65535"] {
            let address: OfficeAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(matches!(address.name, ServerName::DnsName(_)), text.contains('l'), "{text}");
        }
        for wrong in [
            "",
            ":443",
            "control",
            "control:",
            "control:0",
            "control:65536",
            "2001:db8::1:443",
            "a b:1",
            "a/b:1",
        ] {
            assert!(wrong.parse::<OfficeAddress>().is_err(), "{wrong}");
        }
    }
}
