//! A page that shows the node: read-only, off unless an address is configured.
//!
//! ```text
//!  GET /            the page          ┐ embedded, no build step, nothing from elsewhere
//!  GET /page.js     its script        │
//!  GET /page.css    its style         ┘
//!  GET /node.json   the node, at most a second old; asked for by the script
//! ```
//!
//! Nothing can be changed through it, and nothing secret is in it; yet a page of some other
//! site must not read it through a browser on this node. Hence: loopback only unless the
//! configuration says otherwise, only GET, a Host header that names this server (a foreign
//! name that resolves here is DNS rebinding), no CORS, and a content policy that lets the
//! page load itself alone.

mod state;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};

use crate::error::{Context, Result};
use crate::node::Node;

const PAGE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Connections served at once; more wait.
const CONNECTIONS: usize = 16;
/// How long a client may take to send its headers.
const HEADERS: Duration = Duration::from_secs(10);
/// How old an answer may be: many viewers cost as much as one.
const FRESH: Duration = Duration::from_secs(1);

/// What the connections share.
struct Page {
    node: Arc<Node>,
    address: SocketAddr,
    last: Mutex<Option<(Instant, Bytes)>>,
}

/// Serves the page for ever, once the address is bound.
pub(crate) async fn serve(node: Arc<Node>, address: SocketAddr) -> Result<()> {
    let listener =
        TcpListener::bind(address).await.context(|| format!("serve the page on {address}"))?;
    let address = listener.local_addr().context(|| "look at the page's address".to_string())?;
    tracing::info!(%address, "serving the page");
    let page = Arc::new(Page { node, address, last: Mutex::default() });
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let page = page.clone();
                    tokio::spawn(async move {
                        connection(page, stream).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a viewer of the page");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn connection(page: Arc<Page>, stream: TcpStream) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let page = page.clone();
        async move { Ok::<_, Infallible>(page.answer(&request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a viewer of the page");
    }
}

impl Page {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        if !host.is_some_and(|host| names_us(host, self.address)) {
            let text = "this server is reached by its address or as localhost\n";
            return respond(StatusCode::MISDIRECTED_REQUEST, "text/plain", text.into());
        }
        if request.method() != Method::GET {
            return respond(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".into());
        }
        match request.uri().path() {
            "/" => respond(StatusCode::OK, "text/html; charset=utf-8", PAGE.into()),
            "/page.js" => respond(StatusCode::OK, "text/javascript; charset=utf-8", SCRIPT.into()),
            "/page.css" => respond(StatusCode::OK, "text/css; charset=utf-8", STYLE.into()),
            "/node.json" => match self.state().await {
                Ok(json) => respond(StatusCode::OK, "application/json", json),
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "the page has nothing to show");
                    let text = format!("{}\n", error.chain());
                    respond(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", text.into())
                }
            },
            _ => respond(StatusCode::NOT_FOUND, "text/plain", "not here\n".into()),
        }
    }

    async fn state(&self) -> Result<Bytes> {
        let mut last = self.last.lock().await;
        if let Some((taken, json)) = last.as_ref()
            && taken.elapsed() < FRESH
        {
            return Ok(json.clone());
        }
        let json = Bytes::from(state::of(&self.node).await?.to_string());
        *last = Some((Instant::now(), json.clone()));
        Ok(json)
    }
}

fn respond(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    for (name, value) in [
        ("content-type", kind),
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("cache-control", "no-store"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a Host header means this server: `localhost`, or an address that is its own or
/// of loopback, with its port. Names are what an attacker's DNS can point here.
fn names_us(host: &str, own: SocketAddr) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, port.parse::<u16>().ok()),
        _ => (host, Some(80)),
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let ours = match address {
        Ok(address) => address.is_loopback() || address == own.ip() || own.ip().is_unspecified(),
        Err(_) => name.eq_ignore_ascii_case("localhost"),
    };
    ours && port == Some(own.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_reach_the_page() {
        let own = "127.0.0.1:9095".parse().unwrap();
        for good in ["127.0.0.1:9095", "localhost:9095", "LOCALHOST:9095", "[::1]:9095"] {
            assert!(names_us(good, own), "{good}");
        }
        for bad in [
            "evil.example:9095",
            "127.0.0.1",
            "127.0.0.1:80",
            "localhost",
            "localhost.evil.example:9095",
            "10.0.0.1:9095",
            "",
            ":9095",
            "127.0.0.1.evil.example:9095",
        ] {
            assert!(!names_us(bad, own), "{bad}");
        }
        assert!(names_us("10.0.0.1:9095", "10.0.0.1:9095".parse().unwrap()));
    }

    #[test]
    fn the_page_loads_nothing_but_itself() {
        for text in [PAGE, SCRIPT, STYLE] {
            assert!(!text.contains("http://") && !text.contains("https://"), "it names a site");
        }
        // The policy forbids both, so they would silently not work.
        assert!(
            !PAGE.contains("style=") && !PAGE.contains("onclick") && !PAGE.contains("<script>")
        );
        // Names of pods come from users: they are text, never markup.
        assert!(!SCRIPT.contains("innerHTML") && !SCRIPT.contains("insertAdjacentHTML"));
    }
}
