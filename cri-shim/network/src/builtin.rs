//! The network's verbs for chains that are done in this process: off the event loop, with the
//! pod's record kept as for plugins.
//!
//! The record is written before the first step as always, but not forced to the disk: all that
//! an interrupted ADD leaves dies with the power, except for leases, and these are found by the
//! pod's id. So DEL of a pod whose record is lost goes by the configuration in force.

use crate::cni::PluginResult;
use crate::cni::config::NetworkList;
use crate::cni::record::Record;
use crate::error::NetworkError;
use crate::native::config::Plan;
use crate::native::{Attach, Failed};
use crate::network::Network;
use crate::pod::Attachment;
use std::io;
use std::net::IpAddr;

impl Failed {
    fn of(self, command: &'static str) -> NetworkError {
        NetworkError::Native { command, step: self.step, source: self.source }
    }
}

fn attach<'a>(plan: &'a Plan, id: &'a str, record: &'a Record, known: &'a [IpAddr]) -> Attach<'a> {
    Attach {
        plan,
        version: record.network.version,
        network: &record.network.name,
        pod: id,
        interface: &record.interface,
        netns: &record.netns,
        capabilities: &record.capabilities,
        known,
    }
}

/// Addresses the record says the pod has.
fn known(record: &Record) -> Vec<IpAddr> {
    record.attachment.as_ref().map(|attachment| attachment.ips.clone()).unwrap_or_default()
}

/// Runs to its end even if nobody waits for it any more.
async fn blocking<T: Send + 'static>(
    command: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        let step = "run".to_owned();
        NetworkError::Native { command, step, source: io::Error::other(error) }
    })
}

impl Network {
    pub(crate) async fn attach_native(
        &self,
        id: &str,
        plan: Plan,
        record: Record,
    ) -> (Record, Result<Attachment, NetworkError>) {
        let (network, id, unchanged) = (self.clone(), id.to_owned(), record.clone());
        let done = blocking("ADD", move || {
            let mut record = record;
            let outcome = network.attach_blocking(&id, &plan, &mut record);
            (record, outcome)
        });
        done.await.unwrap_or_else(|error| (unchanged, Err(error)))
    }

    fn attach_blocking(
        &self,
        id: &str,
        plan: &Plan,
        record: &mut Record,
    ) -> Result<Attachment, NetworkError> {
        let records = &self.shared.records;
        records.write_volatile(id, record)?;
        let value = attach(plan, id, record, &[])
            .add(&self.shared.rules)
            .map_err(|failed| failed.of("ADD"))?;
        let result = PluginResult::parse(&value).map_err(|reason| NetworkError::BadOutput {
            plugin: "built-in".to_owned(),
            command: "ADD",
            reason,
        })?;
        let attachment = record.attached(value, result)?;
        records.write_volatile(id, record)?;
        self.cache(id, record);
        Ok(attachment)
    }

    pub(crate) async fn detach_native(
        &self,
        id: &str,
        plan: Plan,
        record: &Record,
    ) -> Vec<NetworkError> {
        let (shared, id, record) = (self.shared.clone(), id.to_owned(), record.clone());
        let failures = blocking("DEL", move || {
            attach(&plan, &id, &record, &known(&record)).del(&shared.reaper, &shared.rules)
        });
        match failures.await {
            Ok(failures) => failures.into_iter().map(|failed| failed.of("DEL")).collect(),
            Err(error) => vec![error],
        }
    }

    pub(crate) async fn check_native(
        &self,
        id: &str,
        plan: Plan,
        record: Record,
    ) -> Result<(), NetworkError> {
        let Some(expected) = record.attachment.clone() else { return Ok(()) };
        let (pod, network) = (id.to_owned(), record.network.name.clone());
        let id = id.to_owned();
        let found = blocking("CHECK", move || {
            attach(&plan, &id, &record, &known(&record)).check(&expected.result)
        });
        match found.await?.map_err(|failed| failed.of("CHECK"))? {
            None => Ok(()),
            Some(what) => Err(NetworkError::Changed { pod, network, what }),
        }
    }

    /// Gives back leases of pods that are not among `valid`.
    pub(crate) async fn collect_native(
        &self,
        plan: Plan,
        list: NetworkList,
        valid: Vec<(String, String)>,
    ) -> Vec<NetworkError> {
        let freed = blocking("GC", move || crate::native::collect(&plan, &list.name, &valid));
        match freed.await {
            Ok(Ok(())) => Vec::new(),
            Ok(Err(failed)) => vec![failed.of("GC")],
            Err(error) => vec![error],
        }
    }
}
