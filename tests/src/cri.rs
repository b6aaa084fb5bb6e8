//! A CRI client for tests: kubelet's calls as plain functions, each with its time.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use pinion_cri_proto::admin::{ReceiptsRequest, admin_client::AdminClient};
use pinion_cri_proto::v1::runtime_service_client::RuntimeServiceClient;
use pinion_cri_proto::v1::{self, image_service_client::ImageServiceClient};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use crate::error::{During, Error, Result};

/// The longest any call may take; a server that hangs is a failure, not a wait.
const LONGEST: Duration = Duration::from_secs(300);

/// A pod as a test wants it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pod {
    /// Its name; the uid is derived from it.
    pub(crate) name: String,
    /// RuntimeClass handler; empty for the default.
    pub(crate) handler: String,
    /// Annotations.
    pub(crate) annotations: Vec<(&'static str, &'static str)>,
    /// Where logs go; empty for nowhere.
    pub(crate) log_dir: PathBuf,
    /// Parent cgroup; empty for the server's own choice.
    pub(crate) cgroup_parent: String,
    /// In the host's network namespace.
    pub(crate) host_network: bool,
}

/// A container as a test wants it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Container {
    /// Its name.
    pub(crate) name: String,
    /// Image reference.
    pub(crate) image: String,
    /// The command; empty for the image's.
    pub(crate) command: Vec<String>,
    /// Bind mounts: host path, container path.
    pub(crate) mounts: Vec<(PathBuf, String)>,
    /// Mounts with more to say than that.
    pub(crate) volumes: Vec<v1::Mount>,
    /// Limits and placement.
    pub(crate) resources: Option<v1::LinuxContainerResources>,
    /// Capabilities to add.
    pub(crate) capabilities: Vec<String>,
    /// Device nodes: path (the same inside), permissions.
    pub(crate) devices: Vec<(String, String)>,
    /// CDI devices by qualified name.
    pub(crate) cdi: Vec<String>,
}

/// What a command in a container did.
#[derive(Debug)]
pub(crate) struct Executed {
    /// Its exit code.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) stdout: String,
}

/// Connections to one server.
#[derive(Debug)]
pub(crate) struct Cri {
    executor: Runtime,
    channel: Channel,
    /// Prints every call with its time.
    pub(crate) trace: bool,
}

impl Pod {
    /// A pod with a name and nothing special.
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// What kubelet would send.
    pub(crate) fn config(&self) -> v1::PodSandboxConfig {
        let network =
            if self.host_network { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod };
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: self.name.clone(),
                uid: format!("uid-{}", self.name),
                namespace: "pinion-test".into(),
                attempt: 0,
            }),
            hostname: self.name.clone(),
            log_directory: self.log_dir.display().to_string(),
            annotations: self
                .annotations
                .iter()
                .map(|(key, value)| ((*key).into(), (*value).into()))
                .collect(),
            labels: HashMap::from([("app".into(), self.name.clone())]),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        network: network.into(),
                        pid: v1::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

impl Container {
    /// A container that runs a command of an image.
    pub(crate) fn new(name: &str, image: &str, command: &[&str]) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            command: command.iter().map(|word| (*word).into()).collect(),
            ..Self::default()
        }
    }

    /// Where its log is, below the pod's log directory.
    pub(crate) fn log(&self) -> String {
        format!("{}.log", self.name)
    }

    fn config(&self) -> v1::ContainerConfig {
        let mount = |(host, inside): &(PathBuf, String)| v1::Mount {
            host_path: host.display().to_string(),
            container_path: inside.clone(),
            ..Default::default()
        };
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: self.name.clone(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: self.command.clone(),
            mounts: self.mounts.iter().map(mount).chain(self.volumes.iter().cloned()).collect(),
            log_path: self.log(),
            devices: self
                .devices
                .iter()
                .map(|(path, permissions)| v1::Device {
                    container_path: path.clone(),
                    host_path: path.clone(),
                    permissions: permissions.clone(),
                })
                .collect(),
            cdi_devices: self.cdi.iter().map(|name| v1::CdiDevice { name: name.clone() }).collect(),
            linux: Some(v1::LinuxContainerConfig {
                resources: self.resources.clone(),
                security_context: Some(v1::LinuxContainerSecurityContext {
                    capabilities: Some(v1::Capability {
                        add_capabilities: self.capabilities.clone(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }
}

impl Cri {
    /// Connects to a server's socket.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let executor = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .during(|| "start an async runtime".into())?;
        let path = socket.to_path_buf();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = executor
            .block_on(Endpoint::from_static("http://localhost").connect_with_connector(connector))
            .map_err(|error| Error::check(format!("connect to {}: {error:?}", socket.display())))?;
        Ok(Self { executor, channel, trace: false })
    }

    fn call<T>(
        &self,
        what: &str,
        request: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        let started = Instant::now();
        let answer = self.executor.block_on(async {
            match tokio::time::timeout(LONGEST, request).await {
                Ok(answer) => answer,
                Err(_) => Err(Status::deadline_exceeded("the server does not answer")),
            }
        });
        if self.trace {
            let verdict = answer
                .as_ref()
                .map_or_else(|status| format!("{:?}", status.code()), |_| "ok".into());
            println!("  {:>8.1} ms  {what}  {verdict}", started.elapsed().as_secs_f64() * 1e3);
        }
        answer.map(Response::into_inner).map_err(|status| Error::Rpc {
            call: what.into(),
            code: status.code(),
            message: status.message().into(),
        })
    }

    fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// The server's name and version.
    pub(crate) fn version(&self) -> Result<String> {
        let mut client = self.runtime();
        let request = v1::VersionRequest { version: "v1".into() };
        let answer = self.call("Version", client.version(request))?;
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// Pulls an image; its id.
    pub(crate) fn pull(&self, reference: &str) -> Result<String> {
        let mut client = self.images();
        let image = Some(v1::ImageSpec { image: reference.into(), ..Default::default() });
        let request = v1::PullImageRequest { image, ..Default::default() };
        let answer = self.call(&format!("PullImage {reference}"), client.pull_image(request))?;
        Ok(answer.image_ref)
    }

    /// The names of all images.
    pub(crate) fn image_names(&self) -> Result<Vec<String>> {
        let mut client = self.images();
        let request = v1::ListImagesRequest::default();
        let images = self.call("ListImages", client.list_images(request))?.images;
        Ok(images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    /// Makes a pod; its id.
    pub(crate) fn run_pod(&self, pod: &Pod) -> Result<String> {
        let mut client = self.runtime();
        let request = v1::RunPodSandboxRequest {
            config: Some(pod.config()),
            runtime_handler: pod.handler.clone(),
        };
        let what = format!("RunPodSandbox {}", pod.name);
        Ok(self.call(&what, client.run_pod_sandbox(request))?.pod_sandbox_id)
    }

    /// Makes a container in a pod; its id.
    pub(crate) fn create(&self, pod_id: &str, pod: &Pod, container: &Container) -> Result<String> {
        let mut client = self.runtime();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod_id.into(),
            config: Some(container.config()),
            sandbox_config: Some(pod.config()),
        };
        let what = format!("CreateContainer {}/{}", pod.name, container.name);
        Ok(self.call(&what, client.create_container(request))?.container_id)
    }

    /// Starts a container.
    pub(crate) fn start(&self, id: &str) -> Result<()> {
        let mut client = self.runtime();
        let request = v1::StartContainerRequest { container_id: id.into() };
        self.call(&format!("StartContainer {}", short(id)), client.start_container(request))?;
        Ok(())
    }

    /// Makes and starts a container; its id.
    pub(crate) fn launch(&self, pod_id: &str, pod: &Pod, container: &Container) -> Result<String> {
        let id = self.create(pod_id, pod, container)?;
        self.start(&id)?;
        Ok(id)
    }

    /// Changes a container's limits, as an in-place resize does.
    pub(crate) fn update(&self, id: &str, resources: v1::LinuxContainerResources) -> Result<()> {
        let mut client = self.runtime();
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: Some(resources),
            ..Default::default()
        };
        let what = format!("UpdateContainerResources {}", short(id));
        self.call(&what, client.update_container_resources(request))?;
        Ok(())
    }

    /// Runs a command in a container.
    pub(crate) fn exec(&self, id: &str, command: &[&str]) -> Result<Executed> {
        let mut client = self.runtime();
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|word| (*word).into()).collect(),
            timeout: 60,
        };
        let what = format!("ExecSync {} {}", short(id), command.join(" "));
        let answer = self.call(&what, client.exec_sync(request))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Executed { code: answer.exit_code, stdout: text(answer.stdout) })
    }

    /// A container's status.
    pub(crate) fn status(&self, id: &str) -> Result<v1::ContainerStatus> {
        let mut client = self.runtime();
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: false };
        let answer =
            self.call(&format!("ContainerStatus {}", short(id)), client.container_status(request))?;
        answer.status.ok_or_else(|| Error::check("ContainerStatus without a status"))
    }

    /// Waits until a container has ended; its status.
    pub(crate) fn wait_exited(&self, id: &str, patience: Duration) -> Result<v1::ContainerStatus> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.status(id)?;
            if status.state() == v1::ContainerState::ContainerExited {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(Error::check(format!("{} is {:?}", short(id), status.state())));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the server says of itself.
    pub(crate) fn info(&self) -> Result<serde_json::Value> {
        let mut client = self.runtime();
        let request = v1::StatusRequest { verbose: true };
        let answer = self.call("Status", client.status(request))?;
        let text = answer.info.get("info").cloned().unwrap_or_default();
        serde_json::from_str(&text).during(|| "decode the server's info".into())
    }

    /// Bytes of memory a container uses, by the server's statistics.
    pub(crate) fn memory_used(&self, id: &str) -> Result<u64> {
        let mut client = self.runtime();
        let request = v1::ContainerStatsRequest { container_id: id.into() };
        let answer =
            self.call(&format!("ContainerStats {}", short(id)), client.container_stats(request))?;
        let memory = answer.stats.and_then(|stats| stats.memory);
        Ok(memory.and_then(|memory| memory.usage_bytes).map_or(0, |bytes| bytes.value))
    }

    /// What the server adds to a pod's status, as JSON.
    pub(crate) fn pod_info(&self, id: &str) -> Result<serde_json::Value> {
        let mut client = self.runtime();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        let answer = self
            .call(&format!("PodSandboxStatus {}", short(id)), client.pod_sandbox_status(request))?;
        let text = answer.info.get("info").map(String::as_str).unwrap_or_default();
        serde_json::from_str(text).during(|| "decode a pod's info".into())
    }

    /// All pods.
    pub(crate) fn pods(&self) -> Result<Vec<v1::PodSandbox>> {
        let mut client = self.runtime();
        let request = v1::ListPodSandboxRequest::default();
        Ok(self.call("ListPodSandbox", client.list_pod_sandbox(request))?.items)
    }

    /// All containers.
    pub(crate) fn containers(&self) -> Result<Vec<v1::Container>> {
        let mut client = self.runtime();
        let request = v1::ListContainersRequest::default();
        Ok(self.call("ListContainers", client.list_containers(request))?.containers)
    }

    /// Removes an image; one that is not there is fine.
    pub(crate) fn remove_image(&self, reference: &str) -> Result<()> {
        let mut client = self.images();
        let image = Some(v1::ImageSpec { image: reference.into(), ..Default::default() });
        let request = v1::RemoveImageRequest { image };
        self.call(&format!("RemoveImage {reference}"), client.remove_image(request))?;
        Ok(())
    }

    /// Removes a container.
    pub(crate) fn remove_container(&self, id: &str) -> Result<()> {
        let mut client = self.runtime();
        let request = v1::RemoveContainerRequest { container_id: id.into() };
        self.call(&format!("RemoveContainer {}", short(id)), client.remove_container(request))?;
        Ok(())
    }

    /// Stops a pod.
    pub(crate) fn stop_pod(&self, id: &str) -> Result<()> {
        let mut client = self.runtime();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.into() };
        self.call(&format!("StopPodSandbox {}", short(id)), client.stop_pod_sandbox(request))?;
        Ok(())
    }

    /// Stops and removes a pod with everything in it.
    pub(crate) fn remove_pod(&self, id: &str) -> Result<()> {
        self.stop_pod(id)?;
        let mut client = self.runtime();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.into() };
        self.call(&format!("RemovePodSandbox {}", short(id)), client.remove_pod_sandbox(request))?;
        Ok(())
    }

    /// Removes every pod.
    pub(crate) fn remove_all(&self) -> Result<()> {
        for pod in self.pods()? {
            self.remove_pod(&pod.id)?;
        }
        Ok(())
    }

    /// The receipt of a container, as JSON.
    pub(crate) fn receipt(&self, id: &str) -> Result<serde_json::Value> {
        let mut client = AdminClient::new(self.channel.clone());
        let request = ReceiptsRequest { id: id.into() };
        let receipts = self.call(&format!("Receipts {}", short(id)), client.receipts(request))?;
        let receipt = receipts
            .receipts
            .into_iter()
            .find(|receipt| receipt.container_id == id)
            .ok_or_else(|| Error::check(format!("{} has no receipt", short(id))))?;
        serde_json::from_str(&receipt.json).during(|| "decode a receipt".into())
    }
}

/// The start of an id, for people.
pub(crate) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
