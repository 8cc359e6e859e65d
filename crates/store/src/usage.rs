//! Disk usage: sums that are kept as rows come and go, never a walk of trees.

use std::fs;
use std::ops::ControlFlow;

use plies_oci::{DiffId, ErrorKind};

use crate::catalogue::schema::{ACTIVES, BLOBS, Kind, LAYERS, TOTALS};
use crate::catalogue::{CatalogueError, Rows};
use crate::error::{At as _, FileError};
use crate::{Resource, Store};

/// A kind of thing that takes space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsageKind {
    /// Published blobs.
    Blobs,
    /// Published layers.
    Layers,
    /// Upper directories, as last measured.
    Actives,
    /// Writes not yet visible.
    Ingests,
    /// What was collected but could not be unlinked yet.
    Trash,
    /// The database file.
    Catalogue,
}

/// What all things of one kind cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsageRow {
    /// Of which kind.
    pub kind: UsageKind,
    /// How many there are.
    pub count: u64,
    /// Their bytes.
    pub size_bytes: u64,
    /// Their inodes.
    pub inodes: u64,
}

/// Why usage could not be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// The ingests, or the database file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The sums.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl UsageError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// What one blob, layer or upper costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeRow {
    /// Which.
    pub resource: Resource,
    /// Its bytes; those of an upper as last measured.
    pub size_bytes: u64,
    /// Of a layer: the digest of its tar, if that is known.
    pub diff_id: Option<DiffId>,
}

/// Calls `visit` for every blob, then for every layer, then for every upper that was not sealed, each in the order of
/// their IDs. Rows that are damaged are left out, and hide no other.
///
/// # Errors
/// [`CatalogueError`].
pub fn scan_sizes(rows: &impl Rows, mut visit: impl FnMut(SizeRow)) -> Result<(), CatalogueError> {
    rows.scan_each(&BLOBS, |id, row| {
        if let (Some(id), Ok(row)) = (id, row) {
            visit(SizeRow { resource: id.into(), size_bytes: row.size_bytes, diff_id: None });
        }
        ControlFlow::Continue(())
    })?;
    rows.scan_each(&LAYERS, |id, row| {
        if let (Some(id), Ok(row)) = (id, row) {
            visit(SizeRow { resource: id.into(), size_bytes: row.usage.size_bytes, diff_id: row.diff_id });
        }
        ControlFlow::Continue(())
    })?;
    rows.scan_each(&ACTIVES, |id, row| {
        if let (Some(id), Ok(row)) = (id, row)
            && row.sealed.is_none()
        {
            visit(SizeRow { resource: id.into(), size_bytes: row.total().size_bytes, diff_id: None });
        }
        ControlFlow::Continue(())
    })
}

pub(crate) fn usage(store: &Store) -> Result<Vec<UsageRow>, UsageError> {
    let mut rows = store.read(|tx| {
        let row = |kind, counted| {
            let total = tx.get(&TOTALS, &counted)?.unwrap_or_default();
            Ok::<_, CatalogueError>(UsageRow {
                kind,
                count: total.count,
                size_bytes: total.size_bytes,
                inodes: total.inodes,
            })
        };
        Ok::<_, CatalogueError>(vec![
            row(UsageKind::Blobs, Kind::Blobs)?,
            row(UsageKind::Layers, Kind::Layers)?,
            row(UsageKind::Actives, Kind::Actives)?,
            row(UsageKind::Trash, Kind::Trash)?,
        ])
    })?;
    // Ingests have no rows: there are few, and each changes with every write to it.
    let ingests = store.content().ingests()?;
    rows.push(UsageRow {
        kind: UsageKind::Ingests,
        count: ingests.len() as u64,
        size_bytes: ingests.iter().map(|ingest| ingest.offset_bytes).sum(),
        // A directory and two files each.
        inodes: 3 * ingests.len() as u64,
    });
    let database = store.inner.paths.database();
    let size_bytes = fs::metadata(&database).at("stat", &database)?.len();
    rows.push(UsageRow { kind: UsageKind::Catalogue, count: 1, size_bytes, inodes: 1 });
    rows.sort_unstable_by_key(|row| row.kind);
    Ok(rows)
}
