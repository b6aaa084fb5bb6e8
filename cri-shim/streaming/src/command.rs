//! A remote command: its streams tied to the process's pipes.
//!
//! The command ends when the process has exited and its output is drained, or when the
//! client is gone. Output that a left-behind child keeps open is waited for only briefly.

use crate::backend::Process;
use crate::spdy::{self, ReadHalf, WriteHalf};
use crate::status::Outcome;
use crate::websocket::ChannelWriter;
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

/// How long output is read after the process has exited.
const DRAIN: Duration = Duration::from_secs(3);
/// How long the client may take to open its streams.
const OPENING: Duration = Duration::from_secs(30);
const READ: usize = 32 << 10;

/// The streams of a remote command, whatever carries them.
#[derive(Debug)]
pub(crate) struct Channels {
    pub(crate) stdin: Option<ReadHalf>,
    pub(crate) resize: Option<ReadHalf>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    pub(crate) error: Option<Output>,
    /// Our halves of the client's own streams. Nothing is sent on them, but clients take their
    /// end for the end of the process and close their input.
    pub(crate) held: Vec<WriteHalf>,
    /// Whether the error stream carries a Status object (v4 and later).
    pub(crate) structured: bool,
    /// Becomes true when the client is gone.
    pub(crate) gone: watch::Receiver<bool>,
}

/// A stream to the client.
#[derive(Debug)]
pub(crate) enum Output {
    Spdy(WriteHalf),
    WebSocket(ChannelWriter),
}

impl Output {
    async fn send(&mut self, bytes: Bytes) -> bool {
        match self {
            Self::Spdy(stream) => stream.send(bytes).await,
            Self::WebSocket(channel) => channel.send(bytes).await,
        }
    }

    async fn finish(&mut self) {
        if let Self::Spdy(stream) = self {
            stream.finish().await;
        }
    }
}

/// Which streams a client must open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

/// The version of the remote-command protocol, from its name; 1 for none.
pub(crate) fn version(protocol: &str) -> u8 {
    match protocol {
        "v5.channel.k8s.io" => 5,
        "v4.channel.k8s.io" | "v4.base64.channel.k8s.io" => 4,
        "v3.channel.k8s.io" => 3,
        "v2.channel.k8s.io" => 2,
        _ => 1,
    }
}

/// Waits until the client has opened every stream it must open.
pub(crate) async fn accept(
    connection: &mut spdy::Connection,
    wanted: Wanted,
    version: u8,
) -> Result<Channels, String> {
    let resize = wanted.tty && version >= 3;
    let mut channels = Channels {
        stdin: None,
        resize: None,
        stdout: None,
        stderr: None,
        error: None,
        held: Vec::new(),
        structured: version >= 4,
        gone: connection.gone(),
    };
    let complete = |c: &Channels| {
        c.error.is_some()
            && c.stdin.is_some() == wanted.stdin
            && c.stdout.is_some() == wanted.stdout
            && c.stderr.is_some() == wanted.stderr
            && c.resize.is_some() == resize
    };
    let opening = async {
        while !complete(&channels) {
            let Some(stream) = connection.accept().await else {
                return Err("the client left before it had opened its streams".to_owned());
            };
            let kind = stream.header("streamtype").unwrap_or_default().to_owned();
            match kind.as_str() {
                "error" => channels.error = Some(Output::Spdy(stream.write)),
                "stdin" => {
                    channels.stdin = Some(stream.read);
                    channels.held.push(stream.write);
                }
                "stdout" => channels.stdout = Some(Output::Spdy(stream.write)),
                "stderr" => channels.stderr = Some(Output::Spdy(stream.write)),
                "resize" => {
                    channels.resize = Some(stream.read);
                    channels.held.push(stream.write);
                }
                other => return Err(format!("the client opened a stream of type {other:?}")),
            }
        }
        Ok(())
    };
    match tokio::time::timeout(OPENING, opening).await {
        Ok(Ok(())) => Ok(channels),
        Ok(Err(reason)) => Err(reason),
        Err(_) => Err(format!("the client opened too few streams in {} s", OPENING.as_secs())),
    }
}

/// Ties streams and process together until the command is over.
pub(crate) async fn run(process: Result<Process, String>, mut channels: Channels) {
    let process = match process {
        Ok(process) => process,
        Err(message) => return report(&mut channels, &Outcome::Failed(message)).await,
    };
    if let (Some(input), Some(pipe)) = (channels.stdin.take(), process.stdin) {
        tokio::spawn(feed(input, pipe));
    }
    if let (Some(input), Some(sizes)) = (channels.resize.take(), process.resize) {
        tokio::spawn(resize(input, sizes));
    }
    let stdout = tokio::spawn(drain(process.stdout, channels.stdout.take()));
    let stderr = tokio::spawn(drain(process.stderr, channels.stderr.take()));
    let (stop_out, stop_err) = (stdout.abort_handle(), stderr.abort_handle());
    let exit = tokio::select! {
        exit = process.exit => exit,
        _ = channels.gone.wait_for(|gone| *gone) => {
            stop_out.abort();
            stop_err.abort();
            return;
        }
    };
    let drained = async { (stdout.await, stderr.await) };
    let (out, err) = match tokio::time::timeout(DRAIN, drained).await {
        Ok((out, err)) => (out.ok().flatten(), err.ok().flatten()),
        Err(_) => {
            stop_out.abort();
            stop_err.abort();
            (None, None)
        }
    };
    let outcome = match exit {
        Ok(code) => Outcome::Exited(code),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    report(&mut channels, &outcome).await;
    for mut output in [out, err].into_iter().flatten() {
        output.finish().await;
    }
}

/// Writes the outcome to the error stream and ends it.
pub(crate) async fn report(channels: &mut Channels, outcome: &Outcome) {
    if let Some(error) = &mut channels.error {
        error.send(outcome.encode(channels.structured).into()).await;
        error.finish().await;
    }
}

/// Client to pipe; the pipe closes when the client has ended the stream.
async fn feed(mut input: ReadHalf, mut pipe: pipe::Sender) {
    while let Some(bytes) = input.recv().await {
        if pipe.write_all(&bytes).await.is_err() {
            return; // the process reads no more
        }
    }
}

/// Pipe to client; gives the stream back for its last words.
async fn drain(pipe: Option<pipe::Receiver>, output: Option<Output>) -> Option<Output> {
    let (Some(mut pipe), Some(mut output)) = (pipe, output) else { return None };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ);
        match pipe.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return Some(output), // EIO is how a terminal ends
            Ok(_) => {
                if !output.send(buffer.split().freeze()).await {
                    return None;
                }
            }
        }
    }
}

/// Reads `{"Width":80,"Height":24}` objects; what is no size is passed over.
async fn resize(mut input: ReadHalf, sizes: mpsc::Sender<(u16, u16)>) {
    let mut buffer = Vec::new();
    while let Some(bytes) = input.recv().await {
        buffer.extend_from_slice(&bytes);
        if buffer.len() > 4096 {
            return; // no terminal size is that long
        }
        for size in sizes_in(&mut buffer) {
            if sizes.send(size).await.is_err() {
                return;
            }
        }
    }
}

/// Takes the whole JSON objects off the front of the buffer.
fn sizes_in(buffer: &mut Vec<u8>) -> Vec<(u16, u16)> {
    let mut sizes = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(buffer).into_iter::<serde_json::Value>();
    let mut used = 0;
    while let Some(Ok(value)) = stream.next() {
        used = stream.byte_offset();
        let side = |name: &str| value[name].as_u64().and_then(|n| u16::try_from(n).ok());
        if let (Some(width), Some(height)) = (side("Width"), side("Height")) {
            sizes.push((width, height));
        }
    }
    buffer.drain(..used);
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_come_in_pieces_or_several_at_once() {
        let mut buffer = br#"{"Width":80,"Height":24}{"Width":1"#.to_vec();
        assert_eq!(sizes_in(&mut buffer), [(80, 24)]);
        buffer.extend_from_slice(br#"00,"Height":50}"#);
        buffer.push(b'\n');
        assert_eq!(sizes_in(&mut buffer), [(100, 50)]);
    }

    #[test]
    fn sizes_that_are_none_are_passed_over() {
        let mut buffer = br#"{"Width":-1,"Height":24}{"Width":70000,"Height":1}{}"#.to_vec();
        assert!(sizes_in(&mut buffer).is_empty());
        assert!(buffer.is_empty());
    }

    #[test]
    fn protocols_have_versions() {
        assert_eq!(version("v4.channel.k8s.io"), 4);
        assert_eq!(version(""), 1);
        assert_eq!(version("channel.k8s.io"), 1);
    }
}
