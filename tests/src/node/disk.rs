//! The node's two disks, both ext4, written by mke2fs from a directory and mounted
//! read-only: the system, made once, and the payload, made for each run.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::kernel::Kernel;
use super::{Job, Parts};
use crate::assets::{self, Assets};
use crate::command;
use crate::crates;
use crate::debian::Tree;
use crate::error::{During, Error, Result};
use crate::tools;

/// What of Pinion is installed in the node.
const BINARIES: [&str; 6] =
    ["piniond", "pinctl", "pinion", "pinion-monitor", "pinion-tests", "pinion-workload"];
/// Those without which no node is of use.
const REQUIRED: [&str; 2] = ["pinion-tests", "pinion-workload"];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// Names of one multi-call program that Debian makes by alternatives.
const IPTABLES: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

/// Gathers the system's files in `dir`: Debian's, the kernel's modules, and ours.
pub(crate) fn stage_system(system: &Tree, kernel: &Kernel, dir: &Path) -> Result<()> {
    copy_tree(&system.root, dir)?;
    let modules = dir.join("lib/modules");
    make_dir(&modules)?;
    copy_tree(&kernel.modules, &modules.join(&kernel.release))?;
    depmod(system, dir, &kernel.release)?;
    for path in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "mnt/share",
        "mnt/huge",
        "etc/cni/net.d",
        "etc/systemd/system",
        "usr/local",
        "var/lib",
        "var/log",
        "var/tmp",
        "opt/cni",
        "lower",
        "over",
    ] {
        make_dir(&dir.join(path))?;
    }
    link_applets(system, dir)?;
    for name in IPTABLES {
        link("/usr/sbin/xtables-nft-multi", &dir.join("usr/sbin").join(name))?;
    }
    link("/usr/lib/cni", &dir.join("opt/cni/bin"))?;
    for (path, text, mode) in [
        ("sbin/node-init", include_str!("../../node/node-init"), 0o755),
        ("sbin/node-run", include_str!("../../node/node-run"), 0o755),
        ("etc/systemd/system/node.target", include_str!("../../node/node.target"), 0o644),
        ("etc/systemd/system/node.service", include_str!("../../node/node.service"), 0o644),
        ("etc/machine-id", "", 0o644),
        ("etc/passwd", PASSWD, 0o644),
        ("etc/group", GROUP, 0o644),
        ("etc/hostname", "node\n", 0o644),
        ("etc/hosts", "127.0.0.1 localhost node\n::1 localhost node\n", 0o644),
        ("etc/resolv.conf", "nameserver 127.0.0.1\n", 0o644),
        ("etc/os-release", "ID=debian\nPRETTY_NAME=\"Pinion test node\"\n", 0o644),
        (assets::NODE_MARKER.trim_start_matches('/'), "", 0o644),
    ] {
        write(&dir.join(path), text.as_bytes(), mode)?;
    }
    Ok(())
}

/// The payload disk of one run: /usr/local, with the command as a script.
pub(crate) fn payload(assets: &Assets, parts: &Parts, job: &Job) -> Result<tempfile::TempPath> {
    let staging = tempfile::tempdir().during(|| "make a staging directory".into())?;
    let bin = staging.path().join("bin");
    make_dir(&bin)?;
    for name in BINARIES {
        let given = job.bin_dir.as_ref().map(|dir| dir.join(name)).filter(|path| path.is_file());
        match given.map_or_else(|| assets::binary(name), Ok) {
            Ok(path) => install(&path, &bin.join(name))?,
            Err(error) if REQUIRED.contains(&name) => return Err(error),
            Err(_) => {}
        }
    }
    for program in &job.programs {
        let name = program.file_name().ok_or_else(|| Error::check("a program has no name"))?;
        install(program, &bin.join(name))?;
    }
    let clients: &[tools::Tool] =
        if job.clients { &[tools::CRITEST, tools::CRICTL, tools::GINKGO] } else { &[] };
    for tool in clients.iter().chain(job.kubelet.then_some(&tools::KUBELET)) {
        install(&assets.tool(tool)?, &bin.join(tool.name))?;
    }
    if !job.tests.is_empty() {
        let place = |path: &str| staging.path().join(path.trim_start_matches("/usr/local/"));
        let dir = place(crates::NODE_DIR);
        make_dir(&dir)?;
        install(&parts.busybox, &place(crates::NODE_BUSYBOX))?;
        for (name, program) in &job.tests {
            install(program, &dir.join(name))?;
        }
    }
    let images = staging.path().join("share/pinion-tests/images");
    make_dir(&images)?;
    copy_tree(&assets.images()?, &images)?;
    let script = format!("#!/bin/sh\nexec {}\n", quote(&job.command));
    write(&staging.path().join("bin/node-command"), script.as_bytes(), 0o755)?;
    let image = tempfile::Builder::new()
        .prefix("pinion-payload-")
        .tempfile()
        .during(|| "make a disk image".into())?
        .into_temp_path();
    make_ext4(staging.path(), &image)?;
    Ok(image)
}

/// Writes a directory into an ext4 image just large enough.
pub(crate) fn make_ext4(dir: &Path, image: &Path) -> Result<()> {
    let listed = command::text(Command::new("du").args(["-sk", "--apparent-size"]).arg(dir))?;
    let used: u64 = listed
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| Error::check(format!("du said {listed:?}")))?;
    let kilobytes = used + used / 4 + (16 << 10);
    command::run(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"])
            .args(["-E", "root_owner=0:0", "-d"])
            .arg(dir)
            .arg(image)
            .arg(format!("{kilobytes}k")),
    )?;
    Ok(())
}

/// Makes the tables by which modules are found.
fn depmod(system: &Tree, dir: &Path, release: &str) -> Result<()> {
    let mut kmod = system.command_named("bin/kmod", "depmod")?;
    command::run(kmod.arg("-b").arg(dir).arg(release))?;
    Ok(())
}

/// Links every applet of busybox whose name no other program has.
fn link_applets(system: &Tree, dir: &Path) -> Result<()> {
    let applets = command::text(system.command("bin/busybox")?.arg("--list"))?;
    let places = ["bin", "sbin", "usr/bin", "usr/sbin"];
    for applet in applets.lines() {
        let taken =
            places.iter().any(|place| dir.join(place).join(applet).symlink_metadata().is_ok());
        if !taken {
            link("/bin/busybox", &dir.join("bin").join(applet))?;
        }
    }
    Ok(())
}

/// Copies a tree by hard links; the files are never changed through them.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    make_dir(to)?;
    let linked = command::run(Command::new("cp").arg("-al").arg(from.join(".")).arg(to));
    if linked.is_err() {
        command::run(
            Command::new("cp").args(["-a", "--remove-destination"]).arg(from.join(".")).arg(to),
        )?;
    }
    Ok(())
}

fn install(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).during(|| format!("copy {}", from.display()))?;
    Ok(())
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).during(|| format!("create {}", path.display()))
}

fn link(target: &str, path: &Path) -> Result<()> {
    let _ = fs::remove_file(path);
    symlink(target, path).during(|| format!("link {}", path.display()))
}

/// Writes a new file; one that is there may be a hard link into the cache.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).during(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .during(|| format!("chmod {}", path.display()))
}

/// A command line for a shell.
fn quote(words: &[String]) -> String {
    let quoted: Vec<String> =
        words.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
    quoted.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_the_shell() {
        let words = ["echo", "it's $HOME"].map(str::to_owned);
        assert_eq!(quote(&words), r"'echo' 'it'\''s $HOME'");
    }
}
