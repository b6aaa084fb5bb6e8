//! Where a process runs and what it holds, said by the process itself.
//!
//! `hugepages SIZE PAGES [map-then FILE] [file PATH COUNT] [hold]` maps PAGES pages of SIZE
//! (`2M`, `1G`), waits for FILE to appear between mapping and touching, touches every page,
//! prints where they lie, and with `hold` keeps them until told to end. With `file` COUNT
//! more pages are allocated to a file on a mounted hugetlbfs. A mapping that is refused prints
//! `mmap: <reason>` and exits with 1; a page that was promised and is not there ends the
//! process with SIGBUS, which is what the tests want to see.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use memmap2::{MmapMut, MmapOptions};

/// What one invocation asks for.
#[derive(Debug, Default)]
struct Order {
    page_bits: u8,
    pages: usize,
    /// Touch only once this file is there.
    gate: Option<String>,
    /// A file on a hugetlbfs and how many pages it gets.
    file: Option<(String, u64)>,
    hold: bool,
}

impl Order {
    fn parse(args: &[String]) -> Option<Self> {
        let [size, pages, rest @ ..] = args else { return None };
        let page_bits = match size.as_str() {
            "2M" => 21,
            "1G" => 30,
            _ => return None,
        };
        let mut order = Self { page_bits, pages: pages.parse().ok()?, ..Self::default() };
        let mut words = rest.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "map-then" => order.gate = Some(words.next()?.clone()),
                "file" => order.file = Some((words.next()?.clone(), words.next()?.parse().ok()?)),
                "hold" => order.hold = true,
                _ => return None,
            }
        }
        Some(order)
    }
}

/// Maps, touches and reports.
pub(crate) fn run(args: &[String]) -> io::Result<()> {
    let order = Order::parse(args).ok_or_else(|| {
        io::Error::other("hugepages 2M|1G PAGES [map-then FILE] [file PATH COUNT] [hold]")
    })?;
    let size = 1_usize << order.page_bits;
    let mut pages =
        map(&order, size).map_err(|error| io::Error::other(format!("mmap: {error}")))?;
    println!("mapped {}", order.pages);
    if let Some(gate) = &order.gate {
        while !Path::new(gate).exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    for page in pages.chunks_mut(size) {
        page[0] = 1;
    }
    println!("touched {}", order.pages);
    if let Some((path, count)) = &order.file {
        allocate(path, count << order.page_bits)?;
        println!("allocated {count} to {path}");
    }
    report_place()?;
    for line in std::fs::read_to_string("/proc/self/numa_maps")?.lines() {
        if line.contains(" huge ") {
            println!("numa_maps: {line}");
        }
    }
    if order.hold { super::wait_for_end() } else { Ok(()) }
}

fn map(order: &Order, size: usize) -> io::Result<MmapMut> {
    MmapOptions::new().len(order.pages * size).huge(Some(order.page_bits)).map_anon()
}

/// Gives a file its pages. They are taken now or it fails: no SIGBUS later.
fn allocate(path: &str, length: u64) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    let mode = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&file, mode, 0, length)
        .map_err(|error| io::Error::other(format!("fallocate({path}, {length}): {error}")))
}

/// Prints the CPUs and memory nodes this process may use.
pub(crate) fn report_place() -> io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    for line in status.lines() {
        if line.starts_with("Cpus_allowed_list") || line.starts_with("Mems_allowed_list") {
            println!("{}", line.replace('\t', " "));
        }
    }
    Ok(())
}
