//! Whole specifications compared with stored ones: a change of any rule shows up as a diff.
//!
//! `UPDATE_GOLDEN=1 cargo test -p pinion-spec --test golden` rewrites the files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use oci_spec::image::{Config as ImageConfig, ConfigBuilder};
use oci_spec::runtime::LinuxDeviceType;
use pinion_cri_proto::v1;
use pinion_spec::{
    Accounts, Built, CgroupDriver, DeviceNode, HostFacts, HostPaths, Inputs, MountSource,
    PodNamespaces, PodPaths, Propagation, Settings, build,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What this made-up host may pass on: the default set and two more.
const BOUNDING: [&str; 16] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
];

/// A cgroup v2 host with two hugepage sizes.
fn host() -> HostFacts {
    HostFacts {
        hostname: "node-1".to_owned(),
        cgroup_v2: true,
        bounding: BOUNDING.map(str::to_owned).into(),
        seccomp: true,
        hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
        hugetlb_controller: true,
        swap_accounting: true,
        min_oom_score_adj: -1000,
        recursive_read_only: true,
        ..Default::default()
    }
}

fn pod_paths() -> PodPaths {
    let ns = |kind: &str| Some(format!("/run/pinion/pods/p1/ns/{kind}").into());
    PodPaths {
        namespaces: PodNamespaces {
            net: ns("net"),
            ipc: ns("ipc"),
            uts: ns("uts"),
            ..Default::default()
        },
        hosts: Some("/run/pinion/pods/p1/hosts".into()),
        hostname: Some("/run/pinion/pods/p1/hostname".into()),
        resolv_conf: Some("/run/pinion/pods/p1/resolv.conf".into()),
        shm: Some("/run/pinion/pods/p1/shm".into()),
    }
}

fn sandbox(privileged: bool) -> v1::PodSandboxConfig {
    let options =
        v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "web-0".to_owned(),
            uid: "6f2c".to_owned(),
            namespace: "shop".to_owned(),
            attempt: 0,
        }),
        hostname: "web-0".to_owned(),
        annotations: [("evil.example/run".to_owned(), "yes".to_owned())].into(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/burstable/pod6f2c".to_owned(),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                privileged,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn image() -> ImageConfig {
    let own = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    ConfigBuilder::default()
        .user("web:www")
        .env(own(&["PATH=/usr/bin:/bin", "LANG=C"]))
        .entrypoint(own(&["/srv/web"]))
        .cmd(own(&["--port", "80"]))
        .working_dir("/srv")
        .stop_signal("SIGQUIT")
        .build()
        .unwrap()
}

fn container(security: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
    let options =
        v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "web".to_owned(), attempt: 1 }),
        envs: vec![v1::KeyValue { key: "TIER".to_owned(), value: b"front".to_vec() }],
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(options),
                ..security
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

struct Case {
    container: v1::ContainerConfig,
    sandbox: v1::PodSandboxConfig,
    paths: HostPaths,
    annotations: BTreeMap<String, String>,
    driver: CgroupDriver,
}

impl Case {
    fn new(container: v1::ContainerConfig, privileged: bool) -> Self {
        Self {
            container,
            sandbox: sandbox(privileged),
            paths: HostPaths::default(),
            annotations: BTreeMap::new(),
            driver: CgroupDriver::Cgroupfs,
        }
    }

    fn build(&self) -> Built {
        build(&Inputs {
            container_id: "c1",
            sandbox_id: "p1",
            container: &self.container,
            sandbox: &self.sandbox,
            image: Some(&image()),
            image_name: "registry.example/web:1",
            rootfs: Path::new("/run/pinion/pods/p1/containers/c1/rootfs"),
            pod: &pod_paths(),
            accounts: Accounts {
                passwd: Some(b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/srv:/bin/sh\n"),
                group: Some(b"www:x:1004:\nlog:x:4:web\n"),
            },
            host: &host(),
            paths: &self.paths,
            cgroup_driver: self.driver,
            target_pid_namespace: None,
            localhost_seccomp: None,
            annotations: &self.annotations,
            settings: &Settings::default(),
        })
        .unwrap()
    }
}

/// The specification in a stable form: sets sorted, the long seccomp profile summarised.
fn normal(built: &Built) -> Value {
    let mut spec = serde_json::to_value(&built.spec).unwrap();
    if let Some(sets) = spec.pointer_mut("/process/capabilities").and_then(Value::as_object_mut) {
        for set in sets.values_mut() {
            let names = set.as_array_mut().unwrap();
            names.sort_by_key(|name| name.as_str().unwrap().to_owned());
        }
    }
    if let Some(rules) = spec.pointer_mut("/linux/seccomp/syscalls") {
        let actions = rules.as_array().unwrap().iter().map(|rule| rule["action"].clone());
        *rules = Value::Array(actions.collect());
    }
    spec
}

fn compare(name: &str, built: &Built) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let actual = normal(built);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, serde_json::to_string_pretty(&actual).unwrap() + "\n").unwrap();
    }
    let stored: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(actual, stored, "{name} differs; see `git diff` after UPDATE_GOLDEN=1");
}

#[test]
fn a_plain_pod_container() {
    let mut container = container(v1::LinuxContainerSecurityContext {
        no_new_privs: true,
        seccomp: Some(v1::SecurityProfile::default()),
        masked_paths: vec!["/proc/kcore".to_owned()],
        readonly_paths: vec!["/proc/sys".to_owned()],
        ..Default::default()
    });
    container.mounts = vec![
        v1::Mount {
            container_path: "/etc/hosts".to_owned(),
            host_path: "/var/lib/kubelet/pods/6f2c/etc-hosts".to_owned(),
            ..Default::default()
        },
        v1::Mount {
            container_path: "/srv/data".to_owned(),
            host_path: "/mnt/new".to_owned(),
            readonly: true,
            ..Default::default()
        },
    ];
    container.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        cpu_shares: 102,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: 985,
        ..Default::default()
    });
    let mut case = Case::new(container, false);
    case.paths.mounts.insert(
        "/var/lib/kubelet/pods/6f2c/etc-hosts".to_owned(),
        MountSource::Present(Propagation::Shared),
    );
    case.paths.mounts.insert("/mnt/new".to_owned(), MountSource::Missing);
    let built = case.build();
    assert_eq!(built.missing_sources, [Path::new("/mnt/new")]);
    assert_eq!((built.user.uid, built.user.gid, built.stop_signal), (1000, 1004, 3));
    assert!(built.warnings.is_empty(), "{:?}", built.warnings);
    compare("plain.json", &built);
}

#[test]
fn a_privileged_container() {
    let mut container = container(v1::LinuxContainerSecurityContext {
        privileged: true,
        seccomp: Some(v1::SecurityProfile::default()),
        masked_paths: vec!["/proc/kcore".to_owned()],
        run_as_user: Some(v1::Int64Value { value: 0 }),
        ..Default::default()
    });
    container.tty = true;
    let mut case = Case::new(container, true);
    case.driver = CgroupDriver::Systemd;
    case.sandbox.linux.as_mut().unwrap().cgroup_parent =
        "/kubepods.slice/kubepods-pod6f2c.slice".to_owned();
    case.paths.all_devices = vec![DeviceNode {
        path: "/dev/kvm".into(),
        kind: LinuxDeviceType::C,
        major: 10,
        minor: 232,
        mode: 0o660,
        uid: 0,
        gid: 104,
    }];
    let built = case.build();
    assert_eq!(built.warnings.len(), 1, "says what the host cannot pass on");
    compare("privileged.json", &built);
}

#[test]
fn a_container_with_exclusive_cpus_and_hugepages() {
    let mut container = container(v1::LinuxContainerSecurityContext::default());
    container.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        cpu_shares: 2048,
        cpu_quota: 200_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 1 << 30,
        oom_score_adj: -997,
        cpuset_cpus: "4-5".to_owned(),
        cpuset_mems: "1".to_owned(),
        hugepage_limits: vec![
            v1::HugepageLimit { page_size: "2MB".to_owned(), limit: 128 << 20 },
            v1::HugepageLimit { page_size: "1GB".to_owned(), limit: 0 },
        ],
        ..Default::default()
    });
    let mut case = Case::new(container, false);
    case.annotations.insert("dev.pinion.cpuset.partition".to_owned(), "isolated".to_owned());
    case.annotations.insert("dev.pinion.hugepages.prefault".to_owned(), "1/2MB=64".to_owned());
    let built = case.build();
    compare("hugepages.json", &built);
}
