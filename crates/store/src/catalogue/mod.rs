//! The catalogue: every row the store knows, in one embedded database (redb), behind typed tables
//! and a group commit.
//!
//! One write transaction is open at a time. [`Catalogue::write`] runs the caller's closure in it,
//! in the caller's own thread; if others are waiting at the gate, the transaction stays open for
//! them, and whoever finds nobody behind commits for all. So N concurrent writers share one sync,
//! and a lone writer waits for nothing. A closure that fails or panics after it wrote takes the
//! whole transaction down: its caller gets the error, and its mates run their closures again
//! (which is why a closure may be called more than once).
//!
//! Crash behaviour: a commit is atomic and, unless lazy, durable when `write` returns. Commits are
//! two-phase, because the data is attacker-chosen and so is, in part, the moment of a crash. A lazy
//! write is visible at once and durable with the next one that is not. An open after a kill reads the
//! file once, to find the pages in use; a large file has them written down with each commit instead.

mod batch;
mod key;
pub(crate) mod schema;
mod table;

use std::sync::Arc;

use plies_oci::ErrorKind;

pub(crate) use batch::{Catalogue, Urgency};
pub use key::{Key, KeyReader, PrefixOf};
pub use table::{ReadTx, Row, Rows, Table, Tx};

/// Why a catalogue operation failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogueError {
    /// The database below said no. After an I/O error it refuses everything until the store is
    /// opened again: a write that failed once is never retried into success.
    #[error("catalogue: {op}")]
    Database {
        /// What was being done.
        op: &'static str,
        /// The database's words.
        #[source]
        source: Arc<redb::Error>,
    },
    /// A row that is not what we wrote.
    #[error("catalogue: table {table}: row {key} is damaged: {what}")]
    Damaged {
        /// The table.
        table: &'static str,
        /// The key in hex.
        key: String,
        /// Which part, and how.
        what: &'static str,
    },
    /// A row that a later version of plies wrote.
    #[error("catalogue: table {table}: row version {found} is newer than {supported}, the newest this version knows")]
    RowTooNew {
        /// The table.
        table: &'static str,
        /// The version in the row.
        found: u8,
        /// The newest we know.
        supported: u8,
    },
    /// A hold or an edge names something that is not in the store.
    #[error("{resource} is not in the store")]
    NoSuchResource {
        /// What was to be held.
        resource: crate::Resource,
    },
    /// A lease that was released, or has expired and was collected.
    #[error("lease {lease} does not exist")]
    NoSuchLease {
        /// The lease.
        lease: crate::LeaseId,
    },
}

impl CatalogueError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Database { source, .. } => match &**source {
                redb::Error::Corrupted(_) => ErrorKind::DataLoss,
                redb::Error::Io(_) | redb::Error::PreviousIo => ErrorKind::Unavailable,
                redb::Error::ValueTooLarge(_) => ErrorKind::Limit,
                _ => ErrorKind::Internal,
            },
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::RowTooNew { .. } => ErrorKind::FailedPrecondition,
            Self::NoSuchResource { .. } | Self::NoSuchLease { .. } => ErrorKind::NotFound,
        }
    }

    pub(crate) fn database(op: &'static str) -> impl FnOnce(redb::Error) -> Self {
        move |source| Self::Database { op, source: Arc::new(source) }
    }
}
