//! Device nodes: what a container is to have, and where the kernel says it sits.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::facts::{self, FactsError};
use crate::{Address, Function};

/// Character or block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// Character device.
    Char,
    /// Block device.
    Block,
}

/// What the container may do with a node: read, write, mknod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Access {
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
    /// Make nodes of this number.
    pub mknod: bool,
}

/// A node a container is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// The node on the host.
    pub host: PathBuf,
    /// Its kind.
    pub kind: NodeKind,
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
    /// What is allowed.
    pub access: Access,
}

/// Where a node's device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: a device of the kernel's own, such as `/dev/net/tun`.
    Virtual,
    /// A PCI function.
    Function(Box<Function>),
    /// An IOMMU group of VFIO, with its members.
    Group(u32, Vec<Function>),
    /// A device on another bus, with its NUMA node if that is known.
    Other(Option<u32>),
}

impl FromStr for Access {
    type Err = String;

    /// `r`, `w`, `m` in any order; nothing means all three.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self { read: true, write: true, mknod: true });
        }
        let mut access = Self::default();
        for letter in text.chars() {
            match letter {
                'r' => access.read = true,
                'w' => access.write = true,
                'm' => access.mknod = true,
                _ => return Err(format!("{text:?} is not made of r, w and m")),
            }
        }
        Ok(access)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (on, letter) in [(self.read, "r"), (self.write, "w"), (self.mknod, "m")] {
            f.write_str(if on { letter } else { "" })?;
        }
        Ok(())
    }
}

impl NodeKind {
    /// `c` or `b`, as device rules spell it.
    #[must_use]
    pub fn letter(self) -> char {
        match self {
            Self::Char => 'c',
            Self::Block => 'b',
        }
    }
}

/// Finds the device behind a number below `root`, the directory that has `sys` in it.
/// `None` when the kernel has no such device.
pub fn place(root: &Path, demand: &Demand) -> Result<Option<Place>, FactsError> {
    let bus = match demand.kind {
        NodeKind::Char => "char",
        NodeKind::Block => "block",
    };
    let link = root.join(format!("sys/dev/{bus}/{}:{}", demand.major, demand.minor));
    let Ok(dir) = link.canonicalize() else { return Ok(None) };
    let virtual_vfio = dir.parent().is_some_and(|parent| parent.ends_with("devices/virtual/vfio"));
    if let Some(group) = dir.file_name().and_then(|name| name.to_str()?.parse().ok())
        && virtual_vfio
    {
        return Ok(Some(Place::Group(group, facts::group_members(root, group)?)));
    }
    for dir in dir.ancestors().take_while(|dir| *dir != root) {
        let address = dir.file_name().and_then(|name| name.to_str()?.parse::<Address>().ok());
        if let Some(address) = address
            && let Some(function) = facts::function(root, &address)?
        {
            return Ok(Some(Place::Function(Box::new(function))));
        }
        if dir.ends_with("sys/devices/virtual") {
            return Ok(Some(Place::Virtual));
        }
        if let Some(numa) = facts::text(&dir.join("numa_node"))? {
            return Ok(Some(Place::Other(numa.parse().ok())));
        }
    }
    Ok(Some(Place::Other(None)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::{CARD, VF1, telco};

    fn char_node(major: u32, minor: u32) -> Demand {
        let access = "rw".parse().unwrap();
        Demand { host: "/dev/x".into(), kind: NodeKind::Char, major, minor, access }
    }

    #[test]
    fn a_node_is_placed_by_the_kernel_s_links() {
        let tree = telco();
        let at = |major, minor| place(tree.root(), &char_node(major, minor)).unwrap();
        match at(236, 1) {
            Some(Place::Group(12, members)) => assert_eq!(members[0].address.as_str(), VF1),
            other => panic!("{other:?}"),
        }
        match at(261, 0) {
            Some(Place::Function(function)) => assert_eq!(function.address.as_str(), CARD),
            other => panic!("{other:?}"),
        }
        assert_eq!(at(10, 196), Some(Place::Virtual));
        assert_eq!(at(99, 9), None);
    }

    #[test]
    fn permissions_are_letters_in_any_order() {
        assert_eq!("wr".parse::<Access>().unwrap().to_string(), "rw");
        assert_eq!("".parse::<Access>().unwrap().to_string(), "rwm");
        assert!("rx".parse::<Access>().is_err());
    }

    #[test]
    fn the_host_s_own_null_device_is_virtual() {
        assert_eq!(place(Path::new("/"), &char_node(1, 3)).unwrap(), Some(Place::Virtual));
    }
}
