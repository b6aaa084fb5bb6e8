//! Deletes veth pairs of detached pods, when nobody waits for it.
//!
//! ```text
//!  delete(index) ─▶ queue ─▶ thread: wait GRACE ─▶ still there? ─▶ RTM_DELLINK ─▶ queue empty: end
//! ```
//!
//! A pair usually dies with the pod's namespace, which is released right after the detachment;
//! the kernel then deletes many pairs at once. The grace gives it the time. An index is never
//! used twice in a namespace, so a late deletion cannot hit a stranger.

use crate::netlink::Socket;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the end of the namespace may take.
const GRACE: Duration = Duration::from_millis(300);

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<(Instant, u32)>,
    running: bool,
}

/// The queue of pairs to be deleted. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    shared: Arc<Mutex<Queue>>,
}

impl Reaper {
    /// Sees to it that the link with this index is gone soon.
    pub(crate) fn delete(&self, index: u32) {
        let mut queue = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        queue.waiting.push((Instant::now() + GRACE, index));
        if queue.running {
            return;
        }
        let reaper = self.clone();
        let thread = std::thread::Builder::new().name("link-reaper".to_owned());
        // Inherits the network namespace of the detachment. Without a thread the links stay
        // until their namespaces end, and the next detachment tries again.
        queue.running = thread.spawn(move || reaper.run()).is_ok();
    }

    fn run(&self) {
        loop {
            let Some(due) = self.next_due() else { return };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let now = Instant::now();
            let ready: Vec<_> = {
                let mut queue = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                queue.waiting.extract_if(.., |(due, _)| *due <= now).map(|(_, i)| i).collect()
            };
            let Ok(mut socket) = Socket::route() else { continue };
            for index in ready {
                if let Ok(Some(link)) = socket.link_by_index(index)
                    && link.kind == "veth"
                {
                    let _ = socket.delete_link(index); // gone meanwhile is as good
                }
            }
        }
    }

    /// When the first link is due; `None` ends the thread.
    fn next_due(&self) -> Option<Instant> {
        let mut queue = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let due = queue.waiting.iter().map(|(due, _)| *due).min();
        queue.running = due.is_some();
        due
    }
}
