//! PCI devices and the NUMA node they hang on.
//!
//! Kept apart from [`crate::Topology`]: a node with SR-IOV has thousands of functions, and
//! only placement next to a device and the map for people need them.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::read::{ReadError, text};

/// One PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Address, `0000:3b:00.0`.
    pub address: String,
    /// Vendor and device numbers as the kernel prints them, `0x8086:0x1593`.
    pub id: String,
    /// Class as the kernel prints it, `0x020000` for an Ethernet controller.
    pub class: String,
    /// NUMA node; `None` where firmware did not say.
    pub node: Option<u32>,
    /// The bound driver.
    pub driver: Option<String>,
}

/// Reads every function below `root`, by address; empty where there is no PCI bus.
pub fn read_from(root: &Path) -> Result<Vec<Device>, ReadError> {
    let bus = root.join("sys/bus/pci/devices");
    let entries = match fs::read_dir(&bus) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(ReadError::Io { path: bus, source }),
    };
    let mut devices = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| ReadError::Io { path: bus.clone(), source })?;
        let dir = entry.path();
        let field = |name: &str| text(&dir.join(name)).map(Option::unwrap_or_default);
        let driver = fs::read_link(dir.join("driver")).ok();
        devices.push(Device {
            address: entry.file_name().to_string_lossy().into_owned(),
            id: format!("{}:{}", field("vendor")?, field("device")?),
            class: field("class")?,
            node: field("numa_node")?.parse().ok(), // -1: unknown
            driver: driver.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned())),
        });
    }
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    #[test]
    fn a_function_without_a_node_or_driver_says_so() {
        let tree = Tree::new();
        for (address, node) in [("0000:41:00.0", "1"), ("0000:00:1f.0", "-1")] {
            for (name, value) in [("vendor", "0x8086"), ("device", "0x10c9"), ("class", "0x020000")]
            {
                tree.file(&format!("sys/bus/pci/devices/{address}/{name}"), value);
            }
            tree.file(&format!("sys/bus/pci/devices/{address}/numa_node"), node);
        }
        let driver = tree.root().join("sys/bus/pci/devices/0000:41:00.0/driver");
        std::os::unix::fs::symlink("../../../../bus/pci/drivers/vfio-pci", driver).unwrap();
        let devices = read_from(tree.root()).unwrap();
        assert_eq!(devices[0].node, None);
        assert_eq!(devices[0].driver, None);
        assert_eq!(devices[1].address, "0000:41:00.0");
        assert_eq!(devices[1].node, Some(1));
        assert_eq!(devices[1].id, "0x8086:0x10c9");
        assert_eq!(devices[1].driver.as_deref(), Some("vfio-pci"));
        assert_eq!(read_from(Tree::new().root()).unwrap(), []);
    }
}
