//! What every virtual machine monitor must be able to do, as data: how it is started, and
//! what it is told while it runs. Carrying it out is the caller's.

use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use serde_json::Value;

use crate::machine::Machine;

/// A program to start. Descriptors it is to inherit are those of [`Ends`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, without its name.
    pub arguments: Vec<OsString>,
    /// Its environment.
    pub environment: Vec<(&'static str, PathBuf)>,
}

/// The descriptors a machine is started with, by the numbers they will have in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    /// A stream socket: the channel to the agent.
    pub agent: RawFd,
    /// A stream socket: where it is told what to do.
    pub control: RawFd,
    /// A stream socket: what the guest kernel says.
    pub console: RawFd,
    /// A stream socket: where the files of the host are served.
    pub share: Option<RawFd>,
    /// Network interfaces.
    pub taps: Vec<Tap>,
}

/// A network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// An open tap device with virtio headers.
    pub fd: RawFd,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// Bytes of a packet, without the Ethernet header.
    pub mtu: u32,
}

/// A disk to plug into a running machine.
#[derive(Debug)]
pub struct Disk {
    /// What the guest knows it by: its serial number, at most 20 characters.
    pub serial: String,
    /// Its slot, from 1 to [`SLOTS`].
    pub slot: u8,
    /// A raw image, open for reading. The format is never guessed.
    pub image: OwnedFd,
}

/// Disks a machine can have at a time.
pub const SLOTS: u8 = 28;

/// One step of what a machine is told.
#[derive(Debug)]
pub enum Step {
    /// A command of its control protocol, with a descriptor it names.
    Command {
        /// What to do.
        name: &'static str,
        /// How.
        arguments: Value,
        /// What goes with it.
        fd: Option<OwnedFd>,
    },
    /// Wait until a device has left the guest.
    Gone(String),
}

/// Steps of which each needs the one before.
pub type Script = Vec<Step>;

/// A virtual machine monitor.
pub trait Driver {
    /// How it is started.
    fn launch(&self, machine: &Machine, ends: &Ends) -> Launch;
    /// Plugs a disk in.
    fn add_disk(&self, disk: Disk) -> Script;
    /// Unplugs the disk of a slot.
    fn remove_disk(&self, slot: u8) -> Script;
    /// Asks for the threads that are the processors.
    fn processors(&self) -> Script;
}

/// The thread ids in the answer to [`Driver::processors`], in the order of the processors.
#[must_use]
pub fn threads(answer: &Value) -> Vec<i32> {
    let mut threads: Vec<(u64, i32)> = answer
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|cpu| {
            let thread = i32::try_from(cpu["thread-id"].as_i64()?).ok()?;
            Some((cpu["cpu-index"].as_u64()?, thread))
        })
        .collect();
    threads.sort_unstable();
    threads.into_iter().map(|(_, thread)| thread).collect()
}
