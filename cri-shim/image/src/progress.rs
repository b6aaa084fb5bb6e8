//! What a pull or load tells the person waiting for it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::Digest;

/// One report. Reports about different layers interleave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The layer concerned; `None` for the image as a whole.
    pub layer: Option<Digest>,
    /// What is happening to it.
    pub stage: Stage,
    /// Bytes of the compressed layer (or of all layers) dealt with so far.
    pub done_bytes: u64,
    /// Bytes in all; 0 while unknown.
    pub total_bytes: u64,
}

/// Stage of a layer or an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The manifest is being looked up.
    Resolving,
    /// Bytes are arriving (and are being unpacked as they do).
    Downloading,
    /// Bytes already on disk are being unpacked.
    Unpacking,
    /// Complete.
    Done,
    /// Nothing to do: the layer (or image) was there already.
    AlreadyPresent,
}

/// Receives reports; called from several threads, must not block.
pub type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;

/// Everyone waiting for one pull: callers that join later hear the rest.
#[derive(Clone)]
pub(crate) struct Audience {
    listeners: Arc<Mutex<Vec<ProgressFn>>>,
}

impl Audience {
    /// The caller who started it.
    pub(crate) fn of(listener: ProgressFn) -> Self {
        Self { listeners: Arc::new(Mutex::new(vec![listener])) }
    }

    pub(crate) fn join(&self, listener: ProgressFn) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }

    pub(crate) fn image(&self, stage: Stage, done_bytes: u64, total_bytes: u64) {
        self.tell(&Progress { layer: None, stage, done_bytes, total_bytes });
    }

    pub(crate) fn layer(&self, layer: &Digest, stage: Stage, done_bytes: u64, total_bytes: u64) {
        self.tell(&Progress { layer: Some(layer.clone()), stage, done_bytes, total_bytes });
    }

    fn tell(&self, progress: &Progress) {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for listener in listeners {
            listener(progress.clone());
        }
    }
}
