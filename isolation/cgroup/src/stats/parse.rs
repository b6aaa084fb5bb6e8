//! The text formats of cgroup files. Lines that make no sense are skipped: a statistic is
//! no reason to fail.
//!
//! libcgroups reads what it reads whole: processes, RDMA devices, page sizes. Not used are its
//! pressure parser, which leaves out the totals (and panics on a line of less than four
//! bytes); its flat keyed files and `io.stat`, which are an error as a whole when one line is
//! odd, as the kernel's are for devices without I/O ("259:1" alone).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use libcgroups::common::WrappedIoError;
use libcgroups::stats::{ParseNestedKeyedDataError, PidStatsError};

use super::{BlkioEntry, Pids, Pressure, PressureLine};
use crate::{Error, Result, file, lists};

/// The value of `key` in "key value" lines.
pub(crate) fn value_of(text: &str, key: &str) -> Option<u64> {
    pairs(text).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// "key value" lines.
pub(super) fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name, value.trim().parse().ok()?))
    })
}

pub(super) fn map(text: &str) -> BTreeMap<String, u64> {
    pairs(text).map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A file's text; empty when the file is not there.
pub(super) fn text(directory: &Path, name: &str) -> Result<String> {
    Ok(file::read_if_present(&directory.join(name))?.unwrap_or_default())
}

/// A file's number; 0 when the file is not there.
pub(super) fn number(directory: &Path, name: &str) -> Result<u64> {
    Ok(file::number(&directory.join(name))?.unwrap_or(0))
}

/// A file with a list of CPUs or nodes.
pub(super) fn list(directory: &Path, name: &str) -> Result<Vec<u32>> {
    Ok(lists::parse(&text(directory, name)?).unwrap_or_default().into_iter().collect())
}

/// A pressure file; `None` where the kernel keeps none.
pub(super) fn pressure(directory: &Path, name: &str) -> Result<Option<Pressure>> {
    let text = text(directory, name)?;
    Ok((!text.is_empty()).then(|| parse_pressure(&text)))
}

fn parse_pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let target = match fields.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        *target = parse_pressure_line(fields);
    }
    pressure
}

fn parse_pressure_line<'a>(fields: impl Iterator<Item = &'a str>) -> PressureLine {
    let mut line = PressureLine::default();
    for (key, value) in fields.filter_map(|field| field.split_once('=')) {
        let percent = || value.parse().unwrap_or_default();
        match key {
            "avg10" => line.avg10 = percent(),
            "avg60" => line.avg60 = percent(),
            "avg300" => line.avg300 = percent(),
            "total" => line.total = value.parse().unwrap_or_default(),
            _ => {}
        }
    }
    line
}

/// "8:0 rbytes=1 wbytes=2 ..." lines: device number and keyed values.
pub(super) fn keyed_devices(text: &str) -> impl Iterator<Item = ((u64, u64), &str, u64)> {
    text.lines().flat_map(|line| {
        let mut fields = line.split_whitespace();
        let device = fields.next().and_then(device_number);
        fields.filter_map(move |field| {
            let (key, value) = field.split_once('=')?;
            Some((device?, key, value.parse().ok()?))
        })
    })
}

/// "8:0 Read 5" lines of v1; the line with the sum over devices has no device and is left out.
pub(super) fn v1_devices(text: &str) -> Vec<BlkioEntry> {
    let entries = text.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (major, minor) = device_number(fields.next()?)?;
        let (op, value) = (fields.next()?, fields.next()?);
        Some(BlkioEntry { major, minor, op: op.to_owned(), value: value.parse().ok()? })
    });
    entries.collect()
}

fn device_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A file of "mlx4_0 hca_handle=2 hca_object=max" lines; empty when it is not there.
pub(super) fn rdma(
    directory: &Path,
    name: &str,
) -> Result<BTreeMap<String, BTreeMap<String, u64>>> {
    let path = directory.join(name);
    let lines = match libcgroups::stats::parse_nested_keyed_data(&path) {
        Ok(lines) => lines,
        Err(ParseNestedKeyedDataError::WrappedIo(error)) => return absent(path, error),
        // A line without values: a device that is going away.
        Err(ParseNestedKeyedDataError::DoesNotConform { .. }) => return Ok(BTreeMap::new()),
    };
    let values = |fields: Vec<String>| {
        let fields = fields.into_iter().filter_map(|field| {
            let (key, value) = field.split_once('=')?;
            let value = if value == "max" { u64::MAX } else { value.parse().ok()? };
            Some((key.to_owned(), value))
        });
        fields.collect()
    };
    Ok(lines.into_iter().map(|(device, fields)| (device, values(fields))).collect())
}

/// How many processes and threads there are and may be; zeros without the controller.
pub(super) fn pids(directory: &Path) -> Result<Pids> {
    let parse = |file: &str, text: String| Error::Parse {
        path: directory.join(file),
        text,
        expected: "a number",
    };
    match libcgroups::stats::pid_stats(directory) {
        Ok(stats) => Ok(Pids { current: stats.current, limit: stats.limit }),
        Err(PidStatsError::WrappedIo(error)) => absent(directory.join("pids.current"), error),
        Err(PidStatsError::ParseCurrent(error)) => Err(parse("pids.current", error.to_string())),
        Err(PidStatsError::ParseLimit(error)) => Err(parse("pids.max", error.to_string())),
    }
}

/// Nothing, when a file was not read because it is not there.
fn absent<T: Default>(path: PathBuf, error: WrappedIoError) -> Result<T> {
    match error {
        WrappedIoError::Read { err, .. } if file::is_absent(&err) => Ok(T::default()),
        WrappedIoError::Read { err: source, path } => Err(Error::Read { path, source }),
        other => Err(Error::Read { path, source: std::io::Error::other(other) }),
    }
}

/// The page sizes for which `directory` has files `hugetlb.SIZE.SUFFIX`.
pub(super) fn hugetlb_sizes(directory: &Path) -> Vec<String> {
    crate::hugepage_sizes()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| {
            ["current", "usage_in_bytes"]
                .iter()
                .any(|suffix| directory.join(format!("hugetlb.{name}.{suffix}")).exists())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_files_are_read_and_odd_lines_skipped() {
        let text = "usage_usec 42\nbad\nuser_usec x\nsystem_usec 7\n";
        assert_eq!(value_of(text, "usage_usec"), Some(42));
        assert_eq!(value_of(text, "user_usec"), None);
        assert_eq!(map(text).len(), 2);
    }

    #[test]
    fn pressure_has_both_lines_with_totals() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=123\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=45\n";
        let pressure = parse_pressure(text);
        assert_eq!((pressure.some.avg10, pressure.some.total), (1.5, 123));
        assert_eq!(pressure.full.total, 45);
    }

    #[test]
    fn devices_of_both_versions_are_read() {
        let v2: Vec<_> = keyed_devices("8:0 rbytes=1 wios=4\n259:1\nodd rbytes=9\n").collect();
        assert_eq!(v2, [((8, 0), "rbytes", 1), ((8, 0), "wios", 4)]);
        let v1 = v1_devices("8:0 Read 5\n8:0 Total 6\nTotal 6\n");
        assert_eq!(v1.len(), 2);
        assert_eq!((v1[0].op.as_str(), v1[0].value), ("Read", 5));
    }

    #[test]
    fn rdma_limits_may_be_unlimited() {
        let directory = tempfile::tempdir().unwrap();
        let max = directory.path().join("rdma.max");
        std::fs::write(max, "mlx4_0 hca_handle=2 hca_object=max\n").unwrap();
        let devices = rdma(directory.path(), "rdma.max").unwrap();
        assert_eq!(devices["mlx4_0"]["hca_handle"], 2);
        assert_eq!(devices["mlx4_0"]["hca_object"], u64::MAX);
        assert!(rdma(directory.path(), "rdma.current").unwrap().is_empty());
    }
}
