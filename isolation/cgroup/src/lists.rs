//! The kernel's list format, `0-3,7`, as used for CPUs and memory nodes.

use std::collections::BTreeSet;

/// More than any kernel supports (`NR_CPUS` is at most 8192); keeps `0-4294967295` cheap.
const LIMIT: u32 = 65_536;

/// The members of a list; `None` when it is malformed. Blank text is the empty set.
pub(crate) fn parse(text: &str) -> Option<BTreeSet<u32>> {
    let mut members = BTreeSet::new();
    if text.contains('+') {
        return None; // what Rust takes for a number and the kernel does not
    }
    for item in text.trim().split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let first: u32 = first.trim().parse().ok()?;
        let last: u32 = last.trim().parse().ok()?;
        if first > last || last >= LIMIT {
            return None;
        }
        members.extend(first..=last);
    }
    Some(members)
}

/// systemd's form of a set: a byte array, bit n of byte n/8, without trailing zero bytes.
pub(crate) fn to_bits(members: &BTreeSet<u32>) -> Vec<u8> {
    let length = members.last().map_or(0, |last| *last as usize / 8 + 1);
    let mut bytes = vec![0u8; length];
    for member in members {
        bytes[*member as usize / 8] |= 1 << (member % 8);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse("0-2,5\n"), Some(BTreeSet::from([0, 1, 2, 5])));
        assert_eq!(parse(""), Some(BTreeSet::new()));
        for bad in ["3-1", "a", "1-", "-1", "0-99999999", "1--2", "+1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn bits_are_those_runc_hands_to_systemd() {
        assert_eq!(to_bits(&parse("4-7").unwrap()), [0xf0]);
        assert_eq!(to_bits(&parse("0,8-9").unwrap()), [0x01, 0x03]);
        assert_eq!(to_bits(&BTreeSet::new()), Vec::<u8>::new());
    }
}
