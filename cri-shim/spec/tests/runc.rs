//! A built specification run by runc: the runtime everyone knows must accept it and the
//! process must find itself as asked. Root only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use pinion_cri_proto::v1;
use pinion_network::namespaces::{self, Kind, Setup};
use pinion_spec::{
    Accounts, CgroupDriver, HostFacts, HostPaths, Inputs, PodNamespaces, PodPaths, Settings, build,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nlog:x:4:web\n";

/// A bundle directory with a busybox root filesystem and a pod's namespaces and files.
struct Bundle {
    dir: tempfile::TempDir,
    id: String,
}

impl Bundle {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Self { dir, id: format!("pinion-spec-{name}-{}", std::process::id()) };
        let rootfs = bundle.path("rootfs");
        for sub in ["bin", "etc", "proc", "sys", "dev", "tmp", "data"] {
            std::fs::create_dir_all(rootfs.join(sub)).unwrap();
        }
        std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in
            ["sh", "id", "cat", "grep", "env", "hostname", "touch", "mkdir", "chmod", "ls"]
        {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        std::fs::write(rootfs.join("etc/passwd"), PASSWD).unwrap();
        std::fs::write(rootfs.join("etc/group"), GROUP).unwrap();
        for (name, text) in [("hosts", "127.0.0.1 pod"), ("hostname", "pod-x"), ("resolv", "x")] {
            std::fs::write(bundle.path(name), text).unwrap();
        }
        std::fs::create_dir(bundle.path("shm")).unwrap();
        let setup = Setup { hostname: Some("pod-x".to_owned()), sysctls: Vec::new() };
        namespaces::create(&Kind::ALL, &bundle.path("ns"), &setup).unwrap();
        bundle
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pod(&self) -> PodPaths {
        let ns = |kind: &str| Some(self.path("ns").join(kind));
        PodPaths {
            namespaces: PodNamespaces {
                net: ns("net"),
                ipc: ns("ipc"),
                uts: ns("uts"),
                ..Default::default()
            },
            hosts: Some(self.path("hosts")),
            hostname: Some(self.path("hostname")),
            resolv_conf: Some(self.path("resolv")),
            shm: Some(self.path("shm")),
        }
    }

    /// Builds the specification, runs it, returns what the container printed.
    fn run(&self, script: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> String {
        let options =
            v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
        let security = v1::LinuxContainerSecurityContext {
            namespace_options: Some(options.clone()),
            ..Default::default()
        };
        let mut container = v1::ContainerConfig {
            command: ["sh", "-c", script].map(str::to_owned).into(),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut container);
        let privileged =
            container.linux.as_ref().unwrap().security_context.as_ref().unwrap().privileged;
        let sandbox = v1::PodSandboxConfig {
            hostname: "pod-x".to_owned(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.id),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    privileged,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let built = build(&Inputs {
            container_id: &self.id,
            sandbox_id: "p1",
            container: &container,
            sandbox: &sandbox,
            image: None,
            image_name: "test",
            rootfs: &self.path("rootfs"),
            pod: &self.pod(),
            accounts: Accounts { passwd: Some(PASSWD.as_bytes()), group: Some(GROUP.as_bytes()) },
            host: &HostFacts::read(v2, false, false),
            paths: &HostPaths::inspect(&container).unwrap(),
            cgroup_driver: CgroupDriver::Cgroupfs,
            target_pid_namespace: None,
            localhost_seccomp: None,
            annotations: &BTreeMap::new(),
            settings: &Settings::default(),
        })
        .unwrap();
        built.spec.save(self.path("config.json")).unwrap();
        let output = Command::new("runc")
            .arg("--root")
            .arg(self.path("runc"))
            .args(["run", "--bundle"])
            .arg(self.dir.path())
            .arg(&self.id)
            .stdin(Stdio::null())
            .output()
            .expect("these tests need runc: apt-get install runc");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "runc: {errors}\nprinted: {text}");
        text
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = namespaces::remove(&self.path("ns"));
        // runc removes the container's cgroups, not the pod's.
        for controller in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = std::fs::remove_dir(controller.path().join(&self.id));
        }
        let _ = std::fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.id));
    }
}

fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

#[test]
fn a_confined_user_process_is_what_was_asked_for() {
    let bundle = Bundle::new("user");
    let script = "id; pwd; hostname; echo $HOSTNAME $TIER; cat /etc/hosts; \
        grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status; \
        touch /x 2>&1; ls /proc/acpi /sys/firmware; ls /dev/shm; cat /proc/1/cmdline";
    let text = bundle.run(script, |config| {
        config.working_dir = "/tmp".to_owned();
        config.envs = vec![v1::KeyValue { key: "TIER".into(), value: b"front".into() }];
        let security = security(config);
        security.run_as_username = "web".to_owned();
        security.supplemental_groups = vec![1234];
        security.no_new_privs = true;
        security.readonly_rootfs = true;
        security.seccomp = Some(v1::SecurityProfile::default());
    });
    assert!(text.contains("uid=1000(web) gid=1001 groups=4(log),1001,1234"), "{text}");
    assert!(text.contains("\n/tmp\npod-x\npod-x front\n127.0.0.1 pod"), "{text}");
    assert!(text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2"), "{text}");
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
    assert!(text.contains("Read-only file system"), "{text}");
}

#[test]
fn capabilities_and_the_default_profile_work_together() {
    let bundle = Bundle::new("caps");
    let text = bundle.run("grep Cap /proc/self/status; hostname other && hostname", |config| {
        let security = security(config);
        security.seccomp = Some(v1::SecurityProfile::default());
        security.capabilities = Some(v1::Capability {
            add_capabilities: vec!["SYS_ADMIN".to_owned()],
            drop_capabilities: vec!["ALL".to_owned()],
            ..Default::default()
        });
    });
    assert!(text.contains("CapBnd:\t0000000000200000"), "{text}");
    assert!(text.contains("CapInh:\t0000000000000000"), "{text}");
    assert!(text.ends_with("other\n"), "the profile lets SYS_ADMIN set the name: {text}");
}

#[test]
fn a_privileged_container_has_what_the_host_has() {
    let bundle = Bundle::new("priv");
    let text = bundle.run(
        "grep CapBnd /proc/self/status; ls /dev; grep ' /sys ' /proc/mounts",
        |config| {
            security(config).privileged = true;
        },
    );
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let bounding = own.lines().find(|line| line.starts_with("CapBnd")).unwrap();
    assert!(text.contains(bounding), "{text}");
    assert!(text.contains("sysfs /sys sysfs rw"), "{text}");
}

#[test]
fn mounts_and_devices_arrive_with_their_options() {
    let bundle = Bundle::new("mounts");
    let data = bundle.path("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "content").unwrap();
    let script = "cat /data/file; touch /data/new 2>&1; grep ' /data ' /proc/mounts; \
        ls /dev/mine; cat /dev/mine; cat /etc/resolv.conf";
    let text = bundle.run(script, |config| {
        config.mounts = vec![v1::Mount {
            container_path: "/data".to_owned(),
            host_path: data.to_str().unwrap().to_owned(),
            readonly: true,
            mount_options: vec!["noexec".to_owned(), "nodev".to_owned()],
            ..Default::default()
        }];
        config.devices = vec![v1::Device {
            container_path: "/dev/mine".to_owned(),
            host_path: "/dev/null".to_owned(),
            permissions: "r".to_owned(),
        }];
    });
    assert!(text.contains("content") && text.contains("Read-only file system"), "{text}");
    let mount = text.lines().find(|line| line.contains(" /data ")).unwrap();
    assert!(
        mount.contains("ro,") && mount.contains("noexec") && mount.contains("nodev"),
        "{mount}"
    );
    assert!(text.contains("/dev/mine"), "{text}");
}
