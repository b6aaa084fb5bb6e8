//! Compiles the .proto files with protox, so no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let monitor = protox::compile(["proto/monitor.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(monitor)?;
    let guest = protox::compile(["proto/guest.proto"], ["proto"])?;
    prost_build::Config::new()
        .extern_path(".pinion.monitor.v1", "crate::message")
        .compile_fds(guest)?;
    Ok(())
}
