//! What is left over: mounts, cgroups, network namespaces, links and processes, compared
//! before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Leftovers named in an error.
const SHOWN: usize = 16;

/// Everything of one moment that a server could leave behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    found: BTreeSet<String>,
}

impl Snapshot {
    /// What is there now.
    pub(crate) fn take() -> Self {
        let mut found = BTreeSet::new();
        found.extend(mounts().into_iter().map(|path| format!("mount {}", path.display())));
        cgroups(Path::new("/sys/fs/cgroup"), &mut found);
        for dir in ["/run/netns", "/var/run/netns"] {
            found.extend(names(dir).into_iter().map(|name| format!("netns {name}")));
        }
        found.extend(names("/sys/class/net").into_iter().map(|name| format!("link {name}")));
        found.extend(processes());
        Self { found }
    }

    /// What is here and was not in `before`.
    pub(crate) fn since(&self, before: &Snapshot) -> Vec<String> {
        self.found.difference(&before.found).cloned().collect()
    }
}

/// Fails unless everything new since `before` is gone within `patience`.
pub(crate) fn nothing_since(before: &Snapshot, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let left = Snapshot::take().since(before);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::check(format!("left behind:\n  {}", abridged(&left))));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The first lines of many.
fn abridged(lines: &[String]) -> String {
    let shown = lines.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n  ");
    match lines.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!("{shown}\n  and {more} more"),
        _ => shown,
    }
}

/// All mount points of this mount namespace, in mount order.
fn mounts() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(|line| Some(unescape(line.split(' ').nth(4)?))).collect()
}

/// The mount points below a directory, in mount order.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    mounts().into_iter().filter(|path| path.starts_with(dir) && path != dir).collect()
}

/// Undoes the octal escapes of mountinfo.
fn unescape(text: &str) -> PathBuf {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out.into()
}

/// Groups below the hierarchies' roots. With cgroup v1 a group has a directory in each
/// hierarchy; it is named once, by its path below them.
fn cgroups(root: &Path, found: &mut BTreeSet<String>) {
    let v2 = root.join("cgroup.procs").exists();
    let mut pending: Vec<PathBuf> = directories(root);
    while let Some(dir) = pending.pop() {
        let below = directories(&dir);
        pending.extend(below);
        let relative = dir.strip_prefix(root).unwrap_or(&dir);
        let group: PathBuf = relative.components().skip(usize::from(!v2)).collect();
        if group != Path::new("") && dir.join("cgroup.procs").exists() {
            found.insert(format!("cgroup /{}", group.display()));
        }
    }
}

fn directories(dir: &Path) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(dir) else { return Vec::new() };
    let entries = listing.flatten();
    entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect()
}

/// Programs whose processes belong to a container runtime.
const RUNTIMES: [&str; 6] =
    ["pinion", "pinion-monitor", "conmon", "runc", "crun", "containerd-shim-runc-v2"];

/// Processes of containers and of their runtimes. Others come and go on a busy machine, so
/// only those count that live in another mount or network namespace, or are a runtime's.
fn processes() -> BTreeSet<String> {
    let own = namespaces("self");
    let mut found = BTreeSet::new();
    for (pid, command) in command_lines() {
        let program = command.split(' ').next().unwrap_or_default();
        let program = program.rsplit('/').next().unwrap_or(program);
        if RUNTIMES.contains(&program) || namespaces(&pid) != own {
            found.insert(format!("process {pid} {command}"));
        }
    }
    found
}

fn namespaces(pid: &str) -> Vec<Option<PathBuf>> {
    ["mnt", "net"].map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()).into()
}

/// The process whose command line is exactly this.
pub(crate) fn process_with(command: &str) -> Option<u32> {
    command_lines().into_iter().find(|(_, line)| line == command)?.0.parse().ok()
}

/// The process whose command line ends with this.
pub(crate) fn process_ending(end: &str) -> Option<u32> {
    command_lines().into_iter().find(|(_, line)| line.ends_with(end))?.0.parse().ok()
}

/// A process whose command line has all these words in it.
pub(crate) fn process_containing(words: &[&str]) -> Option<u32> {
    let found = command_lines();
    found.into_iter().find(|(_, line)| words.iter().all(|word| line.contains(word)))?.0.parse().ok()
}

/// All of them.
pub(crate) fn processes_containing(words: &[&str]) -> Vec<u32> {
    let found = command_lines();
    let ours = found.into_iter().filter(|(_, line)| words.iter().all(|word| line.contains(word)));
    ours.filter_map(|(pid, _)| pid.parse().ok()).collect()
}

/// Process ids and command lines; kernel threads have none and are left out.
fn command_lines() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for pid in names("/proc") {
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let text = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
        if !text.is_empty() {
            found.push((pid, text));
        }
    }
    found
}

fn names(dir: &str) -> Vec<String> {
    let Ok(listing) = fs::read_dir(dir) else { return Vec::new() };
    listing.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_blanks_are_read_back() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
    }

    #[test]
    fn a_v1_group_is_named_once_for_all_its_hierarchies() {
        let root = tempfile::tempdir().unwrap();
        for controller in ["cpu", "pids"] {
            let group = root.path().join(controller).join("pods/a");
            fs::create_dir_all(&group).unwrap();
            for dir in [root.path().join(controller), group] {
                fs::write(dir.join("cgroup.procs"), "").unwrap();
            }
        }
        let mut found = BTreeSet::new();
        cgroups(root.path(), &mut found);
        assert_eq!(found, BTreeSet::from(["cgroup /pods/a".to_owned()]));
    }

    #[test]
    fn this_test_s_own_process_is_found_by_its_command_line() {
        let own = std::process::id();
        let line = command_lines().into_iter().find(|(pid, _)| *pid == own.to_string()).unwrap().1;
        assert_eq!(process_with(&line), Some(own));
    }
}
