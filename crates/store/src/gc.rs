//! Garbage collection.
use crate::{CatalogueError, FileError, Resource};
use plies_oci::ErrorKind;

/// Whether to do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcMode {
    /// Only say what would go.
    DryRun,
    /// Collect.
    Run,
}

/// Something that went, or would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// What.
    pub resource: Resource,
    /// Its bytes on disk.
    pub size_bytes: u64,
}

/// What a collection did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// What nothing held.
    pub collected: Vec<Collected>,
    /// Leases that had expired.
    pub leases: Vec<crate::LeaseId>,
    /// Ingests that nobody had written to for too long.
    pub ingests: Vec<crate::IngestStatus>,
    /// What is held, by count.
    pub kept_count: u64,
    /// The bytes of all that went.
    pub freed_bytes: u64,
}

/// Why a collection failed. What it did until then is done; running it again goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GcError {
    /// Removing bytes.
    #[error(transparent)]
    File(#[from] FileError),
    /// Rows.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl GcError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}
