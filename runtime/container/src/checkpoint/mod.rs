//! `checkpoint` and `restore`: a container written to files by CRIU and read back.
//!
//! ```text
//! checkpoint   running ──criu dump──▶ images + descriptors.json ──▶ (deleted, or left running)
//! restore      images + bundle ──cgroup, mountpoints, criu restore──▶ running
//! ```
//!
//! [`rpc`] encodes CRIU's protocol, [`criu`] speaks it, [`external`] decides what of a
//! container belongs to the outside and is only referred to by name: bind mounts, cgroup
//! mounts, masks, joined namespaces. The options and the files in the image directory are
//! those of runc, so that either runtime restores what the other has written.

mod criu;
mod dump;
mod external;
mod restore;
mod rpc;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::error::{Doing, Error, Failure, Result};
use rpc::Encoder;

pub use dump::checkpoint;
pub use restore::{RestoreOptions, restore};

/// What `checkpoint` and `restore` are told about CRIU's work.
#[derive(Clone, Debug, Default)]
pub struct CriuOptions {
    /// The directory of the image files.
    pub images: PathBuf,
    /// The directory of logs and work files; that of the images when absent.
    pub work: Option<PathBuf>,
    /// The directory of an earlier pre-dump, relative to `images`.
    pub parent: Option<PathBuf>,
    /// Leave the container running.
    pub leave_running: bool,
    /// Allow established TCP connections.
    pub tcp_established: bool,
    /// Leave out TCP connections that are just being made.
    pub tcp_skip_in_flight: bool,
    /// Link files that have lost their last name back into the file system.
    pub link_remap: bool,
    /// Allow UNIX sockets connected to the outside.
    pub ext_unix_sk: bool,
    /// Allow a terminal from outside.
    pub shell_job: bool,
    /// Serve memory pages on demand with userfaultfd(2).
    pub lazy_pages: bool,
    /// Gets a NUL byte once pages can be served.
    pub status_fd: Option<i32>,
    /// Where pages go instead of files: address and port.
    pub page_server: Option<(String, u16)>,
    /// Allow file locks.
    pub file_locks: bool,
    /// Write memory only, as a parent for a later dump.
    pub pre_dump: bool,
    /// What CRIU does with cgroups.
    pub cgroups: CgroupsMode,
    /// `CLONE_NEW*` bits of namespaces to restore without their contents, besides network.
    pub empty_namespaces: u64,
    /// Free the pages in parent images that newer ones replace.
    pub auto_dedup: bool,
    /// `TYPE:NAME` of the security profile to restore into.
    pub lsm_profile: Option<String>,
    /// SELinux context for restored mounts.
    pub lsm_mount_context: Option<String>,
}

/// `--manage-cgroups-mode`; CRIU's `criu_cg_mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum CgroupsMode {
    /// Leave them alone.
    Ignore = 0,
    /// Restore the properties of those that had to be made.
    Soft = 3,
    /// Restore the properties of all.
    Full = 4,
    /// Refuse if one exists already.
    Strict = 5,
    /// What CRIU prefers.
    #[default]
    Default = 6,
}

impl CgroupsMode {
    /// The mode of this name.
    ///
    /// # Errors
    /// [`Error::Invalid`] in runc's words.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "" => Self::Default,
            "soft" => Self::Soft,
            "full" => Self::Full,
            "strict" => Self::Strict,
            "ignore" => Self::Ignore,
            _ => return Err(Error::Invalid("invalid manage-cgroups-mode value".into())),
        })
    }
}

/// The names of the standard descriptors at the time of the dump.
const DESCRIPTORS: &str = "descriptors.json";
/// What runc calls the annotation that names a CRIU configuration file, and the default.
const CONFIG_ANNOTATION: &str = "org.criu.config";
const DEFAULT_CONFIG: &str = "/etc/criu/runc.conf";

/// The directories of one operation, open: CRIU is told descriptors.
#[derive(Debug)]
struct Directories {
    images: OwnedFd,
    work: Option<OwnedFd>,
    log: PathBuf,
}

impl Directories {
    fn open(options: &CriuOptions, log: &str) -> Result<Self, Failure> {
        let images = open_directory(&options.images)?;
        let work = options.work.as_deref().map(open_directory).transpose()?;
        let place = options.work.as_ref().unwrap_or(&options.images);
        Ok(Self { images, work, log: place.join(log) })
    }

    /// CRIU's own account of a failure, added to it.
    fn explain(&self, error: Error) -> Error {
        let Error::System(failure) = error else { return error };
        let why = criu::errors_in(&self.log);
        let why = if why.is_empty() { why } else { format!(": {why}") };
        let what = format!("{}{why} (see {})", failure.what, self.log.display());
        Error::System(Failure { what, ..failure })
    }
}

/// Makes a directory if there is none, and opens it.
fn open_directory(path: &Path) -> Result<OwnedFd, Failure> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.doing(|| format!("mkdir {}", path.display()))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).doing(|| format!("open {}", path.display()))
}

/// The options that dump and restore have in common.
fn common(
    options: &CriuOptions,
    directories: &Directories,
    log: &str,
    annotations: &std::collections::HashMap<String, String>,
) -> Encoder {
    const LOG_LEVEL: i64 = 4;
    let mut encoded = Encoder::default();
    encoded
        .number(1, i64::from(directories.images.as_raw_fd()))
        .flag(4, options.ext_unix_sk)
        .flag(5, options.tcp_established)
        .flag(7, options.shell_job)
        .flag(8, options.file_locks)
        .number(9, LOG_LEVEL)
        .text(10, log)
        .flag(12, true)
        .flag(16, options.auto_dedup)
        .flag(24, true)
        .number(34, options.cgroups as i64)
        // Networks are not the runtime's: who made it makes it again.
        .number(38, (options.empty_namespaces | libc::CLONE_NEWNET as u64) as i64)
        .flag(48, options.lazy_pages)
        .flag(50, true);
    if let Some(work) = &directories.work {
        encoded.number(17, i64::from(work.as_raw_fd()));
    }
    match annotations.get(CONFIG_ANNOTATION).map(String::as_str) {
        Some("") => {}
        Some(path) => {
            encoded.text(51, path);
        }
        None => {
            encoded.text(51, DEFAULT_CONFIG);
        }
    }
    encoded
}

/// Adds `ext_mnt` entries: the name of an external mount and what it stands for.
fn add_mounts(options: &mut Encoder, mounts: &[(String, String)]) {
    for (key, value) in mounts {
        let mut entry = Encoder::default();
        entry.text(1, key).text(2, value);
        options.message(23, &entry);
    }
}
