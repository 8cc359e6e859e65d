//! Writable layers: an upper directory on a chain, by name, for as long as somebody wants it.

use std::io;
use std::os::fd::BorrowedFd;

use plies_archive::Change;
use plies_oci::ChainId;
use plies_store::{
    ActiveId, ActiveOptions, Attach, CatalogueError, IdMaps, LayerId, Lease, LeaseId, MountOptions, Mounted, Owner,
    Row, Rows, SnapshotId, Stamp, Store, Table, Transfer, Tx,
};
use serde::{Deserialize, Serialize};

use super::{LayerRef, LayerStore, LayerStoreError, RemovedLayer, hold_chain, layers_of, no_such_chain, unhold_chain};

pub(crate) const RW_LAYERS: Table<String, RwRow> = Table::new("image.rw_layers");
pub(crate) const RW_REFS: Table<(String, LeaseId), ()> = Table::new("image.rw_refs");

/// Characters of a name. It is a key and a part of holders' names, never a path.
const NAME_CHARS_MAX: usize = 128;

/// What is kept of a writable layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RwRow {
    pub(crate) parent: Option<ChainId>,
    pub(crate) active: ActiveId,
    pub(crate) init: Option<LayerId>,
    pub(crate) label: Option<String>,
    pub(crate) created: Stamp,
    pub(crate) ids: Option<IdMaps>,
}

impl Row for RwRow {
    const VERSION: u8 = 2;

    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        type First = (Option<ChainId>, ActiveId, Option<LayerId>, Option<String>, Stamp);
        (version == 1).then_some(())?;
        let (parent, active, init, label, created): First = postcard::from_bytes(body).ok()?;
        Some(Self { parent, active, init, label, created, ids: None })
    }
}

/// Fills the init layer of a new writable layer: gets the root of the merged tree, which it must not leave.
pub type InitLayer<'a> = &'a mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>;

/// What a new writable layer is to be.
#[derive(Default)]
pub struct NewRwLayer<'a> {
    /// What it stands on; `None` is the empty tree.
    pub parent: Option<ChainId>,
    /// The security label of its mounts (SELinux's `context=`). A kernel that knows no labels refuses to mount with one.
    pub label: Option<String>,
    /// Whose its files show as while it is mounted, its init layer's among them. Its changes, and a layer made of them,
    /// have the owners that there are on disk.
    pub ids: Option<IdMaps>,
    /// Makes what every container needs and no image has: its changes become a layer of their own, `<id>-init`, between
    /// the parent and the writable layer, and so do not show among the latter's changes.
    pub init: Option<InitLayer<'a>>,
    /// Makes what the writable layer begins with: shows among its changes.
    pub fill: Option<InitLayer<'a>>,
}

impl std::fmt::Debug for NewRwLayer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewRwLayer").field("parent", &self.parent).field("init", &self.init.is_some()).finish()
    }
}

/// A writable layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RwInfo {
    /// Its name.
    pub name: String,
    /// What it stands on.
    pub parent: Option<ChainId>,
    /// Its upper directory.
    pub active: ActiveId,
    /// What its init function made, if anything.
    pub init: Option<LayerId>,
    /// The security label of its mounts.
    pub label: Option<String>,
    /// Whose its files show as while it is mounted.
    pub ids: Option<IdMaps>,
    /// When it was made.
    pub created: Stamp,
}

impl RwInfo {
    fn new(name: String, row: RwRow) -> Self {
        let RwRow { parent, active, init, label, created, ids } = row;
        Self { name, parent, active, init, label, ids, created }
    }

    /// How it is mounted.
    pub fn mount_options(&self) -> MountOptions<'_> {
        MountOptions { label: self.label.as_deref(), ids: self.ids.as_ref() }
    }

    /// What Docker calls the mount ID.
    pub fn mount_id(&self) -> String {
        self.active.to_string()
    }

    /// What Docker calls the init ID.
    pub fn init_id(&self) -> Option<String> {
        self.init.map(|_| format!("{}-init", self.active))
    }
}

pub(crate) fn owner(name: &str) -> Owner {
    Owner::new("rw", name)
}

/// The name by which a writable layer holds its parent.
fn holder(name: &str) -> String {
    format!("rw:{name}")
}

fn no_such_name(name: &str) -> LayerStoreError {
    LayerStoreError::NoSuchName { name: name.to_owned() }
}

pub(super) fn drop_dead_refs(store: &Store, is_living: &dyn Fn(LeaseId) -> bool) -> Result<(), CatalogueError> {
    let refs: Vec<_> = store.read(|rows| rows.readable(&RW_REFS))?;
    let stale: Vec<_> = refs.into_iter().map(|(key, ())| key).filter(|(_, lease)| !is_living(*lease)).collect();
    if stale.is_empty() {
        return Ok(());
    }
    store.write(|tx| stale.iter().try_for_each(|key| tx.remove(&RW_REFS, key).map(drop)))
}

impl LayerStore {
    /// Makes a writable layer, durable when this returns, and gives a reference to it. Of two that are made under one
    /// name at once, one fails.
    ///
    /// # Errors
    /// [`LayerStoreError::NameTaken`], [`LayerStoreError::Name`], [`LayerStoreError::DoesNotExist`] for the parent,
    /// [`LayerStoreError::Init`]. Nothing of it is left then but bytes for the next collection.
    pub fn create_rw(&self, name: &str, new: NewRwLayer<'_>, lease: &Lease) -> Result<RwRef, LayerStoreError> {
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-');
        if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.bytes().all(plain) {
            return Err(LayerStoreError::Name { name: name.to_owned() });
        }
        let taken = || LayerStoreError::NameTaken { name: name.to_owned() };
        // Before anything is made; it is looked at again when it is given away.
        if self.store.read(|rows| rows.contains(&RW_LAYERS, &name.to_owned()))? {
            return Err(taken());
        }
        let parent = new.parent.map(|parent| self.get(parent)).transpose()?;
        let missing = || no_such_chain(new.parent.expect("because the empty chain is always there"));
        let mut layers = self.store.read(|rows| layers_of(rows, new.parent))?.ok_or_else(missing)?;
        let snapshots = self.store.snapshots();
        let mut base: Option<SnapshotId> = None;
        if !layers.is_empty() {
            base = Some(snapshots.ensure(&layers, lease)?);
        }
        let mut init = None;
        if let Some(initialise) = new.init
            && let Some(layer) = self.init_layer(name, base, new.label.as_deref(), initialise, lease)?
        {
            layers.push(layer);
            base = Some(snapshots.ensure(&layers, lease)?);
            init = Some(layer);
        }
        let active = snapshots.prepare(base, lease, ActiveOptions { volatile: false })?;
        if let Some(fill) = new.fill {
            let mounted = snapshots.mount_active(active, Attach::Detached)?;
            // The row may be there after a power cut; so must the files.
            let filled = fill(mounted.root()).and_then(|()| Ok(rustix::fs::syncfs(mounted.root())?));
            mounted.unmount()?;
            filled.map_err(|source| LayerStoreError::Init { name: name.to_owned(), source })?;
        }
        let held = self.ref_lease(&name)?;
        let row = self.store.write(|tx| {
            if tx.contains(&RW_LAYERS, &name.to_owned())? {
                return Err(taken());
            }
            let (label, ids) = (new.label.clone(), new.ids.clone());
            let row = RwRow { parent: new.parent, active, init, label, created: tx.now(), ids };
            tx.put(&RW_LAYERS, &name.to_owned(), &row)?;
            tx.hold(&owner(name), active)?;
            if let Some(parent) = new.parent {
                hold_chain(tx, parent, &holder(name))?;
            }
            tx.put(&RW_REFS, &(name.to_owned(), held.id()), &())?;
            Ok(row)
        })?;
        if let Some(parent) = parent {
            self.release(parent)?;
        }
        Ok(RwRef { store: self.store.clone(), info: RwInfo::new(name.to_owned(), row), lease: Some(held) })
    }

    /// Makes the init layer; `None` if the function changed nothing.
    fn init_layer(
        &self,
        name: &str,
        base: Option<SnapshotId>,
        label: Option<&str>,
        initialise: InitLayer<'_>,
        lease: &Lease,
    ) -> Result<Option<LayerId>, LayerStoreError> {
        let snapshots = self.store.snapshots();
        let active = snapshots.prepare(base, lease, ActiveOptions { volatile: true })?;
        // As it is on disk: what root makes here is the mapped root's where the writable layer is mounted.
        let mounted = snapshots.mount_active_with(active, MountOptions { label, ids: None }, Attach::Detached)?;
        let initialised = initialise(mounted.root());
        mounted.unmount()?;
        initialised.map_err(|source| LayerStoreError::Init { name: name.to_owned(), source })?;
        let layer = snapshots.seal(active, lease)?;
        Ok((!self.store.layers().is_empty(layer)?).then_some(layer))
    }

    /// One more reference to a writable layer.
    ///
    /// # Errors
    /// [`LayerStoreError::NoSuchName`].
    pub fn get_rw(&self, name: &str) -> Result<RwRef, LayerStoreError> {
        let lease = self.ref_lease(&name)?;
        // What may be lost: the reference, which ends with this process anyway.
        let row = self.store.write_lazily(|tx| {
            let row = tx.get(&RW_LAYERS, &name.to_owned())?.ok_or_else(|| no_such_name(name))?;
            tx.put(&RW_REFS, &(name.to_owned(), lease.id()), &())?;
            Ok::<_, LayerStoreError>(row)
        })?;
        Ok(RwRef { store: self.store.clone(), info: RwInfo::new(name.to_owned(), row), lease: Some(lease) })
    }

    /// Gives a reference up. With the last one the writable layer goes, and with it what only it counted on: what went,
    /// child before parent. To keep the writable layer, drop the reference instead.
    ///
    /// # Errors
    /// [`LayerStoreError::NotRetained`]; [`LayerStoreError::Catalogue`], and it can be tried again with a new reference.
    pub fn release_rw(&self, mut rw: RwRef) -> Result<Vec<RemovedLayer>, LayerStoreError> {
        let Some(lease) = rw.lease.take() else { return Ok(vec![]) };
        let name = &rw.info.name;
        let removed = self.store.write(|tx| {
            if !tx.remove(&RW_REFS, &(name.clone(), lease.id()))? {
                let (what, holder) = (format!("writable layer {name:?}"), format!("reference {}", lease.id()));
                return Err(LayerStoreError::NotRetained { what, holder });
            }
            if !tx.prefixed(&RW_REFS, name)?.is_empty() {
                return Ok(vec![]);
            }
            let Some(row) = tx.take(&RW_LAYERS, name)? else { return Ok(vec![]) };
            tx.unhold_all(&owner(name))?;
            let released = row.parent.map(|parent| unhold_chain(tx, parent, &holder(name))).transpose()?;
            Ok(released.flatten().unwrap_or_default())
        })?;
        lease.release()?;
        Ok(removed)
    }

    /// All writable layers, by name.
    ///
    /// # Errors
    /// [`LayerStoreError::Catalogue`].
    pub fn list_rw(&self) -> Result<Vec<RwInfo>, LayerStoreError> {
        let rows = self.store.read(|rows| rows.all(&RW_LAYERS))?;
        Ok(rows.into_iter().map(|(name, row)| RwInfo::new(name, row)).collect())
    }

    /// Mounts a writable layer, with its label and its owners; once at a time.
    ///
    /// # Errors
    /// Those of [`plies_store::Snapshots::mount_active`].
    pub fn mount_rw(&self, rw: &RwRef, attach: Attach<'_>) -> Result<Mounted, LayerStoreError> {
        Ok(self.store.snapshots().mount_active_with(rw.info.active, rw.info.mount_options(), attach)?)
    }

    /// What was written to a writable layer, path by path. What its init function made is not in the list.
    ///
    /// # Errors
    /// [`LayerStoreError::Snapshot`].
    pub fn changes(&self, rw: &RwRef) -> Result<Vec<Change>, LayerStoreError> {
        Ok(self.store.snapshots().changes(rw.info.active)?)
    }

    /// Makes a layer of what was written to a writable layer, on top of the writable layer's parent, and gives a
    /// reference to it. The writable layer stays as it is.
    ///
    /// # Errors
    /// [`LayerStoreError::MaxDepth`]; [`LayerStoreError::Transfer`], among them that it is mounted.
    pub fn commit_rw(&self, rw: &RwRef, transfer: &Transfer<'_>) -> Result<LayerRef, LayerStoreError> {
        let below = self.begin_child(rw.info.parent)?;
        let received = transfer.receive_changes(rw.info.active, &below.layers, rw.info.parent)?;
        self.finish_child(received.layer, received.diff_id, below)
    }
}

/// A counted reference to a writable layer. Dropping it leaves the writable layer where it is;
/// [`LayerStore::release_rw`] with the last one removes it.
#[derive(Debug)]
pub struct RwRef {
    store: Store,
    info: RwInfo,
    /// `None` once it is released.
    lease: Option<Lease>,
}

impl RwRef {
    /// What is known of it.
    pub fn info(&self) -> &RwInfo {
        &self.info
    }
}

impl Drop for RwRef {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            // What cannot be dropped now goes when the layer store is opened next.
            let key = (self.info.name.clone(), lease.id());
            drop(self.store.write_lazily(|tx: &mut Tx<'_>| tx.remove(&RW_REFS, &key)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_first_version_is_upgraded() {
        let active = "0707070707070707".parse::<ActiveId>().unwrap();
        let first = (None::<ChainId>, active, None::<LayerId>, Some("label"), Stamp::from_micros(5));
        let row = RwRow::upgrade(1, &postcard::to_stdvec(&first).unwrap()).unwrap();
        assert_eq!((row.active, row.label.as_deref(), row.ids), (active, Some("label"), None));
        assert!(RwRow::upgrade(0, b"").is_none() && RwRow::upgrade(1, b"\xff").is_none());
    }
}
