//! A pod's namespaces as files: made in a thread that ends at once, kept by bind mounts.
//!
//! ```text
//!  create(kinds, dir, setup)
//!    └─ fresh thread: unshare ─▶ lo up ─▶ sysctls ─▶ host name ─▶ bind /proc/thread-self/ns/K
//!                                                                 onto <dir>/K, check it
//!    any failure: remove(dir)
//! ```
//!
//! No process lives in the namespaces; the mounts alone hold them. unshare(2) acts on one
//! thread, so the thread is never one of a pool. The mounts keep the propagation of the place
//! they are made in: a shared `/run` lets CNI daemons in their own mount namespaces see them.
//!
//! Namespaces that shall belong to a user namespace of the pod are made by a process instead
//! of a thread, see [`owned`].

pub mod owned;

use crate::error::NetworkError;
use crate::netlink;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

/// `NSFS_MAGIC` and `PROC_SUPER_MAGIC` (linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;
const PROC_MAGIC: i64 = 0x9fa0;
/// Index of `lo`, the first link of every network namespace.
const LOOPBACK: u32 = 1;

/// A kind of namespace a pod owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Network devices, addresses, routes, ports.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Users and groups, and the rights over the other kinds.
    User,
}

impl Kind {
    /// All kinds that a thread can make; [`Kind::User`] takes a process ([`owned`]).
    pub const ALL: [Self; 3] = [Self::Net, Self::Ipc, Self::Uts];

    /// Name of the file in `/proc/<pid>/ns` and in the pod's directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::User => "user",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::User => CloneFlags::CLONE_NEWUSER,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is configured inside the new namespaces before they are pinned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Setup {
    /// Name for the UTS namespace.
    pub hostname: Option<String>,
    /// Paths below `/proc/sys` (`net/ipv4/ip_forward`) and what to write there. Which keys are
    /// allowed is decided before; here only detours out of `/proc/sys` are refused.
    pub sysctls: Vec<(PathBuf, String)>,
}

/// Makes new namespaces of `kinds` and pins them as `<dir>/<kind>`; `dir` is created.
///
/// `lo` is up in a new network namespace. On an error nothing stays behind. Blocks for the
/// kernel's namespace setup (a millisecond), so async callers use a blocking thread.
///
/// # Errors
/// A file of that name that exists already (another pod's pin is never taken over), or the
/// step that failed: the sysctl by name and value, the mount by target.
pub fn create(kinds: &[Kind], dir: &Path, setup: &Setup) -> Result<(), NetworkError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .create(dir)
        .map_err(|error| failed(format!("create {}", dir.display()), error))?;
    let pins = Pins::reserve(kinds, dir)?;
    let outcome = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("pod-namespaces".to_owned())
            .spawn_scoped(scope, || inside(kinds, &pins, setup))
            .map_err(|error| failed("start a thread for namespaces".to_owned(), error))?;
        thread.join().unwrap_or_else(|_panic| {
            let reason = io::Error::other("the thread ended unexpectedly");
            Err(failed("make namespaces".to_owned(), reason))
        })
    });
    if outcome.is_err() {
        pins.release();
    }
    outcome
}

/// Unmounts and removes every pinned namespace in `dir`; what is not there is no error.
///
/// # Errors
/// The first file that could not be unpinned; the others are removed all the same.
pub fn remove(dir: &Path) -> Result<(), NetworkError> {
    let mut outcome = Ok(());
    for kind in Kind::ALL.into_iter().chain([Kind::User]) {
        let removed = unpin(&dir.join(kind.name()));
        outcome = outcome.and(removed);
    }
    outcome
}

/// Whether `path` is a namespace (and not, say, the empty file left by a reboot).
pub fn is_pinned(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
}

/// Runs `work` in a fresh thread inside a pinned network namespace.
///
/// # Errors
/// The namespace that cannot be opened or entered, or what `work` says.
pub(crate) fn within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("pod-network".to_owned());
        let thread = thread.spawn_scoped(scope, || {
            nix::sched::setns(netns, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        thread
            .join()
            .unwrap_or_else(|_panic| Err(io::Error::other("the thread ended unexpectedly")))
    })
}

/// Opens a pinned namespace, so that it stays what it is for as long as the file is open.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if rustix::fs::fstatfs(&file)?.f_type != NSFS_MAGIC {
        return Err(io::Error::other("not a namespace"));
    }
    Ok(file)
}

/// The empty files that become mount points.
struct Pins(Vec<PathBuf>);

impl Pins {
    fn reserve(kinds: &[Kind], dir: &Path) -> Result<Self, NetworkError> {
        let mut pins = Self(Vec::new());
        for kind in kinds {
            let path = dir.join(kind.name());
            let made = OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path);
            if let Err(error) = made {
                pins.release();
                return Err(failed(format!("create {}", path.display()), error));
            }
            pins.0.push(path);
        }
        Ok(pins)
    }

    /// Binds the namespaces in `from`, a `/proc/<pid>/ns`, onto the files reserved for them.
    fn bind(&self, kinds: &[Kind], from: &Path) -> Result<(), NetworkError> {
        for (kind, pin) in kinds.iter().zip(&self.0) {
            let action = || format!("pin {kind} namespace at {}", pin.display());
            rustix::mount::mount_bind(from.join(kind.name()), pin)
                .map_err(|errno| failed(action(), errno))?;
            if !is_pinned(pin) {
                return Err(failed(action(), io::Error::other("the mount is not a namespace")));
            }
        }
        Ok(())
    }

    /// Best effort: this runs when something else has failed already.
    fn release(&self) {
        for path in &self.0 {
            let _ = unpin(path);
        }
    }
}

/// Runs in the fresh thread.
fn inside(kinds: &[Kind], pins: &Pins, setup: &Setup) -> Result<(), NetworkError> {
    enter(kinds, setup)?;
    pins.bind(kinds, Path::new("/proc/thread-self/ns"))
}

/// Moves the calling thread into new namespaces and sets them up.
fn enter(kinds: &[Kind], setup: &Setup) -> Result<(), NetworkError> {
    let flags = kinds.iter().fold(CloneFlags::empty(), |flags, kind| flags | kind.flag());
    let names = kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(",");
    unshare(flags).map_err(|errno| failed(format!("unshare {names}"), errno))?;
    if kinds.contains(&Kind::Net) {
        netlink::Socket::route()
            .and_then(|mut socket| socket.set_up(LOOPBACK))
            .map_err(|error| failed("bring up lo".to_owned(), error))?;
    }
    let proc_sys = if setup.sysctls.is_empty() { None } else { Some(open_proc_sys()?) };
    for (path, value) in &setup.sysctls {
        let Some(root) = &proc_sys else { break };
        write_sysctl(root, path, value).map_err(|error| {
            failed(format!("write sysctl {} = {value:?}", path.display()), error)
        })?;
    }
    if let (true, Some(name)) = (kinds.contains(&Kind::Uts), &setup.hostname) {
        nix::unistd::sethostname(OsStr::new(name))
            .map_err(|errno| failed(format!("set host name {name:?}"), errno))?;
    }
    Ok(())
}

/// `/proc/sys`, after making sure that it is what it claims to be.
fn open_proc_sys() -> Result<File, NetworkError> {
    let open = || -> io::Result<File> {
        let directory = File::open("/proc/sys")?;
        if rustix::fs::fstatfs(&directory)?.f_type != PROC_MAGIC {
            return Err(io::Error::other("not a proc filesystem"));
        }
        Ok(directory)
    };
    open().map_err(|error| failed("open /proc/sys".to_owned(), error))
}

fn write_sysctl(root: &File, path: &Path, value: &str) -> io::Result<()> {
    if !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a plain path below /proc/sys",
        ));
    }
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(root, path, flags, Mode::empty(), beneath)?;
    // One write: procfs takes a value whole or not at all.
    File::from(file).write_all(value.as_bytes())
}

/// A pin may be mounted several times over after a crash; each layer goes.
fn unpin(path: &Path) -> Result<(), NetworkError> {
    let detach = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    loop {
        match rustix::mount::unmount(path, detach) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(errno) => return Err(failed(format!("unmount {}", path.display()), errno)),
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed(format!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn failed(action: String, source: impl Into<io::Error>) -> NetworkError {
    NetworkError::Namespace { action, source: source.into() }
}
