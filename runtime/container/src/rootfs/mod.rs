//! Building the container's root file system, inside its own mount namespace.
//!
//! ```text
//! enter ─▶ mount… ─▶ devices ─▶ (hooks) ─▶ change_root ─▶ restrict
//!   private copy of the host's mounts          pivot_root    masks, read-only
//! ```
//!
//! Until the root has changed, paths are resolved by [`Root`] and never by the process's own
//! root; afterwards the host's file system is out of reach.

mod attach;
mod cgroup_view;
mod copy_up;
mod dev;
mod pivot;
mod procfs;
mod resolve;
mod restrict;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use pinion_cgroup::{CgroupPaths, Hierarchies};
use pinion_sys::mount::{MountAttributes, set_attributes};
use rustix::fs::Mode;

use crate::error::{Doing, Failure};
use crate::mount_options::{Attributes, MountOptions};
use crate::mounts::{MountKind, MountPlan};
use crate::plan::RootPlan;

pub use attach::{bind, copy_of, open_path};
pub use dev::attach_console;
pub use pivot::change_root;
pub use procfs::Proc;
pub use resolve::Root;
pub use restrict::{mask, protect};

/// The host's side of the cgroup mounts.
#[derive(Debug)]
pub struct CgroupSource<'a> {
    /// The hierarchies of the host.
    pub hierarchies: &'a Hierarchies,
    /// The container's own directories.
    pub paths: &'a CgroupPaths,
    /// True when the process is in a cgroup namespace of its own.
    pub namespaced: bool,
}

/// The root file system while it is being built.
#[derive(Debug)]
pub struct Rootfs<'a> {
    root: Root,
    cgroups: CgroupSource<'a>,
    proc: Option<OwnedFd>,
    /// A `devpts` mounted at `/dev/pts`.
    devpts: Option<OwnedFd>,
    /// Mounts that become read-only at the end.
    read_only: Vec<OwnedFd>,
}

impl<'a> Rootfs<'a> {
    /// Cuts the mount namespace off from the host's and makes `plan.path` a mount of its own.
    /// `prepared` is a detached copy of what is at `plan.path`, made before the process entered
    /// a user namespace whose root may have no right to go there.
    ///
    /// # Errors
    /// Names the call that failed.
    pub fn enter(
        plan: &RootPlan,
        cgroups: CgroupSource<'a>,
        prepared: Option<OwnedFd>,
    ) -> Result<Self, Failure> {
        let (propagation, recursive) = match plan.propagation {
            // An unbindable root could not be bound below; it becomes that at the end.
            None | Some((libc::MS_UNBINDABLE, _)) => (libc::MS_SLAVE, true),
            Some(asked) => asked,
        };
        // Only a change of the whole tree takes the rootfs' parent out of its peer group.
        let shared = propagation == libc::MS_SHARED || !recursive;
        let host_root = open_path(Path::new("/"))?;
        attach::set_propagation(host_root.as_fd(), &[(propagation, recursive)])?;
        let root = match prepared {
            Some(tree) => place_root(tree, &plan.path, shared)?,
            None => Self::bind_root(plan, shared)?,
        };
        attach::set_propagation(root.as_fd(), &[(libc::MS_PRIVATE, false)])?;
        Ok(Self { root: Root::new(root), cgroups, proc: None, devpts: None, read_only: Vec::new() })
    }

    fn bind_root(plan: &RootPlan, shared: bool) -> Result<OwnedFd, Failure> {
        let missing = || format!("open the rootfs {}", plan.path.display());
        let target = rustix::fs::open(
            &plan.path,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(missing)?;
        // pivot_root refuses a root whose parent mount is shared.
        if shared {
            make_parent_private(&plan.path)?;
        }
        bind(target.as_fd(), target.as_fd(), true, &MountOptions::default())
            .map_err(|f| Failure { what: format!("bind the rootfs: {}", f.what), ..f })
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Gives up everything but the root and a handle on procfs.
    ///
    /// # Errors
    /// When no procfs can be had.
    pub fn finish(self) -> Result<(Root, Proc), Failure> {
        let proc = match self.proc {
            Some(mount) => Proc::on(mount)?,
            None => Proc::detached()?,
        };
        for mount in &self.read_only {
            attach::protect(mount.as_fd())?;
        }
        Ok((self.root, proc))
    }

    /// Makes one mount. `prepared` is a detached source tree made before the process
    /// entered its namespaces.
    ///
    /// # Errors
    /// Names source, destination and the call that failed.
    pub fn mount(&mut self, plan: &MountPlan, prepared: Option<OwnedFd>) -> Result<(), Failure> {
        let source = match &plan.kind {
            MountKind::Bind { source } => source.display().to_string(),
            MountKind::Cgroup => "cgroup".into(),
            MountKind::FileSystem { source, .. } => source.clone(),
        };
        self.mount_kind(plan, prepared).map_err(|failure| Failure {
            what: format!(
                "error mounting {source:?} to rootfs at {:?}: {}",
                plan.destination.display().to_string(),
                failure.what
            ),
            ..failure
        })
    }

    fn mount_kind(&mut self, plan: &MountPlan, prepared: Option<OwnedFd>) -> Result<(), Failure> {
        match &plan.kind {
            MountKind::Bind { source } => self.mount_bind(plan, source, prepared),
            MountKind::Cgroup => {
                let target = self.root.directory(&plan.destination)?;
                cgroup_view::mount(&self.cgroups, target.as_fd(), &plan.options)
            }
            MountKind::FileSystem { name, source } => self.mount_filesystem(plan, name, source),
        }
    }

    fn mount_bind(
        &self,
        plan: &MountPlan,
        source: &Path,
        prepared: Option<OwnedFd>,
    ) -> Result<(), Failure> {
        let (tree, is_prepared) = match prepared {
            Some(tree) => (tree, true),
            None => (open_source(source)?, false),
        };
        let target = match resolve::is_directory(&tree).doing(|| "fstat".into())? {
            true => self.root.directory(&plan.destination)?,
            false => self.root.file(&plan.destination)?,
        };
        if is_prepared {
            attach::place_with_options(tree, target.as_fd(), &plan.options)?;
        } else {
            let recursive = plan.options.bind.unwrap_or(true);
            bind(tree.as_fd(), target.as_fd(), recursive, &plan.options)?;
        }
        Ok(())
    }

    fn mount_filesystem(
        &mut self,
        plan: &MountPlan,
        name: &str,
        source: &str,
    ) -> Result<(), Failure> {
        let existed = self.root.find(&plan.destination).ok();
        let target = self.root.directory(&plan.destination)?;
        if plan.needs_real_directory() {
            self.root.find_without_links(&plan.destination).map_err(|_link| {
                Failure::refused(format!(
                    "filesystem {name:?} must be mounted on ordinary directory"
                ))
            })?;
        }
        let mut options = with_mode_of(existed.as_ref(), name, &plan.options);
        if plan.is_read_only_at_the_end() {
            options.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
        }
        let mount = match attach::detached_filesystem(name, source, &options) {
            Ok(mount) => mount,
            Err(failure) if failure.errno() == Some(libc::ENOSYS) => {
                return self.mount_filesystem_by_path(
                    plan,
                    (name, source, &options),
                    target.as_fd(),
                );
            }
            // A user namespace without its own network namespace may not mount sysfs.
            Err(failure) if failure.errno() == Some(libc::EPERM) && name == "sysfs" => {
                return bind_host_sysfs(target.as_fd(), &plan.options);
            }
            Err(failure) => return Err(failure),
        };
        if plan.options.copy_up
            && let Some(image) = &existed
        {
            copy_up::copy_tree(image.as_fd(), mount.as_fd()).doing(|| "tmpcopyup".into())?;
        }
        attach::place(mount.as_fd(), target.as_fd()).doing(|| "move_mount".into())?;
        attach::set_propagation(mount.as_fd(), &options.propagation)?;
        self.remember(plan, name, mount)
    }

    fn mount_filesystem_by_path(
        &mut self,
        plan: &MountPlan,
        (name, source, options): (&str, &str, &MountOptions),
        target: BorrowedFd<'_>,
    ) -> Result<(), Failure> {
        if plan.options.copy_up {
            return Err(Failure::refused("tmpcopyup needs Linux 5.2"));
        }
        attach::filesystem_by_path(name, source, options, target)?;
        let mounted = self.root.find(&plan.destination).doing(|| "reopen".into())?;
        attach::set_propagation(mounted.as_fd(), &plan.options.propagation)?;
        self.remember(plan, name, mounted)
    }

    fn remember(&mut self, plan: &MountPlan, name: &str, mount: OwnedFd) -> Result<(), Failure> {
        if plan.is_read_only_at_the_end() {
            self.read_only.push(mount.try_clone().doing(|| "dup".into())?);
        }
        if name == "proc" && plan.destination == Path::new("/proc") {
            self.proc = Some(mount);
        } else if name == "devpts" && plan.destination == Path::new("/dev/pts") {
            self.devpts = Some(mount);
        }
        Ok(())
    }
}

/// Opens the source of a bind mount, following symlinks as the host means them.
///
/// # Errors
/// Names the path.
pub fn open_source(source: &Path) -> Result<OwnedFd, Failure> {
    use rustix::fs::OFlags;
    rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing(|| format!("open {}", source.display()))
}

/// A tmpfs without a mode of its own takes that of the directory it covers.
fn with_mode_of(covered: Option<&OwnedFd>, name: &str, options: &MountOptions) -> MountOptions {
    let mut options = options.clone();
    if name == "tmpfs"
        && !options.data.iter().any(|option| option.starts_with("mode="))
        && let Some(stat) = covered.and_then(|fd| rustix::fs::fstat(fd).ok())
    {
        options.data.push(format!("mode={:o}", stat.st_mode & 0o7777));
    }
    options
}

fn bind_host_sysfs(target: BorrowedFd<'_>, options: &MountOptions) -> Result<(), Failure> {
    let source = open_source(Path::new("/sys"))?;
    let mut options = options.clone();
    options.attributes = Attributes::default();
    options.recursive.set |= libc::MOUNT_ATTR_RDONLY;
    bind(source.as_fd(), target, true, &options).map(drop)
}

/// Mounts the root at its path, or at the nearest directory above it that this process may
/// name: pivot_root(2) asks for a mount, and where it was does not matter afterwards.
fn place_root(tree: OwnedFd, path: &Path, shared: bool) -> Result<OwnedFd, Failure> {
    use rustix::fs::OFlags;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for directory in path.ancestors() {
        let target = match rustix::fs::open(directory, flags, Mode::empty()) {
            Err(rustix::io::Errno::ACCESS) => continue,
            other => other.doing(|| format!("open {}", directory.display()))?,
        };
        if shared {
            make_parent_private(directory)?;
        }
        attach::place(tree.as_fd(), target.as_fd())
            .doing(|| format!("mount the rootfs at {}", directory.display()))?;
        return Ok(tree);
    }
    Err(Failure::refused(format!("no directory above {} can be opened", path.display())))
}

/// The mount that contains `path` gets out of every peer group.
fn make_parent_private(path: &Path) -> Result<(), Failure> {
    let private = MountAttributes { propagation: libc::MS_PRIVATE, ..Default::default() };
    let mut directory: PathBuf =
        path.canonicalize().doing(|| format!("resolve {}", path.display()))?;
    loop {
        let fd = open_path(&directory)?;
        match set_attributes(fd.as_fd(), c"", false, &private) {
            // Not the root of a mount: the one that contains it lies further up.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && directory.pop() => {}
            other => return other.doing(|| "make the parent mount private".into()),
        }
    }
}

/// The last attributes of the root itself.
///
/// # Errors
/// Names the call that failed.
pub fn finish_root(root: &Root, plan: &RootPlan) -> Result<(), Failure> {
    if plan.read_only {
        attach::protect(root.as_fd())
            .map_err(|f| Failure { what: format!("make the root read-only: {}", f.what), ..f })?;
    }
    match plan.propagation {
        Some(propagation) => attach::set_propagation(root.as_fd(), &[propagation]),
        None => Ok(()),
    }
}
