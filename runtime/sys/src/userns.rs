//! Which user namespace this process is in.

/// The inode of the first user namespace in nsfs (`PROC_USER_INIT_INO`, include/linux/proc_ns.h).
const FIRST: u64 = 0xEFFF_FFFD;

/// True in the first user namespace, whose rights are rights on the machine.
///
/// The id map does not tell: a namespace that maps every id onto itself has the same one.
/// Without `/proc` the answer is no, and what needs those rights is then not attempted.
#[must_use]
pub fn is_first() -> bool {
    rustix::fs::stat("/proc/self/ns/user").is_ok_and(|file| file.st_ino == FIRST)
}
