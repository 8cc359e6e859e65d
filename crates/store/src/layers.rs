//! Layers: immutable filesystem differences, a directory each.
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};

use plies_archive::tar::EntryPath;
use plies_oci::{ChainId, DiffId, ErrorKind};

use crate::catalogue::CatalogueError;
use crate::error::FileError;
use crate::shim::{DirIndex, Usage};
use crate::{LayerId, Lease, Stamp, Store};

/// Why an operation on layers failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// Not in the store.
    #[error("layer {layer} is not in the store")]
    NotFound {
        /// Which.
        layer: LayerId,
    },
    /// In the catalogue, but what is on disk is not what was published.
    #[error("layer {layer} is damaged: {what}")]
    Damaged {
        /// Which.
        layer: LayerId,
        /// In which way.
        what: &'static str,
    },
    /// It has a diff ID, and this is another.
    #[error("layer {layer} has diff id {has}, not {given}")]
    OtherDiffId {
        /// Which.
        layer: LayerId,
        /// Its diff ID.
        has: DiffId,
        /// The one to be set.
        given: DiffId,
    },
    /// Its files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its row.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl LayerError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::OtherDiffId { .. } => ErrorKind::FailedPrecondition,
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// What is known of a layer when it is finished.
#[derive(Debug, Clone, Default)]
pub struct LayerContents {
    /// Digest of its tar, if it came from one.
    pub diff_id: Option<DiffId>,
    /// `Some` if it is not self-contained (a hard link into a lower layer, a directory over a
    /// lower symlink): the chain that it completes, and below which alone it may be used.
    pub chain_id: Option<ChainId>,
    /// What it costs on disk.
    pub usage: Usage,
    /// Which of its directories are implied.
    pub index: DirIndex,
}

/// A layer as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// Which.
    pub id: LayerId,
    /// Digest of its tar; `None` until known.
    pub diff_id: Option<DiffId>,
    /// `Some` if it is only good in this chain.
    pub chain_id: Option<ChainId>,
    /// What it costs on disk.
    pub usage: Usage,
    /// When it was published.
    pub created: Stamp,
    /// Whether its tar can be put together again byte by byte.
    pub has_tar_split: bool,
    /// Made by the store (a fix-up or a squash): no difference of anybody's, never exported.
    pub derived: bool,
}

/// Layers of a store.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    store: &'a Store,
}

impl<'a> Layers<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store }
    }

    /// A directory nobody sees, to make a layer in.
    pub fn stage(&self) -> Result<Stage, LayerError> {
        unimplemented!()
    }

    /// Makes finished stages layers, held by `lease`: one sync for all, one transaction. A stage
    /// whose diff ID (or chain ID) is there already yields that layer, and goes.
    pub fn publish(&self, lease: &Lease, finished: Vec<FinishedStage>) -> Result<Vec<LayerId>, LayerError> {
        let _ = (self.store, lease, finished);
        unimplemented!()
    }

    /// Finds the self-contained layer with this diff ID and holds it, in one step.
    pub fn hold_by_diff_id(&self, diff_id: DiffId, lease: &Lease) -> Result<Option<LayerId>, LayerError> {
        let _ = (diff_id, lease);
        unimplemented!()
    }

    /// Finds the layer that completes this chain, if one was made only for it, and holds it.
    pub fn hold_by_chain(&self, chain_id: ChainId, lease: &Lease) -> Result<Option<LayerId>, LayerError> {
        let _ = (chain_id, lease);
        unimplemented!()
    }

    /// What the catalogue knows of it.
    pub fn info(&self, id: LayerId) -> Result<LayerInfo, LayerError> {
        let _ = id;
        unimplemented!()
    }

    /// Which of its directories are implied.
    pub fn index(&self, id: LayerId) -> Result<DirIndex, LayerError> {
        let _ = id;
        unimplemented!()
    }

    /// Its tree, for reading.
    pub fn root(&self, id: LayerId) -> Result<OwnedFd, LayerError> {
        let _ = id;
        unimplemented!()
    }

    /// Its tar-split, if it has one.
    pub fn tar_split(&self, id: LayerId) -> Result<Option<File>, LayerError> {
        let _ = id;
        unimplemented!()
    }

    /// Gives a sealed layer its diff ID, once somebody has made its tar.
    pub fn set_diff_id(&self, id: LayerId, diff_id: DiffId) -> Result<(), LayerError> {
        let _ = (id, diff_id);
        unimplemented!()
    }
}

/// A layer being made. Dropping it removes it.
#[derive(Debug)]
#[must_use = "a stage that is dropped is removed"]
pub struct Stage {
    id: LayerId,
}

impl Stage {
    /// The id it will have, unless the same layer turns out to be there already.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The empty directory to fill (0755, owned by this process's user).
    pub fn root(&self) -> BorrowedFd<'_> {
        unimplemented!()
    }

    /// A file for the gzipped tar-split of what is unpacked; making it says that there is one.
    pub fn tar_split_file(&mut self) -> Result<File, LayerError> {
        unimplemented!()
    }

    /// Nothing more will be written.
    pub fn finish(self, contents: LayerContents) -> FinishedStage {
        FinishedStage { stage: self, contents }
    }
}

/// A stage with what is known of it. Dropping it removes it.
#[derive(Debug)]
#[must_use = "a stage that is dropped is removed"]
pub struct FinishedStage {
    #[allow(dead_code)]
    stage: Stage,
    #[allow(dead_code)]
    contents: LayerContents,
}

#[allow(unused)]
fn unused(_: EntryPath) {}
