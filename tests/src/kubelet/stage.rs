//! What every case works with: server, kubelet, and what kubelet says of its pods.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::agent::{Kubelet, NODE_NAME};
use crate::assets::{self, Assets};
use crate::command;
use crate::cri::Cri;
use crate::error::{During, Error, Result};
use crate::leaks::Snapshot;
use crate::pinned;
use crate::server::Kind;
use crate::site::Site;

/// How long kubelet may take to bring a pod where it should be, on an emulated machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Server and kubelet over one machine. kubelet ends first.
#[derive(Debug)]
pub(super) struct Stage {
    /// kubelet.
    pub(super) kubelet: Kubelet,
    /// The server and its surroundings.
    pub(super) site: Site,
    /// The machine with both and without pods.
    pub(super) before: Snapshot,
}

/// A container as kubelet's pod status has it.
#[derive(Debug, Clone)]
pub(super) struct Status(Value);

impl Stage {
    /// Starts both on a machine that is the suite's own.
    pub(super) fn open(assets: &Assets) -> Result<Self> {
        let site = Site::open(assets, Kind::Piniond)?;
        {
            let cri = site.connect()?;
            site.warm_up(&cri)?;
        }
        let kubelet = Kubelet::start(assets, &site.scratch, &site.server.endpoint())?;
        // kubelet answers before it has made its groups
        let last = pinned::kubelet_group("besteffort");
        let deadline = Instant::now() + PATIENCE;
        while !last.is_dir() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
        }
        let before = Snapshot::take();
        Ok(Self { kubelet, site, before })
    }

    /// A client of the server.
    pub(super) fn cri(&self) -> Result<Cri> {
        self.site.connect()
    }

    /// What kubelet says of a pod, if it knows it.
    pub(super) fn pod(&self, name: &str) -> Result<Option<Value>> {
        let wanted = format!("{name}-{NODE_NAME}");
        let pods = self.kubelet.pods()?;
        Ok(pods.into_iter().find(|pod| pod["metadata"]["name"] == wanted.as_str()))
    }

    /// Waits until kubelet's word about a pod is what `check` wants; its word.
    pub(super) fn wait_pod(
        &self,
        name: &str,
        what: &str,
        check: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let pod = self.pod(name)?;
            if let Some(pod) = pod.as_ref().filter(|pod| check(pod)) {
                return Ok(pod.clone());
            }
            if Instant::now() > deadline {
                let status = pod.map(|mut pod| pod["status"].take());
                return Err(Error::check(format!(
                    "pod {name} is not {what} after {} s: {}\n{}",
                    PATIENCE.as_secs(),
                    status.unwrap_or_default(),
                    self.kubelet.complaints(8)
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until all containers of a pod are ready.
    pub(super) fn wait_ready(&self, name: &str) -> Result<Value> {
        self.wait_pod(name, "ready", ready)
    }

    /// Waits until neither kubelet nor the server knows the pod.
    pub(super) fn wait_gone(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let cri = self.cri()?;
        let full = format!("{name}-{NODE_NAME}");
        loop {
            let listed = cri
                .pods()?
                .into_iter()
                .any(|pod| pod.metadata.is_some_and(|metadata| metadata.name == full));
            if !listed && self.pod(name)?.is_none() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::check(format!(
                    "pod {name} is still there (listed by the server: {listed})\n{}",
                    self.kubelet.complaints(8)
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A receipt as `pinctl receipt` gives it.
    pub(super) fn receipt(&self, container: &str) -> Result<Value> {
        let text = command::text(
            Command::new(assets::binary("pinctl")?)
                .arg("--socket")
                .arg(&self.site.server.socket)
                .args(["--json", "receipt", container]),
        )?;
        let list: Value = serde_json::from_str(&text).during(|| "decode pinctl receipt".into())?;
        Ok(list[0]["receipt"].clone())
    }

    /// The directory kubelet has a container log to.
    pub(super) fn log_dir(&self, pod: &str, container: &str) -> PathBuf {
        self.kubelet.logs.join(format!("default_{pod}-{NODE_NAME}_{pod}-0")).join(container)
    }
}

/// Whether the pod's condition Ready holds.
pub(super) fn ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|list| {
        list.iter().any(|entry| entry["type"] == "Ready" && entry["status"] == "True")
    })
}

/// A container's status in a pod's, init containers included.
pub(super) fn container(pod: &Value, name: &str) -> Result<Status> {
    ["containerStatuses", "initContainerStatuses"]
        .iter()
        .filter_map(|list| pod["status"][*list].as_array())
        .flatten()
        .find(|status| status["name"] == name)
        .map(|status| Status(status.clone()))
        .ok_or_else(|| Error::check(format!("no container {name} in {}", pod["status"])))
}

impl Status {
    /// The server's id of the container.
    pub(super) fn id(&self) -> String {
        let text = self.0["containerID"].as_str().unwrap_or_default();
        text.rsplit("://").next().unwrap_or(text).to_owned()
    }

    /// How often kubelet started it again.
    pub(super) fn restarts(&self) -> u64 {
        self.0["restartCount"].as_u64().unwrap_or_default()
    }

    /// The exit code of its previous run.
    pub(super) fn last_exit(&self) -> Option<i64> {
        self.0["lastState"]["terminated"]["exitCode"].as_i64()
    }

    /// The whole of it.
    pub(super) fn text(&self) -> &Value {
        &self.0
    }
}
