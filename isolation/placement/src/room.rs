//! What the limits above a container leave for its huge pages.
//!
//! Pages of a file on a hugetlbfs stay when the container that touched them ends. Its group
//! is gone, so the kernel charges them to the group above, within whose limit the
//! container's successor has to fit. The file is still in the volume that both share: these
//! pages are the successor's already, and no proof of new ones has room beside them.

use std::path::Path;

use pinion_topology::PageSize;

use crate::files;

/// What counts pages: limit and use on v2 and v1, first what is mapped, then what is touched.
const COUNTERS: [(&str, &str); 4] = [
    ("rsvd.max", "rsvd.current"),
    ("max", "current"),
    ("rsvd.limit_in_bytes", "rsvd.usage_in_bytes"),
    ("limit_in_bytes", "usage_in_bytes"),
];

/// What is touched, on v2 and v1.
const TOUCHED: [&str; 2] = ["current", "usage_in_bytes"];

/// Of `wanted` pages, those that no limit above `group` has room for only because groups
/// that are gone left as many behind. `root` ends the way up.
pub(crate) fn left_by_predecessors(root: &Path, group: &Path, size: PageSize, wanted: u64) -> u64 {
    let above = group.ancestors().skip(1).take_while(|dir| dir.starts_with(root) && *dir != root);
    let counted = above.flat_map(|dir| COUNTERS.iter().map(move |counter| (dir, counter)));
    let short = counted.filter_map(|(dir, (limit, current))| {
        let limit = pages(dir, size, limit)?;
        let used = pages(dir, size, current)?;
        let living: u64 =
            files::children(dir).iter().filter_map(|child| pages(child, size, current)).sum();
        let missing = wanted.saturating_sub(limit.saturating_sub(used));
        Some(missing.min(used.saturating_sub(living)))
    });
    short.max().unwrap_or(0)
}

/// Pages that groups which are gone left behind in `dir`, the group above them: what it has
/// in use beyond what its children have.
#[must_use]
pub fn left_behind(dir: &Path, size: PageSize) -> u64 {
    let used = |dir: &Path| TOUCHED.iter().find_map(|name| pages(dir, size, name));
    let living: u64 = files::children(dir).iter().filter_map(|child| used(child)).sum();
    used(dir).unwrap_or(0).saturating_sub(living)
}

/// A counter in pages; none where the file is missing or says `max`.
fn pages(dir: &Path, size: PageSize, name: &str) -> Option<u64> {
    let text = files::read(&dir.join(format!("hugetlb.{size}.{name}"))).ok().flatten()?;
    Some(size.pages_in(text.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    const PAGE: u64 = 2 << 20;

    #[test]
    fn only_pages_without_a_living_group_excuse_a_lack_of_room() {
        let tree = Tree::new();
        let size: PageSize = "2MB".parse().unwrap();
        let set = |dir: &str, limit: &str, used: u64| {
            tree.file(&format!("{dir}/hugetlb.2MB.rsvd.max"), limit);
            tree.file(&format!("{dir}/hugetlb.2MB.rsvd.current"), &(used * PAGE).to_string());
        };
        let limit = (32 * PAGE).to_string();
        set("k", "max", 12);
        set("k/pod", &limit, 12);
        set("k/pod/sidecar", "max", 4);
        set("k/pod/new", &limit, 0);
        let left =
            |wanted| left_by_predecessors(&tree.path("k"), &tree.path("k/pod/new"), size, wanted);
        // 20 pages of room; of the 12 in use, 8 belong to nobody who lives
        assert_eq!(left(20), 0);
        assert_eq!(left(24), 4);
        assert_eq!(left(32), 8, "the sidecar's pages are no excuse");
    }

    #[test]
    fn what_no_living_group_has_in_use_was_left_behind() {
        let tree = Tree::new();
        let size: PageSize = "2MB".parse().unwrap();
        let pod = tree.path("pod");
        assert_eq!(left_behind(&pod, size), 0);
        for (dir, used) in [("pod", 12), ("pod/sidecar", 4), ("pod/new", 0)] {
            tree.file(&format!("{dir}/hugetlb.2MB.current"), &(used * PAGE).to_string());
        }
        assert_eq!(left_behind(&pod, size), 8);
    }
}
