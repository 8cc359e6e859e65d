//! The build cache: records and the keys that find them.
//!
//! A *record* is a tree that somebody may want again. Immutable, it is a snapshot; mutable, an active that one holder
//! at a time writes into. A build step leaves an immutable record under its *key*: the digest of what the step does
//! and of the content of everything it takes in, so that the same step finds it again.
//!
//! ```text
//! cache.records   RecordId  -> RecordRow   tree, description, created, used
//! cache.keys      CacheKey  -> KeyRow      the record that a step's key found
//! ```
//!
//! # Invariants
//! - A record row has an owner `record:<id>` in the store that holds its tree, made and dropped with the row.
//! - A key row names a record that exists.
//!
//! All functions take the transaction to work in. Last-used times and use counts may be lost in a crash; nothing else
//! may. There are no locks here.

use std::fmt;
use std::str::FromStr;

use plies_oci::{BlobDigest, ErrorKind, Sha256Hasher};
use plies_store::{ActiveId, CatalogueError, Key, KeyReader, Owner, Resource, Row, Rows, SnapshotId, Stamp, Table, Tx};
use serde::{Deserialize, Serialize};

const RECORDS: Table<RecordId, RecordRow> = Table::new("cache.records");
const KEYS: Table<CacheKey, KeyRow> = Table::new("cache.keys");

/// Names a record: 16 random bytes, drawn by whoever makes it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RecordId([u8; 16]);

impl RecordId {
    /// Wraps random bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordId({self})")
    }
}

impl Key for RecordId {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        input.array().map(Self)
    }
}

/// Digest of a step and of the content of all its inputs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct CacheKey(BlobDigest);

impl Key for CacheKey {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        Key::decode(input).map(Self)
    }
}

/// Adds up a [`CacheKey`]. Every part goes in with its length, so that no two lists of parts run together:
/// `["a b"]` never equals `["a", "b"]` (CVE-2024-24557 began that way).
#[derive(Debug)]
pub struct KeyBuilder(Sha256Hasher);

impl KeyBuilder {
    /// Begins a key for one kind of operation. `version` goes up when the operation's meaning changes, so that
    /// results of an older Plies are not taken for it.
    pub fn new(operation: &str, version: u32) -> Self {
        Self(Sha256Hasher::default()).bytes(operation.as_bytes()).number(version.into())
    }

    /// Adds bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn number(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    /// Adds a list: its length, then its parts.
    #[must_use]
    pub fn list<T: AsRef<[u8]>>(self, parts: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>) -> Self {
        let parts = parts.into_iter();
        let begun = self.number(parts.len() as u64);
        parts.fold(begun, |key, part| key.bytes(part.as_ref()))
    }

    /// Adds the key of an input.
    #[must_use]
    pub fn input(self, key: &CacheKey) -> Self {
        self.bytes(key.0.as_bytes())
    }

    /// The key.
    pub fn finish(self) -> CacheKey {
        CacheKey(BlobDigest::from_bytes(self.0.finish()))
    }
}

/// The tree of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tree {
    /// The empty tree.
    Scratch,
    /// A finished one.
    Immutable(SnapshotId),
    /// One that is being written.
    Mutable(ActiveId),
}

/// What is kept of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordRow {
    /// Its files.
    pub tree: Tree,
    /// What it is, for people.
    pub description: String,
    /// The key that finds it, if a build step made it.
    pub key: Option<CacheKey>,
    /// When it was made.
    pub created_at: Stamp,
    /// When it was last used.
    pub last_used_at: Stamp,
    /// How often it was used since it was made.
    pub usage_count: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeyRow(RecordId);

impl Row for RecordRow {
    const VERSION: u8 = 1;
}
impl Row for KeyRow {
    const VERSION: u8 = 1;
}

/// Why a record could not be found or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
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
    /// A mutable record was needed.
    #[error("record {id} is not mutable")]
    NotMutable {
        /// Which one it was.
        id: RecordId,
    },
    /// The catalogue failed.
    #[error("read or change the build cache")]
    Catalogue(#[from] CatalogueError),
}

impl RecordError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } => ErrorKind::InvalidInput,
            Self::NotMutable { .. } => ErrorKind::FailedPrecondition,
            Self::Catalogue(source) => source.kind(),
        }
    }
}

fn owner(id: RecordId) -> Owner {
    Owner::new("record", id)
}

fn hold_tree(tx: &mut Tx<'_>, id: RecordId, tree: Tree) -> Result<(), CatalogueError> {
    match tree {
        Tree::Scratch => Ok(()),
        Tree::Immutable(snapshot) => tx.hold(&owner(id), Resource::Snapshot(snapshot)),
        Tree::Mutable(active) => tx.hold(&owner(id), Resource::Active(active)),
    }
}

/// Adds a record. If another one has the same key, this one takes its place: the step ran again.
///
/// # Errors
/// [`CatalogueError`], among them that the tree is not in the store.
pub fn put(tx: &mut Tx<'_>, id: RecordId, row: &RecordRow) -> Result<(), CatalogueError> {
    hold_tree(tx, id, row.tree)?;
    tx.put(&RECORDS, &id, row)?;
    if let Some(key) = row.key
        && let Some(KeyRow(before)) = tx.take(&KEYS, &key)?
        && before != id
    {
        tx.remove(&RECORDS, &before)?;
        tx.unhold_all(&owner(before))?;
    }
    if let Some(key) = row.key {
        tx.put(&KEYS, &key, &KeyRow(id))?;
    }
    Ok(())
}

/// Finds the record of a step.
///
/// # Errors
/// [`CatalogueError`].
pub fn lookup(rows: &impl Rows, key: &CacheKey) -> Result<Option<(RecordId, RecordRow)>, CatalogueError> {
    let Some(KeyRow(id)) = rows.get(&KEYS, key)? else { return Ok(None) };
    Ok(rows.get(&RECORDS, &id)?.map(|row| (id, row)))
}

/// Notes that a record was used.
///
/// # Errors
/// [`CatalogueError`].
pub fn touch(tx: &mut Tx<'_>, id: RecordId) -> Result<(), CatalogueError> {
    if let Some(mut row) = tx.get(&RECORDS, &id)? {
        row.last_used_at = tx.now();
        row.usage_count = row.usage_count.saturating_add(1);
        tx.put(&RECORDS, &id, &row)?;
    }
    Ok(())
}

/// Makes a mutable record immutable.
///
/// # Errors
/// [`RecordError::NotFound`], [`RecordError::NotMutable`].
pub fn commit(tx: &mut Tx<'_>, id: RecordId, tree: Tree) -> Result<(), RecordError> {
    let mut row = tx.get(&RECORDS, &id)?.ok_or_else(|| RecordError::NotFound { wanted: id.to_string() })?;
    if !matches!(row.tree, Tree::Mutable(_)) {
        return Err(RecordError::NotMutable { id });
    }
    tx.unhold_all(&owner(id))?;
    hold_tree(tx, id, tree)?;
    row.tree = tree;
    tx.put(&RECORDS, &id, &row)?;
    Ok(())
}

/// Finds a record by its ID or the beginning of it.
///
/// # Errors
/// [`RecordError::NotFound`], [`RecordError::Ambiguous`].
pub fn find(rows: &impl Rows, wanted: &str) -> Result<(RecordId, RecordRow), RecordError> {
    let not_found = || RecordError::NotFound { wanted: wanted.to_owned() };
    if wanted.is_empty() {
        return Err(not_found());
    }
    let mut fits = list(rows)?;
    fits.retain(|(id, _)| id.to_string().starts_with(wanted));
    match fits.len() {
        1 => Ok(fits.remove(0)),
        0 => Err(not_found()),
        count => Err(RecordError::Ambiguous { wanted: wanted.to_owned(), count }),
    }
}

/// All records, by ID.
///
/// # Errors
/// [`CatalogueError`].
pub fn list(rows: &impl Rows) -> Result<Vec<(RecordId, RecordRow)>, CatalogueError> {
    rows.all(&RECORDS)
}

/// Removes a record. Its bytes go with the next gc, unless something else stands on them.
///
/// # Errors
/// [`RecordError::NotFound`].
pub fn remove(tx: &mut Tx<'_>, id: RecordId) -> Result<RecordRow, RecordError> {
    let row = tx.take(&RECORDS, &id)?.ok_or_else(|| RecordError::NotFound { wanted: id.to_string() })?;
    if let Some(key) = row.key {
        tx.remove(&KEYS, &key)?;
    }
    tx.unhold_all(&owner(id))?;
    Ok(row)
}

impl FromStr for RecordId {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        let not_found = || RecordError::NotFound { wanted: text.to_owned() };
        if text.len() != 32 || !text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(not_found());
        }
        u128::from_str_radix(text, 16).map(|bits| Self(bits.to_be_bytes())).map_err(|_| not_found())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c01_lists_of_parts_never_run_together() {
        let key = |parts: &[&str]| KeyBuilder::new("run", 1).list(parts.iter()).finish();
        assert_ne!(key(&["a b"]), key(&["a", "b"]));
        assert_ne!(key(&["ab", ""]), key(&["a", "b"]));
        assert_ne!(key(&[]), key(&[""]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(KeyBuilder::new("run", 1).finish(), KeyBuilder::new("run", 2).finish());
    }
}
