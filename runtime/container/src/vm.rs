//! `vm`: a container with a kernel of its own (runtime-spec, "Virtual-machine-specific
//! Container Configuration").
//!
//! The section is read and checked here; starting the machine is a driver's work. Without a
//! driver a bundle with this section is refused, with what is missing, and never runs on the
//! host's kernel instead.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// The section as it stands in the configuration. The types of oci-spec leave out
/// `hwConfig`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Vm {
    /// The program that makes the machine.
    pub hypervisor: Option<Program>,
    /// The guest's kernel.
    pub kernel: Kernel,
    /// The guest's root image.
    pub image: Option<Image>,
    /// CPUs, memory and passed-through devices.
    #[serde(rename = "hwConfig")]
    pub hardware: Option<Hardware>,
}

/// A program with its parameters.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Program {
    /// Absolute path on the host.
    pub path: PathBuf,
    /// Its arguments.
    #[serde(default)]
    pub parameters: Vec<String>,
}

/// The guest's kernel.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Kernel {
    /// Absolute path on the host.
    pub path: PathBuf,
    /// Command line.
    #[serde(default)]
    pub parameters: Vec<String>,
    /// Initial RAM disk, absolute.
    pub initrd: Option<PathBuf>,
}

/// The guest's root image.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Image {
    /// Absolute path on the host.
    pub path: PathBuf,
    /// `raw` (also when empty), `qcow2`, `vdi`, `vmdk`, `vhd` or what else the driver knows.
    #[serde(default)]
    pub format: String,
}

/// `hwConfig`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Hardware {
    /// Device tree, absolute path on the host.
    pub device_tree: Option<PathBuf>,
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Node properties of the device tree that are passed through.
    #[serde(default)]
    pub dtdevs: Vec<String>,
    /// Ranges of I/O memory that are passed through.
    #[serde(default)]
    pub iomems: Vec<IoMemory>,
    /// Interrupts that are passed through.
    #[serde(default)]
    pub irqs: Vec<u32>,
}

/// One range of I/O memory, in pages.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct IoMemory {
    /// First frame in the guest; that of the host when absent.
    #[serde(rename = "firstGFN")]
    pub first_guest_frame: Option<u64>,
    /// First frame on the host.
    #[serde(rename = "firstMFN")]
    pub first_host_frame: u64,
    /// How many.
    #[serde(rename = "nrMFNs")]
    pub count: u64,
}

impl Vm {
    /// Checks the section.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn check(&self) -> Result<()> {
        let hypervisor = self.hypervisor.as_ref().map(|program| &program.path);
        let image = self.image.as_ref().map(|image| &image.path);
        let tree = self.hardware.as_ref().and_then(|hardware| hardware.device_tree.as_ref());
        for (field, path) in [
            ("hypervisor.path", hypervisor),
            ("kernel.path", Some(&self.kernel.path)),
            ("kernel.initrd", self.kernel.initrd.as_ref()),
            ("image.path", image),
            ("hwConfig.deviceTree", tree),
        ] {
            if path.is_some_and(|path: &PathBuf| !Path::is_absolute(path)) {
                return Err(Error::Invalid(format!("vm.{field} must be an absolute path")));
            }
        }
        match self.hardware.as_ref().and_then(|hardware| hardware.vcpus) {
            Some(0) => Err(Error::Invalid("vm.hwConfig.vcpus must not be 0".into())),
            _ => Ok(()),
        }
    }

    /// Why this runtime does not start the machine.
    #[must_use]
    pub fn refusal(&self) -> Error {
        Error::Unsupported(format!(
            "the vm section (kernel {}): this runtime has no microVM driver, and the container must not run on the host's kernel instead",
            self.kernel.path.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_section_is_read_and_checked() {
        let vm: Vm = serde_json::from_str(
            r#"{"hypervisor":{"path":"/usr/bin/vmm","parameters":["a"]},
                "kernel":{"path":"/boot/k","parameters":["quiet"],"initrd":"/boot/i"},
                "image":{"path":"/i.raw","format":"raw"},
                "hwConfig":{"vcpus":2,"memory":268435456,"dtdevs":["x"],"irqs":[5],
                  "iomems":[{"firstMFN":16,"nrMFNs":2}]}}"#,
        )
        .unwrap();
        vm.check().unwrap();
        assert_eq!(vm.hardware.as_ref().unwrap().vcpus, Some(2));
        let text = vm.refusal().to_string();
        assert!(text.contains("/boot/k") && text.contains("microVM driver"), "{text}");
    }

    #[test]
    fn relative_paths_and_no_cpus_are_refused_by_field() {
        for (json, field) in [
            (r#"{"kernel":{"path":"k"}}"#, "kernel.path"),
            (r#"{"kernel":{"path":"/k","initrd":"i"}}"#, "kernel.initrd"),
            (r#"{"kernel":{"path":"/k"},"image":{"path":"i"}}"#, "image.path"),
            (r#"{"kernel":{"path":"/k"},"hwConfig":{"vcpus":0}}"#, "hwConfig.vcpus"),
            (r#"{"kernel":{"path":"/k"},"hypervisor":{"path":"qemu"}}"#, "hypervisor.path"),
        ] {
            let vm: Vm = serde_json::from_str(json).unwrap();
            assert!(vm.check().unwrap_err().to_string().contains(field), "{json}");
        }
    }
}
