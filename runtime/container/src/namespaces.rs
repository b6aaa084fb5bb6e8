//! Which namespaces a container gets: new ones, existing ones, or the host's.

use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

use crate::error::{Error, Result};

/// The namespaces of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// `CLONE_NEW*` bits of those to create.
    pub create: u64,
    /// Those to join, in the order in which they must be joined: user first, mount last.
    pub join: Vec<(LinuxNamespaceType, PathBuf)>,
    /// The id mappings of a new user namespace.
    pub mappings: Option<Mappings>,
    /// Lines for `/proc/self/timens_offsets`.
    pub time_offsets: Vec<String>,
}

/// Id mappings as `/proc/PID/uid_map` takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mappings {
    /// Lines `inside outside count`.
    pub uids: String,
    /// Lines `inside outside count`.
    pub gids: String,
}

/// Linux accepts at most this many lines per map.
const MAX_EXTENTS: usize = 340;

impl Namespaces {
    /// Reads and checks `linux.namespaces`, the mappings and the time offsets.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the field's name.
    pub fn plan(linux: &Linux) -> Result<Self> {
        let mut plan = Self::default();
        let mut seen = 0;
        for namespace in linux.namespaces().iter().flatten() {
            let bit = bit(namespace.typ());
            if seen & bit != 0 {
                return Err(invalid(format!("duplicated ns {:?}", namespace.typ())));
            }
            seen |= bit;
            match namespace.path() {
                Some(path) if !path.as_os_str().is_empty() => {
                    if !path.is_absolute() {
                        return Err(invalid(format!(
                            "namespace path {} is not absolute",
                            path.display()
                        )));
                    }
                    plan.join.push((namespace.typ(), path.clone()));
                }
                _ => plan.create |= bit,
            }
        }
        plan.join.sort_by_key(|(kind, _)| join_order(*kind));
        plan.plan_mappings(linux)?;
        plan.plan_time(linux)?;
        Ok(plan)
    }

    /// True when the container does not share this namespace with the host.
    #[must_use]
    pub fn has(&self, kind: LinuxNamespaceType) -> bool {
        self.create & bit(kind) != 0 || self.path(kind).is_some()
    }

    /// True when this namespace is made for the container.
    #[must_use]
    pub fn creates(&self, kind: LinuxNamespaceType) -> bool {
        self.create & bit(kind) != 0
    }

    /// The existing namespace to join.
    #[must_use]
    pub fn path(&self, kind: LinuxNamespaceType) -> Option<&PathBuf> {
        self.join.iter().find(|(k, _)| *k == kind).map(|(_, path)| path)
    }

    fn plan_mappings(&mut self, linux: &Linux) -> Result<()> {
        let uids = linux.uid_mappings().as_deref().unwrap_or_default();
        let gids = linux.gid_mappings().as_deref().unwrap_or_default();
        if self.creates(LinuxNamespaceType::User) {
            if uids.is_empty() || gids.is_empty() {
                return Err(invalid("user namespaces enabled, but no mappings found"));
            }
            self.mappings = Some(Mappings::plan(uids, gids)?);
        } else if !(self.has(LinuxNamespaceType::User) || uids.is_empty() && gids.is_empty()) {
            return Err(invalid(
                "user namespace mappings specified, but user namespace isn't enabled in the config",
            ));
        }
        Ok(())
    }

    fn plan_time(&mut self, linux: &Linux) -> Result<()> {
        let Some(offsets) = linux.time_offsets().as_ref().filter(|o| !o.is_empty()) else {
            return Ok(());
        };
        if !self.creates(LinuxNamespaceType::Time) {
            return Err(invalid(
                "time namespace offsets specified, but time namespace isn't enabled in the config",
            ));
        }
        for (clock, offset) in offsets {
            if clock != "monotonic" && clock != "boottime" {
                return Err(invalid(format!("unknown clock {clock:?} in linux.timeOffsets")));
            }
            let (secs, nanos) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            self.time_offsets.push(format!("{clock} {secs} {nanos}"));
        }
        self.time_offsets.sort();
        Ok(())
    }
}

impl Mappings {
    /// Checks id ranges and renders them for the kernel.
    ///
    /// # Errors
    /// [`Error::Invalid`] for empty, wrapping, overlapping or too many ranges.
    pub fn plan(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<Self> {
        Ok(Self { uids: render(uids, "uidMappings")?, gids: render(gids, "gidMappings")? })
    }

    /// True for a map of a single group, the one kind a plain user can write.
    #[must_use]
    pub fn maps_one_group(&self) -> bool {
        self.gids.lines().count() == 1 && self.gids.trim_end().ends_with(" 1")
    }
}

fn render(mappings: &[LinuxIdMapping], field: &str) -> Result<String> {
    if mappings.len() > MAX_EXTENTS {
        return Err(invalid(format!("linux.{field} has more than {MAX_EXTENTS} entries")));
    }
    let range = |start: u32, size: u32| (u64::from(start), u64::from(start) + u64::from(size));
    let mut text = String::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let inside = range(mapping.container_id(), mapping.size());
        let outside = range(mapping.host_id(), mapping.size());
        // 2^32 - 1 is "no id" and can be mapped on neither side.
        if mapping.size() == 0 || inside.1 > u64::from(u32::MAX) || outside.1 > u64::from(u32::MAX)
        {
            return Err(invalid(format!(
                "linux.{field}[{index}] is empty or exceeds the id range"
            )));
        }
        for other in &mappings[..index] {
            let overlaps = |a: (u64, u64), b: (u64, u64)| a.0 < b.1 && b.0 < a.1;
            if overlaps(inside, range(other.container_id(), other.size()))
                || overlaps(outside, range(other.host_id(), other.size()))
            {
                return Err(invalid(format!("linux.{field}[{index}] overlaps another entry")));
            }
        }
        text.push_str(&format!(
            "{} {} {}\n",
            mapping.container_id(),
            mapping.host_id(),
            mapping.size()
        ));
    }
    Ok(text)
}

/// The `CLONE_NEW*` bit of a namespace type.
#[must_use]
pub fn bit(kind: LinuxNamespaceType) -> u64 {
    kind as u64
}

fn join_order(kind: LinuxNamespaceType) -> u8 {
    match kind {
        LinuxNamespaceType::User => 0,
        LinuxNamespaceType::Mount => 2,
        _ => 1,
    }
}

fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(json: &str) -> Linux {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn new_and_joined_namespaces_are_told_apart_and_user_is_joined_first() {
        let plan = Namespaces::plan(&linux(
            r#"{"namespaces":[{"type":"pid"},{"type":"mount","path":"/n/mnt"},
                {"type":"network","path":"/n/net"},{"type":"user","path":"/n/user"}]}"#,
        ))
        .unwrap();
        assert_eq!(plan.create, libc::CLONE_NEWPID as u64);
        let order: Vec<_> = plan.join.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(
            order,
            [LinuxNamespaceType::User, LinuxNamespaceType::Network, LinuxNamespaceType::Mount]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [
            r#"{"namespaces":[{"type":"pid"},{"type":"pid"}]}"#,
            r#"{"namespaces":[{"type":"user"}]}"#,
            r#"{"uidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
            r#"{"namespaces":[{"type":"network","path":"relative"}]}"#,
            r#"{"timeOffsets":{"monotonic":{"secs":1,"nanosecs":0}}}"#,
            r#"{"namespaces":[{"type":"time"}],"timeOffsets":{"realtime":{"secs":1}}}"#,
        ] {
            assert!(Namespaces::plan(&linux(json)).is_err(), "{json}");
        }
    }

    #[test]
    fn id_ranges_must_be_disjoint_and_in_range() {
        let map = |inside: u32, outside: u32, size: u32| {
            serde_json::from_value::<LinuxIdMapping>(
                serde_json::json!({"containerID": inside, "hostID": outside, "size": size}),
            )
            .unwrap()
        };
        assert_eq!(
            render(&[map(0, 1000, 1), map(1, 5000, 10)], "x").unwrap(),
            "0 1000 1\n1 5000 10\n"
        );
        for bad in [
            vec![map(0, 0, 0)],
            vec![map(0, u32::MAX, 1)],
            vec![map(0, 0, 2), map(1, 10, 1)],
            vec![map(0, 0, 2), map(5, 1, 1)],
            vec![map(0, 0, 1); 341],
        ] {
            assert!(render(&bad, "x").is_err());
        }
    }
}
