//! Compiles a profile, loads it into this process and says what both cost:
//! `cargo run --release --example load -- profile.json` (an OCI `linux.seccomp` object).

use std::error::Error;
use std::time::Instant;

use oci_spec::runtime::LinuxSeccomp;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: load PROFILE.json")?;
    let profile: LinuxSeccomp = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let started = Instant::now();
    let program = pinion_seccomp::compile(&profile)?;
    let compiled = started.elapsed();
    let started = Instant::now();
    pinion_sys::seccomp::load(&program.instructions, program.flags)?;
    println!(
        "{} instructions, compiled in {} µs, loaded in {} µs",
        program.instructions.len(),
        compiled.as_micros(),
        started.elapsed().as_micros()
    );
    Ok(())
}
