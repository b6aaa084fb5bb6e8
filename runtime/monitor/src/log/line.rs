//! Cutting a stream of bytes into lines of bounded length.

/// Whether a record ends its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The line ends here.
    Full,
    /// The line goes on in the next record.
    Partial,
}

/// An idle splitter gives back buffers larger than this.
const KEPT_CAPACITY: usize = 512;

/// Holds the unterminated end of a stream, at most `limit` bytes of it.
#[derive(Debug)]
pub struct Splitter {
    pending: Vec<u8>,
    limit: usize,
}

impl Splitter {
    /// A splitter that cuts lines longer than `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { pending: Vec::new(), limit: limit.max(1) }
    }

    /// Takes the next bytes of the stream and emits each piece they complete as two parts
    /// that belong together. A line of exactly `limit` bytes is not cut.
    pub fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(Tag, &[u8], &[u8])) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.limit - self.pending.len();
            // One byte past the room tells whether the line ends just there.
            let window = rest.get(..=room).unwrap_or(rest);
            if let Some(end) = window.iter().position(|byte| *byte == b'\n') {
                let (line, after) = rest.split_at(end);
                emit(Tag::Full, &self.pending, line);
                self.clear();
                rest = after.get(1..).unwrap_or_default();
            } else if window.len() > room {
                let (piece, after) = rest.split_at(room);
                emit(Tag::Partial, &self.pending, piece);
                self.clear();
                rest = after;
            } else {
                self.pending.extend_from_slice(rest);
                rest = &[];
            }
        }
    }

    /// The unterminated end of the stream, if there is one.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        let rest = std::mem::take(&mut self.pending);
        if rest.is_empty() { None } else { Some(rest) }
    }

    fn clear(&mut self) {
        self.pending.clear();
        if self.pending.capacity() > KEPT_CAPACITY {
            self.pending = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(limit: usize, chunks: &[&[u8]]) -> Vec<(Tag, Vec<u8>)> {
        let mut splitter = Splitter::new(limit);
        let mut pieces = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, |tag, head, tail| pieces.push((tag, [head, tail].concat())));
            assert!(splitter.pending.len() <= limit);
        }
        pieces.extend(splitter.finish().map(|rest| (Tag::Partial, rest)));
        pieces
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_not_cut() {
        assert_eq!(split(3, &[b"abc\n"]), [(Tag::Full, b"abc".to_vec())]);
        assert_eq!(split(3, &[b"abc", b"\n"]), [(Tag::Full, b"abc".to_vec())]);
        let cut = [(Tag::Partial, b"abc".to_vec()), (Tag::Full, b"d".to_vec())];
        assert_eq!(split(3, &[b"abcd\n"]), cut);
        assert_eq!(split(3, &[b"abc", b"d\n"]), cut);
    }

    proptest! {
        #[test]
        fn pieces_are_the_stream_however_it_is_cut(
            stream in prop::collection::vec(
                prop_oneof![Just(b'\n'), Just(b'\r'), Just(0), any::<u8>()], 0..400),
            limit in 1usize..40,
            cuts in prop::collection::vec(1usize..60, 1..10),
        ) {
            let whole = split(limit, &[&stream]);
            let mut chunks = Vec::new();
            let (mut rest, mut cuts) = (stream.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            let pieces = split(limit, &chunks);
            prop_assert_eq!(&pieces, &whole);
            let mut joined = Vec::new();
            for (index, (tag, piece)) in pieces.iter().enumerate() {
                prop_assert!(piece.len() <= limit && !piece.contains(&b'\n'));
                let last = index + 1 == pieces.len();
                prop_assert!(*tag == Tag::Full || piece.len() == limit || last);
                joined.extend_from_slice(piece);
                if *tag == Tag::Full {
                    joined.push(b'\n');
                }
            }
            prop_assert_eq!(joined, stream);
        }
    }
}
