//! Exec, Attach and PortForward: what the streaming server's clients are tied to.
//!
//! The pipes are made here; their far ends go to the monitor, the near ones to the
//! streaming server, so bulk data crosses neither this module nor the monitor protocol.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use nix::sched::{CloneFlags, setns};
use pinion_cri_proto::v1::{
    AttachRequest, AttachResponse, ExecRequest, ExecResponse, NamespaceMode, PortForwardRequest,
    PortForwardResponse,
};
use pinion_monitor_proto::message;
use pinion_monitor_proto::message::request::Verb;
use pinion_monitor_proto::message::response::Outcome;
use pinion_streaming::{Backend, BackendError, Connected, Process, Server, Session};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::error::{Context, Error, Kind, Result};
use crate::exec;
use crate::monitor::{Answers, Client, unexpected};
use crate::node::Node;
use crate::record::{Container, Phase};

/// How long a port in the pod may take to answer.
const CONNECT: Duration = Duration::from_secs(10);

/// The URL for a command in a container.
pub(crate) fn exec(node: &Node, server: &Server, request: ExecRequest) -> Result<ExecResponse> {
    let ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request;
    if cmd.is_empty() {
        return Err(Error::invalid("cmd: the command is empty"));
    }
    check_streams(tty, stdin, stdout, stderr)?;
    let (_, container) = running(node, &container_id)?;
    let container = container.id.clone();
    let session = Session::Exec { container, command: cmd, tty, stdin, stdout, stderr };
    Ok(ExecResponse { url: register(server, session)? })
}

/// The URL for a container's own stdio.
pub(crate) fn attach(
    node: &Node,
    server: &Server,
    request: AttachRequest,
) -> Result<AttachResponse> {
    let AttachRequest { container_id, stdin, tty, stdout, stderr } = request;
    check_streams(tty, stdin, stdout, stderr)?;
    let (_, container) = running(node, &container_id)?;
    if tty != container.config.tty {
        let has = if container.config.tty { "a" } else { "no" };
        return Err(Error::invalid(format!("tty: container {} has {has} terminal", container.id)));
    }
    let container = container.id.clone();
    let session = Session::Attach { container, tty, stdin, stdout, stderr };
    Ok(AttachResponse { url: register(server, session)? })
}

/// The URL for ports of a pod.
pub(crate) fn port_forward(
    node: &Node,
    server: &Server,
    request: &PortForwardRequest,
) -> Result<PortForwardResponse> {
    let snapshot = node.registry.snapshot();
    let pod = snapshot.pod(&request.pod_sandbox_id)?;
    let port = |port: &i32| match u16::try_from(*port) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Error::invalid(format!("port: {port} is not between 1 and 65535"))),
    };
    let ports = request.port.iter().map(port).collect::<Result<_>>()?;
    let session = Session::PortForward { pod: pod.sandbox.id.clone(), ports };
    Ok(PortForwardResponse { url: register(server, session)? })
}

fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<()> {
    if tty && stderr {
        return Err(Error::invalid("stderr: a terminal has none; ask for tty or for stderr"));
    }
    if !stdin && !stdout && !stderr {
        return Err(Error::invalid("one of stdin, stdout and stderr must be true"));
    }
    Ok(())
}

fn register(server: &Server, session: Session) -> Result<String> {
    server.register(session).context(|| "offer a stream".to_string())
}

/// A running container and its pod's monitor.
fn running(node: &Node, id: &str) -> Result<(Client, Arc<Container>)> {
    let snapshot = node.registry.snapshot();
    let (pod, container) = snapshot.container(id)?;
    if container.phase() != Phase::Running {
        return Err(Error::precondition(format!("container {} is not running", container.id)));
    }
    let monitor = pod.monitor.clone().ok_or_else(|| {
        Error::new(Kind::Unavailable, format!("pod sandbox {} has no monitor", container.pod))
    })?;
    Ok((monitor, container.clone()))
}

/// Ties streams to containers of this node.
#[derive(Debug)]
pub(crate) struct Streams(pub(crate) Arc<Node>);

impl Backend for Streams {
    fn open(&self, session: Session) -> BoxFuture<'static, Result<Process, BackendError>> {
        let node = Arc::clone(&self.0);
        async move { open(&node, session).await.map_err(|e| tell(&e)) }.boxed()
    }

    fn connect(
        &self,
        pod: String,
        port: u16,
    ) -> BoxFuture<'static, Result<Connected, BackendError>> {
        let node = Arc::clone(&self.0);
        async move { connect(&node, &pod, port).await.map_err(|e| tell(&e)) }.boxed()
    }
}

fn tell(error: &Error) -> BackendError {
    BackendError(error.chain().to_string())
}

async fn open(node: &Arc<Node>, session: Session) -> Result<Process> {
    match session {
        Session::Exec { container, command, tty, stdin, stdout, stderr } => {
            let pipes = Pipes::new(stdin, stdout, stderr && !tty)?;
            start(node, &container, command, tty, pipes).await
        }
        Session::Attach { container, stdin, stdout, stderr, tty } => {
            let pipes = Pipes::new(stdin, stdout, stderr && !tty)?;
            join(node, &container, tty, pipes).await
        }
        Session::PortForward { .. } => Err(Error::internal("a port is no process")),
    }
}

/// The pipes of a process: near ends for the client, far ends for the monitor, in the order
/// stdin, stdout, stderr.
struct Pipes {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    far: Vec<OwnedFd>,
}

impl Pipes {
    fn new(stdin: bool, stdout: bool, stderr: bool) -> Result<Self> {
        let what = || "make the pipes of a stream".to_string();
        let mut pipes = Self { stdin: None, stdout: None, stderr: None, far: Vec::new() };
        if stdin {
            let (far, near) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
            pipes.stdin = Some(pipe::Sender::from_owned_fd(near).context(what)?);
            pipes.far.push(far);
        }
        for (wanted, slot) in [(stdout, &mut pipes.stdout), (stderr, &mut pipes.stderr)] {
            if wanted {
                let (near, far) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
                *slot = Some(pipe::Receiver::from_owned_fd(near).context(what)?);
                pipes.far.push(far);
            }
        }
        Ok(pipes)
    }
}

/// Starts a process in a container.
async fn start(
    node: &Arc<Node>,
    container: &str,
    command: Vec<String>,
    tty: bool,
    pipes: Pipes,
) -> Result<Process> {
    let (monitor, container) = running(node, container)?;
    let directory = node.paths.pod(&container.pod).container(&container.id);
    let (exec_id, file) = exec::prepare(directory, command, tty).await?;
    let exec = message::Exec {
        id: container.id.clone(),
        exec_id: exec_id.clone(),
        process: file.to_string_lossy().into_owned(),
        terminal: tty,
        stdin: pipes.stdin.is_some(),
        stdout: pipes.stdout.is_some(),
        stderr: pipes.stderr.is_some(),
        timeout_ms: 0,
    };
    let mut answers = monitor.send(Verb::Exec(exec), pipes.far);
    let started = match answers.next().await {
        Ok(Outcome::ExecStarted(_)) => Ok(()),
        Ok(other) => Err(unexpected("exec", &other)),
        Err(error) => Err(error),
    };
    // The runtime has read it; the container's directory may be gone with the container.
    drop(tokio::fs::remove_file(&file).await);
    started?;
    Ok(Process {
        stdin: pipes.stdin,
        stdout: pipes.stdout,
        stderr: pipes.stderr,
        resize: tty.then(|| resizer(monitor, container.id.clone(), exec_id)),
        exit: exited(answers).boxed(),
    })
}

async fn exited(mut answers: Answers) -> Result<i32, BackendError> {
    match answers.next().await {
        Ok(Outcome::ExecExited(exited)) => Ok(exited.code),
        Ok(other) => Err(tell(&unexpected("exec", &other))),
        Err(error) => Err(tell(&error)),
    }
}

/// Joins the stdio of a container's own process.
async fn join(node: &Arc<Node>, container: &str, tty: bool, pipes: Pipes) -> Result<Process> {
    let (monitor, container) = running(node, container)?;
    let attach = message::Attach {
        id: container.id.clone(),
        stdin: pipes.stdin.is_some(),
        stdout: pipes.stdout.is_some(),
        stderr: pipes.stderr.is_some(),
        patient: false,
    };
    match monitor.send(Verb::Attach(attach), pipes.far).next().await? {
        Outcome::Done(_) => {}
        other => return Err(unexpected("attach", &other)),
    }
    let resize = tty.then(|| resizer(monitor, container.id.clone(), String::new()));
    Ok(Process {
        stdin: pipes.stdin,
        stdout: pipes.stdout,
        stderr: pipes.stderr,
        resize,
        exit: ended(Arc::clone(node), container.id.clone()).boxed(),
    })
}

/// Waits until a container runs no more. Its exit code is the container's affair: attaching
/// to it went well.
async fn ended(node: Arc<Node>, container: String) -> Result<i32, BackendError> {
    let mut changes = node.registry.changes();
    loop {
        changes.mark_unchanged();
        match node.registry.snapshot().container(&container) {
            Ok((_, container)) if container.phase() == Phase::Running => {}
            _ => return Ok(0),
        }
        if changes.changed().await.is_err() {
            return Ok(0);
        }
    }
}

/// Passes terminal sizes on to the monitor, in order.
fn resizer(monitor: Client, id: String, exec_id: String) -> mpsc::Sender<(u16, u16)> {
    let (sender, mut sizes) = mpsc::channel::<(u16, u16)>(4);
    tokio::spawn(async move {
        while let Some((width, height)) = sizes.recv().await {
            let (width, height) = (width.into(), height.into());
            let (id, exec_id) = (id.clone(), exec_id.clone());
            let resize = message::Resize { id, exec_id, width, height };
            if let Err(error) = monitor.send(Verb::Resize(resize), Vec::new()).next().await {
                tracing::debug!(error = %error.chain(), "a terminal was not resized");
                return;
            }
        }
    });
    sender
}

/// Connects to a port on the pod's loopback.
async fn connect(node: &Arc<Node>, pod: &str, port: u16) -> Result<Connected> {
    let guest = {
        let snapshot = node.registry.snapshot();
        let pod = snapshot.pod(pod)?;
        pod.sandbox.guest.as_ref().and(pod.monitor.clone())
    };
    if let Some(monitor) = guest {
        let what = || "make a connection to the guest".to_string();
        let (near, far) = tokio::net::UnixStream::pair().context(what)?;
        let far = far.into_std().context(what)?;
        monitor.dial(port, far.into()).await?;
        return Ok(Connected::Unix(near));
    }
    let namespace = {
        let snapshot = node.registry.snapshot();
        let sandbox = &snapshot.pod(pod)?.sandbox;
        let own = sandbox.namespaces().network() != NamespaceMode::Node;
        own.then(|| node.paths.pod(&sandbox.id).namespaces().join("net"))
    };
    let (answer, connected) = tokio::sync::oneshot::channel();
    // A thread of its own: it enters the pod's namespace and ends there.
    std::thread::Builder::new()
        .name("port-forward".into())
        .spawn(move || drop(answer.send(dial(namespace.as_deref(), port))))
        .context(|| "start a thread".to_string())?;
    let socket = connected.await.context(|| "connect to the pod".to_string())??;
    let what = || "use the connection to the pod".to_string();
    socket.set_nonblocking(true).context(what)?;
    Ok(Connected::Tcp(tokio::net::TcpStream::from_std(socket).context(what)?))
}

/// Enters the network namespace, if any, and connects; IPv4 first.
fn dial(namespace: Option<&Path>, port: u16) -> Result<TcpStream> {
    if let Some(path) = namespace {
        let what = || format!("enter {}", path.display());
        let file = std::fs::File::open(path).context(what)?;
        setns(file, CloneFlags::CLONE_NEWNET).context(what)?;
    }
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let [v4, v6] = loopback.map(|address| SocketAddr::new(address, port));
    TcpStream::connect_timeout(&v4, CONNECT)
        .or_else(|first| TcpStream::connect_timeout(&v6, CONNECT).map_err(|_second| first))
        .context(|| format!("connect to port {port} of the pod"))
}
