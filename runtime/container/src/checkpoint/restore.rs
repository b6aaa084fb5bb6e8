//! `restore`: image files into a running container.
//!
//! CRIU wants a root that is a mountpoint. It gets one in a mount namespace that only CRIU
//! and, for a moment, this process are in: nothing of it can be left on the host.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use pinion_cgroup::{Cgroup, Driver, Hierarchies};
use pinion_sys::clone::{Child, Clone, Exit, pidfd_open, setns, spawn, unshare};
use rustix::process::Pid;

use super::criu::Session;
use super::external::{self, BY_DESCRIPTOR, BY_PATH, Outside};
use super::rpc::{Encoder, Kind, Notify};
use super::{CriuOptions, DESCRIPTORS, Directories, add_mounts, common};
use crate::config::{self, Spec};
use crate::create::{self, Created, Guard};
use crate::error::{Doing, Error, Failure, Result};
use crate::launch::{Opened, open_namespace};
use crate::mount_options::MountOptions;
use crate::net_devices::Transfer;
use crate::plan::{Facts, Plan};
use crate::rootfs::{self, CgroupSource, Rootfs};
use crate::state::{Process, Record, StateDir};
use crate::status::Status;
use crate::{hooks, paths};

const LOG: &str = "restore.log";

/// What `restore` is told.
#[derive(Debug)]
pub struct RestoreOptions<'a> {
    /// The directory of all containers.
    pub root: &'a Path,
    /// The container's name.
    pub id: &'a str,
    /// The bundle.
    pub bundle: &'a Path,
    /// Who makes cgroups.
    pub driver: Option<Driver>,
    /// Where to write the process id.
    pub pid_file: Option<&'a Path>,
    /// Where the master of the terminal goes: a connected socket.
    pub console: Option<OwnedFd>,
    /// For CRIU.
    pub criu: &'a CriuOptions,
}

/// Restores a container.
///
/// # Errors
/// Any of [`Error`], CRIU's own among them; nothing is left behind.
pub fn restore(options: &RestoreOptions<'_>) -> Result<Created> {
    let bundle = std::path::absolute(options.bundle)
        .doing(|| format!("resolve {}", options.bundle.display()))?;
    let (parsed, bytes) = config::load_spec(&bundle.join("config.json"))?;
    let spec = parsed.value;
    let plan = Plan::new(&spec, &bundle, Facts::for_spec(&spec)?)?;
    create::check_rootfs(&plan)?;
    create::check_labels(&plan.process)?;
    let directory = StateDir::of(options.root, options.id)?;
    let _lock = directory.create()?;
    let record = Record::new(options.id, &spec, &bundle, &plan);
    let mut guard = Guard::new(&directory, record);
    directory.save_config(&bytes)?;
    Restoring { options, spec: &spec, plan: &plan }.carry_out(&mut guard)?;
    guard.finish(parsed.warnings)
}

struct Restoring<'a> {
    options: &'a RestoreOptions<'a>,
    spec: &'a Spec,
    plan: &'a Plan,
}

/// CRIU with its orders, not yet sent.
struct Ready {
    session: Session,
    options: Encoder,
    /// CRIU reopens them through this process.
    directories: Directories,
}

impl Restoring<'_> {
    fn carry_out(&self, guard: &mut Guard<'_>) -> Result<()> {
        let hierarchies = Hierarchies::detect()?;
        let (driver, id) = (self.options.driver, self.options.id);
        let cgroup = create::make_cgroup((driver, id), self.spec, self.plan, guard, &hierarchies)?;
        let rdt = create::make_rdt_groups(self.spec, id, guard)?;
        let opened = Opened::open(&self.plan.namespaces)?;
        self.make_mountpoints(&hierarchies, &cgroup)?;
        let root = guard.directory.path().join("criu-root");
        std::fs::create_dir(&root).doing(|| format!("mkdir {}", root.display()))?;
        let Ready { session, mut options, directories } =
            in_private_mounts(&self.plan.root.path, &root, || {
                // Opened here, for CRIU mounts in its working directory.
                let directories = Directories::open(self.options.criu, LOG)?;
                let (options, inherited) =
                    self.encode(&root, &directories, &hierarchies, &cgroup)?;
                let session = Session::start(&inherited.iter().collect::<Vec<_>>())?;
                Ok(Ready { session, options, directories })
            })?;
        self.enter_cgroup(&session, &cgroup, &mut options)?;
        let asked = session
            .ask(Kind::Restore, &options, |notify, fds| self.notified(notify, fds, guard, &opened));
        let _ = std::fs::remove_dir(&root);
        asked.map_err(|error| directories.explain(error))?;
        let child = guard.child.as_ref().ok_or(Error::ChildVanished("being restored"))?;
        let pid = child.pid.as_raw_nonzero().get();
        if let Some(groups) = &rdt {
            groups.add(pid)?;
        }
        // CRIU restores clocks in a time namespace of its own making.
        if is_foreign("time", pid) {
            guard.record.namespaces |= libc::CLONE_NEWTIME as u64;
        }
        guard.directory.save(&guard.record)?;
        match self.options.pid_file {
            None => Ok(()),
            Some(path) => Ok(paths::write_pid_file(path, pid)?),
        }
    }

    /// Makes what `create` would have made in the root file system for the mounts to stand
    /// on: by making them all once, in a mount namespace that ends with the process.
    fn make_mountpoints(&self, hierarchies: &Hierarchies, cgroup: &Cgroup) -> Result<()> {
        let build = || {
            let cgroups = CgroupSource { hierarchies, paths: cgroup.paths(), namespaced: false };
            let mut rootfs = Rootfs::enter(&self.plan.root, cgroups, None)?;
            self.plan.mounts.iter().try_for_each(|mount| rootfs.mount(mount, None))
        };
        let (reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).doing(|| "pipe".into())?;
        let flags = libc::CLONE_NEWNS as u64;
        let child = spawn(&Clone { flags, cgroup: None }, || match build() {
            Ok(()) => 0,
            Err(failure) => {
                // Far below the size of a pipe; without a reader nobody is left to be told.
                let _ = rustix::io::write(&writer, crate::error::chain(&failure).as_bytes());
                1
            }
        })
        .doing(|| "clone".into())?;
        drop(writer);
        let exit = child.wait().doing(|| "wait".into())?;
        if exit == Exit::Code(0) {
            return Ok(());
        }
        let mut text = [0; 4096];
        let length = rustix::io::read(&reader, &mut text).doing(|| "read".into())?;
        let text = String::from_utf8_lossy(&text[..length]).into_owned();
        Err(Failure::refused(format!("make the mountpoints: {text}")).into())
    }

    /// CRIU's options, and the descriptors they name.
    fn encode(
        &self,
        root: &Path,
        directories: &Directories,
        hierarchies: &Hierarchies,
        cgroup: &Cgroup,
    ) -> Result<(Encoder, Vec<OwnedFd>)> {
        let criu = self.options.criu;
        let annotations = self.spec.annotations.clone().unwrap_or_default();
        let mut encoded = common(criu, directories, LOG, &annotations);
        encoded.flag(6, true).flag(26, true).text(13, &root.to_string_lossy());
        if let Some(profile) = &criu.lsm_profile {
            encoded.text(53, profile);
        }
        if let Some(context) = &criu.lsm_mount_context {
            encoded.text(63, context);
        }
        let mut inherited = Vec::new();
        for (kind, _, key) in BY_DESCRIPTOR {
            if let Some(path) = self.plan.namespaces.path(kind) {
                let namespace = open_namespace(path)?;
                add_inherited(&mut encoded, key, namespace.as_raw_fd());
                inherited.push(namespace);
            }
        }
        for (kind, word) in BY_PATH {
            if let Some(path) = self.plan.namespaces.path(kind) {
                let mut entry = Encoder::default();
                entry.text(1, word).text(2, &path.to_string_lossy());
                encoded.message(39, &entry);
            }
        }
        for (number, name) in self.descriptors()?.iter().enumerate() {
            if name.contains("pipe:") {
                add_inherited(&mut encoded, name, i32::try_from(number).unwrap_or(0));
            }
        }
        let outside = Outside::of(&self.plan.root.path)?;
        let cgroups = (hierarchies, cgroup.paths());
        add_mounts(&mut encoded, &external::at_restore(self.plan, self.spec, &outside, cgroups));
        Ok((encoded, inherited))
    }

    fn descriptors(&self) -> Result<Vec<String>, Failure> {
        let path = self.options.criu.images.join(DESCRIPTORS);
        let bytes = std::fs::read(&path).doing(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes)
            .map_err(std::io::Error::from)
            .doing(|| format!("parse {}", path.display()))
    }

    /// CRIU and what it restores belong to the container's cgroup, wherever the dumped one
    /// was.
    fn enter_cgroup(
        &self,
        session: &Session,
        cgroup: &Cgroup,
        encoded: &mut Encoder,
    ) -> Result<()> {
        cgroup.join(session.pid())?;
        let path = format!("/proc/{}/cgroup", session.pid());
        let table = std::fs::read_to_string(&path).doing(|| format!("read {path}"))?;
        for (controllers, place) in table.lines().filter_map(parse_membership) {
            let mut entry = Encoder::default();
            if !controllers.is_empty() {
                entry.text(1, controllers);
            }
            entry.text(2, place);
            encoded.message(25, &entry);
        }
        Ok(())
    }

    fn notified(
        &self,
        notify: &Notify,
        fds: &[OwnedFd],
        guard: &mut Guard<'_>,
        opened: &Opened,
    ) -> Result<()> {
        match notify.script.as_str() {
            "setup-namespaces" => self.namespaces_exist(notify.pid, guard, opened),
            "post-restore" => {
                let pid = Pid::from_raw(notify.pid).ok_or(Error::ChildVanished("restored"))?;
                let pidfd = pidfd_open(pid).doing(|| "pidfd_open".into())?;
                guard.child = Some(Child { pid, pidfd });
                let init = Process::observe(notify.pid);
                guard.record.init = Some(init.doing(|| "read the start time".into())?);
                Ok(guard.directory.save(&guard.record)?)
            }
            "orphan-pts-master" => match (&self.options.console, fds.first()) {
                (Some(socket), Some(master)) => {
                    pinion_sys::scm::send(socket, b"/dev/ptmx", &[master.as_fd()])
                        .doing(|| "send the terminal to the console socket".into())?;
                    Ok(())
                }
                _ => Err(Error::Invalid(
                    "the checkpoint has a terminal: restore it with --console-socket".into(),
                )),
            },
            _ => Ok(()),
        }
    }

    fn namespaces_exist(&self, pid: i32, guard: &mut Guard<'_>, opened: &Opened) -> Result<()> {
        let process = Pid::from_raw(pid).ok_or(Error::ChildVanished("being restored"))?;
        if !self.plan.net_devices.is_empty() {
            let transfer = guard.devices.insert(Transfer::to(opened.network_of(process)?)?);
            self.plan.net_devices.iter().try_for_each(|device| transfer.give(device))?;
        }
        let list = &self.plan.hooks;
        if list.prestart.is_empty() && list.create_runtime.is_empty() {
            return Ok(());
        }
        guard.record.init = Some(Process::observe(pid).doing(|| "read the start time".into())?);
        let state = guard.record.oci_state(Status::Creating).to_json()?;
        hooks::run("prestart", &list.prestart, &state, &guard.record.bundle)?;
        hooks::run("createRuntime", &list.create_runtime, &state, &guard.record.bundle)
    }
}

fn add_inherited(options: &mut Encoder, key: &str, number: i32) {
    let mut entry = Encoder::default();
    entry.text(1, key).number(2, i64::from(number));
    options.message(27, &entry);
}

/// `hierarchy:controllers:path` of `/proc/PID/cgroup`.
fn parse_membership(line: &str) -> Option<(&str, &str)> {
    let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
    // CRIU knows named hierarchies by their names alone, as runc passes them.
    Some((controllers.strip_prefix("name=").unwrap_or(controllers), path))
}

/// Runs `body` where `rootfs` is also mounted at `root`, and comes back whatever happens.
fn in_private_mounts<T>(rootfs: &Path, root: &Path, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let home = open_namespace("/proc/self/ns/mnt".as_ref())?;
    let mounts = libc::CLONE_NEWNS as u64;
    let directory = std::env::current_dir().doing(|| "getcwd".into())?;
    unshare(mounts).doing(|| "unshare the mount namespace".into())?;
    let outcome = bind_root(rootfs, root).map_err(Error::from).and_then(|()| body());
    setns(home.as_fd(), mounts).doing(|| "return to the host's mount namespace".into())?;
    // Joining a mount namespace changes the working directory to its root.
    std::env::set_current_dir(&directory).doing(|| format!("return to {}", directory.display()))?;
    outcome
}

fn bind_root(rootfs: &Path, root: &Path) -> Result<(), Failure> {
    let top = rootfs::open_path(Path::new("/"))?;
    let slave =
        pinion_sys::mount::MountAttributes { propagation: libc::MS_SLAVE, ..Default::default() };
    pinion_sys::mount::set_attributes(top.as_fd(), c"", true, &slave)
        .doing(|| "cut off mount propagation".into())?;
    let source = rootfs::open_source(rootfs)?;
    let target = rootfs::open_path(root)?;
    rootfs::bind(source.as_fd(), target.as_fd(), true, &MountOptions::default()).map(drop)
}

/// True when the process is in another namespace of this kind than the caller.
fn is_foreign(kind: &str, pid: i32) -> bool {
    let link = |of: String| std::fs::read_link(format!("/proc/{of}/ns/{kind}")).ok();
    link(pid.to_string()) != link("self".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_memberships_are_split_as_criu_wants_them() {
        assert_eq!(parse_membership("5:cpu,cpuacct:/a:b"), Some(("cpu,cpuacct", "/a:b")));
        assert_eq!(parse_membership("1:name=systemd:/a"), Some(("systemd", "/a")));
        assert_eq!(parse_membership("0::/a"), Some(("", "/a")));
        assert_eq!(parse_membership("nonsense"), None);
    }
}
