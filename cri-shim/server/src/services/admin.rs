//! The admin service, which `pinctl` speaks.

use std::path::PathBuf;

use futures::StreamExt;
use pinion_cri_proto::admin::admin_server::Admin;
use pinion_cri_proto::admin::*;
use pinion_image::{Auth, Progress, Stage};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status};

use super::streams::Messages;
use super::{Shared, answer, blocking};
use crate::error::{Context, Error, Kind, Result};
use crate::images::{self, Foreign as _};
use crate::record::Phase;
use crate::{contract, info};

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct AdminApi {
    node: Shared,
}

type Reply<T> = Result<Response<T>, Status>;

impl AdminApi {
    pub(crate) fn new(node: Shared) -> Self {
        Self { node }
    }

    async fn receipts(&self, prefix: &str) -> Result<Vec<Receipt>> {
        let snapshot = self.node.registry.snapshot();
        let mut receipts = Vec::new();
        for (pod, container) in snapshot.containers() {
            let wanted = container.id.starts_with(prefix) || pod.sandbox.id.starts_with(prefix);
            if !wanted || container.phase() == Phase::Exited {
                continue;
            }
            let metadata = pod.sandbox.metadata();
            if let Some(json) = contract::receipt(&self.node, container).await? {
                receipts.push(Receipt {
                    container_id: container.id.clone(),
                    container_name: container.name().to_string(),
                    pod_name: metadata.name,
                    pod_namespace: metadata.namespace,
                    json,
                });
            }
        }
        if receipts.is_empty() && !prefix.is_empty() {
            let message = format!("no running pod or container whose id begins with {prefix}");
            return Err(Error::not_found(message));
        }
        Ok(receipts)
    }
}

fn stage(stage: Stage) -> pull_progress::Stage {
    match stage {
        Stage::Resolving => pull_progress::Stage::Resolving,
        Stage::Downloading => pull_progress::Stage::Downloading,
        Stage::Unpacking => pull_progress::Stage::Unpacking,
        Stage::Done => pull_progress::Stage::Done,
        Stage::AlreadyPresent => pull_progress::Stage::AlreadyPresent,
    }
}

fn message(progress: Progress) -> PullProgress {
    PullProgress {
        layer: progress.layer.map(|digest| digest.to_string()).unwrap_or_default(),
        stage: stage(progress.stage).into(),
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        image_id: String::new(),
    }
}

#[tonic::async_trait]
impl Admin for AdminApi {
    async fn info(&self, _: Request<InfoRequest>) -> Reply<InfoResponse> {
        let work = async {
            Ok(InfoResponse {
                version: env!("CARGO_PKG_VERSION").into(),
                json: info::of_node(&self.node).await.to_string(),
            })
        };
        answer("Info", "", work).await
    }

    async fn topology(&self, _: Request<TopologyRequest>) -> Reply<TopologyResponse> {
        let work = async {
            let topology = blocking(contract::topology).await?;
            let json =
                serde_json::to_string(&topology).context(|| "encode the topology".to_string())?;
            let owners = contract::owners(&self.node);
            Ok(TopologyResponse { topology_json: json, owners })
        };
        answer("Topology", "", work).await
    }

    async fn receipts(&self, request: Request<ReceiptsRequest>) -> Reply<ReceiptsResponse> {
        let id = request.into_inner().id;
        let work = async { Ok(ReceiptsResponse { receipts: self.receipts(&id).await? }) };
        answer("Receipts", &id, work).await
    }

    type PullImageStream = Messages<PullProgress>;

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Reply<Self::PullImageStream> {
        let PullImageRequest { reference, username, password } = request.into_inner();
        let subject = reference.clone();
        let node = self.node.clone();
        let work = async move {
            let (sender, receiver) = mpsc::unbounded_channel();
            let auth =
                (!username.is_empty()).then(|| Auth { username, password, ..Auth::default() });
            let watcher = sender.clone();
            // A reader that went away does not end the pull.
            let progress = std::sync::Arc::new(move |progress: Progress| {
                let _ = watcher.send(Ok(message(progress)));
            });
            tokio::spawn(async move {
                let last = match images::pull(&node, &reference, auth, progress).await {
                    Ok(record) => Ok(PullProgress {
                        stage: pull_progress::Stage::Done.into(),
                        image_id: record.id,
                        ..Default::default()
                    }),
                    Err(error) => {
                        tracing::info!(reference, error = %error.chain(), "pull failed");
                        Err(Status::from(&error))
                    }
                };
                let _ = sender.send(last);
            });
            let messages: Messages<PullProgress> = UnboundedReceiverStream::new(receiver).boxed();
            Ok(messages)
        };
        answer("admin.PullImage", &subject, work).await
    }

    async fn load_image(&self, request: Request<LoadImageRequest>) -> Reply<LoadImageResponse> {
        let LoadImageRequest { path, reference } = request.into_inner();
        let subject = path.clone();
        let node = self.node.clone();
        let work = async {
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                let message = format!("path {} is not absolute", path.display());
                return Err(Error::new(Kind::Invalid, message));
            }
            let name = (!reference.is_empty()).then_some(reference);
            let records =
                blocking(move || node.images.load(&path, name.as_deref()).image_error()).await?;
            let names = |r: pinion_image::ImageRecord| match r.repo_tags.is_empty() {
                true => vec![r.id],
                false => r.repo_tags,
            };
            Ok(LoadImageResponse { references: records.into_iter().flat_map(names).collect() })
        };
        answer("LoadImage", &subject, work).await
    }
}
