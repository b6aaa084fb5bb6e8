//! Typed names of tables and what listing one returns.

use std::{fmt, marker::PhantomData};

use redb::TableDefinition;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result};

/// Name of a table whose records are `R`, JSON-encoded and keyed by string.
///
/// ```
/// # use pinion_store::Table;
/// const PODS: Table<serde_json::Value> = Table::new("pods");
/// ```
pub struct Table<R> {
    name: &'static str,
    record: PhantomData<fn() -> R>,
}

impl<R> Table<R> {
    /// Names a table; it comes into being with its first record.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self { name, record: PhantomData }
    }

    /// The table's name in the database file.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) const fn definition(&self) -> Definition {
        Definition::new(self.name)
    }

    pub(crate) const fn failed(
        &self,
        action: &'static str,
    ) -> impl Fn(redb::Error) -> Error + use<R> {
        let table = self.name;
        move |source| Error::Table { action, table, source }
    }
}

impl<R: DeserializeOwned> Table<R> {
    pub(crate) fn decode(&self, key: &str, bytes: &[u8]) -> Result<R> {
        serde_json::from_slice(bytes).map_err(|source| Error::Decode {
            table: self.name,
            key: key.to_owned(),
            source,
        })
    }

    pub(crate) fn collect(
        &self,
        range: redb::Range<'_, &'static str, &'static [u8]>,
    ) -> Result<Listing<R>> {
        let mut listing = Listing::default();
        for entry in range {
            let (key, value) = entry.map_err(|e| self.failed("list table")(e.into()))?;
            match serde_json::from_slice(value.value()) {
                Ok(record) => listing.records.push((key.value().to_owned(), record)),
                Err(reason) => listing.bad.push((key.value().to_owned(), reason.to_string())),
            }
        }
        Ok(listing)
    }
}

impl<R: Serialize> Table<R> {
    pub(crate) fn encode(&self, key: &str, record: &R) -> Result<Vec<u8>> {
        serde_json::to_vec(record).map_err(|source| Error::Encode {
            table: self.name,
            key: key.to_owned(),
            source,
        })
    }
}

impl<R> Clone for Table<R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Table<R> {}

impl<R> fmt::Debug for Table<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Table").field(&self.name).finish()
    }
}

pub(crate) type Definition = TableDefinition<'static, &'static str, &'static [u8]>;

/// All records of a table in key order, the undecodable ones apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing<R> {
    /// Key and record.
    pub records: Vec<(String, R)>,
    /// Key of each record that did not decode, with the decoder's reason.
    pub bad: Vec<(String, String)>,
}

impl<R> Default for Listing<R> {
    fn default() -> Self {
        Self { records: Vec::new(), bad: Vec::new() }
    }
}
