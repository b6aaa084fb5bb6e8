//! Bytes on the wire: ttrpc messages in the frames of NRI's multiplexer.
//!
//! ```text
//!   mux    connection u32 · length u32 · bytes of that connection's stream
//!   ttrpc  length u32 · stream u32 · type u8 · flags u8 · protobuf        (all big-endian)
//! ```
//!
//! The published reader takes a frame in one read into a buffer of 4096 bytes, or straight into
//! what is missing of a message when that is more. So a message is sent as one frame of at most
//! that size and, if it is longer, one more with the rest.

use std::collections::BTreeMap;

/// Bytes of a ttrpc header.
const HEADER: usize = 10;
/// Longest payload of a ttrpc message.
pub(crate) const MAX_PAYLOAD: usize = 4 << 20;
/// First frame of a message.
const FIRST: usize = 4096;
/// Bytes of a mux header.
pub(crate) const MUX_HEADER: usize = 8;

/// The connection on which the runtime calls the plugin.
pub(crate) const TO_PLUGIN: u32 = 1;
/// The connection on which the plugin calls the runtime.
pub(crate) const FROM_PLUGIN: u32 = 2;

/// What a ttrpc message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    Response,
}

/// One ttrpc message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) stream: u32,
    pub(crate) kind: Kind,
    pub(crate) payload: Vec<u8>,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// Longer than any message may be.
    #[error("a message of {0} bytes, and {MAX_PAYLOAD} are the most")]
    TooLong(usize),
    /// Neither a request nor a response.
    #[error("a message of unknown type {0}")]
    Type(u8),
}

/// The frames of a message on a connection.
pub(crate) fn encode(connection: u32, message: &Message) -> Result<Vec<u8>, FrameError> {
    let length = message.payload.len();
    let too_long = || FrameError::TooLong(length);
    let size = u32::try_from(length).ok().filter(|_| length <= MAX_PAYLOAD).ok_or_else(too_long)?;
    let mut bytes = Vec::with_capacity(HEADER + length);
    bytes.extend(size.to_be_bytes());
    bytes.extend(message.stream.to_be_bytes());
    bytes.extend([if message.kind == Kind::Request { 1 } else { 2 }, 0]);
    bytes.extend(&message.payload);
    let (first, rest) = bytes.split_at(bytes.len().min(FIRST));
    let mut frames = Vec::with_capacity(bytes.len() + 2 * MUX_HEADER);
    for part in [first, rest].into_iter().filter(|part| !part.is_empty()) {
        frames.extend(connection.to_be_bytes());
        // Bounded by MAX_PAYLOAD.
        frames.extend((part.len() as u32).to_be_bytes());
        frames.extend(part);
    }
    Ok(frames)
}

/// Connection and length of a mux header; a length that no frame has is an error.
pub(crate) fn mux_header(bytes: [u8; MUX_HEADER]) -> Result<(u32, usize), FrameError> {
    let [a, b, c, d, e, f, g, h] = bytes;
    let length = u32::from_be_bytes([e, f, g, h]) as usize;
    if length > HEADER + MAX_PAYLOAD {
        return Err(FrameError::TooLong(length));
    }
    Ok((u32::from_be_bytes([a, b, c, d]), length))
}

/// Puts messages together from what arrives on the connections.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    partial: BTreeMap<u32, Vec<u8>>,
}

impl Streams {
    /// Takes bytes of a connection; the messages that are now complete. Bytes of connections
    /// that nobody uses are dropped.
    pub(crate) fn take(
        &mut self,
        connection: u32,
        bytes: &[u8],
    ) -> Result<Vec<Message>, FrameError> {
        if ![TO_PLUGIN, FROM_PLUGIN].contains(&connection) {
            return Ok(Vec::new());
        }
        let partial = self.partial.entry(connection).or_default();
        partial.extend_from_slice(bytes);
        let mut messages = Vec::new();
        while let Some((message, used)) = decode(partial)? {
            partial.drain(..used);
            messages.push(message);
        }
        Ok(messages)
    }
}

/// The first message, and how many bytes it has; `None` while it is not complete.
fn decode(bytes: &[u8]) -> Result<Option<(Message, usize)>, FrameError> {
    let Some((&[a, b, c, d, e, f, g, h, kind, _], rest)) = bytes.split_first_chunk::<HEADER>()
    else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length > MAX_PAYLOAD {
        return Err(FrameError::TooLong(length));
    }
    let kind = match kind {
        1 => Kind::Request,
        2 => Kind::Response,
        other => return Err(FrameError::Type(other)),
    };
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let stream = u32::from_be_bytes([e, f, g, h]);
    Ok(Some((Message { stream, kind, payload: payload.to_vec() }, HEADER + length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Splits frames as the reader of a link does.
    fn unframe(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut frames = Vec::new();
        while let Some((header, rest)) = bytes.split_first_chunk() {
            let (connection, length) = mux_header(*header).unwrap();
            frames.push((connection, rest[..length].to_vec()));
            bytes = &rest[length..];
        }
        frames
    }

    #[test]
    fn a_short_message_is_one_frame_and_a_long_one_two() {
        let message = |length| Message { stream: 3, kind: Kind::Request, payload: vec![7; length] };
        for (length, frames) in [(0, 1), (4086, 1), (4087, 2), (1 << 20, 2)] {
            let bytes = encode(TO_PLUGIN, &message(length)).unwrap();
            let found = unframe(&bytes);
            assert_eq!(found.len(), frames, "{length}");
            assert!(found[0].1.len() <= FIRST);
        }
        assert!(encode(TO_PLUGIN, &message(MAX_PAYLOAD + 1)).is_err());
    }

    #[test]
    fn lengths_that_no_message_has_end_the_connection() {
        assert!(mux_header([0, 0, 0, 1, 0xff, 0, 0, 0]).is_err());
        let mut streams = Streams::default();
        let huge = [0xff, 0, 0, 0, 0, 0, 0, 1, 1, 0];
        assert!(streams.take(TO_PLUGIN, &huge).is_err());
        let odd = [0, 0, 0, 0, 0, 0, 0, 1, 9, 0];
        assert_eq!(Streams::default().take(FROM_PLUGIN, &odd), Err(FrameError::Type(9)));
        assert_eq!(streams.take(77, &huge), Ok(Vec::new()), "nobody's connection");
    }

    proptest! {
        /// However the bytes are cut, the messages are the same.
        #[test]
        fn messages_survive_any_cutting(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9000), 1..5),
            cut in 1usize..5000,
        ) {
            let messages: Vec<_> = payloads
                .into_iter()
                .zip(1u32..)
                .map(|(payload, stream)| Message { stream, kind: Kind::Response, payload })
                .collect();
            let mut streams = Streams::default();
            let mut found = Vec::new();
            for message in &messages {
                for (connection, bytes) in unframe(&encode(FROM_PLUGIN, message).unwrap()) {
                    for piece in bytes.chunks(cut) {
                        found.extend(streams.take(connection, piece).unwrap());
                    }
                }
            }
            prop_assert_eq!(found, messages);
        }

        #[test]
        fn any_bytes_are_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Streams::default().take(TO_PLUGIN, &bytes);
        }
    }
}
