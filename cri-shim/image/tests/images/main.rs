//! Images against a real registry (Debian's docker-registry on a loopback port), against one that
//! misbehaves on purpose, and on a real kernel. Needs root.

mod content;
mod faults;
mod hostile;
mod load;
mod names;
mod node;
mod pull;
mod registry;
mod rootfs;
