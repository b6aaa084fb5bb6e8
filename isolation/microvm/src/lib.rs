//! A kernel of its own for a pod: what a guest is made of, and how it is started.
//!
//! * [`image`]: kernel and initramfs, built from the distribution's kernel ([`kernel`],
//!   [`modules`], [`cpio`]) and kept by digest;
//! * [`machine`]: what a virtual machine is asked to be;
//! * [`driver`]: what a virtual machine monitor must be able to do; [`qemu`] is the one there
//!   is, [`qmp`] its control protocol;
//! * [`plan`]: a machine with its surroundings, as a monitor starts it;
//! * [`nic`]: carrying a namespace's interfaces into the guest, over [`netlink`].
//!
//! All but the last is data in, data out: processes are started and channels served by the
//! pod's monitor.

pub mod cpio;
pub mod driver;
pub mod error;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod modules;
pub mod netlink;
pub mod nic;
pub mod plan;
pub mod qemu;
pub mod qmp;

pub use error::{Error, Result};
