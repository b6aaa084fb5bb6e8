//! Length-prefixed frames: a little-endian `u32`, then that many bytes of one message.
//!
//! Pure: bytes in, messages out. A length over the limit or bytes that are no message end
//! the stream with an error that every later call repeats, because nothing after them can
//! be trusted to start at a frame. Memory follows the bytes received, never the length
//! claimed.

use prost::Message;

/// Longest message accepted by default, in bytes, without its prefix.
pub const MAX_FRAME: usize = 1 << 20;

/// Length of the prefix, in bytes.
const PREFIX: usize = 4;

/// An empty decoder gives back buffers larger than this.
const KEPT_CAPACITY: usize = 4096;

/// Why a stream cannot be read on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FrameError {
    /// A frame is longer than the limit.
    #[error("frame of {length} bytes is over the limit of {limit}")]
    TooLarge {
        /// Length of the message, in bytes.
        length: usize,
        /// The limit it broke.
        limit: usize,
    },
    /// The bytes of a frame are not the message they should be.
    #[error("frame is not a valid message")]
    Malformed(#[source] prost::DecodeError),
    /// A message came with another number of descriptors than it names.
    #[error("message names {expected} descriptors, {received} came with it")]
    Descriptors {
        /// What the message needs.
        expected: usize,
        /// What arrived for it.
        received: usize,
    },
    /// The peer closed the connection inside a frame.
    #[error("connection closed inside a frame")]
    Truncated,
}

/// One message as a frame.
///
/// # Errors
/// [`FrameError::TooLarge`] if the message is over [`MAX_FRAME`].
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    let prefix = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_FRAME)
        .ok_or(FrameError::TooLarge { length, limit: MAX_FRAME })?;
    let mut frame = Vec::with_capacity(PREFIX + length);
    frame.extend_from_slice(&prefix.to_le_bytes());
    message.encode_raw(&mut frame);
    Ok(frame)
}

/// Collects bytes and gives back the messages they complete.
///
/// Call [`next`](Self::next) until it returns `None` after each [`push`](Self::push).
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    limit: usize,
    failed: Option<FrameError>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::with_limit(MAX_FRAME)
    }
}

impl Decoder {
    /// A decoder that accepts messages of up to `limit` bytes.
    #[must_use]
    pub fn with_limit(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, limit, failed: None }
    }

    /// Adds bytes as they came from the socket.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.drain(..self.start);
            self.start = 0;
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next whole message, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] or [`FrameError::Malformed`], for ever after the first.
    // Generic in the message, so no Iterator.
    #[allow(clippy::should_implement_trait)]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.decode().inspect_err(|error| {
            self.failed = Some(error.clone());
            self.buffer = Vec::new();
            self.start = 0;
        })
    }

    fn decode<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let received = self.buffer.get(self.start..).unwrap_or_default();
        let Some((prefix, rest)) = received.split_first_chunk::<PREFIX>() else {
            self.release();
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > self.limit {
            return Err(FrameError::TooLarge { length, limit: self.limit });
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = M::decode(body).map_err(FrameError::Malformed)?;
        self.start += PREFIX + length;
        Ok(Some(message))
    }

    /// Whether no part of a message is waiting for the rest of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.buffer.len()
    }

    fn release(&mut self) {
        if self.is_empty() {
            self.buffer.clear();
            self.start = 0;
            if self.buffer.capacity() > KEPT_CAPACITY {
                self.buffer = Vec::new();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Create, Request, request::Verb};
    use proptest::prelude::*;

    fn request(id: u64, text: &str) -> Request {
        let create = Create { id: text.to_owned(), ..Create::default() };
        Request { id, verb: Some(Verb::Create(create)) }
    }

    fn decode_all(decoder: &mut Decoder) -> Result<Vec<Request>, FrameError> {
        let mut messages = Vec::new();
        while let Some(message) = decoder.next()? {
            messages.push(message);
        }
        Ok(messages)
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut_of_the_stream(
            texts in prop::collection::vec(".{0,200}", 0..8),
            cuts in prop::collection::vec(1usize..300, 1..20),
        ) {
            let sent: Vec<Request> =
                (1..).zip(&texts).map(|(id, text)| request(id, text)).collect();
            let mut stream: &[u8] =
                &sent.iter().flat_map(|m| encode(m).unwrap()).collect::<Vec<u8>>();
            let mut decoder = Decoder::default();
            let mut received = Vec::new();
            let mut cuts = cuts.iter().cycle();
            while !stream.is_empty() {
                let (now, later) = stream.split_at((*cuts.next().unwrap()).min(stream.len()));
                decoder.push(now);
                received.extend(decode_all(&mut decoder).unwrap());
                stream = later;
            }
            prop_assert_eq!(received, sent);
            prop_assert!(decoder.is_empty());
        }

        #[test]
        fn arbitrary_bytes_give_messages_or_an_error_and_never_a_panic(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..16),
        ) {
            let mut decoder = Decoder::with_limit(256);
            for chunk in chunks {
                decoder.push(&chunk);
                drop(decode_all(&mut decoder));
                prop_assert!(decoder.buffer.len() <= 16 * 64);
            }
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_le_bytes());
        assert!(matches!(decoder.next::<Request>(), Err(FrameError::TooLarge { .. })));
        assert!(decoder.buffer.capacity() < 64);
    }

    #[test]
    fn an_error_is_final() {
        let mut decoder = Decoder::default();
        decoder.push(&[2, 0, 0, 0, 0xff, 0xff]);
        decoder.push(&encode(&request(1, "x")).unwrap());
        assert!(matches!(decoder.next::<Request>(), Err(FrameError::Malformed(_))));
        decoder.push(&encode(&request(2, "x")).unwrap());
        assert!(matches!(decoder.next::<Request>(), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn a_message_over_the_limit_is_not_encoded() {
        let huge = request(1, &"x".repeat(MAX_FRAME));
        assert!(matches!(encode(&huge), Err(FrameError::TooLarge { .. })));
    }
}
