//! Telling the gateways about a lease, before the guest knocks.
//!
//! ```text
//! control → gateway    {"admit": {…}} newline                                 at most MAX_ADMIT bytes
//! gateway → control    {"admitted": true} newline, or {"refused": words} newline    at most MAX_ANSWER
//! ```
//!
//! over a Unix stream socket. A gateway that does not answer in time gets no second word, and the lease
//! goes out all the same: the guest tries its other gateway, and asks again if neither lets it in.

use crate::config::GatewayConfig;
use kontor_bundle::lease::Admit;
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::{Instant, timeout_at},
};

/// Most bytes of an admission's line.
pub(crate) const MAX_ADMIT: usize = 512 * 1024;
/// Most bytes of the answer's line.
pub(crate) const MAX_ANSWER: u64 = 4 * 1024;
/// How long all gateways together are waited for.
pub(crate) const WAIT: Duration = Duration::from_millis(500);

/// Why a gateway may not have admitted a lease.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdmissionError {
    #[error("the admission has {0} bytes, the limit is {MAX_ADMIT}")]
    TooLarge(usize),
    #[error("no answer within {} ms", WAIT.as_millis())]
    Late,
    #[error("speak to {path}")]
    Speak { path: PathBuf, source: io::Error },
    #[error("the answer does not parse")]
    Answer(#[source] serde_json::Error),
    #[error("the gateway refused: {0:?}")]
    Refused(String),
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum ToGateway<'a> {
    Admit(&'a Admit),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FromGateway {
    Admitted(bool),
    Refused(String),
}

/// Tells each of `gateways` and waits at most [`WAIT`] for all of them together. The answers come in the
/// order of `gateways`.
pub(crate) async fn tell(
    admit: &Admit,
    gateways: &[&GatewayConfig],
) -> Vec<(u8, Result<(), AdmissionError>)> {
    let line = match line(admit) {
        Ok(line) => Arc::new(line),
        Err(bytes) => {
            return gateways
                .iter()
                .map(|gateway| (gateway.id, Err(AdmissionError::TooLarge(bytes))))
                .collect();
        }
    };
    let until = Instant::now() + WAIT;
    let asked: Vec<_> = gateways
        .iter()
        .map(|gateway| {
            let (line, path) = (Arc::clone(&line), gateway.admission.clone());
            let told = async move { timeout_at(until, ask(&path, &line)).await };
            (gateway.id, tokio::spawn(told))
        })
        .collect();
    let mut answers = Vec::new();
    for (id, told) in asked {
        // A task that panicked has given no answer either.
        let told =
            told.await.map_or(Err(AdmissionError::Late), |told| told.unwrap_or(Err(AdmissionError::Late)));
        answers.push((id, told));
    }
    answers
}

/// The line, or its length if that is too much.
fn line(admit: &Admit) -> Result<Vec<u8>, usize> {
    let mut line = serde_json::to_vec(&ToGateway::Admit(admit)).expect("text serializes");
    line.push(b'\n');
    if line.len() > MAX_ADMIT { Err(line.len()) } else { Ok(line) }
}

async fn ask(path: &Path, line: &[u8]) -> Result<(), AdmissionError> {
    let speak = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(line).await?;
        let mut answer = Vec::new();
        BufReader::new(stream).take(MAX_ANSWER).read_until(b'\n', &mut answer).await?;
        Ok(answer)
    };
    let answer =
        speak.await.map_err(|source: io::Error| AdmissionError::Speak { path: path.to_owned(), source })?;
    match serde_json::from_slice(&answer).map_err(AdmissionError::Answer)? {
        FromGateway::Admitted(true) => Ok(()),
        FromGateway::Admitted(false) => Err(AdmissionError::Refused(String::new())),
        FromGateway::Refused(words) => Err(AdmissionError::Refused(words)),
    }
}

#[cfg(test)]
mod tests {
    use super::{AdmissionError, MAX_ADMIT, MAX_ANSWER, ask, line};
    use kontor_bundle::lease::Admit;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        thread,
    };

    #[test]
    fn admission_has_at_most_512_kib() {
        // Base64 grows by four characters; empty keysets make up for the rest.
        let admit = |keysets, device| Admit {
            keysets: vec![Vec::new(); keysets],
            device: vec![0; device],
            ..Admit::default()
        };
        let length = |admit: &Admit| line(admit).map_or_else(|length| length, |line| line.len());
        let keysets = (0..5).find(|keysets| length(&admit(*keysets, 0)).is_multiple_of(4)).unwrap();
        let room = MAX_ADMIT - length(&admit(keysets, 0));
        let fits = admit(keysets, room / 4 * 3);
        assert_eq!(line(&fits).unwrap().len(), MAX_ADMIT);
        assert_eq!(line(&admit(keysets, room / 4 * 3 + 1)).unwrap_err(), MAX_ADMIT + 4);
    }

    /// What is made of an answer of these bytes.
    async fn answered(answer: Vec<u8>) -> Result<(), AdmissionError> {
        let directory = tempfile::TempDir::new().expect("a directory");
        let path = directory.path().join("gateway.sock");
        let listener = UnixListener::bind(&path).expect("a new socket");
        let gateway = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("control");
            stream.read_exact(&mut [0; 3]).expect("the line");
            // Control may have hung up in the middle of it.
            let _ = stream.write_all(&answer);
        });
        let answer = ask(&path, b"{}\n").await;
        gateway.join().expect("no panic");
        answer
    }

    #[tokio::test]
    async fn answer_is_one_line_of_at_most_4_kib() {
        let refusal = |length: usize| {
            let words = "x".repeat(length - "{\"refused\":\"\"}\n".len());
            format!("{{\"refused\":\"{words}\"}}\n").into_bytes()
        };
        let most = usize::try_from(MAX_ANSWER).unwrap();
        assert!(matches!(answered(refusal(most)).await, Err(AdmissionError::Refused(_))));
        assert!(matches!(answered(refusal(most + 2)).await, Err(AdmissionError::Answer(_))));
        assert!(answered(b"{\"admitted\":true}\n".to_vec()).await.is_ok());
        assert!(
            answered(b"{\"admitted\":true}".to_vec()).await.is_ok(),
            "the end of the stream ends a line too"
        );
    }

    #[tokio::test]
    async fn answer_that_is_none_admits_nothing() {
        assert!(matches!(
            answered(b"{\"admitted\":false}\n".to_vec()).await,
            Err(AdmissionError::Refused(_))
        ));
        for wrong in [
            &b""[..],
            b"\n",
            b"{}\n",
            b"yes\n",
            b"{\"admitted\":1}\n",
            b"{\"admitted\":true,\"x\":1}\n",
            b"\xff\n",
        ] {
            assert!(matches!(answered(wrong.to_vec()).await, Err(AdmissionError::Answer(_))), "{wrong:?}");
        }
    }
}
