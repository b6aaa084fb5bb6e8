//! `exec`: a further process in a running container.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;
use pinion_cgroup::Cgroup;
use pinion_seccomp::Program;
use pinion_sys::clone::Child;
use rustix::thread::CapabilitySet;

use crate::child::{Join, Tenant, run_tenant};
use crate::error::{Doing, Error, Result};
use crate::launch::Host;
use crate::namespaces::bit;
use crate::process::ProcessPlan;
use crate::protocol::Channel;
use crate::state::{Record, StateDir};
use crate::status::Status;
use crate::{capability, config, create, listener, paths};

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
    /// Where a descriptor of the process goes.
    pub pidfd_socket: Option<&'a Path>,
    /// A cgroup below the container's.
    pub cgroup: Option<&'a str>,
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
    let cgroup = open_cgroup(&record, options.cgroup)?;
    let place = Place { record: &record, container: &container, cgroup: &cgroup };
    let (child, channel) = place.launch(&plan, filter.as_ref(), options)?;
    let running = record.oci_state(Status::Running).to_json()?;
    let outcome = listener::until_exec(&channel, &child.pidfd, &directory.config(), &running)
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

fn open_cgroup(record: &Record, below: Option<&str>) -> Result<Cgroup> {
    let paths = record.cgroup.clone().ok_or(Error::NotRunning)?;
    match below.filter(|name| !name.is_empty() && *name != "/") {
        None => Ok(Cgroup::open(paths)),
        Some(name) => Ok(Cgroup::open(paths.child(name.trim_start_matches('/'))?)),
    }
}

/// Where the new process goes.
struct Place<'a> {
    record: &'a Record,
    container: &'a OwnedFd,
    cgroup: &'a Cgroup,
}

impl Place<'_> {
    fn launch(
        &self,
        plan: &ProcessPlan,
        filter: Option<&Program>,
        options: &ExecOptions<'_>,
    ) -> Result<(Child, Channel)> {
        let (channel, theirs) = Channel::pair().doing(|| "socketpair".into())?;
        let pid_bit = bit(LinuxNamespaceType::Pid);
        let tenant = Tenant {
            process: plan,
            id: options.id,
            filter,
            container: self.container.try_clone().doing(|| "dup".into())?,
            namespaces: self.record.namespaces & !pid_bit,
            cgroup: self.cgroup,
            join: Join::Done,
            console: match &options.console {
                Some(socket) => Some(socket.try_clone().doing(|| "dup".into())?),
                None => None,
            },
            new_keyring: !options.no_new_keyring,
            keep_fds: options.preserve_fds + create::listen_fds(),
        };
        let joins_pid = self.record.namespaces & pid_bit != 0;
        let host = Host { cgroup: self.cgroup, pid_of: joins_pid.then_some(self.container) };
        let mut parts = Some((tenant, theirs));
        let child = host.give(|join| match parts.take() {
            Some((tenant, channel)) => run_tenant(&Tenant { join, ..tenant }, &channel),
            None => 1,
        })?;
        drop(parts);
        Ok((child, channel))
    }
}
