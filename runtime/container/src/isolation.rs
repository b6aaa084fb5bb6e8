//! The isolation a container's annotations ask for, enforced between its cgroup limits and
//! its first process.

use std::collections::HashMap;
use std::io;

use oci_spec::runtime::LinuxResources;
use pinion_cgroup::{Cgroup, CgroupPaths, Hierarchies};
use pinion_placement::{
    EnforceError, Facts, Host, Receipt, Refusal, Request, Subject, Target, TermName, UndoStep,
};

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
        if record.isolation.contains(step) {
            return Ok(()); // undo is idempotent, and a long life must not make a long list
        }
        record.isolation.push(step.clone());
        directory.save(record).map_err(|failure| io::Error::other(chain(&failure)))
    };
    pinion_placement::enforce(&host, &target, request, &mut journal).map_err(|error| match error {
        EnforceError::Refused { refusal, .. } => refused(refusal),
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

/// Changes the limits of a running container, and what isolation depends on with them: all
/// of it, or nothing and an error. Without a request for isolation the limits are simply
/// written; with one and no change of limits, what was lost is asked for again.
///
/// ```text
///   plan for the new limits ──refused──▶ error, nothing written
///     │
///   write limits ─▶ enforce ─▶ read back ──▶ done
///     └───────┬───────┘ failed, or exclusivity gone that was there
///             ▼
///   old limits, old configuration, enforce ──▶ error
/// ```
///
/// # Errors
/// [`Error::Isolation`] when the request cannot be in force with these limits.
pub fn update(changed: &LinuxResources, record: &mut Record, directory: &StateDir) -> Result<()> {
    let paths = record.cgroup.clone().ok_or(Error::NotRunning)?;
    let group = Cgroup::open(paths.clone());
    let Some(request) = request(&record.annotations)? else { return Ok(group.update(changed)?) };
    // The container may hold its huge pages by now, so they cannot be touched a second time.
    let request = Request { prefault: Vec::new(), ..request };
    let hierarchies = Hierarchies::detect()?;
    let config = directory.config();
    let (parsed, bytes) = crate::config::load_spec(&config)?;
    let old = parsed.value.linux.and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let new = merged(old.clone(), changed);
    let before = Change::look(&old, &hierarchies, &paths, &request)?;
    let after = Change::look(&new, &hierarchies, &paths, &request)?;
    let moves = before.target.cpus != after.target.cpus || before.target.mems != after.target.mems;
    let was_exclusive = before.exclusive();
    if moves {
        after.admit(was_exclusive)?;
    }
    let heals = *changed == LinuxResources::default();
    let keep = |bytes: &[u8]| {
        pinion_sys::atomic_file::write_volatile(&config, bytes, 0o600)
            .doing(|| format!("write {}", config.display()))
    };
    let mut attempt = || -> Result<()> {
        group.update(changed)?;
        let bytes = replace_resources(&bytes, &new).doing(|| "change config.json".to_owned())?;
        keep(&bytes)?;
        let receipt = enforce(&request, &new, &hierarchies, record, directory)?;
        let lost = receipt.term(TermName::ExclusiveCpus).and_then(pinion_placement::Term::refusal);
        match lost.filter(|_| was_exclusive || heals) {
            Some(refusal) => Err(refused(refusal)),
            None => Ok(()),
        }
    };
    let Err(error) = attempt() else { return Ok(()) };
    if heals {
        return Err(error); // there is nothing to go back to
    }
    let back = group.update(&limits_only(&old)).map_err(Error::from);
    let back = back.and(keep(&bytes).map_err(Error::from));
    let back = back.and_then(|()| enforce(&request, &old, &hierarchies, record, directory));
    Err(match back {
        Ok(_) => error,
        Err(second) => Error::Placement(format!(
            "{}; and the old limits could not be put back: {}",
            chain(&error),
            chain(&second)
        )),
    })
}

/// A container under some limits, and the machine around it.
struct Change {
    host: Host,
    target: Target,
    request: Request,
}

impl Change {
    fn look(
        resources: &LinuxResources,
        hierarchies: &Hierarchies,
        paths: &CgroupPaths,
        request: &Request,
    ) -> Result<Self> {
        let host = Host::detect().map_err(|error| Error::Placement(error.to_string()))?;
        let target = target(resources, hierarchies, paths)?;
        Ok(Self { host, target, request: request.clone() })
    }

    /// Whether its partition is in force.
    fn exclusive(&self) -> bool {
        let subject = Subject::new(&self.target, &self.request);
        self.request.partition.is_some() && pinion_placement::lost(&self.host, &subject).is_none()
    }

    /// Refuses before anything is written what could only fail, or would only degrade: new
    /// CPUs of an exclusive container, and nodes without room for its huge pages.
    fn admit(&self, exclusive: bool) -> Result<()> {
        let _lock = self.host.lock().map_err(|error| Error::Placement(error.to_string()))?;
        let facts = Facts::read(&self.host, &self.target)
            .map_err(|error| Error::Placement(chain(&error)))?;
        let planned = pinion_placement::plan(&facts, &self.target, &self.request);
        let plan = planned.map_err(refused)?;
        let exclusivity = |refusal: &&Refusal| refusal.term == TermName::ExclusiveCpus;
        if let Some(refusal) = plan.shortfalls.iter().find(exclusivity).filter(|_| exclusive) {
            return Err(refused(refusal.clone()));
        }
        let root = self.host.v2.as_deref().zip(self.target.cgroup.as_deref());
        let unified = root.map(|(root, path)| root.join(path.strip_prefix("/").unwrap_or(path)));
        let group = self.target.v1.get("hugetlb").cloned().or(unified);
        let mems = self.target.mems.as_ref().filter(|mems| !mems.is_empty());
        let (Some(group), Some(mems)) = (group, mems) else { return Ok(()) };
        let held = pinion_placement::hugepages_held(&group, &facts.topology);
        match pinion_placement::moves_hugepages(&held, &facts.topology, mems) {
            Some(refusal) => Err(refused(refusal)),
            None => Ok(()),
        }
    }
}

fn refused(refusal: Refusal) -> Error {
    Error::Isolation {
        term: refusal.term.to_string(),
        reason: refusal.reason.to_string(),
        detail: refusal.detail,
    }
}

/// Those of the limits that an update can have changed.
fn limits_only(old: &LinuxResources) -> LinuxResources {
    let mut limits = LinuxResources::default();
    limits.set_cpu(old.cpu().clone());
    limits.set_memory(*old.memory());
    limits.set_hugepage_limits(old.hugepage_limits().clone());
    limits.set_pids(*old.pids());
    limits
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
