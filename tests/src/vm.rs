//! Pods with a kernel of their own, through CRI, on this machine: what they do, what becomes
//! of them when server, machine or image go bad, and what is refused.
//!
//! Guests run by translation here (`vm.accelerator = "tcg"`): a kernel is a kernel all the
//! same, only slower.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_cri_proto::v1;

use self::volumes::Volumes;
use crate::assets::{self, Assets};
use crate::command;
use crate::cri::{Container, Cri, Pod};
use crate::error::{During, Error, Result, ensure};
use crate::image::catalogue;
use crate::leaks::{self, Snapshot};
use crate::node;
use crate::server::{Kind, Scratch};
use crate::site::Site;

mod volumes;

/// The RuntimeClass handler.
pub(crate) const HANDLER: &str = "pinion-vm";

/// The drop-in that says what guests are made of.
const DROP_IN: &str = "config.d/vm.toml";

/// How guests may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Allowed {
    Tcg,
    Nothing,
}

/// A site whose server knows how to start guests.
fn site(assets: &Assets, allowed: Allowed) -> Result<Site> {
    let scratch = Scratch::new()?;
    configure(assets, &scratch, allowed)?;
    Site::over(assets, Kind::Piniond, scratch)
}

/// Writes the drop-in, with QEMU and kernel from Debian's unpacked packages.
fn configure(assets: &Assets, scratch: &Scratch, allowed: Allowed) -> Result<()> {
    let parts = node::guest_parts(assets.cache()?)?;
    let modules = parts.qemu.root.join("usr/lib/x86_64-linux-gnu/qemu");
    let environment = format!("export QEMU_MODULE_DIR={}\n", modules.display());
    let emulator = parts.qemu.command("usr/bin/qemu-system-x86_64")?;
    let wrapper = script(&scratch.path("qemu"), &environment, &emulator)?;
    let virtiofsd = parts.virtiofsd.command("usr/libexec/virtiofsd")?;
    let virtiofsd = script(&scratch.path("virtiofsd"), "", &virtiofsd)?;
    let text = format!(
        "[vm]\nqemu = {qemu:?}\nqemu_data = [{data:?}, {bios:?}]\nkernel = {kernel:?}\n\
         kernel_modules = {modules:?}\nagent = {agent:?}\n\
         virtiofsd = {virtiofsd:?}\nqemu_files = [{tree:?}]\naccelerator = \"tcg\"\n\
         allow_tcg = {tcg}\nboot_seconds = 120\n",
        qemu = wrapper,
        tree = parts.qemu.root,
        data = parts.qemu.root.join("usr/share/qemu"),
        bios = parts.qemu.root.join("usr/share/seabios"),
        kernel = parts.kernel,
        modules = parts.modules,
        agent = assets::binary("pinion-agent")?,
        tcg = allowed == Allowed::Tcg,
    );
    let path = scratch.path(DROP_IN);
    fs::create_dir_all(scratch.path("config.d")).during(|| "create config.d".into())?;
    write(&path, &text)
}

/// A script that executes a command of an unpacked package.
fn script(path: &Path, before: &str, command: &std::process::Command) -> Result<PathBuf> {
    write(path, &format!("#!/bin/sh\n{before}exec {} \"$@\"\n", command::line(command)))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .during(|| format!("chmod {}", path.display()))?;
    Ok(path.to_owned())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).during(|| format!("write {}", path.display()))
}

fn vm_pod(site: &Site, name: &str) -> Result<Pod> {
    Ok(Pod { handler: HANDLER.into(), ..site.pod(name)? })
}

fn step(text: &str) {
    println!("  ✓ {text}");
}

/// The suite.
pub(crate) fn run(assets: &Assets) -> Result<()> {
    let mut site = site(assets, Allowed::Nothing)?;
    let cri = site.connect()?;
    site.warm_up(&cri)?;
    let before = Snapshot::take();
    refusals(assets, &mut site, &cri)?;
    let pod = vm_pod(&site, "guest")?;
    let pod_id = cri.run_pod(&pod)?;
    let holder = "echo up; exec pinion-workload wait";
    let mut first = Container::new("first", catalogue::WORKLOAD, &["sh", "-c", holder]);
    let volumes = Volumes::make(&site)?;
    first.volumes = volumes.mounts();
    let first_id = cri.launch(&pod_id, &pod, &first)?;
    own_kernel(&cri, &first_id)?;
    containers(&site, &cri, (&pod, &pod_id), (&first, &first_id))?;
    jailed(&site, &cri, &pod_id)?;
    volumes.seen(&cri, &first_id)?;
    volumes.confined(&site, &cri, (&pod, &pod_id), &first_id)?;
    statistics(&cri, &first_id)?;
    resized(&cri, &first_id)?;
    restart(&mut site, &first_id)?;
    let cri = site.connect()?;
    machine_killed(&site, &cri, &pod_id, &first_id)?;
    cri.remove_all()?;
    leaks::nothing_since(&before, Duration::from_secs(10))?;
    step("nothing is left of all that");
    println!("vm: every step passed");
    Ok(())
}

/// What cannot be had is refused with its reason, and leaves nothing.
fn refusals(assets: &Assets, site: &mut Site, cri: &Cri) -> Result<()> {
    let pod = vm_pod(site, "refused")?;
    refused(cri, &pod, &["no guest can run on this node", "vm.allow_tcg = true"])?;
    step("without KVM, and with TCG not allowed: refused");
    let image = one_image(&site.scratch.path("root/vm/images"))?;
    let initramfs = image.join("initramfs");
    let good = fs::read(&initramfs).during(|| format!("read {}", initramfs.display()))?;
    let mut bad = good.clone();
    if let Some(byte) = bad.get_mut(4096) {
        *byte ^= 0xff;
    }
    replace(&initramfs, &bad)?;
    configure(assets, &site.scratch, Allowed::Tcg)?;
    site.server.kill()?;
    site.server.restart()?;
    let cri = site.connect()?;
    refused(&cri, &pod, &["is corrupt", "initramfs"])?;
    step("a corrupt initramfs: refused");
    replace(&initramfs, &good)?;
    let host = Pod { host_network: true, ..vm_pod(site, "host-network")? };
    refused(&cri, &host, &["network", "a network stack of its own"])?;
    step("the host's network: refused");
    Ok(())
}

fn refused(cri: &Cri, pod: &Pod, words: &[&str]) -> Result<()> {
    match cri.run_pod(pod) {
        Ok(_) => Err(Error::check(format!("pod {} was started", pod.name))),
        Err(Error::Rpc { message, .. }) => {
            for word in words {
                ensure(message.contains(word), || format!("no {word:?} in: {message}"))?;
            }
            ensure(cri.pods()?.is_empty(), || format!("pod {} is listed", pod.name))
        }
        Err(other) => Err(other),
    }
}

fn one_image(directory: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).during(|| format!("list {}", directory.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .next()
        .ok_or_else(|| Error::check("no guest image was built"))
}

fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::remove_file(path).during(|| format!("remove {}", path.display()))?;
    fs::write(path, bytes).during(|| format!("write {}", path.display()))
}

/// The kernel inside is another one.
fn own_kernel(cri: &Cri, id: &str) -> Result<()> {
    let boot_id = cri.exec(id, &["cat", "/proc/sys/kernel/random/boot_id"])?.stdout;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .during(|| "read the host's boot id".into())?;
    ensure(boot_id.trim().len() == 36 && boot_id != host, || {
        format!("boot id inside {boot_id:?}, outside {host:?}")
    })?;
    let release = cri.exec(id, &["cat", "/proc/sys/kernel/osrelease"])?.stdout;
    let outside = fs::read_to_string("/proc/sys/kernel/osrelease")
        .during(|| "read the host's release".into())?;
    step(&format!("guest kernel: {} (host kernel: {})", release.trim(), outside.trim()));
    ensure(release != outside, || "both kernels have one release".into())
}

/// Logs, exit codes, a second container, and what the first sees of the pod's network.
fn containers(
    site: &Site,
    cri: &Cri,
    (pod, pod_id): (&Pod, &str),
    (first, first_id): (&Container, &str),
) -> Result<()> {
    wait_for(|| site.log(pod, first).contains("up")).map_err(|()| Error::check("no log"))?;
    let script = "echo out; echo err >&2; exit 7";
    let second = Container::new("second", catalogue::WORKLOAD, &["sh", "-c", script]);
    let second_id = cri.launch(pod_id, pod, &second)?;
    let ended = cri.wait_exited(&second_id, Duration::from_secs(30))?;
    ensure(ended.exit_code == 7, || format!("exit code {} instead of 7", ended.exit_code))?;
    let log = site.log(pod, &second);
    ensure(log.contains("out\n") && log.contains("err\n"), || format!("logged: {log:?}"))?;
    step("two containers; logs and exit code 7 are theirs");
    let code = cri.exec(first_id, &["sh", "-c", "exit 3"])?.code;
    ensure(code == 3, || format!("exec ended with {code} instead of 3"))?;
    let megabyte = "head -c 1000000 /dev/zero | tr '\\0' x";
    let output = cri.exec(first_id, &["sh", "-c", megabyte])?.stdout;
    ensure(output.len() == 1_000_000, || format!("{} of 1000000 bytes came", output.len()))?;
    step("exec: exit code 3, and a megabyte of output");
    let name = cri.exec(first_id, &["hostname"])?.stdout;
    ensure(name.trim() == pod.name, || format!("host name {name:?}"))?;
    let addresses = cri.exec(first_id, &["ip", "-4", "addr", "show", "eth0"])?.stdout;
    ensure(addresses.contains("inet 10."), || format!("eth0 has: {addresses}"))?;
    step("host name and address are the pod's");
    Ok(())
}

/// What the machine's process can do to the host, as the kernel says: nothing.
fn jailed(site: &Site, cri: &Cri, pod_id: &str) -> Result<()> {
    let pid = machine(site)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .during(|| format!("read the status of {pid}"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (name, wanted) in [
        ("Seccomp:", "2"),
        ("NoNewPrivs:", "1"),
        ("CapEff:", "0000000000000000"),
        ("CapPrm:", "0000000000000000"),
    ] {
        ensure(field(name) == wanted, || format!("{name} {}", field(name)))?;
    }
    let users = field("Uid:");
    ensure(users.split(' ').all(|uid| uid.len() == 10), || format!("Uid: {users}"))?;
    for name in ["mnt", "pid", "net", "ipc", "uts"] {
        let theirs = fs::read_link(format!("/proc/{pid}/ns/{name}"))
            .during(|| format!("read the {name} namespace of {pid}"))?;
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).during(|| "ours".into())?;
        ensure(theirs != ours, || format!("the {name} namespace is the host's"))?;
    }
    for path in ["etc/passwd", "root/.ssh", "run/pinion", "var/lib/pinion/store.redb", "home"] {
        let path = format!("/proc/{pid}/root/{path}");
        ensure(fs::symlink_metadata(&path).is_err(), || format!("{path} is in reach"))?;
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))
        .during(|| format!("read the mounts of {pid}"))?;
    let writable: Vec<&str> = mounts
        .lines()
        .filter(|line| line.split(' ').nth(5).is_some_and(|options| !options.starts_with("ro")))
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| *point != "/proc" && !point.starts_with("/dev/"))
        .collect();
    ensure(writable.is_empty(), || format!("QEMU could write to {writable:?}"))?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).during(|| "list fds".into())?.flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        let known = [
            "socket:",
            "anon_inode:",
            "/dev/null",
            "/dev/net/tun",
            "/dev/urandom",
            "/memfd:",
            "/dev/kvm",
            "pipe:",
        ];
        let disk = target.ends_with(".ext4");
        ensure(disk || known.iter().any(|start| target.starts_with(start)), || {
            format!("QEMU has {target} open")
        })?;
    }
    let info = cri.pod_info(pod_id)?;
    let threads = info["guest"]["threads"].as_array().cloned().unwrap_or_default();
    for thread in &threads {
        let comm = fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"));
        let comm = comm.during(|| format!("thread {thread} is none of {pid}"))?;
        ensure(comm.starts_with("CPU "), || format!("thread {thread} is {comm:?}"))?;
    }
    ensure(!threads.is_empty(), || "the processors have no threads".into())?;
    step("QEMU: a user of its own without rights, seccomp, its own namespaces, nothing to write");
    Ok(())
}

/// The machine's process.
fn machine(site: &Site) -> Result<u32> {
    let image = site.scratch.path("root/vm/images").display().to_string();
    leaks::process_containing(&["pinion-guest", "-nodefaults", &image])
        .ok_or_else(|| Error::check("the machine's process is not there"))
}

/// Numbers of the guest's own cgroups.
fn statistics(cri: &Cri, id: &str) -> Result<()> {
    let memory = cri.memory_used(id)?;
    ensure(memory > 0, || "the container uses no memory".into())?;
    step(&format!("statistics from inside: {memory} bytes of memory"));
    Ok(())
}

/// New limits reach the guest's kernel; more memory than the machine has is refused.
fn resized(cri: &Cri, id: &str) -> Result<()> {
    let limit = 64 << 20;
    let asked = v1::LinuxContainerResources {
        cpu_shares: 2048,
        memory_limit_in_bytes: limit,
        ..Default::default()
    };
    cri.update(id, asked.clone())?;
    let said = cri.exec(id, &["cat", "/sys/fs/cgroup/memory.max"])?.stdout;
    ensure(said.trim() == limit.to_string(), || format!("memory.max is {said:?}"))?;
    let much = v1::LinuxContainerResources { memory_limit_in_bytes: 1 << 40, ..asked };
    match cri.update(id, much) {
        Err(Error::Rpc { message, .. }) => {
            ensure(message.contains("cannot grow"), || message.clone())?;
        }
        other => return Err(Error::check(format!("a terabyte was given: {other:?}"))),
    }
    step("a resize reaches the guest; one beyond the machine is refused");
    Ok(())
}

/// The server dies and comes back: the guest does not notice.
fn restart(site: &mut Site, id: &str) -> Result<()> {
    site.server.kill()?;
    site.server.restart()?;
    let cri = site.connect()?;
    let said = cri.exec(id, &["echo", "still here"])?.stdout;
    ensure(said == "still here\n", || format!("after a restart: {said:?}"))?;
    step("a restart of the server: the guest lives on");
    Ok(())
}

/// The machine dies: its containers have ended, with a reason, at once.
fn machine_killed(site: &Site, cri: &Cri, pod_id: &str, id: &str) -> Result<()> {
    kill(machine(site)?)?;
    let killed = Instant::now();
    let ended = cri.wait_exited(id, Duration::from_secs(2))?;
    let took = killed.elapsed();
    ensure(ended.reason == "MachineEnded", || format!("reason {:?}", ended.reason))?;
    let pods = cri.pods()?;
    let state = pods.iter().find(|pod| pod.id == pod_id).map(v1::PodSandbox::state);
    ensure(state == Some(v1::PodSandboxState::SandboxNotready), || format!("pod: {state:?}"))?;
    step(&format!("kill -9 of QEMU: {} within {} ms", ended.reason, took.as_millis()));
    Ok(())
}

fn kill(pid: u32) -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap_or(0));
    kill(pid, Signal::SIGKILL).during(|| format!("kill {pid}"))
}

fn wait_for(done: impl Fn() -> bool) -> std::result::Result<(), ()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        if Instant::now() > deadline {
            return Err(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The demo: a pod in a machine, beside the host it runs on.
pub(crate) fn demo(assets: &Assets) -> Result<()> {
    let site = site(assets, Allowed::Tcg)?;
    let mut cri = site.connect()?;
    cri.trace = true;
    cri.pull(catalogue::WORKLOAD)?;
    let pod = vm_pod(&site, "kernel-of-its-own")?;
    let pod_id = cri.run_pod(&pod)?;
    let script = "echo hello from $(cat /proc/sys/kernel/osrelease); exec pinion-workload wait";
    let container = Container::new("main", catalogue::WORKLOAD, &["sh", "-c", script]);
    let id = cri.launch(&pod_id, &pod, &container)?;
    let release = cri.exec(&id, &["cat", "/proc/sys/kernel/osrelease"])?.stdout;
    let boot_id = cri.exec(&id, &["cat", "/proc/sys/kernel/random/boot_id"])?.stdout;
    let read = |path: &str| fs::read_to_string(path).during(|| format!("read {path}"));
    let host = (read("/proc/sys/kernel/osrelease")?, read("/proc/sys/kernel/random/boot_id")?);
    wait_for(|| site.log(&pod, &container).contains("hello"))
        .map_err(|()| Error::check("the container logged nothing"))?;
    println!("\n  guest kernel: {} boot id {}", release.trim(), boot_id.trim());
    println!("  host kernel:  {} boot id {}", host.0.trim(), host.1.trim());
    println!("  its log:      {}", site.log(&pod, &container).trim());
    let info = cri.pod_info(&pod_id)?;
    println!("\n  phases of the start (microseconds):");
    for phase in info["guest"]["phases"].as_array().into_iter().flatten() {
        println!("    {:>12}  {}", phase[1], phase[0].as_str().unwrap_or_default());
    }
    println!("\n  its receipt:");
    let receipt = cri.receipt(&id)?;
    println!("{receipt:#}");
    let kernel = receipt["terms"].as_array().into_iter().flatten().find(|t| t["name"] == "kernel");
    ensure(kernel.is_some_and(|term| term["in_force"] == true), || {
        "the receipt does not say that the kernel term is in force".into()
    })?;
    ensure(boot_id != host.1, || "the boot ids are the same".into())?;
    cri.trace = false;
    cri.remove_all()?;
    println!("\nEvery step happened.");
    Ok(())
}
