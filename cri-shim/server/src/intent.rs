//! Intents: committed before the first step of an operation, gone with its result.
//!
//! The one step of an intent is the record as it will be, with everything it *may* come to
//! hold. Giving back is idempotent, so after a crash the whole list is given back, whichever
//! part of it was taken.

use serde_json::Value;

use crate::error::{Context, Result};

/// Kind of intent of RunPodSandbox; the step is a [`crate::record::Sandbox`].
pub(crate) const RUN_POD: &str = "run-pod";
/// Kind of intent of CreateContainer; the step is a [`crate::record::Container`].
pub(crate) const CREATE_CONTAINER: &str = "create-container";

/// A record as the step of an intent.
pub(crate) fn step(record: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(record).context(|| "encode a record".to_string())
}
