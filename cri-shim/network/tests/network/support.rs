//! Directories, pinned namespaces and `ip` for tests that run real plugins as root.

use pinion_network::namespaces::{self, Kind, Setup};
use pinion_network::{Network, NetworkConfig, PodNetwork};
use std::collections::BTreeSet;
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Where plugins are on the systems these tests run on.
pub(crate) const BIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs a test on a node of its own: a thread in a new network namespace. Threads and
/// processes that the test starts inherit it, so nothing of it touches the machine's network.
pub(crate) fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run as root");
            output("ip", &["link", "set", "lo", "up"]);
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test());
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A node of its own: configuration, records, leases, pods, one bridge name, one subnet.
pub(crate) struct Node {
    pub(crate) root: tempfile::TempDir,
    pub(crate) network: Network,
    pub(crate) bridge: String,
    /// First two bytes of the subnet.
    pub(crate) subnet: String,
}

impl Node {
    pub(crate) fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make network namespaces: run as root"
        );
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let root = tempfile::tempdir().unwrap();
        let network = Self::network(root.path());
        for dir in ["net.d", "bin", "pods"] {
            std::fs::create_dir(root.path().join(dir)).unwrap();
        }
        let bridge = format!("pnt{pid}x{number}");
        let subnet = format!("10.{}", 128 + (pid + number * 7) % 100);
        Self { root, network, bridge, subnet }
    }

    /// The same, its chains done by plugins only.
    pub(crate) fn executing() -> Self {
        let mut node = Self::new();
        node.network = node.network.with_native(false);
        node
    }

    /// The network of the node that lives in `root`.
    pub(crate) fn network(root: &Path) -> Network {
        let mut bin_dirs = vec![root.join("bin")];
        bin_dirs.extend(BIN_DIRS.map(PathBuf::from));
        Network::new(NetworkConfig {
            conf_dir: root.join("net.d"),
            bin_dirs,
            cache_dir: root.join("records"),
            native: true,
            guard: pinion_network::Watch::All,
        })
    }

    pub(crate) fn configure(&self, text: &str) {
        let text = text
            .replace("BRIDGE", &self.bridge)
            .replace("SUBNET", &format!("{}.0.0/16", self.subnet))
            .replace("LEASES", self.leases().to_str().unwrap());
        std::fs::write(self.root.path().join("net.d/10-test.conflist"), text).unwrap();
    }

    /// A plugin made of a shell script.
    pub(crate) fn plugin(&self, name: &str, script: &str) {
        let path = self.root.path().join("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub(crate) fn leases(&self) -> PathBuf {
        self.root.path().join("leases")
    }

    /// Addresses host-local has given out and not got back.
    pub(crate) fn leased(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.leases().join("test")) else { return Vec::new() };
        let names = entries.flatten().map(|entry| entry.file_name().into_string().unwrap());
        let mut leased: Vec<_> =
            names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect();
        leased.sort();
        leased
    }

    pub(crate) fn records(&self) -> usize {
        std::fs::read_dir(self.root.path().join("records")).map_or(0, |entries| {
            entries
                .flatten()
                .filter(|entry| entry.path().extension().is_some_and(|suffix| suffix == "json"))
                .count()
        })
    }

    pub(crate) fn ns_dir(&self, id: &str) -> PathBuf {
        self.root.path().join("pods").join(id)
    }

    /// A pod with pinned namespaces, not yet attached.
    pub(crate) fn pod(&self, id: &str) -> PodNetwork {
        let dir = self.ns_dir(id);
        namespaces::create(&Kind::ALL, &dir, &Setup::default()).unwrap();
        Self::describe(self.root.path(), id)
    }

    /// A pod of the node that lives in `root`.
    pub(crate) fn describe(root: &Path, id: &str) -> PodNetwork {
        PodNetwork {
            sandbox_id: id.to_owned(),
            namespace: "default".to_owned(),
            name: format!("pod-{id}"),
            uid: format!("uid-{id}"),
            netns: root.join("pods").join(id).join("net"),
            ..Default::default()
        }
    }
}

impl Drop for Node {
    /// Detaches what a failed test left attached, so that no rule of it misleads the next one.
    fn drop(&mut self) {
        let network = self.network.with_timeout(Duration::from_secs(5));
        let rest = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(network.collect(&BTreeSet::new()))
        });
        let _ = rest.join();
        for entry in std::fs::read_dir(self.root.path().join("pods")).unwrap().flatten() {
            namespaces::remove(&entry.path()).unwrap();
        }
        let _ = Command::new("ip").args(["link", "del", &self.bridge]).output();
    }
}

/// Runs a closure inside a pinned network namespace, in a thread that ends with it.
pub(crate) fn within<T: Send>(netns: &Path, run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let file = File::open(netns).unwrap();
            nix::sched::setns(file, nix::sched::CloneFlags::empty()).unwrap();
            run()
        });
        thread.join().unwrap()
    })
}

/// Output of a command.
pub(crate) fn output(command: &str, args: &[&str]) -> String {
    let output = Command::new(command).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// `ip ARGS` inside a namespace.
pub(crate) fn ip(netns: &Path, args: &[&str]) -> String {
    within(netns, || output("ip", args))
}
