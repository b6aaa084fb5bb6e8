//! The proof that a node can be opened in the container: asked from inside its groups.
//!
//! Opening a device may do something (a watchdog starts, a group of VFIO is taken), so
//! nothing is opened: access(2) goes through the same checks of the kernel, the device
//! cgroup among them (`inode_permission`), and ends there.
//!
//! A process has to enter the container's groups for it. That is a fresh one which does
//! nothing else ([`probe`] runs there), and only before the container runs: afterwards its
//! CPUs are its own.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, accessat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::Demand;

/// What the kernel said about one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The node.
    pub host: PathBuf,
    /// 0, or the errno.
    pub errno: i32,
}

/// Enters the groups (their `cgroup.procs` files) and asks for each node. The calling
/// process stays in the groups: it should end.
pub fn probe(entrances: &[PathBuf], demands: &[Demand]) -> io::Result<Vec<Answer>> {
    for entrance in entrances {
        std::fs::write(entrance, "0").map_err(|error| {
            io::Error::new(error.kind(), format!("write \"0\" to {}: {error}", entrance.display()))
        })?;
    }
    Ok(demands.iter().map(ask).collect())
}

fn ask(demand: &Demand) -> Answer {
    let mut wanted = rustix::fs::Access::EXISTS;
    wanted.set(rustix::fs::Access::READ_OK, demand.access.read);
    wanted.set(rustix::fs::Access::WRITE_OK, demand.access.write);
    let answer = accessat(CWD, &demand.host, wanted, AtFlags::empty());
    let errno = answer.err().map_or(0, Errno::raw_os_error);
    Answer { host: demand.host.clone(), errno }
}

/// The line a probing process prints, which [`Answer`]s are read back from.
pub fn report(answers: &[Answer]) -> Result<String, serde_json::Error> {
    serde_json::to_string(answers)
}

impl Answer {
    /// Reads what [`report`] wrote.
    pub fn parse(line: &str) -> Result<Vec<Self>, serde_json::Error> {
        serde_json::from_str(line)
    }

    /// The kernel's word for the refusal; `None` if it was none.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        let error = || io::Error::from_raw_os_error(self.errno).to_string();
        (self.errno != 0).then(error)
    }

    pub(crate) fn is_for(&self, path: &Path) -> bool {
        self.host == path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NodeKind;

    #[test]
    fn answers_travel_as_a_line_and_name_the_error() {
        let demand = |host: &str| Demand {
            host: host.into(),
            kind: NodeKind::Char,
            major: 1,
            minor: 3,
            access: "rw".parse().unwrap(),
        };
        let answers = probe(&[], &[demand("/dev/null"), demand("/dev/not-there")]).unwrap();
        let read = Answer::parse(&report(&answers).unwrap()).unwrap();
        assert_eq!(read, answers);
        assert_eq!(read[0].refusal(), None);
        assert!(read[1].refusal().unwrap().contains("No such file"));
    }
}
