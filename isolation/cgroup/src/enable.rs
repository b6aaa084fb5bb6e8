//! Making cgroup directories ready for use: controllers enabled down the chain (v2),
//! cpusets inherited (v1).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Error, Result, file};

/// Makes `path` and what is missing above it, below `root`. Returns whether `path` is new.
fn make_directory(path: &Path) -> Result<bool> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(Error::Create { path: path.to_owned(), source }),
    }
}

/// The directories from just below `root` down to `leaf`.
fn chain(root: &Path, leaf: &Path) -> Vec<PathBuf> {
    let mut chain: Vec<PathBuf> = leaf
        .ancestors()
        .take_while(|path| *path != root && path.starts_with(root))
        .map(Path::to_owned)
        .collect();
    chain.reverse();
    chain
}

/// Creates a v2 cgroup. Every controller the root offers is enabled in each ancestor as far
/// as the kernel lets us; one that stays unavailable is reported when a limit needs it.
pub(crate) fn create_v2(root: &Path, leaf: &Path) -> Result<bool> {
    let mut parent = root.to_owned();
    let mut new = false;
    for directory in chain(root, leaf) {
        enable_controllers(&parent)?;
        new = make_directory(&directory)?;
        parent = directory;
    }
    Ok(new)
}

/// Enables for the children of `directory` what its own parent offers it.
fn enable_controllers(directory: &Path) -> Result<()> {
    let control = directory.join("cgroup.subtree_control");
    // A directory that vanished is reported by the mkdir that follows.
    let Some(offered) = file::read_if_present(&directory.join("cgroup.controllers"))? else {
        return Ok(());
    };
    let enabled = file::read(&control)?;
    let missing: Vec<String> = offered
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|held| held == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() || file::try_write(&control, &missing.join(" ")).is_ok() {
        return Ok(());
    }
    // One that cannot be enabled (a cgroup with processes, real-time tasks under the cpu
    // controller) must not keep the others away.
    for name in missing {
        let _ = file::try_write(&control, &name);
    }
    Ok(())
}

/// Creates a cgroup in a v1 hierarchy.
pub(crate) fn create_v1(root: &Path, leaf: &Path, controller: &str) -> Result<bool> {
    let mut parent = root.to_owned();
    let mut new = false;
    for directory in chain(root, leaf) {
        new = make_directory(&directory)?;
        if controller == "cpuset"
            && let Err(error) = inherit_cpuset(&parent, &directory)
        {
            if new {
                // Unusable, and nobody else knows that it is there.
                let _ = fs::remove_dir(&directory);
            }
            return Err(error);
        }
        parent = directory;
    }
    Ok(new)
}

/// A fresh v1 cpuset is empty, and nothing can join it until it has CPUs and nodes.
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let path = child.join(name);
        if file::read(&path)?.trim().is_empty() {
            let inherited = file::read(&parent.join(name))?;
            file::write(&path, inherited.trim())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(parent: &Path, files: &[(&str, &str)]) -> PathBuf {
        fs::create_dir_all(parent).unwrap();
        for (name, content) in files {
            fs::write(parent.join(name), content).unwrap();
        }
        parent.to_owned()
    }

    #[test]
    fn only_controllers_that_are_not_enabled_yet_are_asked_for() {
        let tree = tempfile::tempdir().unwrap();
        let root = directory(
            tree.path(),
            &[("cgroup.controllers", "cpu memory pids\n"), ("cgroup.subtree_control", "cpu\n")],
        );
        assert!(create_v2(&root, &root.join("a/b")).unwrap());
        let asked = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap();
        assert_eq!(asked, "+memory +pids");
        assert!(!create_v2(&root, &root.join("a/b")).unwrap());
    }

    #[test]
    fn a_cpuset_that_cannot_be_made_usable_is_not_left_behind() {
        let tree = tempfile::tempdir().unwrap();
        let root = directory(tree.path(), &[]);
        assert!(create_v1(&root, &root.join("a"), "cpuset").is_err());
        assert!(!root.join("a").exists());
    }

    #[test]
    fn an_empty_cpuset_takes_over_its_parents_at_every_level() {
        let tree = tempfile::tempdir().unwrap();
        let root = directory(tree.path(), &[("cpuset.cpus", "0-3\n"), ("cpuset.mems", "0\n")]);
        let a = directory(&root.join("a"), &[("cpuset.cpus", "1-2\n"), ("cpuset.mems", "\n")]);
        let b = directory(&a.join("b"), &[("cpuset.cpus", "\n"), ("cpuset.mems", "\n")]);
        create_v1(&root, &b, "cpuset").unwrap();
        let read = |path: &Path, name| fs::read_to_string(path.join(name)).unwrap();
        assert_eq!(read(&a, "cpuset.cpus").trim(), "1-2");
        assert_eq!(read(&b, "cpuset.cpus").trim_end_matches('\n'), "1-2");
        assert_eq!(read(&b, "cpuset.mems").trim_end_matches('\n'), "0");
    }
}
