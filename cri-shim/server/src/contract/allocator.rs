//! What whoever allocated a container's CPUs has on record: CRI does not say whether a CPU
//! list is the container's own or everybody's.
//!
//! Asked in this order, and the first that knows the container counts: kubelet's PodResources
//! API, its `cpu_manager_state`, the variables a DRA driver for CPUs leaves in the
//! environment. None of them has to be there, and none can fail a creation: one that does not
//! answer in time or cannot be read is passed over, with a line in the log if it was there.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use pinion_cri_proto::podresources::pod_resources_lister_client::PodResourcesListerClient;
use pinion_cri_proto::podresources::{ListPodResourcesRequest, ListPodResourcesResponse};
use pinion_cri_proto::v1::ContainerConfig;
use pinion_placement::Source;
use pinion_topology::CpuSet;
use serde::Deserialize;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use crate::config::Isolation;
use crate::record::Sandbox;
use crate::services::MAX_MESSAGE;

/// Kubelet waits for the creation in which it is asked, so it must not be waited for long.
const DEADLINE: Duration = Duration::from_millis(200);
const DRA_PREFIX: &str = "DRA_CPUSET_";

/// The record of a container, and where it was found. An empty set: it has no own CPUs.
pub(super) async fn record(
    config: &Isolation,
    sandbox: &Sandbox,
    container: &ContainerConfig,
) -> Option<(Source, CpuSet)> {
    let metadata = sandbox.metadata();
    let name = container.metadata.as_ref().map_or("", |m| m.name.as_str());
    if let Some(answer) = ask(&config.kubelet_dir.join("pod-resources/kubelet.sock")).await {
        let own = in_answer(&answer, &metadata.namespace, &metadata.name, name);
        // Without CPUs in the answer the state says whether there is a CPU manager at all.
        if let Some(cpus) = own.filter(|cpus| !cpus.is_empty()) {
            return Some((Source::Answer, cpus));
        }
    }
    let state = config.kubelet_dir.join("cpu_manager_state");
    let recorded = read(&state).and_then(|text| in_state(&text, &metadata.uid, name, &state));
    match (recorded, in_environment(container)) {
        (Some(cpus), _) if !cpus.is_empty() => Some((Source::StateFile, cpus)),
        (_, Some(cpus)) => Some((Source::Environment, cpus)),
        (recorded, None) => recorded.map(|none| (Source::StateFile, none)),
    }
}

async fn ask(socket: &Path) -> Option<ListPodResourcesResponse> {
    if !socket.exists() {
        return None;
    }
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let call = async {
        let endpoint = Endpoint::from_static("http://kubelet");
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let mut client =
            PodResourcesListerClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        client.list(ListPodResourcesRequest {}).await
    };
    let why = match tokio::time::timeout(DEADLINE, call).await {
        Ok(Ok(answer)) => return Some(answer.into_inner()),
        Ok(Err(status)) => status.to_string(),
        Err(_) => format!("no answer within {DEADLINE:?}"),
    };
    tracing::warn!(socket = %socket.display(), why, "kubelet's PodResources API is passed over");
    None
}

/// The container's own CPUs in kubelet's answer; `None` if it does not know the container.
fn in_answer(
    answer: &ListPodResourcesResponse,
    namespace: &str,
    pod: &str,
    container: &str,
) -> Option<CpuSet> {
    let pods = answer.pod_resources.iter();
    let mut pods = pods.filter(|p| p.namespace == namespace && p.name == pod);
    let found = pods.find_map(|p| p.containers.iter().find(|c| c.name == container))?;
    let mut cpus = CpuSet::new();
    for id in &found.cpu_ids {
        cpus.insert(u32::try_from(*id).ok()?).ok()?;
    }
    Some(cpus)
}

fn read(path: &Path) -> Option<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "passed over");
            None
        }
    }
}

/// Kubelet's checkpoint of its CPU manager; what else it holds is none of our business.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CpuManagerState {
    #[serde(default)]
    policy_name: String,
    /// CPU lists by container, by pod uid.
    #[serde(default)]
    entries: BTreeMap<String, BTreeMap<String, String>>,
}

fn in_state(text: &str, uid: &str, container: &str, path: &Path) -> Option<CpuSet> {
    let state: CpuManagerState = serde_json::from_str(text)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "passed over"))
        .ok()?;
    if state.policy_name != "static" {
        return None;
    }
    // The static policy lists every container with CPUs of its own; the others share the rest.
    let list = state.entries.get(uid).and_then(|pod| pod.get(container));
    list.map_or(Some(CpuSet::new()), |list| list.parse().ok())
}

/// The union of `DRA_CPUSET_<claim>=<list>`.
fn in_environment(container: &ContainerConfig) -> Option<CpuSet> {
    let lists = container.envs.iter().filter(|env| env.key.starts_with(DRA_PREFIX));
    let sets: Vec<CpuSet> =
        lists.filter_map(|env| std::str::from_utf8(&env.value).ok()?.parse().ok()).collect();
    let union = sets.iter().fold(CpuSet::new(), |all, set| all.union(set));
    (!union.is_empty()).then_some(union)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Wire;
    use pinion_cri_proto::podresources::pod_resources_lister_server::{
        PodResourcesLister, PodResourcesListerServer,
    };
    use pinion_cri_proto::podresources::{ContainerResources, PodResources};
    use pinion_cri_proto::v1::{self, KeyValue};

    const STATE: &str = r#"{"policyName":"static","defaultCpuSet":"0-1,4-7",
        "entries":{"uid-1":{"app":"2-3"}},"checksum":1}"#;

    fn state(text: &str, uid: &str, container: &str) -> Option<String> {
        let found = in_state(text, uid, container, Path::new("cpu_manager_state"));
        found.map(|cpus| cpus.to_string())
    }

    #[test]
    fn the_state_file_names_own_cpus_and_who_has_none() {
        assert_eq!(state(STATE, "uid-1", "app").as_deref(), Some("2-3"));
        assert_eq!(state(STATE, "uid-1", "sidecar").as_deref(), Some(""));
        assert_eq!(state(r#"{"policyName":"none"}"#, "uid-1", "app"), None);
        for bad in ["", "{", "[]", r#"{"policyName":7}"#] {
            assert_eq!(state(bad, "uid-1", "app"), None, "{bad}");
        }
    }

    #[test]
    fn the_answer_is_searched_for_the_very_container() {
        let container = |name: &str, cpus: &[i64]| ContainerResources {
            name: name.into(),
            cpu_ids: cpus.to_vec(),
        };
        let answer = ListPodResourcesResponse {
            pod_resources: vec![PodResources {
                name: "p".into(),
                namespace: "n".into(),
                containers: vec![container("app", &[2, 3]), container("sidecar", &[])],
            }],
        };
        let find = |pod, name| in_answer(&answer, "n", pod, name).map(|cpus| cpus.to_string());
        assert_eq!(find("p", "app").as_deref(), Some("2-3"));
        assert_eq!(find("p", "sidecar").as_deref(), Some(""));
        assert_eq!(find("q", "app"), None);
    }

    #[test]
    fn variables_of_several_claims_add_up() {
        let env = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
        let envs = vec![env("DRA_CPUSET_a", "2-3"), env("DRA_CPUSET_b", "6"), env("X", "7")];
        let config = ContainerConfig { envs, ..Default::default() };
        assert_eq!(in_environment(&config).unwrap().to_string(), "2-3,6");
        assert_eq!(in_environment(&ContainerConfig::default()), None);
    }

    #[derive(Debug)]
    struct Kubelet;

    #[tonic::async_trait]
    impl PodResourcesLister for Kubelet {
        async fn list(
            &self,
            _: tonic::Request<ListPodResourcesRequest>,
        ) -> Result<tonic::Response<ListPodResourcesResponse>, tonic::Status> {
            let app = ContainerResources { name: "app".into(), cpu_ids: vec![4, 5] };
            let pod =
                PodResources { name: "p".into(), namespace: "n".into(), containers: vec![app] };
            Ok(tonic::Response::new(ListPodResourcesResponse { pod_resources: vec![pod] }))
        }
    }

    #[tokio::test]
    async fn kubelet_s_answer_counts_before_its_state_file() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pod-resources/kubelet.sock");
        std::fs::create_dir(socket.parent().unwrap()).unwrap();
        let state = r#"{"policyName":"static","entries":{"u":{"app":"2-3","other":"6-7"}}}"#;
        std::fs::write(dir.path().join("cpu_manager_state"), state).unwrap();
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
        let service = PodResourcesListerServer::new(Kubelet);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(incoming));
        let config = Isolation { kubelet_dir: dir.path().to_owned(), ..Isolation::default() };
        let metadata = v1::PodSandboxMetadata {
            name: "p".into(),
            namespace: "n".into(),
            uid: "u".into(),
            attempt: 0,
        };
        let pod = v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
        let sandbox = Sandbox { config: Wire(pod), ..Default::default() };
        for (name, source, cpus) in [
            ("app", Source::Answer, "4-5"),
            ("other", Source::StateFile, "6-7"),
            ("sidecar", Source::StateFile, ""),
        ] {
            let metadata = Some(v1::ContainerMetadata { name: name.into(), attempt: 0 });
            let container = ContainerConfig { metadata, ..Default::default() };
            let found = record(&config, &sandbox, &container).await.unwrap();
            assert_eq!((found.0, found.1.to_string().as_str()), (source, cpus));
        }
    }

    #[tokio::test]
    async fn a_silent_kubelet_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("kubelet.sock");
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let began = std::time::Instant::now();
        assert!(ask(&socket).await.is_none());
        assert!(began.elapsed() < DEADLINE * 10);
        assert!(ask(&dir.path().join("absent.sock")).await.is_none());
    }
}
