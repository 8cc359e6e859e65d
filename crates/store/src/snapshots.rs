//! Snapshots, actives, mounts.
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use plies_archive::tar::EntryPath;
use plies_oci::ErrorKind;

use crate::catalogue::CatalogueError;
use crate::error::FileError;
use crate::layers::LayerError;
use crate::shim::Usage;
use crate::{ActiveId, LayerId, Lease, SnapshotId, Stamp, Store};

/// Why an operation on snapshots or actives failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not in the store.
    #[error("{what} is not in the store")]
    NotFound {
        /// A snapshot, layer or active.
        what: crate::Resource,
    },
    /// `layer` has a directory at `path` that its archive only implied, and what lies there below
    /// it is not a directory. Extract it again over the layers below, and publish it for its chain.
    #[error("layer {layer} implies a directory {path:?} over something else")]
    NeedsBase {
        /// Which layer.
        layer: LayerId,
        /// Where.
        path: EntryPath,
    },
    /// It is mounted, and can be mounted once, and sealed only when nothing can write to it.
    #[error("active {active} is mounted")]
    Mounted {
        /// Which.
        active: ActiveId,
    },
    /// It was volatile, and the process that wrote to it is gone.
    #[error("active {active} was volatile and did not survive its process")]
    Stale {
        /// Which.
        active: ActiveId,
    },
    /// Still in use at unmount. It was detached, and goes when its last user does.
    #[error("mount {} is in use", path.display())]
    Busy {
        /// Where it was attached.
        path: PathBuf,
    },
    /// A layer.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Rows.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl SnapshotError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::NeedsBase { .. } | Self::Stale { .. } => ErrorKind::FailedPrecondition,
            Self::Mounted { .. } | Self::Busy { .. } => ErrorKind::Busy,
            Self::Layer(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// How to prepare an active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ActiveOptions {
    /// Skip the syncs of whoever writes to it: it then does not survive this process, and becomes
    /// durable only by being sealed.
    pub volatile: bool,
}

/// Where a mount appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach<'a> {
    /// Nowhere: reachable through [`Mounted::root`] only, gone with it.
    Detached,
    /// On this directory.
    At(&'a Path),
    /// On a directory of the store's own: [`Mounted::path`] says which.
    InStore,
}

/// A snapshot as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Which.
    pub id: SnapshotId,
    /// Its layers, bottom first, without repetitions and without the fix-up.
    pub layers: Vec<LayerId>,
    /// The layer on top of them that restores directories' metadata, if one was needed.
    pub fixup: Option<LayerId>,
    /// When it was first asked for.
    pub created: Stamp,
}

/// An active as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveInfo {
    /// Which.
    pub id: ActiveId,
    /// What it stands on.
    pub base: Option<SnapshotId>,
    /// Whether it ends with this process.
    pub volatile: bool,
    /// When it was prepared.
    pub created: Stamp,
    /// What its upper cost when it was last measured.
    pub usage: Option<Usage>,
}

/// Snapshots and actives of a store.
#[derive(Debug, Clone, Copy)]
pub struct Snapshots<'a> {
    store: &'a Store,
}

impl<'a> Snapshots<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store }
    }

    /// The snapshot of these layers, bottom first, made if need be and held by `lease`.
    pub fn ensure(&self, layers: &[LayerId], lease: &Lease) -> Result<SnapshotId, SnapshotError> {
        let _ = (self.store, layers, lease);
        unimplemented!()
    }

    /// What the catalogue knows of it.
    pub fn info(&self, id: SnapshotId) -> Result<SnapshotInfo, SnapshotError> {
        let _ = id;
        unimplemented!()
    }

    /// Makes an upper directory on `base`, held by `lease`.
    pub fn prepare(
        &self,
        base: Option<SnapshotId>,
        lease: &Lease,
        options: ActiveOptions,
    ) -> Result<ActiveId, SnapshotError> {
        let _ = (base, lease, options);
        unimplemented!()
    }

    /// What the catalogue knows of it.
    pub fn active(&self, id: ActiveId) -> Result<ActiveInfo, SnapshotError> {
        let _ = id;
        unimplemented!()
    }

    /// Mounts an active for reading and writing. It lives until it is unmounted, lease or not.
    pub fn mount_active(&self, id: ActiveId, attach: Attach<'_>) -> Result<Mounted, SnapshotError> {
        let _ = (id, attach);
        unimplemented!()
    }

    /// Mounts a snapshot for reading.
    pub fn view(&self, id: SnapshotId, attach: Attach<'_>) -> Result<Mounted, SnapshotError> {
        let _ = (id, attach);
        unimplemented!()
    }

    /// Makes the upper directory a layer, held by `lease`; the active is gone.
    pub fn seal(&self, id: ActiveId, lease: &Lease) -> Result<LayerId, SnapshotError> {
        let _ = (id, lease);
        unimplemented!()
    }

    /// Walks the upper directory and writes down what it costs.
    pub fn measure(&self, id: ActiveId) -> Result<Usage, SnapshotError> {
        let _ = id;
        unimplemented!()
    }

    /// The upper directory, for whoever wants to know what was changed.
    pub fn upper(&self, id: ActiveId) -> Result<OwnedFd, SnapshotError> {
        let _ = id;
        unimplemented!()
    }
}

/// A mounted tree. [`Mounted::unmount`] or drop ends it.
#[derive(Debug)]
#[must_use = "a mount that is dropped is unmounted"]
pub struct Mounted {
    root: OwnedFd,
    path: Option<PathBuf>,
}

impl Mounted {
    /// Its root: resolve beneath this.
    pub fn root(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.root.as_fd()
    }

    /// Where it is attached, if anywhere.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Unmounts.
    ///
    /// # Errors
    /// [`SnapshotError::Busy`] if something still uses it.
    pub fn unmount(self) -> Result<(), SnapshotError> {
        unimplemented!()
    }
}
