//! A write transaction over any number of tables.

use std::fmt;

use redb::{ReadableTable, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Listing, Result, Table, record::Definition};

/// Raw bytes of records that no longer decode, keyed `<table>/<key>`.
const SET_ASIDE: Definition = Definition::new("set-aside");

/// One transaction; it sees its own writes. Made by [`crate::Store::write`].
pub struct Tx {
    inner: WriteTransaction,
}

impl Tx {
    pub(crate) fn new(inner: WriteTransaction) -> Self {
        Self { inner }
    }

    pub(crate) fn commit(self) -> Result<()> {
        self.inner.commit().map_err(|e| Error::Transaction { action: "commit", source: e.into() })
    }

    pub(crate) fn abort(self) -> Result<()> {
        self.inner.abort().map_err(|e| Error::Transaction { action: "abort", source: e.into() })
    }

    /// The record under `key` as this transaction sees it.
    pub fn get<R: DeserializeOwned>(&self, table: Table<R>, key: &str) -> Result<Option<R>> {
        let open = self.table(table)?;
        let value = open.get(key).map_err(|e| table.failed("read table")(e.into()))?;
        value.map(|bytes| table.decode(key, bytes.value())).transpose()
    }

    /// Every record of a table as this transaction sees it.
    pub fn list<R: DeserializeOwned>(&self, table: Table<R>) -> Result<Listing<R>> {
        let open = self.table(table)?;
        table.collect(open.iter().map_err(|e| table.failed("list table")(e.into()))?)
    }

    /// Writes or replaces the record under `key`.
    pub fn put<R: Serialize>(&self, table: Table<R>, key: &str, record: &R) -> Result<()> {
        let bytes = table.encode(key, record)?;
        self.table(table)?
            .insert(key, bytes.as_slice())
            .map_err(|e| table.failed("write table")(e.into()))?;
        Ok(())
    }

    /// Deletes the record under `key`, decodable or not; false if there was none.
    pub fn delete<R>(&self, table: Table<R>, key: &str) -> Result<bool> {
        let mut open = self.table(table)?;
        let removed = open.remove(key).map_err(|e| table.failed("write table")(e.into()))?;
        Ok(removed.is_some())
    }

    /// Moves a record that does not decode out of its table, keeping its bytes for inspection.
    pub fn set_aside<R>(&self, table: Table<R>, key: &str) -> Result<bool> {
        let mut open = self.table(table)?;
        let Some(bytes) = open.remove(key).map_err(|e| table.failed("write table")(e.into()))?
        else {
            return Ok(false);
        };
        let failed = |source| Error::Table { action: "write table", table: "set-aside", source };
        let name = format!("{}/{key}", table.name());
        let mut aside = self.inner.open_table(SET_ASIDE).map_err(|e| failed(e.into()))?;
        aside.insert(name.as_str(), bytes.value()).map_err(|e| failed(e.into()))?;
        Ok(true)
    }

    fn table<R>(&self, table: Table<R>) -> Result<redb::Table<'_, &'static str, &'static [u8]>> {
        self.inner.open_table(table.definition()).map_err(|e| table.failed("open table")(e.into()))
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx").finish_non_exhaustive()
    }
}
