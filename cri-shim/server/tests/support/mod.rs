//! A real piniond with real parts, in directories of its own, and a small image for it.

#![allow(dead_code, reason = "each test program uses a part of this")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

pub(crate) mod image;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use pinion_cri_proto::admin::admin_client::AdminClient;
use pinion_cri_proto::v1::image_service_client::ImageServiceClient;
use pinion_cri_proto::v1::runtime_service_client::RuntimeServiceClient;
use pinion_cri_proto::{admin, v1};
use tonic::transport::{Channel, Endpoint, Uri};

/// The name the test image is loaded by.
pub(crate) const IMAGE: &str = "localhost/busybox:test";

/// A running server and where it keeps things.
pub(crate) struct Server {
    child: Option<Child>,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) cgroup: String,
}

impl Server {
    /// Writes a configuration and starts the server with it.
    pub(crate) async fn start() -> Self {
        Self::start_with("").await
    }

    /// The same with more configuration.
    pub(crate) async fn start_with(more: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("pn").tempdir_in("/tmp").unwrap();
        let name = directory.path().file_name().unwrap().to_string_lossy().into_owned();
        let cgroup = format!("/pinion-test-{name}");
        let mut server = Self { child: None, directory, cgroup };
        fs::create_dir_all(server.path("cni")).unwrap();
        // The default socket is the machine's, and servers of tests are many.
        let nri = if more.contains("[nri]") { "" } else { "[nri]\nenabled = false\n" };
        let config = format!(
            "[server]\nroot = '{root}'\nrun_dir = '{run}'\n\
             [runtime]\npath = '{runtime}'\nmonitor_path = '{monitor}'\n\
             cgroup_driver = 'cgroupfs'\ndefault_cgroup_parent = '{cgroup}'\n\
             [network]\nconf_dir = '{cni}'\nbin_dirs = ['/usr/lib/cni', '/opt/cni/bin']\n\
             cache_dir = '{cache}'\n\
             [log]\nlevel = 'debug,h2=info,hyper=info,tower=info'\n{nri}{more}\n",
            root = server.path("root").display(),
            run = server.path("run").display(),
            runtime = runtime().display(),
            monitor = beside("pinion-monitor").display(),
            cgroup = server.cgroup,
            cni = server.path("cni").display(),
            cache = server.path("cni-cache").display(),
        );
        fs::write(server.path("config.toml"), config).unwrap();
        server.spawn().await;
        server
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the program and waits until it answers; how long that took.
    pub(crate) async fn spawn(&mut self) -> Duration {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let began = Instant::now();
        let child = Command::new(piniond())
            .arg("--config")
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        while self.runtime().await.version(v1::VersionRequest::default()).await.is_err() {
            let child = self.child.as_mut().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("piniond ended: {status}\n{}", self.log());
            }
            assert!(began.elapsed() < Duration::from_secs(20), "not serving\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        began.elapsed()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Ends the server at once, as a crash would.
    pub(crate) fn crash(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    async fn channel(&self) -> Channel {
        let socket = self.path("run/piniond.sock");
        Endpoint::from_static("http://local").connect_with_connector_lazy(tower::service_fn(
            move |_: Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            },
        ))
    }

    pub(crate) async fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel().await).max_decoding_message_size(32 << 20)
    }

    pub(crate) async fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel().await)
    }

    pub(crate) async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel().await)
    }

    /// Loads the test image.
    pub(crate) async fn load_image(&self) {
        let layout = self.path("layout");
        image::write_layout(&layout, IMAGE);
        let request = admin::LoadImageRequest {
            path: layout.to_string_lossy().into_owned(),
            reference: String::new(),
        };
        self.admin().await.load_image(request).await.unwrap();
    }

    /// Whether anything of this server is left in the kernel: mounts, cgroups, processes.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        let marker = self.directory.path().to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        found.extend(mounts.lines().filter(|l| l.contains(&marker)).map(str::to_string));
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let group = hierarchy.path().join(self.cgroup.trim_start_matches('/'));
            if group.exists() && fs::read_dir(&group).unwrap().flatten().any(|e| e.path().is_dir())
            {
                found.push(group.display().to_string());
            }
        }
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let pid = process.file_name().to_string_lossy().into_owned();
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&marker)
                && Some(pid.as_str()) != self.child.as_ref().map(|c| c.id().to_string()).as_deref()
            {
                found.push(format!("{pid} {line}"));
            }
        }
        found
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- piniond's log ---\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // What a failed test left: monitors and containers, mounts, cgroups.
        let marker = self.directory.path().to_string_lossy().into_owned();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&marker)
                && let Ok(pid) = process.file_name().to_string_lossy().parse::<i32>()
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
                && pid != rustix::process::getpid()
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        kill_groups(&self.cgroup);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut points: Vec<&str> = mounts
            .lines()
            .filter_map(|l| l.split(' ').nth(4))
            .filter(|p| p.starts_with(&marker))
            .collect();
        points.reverse();
        for point in points {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// Kills and removes every group below a test's own.
fn kill_groups(cgroup: &str) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        remove_group(&hierarchy.path().join(cgroup.trim_start_matches('/')));
    }
}

fn remove_group(group: &Path) {
    let Ok(entries) = fs::read_dir(group) else { return };
    for entry in entries.flatten().filter(|e| e.path().is_dir()) {
        remove_group(&entry.path());
    }
    for _ in 0..50 {
        for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        if fs::remove_dir(group).is_ok() || !group.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The server: where cargo built it, or in `PINION_TEST_BIN` on a machine without cargo.
pub(crate) fn piniond() -> PathBuf {
    match std::env::var_os("PINION_TEST_BIN") {
        Some(directory) => Path::new(&directory).join("piniond"),
        None => env!("CARGO_BIN_EXE_piniond").into(),
    }
}

/// A program built beside the server.
pub(crate) fn beside(name: &str) -> PathBuf {
    let path = piniond().with_file_name(name);
    assert!(path.is_file(), "{} is not built: cargo build --release --workspace", path.display());
    path
}

/// The runtime under test; another one by `PINION_TEST_RUNTIME`.
pub(crate) fn runtime() -> PathBuf {
    match std::env::var_os("PINION_TEST_RUNTIME") {
        Some(path) => path.into(),
        None => beside("pinion"),
    }
}

/// A pod configuration with a unique name.
pub(crate) fn pod(name: &str) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "tests".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        labels: HashMap::from([("app".to_string(), name.to_string())]),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container that runs a shell script.
pub(crate) fn shell(name: &str, script: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: vec!["/bin/sh".into(), "-c".into(), script.into()],
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Calls that most tests make.
pub(crate) struct Client(pub(crate) RuntimeServiceClient<Channel>);

impl Client {
    pub(crate) async fn run(
        &mut self,
        config: &v1::PodSandboxConfig,
    ) -> Result<String, tonic::Status> {
        self.run_with(config, "").await
    }

    pub(crate) async fn run_with(
        &mut self,
        config: &v1::PodSandboxConfig,
        handler: &str,
    ) -> Result<String, tonic::Status> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        Ok(self.0.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    pub(crate) async fn create(
        &mut self,
        pod: &str,
        config: &v1::ContainerConfig,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config.clone()),
            sandbox_config: Some(sandbox.clone()),
        };
        Ok(self.0.create_container(request).await?.into_inner().container_id)
    }

    pub(crate) async fn start(&mut self, container: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest { container_id: container.into() };
        self.0.start_container(request).await.map(drop)
    }

    /// Creates and starts.
    pub(crate) async fn launch(
        &mut self,
        pod: &str,
        config: &v1::ContainerConfig,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<String, tonic::Status> {
        let id = self.create(pod, config, sandbox).await?;
        self.start(&id).await?;
        Ok(id)
    }

    pub(crate) async fn stop(
        &mut self,
        container: &str,
        timeout: i64,
    ) -> Result<(), tonic::Status> {
        let request = v1::StopContainerRequest { container_id: container.into(), timeout };
        self.0.stop_container(request).await.map(drop)
    }

    pub(crate) async fn remove(&mut self, container: &str) -> Result<(), tonic::Status> {
        let request = v1::RemoveContainerRequest { container_id: container.into() };
        self.0.remove_container(request).await.map(drop)
    }

    pub(crate) async fn stop_pod(&mut self, pod: &str) -> Result<(), tonic::Status> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod.into() };
        self.0.stop_pod_sandbox(request).await.map(drop)
    }

    pub(crate) async fn remove_pod(&mut self, pod: &str) -> Result<(), tonic::Status> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.into() };
        self.0.remove_pod_sandbox(request).await.map(drop)
    }

    pub(crate) async fn status(
        &mut self,
        container: &str,
    ) -> Result<v1::ContainerStatus, tonic::Status> {
        let request = v1::ContainerStatusRequest { container_id: container.into(), verbose: false };
        Ok(self.0.container_status(request).await?.into_inner().status.unwrap())
    }

    pub(crate) async fn exec(
        &mut self,
        container: &str,
        cmd: &[&str],
        timeout: i64,
    ) -> Result<v1::ExecSyncResponse, tonic::Status> {
        let request = v1::ExecSyncRequest {
            container_id: container.into(),
            cmd: cmd.iter().map(|s| s.to_string()).collect(),
            timeout,
        };
        Ok(self.0.exec_sync(request).await?.into_inner())
    }

    /// Waits until a container has exited.
    pub(crate) async fn exited(&mut self, container: &str) -> v1::ContainerStatus {
        for _ in 0..500 {
            let status = self.status(container).await.unwrap();
            if status.state() == v1::ContainerState::ContainerExited {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{container} does not exit");
    }
}
