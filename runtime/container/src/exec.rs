//! `exec`: a further process in a running container.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;
use pinion_cgroup::{Cgroup, CgroupPaths};
use pinion_seccomp::Program;
use pinion_sys::clone::Child;
use rustix::thread::CapabilitySet;

use crate::child::Tenant;
use crate::error::{Doing, Error, Result, chain};
use crate::memory_policy::MemoryPolicy;
use crate::namespaces::bit;
use crate::process::ProcessPlan;
use crate::protocol::Channel;
use crate::state::{Record, StateDir};
use crate::status::Status;
use crate::{capability, config, create, launch, listener, midwife, paths, personality};

/// What `exec` is told.
#[derive(Debug)]
pub struct ExecOptions<'a> {
    /// The directory of all containers.
    pub root: &'a Path,
    /// The container's name.
    pub id: &'a str,
    /// Where to write the process id.
    pub pid_file: Option<&'a Path>,
    /// Where the master of the terminal goes: a connected socket.
    pub console: Option<OwnedFd>,
    /// See [`CreateOptions`](crate::create::CreateOptions).
    pub line_feeds: bool,
    /// Where a descriptor of the process goes.
    pub pidfd_socket: Option<&'a Path>,
    /// Cgroups below the container's: a path, or `CONTROLLERS:PATH` for those of v1.
    pub cgroups: &'a [String],
    /// Do it even though the process will not run until `resume`.
    pub ignore_paused: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Descriptors to pass on, after the standard ones and those of `LISTEN_FDS`.
    pub preserve_fds: u32,
}

/// A process in a container.
#[derive(Debug)]
pub struct Executed {
    /// The process, a child of the caller.
    pub child: Child,
    /// For the log.
    pub warnings: Vec<String>,
}

/// The part of the configuration a further process starts from.
///
/// # Errors
/// [`Error::NotFound`], or a damaged configuration.
pub fn template(root: &Path, id: &str) -> Result<config::ExecView> {
    let directory = StateDir::of(root, id)?;
    if !directory.path().exists() {
        return Err(Error::NotFound);
    }
    Ok(config::load_exec_view(&directory.config())?.value)
}

/// Runs `process` in a container; returns once its program runs.
///
/// # Errors
/// Any of [`Error`]; the process is gone then.
pub fn exec(
    options: &ExecOptions<'_>,
    process: &config::Process,
    view: &config::ExecView,
) -> Result<Executed> {
    let directory = StateDir::of(options.root, options.id)?;
    let lock = directory.lock_shared()?;
    let record = directory.load()?;
    match directory.status(&record) {
        Status::Running | Status::Created => {}
        Status::Paused if options.ignore_paused => {}
        other => return Err(Error::CannotExec(other)),
    }
    let init = record.init.ok_or(Error::NotRunning)?;
    let container = init.open().doing(|| "pidfd_open".into())?.ok_or(Error::NotRunning)?;
    let joins_user = record.namespaces & bit(LinuxNamespaceType::User) != 0;
    let available = match joins_user {
        true => CapabilitySet::all(),
        false => capability::available(capability::asked(process.capabilities.as_ref()))?,
    };
    let (plan, warnings) = ProcessPlan::plan(process, available)?;
    create::check_labels(&plan)?;
    create::check_descriptors(options.preserve_fds)?;
    let seccomp = view.linux.as_ref().and_then(|linux| linux.seccomp.as_ref());
    let filter = seccomp.map(pinion_seccomp::compile).transpose()?;
    let cgroup = open_cgroup(&record, options.cgroups)?;
    let linux = view.linux.as_ref();
    let place = Place {
        record: &record,
        container: &container,
        cgroup: &cgroup,
        personality: linux
            .and_then(|linux| linux.personality.as_ref())
            .map(personality::plan)
            .transpose()?,
        memory_policy: linux
            .and_then(|linux| linux.memory_policy.as_ref())
            .map(MemoryPolicy::plan)
            .transpose()?,
    };
    if let Some(mask) = &plan.affinity.0 {
        // Inherited by the process, which may be born in the cgroup already.
        pinion_sys::process::set_affinity(mask).doing(|| "set the initial CPU affinity".into())?;
    }
    let (child, channel) = place.launch(&plan, filter.as_ref(), options)?;
    let running = record.oci_state(Status::Running).to_json()?;
    let pid = child.pid.as_raw_nonzero().get();
    let classed = record.rdt.as_ref().map(|groups| groups.add(pid));
    let outcome = classed
        .unwrap_or(Ok(()))
        .map_err(Error::from)
        .and_then(|()| {
            listener::until_exec(&channel, (pid, &child.pidfd), &directory.config(), &running)
        })
        .and_then(|()| report(&child, options));
    drop(lock);
    match outcome {
        Ok(()) => Ok(Executed { child, warnings }),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

fn report(child: &Child, options: &ExecOptions<'_>) -> Result<()> {
    if let Some(path) = options.pidfd_socket {
        let socket = paths::connect(path)?;
        pinion_sys::scm::send(&socket, b"pidfd", &[child.pidfd.as_fd()])
            .doing(|| format!("send the pidfd to {}", path.display()))?;
    }
    match options.pid_file {
        None => Ok(()),
        Some(path) => Ok(paths::write_pid_file(path, child.pid.as_raw_nonzero().get())?),
    }
}

/// The container's cgroup, or the ones asked for below it.
fn open_cgroup(record: &Record, below: &[String]) -> Result<Cgroup> {
    let mut paths = record.cgroup.clone().ok_or(Error::NotRunning)?;
    for asked in below {
        let bad = |why: &str| Error::Invalid(format!("bad sub cgroup path {asked:?}: {why}"));
        let child_of = |paths: &CgroupPaths, path: &str| {
            paths.child(path.trim_start_matches('/')).map_err(|error| bad(&chain(&error)))
        };
        match asked.split_once(':') {
            Some((controllers, path)) => {
                let child = child_of(&paths, path)?;
                for controller in controllers.split(',') {
                    let place = child.v1.get(controller);
                    let place =
                        place.ok_or_else(|| bad(&format!("unknown controller {controller}")))?;
                    paths.v1.insert(controller.to_owned(), place.clone());
                }
            }
            None if asked.is_empty() || asked == "/" => {}
            None => paths = child_of(&paths, asked)?,
        }
    }
    Ok(Cgroup::open(paths))
}

/// Where the new process goes.
struct Place<'a> {
    record: &'a Record,
    container: &'a OwnedFd,
    cgroup: &'a Cgroup,
    personality: Option<u64>,
    memory_policy: Option<MemoryPolicy>,
}

impl Place<'_> {
    fn launch(
        &self,
        plan: &ProcessPlan,
        filter: Option<&Program>,
        options: &ExecOptions<'_>,
    ) -> Result<(Child, Channel)> {
        let (channel, theirs) = Channel::pair().doing(|| "socketpair".into())?;
        let (directory, join) = launch::birthplace(self.cgroup)?;
        let duplicate = |fd: &OwnedFd| fd.try_clone().doing(|| "dup".into());
        let tenant = Tenant {
            process: plan,
            id: options.id,
            filter,
            personality: self.personality,
            memory_policy: self.memory_policy.as_ref(),
            container: Some(duplicate(self.container)?),
            namespaces: self.record.namespaces,
            cgroup: self.cgroup,
            join,
            console: options.console.as_ref().map(duplicate).transpose()?,
            line_feeds: options.line_feeds,
            new_keyring: !options.no_new_keyring,
            keep_fds: options.preserve_fds + create::listen_fds(),
        };
        let child = midwife::give(
            directory.as_ref().map(AsFd::as_fd),
            0,
            |answer| tenant.enter(&theirs, answer),
            |entered| entered.run(&theirs),
        )?;
        Ok((child, channel))
    }
}
