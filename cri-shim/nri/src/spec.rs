//! Between OCI configurations (as JSON, so that nothing in one is lost) and NRI messages. Pure.

use std::collections::BTreeMap;

use pinion_nri_proto::api::{
    Container, ContainerAdjustment, Hook, Hooks, HugepageLimit, IoPrioClass, LinuxContainer,
    LinuxCpu, LinuxDevice, LinuxMemory, LinuxNamespace, LinuxPids, LinuxResources,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, LinuxSeccomp, Mount, MpolFlag, MpolMode,
    OptionalFileMode, OptionalInt, OptionalInt64, OptionalUInt32, OptionalUInt64, PosixRlimit,
    User,
};
use serde_json::{Map, Value, json};

/// An adjustment that is not made, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Unfit {
    /// The field of the adjustment.
    pub field: String,
    /// What is wrong with it, for a person.
    pub reason: String,
}

fn unfit<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T, Unfit> {
    Err(Unfit { field: field.into(), reason: reason.into() })
}

/// Annotations of this prefix are the runtime's own contract with the server.
const RESERVED: &str = "dev.pinion.";

/// Fills in what an OCI configuration says of a container.
pub fn describe(spec: &Value, container: &mut Container) {
    let texts = |at: &str| -> Vec<String> {
        let list = spec.pointer(at).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|v| Some(v.as_str()?.to_owned())).collect()
    };
    container.args = texts("/process/args");
    container.env = texts("/process/env");
    container.mounts = list(spec, "/mounts").map(mount).collect();
    container.rlimits = list(spec, "/process/rlimits").map(rlimit).collect();
    container.hooks = spec.get("hooks").map(hooks);
    let id = |at: &str| spec.pointer(at).and_then(Value::as_u64).and_then(|n| n.try_into().ok());
    container.user = Some(User {
        uid: id("/process/user/uid").unwrap_or(0),
        gid: id("/process/user/gid").unwrap_or(0),
        additional_gids: list(spec, "/process/user/additionalGids")
            .filter_map(|v| v.as_u64()?.try_into().ok())
            .collect(),
    });
    container.linux = Some(LinuxContainer {
        namespaces: list(spec, "/linux/namespaces").map(namespace).collect(),
        devices: list(spec, "/linux/devices").map(device).collect(),
        resources: spec.pointer("/linux/resources").map(resources),
        oom_score_adj: spec
            .pointer("/process/oomScoreAdj")
            .and_then(Value::as_i64)
            .map(|value| OptionalInt { value }),
        cgroups_path: text(spec.pointer("/linux/cgroupsPath")),
        sysctl: strings(spec.pointer("/linux/sysctl")),
        ..LinuxContainer::default()
    });
}

fn list<'a>(value: &'a Value, at: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(at).and_then(Value::as_array).into_iter().flatten()
}

fn text(value: Option<&Value>) -> String {
    value.and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn strings(value: Option<&Value>) -> BTreeMap<String, String> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}

fn mount(value: &Value) -> Mount {
    Mount {
        destination: text(value.get("destination")),
        r#type: text(value.get("type")),
        source: text(value.get("source")),
        options: list(value, "/options").map(|v| text(Some(v))).collect(),
    }
}

fn rlimit(value: &Value) -> PosixRlimit {
    let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    PosixRlimit { r#type: text(value.get("type")), hard: number("hard"), soft: number("soft") }
}

fn namespace(value: &Value) -> LinuxNamespace {
    LinuxNamespace { r#type: text(value.get("type")), path: text(value.get("path")) }
}

fn device(value: &Value) -> LinuxDevice {
    let signed = |key: &str| value.get(key).and_then(Value::as_i64).unwrap_or(0);
    let small = |key: &str| value.get(key)?.as_u64()?.try_into().ok();
    LinuxDevice {
        path: text(value.get("path")),
        r#type: text(value.get("type")),
        major: signed("major"),
        minor: signed("minor"),
        file_mode: small("fileMode").map(|value| OptionalFileMode { value }),
        uid: small("uid").map(|value| OptionalUInt32 { value }),
        gid: small("gid").map(|value| OptionalUInt32 { value }),
    }
}

fn hooks(value: &Value) -> Hooks {
    let of = |kind: &str| list(value, &format!("/{kind}")).map(hook).collect();
    Hooks {
        prestart: of("prestart"),
        create_runtime: of("createRuntime"),
        create_container: of("createContainer"),
        start_container: of("startContainer"),
        poststart: of("poststart"),
        poststop: of("poststop"),
    }
}

fn hook(value: &Value) -> Hook {
    Hook {
        path: text(value.get("path")),
        args: list(value, "/args").map(|v| text(Some(v))).collect(),
        env: list(value, "/env").map(|v| text(Some(v))).collect(),
        timeout: value.get("timeout").and_then(Value::as_i64).map(|value| OptionalInt { value }),
    }
}

/// `linux.resources` of an OCI configuration.
#[must_use]
pub fn resources(value: &Value) -> LinuxResources {
    let signed =
        |at: &str| value.pointer(at).and_then(Value::as_i64).map(|value| OptionalInt64 { value });
    let unsigned =
        |at: &str| value.pointer(at).and_then(Value::as_u64).map(|value| OptionalUInt64 { value });
    LinuxResources {
        memory: value.get("memory").map(|_| LinuxMemory {
            limit: signed("/memory/limit"),
            reservation: signed("/memory/reservation"),
            swap: signed("/memory/swap"),
            swappiness: unsigned("/memory/swappiness"),
            ..LinuxMemory::default()
        }),
        cpu: value.get("cpu").map(|_| LinuxCpu {
            shares: unsigned("/cpu/shares"),
            quota: signed("/cpu/quota"),
            period: unsigned("/cpu/period"),
            cpus: text(value.pointer("/cpu/cpus")),
            mems: text(value.pointer("/cpu/mems")),
            ..LinuxCpu::default()
        }),
        hugepage_limits: list(value, "/hugepageLimits")
            .map(|limit| HugepageLimit {
                page_size: text(limit.get("pageSize")),
                limit: limit.get("limit").and_then(Value::as_u64).unwrap_or(0),
            })
            .collect(),
        unified: strings(value.get("unified")),
        pids: value.pointer("/pids/limit").and_then(Value::as_i64).map(|limit| LinuxPids { limit }),
        ..LinuxResources::default()
    }
}

/// Lays an adjustment over an OCI configuration. What goes through the server's own planner is
/// left to it: CPU, memory and hugepage limits, `unified`, CDI devices, and the cgroup's place.
///
/// # Errors
/// The first thing that cannot be done; the configuration is then not to be used.
pub fn apply(spec: &mut Value, asked: &ContainerAdjustment) -> Result<(), Unfit> {
    if !spec.is_object() {
        return unfit("config.json", "is not an object");
    }
    for key in asked.annotations.keys() {
        if key.trim_start_matches('-').starts_with(RESERVED) {
            return unfit(format!("annotations[{key:?}]"), "is reserved for the server");
        }
    }
    edit_map(object(spec, &["annotations"]), &asked.annotations, |v| json!(v));
    edit_list(array(spec, &["mounts"]), &asked.mounts, "destination", |m| &m.destination, to_mount);
    edit_env(array(spec, &["process", "env"]), asked);
    edit_list(
        array(spec, &["process", "rlimits"]),
        &asked.rlimits,
        "type",
        |r| &r.r#type,
        |r| json!({ "type": r.r#type, "hard": r.hard, "soft": r.soft }),
    );
    if !asked.args.is_empty() {
        object(spec, &["process"]).insert("args".into(), json!(asked.args));
    }
    if let Some(hooks) = &asked.hooks {
        add_hooks(spec, hooks)?;
    }
    match &asked.linux {
        Some(linux) => apply_linux(spec, linux),
        None => Ok(()),
    }
}

/// The object at a path, made where it is missing.
fn object<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Map<String, Value> {
    let mut at = value;
    for key in path {
        if !at.is_object() {
            *at = json!({});
        }
        at = at.as_object_mut().map(|map| map.entry(*key).or_insert(json!({}))).unwrap_or_else(
            // It was made an object just now.
            || unreachable!("an object"),
        );
    }
    if !at.is_object() {
        *at = json!({});
    }
    match at {
        Value::Object(map) => map,
        _ => unreachable!("an object"),
    }
}

fn array<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Vec<Value> {
    let (last, parents) = path.split_last().unwrap_or((&"", &[]));
    let slot = object(value, parents).entry(*last).or_insert(json!([]));
    if !slot.is_array() {
        *slot = json!([]);
    }
    match slot {
        Value::Array(list) => list,
        _ => unreachable!("an array"),
    }
}

fn edit_map<T>(into: &mut Map<String, Value>, from: &BTreeMap<String, T>, value: fn(&T) -> Value) {
    for removed in from.keys().filter_map(|key| key.strip_prefix('-')) {
        into.remove(removed);
    }
    for (key, item) in from.iter().filter(|(key, _)| !key.starts_with('-')) {
        into.insert(key.clone(), value(item));
    }
}

/// Removes what is named with a leading `-`, and puts the others in the place of their like.
fn edit_list<T>(
    into: &mut Vec<Value>,
    from: &[T],
    key: &str,
    name: fn(&T) -> &str,
    value: impl Fn(&T) -> Value,
) {
    for item in from {
        let named = name(item);
        let bare = named.strip_prefix('-').unwrap_or(named);
        into.retain(|other| other.get(key).and_then(Value::as_str) != Some(bare));
        if bare == named {
            into.push(value(item));
        }
    }
}

fn to_mount(mount: &Mount) -> Value {
    json!({
        "destination": mount.destination,
        "type": mount.r#type,
        "source": mount.source,
        "options": mount.options,
    })
}

fn edit_env(env: &mut Vec<Value>, asked: &ContainerAdjustment) {
    for pair in &asked.env {
        let bare = pair.key.strip_prefix('-').unwrap_or(&pair.key);
        let prefix = format!("{bare}=");
        env.retain(|entry| !entry.as_str().is_some_and(|text| text.starts_with(&prefix)));
        if bare == pair.key {
            env.push(json!(format!("{prefix}{}", pair.value)));
        }
    }
}

fn add_hooks(spec: &mut Value, hooks: &Hooks) -> Result<(), Unfit> {
    let kinds = [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("createContainer", &hooks.create_container),
        ("startContainer", &hooks.start_container),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ];
    for (kind, list) in kinds {
        for hook in list {
            if !hook.path.starts_with('/') {
                let path = &hook.path;
                return unfit(format!("hooks.{kind}"), format!("{path:?} is not an absolute path"));
            }
            let mut value = json!({ "path": hook.path });
            let map = object(&mut value, &[]);
            if !hook.args.is_empty() {
                map.insert("args".into(), json!(hook.args));
            }
            if !hook.env.is_empty() {
                map.insert("env".into(), json!(hook.env));
            }
            if let Some(timeout) = &hook.timeout {
                map.insert("timeout".into(), json!(timeout.value));
            }
            array(spec, &["hooks", kind]).push(value);
        }
    }
    Ok(())
}

fn apply_linux(
    spec: &mut Value,
    asked: &pinion_nri_proto::api::LinuxContainerAdjustment,
) -> Result<(), Unfit> {
    devices(spec, &asked.devices)?;
    edit_list(
        array(spec, &["linux", "namespaces"]),
        &asked.namespaces,
        "type",
        |n| &n.r#type,
        |n| match n.path.as_str() {
            "" => json!({ "type": n.r#type }),
            path => json!({ "type": n.r#type, "path": path }),
        },
    );
    edit_map(object(spec, &["linux", "sysctl"]), &asked.sysctl, |v| json!(v));
    edit_map(object(spec, &["linux", "netDevices"]), &asked.net_devices, |d| {
        if d.name.is_empty() { json!({}) } else { json!({ "name": d.name }) }
    });
    drop_if_empty(spec, "sysctl");
    drop_if_empty(spec, "netDevices");
    let process = object(spec, &["process"]);
    if let Some(adj) = &asked.oom_score_adj {
        process.insert("oomScoreAdj".into(), json!(adj.value));
    }
    if let Some(priority) = &asked.io_priority {
        let class = priority.class();
        if class == IoPrioClass::IoprioClassNone {
            process.remove("ioPriority");
        } else {
            let value = json!({ "class": class.as_str_name(), "priority": priority.priority });
            process.insert("ioPriority".into(), value);
        }
    }
    if let Some(scheduler) = &asked.scheduler {
        process.insert("scheduler".into(), to_scheduler(scheduler));
    }
    if let Some(policy) = &asked.seccomp_policy {
        object(spec, &["linux"]).insert("seccomp".into(), seccomp(policy));
    }
    if let Some(policy) = &asked.memory_policy {
        let flags = policy.flags().map(|flag: MpolFlag| flag.as_str_name());
        let value = json!({
            "mode": MpolMode::as_str_name(&policy.mode()),
            "nodes": policy.nodes,
            "flags": flags.collect::<Vec<_>>(),
        });
        object(spec, &["linux"]).insert("memoryPolicy".into(), value);
    }
    if let Some(rdt) = &asked.rdt {
        let linux = object(spec, &["linux"]);
        if rdt.remove {
            linux.remove("intelRdt");
        } else {
            let mut value = Map::new();
            let mut set = |key: &str, item: Option<Value>| {
                if let Some(item) = item {
                    value.insert(key.into(), item);
                }
            };
            set("closID", rdt.clos_id.as_ref().map(|id| json!(id.value)));
            set("schemata", rdt.schemata.as_ref().map(|lines| json!(lines.value)));
            set("enableMonitoring", rdt.enable_monitoring.as_ref().map(|on| json!(on.value)));
            linux.insert("intelRdt".into(), Value::Object(value));
        }
    }
    match &asked.resources {
        None => Ok(()),
        Some(resources) => rest_of_resources(spec, resources),
    }
}

fn drop_if_empty(spec: &mut Value, key: &str) {
    let linux = object(spec, &["linux"]);
    if linux.get(key).and_then(Value::as_object).is_some_and(Map::is_empty) {
        linux.remove(key);
    }
}

/// Nodes to make, with the rule that lets the container use them.
fn devices(spec: &mut Value, asked: &[LinuxDevice]) -> Result<(), Unfit> {
    for device in asked {
        let bare = device.path.strip_prefix('-').unwrap_or(&device.path);
        if !bare.starts_with("/dev/") || bare.split('/').any(|part| part == "..") {
            return unfit("linux.devices", format!("{bare:?} is not below /dev"));
        }
        if bare == device.path && !["c", "b", "p"].contains(&device.r#type.as_str()) {
            return unfit("linux.devices", format!("{bare}: unknown type {:?}", device.r#type));
        }
    }
    edit_list(
        array(spec, &["linux", "devices"]),
        asked,
        "path",
        |d| &d.path,
        |d| {
            let mut node =
                json!({ "path": d.path, "type": d.r#type, "major": d.major, "minor": d.minor });
            let map = object(&mut node, &[]);
            let optional = [
                ("fileMode", d.file_mode.as_ref().map(|m| m.value)),
                ("uid", d.uid.as_ref().map(|u| u.value)),
                ("gid", d.gid.as_ref().map(|g| g.value)),
            ];
            for (key, value) in optional {
                if let Some(value) = value {
                    map.insert(key.into(), json!(value));
                }
            }
            node
        },
    );
    let rules = array(spec, &["linux", "resources", "devices"]);
    for device in asked.iter().filter(|d| !d.path.starts_with('-') && d.r#type != "p") {
        rules.push(json!({
            "allow": true,
            "type": device.r#type,
            "major": device.major,
            "minor": device.minor,
            "access": "rwm",
        }));
    }
    Ok(())
}

fn to_scheduler(asked: &pinion_nri_proto::api::LinuxScheduler) -> Value {
    let flags = asked.flags().map(|flag: LinuxSchedulerFlag| flag.as_str_name());
    let mut value = json!({
        "policy": LinuxSchedulerPolicy::as_str_name(&asked.policy()),
        "nice": asked.nice,
        "priority": asked.priority,
        "flags": flags.collect::<Vec<_>>(),
    });
    let map = object(&mut value, &[]);
    let deadlines =
        [("runtime", asked.runtime), ("deadline", asked.deadline), ("period", asked.period)];
    for (key, number) in deadlines.into_iter().filter(|(_, number)| *number != 0) {
        map.insert(key.into(), json!(number));
    }
    value
}

fn seccomp(asked: &LinuxSeccomp) -> Value {
    let syscalls = asked.syscalls.iter().map(|call| {
        let args = call.args.iter().map(|arg| {
            json!({ "index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op })
        });
        let mut value = json!({
            "names": call.names,
            "action": call.action,
            "args": args.collect::<Vec<_>>(),
        });
        if let Some(errno) = &call.errno_ret {
            object(&mut value, &[]).insert("errnoRet".into(), json!(errno.value));
        }
        value
    });
    let mut value = json!({
        "defaultAction": asked.default_action,
        "architectures": asked.architectures,
        "flags": asked.flags,
        "syscalls": syscalls.collect::<Vec<_>>(),
    });
    let map = object(&mut value, &[]);
    if let Some(errno) = &asked.default_errno {
        map.insert("defaultErrnoRet".into(), json!(errno.value));
    }
    if !asked.listener_path.is_empty() {
        map.insert("listenerPath".into(), json!(asked.listener_path));
        map.insert("listenerMetadata".into(), json!(asked.listener_metadata));
    }
    value
}

/// The limits that are not the planner's.
fn rest_of_resources(spec: &mut Value, asked: &LinuxResources) -> Result<(), Unfit> {
    for (class, field) in [(&asked.blockio_class, "blockio_class"), (&asked.rdt_class, "rdt_class")]
    {
        if class.as_ref().is_some_and(|class| !class.value.is_empty()) {
            return unfit(
                format!("linux.resources.{field}"),
                "this server has no such classes; set the limits themselves",
            );
        }
    }
    if let Some(pids) = &asked.pids {
        object(spec, &["linux", "resources"]).insert("pids".into(), json!({ "limit": pids.limit }));
    }
    let Some(memory) = &asked.memory else { return Ok(()) };
    let into = object(spec, &["linux", "resources", "memory"]);
    if let Some(value) = &memory.reservation {
        into.insert("reservation".into(), json!(value.value));
    }
    if let Some(value) = &memory.swappiness {
        into.insert("swappiness".into(), json!(value.value));
    }
    if let Some(value) = &memory.disable_oom_killer {
        into.insert("disableOOMKiller".into(), json!(value.value));
    }
    if into.is_empty() {
        object(spec, &["linux", "resources"]).remove("memory");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_nri_proto::api::{
        KeyValue, LinuxContainerAdjustment, LinuxMemoryPolicy, OptionalString,
    };

    fn spec() -> Value {
        json!({
            "process": { "args": ["sleep"], "env": ["PATH=/bin", "A=1"], "user": { "uid": 5, "gid": 6 } },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": {
                "resources": {
                    "cpu": { "shares": 100, "cpus": "2-3" },
                    "memory": { "limit": 1024 },
                    "devices": [{ "allow": false, "access": "rwm" }],
                },
                "namespaces": [{ "type": "mount" }],
                "cgroupsPath": "/pod/x",
            },
            "unknown": { "kept": true },
        })
    }

    fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
        ContainerAdjustment { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn a_plugin_sees_the_container_as_it_will_be() {
        let mut container = Container::default();
        describe(&spec(), &mut container);
        assert_eq!(container.args, ["sleep"]);
        assert_eq!(container.env, ["PATH=/bin", "A=1"]);
        assert_eq!(container.user.unwrap().uid, 5);
        let linux = container.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert_eq!(resources.cpu.unwrap().cpus, "2-3");
        assert_eq!(resources.memory.unwrap().limit, Some(OptionalInt64 { value: 1024 }));
        assert_eq!(linux.cgroups_path, "/pod/x");
    }

    #[test]
    fn adjustments_are_laid_over_and_nothing_else_changes() {
        let mut adjusted = spec();
        let pair = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
        let mount = |at: &str| Mount { destination: at.into(), ..Default::default() };
        let asked = ContainerAdjustment {
            env: vec![pair("A", "2"), pair("-PATH", ""), pair("B", "3")],
            mounts: vec![mount("-/proc"), mount("/new")],
            annotations: [("k".to_owned(), "v".to_owned())].into(),
            hooks: Some(Hooks {
                poststop: vec![Hook { path: "/h".into(), ..Default::default() }],
                ..Default::default()
            }),
            linux: Some(LinuxContainerAdjustment {
                devices: vec![LinuxDevice {
                    path: "/dev/x".into(),
                    r#type: "c".into(),
                    major: 10,
                    minor: 200,
                    ..Default::default()
                }],
                oom_score_adj: Some(OptionalInt { value: 7 }),
                memory_policy: Some(LinuxMemoryPolicy {
                    mode: MpolMode::MpolBind.into(),
                    nodes: "1".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        apply(&mut adjusted, &asked).unwrap();
        assert_eq!(adjusted["process"]["env"], json!(["A=2", "B=3"]));
        assert_eq!(adjusted["mounts"].as_array().unwrap().len(), 1);
        assert_eq!(adjusted["annotations"], json!({ "k": "v" }));
        assert_eq!(adjusted["hooks"]["poststop"][0]["path"], "/h");
        assert_eq!(adjusted["linux"]["resources"]["devices"][1]["minor"], 200);
        assert_eq!(adjusted["linux"]["memoryPolicy"]["mode"], "MPOL_BIND");
        assert_eq!(adjusted["process"]["oomScoreAdj"], 7);
        assert_eq!(adjusted["unknown"], spec()["unknown"]);
        assert_eq!(adjusted["linux"]["resources"]["cpu"], spec()["linux"]["resources"]["cpu"]);
        assert!(adjusted["linux"].get("sysctl").is_none());
    }

    #[test]
    fn nothing_asked_is_nothing_changed() {
        let mut adjusted = spec();
        apply(&mut adjusted, &linux(LinuxContainerAdjustment::default())).unwrap();
        assert_eq!(adjusted["process"]["args"], spec()["process"]["args"]);
        assert_eq!(adjusted["linux"]["resources"], spec()["linux"]["resources"]);
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let refused = |asked: &ContainerAdjustment| apply(&mut spec(), asked).unwrap_err().field;
        let device = |path: &str, kind: &str| {
            linux(LinuxContainerAdjustment {
                devices: vec![LinuxDevice {
                    path: path.into(),
                    r#type: kind.into(),
                    ..Default::default()
                }],
                ..Default::default()
            })
        };
        assert_eq!(refused(&device("/etc/x", "c")), "linux.devices");
        assert_eq!(refused(&device("/dev/../etc/x", "c")), "linux.devices");
        assert_eq!(refused(&device("/dev/x", "q")), "linux.devices");
        let hook = Hook { path: "relative".into(), ..Default::default() };
        let hooks = Hooks { prestart: vec![hook], ..Default::default() };
        let asked = ContainerAdjustment { hooks: Some(hooks), ..Default::default() };
        assert_eq!(refused(&asked), "hooks.prestart");
        let reserved = [("dev.pinion.strict".to_owned(), "false".to_owned())].into();
        let asked = ContainerAdjustment { annotations: reserved, ..Default::default() };
        assert!(refused(&asked).starts_with("annotations"));
        let class = LinuxResources {
            rdt_class: Some(OptionalString { value: "gold".into() }),
            ..Default::default()
        };
        let asked =
            linux(LinuxContainerAdjustment { resources: Some(class), ..Default::default() });
        assert_eq!(refused(&asked), "linux.resources.rdt_class");
    }
}
