//! Static pods: manifests of each QoS class, and the directory kubelet reads them from.
//!
//! | pod | class | shows |
//! |---|---|---|
//! | `strict` | Guaranteed | exclusive whole-core CPUs, hugepages and a hugepage volume, all or nothing by annotation |
//! | `plain` | Guaranteed | the same CPUs without any annotation: the server has to see it itself |
//! | `web` | Burstable | init, sidecar, volumes, every kind of probe; resized in place |
//! | `flaky` | BestEffort | containers that exit, and that fail their liveness probe |
//! | `chatty` | BestEffort | logs past rotation |
//!
//! Each carries its own uid, so that a changed manifest is a change of the same pod, as it
//! would come from an API server, unless the uid changes with it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{During, Result};
use crate::image::catalogue::WORKLOAD;

/// 2 MiB pages the strict pod maps.
pub(super) const MAPPED: u64 = 16;
/// 2 MiB pages it allocates to a file of its volume.
pub(super) const IN_FILE: u64 = 8;
/// 2 MiB pages it may have.
const LIMIT: u64 = 32;
/// Lines the chatty container writes: enough for some rotations, few enough to keep all.
pub(super) const LINES: u32 = 3000;

/// The strict pod's command line, by which its process is found.
pub(super) fn strict_command() -> String {
    format!("pinion-workload hugepages 2M {MAPPED} file /hugepages/ring {IN_FILE} hold")
}

/// Writes a manifest as a whole: kubelet must never read half of one.
pub(super) fn place(dir: &Path, pod: &Value) -> Result<()> {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    // kubelet ignores names that begin with a dot
    let draft = dir.join(format!(".{name}"));
    let path = dir.join(format!("{name}.json"));
    fs::write(&draft, pod.to_string()).during(|| format!("write {}", draft.display()))?;
    fs::rename(&draft, &path).during(|| format!("rename to {}", path.display()))
}

/// Takes a manifest away; whether it was there.
pub(super) fn withdraw(dir: &Path, name: &str) -> Result<()> {
    let path = dir.join(format!("{name}.json"));
    fs::remove_file(&path).during(|| format!("remove {}", path.display()))
}

/// Takes all manifests away.
pub(super) fn withdraw_all(dir: &Path) -> Result<()> {
    let listing = fs::read_dir(dir).during(|| format!("list {}", dir.display()))?;
    for entry in listing.flatten() {
        let path = entry.path();
        fs::remove_file(&path).during(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// A pod of these containers.
pub(super) fn pod(name: &str, containers: &[Value]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "uid": format!("{name}-0"), "annotations": {} },
        "spec": { "terminationGracePeriodSeconds": 2, "containers": containers },
    })
}

/// A container that runs a command of the workload image.
pub(super) fn container(name: &str, command: &[&str]) -> Value {
    json!({
        "name": name, "image": WORKLOAD, "imagePullPolicy": "IfNotPresent", "command": command,
    })
}

/// A container that runs a shell script.
fn script(name: &str, text: &str) -> Value {
    container(name, &["sh", "-c", text])
}

/// Requests and limits of the same size: with only such containers a pod is Guaranteed.
pub(super) fn guaranteed(mut container: Value, cpus: &str) -> Value {
    let amount = json!({ "cpu": cpus, "memory": "64Mi" });
    container["resources"] = json!({ "requests": amount, "limits": amount });
    container
}

/// Two exclusive CPUs, hugepages and a volume of them; all of it or no start.
pub(super) fn strict() -> Value {
    let command = strict_command();
    let words: Vec<&str> = command.split(' ').collect();
    let mut main = guaranteed(container("main", &words), "2");
    let limit = json!(format!("{}Mi", 2 * LIMIT));
    main["resources"]["requests"]["hugepages-2Mi"] = limit.clone();
    main["resources"]["limits"]["hugepages-2Mi"] = limit;
    main["volumeMounts"] = json!([{ "name": "pages", "mountPath": "/hugepages" }]);
    let mut pod = pod("strict", &[main]);
    pod["metadata"]["annotations"]["isolation.pinion.dev/strict"] = json!("true");
    pod["spec"]["volumes"] =
        json!([{ "name": "pages", "emptyDir": { "medium": "HugePages-2Mi" } }]);
    pod
}

/// Two exclusive CPUs, and not a word about it.
pub(super) fn plain() -> Value {
    pod("plain", &[guaranteed(container("main", &["pinion-workload", "wait", "plain"]), "2")])
}

/// A server with an init container, a sidecar, two volumes and every kind of probe.
pub(super) fn web() -> Value {
    let mut first = script("first", "echo prepared >/shared/first");
    let mut sidecar = script(
        "sidecar",
        "test -f /shared/first || exit 3; echo ready >/shared/sidecar; exec pinion-workload wait sidecar",
    );
    let mut main = script(
        "main",
        "test -f /shared/sidecar || exit 4; exec pinion-workload serve 8080 8081 8082",
    );
    let shared = json!([
        { "name": "shared", "mountPath": "/shared" },
        { "name": "memory", "mountPath": "/memory" },
    ]);
    for container in [&mut first, &mut sidecar, &mut main] {
        container["volumeMounts"] = shared.clone();
    }
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] =
        probe("exec", &json!({ "command": ["test", "-f", "/shared/sidecar"] }));
    main["startupProbe"] = probe("tcpSocket", &json!({ "port": 8081 }));
    main["readinessProbe"] = probe("httpGet", &json!({ "port": 8080, "path": "/ready" }));
    main["livenessProbe"] = probe("grpc", &json!({ "port": 8082 }));
    main["resources"] = json!({
        "requests": { "cpu": "200m", "memory": "32Mi" },
        "limits": { "cpu": "1", "memory": "64Mi" },
    });
    let mut pod = pod("web", &[main]);
    pod["spec"]["initContainers"] = json!([first, sidecar]);
    pod["spec"]["volumes"] = json!([
        { "name": "shared", "emptyDir": {} },
        { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } },
    ]);
    pod
}

/// One container ends once with 7, one fails its liveness probe once.
pub(super) fn flaky() -> Value {
    let mut exits = script(
        "exits",
        "test -f /kept/once && exec pinion-workload wait exits; touch /kept/once; exit 7",
    );
    let mut sick = script(
        "sick",
        "touch /tmp/well; test -f /kept/sick && exec pinion-workload wait sick; \
         touch /kept/sick; sleep 6; rm /tmp/well; sleep 600",
    );
    let kept = json!([{ "name": "kept", "mountPath": "/kept" }]);
    exits["volumeMounts"] = kept.clone();
    sick["volumeMounts"] = kept;
    sick["livenessProbe"] = probe("exec", &json!({ "command": ["test", "-f", "/tmp/well"] }));
    sick["livenessProbe"]["initialDelaySeconds"] = json!(3);
    let mut pod = pod("flaky", &[exits, sick]);
    pod["spec"]["volumes"] = json!([{ "name": "kept", "emptyDir": {} }]);
    pod
}

/// Writes more than a log file may hold.
pub(super) fn chatty() -> Value {
    pod("chatty", &[container("main", &["pinion-workload", "count", &LINES.to_string()])])
}

fn probe(kind: &str, action: &Value) -> Value {
    // an exec in an emulated machine takes longer than the second kubelet gives it
    json!({ kind: action, "periodSeconds": 2, "timeoutSeconds": 10, "failureThreshold": 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_appears_as_a_whole_and_under_its_pod_s_name() {
        let dir = tempfile::tempdir().unwrap();
        place(dir.path(), &plain()).unwrap();
        place(dir.path(), &web()).unwrap();
        let text = fs::read_to_string(dir.path().join("plain.json")).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), plain());
        withdraw(dir.path(), "plain").unwrap();
        withdraw_all(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn guaranteed_pods_ask_for_exactly_what_they_are_limited_to() {
        for pod in [strict(), plain()] {
            let resources = &pod["spec"]["containers"][0]["resources"];
            assert_eq!(resources["requests"], resources["limits"]);
        }
    }
}
