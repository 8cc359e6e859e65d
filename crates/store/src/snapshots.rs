//! Snapshots (lists of layers), actives (a snapshot and a writable upper) and their mounts.
//!
//! ```text
//! active/<id>/fs      what was written
//! active/<id>/work    overlay's scratch directory
//! mounts/<id>         mount points handed out by the store
//! ```
//!
//! **Active**: prepared -> mounted and unmounted any number of times -> sealed, which makes its
//! upper a layer without copying it. A volatile one lives as long as this process: a crash leaves
//! a directory that the next open removes. A persistent one survives; while it is being sealed a
//! row says into which layer, so that a crash in between finds it again.
//!
//! A mount holds what it shows by a lease of its own, so that no collection takes it away.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use plies_archive::tar::EntryPath;
use plies_archive::{Change, DirIndex, Implied, SealError, Usage};
use plies_oci::{BlobDigest, ChainId, DiffId, ErrorKind, Sha256Hasher};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree};

use crate::catalogue::schema::{ACTIVES, ActiveRow, LAYERS, LayerKind, SEALING, SNAPSHOTS, SnapshotRow, StoredUsage};
use crate::catalogue::{CatalogueError, Rows as _};
use crate::driver::{Form, Lower, Tree, Upper};
use crate::error::{At as _, FileError};
use crate::fixup::{self, StackLayer};
use crate::idmap::IdMaps;
use crate::layers::{self, LayerContents, LayerError, Stage};
use crate::open::make_dir;
use crate::recover::{self, RecoverError};
use crate::stack::Merged;
use crate::tree::{self, Material, MergeLayer};
use crate::{ActiveId, Indexes, LayerId, Lease, LeaseOptions, Resource, SnapshotId, Stamp, Store, Tx, packed};

/// Packed layers of a stack that stay mounted while it is judged: a descriptor each, of the usual 1,024. The layers of
/// deeper stacks are mounted for each look.
const TREES_HELD_MAX: usize = 256;

/// Why an operation on snapshots or actives failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not in the store.
    #[error("{what} is not in the store")]
    NotFound {
        /// A snapshot, layer or active.
        what: Resource,
    },
    /// A layer has a directory that its archive only implied, and what lies there below it is not a
    /// directory: the files would go elsewhere. Extract the layer again over the merged layers
    /// below it, and publish it for its chain.
    #[error("layer {layer} implies a directory {path} where the layers below have something else")]
    NeedsBase {
        /// The lowest such layer.
        layer: LayerId,
        /// The directory.
        path: EntryPath,
    },
    /// It is mounted (or being sealed): it can be mounted once, and sealed when nobody can write.
    #[error("active {active} is in use")]
    InUse {
        /// Which.
        active: ActiveId,
    },
    /// It was volatile, and the process that wrote to it is gone: nothing says that its files are
    /// whole.
    #[error("active {active} was volatile and did not survive its process")]
    Stale {
        /// Which.
        active: ActiveId,
    },
    /// It was sealed.
    #[error("active {active} was sealed as layer {layer}")]
    Sealed {
        /// Which.
        active: ActiveId,
        /// What it became.
        layer: LayerId,
    },
    /// The kernel refused a mount.
    #[error("mount{}{words}", if words.is_empty() { "" } else { ": " })]
    Mount {
        /// The kernel's own words, if it had any.
        words: String,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Something still used it when it was to be unmounted. It no longer shows anywhere, and ends
    /// when its last user does.
    #[error("mount {} was still in use", path.display())]
    MountBusy {
        /// Where it was attached.
        path: PathBuf,
    },
    /// The upper cannot become a layer.
    #[error(transparent)]
    Seal(#[from] SealError),
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

impl From<RecoverError> for SnapshotError {
    fn from(error: RecoverError) -> Self {
        match error {
            RecoverError::File(error) => Self::File(error),
            RecoverError::Catalogue(error) => Self::Catalogue(error),
        }
    }
}

impl From<tree::MergeError> for SnapshotError {
    fn from(tree::MergeError(error): tree::MergeError) -> Self {
        Self::File(FileError::new("merge", "the layers", error))
    }
}

impl SnapshotError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::NeedsBase { .. } | Self::Stale { .. } | Self::Sealed { .. } => ErrorKind::FailedPrecondition,
            Self::InUse { .. } | Self::MountBusy { .. } => ErrorKind::Busy,
            Self::Mount { .. } => ErrorKind::Unavailable,
            Self::Seal(error) => error.kind(),
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

/// How the mount of an active looks.
#[derive(Debug, Clone, Copy, Default)]
pub struct MountOptions<'a> {
    /// One security label for all that it shows: SELinux's `context=`. A kernel that knows no labels refuses one.
    pub label: Option<&'a str>,
    /// Show files as somebody else's. What is written through the mount is stored as if nothing was mapped. Nobody but the
    /// owners that show can write: to others, root among them, it says `EOVERFLOW`. Needs Linux 5.19 and a file system
    /// whose mounts can be mapped; the native driver can't.
    pub ids: Option<&'a IdMaps>,
}

/// Where a mount appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach<'a> {
    /// Nowhere: reachable through [`Mounted::root`] only, gone with it. (Where the driver or the
    /// kernel cannot do this, as [`Attach::InStore`].)
    Detached,
    /// On this directory, which must exist.
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
    /// The layer on top of them that restores directories' metadata, if one was needed. Not part of
    /// what is exported.
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
    /// What it was sealed as, if it was.
    pub sealed: Option<LayerId>,
    /// Whether somebody may have written to it since it was measured.
    pub changed: bool,
}

impl ActiveInfo {
    fn new(id: ActiveId, row: ActiveRow) -> Self {
        let ActiveRow { base, volatile, created, usage, sealed, changed } = row;
        Self { id, base, volatile, created, usage: usage.map(Into::into), sealed, changed }
    }
}

/// Snapshots and actives of a store.
#[derive(Debug, Clone, Copy)]
pub struct Snapshots<'a> {
    store: &'a Store,
}

/// Repeated layers keep their uppermost place: below it they show nothing that it does not.
pub(crate) fn without_repetitions(layers: &[LayerId]) -> Vec<LayerId> {
    let mut seen = std::collections::HashSet::new();
    let mut kept: Vec<LayerId> = layers.iter().rev().copied().filter(|layer| seen.insert(*layer)).collect();
    kept.reverse();
    kept
}

fn list_digest(layers: &[LayerId]) -> BlobDigest {
    let mut hasher = Sha256Hasher::default();
    for layer in layers {
        hasher.update(layer.as_bytes());
    }
    BlobDigest::from_bytes(hasher.finish())
}

/// The first half of the list's digest. Two lists with the same half take 2^64 tries of somebody who
/// chooses layer ids, which nobody outside does.
pub(crate) fn snapshot_id(layers: &[LayerId]) -> SnapshotId {
    let digest = list_digest(layers);
    SnapshotId::from_bytes(*digest.as_bytes().first_chunk().expect("because 16 is less than 32"))
}

impl<'a> Snapshots<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store }
    }

    /// The snapshot of these layers (bottom first), held by `lease`. The same list always gives the
    /// same snapshot; of a layer that is repeated, the uppermost counts. The first time, the
    /// directories that some layer only implies are compared, and a fix-up layer is made if one of
    /// them would look wrong. The caller must hold the layers meanwhile.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; [`SnapshotError::NeedsBase`].
    pub fn ensure(&self, layers: &[LayerId], lease: &Lease) -> Result<SnapshotId, SnapshotError> {
        let list = without_repetitions(layers);
        let id = snapshot_id(&list);
        if lease.hold_if_present(id)? {
            return Ok(id);
        }
        let found: Result<(), SnapshotError> = self.store.read(|tx| {
            list.iter().try_for_each(|layer| match tx.contains(&LAYERS, layer)? {
                true => Ok(()),
                false => Err(SnapshotError::NotFound { what: (*layer).into() }),
            })
        });
        found?;
        match self.fix_up_of(&list)? {
            Some(stage) => {
                layers::publish::<SnapshotError>(self.store, vec![stage], LayerKind::FixUp, |tx, made| {
                    put_snapshot(tx, id, &list, made.first().copied())?;
                    tx.lease_hold(lease.id(), id)
                })?;
            }
            // As durable as what holds it: whoever refers to it in a durable transaction makes it durable as well.
            None => lease.write(|tx| {
                put_snapshot(tx, id, &list, None)?;
                tx.lease_hold(lease.id(), id)
            })?,
        }
        Ok(id)
    }

    /// The fix-up layer of a list, if it needs one, as a stage.
    pub(crate) fn fix_up_of(&self, list: &[LayerId]) -> Result<Option<layers::FinishedStage>, SnapshotError> {
        let index = |id: &LayerId| Ok((*id, layers::read_index(self.store, *id)?));
        let stack = list.iter().map(index).collect::<Result<Vec<(LayerId, DirIndex)>, SnapshotError>>()?;
        if stack.iter().all(|(_, index)| index.implied().len() == 0) {
            return Ok(None);
        }
        let may_hold = stack.len() <= TREES_HELD_MAX;
        let layer = |(id, index)| {
            let dir = layers::layer_dir(self.store, id);
            let mounted = if may_hold && packed::is_packed(&dir)? { Some(packed::open_tree(&dir)?) } else { None };
            Ok(StackLayer { id, dir, mounted, index })
        };
        let stack = stack.into_iter().map(layer).collect::<Result<Vec<_>, SnapshotError>>()?;
        let fix = fixup::judge(&stack)?;
        if fix.is_empty() {
            return Ok(None);
        }
        let stage = Stage::new(self.store)?;
        fixup::build(&fix, stage.root()).at("make directories", stage.tree())?;
        let usage = tree::measure(stage.root()).at("measure", stage.tree())?;
        Ok(Some(stage.finish(LayerContents { usage, ..LayerContents::default() })))
    }

    /// The ID that the snapshot of these layers has, whether or not it is here.
    pub fn id_of(layers: &[LayerId]) -> SnapshotId {
        snapshot_id(&without_repetitions(layers))
    }

    /// What the catalogue knows of it.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`].
    pub fn info(&self, id: SnapshotId) -> Result<SnapshotInfo, SnapshotError> {
        let SnapshotRow { layers, fixup, created } = self.snapshot_row(id)?;
        Ok(SnapshotInfo { id, layers, fixup, created })
    }

    /// Makes an empty upper directory on `base`, held by `lease`. A persistent one is durable when
    /// this returns.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`] if there is no such base.
    pub fn prepare(
        &self,
        base: Option<SnapshotId>,
        lease: &Lease,
        options: ActiveOptions,
    ) -> Result<ActiveId, SnapshotError> {
        self.prepare_with(base, options, |tx, id| tx.lease_hold(lease.id(), id))
    }

    /// As [`Snapshots::prepare`], held by whatever `also` has hold it, in the transaction in which the active appears. The
    /// caller holds the base meanwhile.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`], and what `also` returns; then nothing has happened.
    pub fn prepare_with(
        &self,
        base: Option<SnapshotId>,
        options: ActiveOptions,
        mut also: impl FnMut(&mut Tx<'_>, ActiveId) -> Result<(), CatalogueError>,
    ) -> Result<ActiveId, SnapshotError> {
        let lowers = self.lowers(base)?;
        let id = ActiveId::from_bytes(self.store.inner.fresh_id()?);
        let upper = self.upper_of(id, options.volatile);
        let ActiveOptions { volatile } = options;
        // The directory of one that ends with this process is made when somebody looks: many are not even mounted, and
        // three directories that come and go cost more than all else about it.
        let made = if volatile { Ok(()) } else { self.make_upper(&lowers, &upper) };
        let made = made.and_then(|()| {
            if !volatile {
                let dir = tree::open_own(&upper.dir)?;
                rustix::fs::syncfs(dir).at("sync", &upper.dir)?;
            }
            let put = |tx: &mut Tx<'_>| {
                let row = ActiveRow { base, volatile, created: tx.now(), usage: None, sealed: None, changed: true };
                tx.put_active(id, &row)?;
                if let Some(base) = base {
                    tx.add_edge(id, base)?;
                }
                also(tx, id)
            };
            let written = if volatile { self.store.write_lazily(put) } else { self.store.write(put) };
            written.map_err(SnapshotError::from)
        });
        if let Err(error) = made {
            match error {
                // It may have been committed after all: the next open knows.
                SnapshotError::Catalogue(CatalogueError::Database { .. }) => self.store.inner.leave_unclean(),
                _ if volatile => {}
                _ => self.store.inner.discard_dir(&upper.dir),
            }
            return Err(error);
        }
        Ok(id)
    }

    /// Makes an upper's directory, or nothing.
    fn make_upper(&self, lowers: &[Lower], upper: &Upper) -> Result<(), SnapshotError> {
        make_dir(&upper.dir)?;
        let made = self.store.inner.driver.prepare(lowers, upper);
        if made.is_err() {
            self.store.inner.discard_dir(&upper.dir);
        }
        made
    }

    /// The upper of an active that the caller has claimed, with its directory, which may not have been needed until now.
    fn claimed_upper(&self, id: ActiveId, row: &ActiveRow, lowers: &[Lower]) -> Result<Upper, SnapshotError> {
        let upper = self.upper_of(id, row.volatile);
        if row.volatile && !self.is_made(&upper)? {
            self.make_upper(lowers, &upper)?;
        }
        Ok(upper)
    }

    fn is_made(&self, upper: &Upper) -> Result<bool, FileError> {
        upper.tree().try_exists().at("stat", upper.tree())
    }

    /// What the catalogue knows of it.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`].
    pub fn active(&self, id: ActiveId) -> Result<ActiveInfo, SnapshotError> {
        let row: Option<ActiveRow> = self.store.read(|tx| tx.get(&ACTIVES, &id))?;
        Ok(ActiveInfo::new(id, row.ok_or(SnapshotError::NotFound { what: id.into() })?))
    }

    /// Whether an active can still be mounted or sealed, as far as the catalogue knows.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::Stale`], [`SnapshotError::Sealed`].
    pub fn check_usable(&self, id: ActiveId) -> Result<(), SnapshotError> {
        self.usable(id).map(drop)
    }

    /// Volatile actives of earlier sessions: nobody can use them any more.
    ///
    /// # Errors
    /// [`SnapshotError::Catalogue`].
    pub fn stale_actives(&self) -> Result<Vec<ActiveId>, SnapshotError> {
        let rows: Vec<(ActiveId, ActiveRow)> = self.store.read(|tx| tx.readable(&ACTIVES))?;
        let is_stale = |id: ActiveId, row: &ActiveRow| {
            row.volatile && row.sealed.is_none() && !self.store.inner.is_of_this_session(*id.as_bytes())
        };
        Ok(rows.into_iter().filter(|(id, row)| is_stale(*id, row)).map(|(id, _)| id).collect())
    }

    /// Calls `visit` for every active, in the order of their ids, until it breaks.
    ///
    /// # Errors
    /// [`SnapshotError::Catalogue`].
    pub fn scan_actives(&self, mut visit: impl FnMut(ActiveInfo) -> ControlFlow<()>) -> Result<(), SnapshotError> {
        Ok(self.store.read(|tx| tx.scan(&ACTIVES, |id, row| visit(ActiveInfo::new(id, row))))?)
    }

    /// Mounts an active for reading and writing; once at a time, since two overlays on one upper
    /// corrupt it. The mount holds the active.
    ///
    /// # Errors
    /// [`SnapshotError::InUse`], [`SnapshotError::Stale`], [`SnapshotError::Sealed`],
    /// [`SnapshotError::Mount`].
    pub fn mount_active(&self, id: ActiveId, attach: Attach<'_>) -> Result<Mounted, SnapshotError> {
        self.mount_active_with(id, MountOptions::default(), attach)
    }

    /// As [`Snapshots::mount_active`], with a label or other owners.
    ///
    /// # Errors
    /// As [`Snapshots::mount_active`].
    pub fn mount_active_with(
        &self,
        id: ActiveId,
        options: MountOptions<'_>,
        attach: Attach<'_>,
    ) -> Result<Mounted, SnapshotError> {
        let claim = Claim::take(self.store, id)?;
        let hold = Hold::take(self.store, id.into())?;
        let row = self.usable(id)?;
        if !row.changed {
            self.store.write_lazily(|tx| tx.mark_changed(id))?;
        }
        let lowers = self.lowers(row.base)?;
        let scratch = self.scratch()?;
        let upper = self.claimed_upper(id, &row, &lowers)?;
        let tree = self.store.inner.driver.mount(&lowers, &upper, options, &scratch)?;
        Mounted::attach(self.store, tree, attach, scratch, hold, Some(claim))
    }

    /// Mounts a snapshot for reading. The mount holds the snapshot.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::Mount`].
    pub fn view(&self, id: SnapshotId, attach: Attach<'_>) -> Result<Mounted, SnapshotError> {
        let hold = Hold::take(self.store, id.into())?;
        let lowers = self.lowers(Some(id))?;
        let scratch = self.scratch()?;
        let tree = self.store.inner.driver.view(&lowers, &scratch)?;
        Mounted::attach(self.store, tree, attach, scratch, hold, None)
    }

    /// Whether what [`Snapshots::view`] shows can be left behind with [`Mounted::keep`]. With the native driver it
    /// cannot, since it is a copy that belongs to this process; an active can.
    pub fn views_can_be_kept(&self) -> bool {
        !self.store.inner.driver.views_are_copies()
    }

    /// Makes what was written to an active a layer, held by `lease` and durable when this returns.
    /// The active can no longer be used, and goes when nothing holds it any more.
    ///
    /// # Errors
    /// [`SnapshotError::InUse`] while it is mounted, and those of [`Snapshots::mount_active`];
    /// [`SnapshotError::Seal`]. The active can be mounted or sealed again then.
    pub fn seal(&self, id: ActiveId, lease: &Lease) -> Result<LayerId, SnapshotError> {
        self.seal_as(id, LayerContents::default(), lease)
    }

    /// As [`Snapshots::seal`], for a layer that was unpacked over the layers below it: it has the diff ID of its
    /// archive, and is good for this chain alone.
    ///
    /// # Errors
    /// As [`Snapshots::seal`].
    pub fn seal_for_chain(
        &self,
        id: ActiveId,
        diff_id: DiffId,
        chain_id: ChainId,
        lease: &Lease,
    ) -> Result<LayerId, SnapshotError> {
        let known = LayerContents { diff_id: Some(diff_id), chain_id: Some(chain_id), ..LayerContents::default() };
        self.seal_as(id, known, lease)
    }

    /// As [`Snapshots::seal`], for an active on nothing whose directories `on_the_way` were only made to have a place
    /// for something: they are implied, and hide nothing of the tree that the layer will be laid over.
    ///
    /// # Errors
    /// As [`Snapshots::seal`].
    pub fn seal_on_the_way(
        &self,
        id: ActiveId,
        on_the_way: &[EntryPath],
        lease: &Lease,
    ) -> Result<LayerId, SnapshotError> {
        let index = on_the_way.iter().map(|path| (path.clone(), Implied::OnTheWay)).collect();
        self.seal_as(id, LayerContents { index, ..LayerContents::default() }, lease)
    }

    /// As [`Snapshots::seal_on_the_way`], unless nothing was written: then there is no layer, and the active can be
    /// used on. `also` runs in the transaction in which the layer appears (or, without one, in one of its own), so that
    /// whoever names it appears with it, and holds it. The caller holds the active meanwhile.
    ///
    /// # Errors
    /// As [`Snapshots::seal`], and what `also` returns; then nothing has happened.
    pub fn seal_with(
        &self,
        id: ActiveId,
        on_the_way: &[EntryPath],
        mut also: impl FnMut(&mut Tx<'_>, Option<LayerId>) -> Result<(), CatalogueError>,
    ) -> Result<Option<LayerId>, SnapshotError> {
        let index = on_the_way.iter().map(|path| (path.clone(), Implied::OnTheWay)).collect();
        let known = LayerContents { index, ..LayerContents::default() };
        self.seal_into(id, known, Empty::IsNothing, &mut also)
    }

    fn seal_as(&self, id: ActiveId, known: LayerContents, lease: &Lease) -> Result<LayerId, SnapshotError> {
        let _hold = Hold::take(self.store, id.into())?;
        let sealed = self.seal_into(id, known, Empty::IsALayer, &mut |tx, layer| {
            layer.map_or(Ok(()), |layer| tx.lease_hold(lease.id(), layer))
        })?;
        Ok(sealed.expect("because an empty layer was asked for too"))
    }

    fn seal_into(
        &self,
        id: ActiveId,
        known: LayerContents,
        empty: Empty,
        also: &mut Also<'_>,
    ) -> Result<Option<LayerId>, SnapshotError> {
        let _claim = Claim::take(self.store, id)?;
        let row = self.usable(id)?;
        let lowers = self.lowers(row.base)?;
        if row.volatile && empty == Empty::IsNothing && !self.is_made(&self.upper_of(id, true))? {
            self.store.write(|tx| also(tx, None))?;
            return Ok(None);
        }
        let upper = self.claimed_upper(id, &row, &lowers)?;
        let mut stage = Stage::without_tree(self.store)?;
        let layer = stage.id();
        // A volatile one does not outlive a crash anyway: nobody will look for it.
        if !row.volatile {
            self.store.write(|tx| tx.put(&SEALING, &id, &layer).map(drop))?;
        }
        // From here the upper may be in the stage, which must not take it along if it fails.
        stage.keep();
        let sealed = self.seal_upper(&stage, &lowers, &upper, known).and_then(|contents| {
            let is_nothing = || -> Result<bool, SnapshotError> {
                let root_only = contents.usage.inodes <= 1;
                // On nothing, there is no root below to be the same as.
                let as_made = || contents.index.is_implied(&EntryPath::root()) || row.base.is_none();
                Ok(root_only && as_made() && is_as_prepared(row.base, &stage.tree())?)
            };
            if empty == Empty::IsNothing && is_nothing()? {
                // A driver that copies has left it where it was.
                if !upper.tree().try_exists().at("stat", upper.tree())? {
                    fs::rename(stage.tree(), upper.tree()).at("rename", upper.tree())?;
                }
                tree::remove(&self.store.inner.paths.stage.join(layer.to_string()))?;
                self.store.write(|tx| {
                    tx.remove(&SEALING, &id)?;
                    also(tx, None)
                })?;
                return Ok(None);
            }
            self.publish_sealed(stage.finish(contents), id, &row, also).map(Some)
        });
        match sealed {
            Ok(Some(layer)) => {
                // Only overlay's scratch directory is left of it.
                self.store.inner.discard_dir(&upper.dir);
                Ok(Some(layer))
            }
            Ok(None) => Ok(None),
            // It may have been committed after all: the next open knows.
            Err(error @ SnapshotError::Catalogue(CatalogueError::Database { .. })) => Err(error),
            Err(error) => {
                recover::put_back(self.store, id, layer)?;
                Err(error)
            }
        }
    }

    /// Seals a volatile active into a stage that nobody sees yet.
    pub(crate) fn seal_to_stage(
        &self,
        id: ActiveId,
        known: LayerContents,
    ) -> Result<layers::FinishedStage, SnapshotError> {
        let _claim = Claim::take(self.store, id)?;
        let row = self.usable(id)?;
        let lowers = self.lowers(row.base)?;
        let upper = self.claimed_upper(id, &row, &lowers)?;
        let stage = Stage::without_tree(self.store)?;
        let contents = self.seal_upper(&stage, &lowers, &upper, known)?;
        Ok(stage.finish(contents))
    }

    /// Moves the upper into the stage and makes it canonical.
    fn seal_upper(
        &self,
        stage: &Stage,
        lowers: &[Lower],
        upper: &Upper,
        known: LayerContents,
    ) -> Result<LayerContents, SnapshotError> {
        let sealed = self.store.inner.driver.seal(lowers, upper, &stage.tree(), &self.scratch()?)?;
        let mut index = sealed.index;
        known.index.implied().for_each(|path| index.insert(path.clone(), Implied::OnTheWay));
        Ok(LayerContents { usage: sealed.usage, index, ..known })
    }

    fn publish_sealed(
        &self,
        stage: layers::FinishedStage,
        id: ActiveId,
        row: &ActiveRow,
        also: &mut Also<'_>,
    ) -> Result<LayerId, SnapshotError> {
        let made = layers::publish::<SnapshotError>(self.store, vec![stage], LayerKind::Full, |tx, made| {
            let sealed = ActiveRow { sealed: made.first().copied(), usage: None, ..row.clone() };
            tx.put_active(id, &sealed)?;
            tx.remove(&SEALING, &id)?;
            for layer in made {
                // Whoever holds the active can find its layer by it, also after a crash before anything else does.
                tx.add_edge(id, *layer)?;
            }
            also(tx, made.first().copied())
        })?;
        Ok(*made.first().expect("because one stage makes one layer"))
    }

    /// What the upper directory costs, written down for [`Store::usage`]. It is walked only if somebody may have written
    /// to it since the last time, and again and again while it is mounted.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; [`SnapshotError::File`] also if somebody is removing files from
    /// it meanwhile.
    pub fn measure(&self, id: ActiveId) -> Result<Usage, SnapshotError> {
        let row = self.usable(id)?;
        if let (false, Some(usage)) = (row.changed, row.usage) {
            return Ok(usage.into());
        }
        let put = |change: &dyn Fn(&mut ActiveRow)| {
            self.store.write_lazily(|tx| {
                let mut row = tx.get(&ACTIVES, &id)?.ok_or(SnapshotError::NotFound { what: id.into() })?;
                change(&mut row);
                Ok::<_, SnapshotError>(tx.put_active(id, &row)?)
            })
        };
        // Before the walk: who mounts it meanwhile marks it again.
        if !self.store.inner.mounted.lock().unwrap_or_else(PoisonError::into_inner).contains(&id) {
            put(&|row| row.changed = false)?;
        }
        let upper = self.upper_of(id, row.volatile);
        let walk = || match row.volatile && !self.is_made(&upper)? {
            true => Ok(Usage::default()),
            false => Ok::<_, SnapshotError>(tree::measure(tree::open_own(&upper.tree())?).at("measure", upper.tree())?),
        };
        match walk() {
            Ok(usage) => put(&|row| row.usage = Some(StoredUsage::from(usage))).map(|()| usage),
            Err(error) => {
                put(&|row| row.changed = true)?;
                Err(error)
            }
        }
    }

    /// What was written to an active, path by path and sorted. It may be mounted meanwhile; what is written while the
    /// list is made is in it or not.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::Stale`], [`SnapshotError::Sealed`], [`SnapshotError::File`].
    pub fn changes(&self, id: ActiveId) -> Result<Vec<Change>, SnapshotError> {
        let _hold = Hold::take(self.store, id.into())?;
        let row = self.usable(id)?;
        let lowers = self.lowers(row.base)?;
        self.store.inner.driver.changes(&lowers, &self.upper_of(id, row.volatile), &self.scratch()?)
    }

    /// The upper directory itself, for whoever wants to know what was changed. (With the native
    /// driver it is the whole tree.)
    ///
    /// # Errors
    /// As [`Snapshots::mount_active`].
    pub fn upper(&self, id: ActiveId) -> Result<OwnedFd, SnapshotError> {
        let row = self.usable(id)?;
        let upper = self.upper_of(id, row.volatile);
        if row.volatile && !self.is_made(&upper)? {
            let _claim = Claim::take(self.store, id)?;
            self.claimed_upper(id, &row, &self.lowers(row.base)?)?;
        }
        Ok(tree::open_own(&upper.tree())?)
    }

    fn snapshot_row(&self, id: SnapshotId) -> Result<SnapshotRow, SnapshotError> {
        let row = self.store.read(|tx| tx.get(&SNAPSHOTS, &id))?;
        row.ok_or(SnapshotError::NotFound { what: id.into() })
    }

    /// The row of an active whose files can be trusted.
    fn usable(&self, id: ActiveId) -> Result<ActiveRow, SnapshotError> {
        let row: Option<ActiveRow> = self.store.read(|tx| tx.get(&ACTIVES, &id))?;
        let row = row.ok_or(SnapshotError::NotFound { what: id.into() })?;
        if let Some(layer) = row.sealed {
            return Err(SnapshotError::Sealed { active: id, layer });
        }
        if row.volatile && !self.store.inner.is_of_this_session(*id.as_bytes()) {
            return Err(SnapshotError::Stale { active: id });
        }
        Ok(row)
    }

    fn upper_of(&self, id: ActiveId, volatile: bool) -> Upper {
        Upper { dir: self.store.inner.paths.active.join(id.to_string()), volatile }
    }

    fn scratch(&self) -> Result<PathBuf, CatalogueError> {
        let id = u64::from_be_bytes(self.store.inner.fresh_id()?);
        Ok(self.store.inner.paths.mounts.join(format!("{id:016x}")))
    }

    pub(crate) fn store(&self) -> &'a Store {
        self.store
    }

    /// The tree of layers, to seal uppers over it; `None` if there are none.
    pub(crate) fn merged<'s>(
        &'s self,
        layers: &[LayerId],
        indexes: &'s Indexes,
    ) -> Result<Option<Merged<'s>>, SnapshotError> {
        let list = without_repetitions(layers);
        let merged = Merged::new(self.store, indexes, &list);
        if merged.may_need_base()? {
            // For what it refuses.
            drop(self.fix_up_of(&list)?);
        }
        Ok((!list.is_empty()).then_some(merged))
    }

    /// The layers to mount for `base`: its own, its fix-up, and squashed at the bottom if they are
    /// more than the driver takes.
    fn lowers(&self, base: Option<SnapshotId>) -> Result<Vec<Lower>, SnapshotError> {
        let Some(base) = base else { return Ok(Vec::new()) };
        let row = self.snapshot_row(base)?;
        let mut ids = row.layers;
        let max = self.store.inner.driver.max_lowers();
        let depth = ids.len() + usize::from(row.fixup.is_some());
        if depth > max {
            // In steps, so that a stack that grows finds the squash of the one before.
            let step = max / 2;
            let bottom = (depth + 1 - max).next_multiple_of(step).min(ids.len());
            let squash = self.squash(base, &ids[..bottom])?;
            ids.splice(..bottom, [squash]);
        }
        ids.extend(row.fixup);
        let lower = |id: LayerId| Lower { id, dir: layers::layer_dir(self.store, id) };
        Ok(ids.into_iter().map(lower).collect())
    }

    /// The layer that shows the same as all of `bottom`, made of hard links, kept by `snapshot`.
    fn squash(&self, snapshot: SnapshotId, bottom: &[LayerId]) -> Result<LayerId, SnapshotError> {
        let list = list_digest(bottom);
        let found = self.store.read(|tx| layers::squash_of(tx, list))?;
        if found.is_some() {
            let kept: Option<LayerId> = self.store.write_lazily(|tx| {
                let Some(id) = layers::squash_of(tx, list)? else { return Ok(None) };
                tx.add_edge(snapshot, id)?;
                Ok::<_, CatalogueError>(Some(id))
            })?;
            if let Some(id) = kept {
                return Ok(id);
            }
        }
        let stage = Stage::new(self.store)?;
        let layers = bottom.iter().map(|id| {
            Ok::<_, SnapshotError>(MergeLayer {
                root: layers::open_root(self.store, *id)?,
                index: layers::read_index(self.store, *id)?,
            })
        });
        tree::merge(layers, stage.root(), Material::Link)?;
        let usage = tree::measure(stage.root()).at("measure", stage.tree())?;
        let stage = stage.finish(LayerContents { usage, ..LayerContents::default() });
        let made = layers::publish::<SnapshotError>(self.store, vec![stage], LayerKind::Squash(list), |tx, made| {
            made.iter().try_for_each(|id| tx.add_edge(snapshot, *id))
        })?;
        Ok(*made.first().expect("because one stage makes one layer"))
    }
}

fn put_snapshot(
    tx: &mut Tx<'_>,
    id: SnapshotId,
    list: &[LayerId],
    fixup: Option<LayerId>,
) -> Result<(), CatalogueError> {
    // Two may have made it at once: the first stands, and the other's fix-up is garbage.
    let row = SnapshotRow { layers: list.to_vec(), fixup, created: tx.now() };
    if !tx.put_snapshot(id, &row)? {
        return Ok(());
    }
    list.iter().chain(&fixup).try_for_each(|layer| tx.add_edge(id, *layer))
}

/// What else happens in the transaction in which a sealed upper becomes a layer.
type Also<'a> = dyn FnMut(&mut Tx<'_>, Option<LayerId>) -> Result<(), CatalogueError> + 'a;

/// What to make of an upper in which nothing was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Empty {
    IsALayer,
    IsNothing,
}

/// The right to mount or seal one active.
#[derive(Debug)]
struct Claim {
    store: Store,
    id: ActiveId,
}

impl Claim {
    fn take(store: &Store, id: ActiveId) -> Result<Self, SnapshotError> {
        let mut mounted = store.inner.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if !mounted.insert(id) {
            return Err(SnapshotError::InUse { active: id });
        }
        Ok(Self { store: store.clone(), id })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.inner.mounted.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// A lease that keeps what is mounted.
#[derive(Debug)]
struct Hold {
    lease: Lease,
}

impl Hold {
    fn take(store: &Store, resource: Resource) -> Result<Self, SnapshotError> {
        let lease = store.lease(LeaseOptions::process(format!("mount of {resource}")))?;
        if lease.hold_if_present(resource)? {
            Ok(Self { lease })
        } else {
            Err(SnapshotError::NotFound { what: resource })
        }
    }
}

/// Whether the root of an upper on nothing says no more than that it was made. (On something, it was compared with that.)
fn is_as_prepared(base: Option<SnapshotId>, root: &Path) -> Result<bool, FileError> {
    if base.is_some() {
        return Ok(true);
    }
    let root_dir = tree::open_own(root)?;
    let stat = rustix::fs::fstat(&root_dir).at("stat", root)?;
    let own = stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_gid == rustix::process::getegid().as_raw();
    let mut names = [0; 1];
    // One byte has room for no name: it is the kernel that says whether there is any.
    let bare = matches!(rustix::fs::flistxattr(&root_dir, &mut names[..]), Ok(0) | Err(Errno::OPNOTSUPP));
    Ok(own && stat.st_mode & 0o7777 == 0o755 && bare)
}

/// Shows `tree` (a mount handle, or a directory to bind) at `target`.
fn move_to(from: impl AsFd, target: &Path) -> Result<(), SnapshotError> {
    let to = tree::open_own(target)?;
    move_mount(from, "", to, "", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)
        .map_err(|error| SnapshotError::Mount {
            words: format!("attach to {}", target.display()),
            source: error.into(),
        })
}

fn bind(dir: &Path, target: &Path) -> Result<(), SnapshotError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(rustix::fs::CWD, dir, flags)
        .map_err(|error| SnapshotError::Mount { words: format!("bind {}", dir.display()), source: error.into() })?;
    move_to(clone, target)
}

/// How long a mount may be busy before that is told. A process that somebody starts meanwhile has copies of all our
/// descriptors until its `exec`, and one in a new mount namespace of all our mounts until it leaves them: milliseconds, or
/// some hundreds on a machine that is busy itself.
const BUSY_TRIES: u32 = 400;
/// See [`BUSY_TRIES`]: two seconds in all.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Unmounts what is mounted at `path`, as soon as nobody uses it.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::ResourceBusy`] if it still was in use after two seconds, and it then stays mounted.
pub fn unmount_patiently(path: &Path) -> io::Result<()> {
    for _ in 1..BUSY_TRIES {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => std::thread::sleep(BUSY_PAUSE),
            unmounted => return Ok(unmounted?),
        }
    }
    Ok(rustix::mount::unmount(path, UnmountFlags::NOFOLLOW)?)
}

/// Unmounts; what stays busy is detached so that it cannot show up again.
fn unmount_at(path: &Path) -> Result<(), SnapshotError> {
    match unmount_patiently(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            detach(path)?;
            Err(SnapshotError::MountBusy { path: path.to_owned() })
        }
        unmounted => Ok(unmounted.at("unmount", path)?),
    }
}

pub(crate) fn detach(path: &Path) -> Result<(), FileError> {
    rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).at("unmount", path)
}

impl Tree {
    /// Ends a tree that was never attached anywhere by us.
    pub(crate) fn end(self, scratch: &Path) -> Result<(), SnapshotError> {
        let Tree { root, form } = self;
        drop(root);
        match form {
            Form::Detached(mount) => drop(mount),
            Form::Attached => {
                unmount_at(scratch)?;
                fs::remove_dir(scratch).at("remove", scratch)?;
            }
            Form::Directory { path, scratch: true } => tree::remove(&path)?,
            Form::Directory { .. } => {}
        }
        Ok(())
    }
}

/// A mounted tree. [`Mounted::unmount`] or drop ends it; the first says whether it went well.
#[derive(Debug)]
#[must_use = "a mount that is dropped is unmounted"]
pub struct Mounted {
    store: Store,
    /// `None` once it is being ended.
    tree: Option<Tree>,
    path: Option<PathBuf>,
    /// What was mounted by us, in the order in which it was.
    attached: Vec<PathBuf>,
    scratch: PathBuf,
    hold: Option<Hold>,
    claim: Option<Claim>,
}

impl Mounted {
    fn attach(
        store: &Store,
        tree: Tree,
        attach: Attach<'_>,
        scratch: PathBuf,
        hold: Hold,
        claim: Option<Claim>,
    ) -> Result<Self, SnapshotError> {
        let mut mounted = Self {
            store: store.clone(),
            tree: Some(tree),
            path: None,
            attached: Vec::new(),
            scratch,
            hold: Some(hold),
            claim,
        };
        let form = &mounted.tree.as_ref().expect("because it was just given").form;
        if let Form::Attached = form {
            mounted.attached.push(mounted.scratch.clone());
        }
        // An error below drops what was made so far, which ends it.
        let path = match (form, attach) {
            (Form::Detached(_), Attach::Detached) => None,
            (Form::Detached(mount), Attach::InStore) => {
                make_dir(&mounted.scratch)?;
                move_to(mount, &mounted.scratch)?;
                mounted.attached.push(mounted.scratch.clone());
                Some(mounted.scratch.clone())
            }
            (Form::Detached(mount), Attach::At(target)) => {
                move_to(mount, target)?;
                Some(mounted.attached_at(target))
            }
            (Form::Attached, Attach::At(target)) => {
                bind(&mounted.scratch, target)?;
                Some(mounted.attached_at(target))
            }
            (Form::Attached, _) => Some(mounted.scratch.clone()),
            (Form::Directory { path, .. }, Attach::At(target)) => {
                bind(path, target)?;
                Some(mounted.attached_at(target))
            }
            (Form::Directory { path, .. }, _) => Some(path.clone()),
        };
        mounted.path = path;
        Ok(mounted)
    }

    fn attached_at(&mut self, target: &Path) -> PathBuf {
        self.attached.push(target.to_owned());
        target.to_owned()
    }

    /// Its root: name things beneath this.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.tree.as_ref().expect("because only the end takes it").root.as_fd()
    }

    /// Where it is attached, if anywhere.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Leaves the mount in place, beyond the life of this process. It must be attached to a directory of the caller's,
    /// who from now on holds what is mounted by an owner of its own, and unmounts it.
    ///
    /// # Errors
    /// [`SnapshotError::Catalogue`].
    pub fn keep(mut self) -> Result<(), SnapshotError> {
        debug_assert!(self.path.is_some(), "a mount that is attached nowhere would be lost");
        self.tree = None;
        self.claim = None;
        Ok(self.hold.take().map_or(Ok(()), |hold| hold.lease.release())?)
    }

    /// Unmounts, and lets go of what was mounted.
    ///
    /// # Errors
    /// [`SnapshotError::MountBusy`] if something still uses it: an active should not be sealed then.
    pub fn unmount(mut self) -> Result<(), SnapshotError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), SnapshotError> {
        let Some(Tree { root, form }) = self.tree.take() else { return Ok(()) };
        // Our own handle would keep the mount busy.
        drop(root);
        let mut first_error = None;
        let mut note = |result: Result<(), SnapshotError>| {
            if let Err(error) = result {
                first_error.get_or_insert(error);
            }
        };
        let copy = match form {
            Form::Detached(mount) => {
                drop(mount);
                None
            }
            Form::Attached => None,
            Form::Directory { path, scratch } => scratch.then_some(path),
        };
        for path in self.attached.iter().rev() {
            note(unmount_at(path));
        }
        note(match copy {
            Some(path) => tree::remove(&path).map_err(Into::into),
            None => match fs::remove_dir(&self.scratch) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(FileError::new("remove", &self.scratch, error).into())
                }
                _ => Ok(()),
            },
        });
        self.claim = None;
        if let Some(hold) = self.hold.take() {
            note(hold.lease.release().map_err(Into::into));
        }
        first_error.map_or(Ok(()), Err)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            self.store.inner.warn(&error);
        }
    }
}
