//! `linux.intelRdt`: cache and memory bandwidth through the resctrl file system.
//!
//! ```text
//! <resctrl>/schemata, tasks            the default class, closID "/"
//! <resctrl>/<closID or id>/schemata    the container's class
//!                         /tasks       every process of the container
//!                         /mon_groups/<id>/tasks   with enableMonitoring
//! ```
//!
//! A class named by `closID` belongs to whoever administers the node: it stays when the
//! container goes, and one that exists must already say what the container asks for. Only a
//! class under the container's own name, made for it, is removed with it (runtime-spec,
//! "IntelRdt"). AMD's QoS extensions use the same file system.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxIntelRdt;
use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Failure, Result};
use crate::state::{Record, StateDir};

/// What a container asks of resctrl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdtPlan {
    /// Directory of the class below the mount; empty for the default class.
    class: String,
    /// True when the class is named by `closID` and not after the container.
    named: bool,
    /// Lines for `schemata`, in the order to write them.
    lines: Vec<String>,
    /// Directory below `mon_groups`.
    monitor: Option<String>,
}

/// What was made, for the container's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdtRecord {
    /// The class's directory.
    pub class: PathBuf,
    /// True when the directory goes with the container.
    pub own: bool,
    /// The monitoring group, which always goes with the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<PathBuf>,
}

impl RdtPlan {
    /// Checks the configuration of container `id`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn plan(asked: &LinuxIntelRdt, id: &str) -> Result<Self> {
        let named = asked.clos_id().as_ref().filter(|name| !name.is_empty());
        let class = match named.map(String::as_str) {
            Some("/") => "",
            Some(name @ ("." | "..")) => return Err(bad("closID", name)),
            Some(name) if name.contains(['/', '\n', '\0']) => return Err(bad("closID", name)),
            Some(name) => name,
            None => id,
        };
        let mut lines = Vec::new();
        for (field, line, prefix) in [
            ("l3CacheSchema", asked.l3_cache_schema(), "L3"),
            ("memBwSchema", asked.mem_bw_schema(), "MB:"),
        ] {
            let Some(line) = line.as_deref().filter(|line| !line.is_empty()) else { continue };
            if !line.starts_with(prefix) {
                return Err(bad(field, line));
            }
            // runc: older callers pass the memory bandwidth along with the cache.
            lines.extend(line.split('\n').map(str::to_owned));
        }
        for line in asked.schemata().iter().flatten() {
            if line.contains('\n') || !line.contains(':') {
                return Err(bad("schemata", line));
            }
            lines.push(line.clone());
        }
        #[allow(deprecated, reason = "the two words of runtime-spec 1.1 for enableMonitoring")]
        let monitored = [asked.enable_monitoring(), asked.enable_cmt(), asked.enable_mbm()]
            .contains(&&Some(true));
        let monitor = monitored.then(|| id.to_owned());
        Ok(Self { class: class.to_owned(), named: named.is_some(), lines, monitor })
    }

    /// The plan for `update` of a container without a class so far, or new lines for its own.
    ///
    /// # Errors
    /// As [`RdtPlan::plan`].
    pub fn changed(l3: Option<&str>, memory: Option<&str>, id: &str) -> Result<Self> {
        let mut asked = LinuxIntelRdt::default();
        asked
            .set_l3_cache_schema(l3.map(str::to_owned))
            .set_mem_bw_schema(memory.map(str::to_owned));
        Self::plan(&asked, id)
    }

    /// What [`RdtPlan::apply`] will leave below the mount `root`.
    #[must_use]
    pub fn record(&self, root: &Path) -> RdtRecord {
        let class = if self.class.is_empty() { root.to_owned() } else { root.join(&self.class) };
        RdtRecord {
            own: !self.named && !class.exists(),
            monitor: self.monitor.as_ref().map(|name| class.join("mon_groups").join(name)),
            class,
        }
    }

    /// Makes or checks the class and the monitoring group of `record`.
    ///
    /// # Errors
    /// A class that must exist and does not, or says something else; what the kernel wrote
    /// into `info/last_cmd_status`.
    pub fn apply(&self, root: &Path, record: &RdtRecord) -> Result<(), Failure> {
        let class = &record.class;
        let exists = class.is_dir();
        if self.named && !exists && self.lines.is_empty() {
            return Err(Failure::refused(format!(
                "linux.intelRdt: the class {} does not exist and closID comes without a schema to make it from",
                class.display()
            )));
        }
        if self.named && exists {
            self.compare(class)?;
        }
        if !exists {
            explained(root, std::fs::create_dir(class), || format!("mkdir {}", class.display()))?;
        }
        self.write_lines(root, class)?;
        match &record.monitor {
            None => Ok(()),
            Some(group) => match std::fs::create_dir(group) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                made => explained(root, made, || format!("mkdir {}", group.display())),
            },
        }
    }

    /// Writes the plan's lines into the `schemata` file of `class`, one write each: the
    /// kernel takes them one by one anyway, and so the error names the line.
    ///
    /// # Errors
    /// As [`RdtPlan::apply`].
    pub fn write_lines(&self, root: &Path, class: &Path) -> Result<(), Failure> {
        let path = class.join("schemata");
        for line in &self.lines {
            let open = std::fs::OpenOptions::new().append(true).create(true).open(&path);
            let written = open.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
            explained(root, written, || format!("write {line:?} to {}", path.display()))?;
        }
        Ok(())
    }

    /// runtime-spec: a class that exists must have the schemas that are asked for.
    fn compare(&self, class: &Path) -> Result<(), Failure> {
        let path = class.join("schemata");
        if self.lines.is_empty() {
            return Ok(());
        }
        let present =
            std::fs::read_to_string(&path).doing(|| format!("read {}", path.display()))?;
        match self.lines.iter().find(|line| !holds(&present, line)) {
            None => Ok(()),
            Some(line) => Err(Failure::refused(format!(
                "linux.intelRdt: the existing class {} does not have the schema {line:?}",
                class.display()
            ))),
        }
    }
}

impl RdtRecord {
    /// Puts a process into the class and the monitoring group.
    ///
    /// # Errors
    /// Names the `tasks` file.
    pub fn add(&self, pid: i32) -> Result<(), Failure> {
        let groups = [Some(&self.class), self.monitor.as_ref()];
        for group in groups.into_iter().flatten() {
            let path = group.join("tasks");
            let open = std::fs::OpenOptions::new().append(true).create(true).open(&path);
            open.and_then(|mut file| file.write_all(format!("{pid}\n").as_bytes()))
                .doing(|| format!("write {pid} to {}", path.display()))?;
        }
        Ok(())
    }

    /// Removes what was made for the container.
    ///
    /// # Errors
    /// As rmdir(2); what is gone already is fine.
    pub fn remove(&self) -> Result<(), Failure> {
        let own = self.own.then_some(&self.class);
        for directory in self.monitor.iter().chain(own) {
            match std::fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.doing(|| format!("rmdir {}", directory.display()))?,
            }
        }
        Ok(())
    }
}

/// `update --l3-cache-schema --mem-bw-schema`: new lines for the class of a running
/// container, which gets one of its own with all its processes `pids` if it has none.
///
/// # Errors
/// As [`RdtPlan::apply`].
pub fn update(
    (l3, memory): (Option<&str>, Option<&str>),
    record: &mut Record,
    directory: &StateDir,
    pids: &[i32],
) -> Result<()> {
    let plan = RdtPlan::changed(l3, memory, &record.id)?;
    let root = mount_point()?;
    if let Some(groups) = &record.rdt {
        return Ok(plan.write_lines(&root, &groups.class)?);
    }
    let groups = plan.record(&root);
    record.rdt = Some(groups.clone());
    directory.save(record)?;
    plan.apply(&root, &groups)?;
    for pid in pids {
        match groups.add(*pid) {
            Err(failure) if failure.errno() == Some(libc::ESRCH) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Where resctrl is mounted.
///
/// # Errors
/// When it is not, in words that say what is missing.
pub fn mount_point() -> Result<PathBuf, Failure> {
    let path = "/proc/self/mountinfo";
    let table = std::fs::read_to_string(path).doing(|| format!("read {path}"))?;
    find_mount(&table).ok_or_else(|| {
        Failure::refused(
            "linux.intelRdt: no resctrl file system is mounted (on a machine with Intel RDT or AMD QoS: mount -t resctrl resctrl /sys/fs/resctrl)",
        )
    })
}

fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        (kind.split(' ').next() == Some("resctrl"))
            .then(|| place.split(' ').nth(4).map(PathBuf::from))
            .flatten()
    })
}

/// True when `schemata` says for every id of `line` what `line` says. Masks are numbers:
/// the kernel pads them with zeros.
fn holds(schemata: &str, line: &str) -> bool {
    let Some((resource, domains)) = line.split_once(':') else { return false };
    let same_resource = |other: &&str| {
        other.split_once(':').is_some_and(|(name, _)| name.trim() == resource.trim())
    };
    let Some(present) = schemata.lines().find(same_resource) else { return false };
    let present = present.split_once(':').map_or("", |(_, domains)| domains);
    let value_of = |id: &str| {
        let entries = present.split(';').filter_map(|entry| entry.split_once('='));
        entries.filter(|(other, _)| other.trim() == id).map(|(_, value)| number(value)).next()
    };
    domains.split(';').filter(|entry| !entry.trim().is_empty()).all(|entry| {
        let Some((id, value)) = entry.split_once('=') else { return false };
        value_of(id.trim()) == Some(number(value))
    })
}

fn number(text: &str) -> String {
    let digits = text.trim().trim_start_matches("0x").trim_start_matches('0');
    if digits.is_empty() { "0".into() } else { digits.to_ascii_lowercase() }
}

/// Adds the kernel's explanation to an error of resctrl.
fn explained(
    root: &Path,
    outcome: io::Result<()>,
    what: impl FnOnce() -> String,
) -> Result<(), Failure> {
    outcome.doing(|| {
        let status = std::fs::read_to_string(root.join("info/last_cmd_status")).unwrap_or_default();
        match status.trim() {
            "" | "ok" => what(),
            status => format!("{} (last_cmd_status: {status})", what()),
        }
    })
}

fn bad(field: &str, value: &str) -> Error {
    Error::Invalid(format!("linux.intelRdt.{field}: {value:?} is not possible"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<RdtPlan> {
        RdtPlan::plan(&serde_json::from_str(json).unwrap(), "c1")
    }

    fn applied(json: &str, root: &Path) -> Result<RdtRecord> {
        let plan = plan(json)?;
        let record = plan.record(root);
        plan.apply(root, &record)?;
        Ok(record)
    }

    /// A directory that takes the place of the mount.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("schemata"), "L3:0=fffff;1=fffff\nMB:0=100;1=100\n")
            .unwrap();
        root
    }

    /// In a real resctrl, files come and go with their directory.
    fn forget_files(directory: &Path) {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            if entry.path().is_file() {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        let _ = std::fs::remove_dir(directory.join("mon_groups"));
    }

    #[test]
    fn a_container_without_closid_has_a_class_of_its_own_that_goes_with_it() {
        let root = tree();
        let record = applied(
            r#"{"l3CacheSchema":"L3:0=f0;1=f","memBwSchema":"MB:0=20;1=70","schemata":["L2:0=f"]}"#,
            root.path(),
        )
        .unwrap();
        let class = root.path().join("c1");
        assert_eq!(record, RdtRecord { class: class.clone(), own: true, monitor: None });
        let written = std::fs::read_to_string(class.join("schemata")).unwrap();
        assert_eq!(written, "L3:0=f0;1=f\nMB:0=20;1=70\nL2:0=f\n");
        record.add(42).unwrap();
        assert_eq!(std::fs::read_to_string(class.join("tasks")).unwrap(), "42\n");
        forget_files(&class);
        record.remove().unwrap();
        assert!(!class.exists());
        record.remove().unwrap();
    }

    #[test]
    fn a_named_class_stays_and_must_agree_with_what_is_asked() {
        let root = tree();
        let json = r#"{"closID":"gold","schemata":["L3:0=0f0"]}"#;
        let record = applied(json, root.path()).unwrap();
        assert!(!record.own);
        let class = root.path().join("gold");
        std::fs::write(class.join("schemata"), "    L3:0=000f0;1=fffff\n    MB:0=100\n").unwrap();
        applied(json, root.path()).unwrap();
        for other in [
            r#"{"closID":"gold","schemata":["L3:0=f"]}"#,
            r#"{"closID":"gold","schemata":["L2:0=f"]}"#,
            r#"{"closID":"gold","l3CacheSchema":"L3:0=f0;2=f"}"#,
        ] {
            let error = applied(other, root.path()).unwrap_err().to_string();
            assert!(error.contains("does not have the schema"), "{error}");
        }
        record.remove().unwrap();
        assert!(class.exists());
    }

    #[test]
    fn a_named_class_without_schemas_must_exist() {
        let root = tree();
        let error = applied(r#"{"closID":"none"}"#, root.path()).unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
        std::fs::create_dir(root.path().join("none")).unwrap();
        let record = applied(r#"{"closID":"none"}"#, root.path()).unwrap();
        assert!(!record.class.join("schemata").exists(), "nothing is written without schemas");
    }

    #[test]
    fn the_root_of_the_tree_is_the_default_class_and_can_be_monitored() {
        let root = tree();
        std::fs::create_dir(root.path().join("mon_groups")).unwrap();
        let record = applied(r#"{"closID":"/","enableMonitoring":true}"#, root.path()).unwrap();
        assert_eq!(record.class, root.path());
        let group = root.path().join("mon_groups/c1");
        assert!(group.is_dir());
        record.add(7).unwrap();
        assert_eq!(std::fs::read_to_string(group.join("tasks")).unwrap(), "7\n");
        forget_files(&group);
        record.remove().unwrap();
        assert!(!group.exists() && root.path().exists());
    }

    #[test]
    fn a_refusal_carries_the_kernels_explanation() {
        let root = tree();
        std::fs::create_dir(root.path().join("info")).unwrap();
        std::fs::write(root.path().join("info/last_cmd_status"), "out of CLOSIDs\n").unwrap();
        let json = r#"{"closID":"a","enableMonitoring":true,"schemata":["MB:0=1"]}"#;
        let error = applied(json, root.path()).unwrap_err();
        assert!(crate::error::chain(&error).contains("last_cmd_status: out of CLOSIDs"));
    }

    #[test]
    fn impossible_names_and_lines_are_refused() {
        for json in [
            r#"{"closID":"a/b"}"#,
            r#"{"closID":".."}"#,
            r#"{"l3CacheSchema":"MB:0=1"}"#,
            r#"{"memBwSchema":"0=1"}"#,
            r#"{"schemata":["L3:0=f\nMB:0=1"]}"#,
            r#"{"schemata":["nonsense"]}"#,
        ] {
            assert!(plan(json).is_err(), "{json}");
        }
    }

    #[test]
    fn the_mount_is_found_wherever_it_is() {
        let table = "22 1 0:20 / /proc rw - proc proc rw\n30 1 0:40 / /mnt/rdt rw,nosuid shared:1 - resctrl resctrl rw\n";
        assert_eq!(find_mount(table), Some("/mnt/rdt".into()));
        assert_eq!(find_mount("22 1 0:20 / /proc rw - proc proc rw\n"), None);
    }
}
