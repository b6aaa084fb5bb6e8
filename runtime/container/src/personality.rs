//! `linux.personality`: the execution domain and its flags, see personality(2).

use oci_spec::runtime::{LinuxPersonality, LinuxPersonalityDomain};

use crate::error::{Error, Result};

/// `<linux/personality.h>`. The specification leaves the flags open and runc ignores them;
/// here they have the kernel's names.
const FLAGS: &[(&str, u64)] = &[
    ("UNAME26", 0x0002_0000),
    ("ADDR_NO_RANDOMIZE", 0x0004_0000),
    ("FDPIC_FUNCPTRS", 0x0008_0000),
    ("MMAP_PAGE_ZERO", 0x0010_0000),
    ("ADDR_COMPAT_LAYOUT", 0x0020_0000),
    ("READ_IMPLIES_EXEC", 0x0040_0000),
    ("ADDR_LIMIT_32BIT", 0x0080_0000),
    ("SHORT_INODE", 0x0100_0000),
    ("WHOLE_SECONDS", 0x0200_0000),
    ("STICKY_TIMEOUTS", 0x0400_0000),
    ("ADDR_LIMIT_3GB", 0x0800_0000),
];

/// The argument of personality(2).
///
/// # Errors
/// [`Error::Invalid`] for a flag the kernel does not have.
pub fn plan(asked: &LinuxPersonality) -> Result<u64> {
    let domain = match asked.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    };
    asked.flags().iter().flatten().try_fold(domain, |persona, name| {
        match FLAGS.iter().find(|(known, _)| known == name) {
            Some((_, bit)) => Ok(persona | bit),
            None => Err(Error::Invalid(format!(
                "linux.personality.flags: {name:?} is not a flag of personality(2)"
            ))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(json: &str) -> Result<u64> {
        plan(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn domain_and_flags_are_combined() {
        assert_eq!(planned(r#"{"domain":"LINUX32"}"#).unwrap(), 8);
        let json = r#"{"domain":"LINUX","flags":["ADDR_NO_RANDOMIZE","UNAME26"]}"#;
        assert_eq!(planned(json).unwrap(), 0x0006_0000);
    }

    #[test]
    fn an_unknown_flag_is_named() {
        let json = r#"{"domain":"LINUX","flags":["ADDR_RANDOM"]}"#;
        assert!(planned(json).unwrap_err().to_string().contains("ADDR_RANDOM"));
    }
}
