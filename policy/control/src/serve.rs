//! Control on the network: HTTPS, one route, one request for each connection.
//!
//! ```text
//! POST /v1/lease    a request's envelope, at most 64 KiB  →  200, the answer as JSON, refusals too
//!                   413 too long   503 too many at once   500 something is wrong in the office
//! ```

use crate::{
    Exit,
    answer::{AnswerError, Desk, Front},
    chain,
    hall::{Guest, Hall},
};
use axum::{
    Extension, Router,
    body::{HttpBody, to_bytes},
    extract::{Request, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::post,
};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use kontor_tls::SetupError;
use kontor_trust::{MAX_ENVELOPE, PublicKey};
use std::{future::poll_fn, io, net::SocketAddr, path::Path, sync::Arc, task::Poll, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tokio_rustls::TlsAcceptor;

/// Most bytes of a request's head.
const MAX_HEAD: usize = 8 * 1024;
/// Most lines of a request's head.
const MAX_HEADERS: usize = 32;
/// How long answers under way may take when control ends.
const GRACE: Duration = Duration::from_secs(5);
/// How long no connection is accepted after that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why control does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error("use control.key")]
    Tls(#[from] SetupError),
    #[error("listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
}

/// Serves until a signal ends it.
pub(crate) fn run(dir: &Path) -> Result<(), ServeError> {
    let (desk, front) = Desk::open(dir)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServeError::Runtime)?;
    runtime.block_on(serve(desk, front))
}

async fn serve(desk: Desk, Front { listen, tls_key }: Front) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Runtime)?;
    let tls = TlsAcceptor::from(Arc::new(kontor_tls::server(&tls_key)?));
    drop(tls_key);
    let mut listeners = Vec::new();
    for address in listen {
        let failed = |source| ServeError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        tracing::info!(address = %listener.local_addr().map_err(failed)?, "listening");
        listeners.push(listener);
    }
    let router = Router::new().route("/v1/lease", post(lease)).with_state(Arc::new(desk));
    let mut hall = Hall::default();
    tracing::info!("kontor-control is ready");
    loop {
        tokio::select! {
            accepted = accept(&listeners) => match accepted {
                Ok(stream) => {
                    let (tls, router) = (tls.clone(), router.clone());
                    hall.admit(|guest| live(stream, tls, router, guest));
                }
                Err(error) => {
                    tracing::warn!("accept a connection: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            () = hall.see_off() => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("kontor-control ends");
    drop(listeners);
    hall.close(GRACE).await;
    Ok(())
}

/// The next connection on any of the listeners.
async fn accept(listeners: &[TcpListener]) -> io::Result<TcpStream> {
    poll_fn(|context| {
        let accepted = listeners.iter().map(|listener| listener.poll_accept(context));
        accepted.into_iter().find(Poll::is_ready).unwrap_or(Poll::Pending)
    })
    .await
    .map(|(stream, _)| stream)
}

/// A connection, from its handshake to its end.
async fn live(stream: TcpStream, tls: TlsAcceptor, router: Router, guest: Guest) {
    let stream = match tls.accept(stream).await {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!("handshake: {error}"),
    };
    // Without a key there was no handshake.
    let Some(peer) = kontor_tls::peer(stream.get_ref().1) else { return };
    let router = router.layer(Extension(peer)).layer(Extension(Arc::new(guest)));
    let mut http = http1::Builder::new();
    http.keep_alive(false).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS).header_read_timeout(None);
    let served = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
    if let Err(error) = served {
        tracing::debug!("connection: {}", chain(&error));
    }
}

async fn lease(
    State(desk): State<Arc<Desk>>,
    Extension(peer): Extension<PublicKey>,
    Extension(guest): Extension<Arc<Guest>>,
    request: Request,
) -> Response {
    let body = request.into_body();
    // What says that it is too long is not waited for.
    if body.size_hint().lower() > MAX_ENVELOPE as u64 {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    }
    let Ok(request) = to_bytes(body, MAX_ENVELOPE).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    if !guest.arrived() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    match desk.answer(peer, request.into()).await {
        Ok(answer) => ([(CONTENT_TYPE, "application/json")], answer).into_response(),
        Err(error) => {
            tracing::error!("{}", chain(&error));
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

impl ServeError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Answer(error) => error.exit(),
            Self::Tls(_) | Self::Listen { .. } | Self::Runtime(_) => Exit::Lacks,
        }
    }
}
