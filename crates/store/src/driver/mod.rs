//! Drivers: how layers' bytes are mounted, and nothing else.
//!
//! `overlay` and `native` keep a layer as a plain directory with overlay's marks. `overlay` mounts them; `native`
//! copies them together, works wherever files do, and is what the others are tested against. `erofs` is `overlay` over
//! layers that are kept packed where they came as tars. Each serves layers of both kinds: which driver made them does not
//! matter.

mod native;
mod overlay;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use plies_archive::{Change, Sealed};

use crate::error::FileError;
use crate::snapshots::{MountOptions, SnapshotError};
use crate::{LayerId, packed};

pub(crate) use native::{Compare, NOTHING_IS_CERTAIN, Native};
pub use overlay::OverlayMethod;
pub(crate) use overlay::{Overlay, Packs};

/// Which driver serves snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DriverKind {
    /// For a new store [`Self::Erofs`] where that works; else as the store was made. Without the right to mount, copies.
    #[default]
    Auto,
    /// Overlay mounts; needs the right to mount. Finds out how the kernel takes the layers.
    Overlay,
    /// Overlay mounts made in one certain way.
    OverlayBy(OverlayMethod),
    /// Overlay mounts too; layers that come as tars are kept as tars, with an index that the kernel mounts.
    Erofs,
    /// Copies.
    Native,
}

/// A layer as a driver needs it.
#[derive(Debug, Clone)]
pub(crate) struct Lower {
    pub(crate) id: LayerId,
    /// `layers/<id>`.
    pub(crate) dir: PathBuf,
}

impl Lower {
    /// The root of its tree, however it is kept.
    pub(crate) fn open(&self) -> Result<OwnedFd, FileError> {
        packed::open_tree(&self.dir)
    }
}

/// An upper's directories, below `active/<id>`.
#[derive(Debug, Clone)]
pub(crate) struct Upper {
    pub(crate) dir: PathBuf,
    pub(crate) volatile: bool,
}

impl Upper {
    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.join("fs")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.dir.join("work")
    }
}

/// A tree to hand out.
#[derive(Debug)]
pub(crate) struct Tree {
    /// Its root, readable.
    pub(crate) root: OwnedFd,
    pub(crate) form: Form,
}

/// What has to be done to show a tree somewhere, and to end it.
#[derive(Debug)]
pub(crate) enum Form {
    /// A mount that is attached nowhere; closing the handle ends it.
    Detached(OwnedFd),
    /// A mount that had to be attached to the scratch directory.
    Attached,
    /// A directory, of which the scratch directory is the last name if it is true.
    Directory {
        /// Where.
        path: PathBuf,
        /// Whether it was made for this one use.
        scratch: bool,
    },
}

/// How stacks become trees. `lowers` come bottom first; `scratch` is a path of the store's own that
/// does not exist yet and that the driver may make a directory at.
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// For people: which driver it is, and how it works here.
    fn describe(&self) -> &'static str;

    /// Whether a tree to read is a copy, made for one use and gone with this process, rather than a mount.
    fn views_are_copies(&self) -> bool {
        false
    }

    /// Whether layers that come as tars are kept packed ([`crate::packed`]). Those that are kept otherwise are served as well.
    fn packs(&self) -> bool {
        false
    }

    /// The deepest stack one tree can be made of; the store squashes deeper ones.
    fn max_lowers(&self) -> usize;

    /// Fills the empty directories of a new upper.
    fn prepare(&self, lowers: &[Lower], upper: &Upper) -> Result<(), SnapshotError>;

    /// A tree to read.
    fn view(&self, lowers: &[Lower], scratch: &Path) -> Result<Tree, SnapshotError>;

    /// A tree to write; what is written lands in `upper`.
    fn mount(
        &self,
        lowers: &[Lower],
        upper: &Upper,
        options: MountOptions<'_>,
        scratch: &Path,
    ) -> Result<Tree, SnapshotError>;

    /// What was written to `upper`, path by path. It may be mounted meanwhile.
    fn changes(&self, lowers: &[Lower], upper: &Upper, scratch: &Path) -> Result<Vec<Change>, SnapshotError>;

    /// Makes what was written a canonical layer at `target`, which does not exist yet. Until it
    /// returns, either `upper` or `target` is whole.
    fn seal(&self, lowers: &[Lower], upper: &Upper, target: &Path, scratch: &Path) -> Result<Sealed, SnapshotError>;
}
