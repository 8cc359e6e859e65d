use std::fmt;
use std::panic::Location;
use std::sync::{Arc, OnceLock};

use plies_oci::{BlobDigest, ErrorKind};
use plies_store::{Canceled, CatalogueError, DifferenceError, GcError, LayerError, SnapshotError, TransferError};

use crate::contenthash::ChecksumError;
use crate::{RecordId, RecordOptions};

/// Who took a ref, for whoever looks for a leak or wonders why a record is locked.
#[derive(Clone, PartialEq, Eq)]
pub struct Holder {
    label: Arc<str>,
    at: &'static Location<'static>,
}

impl Holder {
    pub(crate) fn of(options: &RecordOptions, at: &'static Location<'static>) -> Self {
        static NONE: OnceLock<Arc<str>> = OnceLock::new();
        let unnamed = || Arc::clone(NONE.get_or_init(|| Arc::from("")));
        Self { label: options.holder.clone().unwrap_or_else(unnamed), at }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.label.is_empty() {
            write!(f, "{}:{}", self.at.file(), self.at.line())
        } else {
            f.write_str(&self.label)
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Holder({:?} at {}:{})", &*self.label, self.at.file(), self.at.line())
    }
}

/// Why an operation of the build cache failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// No record has this ID.
    #[error("no record {wanted:?} (see `ply ref ls`)")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// Several records have an ID that begins so.
    #[error("{wanted:?} is short for {count} records, give more digits")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// How many records fit.
        count: usize,
    },
    /// Somebody has a ref that this does not go together with. Nothing waited.
    #[error("record {id} is locked by {holder}")]
    Locked {
        /// Which.
        id: RecordId,
        /// Who has it.
        holder: Holder,
    },
    /// Other records stand on it.
    #[error("record {id} is the parent of {child}{}: remove that first", if *count > 1 { format!(" and {} more", count - 1) } else { String::new() })]
    HasChildren {
        /// Which.
        id: RecordId,
        /// One of those that stand on it.
        child: RecordId,
        /// How many there are.
        count: usize,
    },
    /// The wrong kind of record.
    #[error("record {id} is not {wanted}")]
    WrongKind {
        /// Which.
        id: RecordId,
        /// What it should have been.
        wanted: &'static str,
    },
    /// Its parents are gone, or its files are.
    #[error("record {id} is damaged: {what}")]
    Damaged {
        /// Which.
        id: RecordId,
        /// In which way.
        what: String,
    },
    /// Blobs that are not here, and that nobody offered to fetch.
    #[error("{} blob{} must be fetched, and nobody said from where: {}", .0.len(), if .0.len() == 1 { "" } else { "s" },
        .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    NeedsProviders(Vec<BlobDigest>),
    /// A descriptor that does not say what its blob decompresses to.
    #[error("blob {digest} has no annotation containerd.io/uncompressed")]
    NoDiffId {
        /// The blob.
        digest: String,
    },
    /// A descriptor that says something else there.
    #[error("blob {digest}: {text:?} in annotation containerd.io/uncompressed is no digest")]
    BadDiffId {
        /// The blob.
        digest: String,
        /// What it says.
        text: String,
    },
    /// A parent whose layers have no digests yet.
    #[error("parent record {id} has no chain of blobs: export it first")]
    NotAddressable {
        /// Which.
        id: RecordId,
    },
    /// A diff from nothing.
    #[error("a diff needs a lower record")]
    NoLower,
    /// A blob that is no layer.
    #[error("blob {digest} has media type {media_type}, which is no layer")]
    NotALayer {
        /// The blob.
        digest: String,
        /// What it is.
        media_type: String,
    },
    /// A compression that is not written.
    #[error("layers are not written as {name} (use none, gzip or zstd)")]
    Unwritable {
        /// Its name.
        name: String,
    },
    /// What is at a path could not be digested.
    #[error(transparent)]
    Checksum(ChecksumError),
    /// A directory to stand for the empty tree.
    #[error("make an empty directory")]
    EmptyTree(#[source] std::io::Error),
    /// A filter that cannot be read.
    #[error("failed to parse {what} filters {filter:?}: at character {}: {why}", filter.get(..*at).map_or(0, |before| before.chars().count()) + 1)]
    Filter {
        /// Of which request.
        what: &'static str,
        /// As given.
        filter: String,
        /// Where in it, in bytes.
        at: usize,
        /// What is wrong.
        why: String,
    },
    /// Whoever was to fetch a blob failed.
    #[error("fetch blob {digest}")]
    Provider {
        /// The blob.
        digest: BlobDigest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The checker for shared records failed.
    #[error("ask whether records are shared")]
    Checker(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The file system would not say how full it is.
    #[error("ask how much space is free at {}", path.display())]
    FreeSpace {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The random source failed.
    #[error("draw a record's ID")]
    Random(#[source] std::io::Error),
    /// Somebody else's work that this one waited for failed.
    #[error(transparent)]
    Shared(Arc<CacheError>),
    /// Blobs and layers.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A difference of two trees.
    #[error("compare two trees")]
    Difference(#[from] DifferenceError),
    /// A tree.
    #[error("prepare, mount or seal a tree")]
    Snapshot(#[from] SnapshotError),
    /// A layer.
    #[error("read a layer")]
    Layer(#[from] LayerError),
    /// The records are gone, their bytes are not: the next collection tries again.
    #[error("free the bytes of what was removed")]
    Collect(#[from] GcError),
    /// The catalogue failed.
    #[error("read or change the build cache")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl CacheError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. }
            | Self::NoDiffId { .. }
            | Self::BadDiffId { .. }
            | Self::NotALayer { .. }
            | Self::Unwritable { .. }
            | Self::NoLower
            | Self::Filter { .. } => ErrorKind::InvalidInput,
            Self::Locked { .. } => ErrorKind::Busy,
            Self::HasChildren { .. } | Self::WrongKind { .. } | Self::NotAddressable { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::Checksum(source) => source.kind(),
            Self::EmptyTree(_)
            | Self::NeedsProviders(_)
            | Self::Provider { .. }
            | Self::Checker(_)
            | Self::FreeSpace { .. }
            | Self::Random(_) => ErrorKind::Unavailable,
            Self::Shared(source) => source.kind(),
            Self::Transfer(source) => source.kind(),
            Self::Difference(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Collect(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }

    /// Whether a record was asked for that is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether somebody has a ref in the way.
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Locked { .. })
    }

    pub(crate) fn gone_below(id: RecordId, parent: RecordId) -> Self {
        Self::Damaged { id, what: format!("record {parent}, which it stands on, is gone") }
    }

    pub(crate) fn no_record(id: RecordId) -> Self {
        Self::NotFound { wanted: id.to_string() }
    }
}
