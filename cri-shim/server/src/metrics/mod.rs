//! cAdvisor's metrics through CRI: one table of families drives descriptors and samples.
//!
//! Every family has the [`LABELS`] that cAdvisor has, then its own. A sample's labels are
//! built from the same table as its descriptor, so the two cannot disagree.

mod families;
mod process;
mod reading;

use std::sync::Arc;

use pinion_cri_proto::v1::{
    ContainerMetrics, Metric, MetricDescriptor, MetricType, PodSandboxMetrics, UInt64Value,
};

use crate::contract::infra;
use crate::error::Result;
use crate::ids;
use crate::netdev;
use crate::node::Node;
use crate::record::{Container, Phase};
use crate::registry::PodView;
use crate::services::blocking;

use families::{CONTAINER, INFRA, NETWORK};
use reading::Reading;

/// Labels of every metric.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

/// Values of a family's own labels, and the number.
type Samples = Vec<(Vec<String>, u64)>;

/// A metric family. `T` is what its samples are read from.
struct Family<T> {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// Labels of its own.
    labels: &'static [&'static str],
    /// Its samples in a reading.
    read: fn(&T) -> Samples,
}

impl<T> Family<T> {
    fn descriptor(&self) -> MetricDescriptor {
        let labels = LABELS.iter().chain(self.labels);
        MetricDescriptor {
            name: self.name.into(),
            help: self.help.into(),
            label_keys: labels.map(|label| (*label).to_string()).collect(),
        }
    }

    fn metrics(&self, from: &T, labels: &[String], timestamp: i64) -> Vec<Metric> {
        let metric = |(own, value): (Vec<String>, u64)| Metric {
            name: self.name.into(),
            timestamp,
            metric_type: self.kind.into(),
            label_values: labels.iter().cloned().chain(own).collect(),
            value: Some(UInt64Value { value }),
        };
        (self.read)(from).into_iter().map(metric).collect()
    }
}

/// What all metrics are called, mean and are labelled with.
pub(crate) fn descriptors() -> Vec<MetricDescriptor> {
    let containers = CONTAINER.iter().map(Family::descriptor);
    let pods = NETWORK.iter().map(Family::descriptor).chain(INFRA.iter().map(Family::descriptor));
    containers.chain(pods).collect()
}

/// The metrics of pods and their running containers.
pub(crate) async fn pods(
    node: &Arc<Node>,
    chosen: Vec<Arc<PodView>>,
) -> Result<Vec<PodSandboxMetrics>> {
    let node = node.clone();
    blocking(move || Ok(chosen.iter().map(|pod| of_pod(&node, pod)).collect())).await
}

fn of_pod(node: &Node, pod: &PodView) -> PodSandboxMetrics {
    let now = ids::now();
    let labels = labels(node, pod, None);
    let interfaces = netdev::of_pod(node, &pod.sandbox).unwrap_or_default();
    let network = NETWORK.iter().flat_map(|family| {
        interfaces.iter().flat_map(|interface| family.metrics(interface, &labels, now))
    });
    let cost = infra::of_pod(node, &pod.sandbox.id);
    let infra = INFRA.iter().flat_map(|family| family.metrics(&cost, &labels, now));
    let running = pod.containers.values().filter(|c| c.phase() == Phase::Running);
    PodSandboxMetrics {
        pod_sandbox_id: pod.sandbox.id.clone(),
        metrics: network.chain(infra).collect(),
        container_metrics: running.map(|c| of_container(node, pod, c)).collect(),
    }
}

fn of_container(node: &Node, pod: &PodView, container: &Container) -> ContainerMetrics {
    let now = ids::now();
    let labels = labels(node, pod, Some(container));
    let reading = Reading::take(node, container);
    ContainerMetrics {
        container_id: container.id.clone(),
        metrics: CONTAINER.iter().flat_map(|f| f.metrics(&reading, &labels, now)).collect(),
    }
}

/// Values of [`LABELS`].
fn labels(node: &Node, pod: &PodView, container: Option<&Container>) -> Vec<String> {
    let metadata = pod.sandbox.metadata();
    let group = match container {
        Some(c) => node.cgroups.container_paths(&c.cgroups_path, &c.id),
        None => node.cgroups.parent(&pod.sandbox.cgroup_parent),
    };
    let root = node.cgroups.hierarchies().v2_root();
    let path = group.ok().and_then(|paths| {
        let below = paths.unified?.strip_prefix(root?).ok()?.to_path_buf();
        Some(format!("/{}", below.display()))
    });
    let id = container.map_or(&pod.sandbox.id, |c| &c.id);
    let image = container.and_then(|c| c.config.image.clone()).unwrap_or_default();
    let image = if image.user_specified_image.is_empty() {
        image.image
    } else {
        image.user_specified_image
    };
    vec![
        path.unwrap_or_default(),
        id.clone(),
        image,
        container.map_or(String::new(), |c| c.name().to_string()),
        metadata.name,
        metadata.namespace,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_every_family_is_described() {
        let descriptors = descriptors();
        let names: HashSet<_> = descriptors.iter().map(|d| d.name.clone()).collect();
        assert_eq!(names.len(), descriptors.len());
        assert!(descriptors.iter().all(|d| !d.help.is_empty() && d.label_keys.len() >= 6));
    }

    #[test]
    fn a_sample_has_as_many_labels_as_its_descriptor() {
        let reading = Reading::example();
        let labels: Vec<String> = LABELS.iter().map(|_| String::new()).collect();
        for family in CONTAINER {
            let metrics = family.metrics(&reading, &labels, 1);
            assert!(!metrics.is_empty(), "{}", family.name);
            for metric in metrics {
                assert_eq!(metric.label_values.len(), family.descriptor().label_keys.len());
            }
        }
    }
}
