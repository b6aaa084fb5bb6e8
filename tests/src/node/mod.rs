//! The virtual telco node: a QEMU machine with what this class of host lacks.
//!
//! Two sockets of two cores of two threads, two NUMA nodes, 2 MiB and 1 GiB hugepages and
//! cgroup v2, booted into a small Debian system in ten seconds. It shows placement and
//! behaviour; it says nothing about latency.
//!
//! ```text
//!  host                                   guest
//!  system disk  (cached ext4) ──virtio──▶ lower of the overlay root
//!  payload disk (per run ext4) ─virtio──▶ /usr/local: Pinion, clients, images, the command
//!  terminal    ◀── port "out" ─────────── what the command writes, as it writes it
//!  verdict     ◀── port "control" ─────── READY · heartbeat · DONE <code>
//!  console.log ◀── ttyS0 ──────────────── kernel messages
//!  --share DIR ◀── 9p ──────────────────▶ /mnt/share
//! ```

mod boot;
mod disk;
mod initramfs;
mod kernel;
mod machine;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use crate::assets::Assets;
use crate::cache::Cache;
use crate::crates;
use crate::error::{Error, Result};

pub(crate) use boot::{Parts, guest_parts};

/// What to run in the node, and how.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The command and its arguments.
    pub(crate) command: Vec<String>,
    /// Where Pinion's binaries are taken from, instead of beside this program.
    pub(crate) bin_dir: Option<PathBuf>,
    /// A directory to share at /mnt/share.
    pub(crate) share: Option<PathBuf>,
    /// Installs critest and crictl too.
    pub(crate) clients: bool,
    /// Installs kubelet too.
    pub(crate) kubelet: bool,
    /// Further programs for /usr/local/bin.
    pub(crate) programs: Vec<PathBuf>,
    /// Test programs of crates.
    pub(crate) tests: Vec<crates::Program>,
    /// systemd is PID 1, instead of a script.
    pub(crate) systemd: bool,
    /// An IOMMU, a NIC with virtual functions on each NUMA node, and a second 1 GiB page on
    /// node 1. Costs some seconds of the boot.
    pub(crate) devices: bool,
    /// A port of this machine's loopback that leads to the node's 10.0.2.15, same port.
    pub(crate) forward: Option<u16>,
    /// MiB of memory.
    pub(crate) memory: u32,
    /// Added to the kernel's command line.
    pub(crate) kernel_args: Vec<String>,
    /// How long the command may take.
    pub(crate) deadline: Duration,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            command: Vec::new(),
            bin_dir: None,
            share: None,
            clients: false,
            kubelet: false,
            programs: Vec::new(),
            tests: Vec::new(),
            systemd: false,
            devices: false,
            forward: None,
            memory: 4096,
            kernel_args: Vec::new(),
            deadline: Duration::from_secs(900),
        }
    }
}

impl Job {
    /// A node with devices, and with the memory that its 1 GiB pages take.
    pub(crate) fn with_devices() -> Self {
        Self { devices: true, memory: 6144, ..Self::default() }
    }
}

/// Fetches and builds everything that does not change from run to run.
pub(crate) fn fetch(cache: &Cache) -> Result<Parts> {
    Parts::fetch(cache)
}

/// Runs the command in a fresh node; its exit code. A node that does not boot or stops
/// answering is replaced once: that says nothing about the command.
pub(crate) fn run(assets: &Assets, job: &Job) -> Result<i32> {
    let parts = fetch(assets.cache()?)?;
    let payload = disk::payload(assets, &parts, job)?;
    let mut first = true;
    loop {
        match machine::run(&parts, &payload, job) {
            Err(Error::Node(why)) if first => {
                eprintln!("the node {why}; starting another one");
                first = false;
            }
            other => return other,
        }
    }
}
