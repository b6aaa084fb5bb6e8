//! Frequency governor and wake-up latency limit of the container's CPUs, by sysfs.

use pinion_lease::Setting;
use pinion_topology::CpuSet;

use super::Subject;
use crate::{Host, Reason, Term, TermName, files};

pub(super) fn power(host: &Host, subject: &Subject) -> Term {
    let asked = [
        subject.governor.as_ref().map(|name| format!("governor {name}")),
        subject.latency.as_ref().map(|limit| match limit.as_str() {
            "n/a" => "no idle state with a wake-up latency".to_owned(),
            "0" => "any idle state".to_owned(),
            micros => format!("wake-up latency of at most {micros} µs"),
        }),
    ];
    let asked: Vec<String> = asked.into_iter().flatten().collect();
    let mut term = Term::new(TermName::Power, (!asked.is_empty()).then(|| asked.join(", ")));
    let cpus = subject.cpus.clone().unwrap_or_default();
    if cpus.is_empty() && term.asked.is_some() {
        term.fail(Reason::NoCpus, "the container has no CPU list");
    }
    let governor = |cpu| Setting::Governor { cpu };
    check(&mut term, host, &cpus, "scaling_governor", governor, subject.governor.as_deref());
    let latency = |cpu| Setting::ResumeLatency { cpu };
    check(&mut term, host, &cpus, "pm_qos_resume_latency_us", latency, subject.latency.as_deref());
    term
}

/// Notes what the CPUs say, and fails for those that do not say what was asked.
fn check(
    term: &mut Term,
    host: &Host,
    cpus: &CpuSet,
    name: &str,
    setting: impl Fn(u32) -> Setting,
    asked: Option<&str>,
) {
    let mut shown = Vec::new();
    for cpu in cpus.iter() {
        let setting = setting(cpu);
        match files::read(&setting.path(&host.root)) {
            Ok(Some(found)) => {
                if asked.is_some_and(|asked| asked != found) {
                    let asked = asked.unwrap_or_default();
                    let detail = format!("{setting} is {found:?}, asked was {asked:?}");
                    term.fail(Reason::PowerDiffers, detail);
                }
                shown.push(format!("cpu{cpu}={found}"));
            }
            Ok(None) => {
                if asked.is_some() {
                    let detail = format!(
                        "{setting} does not exist: this machine's kernel has no driver for it, \
                         as virtual machines often have not"
                    );
                    term.fail(Reason::NoPowerControl, detail);
                }
            }
            Err(error) => term.fail(Reason::Unreadable, format!("{error}: {}", error.source)),
        }
    }
    if !shown.is_empty() {
        term.note(name, shown.join(" "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testtree::Tree;

    #[test]
    fn what_the_cpus_say_is_compared_with_what_was_asked() {
        let tree = Tree::new();
        for (cpu, limit) in [(2, "n/a"), (3, "0")] {
            let dir = format!("sys/devices/system/cpu/cpu{cpu}");
            tree.file(&format!("{dir}/power/pm_qos_resume_latency_us"), limit);
        }
        let ask = |cpus: &str, governor: Option<&str>, latency: Option<&str>| {
            let subject = Subject {
                cpus: Some(cpus.parse().unwrap()),
                governor: governor.map(str::to_owned),
                latency: latency.map(str::to_owned),
                ..Subject::default()
            };
            power(&tree.host("6.12"), &subject)
        };
        assert!(ask("2", None, Some("n/a")).in_force);
        let differs = ask("2-3", None, Some("n/a"));
        assert_eq!(differs.code, Some(Reason::PowerDiffers));
        assert!(differs.reason.unwrap().contains("cpu3/power"));
        let absent = ask("2", Some("performance"), None);
        assert_eq!(absent.code, Some(Reason::NoPowerControl));
        let unasked = ask("2-3", None, None);
        assert!(unasked.in_force && unasked.asked.is_none());
        assert_eq!(unasked.evidence["pm_qos_resume_latency_us"], "cpu2=n/a cpu3=0");
    }
}
