//! Streaming a blob: resumed after breaks, from whichever host still answers.

use std::time::Duration;

use bytes::Bytes;
use reqwest::{
    Response, StatusCode,
    header::{CONTENT_RANGE, HeaderMap},
};
use tokio::sync::mpsc;

use super::{ATTEMPTS, Host, Session, http_error, shown};
use crate::{Digest, Error, error::Result};

impl Session {
    /// Sends the blob's bytes to `out` in order, each once. Their digest is the receiver's to
    /// check. Returns early, without error, if the receiver goes away.
    pub(crate) async fn download(
        &self,
        digest: &Digest,
        size: u64,
        out: &mpsc::Sender<Bytes>,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let mut position = 0;
        let mut failures = Vec::new();
        for host in self.hosts.iter().filter(|host| host.endpoint.pull) {
            let mut fruitless = 0;
            loop {
                let before = position;
                let part = Part { digest, size, out, progress };
                match self.part(host, &part, &mut position).await {
                    Ok(()) => return Ok(()),
                    Err((e, broke_off)) => {
                        fruitless = if position > before { 1 } else { fruitless + 1 };
                        if !broke_off || fruitless >= ATTEMPTS {
                            failures.push((host.endpoint.host(), e));
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(200) * 2_u32.pow(fruitless)).await;
                    }
                }
            }
        }
        Err(self.all_failed(failures))
    }

    /// A small blob, whole.
    pub(crate) async fn blob(&self, digest: &Digest, size: u64) -> Result<Vec<u8>> {
        let (out, mut incoming) = mpsc::channel::<Bytes>(16);
        let collect = async {
            let mut bytes = Vec::new();
            while let Some(chunk) = incoming.recv().await {
                bytes.extend_from_slice(&chunk);
            }
            bytes
        };
        let fetch = async {
            let result = self.download(digest, size, &out, &|_| {}).await;
            drop(out);
            result
        };
        let (fetched, bytes) = futures::join!(fetch, collect);
        fetched?;
        let actual = Digest::of(&bytes);
        if actual == *digest {
            return Ok(bytes);
        }
        let (expected, actual) = (digest.to_string(), actual.to_string());
        Err(Error::Mismatch { what: "blob".to_owned(), expected, actual })
    }

    /// Downloads from `position` on, moving it along. The flag of an error tells a connection that
    /// broke, where trying again makes sense, from an answer that settles the matter.
    async fn part(
        &self,
        host: &Host,
        part: &Part<'_>,
        position: &mut u64,
    ) -> Result<(), (Error, bool)> {
        let path = format!("blobs/{}", part.digest);
        let from = (*position > 0).then_some(*position);
        let mut response = self.get(host, &path, "*/*", from).await.map_err(|e| (e, false))?;
        let mut skip = start_of(&response, part, *position).map_err(|e| (e, false))?;
        let url = response.url().clone();
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) if *position >= part.size => return Ok(()),
                Ok(None) => return Err((part.mismatch(&position.to_string()), true)),
                Err(e) => return Err((http_error("GET", &url, e), true)),
            };
            let known = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
            skip -= known as u64;
            let fresh = chunk.slice(known..);
            if fresh.is_empty() {
                continue;
            }
            *position += fresh.len() as u64;
            if *position > part.size {
                return Err((part.mismatch("more"), false));
            }
            if part.out.send(fresh).await.is_err() {
                return Ok(());
            }
            (part.progress)(*position);
        }
    }
}

struct Part<'a> {
    digest: &'a Digest,
    size: u64,
    out: &'a mpsc::Sender<Bytes>,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl Part<'_> {
    fn mismatch(&self, actual: &str) -> Error {
        Error::Mismatch {
            what: format!("blob {}", self.digest),
            expected: format!("{} bytes", self.size),
            actual: format!("{actual} bytes"),
        }
    }
}

/// How many bytes of the answer are known already: none if the host honoured the range, all up to
/// `position` if it sent the whole blob again.
fn start_of(response: &Response, part: &Part<'_>, position: u64) -> Result<u64> {
    let protocol = |reason: String| Error::Protocol { url: shown(response.url()), reason };
    if response.status() == StatusCode::PARTIAL_CONTENT {
        return match range_start(response.headers()) {
            Some(start) if start == position => Ok(0),
            _ => Err(protocol(format!("sent another range than from byte {position}"))),
        };
    }
    match response.content_length() {
        Some(length) if length != part.size => Err(part.mismatch(&length.to_string())),
        _ => Ok(position),
    }
}

/// `bytes 5-9/10` starts at 5.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
