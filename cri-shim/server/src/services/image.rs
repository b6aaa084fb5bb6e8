//! `ImageService`: decode, hand over, answer.

use std::collections::HashMap;

use pinion_cri_proto::v1::image_service_server::ImageService;
use pinion_cri_proto::v1::*;
use pinion_image::{Auth, ImageRecord, Usage};
use tonic::{Request, Response, Status};

use super::streams::{Messages, chunked};
use super::{Shared, answer, blocking};
use crate::error::{Error, Result};
use crate::ids;
use crate::images::{self, Foreign as _};

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct ImageApi {
    node: Shared,
}

type Reply<T> = Result<Response<T>, Status>;

impl ImageApi {
    pub(crate) fn new(node: Shared) -> Self {
        Self { node }
    }

    async fn list(&self, filter: Option<ImageFilter>) -> Result<Vec<Image>> {
        let wanted = filter.and_then(|f| f.image).map(|i| i.image).unwrap_or_default();
        let node = self.node.clone();
        blocking(move || {
            let records = if wanted.is_empty() {
                node.images.list()
            } else {
                node.images.resolve(&wanted).into_iter().collect()
            };
            Ok(records.into_iter().map(to_cri).collect())
        })
        .await
    }
}

/// The name in an image specification.
fn named(spec: Option<ImageSpec>) -> Result<String> {
    match spec.map(|s| s.image) {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(Error::invalid("the request names no image")),
    }
}

/// An image as CRI describes it.
pub(crate) fn to_cri(record: ImageRecord) -> Image {
    Image {
        id: record.id,
        repo_tags: record.repo_tags,
        repo_digests: record.repo_digests,
        size: record.size,
        uid: record.user.uid.map(|value| Int64Value { value }),
        username: record.user.username,
        spec: None,
        pinned: record.pinned,
    }
}

fn credentials(auth: AuthConfig) -> Auth {
    Auth {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    }
}

#[tonic::async_trait]
impl ImageService for ImageApi {
    async fn list_images(&self, request: Request<ListImagesRequest>) -> Reply<ListImagesResponse> {
        let filter = request.into_inner().filter;
        let work = async { Ok(ListImagesResponse { images: self.list(filter).await? }) };
        answer("ListImages", "", work).await
    }

    type StreamImagesStream = Messages<StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Reply<Self::StreamImagesStream> {
        let filter = request.into_inner().filter;
        let work = async {
            Ok(chunked(self.list(filter).await?, |images| StreamImagesResponse { images }))
        };
        answer("StreamImages", "", work).await
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Reply<ImageStatusResponse> {
        let ImageStatusRequest { image, verbose } = request.into_inner();
        let subject = image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
        let node = self.node.clone();
        let work = async {
            let name = named(image)?;
            blocking(move || {
                let Some(record) = node.images.resolve(&name) else {
                    return Ok(ImageStatusResponse::default());
                };
                let info =
                    if verbose { images::info(&node.images, &record) } else { HashMap::new() };
                Ok(ImageStatusResponse { image: Some(to_cri(record)), info })
            })
            .await
        };
        answer("ImageStatus", &subject, work).await
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Reply<PullImageResponse> {
        let PullImageRequest { image, auth, .. } = request.into_inner();
        let subject = image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
        let work = async {
            let auth = auth.map(credentials);
            let record = images::pull(&self.node, &named(image)?, auth, images::silent()).await?;
            Ok(PullImageResponse { image_ref: record.id })
        };
        answer("PullImage", &subject, work).await
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Reply<RemoveImageResponse> {
        let image = request.into_inner().image;
        let subject = image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
        let node = self.node.clone();
        let work = async {
            let name = named(image)?;
            blocking(move || images::remove(&node.images, &name)).await?;
            Ok(RemoveImageResponse {})
        };
        answer("RemoveImage", &subject, work).await
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Reply<ImageFsInfoResponse> {
        let node = self.node.clone();
        let work = blocking(move || {
            let info = node.images.fs_info().image_error()?;
            let usage = |usage: Usage| FilesystemUsage {
                timestamp: ids::now(),
                fs_id: Some(FilesystemIdentifier {
                    mountpoint: info.path.to_string_lossy().into_owned(),
                }),
                used_bytes: Some(UInt64Value { value: usage.bytes }),
                inodes_used: Some(UInt64Value { value: usage.inodes }),
            };
            Ok(ImageFsInfoResponse {
                image_filesystems: vec![usage(info.images)],
                container_filesystems: vec![usage(info.containers)],
            })
        });
        answer("ImageFsInfo", "", work).await
    }
}
