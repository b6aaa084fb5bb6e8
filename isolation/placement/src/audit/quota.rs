//! CPU quotas on the container's group and above.

use std::path::{Path, PathBuf};

use super::Subject;
use crate::plan::is_quota;
use crate::{Host, Reason, Term, TermName, files};

pub(super) fn no_throttling(host: &Host, subject: &Subject) -> Term {
    let wanted = subject.partition.is_some() || subject.unthrottled;
    let asked = wanted.then(|| "no CPU quota that could throttle".to_owned());
    let mut term = Term::new(TermName::NoThrottling, asked);
    let v1 = subject.v1.get("cpu").cloned().zip(host.v1.get("cpu").cloned());
    let v2 = || subject.v2(host).zip(host.v2.clone());
    let (leaf, root, file) = match (v1, v2()) {
        (Some((leaf, root)), _) => (leaf, root, "cpu.cfs_quota_us"),
        (None, Some((leaf, root))) => (leaf, root, "cpu.max"),
        (None, None) => {
            term.note("cpu controller", "not enabled for the container, so no quota exists");
            return term;
        }
    };
    let levels: Vec<PathBuf> = leaf
        .ancestors()
        .take_while(|dir| *dir != root && dir.starts_with(&root))
        .map(Path::to_owned)
        .collect();
    for dir in levels {
        let path = dir.join(file);
        let name = dir.strip_prefix(&root).unwrap_or(&dir).display();
        match files::read(&path) {
            Ok(Some(quota)) => {
                term.note(format!("{file} of /{name}"), &quota);
                if is_quota(&quota) {
                    let detail = format!("{} limits CPU time to {quota:?}", path.display());
                    term.fail(Reason::Quota, detail);
                }
            }
            Ok(None) => {}
            Err(error) => term.fail(Reason::Unreadable, format!("{error}: {}", error.source)),
        }
    }
    let stat = files::read(&leaf.join("cpu.stat")).ok().flatten().unwrap_or_default();
    if let Some(throttled) = stat.lines().find_map(|line| line.strip_prefix("nr_throttled ")) {
        term.note("nr_throttled", throttled);
    }
    term
}
