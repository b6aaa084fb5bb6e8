//! A directory that looks like the sysfs of a node with SR-IOV.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

pub(crate) const PF: &str = "0000:41:00.0";
pub(crate) const VF0: &str = "0000:41:10.0";
pub(crate) const VF1: &str = "0000:41:10.2";
/// A card of node 0 whose group it shares with a second function.
pub(crate) const CARD: &str = "0000:21:00.0";
pub(crate) const CARD_TWIN: &str = "0000:21:00.1";

pub(crate) struct Tree(tempfile::TempDir);

impl Tree {
    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    pub(crate) fn bind(&self, address: &str, driver: Option<&str>) {
        let path = self.root().join(format!("sys/devices/pci/{address}/driver"));
        let _ = fs::remove_file(&path);
        if let Some(driver) = driver {
            symlink(format!("../../../bus/pci/drivers/{driver}"), path).unwrap();
        }
    }

    fn function(&self, address: &str, ids: (&str, &str, &str), numa: i32, group: u32) {
        let dir = format!("sys/devices/pci/{address}");
        for (name, text) in [("vendor", ids.0), ("device", ids.1), ("class", ids.2)] {
            self.file(&format!("{dir}/{name}"), text);
        }
        self.file(&format!("{dir}/numa_node"), &numa.to_string());
        self.file(&format!("{dir}/driver_override"), "(null)");
        self.link(&format!("{dir}/iommu_group"), &format!("../../../kernel/iommu_groups/{group}"));
        let member = format!("sys/kernel/iommu_groups/{group}/devices/{address}");
        self.link(&member, &format!("../../../../devices/pci/{address}"));
        self.link(
            &format!("sys/bus/pci/devices/{address}"),
            &format!("../../../devices/pci/{address}"),
        );
    }
}

/// One card of two functions on node 0; a NIC with two virtual functions on node 1; VFIO's
/// own nodes, with the numbers that the tests use.
pub(crate) fn telco() -> Tree {
    let tree = Tree(tempfile::tempdir().unwrap());
    let card = ("0x10ee", "0x5000", "0x120000");
    tree.function(CARD, card, 0, 7);
    tree.function(CARD_TWIN, card, 0, 7);
    tree.function(PF, ("0x8086", "0x10c9", "0x020000"), 1, 10);
    for (number, (vf, group)) in [(VF0, 11), (VF1, 12)].into_iter().enumerate() {
        tree.function(vf, ("0x8086", "0x10ca", "0x020000"), 1, group);
        tree.link(&format!("sys/devices/pci/{vf}/physfn"), &format!("../{PF}"));
        tree.link(&format!("sys/devices/pci/{PF}/virtfn{number}"), &format!("../{vf}"));
        tree.bind(vf, Some("igbvf"));
        tree.file(
            &format!("sys/devices/pci/{vf}/net/eth{}/address", number + 1),
            "02:00:00:00:00:01",
        );
        // the group's node exists once a member is on vfio-pci
        tree.file(&format!("sys/devices/virtual/vfio/{group}/dev"), &format!("236:{number}"));
        tree.link(
            &format!("sys/dev/char/236:{number}"),
            &format!("../../devices/virtual/vfio/{group}"),
        );
    }
    tree.bind(PF, Some("igb"));
    tree.file("sys/devices/virtual/misc/vfio/dev", "10:196");
    tree.link("sys/dev/char/10:196", "../../devices/virtual/misc/vfio");
    tree.file(&format!("sys/devices/pci/{CARD}/accel/accel0/dev"), "261:0");
    tree.link("sys/dev/char/261:0", &format!("../../devices/pci/{CARD}/accel/accel0"));
    fs::create_dir_all(tree.root().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
    tree
}
