//! `create`: from a bundle to a process that waits for `start`.
//!
//! Whatever is made is in the record before it is made, and [`Guard`] takes everything back
//! when a later step fails: nothing is left of a container that could not be created.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources};
use pinion_cgroup::{Cgroup, CgroupPaths, Driver, Hierarchies};
use pinion_sys::clone::Child;

use crate::child::{Init, run_init};
use crate::config::Spec;
use crate::error::{Doing, Error, Result};
use crate::launch::{self, Birth, Opened};
use crate::net_devices::Transfer;
use crate::plan::{Facts, Plan};
use crate::protocol::{Channel, Message};
use crate::rdt::{self, RdtPlan};
use crate::state::{Lock, Process, Record, StateDir};
use crate::status::Status;
use crate::{config, delete, hooks, isolation, paths, prepared};

/// What `create` and `run` are told.
#[derive(Debug)]
pub struct CreateOptions<'a> {
    /// The directory of all containers.
    pub root: &'a Path,
    /// The container's name.
    pub id: &'a str,
    /// The bundle.
    pub bundle: &'a Path,
    /// Who makes cgroups; none are made without.
    pub driver: Option<Driver>,
    /// Where to write the process id.
    pub pid_file: Option<&'a Path>,
    /// Where the master of the terminal goes: a connected socket.
    pub console: Option<OwnedFd>,
    /// The terminal adds no carriage return to a line feed: for a caller in the foreground, who
    /// copies to a terminal that does, or to a file that shall have none.
    pub line_feeds: bool,
    /// Where a descriptor of the process goes.
    pub pidfd_socket: Option<&'a Path>,
    /// Use `MS_MOVE` instead of pivot_root(2).
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Descriptors to pass on, after the standard ones and those of `LISTEN_FDS`.
    pub preserve_fds: u32,
}

/// A container that waits for `start`.
#[derive(Debug)]
pub struct Created {
    /// Its first process, a child of the caller.
    pub child: Child,
    /// For the log.
    pub warnings: Vec<String>,
}

/// Creates a container.
///
/// # Errors
/// Any of [`Error`]; nothing is left behind.
pub fn create(options: CreateOptions<'_>) -> Result<Created> {
    let bundle = std::path::absolute(options.bundle)
        .doing(|| format!("resolve {}", options.bundle.display()))?;
    let (parsed, bytes) = config::load_spec(&bundle.join("config.json"))?;
    let spec = parsed.value;
    let mut plan = Plan::new(&spec, &bundle, Facts::for_spec(&spec)?)?;
    check_host(&plan, &options)?;
    let directory = StateDir::of(options.root, options.id)?;
    let lock = directory.create()?;
    let record = Record::new(options.id, &spec, &bundle, &plan);
    let mut guard = Guard::new(&directory, record);
    directory.save_config(&bytes)?;
    let mut warnings = parsed.warnings;
    warnings.append(&mut plan.warnings);
    bring_up(options, &spec, &plan, &mut guard, &lock)?;
    guard.finish(warnings)
}

fn bring_up(
    options: CreateOptions<'_>,
    spec: &Spec,
    plan: &Plan,
    guard: &mut Guard<'_>,
    lock: &Lock,
) -> Result<()> {
    let hierarchies = Hierarchies::detect()?;
    let mut cgroup = make_cgroup((options.driver, options.id), spec, plan, guard, &hierarchies)?;
    let rdt = make_rdt_groups(spec, options.id, guard)?;
    let opened = Opened::open(&plan.namespaces)?;
    let prepared = prepared::sources(plan)?;
    let prepared_root = prepared::root(plan)?;
    let listener = paths::listen(lock.directory().as_fd(), &guard.directory.start_socket())?;
    let (channel, theirs) = Channel::pair().doing(|| "socketpair".into())?;
    let mut init = Some((
        Init {
            plan,
            id: options.id,
            listener,
            cgroup: &cgroup,
            hierarchies: &hierarchies,
            join: crate::child::Join::Done,
            namespaces: clone_all(&opened.others)?,
            prepared,
            prepared_root,
            console: options.console,
            line_feeds: options.line_feeds,
            no_pivot: options.no_pivot,
            new_keyring: !options.no_new_keyring,
            keep_fds: options.preserve_fds + listen_fds(),
            extra_env: listen_env(listen_fds()),
        },
        theirs,
    ));
    let birth = Birth {
        namespaces: &plan.namespaces,
        opened: &opened,
        cgroup: &cgroup,
        oom_score: plan.process.oom_score_adj,
    };
    let child = birth.give(|join| match init.take() {
        Some((init, channel)) => run_init(Init { join, ..init }, channel),
        None => 1,
    })?;
    // The process has its own copies; ours must go, or its end would go unnoticed.
    drop(init);
    let pid = child.pid;
    let child = &*guard.child.insert(child);
    if let Some(groups) = &rdt {
        groups.add(pid.as_raw_nonzero().get())?;
    }
    if !plan.net_devices.is_empty() {
        let transfer = guard.devices.insert(Transfer::to(opened.network_of(pid)?)?);
        plan.net_devices.iter().try_for_each(|device| transfer.give(device))?;
    }
    if let Some(mappings) = &plan.namespaces.mappings {
        launch::map_ids(pid, mappings, plan.process.oom_score_adj)?;
        channel.proceed(&[]).doing(|| "let the process go on".into())?;
    }
    let raw_pid = pid.as_raw_nonzero().get();
    guard.record.init =
        Some(Process::observe(raw_pid).doing(|| "read the process's start time".into())?);
    if Init::reports_rootfs(plan) {
        channel.expect(&Message::RootfsReady, "building its root")?;
        run_runtime_hooks(plan, &guard.record, &channel)?;
    }
    channel.expect(&Message::Ready, "preparing the program")?;
    cgroup.settle();
    guard.directory.save(&guard.record)?;
    if let Some(path) = options.pidfd_socket {
        let socket = paths::connect(path)?;
        pinion_sys::scm::send(&socket, b"pidfd", &[child.pidfd.as_fd()])
            .doing(|| format!("send the pidfd to {}", path.display()))?;
    }
    match options.pid_file {
        None => Ok(()),
        Some(path) => Ok(paths::write_pid_file(path, raw_pid)?),
    }
}

/// The container's cgroup with its limits, and the isolation it asks for.
pub(crate) fn make_cgroup(
    (driver, id): (Option<Driver>, &str),
    spec: &Spec,
    plan: &Plan,
    guard: &mut Guard<'_>,
    hierarchies: &Hierarchies,
) -> Result<Cgroup> {
    let Some(driver) = driver else { return without_cgroup(plan, guard) };
    let paths = Cgroup::plan(hierarchies, driver, plan.cgroups_path.as_deref(), id)?;
    guard.record.cgroup = Some(paths.clone());
    guard.directory.save(&guard.record)?;
    let cgroup = match Cgroup::create(hierarchies, &paths) {
        Err(error) if can_do_without(plan, &error) => {
            let why = crate::error::chain(&error);
            guard.warnings.push(format!("no cgroup for the container of a plain user: {why}"));
            Cgroup::open(nowhere())
        }
        other => other.inspect_err(|_| {
            // Refused or undone by the layer below: a cgroup in that place is not ours.
            guard.record.cgroup = None;
        })?,
    };
    guard.record.cgroup = Some(cgroup.paths().clone());
    if plan.privileged {
        cgroup.apply(&plan.resources)?;
    } else {
        // Device rules take more rights, and a user namespace has no devices of its own.
        let mut resources = plan.resources.clone();
        cgroup.update(resources.set_devices(None))?;
    }
    let annotations = spec.annotations.clone().unwrap_or_default();
    if let Some(request) = isolation::request(&annotations)? {
        let (record, directory) = (&mut guard.record, guard.directory);
        isolation::enforce(&request, &plan.resources, hierarchies, record, directory)?;
    }
    Ok(cgroup)
}

/// The container stays in the cgroup of the runtime, where nobody limits it.
fn without_cgroup(plan: &Plan, guard: &mut Guard<'_>) -> Result<Cgroup> {
    if asks_for_limits(plan) {
        return Err(Error::Invalid(
            "linux.resources has limits, but cgroups are disabled (--cgroup-manager disabled)"
                .into(),
        ));
    }
    guard.record.cgroup = Some(nowhere());
    guard.directory.save(&guard.record)?;
    Ok(Cgroup::open(nowhere()))
}

fn nowhere() -> CgroupPaths {
    let driver = Driver::Cgroupfs;
    CgroupPaths { driver, unified: None, v1: Default::default(), unit: None }
}

fn asks_for_limits(plan: &Plan) -> bool {
    let mut asked = plan.resources.clone();
    asked.set_devices(None);
    asked != LinuxResources::default()
}

/// runc's rule for an unprivileged runtime: without a path and without limits in the
/// configuration, a cgroup that may not be made is not missed.
fn can_do_without(plan: &Plan, error: &pinion_cgroup::Error) -> bool {
    !plan.privileged
        && plan.cgroups_path.is_none()
        && !asks_for_limits(plan)
        && error.kind() == pinion_cgroup::ErrorKind::Permission
}

/// The container's class and monitoring group in resctrl, journalled before they are made.
pub(crate) fn make_rdt_groups(
    spec: &Spec,
    id: &str,
    guard: &mut Guard<'_>,
) -> Result<Option<rdt::RdtRecord>> {
    let asked = spec.linux.as_ref().and_then(|linux| linux.intel_rdt().as_ref());
    let Some(asked) = asked else { return Ok(None) };
    let plan = RdtPlan::plan(asked, id)?;
    let root = rdt::mount_point()?;
    let groups = plan.record(&root);
    guard.record.rdt = Some(groups.clone());
    guard.directory.save(&guard.record)?;
    plan.apply(&root, &groups)?;
    Ok(Some(groups))
}

fn run_runtime_hooks(plan: &Plan, record: &Record, channel: &Channel) -> Result<()> {
    let creating = record.oci_state(Status::Creating).to_json()?;
    hooks::run("prestart", &plan.hooks.prestart, &creating, &record.bundle)?;
    hooks::run("createRuntime", &plan.hooks.create_runtime, &creating, &record.bundle)?;
    channel.proceed(&creating).doing(|| "let the process go on".into())?;
    Ok(())
}

/// What the pure plan cannot know.
fn check_host(plan: &Plan, options: &CreateOptions<'_>) -> Result<()> {
    check_rootfs(plan)?;
    if plan.process.terminal && options.console.is_none() {
        return Err(Error::Invalid(
            "cannot allocate tty if runc will detach without setting console socket".into(),
        ));
    }
    if !plan.process.terminal && options.console.is_some() {
        return Err(Error::Invalid(
            "cannot use console socket if runc will not detach or allocate tty".into(),
        ));
    }
    check_labels(&plan.process)?;
    check_mount_label(plan.mount_label.as_deref())?;
    check_host_network(plan)?;
    check_descriptors(options.preserve_fds)
}

pub(crate) fn check_rootfs(plan: &Plan) -> Result<()> {
    let path = &plan.root.path;
    if path.is_dir() {
        return Ok(());
    }
    Err(Error::Invalid(format!("invalid rootfs: {} is not a directory", path.display())))
}

pub(crate) fn check_labels(process: &crate::process::ProcessPlan) -> Result<()> {
    let enabled =
        |path: &str| std::fs::read_to_string(path).is_ok_and(|text| text.starts_with('Y'));
    if process.apparmor.is_some() && !enabled("/sys/module/apparmor/parameters/enabled") {
        return Err(Error::Unsupported(
            "apparmor profile specified, but AppArmor is not enabled".into(),
        ));
    }
    if process.selinux.is_some() && !selinux_enabled() {
        return Err(Error::Unsupported(SELINUX_MISSING.into()));
    }
    Ok(())
}

fn check_mount_label(label: Option<&str>) -> Result<()> {
    if label.is_some() && !selinux_enabled() {
        return Err(Error::Unsupported(SELINUX_MISSING.into()));
    }
    Ok(())
}

fn selinux_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

const SELINUX_MISSING: &str =
    "selinux label is specified in config, but selinux is disabled or not supported";

/// A joined network namespace that is the host's would let sysctls change the host.
fn check_host_network(plan: &Plan) -> Result<()> {
    let Some(path) = plan.namespaces.path(LinuxNamespaceType::Network) else { return Ok(()) };
    let inode = |path: &Path| rustix::fs::stat(path).map(|stat| (stat.st_dev, stat.st_ino));
    let same = inode(path).ok() == inode(Path::new("/proc/self/ns/net")).ok();
    match plan.sysctl.iter().find(|parameter| parameter.path.starts_with("net/")) {
        Some(parameter) if same => Err(Error::Invalid(format!(
            "sysctl {:?} is not allowed in the hosts network namespace",
            parameter.path
        ))),
        _ => Ok(()),
    }
}

/// All descriptors the caller promised must be there.
pub(crate) fn check_descriptors(preserved: u32) -> Result<()> {
    let count = preserved.saturating_add(listen_fds());
    for number in 3..3 + i64::from(count) {
        let fd = i32::try_from(number).unwrap_or(i32::MAX);
        if !pinion_sys::fd::is_open(fd) {
            return Err(Error::Invalid(format!(
                "unable to stat preserved-fd {number} (of {count})"
            )));
        }
    }
    Ok(())
}

fn clone_all(fds: &[OwnedFd]) -> Result<Vec<OwnedFd>> {
    fds.iter().map(|fd| Ok(fd.try_clone().doing(|| "dup".into())?)).collect()
}

/// How many sockets systemd handed to the caller, who hands them on (sd_listen_fds(3)).
/// Nonsense counts as none.
pub(crate) fn listen_fds() -> u32 {
    let listed = std::env::var("LISTEN_FDS").ok().and_then(|text| text.parse().ok());
    listed.filter(|count| *count <= MAX_LISTEN_FDS).unwrap_or(0)
}

/// More than any unit has sockets, and far from overflowing a descriptor number.
const MAX_LISTEN_FDS: u32 = 1024;

/// The container's process is the one the sockets are meant for.
fn listen_env(count: u32) -> Vec<CString> {
    if count == 0 {
        return Vec::new();
    }
    let entries = [format!("LISTEN_FDS={count}"), "LISTEN_PID=1".into()];
    entries.into_iter().filter_map(|entry| CString::new(entry).ok()).collect()
}

/// Takes back an unfinished container when dropped.
pub(crate) struct Guard<'a> {
    pub(crate) directory: &'a StateDir,
    pub(crate) record: Record,
    pub(crate) child: Option<Child>,
    pub(crate) devices: Option<Transfer>,
    /// For the log.
    warnings: Vec<String>,
    done: bool,
}

impl<'a> Guard<'a> {
    pub(crate) fn new(directory: &'a StateDir, record: Record) -> Self {
        Self { directory, record, child: None, devices: None, warnings: Vec::new(), done: false }
    }

    /// The container is there to stay.
    pub(crate) fn finish(mut self, mut warnings: Vec<String>) -> Result<Created> {
        warnings.append(&mut self.warnings);
        match self.child.take() {
            Some(child) => {
                self.done = true;
                Ok(Created { child, warnings })
            }
            None => Err(Error::ChildVanished("being born")),
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // While the container's network namespace still has a process to hold it.
        if let Some(Err(failures)) = self.devices.take().map(Transfer::take_back) {
            failures.iter().for_each(|failure| eprintln!("warning: {failure}"));
        }
        if let Some(child) = &self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        let leftovers = delete::tear_down(self.directory, &mut self.record);
        if let Err(Error::Cleanup(_)) = leftovers {
            // Stays visible, so that `delete --force` can try again.
            let _ = self.directory.save(&self.record);
        }
    }
}
