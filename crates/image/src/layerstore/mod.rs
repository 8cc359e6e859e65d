//! The layer store: layers by the chain that they complete, with counted references; and writable layers by name.
//!
//! ```text
//! image.chains          ChainId            -> ChainRow   diff ID, parent, layer, depth, sizes
//! image.chain_children  ChainId, ChainId   -> ()         parent, child
//! image.chain_holds     ChainId, holder    -> u64        how often `image:<id>`, `rw:<name>` or a user holds it
//! image.chain_refs      ChainId, LeaseId   -> ()         a [`LayerRef`] of the process that runs
//! image.rw_layers       name               -> RwRow      parent, active, init layer, label, id maps
//! image.rw_refs         name, LeaseId      -> ()         an [`RwRef`] of the process that runs
//! ```
//!
//! A registered layer lives as long as something counts on it: a reference, a hold, a child. When the last of these
//! goes its row goes, and so on down the chain, in one transaction. Its bytes go with the next collection.
//!
//! # Invariants
//! - A chain row has an owner `chain:<id>` in the store that holds its layer, and a row for its parent. All appear in one
//!   transaction, and go in one.
//! - A reference is a process-bound lease and a row with its id. When the process dies the next open ends the lease, and
//!   [`LayerStore::open`] takes the row for what it is.
//! - A writable layer has an owner `rw:<name>` that holds its active, and a hold on its parent.
//!
//! # Locks
//! None: whoever changes counts does so in a write transaction, and there is one of those at a time. Nothing is held
//! while a stream is read, a layer unpacked or a caller's function runs, so registrations run side by side up to their
//! last commit.

mod rw;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::ops::ControlFlow;

use plies_oci::{ChainId, Compression, DiffId, ErrorKind};
use plies_store::{
    CatalogueError, LayerError, LayerId, Lease, LeaseId, LeaseOptions, Owner, Row, Rows, SnapshotError, Stamp, Store,
    Table, Transfer, TransferError, Tx,
};
use serde::{Deserialize, Serialize};

pub use rw::{InitLayer, NewRwLayer, RwInfo, RwRef};
pub(crate) use rw::{RW_LAYERS, RW_REFS, RwRow, owner as rw_owner};

pub(crate) const CHAINS: Table<ChainId, ChainRow> = Table::new("image.chains");
pub(crate) const CHILDREN: Table<(ChainId, ChainId), ()> = Table::new("image.chain_children");
pub(crate) const HOLDS: Table<(ChainId, String), u64> = Table::new("image.chain_holds");
pub(crate) const REFS: Table<(ChainId, LeaseId), ()> = Table::new("image.chain_refs");

/// Hex digits that a chain ID must be given with at least.
const ID_PREFIX_DIGITS_MIN: usize = 2;

/// What is kept of a registered layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChainRow {
    pub(crate) diff_id: DiffId,
    pub(crate) parent: Option<ChainId>,
    pub(crate) layer: LayerId,
    /// Layers in the chain, this one included.
    pub(crate) depth: u32,
    /// Bytes in files of this layer.
    pub(crate) diff_bytes: u64,
    /// Bytes in files of the whole chain.
    pub(crate) chain_bytes: u64,
    pub(crate) created: Stamp,
}

impl ChainRow {
    /// That of a layer, given with the bytes in its files, on the chain `below`.
    pub(crate) fn on(
        below: Option<(ChainId, &ChainRow)>,
        diff_id: DiffId,
        (layer, diff_bytes): (LayerId, u64),
        created: Stamp,
    ) -> Self {
        let (depth, bytes) = below.map_or((0, 0), |(_, below)| (below.depth, below.chain_bytes));
        let (parent, depth) = (below.map(|(parent, _)| parent), depth + 1);
        Self { diff_id, parent, layer, depth, diff_bytes, chain_bytes: bytes + diff_bytes, created }
    }
}

impl Row for ChainRow {
    const VERSION: u8 = 1;
}

/// Why the layer store could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerStoreError {
    /// No layer completes this chain.
    #[error("layer {wanted} does not exist (see `ply layer ls`)")]
    DoesNotExist {
        /// As it was asked for.
        wanted: String,
    },
    /// Several chain IDs begin so.
    #[error("{wanted:?} is short for {count} layers, give more digits")]
    Ambiguous {
        /// As it was asked for.
        wanted: String,
        /// How many fit.
        count: usize,
    },
    /// The reference was released before, or the holder holds nothing.
    #[error("{what} is not held by {holder}")]
    NotRetained {
        /// The layer or the writable layer.
        what: String,
        /// Who was to let go.
        holder: String,
    },
    /// A chain may not be that long.
    #[error("layer {parent} has {depth} layers below and at it, the limit depth_max is {maximum}")]
    MaxDepth {
        /// The parent.
        parent: ChainId,
        /// Layers in its chain.
        depth: u32,
        /// The limit.
        maximum: u32,
    },
    /// A writable layer has this name.
    #[error("a writable layer is called {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A name that no writable layer may have.
    #[error("{name:?} is no name for a writable layer: up to 128 letters, digits, '_', '.' and '-'")]
    Name {
        /// The name.
        name: String,
    },
    /// No writable layer has this name.
    #[error("no writable layer is called {name:?}")]
    NoSuchName {
        /// The name.
        name: String,
    },
    /// The init function failed. Nothing of the writable layer is left.
    #[error("initialise writable layer {name:?}")]
    Init {
        /// The writable layer.
        name: String,
        /// What went wrong.
        #[source]
        source: std::io::Error,
    },
    /// Unpacking, or putting a tar together.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// Stacking, mounting or listing.
    #[error("stack or mount layers")]
    Snapshot(#[from] SnapshotError),
    /// A layer's row.
    #[error("read a layer's row")]
    Layer(#[from] LayerError),
    /// The catalogue failed.
    #[error("read or change the layer store")]
    Catalogue(#[from] CatalogueError),
}

impl LayerStoreError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::DoesNotExist { .. } | Self::NoSuchName { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } | Self::Name { .. } => ErrorKind::InvalidInput,
            Self::NotRetained { .. } => ErrorKind::FailedPrecondition,
            Self::MaxDepth { .. } => ErrorKind::Limit,
            Self::NameTaken { .. } => ErrorKind::AlreadyExists,
            Self::Init { .. } => ErrorKind::Unavailable,
            Self::Transfer(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

fn no_such_chain(chain: ChainId) -> LayerStoreError {
    LayerStoreError::DoesNotExist { wanted: chain.to_string() }
}

/// How a layer store works.
#[derive(Debug, Clone, Copy)]
pub struct LayerStoreOptions {
    /// The most layers in a chain, counted from 1.
    ///
    /// Docker's layer store stops at 125: its overlay2 driver passes lower directories in one page of mount options,
    /// which holds 128 of its short paths, less one each for the init and the writable layer and one in reserve. Ours
    /// are passed one by one, of which the kernel takes 500 (`OVL_MAX_STACK`); deeper stacks are squashed at the bottom.
    /// So this limit protects from chains without end, not from the kernel.
    pub depth_max: u32,
}

impl Default for LayerStoreOptions {
    fn default() -> Self {
        Self { depth_max: 500 }
    }
}

/// A layer of a chain that somebody adds, and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainLayer {
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// The layer.
    pub layer: LayerId,
    /// Bytes in its files.
    pub content_bytes: u64,
}

/// A registered layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainInfo {
    /// The chain that it completes.
    pub chain_id: ChainId,
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// The chain below it.
    pub parent: Option<ChainId>,
    /// Where its files are.
    pub layer: LayerId,
    /// Layers in the chain.
    pub depth: u32,
    /// Bytes in files of this layer.
    pub diff_bytes: u64,
    /// Bytes in files of the whole chain.
    pub chain_bytes: u64,
    /// When it was registered.
    pub created: Stamp,
}

impl ChainInfo {
    fn new(chain_id: ChainId, row: ChainRow) -> Self {
        let ChainRow { diff_id, parent, layer, depth, diff_bytes, chain_bytes, created } = row;
        Self { chain_id, diff_id, parent, layer, depth, diff_bytes, chain_bytes, created }
    }
}

/// What counts on a registered layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Users {
    /// Layers registered on top of it.
    pub children: Vec<ChainId>,
    /// Who holds it for good, and how often.
    pub holders: Vec<(String, u64)>,
    /// References of this process.
    pub refs_count: usize,
}

impl Users {
    fn none(&self) -> bool {
        self.children.is_empty() && self.holders.is_empty() && self.refs_count == 0
    }
}

/// A layer that went because nothing counted on it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemovedLayer {
    /// The chain that it completed.
    pub chain_id: ChainId,
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// Bytes in files of the whole chain.
    pub chain_bytes: u64,
    /// Bytes in files of this layer.
    pub diff_bytes: u64,
}

pub(crate) fn owner(chain: &ChainId) -> Owner {
    Owner::new("chain", chain)
}

/// What is known of the layers of an image, bottom first, to be put into the layer store with it.
///
/// # Errors
/// [`LayerError`].
pub fn chain_layers(store: &Store, diff_ids: &[DiffId], layers: &[LayerId]) -> Result<Vec<ChainLayer>, LayerError> {
    debug_assert_eq!(diff_ids.len(), layers.len());
    let known = |(diff_id, layer): (&DiffId, &LayerId)| {
        let content_bytes = store.layers().info(*layer)?.usage.content_bytes;
        Ok(ChainLayer { diff_id: *diff_id, layer: *layer, content_bytes })
    };
    diff_ids.iter().zip(layers).map(known).collect()
}

/// The layers of a chain that is in the layer store, bottom first, by its diff IDs; `None` if it is not there.
///
/// # Errors
/// [`CatalogueError`].
pub fn layers_of_chain(rows: &impl Rows, diff_ids: &[DiffId]) -> Result<Option<Vec<LayerId>>, CatalogueError> {
    layers_of(rows, ChainId::of(diff_ids))
}

/// Puts the rows of a whole chain that are not there yet; its last chain ID. Whoever does so must hold that one in the
/// same transaction.
pub(crate) fn put_chain(tx: &mut Tx<'_>, layers: &[ChainLayer]) -> Result<Option<ChainId>, CatalogueError> {
    layers.iter().try_fold(None, |parent, layer| put_layer(tx, parent, layer).map(Some))
}

/// Puts a layer's row unless its chain is there: then the layer that is there stands.
fn put_layer(tx: &mut Tx<'_>, parent: Option<ChainId>, new: &ChainLayer) -> Result<ChainId, CatalogueError> {
    let chain = ChainId::extend(parent, new.diff_id);
    if tx.contains(&CHAINS, &chain)? {
        return Ok(chain);
    }
    let below = parent.map(|parent| tx.get(&CHAINS, &parent)).transpose()?.flatten();
    assert_eq!(below.is_some(), parent.is_some(), "a parent stays as long as somebody counts on it");
    let row = ChainRow::on(parent.zip(below.as_ref()), new.diff_id, (new.layer, new.content_bytes), tx.now());
    tx.hold(&owner(&chain), new.layer)?;
    tx.put(&CHAINS, &chain, &row)?;
    if let Some(parent) = parent {
        tx.put(&CHILDREN, &(parent, chain), &())?;
    }
    Ok(chain)
}

/// Lets `holder` count on a chain once more.
pub(crate) fn hold_chain(tx: &mut Tx<'_>, chain: ChainId, holder: &str) -> Result<(), CatalogueError> {
    debug_assert!(tx.contains(&CHAINS, &chain)?, "only what is there is held");
    let key = (chain, holder.to_owned());
    let count = tx.get(&HOLDS, &key)?.unwrap_or(0) + 1;
    tx.put(&HOLDS, &key, &count).map(drop)
}

/// Takes one hold of `holder` back; what goes by that. `None` if it held nothing.
pub(crate) fn unhold_chain(
    tx: &mut Tx<'_>,
    chain: ChainId,
    holder: &str,
) -> Result<Option<Vec<RemovedLayer>>, CatalogueError> {
    let key = (chain, holder.to_owned());
    match tx.get(&HOLDS, &key)? {
        None => return Ok(None),
        Some(0 | 1) => drop(tx.remove(&HOLDS, &key)?),
        Some(count) => tx.put(&HOLDS, &key, &(count - 1))?,
    }
    remove_unused(tx, chain).map(Some)
}

/// Removes a chain's row if nothing counts on it, and so on with its parent.
fn remove_unused(tx: &mut Tx<'_>, chain: ChainId) -> Result<Vec<RemovedLayer>, CatalogueError> {
    let mut removed = Vec::new();
    let mut next = Some(chain);
    while let Some(chain_id) = next {
        if !users(tx, chain_id)?.none() {
            break;
        }
        let Some(row) = tx.take(&CHAINS, &chain_id)? else { break };
        tx.unhold_all(&owner(&chain_id))?;
        if let Some(parent) = row.parent {
            tx.remove(&CHILDREN, &(parent, chain_id))?;
        }
        let ChainRow { diff_id, chain_bytes, diff_bytes, parent, .. } = row;
        removed.push(RemovedLayer { chain_id, diff_id, chain_bytes, diff_bytes });
        next = parent;
    }
    Ok(removed)
}

fn users(rows: &impl Rows, chain: ChainId) -> Result<Users, CatalogueError> {
    Ok(Users {
        children: rows.prefixed(&CHILDREN, &chain)?.into_iter().map(|((_, child), ())| child).collect(),
        holders: rows.prefixed(&HOLDS, &chain)?.into_iter().map(|((_, holder), count)| (holder, count)).collect(),
        refs_count: rows.prefixed(&REFS, &chain)?.len(),
    })
}

/// The layers of a chain, bottom first; `None` if it is not there.
pub(crate) fn layers_of(rows: &impl Rows, chain: Option<ChainId>) -> Result<Option<Vec<LayerId>>, CatalogueError> {
    let mut layers = Vec::new();
    let mut next = chain;
    while let Some(chain) = next {
        let Some(row) = rows.get(&CHAINS, &chain)? else { return Ok(None) };
        layers.push(row.layer);
        next = row.parent;
    }
    layers.reverse();
    Ok(Some(layers))
}

/// Layers by chain, and writable layers by name.
#[derive(Debug, Clone)]
pub struct LayerStore {
    store: Store,
    options: LayerStoreOptions,
}

impl LayerStore {
    /// Opens the layer store of a store. References that a dead process left are dropped, and with them what only they
    /// counted on; the cost is one look at each.
    ///
    /// # Errors
    /// [`LayerStoreError::Catalogue`].
    pub fn open(store: &Store, options: LayerStoreOptions) -> Result<Self, LayerStoreError> {
        let living: HashSet<LeaseId> = store.leases()?.into_iter().map(|lease| lease.id).collect();
        let is_living = |lease: LeaseId| living.contains(&lease);
        let refs: Vec<_> = store.read(|rows| rows.readable(&REFS))?;
        let stale: Vec<(ChainId, LeaseId)> =
            refs.into_iter().map(|(key, ())| key).filter(|(_, lease)| !is_living(*lease)).collect();
        if !stale.is_empty() {
            store.write(|tx| {
                for key in &stale {
                    tx.remove(&REFS, key)?;
                    remove_unused(tx, key.0)?;
                }
                Ok::<_, CatalogueError>(())
            })?;
        }
        rw::drop_dead_refs(store, &is_living)?;
        Ok(Self { store: store.clone(), options })
    }

    /// The store below.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How layers are kept and mounted.
    pub fn driver(&self) -> &'static str {
        self.store.driver()
    }

    /// Makes a layer of a tar (packed or plain) on top of `parent`, or of nothing, and gives a reference to it. One pass:
    /// unpacked, recorded and hashed; no copy of the tar is kept unless its files could not give it back. If the chain
    /// is there by now, the reference is to the layer that is there.
    ///
    /// # Errors
    /// [`LayerStoreError::DoesNotExist`] for the parent, [`LayerStoreError::MaxDepth`], [`LayerStoreError::Transfer`]
    /// for a tar that is not one or not whole. Nothing is registered then.
    pub fn register(
        &self,
        stream: impl Read + Send,
        compression: Compression,
        parent: Option<ChainId>,
        transfer: &Transfer<'_>,
    ) -> Result<LayerRef, LayerStoreError> {
        let below = self.begin_child(parent)?;
        let received = transfer.receive_layer(stream, compression, &below.layers, parent)?;
        self.finish_child(received.layer, received.diff_id, below)
    }

    /// Puts a chain of layers that somebody else made, bottom first, and gives a reference to the topmost; what is there
    /// already stays. The caller's lease holds the layers.
    ///
    /// # Errors
    /// [`LayerStoreError::Catalogue`]. Nothing is put then.
    pub fn adopt(&self, layers: &[ChainLayer]) -> Result<Option<LayerRef>, LayerStoreError> {
        let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
        let Some(chain) = ChainId::of(&diff_ids) else { return Ok(None) };
        let lease = self.ref_lease(&chain)?;
        let info = self.store.write(|tx| {
            put_chain(tx, layers)?;
            tx.put(&REFS, &(chain, lease.id()), &())?;
            let row = tx.get(&CHAINS, &chain)?.expect("because it was just put");
            Ok::<_, CatalogueError>(ChainInfo::new(chain, row))
        })?;
        Ok(Some(LayerRef { store: self.store.clone(), info, lease: Some(lease) }))
    }

    /// Holds the parent of a layer that is being made.
    fn begin_child(&self, parent: Option<ChainId>) -> Result<Below, LayerStoreError> {
        let parent = parent.map(|parent| self.get(parent)).transpose()?;
        let chain = parent.as_ref().map(LayerRef::chain_id);
        if let Some(parent) = &parent
            && parent.info.depth >= self.options.depth_max
        {
            let (depth, maximum) = (parent.info.depth, self.options.depth_max);
            return Err(LayerStoreError::MaxDepth { parent: parent.chain_id(), depth, maximum });
        }
        let layers = self.store.read(|rows| layers_of(rows, chain))?;
        let layers = layers.ok_or_else(|| no_such_chain(chain.expect("because the empty chain is always there")))?;
        Ok(Below { parent, layers })
    }

    fn finish_child(&self, layer: LayerId, diff_id: DiffId, below: Below) -> Result<LayerRef, LayerStoreError> {
        let content_bytes = self.store.layers().info(layer)?.usage.content_bytes;
        let new = ChainLayer { diff_id, layer, content_bytes };
        let parent = below.parent.as_ref().map(LayerRef::chain_id);
        let lease = self.ref_lease(&ChainId::extend(parent, diff_id))?;
        let info = self.store.write(|tx| {
            let chain = put_layer(tx, parent, &new)?;
            tx.put(&REFS, &(chain, lease.id()), &())?;
            let row = tx.get(&CHAINS, &chain)?.expect("because it was just put");
            Ok::<_, CatalogueError>(ChainInfo::new(chain, row))
        })?;
        // It has a child now, so nothing goes with this reference, and nobody waits for its end.
        drop(below.parent);
        Ok(LayerRef { store: self.store.clone(), info, lease: Some(lease) })
    }

    fn ref_lease(&self, what: &dyn std::fmt::Display) -> Result<Lease, CatalogueError> {
        self.store.lease(LeaseOptions::process(format!("reference to {what}")))
    }

    /// One more reference to a layer, distinct from all others.
    ///
    /// # Errors
    /// [`LayerStoreError::DoesNotExist`].
    pub fn get(&self, chain: ChainId) -> Result<LayerRef, LayerStoreError> {
        let lease = self.ref_lease(&chain)?;
        // What may be lost: the reference, which ends with this process anyway.
        let info = self.store.write_lazily(|tx| {
            let row = tx.get(&CHAINS, &chain)?.ok_or_else(|| no_such_chain(chain))?;
            tx.put(&REFS, &(chain, lease.id()), &())?;
            Ok::<_, LayerStoreError>(ChainInfo::new(chain, row))
        })?;
        Ok(LayerRef { store: self.store.clone(), info, lease: Some(lease) })
    }

    /// Gives a reference up. If it was the last thing that counted on the layer, the layer goes, and so on down the
    /// chain: what went, child before parent.
    ///
    /// # Errors
    /// [`LayerStoreError::NotRetained`] if this store does not have it; [`LayerStoreError::Catalogue`], and the
    /// reference goes with the process then.
    pub fn release(&self, mut layer: LayerRef) -> Result<Vec<RemovedLayer>, LayerStoreError> {
        if layer.store.root() != self.store.root() {
            let (what, holder) = (format!("layer {}", layer.info.chain_id), "a reference of another store".to_owned());
            return Err(LayerStoreError::NotRetained { what, holder });
        }
        let Some(lease) = layer.lease.take() else { return Ok(vec![]) };
        let removed = release_ref(&self.store, &layer.info, &lease, Urgent::Durably)?;
        lease.release()?;
        Ok(removed)
    }

    /// Lets `holder` hold a layer for good, beyond the life of this process. It may hold one several times.
    ///
    /// # Errors
    /// [`LayerStoreError::Catalogue`].
    pub fn hold(&self, layer: &LayerRef, holder: &str) -> Result<(), LayerStoreError> {
        Ok(self.store.write(|tx| hold_chain(tx, layer.info.chain_id, holder))?)
    }

    /// Takes one hold of `holder` back: what went by that, child before parent. An unknown layer is nothing to let go.
    ///
    /// # Errors
    /// [`LayerStoreError::NotRetained`] if it holds none.
    pub fn let_go(&self, chain: ChainId, holder: &str) -> Result<Vec<RemovedLayer>, LayerStoreError> {
        self.store.write(|tx| {
            if !tx.contains(&CHAINS, &chain)? {
                return Ok(vec![]);
            }
            unhold_chain(tx, chain, holder)?.ok_or_else(|| LayerStoreError::NotRetained {
                what: format!("layer {chain}"),
                holder: holder.to_owned(),
            })
        })
    }

    /// The chain ID that `wanted` is, or is the beginning of.
    ///
    /// # Errors
    /// [`LayerStoreError::DoesNotExist`], [`LayerStoreError::Ambiguous`].
    pub fn find(&self, wanted: &str) -> Result<ChainId, LayerStoreError> {
        let missing = || LayerStoreError::DoesNotExist { wanted: wanted.to_owned() };
        if let Ok(chain) = wanted.parse::<ChainId>() {
            return match self.store.read(|rows| rows.contains(&CHAINS, &chain))? {
                true => Ok(chain),
                false => Err(missing()),
            };
        }
        let digits = wanted.strip_prefix("sha256:").unwrap_or(wanted);
        if digits.len() < ID_PREFIX_DIGITS_MIN || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let mut fits = self.list()?;
        fits.retain(|info| info.chain_id.hex().starts_with(digits));
        match fits.as_slice() {
            [one] => Ok(one.chain_id),
            [] => Err(missing()),
            several => Err(LayerStoreError::Ambiguous { wanted: wanted.to_owned(), count: several.len() }),
        }
    }

    /// What is known of a layer.
    ///
    /// # Errors
    /// [`LayerStoreError::DoesNotExist`].
    pub fn info(&self, chain: ChainId) -> Result<ChainInfo, LayerStoreError> {
        let row: Option<ChainRow> = self.store.read(|rows| rows.get(&CHAINS, &chain))?;
        Ok(ChainInfo::new(chain, row.ok_or_else(|| no_such_chain(chain))?))
    }

    /// What counts on a layer.
    ///
    /// # Errors
    /// [`LayerStoreError::Catalogue`].
    pub fn users(&self, chain: ChainId) -> Result<Users, LayerStoreError> {
        Ok(self.store.read(|rows| users(rows, chain))?)
    }

    /// All layers, by chain ID.
    ///
    /// # Errors
    /// [`LayerStoreError::Catalogue`].
    pub fn list(&self) -> Result<Vec<ChainInfo>, LayerStoreError> {
        let mut all = Vec::new();
        self.store.read(|rows| {
            rows.scan(&CHAINS, |chain, row| {
                all.push(ChainInfo::new(chain, row));
                ControlFlow::Continue(())
            })
        })?;
        Ok(all)
    }

    /// Writes the tar that a layer was registered from, byte for byte; hashed on the way.
    ///
    /// # Errors
    /// [`LayerStoreError::Transfer`]. What was written is part of the tar, or not what it should be: throw it away.
    pub fn export(&self, layer: &LayerRef, out: impl Write, transfer: &Transfer<'_>) -> Result<(), LayerStoreError> {
        Ok(transfer.write_tar(layer.info.diff_id, Some(layer.info.layer), out)?)
    }
}

/// What a new layer stands on.
struct Below {
    parent: Option<LayerRef>,
    layers: Vec<LayerId>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Urgent {
    Durably,
    /// Where nobody waits for the result. What may be lost: that a reference ended, which the next open finds out.
    Lazily,
}

fn release_ref(
    store: &Store,
    info: &ChainInfo,
    lease: &Lease,
    urgent: Urgent,
) -> Result<Vec<RemovedLayer>, LayerStoreError> {
    let key = (info.chain_id, lease.id());
    let change = |tx: &mut Tx<'_>| {
        if !tx.remove(&REFS, &key)? {
            let (what, holder) = (format!("layer {}", key.0), format!("reference {}", key.1));
            return Err(LayerStoreError::NotRetained { what, holder });
        }
        Ok(remove_unused(tx, key.0)?)
    };
    match urgent {
        Urgent::Durably => store.write(change),
        Urgent::Lazily => store.write_lazily(change),
    }
}

/// A counted reference to a registered layer, which stays as long as it lives. Dropping it releases it too, but nobody
/// learns what went.
#[derive(Debug)]
#[must_use = "a layer that nothing counts on goes"]
pub struct LayerRef {
    store: Store,
    info: ChainInfo,
    /// `None` once it is released.
    lease: Option<Lease>,
}

impl LayerRef {
    /// The chain that the layer completes.
    pub fn chain_id(&self) -> ChainId {
        self.info.chain_id
    }

    /// What is known of the layer.
    pub fn info(&self) -> &ChainInfo {
        &self.info
    }
}

impl Drop for LayerRef {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            // What cannot be released now goes when the layer store is opened next.
            drop(release_ref(&self.store, &self.info, &lease, Urgent::Lazily));
        }
    }
}
