//! Decompression: gzip (any number of members), zstd (any number of frames), or none, told apart
//! by their first bytes. The stream decides, not the media type, as with every other client.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{
    FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};
use sha2::{Digest as _, Sha256};

use super::{LayerError, chunks::Filled};

const INPUT_BUFFER: usize = 128 << 10;
/// Memory one zstd stream may ask for; `zstd --ultra -22` needs 128 MiB.
const MAX_ZSTD_WINDOW: u64 = 128 << 20;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Decompresses all of `source` into `filled` and returns the hash of what came out. Ends early,
/// without error, once nobody reads any more.
pub(super) fn run(source: impl Read, filled: &Filled, limit: u64) -> Result<Sha256, LayerError> {
    let mut decoder = decoder(source).map_err(LayerError::Inflate)?;
    let mut hasher = Sha256::new();
    let mut total = 0_u64;
    loop {
        let mut buffer = filled.buffer();
        let count = fill(&mut decoder, &mut buffer).map_err(LayerError::Inflate)?;
        if count == 0 {
            return Ok(hasher);
        }
        total += count as u64;
        if total > limit {
            return Err(LayerError::TooLarge { what: "uncompressed size", limit });
        }
        buffer.truncate(count);
        hasher.update(&buffer);
        if !filled.send(buffer) {
            return Ok(hasher);
        }
    }
}

/// A reader of the decompressed bytes of `source`.
pub(crate) fn decoder<'a>(source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut source = BufReader::with_capacity(INPUT_BUFFER, source);
    // A short first read must not hide the magic number.
    let mut start = [0; 4];
    let count = fill(&mut source, &mut start)?;
    let start = &start[..count];
    let whole = io::Cursor::new(start.to_vec()).chain(source);
    Ok(if start.starts_with(&GZIP) {
        Box::new(MultiGzDecoder::new(BufReader::with_capacity(INPUT_BUFFER, whole)))
    } else if start.starts_with(&ZSTD) || is_skippable_frame(start) {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_ZSTD_WINDOW);
        let source = BufReader::with_capacity(INPUT_BUFFER, whole);
        Box::new(ZstdFrames { source, decoder, in_frame: false })
    } else {
        Box::new(whole)
    })
}

/// Whether a stream that starts so has to be decompressed.
pub(crate) fn is_compressed(start: &[u8]) -> bool {
    start.starts_with(&GZIP) || start.starts_with(&ZSTD) || is_skippable_frame(start)
}

fn is_skippable_frame(start: &[u8]) -> bool {
    matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18])
}

/// Reads until `buffer` is full or the source ends.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match source.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(read) => count += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(count)
}

/// Concatenated zstd frames; skippable ones (zstd:chunked has them) are skipped.
struct ZstdFrames<R> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> ZstdFrames<R> {
    /// Enters the next frame; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.source) {
                Ok(()) => {
                    self.in_frame = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut (&mut self.source).take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, e)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use ruzstd::decoding::BlockDecodingStrategy::UptoBytes;
        loop {
            if !self.in_frame && !self.next_frame()? {
                return Ok(0);
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, UptoBytes(buffer.len().max(1)))
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            }
            let count = self
                .decoder
                .read(buffer)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            if count > 0 {
                return Ok(count);
            }
            let stated = self.decoder.get_checksum_from_data();
            if stated.is_some() && stated != self.decoder.get_calculated_checksum() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "zstd checksum mismatch"));
            }
            self.in_frame = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    fn decode(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decoder(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_compression_yields_the_same_bytes() {
        let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(decode(&bytes).unwrap(), bytes);
        assert_eq!(decode(&gzip(&bytes)).unwrap(), bytes);
        assert_eq!(decode(&zstd(&bytes)).unwrap(), bytes);
        assert_eq!(decode(b"").unwrap(), b"");
    }

    #[test]
    fn members_and_frames_are_joined_and_skippable_frames_skipped() {
        assert_eq!(decode(&[gzip(b"one "), gzip(b"two")].concat()).unwrap(), b"one two");
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        let frames = [skippable.clone(), zstd(b"one "), skippable.clone(), zstd(b"two"), skippable];
        assert_eq!(decode(&frames.concat()).unwrap(), b"one two");
    }

    #[test]
    fn truncated_and_damaged_streams_are_errors() {
        let bytes = vec![7; 100_000];
        for whole in [gzip(&bytes), zstd(&bytes)] {
            assert!(decode(&whole[..whole.len() / 2]).is_err());
        }
        let mut damaged = gzip(&bytes);
        let last = damaged.len() - 6; // the checksum
        damaged[last] ^= 1;
        assert!(decode(&damaged).is_err());
        assert!(decode(&[gzip(b"x"), b"trailing".to_vec()].concat()).is_err());
    }

    #[test]
    fn a_zstd_window_of_2_gib_is_refused_before_memory_is_reserved() {
        // Frame header: no content size, no single segment, window descriptor for 2 GiB.
        let bomb = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
        assert!(decode(&bomb).is_err());
    }
}
