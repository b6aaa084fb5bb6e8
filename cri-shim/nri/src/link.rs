//! One connection to a plugin: calls in both directions at the same time.
//!
//! Two tasks own the socket, one for each direction. Both end when the peer goes away or says
//! something that is no message; every call then fails with [`CallError::Closed`].

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pinion_nri_proto::{PLUGIN, ttrpc};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use crate::frame::{
    FROM_PLUGIN, Kind, MAX_PAYLOAD, MUX_HEADER, Message, Streams, TO_PLUGIN, encode, mux_header,
};

/// Status code of a method that the peer does not have.
const UNIMPLEMENTED: i32 = 12;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The plugin is gone.
    #[error("the connection is closed")]
    Closed,
    /// It does not answer.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The request is longer than a message may be.
    #[error("a request of {0} bytes, and {MAX_PAYLOAD} are the most")]
    TooLong(usize),
    /// It does not know the method.
    #[error("it does not implement the call")]
    Unimplemented,
    /// It said no.
    #[error("{0}")]
    Refused(String),
    /// Its answer is not the message it should be.
    #[error("its answer cannot be decoded")]
    Decode(#[source] prost::DecodeError),
}

impl CallError {
    /// Whether the plugin cannot be worked with any more.
    pub(crate) fn is_fatal(&self) -> bool {
        matches!(self, Self::Closed | Self::Timeout(_) | Self::Decode(_))
    }
}

/// A call that the plugin makes.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) method: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) reply: Answer,
}

/// Where the answer to a plugin's call goes.
#[derive(Debug)]
pub(crate) struct Answer {
    stream: u32,
    outgoing: mpsc::Sender<Vec<u8>>,
}

impl Answer {
    /// Answers with a message, or with words of refusal.
    pub(crate) async fn send(self, result: Result<Vec<u8>, String>) {
        let response = match result {
            Ok(payload) => ttrpc::Response { status: None, payload },
            Err(message) => ttrpc::Response {
                status: Some(ttrpc::Status { code: 2, message }),
                payload: Vec::new(),
            },
        };
        let message = Message {
            stream: self.stream,
            kind: Kind::Response,
            payload: response.encode_to_vec(),
        };
        if let Ok(frames) = encode(FROM_PLUGIN, &message) {
            // The plugin may be gone.
            let _ = self.outgoing.send(frames).await;
        }
    }
}

type Waiting = HashMap<u32, oneshot::Sender<ttrpc::Response>>;

/// The runtime's end of a connection.
#[derive(Debug)]
pub(crate) struct Link {
    outgoing: mpsc::Sender<Vec<u8>>,
    waiting: Arc<Mutex<Waiting>>,
    next: Mutex<u32>,
    closed: watch::Receiver<bool>,
    close: Arc<watch::Sender<bool>>,
}

impl Link {
    /// Takes a connection over; calls of the plugin come out of the channel.
    pub(crate) fn new(socket: UnixStream) -> (Self, mpsc::Receiver<Incoming>) {
        let (reader, writer) = socket.into_split();
        let (outgoing, frames) = mpsc::channel(64);
        let (calls, incoming) = mpsc::channel(64);
        let (close, closed) = watch::channel(false);
        let close = Arc::new(close);
        let waiting = Arc::<Mutex<Waiting>>::default();
        tokio::spawn(write(writer, frames, close.clone()));
        let reading = Reading { calls, waiting: waiting.clone(), outgoing: outgoing.clone() };
        tokio::spawn(read(reader, reading, close.clone()));
        (Self { outgoing, waiting, next: Mutex::new(1), closed, close }, incoming)
    }

    /// Calls a method of the plugin.
    pub(crate) async fn call<A: prost::Message + Default>(
        &self,
        method: &str,
        request: &impl prost::Message,
        limit: Duration,
    ) -> Result<A, CallError> {
        if self.is_closed() {
            return Err(CallError::Closed);
        }
        let payload = request.encode_to_vec();
        let envelope = ttrpc::Request {
            service: PLUGIN.into(),
            method: method.into(),
            payload,
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        };
        let payload = envelope.encode_to_vec();
        let length = payload.len();
        let stream = self.next_stream();
        let message = Message { stream, kind: Kind::Request, payload };
        let frames = encode(TO_PLUGIN, &message).map_err(|_long| CallError::TooLong(length))?;
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).insert(stream, sender);
        let mut closed = self.closed.clone();
        let exchange = async {
            self.outgoing.send(frames).await.map_err(|_gone| CallError::Closed)?;
            tokio::select! {
                answer = answer => answer.map_err(|_gone| CallError::Closed),
                _ = closed.wait_for(|closed| *closed) => Err(CallError::Closed),
            }
        };
        let outcome = tokio::time::timeout(limit, exchange).await;
        lock(&self.waiting).remove(&stream);
        let response = outcome.map_err(|_late| CallError::Timeout(limit))??;
        match response.status {
            Some(status) if status.code == UNIMPLEMENTED => Err(CallError::Unimplemented),
            Some(status) if status.code != 0 => Err(CallError::Refused(status.message)),
            _ => A::decode(response.payload.as_slice()).map_err(CallError::Decode),
        }
    }

    /// Clients use odd stream numbers.
    fn next_stream(&self) -> u32 {
        let mut next = lock(&self.next);
        let stream = *next;
        *next = stream.wrapping_add(2);
        stream
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Ends the connection.
    pub(crate) fn close(&self) {
        self.close.send_replace(true);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write(
    mut socket: OwnedWriteHalf,
    mut frames: mpsc::Receiver<Vec<u8>>,
    close: Arc<watch::Sender<bool>>,
) {
    let mut closed = close.subscribe();
    loop {
        let next = tokio::select! {
            next = frames.recv() => next,
            _ = closed.wait_for(|closed| *closed) => None,
        };
        let Some(bytes) = next else { break };
        if socket.write_all(&bytes).await.is_err() {
            break;
        }
    }
    close.send_replace(true);
}

/// Where what is read goes.
struct Reading {
    calls: mpsc::Sender<Incoming>,
    waiting: Arc<Mutex<Waiting>>,
    outgoing: mpsc::Sender<Vec<u8>>,
}

async fn read(mut socket: OwnedReadHalf, to: Reading, close: Arc<watch::Sender<bool>>) {
    let mut closed = close.subscribe();
    let ended = tokio::select! {
        ended = read_all(&mut socket, &to) => ended,
        _ = closed.wait_for(|closed| *closed) => Ok(()),
    };
    if let Err(error) = ended
        && error.kind() != io::ErrorKind::UnexpectedEof
    {
        tracing::debug!(%error, "NRI connection ended");
    }
    close.send_replace(true);
}

async fn read_all(socket: &mut OwnedReadHalf, to: &Reading) -> io::Result<()> {
    let mut streams = Streams::default();
    loop {
        let mut header = [0; MUX_HEADER];
        socket.read_exact(&mut header).await?;
        let (connection, length) = mux_header(header).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        socket.read_exact(&mut bytes).await?;
        for message in streams.take(connection, &bytes).map_err(io::Error::other)? {
            match (connection, message.kind) {
                (TO_PLUGIN, Kind::Response) => answered(&message, to)?,
                (FROM_PLUGIN, Kind::Request) => called(&message, to).await?,
                _ => return Err(io::Error::other("a message in the wrong direction")),
            }
        }
    }
}

fn answered(message: &Message, to: &Reading) -> io::Result<()> {
    let response = ttrpc::Response::decode(message.payload.as_slice()).map_err(io::Error::other)?;
    // One that came too late has nobody waiting.
    if let Some(waiting) = lock(&to.waiting).remove(&message.stream) {
        let _ = waiting.send(response);
    }
    Ok(())
}

async fn called(message: &Message, to: &Reading) -> io::Result<()> {
    let request = ttrpc::Request::decode(message.payload.as_slice()).map_err(io::Error::other)?;
    let reply = Answer { stream: message.stream, outgoing: to.outgoing.clone() };
    let call = Incoming { method: request.method, payload: request.payload, reply };
    to.calls.send(call).await.map_err(|_gone| io::Error::other("nobody takes calls"))
}
