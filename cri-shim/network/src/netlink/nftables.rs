//! nf_tables: tables, chains and rules, changed in one transaction.
//!
//! ```text
//!  generation ─▶ look (dumps) ─▶ batch [BEGIN generation, …, END]
//!       ▲                              │ ERESTART: somebody changed the rules meanwhile
//!       └──────────────────────────────┘
//! ```
//!
//! Formats: `linux/netfilter/nf_tables.h`, `linux/netfilter/nfnetlink.h`.

use super::{Attributes, Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, Socket, number_be};
use std::io;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFNL_BATCH_GENID: u16 = 1;

const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const DELRULE: u16 = 8;
const GETGEN: u16 = 16;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_HOOKNUM: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const NF_ACCEPT: u32 = 1;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_COMPAT: u16 = 5;
const RULE_COMPAT_PROTO: u16 = 1;
const RULE_COMPAT_FLAGS: u16 = 2;
const GEN_ID: u16 = 1;
/// Length of `struct nfgenmsg`.
const GENERIC: usize = 4;
/// Transactions of others that may come between our look and our change.
const ATTEMPTS: u32 = 50;

/// A base chain: where packets enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    /// `nat`, `filter`
    pub(crate) kind: &'static str,
    /// `NF_INET_*`
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

/// Where a new rule goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    First,
    Last,
}

/// A rule to be added: its expressions as an attribute list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    /// A sequence of `NFTA_LIST_ELEM`.
    pub(crate) expressions: Vec<u8>,
    /// Transport protocol that matches of xtables may rely on.
    pub(crate) protocol: Option<u8>,
}

/// A rule that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) chain: String,
    pub(crate) handle: u64,
    /// A sequence of `NFTA_LIST_ELEM`.
    pub(crate) expressions: Vec<u8>,
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Makes a table, or finds it there.
    Table,
    /// Makes a chain, or finds it there.
    Chain { name: String, hook: Option<Hook> },
    /// Adds a rule.
    Rule { chain: String, place: Place, rule: Rule },
    /// Deletes one rule.
    DeleteRule { chain: String, handle: u64 },
    /// Deletes all rules of a chain.
    Flush { chain: String },
    /// Deletes a chain without rules.
    DeleteChain { chain: String },
}

/// The rules of one family and table, in one namespace.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    pub(crate) socket: &'a mut Socket,
    /// `NFPROTO_*`
    pub(crate) family: u8,
    pub(crate) name: &'static str,
}

fn message(kind: u16, family: u8) -> Message {
    Message::new(SUBSYSTEM << 8 | kind).raw(&[family, 0, 0, 0])
}

/// Names of all tables with their family.
pub(crate) fn tables(socket: &mut Socket) -> io::Result<Vec<(u8, String)>> {
    let answers = socket.dump(&message(GETTABLE, 0))?;
    Ok(answers
        .iter()
        .filter_map(|answer| {
            let name = Attributes::after(&answer.body, GENERIC).text(TABLE_NAME)?;
            Some((*answer.body.first()?, name))
        })
        .collect())
}

impl Table<'_> {
    /// Looks, decides, changes, as if nobody else was there: when somebody was, again.
    pub(crate) fn transact(
        &mut self,
        mut decide: impl FnMut(&mut Self) -> io::Result<Vec<Change>>,
    ) -> io::Result<()> {
        let mut outcome = Ok(());
        for _ in 0..ATTEMPTS {
            let generation = self.generation()?;
            let changes = decide(self)?;
            if changes.is_empty() {
                return Ok(());
            }
            outcome = self.commit(generation, &changes);
            match &outcome {
                Err(error) if again(error) => {}
                _ => return outcome,
            }
        }
        outcome
    }

    fn generation(&mut self) -> io::Result<u32> {
        let answer = self.socket.get(message(GETGEN, 0))?;
        let id = Attributes::after(&answer.body, GENERIC).get(GEN_ID).map_or(0, number_be);
        Ok(u32::try_from(id).unwrap_or_default())
    }

    fn commit(&mut self, generation: u32, changes: &[Change]) -> io::Result<()> {
        let edge = |kind| Message::new(kind).raw(&[0, 0]).raw(&SUBSYSTEM.to_be_bytes());
        let mut batch = vec![(0, edge(BATCH_BEGIN).number_be(NFNL_BATCH_GENID, generation))];
        for (index, change) in changes.iter().enumerate() {
            let acknowledge = if index + 1 == changes.len() { NLM_F_ACK } else { 0 };
            batch.push((acknowledge, self.encode(change)));
        }
        batch.push((0, edge(BATCH_END)));
        self.socket.batch(batch)
    }

    fn encode(&self, change: &Change) -> Message {
        let new = |kind| message(kind, self.family).text(1, self.name);
        match change {
            Change::Table => new(NEWTABLE).flags(NLM_F_CREATE),
            Change::Chain { name, hook } => {
                let chain = new(NEWCHAIN).flags(NLM_F_CREATE).text(CHAIN_NAME, name);
                let Some(hook) = hook else { return chain };
                chain
                    .nest(CHAIN_HOOK, |inner| {
                        inner
                            .number_be(HOOK_HOOKNUM, hook.number)
                            .attribute(HOOK_PRIORITY, &hook.priority.to_be_bytes())
                    })
                    .number_be(CHAIN_POLICY, NF_ACCEPT)
                    .text(CHAIN_TYPE, hook.kind)
            }
            Change::Rule { chain, place, rule } => {
                let append = if *place == Place::Last { NLM_F_APPEND } else { 0 };
                let message = new(NEWRULE)
                    .flags(NLM_F_CREATE | append)
                    .text(RULE_CHAIN, chain)
                    .nest(RULE_EXPRESSIONS, |list| list.raw(&rule.expressions));
                match rule.protocol {
                    None => message,
                    Some(protocol) => message.nest(RULE_COMPAT, |compat| {
                        compat
                            .number_be(RULE_COMPAT_PROTO, u32::from(protocol))
                            .number_be(RULE_COMPAT_FLAGS, 0)
                    }),
                }
            }
            Change::DeleteRule { chain, handle } => {
                new(DELRULE).text(RULE_CHAIN, chain).attribute(RULE_HANDLE, &handle.to_be_bytes())
            }
            Change::Flush { chain } => new(DELRULE).text(RULE_CHAIN, chain),
            Change::DeleteChain { chain } => new(DELCHAIN).text(CHAIN_NAME, chain),
        }
    }

    /// Names of the table's chains; none if there is no such table.
    pub(crate) fn chains(&mut self) -> io::Result<Vec<String>> {
        let answers = self.socket.dump(&message(GETCHAIN, self.family))?;
        Ok(answers
            .iter()
            .filter_map(|answer| {
                let attributes = Attributes::after(&answer.body, GENERIC);
                let own = attributes.text(CHAIN_TABLE).as_deref() == Some(self.name);
                attributes.text(CHAIN_NAME).filter(|_| own)
            })
            .collect())
    }

    /// Whether the table has this chain.
    pub(crate) fn has_chain(&mut self, name: &str) -> io::Result<bool> {
        let request =
            message(GETCHAIN, self.family).text(CHAIN_TABLE, self.name).text(CHAIN_NAME, name);
        match self.socket.get(request) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The rules of a chain, in order; none if there is no such chain.
    pub(crate) fn rules(&mut self, chain: &str) -> io::Result<Vec<Found>> {
        let request =
            message(GETRULE, self.family).text(RULE_TABLE, self.name).text(RULE_CHAIN, chain);
        let answers = self.socket.dump(&request)?;
        Ok(answers.iter().filter_map(|answer| self.parse(&answer.body, chain)).collect())
    }

    /// Kernels that do not filter dumps give all rules, so the names are compared.
    fn parse(&self, body: &[u8], chain: &str) -> Option<Found> {
        let attributes = Attributes::after(body, GENERIC);
        let own = attributes.text(RULE_TABLE)? == self.name && *body.first()? == self.family;
        let found = attributes.text(RULE_CHAIN).filter(|found| own && found == chain)?;
        Some(Found {
            chain: found,
            handle: attributes.get(RULE_HANDLE).map(number_be)?,
            expressions: attributes.get(RULE_EXPRESSIONS).unwrap_or_default().to_vec(),
        })
    }
}

/// ERESTART: the generation is no longer the one that was looked at. (A file system's EINTR
/// and a table's EAGAIN mean the same here.)
fn again(error: &io::Error) -> bool {
    const ERESTART: i32 = 85;
    error.raw_os_error() == Some(ERESTART)
        || matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_told_apart_from_a_refusal() {
        assert!(again(&io::Error::from_raw_os_error(85)));
        assert!(!again(&io::Error::from_raw_os_error(2)));
    }
}
