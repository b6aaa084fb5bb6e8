//! Streams over WebSocket: each message starts with the number of its channel.
//!
//! Channels are 0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize; from v5 on a message on
//! channel 255 closes the channel it names. The base64 variants use text messages with the
//! number as a digit. A port-forward client may instead tunnel SPDY through binary messages.

use crate::command::{Channels, Output, Wanted, version};
use crate::spdy::ReadHalf;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use std::collections::HashMap;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// A WebSocket with channels.
#[derive(Debug)]
pub(crate) struct ChannelSocket {
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    out: mpsc::Sender<Message>,
    gone: watch::Receiver<bool>,
    base64: bool,
}

/// The sending end of one channel.
#[derive(Debug)]
pub(crate) struct ChannelWriter {
    channel: u8,
    base64: bool,
    out: mpsc::Sender<Message>,
}

impl ChannelWriter {
    /// Sends bytes as one message; false once the connection is gone.
    pub(crate) async fn send(&mut self, bytes: Bytes) -> bool {
        self.out.send(encode(self.channel, &bytes, self.base64)).await.is_ok()
    }
}

fn encode(channel: u8, bytes: &[u8], base64: bool) -> Message {
    if base64 {
        return Message::text(format!("{channel}{}", STANDARD.encode(bytes)));
    }
    let mut message = BytesMut::with_capacity(bytes.len() + 1);
    message.put_u8(channel);
    message.put_slice(bytes);
    Message::Binary(message.freeze())
}

/// Channel and bytes of a message; `None` for what carries no channel.
fn decode(message: Message, base64: bool) -> Option<(u8, Bytes)> {
    match message {
        Message::Binary(mut bytes) if !base64 && !bytes.is_empty() => {
            let channel = bytes.split_to(1)[0];
            Some((channel, bytes))
        }
        Message::Text(text) if base64 => {
            let digit = text.as_bytes().first()?.checked_sub(b'0').filter(|d| *d <= 9)?;
            Some((digit, STANDARD.decode(&text.as_bytes()[1..]).ok()?.into()))
        }
        _ => None,
    }
}

/// The end of a session. A close without a code reaches clients as 1005, and client-go takes
/// any code but 1000 for an error of every stream, the one with the status included.
fn goodbye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(4 << 20)).max_frame_size(Some(4 << 20))
}

async fn socket<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> WebSocketStream<T> {
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config())).await
}

impl ChannelSocket {
    /// Channels over an upgraded connection; gives a receiver for each of `inputs`.
    async fn new<T>(io: T, inputs: &[u8], closes: bool, base64: bool) -> (Self, Vec<ReadHalf>)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sink, stream) = socket(io).await.split();
        let (out, orders) = mpsc::channel(64);
        let (lost, gone) = watch::channel(false);
        let mut senders = HashMap::new();
        let mut receivers = Vec::new();
        for channel in inputs {
            let (send, receive) = mpsc::channel(16);
            senders.insert(*channel, send);
            receivers.push(ReadHalf(receive));
        }
        let writer = tokio::spawn(write(sink, orders));
        let pongs = out.clone();
        let reader = tokio::spawn(async move {
            read(stream, senders, closes, base64, pongs).await;
            lost.send_replace(true);
        });
        (Self { reader, writer, out, gone, base64 }, receivers)
    }

    fn channel(&self, channel: u8) -> ChannelWriter {
        ChannelWriter { channel, base64: self.base64, out: self.out.clone() }
    }

    /// Sends what is queued and closes; the client gets a moment to answer.
    pub(crate) async fn close(mut self) {
        drop(self.out.send(goodbye()).await);
        let patience = Duration::from_secs(5);
        if tokio::time::timeout(patience, &mut self.writer).await.is_err() {
            self.writer.abort();
        }
        if tokio::time::timeout(patience, &mut self.reader).await.is_err() {
            self.reader.abort();
        }
    }
}

/// The channels of a remote command.
pub(crate) async fn command<T>(io: T, wanted: Wanted, protocol: &str) -> (ChannelSocket, Channels)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let base64 = protocol.contains("base64");
    let version = version(protocol);
    let (socket, receivers) = ChannelSocket::new(io, &[STDIN, RESIZE], version >= 5, base64).await;
    let mut receivers = receivers.into_iter();
    let (stdin, resize) = (receivers.next(), receivers.next());
    let output = |channel| Output::WebSocket(socket.channel(channel));
    let channels = Channels {
        stdin: stdin.filter(|_| wanted.stdin),
        resize: resize.filter(|_| wanted.tty),
        stdout: wanted.stdout.then(|| output(STDOUT)),
        stderr: wanted.stderr.then(|| output(STDERR)),
        error: Some(output(ERROR)),
        held: Vec::new(),
        structured: version >= 4,
        gone: socket.gone.clone(),
    };
    // An empty message tells the client that the streams are there.
    let first = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    socket.channel(first).send(Bytes::new()).await;
    (socket, channels)
}

/// One forwarded port: its bytes both ways, and its error channel.
#[derive(Debug)]
pub(crate) struct PortChannels {
    pub(crate) port: u16,
    pub(crate) read: ReadHalf,
    pub(crate) data: ChannelWriter,
    pub(crate) error: ChannelWriter,
}

/// Channel pairs for ports: 2n data, 2n+1 error; each starts with its port number.
pub(crate) async fn ports<T>(
    io: T,
    ports: &[u16],
    protocol: &str,
) -> (ChannelSocket, Vec<PortChannels>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Channel numbers are one byte, and base64 has one digit for them.
    let base64 = protocol.contains("base64");
    let most = if base64 { 5 } else { 127 };
    let ports = &ports[..ports.len().min(most)];
    let inputs: Vec<u8> = (0..ports.len() as u8).map(|n| n * 2).collect();
    let (socket, receivers) = ChannelSocket::new(io, &inputs, false, base64).await;
    let mut all = Vec::new();
    for ((channel, port), read) in inputs.iter().zip(ports).zip(receivers) {
        let mut data = socket.channel(*channel);
        let mut error = socket.channel(channel + 1);
        data.send(Bytes::copy_from_slice(&port.to_le_bytes())).await;
        error.send(Bytes::copy_from_slice(&port.to_le_bytes())).await;
        all.push(PortChannels { port: *port, read, data, error });
    }
    (socket, all)
}

/// A byte stream through the binary messages of a WebSocket, for SPDY within.
pub(crate) async fn tunnel<T>(io: T) -> DuplexStream
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let (mut sink, mut stream) = socket(io).await.split();
    let (mut from, mut to) = tokio::io::split(ours);
    tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            match message {
                Message::Binary(bytes) if to.write_all(&bytes).await.is_ok() => {}
                Message::Binary(_) | Message::Close(_) => break,
                _ => {}
            }
        }
        drop(to.shutdown().await); // the reader sees the end of the stream
    });
    tokio::spawn(async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(32 << 10);
            match from.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    if sink.send(Message::Binary(buffer.split().freeze())).await.is_err() {
                        return;
                    }
                }
            }
        }
        drop(sink.send(goodbye()).await); // the client may have left
    });
    theirs
}

async fn read<T>(
    mut stream: SplitStream<WebSocketStream<T>>,
    mut inputs: HashMap<u8, mpsc::Sender<Bytes>>,
    closes: bool,
    base64: bool,
    out: mpsc::Sender<Message>,
) where
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = stream.next().await {
        match message {
            Message::Ping(bytes) => drop(out.send(Message::Pong(bytes)).await),
            Message::Close(_) => return,
            other => match decode(other, base64) {
                Some((CLOSE, bytes)) if closes => {
                    if let Some(channel) = bytes.first() {
                        inputs.remove(channel);
                    }
                }
                Some((channel, bytes)) => {
                    if let Some(to) = inputs.get(&channel).filter(|_| !bytes.is_empty()) {
                        drop(to.send(bytes).await); // a reader that left wants no more
                    }
                }
                None => {}
            },
        }
    }
}

async fn write<T>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    mut orders: mpsc::Receiver<Message>,
) where
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = orders.recv().await {
        let last = matches!(message, Message::Close(_));
        if sink.send(message).await.is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_their_channel() {
        let message = encode(STDERR, b"oops", false);
        assert_eq!(decode(message, false), Some((2, Bytes::from_static(b"oops"))));
        let message = encode(STDOUT, b"\x00\xff", true);
        assert_eq!(decode(message, true), Some((1, Bytes::from_static(b"\x00\xff"))));
    }

    #[tokio::test]
    async fn a_session_ends_with_a_normal_closure() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let wanted = Wanted { stdin: false, stdout: true, stderr: false, tty: false };
        let (socket, channels) = command(ours, wanted, "v5.channel.k8s.io").await;
        drop(channels);
        let closing = tokio::spawn(socket.close());
        let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
        let mut last = None;
        while let Some(Ok(message)) = client.next().await {
            last = Some(message);
        }
        let Some(Message::Close(Some(frame))) = last else { panic!("{last:?}") };
        assert_eq!(frame.code, CloseCode::Normal);
        closing.await.unwrap();
    }

    #[test]
    fn what_carries_no_channel_is_passed_over() {
        assert_eq!(decode(Message::Binary(Bytes::new()), false), None);
        assert_eq!(decode(Message::text("1aGk="), false), None);
        assert_eq!(decode(Message::text("x"), true), None);
        assert_eq!(decode(Message::text("1***"), true), None);
    }
}
