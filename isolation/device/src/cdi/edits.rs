//! Edits into an OCI configuration, the way the reference implementation orders them: env,
//! nodes with their rules, interfaces, mounts (sorted by depth), hooks, resctrl, groups.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Hook as OciHook, HookBuilder, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder,
    LinuxDeviceType, LinuxIntelRdt, LinuxNamespaceType, LinuxNetDevice, LinuxNetDeviceBuilder,
    Mount as OciMount, MountBuilder, Spec,
};

use super::spec::{DeviceNode, Edits, Hook, IntelRdt, Mount};
use crate::{Access, Demand, NodeKind};

/// Hooks that name no limit get this one: a hook that hangs must not hang the pod.
const HOOK_SECONDS: i64 = 60;

/// Why the edits cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Something the vendor's file names is not there.
    #[error("CDI: {what} {}: {reason}", path.display())]
    Missing {
        /// Device node, mount source, hook.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The OCI configuration could not be built.
    #[error("CDI: {0}")]
    Oci(#[from] OciSpecError),
    /// The OCI configuration is not one for Linux.
    #[error("CDI: the configuration has no {0}")]
    Shape(&'static str),
}

/// Makes the edits and tells which device nodes they added, for the contract.
pub fn apply(spec: &mut Spec, edits: &Edits) -> Result<Vec<Demand>, ApplyError> {
    env(spec, &edits.env)?;
    let mut demands = Vec::new();
    for node in &edits.device_nodes {
        demands.extend(device_node(spec, node)?);
    }
    net_devices(spec, edits)?;
    mounts(spec, &edits.mounts)?;
    for hook in &edits.hooks {
        self::hook(spec, hook)?;
    }
    if let Some(rdt) = &edits.intel_rdt {
        let linux = spec.linux_mut().as_mut().ok_or(ApplyError::Shape("linux"))?;
        linux.set_intel_rdt(Some(intel_rdt(rdt)?));
    }
    gids(spec, &edits.additional_gids)?;
    Ok(demands)
}

/// A later value of a name takes the place of an earlier one.
fn env(spec: &mut Spec, added: &[String]) -> Result<(), ApplyError> {
    if added.is_empty() {
        return Ok(());
    }
    let process = spec.process_mut().as_mut().ok_or(ApplyError::Shape("process"))?;
    let mut env = process.env().clone().unwrap_or_default();
    for entry in added {
        let name = |entry: &str| entry.split_once('=').map(|(name, _)| name.to_owned());
        match env.iter_mut().find(|old| name(old) == name(entry)) {
            Some(old) => old.clone_from(entry),
            None => env.push(entry.clone()),
        }
    }
    process.set_env(Some(env));
    Ok(())
}

/// Kind and number of a node: as the file says, else those of the host's node.
struct Resolved {
    kind: LinuxDeviceType,
    major: i64,
    minor: i64,
    mode: Option<u32>,
}

fn resolve(node: &DeviceNode, host: &Path) -> Result<Resolved, ApplyError> {
    let said = match node.r#type.as_str() {
        "b" => Some(LinuxDeviceType::B),
        "c" | "u" => Some(LinuxDeviceType::C),
        "p" => Some(LinuxDeviceType::P),
        _ => None,
    };
    let complete = said.filter(|kind| node.major != 0 || *kind == LinuxDeviceType::P);
    let missing =
        |reason: String| ApplyError::Missing { what: "device node", path: host.into(), reason };
    let meta = match (host.symlink_metadata(), complete) {
        (Ok(meta), _) => meta,
        // A vendor may describe a node that is made later.
        (Err(_), Some(kind)) => {
            return Ok(Resolved {
                kind,
                major: node.major,
                minor: node.minor,
                mode: node.file_mode,
            });
        }
        (Err(error), None) => return Err(missing(error.to_string())),
    };
    let mode = node.file_mode.or(Some(meta.mode() & 0o777));
    if let Some(kind) = complete {
        return Ok(Resolved { kind, major: node.major, minor: node.minor, mode });
    }
    let kind = match meta.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        kind if kind.is_fifo() => LinuxDeviceType::P,
        _ => return Err(missing("it is not a device node".into())),
    };
    if said.is_some_and(|said| said != kind) {
        let reason = format!("it is of type {:?}, the CDI file says {:?}", kind, node.r#type);
        return Err(missing(reason));
    }
    let number = |part: u32| i64::from(part);
    let (major, minor) =
        (number(rustix::fs::major(meta.rdev())), number(rustix::fs::minor(meta.rdev())));
    Ok(Resolved { kind, major, minor, mode })
}

/// The device nodes that edits would add.
pub fn demands(edits: &Edits) -> Result<Vec<Demand>, ApplyError> {
    let each = edits.device_nodes.iter().map(|node| {
        let host = host_path(node);
        Ok(demand(node, host, &resolve(node, Path::new(host))?))
    });
    each.filter_map(Result::transpose).collect()
}

fn host_path(node: &DeviceNode) -> &str {
    if node.host_path.is_empty() { &node.path } else { &node.host_path }
}

/// A node for the contract; pipes are none.
fn demand(node: &DeviceNode, host: &str, found: &Resolved) -> Option<Demand> {
    let kind = match found.kind {
        LinuxDeviceType::B => NodeKind::Block,
        LinuxDeviceType::C | LinuxDeviceType::U => NodeKind::Char,
        LinuxDeviceType::P | LinuxDeviceType::A => return None,
    };
    let access = match node.permissions.as_str() {
        "none" => Access::default(),
        letters => letters.parse().unwrap_or_default(), // validated
    };
    let number = |value: i64| u32::try_from(value).unwrap_or_default(); // validated
    let (major, minor) = (number(found.major), number(found.minor));
    Some(Demand { host: host.into(), kind, major, minor, access })
}

fn device_node(spec: &mut Spec, node: &DeviceNode) -> Result<Option<Demand>, ApplyError> {
    let host = host_path(node);
    let found = resolve(node, Path::new(host))?;
    let user = spec.process().as_ref().map(|process| process.user().clone()).unwrap_or_default();
    let mut device = LinuxDeviceBuilder::default()
        .path(&node.path)
        .typ(found.kind)
        .major(found.major)
        .minor(found.minor)
        .uid(node.uid.unwrap_or(user.uid()))
        .gid(node.gid.unwrap_or(user.gid()));
    if let Some(mode) = found.mode {
        device = device.file_mode(mode);
    }
    let device: LinuxDevice = device.build()?;
    let linux = spec.linux_mut().as_mut().ok_or(ApplyError::Shape("linux"))?;
    let mut devices = linux.devices().clone().unwrap_or_default();
    devices.retain(|old| old.path() != device.path());
    devices.push(device);
    linux.set_devices(Some(devices));
    let Some(demand) = demand(node, host, &found) else { return Ok(None) };
    if demand.access == Access::default() {
        return Ok(Some(demand));
    }
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(found.kind)
        .major(found.major)
        .minor(found.minor)
        .access(demand.access.to_string())
        .build()?;
    let resources = linux.resources_mut().get_or_insert_with(Default::default);
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(rule);
    resources.set_devices(Some(rules));
    Ok(Some(demand))
}

fn net_devices(spec: &mut Spec, edits: &Edits) -> Result<(), ApplyError> {
    if edits.net_devices.is_empty() {
        return Ok(());
    }
    let linux = spec.linux_mut().as_mut().ok_or(ApplyError::Shape("linux"))?;
    let mut all: HashMap<String, LinuxNetDevice> = linux.net_devices().clone().unwrap_or_default();
    for device in &edits.net_devices {
        let path = PathBuf::from(format!("/sys/class/net/{}", device.host_interface_name));
        if !path.exists() {
            let reason = "the host has no such interface".to_owned();
            return Err(ApplyError::Missing { what: "interface", path, reason });
        }
        let to = LinuxNetDeviceBuilder::default().name(&device.name).build()?;
        all.insert(device.host_interface_name.clone(), to);
    }
    linux.set_net_devices(Some(all));
    Ok(())
}

fn mounts(spec: &mut Spec, added: &[Mount]) -> Result<(), ApplyError> {
    if added.is_empty() {
        return Ok(());
    }
    let mapped =
        spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref()).is_some_and(
            |namespaces| namespaces.iter().any(|ns| ns.typ() == LinuxNamespaceType::User),
        );
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in added {
        let made = oci_mount(mount, mapped)?;
        mounts.retain(|old| old.destination() != made.destination());
        mounts.push(made);
    }
    // Stable: what is as deep stays in its order.
    mounts.sort_by_key(|mount| mount.destination().components().count());
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn oci_mount(mount: &Mount, mapped: bool) -> Result<OciMount, ApplyError> {
    let mut options = mount.options.clone();
    let binds = |options: &[String]| options.iter().any(|o| o == "bind" || o == "rbind");
    if mount.r#type.is_empty() && !binds(&options) {
        options.insert(0, "rbind".into());
    }
    let bind = binds(&options) || mount.r#type == "bind";
    if bind && let Err(error) = Path::new(&mount.host_path).metadata() {
        let path = PathBuf::from(&mount.host_path);
        return Err(ApplyError::Missing { what: "mount source", path, reason: error.to_string() });
    }
    if bind && mapped {
        options.push("idmap".into());
    }
    let kind = if mount.r#type.is_empty() { "bind" } else { &mount.r#type };
    Ok(MountBuilder::default()
        .destination(&mount.container_path)
        .source(&mount.host_path)
        .typ(kind)
        .options(options)
        .build()?)
}

fn hook(spec: &mut Spec, hook: &Hook) -> Result<(), ApplyError> {
    // That one is looked up inside the container.
    let on_host = hook.hook_name != "startContainer";
    if on_host && let Err(error) = executable(Path::new(&hook.path)) {
        let path = PathBuf::from(&hook.path);
        return Err(ApplyError::Missing { what: "hook", path, reason: error.to_string() });
    }
    let args = if hook.args.is_empty() { vec![hook.path.clone()] } else { hook.args.clone() };
    // Never the environment of the container or of the server.
    let made = HookBuilder::default()
        .path(&hook.path)
        .args(args)
        .env(hook.env.clone())
        .timeout(hook.timeout.unwrap_or(HOOK_SECONDS))
        .build()?;
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let push = |list: &Option<Vec<OciHook>>| {
        let mut list = list.clone().unwrap_or_default();
        list.push(made.clone());
        Some(list)
    };
    match hook.hook_name.as_str() {
        "prestart" => hooks.set_prestart(push(hooks.prestart())),
        "createRuntime" => hooks.set_create_runtime(push(hooks.create_runtime())),
        "createContainer" => hooks.set_create_container(push(hooks.create_container())),
        "startContainer" => hooks.set_start_container(push(hooks.start_container())),
        "poststart" => hooks.set_poststart(push(hooks.poststart())),
        _ => hooks.set_poststop(push(hooks.poststop())), // validated
    };
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn executable(path: &Path) -> io::Result<()> {
    let meta = path.metadata()?;
    if meta.is_file() && meta.mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(io::Error::other("it is not an executable file"))
}

/// Through JSON, whose names both sides share.
fn intel_rdt(rdt: &IntelRdt) -> Result<LinuxIntelRdt, ApplyError> {
    let mut fields = serde_json::Map::new();
    for (name, value) in [
        ("closID", &rdt.clos_id),
        ("l3CacheSchema", &rdt.l3_cache_schema),
        ("memBwSchema", &rdt.mem_bw_schema),
    ] {
        if !value.is_empty() {
            fields.insert(name.into(), value.clone().into());
        }
    }
    if !rdt.schemata.is_empty() {
        fields.insert("schemata".into(), rdt.schemata.clone().into());
    }
    // The two older switches asked for kinds of monitoring that the newer one gives together.
    if rdt.enable_monitoring || rdt.enable_cmt || rdt.enable_mbm {
        fields.insert("enableMonitoring".into(), true.into());
    }
    serde_json::from_value(fields.into()).map_err(|error| ApplyError::Oci(error.into()))
}

fn gids(spec: &mut Spec, added: &[u32]) -> Result<(), ApplyError> {
    if added.iter().all(|gid| *gid == 0) {
        return Ok(());
    }
    let process = spec.process_mut().as_mut().ok_or(ApplyError::Shape("process"))?;
    let mut user = process.user().clone();
    let mut all = user.additional_gids().clone().unwrap_or_default();
    for gid in added.iter().filter(|gid| **gid != 0) {
        if !all.contains(gid) {
            all.push(*gid);
        }
    }
    user.set_additional_gids(Some(all));
    process.set_user(user);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::spec::NetDevice;
    use super::*;

    fn node(path: &str, host: &str) -> DeviceNode {
        DeviceNode { path: path.into(), host_path: host.into(), ..Default::default() }
    }

    #[test]
    fn every_kind_of_edit_lands_in_the_configuration() {
        let mut spec = Spec::default();
        let edits = Edits {
            env: vec!["PATH=/v".into(), "NEW=1".into()],
            device_nodes: vec![node("/dev/mine", "/dev/null")],
            net_devices: vec![NetDevice { host_interface_name: "lo".into(), name: "n".into() }],
            hooks: vec![Hook {
                hook_name: "createRuntime".into(),
                path: "/bin/sh".into(),
                args: vec![],
                env: vec![],
                timeout: None,
            }],
            mounts: vec![Mount {
                host_path: "/tmp".into(),
                container_path: "/proc".into(),
                options: vec!["ro".into()],
                r#type: String::new(),
            }],
            intel_rdt: Some(IntelRdt {
                clos_id: "gold".into(),
                enable_cmt: true,
                ..Default::default()
            }),
            additional_gids: vec![0, 7, 7],
        };
        let demands = apply(&mut spec, &edits).unwrap();
        assert_eq!((demands[0].major, demands[0].minor, demands[0].kind), (1, 3, NodeKind::Char));
        assert_eq!(demands[0].access.to_string(), "rwm");

        let process = spec.process().as_ref().unwrap();
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"PATH=/v".to_owned()) && env.contains(&"NEW=1".to_owned()));
        assert_eq!(env.iter().filter(|entry| entry.starts_with("PATH=")).count(), 1);
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[7]);
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.devices().as_ref().unwrap()[0].path(), Path::new("/dev/mine"));
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        assert_eq!(rules.last().unwrap().to_string(), "c 1:3 rwm");
        assert_eq!(linux.net_devices().as_ref().unwrap()["lo"].name().as_deref(), Some("n"));
        let rdt = serde_json::to_value(linux.intel_rdt()).unwrap();
        assert_eq!(rdt, serde_json::json!({ "closID": "gold", "enableMonitoring": true }));
        let hook = &spec.hooks().as_ref().unwrap().create_runtime().as_ref().unwrap()[0];
        assert_eq!(hook.timeout(), Some(HOOK_SECONDS));
        assert_eq!(hook.env().as_ref().unwrap().len(), 0);
        let mounts = spec.mounts().as_ref().unwrap();
        let ours: Vec<_> =
            mounts.iter().filter(|m| m.destination() == Path::new("/proc")).collect();
        assert_eq!(ours.len(), 1, "a mount at the same place is replaced");
        assert_eq!(ours[0].options().as_ref().unwrap(), &["rbind", "ro"]);
        let depths: Vec<usize> =
            mounts.iter().map(|m| m.destination().components().count()).collect();
        assert!(depths.is_sorted());
    }

    #[test]
    fn what_is_not_there_is_named() {
        let missing = |edits: Edits| apply(&mut Spec::default(), &edits).unwrap_err().to_string();
        let nodes = Edits { device_nodes: vec![node("/dev/x", "/dev/none")], ..Default::default() };
        assert!(missing(nodes).contains("device node /dev/none"));
        let file =
            Edits { device_nodes: vec![node("/dev/x", "/etc/passwd")], ..Default::default() };
        assert!(missing(file).contains("not a device node"));
        let mount = Mount {
            host_path: "/none/here".into(),
            container_path: "/x".into(),
            options: vec![],
            r#type: String::new(),
        };
        assert!(
            missing(Edits { mounts: vec![mount], ..Default::default() }).contains("/none/here")
        );
        let hook = Hook {
            hook_name: "poststop".into(),
            path: "/etc/passwd".into(),
            args: vec![],
            env: vec![],
            timeout: None,
        };
        assert!(
            missing(Edits { hooks: vec![hook], ..Default::default() })
                .contains("not an executable")
        );
    }

    #[test]
    fn a_complete_node_need_not_exist_and_none_allows_nothing() {
        let node = DeviceNode {
            path: "/dev/x".into(),
            r#type: "c".into(),
            major: 240,
            minor: 1,
            permissions: "none".into(),
            ..Default::default()
        };
        let mut spec = Spec::default();
        let before = spec.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone();
        let demands =
            apply(&mut spec, &Edits { device_nodes: vec![node], ..Default::default() }).unwrap();
        assert_eq!(demands[0].access, Access::default());
        let rules = spec.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone();
        assert_eq!(rules, before);
    }
}
