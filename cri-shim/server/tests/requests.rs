//! Requests that change what runs, and requests that nobody should send.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use pinion_cri_proto::v1::{self, LinuxContainerResources};
use prost::Message;
use support::{Client, Server, pod, shell};
use tonic::{Code, Status};

/// A pod's directory in the hierarchy of the CPU controller, v2 or v1.
fn cpu_group(server: &Server, pod: &str) -> PathBuf {
    let parent = server.cgroup.trim_start_matches('/');
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];
    let group = |root| Path::new(root).join(parent).join(pod);
    let has_quota =
        |group: &PathBuf| ["cpu.max", "cpu.cfs_quota_us"].iter().any(|f| group.join(f).exists());
    roots.map(group).into_iter().find(has_quota).unwrap()
}

/// Quota and period in microseconds; -1 without a quota.
fn bandwidth(group: &Path) -> (i64, i64) {
    let number = |text: &str| text.trim().parse().unwrap_or(-1);
    if let Ok(text) = fs::read_to_string(group.join("cpu.max")) {
        let (quota, period) = text.split_once(' ').unwrap();
        return (number(quota), number(period));
    }
    let read = |name| number(&fs::read_to_string(group.join(name)).unwrap());
    (read("cpu.cfs_quota_us"), read("cpu.cfs_period_us"))
}

#[tokio::test]
async fn a_pod_s_new_limits_are_those_of_its_cgroup() {
    let server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("limits");
    let id = client.run(&config).await.unwrap();
    client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    let group = cpu_group(&server, &id);
    let quota = |cpu_quota, cpu_period| LinuxContainerResources {
        cpu_quota,
        cpu_period,
        ..Default::default()
    };
    let mut ask = async |overhead, resources| {
        let pod_sandbox_id = id.clone();
        let request = v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id, overhead, resources };
        client.0.update_pod_sandbox_resources(request).await.map(drop)
    };
    ask(Some(quota(10_000, 100_000)), Some(quota(50_000, 100_000))).await.unwrap();
    assert_eq!(bandwidth(&group), (60_000, 100_000));
    // The overhead is remembered.
    ask(None, Some(quota(20_000, 50_000))).await.unwrap();
    assert_eq!(bandwidth(&group), (25_000, 50_000));
    for (wrong, named) in [
        (quota(50_000, 10), "period"),
        (LinuxContainerResources { cpu_shares: -5, ..Default::default() }, "cpu_shares"),
        (LinuxContainerResources { cpuset_cpus: "0-".into(), ..Default::default() }, "cpuset_cpus"),
    ] {
        let error = ask(None, Some(wrong)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(named), "{error}");
        assert_eq!(bandwidth(&group), (25_000, 50_000));
    }
    assert_eq!(ask(None, None).await.unwrap_err().code(), Code::InvalidArgument);
    ask(None, Some(quota(-1, 0))).await.unwrap();
    assert_eq!(bandwidth(&group).0, -1);
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn pods_get_addresses_of_the_node_s_networks_and_wrong_ones_are_named() {
    let server = Server::start().await;
    let name = server.path("").file_name().unwrap().to_string_lossy().into_owned();
    let bridge = format!("b{}", name.to_lowercase());
    let conflist = serde_json::json!({
        "cniVersion": "1.0.0", "name": name,
        "plugins": [{
            "type": "bridge", "bridge": bridge, "isGateway": true,
            "capabilities": { "ipRanges": true },
            "ipam": { "type": "host-local", "dataDir": server.path("leases") },
        }],
    });
    fs::write(server.path("cni/10-test.conflist"), conflist.to_string()).unwrap();
    let mut client = Client(server.runtime().await);
    let mut set = async |cidr: &str| {
        let network_config = Some(v1::NetworkConfig { pod_cidr: cidr.into() });
        let runtime_config = Some(v1::RuntimeConfig { network_config });
        let request = v1::UpdateRuntimeConfigRequest { runtime_config };
        client.0.update_runtime_config(request).await.map(drop)
    };
    for wrong in ["10.214.0.0", "10.214.0.0/33", "10.214.0.0/24,fd00::/200", "a,b"] {
        let error = set(wrong).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        let part = wrong.rsplit(',').next().unwrap();
        assert!(wrong == "a,b" || error.message().contains(part), "{error}");
    }
    set("10.214.0.9/24,fd00:214::/64").await.unwrap();
    // What kubelet sends before the node has its own changes nothing.
    set("").await.unwrap();
    let id = client.run(&pod("cidr")).await.unwrap();
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
    let status = client.0.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap();
    let network = status.network.unwrap();
    let more: Vec<&str> = network.additional_ips.iter().map(|ip| ip.ip.as_str()).collect();
    assert!(network.ip.starts_with("10.214.0."), "{}", network.ip);
    assert!(more.iter().any(|ip| ip.starts_with("fd00:214::")), "{more:?}");
    client.remove_pod(&id).await.unwrap();
    std::process::Command::new("ip").args(["link", "del", &bridge]).status().unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_retry_after_a_restart_is_compared_with_what_was_asked() {
    let mut server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let mut config = pod("retry");
    config.annotations.insert("cpu.pinion.dev/count".into(), threads_of_a_core().to_string());
    let id = client.run(&config).await.unwrap();
    let container = shell("c", "sleep 1000");
    let first = client.create(&id, &container, &config).await.unwrap();
    server.crash();
    server.spawn().await;
    let mut client = Client(server.runtime().await);
    assert_eq!(client.create(&id, &container, &config).await.unwrap(), first);
    let other = shell("c", "sleep 2000");
    let error = client.create(&id, &other, &config).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    client.remove_pod(&id).await.unwrap();
    assert_eq!(server.leftovers(), Vec::<String>::new());
}

/// What can be had exclusively is whole cores.
fn threads_of_a_core() -> usize {
    let siblings = "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list";
    let list = fs::read_to_string(siblings).unwrap_or_else(|_| "0".to_owned());
    list.trim().parse::<pinion_topology::CpuSet>().unwrap().len()
}

/// Random numbers that are the same in every run; xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap() % limit
    }

    fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

const NUMBERS: [u64; 9] =
    [0, 1, 2, 3, 0x7f, i32::MAX as u64, i64::MAX as u64, u64::MAX, i64::MIN as u64];

fn strings(valid: &[&str]) -> Vec<String> {
    let mut all: Vec<String> = [
        "",
        ".",
        "..",
        "../x",
        "a/../../b",
        "x\0y",
        "a\nb",
        "\u{1b}[31m",
        "\u{202e}",
        "%s%n",
        "a;b=c",
        "-x",
        "*",
        "0-",
        "4294967296",
        "key=value",
        "kernel.core_pattern",
        "net/../kernel/core_pattern",
        "ALL",
        "unconfined",
        "localhost/../x",
        "sha256:00",
        "{\"a\":[",
    ]
    .map(str::to_owned)
    .to_vec();
    all.push("n".repeat(300));
    all.push("é".repeat(5_000));
    all.extend(valid.iter().map(|s| (*s).to_owned()));
    all
}

/// Grows the encoding of a message field by field: one that the type does not take is left out,
/// so what comes out decodes, however deep it goes.
fn grow(
    random: &mut Random,
    pool: &[String],
    depth: usize,
    fits: &dyn Fn(&[u8]) -> bool,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Each field asks of the whole message whether it still decodes: few far down.
    for _ in 0..random.below(4 + 3 * depth) {
        let field = u32::try_from(1 + random.below(18)).unwrap();
        let mut next = bytes.clone();
        match random.below(if depth == 0 { 2 } else { 4 }) {
            0 => {
                prost::encoding::encode_key(field, prost::encoding::WireType::Varint, &mut next);
                prost::encoding::encode_varint(*random.choose(&NUMBERS), &mut next);
            }
            1 => prost::encoding::string::encode(field, random.choose(pool), &mut next),
            _ => {
                let wrap = |inner: &[u8]| {
                    let mut outer = bytes.clone();
                    prost::encoding::bytes::encode(field, &inner.to_vec(), &mut outer);
                    outer
                };
                let inner = grow(random, pool, depth - 1, &|inner| fits(&wrap(inner)));
                next = wrap(&inner);
            }
        }
        if fits(&next) {
            bytes = next;
        }
    }
    bytes
}

fn hostile<M: Message + Default>(random: &mut Random, pool: &[String]) -> M {
    let bytes = grow(random, pool, 3, &|bytes| M::decode(bytes).is_ok());
    M::decode(bytes.as_slice()).unwrap()
}

/// What a client can act on: neither a fault of the server nor a broken connection.
fn precise(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Ok | InvalidArgument | NotFound | AlreadyExists | FailedPrecondition | OutOfRange
    )
}

/// How many messages of each kind, and which: more of them by `PINION_HOSTILE=<count>/<seed>`.
fn plan() -> (usize, u64) {
    let asked = std::env::var("PINION_HOSTILE").unwrap_or_default();
    let (count, seed) = asked.split_once('/').unwrap_or((&asked, ""));
    (count.parse().unwrap_or(25), seed.parse().unwrap_or(7))
}

#[tokio::test]
async fn hostile_messages_are_answered_precisely_and_the_server_keeps_serving() {
    let server = Server::start().await;
    server.load_image().await;
    let mut runtime = server.runtime().await;
    let mut images = server.images().await;
    let mut client = Client(server.runtime().await);
    let config = pod("target");
    let id = client.run(&config).await.unwrap();
    let c = client.launch(&id, &shell("c", "sleep 1000"), &config).await.unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();

    let (count, seed) = plan();
    let mut random = Random(seed | 1);
    // Those that end things get nothing that is there.
    let nobody = strings(&[]);
    let known = strings(&[&id, &c, support::IMAGE, support::IMAGE, "true"]);
    let mut codes: HashMap<(&str, Code), usize> = HashMap::new();
    let mut wrong = Vec::new();
    macro_rules! ask {
        ($client:ident, $call:ident, $request:ty, $pool:expr) => {
            for _ in 0..count {
                let request: $request = hostile(&mut random, $pool);
                let said = format!("{request:?}");
                let answer: Result<(), Status> = $client.$call(request).await.map(drop);
                let code = answer.as_ref().map_or_else(Status::code, |()| Code::Ok);
                *codes.entry((stringify!($call), code)).or_default() += 1;
                if let Err(status) = &answer
                    && (!precise(code) || status.message().is_empty())
                {
                    let said: String = said.chars().take(1500).collect();
                    wrong.push(format!("{}: {status:?}\n  for {said}", stringify!($call)));
                }
            }
            runtime.version(v1::VersionRequest::default()).await.unwrap();
        };
    }
    ask!(runtime, status, v1::StatusRequest, &known);
    ask!(runtime, update_runtime_config, v1::UpdateRuntimeConfigRequest, &known);
    ask!(runtime, run_pod_sandbox, v1::RunPodSandboxRequest, &known);
    ask!(runtime, create_container, v1::CreateContainerRequest, &known);
    ask!(runtime, start_container, v1::StartContainerRequest, &known);
    ask!(runtime, update_container_resources, v1::UpdateContainerResourcesRequest, &known);
    ask!(runtime, update_pod_sandbox_resources, v1::UpdatePodSandboxResourcesRequest, &known);
    ask!(runtime, reopen_container_log, v1::ReopenContainerLogRequest, &known);
    ask!(runtime, exec_sync, v1::ExecSyncRequest, &known);
    ask!(runtime, exec, v1::ExecRequest, &known);
    ask!(runtime, attach, v1::AttachRequest, &known);
    ask!(runtime, port_forward, v1::PortForwardRequest, &known);
    ask!(runtime, container_status, v1::ContainerStatusRequest, &known);
    ask!(runtime, pod_sandbox_status, v1::PodSandboxStatusRequest, &known);
    ask!(runtime, list_pod_sandbox, v1::ListPodSandboxRequest, &known);
    ask!(runtime, list_containers, v1::ListContainersRequest, &known);
    ask!(runtime, container_stats, v1::ContainerStatsRequest, &known);
    ask!(runtime, list_container_stats, v1::ListContainerStatsRequest, &known);
    ask!(runtime, pod_sandbox_stats, v1::PodSandboxStatsRequest, &known);
    ask!(runtime, list_pod_sandbox_stats, v1::ListPodSandboxStatsRequest, &known);
    ask!(runtime, list_pod_sandbox_metrics, v1::ListPodSandboxMetricsRequest, &known);
    ask!(runtime, stream_pod_sandboxes, v1::StreamPodSandboxesRequest, &known);
    ask!(runtime, stream_containers, v1::StreamContainersRequest, &known);
    ask!(runtime, checkpoint_container, v1::CheckpointContainerRequest, &known);
    ask!(runtime, checkpoint_pod, v1::CheckpointPodRequest, &known);
    ask!(runtime, restore_pod, v1::RestorePodRequest, &known);
    ask!(images, list_images, v1::ListImagesRequest, &known);
    ask!(images, image_status, v1::ImageStatusRequest, &known);
    ask!(images, image_fs_info, v1::ImageFsInfoRequest, &known);
    ask!(images, remove_image, v1::RemoveImageRequest, &nobody);
    ask!(runtime, stop_container, v1::StopContainerRequest, &nobody);
    ask!(runtime, remove_container, v1::RemoveContainerRequest, &nobody);
    ask!(runtime, stop_pod_sandbox, v1::StopPodSandboxRequest, &nobody);
    ask!(runtime, remove_pod_sandbox, v1::RemovePodSandboxRequest, &nobody);
    let mut table: Vec<_> =
        codes.iter().map(|((call, code), n)| format!("{call} {code:?} {n}")).collect();
    table.sort();
    println!("{}", table.join("\n"));
    assert!(wrong.is_empty(), "{} answers are not precise:\n{}", wrong.len(), wrong.join("\n"));

    assert_eq!(client.exec(&c, &["echo", "alive"], 10).await.unwrap().stdout, b"alive\n");
    let listed = client.0.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
    for pod in listed.into_inner().items {
        client.remove_pod(&pod.id).await.unwrap();
    }
    assert_eq!(server.leftovers(), Vec::<String>::new());
    let own = server.path("").to_string_lossy().into_owned();
    let foreign = |text: &str| text.lines().filter(|l| !l.contains(&own)).count();
    let now = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(foreign(&now) <= foreign(&mounts), "mounts were left:\n{now}");
}
