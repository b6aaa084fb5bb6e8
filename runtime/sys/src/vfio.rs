//! A PCI function used from user space: the group API of VFIO with a type 1 IOMMU
//! (Documentation/driver-api/vfio.rst, include/uapi/linux/vfio.h).
//!
//! ```text
//!   /dev/vfio/vfio (container) ◀─ set ── /dev/vfio/<group> ── get ─▶ device
//!        │ map: memory ▶ I/O virtual addresses                        │ regions, reset
//! ```
//!
//! A mapping borrows its memory, so that the memory outlives what the device may write.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// `_IO(';', 100 + number)`.
const fn request(number: u64) -> u64 {
    0x3b64 + number
}

const API_VERSION: u64 = request(0);
const CHECK_EXTENSION: u64 = request(1);
const SET_IOMMU: u64 = request(2);
const GROUP_STATUS: u64 = request(3);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_DEVICE: u64 = request(6);
const DEVICE_INFO: u64 = request(7);
const REGION_INFO: u64 = request(8);
const DEVICE_RESET: u64 = request(11);
const MAP_DMA: u64 = request(13);
const UNMAP_DMA: u64 = request(14);
const TYPE1V2: libc::c_ulong = 3;
const VIABLE: u32 = 1;
const READ_WRITE: u32 = 3;
const CONFIG_REGION: u32 = 7;

#[repr(C)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
struct DeviceInfo {
    argsz: u32,
    flags: u32,
    regions: u32,
    irqs: u32,
}

#[repr(C)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// An opened function.
#[derive(Debug)]
pub struct Function {
    container: File,
    _group: File,
    device: File,
}

/// What the function says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// Its regions, BARs first.
    pub regions: u32,
    /// Kinds of interrupt.
    pub irqs: u32,
    /// Vendor (low half) and device, as in its configuration space.
    pub id: u32,
}

/// Memory that the function may read and write, until dropped.
#[derive(Debug)]
pub struct Mapping<'a> {
    function: &'a Function,
    iova: u64,
    memory: &'a mut [u8],
}

impl Function {
    /// Opens a function through its group.
    pub fn open(group: u32, address: &str) -> io::Result<Self> {
        let open = |path: &str| {
            let file = File::options().read(true).write(true).open(path);
            file.map_err(|error| io::Error::new(error.kind(), format!("open {path}: {error}")))
        };
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/{group}"))?;
        // SAFETY: takes no pointer.
        let version = unsafe { libc::ioctl(container.as_raw_fd(), API_VERSION as _) };
        if version != 0 {
            return Err(io::Error::other(format!("VFIO has API version {version}, not 0")));
        }
        // SAFETY: takes a number.
        let type1 = unsafe { libc::ioctl(container.as_raw_fd(), CHECK_EXTENSION as _, TYPE1V2) };
        if type1 != 1 {
            return Err(io::Error::other("VFIO has no type 1 IOMMU"));
        }
        let mut status = GroupStatus { argsz: size_of::<GroupStatus>() as u32, flags: 0 };
        // SAFETY: the structure is as large as it says.
        check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_STATUS as _, &raw mut status) })?;
        if status.flags & VIABLE == 0 {
            return Err(io::Error::other("the group is not viable: not all of it is on VFIO"));
        }
        let fd = container.as_raw_fd();
        // SAFETY: a descriptor by address, valid during the call.
        check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER as _, &raw const fd) })?;
        // SAFETY: takes a number.
        check(unsafe { libc::ioctl(container.as_raw_fd(), SET_IOMMU as _, TYPE1V2) })?;
        let name = CString::new(address).map_err(io::Error::other)?;
        // SAFETY: a string that ends with NUL and lives during the call.
        let fd =
            check(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_DEVICE as _, name.as_ptr()) })?;
        // SAFETY: the kernel has just made it for us alone.
        let device = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        Ok(Self { container, _group: group, device })
    }

    /// Asks the function what it is.
    pub fn describe(&self) -> io::Result<Description> {
        let mut info =
            DeviceInfo { argsz: size_of::<DeviceInfo>() as u32, flags: 0, regions: 0, irqs: 0 };
        // SAFETY: the structure is as large as it says.
        check(unsafe { libc::ioctl(self.device.as_raw_fd(), DEVICE_INFO as _, &raw mut info) })?;
        let mut region = RegionInfo {
            argsz: size_of::<RegionInfo>() as u32,
            flags: 0,
            index: CONFIG_REGION,
            cap_offset: 0,
            size: 0,
            offset: 0,
        };
        // SAFETY: the structure is as large as it says.
        check(unsafe { libc::ioctl(self.device.as_raw_fd(), REGION_INFO as _, &raw mut region) })?;
        let mut id = [0; 4];
        self.device.read_exact_at(&mut id, region.offset)?;
        let id = u32::from_le_bytes(id);
        Ok(Description { regions: info.regions, irqs: info.irqs, id })
    }

    /// Resets the function.
    pub fn reset(&self) -> io::Result<()> {
        // SAFETY: takes no argument.
        check(unsafe { libc::ioctl(self.device.as_raw_fd(), DEVICE_RESET as _) }).map(drop)
    }

    /// Lets the function use memory under an I/O virtual address. The kernel pins it, and
    /// counts it against RLIMIT_MEMLOCK.
    pub fn map<'a>(&'a self, memory: &'a mut [u8], iova: u64) -> io::Result<Mapping<'a>> {
        let map = DmaMap {
            argsz: size_of::<DmaMap>() as u32,
            flags: READ_WRITE,
            vaddr: memory.as_mut_ptr() as u64,
            iova,
            size: memory.len() as u64,
        };
        // SAFETY: the memory is borrowed for as long as the mapping lives, and unmapped before.
        check(unsafe { libc::ioctl(self.container.as_raw_fd(), MAP_DMA as _, &raw const map) })?;
        Ok(Mapping { function: self, iova, memory })
    }
}

impl Mapping<'_> {
    /// Bytes that are mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether nothing is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        let mut unmap = DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags: 0,
            iova: self.iova,
            size: self.memory.len() as u64,
        };
        let container = self.function.container.as_raw_fd();
        // SAFETY: the structure is as large as it says. A failure leaves the mapping to the
        // end of the container's descriptor, which ends with the function.
        let _ = unsafe { libc::ioctl(container, UNMAP_DMA as _, &raw mut unmap) };
    }
}

fn check(answer: libc::c_int) -> io::Result<libc::c_int> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}
