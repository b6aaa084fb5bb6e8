//! The annotations a container's `config.json` carries.
//!
//! The `io.kubernetes.cri.*` names are those containerd sets, because hooks, NRI plugins and
//! VM runtimes read them. Annotations of the pod or the image are never copied: they come from
//! users, and a runtime acts on what it finds here (CVE-2024-3154, CVE-2026-53488).

use crate::inputs::Inputs;
use std::collections::HashMap;

const PREFIX: &str = "io.kubernetes.cri";

/// All annotations of a container.
pub(crate) fn annotations(inputs: &Inputs<'_>) -> HashMap<String, String> {
    let pod = inputs.sandbox.metadata.clone().unwrap_or_default();
    let container = inputs.container.metadata.clone().unwrap_or_default();
    let mut all: HashMap<_, _> =
        inputs.annotations.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    let standard = [
        ("container-type", "container"),
        ("sandbox-id", inputs.sandbox_id),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
        ("container-name", &container.name),
        ("image-name", inputs.image_name),
    ];
    let own = |(key, value): (&str, &str)| (format!("{PREFIX}.{key}"), value.to_owned());
    all.extend(standard.map(own));
    all
}

/// Annotations of the pod's init container ([`crate::pod::init_spec`]).
pub(crate) fn sandbox_annotations(sandbox_id: &str) -> HashMap<String, String> {
    [("container-type", "sandbox"), ("sandbox-id", sandbox_id)]
        .map(|(key, value)| (format!("{PREFIX}.{key}"), value.to_owned()))
        .into()
}
