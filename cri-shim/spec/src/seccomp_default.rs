//! The `RuntimeDefault` seccomp profile: an allow list, fitted to the container's capabilities.
//!
//! In the spirit of Docker's and containerd's default: everything ordinary programs use is
//! allowed, what needs a capability is allowed with that capability, the rest gets EPERM.
//! Stricter than theirs in two points: the x32 ABI is not opened, and i386's `socketcall`
//! is refused, because its arguments lie in memory where no filter sees them and so would
//! lead around the ban on AF_ALG and AF_VSOCK (i386 has had plain `socket` since Linux 4.3).
//!
//! Absent on purpose: io_uring, the keyring, userfaultfd, nfsservctl, kexec and module calls.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};
use std::collections::BTreeSet;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;
/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: bits of clone(2)'s flags.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// Execution domains personality(2) may ask for: Linux, 32-bit, UNAME26 and both; the last
/// value only queries.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Files, directories and their attributes.
const FILES: &str = "\
    access cachestat chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 \
    dup3 faccessat faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 \
    fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fremovexattr \
    fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat \
    getcwd getdents getdents64 getxattr getxattrat ioctl lchown lchown32 lgetxattr link linkat \
    listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat \
    lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2 pread64 \
    preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv \
    removexattr removexattrat rename renameat renameat2 rmdir sendfile sendfile64 setxattr \
    setxattrat splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync \
    sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat \
    utimensat_time64 utimes vmsplice write writev";

/// Waiting for events, and asynchronous input and output other than io_uring.
const EVENTS: &str = "\
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
    epoll_wait_old eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 \
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 \
    io_setup io_submit _newselect pipe pipe2 poll ppoll ppoll_time64 pselect6 pselect6_time64 \
    select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime \
    timerfd_settime64";

/// Address space.
const MEMORY: &str = "\
    brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 \
    mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc \
    pkey_free pkey_mprotect process_mrelease remap_file_pages";

/// Sockets, except opening one (see [`socket_rules`]).
const SOCKETS: &str = "\
    accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg \
    recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketpair";

/// System V and POSIX interprocess communication.
const IPC: &str = "\
    ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend \
    mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop \
    semtimedop_time64 shmat shmctl shmdt shmget";

/// Processes, threads, credentials, limits and scheduling.
const PROCESSES: &str = "\
    capget capset execve execveat exit exit_group fork futex futex_requeue futex_time64 \
    futex_wait futex_waitv futex_wake getcpu getegid getegid32 geteuid geteuid32 getgid getgid32 \
    getgroups getgroups32 getpgid getpgrp getpid getppid getpriority getresgid getresgid32 \
    getresuid getresuid32 getrlimit get_robust_list getrusage getsid get_thread_area gettid \
    getuid getuid32 ioprio_get ioprio_set landlock_add_rule landlock_create_ruleset \
    landlock_restrict_self lsm_get_self_attr lsm_list_modules lsm_set_self_attr pidfd_open \
    pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev ptrace rseq \
    sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min \
    sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity \
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp setfsgid setfsgid32 \
    setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setpriority setregid \
    setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit \
    set_robust_list setsid set_thread_area set_tid_address setuid setuid32 ugetrlimit vfork \
    wait4 waitid waitpid";

/// Signals, time and facts about the machine.
const SIGNALS_AND_TIME: &str = "\
    adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
    clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer getrandom gettimeofday kill \
    nanosleep pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo \
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo \
    setitimer sigaltstack sigprocmask sigreturn sysinfo tgkill time timer_create timer_delete \
    timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 times tkill \
    uname uretprobe";

/// What exists on one machine type only.
#[cfg(target_arch = "x86_64")]
const MACHINE: &str = "arch_prctl modify_ldt";
#[cfg(target_arch = "aarch64")]
const MACHINE: &str = "\
    arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2";
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const MACHINE: &str = "";

/// Everything that needs no capability.
const ALWAYS: [&str; 8] =
    [FILES, EVENTS, MEMORY, SOCKETS, IPC, PROCESSES, SIGNALS_AND_TIME, MACHINE];

/// Calls a capability opens. `SYS_ADMIN` also lifts the rules on clone and clone3.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("BPF", "bpf"),
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    ("PERFMON", "perf_event_open"),
    (
        "SYS_ADMIN",
        "\
            bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount \
            mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd \
            setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module finit_module init_module"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "ioperm iopl"),
    ("SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYSLOG", "syslog"),
];

/// Call ABIs the filter admits; any other is killed by the kernel's default for filters.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchX86_64, Arch::ScmpArchX86];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchAarch64, Arch::ScmpArchArm];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchNative];

/// The profile for a process whose bounding set is `held` (names without `CAP_`).
pub(crate) fn profile(held: &BTreeSet<&'static str>) -> Result<LinuxSeccomp, OciSpecError> {
    let always: Vec<_> = ALWAYS.iter().flat_map(|list| words(list)).collect();
    let opened = BY_CAPABILITY.iter().filter(|(capability, _)| held.contains(capability));
    let opened: BTreeSet<_> = opened.flat_map(|(_, calls)| words(calls)).collect();
    let mut rules = vec![allow(&always, None)?];
    if !opened.is_empty() {
        rules.push(allow(&Vec::from_iter(opened), None)?);
    }
    rules.extend(socket_rules()?);
    for persona in PERSONALITIES {
        rules.push(allow(&["personality"], Some(first_argument(persona, Compare::Equal)?))?);
    }
    if !held.contains("SYS_ADMIN") {
        rules.extend(clone_rules()?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(ARCHITECTURES.to_vec())
        .syscalls(rules)
        .build()
}

/// Names of a list; a string per list keeps them readable, a line each would be pages.
fn words(list: &'static str) -> impl Iterator<Item = &'static str> {
    list.split_ascii_whitespace()
}

/// socket(2) for every family but AF_ALG and AF_VSOCK.
///
/// Three rules with one condition each: conditions on the same argument inside one rule are
/// treated as alternatives by libseccomp-based runtimes and would let both through.
fn socket_rules() -> Result<[LinuxSyscall; 3], OciSpecError> {
    let families = |value, compare| allow(&["socket"], Some(first_argument(value, compare)?));
    Ok([
        families(AF_ALG, Compare::Below)?,
        families(AF_ALG + 1, Compare::Equal)?,
        families(AF_VSOCK, Compare::Above)?,
    ])
}

/// clone(2) without new namespaces; clone3's flags lie in memory, so ENOSYS sends the C
/// library back to clone.
fn clone_rules() -> Result<[LinuxSyscall; 2], OciSpecError> {
    let no_namespaces = LinuxSeccompArgBuilder::default()
        .index(0usize)
        .value(NEW_NAMESPACES)
        .value_two(0u64)
        .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
        .build()?;
    let clone3 = LinuxSyscallBuilder::default()
        .names(vec!["clone3".to_owned()])
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(ENOSYS)
        .build()?;
    Ok([allow(&["clone"], Some(no_namespaces))?, clone3])
}

#[derive(Clone, Copy)]
enum Compare {
    Below,
    Equal,
    Above,
}

fn first_argument(value: u64, compare: Compare) -> Result<LinuxSeccompArg, OciSpecError> {
    let op = match compare {
        Compare::Below => LinuxSeccompOperator::ScmpCmpLt,
        Compare::Equal => LinuxSeccompOperator::ScmpCmpEq,
        Compare::Above => LinuxSeccompOperator::ScmpCmpGt,
    };
    LinuxSeccompArgBuilder::default().index(0usize).value(value).op(op).build()
}

fn allow(names: &[&str], arg: Option<LinuxSeccompArg>) -> Result<LinuxSyscall, OciSpecError> {
    let mut rule = LinuxSyscallBuilder::default()
        .names(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActAllow);
    if let Some(arg) = arg {
        rule = rule.args(vec![arg]);
    }
    rule.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules_for(call: &str, held: &[&'static str]) -> Vec<LinuxSyscall> {
        let profile = profile(&held.iter().copied().collect()).unwrap();
        let rules = profile.syscalls().clone().unwrap();
        rules.into_iter().filter(|rule| rule.names().iter().any(|name| name == call)).collect()
    }

    #[test]
    fn no_call_is_listed_twice_and_each_capability_counts_once() {
        let all: Vec<_> = ALWAYS.iter().flat_map(|list| words(list)).collect();
        let unique: BTreeSet<_> = all.iter().collect();
        assert_eq!(all.len(), unique.len());
        for (capability, calls) in BY_CAPABILITY {
            assert!(crate::capabilities::NAMES.contains(capability), "{capability}");
            for call in words(calls) {
                assert!(!all.contains(&call), "{call} needs no {capability}");
            }
        }
    }

    #[test]
    fn dangerous_calls_are_not_allowed_by_default() {
        for call in [
            "add_key",
            "bpf",
            "chroot",
            "init_module",
            "io_uring_setup",
            "kexec_load",
            "keyctl",
            "mbind",
            "mount",
            "open_by_handle_at",
            "pidfd_getfd",
            "reboot",
            "request_key",
            "setns",
            "socketcall",
            "swapon",
            "syslog",
            "unshare",
            "userfaultfd",
        ] {
            assert!(rules_for(call, &[]).is_empty(), "{call}");
        }
    }

    #[test]
    fn capabilities_open_their_calls() {
        for (capability, call) in
            [("SYS_ADMIN", "mount"), ("SYS_CHROOT", "chroot"), ("SYS_NICE", "mbind")]
        {
            assert_eq!(rules_for(call, &[capability]).len(), 1, "{call}");
        }
    }

    #[test]
    fn clone_cannot_make_namespaces_unless_sys_admin_is_held() {
        let clone = &rules_for("clone", &[])[0];
        let arg = clone.args().as_ref().unwrap()[0];
        assert_eq!((arg.value(), arg.value_two()), (NEW_NAMESPACES, Some(0)));
        assert_eq!(rules_for("clone3", &[])[0].errno_ret(), Some(ENOSYS));
        let clone3 = rules_for("clone3", &["SYS_ADMIN"]);
        assert_eq!(clone3[0].action(), LinuxSeccompAction::ScmpActAllow);
        assert!(rules_for("clone", &["SYS_ADMIN"])[0].args().is_none());
    }

    #[test]
    fn sockets_of_every_family_but_two_can_be_opened() {
        let rules = rules_for("socket", &[]);
        let allowed = |family: u64| {
            rules.iter().any(|rule| {
                let arg = rule.args().as_ref().unwrap()[0];
                match arg.op() {
                    LinuxSeccompOperator::ScmpCmpLt => family < arg.value(),
                    LinuxSeccompOperator::ScmpCmpEq => family == arg.value(),
                    LinuxSeccompOperator::ScmpCmpGt => family > arg.value(),
                    _ => unreachable!(),
                }
            })
        };
        let refused: Vec<_> = (0..64).filter(|family| !allowed(*family)).collect();
        assert_eq!(refused, [AF_ALG, AF_VSOCK]);
    }
}
