//! Links without tables for unwinding where a panic aborts.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../aborting.ld");
    let set = |name: &str| std::env::var(name).unwrap_or_default();
    // Other linkers and C libraries were not tried.
    if set("CARGO_CFG_PANIC") == "abort" && set("CARGO_CFG_TARGET_ENV") == "musl" {
        let script = std::path::Path::new(&set("CARGO_MANIFEST_DIR")).join("../aborting.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
