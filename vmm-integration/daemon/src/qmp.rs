//! QEMU's control protocol (QMP), as much of it as is needed: say `quit`, hear events.
//!
//! QEMU runs what the guest sends, so it is not trusted either: its lines are limited, and what is not
//! understood is passed over.

use crate::{lines::next_line, session::Input, tail::clean};
use serde::Deserialize;
use std::io;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    sync::mpsc,
};

/// Most bytes of a line from QEMU.
const LINE_MAX: usize = 64 * 1024;
/// Ends the greeting's negotiation; no other command is taken before it.
const CAPABILITIES: &[u8] = b"{\"execute\":\"qmp_capabilities\"}\n";
const QUIT: &[u8] = b"{\"execute\":\"quit\"}\n";

/// A line of QEMU, as far as it matters.
#[derive(Debug, Deserialize)]
struct Line {
    event: Option<String>,
    #[serde(default)]
    data: serde_json::Value,
    error: Option<serde_json::Value>,
}

/// Tells `inputs` what QEMU reports until QEMU closes the channel.
pub(crate) async fn listen(from: impl AsyncRead + Unpin, inputs: mpsc::Sender<Input>) {
    let mut from = BufReader::new(from);
    loop {
        let line = match next_line(&mut from, LINE_MAX).await {
            Ok(Some(line)) => line,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "QEMU's control channel is not read any more");
                return;
            }
        };
        let Ok(line) = serde_json::from_slice::<Line>(&line) else {
            tracing::warn!("a line of QEMU's control channel is not understood");
            continue;
        };
        if let Some(error) = line.error {
            tracing::warn!(%error, "QEMU refused a command");
        }
        let Some(event) = line.event else { continue };
        tracing::debug!(event, data = %line.data, "QEMU reports");
        let input = match event.as_str() {
            "GUEST_PANICKED" => Input::Panicked("the guest's kernel reported its panic (pvpanic)".into()),
            "SHUTDOWN" => {
                let word = line.data["reason"].as_str().unwrap_or("shutdown").to_owned();
                Input::WentOff(clean(word.as_bytes()))
            }
            _ => continue,
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

/// Ends the negotiation; events come from now on.
pub(crate) async fn begin(to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    to.write_all(CAPABILITIES).await
}

/// Asks QEMU to end.
pub(crate) async fn quit(to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    to.write_all(QUIT).await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn heard(text: &[u8]) -> Vec<Input> {
        let (tx, mut rx) = mpsc::channel(8);
        listen(text, tx).await;
        let mut heard = Vec::new();
        while let Some(input) = rx.recv().await {
            heard.push(input);
        }
        heard
    }

    #[tokio::test]
    async fn panic_is_reported_once_for_each_event() {
        let text = concat!(
            "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n",
            "{\"return\": {}}\r\n",
            "{\"timestamp\": {\"seconds\": 1}, \"event\": \"RESUME\"}\r\n",
            "{\"timestamp\": {\"seconds\": 2}, \"event\": \"GUEST_PANICKED\", \"data\": {\"action\": \"pause\"}}\r\n",
        );
        assert!(matches!(heard(text.as_bytes()).await.as_slice(), [Input::Panicked(_)]));
    }

    #[tokio::test]
    async fn end_of_the_machine_is_reported_with_its_reason() {
        let text = b"{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-reset\"}}\n";
        assert!(matches!(heard(text).await.as_slice(), [Input::WentOff(word)] if word == "guest-reset"));
        assert!(matches!(heard(b"{\"event\":\"SHUTDOWN\"}\n").await.as_slice(), [Input::WentOff(_)]));
    }

    #[tokio::test]
    async fn what_is_not_understood_is_passed_over() {
        let text = b"garbage\n[1]\n\xff\xff\n{\"event\":7}\n{\"event\":\"GUEST_PANICKED\"}\n";
        assert_eq!(heard(text).await.len(), 1);
    }

    #[tokio::test]
    async fn line_above_the_limit_ends_the_listening() {
        let text = [vec![b'x'; LINE_MAX + 1], b"\n{\"event\":\"GUEST_PANICKED\"}\n".to_vec()].concat();
        assert!(heard(&text).await.is_empty());
    }
}
