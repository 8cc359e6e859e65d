//! The tables of this crate and their rows. docs/format/catalogue.md draws them byte by byte; the
//! two change together, and a changed row gets a new version.
//!
//! ```text
//! meta              name                     -> number     schema, session, clean
//! leases            lease                    -> created, expires, label
//! lease_holds       lease, resource          -> ()
//! holds             owner, resource          -> ()         permanent
//! edges             resource, resource       -> ()         the first keeps the second
//! refs              resource                 -> count      of the rows of the last three that name it
//! loose             resource                 -> ()         those that have a row and no count
//! blobs             digest                   -> size, created
//! layers            layer                    -> kind, diff ID, chain ID, usage, created, tar_split, beside
//! layers_by_diff    diff ID, layer           -> ()         self-contained ones
//! layers_by_chain   chain ID, layer          -> ()         those that need the layers below
//! snapshots         snapshot                 -> layers, fix-up, created
//! squashes          digest of a layer list   -> layer      bottoms of deep stacks
//! actives           active                   -> base, volatile, created, usage, sealed, changed
//! sealing           active                   -> layer      a persistent upper on its way into a layer
//! trash             resource                 -> size       rows are gone, bytes yet to go
//! totals            kind                     -> count, size, inodes
//! ```
//!
//! Every put and remove of a counted row goes through the functions here, which keep `totals` and
//! the two `by_` indexes in step; `refs` and `loose` are kept by [`crate::refs`].

use plies_archive::Usage;
use plies_oci::{BlobDigest, ChainId, DiffId};
use serde::{Deserialize, Serialize};

use super::{CatalogueError, Key, KeyReader, Row, Rows, Table, Tx};
use crate::{ActiveId, LayerId, LeaseId, Owner, Resource, SnapshotId, Stamp};

/// The version of all of the above, and of the layout of the directories.
///
/// 1 had neither `refs` nor `loose`. 2 knew no packed layers: its programs take them for damaged, so they must not open them.
pub(crate) const SCHEMA: u64 = 3;

pub(crate) const META: Table<String, u64> = Table::new("meta");
pub(crate) const LEASES: Table<LeaseId, LeaseRow> = Table::new("leases");
pub(crate) const LEASE_HOLDS: Table<(LeaseId, Resource), ()> = Table::new("lease_holds");
pub(crate) const HOLDS: Table<(Owner, Resource), ()> = Table::new("holds");
pub(crate) const EDGES: Table<(Resource, Resource), ()> = Table::new("edges");
pub(crate) const REFS: Table<Resource, u64> = Table::new("refs");
pub(crate) const LOOSE: Table<Resource, ()> = Table::new("loose");
pub(crate) const BLOBS: Table<BlobDigest, BlobRow> = Table::new("blobs");
pub(crate) const LAYERS: Table<LayerId, LayerRow> = Table::new("layers");
pub(crate) const LAYERS_BY_DIFF: Table<(DiffId, LayerId), ()> = Table::new("layers_by_diff");
pub(crate) const LAYERS_BY_CHAIN: Table<(ChainId, LayerId), ()> = Table::new("layers_by_chain");
pub(crate) const SNAPSHOTS: Table<SnapshotId, SnapshotRow> = Table::new("snapshots");
pub(crate) const SQUASHES: Table<BlobDigest, LayerId> = Table::new("squashes");
pub(crate) const ACTIVES: Table<ActiveId, ActiveRow> = Table::new("actives");
pub(crate) const SEALING: Table<ActiveId, LayerId> = Table::new("sealing");
pub(crate) const TRASH: Table<Resource, u64> = Table::new("trash");
pub(crate) const TOTALS: Table<Kind, TotalRow> = Table::new("totals");

/// Key of [`META`]: [`SCHEMA`] when the store was made or migrated.
pub(crate) const META_SCHEMA: &str = "schema";
/// Key of [`META`]: how many times a process has begun to write here. The upper half of fresh ids.
pub(crate) const META_SESSION: &str = "session";
/// Key of [`META`]: 1 if the last session ended well, 0 while one runs or after it was killed.
pub(crate) const META_CLEAN: &str = "clean";
/// Key of [`META`]: 1 if [`DriverKind::Auto`](crate::DriverKind::Auto) keeps layers that come as tars packed here, 0 if not.
/// Said when the store is made, and again when somebody has its layers kept in another form.
pub(crate) const META_PACKS: &str = "packs";
/// Key of [`META`]: the layer whose directory is being exchanged; see [`crate::Transfer::repack`] and `recover::settle`.
pub(crate) const META_REPACKING: &str = "repacking";

/// A lease; without expiry it belongs to the process that holds the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseRow {
    pub(crate) created: Stamp,
    pub(crate) expires: Option<Stamp>,
    pub(crate) label: String,
}

impl Row for LeaseRow {
    const VERSION: u8 = 1;
}

/// A verified blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlobRow {
    pub(crate) size_bytes: u64,
    pub(crate) created: Stamp,
}

impl Row for BlobRow {
    const VERSION: u8 = 1;
}

/// How a layer came to be, and so how it may be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LayerKind {
    /// A canonical difference.
    Full,
    /// Directories only, computed for one list of layers. No diff ID; never exported.
    FixUp,
    /// The bottom of a deep stack hard-linked into one layer. Found by the digest of its list.
    Squash(BlobDigest),
}

/// A published layer.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRow {
    pub(crate) kind: LayerKind,
    pub(crate) diff_id: Option<DiffId>,
    /// Not self-contained: only good on top of exactly the layers that this chain ID ends with.
    pub(crate) chain_id: Option<ChainId>,
    pub(crate) usage: StoredUsage,
    pub(crate) created: Stamp,
    /// Whether a tar-split lies beside it.
    pub(crate) tar_split: bool,
    /// What its directory costs besides the tree: itself, the index, the sidecar, the tar-split. Nothing of layers of
    /// version 1, until [`crate::usage`] has looked.
    #[serde(default)]
    pub(crate) beside: StoredUsage,
    /// Its diff ID is another program's word: nobody has read its files since they were taken over.
    #[serde(default)]
    pub(crate) unverified: bool,
}

/// What lies beside a layer is no part of what it is: the sidecar of one of version 1 never tells. Nor is what somebody found
/// out about it since.
impl PartialEq for LayerRow {
    fn eq(&self, other: &Self) -> bool {
        let Self { kind, diff_id, chain_id, usage, created, tar_split, beside: _, unverified: _ } = other;
        (self.kind, self.diff_id, self.chain_id) == (*kind, *diff_id, *chain_id)
            && (self.usage, self.created, self.tar_split) == (*usage, *created, *tar_split)
    }
}

/// A layer of version 1; in version 2 what lies beside it follows.
#[derive(Deserialize)]
struct LayerRow1 {
    kind: LayerKind,
    diff_id: Option<DiffId>,
    chain_id: Option<ChainId>,
    usage: StoredUsage,
    created: Stamp,
    tar_split: bool,
}

impl Row for LayerRow {
    const VERSION: u8 = 3;

    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        let (LayerRow1 { kind, diff_id, chain_id, usage, created, tar_split }, rest) =
            postcard::take_from_bytes(body).ok()?;
        let (beside, rest) = match version {
            1 => (StoredUsage::default(), rest),
            2 => postcard::take_from_bytes(rest).ok()?,
            _ => return None,
        };
        let unverified = false;
        rest.is_empty().then_some(Self { kind, diff_id, chain_id, usage, created, tar_split, beside, unverified })
    }
}

/// `plies_archive::Usage` as it is stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredUsage {
    pub(crate) size_bytes: u64,
    pub(crate) inodes: u64,
    pub(crate) content_bytes: u64,
}

impl From<Usage> for StoredUsage {
    fn from(usage: Usage) -> Self {
        let Usage { size_bytes, inodes, content_bytes } = usage;
        Self { size_bytes, inodes, content_bytes }
    }
}

impl From<StoredUsage> for Usage {
    fn from(usage: StoredUsage) -> Self {
        let StoredUsage { size_bytes, inodes, content_bytes } = usage;
        Self { size_bytes, inodes, content_bytes }
    }
}

/// A stack, bottom first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRow {
    pub(crate) layers: Vec<LayerId>,
    pub(crate) fixup: Option<LayerId>,
    pub(crate) created: Stamp,
}

impl Row for SnapshotRow {
    const VERSION: u8 = 1;
}

/// An upper directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ActiveRow {
    pub(crate) base: Option<SnapshotId>,
    pub(crate) volatile: bool,
    pub(crate) created: Stamp,
    /// As of the last time somebody measured it.
    pub(crate) usage: Option<StoredUsage>,
    /// What became of it. Its bytes are that layer now, and the row goes when nobody holds it.
    pub(crate) sealed: Option<LayerId>,
    /// Somebody may have written to it since it was measured, or never was it.
    pub(crate) changed: bool,
}

/// An upper directory of version 1.
#[derive(Deserialize)]
struct ActiveRow1 {
    base: Option<SnapshotId>,
    volatile: bool,
    created: Stamp,
    usage: Option<StoredUsage>,
    sealed: Option<LayerId>,
}

impl Row for ActiveRow {
    const VERSION: u8 = 2;

    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        (version == 1).then_some(())?;
        let (ActiveRow1 { base, volatile, created, usage, sealed }, rest) = postcard::take_from_bytes(body).ok()?;
        rest.is_empty().then_some(Self { base, volatile, created, usage, sealed, changed: true })
    }
}

impl Row for LayerId {
    const VERSION: u8 = 1;
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Blobs = 1,
    Layers = 2,
    Actives = 3,
    Trash = 4,
    Sidecars = 5,
}

impl Kind {
    pub(crate) const ALL: [Kind; 5] = [Kind::Blobs, Kind::Layers, Kind::Actives, Kind::Trash, Kind::Sidecars];
}

impl Key for Kind {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        let byte = u8::decode(input)?;
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// The sum over the rows of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TotalRow {
    pub(crate) count: u64,
    pub(crate) size_bytes: u64,
    pub(crate) inodes: u64,
}

impl Row for TotalRow {
    const VERSION: u8 = 1;
}

impl TotalRow {
    pub(crate) fn one(size_bytes: u64, inodes: u64) -> Self {
        Self { count: 1, size_bytes, inodes }
    }

    /// Saturates, here and below: a total that is wrong is re-derivable and reported by the check, and must not stop
    /// anything.
    pub(crate) fn add(&mut self, other: TotalRow) {
        self.count = self.count.saturating_add(other.count);
        self.size_bytes = self.size_bytes.saturating_add(other.size_bytes);
        self.inodes = self.inodes.saturating_add(other.inodes);
    }

    pub(crate) fn subtract(&mut self, other: TotalRow) {
        self.count = self.count.saturating_sub(other.count);
        self.size_bytes = self.size_bytes.saturating_sub(other.size_bytes);
        self.inodes = self.inodes.saturating_sub(other.inodes);
    }
}

impl BlobRow {
    pub(crate) fn total(&self) -> TotalRow {
        TotalRow::one(self.size_bytes, 1)
    }
}

impl LayerRow {
    /// Its tree alone.
    pub(crate) fn total(&self) -> TotalRow {
        TotalRow::one(self.usage.size_bytes, self.usage.inodes)
    }

    /// What lies beside the tree.
    pub(crate) fn sidecars(&self) -> TotalRow {
        // Of a layer of version 1 nothing was ever counted.
        let StoredUsage { size_bytes, inodes, .. } = self.beside;
        TotalRow { count: u64::from(inodes > 0), size_bytes, inodes }
    }

    /// All that its removal frees.
    pub(crate) fn removal_bytes(&self) -> u64 {
        self.usage.size_bytes.saturating_add(self.beside.size_bytes)
    }
}

impl ActiveRow {
    pub(crate) fn total(&self) -> TotalRow {
        let usage = self.usage.unwrap_or_default();
        TotalRow::one(usage.size_bytes, usage.inodes)
    }
}

/// Whether `resource` has its row.
pub(crate) fn exists(rows: &impl Rows, resource: Resource) -> Result<bool, CatalogueError> {
    match resource {
        Resource::Blob(digest) => rows.contains(&BLOBS, &digest),
        Resource::Layer(id) => rows.contains(&LAYERS, &id),
        Resource::Snapshot(id) => rows.contains(&SNAPSHOTS, &id),
        Resource::Active(id) => rows.contains(&ACTIVES, &id),
    }
}

impl Tx<'_> {
    fn count(&mut self, kind: Kind, put: Option<TotalRow>, removed: Option<TotalRow>) -> Result<(), CatalogueError> {
        let mut total = self.get(&TOTALS, &kind)?.unwrap_or_default();
        let before = total;
        if let Some(removed) = removed {
            total.subtract(removed);
        }
        if let Some(put) = put {
            total.add(put);
        }
        if total != before {
            self.put(&TOTALS, &kind, &total)?;
        }
        Ok(())
    }

    /// Puts a blob's row unless it is there; true if it was not.
    pub(crate) fn put_blob(&mut self, digest: BlobDigest, size_bytes: u64) -> Result<bool, CatalogueError> {
        if self.contains(&BLOBS, &digest)? {
            return Ok(false);
        }
        let row = BlobRow { size_bytes, created: self.now() };
        self.put(&BLOBS, &digest, &row)?;
        self.put(&LOOSE, &digest.into(), &())?;
        self.count(Kind::Blobs, Some(row.total()), None)?;
        Ok(true)
    }

    /// Puts or replaces a layer's row and keeps its indexes.
    pub(crate) fn put_layer(&mut self, id: LayerId, row: &LayerRow) -> Result<(), CatalogueError> {
        let before = self.take_layer(id)?;
        debug_assert!(before.as_ref().is_none_or(|before| before.usage == row.usage), "a layer is immutable");
        self.put(&LAYERS, &id, row)?;
        if before.is_none() {
            self.put(&LOOSE, &id.into(), &())?;
        }
        match (row.diff_id, row.chain_id) {
            (_, Some(chain_id)) => self.put(&LAYERS_BY_CHAIN, &(chain_id, id), &())?,
            (Some(diff_id), None) => self.put(&LAYERS_BY_DIFF, &(diff_id, id), &())?,
            (None, None) => {}
        }
        if let LayerKind::Squash(list) = row.kind {
            self.put(&SQUASHES, &list, &id)?;
        }
        self.count(Kind::Layers, Some(row.total()), None)?;
        self.count(Kind::Sidecars, Some(row.sidecars()), None)
    }

    /// Puts the row of a layer that is there, as the same layer kept in another form.
    pub(crate) fn replace_layer(&mut self, id: LayerId, row: &LayerRow) -> Result<(), CatalogueError> {
        let Some(before) = self.get(&LAYERS, &id)? else { return Ok(()) };
        self.put(&LAYERS, &id, row)?;
        self.count(Kind::Layers, Some(row.total()), Some(before.total()))?;
        self.count(Kind::Sidecars, Some(row.sidecars()), Some(before.sidecars()))
    }

    pub(crate) fn take_layer(&mut self, id: LayerId) -> Result<Option<LayerRow>, CatalogueError> {
        let Some(row) = self.get(&LAYERS, &id)? else { return Ok(None) };
        self.remove(&LAYERS, &id)?;
        if let Some(chain_id) = row.chain_id {
            self.remove(&LAYERS_BY_CHAIN, &(chain_id, id))?;
        }
        if let Some(diff_id) = row.diff_id {
            self.remove(&LAYERS_BY_DIFF, &(diff_id, id))?;
        }
        if let LayerKind::Squash(list) = row.kind {
            self.remove(&SQUASHES, &list)?;
        }
        self.count(Kind::Layers, None, Some(row.total()))?;
        self.count(Kind::Sidecars, None, Some(row.sidecars()))?;
        Ok(Some(row))
    }

    /// Puts a snapshot's row unless it is there; true if it was not.
    pub(crate) fn put_snapshot(&mut self, id: SnapshotId, row: &SnapshotRow) -> Result<bool, CatalogueError> {
        if self.contains(&SNAPSHOTS, &id)? {
            return Ok(false);
        }
        self.put(&SNAPSHOTS, &id, row)?;
        self.put(&LOOSE, &id.into(), &())?;
        Ok(true)
    }

    /// Puts or replaces an active's row.
    pub(crate) fn put_active(&mut self, id: ActiveId, row: &ActiveRow) -> Result<(), CatalogueError> {
        let before = self.get(&ACTIVES, &id)?;
        self.put(&ACTIVES, &id, row)?;
        if before.is_none() {
            self.put(&LOOSE, &id.into(), &())?;
        }
        self.count(Kind::Actives, Some(row.total()), before.map(|before| before.total()))
    }

    /// Notes that an upper may be written to by somebody whom this process does not see, or was: its size is no longer
    /// known. Nothing if there is no such upper.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn mark_changed(&mut self, id: ActiveId) -> Result<(), CatalogueError> {
        match self.get(&ACTIVES, &id)? {
            Some(row) if !row.changed => self.put_active(id, &ActiveRow { changed: true, ..row }),
            _ => Ok(()),
        }
    }

    /// Moves one resource's row to the trash, with its edges and whatever else names it; what they
    /// led to may become loose. Holds are not looked at: the caller knows that there are none.
    /// Returns the bytes that will be freed.
    pub(crate) fn discard(&mut self, resource: Resource) -> Result<Option<u64>, CatalogueError> {
        self.remove(&LOOSE, &resource)?;
        let size_bytes = match resource {
            Resource::Blob(digest) => {
                let Some(row) = self.take(&BLOBS, &digest)? else { return Ok(None) };
                self.count(Kind::Blobs, None, Some(row.total()))?;
                row.size_bytes
            }
            Resource::Layer(id) => {
                let Some(row) = self.take_layer(id)? else { return Ok(None) };
                row.removal_bytes()
            }
            Resource::Active(id) => {
                let Some(row) = self.take(&ACTIVES, &id)? else { return Ok(None) };
                self.count(Kind::Actives, None, Some(row.total()))?;
                row.usage.unwrap_or_default().size_bytes
            }
            Resource::Snapshot(id) => {
                if !self.remove(&SNAPSHOTS, &id)? {
                    return Ok(None);
                }
                0
            }
        };
        for (edge, ()) in self.prefixed(&EDGES, &resource)? {
            self.remove_ref(&EDGES, &edge, edge.1)?;
        }
        // A snapshot has no bytes of its own.
        if !matches!(resource, Resource::Snapshot(_)) && self.insert(&TRASH, &resource, &size_bytes)? {
            self.count(Kind::Trash, Some(TotalRow::one(size_bytes, 0)), None)?;
        }
        Ok(Some(size_bytes))
    }

    /// The bytes of `resource` are gone (or it lives again).
    pub(crate) fn empty_trash(&mut self, resource: Resource) -> Result<(), CatalogueError> {
        if let Some(size_bytes) = self.take(&TRASH, &resource)? {
            self.count(Kind::Trash, None, Some(TotalRow::one(size_bytes, 0)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use proptest::prelude::*;

    use super::super::table::decode_row;
    use super::super::{Row, encode_row};
    use super::*;

    /// Anything is a row or an error, and a row is written as something that is read again, to the same.
    fn comes_back<V: Row + PartialEq + Debug>(bytes: &[u8]) -> bool {
        let again = |row: &V| decode_row::<V>("test", &[], &encode_row(row)).unwrap() == *row;
        let whole = decode_row::<V>("test", &[], bytes).as_ref().map_or(true, again);
        // Few bytes end where a row does: of others, the beginning.
        whole && postcard::take_from_bytes::<V>(bytes).as_ref().map_or(true, |(row, _)| again(row))
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_row_that_comes_back_or_an_error(
            // Low ones are tags and short lengths.
            bytes in prop::collection::vec(prop_oneof![3 => 0..3_u8, 1 => any::<u8>()], 0..160),
        ) {
            prop_assert!(comes_back::<LeaseRow>(&bytes));
            prop_assert!(comes_back::<BlobRow>(&bytes));
            prop_assert!(comes_back::<LayerRow>(&bytes));
            prop_assert!(comes_back::<SnapshotRow>(&bytes));
            prop_assert!(comes_back::<ActiveRow>(&bytes));
            prop_assert!(comes_back::<LayerId>(&bytes));
            prop_assert!(comes_back::<TotalRow>(&bytes));
            prop_assert!(comes_back::<u64>(&bytes));
            prop_assert!(comes_back::<()>(&bytes));
        }
    }

    #[test]
    fn layers_of_earlier_versions_are_verified_and_know_less() {
        let usage = StoredUsage { size_bytes: 1, inodes: 2, content_bytes: 3 };
        let beside = StoredUsage { size_bytes: 4, inodes: 5, content_bytes: 6 };
        let chain_id: Option<ChainId> = None;
        let first = (LayerKind::Full, Some(DiffId::from_bytes([7; 32])), chain_id, usage, Stamp::from_micros(8), true);
        let first = postcard::to_stdvec(&first).unwrap();
        let second = [first.clone(), postcard::to_stdvec(&beside).unwrap()].concat();
        for (version, body, beside) in [(1, &first, StoredUsage::default()), (2, &second, beside)] {
            let row = LayerRow::upgrade(version, body).unwrap();
            assert_eq!((row.usage, row.beside, row.tar_split, row.unverified), (usage, beside, true, false));
        }
        assert!(LayerRow::upgrade(1, &second).is_none() && LayerRow::upgrade(2, &first).is_none());
        assert!(LayerRow::upgrade(3, &second).is_none());
    }
}
