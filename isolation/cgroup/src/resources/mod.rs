//! `LinuxResources` as an ordered list of file writes, and carrying it out.
//!
//! Building the list is pure ([`writes`]): each controller's section is spelt for the version
//! its controller lives on, which on a hybrid host may differ from one to the next.
//! Carrying it out knows three things per write:
//! what a missing file means, whether the value is read back, and how to put the old value
//! back when a later write fails.

pub(crate) mod v1;
pub(crate) mod v2;
mod values;

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxResources;

use crate::{Error, Result, file, lists};

pub(crate) use values::{cpu_bandwidth, io_weight, swap_on_v2};
pub use values::{cpu_shares_to_weight, hugepage_sizes};

type Text = Cow<'static, str>;

/// One value for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Write {
    /// The controller it belongs to (on v1 this selects the directory).
    pub(crate) controller: Text,
    pub(crate) file: Text,
    pub(crate) value: String,
    pub(crate) need: Need,
    pub(crate) check: Check,
    /// Another file and value that do as well when `file` does not exist.
    pub(crate) instead: Option<(Text, String)>,
}

/// What failure to write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// An error.
    Required,
    /// Nothing when the file is missing: the kernel has no such mechanism to restrain.
    IfPresent,
    /// Nothing: a first try, repeated as `Required` after a value it depends on.
    Attempt,
}

/// What must hold when the value is read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// Not read back.
    None,
    /// The same set of CPUs or nodes.
    List,
    /// The same number of bytes, rounded down by less than this many.
    Bytes(u64),
}

#[expect(clippy::needless_pass_by_value, reason = "values are literals and numbers")]
impl Write {
    fn new(controller: &'static str, file: impl Into<Text>, value: impl ToString) -> Self {
        Self {
            controller: controller.into(),
            file: file.into(),
            value: value.to_string(),
            need: Need::Required,
            check: Check::None,
            instead: None,
        }
    }

    fn need(mut self, need: Need) -> Self {
        self.need = need;
        self
    }

    fn check(mut self, check: Check) -> Self {
        self.check = check;
        self
    }

    fn or(mut self, file: &'static str, value: impl ToString) -> Self {
        self.instead = Some((file.into(), value.to_string()));
        self
    }

    fn missing(&self) -> Error {
        Error::ControllerMissing {
            controller: self.controller.to_string(),
            file: self.file.to_string(),
            value: self.value.clone(),
        }
    }
}

/// Where a host keeps its controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// All in the unified hierarchy.
    V2,
    /// On v1, except for some that only the unified hierarchy beside it offers.
    V1,
}

/// The writes for `resources`, in order; `on_v1` says where a controller lives. Devices are
/// not among them: they are no file on v2, and depend on what is in force on v1.
pub(crate) fn writes(
    resources: &LinuxResources,
    page_sizes: &[(String, u64)],
    layout: Layout,
    on_v1: impl Fn(&str) -> bool,
) -> Result<Vec<Write>> {
    let mut writes = Vec::new();
    if let Some(cpu) = resources.cpu() {
        v2::cpuset_writes(cpu, &mut writes)?;
    }
    hugetlb_writes(resources, page_sizes, on_v1("hugetlb"), &mut writes)?;
    match resources.memory() {
        Some(memory) if on_v1("memory") => v1::memory_writes(memory, &mut writes)?,
        Some(memory) => v2::memory_writes(memory, &mut writes)?,
        None => {}
    }
    match resources.cpu() {
        Some(cpu) if on_v1("cpu") => v1::cpu_writes(cpu, &mut writes)?,
        Some(cpu) => v2::cpu_writes(cpu, &mut writes)?,
        None => {}
    }
    v2::pids_writes(resources, &mut writes);
    match resources.block_io() {
        Some(block_io) if on_v1("blkio") => v1::blkio_writes(block_io, &mut writes)?,
        Some(block_io) => v2::io_writes(block_io, &mut writes)?,
        None => {}
    }
    if let Some(network) = resources.network() {
        let before = writes.len();
        v1::network_writes(network, &mut writes);
        if layout == Layout::V2 && writes.len() > before {
            return Err(Error::Unsupported { field: "linux.resources.network", version: "v2" });
        }
    }
    v2::rdma_writes(resources.rdma().as_ref(), &mut writes);
    let unified = resources.unified().as_ref().filter(|unified| !unified.is_empty());
    if unified.is_some() && layout == Layout::V1 {
        return Err(Error::Unsupported { field: "linux.resources.unified", version: "v1" });
    }
    v2::unified_writes(unified, &mut writes)?;
    Ok(writes)
}

fn hugetlb_writes(
    resources: &LinuxResources,
    page_sizes: &[(String, u64)],
    on_v1: bool,
    writes: &mut Vec<Write>,
) -> Result<()> {
    for limit in resources.hugepage_limits().iter().flatten() {
        let Some((size, bytes, value)) = values::hugepage(limit, page_sizes)? else {
            continue;
        };
        let (files, unlimited) =
            if on_v1 { (v1::HUGETLB_FILES, "-1") } else { (v2::HUGETLB_FILES, "max") };
        let value = value.map_or_else(|| unlimited.to_owned(), |value| value.to_string());
        for file in files {
            let write = Write::new("hugetlb", format!("hugetlb.{size}.{file}"), &value);
            writes.push(write.check(Check::Bytes(bytes)));
        }
    }
    Ok(())
}

/// Old values, newest last, for putting things back.
pub(crate) type Undo = Vec<(PathBuf, String)>;

/// Carries out `writes` in order. `directory` finds a controller's cgroup, if there is one.
///
/// With `undo` given, each file's old content is recorded before it is changed.
pub(crate) fn carry_out<'a>(
    writes: &[Write],
    directory: impl Fn(&str) -> Option<&'a Path>,
    mut undo: Option<&mut Undo>,
) -> Result<()> {
    for write in writes {
        let Some(directory) = directory(&write.controller) else {
            match write.need {
                Need::Required => return Err(write.missing()),
                Need::IfPresent | Need::Attempt => continue,
            }
        };
        one(write, directory, undo.as_deref_mut())?;
    }
    Ok(())
}

fn one(write: &Write, directory: &Path, undo: Option<&mut Undo>) -> Result<()> {
    let mut path = directory.join(write.file.as_ref());
    if let Some(undo) = undo
        && write.need != Need::Attempt
        && let Ok(old) = std::fs::read_to_string(&path)
    {
        undo.push((path.clone(), old));
    }
    let mut value = write.value.as_str();
    let mut outcome = file::try_write(&path, value);
    if let (Err(error), Some((other, other_value))) = (&outcome, &write.instead)
        && error.kind() == io::ErrorKind::NotFound
    {
        path = directory.join(other.as_ref());
        value = other_value;
        outcome = file::try_write(&path, value);
    }
    match outcome {
        Ok(()) => read_back(write.check, &path, value),
        Err(_) if write.need == Need::Attempt => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if write.need == Need::IfPresent {
                Ok(())
            } else if directory.is_dir() {
                Err(write.missing())
            } else {
                Err(Error::Write { path, value: value.to_owned(), source: error })
            }
        }
        Err(source) => Err(Error::Write { path, value: value.to_owned(), source }),
    }
}

/// Checks that the kernel holds what was written.
fn read_back(check: Check, path: &Path, asked: &str) -> Result<()> {
    let holds = match check {
        Check::None => return Ok(()),
        Check::List => |asked: &str, held: &str, _unit| lists::parse(asked) == lists::parse(held),
        Check::Bytes(_) => |asked: &str, held: &str, unit: u64| {
            match (asked.parse::<u64>(), held.parse::<u64>()) {
                (Ok(asked), Ok(held)) => held <= asked && asked - held < unit,
                // "max" or -1: anything that is no limit; v1 shows a page-rounded huge number.
                (Err(_), Ok(held)) => held > i64::MAX as u64 / 2,
                (_, Err(_)) => asked == held,
            }
        },
    };
    let unit = if let Check::Bytes(unit) = check { unit.max(1) } else { 1 };
    let held = file::read(path)?;
    let held = held.trim();
    if holds(asked, held, unit) {
        Ok(())
    } else {
        Err(Error::NotInForce {
            path: path.to_owned(),
            asked: asked.to_owned(),
            held: held.to_owned(),
        })
    }
}

/// Puts recorded values back, newest first. Best effort: the first failure is what the
/// caller reports, and a value that cannot be restored now was refused by the kernel.
pub(crate) fn roll_back(undo: Undo) {
    for (path, old) in undo.into_iter().rev() {
        if old.trim().is_empty() {
            let _ = file::try_write(&path, "\n");
        }
        for line in old.lines().filter(|line| !line.is_empty()) {
            let _ = file::try_write(&path, line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        directory
    }

    fn run(directory: &Path, writes: &[Write], undo: Option<&mut Undo>) -> Result<()> {
        carry_out(writes, |_| Some(directory), undo)
    }

    #[test]
    fn a_missing_file_names_controller_file_and_value() {
        let directory = cgroup(&[]);
        let write = Write::new("hugetlb", "hugetlb.2MB.max", 0);
        let error = run(directory.path(), std::slice::from_ref(&write), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cgroup controller hugetlb is not available: cannot set hugetlb.2MB.max to \"0\""
        );
        run(directory.path(), &[write.need(Need::IfPresent)], None).unwrap();
    }

    #[test]
    fn the_other_file_is_used_when_the_first_does_not_exist() {
        let directory = cgroup(&[("io.weight", "default 100")]);
        let write = Write::new("io", "io.bfq.weight", 10).or("io.weight", 1);
        run(directory.path(), &[write], None).unwrap();
        assert_eq!(std::fs::read(directory.path().join("io.weight")).unwrap()[0], b'1');
    }

    #[test]
    fn a_value_the_kernel_did_not_take_is_not_in_force() {
        let full = Path::new("/proc/self");
        let write = Write::new("x", "oom_score_adj", "+7").check(Check::Bytes(1));
        // The kernel reads +7 and shows 7; as a list they differ, as bytes they do not.
        run(full, std::slice::from_ref(&write), None).unwrap();
        let error = run(full, &[write.check(Check::List)], None).unwrap_err();
        assert!(matches!(error, Error::NotInForce { .. }), "{error}");
    }

    #[test]
    fn bytes_may_be_rounded_down_to_whole_pages_only() {
        let directory = cgroup(&[("max", "")]);
        let path = directory.path().join("max");
        for (asked, held, fine) in [
            ("4194304", "4194304", true),
            ("5000000", "4194304", true),
            ("4194304", "2097152", false),
            ("max", "max", true),
            ("max", "9223372036854771712", true),
            ("2097152", "max", false),
        ] {
            std::fs::write(&path, held).unwrap();
            assert_eq!(read_back(Check::Bytes(2 << 20), &path, asked).is_ok(), fine, "{asked}");
        }
    }

    #[test]
    fn rolling_back_restores_every_line_newest_first() {
        let directory = cgroup(&[("a", "1\n"), ("b", "2\n")]);
        let mut undo = Undo::new();
        let writes = [Write::new("x", "a", 5), Write::new("x", "b", 6), Write::new("x", "c", 7)];
        run(directory.path(), &writes, Some(&mut undo)).unwrap_err();
        roll_back(undo);
        let content = |name| std::fs::read_to_string(directory.path().join(name)).unwrap();
        assert!(content("a").starts_with('1') && content("b").starts_with('2'));
    }
}
