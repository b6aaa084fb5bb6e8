//! Putting together what several plugins ask for. Pure.
//!
//! Every field of a container can be set by one plugin. A second one that sets the same field is
//! a conflict and the container is not created, unless it first removes (a key with a leading
//! `-`) what the other one has set. Hooks are lists and only grow.

use std::collections::BTreeMap;

use pinion_nri_proto::api::{
    ContainerAdjustment, ContainerUpdate, LinuxContainerAdjustment, LinuxResources,
};

/// Two plugins that want different things.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("plugins {first} and {second} both set {field}")]
pub struct Conflict {
    /// The field, such as `env FOO` or `cpu.shares`.
    pub field: String,
    /// Who was first.
    pub first: String,
    /// Who came later.
    pub second: String,
}

/// What all plugins asked for so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Merged {
    /// Changes to the container that is being made.
    pub adjust: ContainerAdjustment,
    /// Changes to other containers.
    pub updates: Vec<ContainerUpdate>,
    /// Containers to end, and why.
    pub evictions: Vec<(String, String)>,
    /// Field to plugin.
    owners: BTreeMap<String, String>,
}

/// Fields of one plugin's request on their way into the whole.
struct Claims<'a> {
    plugin: &'a str,
    owners: &'a mut BTreeMap<String, String>,
}

impl Claims<'_> {
    fn claim(&mut self, field: String) -> Result<(), Conflict> {
        match self.owners.get(&field) {
            Some(first) if first != self.plugin => {
                let (first, second) = (first.clone(), self.plugin.to_owned());
                Err(Conflict { field, first, second })
            }
            _ => {
                self.owners.insert(field, self.plugin.to_owned());
                Ok(())
            }
        }
    }

    /// A single value: the later request stands if it is the same plugin's.
    fn one<T: Clone>(
        &mut self,
        field: &str,
        into: &mut Option<T>,
        from: Option<&T>,
    ) -> Result<(), Conflict> {
        if let Some(value) = from {
            self.claim(field.to_owned())?;
            *into = Some(value.clone());
        }
        Ok(())
    }

    fn text(&mut self, field: &str, into: &mut String, from: &str) -> Result<(), Conflict> {
        if !from.is_empty() {
            self.claim(field.to_owned())?;
            from.clone_into(into);
        }
        Ok(())
    }

    /// A map; keys with a leading `-` remove.
    fn map<T: Clone>(
        &mut self,
        field: &str,
        into: &mut BTreeMap<String, T>,
        from: &BTreeMap<String, T>,
    ) -> Result<(), Conflict> {
        for (key, value) in from.iter().filter_map(|(key, v)| Some((key.strip_prefix('-')?, v))) {
            self.owners.remove(&format!("{field} {key}"));
            into.remove(key);
            into.insert(format!("-{key}"), value.clone());
        }
        for (key, value) in from.iter().filter(|(key, _)| !key.starts_with('-')) {
            self.claim(format!("{field} {key}"))?;
            into.insert(key.clone(), value.clone());
        }
        Ok(())
    }

    /// A list of things with names; names with a leading `-` remove.
    fn named<T: Clone>(
        &mut self,
        field: &str,
        into: &mut Vec<T>,
        from: &[T],
        name: fn(&T) -> &str,
    ) -> Result<(), Conflict> {
        for item in from {
            if let Some(removed) = name(item).strip_prefix('-') {
                self.owners.remove(&format!("{field} {removed}"));
                into.retain(|other| name(other) != removed);
                into.push(item.clone());
            }
        }
        for item in from.iter().filter(|item| !name(item).starts_with('-')) {
            self.claim(format!("{field} {}", name(item)))?;
            into.retain(|other| name(other) != name(item));
            into.push(item.clone());
        }
        Ok(())
    }
}

impl Merged {
    /// Takes in what a plugin asks for about the new container.
    pub(crate) fn adjust(
        &mut self,
        plugin: &str,
        asked: &ContainerAdjustment,
    ) -> Result<(), Conflict> {
        let mut claims = Claims { plugin, owners: &mut self.owners };
        let whole = &mut self.adjust;
        claims.map("annotation", &mut whole.annotations, &asked.annotations)?;
        claims.named("mount", &mut whole.mounts, &asked.mounts, |m| &m.destination)?;
        claims.named("env", &mut whole.env, &asked.env, |e| &e.key)?;
        claims.named("rlimit", &mut whole.rlimits, &asked.rlimits, |r| &r.r#type)?;
        claims.named("CDI device", &mut whole.cdi_devices, &asked.cdi_devices, |d| &d.name)?;
        // An empty first argument says that others' arguments may be replaced.
        if let Some((first, rest)) = asked.args.split_first() {
            let args = if first.is_empty() { rest } else { &asked.args[..] };
            if first.is_empty() {
                claims.owners.remove("args");
            }
            claims.claim("args".into())?;
            whole.args = args.to_vec();
        }
        if let Some(hooks) = &asked.hooks {
            let all = whole.hooks.get_or_insert_default();
            all.prestart.extend(hooks.prestart.iter().cloned());
            all.create_runtime.extend(hooks.create_runtime.iter().cloned());
            all.create_container.extend(hooks.create_container.iter().cloned());
            all.start_container.extend(hooks.start_container.iter().cloned());
            all.poststart.extend(hooks.poststart.iter().cloned());
            all.poststop.extend(hooks.poststop.iter().cloned());
        }
        if let Some(linux) = &asked.linux {
            adjust_linux(&mut claims, whole.linux.get_or_insert_default(), linux)?;
        }
        Ok(())
    }

    /// Takes in what a plugin asks for about other containers.
    pub(crate) fn update(
        &mut self,
        plugin: &str,
        asked: &[ContainerUpdate],
    ) -> Result<(), Conflict> {
        for update in asked {
            let id = &update.container_id;
            let known = self.updates.iter().position(|other| other.container_id == *id);
            let index = known.unwrap_or(self.updates.len());
            if known.is_none() {
                let container_id = id.clone();
                let first = ContainerUpdate { container_id, ignore_failure: true, linux: None };
                self.updates.push(first);
            }
            let Some(whole) = self.updates.get_mut(index) else { continue };
            whole.ignore_failure &= update.ignore_failure;
            if let Some(asked) = update.linux.as_ref().and_then(|l| l.resources.as_ref()) {
                let linux = whole.linux.get_or_insert_default();
                let mut claims = Claims { plugin, owners: &mut self.owners };
                let prefix = format!("{id}: ");
                resources(&mut claims, &prefix, linux.resources.get_or_insert_default(), asked)?;
            }
        }
        Ok(())
    }

    /// Field to plugin, for those who judge the whole.
    pub(crate) fn owners(&self) -> &BTreeMap<String, String> {
        &self.owners
    }
}

fn adjust_linux(
    claims: &mut Claims<'_>,
    whole: &mut LinuxContainerAdjustment,
    asked: &LinuxContainerAdjustment,
) -> Result<(), Conflict> {
    claims.named("device", &mut whole.devices, &asked.devices, |d| &d.path)?;
    claims.named("namespace", &mut whole.namespaces, &asked.namespaces, |n| &n.r#type)?;
    claims.map("sysctl", &mut whole.sysctl, &asked.sysctl)?;
    claims.map("network device", &mut whole.net_devices, &asked.net_devices)?;
    claims.text("cgroups path", &mut whole.cgroups_path, &asked.cgroups_path)?;
    claims.one("oom_score_adj", &mut whole.oom_score_adj, asked.oom_score_adj.as_ref())?;
    claims.one("io_priority", &mut whole.io_priority, asked.io_priority.as_ref())?;
    claims.one("seccomp policy", &mut whole.seccomp_policy, asked.seccomp_policy.as_ref())?;
    claims.one("scheduler", &mut whole.scheduler, asked.scheduler.as_ref())?;
    claims.one("rdt", &mut whole.rdt, asked.rdt.as_ref())?;
    claims.one("memory policy", &mut whole.memory_policy, asked.memory_policy.as_ref())?;
    if let Some(asked) = &asked.resources {
        resources(claims, "", whole.resources.get_or_insert_default(), asked)?;
    }
    Ok(())
}

fn resources(
    claims: &mut Claims<'_>,
    prefix: &str,
    whole: &mut LinuxResources,
    asked: &LinuxResources,
) -> Result<(), Conflict> {
    let field = |name: &str| format!("{prefix}{name}");
    macro_rules! one {
        ($whole:expr, $asked:expr, $name:literal, $($member:ident),+) => {
            $(claims.one(
                &field(concat!($name, stringify!($member))),
                &mut $whole.$member,
                $asked.$member.as_ref(),
            )?;)+
        };
    }
    if let Some(asked) = &asked.memory {
        let whole = whole.memory.get_or_insert_default();
        one!(whole, asked, "memory.", limit, reservation, swap, kernel, kernel_tcp, swappiness);
        one!(whole, asked, "memory.", disable_oom_killer, use_hierarchy);
    }
    if let Some(asked) = &asked.cpu {
        let whole = whole.cpu.get_or_insert_default();
        one!(whole, asked, "cpu.", shares, quota, period, realtime_runtime, realtime_period);
        claims.text(&field("cpu.cpus"), &mut whole.cpus, &asked.cpus)?;
        claims.text(&field("cpu.mems"), &mut whole.mems, &asked.mems)?;
    }
    one!(whole, asked, "", blockio_class, rdt_class, pids);
    let hugepages = field("hugepage limit");
    claims
        .named(&hugepages, &mut whole.hugepage_limits, &asked.hugepage_limits, |h| &h.page_size)?;
    claims.map(&field("unified"), &mut whole.unified, &asked.unified)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_nri_proto::api::{
        KeyValue, LinuxContainerUpdate, LinuxCpu, Mount, OptionalInt64, OptionalUInt64,
    };

    fn env(list: &[(&str, &str)]) -> ContainerAdjustment {
        let pair = |&(key, value): &(&str, &str)| KeyValue { key: key.into(), value: value.into() };
        ContainerAdjustment { env: list.iter().map(pair).collect(), ..Default::default() }
    }

    fn cpu(cpu: LinuxCpu) -> LinuxResources {
        LinuxResources { cpu: Some(cpu), ..Default::default() }
    }

    #[test]
    fn different_fields_come_together_and_the_same_one_is_a_conflict() {
        let mut merged = Merged::default();
        merged.adjust("00-a", &env(&[("A", "1")])).unwrap();
        merged.adjust("01-b", &env(&[("B", "2")])).unwrap();
        assert_eq!(merged.adjust.env.len(), 2);
        let conflict = merged.adjust("02-c", &env(&[("A", "3")])).unwrap_err();
        assert_eq!(conflict.to_string(), "plugins 00-a and 02-c both set env A");
        merged.adjust("00-a", &env(&[("A", "4")])).unwrap();
        assert_eq!(merged.adjust.env.len(), 2, "its own may be set again");
    }

    #[test]
    fn what_is_removed_first_may_be_set_by_another() {
        let mut merged = Merged::default();
        merged.adjust("00-a", &env(&[("A", "1")])).unwrap();
        merged.adjust("01-b", &env(&[("-A", ""), ("A", "2")])).unwrap();
        assert_eq!(merged.adjust.env, env(&[("-A", ""), ("A", "2")]).env);
        let mount = |at: &str| Mount { destination: at.into(), ..Default::default() };
        let asked =
            ContainerAdjustment { mounts: vec![mount("-/x"), mount("/y")], ..Default::default() };
        merged.adjust("01-b", &asked).unwrap();
        assert_eq!(merged.adjust.mounts.len(), 2);
    }

    #[test]
    fn resources_are_single_fields() {
        let with = |resources| ContainerAdjustment {
            linux: Some(LinuxContainerAdjustment {
                resources: Some(resources),
                ..Default::default()
            }),
            ..Default::default()
        };
        let shares = cpu(LinuxCpu {
            shares: Some(OptionalUInt64 { value: 5 }),
            cpus: "2-3".into(),
            ..Default::default()
        });
        let quota =
            cpu(LinuxCpu { quota: Some(OptionalInt64 { value: -1 }), ..Default::default() });
        let mut merged = Merged::default();
        merged.adjust("00-a", &with(shares.clone())).unwrap();
        merged.adjust("01-b", &with(quota)).unwrap();
        assert_eq!(merged.adjust("01-b", &with(shares)).unwrap_err().field, "cpu.shares");
    }

    #[test]
    fn updates_are_kept_apart_by_container() {
        let update = |id: &str, cpus: &str, ignore_failure| ContainerUpdate {
            container_id: id.into(),
            linux: Some(LinuxContainerUpdate {
                resources: Some(cpu(LinuxCpu { cpus: cpus.into(), ..Default::default() })),
            }),
            ignore_failure,
        };
        let mut merged = Merged::default();
        merged.update("00-a", &[update("one", "0", true), update("two", "1", false)]).unwrap();
        assert_eq!(merged.updates.len(), 2);
        assert!(merged.updates[0].ignore_failure && !merged.updates[1].ignore_failure);
        assert!(merged.update("01-b", &[update("one", "3", true)]).is_err());
    }

    #[test]
    fn arguments_are_replaced_only_when_that_is_said() {
        let args = |list: &[&str]| ContainerAdjustment {
            args: list.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        };
        let mut merged = Merged::default();
        merged.adjust("00-a", &args(&["x"])).unwrap();
        assert!(merged.adjust("01-b", &args(&["y"])).is_err());
        merged.adjust("01-b", &args(&["", "y"])).unwrap();
        assert_eq!(merged.adjust.args, ["y"]);
    }
}
