//! The gRPC protocols piniond speaks.
//!
//! * [`v1`]: CRI, what kubelet asks of a container runtime (`proto/cri.proto`);
//! * [`admin`]: what `pinctl` asks beyond it (`proto/admin.proto`).
//! * [`podresources`]: what piniond asks kubelet (`proto/podresources.proto`).
//!
//! All are generated at build time; `DESCRIPTORS` is the compiled form, for tests and
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

/// Kubelet's account of the CPUs it gave to containers: messages, client, and the server that
/// tests put in kubelet's place.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications)]
pub mod podresources {
    tonic::include_proto!("v1");
}

/// The `FileDescriptorSet` of all protocols.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
