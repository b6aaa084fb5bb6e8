//! What can go wrong in the store, with the file, table and key it happened to.

use std::{io, path::PathBuf};

/// Failure of a store operation. Nothing was changed by the call that returned it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused access to the database file or its directory.
    #[error("{action} {path}")]
    File {
        /// What was attempted: `create directory`, `open`, `rename`.
        action: &'static str,
        /// The file concerned.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another process (or another `Store` of this one) holds the database.
    #[error("open {path}: in use by another process")]
    Busy {
        /// The database file.
        path: PathBuf,
    },
    /// The file was written by a newer build; it was left unchanged.
    #[error("open {path}: schema version {found} is newer than {supported}, the newest known")]
    NewerSchema {
        /// The database file.
        path: PathBuf,
        /// Version recorded in the file.
        found: u32,
        /// Newest version this build reads.
        supported: u32,
    },
    /// redb could not open the file, for a reason other than damage.
    #[error("open {path}")]
    Open {
        /// The database file.
        path: PathBuf,
        /// redb's reason.
        #[source]
        source: redb::Error,
    },
    /// A transaction could not be begun, or its commit failed: nothing of it is stored.
    #[error("{action} transaction")]
    Transaction {
        /// `begin` or `commit`.
        action: &'static str,
        /// redb's reason.
        #[source]
        source: redb::Error,
    },
    /// A table could not be read or written.
    #[error("{action} {table:?}")]
    Table {
        /// What was attempted.
        action: &'static str,
        /// Table name.
        table: &'static str,
        /// redb's reason.
        #[source]
        source: redb::Error,
    },
    /// The record exists but is not what this build expects.
    #[error("decode record {key:?} of table {table:?}")]
    Decode {
        /// Table name.
        table: &'static str,
        /// Record key.
        key: String,
        /// The decoder's reason.
        #[source]
        source: serde_json::Error,
    },
    /// The record cannot be written as JSON.
    #[error("encode record {key:?} of table {table:?}")]
    Encode {
        /// Table name.
        table: &'static str,
        /// Record key.
        key: String,
        /// The encoder's reason.
        #[source]
        source: serde_json::Error,
    },
    /// A step was appended to an intent that was never begun or is already finished.
    #[error("intent {id:?} is not open")]
    NoIntent {
        /// The intent's id.
        id: String,
    },
}
