//! A place for a suite: registry, network and server in directories of their own.

use std::path::PathBuf;

use crate::assets::Assets;
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Result};
use crate::image::{catalogue, registry::Registry};
use crate::network::Network;
use crate::server::{Kind, Scratch, Server};

/// The CNI configuration below a site's directories.
pub(crate) const CNI_CONFIG: &str = "cni/net.d/10-pinion-test.conflist";

/// A server with everything it needs; it all ends with this value, the server first.
#[derive(Debug)]
pub(crate) struct Site {
    /// The server under test.
    pub(crate) server: Server,
    /// Test images on loopback, for as long as this lives.
    _registry: Registry,
    _network: Network,
    /// Directories.
    pub(crate) scratch: Scratch,
}

impl Site {
    /// Starts registry and server.
    pub(crate) fn open(assets: &Assets, kind: Kind) -> Result<Self> {
        Self::over(assets, kind, Scratch::new()?)
    }

    /// The same over directories that were prepared.
    pub(crate) fn over(assets: &Assets, kind: Kind, scratch: Scratch) -> Result<Self> {
        let registry = assets.registry(&scratch.path("logs"))?;
        registry.write_mirrors(&scratch.path("certs.d"))?;
        let network = Network::take()?;
        network.write(&scratch.path(CNI_CONFIG), &scratch.path("cni/leases"))?;
        let server = Server::start(kind, assets, &scratch)?;
        Ok(Self { server, _registry: registry, _network: network, scratch })
    }

    /// Connects to the server.
    pub(crate) fn connect(&self) -> Result<Cri> {
        Cri::connect(&self.server.socket)
    }

    /// A pod whose containers log below the site's directories.
    pub(crate) fn pod(&self, name: &str) -> Result<Pod> {
        let log_dir = self.scratch.path("logs").join(name);
        std::fs::create_dir_all(&log_dir).during(|| format!("create {}", log_dir.display()))?;
        Ok(Pod { log_dir, ..Pod::named(name) })
    }

    /// What a container has logged, without times and stream names.
    pub(crate) fn log(&self, pod: &Pod, container: &Container) -> String {
        let path: PathBuf = pod.log_dir.join(container.log());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.splitn(4, ' ').nth(3))
            .map(|line| format!("{line}\n"))
            .collect()
    }

    /// Runs a pod once and removes it, so that what a server makes once and keeps (the CNI
    /// bridge, parent cgroups) is there before anything is compared.
    pub(crate) fn warm_up(&self, cri: &Cri) -> Result<()> {
        cri.pull(catalogue::WORKLOAD)?;
        let pod = self.pod("warm-up")?;
        let id = cri.run_pod(&pod)?;
        cri.launch(&id, &pod, &Container::new("true", catalogue::WORKLOAD, &["true"]))?;
        cri.remove_pod(&id)
    }
}

impl Drop for Site {
    /// Removes what a failed suite left, while there is still a server to do it.
    fn drop(&mut self) {
        let removed = self.connect().and_then(|cri| cri.remove_all());
        if let Err(error) = removed {
            eprintln!("could not remove all pods: {}", error.chain());
        }
    }
}
