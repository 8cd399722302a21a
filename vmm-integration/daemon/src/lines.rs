//! Lines of a limited length from a stream.

use std::io;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// Why there is no next line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    #[error("read a line")]
    Read(#[from] io::Error),
    #[error("a line is longer than {0} bytes")]
    TooLong(usize),
    #[error("the stream ended within a line")]
    Cut,
}

/// The next line without its end, `None` at the end of the stream.
pub(crate) async fn next_line(
    reader: &mut (impl AsyncBufRead + Unpin),
    most: usize,
) -> Result<Option<Vec<u8>>, LineError> {
    let mut line = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    if reader.take(limit).read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    if line.pop_if(|last| *last == b'\n').is_some() {
        Ok(Some(line))
    } else if line.len() > most {
        Err(LineError::TooLong(most))
    } else {
        Err(LineError::Cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn line_at_the_limit_passes_and_a_longer_one_is_refused() {
        let mut reader: &[u8] = b"1234\n12345\n";
        assert_eq!(next_line(&mut reader, 4).await.unwrap().unwrap(), b"1234");
        assert!(matches!(next_line(&mut reader, 4).await, Err(LineError::TooLong(4))));
    }

    #[tokio::test]
    async fn end_of_the_stream_is_told_from_a_cut_line() {
        let mut reader: &[u8] = b"\n12";
        assert_eq!(next_line(&mut reader, 4).await.unwrap().unwrap(), b"");
        assert!(matches!(next_line(&mut reader, 4).await, Err(LineError::Cut)));
        assert!(next_line(&mut reader, 4).await.unwrap().is_none());
    }
}
