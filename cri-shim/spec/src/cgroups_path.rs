//! `linux.cgroupsPath`: where a container's cgroup hangs below the pod's.

use crate::error::SpecError;

/// Who creates cgroups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Plain directories.
    #[default]
    Cgroupfs,
    /// systemd scopes inside slices.
    Systemd,
}

const FIELD: &str = "sandbox.linux.cgroup_parent";

/// The path of `container_id` below `parent` (`PodSandboxConfig.linux.cgroup_parent`).
///
/// cgroupfs: `/kubepods/pod1/<id>`; systemd: `<slice>:pinion:<id>` with the last component of
/// the parent as the slice, as runc's systemd driver reads it. An empty parent (crictl) means
/// `/pinion` or `system.slice`.
pub fn cgroups_path(
    driver: CgroupDriver,
    parent: &str,
    container_id: &str,
) -> Result<String, SpecError> {
    check(parent)?;
    match driver {
        CgroupDriver::Cgroupfs => {
            let parent = if parent.is_empty() { "pinion" } else { parent };
            Ok(format!("/{}/{container_id}", parent.trim_matches('/')))
        }
        CgroupDriver::Systemd => {
            let slice = if parent.is_empty() { "system.slice" } else { parent };
            let slice = slice.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            if !slice.ends_with(".slice") || slice.len() == ".slice".len() || slice.contains(':') {
                let reason = format!("{parent:?} does not end in a systemd slice");
                return Err(SpecError::invalid(FIELD, reason));
            }
            Ok(format!("{slice}:pinion:{container_id}"))
        }
    }
}

fn check(parent: &str) -> Result<(), SpecError> {
    let odd = |c: char| c.is_control();
    if parent.len() > 4000 || parent.contains(odd) || parent.split('/').any(|part| part == "..") {
        let start: String = parent.chars().take(64).collect();
        return Err(SpecError::invalid(FIELD, format!("{start:?} is no cgroup path")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroupfs_paths_are_plain_directories() {
        let path = |parent| cgroups_path(CgroupDriver::Cgroupfs, parent, "c1").unwrap();
        assert_eq!(path("/kubepods/burstable/pod1"), "/kubepods/burstable/pod1/c1");
        assert_eq!(path("kubepods/pod1/"), "/kubepods/pod1/c1");
        assert_eq!(path(""), "/pinion/c1");
        assert_eq!(path("/odd.slice"), "/odd.slice/c1");
    }

    #[test]
    fn systemd_paths_name_the_last_slice() {
        let path = |parent| cgroups_path(CgroupDriver::Systemd, parent, "c1").unwrap();
        assert_eq!(path("/kubepods.slice/kubepods-pod1.slice"), "kubepods-pod1.slice:pinion:c1");
        assert_eq!(path(""), "system.slice:pinion:c1");
    }

    #[test]
    fn parents_that_leave_the_tree_or_are_no_slice_are_refused() {
        let long = "a/".repeat(3000);
        for parent in ["/../x", "a/../b", "..", "a\nb", &long] {
            assert!(cgroups_path(CgroupDriver::Cgroupfs, parent, "c1").is_err(), "{parent}");
        }
        for parent in ["/kubepods/pod1", ".slice", "a:b.slice"] {
            assert!(cgroups_path(CgroupDriver::Systemd, parent, "c1").is_err(), "{parent}");
        }
    }
}
