//! Putting right what has drifted: the smallest write for one difference.

use std::io;
use std::path::Path;

use pinion_device::vfio::{self, Allowed};
use pinion_topology::{CpuSet, PageSize};

use super::{Drift, Kind};

/// Puts one difference right, if that can be done while the node runs.
pub(super) fn repair(drift: &Drift) -> io::Result<()> {
    match drift.kind {
        Kind::Hugepages => hugepages(drift),
        Kind::IrqDefault => irq_default(drift),
        Kind::Vfio => bind(drift),
        Kind::Profile | Kind::KernelCommandLine | Kind::ReservedCpus => {
            Err(io::Error::other("this cannot be changed while the node runs"))
        }
    }
}

/// `node 1, 1GB pages`: the pool's file takes the number and gives what it could.
fn hugepages(drift: &Drift) -> io::Result<()> {
    let odd = || io::Error::other(format!("{:?} is no pool", drift.what));
    let (node, size) = drift
        .what
        .strip_prefix("node ")
        .and_then(|rest| rest.strip_suffix(" pages"))
        .and_then(|rest| rest.split_once(", "))
        .ok_or_else(odd)?;
    let size: PageSize = size.parse().map_err(io::Error::other)?;
    let path =
        format!("/sys/devices/system/node/node{node}/hugepages/{}/nr_hugepages", size.sysfs_name());
    write(&path, &drift.wanted)
}

/// Never widened: whoever took CPUs out of the mask since keeps them out.
fn irq_default(drift: &Drift) -> io::Result<()> {
    let path = "/proc/irq/default_smp_affinity";
    let wanted: CpuSet = drift.wanted.parse().map_err(io::Error::other)?;
    let found: CpuSet = drift.found.parse().map_err(io::Error::other)?;
    let both = wanted.intersection(&found);
    write(path, &mask(if both.is_empty() { &wanted } else { &both }))
}

/// As the kernel prints masks: words of 32 bits in hex, the highest first.
fn mask(cpus: &CpuSet) -> String {
    let mut words: Vec<String> = Vec::new();
    for word in cpus.words() {
        words.push(format!("{:08x}", word & 0xffff_ffff));
        words.push(format!("{:08x}", word >> 32));
    }
    while words.len() > 1 && words.last().is_some_and(|word| word == "00000000") {
        words.pop();
    }
    words.reverse();
    words.join(",")
}

fn bind(drift: &Drift) -> io::Result<()> {
    let root = Path::new("/");
    let address = drift.what.parse().map_err(io::Error::other)?;
    let allowed = Allowed { entries: vec![drift.what.clone()] };
    let bindings = vfio::admit(root, &[address], &allowed).map_err(io::Error::other)?;
    bindings.iter().try_for_each(|binding| vfio::bind(root, binding))
}

fn write(path: &str, value: &str) -> io::Result<()> {
    std::fs::write(path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("write({path}, {value:?}): {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_spelled_as_the_kernel_does() {
        let spell = |list: &str| mask(&list.parse().unwrap());
        assert_eq!(spell("0-1"), "00000003");
        assert_eq!(spell("33"), "00000002,00000000");
        let there: CpuSet = "3,40,70".parse().unwrap();
        assert_eq!(CpuSet::from_mask(&mask(&there)).unwrap(), there);
    }

    #[test]
    fn what_needs_a_boot_is_not_pretended() {
        let drift = Drift::new(Kind::KernelCommandLine, "kernel command line", "a", "b");
        assert!(repair(&drift).is_err());
        let odd = Drift::new(Kind::Hugepages, "nonsense", 1, 2);
        assert!(repair(&odd).unwrap_err().to_string().contains("no pool"));
    }
}
