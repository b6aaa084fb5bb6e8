//! Images whose pull takes long enough to be measured: one large file, and very many small
//! ones in four layers. Their bytes come from a fixed sequence, so they are always the same.

use std::path::Path;
use std::sync::Arc;

use super::catalogue::Named;
use super::{Image, Layer, LayerBuilder, Process, registry};
use crate::error::Result;

/// The host that the references below name; it is nobody's.
pub(crate) const HOST: &str = "large.pinion.invalid";
/// Raised whenever the images change, so that cached ones are made again.
pub(crate) const REVISION: u32 = 1;
/// 64 MiB that do not compress, in one file.
pub(crate) const BLOB: &str = "large.pinion.invalid/blob:1";
/// 11,600 entries in four layers, of a size and compressibility like a distribution's files.
pub(crate) const MANY_FILES: &str = "large.pinion.invalid/many-files:1";

const LAYERS: u64 = 4;
const DIRECTORIES: u64 = 58;
const FILES: u64 = 49;

/// Writes both as a registry's storage below `dir`.
pub(crate) fn write(dir: &Path) -> Result<()> {
    let process = Process { cmd: &["true"], ..Process::default() };
    let layers = (0..LAYERS).map(many_files).collect::<Result<Vec<_>>>()?;
    let many = Image::new(&process, &layers.iter().collect::<Vec<_>>());
    let blob = Image::new(&process, &[&one_file()?]);
    let named = |reference: &str, image| Named { references: vec![reference.to_owned()], image };
    registry::write_storage(dir, &[named(MANY_FILES, many), named(BLOB, blob)])
}

fn one_file() -> Result<Arc<Layer>> {
    let mut sequence = Sequence(1);
    let bytes: Vec<u8> = (0..8 << 20).flat_map(|_| sequence.next().to_le_bytes()).collect();
    let mut layer = LayerBuilder::default();
    layer.file("blob", 0o644, &bytes)?;
    layer.finish()
}

fn many_files(number: u64) -> Result<Arc<Layer>> {
    let mut sequence = Sequence(number + 2);
    let mut layer = LayerBuilder::default();
    layer.dir("usr", 0o755)?.dir(&format!("usr/{number}"), 0o755)?;
    for directory in 0..DIRECTORIES {
        let directory = format!("usr/{number}/{directory}");
        layer.dir(&directory, 0o755)?;
        for file in 0..FILES {
            // Most files are small and a few are large.
            let length = match sequence.next() % 16 {
                0 => 64 << 10,
                1..4 => 32 << 10,
                _ => 2 << 10 << (sequence.next() % 4),
            };
            layer.file(&format!("{directory}/{file}"), 0o644, &sequence.text(length))?;
        }
    }
    layer.finish()
}

/// Marsaglia's xorshift64: as good as random for a compressor, and the same everywhere.
struct Sequence(u64);

impl Sequence {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Bytes of which a third carry information, as in programs and texts.
    fn text(&mut self, length: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(length + 32);
        while text.len() < length {
            let word = self.next();
            text.extend_from_slice(&word.to_le_bytes());
            text.extend_from_slice(b"a word that repeats"[..8 + (word % 11) as usize].as_ref());
        }
        text.truncate(length);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_entries_as_is_said() {
        assert_eq!(LAYERS * (2 + DIRECTORIES * (1 + FILES)), 11_608);
    }

    #[test]
    fn the_sequence_is_always_the_same() {
        let mut sequence = Sequence(1);
        assert_eq!([sequence.next(), sequence.next()], [0x4082_2041, 0x1000_4106_0c01_1441]);
    }
}
