//! The option list of an OCI mount, as runc understands it.
//!
//! An option sets or clears an attribute of the mount (or, with an `r` in front, of all
//! mounts below it too), chooses its propagation, asks for something the runtime does
//! itself, or belongs to the file system.

use libc::{
    MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_RELATIME,
    MOUNT_ATTR_STRICTATIME,
};

/// The bits of the mutually exclusive access-time modes.
pub const ATIME_MASK: u64 = libc::MOUNT_ATTR__ATIME;

/// What the options of one mount add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// It is a bind mount, `Some(true)` with everything below it.
    pub bind: Option<bool>,
    /// Attributes of the mount itself.
    pub attributes: Attributes,
    /// Attributes of the mount and of everything below it.
    pub recursive: Attributes,
    /// `MS_SHARED` and its kin, in order, with `true` for the whole tree.
    pub propagation: Vec<(u64, bool)>,
    /// Copy what the image has at this place into the new tmpfs.
    pub copy_up: bool,
    /// Apply an id mapping, `Some(true)` to everything below too.
    pub idmap: Option<bool>,
    /// Superblock flags (`ro`, `sync`, …) in fsconfig's words.
    pub superblock: Vec<&'static str>,
    /// What is left, for the file system.
    pub data: Vec<String>,
}

/// `MOUNT_ATTR_*` bits to set and to clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// To set.
    pub set: u64,
    /// To clear.
    pub clear: u64,
}

impl Attributes {
    fn set(&mut self, bit: u64) {
        if bit & ATIME_MASK != 0 || bit == MOUNT_ATTR_RELATIME {
            self.set &= !ATIME_MASK;
            self.clear |= ATIME_MASK;
            self.set |= bit;
        } else {
            self.set |= bit;
            self.clear &= !bit;
        }
    }

    fn clear(&mut self, bit: u64) {
        self.set &= !bit;
        self.clear |= if bit & ATIME_MASK != 0 { ATIME_MASK } else { bit };
    }

    /// True when nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set == 0 && self.clear == 0
    }
}

/// Options that change mount attributes: name, bit, and whether the name sets it.
const ATTRIBUTES: &[(&str, u64, bool)] = &[
    ("ro", MOUNT_ATTR_RDONLY, true),
    ("rw", MOUNT_ATTR_RDONLY, false),
    ("nosuid", MOUNT_ATTR_NOSUID, true),
    ("suid", MOUNT_ATTR_NOSUID, false),
    ("nodev", MOUNT_ATTR_NODEV, true),
    ("dev", MOUNT_ATTR_NODEV, false),
    ("noexec", MOUNT_ATTR_NOEXEC, true),
    ("exec", MOUNT_ATTR_NOEXEC, false),
    ("noatime", MOUNT_ATTR_NOATIME, true),
    ("atime", MOUNT_ATTR_NOATIME, false),
    ("nodiratime", MOUNT_ATTR_NODIRATIME, true),
    ("diratime", MOUNT_ATTR_NODIRATIME, false),
    ("relatime", MOUNT_ATTR_RELATIME, true),
    ("norelatime", MOUNT_ATTR_RELATIME, false),
    ("strictatime", MOUNT_ATTR_STRICTATIME, true),
    ("nostrictatime", MOUNT_ATTR_STRICTATIME, false),
    ("nosymfollow", MOUNT_ATTR_NOSYMFOLLOW, true),
    ("symfollow", MOUNT_ATTR_NOSYMFOLLOW, false),
];

const PROPAGATION: &[(&str, libc::c_ulong)] = &[
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("private", libc::MS_PRIVATE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Superblock flags, and their negations where mount(8) has one.
const SUPERBLOCK: &[(&str, Option<&str>)] = &[
    ("sync", Some("async")),
    ("dirsync", None),
    ("lazytime", Some("nolazytime")),
    ("mand", Some("nomand")),
    ("iversion", Some("noiversion")),
    ("silent", Some("loud")),
];

impl MountOptions {
    /// Sorts the options of a mount.
    #[must_use]
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.take(option);
        }
        parsed
    }

    fn take(&mut self, option: &str) {
        match option {
            "" | "defaults" | "remount" => {}
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.idmap = Some(false),
            "ridmap" => self.idmap = Some(true),
            other => {
                if !(self.take_attribute(other)
                    || self.take_propagation(other)
                    || self.take_superblock(other))
                {
                    self.data.push(other.to_owned());
                }
            }
        }
    }

    fn take_attribute(&mut self, option: &str) -> bool {
        let find = |name: &str| ATTRIBUTES.iter().find(|(known, ..)| *known == name);
        let (target, found) = match find(option) {
            Some(found) => (&mut self.attributes, found),
            None => match option.strip_prefix('r').and_then(find) {
                Some(found) => (&mut self.recursive, found),
                None => return false,
            },
        };
        let &(_, bit, sets) = found;
        if sets {
            target.set(bit);
        } else {
            target.clear(bit);
        }
        true
    }

    fn take_propagation(&mut self, option: &str) -> bool {
        let find = |name: &str| PROPAGATION.iter().find(|(known, _)| *known == name);
        let (found, recursive) = match (find(option), option.strip_prefix('r').and_then(find)) {
            (Some(found), _) => (found, false),
            (None, Some(found)) => (found, true),
            (None, None) => return false,
        };
        self.propagation.push((found.1, recursive));
        true
    }

    fn take_superblock(&mut self, option: &str) -> bool {
        for (flag, negation) in SUPERBLOCK {
            if *flag == option {
                self.superblock.push(flag);
                return true;
            }
            if *negation == Some(option) {
                self.superblock.retain(|set| set != flag);
                return true;
            }
        }
        false
    }
}

/// Parses `linux.rootfsPropagation`: the flag and whether it covers the whole tree.
#[must_use]
pub fn propagation(name: &str) -> Option<(u64, bool)> {
    let mut options = MountOptions::default();
    options.take_propagation(name).then(|| options.propagation[0])
}

/// All option names with a meaning of their own, for `features`.
pub fn known() -> impl Iterator<Item = String> {
    let attributes = ATTRIBUTES.iter().flat_map(|(name, ..)| [(*name).into(), format!("r{name}")]);
    let propagation = PROPAGATION.iter().flat_map(|(name, _)| [(*name).into(), format!("r{name}")]);
    let superblock = SUPERBLOCK.iter().flat_map(|(flag, negation)| {
        [Some(*flag), *negation].into_iter().flatten().map(str::to_owned)
    });
    let own = ["bind", "rbind", "defaults", "remount", "tmpcopyup", "idmap", "ridmap"];
    attributes.chain(propagation).chain(superblock).chain(own.map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_two_contradicting_options_wins() {
        let options = MountOptions::parse(["ro", "rw", "nosuid"]);
        assert_eq!(options.attributes.set, MOUNT_ATTR_NOSUID);
        assert_eq!(options.attributes.clear, MOUNT_ATTR_RDONLY);
        let options = MountOptions::parse(["noatime", "strictatime"]);
        assert_eq!(options.attributes.set, MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.attributes.clear, ATIME_MASK);
    }

    #[test]
    fn an_r_in_front_reaches_the_whole_tree_unless_the_word_has_its_own_meaning() {
        let options = MountOptions::parse(["rbind", "rro", "rprivate", "rw", "relatime"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.recursive.set, MOUNT_ATTR_RDONLY);
        assert_eq!(options.propagation, [(libc::MS_PRIVATE, true)]);
        assert_eq!(options.attributes.clear, MOUNT_ATTR_RDONLY | ATIME_MASK);
    }

    #[test]
    fn what_nobody_knows_goes_to_the_file_system() {
        let options =
            MountOptions::parse(["mode=755", "size=65536k", "sync", "async", "tmpcopyup"]);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        assert!(options.superblock.is_empty() && options.copy_up);
    }

    proptest::proptest! {
        #[test]
        fn no_bit_is_both_set_and_cleared(words in proptest::collection::vec(
            proptest::sample::select(known().collect::<Vec<_>>()), 0..12)
        ) {
            let options = MountOptions::parse(words.iter().map(String::as_str));
            for attributes in [options.attributes, options.recursive] {
                assert_eq!(attributes.set & attributes.clear & !ATIME_MASK, 0);
            }
            assert!(options.data.is_empty());
        }
    }
}
