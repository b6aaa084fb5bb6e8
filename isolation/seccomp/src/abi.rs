//! The system call ABIs a kernel can report, and their syscall numbers.

use oci_spec::runtime::Arch;

/// Set in every x32 syscall number (`__X32_SYSCALL_BIT`).
pub(crate) const X32_BIT: u32 = 0x4000_0000;

const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
const AUDIT_ARCH_ARM: u32 = 0x4000_0028;
const AUDIT_ARCH_AARCH64: u32 = 0xC000_00B7;
const AUDIT_ARCH_RISCV64: u32 = 0xC000_00F3;

/// x32 shares x86_64's numbers except where the kernel needed a compatible entry point: these
/// calls, by their x86_64 number, have x32 numbers from 512 on, in this order
/// (`arch/x86/entry/syscalls/syscall_64.tbl`, the rows marked x32).
const X32_OWN: [u32; 36] = [
    13, 15, 16, 19, 20, 45, 46, 47, 59, 101, 127, 128, 129, 131, 222, 244, 246, 247, 273, 274, 278,
    279, 295, 296, 297, 299, 307, 310, 311, 54, 55, 206, 209, 322, 327, 328,
];
const X32_OWN_FIRST: u32 = 512;

/// Arm's private calls (`arch/arm/include/uapi/asm/unistd.h`), numbered from here on.
const ARM_PRIVATE: [&str; 6] = ["breakpoint", "cacheflush", "usr26", "usr32", "set_tls", "get_tls"];
const ARM_PRIVATE_FIRST: u32 = 0xF_0001;

/// A way of entering the kernel with its own numbering of system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Abi {
    /// 64-bit x86.
    X86_64,
    /// 32-bit pointers in 64-bit mode; shares the audit value of `X86_64`.
    X32,
    /// 32-bit x86.
    X86,
    /// 64-bit Arm.
    Aarch64,
    /// 32-bit Arm, EABI.
    Arm,
    /// 64-bit RISC-V.
    Riscv64,
}

impl Abi {
    /// The ABI of this build, if there is a syscall table for it.
    #[must_use]
    pub const fn native() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::X86_64)
        } else if cfg!(target_arch = "aarch64") {
            Some(Self::Aarch64)
        } else if cfg!(target_arch = "riscv64") {
            Some(Self::Riscv64)
        } else {
            None
        }
    }

    /// What the OCI name means on a kernel whose native ABI is `native`; `None` when such a
    /// kernel never reports it.
    pub(crate) fn from_oci(arch: Arch, native: Self) -> Option<Self> {
        let abi = match arch {
            Arch::ScmpArchNative => native,
            Arch::ScmpArchX86_64 => Self::X86_64,
            Arch::ScmpArchX32 => Self::X32,
            Arch::ScmpArchX86 => Self::X86,
            Arch::ScmpArchAarch64 => Self::Aarch64,
            Arch::ScmpArchArm => Self::Arm,
            Arch::ScmpArchRiscv64 => Self::Riscv64,
            _ => return None,
        };
        abi.runs_on(native).then_some(abi)
    }

    fn runs_on(self, native: Self) -> bool {
        match native {
            Self::X86_64 => matches!(self, Self::X86_64 | Self::X32 | Self::X86),
            Self::Aarch64 => matches!(self, Self::Aarch64 | Self::Arm),
            Self::X32 | Self::X86 | Self::Arm | Self::Riscv64 => self == native,
        }
    }

    /// `seccomp_data.arch` of a call through this ABI (`linux/audit.h`).
    #[must_use]
    pub const fn audit_arch(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => AUDIT_ARCH_X86_64,
            Self::X86 => AUDIT_ARCH_I386,
            Self::Aarch64 => AUDIT_ARCH_AARCH64,
            Self::Arm => AUDIT_ARCH_ARM,
            Self::Riscv64 => AUDIT_ARCH_RISCV64,
        }
    }

    /// Whether arguments are compared as 32-bit values (as libseccomp does, x32 included).
    pub(crate) const fn narrow_arguments(self) -> bool {
        matches!(self, Self::X32 | Self::X86 | Self::Arm)
    }

    /// The number in `seccomp_data.nr` for a syscall name. Slow: for many names walk the
    /// table once with [`Self::each_call`].
    #[must_use]
    pub fn number(self, name: &str) -> Option<u32> {
        let mut found = None;
        self.each_call(&mut |known, number| {
            if known == name {
                found = Some(number);
            }
        });
        found
    }

    /// Visits every system call, by ascending number.
    pub(crate) fn each_call(self, visit: &mut dyn FnMut(&'static str, u32)) {
        macro_rules! walk {
            ($arch:ident, $numbers:expr) => {
                for call in $numbers.filter_map(syscalls::$arch::Sysno::new) {
                    visit(call.name(), call.id() as u32);
                }
            };
        }
        match self {
            Self::X86_64 => walk!(x86_64, 0..TABLE_END),
            Self::X86 => walk!(x86, 0..TABLE_END),
            Self::Aarch64 => walk!(aarch64, 0..TABLE_END),
            Self::Riscv64 => walk!(riscv64, 0..TABLE_END),
            Self::Arm => {
                walk!(arm, 0..TABLE_END);
                for (name, number) in ARM_PRIVATE.iter().zip(ARM_PRIVATE_FIRST..) {
                    visit(name, number);
                }
            }
            Self::X32 => {
                Self::X86_64.each_call(&mut |name, number| {
                    if !X32_OWN.contains(&number) {
                        visit(name, number | X32_BIT);
                    }
                });
                for (native, own) in X32_OWN.iter().zip(X32_OWN_FIRST..) {
                    if let Some(call) = syscalls::x86_64::Sysno::new(*native as usize) {
                        visit(call.name(), own | X32_BIT);
                    }
                }
            }
        }
    }
}

/// Beyond every number in the tables.
const TABLE_END: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernels_tables() {
        assert_eq!(Abi::X86_64.number("read"), Some(0));
        assert_eq!(Abi::X86_64.number("clone3"), Some(435));
        assert_eq!(Abi::X86.number("read"), Some(3));
        assert_eq!(Abi::X86.number("mmap2"), Some(192));
        assert_eq!(Abi::Aarch64.number("openat"), Some(56));
        assert_eq!(Abi::Aarch64.number("open"), None);
        assert_eq!(Abi::X32.number("read"), Some(0x4000_0000));
        assert_eq!(Abi::X32.number("ioctl"), Some(0x4000_0202));
        assert_eq!(Abi::X32.number("getsockopt"), Some(0x4000_0000 | 542));
        assert_eq!(Abi::X32.number("pwritev2"), Some(0x4000_0000 | 547));
        assert_eq!(Abi::Arm.number("set_tls"), Some(983_045));
        assert_eq!(Abi::X86_64.number("no_such_call"), None);
    }

    #[test]
    fn an_architecture_the_kernel_cannot_report_is_left_out() {
        assert_eq!(Abi::from_oci(Arch::ScmpArchAarch64, Abi::X86_64), None);
        assert_eq!(Abi::from_oci(Arch::ScmpArchS390x, Abi::X86_64), None);
        assert_eq!(Abi::from_oci(Arch::ScmpArchX86, Abi::X86_64), Some(Abi::X86));
        assert_eq!(Abi::from_oci(Arch::ScmpArchNative, Abi::Aarch64), Some(Abi::Aarch64));
    }
}
