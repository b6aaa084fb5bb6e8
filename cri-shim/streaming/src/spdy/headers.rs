//! SPDY/3 header blocks.
//!
//! A block is a count, then name and value pairs, each with its length; the blocks of one
//! direction share one zlib stream, primed with the protocol's dictionary, and end on a
//! sync flush. A block that expands too far ends the connection: the zlib state is lost.

use bytes::{Buf as _, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// The dictionary of the SPDY/3 specification; its Adler-32 is `e3c6a7c2`.
static DICTIONARY: &[u8] = include_bytes!("dictionary.bin");
/// The most a block may expand to.
const MAX_BLOCK: usize = 64 << 10;

/// Names in lower case, and values; a name's several values are separate pairs.
pub type Headers = Vec<(String, String)>;

/// A block that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Not zlib, or not with this dictionary.
    #[error("a SPDY header block does not decompress")]
    Zlib,
    /// Expands beyond the limit.
    #[error("a SPDY header block expands beyond {MAX_BLOCK} bytes")]
    TooLong,
    /// Lengths that do not fit the block, or no UTF-8.
    #[error("a malformed SPDY header block")]
    Malformed,
}

/// Writes the header blocks of one direction.
#[derive(Debug)]
pub struct Compressor(Compress);

impl Compressor {
    /// A fresh zlib stream.
    pub fn new() -> Result<Self, HeaderError> {
        let mut zlib = Compress::new(Compression::default(), true);
        zlib.set_dictionary(DICTIONARY).map_err(|_zlib| HeaderError::Zlib)?;
        Ok(Self(zlib))
    }

    /// Compresses one block.
    pub fn compress(&mut self, headers: &[(String, String)]) -> Result<Bytes, HeaderError> {
        let mut plain = Vec::new();
        plain.extend_from_slice(&length(headers.len())?);
        for (name, value) in headers {
            for text in [name, value] {
                plain.extend_from_slice(&length(text.len())?);
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(plain.len() + 64);
        let start = self.0.total_in();
        loop {
            let done = (self.0.total_in() - start) as usize;
            out.reserve(256);
            self.0
                .compress_vec(&plain[done..], &mut out, FlushCompress::Sync)
                .map_err(|_zlib| HeaderError::Zlib)?;
            // A flush that leaves room in the output has written everything.
            if out.len() < out.capacity() {
                return Ok(out.into());
            }
        }
    }
}

fn length(n: usize) -> Result<[u8; 4], HeaderError> {
    u32::try_from(n).map(u32::to_be_bytes).map_err(|_big| HeaderError::TooLong)
}

/// Reads the header blocks of one direction.
#[derive(Debug)]
pub struct Decompressor(Decompress);

impl Default for Decompressor {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Decompressor {
    /// Expands and reads one block.
    pub fn decompress(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        let mut out = Vec::with_capacity(1024);
        let start = self.0.total_in();
        loop {
            let done = (self.0.total_in() - start) as usize;
            if out.len() == out.capacity() {
                if out.len() >= MAX_BLOCK {
                    return Err(HeaderError::TooLong);
                }
                out.reserve(out.len().max(1024));
            }
            let (before_in, before_out) = (self.0.total_in(), out.len());
            match self.0.decompress_vec(&block[done..], &mut out, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => break,
                Ok(Status::Ok | Status::BufError) => {
                    let idle = self.0.total_in() == before_in && out.len() == before_out;
                    let all = (self.0.total_in() - start) as usize == block.len();
                    if (all && out.len() < out.capacity()) || idle {
                        break;
                    }
                }
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(DICTIONARY).map_err(|_zlib| HeaderError::Zlib)?;
                }
                Err(_) => return Err(HeaderError::Zlib),
            }
        }
        parse(out.into())
    }
}

fn parse(mut block: Bytes) -> Result<Headers, HeaderError> {
    fn text(block: &mut Bytes) -> Result<String, HeaderError> {
        let length = block.try_get_u32().map_err(|_end| HeaderError::Malformed)? as usize;
        if length > block.len() {
            return Err(HeaderError::Malformed);
        }
        String::from_utf8(block.split_to(length).to_vec()).map_err(|_end| HeaderError::Malformed)
    }
    let count = block.try_get_u32().map_err(|_end| HeaderError::Malformed)?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        for value in text(&mut block)?.split('\0') {
            headers.push((name.clone(), value.to_owned()));
        }
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_dictionary_is_the_one_of_the_specification() {
        assert_eq!(DICTIONARY.len(), 1423);
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    proptest! {
        #[test]
        fn blocks_of_one_direction_share_their_context(
            all in prop::collection::vec(
                prop::collection::vec(("[a-z-]{1,20}", "[ -~]{0,300}"), 0..6), 1..6)
        ) {
            let (mut out, mut back) = (Compressor::new().unwrap(), Decompressor::default());
            for headers in all {
                let block = out.compress(&headers).unwrap();
                prop_assert_eq!(back.decompress(&block).unwrap(), headers);
            }
        }

        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(Decompressor::default().decompress(&bytes));
            drop(parse(bytes.into()));
        }
    }

    #[test]
    fn a_block_that_expands_too_far_is_refused() {
        let mut zlib = Compressor::new().unwrap();
        let block = zlib.compress(&[("a".into(), "x".repeat(MAX_BLOCK * 4))]).unwrap();
        assert!(block.len() < 4096);
        let answer = Decompressor::default().decompress(&block);
        assert!(matches!(answer, Err(HeaderError::TooLong)));
    }
}
