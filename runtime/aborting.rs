// The build script of the programs that abort on a panic: links them without tables for
// unwinding where the build says that nothing unwinds.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../aborting.ld");
    println!("cargo::rerun-if-changed=../aborting.rs");
    let set = |name: &str| std::env::var(name).unwrap_or_default();
    // As `make build` has it. Other linkers and C libraries were not tried.
    let none_unwinds = set("CARGO_ENCODED_RUSTFLAGS").contains("force-unwind-tables=no");
    if none_unwinds && set("CARGO_CFG_TARGET_ENV") == "musl" {
        let script = std::path::Path::new(&set("CARGO_MANIFEST_DIR")).join("../aborting.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
