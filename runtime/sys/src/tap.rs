//! Tap devices: network interfaces whose other side is a descriptor (tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// `struct ifreq` as TUNSETIFF reads it: a name and flags.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Makes the tap device `name` in the calling thread's network namespace and opens it,
/// non-blocking, with a virtio header before each frame. It goes with the descriptor.
///
/// # Errors
/// Those of opening `/dev/net/tun` and of `TUNSETIFF`; `InvalidInput` for a name of more
/// than 15 bytes.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    let room = request.name.get_mut(..name.len()).filter(|_| name.len() < libc::IFNAMSIZ);
    room.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(name.as_bytes());
    request.flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: the kernel reads and writes one `struct ifreq`, which `request` is as large as.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(device.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_large_as_the_kernel_s() {
        assert_eq!(size_of::<Request>(), size_of::<libc::ifreq>());
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        let error = open("sixteen-bytes-xy").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
