//! CPU time of processes and of what they have waited for, from procfs.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;

/// Milliseconds of CPU time that a process and its ended children have had (`utime`, `stime`,
/// `cutime` and `cstime` of proc_pid_stat(5)). The kernel counts nanoseconds and shows ticks,
/// so differences over many operations are exact to a tick.
pub(crate) fn spent(pid: u32) -> Result<f64, Box<dyn Error>> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let ticks = ticks_of(&text).ok_or_else(|| format!("{path}: cannot be read: {text}"))?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(ticks as f64 * 1000.0 / per_second as f64)
}

/// The same of every process with one of these names, by its number. The kernel cuts names off
/// after 15 bytes.
pub(crate) fn spent_by(names: &[&str]) -> Result<BTreeMap<u32, f64>, Box<dyn Error>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(pid) = pid
            && names.contains(&name.trim_end())
            && let Ok(time) = spent(pid)
        {
            all.insert(pid, time);
        }
    }
    Ok(all)
}

/// What those that were there before and still are have had since.
pub(crate) fn since(before: &BTreeMap<u32, f64>, after: &BTreeMap<u32, f64>) -> f64 {
    let both = after.iter().filter_map(|(pid, time)| Some(time - before.get(pid)?));
    both.sum()
}

/// Fields 14 to 17; the second one, in brackets, may contain anything.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<u64> =
        rest.split_ascii_whitespace().skip(11).take(4).map_while(|f| f.parse().ok()).collect();
    (fields.len() == 4).then(|| fields.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_blanks_moves_no_field() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 5 6 7 8 100 20 3 4 20 0 1 0 9 9 9";
        assert_eq!(ticks_of(stat), Some(127));
        assert_eq!(ticks_of("7 (x) S 1"), None);
    }

    #[test]
    fn who_ends_meanwhile_takes_nothing_away() {
        let before = BTreeMap::from([(1, 5.0), (2, 100.0)]);
        let after = BTreeMap::from([(1, 8.0), (3, 40.0)]);
        assert!((since(&before, &after) - 3.0).abs() < f64::EPSILON);
    }

    #[test]
    fn work_is_counted() {
        let own = std::process::id();
        let before = spent(own).unwrap();
        let began = std::time::Instant::now();
        let mut sum = 0_u64;
        while began.elapsed().as_millis() < 3000 && spent(own).unwrap() - before < 50.0 {
            sum = (0..100_000).fold(sum, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        }
        assert!(spent(own).unwrap() - before >= 50.0, "{sum}");
    }
}
