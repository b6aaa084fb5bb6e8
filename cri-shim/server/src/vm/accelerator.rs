//! Whether and how guests can run here.
//!
//! That `/dev/kvm` opens says little: inside some clouds it is itself emulated, and a kernel
//! does not come up in practical time. So a guest is started under KVM with a deadline, once
//! per boot of the host; what came of it is kept in the run directory.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pinion_microvm::image::{self, Inputs};
use pinion_microvm::kernel::Kernel;
use pinion_microvm::machine::{Accelerator, Emulator, Machine, Processors};
use pinion_microvm::plan::Plan;
use tokio::sync::mpsc;

use super::machine::jail;
use super::{Machines, Prepared};
use crate::config::{Vm, VmAccelerator};
use crate::error::{Context, Error, Kind, Result};
use crate::monitor::{self, Client};
use crate::node::Node;
use crate::programs::find;
use crate::services::blocking;

/// The user that a trial guest runs as.
const PROBE_USER: u32 = 0x6fff_ffff;

impl Machines {
    /// What guests start with. Made on first use; a failure is tried again.
    pub(crate) async fn prepared(&self, node: &Arc<Node>) -> Result<Prepared> {
        let mut kept = self.prepared.lock().await;
        if let Some(prepared) = &*kept {
            // The files may have changed since: what is started is what was checked.
            let (image, directory) = (prepared.image.clone(), images(node));
            blocking(move || image.check(&directory).map_err(refused)).await?;
            return Ok(prepared.clone());
        }
        let worker = node.clone();
        let mut prepared = blocking(move || gather(&worker)).await?;
        prepared.accelerator = decide(node, &prepared).await?;
        tracing::info!(
            image = prepared.image.id,
            kernel = prepared.image.release,
            accelerator = prepared.accelerator.name(),
            "guests can be started"
        );
        *kept = Some(prepared.clone());
        Ok(prepared)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err's function")]
fn refused(error: pinion_microvm::Error) -> Error {
    Error::from_foreign(Kind::Precondition, error)
}

/// Where guest images are.
fn images(node: &Node) -> PathBuf {
    node.paths.root().join("vm/images")
}

/// What a guest image is made of here.
fn inputs(config: &Vm, runtime: &Path) -> Result<Inputs> {
    let kernel = Kernel::find(&config.kernel, &config.kernel_modules, Path::new("/"));
    let runtime =
        if config.runtime.as_os_str().is_empty() { runtime } else { config.runtime.as_path() };
    Ok(Inputs {
        kernel: kernel.map_err(refused)?,
        agent: find(&config.agent, "pinion-agent", "vm.agent")?,
        runtime: runtime.to_owned(),
    })
}

fn gather(node: &Node) -> Result<Prepared> {
    let config = &node.config.vm;
    let program = find(&config.qemu, "qemu-system-x86_64", "vm.qemu")?;
    let inputs = inputs(config, &node.programs.runtime)?;
    let directory = images(node);
    let image = image::ensure(&directory, &inputs).map_err(refused)?;
    let modules = Some(config.qemu_modules.clone()).filter(|path| !path.as_os_str().is_empty());
    Ok(Prepared {
        kernel: image.kernel_path(&directory),
        initramfs: image.initramfs_path(&directory),
        image,
        files: file_server(config)?,
        visible: config.qemu_files.clone(),
        emulator: Emulator { program, firmware: config.qemu_data.clone(), modules },
        accelerator: Accelerator::Tcg,
    })
}

/// virtiofsd, which Debian keeps out of `PATH`. Without it pods have no volumes; one that is
/// configured must be there.
fn file_server(config: &Vm) -> Result<Option<PathBuf>> {
    let place = Path::new("/usr/libexec/virtiofsd");
    match find(&config.virtiofsd, "virtiofsd", "vm.virtiofsd") {
        Ok(program) => Ok(Some(program)),
        Err(_) if config.virtiofsd.as_os_str().is_empty() => {
            Ok(place.is_file().then(|| place.to_path_buf()))
        }
        Err(error) => Err(error),
    }
}

/// KVM where a guest comes up under it; else TCG where that is allowed; else a refusal.
async fn decide(node: &Arc<Node>, prepared: &Prepared) -> Result<Accelerator> {
    let config = &node.config.vm;
    let why = match config.accelerator {
        VmAccelerator::Tcg => "vm.accelerator is \"tcg\"".to_string(),
        VmAccelerator::Auto | VmAccelerator::Kvm => match usable(node, prepared).await {
            Ok(()) => return Ok(Accelerator::Kvm),
            Err(error) => format!("KVM is not usable: {}", error.chain()),
        },
    };
    if config.allow_tcg && config.accelerator != VmAccelerator::Kvm {
        node.find(format!("guests run under TCG, thirty times slower than KVM: {why}"));
        return Ok(Accelerator::Tcg);
    }
    let fix = match config.accelerator {
        VmAccelerator::Kvm => "vm.accelerator = \"kvm\" allows nothing else",
        _ => "set vm.allow_tcg = true to run guests slowly instead",
    };
    Err(Error::precondition(format!("no guest can run on this node: {why}; {fix}")))
}

/// Whether a guest comes up under KVM, from this boot's notes or by trying.
async fn usable(node: &Arc<Node>, prepared: &Prepared) -> Result<()> {
    let device = Path::new("/dev/kvm");
    fs::File::options()
        .read(true)
        .write(true)
        .open(device)
        .context(|| format!("open {}", device.display()))?;
    let notes = node.paths.run_dir().join("kvm-probe");
    let works = format!("{} works", prepared.image.id);
    match fs::read_to_string(&notes) {
        Ok(text) if text == works => return Ok(()),
        Ok(text) if text.starts_with(&prepared.image.id) => {
            let words = text.split_once(' ').map_or("", |(_, words)| words);
            return Err(Error::precondition(words.to_string()));
        }
        _ => {}
    }
    let tried = probe(node, prepared).await;
    let text = match &tried {
        Ok(()) => works,
        Err(error) => format!("{} {}", prepared.image.id, error.chain()),
    };
    pinion_sys::atomic_file::write_volatile(&notes, text.as_bytes(), 0o600)
        .context(|| format!("write {}", notes.display()))?;
    tried
}

/// Starts the smallest guest under KVM and waits for its agent.
async fn probe(node: &Arc<Node>, prepared: &Prepared) -> Result<()> {
    let directory = node.paths.run_dir().join("probe");
    let what = || format!("prepare {}", directory.display());
    drop(monitor::end(&directory).await);
    drop(fs::remove_dir_all(&directory));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).context(what)?;
    let limit = Duration::from_secs(node.config.vm.kvm_probe_seconds);
    let plan = Plan {
        machine: Machine {
            emulator: prepared.emulator.clone(),
            accelerator: Accelerator::Kvm,
            kernel: prepared.kernel.clone(),
            initramfs: prepared.initramfs.clone(),
            processors: Processors { count: 1, threads: 1 },
            memory: 128,
            huge: None,
        },
        namespace: None,
        cgroups: Vec::new(),
        user: Some((PROBE_USER, PROBE_USER)),
        cpus: String::new(),
        jail: Some(jail(prepared, Accelerator::Kvm, directory.join("jail"))?),
        share: None,
        hostname: "probe".into(),
        files: Vec::new(),
        sysctls: Vec::new(),
        shm_bytes: 1 << 20,
        boot_limit: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
    };
    let file = directory.join("machine.json");
    let json = serde_json::to_vec(&plan).context(what)?;
    fs::write(&file, json).context(what)?;
    let result = async {
        monitor::start(&monitor::Invocation {
            program: &node.programs.monitor,
            pod: "probe",
            directory: &directory,
            runtime: &node.programs.runtime,
            runtime_root: &node.programs.runtime_root,
            systemd_cgroup: false,
            machine: Some(&file),
        })
        .await?;
        let (notices, _ignored) = mpsc::unbounded_channel();
        Client::connect(&directory, notices).await.map(drop)
    }
    .await;
    drop(monitor::end(&directory).await);
    drop(fs::remove_dir_all(&directory));
    result
}
