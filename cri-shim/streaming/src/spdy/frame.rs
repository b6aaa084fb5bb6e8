//! SPDY/3 frames: to bytes and back, without I/O.
//!
//! ```text
//!  control  |1| version 3 (15) | type (16) | flags (8) | length (24) | body
//!  data     |0| stream id (31)             | flags (8) | length (24) | body
//! ```

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// The longest frame body accepted: a client sends far shorter ones.
pub const MAX_FRAME: usize = 1 << 20;
const HEADER: usize = 8;
const VERSION: u16 = 3;
const FIN: u8 = 1;

/// A frame; header blocks are still compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// Odd when the client opens it.
        stream: u32,
        /// The opener sends nothing more.
        fin: bool,
        /// Compressed header block.
        block: Bytes,
    },
    /// Accepts a stream.
    SynReply {
        /// The stream.
        stream: u32,
        /// The sender sends nothing more.
        fin: bool,
        /// Compressed header block.
        block: Bytes,
    },
    /// Further headers of a stream.
    Headers {
        /// The stream.
        stream: u32,
        /// Compressed header block.
        block: Bytes,
    },
    /// Ends a stream at once.
    Reset {
        /// The stream.
        stream: u32,
        /// Why; see the protocol's list.
        status: u32,
    },
    /// To be answered with the same id.
    Ping(u32),
    /// The sender opens no more streams.
    GoAway {
        /// The last stream it took.
        last: u32,
        /// Why.
        status: u32,
    },
    /// Bytes of a stream.
    Data {
        /// The stream.
        stream: u32,
        /// The sender sends nothing more.
        fin: bool,
        /// The bytes.
        bytes: Bytes,
    },
    /// Settings, window updates and the like: read over.
    Other,
}

/// A frame that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    #[error("a SPDY frame of {0} bytes; at most {MAX_FRAME} are accepted")]
    TooLong(usize),
    /// Not SPDY/3.
    #[error("a SPDY control frame of version {0}; only 3 is spoken")]
    Version(u16),
    /// A body shorter than its type needs, or for stream 0.
    #[error("a malformed SPDY frame of type {0}")]
    Malformed(u16),
}

impl Frame {
    /// Takes the first whole frame off the buffer; `None` while bytes are missing.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        if buffer.len() < HEADER {
            return Ok(None);
        }
        let word = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]);
        let flags = buffer[4];
        let length = u32::from_be_bytes([0, buffer[5], buffer[6], buffer[7]]) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length));
        }
        if buffer.len() < HEADER + length {
            return Ok(None);
        }
        buffer.advance(HEADER);
        let body = buffer.split_to(length).freeze();
        if word & 0x8000_0000 == 0 {
            return match word {
                0 => Err(FrameError::Malformed(0)),
                stream => Ok(Some(Self::Data { stream, fin: flags & FIN != 0, bytes: body })),
            };
        }
        let version = (word >> 16) as u16 & 0x7fff;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        Self::control(word as u16, flags & FIN != 0, body).map(Some)
    }

    fn control(kind: u16, fin: bool, mut body: Bytes) -> Result<Self, FrameError> {
        let short = || FrameError::Malformed(kind);
        let word = |body: &mut Bytes| body.try_get_u32().map_err(|_end| short());
        let stream = |body: &mut Bytes| match word(body)? & 0x7fff_ffff {
            0 => Err(short()),
            id => Ok(id),
        };
        Ok(match kind {
            1 => {
                let stream = stream(&mut body)?;
                word(&mut body)?; // associated stream
                body.try_get_u16().map_err(|_end| short())?; // priority and slot
                Self::SynStream { stream, fin, block: body }
            }
            2 => Self::SynReply { stream: stream(&mut body)?, fin, block: body },
            3 => Self::Reset { stream: stream(&mut body)?, status: word(&mut body)? },
            6 => Self::Ping(word(&mut body)?),
            7 => Self::GoAway { last: word(&mut body)? & 0x7fff_ffff, status: word(&mut body)? },
            8 => Self::Headers { stream: stream(&mut body)?, block: body },
            _ => Self::Other,
        })
    }

    /// Appends the frame to a buffer; [`Frame::Other`] appends nothing. Bodies are at most
    /// 2^24 - 1 bytes long: the connection splits data long before.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::SynStream { stream, fin, block } => {
                head(out, 1, *fin, 10 + block.len());
                out.put_u32(*stream);
                out.put_u32(0);
                out.put_u16(0);
                out.put_slice(block);
            }
            Self::SynReply { stream, fin, block } => {
                head(out, 2, *fin, 4 + block.len());
                out.put_u32(*stream);
                out.put_slice(block);
            }
            Self::Headers { stream, block } => {
                head(out, 8, false, 4 + block.len());
                out.put_u32(*stream);
                out.put_slice(block);
            }
            Self::Reset { stream, status } => {
                head(out, 3, false, 8);
                out.put_u32(*stream);
                out.put_u32(*status);
            }
            Self::Ping(id) => {
                head(out, 6, false, 4);
                out.put_u32(*id);
            }
            Self::GoAway { last, status } => {
                head(out, 7, false, 8);
                out.put_u32(*last);
                out.put_u32(*status);
            }
            Self::Data { stream, fin, bytes } => {
                out.put_u32(*stream);
                out.put_u32(u32::from(*fin) << 24 | bytes.len() as u32);
                out.put_slice(bytes);
            }
            Self::Other => {}
        }
    }
}

fn head(out: &mut BytesMut, kind: u16, fin: bool, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32(u32::from(fin) << 24 | length as u32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        let id = 1u32..0x8000_0000;
        prop_oneof![
            (id.clone(), any::<bool>(), bytes())
                .prop_map(|(stream, fin, block)| Frame::SynStream { stream, fin, block }),
            (id.clone(), any::<bool>(), bytes()).prop_map(|(stream, fin, block)| Frame::SynReply {
                stream,
                fin,
                block
            }),
            (id.clone(), bytes()).prop_map(|(stream, block)| Frame::Headers { stream, block }),
            (id.clone(), any::<u32>()).prop_map(|(stream, status)| Frame::Reset { stream, status }),
            any::<u32>().prop_map(Frame::Ping),
            (0u32..0x8000_0000, any::<u32>())
                .prop_map(|(last, status)| Frame::GoAway { last, status }),
            (id, any::<bool>(), bytes()).prop_map(|(stream, fin, bytes)| Frame::Data {
                stream,
                fin,
                bytes
            }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(all in prop::collection::vec(frames(), 0..8), cut in 1usize..40) {
            let mut wire = BytesMut::new();
            for frame in &all {
                frame.encode(&mut wire);
            }
            let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
            for chunk in wire.chunks(cut) {
                buffer.extend_from_slice(chunk);
                while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, all);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
        }
    }

    #[test]
    fn a_frame_too_long_is_refused_before_it_is_read() {
        let mut buffer = BytesMut::from(&[0, 0, 0, 1, 0, 0xff, 0xff, 0xff][..]);
        assert_eq!(Frame::decode(&mut buffer), Err(FrameError::TooLong(0xff_ffff)));
    }
}
