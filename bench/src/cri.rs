//! The life of a pod through CRI servers.

use std::collections::HashMap;
use std::error::Error;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use pinion_cri_proto::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    ImageStatusRequest, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest,
    RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::memory;
use crate::probes;
use crate::report::{Collector, Report};

pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

/// What every pod of the comparison looks like.
#[derive(Debug, Clone)]
pub(crate) struct PodShape {
    pub(crate) image: String,
    /// Images to pull, by what they are called in the report.
    pub(crate) pulls: Vec<(String, String)>,
    pub(crate) handler: String,
    pub(crate) host_network: bool,
    pub(crate) cgroup_parent: String,
}

/// Compares servers given by name and socket; `daemons` are their processes, to be weighed.
pub(crate) fn compare(
    endpoints: &[(String, String)],
    daemons: &[(String, u32)],
    (rounds, pods): (usize, usize),
    shape: &PodShape,
) -> Outcome<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(compare_async(endpoints, daemons, (rounds, pods), shape))
}

async fn compare_async(
    endpoints: &[(String, String)],
    daemons: &[(String, u32)],
    (rounds, pods): (usize, usize),
    shape: &PodShape,
) -> Outcome<Report> {
    let network = if shape.host_network { "host network" } else { "pod network" };
    let names = endpoints.iter().map(|(name, _)| name.clone()).collect();
    let title = format!("CRI servers, one pod with one container, {network}, {rounds} rounds");
    let mut collector = Collector::new(title, names);
    let mut idle = HashMap::new();
    for (name, pid) in daemons {
        idle.insert(name, (memory::resident(*pid)?, memory::share(*pid)?));
    }
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
    // Pulls take turns too: what the page cache and the disk do meanwhile hits all alike.
    for (kind, image) in &shape.pulls {
        for turn in 0..PULLS * servers.len() {
            let peer = (turn + turn / servers.len()) % servers.len();
            let (name, socket) = &endpoints[peer];
            let pulled = pull_anew(&connect(socket).await?, image).await;
            let time = pulled.map_err(|error| format!("{name}: {image}: {error}"))?;
            collector.add(kind, "PullImage", "ms", peer, time);
        }
    }
    for turn in 0..PROBE_TURNS * servers.len() {
        let peer = turn % servers.len();
        let name = &endpoints[peer].0;
        let Some((_, pid)) = daemons.iter().find(|(daemon, _)| daemon == name) else { continue };
        let measured = probes::run(&mut servers[peer], shape, *pid, 5000 + turn).await;
        let (times, cpu) = measured.map_err(|error| format!("{name}: {error}"))?;
        for time in times {
            collector.add("probes", "ExecSync", "ms", peer, time);
        }
        collector.add("probes", "ExecSync CPU time", "ms", peer, cpu);
    }
    let burst_name = format!("{pods} pods, {IN_FLIGHT} at a time");
    for (peer, (name, _)) in endpoints.iter().enumerate() {
        let measured = async {
            for (measure, unit, value) in burst(&servers[peer], shape, pods).await? {
                collector.add(&burst_name, measure, unit, peer, value);
            }
            Ok::<_, Box<dyn Error>>(())
        };
        measured.await.map_err(|error| format!("{name}: {error}"))?;
    }
    for (peer, (name, _)) in endpoints.iter().enumerate() {
        if let Some((_, pid)) = daemons.iter().find(|(daemon, _)| daemon == name) {
            let value = memory::resident(*pid)?;
            collector.add("server", "resident after all", "KiB", peer, value);
            collector.add("server", "PSS after all", "KiB", peer, memory::share(*pid)?);
            let (resident, share) = idle[name];
            collector.add("server", "resident idle", "KiB", peer, resident);
            collector.add("server", "PSS idle", "KiB", peer, share);
        }
    }
    Ok(collector.report())
}

/// Of many pods, so many are being started at any time.
const IN_FLIGHT: usize = 10;
/// How often an image is pulled anew from each server.
const PULLS: usize = 3;
/// How often each server has a turn of probes.
const PROBE_TURNS: usize = 3;

/// Milliseconds of a pull of an image that is not there.
async fn pull_anew(channel: &Channel, image: &str) -> Outcome<f64> {
    let mut images = ImageServiceClient::new(channel.clone());
    let spec = Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() });
    images.remove_image(RemoveImageRequest { image: spec.clone() }).await?;
    let began = Instant::now();
    let request = PullImageRequest { image: spec, ..PullImageRequest::default() };
    images.pull_image(request).await?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// Starts and removes many pods; between the two, what keeps them is weighed.
async fn burst(
    client: &Client,
    shape: &PodShape,
    pods: usize,
) -> Outcome<Vec<(&'static str, &'static str, f64)>> {
    let before = memory::shares(KEEPERS)?;
    let began = Instant::now();
    let started_pods = in_parallel(0..pods, |number| {
        let (mut client, shape) = (client.clone(), shape.clone());
        async move { start_pod(&mut client, &shape, 1000 + number).await }
    })
    .await?;
    let started = began.elapsed().as_secs_f64() * 1000.0;
    let kept = (memory::shares(KEEPERS)? - before) / pods as f64;
    let began = Instant::now();
    in_parallel(started_pods, |pod| {
        let mut client = client.clone();
        async move { end_pod(&mut client, pod).await }
    })
    .await?;
    let ended = began.elapsed().as_secs_f64() * 1000.0;
    Ok(vec![
        ("start all", "ms", started),
        ("end all", "ms", ended),
        ("monitor or shim, PSS per pod", "KiB", kept),
    ])
}

/// The processes that stay with a pod.
const KEEPERS: &[&str] = &["pinion-monitor", "containerd-shim"];

/// Runs `act` for every item, [`IN_FLIGHT`] at a time.
async fn in_parallel<T, R, F>(
    items: impl IntoIterator<Item = T>,
    act: impl Fn(T) -> F,
) -> Outcome<Vec<R>>
where
    R: Send + 'static,
    F: Future<Output = Result<R, String>> + Send + 'static,
{
    let mut items = items.into_iter();
    let mut running = tokio::task::JoinSet::new();
    let mut results = Vec::new();
    for item in items.by_ref().take(IN_FLIGHT) {
        running.spawn(act(item));
    }
    while let Some(result) = running.join_next().await {
        results.push(result??);
        if let Some(item) = items.next() {
            running.spawn(act(item));
        }
    }
    Ok(results)
}

/// A pod with one container that sleeps.
pub(crate) async fn start_pod(
    client: &mut Client,
    shape: &PodShape,
    number: usize,
) -> Result<(String, String), String> {
    let failed = |what: &str, error: tonic::Status| format!("{what}: {error}");
    let config = sandbox_config(shape, number);
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: shape.handler.clone(),
    };
    let pod = client.run_pod_sandbox(request).await.map_err(|e| failed("RunPodSandbox", e))?;
    let pod = pod.into_inner().pod_sandbox_id;
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(sleeping(shape)),
        sandbox_config: Some(config.clone()),
    };
    let id = client.create_container(request).await.map_err(|e| failed("CreateContainer", e))?;
    let container_id = id.into_inner().container_id;
    let request = StartContainerRequest { container_id };
    client.start_container(request).await.map_err(|e| failed("StartContainer", e))?;
    Ok((pod, config.log_directory))
}

pub(crate) async fn end_pod(client: &mut Client, pod: (String, String)) -> Result<(), String> {
    let (pod_sandbox_id, logs) = pod;
    let stop = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
    client.stop_pod_sandbox(stop).await.map_err(|error| format!("StopPodSandbox: {error}"))?;
    let remove = RemovePodSandboxRequest { pod_sandbox_id };
    let removed = client.remove_pod_sandbox(remove).await;
    let _ = std::fs::remove_dir_all(logs);
    removed.map(drop).map_err(|error| format!("RemovePodSandbox: {error}"))
}

fn sleeping(shape: &PodShape) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: shape.image.clone(), ..ImageSpec::default() }),
        command: vec!["/bin/sleep".to_owned(), "1000".to_owned()],
        log_path: "main.log".to_owned(),
        ..ContainerConfig::default()
    }
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

pub(crate) type Client = RuntimeServiceClient<Channel>;

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
    let config = sleeping(shape);
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
