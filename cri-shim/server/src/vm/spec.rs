//! A container's configuration as the runtime in the guest gets it.
//!
//! What the host's runtime would do by namespaces of the pod, the guest is: its network, name
//! and IPC objects are the pod's. What names things of the host (CPU numbers, devices, cgroup
//! paths, mounts) is translated, left out, or refused.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType as Namespace, Mount, Spec};
use pinion_monitor_proto::message::Share;
use pinion_spec::{PodNamespaces, PodPaths};
use serde_json::Value;

use crate::error::{Context, Error, Kind, Result};

/// Files of the pod in the guest.
const POD: &str = "/run/pinion/pod";

/// What a pod lends to its containers in the guest. The namespaces are named so that the
/// configuration is decided as for any other pod, and left out by [`adapt`].
pub(crate) fn lend() -> PodPaths {
    let inside = |name: &str| Some(Path::new(POD).join(name));
    PodPaths {
        namespaces: PodNamespaces {
            net: inside("net"),
            ipc: inside("ipc"),
            uts: inside("uts"),
            pid: inside("pid"),
            user: None,
        },
        hosts: inside("hosts"),
        hostname: inside("hostname"),
        resolv_conf: inside("resolv.conf"),
        shm: inside("shm"),
    }
}

/// What is shared with the guest, in the guest.
const SHARE: &str = "/run/pinion/share";

/// [`adapt`] for a configuration as JSON, with a look at what it shares. Blocks.
pub(crate) fn adapt_config(config: Value, id: &str) -> Result<(Value, Vec<Share>)> {
    let what = || format!("adapt the configuration of {id}");
    let (spec, shares) = adapt(serde_json::from_value(config).context(what)?, id)?;
    for share in &shares {
        check_source(share)?;
    }
    Ok((serde_json::to_value(spec).context(what)?, shares))
}

/// Refuses what a guest cannot use of the host's files.
#[allow(clippy::unnecessary_cast, reason = "the field's type differs between C libraries")]
fn check_source(share: &Share) -> Result<()> {
    const HUGETLBFS: i64 = 0x9584_58f6; // HUGETLBFS_MAGIC, statfs(2)
    let source = &share.source;
    let found = rustix::fs::statfs(source.as_str()).context(|| format!("statfs {source}"))?;
    if found.f_type as i64 == HUGETLBFS {
        let why = format!(
            "{source}: hugepages of the host are not those of a guest; a guest's own cannot be \
             mounted yet"
        );
        return Err(refused("mounts", &why));
    }
    Ok(())
}

/// Turns a configuration for the host into one for the guest, and says what of the host's
/// files it needs. Pure.
fn adapt(mut spec: Spec, id: &str) -> Result<(Spec, Vec<Share>)> {
    let mut shares = Vec::new();
    if let Some(root) = spec.root_mut() {
        root.set_path(PathBuf::from("rootfs"));
    }
    if let Some(mounts) = spec.mounts_mut() {
        for mount in mounts {
            shares.extend(share(mount, id, shares.len())?);
        }
    }
    spec.set_annotations(None);
    let Some(linux) = spec.linux_mut() else { return Ok((spec, shares)) };
    linux.set_rootfs_propagation(None);
    linux.set_cgroups_path(Some(format!("/pinion/{id}").into()));
    // AppArmor and memory policy are the host's; a mount label needs SELinux in the guest.
    linux.set_mount_label(None);
    let own =
        |kind: Namespace| !matches!(kind, Namespace::Network | Namespace::Uts | Namespace::Ipc);
    if let Some(namespaces) = linux.namespaces_mut() {
        namespaces.retain(|namespace| own(namespace.typ()));
        // A PID namespace by path is the pod's shared one: in the guest, the guest's own.
        namespaces.retain(|ns| ns.typ() != Namespace::Pid || ns.path().is_none());
        if !namespaces.iter().any(|ns| ns.typ() == Namespace::Cgroup) {
            namespaces.push(cgroup_namespace()?);
        }
    }
    if linux.devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(refused("devices", "a device of the host is not in the guest"));
    }
    if let Some(resources) = linux.resources_mut() {
        if let Some(limits) = resources.hugepage_limits()
            && limits.iter().any(|limit| limit.limit() > 0)
        {
            return Err(refused("linux.resources.hugepage_limits", "no hugepages in guests yet"));
        }
        resources.set_hugepage_limits(None);
        // Numbers of the host's processors and nodes; the guest has others.
        if let Some(cpu) = resources.cpu_mut() {
            cpu.set_cpus(None);
            cpu.set_mems(None);
        }
    }
    if let Some(process) = spec.process_mut() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
    }
    Ok((spec, shares))
}

fn cgroup_namespace() -> Result<oci_spec::runtime::LinuxNamespace> {
    oci_spec::runtime::LinuxNamespaceBuilder::default()
        .typ(Namespace::Cgroup)
        .build()
        .map_err(|error| Error::internal("build a namespace").caused_by(error))
}

/// Binds of the pod's own files are in the guest; others come from the host.
fn share(mount: &mut Mount, id: &str, number: usize) -> Result<Option<Share>> {
    let options = mount.options().as_deref().unwrap_or_default();
    let has = |names: &[&str]| options.iter().any(|option| names.contains(&option.as_str()));
    let source = mount.source().clone().unwrap_or_default();
    if !has(&["bind", "rbind"]) || source.starts_with(POD) {
        return Ok(None);
    }
    let at = mount.destination().display();
    let from = source.display();
    if has(&["shared", "rshared", "slave", "rslave"]) {
        let why = format!(
            "{from} at {at}: mounts do not propagate between a guest and the host; ask for \
             propagation None"
        );
        return Err(refused("mounts", &why));
    }
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(refused("mounts", &format!("{from} at {at}: no id mappings in a guest")));
    }
    let share = Share {
        name: format!("{id}-{number}"),
        source: source.to_string_lossy().into_owned(),
        read_only: has(&["ro", "rro"]),
    };
    mount.set_source(Some(Path::new(SHARE).join(&share.name)));
    Ok(Some(share))
}

fn refused(field: &str, why: &str) -> Error {
    Error::new(Kind::Precondition, format!("handler pinion-vm: {field}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(extra: serde_json::Value) -> Spec {
        let mut value = json!({
            "ociVersion": "1.2.0",
            "root": { "path": "/run/pods/p/containers/c/rootfs" },
            "annotations": { "dev.pinion.partition": "isolated" },
            "process": { "args": ["x"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
                         "apparmorProfile": "p" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/etc/hosts", "type": "bind",
                  "source": "/run/pinion/pod/hosts", "options": ["rbind", "rw"] },
            ],
            "linux": {
                "cgroupsPath": "kubepods.slice:pinion:c",
                "namespaces": [
                    { "type": "mount" }, { "type": "pid" },
                    { "type": "network", "path": "/run/pinion/pod/net" },
                    { "type": "uts", "path": "/run/pinion/pod/uts" },
                    { "type": "ipc", "path": "/run/pinion/pod/ipc" },
                ],
                "resources": { "cpu": { "cpus": "6-7", "mems": "1", "shares": 512 } },
            },
        });
        if let (Some(into), serde_json::Value::Object(from)) = (value.as_object_mut(), extra) {
            into.extend(from);
        }
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn nothing_of_the_host_is_left_in_it() {
        let (adapted, shares) = adapt(spec(json!({})), "c1").unwrap();
        assert!(shares.is_empty(), "{shares:?}");
        let text = serde_json::to_string(&adapted).unwrap();
        for word in
            ["kubepods", "network", "uts", "6-7", "dev.pinion", "apparmorProfile", "/run/pods"]
        {
            assert!(!text.contains(word), "{word}: {text}");
        }
        assert!(text.contains("\"cgroupsPath\":\"/pinion/c1\""), "{text}");
        assert!(text.contains("\"shares\":512"), "{text}");
    }

    #[test]
    fn a_shared_pid_namespace_is_the_guests() {
        let linux = json!({ "linux": { "namespaces": [
            { "type": "mount" }, { "type": "pid", "path": "/run/pinion/pod/pid" }] } });
        let (adapted, _) = adapt(spec(linux), "c").unwrap();
        let namespaces = adapted.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        assert!(namespaces.iter().all(|ns| ns.typ() != Namespace::Pid));
    }

    fn mounting(options: &[&str]) -> Result<(Spec, Vec<Share>)> {
        let mounts = json!({ "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/data", "type": "bind", "source": "/srv/data", "options": options },
            { "destination": "/etc/hosts", "type": "bind", "source": "/run/pinion/pod/hosts",
              "options": ["rbind"] },
            { "destination": "/log", "type": "bind", "source": "/srv/log", "options": ["bind"] },
        ] });
        adapt(spec(mounts), "c")
    }

    #[test]
    fn volumes_are_shared_by_names_of_their_own() {
        let (spec, shares) = mounting(&["rbind", "rprivate", "ro"]).unwrap();
        let share = |name: &str, source: &str, read_only| Share {
            name: name.into(),
            source: source.into(),
            read_only,
        };
        assert_eq!(shares, [share("c-0", "/srv/data", true), share("c-1", "/srv/log", false)]);
        let sources: Vec<_> = spec.mounts().iter().flatten().map(|m| m.source().clone()).collect();
        assert_eq!(sources[1].as_deref(), Some(Path::new("/run/pinion/share/c-0")));
        assert_eq!(sources[2].as_deref(), Some(Path::new("/run/pinion/pod/hosts")));
    }

    #[test]
    fn propagation_is_refused_by_name() {
        for option in ["rslave", "rshared", "shared", "slave"] {
            let text = mounting(&["rbind", option]).unwrap_err().to_string();
            assert!(text.contains("/srv/data at /data") && text.contains("propagate"), "{text}");
        }
    }

    #[test]
    fn hugepages_are_refused_by_name() {
        let limits = json!({ "linux": { "resources": { "hugepageLimits": [
            { "pageSize": "2MB", "limit": 2_097_152 }] } } });
        assert!(adapt(spec(limits), "c").is_err());
    }
}
