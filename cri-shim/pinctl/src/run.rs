//! `pinctl run`: a pod with one container, the way kubelet would start it.

use crate::cli::RunArgs;
use crate::connect::Node;
use crate::error::Error;
use crate::output::{self, Format};
use crate::{images, logs, remove};
use pinion_cri_proto::admin::PullImageRequest;
use pinion_cri_proto::v1::{
    CdiDevice, ContainerConfig, ContainerMetadata, CreateContainerRequest, Device, HugepageLimit,
    ImageSpec, ImageStatusRequest, KeyValue, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, RunPodSandboxRequest,
    StartContainerRequest,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const LOG_ROOT: &str = "/var/log/pinion/pinctl";

/// Starts the container; in the foreground, prints its output and gives its exit code.
pub(crate) async fn run(node: &mut Node, format: Format, args: RunArgs) -> Result<u8, Error> {
    ensure_image(node, &args.image).await?;
    let unique = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let name = args.name.clone().unwrap_or_else(|| format!("run-{:x}", unique & 0xffff_ffff));
    let pod_config = pod_config(&args, &name, unique);
    let container_config = container_config(&args, &name)?;
    let logs = PathBuf::from(&pod_config.log_directory);
    std::fs::create_dir_all(&logs).map_err(|source| Error::File {
        action: "create",
        path: logs.clone(),
        source,
    })?;

    let request = RunPodSandboxRequest {
        config: Some(pod_config.clone()),
        runtime_handler: args.handler.clone(),
    };
    let answer = node.runtime.run_pod_sandbox(request).await;
    let pod = answer.map_err(Error::call("starting the pod"))?.into_inner().pod_sandbox_id;
    let log_file = logs.join(&container_config.log_path);
    match start(node, &pod, pod_config, container_config).await {
        Ok(id) if args.detach => {
            match format {
                Format::Json => output::json(&serde_json::json!({ "pod": pod, "container": id }))?,
                Format::Table => output::print(&id)?,
            }
            Ok(0)
        }
        Ok(id) => {
            let code = foreground(node, &id, &log_file).await;
            if !args.keep {
                remove::remove_pod(node, &pod).await?;
                drop(std::fs::remove_dir_all(&logs)); // its log was printed
            }
            code
        }
        Err(error) => {
            // The first error is the one to tell; a pod that cannot be removed now shows
            // in `pinctl pods`.
            drop(remove::remove_pod(node, &pod).await);
            drop(std::fs::remove_dir_all(&logs));
            Err(error)
        }
    }
}

async fn start(
    node: &mut Node,
    pod: &str,
    pod_config: PodSandboxConfig,
    config: ContainerConfig,
) -> Result<String, Error> {
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(pod_config),
    };
    let answer = node.runtime.create_container(request).await;
    let id = answer.map_err(Error::call("creating the container"))?.into_inner().container_id;
    let request = StartContainerRequest { container_id: id.clone() };
    let answer = node.runtime.start_container(request).await;
    answer.map_err(Error::call("starting the container"))?;
    Ok(id)
}

async fn foreground(node: &mut Node, id: &str, log: &Path) -> Result<u8, Error> {
    tokio::select! {
        followed = logs::follow(node, id, log) => followed?,
        _ = tokio::signal::ctrl_c() => return Ok(130),
    }
    let code = logs::status(node, id).await?.exit_code;
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

async fn ensure_image(node: &mut Node, image: &str) -> Result<(), Error> {
    let spec = ImageSpec { image: image.to_owned(), ..ImageSpec::default() };
    let request = ImageStatusRequest { image: Some(spec), verbose: false };
    let answer = node.images.image_status(request).await;
    if answer.map_err(Error::call(format!("looking up {image}")))?.into_inner().image.is_none() {
        let request =
            PullImageRequest { reference: image.to_owned(), ..PullImageRequest::default() };
        images::pull_with_bars(node, request, Format::Table).await?;
    }
    Ok(())
}

fn pod_config(args: &RunArgs, name: &str, unique: u128) -> PodSandboxConfig {
    let network = if args.host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
    let mut annotations = HashMap::new();
    if args.exclusive {
        annotations.insert("cpu.pinion.dev/exclusive".to_owned(), "true".to_owned());
    }
    let mut annotate =
        |key: &str, value: String| annotations.insert(format!("{key}.{name}"), value);
    if let Some(count) = args.cpus_exclusive {
        annotate("cpu.pinion.dev/count", count.to_string());
    }
    if let Some(node) = args.numa {
        annotate("cpu.pinion.dev/numa", node.to_string());
    }
    if !args.vfio.is_empty() {
        annotate("device.pinion.dev/vfio", args.vfio.join(","));
    }
    if !args.hugepages.is_empty() {
        annotations.insert("hugepages.pinion.dev/mount".to_owned(), "true".to_owned());
    }
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("pinctl-{unique:x}"),
            namespace: "pinctl".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: format!("{LOG_ROOT}/{name}-{unique:x}"),
        labels: HashMap::from([("pinctl".to_owned(), "true".to_owned())]),
        annotations,
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(network)),
                privileged: args.privileged,
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

fn namespaces(network: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        network: network.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}

fn container_config(args: &RunArgs, name: &str) -> Result<ContainerConfig, Error> {
    let envs = args.env.iter().map(|e| env(e)).collect::<Result<_, _>>()?;
    let mounts = args.volume.iter().map(|v| volume(v)).collect::<Result<_, _>>()?;
    let network = if args.host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: args.image.clone(), ..ImageSpec::default() }),
        // What follows the image replaces its command and keeps its entrypoint.
        args: args.command.clone(),
        envs,
        mounts,
        devices: args.device.iter().map(|d| device(d)).collect::<Result<_, _>>()?,
        cdi_devices: args.cdi.iter().map(|name| CdiDevice { name: name.clone() }).collect(),
        labels: HashMap::from([("pinctl".to_owned(), "true".to_owned())]),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                cpuset_cpus: args.cpus.clone().unwrap_or_default(),
                cpuset_mems: args.mems.clone().unwrap_or_default(),
                memory_limit_in_bytes: args.memory.unwrap_or_default(),
                hugepage_limits: hugepage_limits(&args.hugepages)?,
                ..LinuxContainerResources::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces(network)),
                privileged: args.privileged,
                ..LinuxContainerSecurityContext::default()
            }),
        }),
        ..ContainerConfig::default()
    })
}

fn hugepage_limits(asked: &[(String, u64)]) -> Result<Vec<HugepageLimit>, Error> {
    let limit = |(size, pages): &(String, u64)| {
        let page = bytes(size).map_err(Error::Invalid)?;
        let limit = u64::try_from(page).unwrap_or_default().checked_mul(*pages);
        let limit =
            limit.ok_or_else(|| Error::Invalid(format!("{pages} pages of {size} are too many")))?;
        Ok(HugepageLimit { page_size: size.clone(), limit })
    };
    asked.iter().map(limit).collect()
}

fn env(text: &str) -> Result<KeyValue, Error> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => {
            Ok(KeyValue { key: key.to_owned(), value: value.as_bytes().to_vec() })
        }
        _ => Err(Error::Invalid(format!("--env {text:?} is not NAME=VALUE"))),
    }
}

fn device(text: &str) -> Result<Device, Error> {
    let parts: Vec<&str> = text.split(':').collect();
    let (host, inside, permissions) = match parts.as_slice() {
        [host] => (*host, *host, "rw"),
        [host, inside] => (*host, *inside, "rw"),
        [host, inside, permissions] => (*host, *inside, *permissions),
        _ => return Err(Error::Invalid(format!("--device {text:?} is not PATH[:PATH[:rwm]]"))),
    };
    Ok(Device {
        host_path: host.to_owned(),
        container_path: inside.to_owned(),
        permissions: permissions.to_owned(),
    })
}

fn volume(text: &str) -> Result<Mount, Error> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, readonly) = match parts.as_slice() {
        [source, target] | [source, target, "rw"] => (*source, *target, false),
        [source, target, "ro"] => (*source, *target, true),
        _ => return Err(Error::Invalid(format!("--volume {text:?} is not SOURCE:TARGET[:ro]"))),
    };
    if !source.starts_with('/') || !target.starts_with('/') {
        return Err(Error::Invalid(format!("--volume {text:?}: both paths must be absolute")));
    }
    Ok(Mount {
        host_path: source.to_owned(),
        container_path: target.to_owned(),
        readonly,
        ..Mount::default()
    })
}

/// Reads `2MB=64`: page size and number of pages.
pub(crate) fn hugepages(text: &str) -> Result<(String, u64), String> {
    let wrong = || format!("{text:?} is not SIZE=PAGES, such as 2MB=64");
    let (size, pages) = text.split_once('=').ok_or_else(wrong)?;
    bytes(size)?;
    Ok((size.to_owned(), pages.parse().map_err(|_nan| wrong())?))
}

/// Reads a size such as `256M`, `2MB`, `1Gi` or plain bytes; units are powers of 1024.
pub(crate) fn bytes(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is not a size, such as 256M");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let value: i64 = text[..digits].parse().map_err(|_nan| wrong())?;
    let shift = match text[digits..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KI" | "KIB" => 10,
        "M" | "MB" | "MI" | "MIB" => 20,
        "G" | "GB" | "GI" | "GIB" => 30,
        _ => return Err(wrong()),
    };
    value.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(bytes("2MB"), Ok(2 << 20));
        assert_eq!(bytes("1Gi"), Ok(1 << 30));
        assert_eq!(bytes("12"), Ok(12));
        for bad in ["", "M", "12X", "99999999999G", "-1"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hugepages_are_size_and_count() {
        assert_eq!(hugepages("2MB=64"), Ok(("2MB".into(), 64)));
        assert!(hugepages("2MB").is_err());
        assert!(hugepages("2MB=x").is_err());
        assert_eq!(hugepage_limits(&[("2MB".into(), 64)]).unwrap()[0].limit, 128 << 20);
    }

    #[test]
    fn volumes_want_absolute_paths() {
        assert!(volume("/a:/b:ro").unwrap().readonly);
        assert!(!volume("/a:/b").unwrap().readonly);
        for bad in ["/a", "a:/b", "/a:b", "/a:/b:x"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }
}
