//! The life of a pod through CRI servers.

use std::collections::HashMap;
use std::error::Error;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use pinion_cri_proto::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    ImageStatusRequest, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::report::{Collector, Report};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What every pod of the comparison looks like.
#[derive(Debug)]
pub(crate) struct PodShape {
    pub(crate) image: String,
    pub(crate) handler: String,
    pub(crate) host_network: bool,
    pub(crate) cgroup_parent: String,
}

/// Compares servers given by name and socket.
pub(crate) fn compare(
    endpoints: &[(String, String)],
    rounds: usize,
    shape: &PodShape,
) -> Outcome<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(compare_async(endpoints, rounds, shape))
}

async fn compare_async(
    endpoints: &[(String, String)],
    rounds: usize,
    shape: &PodShape,
) -> Outcome<Report> {
    let network = if shape.host_network { "host network" } else { "pod network" };
    let names = endpoints.iter().map(|(name, _)| name.clone()).collect();
    let title = format!("CRI servers, one pod with one container, {network}, {rounds} rounds");
    let mut collector = Collector::new(title, names);
    let mut servers = Vec::new();
    for (name, socket) in endpoints {
        let channel = connect(socket).await?;
        ensure_image(&channel, &shape.image).await.map_err(|error| format!("{name}: {error}"))?;
        servers.push(RuntimeServiceClient::new(channel));
    }
    for round in 0..=rounds {
        for turn in 0..servers.len() {
            let peer = (round + turn) % servers.len();
            let times = one_pod(&mut servers[peer], shape, round)
                .await
                .map_err(|error| format!("{}: {error}", endpoints[peer].0))?;
            // The first round fills caches.
            for (measure, value) in times.into_iter().filter(|_| round > 0) {
                collector.add("pod", measure, "ms", peer, value);
            }
        }
    }
    Ok(collector.report())
}

async fn connect(socket: &str) -> Outcome<Channel> {
    let path = socket.strip_prefix("unix://").unwrap_or(socket).to_owned();
    let endpoint = Endpoint::from_static("http://localhost").timeout(Duration::from_secs(120));
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Ok(endpoint.connect_with_connector(connector).await?)
}

async fn ensure_image(channel: &Channel, image: &str) -> Outcome<()> {
    let mut images = ImageServiceClient::new(channel.clone());
    let spec = Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() });
    let request = ImageStatusRequest { image: spec.clone(), ..ImageStatusRequest::default() };
    if images.image_status(request).await?.into_inner().image.is_none() {
        let request = PullImageRequest { image: spec, ..PullImageRequest::default() };
        images.pull_image(request).await?;
    }
    Ok(())
}

fn sandbox_config(shape: &PodShape, round: usize) -> PodSandboxConfig {
    let name = format!("bench-{}-{round}", std::process::id());
    let mode = if shape.host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            uid: name.clone(),
            name: name.clone(),
            namespace: "bench".to_owned(),
            attempt: 0,
        }),
        hostname: if shape.host_network { String::new() } else { name.clone() },
        log_directory: std::env::temp_dir().join(&name).to_string_lossy().into_owned(),
        labels: HashMap::from([("bench".to_owned(), "true".to_owned())]),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: shape.cgroup_parent.clone(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: mode as i32,
                    ..NamespaceOption::default()
                }),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// Milliseconds since the last call, by name.
struct Laps {
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Laps {
    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, (now - self.last).as_secs_f64() * 1000.0));
        self.last = now;
    }

    /// The sum of some laps, as one more measure.
    fn sum(&self, name: &'static str, of: &[&str]) -> (&'static str, f64) {
        let laps = self.laps.iter().filter(|(lap, _)| of.contains(lap));
        (name, laps.map(|(_, value)| value).sum())
    }
}

type Client = RuntimeServiceClient<Channel>;

/// Runs one pod from its sandbox to its removal. A pod that fails half-way is removed.
async fn one_pod(
    client: &mut Client,
    shape: &PodShape,
    round: usize,
) -> Outcome<Vec<(&'static str, f64)>> {
    let config = sandbox_config(shape, round);
    let mut laps = Laps { last: Instant::now(), laps: Vec::new() };
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: shape.handler.clone(),
    };
    let pod = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    laps.lap("RunPodSandbox");
    let outcome = one_container(client, shape, &pod, &config, &mut laps).await;
    client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    laps.lap("StopPodSandbox");
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    laps.lap("RemovePodSandbox");
    let _ = std::fs::remove_dir_all(&config.log_directory);
    outcome?;
    let start = laps.sum("pod start", &["RunPodSandbox", "CreateContainer", "StartContainer"]);
    let stop = laps.sum(
        "pod end",
        &["StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"],
    );
    Ok([vec![start, stop], laps.laps].concat())
}

async fn one_container(
    client: &mut Client,
    shape: &PodShape,
    pod: &str,
    sandbox: &PodSandboxConfig,
    laps: &mut Laps,
) -> Outcome<()> {
    let config = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: shape.image.clone(), ..ImageSpec::default() }),
        command: vec!["/bin/sleep".to_owned(), "1000".to_owned()],
        log_path: "main.log".to_owned(),
        ..ContainerConfig::default()
    };
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(sandbox.clone()),
    };
    laps.last = Instant::now();
    let id = client.create_container(request).await?.into_inner().container_id;
    laps.lap("CreateContainer");
    client.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    laps.lap("StartContainer");
    let request = ExecSyncRequest {
        container_id: id.clone(),
        cmd: vec!["/bin/true".to_owned()],
        timeout: 10,
    };
    let exec = client.exec_sync(request).await?.into_inner();
    laps.lap("ExecSync");
    if exec.exit_code != 0 {
        return Err(format!("ExecSync of true ended with {}", exec.exit_code).into());
    }
    let request = StopContainerRequest { container_id: id.clone(), timeout: 0 };
    client.stop_container(request).await?;
    laps.lap("StopContainer");
    client.remove_container(RemoveContainerRequest { container_id: id }).await?;
    laps.lap("RemoveContainer");
    Ok(())
}
