//! The machine: QEMU's command line, and one run of it.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::watch::{self, Watch};
use super::{Job, Parts};
use crate::command;
use crate::error::{During, Error, Result};

/// 2 MiB pages on each NUMA node.
pub(crate) const SMALL_HUGEPAGES: u32 = 128;

/// An IOMMU, and behind a root bridge of each NUMA node a NIC with seven virtual functions.
/// With such bridges there every other device must name its bus.
const DEVICES: [&str; 18] = [
    "-device",
    "intel-iommu,intremap=on,caching-mode=on",
    "-device",
    "pxb-pcie,id=px0,bus_nr=32,numa_node=0,bus=pcie.0",
    "-device",
    "pxb-pcie,id=px1,bus_nr=64,numa_node=1,bus=pcie.0",
    "-device",
    "pcie-root-port,id=rp0,bus=px0,chassis=1,slot=1",
    "-device",
    "pcie-root-port,id=rp1,bus=px1,chassis=2,slot=2",
    "-netdev",
    "hubport,id=n0,hubid=0",
    "-netdev",
    "hubport,id=n1,hubid=1",
    "-device",
    "igb,bus=rp0,netdev=n0,mac=52:54:00:00:00:10",
    "-device",
    "igb,bus=rp1,netdev=n1,mac=52:54:00:00:00:11",
];

/// Boots a node, runs the job's command and returns its exit code.
pub(super) fn run(parts: &Parts, payload: &Path, job: &Job) -> Result<i32> {
    let dir = tempfile::Builder::new()
        .prefix("pinion-node-")
        .tempdir()
        .during(|| "make a directory for the node".into())?;
    let listen = |name: &str| {
        let path = dir.path().join(name);
        UnixListener::bind(&path).during(|| format!("listen on {}", path.display()))
    };
    let (control, out) = (listen("control")?, listen("out")?);
    let errors = dir.path().join("qemu.err");
    let log = fs::File::create(&errors).during(|| format!("create {}", errors.display()))?;
    let mut qemu = parts.qemu.command("usr/bin/qemu-system-x86_64")?;
    arguments(&mut qemu, parts, payload, dir.path(), job);
    let child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .during(|| "start QEMU".into())?;
    let mut machine = Machine { child };
    let outcome =
        watch::follow(&mut machine.child, &Watch { control, out, deadline: job.deadline });
    if let Err(Error::Node(why)) = outcome {
        let said = |name: &str| {
            command::tail(&fs::read_to_string(dir.path().join(name)).unwrap_or_default(), 12)
        };
        return Err(Error::Node(format!("{why}\n{}{}", said("console.log"), said("qemu.err"))));
    }
    outcome
}

/// The emulator ends with this value.
#[derive(Debug)]
struct Machine {
    child: Child,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(qemu: &mut Command, parts: &Parts, payload: &Path, dir: &Path, job: &Job) {
    let tree = &parts.qemu.root;
    let half = job.memory / 2;
    qemu.env("QEMU_MODULE_DIR", tree.join("usr/lib/x86_64-linux-gnu/qemu"))
        .arg("-L")
        .arg(tree.join("usr/share/qemu"))
        .arg("-L")
        .arg(tree.join("usr/share/seabios"));
    // never KVM: where this is nested and emulated in software, a kernel does not boot in
    // practical time
    qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,topoext=on"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-m", &format!("{}M", job.memory)])
        .args(["-smp", &smp(job)])
        .args(["-object", &format!("memory-backend-ram,id=m0,size={half}M")])
        .args(["-object", &format!("memory-backend-ram,id=m1,size={half}M")])
        .args(["-numa", &format!("node,nodeid=0,memdev=m0,cpus=0-{}", cpus(job) / 2 - 1)])
        .args([
            "-numa",
            &format!("node,nodeid=1,memdev=m1,cpus={}-{}", cpus(job) / 2, cpus(job) - 1),
        ])
        .args(["-numa", "dist,src=0,dst=1,val=21"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=0x4"]);
    if job.devices {
        qemu.args(DEVICES);
    }
    qemu.args([
        "-object",
        "rng-random,id=rng,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng,bus=pcie.0",
    ])
    .arg("-serial")
    .arg(format!("file:{}", dir.join("console.log").display()))
    .args(["-device", "virtio-serial-pci,bus=pcie.0"]);

    for port in ["control", "out"] {
        let path = dir.join(port);
        qemu.args(["-chardev", &format!("socket,id={port},path={}", path.display())])
            .args(["-device", &format!("virtserialport,chardev={port},name={port}")]);
    }
    for (name, image) in [("system", parts.disk.as_path()), ("payload", payload)] {
        let drive = format!(
            "if=none,id={name},file={},format=raw,readonly=on,cache=unsafe",
            image.display()
        );
        qemu.args([
            "-drive",
            &drive,
            "-device",
            &format!("virtio-blk-pci,drive={name},bus=pcie.0"),
        ]);
    }
    if let Some(share) = &job.share {
        let device =
            format!("local,id=share,path={},security_model=none,multidevs=remap", share.display());
        qemu.args([
            "-fsdev",
            &device,
            "-device",
            "virtio-9p-pci,fsdev=share,mount_tag=share,bus=pcie.0",
        ]);
    }
    if let Some(port) = job.forward {
        // Nothing leads out of the node.
        let net = format!("user,id=page,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{port}");
        qemu.args(["-netdev", &net, "-device", "virtio-net-pci,netdev=page,bus=pcie.0,romfile="]);
    }
    qemu.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initramfs);
    qemu.arg("-append").arg(kernel_command_line(job));
}

/// Two sockets of two cores of two threads; with devices of three cores, so that five pods
/// can each have one.
fn cpus(job: &Job) -> u32 {
    if job.devices { 12 } else { 8 }
}

fn smp(job: &Job) -> String {
    format!("{},sockets=2,cores={},threads=2", cpus(job), cpus(job) / 4)
}

fn kernel_command_line(job: &Job) -> String {
    let mut words = vec![
        "console=ttyS0 quiet loglevel=4 panic=-1".to_owned(),
        // timers of an emulated machine fail the kernel's checks of real ones
        "no_timer_check rcupdate.rcu_cpu_stall_timeout=120 tsc=reliable".to_owned(),
        "apparmor=0".to_owned(),
        format!(
            "default_hugepagesz=2M hugepagesz=1G hugepages=0:0,1:{}",
            1 + u8::from(job.devices)
        ),
        format!("hugepagesz=2M hugepages=0:{SMALL_HUGEPAGES},1:{SMALL_HUGEPAGES}"),
    ];
    if job.devices {
        words.push("intel_iommu=on iommu=pt".into());
    }
    if job.share.is_some() {
        words.push("node.share=1".into());
    }
    if job.systemd {
        words.push("node.init=systemd".into());
    }
    words.extend(job.kernel_args.iter().cloned());
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hugepages_are_asked_for_per_numa_node() {
        let line = kernel_command_line(&Job::default());
        assert!(line.contains("hugepagesz=2M hugepages=0:128,1:128"), "{line}");
        assert!(!line.contains("node.share"));
    }
}
