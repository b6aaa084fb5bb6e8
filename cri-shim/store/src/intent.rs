//! Intents: what an operation is about to do, on disk before it does it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Listing, Result, Store, Table, Tx};

/// The table of unfinished intents, keyed by [`Intent::id`] in the order they began.
pub const INTENTS: Table<Intent> = Table::new("intents");

const SEQUENCE: Table<u64> = Table::new("intent-sequence");
const SEQUENCE_KEY: &str = "last";

/// An operation in progress and the steps it has announced so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Unique for the life of the database; sorts by age.
    pub id: String,
    /// What is being done, e.g. `run-pod-sandbox`.
    pub kind: String,
    /// To what, e.g. the sandbox id.
    pub subject: String,
    /// Steps announced, oldest first; undo runs them in reverse. Their shape is the kind's own.
    pub steps: Vec<Value>,
}

impl Tx {
    /// Begins an intent within this transaction, beside the records it reserves.
    pub fn begin_intent(&self, kind: &str, subject: &str) -> Result<Intent> {
        // A sequence record that does not decode starts over above every intent still open.
        let last = match self.get(SEQUENCE, SEQUENCE_KEY) {
            Ok(last) => last.unwrap_or(0),
            Err(Error::Decode { .. }) => self.last_open_intent()?,
            Err(e) => return Err(e),
        };
        let number = last + 1;
        self.put(SEQUENCE, SEQUENCE_KEY, &number)?;
        let intent = Intent {
            id: format!("{number:016x}"),
            kind: kind.to_owned(),
            subject: subject.to_owned(),
            steps: Vec::new(),
        };
        self.put(INTENTS, &intent.id, &intent)?;
        Ok(intent)
    }

    /// Adds a step to an open intent within this transaction.
    pub fn append_step(&self, id: &str, step: Value) -> Result<()> {
        let mut intent =
            self.get(INTENTS, id)?.ok_or_else(|| Error::NoIntent { id: id.to_owned() })?;
        intent.steps.push(step);
        self.put(INTENTS, id, &intent)
    }

    /// Ends an intent within this transaction, beside the records that settle it. Ending one
    /// that is not open is not an error, so that undo may be repeated.
    pub fn finish_intent(&self, id: &str) -> Result<()> {
        self.delete(INTENTS, id).map(drop)
    }

    fn last_open_intent(&self) -> Result<u64> {
        let open = self.list(INTENTS)?;
        let keys = open.records.iter().map(|(k, _)| k).chain(open.bad.iter().map(|(k, _)| k));
        Ok(keys.filter_map(|k| u64::from_str_radix(k, 16).ok()).max().unwrap_or(0))
    }
}

impl Store {
    /// Commits a new intent; call before the first step.
    pub fn begin_intent(&self, kind: &str, subject: &str) -> Result<Intent> {
        self.write(|tx| tx.begin_intent(kind, subject))
    }

    /// Commits the next step of an intent; call before carrying it out.
    pub fn append_step(&self, id: &str, step: Value) -> Result<()> {
        self.write(|tx| tx.append_step(id, step))
    }

    /// Ends an intent that was carried out or undone.
    pub fn finish_intent(&self, id: &str) -> Result<()> {
        self.write(|tx| tx.finish_intent(id))
    }

    /// Intents that were begun and not finished, oldest first.
    pub fn unfinished_intents(&self) -> Result<Listing<Intent>> {
        self.list(INTENTS)
    }
}
