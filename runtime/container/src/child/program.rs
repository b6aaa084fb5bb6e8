//! Finding the program to execute, in the container and with its user's rights.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};

use crate::error::{Doing, Failure};

/// The path of the program that `name` stands for: itself when it contains a slash, else
/// the first match in `search_path`.
///
/// # Errors
/// In runc's words, which clients turn into the exit codes 126 and 127.
pub(crate) fn find(name: &str, search_path: &str) -> Result<CString, Failure> {
    if name.contains('/') {
        let path = Path::new(name);
        return match executable(path) {
            Ok(()) => to_c(path),
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                Err(error).doing(|| format!("{name:?}"))
            }
            Err(error) => Err(error).doing(|| format!("{name:?}: stat {name}")),
        };
    }
    let mut denied = None;
    for directory in search_path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate: PathBuf = Path::new(directory).join(name);
        match executable(&candidate) {
            Ok(()) => return to_c(&candidate),
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => denied = Some(error),
            Err(_) => {}
        }
    }
    match denied {
        Some(error) => Err(error).doing(|| format!("{name:?}")),
        None => Err(Failure::refused(format!("{name:?}: executable file not found in $PATH"))),
    }
}

fn executable(path: &Path) -> io::Result<()> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        // As execve would say, and what callers turn into the exit code 126.
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    match rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        // Before faccessat2 (Linux 5.8) the mode bits must do; execve decides anyway.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) if stat.st_mode & 0o111 != 0 => {
            Ok(())
        }
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {
            Err(io::Error::from_raw_os_error(libc::EACCES))
        }
        other => Ok(other?),
    }
}

fn to_c(path: &Path) -> Result<CString, Failure> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_nul| Failure::refused(format!("{}: contains a NUL byte", path.display())))
}

/// The largest `/etc/passwd` that is read.
const MAX_PASSWD: u64 = 10 << 20;

/// The home directory of `uid` in the container's `/etc/passwd`, or `/`.
#[must_use]
pub(crate) fn home_of(uid: u32) -> String {
    let fallback = || "/".to_owned();
    // A FIFO or device of the image must not block or feed us for ever.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::open("/etc/passwd", flags, Mode::empty()) else { return fallback() };
    let regular = rustix::fs::fstat(&fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    let mut text = Vec::new();
    if !regular || std::fs::File::from(fd).take(MAX_PASSWD).read_to_end(&mut text).is_err() {
        return fallback();
    }
    home_in(&String::from_utf8_lossy(&text), uid).unwrap_or_else(fallback)
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = fields.nth(2)?.parse::<u32>().ok()?;
        let home = fields.nth(2)?;
        (id == uid && home.starts_with('/')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_path_and_by_name() {
        assert_eq!(find("/bin/sh", "").unwrap().to_str().unwrap(), "/bin/sh");
        assert!(find("sh", "/nonexistent:/usr/bin:/bin").is_ok());
    }

    #[test]
    fn failures_are_told_in_the_words_clients_look_for() {
        let text = |name: &str| crate::error::chain(&find(name, "/usr/bin").unwrap_err());
        assert_eq!(text("no-such"), "\"no-such\": executable file not found in $PATH");
        assert_eq!(text("/no/such"), "\"/no/such\": stat /no/such: no such file or directory");
        assert_eq!(text("/etc/passwd"), "\"/etc/passwd\": permission denied");
        assert_eq!(text("/etc"), "\"/etc\": permission denied");
    }

    #[test]
    fn the_home_directory_is_that_of_the_user_id() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:10:10::/srv/app:/bin/sh\nx:x:11:1::no:/\n";
        assert_eq!(home_in(passwd, 10).as_deref(), Some("/srv/app"));
        assert_eq!(home_in(passwd, 11), None);
        assert_eq!(home_in(passwd, 12), None);
    }
}
