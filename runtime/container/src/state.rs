//! What is kept about a container: `<root>/<id>/`.
//!
//! ```text
//! state.json    the record below, replaced atomically
//! config.json   the configuration as it was at create
//! exec.sock     exists from create until start; the waiting process listens on it
//! ```
//!
//! The record says what was made; whether the container lives is asked of the kernel each
//! time: pid and start time together name a process beyond the reuse of its number. Verbs
//! that change the container hold an exclusive lock on the directory; the others (`state`,
//! `kill`, `list`, `ps`, `events`) take none, for they must work while a verb hangs.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pinion_cgroup::{Cgroup, CgroupPaths};
use pinion_placement::UndoStep;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Failure, Result};
use crate::namespaces::bit;
use crate::plan::Plan;
use crate::rdt::RdtRecord;
use crate::status::Status;

/// The version of [`Record`]'s format.
const FORMAT: u32 = 1;

/// `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The format's version.
    pub format: u32,
    /// `ociVersion` of the configuration.
    pub oci_version: String,
    /// The container's name.
    pub id: String,
    /// The bundle, absolute.
    pub bundle: PathBuf,
    /// The root file system, absolute.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// The user who created it.
    pub owner: u32,
    /// The configuration's annotations.
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    /// The first process; absent while the container is being created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<Process>,
    /// Written before the cgroup is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<CgroupPaths>,
    /// `CLONE_NEW*` bits of the namespaces it does not share with the host.
    pub namespaces: u64,
    /// What was changed on the node for its isolation; each entry precedes its change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub isolation: Vec<UndoStep>,
    /// Its resctrl groups; written before they are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdt: Option<RdtRecord>,
    /// True when `start` has hooks to run afterwards.
    #[serde(default)]
    pub has_poststart: bool,
    /// True when `delete` has hooks to run.
    #[serde(default)]
    pub has_poststop: bool,
}

/// A process, safe against reuse of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the host's PID namespace.
    pub pid: i32,
    /// Start time in clock ticks after boot (`/proc/PID/stat`, field 22).
    pub start_time: u64,
}

impl Process {
    /// The process with this number now.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn observe(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start_time: stat(pid)?.start_time })
    }

    /// True when the process exists and has not ended.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_ok_and(|s| s.start_time == self.start_time && !s.ended)
    }

    /// A descriptor for exactly this process; `None` when it has ended.
    ///
    /// # Errors
    /// As pidfd_open(2).
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        self.open_by(pinion_sys::clone::pidfd_open)
    }

    /// As [`Process::open`], of use for signals only; also on kernels without pidfd_open(2).
    ///
    /// # Errors
    /// As open(2).
    pub fn open_for_signals(&self) -> io::Result<Option<OwnedFd>> {
        self.open_by(pinion_sys::clone::open_for_signals)
    }

    fn open_by(&self, open: fn(Pid) -> io::Result<OwnedFd>) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        match open(pid) {
            // Looked at after the open: now the number cannot change its owner unnoticed.
            Ok(pidfd) if self.is_alive() => Ok(Some(pidfd)),
            Ok(_) => Ok(None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

struct Stat {
    ended: bool,
    start_time: u64,
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&String::from_utf8_lossy(&text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name in parentheses may contain anything, parentheses and blanks included.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ended = matches!(*fields.first()?, "Z" | "X" | "x");
    Some(Stat { ended, start_time: fields.get(19)?.parse().ok()? })
}

/// The directory of one container.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// Exclusive use of a container's state; ends with the value.
#[derive(Debug)]
pub struct Lock {
    directory: OwnedFd,
}

impl StateDir {
    /// The directory of container `id` below `root`. Touches nothing.
    ///
    /// # Errors
    /// [`Error::InvalidId`].
    pub fn of(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        Ok(Self { path: root.join(id) })
    }

    /// Makes the directory, which must not exist, and locks it.
    ///
    /// # Errors
    /// [`Error::Exists`].
    pub fn create(&self) -> Result<Lock> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        let make = |builder: &std::fs::DirBuilder| builder.create(&self.path);
        let mut made = make(builder.mode(0o711));
        if let (Err(error), Some(root)) = (&made, self.path.parent())
            && error.kind() == io::ErrorKind::NotFound
        {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(root)
                .doing(|| format!("mkdir {}", root.display()))?;
            made = make(&builder);
        }
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Exists),
            other => {
                other.doing(|| format!("mkdir {}", self.path.display()))?;
                self.lock(FlockOperation::NonBlockingLockExclusive).inspect_err(|_error| {
                    // Empty as it is, it would only keep the name.
                    let _ = std::fs::remove_dir(&self.path);
                })
            }
        }
    }

    /// Waits for exclusive use.
    ///
    /// # Errors
    /// [`Error::NotFound`], also when the container was deleted meanwhile.
    pub fn lock_exclusive(&self) -> Result<Lock> {
        self.lock(FlockOperation::LockExclusive)
    }

    /// Waits until nobody has exclusive use, and prevents it.
    ///
    /// # Errors
    /// As [`StateDir::lock_exclusive`].
    pub fn lock_shared(&self) -> Result<Lock> {
        self.lock(FlockOperation::LockShared)
    }

    fn lock(&self, operation: FlockOperation) -> Result<Lock> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(&self.path, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Err(Error::NotFound),
            other => other.doing(|| format!("open {}", self.path.display()))?,
        };
        rustix::io::retry_on_intr(|| rustix::fs::flock(&directory, operation))
            .doing(|| format!("lock {}", self.path.display()))?;
        let links = rustix::fs::fstat(&directory).doing(|| "fstat".into())?.st_nlink;
        if links == 0 { Err(Error::NotFound) } else { Ok(Lock { directory }) }
    }

    /// Reads the record.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::State`].
    pub fn load(&self) -> Result<Record> {
        let path = self.path.join("state.json");
        match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| Error::State { path, source })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NotFound),
            Err(error) => Err(error).doing(|| format!("read {}", path.display()))?,
        }
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// As write(2) and rename(2).
    pub fn save(&self, record: &Record) -> Result<(), Failure> {
        let path = self.path.join("state.json");
        let bytes = serde_json::to_vec(record).map_err(io::Error::from);
        // The directory lies on a tmpfs by convention, and what it describes does not
        // outlive the kernel: no fsync.
        bytes
            .and_then(|bytes| pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600))
            .doing(|| format!("write {}", path.display()))
    }

    /// Keeps the configuration for `exec` and `delete`.
    ///
    /// # Errors
    /// As write(2).
    pub fn save_config(&self, bytes: &[u8]) -> Result<(), Failure> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.config();
        let mut options = std::fs::OpenOptions::new();
        options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, bytes))
            .doing(|| format!("write {}", path.display()))
    }

    /// The kept configuration.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// The socket on which the created process waits.
    #[must_use]
    pub fn start_socket(&self) -> PathBuf {
        self.path.join("exec.sock")
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the directory; none is fine.
    ///
    /// # Errors
    /// As unlink(2) and rmdir(2).
    pub fn remove(&self) -> Result<(), Failure> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.doing(|| format!("remove {}", self.path.display())),
        }
    }

    /// What the kernel says about the container of `record`.
    #[must_use]
    pub fn status(&self, record: &Record) -> Status {
        let Some(init) = &record.init else { return Status::Creating };
        if !init.is_alive() {
            return Status::Stopped;
        }
        let frozen = || {
            let paths = record.cgroup.clone()?;
            Cgroup::open(paths).is_frozen().ok()
        };
        if frozen() == Some(true) {
            return Status::Paused;
        }
        if self.start_socket().exists() { Status::Created } else { Status::Running }
    }
}

impl Lock {
    /// The locked directory.
    #[must_use]
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }
}

impl Record {
    /// True for a container that stays in the cgroup of whoever made it.
    #[must_use]
    pub fn has_no_cgroup(&self) -> bool {
        self.cgroup.as_ref().is_some_and(|paths| paths.unified.is_none() && paths.v1.is_empty())
    }

    /// A record for a container about to be made.
    #[must_use]
    pub fn new(id: &str, spec: &crate::config::Spec, bundle: &Path, plan: &Plan) -> Self {
        let joined = plan.namespaces.join.iter();
        Self {
            format: FORMAT,
            oci_version: spec.oci_version.clone(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            rootfs: plan.root.path.clone(),
            created: crate::time::now_rfc3339(),
            owner: rustix::process::getuid().as_raw(),
            annotations: spec.annotations.clone().unwrap_or_default(),
            init: None,
            cgroup: None,
            namespaces: joined.fold(plan.namespaces.create, |bits, (kind, _)| bits | bit(*kind)),
            isolation: Vec::new(),
            rdt: None,
            has_poststart: !plan.hooks.poststart.is_empty(),
            has_poststop: !plan.hooks.poststop.is_empty(),
        }
    }

    /// The state as the specification defines it: what hooks and `state` get.
    ///
    /// A stopped container has no process, which runc expresses as pid 0.
    #[must_use]
    pub fn oci_state(&self, status: Status) -> OciState<'_> {
        let pid = match (self.init, status) {
            (Some(_), Status::Stopped) | (None, _) => 0,
            (Some(init), _) => init.pid,
        };
        OciState {
            oci_version: &self.oci_version,
            id: &self.id,
            status,
            pid,
            bundle: &self.bundle,
            annotations: &self.annotations,
        }
    }
}

/// runtime-spec, "State".
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciState<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: Status,
    pid: i32,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    annotations: &'a HashMap<String, String>,
}

impl OciState<'_> {
    /// The document on a hook's standard input.
    ///
    /// # Errors
    /// Never for a record that was read from JSON; paths must be UTF-8.
    pub fn to_json(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(io::Error::from).doing(|| "encode the state".into())
    }
}

/// The longest name; it becomes a directory name in several places.
const MAX_ID: usize = 255;

fn check_id(id: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    let sound =
        !id.is_empty() && id.len() <= MAX_ID && id != "." && id != ".." && id.chars().all(allowed);
    if sound { Ok(()) } else { Err(Error::InvalidId(id.to_owned())) }
}

/// The containers below `root` with their records, by name; unreadable ones are returned as
/// errors beside their name.
///
/// # Errors
/// When `root` cannot be listed; a missing one is empty.
pub fn list(root: &Path) -> Result<Vec<(String, Result<Record>)>> {
    let entries = match std::fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.doing(|| format!("list {}", root.display()))?,
    };
    let mut all = Vec::new();
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        let Ok(id) = entry.file_name().into_string() else { continue };
        let Ok(directory) = StateDir::of(root, &id) else { continue };
        match directory.load() {
            // Being made or removed at this moment.
            Err(Error::NotFound) => {}
            loaded => all.push((id, loaded)),
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_are_refused() {
        for id in ["", ".", "..", "a/b", "../x", "a b", "a\n", "ä", &"x".repeat(256)] {
            assert!(matches!(check_id(id), Err(Error::InvalidId(_))), "{id:?}");
        }
        for id in ["a", "A_1+2-3.4", "..."] {
            assert!(check_id(id).is_ok(), "{id}");
        }
    }

    #[test]
    fn a_process_is_known_by_number_and_start_time() {
        let me = Process::observe(std::process::id() as i32).unwrap();
        assert!(me.is_alive());
        assert!(me.open().unwrap().is_some());
        let reused = Process { start_time: me.start_time + 1, ..me };
        assert!(!reused.is_alive());
        assert!(reused.open().unwrap().is_none());
    }

    #[test]
    fn a_command_name_cannot_forge_the_fields_after_it() {
        let text = format!("7 (a) Z 1) S {} 4242 0", "0 ".repeat(18).trim_end());
        let stat = parse_stat(&text).unwrap();
        assert!(!stat.ended);
        assert_eq!(stat.start_time, 4242);
    }

    #[test]
    fn a_directory_is_made_once_and_found_gone() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::of(&root.path().join("deep"), "c").unwrap();
        let lock = state.create().unwrap();
        assert!(matches!(state.create(), Err(Error::Exists)));
        drop(lock);
        state.remove().unwrap();
        assert!(matches!(state.lock_exclusive(), Err(Error::NotFound)));
        assert!(matches!(state.load(), Err(Error::NotFound)));
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_the_end_of_the_list() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::of(root.path(), "c").unwrap();
        let _lock = state.create().unwrap();
        std::fs::write(state.path().join("state.json"), "{").unwrap();
        let all = list(root.path()).unwrap();
        assert!(matches!(all.as_slice(), [(id, Err(Error::State { .. }))] if id == "c"));
    }
}
