//! The part of SPDY/3.1 that container streams use.
//!
//! * [`frame`]: frames to bytes and back, no I/O;
//! * [`headers`]: header blocks, compressed with one zlib context for each direction;
//! * [`connection`]: the server's end of a connection and its streams.
//!
//! Flow control is left out, as every Kubernetes client leaves it out: windows are never
//! counted, and back-pressure comes from TCP.

mod connection;
mod frame;
mod headers;

pub use connection::{Connection, Incoming, ReadHalf, WriteHalf};
pub use frame::{Frame, FrameError, MAX_FRAME};
pub use headers::{Compressor, Decompressor, HeaderError, Headers};
