//! New limits for a container in a guest: carried out by the runtime in the guest.

use pinion_cri_proto::v1::LinuxContainerResources;

use super::Guest;
use crate::error::{Context as _, Error, Result};
use crate::pod::Context;
use crate::resources;
use crate::services::blocking;

/// Changes the limits of container `id`.
pub(crate) async fn update(
    context: &Context,
    guest: &Guest,
    id: &str,
    change: &LinuxContainerResources,
) -> Result<()> {
    let inside = translate(guest, change)?;
    let directory = context.node.paths.pod(&context.sandbox.id).container(id);
    let file = directory.path().join("resources.json");
    let json = serde_json::to_vec(&resources::to_oci(&inside)?);
    let json = json.context(|| format!("encode the limits of {id}"))?;
    let written = file.clone();
    blocking(move || {
        pinion_sys::atomic_file::write_volatile(&written, &json, 0o600)
            .context(|| format!("write {}", written.display()))
    })
    .await?;
    context.monitor()?.update(id, &file).await
}

/// A change as the guest can carry it out: no CPUs or nodes of the host in it, and no more
/// than the machine has. Pure.
fn translate(guest: &Guest, change: &LinuxContainerResources) -> Result<LinuxContainerResources> {
    let limit = u64::try_from(change.memory_limit_in_bytes).unwrap_or(0);
    if limit > guest.memory {
        return Err(Error::precondition(format!(
            "handler pinion-vm: memory_limit_in_bytes: {limit} is more than the {} bytes of the \
             pod's machine, which cannot grow; annotate vm.pinion.dev/memory-mib and create the pod \
             anew",
            guest.memory
        )));
    }
    if change.hugepage_limits.iter().any(|asked| asked.limit > 0) {
        return Err(Error::precondition(
            "handler pinion-vm: hugepage_limits: no hugepages in guests yet",
        ));
    }
    Ok(LinuxContainerResources {
        cpuset_cpus: String::new(),
        cpuset_mems: String::new(),
        hugepage_limits: Vec::new(),
        ..change.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_the_machine_can_give() {
        let guest = Guest { memory: 256 << 20, ..Guest::default() };
        let change = LinuxContainerResources {
            cpu_shares: 512,
            cpuset_cpus: "6-7".into(),
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        };
        let inside = translate(&guest, &change).unwrap();
        assert_eq!((inside.cpu_shares, inside.memory_limit_in_bytes), (512, 128 << 20));
        assert!(inside.cpuset_cpus.is_empty());
        let large = LinuxContainerResources { memory_limit_in_bytes: 1 << 30, ..change };
        let text = translate(&guest, &large).unwrap_err().to_string();
        assert!(text.contains("cannot grow") && text.contains("268435456"), "{text}");
    }
}
