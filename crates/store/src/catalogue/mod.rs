//! The catalogue: every row the store knows, in one embedded database (redb), behind typed tables
//! and a group commit.
//!
//! A write runs the caller's closure in the caller's own thread, one closure at a time. What it changes
//! is kept in memory at first: over the database lie the changes that are just being written to it, and
//! over those the ones that wait (`view`). So whoever reads or writes next sees them at once, and a
//! closure that fails or panics has changed nothing. Whoever needs their changes durable writes down all
//! that wait, in one commit, unless somebody is at it; then they wait for that one to end, and one of
//! them writes for all who came meanwhile. So N concurrent writers share a sync, a lone one waits for
//! nothing, no closure and no reader ever waits for the disk, and what was put and removed again before
//! anybody needed it never reaches the disk.
//!
//! Crash behaviour: a commit is atomic, and holds all closures up to one, none after it. Commits are
//! two-phase, because the data is attacker-chosen and so is, in part, the moment of a crash. A lazy
//! write is visible at once and durable with the next one that is not, even if that one finds all as it wants it and changes
//! nothing: what it found may be in memory only. If a commit fails, everything
//! that was not durable is gone, as after a crash, and all later writes fail. An open after a kill reads
//! the file once, to find the pages in use; a large file has them written down with each commit instead.

mod batch;
mod key;
pub(crate) mod schema;
mod table;
mod view;

use std::sync::Arc;

use plies_oci::ErrorKind;

pub(crate) use batch::{Catalogue, Urgency};
pub use key::{Key, KeyReader, PrefixOf};
pub(crate) use table::encode_row;
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
        /// The key in hex, or its text.
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
