//! Length-prefixed frames on a byte stream: `u32` little endian, then that many bytes of postcard.

use serde::{Serialize, de::DeserializeOwned};

/// Bytes of the length in front of every frame.
const PREFIX_LEN: usize = 4;

/// Why a frame was refused. The stream cannot be resumed after any of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced length is above the limit of this direction.
    #[error("a frame announces {announced} bytes, the limit is {limit}")]
    TooLong {
        /// What the length prefix said.
        announced: usize,
        /// The limit of this direction.
        limit: usize,
    },
    /// The body is no message of this direction, or is followed by bytes that belong to none.
    #[error("a frame of {0} bytes holds no message")]
    Malformed(usize),
}

/// Serialises `message` behind its length.
///
/// # Panics
/// When `message` is larger than 4 GiB; no message type here can be.
#[must_use]
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let mut frame = vec![0; PREFIX_LEN];
    frame = postcard::to_extend(message, frame).expect("a Vec grows as postcard asks");
    let length = u32::try_from(frame.len() - PREFIX_LEN).expect("no message comes near 4 GiB");
    frame[..PREFIX_LEN].copy_from_slice(&length.to_le_bytes());
    frame
}

/// Cuts a byte stream into messages. Holds at most one frame of the limit, however the peer behaves.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses frames whose body is longer than `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), limit }
    }

    /// How many bytes [`Decoder::push`] takes now: read at most so many from the stream.
    #[must_use]
    pub fn room(&self) -> usize {
        (self.limit + PREFIX_LEN).saturating_sub(self.buffer.len())
    }

    /// Takes bytes as they came from the stream; returns how many were taken (at most [`Decoder::room`]).
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.buffer.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// The next whole message, `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`] when the peer announces too much or sends what is no `M`.
    pub fn next_message<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        let Some(prefix) = self.buffer.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
        let announced = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if announced > self.limit {
            return Err(FrameError::TooLong { announced, limit: self.limit });
        }
        let Some(body) = self.buffer.get(PREFIX_LEN..PREFIX_LEN + announced) else { return Ok(None) };
        let (message, rest) =
            postcard::take_from_bytes(body).map_err(|_| FrameError::Malformed(announced))?;
        if !rest.is_empty() {
            return Err(FrameError::Malformed(announced));
        }
        self.buffer.drain(..PREFIX_LEN + announced);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 64;

    #[test]
    fn frame_at_the_limit_passes_and_one_byte_more_is_refused() {
        let mut decoder = Decoder::new(LIMIT);
        let fits = encode(&vec![7u8; LIMIT - 1]);
        assert_eq!(fits.len(), PREFIX_LEN + LIMIT);
        assert_eq!(decoder.push(&fits), fits.len());
        assert_eq!(decoder.next_message::<Vec<u8>>(), Ok(Some(vec![7; LIMIT - 1])));

        decoder.push(&encode(&vec![7u8; LIMIT]));
        let too_long = FrameError::TooLong { announced: LIMIT + 1, limit: LIMIT };
        assert_eq!(decoder.next_message::<Vec<u8>>(), Err(too_long));
    }

    #[test]
    fn bytes_behind_the_message_are_refused() {
        let mut frame = encode(&3u8);
        frame.push(9);
        frame[0] += 1;
        let mut decoder = Decoder::new(LIMIT);
        decoder.push(&frame);
        assert_eq!(decoder.next_message::<u8>(), Err(FrameError::Malformed(2)));
    }

    proptest! {
        #[test]
        fn any_stream_is_cut_without_panic_and_without_growth(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..40)
        ) {
            let mut decoder = Decoder::new(LIMIT);
            'stream: for chunk in chunks {
                let mut rest = chunk.as_slice();
                while !rest.is_empty() {
                    let taken = decoder.push(rest);
                    rest = &rest[taken..];
                    prop_assert!(decoder.buffer.len() <= LIMIT + PREFIX_LEN);
                    loop {
                        match decoder.next_message::<(u8, Vec<u8>)>() {
                            Ok(Some(_)) => {}
                            Ok(None) => break,
                            Err(_) => break 'stream,
                        }
                    }
                }
            }
        }

        #[test]
        fn messages_survive_any_split(messages in prop::collection::vec("[a-z]{0,50}", 1..8), cut in 1usize..30) {
            let stream: Vec<u8> = messages.iter().flat_map(encode).collect();
            let mut decoder = Decoder::new(LIMIT);
            let mut seen = Vec::new();
            for chunk in stream.chunks(cut) {
                let mut rest = chunk;
                while !rest.is_empty() {
                    rest = &rest[decoder.push(rest)..];
                    while let Some(message) = decoder.next_message::<String>().unwrap() {
                        seen.push(message);
                    }
                }
            }
            prop_assert_eq!(seen, messages);
        }
    }
}
