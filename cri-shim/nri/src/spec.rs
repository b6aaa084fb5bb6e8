//! Between OCI configurations (as JSON, so that nothing in one is lost) and NRI messages. Pure.

mod describe;
mod edit;
mod linux;

use pinion_nri_proto::api::{ContainerAdjustment, Hooks, Mount};
use serde_json::{Value, json};

pub use describe::{describe, resources};
use edit::{array, edit_list, edit_map, object};
use linux::apply_linux;

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

#[cfg(test)]
mod tests;
