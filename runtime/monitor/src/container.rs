//! Life of a container, as a pure transition table.
//!
//! ```text
//!              created           start            started
//! Creating ───────────▶ Created ───────▶ Starting ───────▶ Running
//!     │ failed             │ ▲  failed      │                 │
//!     ▼                    │ └──────────────┤                 │
//!   (gone)                 └──── exited ────┴──── exited ─────┴──▶ Exited
//! ```
//!
//! The process may end before the runtime has reported its start; the exit then counts,
//! and the late report changes nothing.

use pinion_monitor_proto::message::Exited;

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// The runtime is creating it.
    Creating,
    /// Its init waits for start.
    Created,
    /// The runtime is starting it.
    Starting,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Exited {
        /// How it ended.
        exited: Exited,
        /// Whether it had been started.
        started: bool,
    },
}

/// What happens to a container.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The runtime has created it.
    Created,
    /// A client wants it started.
    Start,
    /// The runtime has started it.
    Started,
    /// The runtime could not start it.
    StartFailed,
    /// Its process ended.
    Exited(Exited),
}

/// What a client wants of a container; admitted or not by its phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Start it.
    Start,
    /// Send a signal to its processes.
    Signal,
    /// Run a process in it.
    Exec,
    /// Join its stdio or resize its terminal.
    Attach,
    /// Remove it.
    Delete,
    /// Kill and remove it.
    ForceDelete,
}

/// Why a verb is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It does not run (any more).
    NotRunning,
    /// It is in the wrong phase.
    WrongPhase,
}

impl Phase {
    /// The name clients know.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited { .. } => "exited",
        }
    }

    /// The phase after `change`; a change that has no meaning here changes nothing.
    #[must_use]
    pub fn after(self, change: Change) -> Self {
        match (self, change) {
            (Self::Creating, Change::Created) | (Self::Starting, Change::StartFailed) => {
                Self::Created
            }
            (Self::Created, Change::Start) => Self::Starting,
            (Self::Starting, Change::Started) => Self::Running,
            (Self::Exited { exited, .. }, Change::Started) => {
                Self::Exited { exited, started: true }
            }
            (exited @ Self::Exited { .. }, _) => exited,
            (Self::Running, Change::Exited(exited)) => Self::Exited { exited, started: true },
            (_, Change::Exited(exited)) => Self::Exited { exited, started: false },
            (phase, _) => phase,
        }
    }

    /// Whether its process is alive.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self, Self::Exited { .. })
    }

    /// Whether `verb` may be carried out now.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self, verb: Verb) -> Result<(), Refusal> {
        use {Refusal as R, Verb as V};
        match (self, verb) {
            (Self::Created, V::Start | V::Signal | V::Attach | V::Delete | V::ForceDelete)
            | (Self::Starting, V::Signal | V::Attach | V::ForceDelete)
            | (Self::Running, V::Signal | V::Exec | V::Attach | V::ForceDelete)
            | (Self::Exited { .. }, V::Delete | V::ForceDelete) => Ok(()),
            (Self::Exited { .. } | Self::Created | Self::Starting, _) => Err(R::NotRunning),
            (Self::Running | Self::Creating, _) => Err(R::WrongPhase),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> Change {
        Change::Exited(Exited { code, ..Exited::default() })
    }

    fn through(changes: &[Change]) -> Phase {
        changes.iter().cloned().fold(Phase::Creating, Phase::after)
    }

    #[test]
    fn a_container_lives_and_dies() {
        let running = through(&[Change::Created, Change::Start, Change::Started]);
        assert_eq!(running, Phase::Running);
        let Phase::Exited { exited, started } = running.after(exit(3)) else { panic!() };
        assert!(exited.code == 3 && started);
    }

    #[test]
    fn an_exit_before_the_start_is_reported_counts_as_started_afterwards() {
        let early = [Change::Created, Change::Start, exit(0), Change::Started];
        assert!(matches!(through(&early), Phase::Exited { started: true, .. }));
        let failed = [Change::Created, Change::Start, exit(1), Change::StartFailed];
        assert!(matches!(through(&failed), Phase::Exited { started: false, .. }));
    }

    #[test]
    fn a_failed_start_can_be_tried_again() {
        let again = through(&[Change::Created, Change::Start, Change::StartFailed]);
        assert_eq!(again, Phase::Created);
        assert_eq!(again.admits(Verb::Start), Ok(()));
    }

    #[test]
    fn the_first_exit_is_the_one_that_counts() {
        let twice = through(&[Change::Created, exit(1), exit(2)]);
        assert!(matches!(twice, Phase::Exited { exited: Exited { code: 1, .. }, .. }));
    }

    #[test]
    fn verbs_are_admitted_only_where_they_make_sense() {
        let exited = through(&[Change::Created, exit(0)]);
        assert_eq!(exited.admits(Verb::Signal), Err(Refusal::NotRunning));
        assert_eq!(exited.admits(Verb::Exec), Err(Refusal::NotRunning));
        assert_eq!(exited.admits(Verb::Start), Err(Refusal::NotRunning));
        assert_eq!(exited.admits(Verb::Delete), Ok(()));
        assert_eq!(Phase::Running.admits(Verb::Delete), Err(Refusal::WrongPhase));
        assert_eq!(Phase::Running.admits(Verb::Start), Err(Refusal::WrongPhase));
        assert_eq!(Phase::Created.admits(Verb::Exec), Err(Refusal::NotRunning));
        assert_eq!(Phase::Creating.admits(Verb::Attach), Err(Refusal::WrongPhase));
        assert_eq!(Phase::Creating.admits(Verb::ForceDelete), Err(Refusal::WrongPhase));
        assert_eq!(Phase::Running.admits(Verb::ForceDelete), Ok(()));
    }
}
