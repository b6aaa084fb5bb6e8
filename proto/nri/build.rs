//! Compiles the .proto files with protox, so no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/nri.proto", "proto/ttrpc.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    prost_build::Config::new().btree_map(["."]).compile_fds(descriptors)?;
    Ok(())
}
