//! Control groups: version 2 first, version 1 and the hybrid of both, driven by files or
//! through systemd.
//!
//! ```text
//! Hierarchies::detect ─▶ Cgroup::plan (pure) ─▶ CgroupPaths ─▶ Cgroup::create
//!   mountinfo, own cgroup   cgroupsPath, driver     (kept in state.json)   │
//!                                                                          ├ apply / update
//! LinuxResources ─▶ resources::{v2,v1} (pure) ─▶ ordered writes ───────────┤ join, freeze, kill
//!                                                                          └ stats, remove
//! ```
//!
//! Invariants:
//! * what a limit becomes is decided by pure functions; the code that writes knows no policy;
//! * a limit that cannot be set is an error naming the controller, file and value: nothing is
//!   dropped silently, and an update that fails half-way is rolled back;
//! * values that decide isolation (cpusets, hugepages) are read back after the write;
//! * only directories of our own making are ever removed, and nothing outside the hierarchy's
//!   root is reachable: `..` is refused in every path.
//!
//! The libcgroups crate is used for statistics ([`stats`]) and page sizes, and judges our
//! limits in `tests/libcgroups.rs`. Its managers do not set limits here: they write `unified`
//! in the random order of a hash map (a partition needs its CPUs first), read nothing back,
//! join every mounted v1 controller, know no `rsvd` limit of huge pages and, without a C
//! library, no devices on v2; their conversion of an I/O weight above 16 overflows. Its D-Bus
//! client is private to its systemd manager, which knows neither huge pages nor hybrid hosts,
//! ignores whether a job succeeded and opens its socket without close-on-exec. Hierarchies
//! are read from mountinfo, because it looks for them in one place only.

mod devices;
mod enable;
mod error;
mod file;
mod freeze;
mod group;
mod hierarchy;
mod kill;
mod lists;
mod path;
mod resources;
pub mod stats;
mod systemd;

pub use devices::default_device_rules;
pub use error::{Error, ErrorKind, Result};
pub use group::Cgroup;
pub use hierarchy::{Hierarchies, Mode};
pub use path::{CgroupPaths, Driver, Unit};
pub use resources::{cpu_shares_to_weight, hugepage_sizes};
pub use stats::{Stats, Usage};
