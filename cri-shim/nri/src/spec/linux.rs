//! The part of an adjustment that is Linux's: devices, namespaces, scheduling, seccomp, and the
//! limits that are not the planner's.

use pinion_nri_proto::api::{
    IoPrioClass, LinuxDevice, LinuxResources, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    LinuxSeccomp, MpolFlag, MpolMode,
};
use serde_json::{Map, Value, json};

use super::edit::{array, drop_if_empty, edit_list, edit_map, object};
use super::{Unfit, unfit};

pub(super) fn apply_linux(
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
