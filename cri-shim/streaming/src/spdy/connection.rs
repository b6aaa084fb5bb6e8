//! The server's end of a SPDY connection.
//!
//! ```text
//!  socket ──▶ reader task ──▶ accept(): streams the client opens
//!                  │ data ──▶ ReadHalf of each stream (bounded: a slow stream slows TCP)
//!  socket ◀── writer task ◀── WriteHalf of each stream, replies, pings
//! ```
//!
//! Invariant: only the writer task writes and owns the compressor, so frames never mix and
//! header blocks keep their order.

use super::frame::Frame;
use super::headers::{Compressor, Decompressor, HeaderError, Headers};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

const READ: usize = 64 << 10;
/// Data frames sent are at most this long.
const CHUNK: usize = 32 << 10;
/// Streams open at once; a port-forward client uses two for each connection.
const MOST_STREAMS: usize = 4096;
const PROTOCOL_ERROR: u32 = 1;
const REFUSED: u32 = 3;

/// A stream that the client opened.
#[derive(Debug)]
pub struct Incoming {
    /// The headers it came with.
    pub headers: Headers,
    /// Its bytes from the client.
    pub read: ReadHalf,
    /// Its bytes to the client.
    pub write: WriteHalf,
}

impl Incoming {
    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Bytes from the client.
#[derive(Debug)]
pub struct ReadHalf(pub(crate) mpsc::Receiver<Bytes>);

impl ReadHalf {
    /// The next bytes; `None` once the client has ended the stream or is gone.
    pub async fn recv(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}

/// Bytes to the client; dropping it ends the stream.
#[derive(Debug)]
pub struct WriteHalf {
    stream: u32,
    out: mpsc::Sender<Out>,
    ended: bool,
}

impl WriteHalf {
    /// Sends bytes; false once the connection is gone.
    pub async fn send(&mut self, mut bytes: Bytes) -> bool {
        while !bytes.is_empty() {
            let chunk = bytes.split_to(bytes.len().min(CHUNK));
            let out = Out::Frame(Frame::Data { stream: self.stream, fin: false, bytes: chunk });
            if self.out.send(out).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Ends this direction of the stream.
    pub async fn finish(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            let frame = Frame::Data { stream: self.stream, fin: true, bytes: Bytes::new() };
            drop(self.out.send(Out::Frame(frame)).await); // gone is as good as ended
        }
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if !self.ended {
            let frame = Frame::Data { stream: self.stream, fin: true, bytes: Bytes::new() };
            drop(self.out.try_send(Out::Frame(frame)));
        }
    }
}

/// What the writer task is told.
#[derive(Debug)]
enum Out {
    Frame(Frame),
    /// Accept a stream: the block is compressed by the writer, in its order.
    Reply(u32),
    Close,
}

/// The server's end of a connection.
#[derive(Debug)]
pub struct Connection {
    incoming: mpsc::Receiver<Incoming>,
    out: mpsc::Sender<Out>,
    gone: watch::Receiver<bool>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Connection {
    /// Speaks SPDY/3.1 on an upgraded connection.
    pub fn new<T>(io: T) -> Result<Self, HeaderError>
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (accepted, incoming) = mpsc::channel(16);
        let (out, orders) = mpsc::channel(64);
        let (lost, gone) = watch::channel(false);
        let writer = tokio::spawn(write_frames(write, orders, Compressor::new()?));
        let replies = out.clone();
        let reader = tokio::spawn(async move {
            let mut reader = Reader {
                streams: HashMap::new(),
                last: 0,
                headers: Decompressor::default(),
                accepted,
                out: replies,
            };
            if let Err(error) = reader.run(read).await {
                tracing::debug!(%error, "streaming client left the protocol");
            }
            drop(reader); // ends every stream before anybody hears that the client is gone
            lost.send_replace(true);
        });
        Ok(Self { incoming, out, gone, reader, writer })
    }

    /// The next stream that the client opens; `None` when it is gone.
    pub async fn accept(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Becomes true when the client is gone.
    pub fn gone(&self) -> watch::Receiver<bool> {
        self.gone.clone()
    }

    /// Sends what is queued, says goodbye, and gives the client a moment to leave first, so
    /// that no reset overtakes the last bytes.
    pub async fn close(mut self) {
        drop(self.out.send(Out::Close).await);
        let patience = Duration::from_secs(5);
        if tokio::time::timeout(patience, &mut self.writer).await.is_err() {
            self.writer.abort();
        }
        if tokio::time::timeout(patience, &mut self.reader).await.is_err() {
            self.reader.abort();
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the connection broke")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] super::frame::FrameError),
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// The reader task's state.
struct Reader {
    streams: HashMap<u32, mpsc::Sender<Bytes>>,
    last: u32,
    headers: Decompressor,
    accepted: mpsc::Sender<Incoming>,
    out: mpsc::Sender<Out>,
}

impl Reader {
    async fn run(&mut self, mut io: impl AsyncRead + Unpin) -> Result<(), ReadError> {
        let mut buffer = BytesMut::with_capacity(READ);
        loop {
            while let Some(frame) = Frame::decode(&mut buffer)? {
                self.handle(frame).await?;
            }
            buffer.reserve(READ);
            if io.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn handle(&mut self, frame: Frame) -> Result<(), ReadError> {
        match frame {
            Frame::SynStream { stream, fin, block } => self.open(stream, fin, &block).await?,
            Frame::Data { stream, fin, bytes } => {
                if let Some(to) = self.streams.get(&stream) {
                    // A reader that left wants no more bytes; the stream itself goes on.
                    drop(to.send(bytes).await);
                }
                if fin {
                    self.streams.remove(&stream);
                }
            }
            Frame::Reset { stream, .. } => drop(self.streams.remove(&stream)),
            Frame::Ping(id) => self.send(Out::Frame(Frame::Ping(id))).await,
            // Their blocks belong to the shared zlib stream and must be read in order.
            Frame::SynReply { block, .. } | Frame::Headers { block, .. } => {
                drop(self.headers.decompress(&block)?);
            }
            Frame::GoAway { .. } | Frame::Other => {}
        }
        Ok(())
    }

    async fn open(&mut self, stream: u32, fin: bool, block: &[u8]) -> Result<(), ReadError> {
        let headers = self.headers.decompress(block)?;
        let status = if stream.is_multiple_of(2) || stream <= self.last {
            Some(PROTOCOL_ERROR)
        } else if self.streams.len() >= MOST_STREAMS {
            Some(REFUSED)
        } else {
            None
        };
        if let Some(status) = status {
            self.send(Out::Frame(Frame::Reset { stream, status })).await;
            return Ok(());
        }
        self.last = stream;
        let (bytes, read) = mpsc::channel(16);
        if !fin {
            self.streams.insert(stream, bytes);
        }
        self.send(Out::Reply(stream)).await;
        let write = WriteHalf { stream, out: self.out.clone(), ended: false };
        // Nobody accepts any more when the session has ended; the stream ends by being dropped.
        drop(self.accepted.send(Incoming { headers, read: ReadHalf(read), write }).await);
        Ok(())
    }

    async fn send(&self, out: Out) {
        // A writer that is gone means the connection is: reading ends by itself.
        drop(self.out.send(out).await);
    }
}

async fn write_frames(
    mut io: impl AsyncWrite + Unpin,
    mut orders: mpsc::Receiver<Out>,
    mut headers: Compressor,
) {
    let mut buffer = BytesMut::with_capacity(CHUNK + 1024);
    let mut open = true;
    while open {
        let Some(mut order) = orders.recv().await else { break };
        // What is queued goes out in as few writes as it fits.
        loop {
            match order {
                Out::Frame(frame) => frame.encode(&mut buffer),
                Out::Reply(stream) => match headers.compress(&[]) {
                    Ok(block) => Frame::SynReply { stream, fin: false, block }.encode(&mut buffer),
                    Err(_) => open = false,
                },
                Out::Close => {
                    Frame::GoAway { last: 0, status: 0 }.encode(&mut buffer);
                    open = false;
                }
            }
            if !open || buffer.len() >= CHUNK {
                break;
            }
            match orders.try_recv() {
                Ok(next) => order = next,
                Err(_) => break,
            }
        }
        if io.write_all(&buffer).await.is_err() {
            return;
        }
        buffer.clear();
    }
    drop(io.shutdown().await); // the other side may have left first
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client for tests: opens streams and reads frames.
    struct Client {
        io: tokio::io::DuplexStream,
        headers: Compressor,
        buffer: BytesMut,
    }

    impl Client {
        fn connect() -> (Self, Connection) {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            let client =
                Self { io: ours, headers: Compressor::new().unwrap(), buffer: BytesMut::new() };
            (client, Connection::new(theirs).unwrap())
        }

        async fn send(&mut self, frame: Frame) {
            let mut wire = BytesMut::new();
            frame.encode(&mut wire);
            self.io.write_all(&wire).await.unwrap();
        }

        async fn open(&mut self, stream: u32, kind: &str) {
            let block = self.headers.compress(&[("streamtype".into(), kind.into())]).unwrap();
            self.send(Frame::SynStream { stream, fin: false, block }).await;
        }

        async fn next(&mut self) -> Option<Frame> {
            loop {
                if let Some(frame) = Frame::decode(&mut self.buffer).unwrap() {
                    return Some(frame);
                }
                if self.io.read_buf(&mut self.buffer).await.unwrap() == 0 {
                    return None;
                }
            }
        }
    }

    #[tokio::test]
    async fn a_stream_carries_bytes_both_ways_and_half_closes() {
        let (mut client, mut server) = Client::connect();
        client.open(1, "stdin").await;
        let mut stream = server.accept().await.unwrap();
        assert_eq!(stream.header("streamtype"), Some("stdin"));
        assert!(matches!(client.next().await, Some(Frame::SynReply { stream: 1, .. })));
        client.send(Frame::Data { stream: 1, fin: true, bytes: Bytes::from_static(b"in") }).await;
        assert_eq!(stream.read.recv().await.unwrap(), "in");
        assert_eq!(stream.read.recv().await, None);
        assert!(stream.write.send(Bytes::from_static(b"out")).await);
        stream.write.finish().await;
        let sent = Frame::Data { stream: 1, fin: false, bytes: Bytes::from_static(b"out") };
        assert_eq!(client.next().await, Some(sent));
        assert!(matches!(client.next().await, Some(Frame::Data { stream: 1, fin: true, .. })));
    }

    #[tokio::test]
    async fn ids_must_be_odd_and_grow() {
        let (mut client, mut server) = Client::connect();
        client.open(2, "data").await;
        assert!(matches!(client.next().await, Some(Frame::Reset { stream: 2, .. })));
        client.open(5, "data").await;
        server.accept().await.unwrap();
        assert!(matches!(client.next().await, Some(Frame::SynReply { stream: 5, .. })));
        client.open(3, "data").await;
        loop {
            match client.next().await {
                Some(Frame::Reset { stream: 3, .. }) => break,
                Some(_) => {}
                None => panic!("no reset"),
            }
        }
    }

    #[tokio::test]
    async fn pings_are_answered_and_a_lost_client_is_noticed() {
        let (mut client, server) = Client::connect();
        client.send(Frame::Ping(7)).await;
        assert_eq!(client.next().await, Some(Frame::Ping(7)));
        let mut gone = server.gone();
        drop(client);
        gone.wait_for(|gone| *gone).await.unwrap();
    }

    #[tokio::test]
    async fn closing_sends_everything_queued_first() {
        let (mut client, mut server) = Client::connect();
        client.open(1, "error").await;
        let mut stream = server.accept().await.unwrap();
        stream.write.send(Bytes::from(vec![7; 3 * CHUNK])).await;
        stream.write.finish().await;
        let closing = tokio::spawn(server.close());
        let mut bytes = 0;
        while let Some(frame) = client.next().await {
            if let Frame::Data { bytes: data, .. } = frame {
                bytes += data.len();
            }
        }
        assert_eq!(bytes, 3 * CHUNK);
        drop(client);
        closing.await.unwrap();
    }
}
