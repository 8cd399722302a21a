//! The probe channel of a test image, served on a unix socket: bytes go to and fro unchanged, one client
//! after the other.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

const CHUNK_MAX: usize = 64 * 1024;

/// Serves clients until the guest closes its end.
pub(crate) async fn serve(listener: UnixListener, mut guest: UnixStream) {
    loop {
        let Ok((mut client, _)) = listener.accept().await else { return };
        tracing::debug!("a probe client came");
        match join(&mut client, &mut guest).await {
            Closed::Client => tracing::debug!("the probe client is gone"),
            Closed::Guest => return,
        }
    }
}

enum Closed {
    Client,
    Guest,
}

async fn join(client: &mut UnixStream, guest: &mut UnixStream) -> Closed {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_guest, mut to_guest) = guest.split();
    let down = async {
        let mut chunk = vec![0; CHUNK_MAX];
        loop {
            match from_client.read(&mut chunk).await {
                Ok(0) | Err(_) => return Closed::Client,
                Ok(count) => {
                    if to_guest.write_all(&chunk[..count]).await.is_err() {
                        return Closed::Guest;
                    }
                }
            }
        }
    };
    let up = async {
        let mut chunk = vec![0; CHUNK_MAX];
        loop {
            match from_guest.read(&mut chunk).await {
                Ok(0) | Err(_) => return Closed::Guest,
                Ok(count) => {
                    if to_client.write_all(&chunk[..count]).await.is_err() {
                        return Closed::Client;
                    }
                }
            }
        }
    };
    tokio::select! { closed = down => closed, closed = up => closed }
}
