//! The last words of a child process: what it wrote to standard error, cut to a limit.

use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes that are kept.
const TAIL_MAX: usize = 2048;

/// Reads `stream` to its end. Returns the last line that says something, cleaned.
pub(crate) async fn last_words(mut stream: impl AsyncRead + Unpin, who: &'static str) -> String {
    let mut tail = Vec::with_capacity(2 * TAIL_MAX);
    let mut chunk = [0; TAIL_MAX];
    loop {
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                tracing::debug!(who, words = %clean(&chunk[..count]), "standard error");
                tail.extend_from_slice(&chunk[..count]);
                tail.drain(..tail.len().saturating_sub(TAIL_MAX));
            }
        }
    }
    let words = tail.split(|byte| *byte == b'\n').rfind(|line| !line.trim_ascii().is_empty());
    clean(words.unwrap_or_default())
}

/// Text that a terminal or a log takes no harm from: what is not printable ASCII is escaped.
pub(crate) fn clean(bytes: &[u8]) -> String {
    bytes.trim_ascii().escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn last_line_is_kept_and_cleaned() {
        let stream: &[u8] = b"first\nqemu: no \x1b[2J such file\n\n";
        assert_eq!(last_words(stream, "test").await, "qemu: no \\x1b[2J such file");
    }

    #[tokio::test]
    async fn flood_is_cut_to_the_limit() {
        let stream = [vec![b'x'; 10 * TAIL_MAX], b"end".to_vec()].concat();
        let words = last_words(stream.as_slice(), "test").await;
        assert_eq!(words.len(), TAIL_MAX);
        assert!(words.ends_with("xend"));
    }
}
