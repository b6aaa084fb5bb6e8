//! The isolation a container's annotations ask for, enforced between its cgroup limits and
//! its first process.

use std::collections::HashMap;
use std::io;

use oci_spec::runtime::LinuxResources;
use pinion_cgroup::{CgroupPaths, Hierarchies};
use pinion_placement::{EnforceError, Host, Receipt, Request, Target, UndoStep};

use crate::error::{Doing, Error, Result, chain};
use crate::state::{Record, StateDir};

/// The request in `annotations`, if any.
///
/// # Errors
/// [`Error::Invalid`] with the annotation's name.
pub fn request(annotations: &HashMap<String, String>) -> Result<Option<Request>> {
    Request::from_annotations(annotations).map_err(|error| Error::Invalid(error.to_string()))
}

/// Enforces `request` on the container of `record`, whose cgroup exists with its limits.
/// Every undo step is in the record before the change it undoes.
///
/// # Errors
/// [`Error::Isolation`] for a strict request that is not in force.
pub fn enforce(
    request: &Request,
    resources: &LinuxResources,
    hierarchies: &Hierarchies,
    record: &mut Record,
    directory: &StateDir,
) -> Result<Receipt> {
    let paths = record.cgroup.clone().ok_or(Error::NotFound)?;
    let target = target(resources, hierarchies, &paths)?;
    let host = Host::detect().map_err(|error| Error::Placement(error.to_string()))?;
    let mut journal = |step: &UndoStep| {
        record.isolation.push(step.clone());
        directory.save(record).map_err(|failure| io::Error::other(chain(&failure)))
    };
    pinion_placement::enforce(&host, &target, request, &mut journal).map_err(|error| match error {
        EnforceError::Refused { refusal, .. } => Error::Isolation {
            term: refusal.term.to_string(),
            reason: refusal.reason.to_string(),
            detail: refusal.detail,
        },
        other => Error::Placement(chain(&other)),
    })
}

/// Takes back what the record says was changed. What fails stays in the record.
///
/// # Errors
/// The texts of the failures.
pub fn undo(record: &mut Record) -> Result<(), Vec<String>> {
    if record.isolation.is_empty() {
        return Ok(());
    }
    let host = Host::detect().map_err(|error| vec![error.to_string()])?;
    match pinion_placement::undo(&host, &record.isolation) {
        Ok(()) => {
            record.isolation.clear();
            Ok(())
        }
        Err(failures) => {
            let texts = failures.iter().map(|failure| chain(failure)).collect();
            record.isolation = failures.into_iter().map(|failure| failure.step).collect();
            Err(texts)
        }
    }
}

fn target(
    resources: &LinuxResources,
    hierarchies: &Hierarchies,
    paths: &CgroupPaths,
) -> Result<Target> {
    let parse_error = |error: &dyn std::error::Error| Error::Invalid(error.to_string());
    let cpu = resources.cpu().as_ref();
    let cpus = cpu.and_then(|cpu| cpu.cpus().clone()).filter(|list| !list.is_empty());
    let mems = cpu.and_then(|cpu| cpu.mems().clone()).filter(|list| !list.is_empty());
    let mut target = Target {
        cgroup: None,
        v1: paths.v1.clone(),
        cpus: cpus.map(|list| list.parse()).transpose().map_err(|e| parse_error(&e))?,
        mems: mems.map(|list| list.parse()).transpose().map_err(|e| parse_error(&e))?,
        ..Target::default()
    };
    if let (Some(root), Some(directory)) = (hierarchies.v2_root(), &paths.unified) {
        target.cgroup = directory.strip_prefix(root).ok().map(Into::into);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size().parse().map_err(|e| parse_error(&e))?;
        target.hugepages.insert(size, u64::try_from(limit.limit()).unwrap_or(u64::MAX));
    }
    Ok(target)
}

/// Enforces the container's request again after its limits changed. The changed limits
/// become part of the kept configuration, so that the next change starts from them.
///
/// # Errors
/// As [`enforce`].
pub fn renew(changed: &LinuxResources, record: &mut Record, directory: &StateDir) -> Result<()> {
    let Some(request) = request(&record.annotations)? else { return Ok(()) };
    let path = directory.config();
    let (parsed, bytes) = crate::config::load_spec(&path)?;
    let kept = parsed.value.linux.and_then(|linux| linux.resources().clone());
    let resources = merged(kept.unwrap_or_default(), changed);
    replace_resources(&bytes, &resources)
        .and_then(|bytes| pinion_sys::atomic_file::write_volatile(&path, &bytes, 0o600))
        .doing(|| format!("write {}", path.display()))?;
    enforce(&request, &resources, &Hierarchies::detect()?, record, directory).map(drop)
}

fn replace_resources(config: &[u8], resources: &LinuxResources) -> io::Result<Vec<u8>> {
    let mut document: serde_json::Value = serde_json::from_slice(config)?;
    document["linux"]["resources"] = serde_json::to_value(resources)?;
    Ok(serde_json::to_vec(&document)?)
}

/// The limits that isolation depends on, changed ones first.
fn merged(mut old: LinuxResources, new: &LinuxResources) -> LinuxResources {
    if let Some(changed) = new.cpu() {
        let mut cpu = old.cpu().clone().unwrap_or_default();
        let given = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
        if let Some(cpus) = given(changed.cpus()) {
            cpu.set_cpus(Some(cpus));
        }
        if let Some(mems) = given(changed.mems()) {
            cpu.set_mems(Some(mems));
        }
        old.set_cpu(Some(cpu));
    }
    if let Some(limits) = new.hugepage_limits() {
        old.set_hugepage_limits(Some(limits.clone()));
    }
    old
}
