//! PCI functions and IOMMU groups as sysfs shows them
//! (Documentation/ABI/testing/sysfs-bus-pci, sysfs-kernel-iommu_groups).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Address;

/// A file of sysfs that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("read {}", path.display())]
pub struct FactsError {
    /// The file or directory.
    pub path: PathBuf,
    /// What the kernel answered.
    #[source]
    pub source: io::Error,
}

/// One PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its address.
    pub address: Address,
    /// Vendor and device without `0x`, `8086:10ca`.
    pub id: String,
    /// Class with programming interface, `020000` for an Ethernet controller.
    pub class: String,
    /// The bound driver.
    pub driver: Option<String>,
    /// The driver that alone may bind it (`driver_override`).
    pub driver_override: Option<String>,
    /// NUMA node; `None` where firmware did not say.
    pub numa: Option<u32>,
    /// IOMMU group; `None` without an IOMMU.
    pub group: Option<u32>,
    /// The physical function this one is virtual of.
    pub physfn: Option<Address>,
    /// Which virtual function of it this is.
    pub vf: Option<u32>,
    /// Its own virtual functions, in order.
    pub virtfns: Vec<Address>,
    /// Its network interfaces in the namespace of whoever reads.
    pub interfaces: Vec<String>,
}

impl Function {
    /// Bridges share groups with what is behind them and are never given away.
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        self.class.starts_with("06")
    }

    /// Whether a driver that hands the function to user space is bound; besides `vfio-pci`
    /// there are vendors' variants such as `mlx5_vfio_pci`.
    #[must_use]
    pub fn on_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }
}

fn is_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("_vfio_pci")
}

pub(crate) fn devices_dir(root: &Path) -> PathBuf {
    root.join("sys/bus/pci/devices")
}

/// The function of this address below `root` (the directory that has `sys` in it); `None`
/// when there is none.
pub fn function(root: &Path, address: &Address) -> Result<Option<Function>, FactsError> {
    let dir = devices_dir(root).join(address.as_str());
    if !dir.exists() {
        return Ok(None);
    }
    let hex = |name: &str| {
        let text = text(&dir.join(name))?.unwrap_or_default();
        Ok::<_, FactsError>(text.trim_start_matches("0x").to_owned())
    };
    let virtfns = virtfns(&dir)?;
    let physfn = link_name(&dir.join("physfn")).and_then(|name| name.parse().ok());
    let vf = match &physfn {
        Some(parent) => vf_number(root, parent, address)?,
        None => None,
    };
    let overriding = text(&dir.join("driver_override"))?;
    Ok(Some(Function {
        address: address.clone(),
        id: format!("{}:{}", hex("vendor")?, hex("device")?),
        class: hex("class")?,
        driver: link_name(&dir.join("driver")),
        driver_override: overriding.filter(|name| !name.is_empty() && name != "(null)"),
        // -1 is "unknown"
        numa: text(&dir.join("numa_node"))?.and_then(|text| text.parse().ok()),
        group: link_name(&dir.join("iommu_group")).and_then(|name| name.parse().ok()),
        physfn,
        vf,
        virtfns,
        interfaces: names(&dir.join("net"))?,
    }))
}

/// Every function of the machine, by address; empty where there is no PCI bus.
pub fn functions(root: &Path) -> Result<Vec<Function>, FactsError> {
    let mut all = Vec::new();
    for name in names(&devices_dir(root))? {
        let Ok(address) = name.parse() else { continue };
        // One that is gone since the listing was unplugged.
        all.extend(function(root, &address)?);
    }
    Ok(all)
}

/// The functions of an IOMMU group, by address; empty when there is no such group.
pub fn group_members(root: &Path, group: u32) -> Result<Vec<Function>, FactsError> {
    let dir = root.join(format!("sys/kernel/iommu_groups/{group}/devices"));
    let mut members = Vec::new();
    for name in names(&dir)? {
        let Ok(address) = name.parse() else { continue };
        members.extend(function(root, &address)?);
    }
    Ok(members)
}

fn virtfns(dir: &Path) -> Result<Vec<Address>, FactsError> {
    let mut found = Vec::new();
    for name in names(dir)? {
        let Some(number) = name.strip_prefix("virtfn").and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let target = link_name(&dir.join(&name)).and_then(|name| name.parse().ok());
        found.extend(target.map(|address: Address| (number, address)));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, address)| address).collect())
}

fn vf_number(root: &Path, parent: &Address, address: &Address) -> Result<Option<u32>, FactsError> {
    let siblings = virtfns(&devices_dir(root).join(parent.as_str()))?;
    let at = siblings.iter().position(|sibling| sibling == address);
    Ok(at.and_then(|at| u32::try_from(at).ok()))
}

/// The text of a file without blanks around it; `None` where there is no such file.
pub(crate) fn text(path: &Path) -> Result<Option<String>, FactsError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FactsError { path: path.to_owned(), source }),
    }
}

/// The last component of a symbolic link's target.
pub(crate) fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// Names of a directory's entries in order; none where there is no such directory.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, FactsError> {
    let failed = |source| FactsError { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::{PF, VF0, VF1, telco};

    #[test]
    fn a_virtual_function_knows_its_parent_number_group_and_node() {
        let tree = telco();
        let vf = function(tree.root(), &VF1.parse().unwrap()).unwrap().unwrap();
        assert_eq!((vf.physfn.as_ref().map(Address::as_str), vf.vf), (Some(PF), Some(1)));
        assert_eq!((vf.group, vf.numa), (Some(12), Some(1)));
        assert_eq!(vf.driver.as_deref(), Some("igbvf"));
        assert_eq!(vf.driver_override, None);
        assert_eq!(vf.interfaces, ["eth2"]);
        let pf = function(tree.root(), &PF.parse().unwrap()).unwrap().unwrap();
        assert_eq!(pf.virtfns.iter().map(Address::as_str).collect::<Vec<_>>(), [VF0, VF1]);
        assert_eq!((pf.id.as_str(), pf.class.as_str()), ("8086:10c9", "020000"));
    }

    #[test]
    fn absent_functions_and_groups_are_not_errors() {
        let tree = telco();
        assert_eq!(function(tree.root(), &"0000:ff:00.0".parse().unwrap()).unwrap(), None);
        assert!(group_members(tree.root(), 999).unwrap().is_empty());
        assert_eq!(functions(tree.root()).unwrap().len(), 5);
    }
}
