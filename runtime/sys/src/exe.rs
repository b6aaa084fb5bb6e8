//! A copy of the running program that nobody can write to.
//!
//! A container can reach the file behind `/proc/PID/exe` of a runtime process that enters
//! it, and overwrite the runtime on the host (CVE-2019-5736). Before entering, the runtime
//! therefore executes itself again from a place that has no writable path:
//!
//! 1. a detached, read-only clone of the mount that holds the binary (no copy), or
//! 2. a sealed memory file, where the kernel refuses the first.

use std::ffi::{CStr, CString, OsStr};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mount::OpenTreeFlags;

use crate::mount::{MountAttributes, set_attributes};

const SELF: &CStr = c"/proc/self/exe";
/// Tells the second instance that the first one arranged its executable.
const MARKER: &str = "_PINION_SEALED";

/// Returns at once in a sealed instance; otherwise replaces this process by one.
///
/// Call it before descriptors are opened or state is made.
///
/// # Errors
/// When neither way works; the caller must then not enter a container.
pub fn ensure_sealed() -> io::Result<()> {
    if std::env::var_os(MARKER).is_some() && is_sealed()? {
        return Ok(());
    }
    let sealed = read_only_clone().or_else(|_| sealed_copy())?;
    Err(execute(sealed))
}

/// True when the running executable lies on a read-only mount or is a sealed memory file.
fn is_sealed() -> io::Result<bool> {
    let exe = rustix::fs::open(SELF, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    if let Ok(seals) = rustix::fs::fcntl_get_seals(&exe) {
        return Ok(seals.contains(SealFlags::WRITE | SealFlags::SEAL));
    }
    let flags = rustix::fs::fstatvfs(&exe)?.f_flag;
    Ok(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

fn read_only_clone() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(rustix::fs::CWD, SELF, flags)?;
    let read_only = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() };
    set_attributes(tree.as_fd(), c"", false, &read_only)?;
    Ok(tree)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create(c"pinion", flags | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create(c"pinion", flags))?;
    let mut copy = std::fs::File::from(memory);
    let mut program = Vec::new();
    std::fs::File::open("/proc/self/exe")?.read_to_end(&mut program)?;
    copy.write_all(&program)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    Ok(copy.into())
}

/// Executes `program` with the arguments of this process; returns only on failure.
fn execute(program: OwnedFd) -> io::Error {
    let arguments: Vec<CString> =
        std::env::args_os().filter_map(|a| CString::new(a.into_vec()).ok()).collect();
    let mut environment: Vec<CString> = std::env::vars_os()
        .filter(|(key, _)| key != MARKER)
        .filter_map(|(key, value)| assignment(&key, &value))
        .collect();
    environment.extend(assignment(OsStr::new(MARKER), OsStr::new("1")));
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    // SAFETY: both vectors are null-terminated arrays of C strings that outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

fn assignment(key: &OsStr, value: &OsStr) -> Option<CString> {
    let mut bytes = key.as_bytes().to_vec();
    bytes.push(b'=');
    bytes.extend_from_slice(value.as_bytes());
    CString::new(bytes).ok()
}
