//! kubelet as a process: its configuration, and how it starts, answers and dies.
//!
//! Standalone: no API server, pods from a directory of manifests, state below
//! `/var/lib/kubelet` as on any node (its plugin sockets have fixed paths there).

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::http;
use crate::assets::Assets;
use crate::command;
use crate::error::{During, Error, Result};
use crate::pinned;
use crate::server::Scratch;
use crate::tools;

/// CPUs kept for the system: one whole core of node 0.
pub(super) const RESERVED_CPUS: &str = "0-1";
/// The CPU manager looks at every container this often; ten seconds by default.
pub(super) const RECONCILE: Duration = Duration::from_secs(5);
/// A log file is rotated when it is larger.
pub(super) const LOG_SIZE: u64 = 64 << 10;
/// Log files kept for a container.
pub(super) const LOG_FILES: u32 = 10;
/// The node's name, which ends the names of static pods.
pub(super) const NODE_NAME: &str = "node";

const ROOT: &str = "/var/lib/kubelet";
const READ_ONLY_PORT: u16 = 10255;
const HEALTH_PORT: u16 = 10248;
/// An emulated machine needs a while for a Go program of this size.
const START: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(30);
/// kubelet asks for an address of the node that is not loopback.
const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const NODE_LINK: &str = "kubelet0";

/// A running kubelet.
#[derive(Debug)]
pub(super) struct Kubelet {
    program: PathBuf,
    config: PathBuf,
    /// What the configuration is made from.
    endpoint: String,
    log: PathBuf,
    process: Child,
    /// Where manifests are read from.
    pub(super) manifests: PathBuf,
    /// Where it has containers log to.
    pub(super) logs: PathBuf,
}

impl Kubelet {
    /// Writes the configuration and starts kubelet on the server's socket; returns when it
    /// says that it is healthy.
    pub(super) fn start(assets: &Assets, scratch: &Scratch, endpoint: &str) -> Result<Self> {
        give_node_an_address()?;
        let manifests = scratch.path("manifests");
        let logs = scratch.path("pods");
        for dir in [manifests.as_path(), &logs, Path::new(ROOT)] {
            fs::create_dir_all(dir).during(|| format!("create {}", dir.display()))?;
        }
        let config = scratch.path("kubelet.json");
        write(&config, &configuration(endpoint, &manifests, &logs))?;
        let program = assets.tool(&tools::KUBELET)?;
        let log = scratch.path("kubelet.log");
        let process = spawn(&program, &config, &log)?;
        let endpoint = endpoint.to_owned();
        let mut kubelet = Self { program, config, endpoint, log, process, manifests, logs };
        kubelet.wait_healthy()?;
        Ok(kubelet)
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.process.kill().during(|| "kill kubelet".into())?;
        self.process.wait().during(|| "wait for kubelet".into())?;
        Ok(())
    }

    /// Has its next start take all statistics of pods from the server, and none from the
    /// cAdvisor inside kubelet.
    pub(super) fn believe_the_server(&self) -> Result<()> {
        let mut config = configuration(&self.endpoint, &self.manifests, &self.logs);
        config["featureGates"]["PodAndContainerStatsFromCRI"] = true.into();
        write(&self.config, &config)
    }

    /// Starts it again over the same state.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.program, &self.config, &self.log)?;
        self.wait_healthy()
    }

    /// The pods it manages, with their status, as it tells them.
    pub(super) fn pods(&self) -> Result<Vec<Value>> {
        let text = http::get(READ_ONLY_PORT, "/pods")?;
        let mut list: Value = serde_json::from_str(&text).during(|| "decode /pods".into())?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(Vec::new()),
        }
    }

    /// A page of its read-only port.
    pub(super) fn get(&self, path: &str) -> Result<String> {
        http::get(READ_ONLY_PORT, path)
    }

    /// Everything it has logged.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The errors among the last lines of its log, else the last lines.
    pub(super) fn complaints(&self, lines: usize) -> String {
        let text = self.log();
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with('E')).collect();
        command::tail(
            if errors.is_empty() { text.clone() } else { errors.join("\n") }.as_str(),
            lines,
        )
    }

    fn wait_healthy(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let answer = http::get(HEALTH_PORT, "/healthz").and_then(|_| self.pods());
            let Err(error) = answer else { return Ok(()) };
            let ended = self.process.try_wait().during(|| "wait for kubelet".into())?;
            let failure = match ended {
                Some(status) => format!("kubelet ended with {status}"),
                None if Instant::now() > deadline => {
                    format!("kubelet is not healthy: {}", error.chain())
                }
                None => {
                    std::thread::sleep(Duration::from_millis(200));
                    continue;
                }
            };
            return Err(Error::check(format!("{failure}\n{}", command::tail(&self.log(), 20))));
        }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.process.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + STOP;
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        // the server goes by them, and there is no kubelet any more
        for state in ["cpu_manager_state", "memory_manager_state"] {
            let _ = fs::remove_file(Path::new(ROOT).join(state));
        }
    }
}

fn write(path: &Path, config: &Value) -> Result<()> {
    fs::write(path, config.to_string()).during(|| format!("write {}", path.display()))
}

fn spawn(program: &Path, config: &Path, log: &Path) -> Result<Child> {
    let output = File::options()
        .create(true)
        .append(true)
        .open(log)
        .during(|| format!("open {}", log.display()))?;
    let errors = output.try_clone().during(|| "duplicate a descriptor".into())?;
    Command::new(program)
        .arg("--config")
        .arg(config)
        .args(["--root-dir", ROOT, "--hostname-override", NODE_NAME, "-v=2"])
        .arg(format!("--node-ip={NODE_ADDRESS}"))
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .during(|| format!("start {}", program.display()))
}

/// A bridge without members carries the address; a second kubelet finds it there.
fn give_node_an_address() -> Result<()> {
    if Path::new("/sys/class/net").join(NODE_LINK).exists() {
        return Ok(());
    }
    let address = format!("{NODE_ADDRESS}/24");
    for words in [
        &["link", "add", NODE_LINK, "type", "bridge"][..],
        &["address", "add", &address, "dev", NODE_LINK],
        &["link", "set", NODE_LINK, "up"],
    ] {
        command::run(Command::new("ip").args(words))?;
    }
    Ok(())
}

/// Every policy that places a container, at its strictest. The cgroup driver named here is
/// the wrong one: kubelet has to take the server's.
fn configuration(endpoint: &str, manifests: &Path, logs: &Path) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": endpoint,
        "cgroupDriver": if pinned::is_systemd() { "cgroupfs" } else { "systemd" },
        "staticPodPath": manifests,
        "podLogsDir": logs,
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "readOnlyPort": READ_ONLY_PORT,
        "healthzPort": HEALTH_PORT,
        "cpuManagerPolicy": "static",
        "cpuManagerPolicyOptions": { "full-pcpus-only": "true" },
        "cpuManagerReconcilePeriod": seconds(RECONCILE),
        "reservedSystemCPUs": RESERVED_CPUS,
        "memoryManagerPolicy": "Static",
        "reservedMemory": [{ "numaNode": 0, "limits": { "memory": "300Mi" } }],
        "systemReserved": { "memory": "200Mi" },
        "evictionHard": { "memory.available": "100Mi", "nodefs.available": "5%" },
        "topologyManagerPolicy": "single-numa-node",
        "containerLogMaxSize": LOG_SIZE.to_string(),
        "containerLogMaxFiles": LOG_FILES,
        "containerLogMonitorInterval": "3s",
        "fileCheckFrequency": "1s",
        "syncFrequency": "5s",
        "serializeImagePulls": false,
        "failSwapOn": false,
    })
}

fn seconds(time: Duration) -> String {
    format!("{}s", time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_reserved_per_node_is_what_kubelet_reserves_in_all() {
        // the memory manager refuses to start otherwise
        let config = configuration("unix:///x", Path::new("/m"), Path::new("/l"));
        let mebibytes = |value: &Value| -> u32 {
            value.as_str().and_then(|text| text.strip_suffix("Mi")?.parse().ok()).unwrap()
        };
        let reserved = mebibytes(&config["systemReserved"]["memory"])
            + mebibytes(&config["evictionHard"]["memory.available"]);
        assert_eq!(reserved, mebibytes(&config["reservedMemory"][0]["limits"]["memory"]));
    }
}
