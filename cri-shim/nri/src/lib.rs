//! The Node Resource Interface (NRI): plugins that watch pods and containers and may change
//! what containers are made of.
//!
//! ```text
//!   /opt/nri/plugins/NN-name ──started by us──┐
//!   plugin ──connects── /var/run/nri/nri.sock ┤
//!                                             ▼
//!   frame   8-byte mux header, then 10-byte ttrpc header, then protobuf
//!   link    one connection: calls to the plugin (1), calls from it (2)
//!   plugin  register ─▶ configure ─▶ synchronize ─▶ events, in the order of the indexes
//!   merge   what the plugins ask for, put together; two that want different things: refused
//!   spec    the result, laid over an OCI configuration
//! ```
//!
//! One event is with one plugin at a time, node-wide. A plugin that does not answer in time, or
//! whose connection breaks, is dropped; where the configuration requires it, no pod or container
//! is made until it is back. While a plugin is told what exists nothing new is made, so that it
//! learns of every container either in that list or by an event.

mod frame;
mod launch;
mod link;
mod merge;
mod plugin;
mod plugins;
pub mod spec;

pub use link::CallError;
pub use merge::{Conflict, Merged};
pub use pinion_nri_proto::api;
pub use plugins::{Config, Creation, Plugins, Refused, State};
