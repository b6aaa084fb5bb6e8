//! What only `/proc` knows of a container's processes.

use std::fs;

/// Sums over processes, and limits of the first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) count: u64,
    pub(super) threads: u64,
    pub(super) descriptors: u64,
    pub(super) sockets: u64,
    /// Soft limit on open files of the first process.
    pub(super) open_files: u64,
}

impl Processes {
    /// Looks at each process; one that ends meanwhile counts for nothing.
    pub(super) fn read(pids: &[i32]) -> Self {
        let mut sum = Self { count: pids.len() as u64, ..Self::default() };
        for pid in pids {
            sum.threads +=
                fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |d| d.count() as u64);
            let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
            for entry in entries.flatten() {
                sum.descriptors += 1;
                let target = fs::read_link(entry.path()).unwrap_or_default();
                sum.sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
            }
        }
        let limits =
            pids.first().and_then(|pid| fs::read_to_string(format!("/proc/{pid}/limits")).ok());
        sum.open_files = limits.and_then(|text| soft_limit(&text, "Max open files")).unwrap_or(0);
        sum
    }
}

/// The soft limit of a name in `/proc/<pid>/limits`; 0 for "unlimited".
fn soft_limit(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    let soft = line.strip_prefix(name)?.split_whitespace().next()?;
    Some(soft.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_threads_and_descriptors() {
        let own = Processes::read(&[std::process::id() as i32]);
        assert_eq!(own.count, 1);
        assert!(own.threads >= 1 && own.descriptors >= 1 && own.open_files > 0, "{own:?}");
    }

    #[test]
    fn a_process_that_is_gone_counts_for_nothing() {
        assert_eq!(Processes::read(&[i32::MAX - 1]).descriptors, 0);
    }
}
