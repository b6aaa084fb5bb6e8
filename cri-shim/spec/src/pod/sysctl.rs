//! The pod's sysctls, sorted by the namespace that owns them.
//!
//! Only keys the kernel keeps per namespace are accepted, and only when the pod has that
//! namespace to itself. Names and values stay separate to the end: nothing is ever joined
//! into a list that a value could extend (CVE-2022-0811).

use crate::error::SpecError;
use pinion_cri_proto::v1::{NamespaceMode, PodSandboxConfig};
use std::path::PathBuf;

const FIELD: &str = "linux.sysctls";

/// Keys of the IPC namespace (ipc_namespaces(7), mq_overview(7)).
const IPC: [&str; 9] = [
    "kernel/auto_msgmni",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shm_rmid_forced",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
];

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below `/proc/sys`: `net/ipv4/ip_forward`.
    pub path: PathBuf,
    /// What to write.
    pub value: String,
}

/// Settings by namespace, ordered by path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sysctls {
    /// To be written in the pod's network namespace.
    pub net: Vec<Sysctl>,
    /// To be written in the pod's IPC namespace.
    pub ipc: Vec<Sysctl>,
}

/// Checks and sorts `PodSandboxConfig.linux.sysctls`.
pub fn sysctls(pod: &PodSandboxConfig) -> Result<Sysctls, SpecError> {
    let Some(linux) = &pod.linux else { return Ok(Sysctls::default()) };
    let options = linux.security_context.as_ref().and_then(|sc| sc.namespace_options.as_ref());
    let host = |mode: Option<i32>| mode == Some(NamespaceMode::Node.into());
    let mut sorted = Sysctls::default();
    for (name, value) in &linux.sysctls {
        let field = || format!("{FIELD}[{name:?}]");
        let path = path(name).ok_or_else(|| SpecError::invalid(field(), "no sysctl name"))?;
        let odd = |c: char| !(c.is_ascii_alphanumeric() || " \t,.:_-".contains(c));
        if value.is_empty() || value.len() > 1024 || value.contains(odd) {
            let start: String = value.chars().take(64).collect();
            return Err(SpecError::invalid(field(), format!("{start:?} is no sysctl value")));
        }
        let (list, shared) = if path.starts_with("net/") {
            (&mut sorted.net, host(options.map(|o| o.network)).then_some("network"))
        } else if IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
            (&mut sorted.ipc, host(options.map(|o| o.ipc)).then_some("IPC"))
        } else {
            return Err(SpecError::invalid(field(), "not kept per network or IPC namespace"));
        };
        if let Some(what) = shared {
            let reason = format!("this pod shares the host's {what} namespace");
            return Err(SpecError::invalid(field(), reason));
        }
        list.push(Sysctl { path: path.into(), value: value.clone() });
    }
    for list in [&mut sorted.net, &mut sorted.ipc] {
        list.sort_by(|a, b| a.path.cmp(&b.path));
        if let Some(twice) = list.windows(2).find(|pair| pair[0].path == pair[1].path) {
            let reason = format!("{} is set twice", twice[0].path.display());
            return Err(SpecError::invalid(FIELD, reason));
        }
    }
    Ok(sorted)
}

/// sysctl.d(5): the first separator met is the separator; the other one then stands for a dot
/// inside a component (`net.ipv4.conf.eth0/100.forwarding` = `net/ipv4/conf/eth0.100/forwarding`).
fn path(name: &str) -> Option<String> {
    let separator = name.find(['.', '/']).and_then(|at| name[at..].chars().next())?;
    let parts: Vec<String> = name
        .split(separator)
        .map(|part| if separator == '.' { part.replace('/', ".") } else { part.to_owned() })
        .collect();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let good = |part: &String| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(plain)
            && !part.contains("..")
    };
    (parts.len() > 1 && name.len() <= 253 && parts.iter().all(good)).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::{
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    };

    fn pod(list: &[(&str, &str)], network: NamespaceMode, ipc: NamespaceMode) -> PodSandboxConfig {
        let options =
            NamespaceOption { network: network.into(), ipc: ipc.into(), ..Default::default() };
        let security =
            LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                sysctls: list.iter().map(own).collect(),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn sorted(list: &[(&str, &str)]) -> Result<Sysctls, SpecError> {
        sysctls(&pod(list, NamespaceMode::Pod, NamespaceMode::Pod))
    }

    #[test]
    fn keys_go_to_their_namespace_in_either_spelling() {
        let found = sorted(&[
            ("kernel.shm_rmid_forced", "1"),
            ("net.ipv4.ip_local_port_range", "1024 65000"),
            ("net/ipv4/conf/eth0.100/forwarding", "1"),
            ("fs.mqueue.msg_max", "20"),
        ])
        .unwrap();
        let paths =
            |list: &[Sysctl]| list.iter().map(|s| s.path.display().to_string()).collect::<Vec<_>>();
        let net = ["net/ipv4/conf/eth0.100/forwarding", "net/ipv4/ip_local_port_range"];
        assert_eq!(paths(&found.net), net);
        assert_eq!(paths(&found.ipc), ["fs/mqueue/msg_max", "kernel/shm_rmid_forced"]);
        let swapped = sorted(&[("net.ipv4.conf.eth0/100.forwarding", "1")]).unwrap();
        assert_eq!(paths(&swapped.net), ["net/ipv4/conf/eth0.100/forwarding"]);
    }

    #[test]
    fn keys_of_the_host_and_detours_are_refused() {
        for name in [
            "kernel.core_pattern",
            "vm.swappiness",
            "net/../kernel/core_pattern",
            "net..x",
            "kernel.hostname",
            "net",
            "",
            "net.",
            "/net/x",
            "net.ipv4/../..",
            "net.a b",
            "fs.mqueue",
        ] {
            let error = sorted(&[(name, "1")]).unwrap_err();
            assert!(error.field.starts_with("linux.sysctls"), "{name:?}: {error}");
        }
    }

    #[test]
    fn values_cannot_carry_a_second_key() {
        for value in ["1+kernel.core_pattern=|/x", "1\nkernel.x", "a=b", "1;2", "", "\0"] {
            assert!(sorted(&[("net.ipv4.ip_forward", value)]).is_err(), "{value:?}");
        }
    }

    #[test]
    fn the_same_key_in_two_spellings_is_refused() {
        let list = [("net.ipv4.ip_forward", "1"), ("net/ipv4/ip_forward", "0")];
        assert!(sorted(&list).unwrap_err().reason.contains("twice"));
    }

    #[test]
    fn host_namespaces_take_no_sysctls() {
        let net = [("net.core.somaxconn", "1")];
        assert!(sysctls(&pod(&net, NamespaceMode::Node, NamespaceMode::Pod)).is_err());
        let ipc = [("kernel.shmmax", "1")];
        assert!(sysctls(&pod(&ipc, NamespaceMode::Pod, NamespaceMode::Node)).is_err());
        assert!(sysctls(&pod(&ipc, NamespaceMode::Node, NamespaceMode::Pod)).is_ok());
    }
}
