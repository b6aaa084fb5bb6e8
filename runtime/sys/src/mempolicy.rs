//! NUMA memory policy and the proof that huge pages are really there.
//!
//! `mmap` of huge pages promises less than it seems: the kernel's reservation is global, not
//! per node, so a mapping that succeeded can still end in SIGBUS at the first touch. The only
//! proof is to touch. [`prove`] therefore lets a child enter a container's cgroups, bind
//! itself to a node, map and populate every page, read back where each page lies, and go
//! away, which releases them.
//!
//! ```text
//! parent                       child
//!   open cgroup files, pipe
//!   fork ────────────────────▶ write "0" to each cgroup file
//!   read until end of file     per demand: bind, mmap, populate, move_pages (query)
//!     │  ◀──────────────────── one record per demand
//!   wait, judge                _exit
//! ```
//!
//! Invariant: between fork and `_exit` the child makes system calls only. It allocates
//! nothing and takes no lock, so [`prove`] is sound even in a process with threads.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

const MPOL_DEFAULT: libc::c_int = 0;
const MPOL_BIND: libc::c_int = 2;
/// Linux 5.14; populates like a write access and returns an error where that would raise SIGBUS.
const MADV_POPULATE_WRITE: libc::c_int = 23;
/// Pages per `move_pages(2)` query; the arrays live on the child's stack.
const QUERY: usize = 256;
/// Nodes a record counts; the kernel's `MAX_NUMNODES` is at most this.
const NODES: usize = 1024;
/// The mask of [`NODES`] bits in words, as the kernel's `unsigned long` array.
const MASK_WORDS: usize = NODES / 64;

/// Huge pages to be proven, all held at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Node the pages must lie on, below 1024.
    pub node: u32,
    /// Bytes per page: a power of two that the kernel has a pool for.
    pub page_size: u64,
    /// How many.
    pub pages: u64,
}

/// What the child got for one [`Demand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Where every page was found, as node and count, by rising node.
    pub found: Vec<(u32, u64)>,
}

/// What kept a [`Demand`] from being proven.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// The child could not be made or heard.
    #[error("{operation} for the hugepage proof")]
    Setup {
        /// What was attempted.
        operation: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A demand that no kernel could fulfil.
    #[error("{pages} pages of {page_size} bytes on node {node} is no possible demand", pages = .0.pages, page_size = .0.page_size, node = .0.node)]
    Impossible(Demand),
    /// The child could not enter one of the cgroups.
    #[error("enter cgroup file {index} for the hugepage proof")]
    Join {
        /// Index into the files given.
        index: usize,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// One step of one demand failed.
    #[error("{step} for {pages} pages of {page_size} bytes on node {node}", step = .step.name(), pages = .demand.pages, page_size = .demand.page_size, node = .demand.node)]
    Refused {
        /// Index into the demands given.
        index: usize,
        /// The demand.
        demand: Demand,
        /// The step.
        step: Step,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The child was killed; SIGBUS means that a page was promised and not there.
    #[error("the hugepage proof was killed by signal {signal} at demand {index}")]
    Killed {
        /// The signal.
        signal: i32,
        /// Index into the demands given: the first one without an answer.
        index: usize,
    },
    /// The child did not finish in time.
    #[error("the hugepage proof did not finish within {0:?}")]
    Timeout(Duration),
}

/// What the child was doing for a demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Binding itself to the node: EINVAL means that its cpuset forbids the node.
    Bind,
    /// Mapping: ENOMEM means too few pages free on the node, or a `rsvd.max` limit.
    Map,
    /// Populating: EFAULT stands for the SIGBUS an ordinary access would have raised.
    Populate,
    /// Asking where the pages are.
    Locate,
}

impl Step {
    /// The words for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind to the node",
            Self::Map => "map",
            Self::Populate => "populate",
            Self::Locate => "locate pages",
        }
    }
}

/// Restricts the memory of the calling thread and its future children to these nodes, given
/// as a bit mask in 64-bit words; an empty mask restores the default (`set_mempolicy(2)`).
pub fn bind_thread(nodes: &[u64]) -> io::Result<()> {
    let mode = if nodes.iter().all(|&word| word == 0) { MPOL_DEFAULT } else { MPOL_BIND };
    let (mask, bits) = if mode == MPOL_DEFAULT {
        (std::ptr::null(), 0)
    } else {
        (nodes.as_ptr(), nodes.len() * 64 + 1)
    };
    // SAFETY: the mask has at least `bits - 1` bits (the kernel reads one less than it is
    // told, see set_mempolicy(2) BUGS), and the call writes to no memory of ours.
    match unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the child sends per demand; plain integers, written in one piece.
#[repr(C)]
struct Record {
    /// [`RECORD_JOIN`] or a step's number; meaningful when `errno` is not 0.
    step: u64,
    /// Index of the cgroup file or of the demand.
    index: u64,
    errno: u64,
    /// Pages found, by node.
    found: [u64; NODES],
}

const RECORD_JOIN: u64 = 0;
const RECORD_BYTES: usize = size_of::<Record>();

/// Proves that every demand can be held at the same time by a process inside these cgroups.
///
/// `cgroups` are files open for writing (`cgroup.procs` of v2, `tasks` of v1) to which the
/// child writes `0`; with none of them the proof is made where the caller is. On return the
/// child is gone and its pages are free again.
pub fn prove(
    cgroups: &[File],
    demands: &[Demand],
    deadline: Duration,
) -> Result<Vec<Proof>, ProveError> {
    let possible = |demand: &&Demand| {
        let bytes = demand.page_size.checked_mul(demand.pages);
        (demand.node as usize) < NODES
            && demand.page_size.is_power_of_two()
            && demand.pages > 0
            && bytes.is_some_and(|bytes| bytes <= isize::MAX as u64)
    };
    if let Some(demand) = demands.iter().find(|demand| !possible(demand)) {
        return Err(ProveError::Impossible(*demand));
    }
    let setup = |operation| move |source| ProveError::Setup { operation, source };
    let (reader, writer) = pipe().map_err(setup("pipe"))?;
    let joins: Vec<RawFd> = cgroups.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: the child runs `child_main` only, which makes system calls and neither
    // allocates nor locks, so the copied state of other threads is never used.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(setup("fork")(io::Error::last_os_error())),
        0 => child_main(&joins, demands, writer.as_raw_fd()),
        pid => pid,
    };
    drop(writer);
    let mut child = Child { pid, status: None };
    let records = read_records(reader, demands.len(), deadline, &mut child)?;
    let status = child.wait().map_err(setup("wait"))?;
    judge(&records, demands, status)
}

/// Turns what the child said, and how it ended, into the answer.
fn judge(
    records: &[Record],
    demands: &[Demand],
    status: libc::c_int,
) -> Result<Vec<Proof>, ProveError> {
    let mut proofs = Vec::with_capacity(demands.len());
    for record in records {
        let index = record.index as usize;
        if record.errno != 0 {
            let source = io::Error::from_raw_os_error(record.errno as i32);
            let step = match record.step {
                1 => Step::Bind,
                2 => Step::Map,
                3 => Step::Populate,
                4 => Step::Locate,
                _ => return Err(ProveError::Join { index, source }),
            };
            let demand = demands.get(index).copied().ok_or_else(garbled)?;
            return Err(ProveError::Refused { index, demand, step, source });
        }
        let found = record.found.iter().enumerate().filter(|(_, pages)| **pages > 0);
        proofs.push(Proof { found: found.map(|(node, pages)| (node as u32, *pages)).collect() });
    }
    if libc::WIFSIGNALED(status) {
        return Err(ProveError::Killed { signal: libc::WTERMSIG(status), index: proofs.len() });
    }
    if proofs.len() < demands.len() { Err(garbled()) } else { Ok(proofs) }
}

fn garbled() -> ProveError {
    let source = io::Error::new(io::ErrorKind::InvalidData, "the child's answer is incomplete");
    ProveError::Setup { operation: "read the answer", source }
}

/// A child that is killed and reaped when dropped, so that no page stays held.
struct Child {
    pid: libc::pid_t,
    status: Option<libc::c_int>,
}

impl Child {
    fn wait(&mut self) -> io::Result<libc::c_int> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let mut status = 0;
        loop {
            // SAFETY: `pid` is our own child and was not waited for yet (`status` is None).
            if unsafe { libc::waitpid(self.pid, &mut status, 0) } == self.pid {
                self.status = Some(status);
                return Ok(status);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                self.status = Some(0); // somebody else reaped it: there is nothing to wait for
                return Err(error);
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.status.is_none() {
            // SAFETY: an unreaped child of ours, so the number cannot name another process.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            let _gone = self.wait();
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors the call writes.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so both are open and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Reads whole records until end of file; a cut one at the end is dropped.
fn read_records(
    reader: OwnedFd,
    limit: usize,
    deadline: Duration,
    child: &mut Child,
) -> Result<Vec<Record>, ProveError> {
    let setup = |source| ProveError::Setup { operation: "read the answer", source };
    let start = Instant::now();
    let mut reader = File::from(reader);
    let mut bytes = Vec::new();
    let mut chunk = [0u8; RECORD_BYTES];
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        let mut poll = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, and the count says one.
        match unsafe { libc::poll(&mut poll, 1, millis) } {
            0 => {
                // SAFETY: an unreaped child of ours.
                unsafe { libc::kill(child.pid, libc::SIGKILL) };
                return Err(ProveError::Timeout(deadline));
            }
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(setup(error));
                }
            }
            _ => match reader.read(&mut chunk).map_err(setup)? {
                0 => break,
                read => bytes.extend_from_slice(&chunk[..read]),
            },
        }
    }
    let words = |record: &[u8]| -> Vec<u64> {
        let word =
            |bytes: &[u8]| bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        record.chunks_exact(8).map(word).collect()
    };
    let record = |record: &[u8]| {
        let words = words(record);
        let mut found = [0; NODES];
        found.copy_from_slice(&words[3..]);
        Record { step: words[0], index: words[1], errno: words[2], found }
    };
    Ok(bytes.chunks_exact(RECORD_BYTES).take(limit.max(1)).map(record).collect())
}

/// The child. System calls only: see the invariant at the top.
fn child_main(joins: &[RawFd], demands: &[Demand], answer: RawFd) -> ! {
    let mut record = Record { step: RECORD_JOIN, index: 0, errno: 0, found: [0; NODES] };
    // SAFETY: these calls take integers or pointers to live locals and touch no shared state.
    unsafe {
        libc::signal(libc::SIGBUS, libc::SIG_DFL); // Rust's handler would run on our stack
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &no_core);
    }
    for (index, &fd) in joins.iter().enumerate() {
        // SAFETY: one byte from a static string to a descriptor that is open here too.
        if unsafe { libc::write(fd, c"0".as_ptr().cast(), 1) } != 1 {
            record.index = index as u64;
            record.errno = errno();
            leave(answer, &record);
        }
    }
    for (index, demand) in demands.iter().enumerate() {
        record.index = index as u64;
        record.found = [0; NODES];
        if let Err((step, errno)) = hold(demand, &mut record.found) {
            record.step = step as u64 + 1;
            record.errno = errno;
            leave(answer, &record);
        }
        send(answer, &record);
    }
    // SAFETY: ends the child without running the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

fn errno() -> u64 {
    // SAFETY: the location is valid for the calling thread.
    unsafe { *libc::__errno_location() as u64 }
}

fn send(answer: RawFd, record: &Record) {
    let mut sent = 0;
    while sent < RECORD_BYTES {
        let rest = std::ptr::from_ref(record).cast::<u8>().wrapping_add(sent);
        // SAFETY: `rest` points to the `RECORD_BYTES - sent` unsent bytes of a live record
        // that consists of u64 only, so every byte is initialised.
        match unsafe { libc::write(answer, rest.cast::<c_void>(), RECORD_BYTES - sent) } {
            written @ 1.. => sent += written as usize,
            _ if errno() == libc::EINTR as u64 => {}
            // SAFETY: as in `leave`. Nobody listens any more.
            _ => unsafe { libc::_exit(2) },
        }
    }
}

fn leave(answer: RawFd, record: &Record) -> ! {
    send(answer, record);
    // SAFETY: ends the child without running the parent's exit handlers.
    unsafe { libc::_exit(1) }
}

/// Binds, maps, populates and locates; the mapping stays until the child ends.
fn hold(demand: &Demand, found: &mut [u64; NODES]) -> Result<(), (Step, u64)> {
    let mut mask = [0u64; MASK_WORDS];
    mask[demand.node as usize / 64] |= 1 << (demand.node % 64);
    let length = (demand.page_size * demand.pages) as usize;
    let huge =
        libc::MAP_HUGETLB | ((demand.page_size.trailing_zeros() as i32) << libc::MAP_HUGE_SHIFT);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge;
    // SAFETY: the mask has NODES bits and the kernel reads one less than it is told.
    if unsafe { libc::syscall(libc::SYS_set_mempolicy, MPOL_BIND, mask.as_ptr(), NODES + 1) } != 0 {
        return Err((Step::Bind, errno()));
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err((Step::Map, errno()));
    }
    // SAFETY: exactly the mapping made above.
    if unsafe { libc::madvise(start, length, MADV_POPULATE_WRITE) } != 0 {
        match errno() {
            old_kernel if old_kernel == libc::EINVAL as u64 => touch(start, demand),
            errno => return Err((Step::Populate, errno)),
        }
    }
    locate(start, demand, found)
}

/// For kernels before 5.14: a page that is not there kills the child, which the parent sees.
fn touch(start: *mut c_void, demand: &Demand) {
    for page in 0..demand.pages {
        let at = start.cast::<u8>().wrapping_add((page * demand.page_size) as usize);
        // SAFETY: inside the mapping of `pages * page_size` writable bytes at `start`.
        unsafe { at.write_volatile(1) };
    }
}

fn locate(
    start: *mut c_void,
    demand: &Demand,
    found: &mut [u64; NODES],
) -> Result<(), (Step, u64)> {
    let mut first = 0;
    while first < demand.pages {
        let count = (demand.pages - first).min(QUERY as u64) as usize;
        let mut addresses = [std::ptr::null_mut::<c_void>(); QUERY];
        let mut status = [libc::c_int::MIN; QUERY];
        for (offset, address) in addresses.iter_mut().enumerate().take(count) {
            let page = first + offset as u64;
            *address = start.cast::<u8>().wrapping_add((page * demand.page_size) as usize).cast();
        }
        // SAFETY: both arrays have at least `count` elements; without target nodes the call
        // only fills `status`.
        let asked = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                count,
                addresses.as_ptr(),
                std::ptr::null::<libc::c_int>(),
                status.as_mut_ptr(),
                0,
            )
        };
        if asked < 0 {
            return Err((Step::Locate, errno()));
        }
        for &node in &status[..count] {
            match usize::try_from(node).ok().and_then(|node| found.get_mut(node)) {
                Some(pages) => *pages += 1,
                None => return Err((Step::Locate, node.unsigned_abs().into())),
            }
        }
        first += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SMALL: Demand = Demand { node: 0, page_size: 2 << 20, pages: 1 };

    fn free_pages() -> u64 {
        let path = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages";
        std::fs::read_to_string(path).map_or(0, |text| text.trim().parse().unwrap_or(0))
    }

    #[test]
    fn more_pages_than_there_are_is_a_refusal_and_not_a_signal() {
        let demand = Demand { pages: free_pages() + 1, ..SMALL };
        match prove(&[], &[demand], LONG) {
            Err(ProveError::Refused {
                index: 0, step: Step::Map | Step::Populate, source, ..
            }) => {
                assert!(matches!(source.raw_os_error(), Some(libc::ENOMEM | libc::EFAULT)));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pages_are_found_on_their_node_and_released() {
        if free_pages() == 0 {
            println!("not possible here: node 0 has no free page of 2MB");
            assert!(prove(&[], &[SMALL], LONG).is_err());
            return;
        }
        let before = free_pages();
        let proofs = prove(&[], &[SMALL], LONG).unwrap();
        assert_eq!(proofs, [Proof { found: vec![(0, 1)] }]);
        assert_eq!(free_pages(), before);
    }

    #[test]
    fn a_page_size_without_a_pool_is_refused_at_mapping() {
        let demand = Demand { page_size: 1 << 40, ..SMALL };
        let error = prove(&[], &[demand], LONG).unwrap_err();
        assert!(matches!(error, ProveError::Refused { step: Step::Map, .. }), "{error:?}");
        assert_eq!(error.to_string(), "map for 1 pages of 1099511627776 bytes on node 0");
    }

    #[test]
    fn a_node_that_does_not_exist_is_refused_at_binding() {
        let error = prove(&[], &[Demand { node: 1000, ..SMALL }], LONG).unwrap_err();
        assert!(matches!(error, ProveError::Refused { step: Step::Bind, .. }), "{error:?}");
    }

    #[test]
    fn a_cgroup_file_that_cannot_be_entered_is_named() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let null = File::options().write(true).open("/dev/null").unwrap();
        let error = prove(&[null, full], &[SMALL], LONG).unwrap_err();
        assert!(matches!(error, ProveError::Join { index: 1, .. }), "{error:?}");
    }

    #[test]
    fn impossible_demands_never_reach_a_child() {
        for demand in [
            Demand { pages: 0, ..SMALL },
            Demand { pages: u64::MAX, ..SMALL },
            Demand { page_size: 3, ..SMALL },
            Demand { node: 1024, ..SMALL },
        ] {
            let error = prove(&[], &[demand], LONG).unwrap_err();
            assert!(matches!(error, ProveError::Impossible(_)), "{error:?}");
        }
    }

    #[test]
    fn death_by_signal_and_silence_are_failed_proofs() {
        let killed = judge(&[], &[SMALL], libc::SIGBUS).unwrap_err();
        assert!(matches!(killed, ProveError::Killed { signal: libc::SIGBUS, index: 0 }));
        assert!(matches!(judge(&[], &[SMALL], 0), Err(ProveError::Setup { .. })));
    }

    #[test]
    fn a_thread_binds_to_its_node_and_back() {
        bind_thread(&[1]).unwrap();
        bind_thread(&[]).unwrap();
        assert!(bind_thread(&[0, 0, 0, 1 << 63]).is_err(), "node 255 is not here");
    }
}
