//! The client's deadline, answered with the code the gRPC specification names.
//!
//! The transport ends a call whose `grpc-timeout` is over with `Cancelled`, which clients
//! take for their own cancellation. This layer is inside the transport's, so its timer, of
//! the same length and begun first, is the one that counts: `DeadlineExceeded`. Either way only the
//! answer is given up; operations go on (see [`crate::pod`]).

use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use tonic::Status;
use tonic::codegen::Service;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::Layer;

/// Adds the deadline to a service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { inner }
    }
}

/// A service whose calls end in time.
#[derive(Debug, Clone)]
pub(crate) struct Deadline<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<tonic::body::Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Some(limit) = limit(request.headers()) else {
            return Box::pin(self.inner.call(request));
        };
        let path = request.uri().path().to_string();
        let timer = tokio::time::sleep(limit);
        let work = self.inner.call(request);
        Box::pin(async move {
            tokio::select! {
                result = work => result,
                () = timer => {
                    tracing::info!(path, ?limit, "the client's deadline is over");
                    let message = format!("not done within the client's deadline of {limit:?}");
                    Ok(Status::deadline_exceeded(message).into_http())
                }
            }
        })
    }
}

/// The value of `grpc-timeout`: up to eight digits and a unit. What does not parse is no
/// deadline, as the specification has it.
fn limit(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", text.parse().unwrap());
        limit(&headers)
    }

    #[test]
    fn every_unit_is_understood() {
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse("5S"), Some(Duration::from_secs(5)));
        assert_eq!(parse("999977u"), Some(Duration::from_micros(999_977)));
        assert_eq!(parse("1m"), Some(Duration::from_millis(1)));
        assert_eq!(parse("1n"), Some(Duration::from_nanos(1)));
    }

    #[test]
    fn nonsense_is_no_deadline() {
        for text in ["", "S", "5", "5s", "-1S", "123456789S", "1é"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert_eq!(limit(&HeaderMap::new()), None);
    }
}
