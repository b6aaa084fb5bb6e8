//! Sets of CPU and node numbers in the kernel's list format (`0-3,8`).
//!
//! [`CpuSet`] and [`NodeSet`] are one bitset with two kinds, so a set of nodes cannot be
//! passed where CPUs are meant. Invariants: no trailing zero word (equality and hashing are
//! those of the set), and every member is below the kind's limit, so that a hostile list
//! cannot make us allocate without bound.

use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the numbers of an [`IdSet`] stand for.
pub trait Kind: Copy + Eq + Ord + Hash + fmt::Debug + 'static {
    /// The word used in error messages.
    const NOUN: &'static str;
    /// First number that is too large.
    const LIMIT: u32;
}

/// Marks sets of logical CPUs. The limit is the largest `NR_CPUS` of any mainline kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpus;
/// Marks sets of NUMA nodes. The limit is the largest `MAX_NUMNODES` of any mainline kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nodes;

impl Kind for Cpus {
    const NOUN: &'static str = "CPU";
    const LIMIT: u32 = 8192;
}
impl Kind for Nodes {
    const NOUN: &'static str = "node";
    const LIMIT: u32 = 1024;
}

/// A set of logical CPUs.
pub type CpuSet = IdSet<Cpus>;
/// A set of NUMA nodes.
pub type NodeSet = IdSet<Nodes>;

/// A bounded set of small numbers; see the module's documentation.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdSet<K: Kind> {
    words: Vec<u64>,
    kind: PhantomData<K>,
}

/// Why a list, a mask or a number is not a set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSetError {
    /// An item is not a number, a range or a strided range.
    #[error("{noun} list {list:?}: item {item:?} is not a number or a range")]
    Item {
        /// What the list holds.
        noun: &'static str,
        /// The whole input, cut to 256 characters.
        list: String,
        /// The item that was not understood.
        item: String,
    },
    /// A range runs backwards.
    #[error("{noun} list {list:?}: range {item:?} ends before it starts")]
    Backwards {
        /// What the list holds.
        noun: &'static str,
        /// The whole input, cut to 256 characters.
        list: String,
        /// The range.
        item: String,
    },
    /// A number is beyond what any kernel supports.
    #[error("{noun} {id} is too large: numbers end at {last}", last = limit - 1)]
    TooLarge {
        /// What the number stands for.
        noun: &'static str,
        /// The number.
        id: u64,
        /// First number that is too large.
        limit: u32,
    },
    /// A hexadecimal mask has a group that is not 1 to 8 hexadecimal digits.
    #[error("{noun} mask {mask:?}: group {group:?} is not 1 to 8 hexadecimal digits")]
    Mask {
        /// What the mask holds.
        noun: &'static str,
        /// The whole input, cut to 256 characters.
        mask: String,
        /// The group that was not understood.
        group: String,
    },
}

impl<K: Kind> IdSet<K> {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { words: Vec::new(), kind: PhantomData }
    }

    /// The set with this one member; fails when the number is beyond the kind's limit.
    pub fn single(id: u32) -> Result<Self, ParseSetError> {
        let mut set = Self::new();
        set.insert(id)?;
        Ok(set)
    }

    /// Adds a member; fails when the number is beyond the kind's limit.
    pub fn insert(&mut self, id: u32) -> Result<(), ParseSetError> {
        if id >= K::LIMIT {
            return Err(too_large::<K>(u64::from(id)));
        }
        self.set(id);
        Ok(())
    }

    /// Removes a member if it is there.
    pub fn remove(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 64) {
            *word &= !(1 << (id % 64));
        }
        self.trim();
    }

    /// Whether the number is a member.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 64).is_some_and(|word| word & (1 << (id % 64)) != 0)
    }

    /// Whether there is no member.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// How many members there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The smallest member.
    #[must_use]
    pub fn first(&self) -> Option<u32> {
        self.iter().next()
    }

    /// The largest member.
    #[must_use]
    pub fn last(&self) -> Option<u32> {
        let word = self.words.last()?;
        Some((self.words.len() as u32) * 64 - 1 - word.leading_zeros())
    }

    /// The members in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            (0..64)
                .filter(move |bit| word & (1 << bit) != 0)
                .map(move |bit| index as u32 * 64 + bit)
        })
    }

    /// Members of either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a | b)
    }

    /// Members of both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & b)
    }

    /// Members of this set that are not in the other.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & !b)
    }

    /// Whether every member is in the other set.
    #[must_use]
    pub fn is_subset(&self, other: &Self) -> bool {
        self.difference(other).is_empty()
    }

    /// Whether the sets have no member in common.
    #[must_use]
    pub fn is_disjoint(&self, other: &Self) -> bool {
        self.intersection(other).is_empty()
    }

    /// The bits as 64-bit words, lowest first, as `mbind(2)` and `sched_setaffinity(2)` take
    /// them on little-endian and 64-bit machines.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Parses a hexadecimal bitmap as `/proc/irq/*/smp_affinity` shows it: groups of eight
    /// digits, highest first, separated by commas.
    pub fn from_mask(mask: &str) -> Result<Self, ParseSetError> {
        let mask = mask.trim();
        let mut set = Self::new();
        for (position, group) in mask.rsplit(',').enumerate() {
            let digits = (1..=8).contains(&group.len())
                && group.bytes().all(|byte| byte.is_ascii_hexdigit());
            let bits = u32::from_str_radix(group, 16).ok().filter(|_| digits).ok_or_else(|| {
                ParseSetError::Mask { noun: K::NOUN, mask: cut(mask), group: cut(group) }
            })?;
            for bit in (0..32).filter(|bit| bits & (1 << bit) != 0) {
                let id = position as u64 * 32 + bit;
                set.insert(u32::try_from(id).unwrap_or(u32::MAX))?;
            }
        }
        Ok(set)
    }

    /// The hexadecimal bitmap that [`Self::from_mask`] reads, without leading zeros.
    #[must_use]
    pub fn mask(&self) -> String {
        let halves = |word: &u64| [*word as u32, (*word >> 32) as u32];
        let mut groups: Vec<u32> = self.words.iter().flat_map(halves).collect();
        while groups.len() > 1 && groups.last() == Some(&0) {
            groups.pop();
        }
        let mut text = format!("{:x}", groups.pop().unwrap_or(0));
        groups.iter().rev().for_each(|group| text.push_str(&format!(",{group:08x}")));
        text
    }

    fn set(&mut self, id: u32) {
        let index = id as usize / 64;
        if self.words.len() <= index {
            self.words.resize(index + 1, 0);
        }
        self.words[index] |= 1 << (id % 64);
    }

    fn trim(&mut self) {
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }

    fn combine(&self, other: &Self, op: impl Fn(u64, u64) -> u64) -> Self {
        let word = |set: &Self, index: usize| set.words.get(index).copied().unwrap_or(0);
        let len = self.words.len().max(other.words.len());
        let words = (0..len).map(|index| op(word(self, index), word(other, index))).collect();
        let mut set = Self { words, kind: PhantomData };
        set.trim();
        set
    }

    /// One item of a list: `5`, `2-7`, or `0-15:2/4` (two of every four).
    fn insert_item(&mut self, list: &str, item: &str) -> Result<(), ParseSetError> {
        let bad = || ParseSetError::Item { noun: K::NOUN, list: cut(list), item: cut(item) };
        let number = |text: &str| -> Result<u64, ParseSetError> {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let value: u64 = text.parse().ok().filter(|_| digits).ok_or_else(bad)?;
            if value >= u64::from(K::LIMIT) { Err(too_large::<K>(value)) } else { Ok(value) }
        };
        let (range, stride) = match item.split_once(':') {
            Some((range, stride)) => (range, Some(stride)),
            None => (item, None),
        };
        let (start, end) = match range.split_once('-') {
            Some((start, end)) => (number(start)?, number(end)?),
            None if stride.is_none() => (number(range)?, number(range)?),
            None => return Err(bad()),
        };
        let (used, group) = match stride.map(|stride| stride.split_once('/').ok_or_else(bad)) {
            Some(parts) => {
                let (used, group) = parts?;
                (number(used)?, number(group)?)
            }
            None => (1, 1),
        };
        if end < start {
            let (list, item) = (cut(list), cut(item));
            return Err(ParseSetError::Backwards { noun: K::NOUN, list, item });
        }
        if group == 0 || used == 0 || used > group {
            return Err(bad());
        }
        (start..=end).filter(|id| (id - start) % group < used).for_each(|id| self.set(id as u32));
        Ok(())
    }
}

fn too_large<K: Kind>(id: u64) -> ParseSetError {
    ParseSetError::TooLarge { noun: K::NOUN, id, limit: K::LIMIT }
}

/// Keeps hostile input out of messages.
fn cut(text: &str) -> String {
    text.chars().take(256).collect()
}

impl<K: Kind> Default for IdSet<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Kind> FromStr for IdSet<K> {
    type Err = ParseSetError;

    /// Parses the kernel's list format, blanks and a final newline allowed; the empty text is
    /// the empty set.
    fn from_str(list: &str) -> Result<Self, ParseSetError> {
        let list = list.trim();
        let mut set = Self::new();
        if list.is_empty() {
            return Ok(set);
        }
        for item in list.split(',') {
            set.insert_item(list, item.trim())?;
        }
        Ok(set)
    }
}

impl<K: Kind> fmt::Display for IdSet<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ids = self.iter().peekable();
        let mut separator = "";
        while let Some(start) = ids.next() {
            let mut end = start;
            while let Some(next) = ids.next_if(|&next| next == end + 1) {
                end = next;
            }
            write!(f, "{separator}{start}")?;
            if end > start {
                write!(f, "-{end}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

impl<K: Kind> fmt::Debug for IdSet<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s({self})", K::NOUN)
    }
}

impl<K: Kind> Serialize for IdSet<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, K: Kind> Deserialize<'de> for IdSet<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn lists_are_normalised() {
        for (given, shown) in
            [("", ""), ("\n", ""), ("3,1,2", "1-3"), (" 0-3, 8\n", "0-3,8"), ("0-7:1/2", "0,2,4,6")]
        {
            assert_eq!(cpus(given).to_string(), shown);
        }
    }

    #[test]
    fn errors_name_the_item() {
        let error = |list: &str| list.parse::<CpuSet>().unwrap_err().to_string();
        assert_eq!(error("0-3,x"), r#"CPU list "0-3,x": item "x" is not a number or a range"#);
        assert_eq!(error("1,,2"), r#"CPU list "1,,2": item "" is not a number or a range"#);
        assert_eq!(error("7-2"), r#"CPU list "7-2": range "7-2" ends before it starts"#);
        assert_eq!(error("0-8192"), "CPU 8192 is too large: numbers end at 8191");
        assert!(error("+1").contains("not a number"));
        assert!(error("0-3:0/2").contains("not a number or a range"));
        assert!(error("99999999999999999999999").contains("not a number"));
        assert_eq!(
            "1024".parse::<NodeSet>().unwrap_err().to_string(),
            "node 1024 is too large: numbers end at 1023"
        );
    }

    #[test]
    fn masks_are_read_highest_group_first() {
        assert_eq!(CpuSet::from_mask("ff\n").unwrap(), cpus("0-7"));
        assert_eq!(CpuSet::from_mask("00000001,00000000").unwrap(), cpus("32"));
        assert_eq!(CpuSet::from_mask("0").unwrap(), CpuSet::new());
        assert!(CpuSet::from_mask("xyz").is_err());
        assert!(CpuSet::from_mask("").is_err());
    }

    #[test]
    fn masks_are_written_as_the_kernel_writes_them() {
        assert_eq!(cpus("0-1,4-7").mask(), "f3");
        assert_eq!(cpus("32").mask(), "1,00000000");
        assert_eq!(CpuSet::new().mask(), "0");
    }

    #[test]
    fn serde_uses_the_list() {
        let set: CpuSet = serde_json::from_str(r#""2-3,6""#).unwrap();
        assert_eq!(set, cpus("2,3,6"));
        assert_eq!(serde_json::to_string(&set).unwrap(), r#""2-3,6""#);
        assert!(serde_json::from_str::<CpuSet>(r#""6-2""#).is_err());
    }

    fn ids() -> impl Strategy<Value = BTreeSet<u32>> {
        prop::collection::btree_set(prop_oneof![0u32..130, 0u32..8192], 0..40)
    }

    fn to_set(ids: &BTreeSet<u32>) -> CpuSet {
        let mut set = CpuSet::new();
        ids.iter().for_each(|&id| set.insert(id).unwrap());
        set
    }

    proptest! {
        #[test]
        fn text_round_trips(ids in ids()) {
            let set = to_set(&ids);
            prop_assert_eq!(&cpus(&set.to_string()), &set);
            prop_assert_eq!(&CpuSet::from_mask(&set.mask()).unwrap(), &set);
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), ids.clone());
            prop_assert_eq!(set.len(), ids.len());
            prop_assert_eq!(set.last(), ids.last().copied());
            prop_assert_eq!(set.first(), ids.first().copied());
        }

        #[test]
        fn algebra_agrees_with_the_standard_library(a in ids(), b in ids()) {
            let (x, y) = (to_set(&a), to_set(&b));
            prop_assert_eq!(x.union(&y), to_set(&(&a | &b)));
            prop_assert_eq!(x.intersection(&y), to_set(&(&a & &b)));
            prop_assert_eq!(x.difference(&y), to_set(&(&a - &b)));
            prop_assert_eq!(x.is_subset(&y), a.is_subset(&b));
            prop_assert_eq!(x.is_disjoint(&y), a.is_disjoint(&b));
        }

        #[test]
        fn any_text_parses_or_is_refused(text in "[0-9,\\-:/ x]{0,40}") {
            if let Ok(set) = text.parse::<CpuSet>() {
                prop_assert_eq!(cpus(&set.to_string()), set);
            }
        }

        #[test]
        fn removing_what_was_added_leaves_an_equal_set(ids in ids(), extra in 0u32..8192) {
            let set = to_set(&ids);
            let mut changed = set.clone();
            changed.insert(extra).unwrap();
            if !ids.contains(&extra) {
                changed.remove(extra);
            }
            prop_assert_eq!(changed, set);
        }
    }
}
