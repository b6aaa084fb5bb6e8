//! The asynchronous client of one pod's monitor.
//!
//! A task owns the connection. Requests are written in the order they are made and may all
//! be in flight at once; answers are matched by request id. Events of the monitor, and the
//! loss of the connection, go to the pod's actor as [`Notice`]s. When the connection is lost
//! every call in flight fails as unavailable.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pinion_monitor_proto::channel::{Descriptors, recv_with_fds, send_with_fds};
use pinion_monitor_proto::frame::{Decoder, FrameError, encode};
use pinion_monitor_proto::message::error::Kind as MonitorKind;
use pinion_monitor_proto::message::event::What;
use pinion_monitor_proto::message::request::Verb;
use pinion_monitor_proto::message::response::Outcome;
use pinion_monitor_proto::message::{self, Exited, Request, Response};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::error::{Context, Error, Kind, Result};

const GONE: &str = "the pod's monitor is gone";

/// A monitor answers these at once. One that does not hangs, and its pod is ended without it.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A monitor that does not greet by then counts as gone, and what it has is killed.
const HELLO_LIMIT: Duration = Duration::from_secs(20);

/// The runtime works for these, and the monitor ends one that hangs after two minutes.
const WORK_LIMIT: Duration = Duration::from_secs(150);

/// Something a pod's actor must know.
#[derive(Debug)]
pub(crate) enum Notice {
    /// A container ended.
    Exited {
        /// The container.
        id: String,
        /// How.
        exit: Exited,
    },
    /// The kernel killed something in a container for want of memory.
    Oom {
        /// The container.
        id: String,
    },
    /// The pod's virtual machine is gone.
    GuestEnded {
        /// Why.
        reason: String,
    },
    /// The connection is gone.
    Lost,
}

/// A handle on the connection; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    calls: mpsc::UnboundedSender<Call>,
}

#[derive(Debug)]
struct Call {
    verb: Verb,
    fds: Vec<OwnedFd>,
    answers: mpsc::UnboundedSender<Outcome>,
}

/// The answers to one request, in order.
#[derive(Debug)]
pub(crate) struct Answers(mpsc::UnboundedReceiver<Outcome>);

impl Answers {
    /// The next answer.
    pub(crate) async fn next(&mut self) -> Result<Outcome> {
        match self.0.recv().await {
            Some(Outcome::Error(error)) => Err(from_monitor(error)),
            Some(outcome) => Ok(outcome),
            None => Err(Error::new(Kind::Unavailable, GONE)),
        }
    }
}

impl Client {
    /// Connects to the monitor that listens in `directory`, subscribes, and learns the
    /// state of its containers.
    pub(crate) async fn connect(
        directory: &Path,
        notices: mpsc::UnboundedSender<Notice>,
    ) -> Result<(Self, message::HelloReply)> {
        let path = directory.join("monitor.sock");
        let stream = UnixStream::connect(&path)
            .await
            .kind(Kind::Unavailable, || format!("connect to {}", path.display()))?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let greeted = Arc::new(AtomicBool::new(false));
        let connection = Connection {
            greeted: greeted.clone(),
            stream,
            decoder: Decoder::default(),
            pending: HashMap::new(),
            notices,
            last: 0,
        };
        tokio::spawn(connection.run(receiver));
        let client = Self { calls: sender };
        let hello = message::Hello { version: pinion_monitor_proto::VERSION, subscribe: true };
        // Whoever stopped it may not have meant to take the pod down.
        super::process::wake(directory);
        let hello = client.call(Verb::Hello(hello), Vec::new());
        let reply = match in_time("hello", HELLO_LIMIT, hello).await? {
            Outcome::Hello(reply) => reply,
            other => return Err(unexpected("hello", &other)),
        };
        // From here on a loss is a notice; one that came before is an error of this call.
        greeted.store(true, Ordering::SeqCst);
        if client.calls.is_closed() {
            return Err(Error::new(Kind::Unavailable, GONE));
        }
        Ok((client, reply))
    }

    /// Sends a request; the answers come one by one.
    pub(crate) fn send(&self, verb: Verb, fds: Vec<OwnedFd>) -> Answers {
        let (answers, receiver) = mpsc::unbounded_channel();
        // If the connection's task is gone the sender is dropped here and the receiver
        // reports the loss.
        let _ = self.calls.send(Call { verb, fds, answers });
        Answers(receiver)
    }

    async fn call(&self, verb: Verb, fds: Vec<OwnedFd>) -> Result<Outcome> {
        self.send(verb, fds).next().await
    }

    /// Creates a container; its init's pid.
    pub(crate) async fn create(&self, create: message::Create) -> Result<i32> {
        match self.call(Verb::Create(create), Vec::new()).await? {
            Outcome::Created(started) => Ok(started.pid),
            other => Err(unexpected("create", &other)),
        }
    }

    /// Lets a created container run.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.done("start", Verb::Start(message::Start { id: id.into() })).await
    }

    /// Sends a signal to the container's init, or to all its processes.
    pub(crate) async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        self.done("signal", Verb::Signal(message::Signal { id: id.into(), signal, all })).await
    }

    /// Deletes a container from the runtime, killing it if it runs.
    pub(crate) async fn delete(&self, id: &str) -> Result<()> {
        self.done("delete", Verb::Delete(message::Delete { id: id.into(), force: true })).await
    }

    /// Opens a container's log path anew.
    pub(crate) async fn reopen_log(&self, id: &str) -> Result<()> {
        self.done("reopen log", Verb::ReopenLog(message::ReopenLog { id: id.into() })).await
    }

    /// Changes a container's limits to the OCI resources in a file.
    pub(crate) async fn update(&self, id: &str, resources: &std::path::Path) -> Result<()> {
        let resources = resources.to_string_lossy().into_owned();
        let update = Verb::Update(message::Update { id: id.to_string(), resources });
        match self.call(update, Vec::new()).await? {
            Outcome::Done(_) => Ok(()),
            other => Err(unexpected("update", &other)),
        }
    }

    /// What containers in the pod's guest use.
    pub(crate) async fn usage(&self, usage: message::Usage) -> Result<message::UsageReply> {
        match self.call(Verb::Usage(usage), Vec::new()).await? {
            Outcome::Usage(reply) => Ok(reply),
            other => Err(unexpected("usage", &other)),
        }
    }

    /// Connects a socket to a port on the loopback of the pod's guest.
    pub(crate) async fn dial(&self, port: u16, socket: OwnedFd) -> Result<()> {
        let dial = Verb::Dial(message::Dial { port: port.into() });
        match self.call(dial, vec![socket]).await? {
            Outcome::Done(_) => Ok(()),
            other => Err(unexpected("dial", &other)),
        }
    }

    /// Ends the monitor, whatever it still has.
    pub(crate) async fn shutdown(&self) -> Result<()> {
        self.done("shutdown", Verb::Shutdown(message::Shutdown { force: true })).await
    }

    async fn done(&self, what: &str, verb: Verb) -> Result<()> {
        let limit = match verb {
            Verb::Start(_) | Verb::Delete(_) => WORK_LIMIT,
            _ => ANSWER_LIMIT,
        };
        match in_time(what, limit, self.call(verb, Vec::new())).await? {
            Outcome::Done(_) => Ok(()),
            other => Err(unexpected(what, &other)),
        }
    }
}

/// An answer, or the error that there is none.
async fn in_time<T>(
    what: &str,
    limit: Duration,
    answer: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_late| {
        let message = format!("{what}: the pod's monitor has not answered for {limit:?}");
        Err(Error::new(Kind::Timeout, message))
    })
}

/// The monitor's answer is of another kind than the question.
pub(crate) fn unexpected(what: &str, outcome: &Outcome) -> Error {
    Error::internal(format!("{what}: the monitor answered with {outcome:?}"))
}

/// The monitor's error as ours.
fn from_monitor(error: message::Error) -> Error {
    let kind = match error.kind() {
        MonitorKind::Internal | MonitorKind::Runtime => Kind::Internal,
        MonitorKind::Invalid => Kind::Invalid,
        MonitorKind::NotFound => Kind::NotFound,
        MonitorKind::AlreadyExists => Kind::AlreadyExists,
        MonitorKind::NotRunning => Kind::Precondition,
        MonitorKind::Timeout => Kind::Timeout,
        MonitorKind::Refused => Kind::Refused,
    };
    Error::new(kind, error.message)
}

#[derive(Debug)]
struct Connection {
    /// Whether the monitor has answered the first request.
    greeted: Arc<AtomicBool>,
    stream: UnixStream,
    decoder: Decoder,
    pending: HashMap<u64, mpsc::UnboundedSender<Outcome>>,
    notices: mpsc::UnboundedSender<Notice>,
    last: u64,
}

impl Connection {
    async fn run(mut self, mut calls: mpsc::UnboundedReceiver<Call>) {
        loop {
            let carried_on = tokio::select! {
                call = calls.recv() => match call {
                    Some(call) => self.write(call).await,
                    // Every handle is gone, so nobody waits for anything.
                    None => return,
                },
                ready = self.stream.readable() => match ready {
                    Ok(()) => self.read(),
                    Err(e) => Err(e),
                },
            };
            match carried_on {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "monitor connection failed");
                    break;
                }
            }
        }
        // Before the flag is looked at, so that one of both sides sees the other.
        drop(calls);
        if self.greeted.load(Ordering::SeqCst) {
            // The actor may be gone already.
            let _ = self.notices.send(Notice::Lost);
        }
    }

    async fn write(&mut self, call: Call) -> io::Result<bool> {
        self.last += 1;
        let request = Request { id: self.last, verb: Some(call.verb) };
        let frame = match encode(&request) {
            Ok(frame) => frame,
            Err(error) => {
                let error = message::Error {
                    kind: MonitorKind::Invalid.into(),
                    message: error.to_string(),
                };
                let _ = call.answers.send(Outcome::Error(error));
                return Ok(true);
            }
        };
        self.pending.insert(self.last, call.answers);
        let mut fds: Vec<BorrowedFd<'_>> = call.fds.iter().map(AsFd::as_fd).collect();
        let mut sent = 0;
        while let Some(rest) = frame.get(sent..).filter(|rest| !rest.is_empty()) {
            let stream = &self.stream;
            sent +=
                stream.async_io(Interest::WRITABLE, || send_with_fds(stream, rest, &fds)).await?;
            fds.clear();
        }
        Ok(true)
    }

    /// Reads what is there; false at the end of the stream.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 8192];
        let mut none = Descriptors::default();
        let stream = &self.stream;
        let received =
            stream.try_io(Interest::READABLE, || recv_with_fds(stream, &mut buffer, &mut none));
        match received {
            Ok(0) => return Ok(false),
            Ok(n) => self.decoder.push(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(e) => return Err(e),
        }
        let invalid = |e: FrameError| io::Error::new(io::ErrorKind::InvalidData, e);
        while let Some(response) = self.decoder.next::<Response>().map_err(invalid)? {
            self.dispatch(response);
        }
        Ok(true)
    }

    fn dispatch(&mut self, response: Response) {
        let Some(outcome) = response.outcome else { return };
        if let Outcome::Event(event) = outcome {
            let notice = match event.what {
                Some(What::Exited(e)) => {
                    Notice::Exited { id: e.id, exit: e.exited.unwrap_or_default() }
                }
                Some(What::Oom(e)) => Notice::Oom { id: e.id },
                Some(What::GuestEnded(e)) => Notice::GuestEnded { reason: e.message },
                None => return,
            };
            let _ = self.notices.send(notice);
            return;
        }
        // An exec is answered twice, everything else once.
        let more = matches!(outcome, Outcome::ExecStarted(_));
        if let Some(answers) = self.pending.get(&response.request) {
            let _ = answers.send(outcome);
        }
        if !more {
            self.pending.remove(&response.request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_monitor_proto::message::{ContainerExited, Event, HelloReply, Started};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    async fn request(stream: &mut UnixStream) -> Request {
        let mut prefix = [0; 4];
        stream.read_exact(&mut prefix).await.unwrap();
        let mut body = vec![0; u32::from_le_bytes(prefix) as usize];
        stream.read_exact(&mut body).await.unwrap();
        prost::Message::decode(body.as_slice()).unwrap()
    }

    async fn answer(stream: &mut UnixStream, request: u64, outcome: Outcome) {
        let response = Response { request, outcome: Some(outcome) };
        stream.write_all(&encode(&response).unwrap()).await.unwrap();
    }

    async fn connected() -> (Client, UnixStream, mpsc::UnboundedReceiver<Notice>, tempfile::TempDir)
    {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("monitor.sock")).unwrap();
        let (sender, notices) = mpsc::unbounded_channel();
        let path = dir.path().to_path_buf();
        let client = tokio::spawn(async move { Client::connect(&path, sender).await });
        let (mut server, _) = listener.accept().await.unwrap();
        let hello = request(&mut server).await;
        answer(&mut server, hello.id, Outcome::Hello(HelloReply::default())).await;
        (client.await.unwrap().unwrap().0, server, notices, dir)
    }

    #[tokio::test]
    async fn answers_find_their_requests_in_any_order() {
        let (client, mut server, _notices, _dir) = connected().await;
        let a = tokio::spawn({
            let client = client.clone();
            async move { client.create(message::Create { id: "a".into(), ..Default::default() }).await }
        });
        let first = request(&mut server).await;
        let b = tokio::spawn(async move { client.start("b").await });
        let second = request(&mut server).await;
        answer(&mut server, second.id, Outcome::Done(message::Done {})).await;
        answer(&mut server, first.id, Outcome::Created(Started { pid: 42 })).await;
        b.await.unwrap().unwrap();
        assert_eq!(a.await.unwrap().unwrap(), 42);
    }

    #[tokio::test]
    async fn a_refusal_keeps_its_kind_and_words() {
        let (client, mut server, _notices, _dir) = connected().await;
        let start = tokio::spawn(async move { client.start("x").await });
        let asked = request(&mut server).await;
        let refused = message::Error {
            kind: MonitorKind::Refused.into(),
            message: "cpus: partition is invalid".into(),
        };
        answer(&mut server, asked.id, Outcome::Error(refused)).await;
        let error = start.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        assert_eq!(error.to_string(), "cpus: partition is invalid");
    }

    #[tokio::test]
    async fn a_lost_connection_fails_calls_in_flight_and_tells_the_actor() {
        let (client, mut server, mut notices, _dir) = connected().await;
        let start = tokio::spawn(async move { client.start("x").await });
        request(&mut server).await;
        let exited = ContainerExited { id: "x".into(), exited: None };
        let event = Event { what: Some(What::Exited(exited)) };
        answer(&mut server, 0, Outcome::Event(event)).await;
        drop(server);
        assert_eq!(start.await.unwrap().unwrap_err().kind(), Kind::Unavailable);
        assert!(matches!(notices.recv().await, Some(Notice::Exited { .. })));
        assert!(matches!(notices.recv().await, Some(Notice::Lost)));
    }
}
