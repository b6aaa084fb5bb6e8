//! The stream of container events, for kubelet's evented PLEG.
//!
//! A slow reader is disconnected with an error instead of holding anyone up: kubelet falls
//! back to listing and connects again.

use pinion_cri_proto::v1::ContainerEventResponse;
use tokio::sync::broadcast;

/// Events kept for a reader that lags.
const BACKLOG: usize = 1024;

/// Sender of events; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    sender: broadcast::Sender<ContainerEventResponse>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(BACKLOG).0 }
    }
}

impl Events {
    /// Whether anyone listens; building an event costs a pod status.
    pub(crate) fn wanted(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Sends to everyone who listens now.
    pub(crate) fn send(&self, event: ContainerEventResponse) {
        // An error means that nobody listens.
        let _ = self.sender.send(event);
    }

    /// Listens from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}
