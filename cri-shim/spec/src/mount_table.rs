//! How mounts propagate, from the text of `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// How a mount shares events with its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Neither sends nor receives.
    Private,
    /// Receives only (`master:N`).
    Slave,
    /// Sends and receives (`shared:N`).
    Shared,
}

/// The mounts of one mount namespace, in mount order.
#[derive(Debug, Clone, Default)]
pub struct MountTable {
    mounts: Vec<(PathBuf, Propagation)>,
}

impl MountTable {
    /// Parses mountinfo; lines that are not of its form are skipped.
    pub fn parse(mountinfo: &[u8]) -> Self {
        let lines = mountinfo.split(|byte| *byte == b'\n');
        Self { mounts: lines.filter_map(parse_line).collect() }
    }

    /// Propagation of the mount that `path` (absolute, symlinks resolved) lies on.
    ///
    /// Of mounts stacked on one point the last is on top. An unknown path counts as private.
    pub fn propagation_of(&self, path: &Path) -> Propagation {
        self.mounts
            .iter()
            .enumerate()
            .filter(|(_, (point, _))| path.starts_with(point))
            .max_by_key(|(order, (point, _))| (point.components().count(), *order))
            .map_or(Propagation::Private, |(_, (_, propagation))| *propagation)
    }
}

fn parse_line(line: &[u8]) -> Option<(PathBuf, Propagation)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = unescape(fields.nth(4)?);
    let optional = fields.skip(1).take_while(|field| *field != b"-");
    let mut propagation = Propagation::Private;
    for field in optional {
        if field.starts_with(b"shared:") {
            propagation = Propagation::Shared;
        } else if field.starts_with(b"master:") && propagation == Propagation::Private {
            propagation = Propagation::Slave;
        }
    }
    Some((point, propagation))
}

/// Undoes the kernel's `\040` escapes of blank, tab, newline, backslash and `#`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    let path = OsString::from_vec(bytes);
    debug_assert!(path.as_bytes().len() <= field.len());
    PathBuf::from(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &[u8] = b"\
22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:22 / /var rw master:1 - ext4 /dev/vdb rw
24 23 0:23 / /var/lib/with\\040blank rw - tmpfs tmpfs rw
25 22 0:24 / /both rw shared:5 master:2 - tmpfs tmpfs rw
26 23 0:25 / /var rw shared:9 - tmpfs tmpfs rw
short line
";

    #[test]
    fn the_deepest_mount_and_the_topmost_of_a_stack_decide() {
        let table = MountTable::parse(INFO);
        let at = |path: &str| table.propagation_of(Path::new(path));
        assert_eq!(at("/etc"), Propagation::Shared);
        assert_eq!(at("/var/log"), Propagation::Shared, "the later mount on /var is on top");
        assert_eq!(at("/variety"), Propagation::Shared, "/var is no prefix of /variety");
        assert_eq!(at("/var/lib/with blank/x"), Propagation::Private);
        assert_eq!(at("/both"), Propagation::Shared);
    }

    #[test]
    fn an_empty_table_knows_only_private_mounts() {
        assert_eq!(MountTable::default().propagation_of(Path::new("/")), Propagation::Private);
    }

    #[test]
    fn stray_backslashes_survive() {
        assert_eq!(unescape(b"/a\\z\\04"), PathBuf::from("/a\\z\\04"));
        assert_eq!(unescape(b"/t\\011b"), PathBuf::from("/t\tb"));
    }
}
