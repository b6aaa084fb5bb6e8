//! The HTTP server that streaming clients connect to.

use crate::backend::{Backend, Session};
use crate::command::{self, Wanted};
use crate::session::{self, Waiting};
use crate::spdy::Connection;
use crate::{portforward, websocket};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const PROTOCOL_HEADER: &str = "x-stream-protocol-version";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const PORTFORWARD: &str = "portforward.k8s.io";
const SPDY_COMMAND: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const WEBSOCKET_COMMAND: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];
const WEBSOCKET_PORTS: [&str; 3] = [TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// Why the server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be had.
    #[error("listen for streaming clients on {address}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// No randomness for a token.
    #[error("make a token")]
    Token(#[source] std::io::Error),
    /// Too many URLs wait for their client.
    #[error("{} streams wait for their client; try again in a minute", session::MOST)]
    Full,
}

/// The streaming server; cheap to clone.
#[derive(Clone)]
pub struct Server {
    waiting: Arc<Waiting>,
    address: SocketAddr,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens and serves in the background. Port 0 takes any free one. Must be called
    /// within a tokio runtime.
    pub async fn listen(
        address: SocketAddr,
        backend: Arc<dyn Backend>,
    ) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let waiting = Arc::new(Waiting::default());
        tokio::spawn(accept(listener, Arc::clone(&waiting), backend));
        Ok(Self { waiting, address })
    }

    /// The URL for a session: good for one client, within a minute.
    pub fn register(&self, session: Session) -> Result<String, ServerError> {
        let verb = match session {
            Session::Exec { .. } => "exec",
            Session::Attach { .. } => "attach",
            Session::PortForward { .. } => "portforward",
        };
        let token = session::token().map_err(ServerError::Token)?;
        let url = format!("http://{}/{verb}/{token}", self.address);
        self.waiting.insert(token, session, Instant::now()).ok_or(ServerError::Full)?;
        Ok(url)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(listener: TcpListener, waiting: Arc<Waiting>, backend: Arc<dyn Backend>) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                drop(socket.set_nodelay(true)); // only latency is lost
                tokio::spawn(serve(socket, Arc::clone(&waiting), Arc::clone(&backend)));
            }
            Err(error) => {
                // Out of descriptors, most likely: others will be closed.
                tracing::warn!(%error, "cannot accept a streaming client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(socket: TcpStream, waiting: Arc<Waiting>, backend: Arc<dyn Backend>) {
    let service = service_fn(move |request| {
        let answer = answer(request, &waiting, &backend);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(30))
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a streaming client's connection ended");
    }
}

type Answer = Response<Full<Bytes>>;

fn refuse(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Full::from(text.to_owned()));
    *answer.status_mut() = status;
    answer
}

fn answer(request: Request<Incoming>, waiting: &Waiting, backend: &Arc<dyn Backend>) -> Answer {
    if request.method() != Method::GET && request.method() != Method::POST {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "GET or POST\n");
    }
    let upgrade = text(request.headers(), &header::UPGRADE).to_ascii_lowercase();
    if upgrade != "websocket" && upgrade != "spdy/3.1" {
        return refuse(StatusCode::BAD_REQUEST, "upgrade to SPDY/3.1 or websocket\n");
    }
    let mut path = request.uri().path().trim_start_matches('/').splitn(2, '/');
    let (verb, token) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
    let Some(session) = waiting.take(token, Instant::now()) else {
        return refuse(StatusCode::NOT_FOUND, "no such stream: its URL was used or is too old\n");
    };
    let fits = match &session {
        Session::Exec { .. } => verb == "exec",
        Session::Attach { .. } => verb == "attach",
        Session::PortForward { .. } => verb == "portforward",
    };
    if !fits {
        return refuse(StatusCode::NOT_FOUND, "this token is for another verb\n");
    }
    if upgrade == "websocket" {
        over_websocket(request, session, Arc::clone(backend))
    } else {
        over_spdy(request, session, Arc::clone(backend))
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &header::HeaderName) -> &'a str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

/// The first protocol the client names that is spoken here; `None` when it names some and
/// none of them fits, an empty one when it names none.
fn negotiate<'a>(headers: &HeaderMap, name: &str, spoken: &[&'a str]) -> Option<&'a str> {
    let mut named = false;
    for value in headers.get_all(name) {
        for offer in value.to_str().unwrap_or_default().split(',').map(str::trim) {
            named |= !offer.is_empty();
            if let Some(found) = spoken.iter().find(|s| **s == offer) {
                return Some(found);
            }
        }
    }
    if named { None } else { Some("") }
}

fn switch(upgrade: &'static str, header: &'static str, protocol: &str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(upgrade));
    if let Some(value) = HeaderValue::from_str(protocol).ok().filter(|_| !protocol.is_empty()) {
        headers.insert(header, value);
    }
    answer
}

fn over_spdy(request: Request<Incoming>, session: Session, backend: Arc<dyn Backend>) -> Answer {
    let spoken: &[&str] = match session {
        Session::PortForward { .. } => &[PORTFORWARD],
        _ => &SPDY_COMMAND,
    };
    let Some(protocol) = negotiate(request.headers(), PROTOCOL_HEADER, spoken) else {
        return refuse(
            StatusCode::FORBIDDEN,
            &format!("protocols spoken: {}\n", spoken.join(", ")),
        );
    };
    let reply = switch("SPDY/3.1", PROTOCOL_HEADER, protocol);
    let protocol = protocol.to_owned();
    tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => TokioIo::new(upgraded),
            Err(error) => return tracing::debug!(%error, "a streaming client did not upgrade"),
        };
        match Connection::new(upgraded) {
            Ok(connection) => spdy_session(connection, session, backend, &protocol).await,
            Err(error) => tracing::warn!(%error, "cannot serve a streaming client"),
        }
    });
    reply
}

async fn spdy_session(
    mut connection: Connection,
    session: Session,
    backend: Arc<dyn Backend>,
    protocol: &str,
) {
    let wanted = match &session {
        Session::PortForward { pod, .. } => {
            return portforward::spdy(connection, backend, pod.clone()).await;
        }
        Session::Exec { .. } | Session::Attach { .. } => wanted(&session),
    };
    match command::accept(&mut connection, wanted, command::version(protocol)).await {
        Ok(channels) => {
            let process = backend.open(session).await.map_err(|e| e.to_string());
            command::run(process, channels).await;
        }
        Err(reason) => tracing::debug!(%reason, "a streaming client opened the wrong streams"),
    }
    connection.close().await;
}

fn wanted(session: &Session) -> Wanted {
    match session {
        Session::Exec { tty, stdin, stdout, stderr, .. }
        | Session::Attach { tty, stdin, stdout, stderr, .. } => {
            Wanted { stdin: *stdin, stdout: *stdout, stderr: *stderr && !tty, tty: *tty }
        }
        Session::PortForward { .. } => {
            Wanted { stdin: false, stdout: false, stderr: false, tty: false }
        }
    }
}

fn over_websocket(
    request: Request<Incoming>,
    session: Session,
    backend: Arc<dyn Backend>,
) -> Answer {
    let spoken: &[&str] = match session {
        Session::PortForward { .. } => &WEBSOCKET_PORTS,
        _ => &WEBSOCKET_COMMAND,
    };
    let named = header::SEC_WEBSOCKET_PROTOCOL.as_str();
    let Some(protocol) = negotiate(request.headers(), named, spoken) else {
        return refuse(
            StatusCode::FORBIDDEN,
            &format!("protocols spoken: {}\n", spoken.join(", ")),
        );
    };
    let key = text(request.headers(), &header::SEC_WEBSOCKET_KEY);
    if key.is_empty() || text(request.headers(), &header::SEC_WEBSOCKET_VERSION) != "13" {
        return refuse(StatusCode::BAD_REQUEST, "a WebSocket of version 13, with a key\n");
    }
    let mut reply = switch("websocket", "sec-websocket-protocol", protocol);
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        reply.headers_mut().insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    let protocol = protocol.to_owned();
    tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => TokioIo::new(upgraded),
            Err(error) => return tracing::debug!(%error, "a streaming client did not upgrade"),
        };
        websocket_session(upgraded, session, backend, &protocol).await;
    });
    reply
}

async fn websocket_session(
    io: TokioIo<hyper::upgrade::Upgraded>,
    session: Session,
    backend: Arc<dyn Backend>,
    protocol: &str,
) {
    match &session {
        Session::PortForward { pod, .. } if protocol == TUNNEL => {
            match Connection::new(websocket::tunnel(io).await) {
                Ok(connection) => portforward::spdy(connection, backend, pod.clone()).await,
                Err(error) => tracing::warn!(%error, "cannot serve a streaming client"),
            }
        }
        Session::PortForward { pod, ports } => {
            let (socket, pairs) = websocket::ports(io, ports, protocol).await;
            let each = pairs
                .into_iter()
                .map(|pair| portforward::channels(Arc::clone(&backend), pod.clone(), pair));
            futures::future::join_all(each).await;
            socket.close().await;
        }
        Session::Exec { .. } | Session::Attach { .. } => {
            let (socket, channels) = websocket::command(io, wanted(&session), protocol).await;
            let process = backend.open(session).await.map_err(|e| e.to_string());
            command::run(process, channels).await;
            socket.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(values: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(PROTOCOL_HEADER, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn the_clients_order_decides() {
        let both = offers(&["v3.channel.k8s.io", "v4.channel.k8s.io"]);
        assert_eq!(negotiate(&both, PROTOCOL_HEADER, &SPDY_COMMAND), Some("v3.channel.k8s.io"));
        let listed = offers(&["v9.channel.k8s.io, v4.channel.k8s.io"]);
        assert_eq!(negotiate(&listed, PROTOCOL_HEADER, &SPDY_COMMAND), Some("v4.channel.k8s.io"));
    }

    #[test]
    fn a_client_that_speaks_nothing_we_speak_is_refused() {
        assert_eq!(negotiate(&offers(&["v9"]), PROTOCOL_HEADER, &SPDY_COMMAND), None);
        assert_eq!(negotiate(&offers(&[]), PROTOCOL_HEADER, &SPDY_COMMAND), Some(""));
    }
}
