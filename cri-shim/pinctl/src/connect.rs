//! The connection to piniond.

use crate::error::Error;
use pinion_cri_proto::admin::admin_client::AdminClient;
use pinion_cri_proto::v1::image_service_client::ImageServiceClient;
use pinion_cri_proto::v1::runtime_service_client::RuntimeServiceClient;
use std::path::Path;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// The three services of one node, over one connection.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    pub(crate) admin: AdminClient<Channel>,
}

impl Node {
    /// Connects to a unix socket.
    pub(crate) async fn connect(socket: &Path, timeout: Duration) -> Result<Self, Error> {
        let failed = |source| Error::Connect { socket: socket.to_owned(), source };
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))
            .map_err(failed)?
            .connect_timeout(timeout);
        let channel = endpoint.connect().await.map_err(failed)?;
        let limit = 64 << 20; // a node of many images answers with more than tonic's 4 MiB
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            admin: AdminClient::new(channel).max_decoding_message_size(limit),
        })
    }
}
