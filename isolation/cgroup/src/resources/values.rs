//! Conversions and checks shared by both cgroup versions. Pure, except for the page sizes.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit};

use crate::{Error, Result, lists};

fn invalid<T>(field: &'static str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Invalid { field, reason: reason.into() })
}

/// v1 shares (2 to 262144) as a v2 weight (1 to 10000); 0 means "not set".
///
/// runc's formula since 1.3.2, also crun's and kubelet's: a quadratic in the logarithm
/// through (2, 1), (1024, 100) and (262144, 10000), so that the default stays the default.
#[must_use]
pub fn cpu_shares_to_weight(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1 | 2 => 1,
        3..262_144 => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
        _ => 10_000,
    }
}

/// `blkio.weight` (10 to 1000) as `io.weight` (1 to 10000), linearly, as runc does.
pub(crate) fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990
}

/// v2's swap limit from the spec's limit of memory and swap together.
///
/// `None`: not set. `Some(None)`: unlimited.
pub(crate) fn swap_on_v2(limit: Option<i64>, swap: Option<i64>) -> Result<Option<Option<u64>>> {
    let (limit, swap) = (limit.unwrap_or(0), swap.unwrap_or(0));
    if swap < -1 {
        return invalid("linux.resources.memory.swap", format!("{swap} is negative"));
    }
    match (limit, swap) {
        // On v1, no memory limit meant no swap limit either.
        (-1, 0) | (_, -1) => Ok(Some(None)),
        (_, 0) => Ok(None),
        (..=0, _) => invalid(
            "linux.resources.memory.swap",
            "a swap limit counts memory too and needs a memory limit beside it",
        ),
        (limit, swap) if swap < limit => invalid(
            "linux.resources.memory.swap",
            format!("{swap} is less than the memory limit {limit}, which it includes"),
        ),
        (limit, swap) => Ok(Some(Some((swap - limit) as u64))),
    }
}

/// Checks an amount of memory: -1 is unlimited, 0 or nothing is not set.
pub(crate) fn amount(field: &'static str, value: Option<i64>) -> Result<Option<i64>> {
    match value {
        None | Some(0) => Ok(None),
        Some(value) if value < -1 => invalid(field, format!("{value} is negative")),
        Some(value) => Ok(Some(value)),
    }
}

/// Quota, period and burst, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CpuBandwidth {
    /// Microseconds per period; negative is unlimited.
    pub(crate) quota: Option<i64>,
    /// Microseconds.
    pub(crate) period: Option<u64>,
    /// Microseconds that may be saved up.
    pub(crate) burst: Option<u64>,
}

/// The CFS bandwidth asked for; the kernel's own bounds, checked before anything is written.
pub(crate) fn cpu_bandwidth(cpu: &LinuxCpu) -> Result<CpuBandwidth> {
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if let Some(period) = period
        && !(1_000..=1_000_000).contains(&period)
    {
        return invalid(
            "linux.resources.cpu.period",
            format!("{period} µs is outside 1000 to 1000000"),
        );
    }
    if let Some(quota @ 1..1_000) = quota {
        return invalid(
            "linux.resources.cpu.quota",
            format!("{quota} µs is less than the kernel's minimum of 1000"),
        );
    }
    if let (Some(burst), Some(quota @ 1..)) = (cpu.burst(), quota)
        && burst > quota as u64
    {
        return invalid(
            "linux.resources.cpu.burst",
            format!("{burst} µs is more than the quota of {quota}"),
        );
    }
    Ok(CpuBandwidth { quota, period, burst: cpu.burst() })
}

/// Checks a CPU or node list; empty means "not set".
pub(crate) fn list<'a>(field: &'static str, text: Option<&'a String>) -> Result<Option<&'a str>> {
    let Some(text) = text.map(|text| text.trim()).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    match lists::parse(text) {
        Some(members) if !members.is_empty() => Ok(Some(text)),
        _ => invalid(field, format!("{text:?} is not a list like 0-3,7")),
    }
}

/// The huge page sizes this kernel knows, in the controller's spelling (`2MB`, `1GB`), with
/// their sizes in bytes; none where it has no huge pages.
#[must_use]
pub fn hugepage_sizes() -> Vec<(String, u64)> {
    let names = libcgroups::stats::supported_page_sizes().unwrap_or_default();
    let sized = names.into_iter().filter_map(|name| Some((size_of_name(&name)?, name)));
    let mut sizes: Vec<(String, u64)> = sized.map(|(bytes, name)| (name, bytes)).collect();
    sizes.sort_by_key(|(_, bytes)| *bytes);
    sizes
}

/// `2MB` in bytes.
fn size_of_name(name: &str) -> Option<u64> {
    let (number, shift) = [("KB", 10), ("MB", 20), ("GB", 30)]
        .iter()
        .find_map(|(unit, shift)| Some((name.strip_suffix(unit)?, *shift)))?;
    number.parse::<u64>().ok()?.checked_shl(shift)
}

/// A huge page limit, checked: file-name part, page size in bytes, value (`None` is
/// unlimited).
///
/// No answer at all: a limit of zero on a size this kernel does not have holds by itself.
pub(crate) fn hugepage<'a>(
    limit: &'a LinuxHugepageLimit,
    known: &[(String, u64)],
) -> Result<Option<(&'a str, u64, Option<i64>)>> {
    const FIELD: &str = "linux.resources.hugepageLimits";
    let name = limit.page_size().as_str();
    let Some((_, bytes)) = known.iter().find(|(known, _)| known == name) else {
        if limit.limit() == 0 {
            return Ok(None);
        }
        let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
        return invalid(
            FIELD,
            format!("page size {name:?} is not one of this kernel's: {}", names.join(", ")),
        );
    };
    let value = match limit.limit() {
        -1 => None,
        ..-1 => return invalid(FIELD, format!("limit {} is negative", limit.limit())),
        bytes => Some(bytes),
    };
    Ok(Some((name, *bytes, value)))
}

/// A device number of the spec as the kernel prints it.
pub(crate) fn device(field: &'static str, major: i64, minor: i64) -> Result<String> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok(format!("{major}:{minor}")),
        _ => invalid(field, format!("{major}:{minor} is not a device number")),
    }
}

/// Checks a `blkio` weight; 0 means "not set".
pub(crate) fn weight(field: &'static str, weight: Option<u16>) -> Result<Option<u16>> {
    match weight {
        None | Some(0) => Ok(None),
        Some(weight @ 10..=1000) => Ok(Some(weight)),
        Some(weight) => invalid(field, format!("{weight} is outside 10 to 1000")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_the_weights_runc_computes() {
        let table = [
            (0, 0),
            (1, 1),
            (2, 1),
            (10, 4),
            (100, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (100_000, 4_340),
            (262_143, 10_000),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ];
        for (shares, weight) in table {
            assert_eq!(cpu_shares_to_weight(shares), weight, "{shares}");
        }
    }

    #[test]
    fn weights_never_fall_when_shares_rise() {
        let weights: Vec<u64> = (1..262_200).map(cpu_shares_to_weight).collect();
        assert!(weights.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(weights.iter().all(|weight| (1..=10_000).contains(weight)));
    }

    #[test]
    fn swap_excludes_memory_on_v2() {
        let gib = 1 << 30;
        assert_eq!(swap_on_v2(Some(gib), Some(2 * gib)).unwrap(), Some(Some(gib as u64)));
        assert_eq!(swap_on_v2(Some(gib), Some(gib)).unwrap(), Some(Some(0)));
        assert_eq!(swap_on_v2(Some(gib), Some(-1)).unwrap(), Some(None));
        assert_eq!(swap_on_v2(Some(-1), None).unwrap(), Some(None));
        assert_eq!(swap_on_v2(Some(gib), None).unwrap(), None);
        assert_eq!(swap_on_v2(None, None).unwrap(), None);
        assert!(swap_on_v2(None, Some(gib)).is_err());
        assert!(swap_on_v2(Some(-1), Some(gib)).is_err());
        assert!(swap_on_v2(Some(2 * gib), Some(gib)).is_err());
        assert!(swap_on_v2(Some(gib), Some(-2)).is_err());
    }

    #[test]
    fn io_weights_span_the_whole_range() {
        assert_eq!((io_weight(10), io_weight(500), io_weight(1000)), (1, 4950, 10_000));
    }

    #[test]
    fn page_sizes_are_understood_as_the_controller_spells_them() {
        assert_eq!(size_of_name("64KB"), Some(64 << 10));
        assert_eq!(size_of_name("2MB"), Some(2 << 20));
        assert_eq!(size_of_name("16GB"), Some(16 << 30));
        assert_eq!(size_of_name("2"), None);
    }
}
