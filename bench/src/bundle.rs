//! The bundles that runtimes are compared on.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A configuration and the name it is reported under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// What `runc spec` writes: six mounts, six namespaces, no limits.
    Plain,
    /// What kubelet and a CRI server ask for: 20 mounts, masked and read-only paths,
    /// 14 capabilities, a default seccomp profile, limits and device rules.
    Kubernetes,
}

impl Shape {
    pub(crate) const ALL: [Self; 2] = [Self::Plain, Self::Kubernetes];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Kubernetes => "k8s",
        }
    }
}

/// Makes a root file system whose only program is busybox.
pub(crate) fn rootfs(directory: &Path, busybox: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let rootfs = directory.join("rootfs");
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(rootfs.join(name))?;
    }
    let program = rootfs.join("bin/busybox");
    fs::copy(busybox, &program).map_err(|error| format!("{}: {error}", busybox.display()))?;
    for name in ["true", "sleep", "sh"] {
        fs::hard_link(&program, rootfs.join("bin").join(name))?;
    }
    Ok(rootfs)
}

/// Writes the bundle's configuration: `shape`, running `arguments` in `cgroup`.
pub(crate) fn write(
    bundle: &Path,
    rootfs: &Path,
    shape: Shape,
    arguments: &[&str],
    cgroup: &str,
) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(bundle)?;
    let mut config = plain(rootfs, arguments, cgroup);
    if shape == Shape::Kubernetes {
        add_kubernetes(&mut config, bundle)?;
    }
    fs::write(bundle.join("config.json"), config.to_string())?;
    Ok(())
}

fn plain(rootfs: &Path, arguments: &[&str], cgroup: &str) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let namespaces: Vec<Value> = ["pid", "network", "ipc", "uts", "mount", "cgroup"]
        .iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    json!({
        "ociVersion": "1.0.2",
        "hostname": "bench",
        "root": {"path": rootfs, "readonly": true},
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {"bounding": capabilities, "effective": capabilities,
                "permitted": capabilities},
        },
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {"cgroupsPath": cgroup, "namespaces": namespaces},
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

fn add_kubernetes(config: &mut Value, bundle: &Path) -> Result<(), Box<dyn Error>> {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set] = capabilities.clone();
    }
    config["process"]["oomScoreAdj"] = json!(1000);
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.push(mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ));
        // hosts, hostname, resolv.conf and the termination log, then volumes.
        for index in 0..4 {
            let file = bundle.join(format!("file{index}"));
            fs::write(&file, "bench\n")?;
            let target = format!("/tmp/file{index}");
            mounts.push(bind(&target, &file));
        }
        for index in 0..9 {
            let volume = bundle.join(format!("volume{index}"));
            fs::create_dir_all(&volume)?;
            mounts.push(bind(&format!("/tmp/volume{index}"), &volume));
        }
    }
    // Mount points have to exist where the root file system is read-only.
    let rootfs = config["root"]["path"].as_str().unwrap_or_default().to_owned();
    for index in 0..4 {
        fs::write(Path::new(&rootfs).join(format!("tmp/file{index}")), "")?;
    }
    for index in 0..9 {
        fs::create_dir_all(Path::new(&rootfs).join(format!("tmp/volume{index}")))?;
    }
    config["linux"]["maskedPaths"] = json!([
        "/proc/asound",
        "/proc/acpi",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/sys/firmware",
        "/sys/devices/virtual/powercap"
    ]);
    config["linux"]["readonlyPaths"] =
        json!(["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]);
    config["linux"]["resources"] = resources();
    config["linux"]["seccomp"] = seccomp();
    Ok(())
}

fn bind(destination: &str, source: &Path) -> Value {
    json!({"destination": destination, "type": "bind", "source": source,
        "options": ["rbind", "rprivate", "rw"]})
}

fn resources() -> Value {
    let allow = |major: i64, minor: i64| json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
    json!({
        "devices": [{"allow": false, "access": "rwm"}, allow(1, 3), allow(1, 5), allow(1, 7),
            allow(1, 8), allow(1, 9), allow(5, 0), allow(5, 1), allow(5, 2), allow(10, 229)],
        "memory": {"limit": 268_435_456, "swap": 268_435_456},
        "cpu": {"shares": 1024, "quota": 100_000, "period": 100_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 1024},
    })
}

/// What default profiles forbid; everything else is allowed.
const DENIED: &str = "acct add_key bpf clock_adjtime clock_settime create_module delete_module \
    finit_module fsconfig fsmount fsopen fspick get_kernel_syms get_mempolicy init_module \
    io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load \
    keyctl lookup_dcookie mbind mount mount_setattr move_mount move_pages nfsservctl \
    open_by_handle_at open_tree perf_event_open pivot_root process_vm_readv process_vm_writev \
    ptrace query_module quotactl quotactl_fd reboot request_key set_mempolicy setns \
    settimeofday swapoff swapon sysfs _sysctl umount2 unshare uselib userfaultfd ustat vmsplice";

fn seccomp() -> Value {
    let denied: Vec<&str> = DENIED.split_whitespace().collect();
    let allowed: Vec<&str> = (0..512)
        .filter_map(syscalls::x86_64::Sysno::new)
        .map(|call| call.name())
        .filter(|name| !denied.contains(name) && !["clone", "personality"].contains(name))
        .collect();
    let personality = |value: u64| {
        json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
    };
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            personality(0), personality(8), personality(0x20000), personality(0xFFFF_FFFF),
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 2_114_060_288u64, "valueTwo": 0,
                 "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubernetes_bundle_is_as_large_as_it_claims() {
        let directory = tempfile::tempdir().unwrap();
        let rootfs = directory.path().join("rootfs");
        fs::create_dir_all(rootfs.join("tmp")).unwrap();
        let bundle = directory.path().join("bundle");
        write(&bundle, &rootfs, Shape::Kubernetes, &["/bin/true"], "/x").unwrap();
        let text = fs::read_to_string(bundle.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["mounts"].as_array().unwrap().len(), 20);
        assert_eq!(config["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
        assert_eq!(config["linux"]["resources"]["devices"].as_array().unwrap().len(), 10);
        assert!(config["linux"]["seccomp"]["syscalls"][0]["names"].as_array().unwrap().len() > 250);
    }
}
