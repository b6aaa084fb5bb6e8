//! What plugins are told of a container: its OCI configuration as NRI messages.

use std::collections::BTreeMap;

use pinion_nri_proto::api::{
    Container, Hook, Hooks, HugepageLimit, LinuxContainer, LinuxCpu, LinuxDevice, LinuxMemory,
    LinuxNamespace, LinuxPids, LinuxResources, Mount, OptionalFileMode, OptionalInt, OptionalInt64,
    OptionalUInt32, OptionalUInt64, PosixRlimit, User,
};
use serde_json::Value;

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
