//! piniond: the CRI server of one node.
//!
//! What happens where:
//!
//! * [`config`], `cli`, `logging`, `server`: start, serve, stop; `recovery`: what a restart finds;
//! * `services`: gRPC in and out; `pod`: the actors that own all state; `registry`: what they publish;
//! * `vm`: pods with a kernel of their own; `contract`: the isolation contract; `record`: what the store keeps; `monitor`: one pod's monitor;
//! * `profile`: what the node is declared to be; `stats`, `metrics`, `info`, `status`: answers about the state, none of which waits for a pod.
//!
//! The server may end at any moment without a container noticing: containers belong to their
//! monitors, and everything needed to go on is in the store and the run directory.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod admission;
mod annotations;
mod cgroups;
mod checkpoint;
pub mod cli;
pub mod config;
mod contract;
mod error;
mod events;
mod exec;
mod ids;
mod images;
mod info;
mod intent;
mod logging;
mod metrics;
mod monitor;
mod netdev;
mod node;
mod nri;
mod paths;
mod pod;
mod profile;
mod programs;
mod record;
mod recovery;
mod registry;
mod resources;
mod server;
mod services;
mod signals;
mod stats;
mod status;
mod streaming;
mod stuck;
mod ticket;
mod vm;
mod web;
mod wire;

pub use pinion_network::namespaces::owned as namespace_maker;
pub use pod::shared_pid as pod_init;
