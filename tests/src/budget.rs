//! What `pinion` may cost before it has done anything: bytes on disk, a loader, time to start.
//!
//! It is run several times for each container, so its size and its start are paid for by
//! every pod.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::assets;
use crate::error::{During, Error, Result, ensure};

/// Bytes of the program as it is installed.
const SIZE: u64 = 2 << 20;
/// From fork to exit of a call that does nothing.
const START: Duration = Duration::from_millis(1);
/// Starts that are tried; the fastest counts, since the others tell of the machine.
const STARTS: usize = 200;

/// Checks the budget.
pub(crate) fn run() -> Result<()> {
    let program = assets::binary("pinion")?;
    let bytes = fs::read(&program).during(|| format!("read {}", program.display()))?;
    let size = bytes.len() as u64;
    println!("{}: {size} bytes of {SIZE}", program.display());
    ensure(size < SIZE, || format!("pinion has {size} bytes, {} too many", size - SIZE + 1))?;
    ensure(interpreter(&bytes)?.is_none(), || "pinion is not static: it names a loader".into())?;
    let mut fastest = Duration::MAX;
    for _ in 0..STARTS {
        fastest = fastest.min(start(&program)?);
    }
    println!("starts and ends in {} µs", fastest.as_micros());
    ensure(fastest < START, || format!("pinion --version took {fastest:?} at best"))
}

fn start(program: &Path) -> Result<Duration> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null());
    let began = Instant::now();
    let status = command.status().during(|| format!("start {}", program.display()))?;
    let took = began.elapsed();
    ensure(status.success(), || format!("{} --version ended with {status}", program.display()))?;
    Ok(took)
}

/// Type of the program header that names a loader (elf(5)).
const PT_INTERP: u32 = 3;

/// The offset of the loader's name in a 64-bit little-endian ELF file, if it wants one.
fn interpreter(elf: &[u8]) -> Result<Option<u64>> {
    let number = |at: u64, length: usize| {
        let at = usize::try_from(at).ok()?;
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    let find = || {
        (elf.get(..6)? == b"\x7fELF\x02\x01").then_some(())?;
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut found = None;
        for index in 0..count {
            let header = table + index * size;
            if number(header, 4)? == u64::from(PT_INTERP) {
                found = Some(number(header + 8, 8)?);
            }
        }
        Some(found)
    };
    find().ok_or_else(|| Error::check("not a 64-bit ELF file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let mut elf = vec![0_u8; 64 + 2 * 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64; // the table's offset
        elf[54] = 56; // a header's size
        elf[56] = 2; // headers
        elf[64] = 1; // PT_LOAD
        assert_eq!(interpreter(&elf).unwrap(), None);
        elf[64 + 56] = 3;
        elf[64 + 56 + 8] = 99;
        assert_eq!(interpreter(&elf).unwrap(), Some(99));
        assert!(interpreter(b"#!/bin/sh").is_err());
    }
}
