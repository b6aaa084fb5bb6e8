//! Settings of links under `/proc/sys/net`, of the calling thread's network namespace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

fn path(family: &str, link: &str, key: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(family).join("conf").join(link).join(key)
}

/// Writes a setting.
pub(crate) fn write(family: &str, link: &str, key: &str, value: &str) -> io::Result<()> {
    fs::write(path(family, link, key), value)
}

/// Writes a setting that some kernels lack (IPv6 switched off): as the plugins, without it.
pub(crate) fn try_write(family: &str, link: &str, key: &str, value: &str) {
    let _ = write(family, link, key, value);
}

/// Writes a setting unless it has the value.
pub(crate) fn ensure(family: &str, link: &str, key: &str, value: &str) -> io::Result<()> {
    match fs::read_to_string(path(family, link, key)) {
        Ok(found) if found.trim() == value => Ok(()),
        Ok(_) => write(family, link, key, value),
        Err(error) => Err(error),
    }
}

/// Lets the node route packets of a family.
pub(crate) fn enable_forwarding(v4: bool) -> io::Result<()> {
    let path = if v4 {
        Path::new("/proc/sys/net/ipv4/ip_forward")
    } else {
        Path::new("/proc/sys/net/ipv6/conf/all/forwarding")
    };
    if fs::read_to_string(path).is_ok_and(|value| value.trim() == "1") {
        return Ok(());
    }
    fs::write(path, "1")
}
