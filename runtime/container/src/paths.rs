//! Sockets and small files in places whose paths may be longer than a socket address.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use pinion_sys::fd::proc_path;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Doing, Failure};

/// Listens on the socket `path`, whose directory is open as `directory`; mode 0600.
///
/// # Errors
/// As bind(2).
pub fn listen(directory: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Failure> {
    let what = || format!("listen on {}", path.display());
    let socket = new_socket(SocketType::SEQPACKET).doing(what)?;
    let address = address_in(directory, path).doing(what)?;
    // Nobody but the owner may start the container; the umask decides a socket's mode.
    let old = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = rustix::net::bind(&socket, &address);
    rustix::process::umask(old);
    bound.doing(what)?;
    rustix::net::listen(&socket, 1).doing(what)?;
    Ok(socket)
}

/// Connects to the `SOCK_SEQPACKET` socket at `path`.
///
/// # Errors
/// `ECONNREFUSED` when nobody listens any more.
pub fn connect_packets(path: &Path) -> io::Result<OwnedFd> {
    connect_to(path, SocketType::SEQPACKET)
}

/// Connects to the stream socket at `path`.
///
/// # Errors
/// Names the path.
pub fn connect(path: &Path) -> Result<OwnedFd, Failure> {
    connect_to(path, SocketType::STREAM).doing(|| format!("connect to {}", path.display()))
}

fn connect_to(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent, flags, Mode::empty())?;
    let socket = new_socket(kind)?;
    rustix::net::connect(&socket, &address_in(directory.as_fd(), path)?)?;
    Ok(socket)
}

fn new_socket(kind: SocketType) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    Ok(socket)
}

/// `/proc/self/fd/N/name`: short, however deep the directory.
fn address_in(directory: BorrowedFd<'_>, path: &Path) -> io::Result<SocketAddrUnix> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let short: PathBuf = proc_path(directory).join(name);
    Ok(SocketAddrUnix::new(short)?)
}

/// Writes a process id for whoever polls the file: never seen empty.
///
/// # Errors
/// Names the path.
pub fn write_pid_file(path: &Path, pid: i32) -> Result<(), Failure> {
    pinion_sys::atomic_file::write_volatile(path, pid.to_string().as_bytes(), 0o644)
        .doing(|| format!("write the pid file {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_deep_in_the_file_system_can_be_used() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let directory = std::fs::File::open(&deep).unwrap();
        let path = deep.join("exec.sock");
        let listener = listen(directory.as_fd(), &path).unwrap();
        let client = connect_packets(&path).unwrap();
        let server = rustix::net::accept(&listener).unwrap();
        rustix::io::write(&client, b"x").unwrap();
        assert_eq!(rustix::io::read(&server, &mut [0; 2]).unwrap(), 1);
        drop(listener);
        assert!(connect_packets(&path).is_err());
    }
}
