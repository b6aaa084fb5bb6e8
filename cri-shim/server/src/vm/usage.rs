//! What containers in guests use, as their agents say; each pod is waited for a moment only.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pinion_cgroup::Usage;
use pinion_monitor_proto::message::{self, ContainerUsage};

use crate::monitor::Client;
use crate::registry::PodView;

/// A pod that takes longer has no numbers this time.
const LIMIT: Duration = Duration::from_secs(2);

/// Use by container id.
pub(crate) type Usages = HashMap<String, Usage>;

/// Asks the agents of those pods that have one, side by side.
pub(crate) async fn read(pods: impl Iterator<Item = &Arc<PodView>>) -> Usages {
    let asked =
        pods.filter(|pod| pod.sandbox.guest.is_some()).filter_map(|pod| pod.monitor.clone());
    let answers = futures::future::join_all(asked.map(ask)).await;
    answers.into_iter().flatten().map(|usage| (usage.id.clone(), of(&usage))).collect()
}

async fn ask(monitor: Client) -> Vec<ContainerUsage> {
    match tokio::time::timeout(LIMIT, monitor.usage(message::Usage::default())).await {
        Ok(Ok(reply)) => reply.containers,
        Ok(Err(error)) => {
            tracing::debug!(error = %error.chain(), "a guest did not say what it uses");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!(limit = ?LIMIT, "a guest does not say what it uses");
            Vec::new()
        }
    }
}

fn of(usage: &ContainerUsage) -> Usage {
    Usage {
        cpu_nanoseconds: usage.cpu_nanoseconds,
        memory_bytes: usage.memory_bytes,
        working_set_bytes: usage.working_set_bytes,
        memory_limit_bytes: usage.memory_limit_bytes,
        rss_bytes: usage.rss_bytes,
        page_faults: usage.page_faults,
        major_page_faults: usage.major_page_faults,
        pids: usage.pids,
        ..Usage::default()
    }
}
