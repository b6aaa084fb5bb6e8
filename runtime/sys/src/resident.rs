//! Letting go of pages of the program itself that were needed once.
//!
//! The kernel maps sixteen pages of a file around each one that is touched, and keeps them in
//! the process for as long as memory is plenty: a server stays as large as its start made it.
//! What is let go here is still in the page cache, and comes back by a fault that reads
//! nothing.

use std::fs;
use std::io;

/// A mapping of `/proc/PID/smaps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
}

/// Unmaps the pages of this program's code and constants until they are touched again; the
/// bytes of the address space this was asked for.
///
/// Only mappings of the program's file that cannot be written and that hold no page of their
/// own (relocated data has such) are meant: their every page is the file's.
///
/// # Errors
/// `/proc/self/smaps` that cannot be read.
pub fn let_go_of_code() -> io::Result<usize> {
    let program = fs::read_link("/proc/self/exe")?;
    let table = fs::read_to_string("/proc/self/smaps")?;
    let mut bytes = 0;
    for mapping in clean_mappings(&table, &program.to_string_lossy()) {
        let address = mapping.start as *mut libc::c_void;
        let length = mapping.end - mapping.start;
        // SAFETY: the range is a mapping of this process's own program, which lives as long as
        // the process. It is read-only and has no anonymous page, so each of its pages equals
        // the file's (the kernel refuses writes to the file of a running program), and the
        // next access maps the very same bytes again: no value that anything refers to changes.
        if unsafe { libc::madvise(address, length, libc::MADV_DONTNEED) } == 0 {
            bytes += length;
        }
    }
    Ok(bytes)
}

/// The mappings of `file` that are read-only and all of the file.
fn clean_mappings(table: &str, file: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut current = None;
    for line in table.lines() {
        if let Some(mapping) = header(line, file) {
            current = mapping;
        } else if line.strip_prefix("Anonymous:").map(str::trim) == Some("0 kB") {
            found.extend(current.take());
        }
    }
    found
}

/// `Some` for the first line of a mapping, with the mapping if it is one of `file` that cannot
/// be written: `55d0-55e0 r-xp 00001000 fe:00 1234   /path`.
fn header(line: &str, file: &str) -> Option<Option<Mapping>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let mapping = Mapping { start: number(start)?, end: number(end)? };
    let permissions = words.next()?;
    let path = words.skip(3).collect::<Vec<_>>().join(" ");
    let meant = path == file && permissions.starts_with("r-") && permissions.ends_with('p');
    Some(meant.then_some(mapping))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
10000-20000 r-xp 00001000 fe:00 12                 /bin/x
Rss:                  64 kB
Anonymous:             0 kB
20000-21000 r--p 00011000 fe:00 12                 /bin/x
Anonymous:             4 kB
21000-22000 rw-p 00012000 fe:00 12                 /bin/x
Anonymous:             0 kB
30000-40000 r--p 00000000 fe:00 13                 /lib/y
Anonymous:             0 kB
50000-60000 r--p 00000000 fe:00 12                 /bin/x
Anonymous:             0 kB
";

    #[test]
    fn relocated_written_and_foreign_pages_are_left_alone() {
        let found = clean_mappings(TABLE, "/bin/x");
        let expected = [(0x10000, 0x20000), (0x50000, 0x60000)];
        assert_eq!(found, expected.map(|(start, end)| Mapping { start, end }));
    }

    #[test]
    fn the_program_goes_on_afterwards() {
        let words = ["still", "here"];
        assert!(let_go_of_code().unwrap() > 4096);
        assert_eq!(words.join(" "), "still here");
        assert!(let_go_of_code().unwrap() > 4096, "and it may be done again");
    }
}
