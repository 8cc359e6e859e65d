//! Rows of records, and everything that must change together with one.
//!
//! ```text
//! cache.records        RecordId               -> RecordRow   what it is and where its files are
//! cache.uses           RecordId               -> UseRow      last use and count; may lag
//! cache.children       (parent, child)        -> ()          who stands on whom
//! cache.by_chain       (ChainId, RecordId)    -> ()
//! cache.by_blob_chain  (digest, RecordId)     -> ()
//! cache.compositions   digest of the parents  -> RecordId    merges and diffs, to be found again
//! cache.actives        ActiveId               -> RecordId    mutable records
//! ```
//!
//! [`replace`] is the only place that writes them, so that a row, its indexes and its holds never disagree.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Duration;

use plies_oci::{BlobDigest, ChainId, DiffId, Sha256Hasher};
use plies_store::{ActiveId, CatalogueError, LayerId, Owner, Resource, Row, Rows, SnapshotId, Stamp, Table, Tx};
use serde::{Deserialize, Serialize};

use crate::{CacheKey, RecordId};

pub(crate) const RECORDS: Table<RecordId, RecordRow> = Table::new("cache.records");
pub(crate) const USES: Table<RecordId, UseRow> = Table::new("cache.uses");
pub(crate) const CHILDREN: Table<(RecordId, RecordId), ()> = Table::new("cache.children");
pub(crate) const BY_CHAIN: Table<(ChainId, RecordId), ()> = Table::new("cache.by_chain");
pub(crate) const BY_BLOB_CHAIN: Table<(BlobDigest, RecordId), ()> = Table::new("cache.by_blob_chain");
pub(crate) const COMPOSITIONS: Table<BlobDigest, IdRow> = Table::new("cache.compositions");
pub(crate) const ACTIVES: Table<ActiveId, IdRow> = Table::new("cache.actives");

/// Image references kept of one record. Each pull of a layer under another name adds one; the oldest go.
const IMAGE_REFS_MAX: usize = 64;

/// What a record stands on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Parents {
    /// Nothing.
    None,
    /// One record: this one is a layer on top of it.
    Layer(RecordId),
    /// Several, bottom first: this one shows them all.
    Merge(Vec<RecordId>),
    /// Two: this one is what leads from the first to the second. Without the second, everything is taken away.
    Diff {
        /// Where it starts.
        lower: RecordId,
        /// Where it ends.
        upper: Option<RecordId>,
    },
}

impl Parents {
    /// Their IDs, in order; one that is both ends of a diff comes twice.
    pub fn ids(&self) -> Vec<RecordId> {
        match self {
            Self::None => Vec::new(),
            Self::Layer(parent) => vec![*parent],
            Self::Merge(parents) => parents.clone(),
            Self::Diff { lower, upper } => [*lower].into_iter().chain(*upper).collect(),
        }
    }

    /// What a merge or a diff of these parents is found by.
    pub(crate) fn composition(&self) -> Option<BlobDigest> {
        let kind: &[u8] = match self {
            Self::None | Self::Layer(_) => return None,
            Self::Merge(_) => b"merge",
            Self::Diff { .. } => b"diff",
        };
        let mut hasher = Sha256Hasher::default();
        hasher.update(kind);
        self.ids().iter().for_each(|id| hasher.update(id.as_bytes()));
        Some(BlobDigest::from_bytes(hasher.finish()))
    }
}

/// Where a record's own files are: what it adds to its parents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// In an upper directory, which one holder at a time writes to.
    Mutable {
        /// The directory.
        active: ActiveId,
        /// The immutable record that shares it, once it was committed.
        committed_as: Option<RecordId>,
    },
    /// In the upper directory of a mutable record, which was committed and not finalized.
    Shared {
        /// That record.
        mutable: RecordId,
        /// Its directory.
        active: ActiveId,
    },
    /// In a layer; `None` if it adds nothing.
    Sealed {
        /// The layer.
        layer: Option<LayerId>,
    },
    /// In a blob that was not unpacked yet, and maybe not fetched.
    Lazy,
    /// Nowhere: a merge shows its parents, and a diff was not computed yet.
    Composed,
    /// In a whole stack, of a record that an older Plies made.
    Stack(SnapshotId),
}

/// What kind of thing a record keeps; decides what prune takes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum RecordType {
    /// A build step's result.
    #[default]
    Regular,
    /// Something of the cache's own.
    Internal,
    /// A frontend's image.
    Frontend,
    /// A build context.
    LocalSource,
    /// A checkout.
    GitCheckout,
    /// A cache mount.
    CacheMount,
}

impl RecordType {
    /// All of them, with the names that BuildKit gives them.
    pub const NAMES: [(RecordType, &'static str); 6] = [
        (Self::Regular, "regular"),
        (Self::Internal, "internal"),
        (Self::Frontend, "frontend"),
        (Self::LocalSource, "source.local"),
        (Self::GitCheckout, "source.git.checkout"),
        (Self::CacheMount, "exec.cachemount"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(kind, _)| *kind == self).map_or("regular", |(_, name)| name)
    }
}

/// The blob of a record's own files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRow {
    /// The blob; `None` if only its diff ID is known.
    pub digest: Option<BlobDigest>,
    /// Digest of its tar.
    pub diff_id: DiffId,
    /// Its media type.
    pub media_type: String,
    /// Its length.
    pub size_bytes: u64,
    /// Where else it can be had.
    pub urls: Vec<String>,
    /// What else its descriptor said.
    pub annotations: Vec<(String, String)>,
}

/// What is kept of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordRow {
    /// Where its own files are.
    pub state: State,
    /// What it stands on.
    pub parents: Parents,
    /// What it is, for people.
    pub description: String,
    /// What kind of thing it is.
    pub record_type: RecordType,
    /// Kept when its last ref goes, although it was never finalized (cache policy "retain").
    pub retain: bool,
    /// Never pruned.
    pub pinned: bool,
    /// When it was made.
    pub created_at: Stamp,
    /// Its blob, if it came from one or was made one.
    pub blob: Option<BlobRow>,
    /// Digest of all diff IDs below and of this.
    pub chain_id: Option<ChainId>,
    /// The same over blobs and diff IDs.
    pub blob_chain_id: Option<BlobDigest>,
    /// Images that it was a part of.
    pub image_refs: Vec<String>,
    /// All of its tree as one stack, once somebody needed it.
    pub snapshot: Option<SnapshotId>,
    /// How long it took to make what it adds; `None` if nobody saw it.
    pub took: Option<Duration>,
}

impl RecordRow {
    pub(crate) fn new(state: State, parents: Parents, created_at: Stamp) -> Self {
        Self {
            state,
            parents,
            description: String::new(),
            record_type: RecordType::Regular,
            retain: false,
            pinned: false,
            created_at,
            blob: None,
            chain_id: None,
            blob_chain_id: None,
            image_refs: Vec::new(),
            snapshot: None,
            took: None,
        }
    }

    /// Whether it can still be written to. Of a committed pair, the mutable one is.
    pub fn is_mutable(&self) -> bool {
        matches!(self.state, State::Mutable { .. })
    }

    /// Adds image references, each once.
    pub(crate) fn add_image_refs(&mut self, refs: &[String]) {
        for name in refs {
            if !self.image_refs.contains(name) {
                self.image_refs.push(name.clone());
            }
        }
        let surplus = self.image_refs.len().saturating_sub(IMAGE_REFS_MAX);
        self.image_refs.drain(..surplus);
    }

    pub(crate) fn resources(&self) -> BTreeSet<Resource> {
        let own: Option<Resource> = match &self.state {
            State::Mutable { active, .. } | State::Shared { active, .. } => Some((*active).into()),
            State::Sealed { layer } => layer.map(Into::into),
            State::Stack(snapshot) => Some((*snapshot).into()),
            State::Lazy | State::Composed => None,
        };
        let blob = self.blob.as_ref().and_then(|blob| blob.digest).map(Resource::from);
        own.into_iter().chain(blob).chain(self.snapshot.map(Resource::from)).collect()
    }
}

/// How a record of version 1 looked: a tree, and the key of the step that made it.
#[derive(Deserialize)]
struct RecordRowV1 {
    tree: TreeV1,
    description: String,
    _key: Option<CacheKey>,
    created_at: Stamp,
    _last_used_at: Stamp,
    _usage_count: u64,
}

#[derive(Deserialize)]
enum TreeV1 {
    Scratch,
    Immutable(SnapshotId),
    Mutable(ActiveId),
}

impl Row for RecordRow {
    const VERSION: u8 = 3;

    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        if version == 2 {
            // All but the last field, which is an option: a zero byte is none.
            let body = [body, &[0]].concat();
            let (row, rest) = postcard::take_from_bytes(&body).ok()?;
            return rest.is_empty().then_some(row);
        }
        (version == 1).then_some(())?;
        let old: RecordRowV1 = postcard::from_bytes(body).ok()?;
        let (state, retain) = match old.tree {
            TreeV1::Scratch => (State::Sealed { layer: None }, false),
            TreeV1::Immutable(snapshot) => (State::Stack(snapshot), false),
            TreeV1::Mutable(active) => (State::Mutable { active, committed_as: None }, true),
        };
        let description = old.description;
        Some(Self { description, retain, ..Self::new(state, Parents::None, old.created_at) })
    }
}

/// When and how often a record was used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UseRow {
    /// The last time a ref was released; `None` if never.
    pub last_used_at: Option<Stamp>,
    /// How many times.
    pub count: u64,
}

impl Row for UseRow {
    const VERSION: u8 = 1;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdRow(pub(crate) RecordId);

impl Row for IdRow {
    const VERSION: u8 = 1;
}

pub(crate) fn owner(id: RecordId) -> Owner {
    Owner::new("record", id)
}

pub(crate) fn get(rows: &impl Rows, id: RecordId) -> Result<Option<RecordRow>, CatalogueError> {
    rows.get(&RECORDS, &id)
}

/// Puts, changes or removes a record: its row, what is found by it, and what it holds.
///
/// # Errors
/// [`CatalogueError::NoSuchResource`] if its files are not in the store. (A blob need not be: then it is not held.)
pub(crate) fn replace(
    tx: &mut Tx<'_>,
    id: RecordId,
    before: Option<&RecordRow>,
    after: Option<&RecordRow>,
) -> Result<(), CatalogueError> {
    let parents = |row: Option<&RecordRow>| -> BTreeSet<RecordId> {
        row.map(|row| row.parents.ids().into_iter().collect()).unwrap_or_default()
    };
    let (old, new) = (parents(before), parents(after));
    for parent in old.difference(&new) {
        tx.remove(&CHILDREN, &(*parent, id))?;
    }
    for parent in new.difference(&old) {
        tx.put(&CHILDREN, &(*parent, id), &())?;
    }
    let old_chain = before.and_then(|row| row.chain_id);
    let new_chain = after.and_then(|row| row.chain_id);
    if old_chain != new_chain {
        old_chain.map(|chain| tx.remove(&BY_CHAIN, &(chain, id))).transpose()?;
        new_chain.map(|chain| tx.put(&BY_CHAIN, &(chain, id), &())).transpose()?;
    }
    let old_chain = before.and_then(|row| row.blob_chain_id);
    let new_chain = after.and_then(|row| row.blob_chain_id);
    if old_chain != new_chain {
        old_chain.map(|chain| tx.remove(&BY_BLOB_CHAIN, &(chain, id))).transpose()?;
        new_chain.map(|chain| tx.put(&BY_BLOB_CHAIN, &(chain, id), &())).transpose()?;
    }
    let composition = |row: Option<&RecordRow>| row.and_then(|row| row.parents.composition());
    match (composition(before), composition(after)) {
        (old, new) if old == new => {}
        (old, new) => {
            if let Some(old) = old
                && tx.get(&COMPOSITIONS, &old)?.is_some_and(|IdRow(found)| found == id)
            {
                tx.remove(&COMPOSITIONS, &old)?;
            }
            new.map(|new| tx.put(&COMPOSITIONS, &new, &IdRow(id))).transpose()?;
        }
    }
    let active = |row: Option<&RecordRow>| match row.map(|row| &row.state) {
        Some(State::Mutable { active, .. }) => Some(*active),
        _ => None,
    };
    if active(before) != active(after) {
        active(before).map(|active| tx.remove(&ACTIVES, &active)).transpose()?;
        active(after).map(|active| tx.put(&ACTIVES, &active, &IdRow(id))).transpose()?;
    }
    let resources = |row: Option<&RecordRow>| row.map(RecordRow::resources).unwrap_or_default();
    let (old, new) = (resources(before), resources(after));
    // Hold before letting go: what goes from one to the other is never without a hold.
    for resource in new.difference(&old) {
        match tx.hold(&owner(id), *resource) {
            Err(CatalogueError::NoSuchResource { resource: Resource::Blob(_) }) => {}
            other => other?,
        }
    }
    for resource in old.difference(&new) {
        tx.unhold(&owner(id), *resource)?;
    }
    match after {
        Some(row) => tx.put(&RECORDS, &id, row).map(drop),
        None => {
            // Also what its row does not say: variants of its blob.
            tx.unhold_all(&owner(id))?;
            tx.remove(&USES, &id)?;
            crate::metadata::forget(tx, id)?;
            crate::solver::forget(tx, id)?;
            tx.remove(&RECORDS, &id).map(drop)
        }
    }
}

/// Changes a record's row; false if there is none.
pub(crate) fn change(
    tx: &mut Tx<'_>,
    id: RecordId,
    change: impl FnOnce(&mut RecordRow),
) -> Result<bool, CatalogueError> {
    let Some(before) = get(tx, id)? else { return Ok(false) };
    let mut after = before.clone();
    change(&mut after);
    if after != before {
        replace(tx, id, Some(&before), Some(&after))?;
    }
    Ok(true)
}

/// Removes a record; false if there was none.
pub(crate) fn remove(tx: &mut Tx<'_>, id: RecordId) -> Result<bool, CatalogueError> {
    match tx.get(&RECORDS, &id) {
        Ok(None) => Ok(false),
        Ok(Some(before)) => replace(tx, id, Some(&before), None).map(|()| true),
        // A row that does not decode cannot say what it stood on or held; its holds are under its own name.
        Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => {
            replace(tx, id, None, None).map(|()| true)
        }
        Err(error) => Err(error),
    }
}

/// Those of `ids` that have a row: the indexes do not follow the removal of a row that did not decode.
pub(crate) fn that_are_there(
    rows: &impl Rows,
    ids: impl IntoIterator<Item = RecordId>,
) -> Result<Vec<RecordId>, CatalogueError> {
    let mut there = Vec::new();
    for id in ids {
        if rows.contains(&RECORDS, &id)? {
            there.push(id);
        }
    }
    Ok(there)
}

/// The records that stand on this one.
pub(crate) fn children(rows: &impl Rows, id: RecordId) -> Result<Vec<RecordId>, CatalogueError> {
    let listed = rows.prefixed(&CHILDREN, &id)?;
    that_are_there(rows, listed.into_iter().map(|((_, child), ())| child))
}

/// Calls `visit` for every record's ID from `from` on, in order, until it says no. Reads no rows.
pub(crate) fn scan_ids_from(
    rows: &impl Rows,
    from: RecordId,
    mut visit: impl FnMut(RecordId) -> bool,
) -> Result<(), CatalogueError> {
    rows.scan_keys_from(&RECORDS, &from, |id| match visit(id) {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    })
}

/// Whether a diff is nothing but its upper record's own layer: that stands right on the lower one.
pub(crate) fn is_single_layer(upper: &RecordRow, lower: RecordId) -> bool {
    upper.parents == Parents::Layer(lower)
}

/// The records whose own files make up the tree of `id`, bottom first, each with its row.
///
/// # Errors
/// `Err(id)` inside if a record on the way is missing.
pub(crate) fn walk(
    rows: &impl Rows,
    id: RecordId,
) -> Result<Result<Vec<(RecordId, RecordRow)>, RecordId>, CatalogueError> {
    enum Step {
        /// Everything that a record shows.
        Whole(RecordId),
        /// Its own files only.
        Own(RecordId, Box<RecordRow>),
    }
    let mut out = Vec::new();
    let mut pending = vec![Step::Whole(id)];
    while let Some(step) = pending.pop() {
        let id = match step {
            Step::Own(id, row) => {
                out.push((id, *row));
                continue;
            }
            Step::Whole(id) => id,
        };
        let Some(row) = get(rows, id)? else { return Ok(Err(id)) };
        // Pushed in reverse: what lies below comes out first.
        match row.parents.clone() {
            Parents::None => out.push((id, row)),
            Parents::Layer(parent) => {
                pending.push(Step::Own(id, Box::new(row)));
                pending.push(Step::Whole(parent));
            }
            Parents::Merge(parents) => pending.extend(parents.into_iter().rev().map(Step::Whole)),
            Parents::Diff { lower, upper } => {
                let upper = match upper {
                    Some(upper) => Some((upper, get(rows, upper)?)),
                    None => None,
                };
                match upper {
                    Some((upper, Some(upper_row))) if is_single_layer(&upper_row, lower) => {
                        out.push((upper, upper_row));
                    }
                    Some((upper, None)) => return Ok(Err(upper)),
                    _ => out.push((id, row)),
                }
            }
        }
    }
    Ok(Ok(out))
}

/// Brings the tables of this crate from this schema of the store's catalogue to the next; see
/// [`plies_store::OpenOptions::migrate_above`].
///
/// # Errors
/// [`CatalogueError`].
pub fn migrate(from: u64, tx: &mut Tx<'_>) -> Result<(), CatalogueError> {
    if from != 1 {
        return Ok(());
    }
    // The first versions did not list the uppers of mutable records. A row that cannot be read is for a check to find.
    let mut actives = Vec::new();
    tx.scan_each(&RECORDS, |id, row| {
        if let (Some(id), Ok(RecordRow { state: State::Mutable { active, .. }, .. })) = (id, row) {
            actives.push((active, id));
        }
        ControlFlow::Continue(())
    })?;
    actives.into_iter().try_for_each(|(active, id)| tx.put(&ACTIVES, &active, &IdRow(id)))
}
