//! What a stream is for, and who makes the process or socket at its other end.

use futures::future::BoxFuture;
use std::fmt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

/// What a URL stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Session {
    /// A new process in a container.
    Exec {
        /// Container id.
        container: String,
        /// Command and arguments.
        command: Vec<String>,
        /// Whether it gets a terminal.
        tty: bool,
        /// Whether the client sends input.
        stdin: bool,
        /// Whether the client wants output.
        stdout: bool,
        /// Whether the client wants error output; false with a terminal.
        stderr: bool,
    },
    /// The container's own process.
    Attach {
        /// Container id.
        container: String,
        /// Whether the container has a terminal.
        tty: bool,
        /// Whether the client sends input.
        stdin: bool,
        /// Whether the client wants output.
        stdout: bool,
        /// Whether the client wants error output; false with a terminal.
        stderr: bool,
    },
    /// TCP ports in a pod's network namespace.
    PortForward {
        /// Pod id.
        pod: String,
        /// The ports the caller named; others are allowed too when it named none.
        ports: Vec<u16>,
    },
}

/// A failure, in words for the client.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// A running process and the ends of its pipes.
pub struct Process {
    /// Closed by dropping it.
    pub stdin: Option<pipe::Sender>,
    /// Ends when every process that has it open is gone.
    pub stdout: Option<pipe::Receiver>,
    /// As `stdout`.
    pub stderr: Option<pipe::Receiver>,
    /// Takes terminal sizes as (columns, rows).
    pub resize: Option<mpsc::Sender<(u16, u16)>>,
    /// The exit code; for attach, resolves when the container has ended.
    pub exit: BoxFuture<'static, Result<i32, BackendError>>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("stdin", &self.stdin)
            .field("stdout", &self.stdout)
            .field("stderr", &self.stderr)
            .finish_non_exhaustive()
    }
}

/// Makes the other end of a stream.
pub trait Backend: Send + Sync + 'static {
    /// Starts the process of an [`Session::Exec`], or joins the one of an
    /// [`Session::Attach`].
    fn open(&self, session: Session) -> BoxFuture<'static, Result<Process, BackendError>>;

    /// Connects to a TCP port in the pod's network namespace. The answer is a stream
    /// socket; a TCP one is passed as the same descriptor type, see [`Connected`].
    fn connect(
        &self,
        pod: String,
        port: u16,
    ) -> BoxFuture<'static, Result<Connected, BackendError>>;
}

/// A connected socket inside the pod.
#[derive(Debug)]
pub enum Connected {
    /// A TCP connection.
    Tcp(tokio::net::TcpStream),
    /// A unix connection, for pods behind a virtual machine's channel.
    Unix(UnixStream),
}
