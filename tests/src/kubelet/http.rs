//! One GET of kubelet's read-only port. HTTP/1.0, so the answer ends with the connection.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::error::{During, Error, Result};

/// How long kubelet may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The body of a successful answer from a port on loopback.
pub(super) fn get(port: u16, path: &str) -> Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let what = || format!("GET http://{address}{path}");
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).during(what)?;
    stream.set_read_timeout(Some(PATIENCE)).during(what)?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").during(what)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).during(what)?;
    let answer = String::from_utf8_lossy(&answer);
    body(&answer).map(str::to_owned).map_err(|status| Error::check(format!("{}: {status}", what())))
}

/// The body, or the status line and what came with it.
fn body(answer: &str) -> std::result::Result<&str, String> {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let status = head.lines().next().unwrap_or_default();
    match status.split(' ').nth(1) {
        Some("200") => Ok(body),
        _ => Err(format!("{status}: {}", body.trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_200_is_an_answer() {
        assert_eq!(body("HTTP/1.0 200 OK\r\nA: b\r\n\r\n{}"), Ok("{}"));
        let refused = body("HTTP/1.0 403 Forbidden\r\n\r\nno\n").unwrap_err();
        assert_eq!(refused, "HTTP/1.0 403 Forbidden: no");
        assert!(body("").is_err());
    }
}
