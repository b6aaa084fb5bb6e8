//! Port-forward: each connection of the client to a port is a pair of streams.
//!
//! Over SPDY the pair shares a `requestID` (old clients send none: then streams are paired
//! by port, in order). What fails for one connection is told on its error stream and ends
//! only that connection.

use crate::backend::{Backend, Connected};
use crate::spdy::{Connection, Incoming, ReadHalf, WriteHalf};
use crate::websocket::PortChannels;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const READ: usize = 32 << 10;
/// Half-open pairs kept at once.
const MOST_PAIRS: usize = 1024;

#[derive(Debug, Default)]
struct Pair {
    data: Option<Incoming>,
    error: Option<Incoming>,
}

/// Serves a SPDY connection until the client leaves.
pub(crate) async fn spdy(mut connection: Connection, backend: Arc<dyn Backend>, pod: String) {
    let mut pairs: HashMap<(String, String), Pair> = HashMap::new();
    while let Some(stream) = connection.accept().await {
        let port = stream.header("port").unwrap_or_default().to_owned();
        let id = stream.header("requestid").unwrap_or_default().to_owned();
        let key = (id, port);
        if pairs.len() >= MOST_PAIRS && !pairs.contains_key(&key) {
            continue; // dropping the stream ends it
        }
        let pair = pairs.entry(key.clone()).or_default();
        match stream.header("streamtype") {
            Some("data") => pair.data = Some(stream),
            Some("error") => pair.error = Some(stream),
            _ => continue,
        }
        let whole = pair.data.is_some() && pair.error.is_some();
        if let Some(Pair { data: Some(data), error: Some(error) }) =
            whole.then(|| pairs.remove(&key)).flatten()
        {
            let (backend, pod) = (Arc::clone(&backend), pod.clone());
            tokio::spawn(async move {
                let mut errors = error.write;
                if let Err(message) = forward(&*backend, pod, &key.1, data.read, data.write).await {
                    errors.send(message.into()).await;
                }
                errors.finish().await;
            });
        }
    }
    connection.close().await;
}

async fn forward(
    backend: &dyn Backend,
    pod: String,
    port: &str,
    read: ReadHalf,
    write: WriteHalf,
) -> Result<(), String> {
    let number: u16 = match port.parse() {
        Ok(number) if number > 0 => number,
        _ => return Err(format!("{port:?} is no port number")),
    };
    match backend.connect(pod, number).await.map_err(|e| e.to_string())? {
        Connected::Tcp(socket) => copy(socket, read, Sink::Spdy(write)).await,
        Connected::Unix(socket) => copy(socket, read, Sink::Spdy(write)).await,
    }
    Ok(())
}

/// Serves one port over WebSocket channels.
pub(crate) async fn channels(backend: Arc<dyn Backend>, pod: String, pair: PortChannels) {
    let PortChannels { port, read, data, mut error } = pair;
    match backend.connect(pod, port).await {
        Ok(Connected::Tcp(socket)) => copy(socket, read, Sink::WebSocket(data)).await,
        Ok(Connected::Unix(socket)) => copy(socket, read, Sink::WebSocket(data)).await,
        Err(cause) => {
            error.send(Bytes::from(cause.to_string())).await;
        }
    }
}

/// Where bytes from the pod go.
enum Sink {
    Spdy(WriteHalf),
    WebSocket(crate::websocket::ChannelWriter),
}

impl Sink {
    async fn send(&mut self, bytes: Bytes) -> bool {
        match self {
            Self::Spdy(stream) => stream.send(bytes).await,
            Self::WebSocket(channel) => channel.send(bytes).await,
        }
    }
}

/// Both directions until both have ended; a half-close is passed on.
async fn copy(socket: impl AsyncRead + AsyncWrite, mut from: ReadHalf, mut to: Sink) {
    let (mut read, mut write) = tokio::io::split(socket);
    let inward = async {
        while let Some(bytes) = from.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        drop(write.shutdown().await); // the pod's side may be closed already
    };
    let outward = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(READ);
            match read.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    if !to.send(buffer.split().freeze()).await {
                        break;
                    }
                }
            }
        }
        if let Sink::Spdy(stream) = &mut to {
            stream.finish().await;
        }
    };
    tokio::pin!(inward, outward);
    // The pod closing its side ends the connection; the client closing its own does not.
    tokio::select! {
        () = &mut outward => {}
        () = &mut inward => outward.await,
    }
}
