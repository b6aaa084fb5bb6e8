//! The whole way for one container: facts, plan, apply, proof, audit, and back if strict.

use std::io;

use crate::step::{apply_step, undo_locked};
use crate::{
    ApplyError, Facts, FactsError, Host, Plan, Receipt, Refusal, Request, Target, TermName,
    UndoFailure, UndoStep, audit, plan, prefault,
};

/// Why a container must not start.
#[derive(Debug, thiserror::Error)]
pub enum EnforceError {
    /// A strict request cannot be met. Everything done for it was undone, except what is
    /// listed.
    #[error("{refusal}")]
    Refused {
        /// The first term that is missing.
        refusal: Refusal,
        /// Steps that could not be taken back and stay in the caller's journal.
        failures: Vec<UndoFailure>,
    },
    /// The machine could not be read.
    #[error("collect the facts for placement")]
    Facts(#[source] FactsError),
    /// The lock on the group tree could not be taken.
    #[error("lock the cgroup tree")]
    Lock(#[source] io::Error),
    /// The journal did not take an undo step. What was recorded before was undone.
    #[error("journal the undo of a placement step")]
    Journal(#[source] io::Error),
}

/// Enforces a request on a container whose groups exist and are empty, and returns the
/// receipt. `record` gets every undo step before its write; after an error, and at the end of
/// the container's life, the recorded steps are given to [`crate::undo`].
///
/// Under a strict request the receipt's verdict is always aligned; otherwise what is missing
/// is in the receipt.
pub fn enforce(
    host: &Host,
    target: &Target,
    request: &Request,
    record: &mut dyn FnMut(&UndoStep) -> io::Result<()>,
) -> Result<Receipt, EnforceError> {
    let mut done = Vec::new();
    let mut missing = Vec::new();
    let subject = {
        let _lock = host.lock().map_err(EnforceError::Lock)?;
        let facts = Facts::read(host, target).map_err(EnforceError::Facts)?;
        let plan = plan(&facts, target, request)
            .map_err(|refusal| EnforceError::Refused { refusal, failures: Vec::new() })?;
        missing.extend(plan.shortfalls.iter().cloned());
        missing.extend(apply_terms(&plan, request.strict, record, &mut done)?);
        if missing.iter().all(|refusal| refusal.term != TermName::ExclusiveCpus) {
            // Leftovers of an earlier, larger set are tidied up once the new one holds; a
            // failure leaves CPUs reserved for this workload, which deletion releases.
            let _leftover = undo_locked(&plan.release);
        }
        plan.subject
    };
    let hopeless = missing.iter().any(|refusal| refusal.term == TermName::Hugepages);
    let proof = if hopeless { Ok(Vec::new()) } else { prefault(host, target, &request.prefault) };
    let mut receipt = audit(host, &subject);
    match proof {
        Ok(lines) => {
            let term = receipt.terms.iter_mut().find(|term| term.name == TermName::Hugepages);
            if let Some(term) = term.filter(|_| !lines.is_empty()) {
                term.note("proof", lines.join("; "));
            }
        }
        Err(refusal) => missing.push(refusal),
    }
    missing.iter().for_each(|refusal| receipt.add(request.strict, refusal));
    match receipt.terms.iter().find_map(crate::Term::refusal).filter(|_| request.strict) {
        Some(refusal) => Err(refused(host, refusal, &done)),
        None => Ok(receipt),
    }
}

fn refused(host: &Host, refusal: Refusal, done: &[UndoStep]) -> EnforceError {
    let failures = crate::undo(host, done).err().unwrap_or_default();
    EnforceError::Refused { refusal, failures }
}

/// Applies the plan term by term: the steps of a term that cannot be had are undone at once,
/// and the others go on unless the request is strict. Runs under the lock.
fn apply_terms(
    plan: &Plan,
    strict: bool,
    record: &mut dyn FnMut(&UndoStep) -> io::Result<()>,
    done: &mut Vec<UndoStep>,
) -> Result<Vec<Refusal>, EnforceError> {
    let mut missing: Vec<Refusal> = Vec::new();
    let terms = [TermName::NoThrottling, TermName::ExclusiveCpus]; // in the plan's order
    for term in terms {
        // The memory nodes belong between the container's CPUs and its partition.
        let of = |name: TermName| match name {
            TermName::MemoryLocality => TermName::ExclusiveCpus,
            other => other,
        };
        let mut attempted = Vec::new();
        let applied = plan.steps.iter().filter(|step| of(step.term) == term).try_for_each(|step| {
            attempted.push(step.undo.clone());
            apply_step(step, record)
        });
        let Err(error) = applied else {
            done.extend(attempted);
            continue;
        };
        let mut failures = undo_locked(&attempted).err().unwrap_or_default();
        if let ApplyError::Journal { source, .. } = error {
            let _reported_by_the_journal = undo_locked(done);
            return Err(EnforceError::Journal(source));
        }
        let refusal = error.refusal(&plan.hint);
        if strict {
            failures.extend(undo_locked(done).err().unwrap_or_default());
            return Err(EnforceError::Refused { refusal, failures });
        }
        missing.push(refusal);
    }
    Ok(missing)
}
