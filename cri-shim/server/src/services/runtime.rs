//! `RuntimeService`: decode, hand over, answer.

use std::time::Duration;

use pinion_cri_proto::v1::runtime_service_server::RuntimeService;
use pinion_cri_proto::v1::{self, *};
use tonic::{Request, Response, Status};

use super::streams::{self, Messages, chunked};
use super::{Shared, answer};
use crate::error::{Error, Result};
use crate::pod::{self, Command};
use crate::{checkpoint, exec, info, metrics, stats, status, streaming};

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeApi {
    node: Shared,
    streams: pinion_streaming::Server,
}

type Reply<T> = Result<Response<T>, Status>;

impl RuntimeApi {
    pub(crate) fn new(node: Shared, streams: pinion_streaming::Server) -> Self {
        Self { node, streams }
    }

    /// Hands a command to the actor of the container's pod and waits for its answer.
    async fn command<T>(
        &self,
        container: &str,
        command: impl FnOnce(String, pod::Reply<T>) -> Command,
    ) -> Result<T> {
        let (commands, id) = {
            let snapshot = self.node.registry.snapshot();
            let (pod, container) = snapshot.container(container)?;
            (pod.commands.clone(), container.id.clone())
        };
        pod::ask(&commands, |reply| command(id, reply)).await
    }

    /// The same for a command that is done when there is nothing to do it to.
    async fn command_if_there(
        &self,
        container: &str,
        command: impl FnOnce(String, pod::Reply<()>) -> Command,
    ) -> Result<()> {
        forgive_absence(self.command(container, command).await)
    }

    async fn pod_command(
        &self,
        pod: &str,
        command: impl FnOnce(pod::Reply<()>) -> Command,
    ) -> Result<()> {
        let commands = match self.node.registry.snapshot().pod(pod) {
            Ok(pod) => pod.commands.clone(),
            Err(e) => return forgive_absence(Err(e)),
        };
        forgive_absence(pod::ask(&commands, command).await)
    }
}

fn forgive_absence(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if e.kind() == crate::error::Kind::NotFound => Ok(()),
        other => other,
    }
}

#[tonic::async_trait]
impl RuntimeService for RuntimeApi {
    async fn version(&self, _: Request<VersionRequest>) -> Reply<VersionResponse> {
        answer("Version", "", async { Ok(info::version()) }).await
    }

    async fn status(&self, request: Request<StatusRequest>) -> Reply<StatusResponse> {
        let verbose = request.into_inner().verbose;
        answer("Status", "", info::status(&self.node, verbose)).await
    }

    async fn runtime_config(
        &self,
        _: Request<RuntimeConfigRequest>,
    ) -> Reply<RuntimeConfigResponse> {
        answer("RuntimeConfig", "", async { Ok(info::runtime_config(&self.node)) }).await
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Reply<UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config.unwrap_or_default();
        let cidr = config.network_config.unwrap_or_default().pod_cidr;
        let work = async {
            let networks = pinion_network::pod_cidrs(&cidr).map_err(|error| {
                Error::invalid(format!("runtime_config.network_config.pod_cidr: {error}"))
            })?;
            // Kubelet sends an empty one until the node is assigned its own.
            if !networks.is_empty() {
                let networks = networks.iter().map(ToString::to_string);
                self.node.network.set_pod_cidrs(networks.collect());
            }
            Ok(UpdateRuntimeConfigResponse {})
        };
        answer("UpdateRuntimeConfig", &cidr, work).await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Reply<RunPodSandboxResponse> {
        let request = request.into_inner();
        let name = pod::title(request.config.as_ref());
        let work = async {
            let pod_sandbox_id = pod::run(&self.node, request).await?;
            Ok(RunPodSandboxResponse { pod_sandbox_id })
        };
        answer("RunPodSandbox", &name, work).await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Reply<StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let work = async {
            self.pod_command(&id, |reply| Command::StopPod { reply }).await?;
            Ok(StopPodSandboxResponse {})
        };
        answer("StopPodSandbox", &id, work).await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Reply<RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let work = async {
            self.pod_command(&id, |reply| Command::RemovePod { reply }).await?;
            Ok(RemovePodSandboxResponse {})
        };
        answer("RemovePodSandbox", &id, work).await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Reply<PodSandboxStatusResponse> {
        let request = request.into_inner();
        let work = async {
            let pod = self.node.registry.snapshot().pod(&request.pod_sandbox_id)?.clone();
            Ok(PodSandboxStatusResponse {
                status: Some(status::sandbox_status(&pod.sandbox)),
                info: if request.verbose {
                    info::of_pod(&self.node, &pod)
                } else {
                    Default::default()
                },
                containers_statuses: status::container_statuses(&pod),
                timestamp: crate::ids::now(),
            })
        };
        answer("PodSandboxStatus", &request.pod_sandbox_id, work).await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Reply<ListPodSandboxResponse> {
        let filter = request.into_inner().filter;
        let work = async {
            let snapshot = self.node.registry.snapshot();
            Ok(ListPodSandboxResponse { items: status::list_sandboxes(&snapshot, filter.as_ref()) })
        };
        answer("ListPodSandbox", "", work).await
    }

    type StreamPodSandboxesStream = Messages<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        let filter = request.into_inner().filter;
        let work = async {
            let snapshot = self.node.registry.snapshot();
            let pods = status::list_sandboxes(&snapshot, filter.as_ref());
            Ok(chunked(pods, |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes }))
        };
        answer("StreamPodSandboxes", "", work).await
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Reply<CreateContainerResponse> {
        let request = request.into_inner();
        let pod = request.pod_sandbox_id.clone();
        let work = async {
            let config =
                request.config.ok_or_else(|| Error::invalid("the request has no config"))?;
            let commands = self.node.registry.snapshot().pod(&pod)?.commands.clone();
            let config = Box::new(config);
            let ticket = pod::ask(&commands, |reply| Command::Create { config, reply }).await?;
            Ok(CreateContainerResponse { container_id: ticket.wait().await? })
        };
        answer("CreateContainer", &pod, work).await
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Reply<StartContainerResponse> {
        let id = request.into_inner().container_id;
        let work = async {
            self.command(&id, |container, reply| Command::Start { container, reply }).await?;
            Ok(StartContainerResponse {})
        };
        answer("StartContainer", &id, work).await
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Reply<StopContainerResponse> {
        let StopContainerRequest { container_id, timeout } = request.into_inner();
        let grace = Duration::from_secs(u64::try_from(timeout).unwrap_or(0));
        let work = async {
            let stop = |container, reply| Command::Stop { container, grace, reply };
            self.command_if_there(&container_id, stop).await?;
            Ok(StopContainerResponse {})
        };
        answer("StopContainer", &container_id, work).await
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Reply<RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        let work = async {
            let remove = |container, reply| Command::Remove { container, reply };
            self.command_if_there(&id, remove).await?;
            Ok(RemoveContainerResponse {})
        };
        answer("RemoveContainer", &id, work).await
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Reply<ListContainersResponse> {
        let filter = request.into_inner().filter;
        let work = async {
            let snapshot = self.node.registry.snapshot();
            let containers = status::list_containers(&snapshot, filter.as_ref());
            Ok(ListContainersResponse { containers })
        };
        answer("ListContainers", "", work).await
    }

    type StreamContainersStream = Messages<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Reply<Self::StreamContainersStream> {
        let filter = request.into_inner().filter;
        let work = async {
            let snapshot = self.node.registry.snapshot();
            let containers = status::list_containers(&snapshot, filter.as_ref());
            Ok(chunked(containers, |containers| StreamContainersResponse { containers }))
        };
        answer("StreamContainers", "", work).await
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Reply<ContainerStatusResponse> {
        let request = request.into_inner();
        let work = async {
            let container =
                self.node.registry.snapshot().container(&request.container_id)?.1.clone();
            let info = if request.verbose {
                info::of_container(&self.node, &container).await
            } else {
                Default::default()
            };
            Ok(ContainerStatusResponse { status: Some(status::container_status(&container)), info })
        };
        answer("ContainerStatus", &request.container_id, work).await
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Reply<UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let work = async {
            let missing = || Error::invalid("the request has no linux resources");
            let resources = Box::new(request.linux.clone().ok_or_else(missing)?);
            let update =
                |container, reply| Command::Update { container, resources, told: false, reply };
            self.command(&request.container_id, update).await?;
            Ok(UpdateContainerResourcesResponse {})
        };
        answer("UpdateContainerResources", &request.container_id, work).await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Reply<UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let work = async {
            let pod = self.node.registry.snapshot().pod(&request.pod_sandbox_id)?.clone();
            let overhead = request.overhead.clone().map(Box::new);
            let resources = request.resources.clone().map(Box::new);
            let command = |reply| Command::UpdatePod { overhead, resources, reply };
            pod::ask(&pod.commands, command).await?;
            Ok(UpdatePodSandboxResourcesResponse {})
        };
        answer("UpdatePodSandboxResources", &request.pod_sandbox_id, work).await
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Reply<ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        let work = async {
            self.command(&id, |container, reply| Command::ReopenLog { container, reply }).await?;
            Ok(ReopenContainerLogResponse {})
        };
        answer("ReopenContainerLog", &id, work).await
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Reply<ExecSyncResponse> {
        let request = request.into_inner();
        let id = request.container_id.clone();
        answer("ExecSync", &id, exec::sync(&self.node, request)).await
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Reply<ExecResponse> {
        let request = request.into_inner();
        let id = request.container_id.clone();
        answer("Exec", &id, async { streaming::exec(&self.node, &self.streams, request) }).await
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Reply<AttachResponse> {
        let request = request.into_inner();
        let id = request.container_id.clone();
        answer("Attach", &id, async { streaming::attach(&self.node, &self.streams, request) }).await
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Reply<PortForwardResponse> {
        let request = request.into_inner();
        let id = request.pod_sandbox_id.clone();
        let work = async { streaming::port_forward(&self.node, &self.streams, &request) };
        answer("PortForward", &id, work).await
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Reply<ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        let work = async {
            let (pod, container) = {
                let snapshot = self.node.registry.snapshot();
                let (pod, container) = snapshot.container(&id)?;
                (pod.clone(), container.clone())
            };
            let mut stats = stats::containers(&self.node, vec![(pod, container)]).await?;
            Ok(ContainerStatsResponse { stats: stats.pop() })
        };
        answer("ContainerStats", &id, work).await
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Reply<ListContainerStatsResponse> {
        let filter = request.into_inner().filter;
        let work = async {
            let chosen = status::select_containers(&self.node.registry.snapshot(), filter.as_ref());
            Ok(ListContainerStatsResponse { stats: stats::containers(&self.node, chosen).await? })
        };
        answer("ListContainerStats", "", work).await
    }

    type StreamContainerStatsStream = Messages<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        let filter = request.into_inner().filter;
        let work = async {
            let chosen = status::select_containers(&self.node.registry.snapshot(), filter.as_ref());
            let stats = stats::containers(&self.node, chosen).await?;
            Ok(chunked(stats, |container_stats| StreamContainerStatsResponse { container_stats }))
        };
        answer("StreamContainerStats", "", work).await
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Reply<PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let work = async {
            let pod = self.node.registry.snapshot().pod(&id)?.clone();
            let mut stats = stats::pods(&self.node, vec![pod]).await?;
            Ok(PodSandboxStatsResponse { stats: stats.pop() })
        };
        answer("PodSandboxStats", &id, work).await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Reply<ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter;
        let work = async {
            let chosen = status::select_pods(&self.node.registry.snapshot(), filter.as_ref());
            Ok(ListPodSandboxStatsResponse { stats: stats::pods(&self.node, chosen).await? })
        };
        answer("ListPodSandboxStats", "", work).await
    }

    type StreamPodSandboxStatsStream = Messages<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        let filter = request.into_inner().filter;
        let work = async {
            let chosen = status::select_pods(&self.node.registry.snapshot(), filter.as_ref());
            let stats = stats::pods(&self.node, chosen).await?;
            Ok(chunked(stats, |pod_sandbox_stats| StreamPodSandboxStatsResponse {
                pod_sandbox_stats,
            }))
        };
        answer("StreamPodSandboxStats", "", work).await
    }

    type GetContainerEventsStream = Messages<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Reply<Self::GetContainerEventsStream> {
        let work = async {
            Ok({
                let (missed, live) = self.node.events.subscribe(&self.node.registry.snapshot());
                streams::events(missed, live)
            })
        };
        answer("GetContainerEvents", "", work).await
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Reply<ListMetricDescriptorsResponse> {
        let work =
            async { Ok(ListMetricDescriptorsResponse { descriptors: metrics::descriptors() }) };
        answer("ListMetricDescriptors", "", work).await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Reply<ListPodSandboxMetricsResponse> {
        let work = async {
            let pods = status::select_pods(&self.node.registry.snapshot(), None);
            Ok(ListPodSandboxMetricsResponse {
                pod_metrics: metrics::pods(&self.node, pods).await?,
            })
        };
        answer("ListPodSandboxMetrics", "", work).await
    }

    type StreamPodSandboxMetricsStream = Messages<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        let work = async {
            let pods = status::select_pods(&self.node.registry.snapshot(), None);
            let metrics = metrics::pods(&self.node, pods).await?;
            Ok(chunked(metrics, |pod_sandbox_metrics| StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }))
        };
        answer("StreamPodSandboxMetrics", "", work).await
    }

    async fn checkpoint_container(
        &self,
        request: Request<CheckpointContainerRequest>,
    ) -> Reply<CheckpointContainerResponse> {
        let CheckpointContainerRequest { container_id, location, timeout } = request.into_inner();
        let work = async {
            checkpoint::allowed(&self.node)?;
            let place = checkpoint::check_place("location", &location)?;
            let limit = Duration::from_secs(u64::try_from(timeout).unwrap_or(0));
            self.command(&container_id, |container, reply| Command::Checkpoint {
                containers: Some(vec![container]),
                place,
                limit,
                whole: false,
                reply,
            })
            .await?;
            Ok(CheckpointContainerResponse {})
        };
        answer("CheckpointContainer", &container_id, work).await
    }

    async fn checkpoint_pod(
        &self,
        request: Request<CheckpointPodRequest>,
    ) -> Reply<CheckpointPodResponse> {
        let CheckpointPodRequest { pod_sandbox_id, output_path, container_ids, options } =
            request.into_inner();
        let work = async {
            checkpoint::allowed(&self.node)?;
            if let Some(option) = options.keys().next() {
                return Err(Error::invalid(format!("options: {option:?} is not known")));
            }
            let place = checkpoint::check_place("output_path", &output_path)?;
            let pod = self.node.registry.snapshot().pod(&pod_sandbox_id)?.clone();
            let containers = (!container_ids.is_empty()).then_some(container_ids);
            let limit = Duration::ZERO;
            pod::ask(&pod.commands, |reply| Command::Checkpoint {
                containers,
                place,
                limit,
                whole: true,
                reply,
            })
            .await?;
            Ok(CheckpointPodResponse {})
        };
        answer("CheckpointPod", &pod_sandbox_id, work).await
    }

    async fn restore_pod(
        &self,
        request: Request<RestorePodRequest>,
    ) -> Reply<v1::RestorePodResponse> {
        let path = request.into_inner().checkpoint_path;
        let work = async {
            checkpoint::allowed(&self.node)?;
            Err(checkpoint::restore_refused(&path))
        };
        answer("RestorePod", &path, work).await
    }
}
