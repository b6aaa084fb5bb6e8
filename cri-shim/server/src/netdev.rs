//! Counters of a pod's network interfaces, read inside its network namespace.

use std::fs::{self, File};

use nix::sched::{CloneFlags, setns};
use pinion_cri_proto::v1::NamespaceMode;

use crate::error::{Context, Error, Result};
use crate::node::Node;
use crate::record::Sandbox;

/// The interface CNI plugins call the default one.
pub(crate) const DEFAULT: &str = "eth0";

/// One direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) errors: u64,
    pub(crate) dropped: u64,
}

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) rx: Counters,
    pub(crate) tx: Counters,
}

/// The interfaces of a pod with a network of its own, without loopback. Blocks.
pub(crate) fn of_pod(node: &Node, sandbox: &Sandbox) -> Option<Vec<Interface>> {
    if !sandbox.ready || sandbox.namespaces().network() == NamespaceMode::Node {
        return None;
    }
    let path = node.paths.pod(&sandbox.id).namespaces().join("net");
    let read = || -> Result<String> {
        let what = || format!("read network counters in {}", path.display());
        let namespace = File::open(&path).context(what)?;
        // A thread of its own, since it stays in the namespace; no process is needed there.
        let thread = std::thread::spawn(move || -> Result<String> {
            setns(namespace, CloneFlags::CLONE_NEWNET).context(|| "setns".to_string())?;
            fs::read_to_string("/proc/thread-self/net/dev").context(|| "read".to_string())
        });
        thread.join().unwrap_or_else(|_| Err(Error::internal(what())))
    };
    match read() {
        Ok(text) => Some(parse(&text)),
        Err(error) => {
            // The pod may be stopping.
            tracing::debug!(pod = sandbox.id, error = %error.chain(), "no network counters");
            None
        }
    }
}

/// `/proc/net/dev`; see proc_pid_net(5).
fn parse(text: &str) -> Vec<Interface> {
    text.lines().skip(2).filter_map(interface).filter(|i| i.name != "lo").collect()
}

fn interface(line: &str) -> Option<Interface> {
    let (name, numbers) = line.split_once(':')?;
    let numbers: Vec<u64> = numbers.split_whitespace().map_while(|n| n.parse().ok()).collect();
    let counters = |at: usize| {
        Some(Counters {
            bytes: *numbers.get(at)?,
            packets: *numbers.get(at + 1)?,
            errors: *numbers.get(at + 2)?,
            dropped: *numbers.get(at + 3)?,
        })
    };
    Some(Interface { name: name.trim().to_string(), rx: counters(0)?, tx: counters(8)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0:    1234      10    1    2    0     0          0         0     5678      20    3    4    0     0       0          0
";

    #[test]
    fn counters_are_read_and_loopback_is_left_out() {
        let interfaces = parse(TEXT);
        assert_eq!(interfaces.len(), 1);
        let eth0 = &interfaces[0];
        assert_eq!(eth0.name, DEFAULT);
        assert_eq!(eth0.rx, Counters { bytes: 1234, packets: 10, errors: 1, dropped: 2 });
        assert_eq!(eth0.tx, Counters { bytes: 5678, packets: 20, errors: 3, dropped: 4 });
    }

    #[test]
    fn nonsense_is_skipped() {
        assert!(parse("a\nb\nc: x y\nd").is_empty());
    }
}
