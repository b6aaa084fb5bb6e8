//! `checkpoint`: the container's processes into image files.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pinion_cgroup::{CgroupPaths, Hierarchies};

use super::criu::{Session, features};
use super::external::{self, BY_DESCRIPTOR, Outside};
use super::rpc::{Encoder, Kind, Notify};
use super::{CriuOptions, DESCRIPTORS, Directories, add_mounts, common};
use crate::config::{self, Spec};
use crate::delete;
use crate::error::{Doing, Error, Failure, Result};
use crate::plan::{Facts, Plan};
use crate::state::{Record, StateDir};
use crate::status::Status;

const LOG: &str = "dump.log";

/// Writes the container `id` into image files; unless it shall run on, it is deleted
/// afterwards. The result are warnings.
///
/// # Errors
/// [`Error::CannotCheckpoint`] for a container without a running program; what CRIU says.
pub fn checkpoint(root: &Path, id: &str, options: &CriuOptions) -> Result<Vec<Error>> {
    let directory = StateDir::of(root, id)?;
    let lock = directory.lock_exclusive()?;
    let record = directory.load()?;
    match directory.status(&record) {
        Status::Running | Status::Paused => {}
        other => return Err(Error::CannotCheckpoint(other)),
    }
    let spec = config::load_spec(&directory.config())?.0.value;
    let plan = Plan::new(&spec, &record.bundle, Facts::for_spec(&spec)?)?;
    let directories = Directories::open(options, LOG)?;
    check_features(options)?;
    let encoded = encode(options, &directories, &record, &spec, &plan)?;
    let kind = if options.pre_dump { Kind::PreDump } else { Kind::Dump };
    let notified =
        |notify: &Notify, _: &[OwnedFd]| match (notify.script.as_str(), options.status_fd) {
            ("status-ready", Some(fd)) => Ok(tell_ready(fd)?),
            _ => Ok(()),
        };
    let session = Session::start(&[])?;
    session.ask(kind, &encoded, notified).map_err(|error| directories.explain(error))?;
    if options.leave_running || options.pre_dump {
        return Ok(Vec::new());
    }
    // The lock is of one file description: `delete` takes its own.
    drop(lock);
    delete::delete(root, id, true)
}

fn check_features(options: &CriuOptions) -> Result<()> {
    if !(options.pre_dump || options.lazy_pages) {
        return Ok(());
    }
    let has = features()?;
    let mut missing = Vec::new();
    if options.pre_dump && !has.mem_track {
        missing.push("MemTrack");
    }
    if options.lazy_pages && !has.lazy_pages {
        missing.push("LazyPages");
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Error::Unsupported(format!(
            "criu is missing features: [{}] (criu or this kernel cannot do it)",
            missing.join(" ")
        ))),
    }
}

fn encode(
    options: &CriuOptions,
    directories: &Directories,
    record: &Record,
    spec: &Spec,
    plan: &Plan,
) -> Result<Encoder> {
    let pid = record.init.ok_or(Error::NotRunning)?.pid;
    let paths = record.cgroup.clone().ok_or(Error::NotRunning)?;
    let mut encoded = common(options, directories, LOG, &record.annotations);
    encoded
        .number(2, i64::from(pid))
        .flag(3, options.leave_running)
        .text(13, &record.rootfs.to_string_lossy())
        .flag(18, options.link_remap)
        .flag(46, options.tcp_skip_in_flight);
    if let Some((address, port)) = &options.page_server {
        let mut server = Encoder::default();
        server.text(1, address).number(2, i64::from(*port));
        encoded.message(11, &server);
    }
    if let Some(parent) = &options.parent {
        encoded.text(14, &parent.to_string_lossy()).flag(15, true);
    }
    for (kind, word, key) in BY_DESCRIPTOR {
        if let Some(path) = plan.namespaces.path(kind) {
            let inode = std::fs::metadata(path)
                .doing(|| format!("stat the namespace {}", path.display()))?
                .ino();
            encoded.text(37, &format!("{word}[{inode}]:{key}"));
        }
    }
    if let Some(cgroup) = freezer(&paths) {
        encoded.text(44, &cgroup.to_string_lossy());
    }
    if !options.pre_dump {
        let hierarchies = Hierarchies::detect()?;
        let outside = Outside::of(&record.rootfs)?;
        let mounts = external::at_dump(plan, spec, &outside, (&hierarchies, &paths), pid);
        add_mounts(&mut encoded, &mounts);
        note_descriptors(pid, &options.images)?;
    }
    Ok(encoded)
}

/// The directory CRIU stops the processes with.
fn freezer(paths: &CgroupPaths) -> Option<PathBuf> {
    paths.v1.get("freezer").or(paths.unified.as_ref()).cloned()
}

/// What the standard descriptors are: pipes are replaced at the restore.
fn note_descriptors(pid: i32, images: &Path) -> Result<(), Failure> {
    let name = |number: i32| {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}"));
        link.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let names: Vec<String> = (0..=2).map(name).collect();
    let path = images.join(DESCRIPTORS);
    serde_json::to_vec(&names)
        .map_err(std::io::Error::from)
        .and_then(|bytes| pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600))
        .doing(|| format!("write {}", path.display()))
}

fn tell_ready(number: i32) -> Result<(), Failure> {
    let fd = pinion_sys::fd::borrow(number)
        .ok_or_else(|| Failure::refused(format!("--status-fd {number} is not open")))?;
    rustix::io::write(fd, b"\0").map(drop).doing(|| format!("write to --status-fd {number}"))
}
