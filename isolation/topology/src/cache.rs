//! Which CPUs share a last-level cache.
//!
//! Kept apart from [`crate::Topology`], which is read often: only allocation needs it.

use std::path::Path;

use crate::CpuSet;
use crate::read::{ReadError, list, number, numbered, text};

/// The sets of online CPUs that share a last-level cache, by their first CPU; empty where the
/// kernel does not tell.
pub fn last_level(root: &Path) -> Result<Vec<CpuSet>, ReadError> {
    let cpu_dir = root.join("sys/devices/system/cpu");
    let mut found: Vec<CpuSet> = Vec::new();
    for id in numbered(&cpu_dir, "cpu")? {
        if found.iter().any(|set| set.contains(id)) {
            continue;
        }
        let dir = cpu_dir.join(format!("cpu{id}/cache"));
        let mut last: Option<(u32, CpuSet)> = None;
        for index in numbered(&dir, "index")? {
            let index = dir.join(format!("index{index}"));
            if text(&index.join("type"))?.as_deref() == Some("Instruction") {
                continue;
            }
            let level = number(&index, "level")?.unwrap_or(0);
            let shared: Option<CpuSet> = list(&index.join("shared_cpu_list"))?;
            let higher = last.as_ref().is_none_or(|(best, _)| level > *best);
            last = shared.filter(|_| higher).map(|set| (level, set)).or(last);
        }
        found.extend(last.map(|(_, set)| set));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    #[test]
    fn the_highest_level_counts_and_each_cache_once() {
        let tree = Tree::new();
        for cpu in 0..4 {
            let dir = format!("sys/devices/system/cpu/cpu{cpu}/cache");
            let half = if cpu < 2 { "0-1" } else { "2-3" };
            for (index, level, kind, shared) in [
                (0, 1, "Data", cpu.to_string()),
                (1, 1, "Instruction", cpu.to_string()),
                (3, 3, "Unified", half.to_owned()),
            ] {
                tree.file(&format!("{dir}/index{index}/level"), &level.to_string());
                tree.file(&format!("{dir}/index{index}/type"), kind);
                tree.file(&format!("{dir}/index{index}/shared_cpu_list"), &shared);
            }
        }
        let caches = last_level(tree.root()).unwrap();
        assert_eq!(caches, ["0-1".parse().unwrap(), "2-3".parse().unwrap()]);
        assert!(last_level(Tree::new().root()).unwrap().is_empty());
    }
}
