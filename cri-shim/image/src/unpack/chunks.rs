//! A bounded pipe of large buffers between two threads; buffers go back to be filled again.

use std::{
    io::{self, Read, Write},
    sync::mpsc::{self, Receiver, SyncSender},
};

use super::tar::Source;

/// Large enough that a thread switch per buffer costs nothing, small enough to stay in cache.
const CHUNK: usize = 256 << 10;
/// Buffers under way.
const DEPTH: usize = 4;

/// The writing end: [`Filled::buffer`], fill, [`Filled::send`].
pub(super) struct Filled {
    out: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

/// The reading end.
pub(super) struct Chunks {
    filled: Receiver<Vec<u8>>,
    back: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
    consumed: u64,
}

pub(super) fn channel() -> (Filled, Chunks) {
    let (out, filled) = mpsc::sync_channel(DEPTH);
    let (back, empty) = mpsc::sync_channel(DEPTH + 2);
    let chunks = Chunks { filled, back, current: Vec::new(), position: 0, consumed: 0 };
    (Filled { out, empty }, chunks)
}

impl Filled {
    /// A buffer of full length, its content arbitrary.
    pub(super) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.empty.try_recv().unwrap_or_default();
        buffer.resize(CHUNK, 0);
        buffer
    }

    /// Hands a filled buffer over; false if nobody reads any more.
    pub(super) fn send(&self, buffer: Vec<u8>) -> bool {
        self.out.send(buffer).is_ok()
    }
}

impl Chunks {
    /// Reads and forgets everything up to the end.
    pub(super) fn drain(&mut self) {
        loop {
            let rest = self.available().len();
            if rest == 0 {
                return;
            }
            self.advance(rest);
        }
    }

    /// The rest of the current buffer, fetching the next one if it is used up; empty at the end.
    fn available(&mut self) -> &[u8] {
        while self.position == self.current.len() {
            let Ok(next) = self.filled.recv() else { return &[] };
            let used = std::mem::replace(&mut self.current, next);
            self.position = 0;
            if used.capacity() > 0 {
                // A full return channel only means the buffer is freed instead.
                let _ = self.back.try_send(used);
            }
        }
        &self.current[self.position..]
    }

    fn advance(&mut self, count: usize) {
        self.position += count;
        self.consumed += count as u64;
    }
}

impl Source for Chunks {
    fn position(&self) -> u64 {
        self.consumed
    }

    /// Straight from the buffers, without another copy.
    fn copy_to(&mut self, out: &mut dyn Write, mut count: u64) -> io::Result<()> {
        while count > 0 {
            let available = self.available();
            if available.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let part = usize::try_from(count).unwrap_or(usize::MAX).min(available.len());
            out.write_all(&available[..part])?;
            self.advance(part);
            count -= part as u64;
        }
        Ok(())
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.available();
        let count = buffer.len().min(available.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.advance(count);
        Ok(count)
    }
}
