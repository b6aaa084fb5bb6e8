//! The gRPC services, and the one place where their errors are logged.

mod admin;
mod deadline;
mod image;
mod runtime;
mod streams;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tonic::{Response, Status};
use tracing::Instrument as _;

use crate::error::{Error, Result};
use crate::node::Node;

pub(crate) use admin::AdminApi;
pub(crate) use deadline::DeadlineLayer;
pub(crate) use image::ImageApi;
pub(crate) use runtime::RuntimeApi;

/// Longest message in either direction. Kubelet accepts no more.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

static REQUESTS: AtomicU64 = AtomicU64::new(1);

/// Runs one RPC: gives it a request id, and logs how it ended.
pub(crate) async fn answer<T>(
    rpc: &'static str,
    subject: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<Response<T>, Status> {
    let request = REQUESTS.fetch_add(1, Ordering::Relaxed);
    let span = tracing::info_span!("rpc", request, rpc, subject);
    async {
        let began = Instant::now();
        let outcome = work.await;
        let ms = began.elapsed().as_millis();
        match outcome {
            Ok(reply) => {
                tracing::debug!(ms, "done");
                Ok(Response::new(reply))
            }
            Err(error) => {
                let (kind, chain) = (error.kind(), error.chain());
                if kind.is_fault() {
                    tracing::error!(ms, ?kind, error = %chain, "failed");
                } else {
                    tracing::info!(ms, ?kind, error = %chain, "refused");
                }
                Err(Status::from(&error))
            }
        }
    }
    .instrument(span)
    .await
}

/// Runs blocking work off the event loop. It runs to its end even if the caller goes away.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("a background task ended early").caused_by(e)),
    }
}

/// What every service has.
pub(crate) type Shared = Arc<Node>;
