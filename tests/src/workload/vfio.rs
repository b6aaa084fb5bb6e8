//! A poll-mode driver in small: takes the functions that the container was handed, lets the
//! first use all its hugepages, and says what it has.
//!
//! `vfio SIZE PAGES [hold]` reads `PINION_VFIO` (`ADDRESS=GROUP,…`), maps and touches PAGES
//! pages of SIZE (`2M`, `1G`), opens every function, maps the pages for the first one's DMA,
//! and prints a line for each.

use std::io;

use memmap2::MmapOptions;
use pinion_sys::vfio::Function;

/// Where the pages appear to the device.
const IOVA: u64 = 0x1_0000_0000;

/// Uses the functions.
pub(crate) fn run(args: &[String]) -> io::Result<()> {
    let usage = || io::Error::other("vfio 2M|1G PAGES [hold]");
    let [size, pages, rest @ ..] = args else { return Err(usage()) };
    let bits: u8 = match size.as_str() {
        "2M" => 21,
        "1G" => 30,
        _ => return Err(usage()),
    };
    let pages: usize = pages.parse().map_err(|_not_a_number| usage())?;
    let list = std::env::var("PINION_VFIO").map_err(io::Error::other)?;
    let mut functions = Vec::new();
    for entry in list.split(',') {
        let (address, group) = entry.split_once('=').ok_or_else(usage)?;
        let group = group.parse().map_err(io::Error::other)?;
        let function = Function::open(group, address)?;
        let said = function.describe()?;
        println!(
            "function {address} group {group} id {:04x}:{:04x} regions {} irqs {}",
            said.id & 0xffff,
            said.id >> 16,
            said.regions,
            said.irqs
        );
        function.reset()?;
        functions.push(function);
    }
    let bytes = pages << bits;
    let mut memory = MmapOptions::new().len(bytes).huge(Some(bits)).map_anon()?;
    for page in memory.chunks_mut(1 << bits) {
        page[0] = 1;
    }
    super::hugepages::report_place()?;
    let Some(first) = functions.first() else { return Err(usage()) };
    let mapping = first.map(&mut memory, IOVA).map_err(|error| {
        io::Error::new(error.kind(), format!("map {bytes} bytes for DMA: {error}"))
    })?;
    for line in std::fs::read_to_string("/proc/self/numa_maps")?.lines() {
        if line.contains(" huge ") {
            println!("numa_maps: {line}");
        }
    }
    println!("dma {} bytes", mapping.len());
    if rest.iter().any(|word| word == "hold") { super::wait_for_end() } else { Ok(()) }
}
