//! `bpf(2)` for cgroup device programs: load, attach, replace, query, detach.
//!
//! Every call hands the kernel one zeroed buffer larger than any `union bpf_attr` known
//! today: kernels 6.17 to 7.1 write past the end of a shorter structure.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;

const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// The kernel accepts at most this many programs on one cgroup (`BPF_CGROUP_MAX_PROGS`).
const MAX_PROGRAMS: usize = 64;

/// `union bpf_attr`, written field by field at the offsets of `linux/bpf.h`.
#[repr(C, align(8))]
struct Attr([u8; 512]);

impl Attr {
    const fn zeroed() -> Self {
        Self([0; 512])
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        self.0[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn put_u64(&mut self, offset: usize, value: u64) {
        self.0[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
    }

    fn put_fd(&mut self, offset: usize, fd: BorrowedFd<'_>) {
        self.0[offset..offset + 4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    }

    fn u32_at(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[offset..offset + 4]);
        u32::from_ne_bytes(bytes)
    }
}

/// Runs one command. The caller guarantees that every pointer it put into `attr` is live.
fn bpf(command: libc::c_int, attr: &mut Attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, zero-padded buffer of exactly the size passed; pointers inside
    // it were taken by the functions below from slices that outlive this call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attr.0.as_mut_ptr(),
            size_of::<Attr>() as libc::c_uint,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn owned(answer: libc::c_long) -> OwnedFd {
    // SAFETY: the two commands that call this answer with a fresh close-on-exec descriptor.
    unsafe { OwnedFd::from_raw_fd(answer as RawFd) }
}

/// Loads a `BPF_PROG_TYPE_CGROUP_DEVICE` program of encoded 8-byte instructions.
///
/// `name` is what `bpftool prog` shows, at most 15 bytes of `[A-Za-z0-9_.]`. On refusal
/// the verifier's last line is appended to the error.
pub fn load_device_program(instructions: &[u64], name: &str) -> io::Result<OwnedFd> {
    const LICENSE: &CStr = c"Apache-2.0";
    let count = u32::try_from(instructions.len())
        .map_err(|_too_long| io::Error::from_raw_os_error(libc::E2BIG))?;
    let mut attr = Attr::zeroed();
    attr.put_u32(0, BPF_PROG_TYPE_CGROUP_DEVICE);
    attr.put_u32(4, count);
    attr.put_u64(8, instructions.as_ptr() as u64);
    attr.put_u64(16, LICENSE.as_ptr() as u64);
    for (slot, byte) in attr.0[48..63].iter_mut().zip(name.bytes()) {
        *slot = byte;
    }
    let refusal = match bpf(BPF_PROG_LOAD, &mut attr) {
        Ok(answer) => return Ok(owned(answer)),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Err(error),
        Err(error) => error,
    };

    // Ask again with a log buffer, only to say why.
    let mut log = vec![0u8; 16 * 1024];
    attr.put_u32(24, 1); // log_level
    attr.put_u32(28, log.len() as u32);
    attr.put_u64(32, log.as_mut_ptr() as u64);
    match bpf(BPF_PROG_LOAD, &mut attr) {
        Ok(answer) => Ok(owned(answer)),
        Err(_same) => {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(0);
            let text = String::from_utf8_lossy(&log[..end]);
            let line = text.trim_end().lines().rev().find(|line| !line.starts_with("processed"));
            match line {
                Some(line) => {
                    Err(io::Error::new(refusal.kind(), format!("{refusal}; verifier: {line}")))
                }
                None => Err(refusal),
            }
        }
    }
}

/// Attaches `program` beside what is there, so that an ancestor's or systemd's program
/// keeps its say (`BPF_F_ALLOW_MULTI`: every program has to allow).
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    attach(cgroup, program, None)
}

/// Puts `program` in the place of `old` in one step: no moment without a filter (Linux 5.6).
pub fn replace_device_program(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    old: BorrowedFd<'_>,
) -> io::Result<()> {
    attach(cgroup, program, Some(old))
}

fn attach(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut attr = Attr::zeroed();
    attr.put_fd(0, cgroup);
    attr.put_fd(4, program);
    attr.put_u32(8, BPF_CGROUP_DEVICE);
    attr.put_u32(12, BPF_F_ALLOW_MULTI | if replaced.is_some() { BPF_F_REPLACE } else { 0 });
    if let Some(old) = replaced {
        attr.put_fd(16, old);
    }
    bpf(BPF_PROG_ATTACH, &mut attr).map(drop)
}

/// Detaches `program` from `cgroup`.
pub fn detach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Attr::zeroed();
    attr.put_fd(0, cgroup);
    attr.put_fd(4, program);
    attr.put_u32(8, BPF_CGROUP_DEVICE);
    bpf(BPF_PROG_DETACH, &mut attr).map(drop)
}

/// The ids of the device programs attached to `cgroup` itself, in attach order.
pub fn attached_device_programs(cgroup: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; MAX_PROGRAMS];
    let mut attr = Attr::zeroed();
    attr.put_fd(0, cgroup);
    attr.put_u32(4, BPF_CGROUP_DEVICE);
    attr.put_u64(16, ids.as_mut_ptr() as u64);
    attr.put_u32(24, ids.len() as u32);
    bpf(BPF_PROG_QUERY, &mut attr)?;
    ids.truncate(attr.u32_at(24) as usize);
    Ok(ids)
}

/// Opens a loaded program by id. Needs `CAP_SYS_ADMIN`.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = Attr::zeroed();
    attr.put_u32(0, id);
    bpf(BPF_PROG_GET_FD_BY_ID, &mut attr).map(owned)
}

/// `struct bpf_prog_info`: the id is at offset 4, the name at 64.
fn program_info(program: BorrowedFd<'_>) -> io::Result<Attr> {
    let mut info = Attr::zeroed();
    let mut attr = Attr::zeroed();
    attr.put_fd(0, program);
    attr.put_u32(4, size_of::<Attr>() as u32);
    attr.put_u64(8, info.0.as_mut_ptr() as u64);
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// The id of a loaded program.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    program_info(program).map(|info| info.u32_at(4))
}

/// The name a program was loaded under, at most 15 bytes.
pub fn program_name(program: BorrowedFd<'_>) -> io::Result<String> {
    let info = program_info(program)?;
    let name = info.0[64..80].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    const ALLOW_ALL: [u64; 2] = [0x0000_0001_0000_00b7, 0x95]; // r0 = 1; exit

    fn privileged(error: &io::Error) -> bool {
        !matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))
    }

    #[test]
    fn a_trivial_device_program_loads_or_the_kernel_forbids_bpf() {
        match load_device_program(&ALLOW_ALL, "pinion_test") {
            Ok(_program) => {}
            Err(error) if !privileged(&error) => println!("not possible here: {error}"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_program_that_does_not_end_is_refused_with_the_verifiers_words() {
        match load_device_program(&[0x0000_0001_0000_00b7], "pinion_test") {
            Ok(_program) => panic!("accepted a program without an exit"),
            Err(error) if !privileged(&error) => println!("not possible here: {error}"),
            Err(error) => assert!(error.to_string().contains("verifier"), "{error}"),
        }
    }

    #[test]
    fn attaching_to_something_that_is_no_cgroup_is_an_error() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(attach_device_program(file.as_fd(), file.as_fd()).is_err());
        assert!(attached_device_programs(file.as_fd()).is_err());
    }
}
