//! The receipt of a container in a guest: what the host's kernel and the guest say of it now.

use std::collections::BTreeMap;
use std::fs;

use pinion_placement::{Receipt, Term, TermName};

use super::Guest;
use crate::error::{Context, Result};
use crate::record::Container;

/// Looks at a guest. Blocks.
pub(crate) fn receipt(guest: &Guest, container: &Container) -> Result<Receipt> {
    let read = |path: &str| {
        let text = fs::read_to_string(path).context(|| format!("read {path}"))?;
        Ok::<_, crate::error::Error>(text.trim().to_string())
    };
    let host = Host {
        boot_id: read("/proc/sys/kernel/random/boot_id")?,
        release: read("/proc/sys/kernel/osrelease")?,
        machine: fs::read_to_string(format!("/proc/{}/comm", guest.pid)).ok(),
    };
    let mut terms = vec![kernel(guest, &host)];
    terms.extend(cpus(container));
    Ok(Receipt::new(&guest.release, true, terms))
}

/// What the host is, and what it calls the machine's process.
struct Host {
    boot_id: String,
    release: String,
    machine: Option<String>,
}

/// A kernel of its own: another boot id, and a machine that runs. Pure.
fn kernel(guest: &Guest, host: &Host) -> Term {
    let evidence = [
        ("guest boot_id", guest.boot_id.clone()),
        ("host boot_id", host.boot_id.clone()),
        ("guest release", guest.release.clone()),
        ("host release", host.release.clone()),
        ("accelerator", guest.accelerator.clone()),
        ("machine", format!("pid {} {}", guest.pid, host.machine.as_deref().unwrap_or("").trim())),
    ];
    let reason = if let Some(ended) = &guest.ended {
        Some(format!("the machine has ended: {ended}"))
    } else if host.machine.is_none() {
        Some("the machine's process is gone".to_string())
    } else if guest.boot_id == host.boot_id {
        Some("the guest's boot id is the host's".to_string())
    } else {
        None
    };
    Term {
        name: TermName::Kernel,
        asked: Some("a kernel of its own".into()),
        in_force: reason.is_none(),
        evidence: evidence.map(|(key, value)| (key.to_string(), value)).into(),
        code: None,
        reason,
    }
}

/// CPUs of its own are a promise about processors of the machine that is not kept yet.
fn cpus(container: &Container) -> Option<Term> {
    container.contract.exclusive.then(|| Term {
        name: TermName::ExclusiveCpus,
        asked: Some(container.contract.cpus.to_string()),
        in_force: false,
        evidence: BTreeMap::new(),
        code: None,
        reason: Some("processors of a guest are not bound to CPUs of the host yet".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_term_needs_another_boot_and_a_live_machine() {
        let host = |machine: Option<&str>| Host {
            boot_id: "h".into(),
            release: "6".into(),
            machine: machine.map(str::to_string),
        };
        let guest = |id: &str| Guest { boot_id: id.into(), ..Guest::default() };
        assert!(kernel(&guest("g"), &host(Some("pinion-vm"))).in_force);
        for term in [kernel(&guest("h"), &host(Some("x"))), kernel(&guest("g"), &host(None))] {
            assert!(!term.in_force && term.reason.is_some());
        }
        let ended = Guest { ended: Some("killed".into()), ..guest("g") };
        assert!(kernel(&ended, &host(Some("x"))).reason.unwrap().contains("killed"));
    }
}
