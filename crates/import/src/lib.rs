//! Takes over what other programs keep: layers, blobs and records, into a store and its build cache.
//!
//! ```text
//! lib.rs                 what an import is asked and what it tells
//! take.rs                layers, blobs and mutable trees on their way: the part that all sources share
//! listing.rs             whether a tree is what a tar unpacks to
//! images.rs              layers, images, names and writable layers on their way, whatever source they come from
//! buildkit/              a BuildKit worker's state: v1 and v2
//! docker.rs              a Docker data root
//! containers_storage.rs  a storage of podman, buildah or CRI-O
//! containerd/            containerd's root directory; and its two databases, which BuildKit has too
//! ```
//!
//! # Invariants
//! - The source is only read. Hard links to its files are made, and only to those that nobody writes to any more.
//! - What cannot be read is told and left out; it hides nothing else.
//! - What came over has the same ID each time, so that a second import brings only what is new. A record appears with its
//!   layer in the store and its parents beside it, in one transaction for many: a kill at any point leaves whole records.

pub mod buildkit;
pub mod containerd;
pub mod containers_storage;
pub mod docker;
mod images;
mod listing;
mod take;

pub use images::Containers;

use std::path::PathBuf;

use plies_archive::Limits;
use plies_bolt::BoltError;
use plies_cache::{Accessor, CacheError};
use plies_image::{ImageError, LayerStoreError};
use plies_oci::{DocumentLimits, ErrorKind};
use plies_store::progress::Progress;
use plies_store::{Cancel, Canceled, CatalogueError, LayerError, NotLinked, SnapshotError, Store, TransferError};
use serde::Serialize;

/// How to import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImportOptions {
    /// Say what would come over, and do nothing.
    pub dry_run: bool,
    /// Copy files instead of linking to them; needed where the source is on another file system.
    pub copy: bool,
    /// Read all files that come over, and hold them against the digests that their layers have. Otherwise the source is believed
    /// where names, kinds, lengths, modes, owners and times of all files are what its tar lists.
    pub verify: bool,
}

/// What an import works with.
#[derive(Clone, Copy)]
pub struct Import<'a> {
    /// Where to.
    pub store: &'a Store,
    /// Its build cache.
    pub cache: &'a Accessor,
    /// What archives may ask for.
    pub limits: &'a Limits,
    /// What documents may.
    pub documents: &'a DocumentLimits,
    /// How.
    pub options: ImportOptions,
    /// Told what happens.
    pub progress: &'a dyn Progress,
    /// Asked whether to go on.
    pub cancel: &'a Cancel,
    /// Where files are counted that no hard link can be made to.
    pub not_linked: &'a NotLinked,
}

impl std::fmt::Debug for Import<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Import").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Why an import came to nothing, or stopped where it was. What had come over by then stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// It is no state that is known.
    #[error("{} is no {wanted}", path.display())]
    NotOne {
        /// What was given.
        path: PathBuf,
        /// What it should be.
        wanted: &'static str,
    },
    /// Hard links do not lead from one file system to another.
    #[error("{} is on another file system than the store: give --copy, and its files are copied", path.display())]
    OtherFileSystem {
        /// The source.
        path: PathBuf,
    },
    /// A database of the source.
    #[error(transparent)]
    Bolt(#[from] BoltError),
    /// A file of the source.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The build cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The store's layers.
    #[error("keep layers")]
    Layer(#[from] LayerError),
    /// The store's stacks.
    #[error("stack layers")]
    Snapshot(#[from] SnapshotError),
    /// The image store.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The layer store.
    #[error(transparent)]
    LayerStore(#[from] LayerStoreError),
    /// The store's blobs.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl ImportError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotOne { .. } => ErrorKind::InvalidInput,
            Self::OtherFileSystem { .. } => ErrorKind::FailedPrecondition,
            Self::Bolt(source) => source.kind(),
            Self::Io { .. } => ErrorKind::Unavailable,
            Self::Cache(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Image(source) => source.kind(),
            Self::LayerStore(source) => source.kind(),
            Self::Transfer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// What became of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It came over, or would.
    Taken,
    /// It was here already.
    Here,
    /// It is of no use here.
    Left,
    /// It cannot be read, or stands on what can't be.
    Failed,
}

/// A thing of the source, and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct ImportedItem {
    /// What kind of thing it is: `record`, `database`, `layer`, `image`, `name`, `container`, `snapshot`, `blob`.
    pub kind: &'static str,
    /// Its name there.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// What became of it.
    pub outcome: Outcome,
    /// Its name here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Bytes on disk of the files that it adds.
    pub size_bytes: u64,
    /// Why it was left or failed, or what did not come with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What an import did, or would do.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ImportReport {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The directories that were read.
    pub sources: Vec<PathBuf>,
    /// All that was found, in the source's order.
    pub items: Vec<ImportedItem>,
    /// Bytes on disk of the layers and trees that came over.
    pub layer_bytes: u64,
    /// Layers and trees that came over.
    pub layers_count: usize,
    /// Bytes of the blobs that came over.
    pub blob_bytes: u64,
    /// Blobs that came over.
    pub blobs_count: usize,
    /// Results of steps that builds will find.
    pub keys_count: usize,
    /// Files that were to be linked and were copied: they take space of their own.
    pub files_not_linked_count: u64,
}

impl ImportReport {
    /// How many things ended so.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.items.iter().filter(|item| item.outcome == outcome).count()
    }

    pub(crate) fn problem(&mut self, kind: &'static str, name: impl Into<String>, why: impl Into<String>) {
        let (name, why, description) = (name.into(), Some(why.into()), String::new());
        self.items.push(ImportedItem {
            kind,
            name,
            description,
            outcome: Outcome::Failed,
            id: None,
            size_bytes: 0,
            why,
        });
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
