//! The two gRPC protocols piniond speaks.
//!
//! * [`v1`]: CRI, what kubelet asks of a container runtime (`proto/cri.proto`);
//! * [`admin`]: what `pinctl` asks beyond it (`proto/admin.proto`).
//!
//! Both are generated at build time; `DESCRIPTORS` is the compiled form, for tests and
//! reflection.

/// CRI v1: messages, clients and servers.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// The admin protocol: messages, client and server.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications)]
pub mod admin {
    tonic::include_proto!("pinion.admin.v1");
}

/// The `FileDescriptorSet` of both protocols.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
