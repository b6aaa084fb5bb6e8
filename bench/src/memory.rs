//! What processes weigh, from procfs, in KiB.

use std::error::Error;
use std::fs;

/// Resident memory of one process (`VmRSS`).
pub(crate) fn resident(pid: u32) -> Result<f64, Box<dyn Error>> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    kib_of(&text, "VmRSS:").ok_or_else(|| format!("{path} has no VmRSS").into())
}

/// The proportional share (`Pss`) of one process.
pub(crate) fn share(pid: u32) -> Result<f64, Box<dyn Error>> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    kib_of(&text, "Pss:").ok_or_else(|| format!("{path} has no Pss").into())
}

/// The proportional share (`Pss`) of every process with one of these names, together.
pub(crate) fn shares(names: &[&str]) -> Result<f64, Box<dyn Error>> {
    let mut sum = 0.0;
    for entry in fs::read_dir("/proc")?.flatten() {
        // Processes come and go; those that have gone weigh nothing.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if names.contains(&name.trim_end()) {
            let text = fs::read_to_string(entry.path().join("smaps_rollup")).unwrap_or_default();
            sum += kib_of(&text, "Pss:").unwrap_or(0.0);
        }
    }
    Ok(sum)
}

fn kib_of(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_weighs_something_and_an_absent_name_nothing() {
        assert!(resident(std::process::id()).unwrap() > 100.0);
        assert!(share(std::process::id()).unwrap() > 100.0);
        assert_eq!(shares(&["no such process"]).unwrap(), 0.0);
        assert_eq!(kib_of("Rss:  7 kB\nPss:    12 kB\n", "Pss:"), Some(12.0));
    }
}
