//! Reading and writing cgroup files, errors that name the file.
//!
//! System calls are made directly: the standard library over musl needs seven for a file that
//! four can read, and a container's life is mostly such files.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::{Error, Result};

/// The whole file.
pub(crate) fn read(path: &Path) -> Result<String> {
    text(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// The whole file, or `None` when it (or its directory) is not there, or its driver has
/// nothing to say (`ENODEV`, `EOPNOTSUPP`: pressure files on kernels booted without PSI).
pub(crate) fn read_if_present(path: &Path) -> Result<Option<String>> {
    match text(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}

/// One number; `max` is `u64::MAX`. `None` when the file is not there.
pub(crate) fn number(path: &Path) -> Result<Option<u64>> {
    let Some(text) = read_if_present(path)? else {
        return Ok(None);
    };
    match text.trim() {
        "max" => Ok(Some(u64::MAX)),
        // v1 writes -1 for "no limit" into files that take it.
        "-1" => Ok(Some(u64::MAX)),
        text => text.parse().map(Some).map_err(|_not_a_number| Error::Parse {
            path: path.to_owned(),
            text: text.to_owned(),
            expected: "a number",
        }),
    }
}

/// Writes `value` in one call, as the kernel wants it.
pub(crate) fn write(path: &Path, value: &str) -> Result<()> {
    try_write(path, value).map_err(|source| Error::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// [`write`] with the bare cause.
pub(crate) fn try_write(path: &Path, value: &str) -> io::Result<()> {
    let file = open(path, OFlags::WRONLY)?;
    let mut rest = value.as_bytes();
    while !rest.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::write(&file, rest))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => rest = &rest[written..],
        }
    }
    Ok(())
}

fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    Ok(rustix::io::retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))?)
}

fn text(path: &Path) -> io::Result<String> {
    let file = open(path, OFlags::RDONLY)?;
    let mut bytes = Vec::new();
    let mut page = [0; 4096];
    loop {
        match rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut page))? {
            0 => break,
            length => bytes.extend_from_slice(&page[..length]),
        }
    }
    String::from_utf8(bytes).map_err(|_not_utf8| io::ErrorKind::InvalidData.into())
}

/// `ENOENT` or `ENODEV`: the cgroup or the file is not there (any more).
pub(crate) fn is_gone(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(code, Some(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV))
}

/// The file is not there, or its driver has nothing to say.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    is_gone(error) || is_unsupported(error)
}

fn is_unsupported(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    code == Some(rustix::io::Errno::OPNOTSUPP)
}
