//! Exec, attach and port-forward streams.
//!
//! CRI's `Exec`, `Attach` and `PortForward` answer with a URL; the client (kubelet, crictl)
//! then connects to it and upgrades the connection:
//!
//! ```text
//!  Exec RPC ──▶ Server::register(Session) ──▶ http://127.0.0.1:PORT/exec/TOKEN
//!  client  ──▶ GET or POST that URL, Upgrade: SPDY/3.1 or websocket
//!                 │ token looked up once, then gone
//!                 ▼
//!            spdy::Connection or websocket::Channels
//!                 │ one stream for each of error, stdin, stdout, stderr, resize
//!                 ▼
//!            Backend: pipes to the process, or a socket in the pod
//! ```
//!
//! Bytes go from the client's socket to the process's pipe inside this crate; the
//! [`Backend`] only makes the pipes. The remote-command protocols are those of
//! `k8s.io/streaming`: `v4.channel.k8s.io` down to v1 over SPDY, v5 down to v1 over
//! WebSocket; port-forward over SPDY, and over WebSocket as a tunnel for SPDY or as
//! channel pairs.

mod backend;
mod command;
mod portforward;
mod server;
mod session;
pub mod spdy;
mod status;
mod websocket;

pub use backend::{Backend, BackendError, Connected, Process, Session};
pub use server::{Server, ServerError};
