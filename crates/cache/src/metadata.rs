//! What others keep with a record: values that can be searched by an index, and opaque bytes. They go with the record.
//!
//! ```text
//! cache.values    (RecordId, key)    -> ValueRow
//! cache.index     (index, RecordId)  -> number of values under it
//! cache.external  (RecordId, key)    -> bytes
//! ```
//!
//! What BuildKit keeps under keys of its own is a typed field of the record here:
//!
//! | BuildKit's key | here |
//! |---|---|
//! | `snapshot.size` | the sum of the sizes of what the record holds, kept by the store |
//! | `cache.equalMutable` | [`State::Shared`], and `committed_as` of the other |
//! | `cache.cachePolicy` | `RecordRow::retain` |
//! | `cache.description` | `RecordRow::description` |
//! | `cache.createdAt` | `RecordRow::created_at`, in microseconds |
//! | `cache.lastUsedAt`, `cache.usageCount` | [`UseRow`](crate::UseRow), gathered and written late |
//! | `cache.layerType` | a value like any other: [`LAYER_TYPE`] |
//! | `cache.recordType` | `RecordRow::record_type` |
//! | `snapshot.committed` | [`State`]: all but `Mutable` |
//! | `cache.parent`, `cache.mergeParents`, `cache.lowerDiffParent`, `cache.upperDiffParent` | [`Parents`](crate::Parents) |
//! | `cache.diffID`, `cache.blob`, `cache.mediatype`, `cache.blobsize`, `cache.layer.urls` | [`BlobRow`](crate::BlobRow) |
//! | `cache.chainID`, index `chainid:` | `RecordRow::chain_id`, [`Accessor::search_chain`] |
//! | `cache.blobChainID`, index `blobchainid:` | `RecordRow::blob_chain_id`, [`Accessor::search_blob_chain`] |
//! | `cache.snapshot` | the layer in [`State::Sealed`], and `RecordRow::snapshot` |
//! | `cache.blobonly` | [`State::Lazy`] |
//! | `cache.imageRefs` | `RecordRow::image_refs` |
//! | `cache.deleted` | none: a record goes in one transaction |
//! | `_external` | [`Accessor::external`] |

use std::collections::{BTreeMap, BTreeSet};

use plies_store::fsck::{Change, Findings, Remedy};
use plies_store::{CatalogueError, ReadTx, Row, Rows, Stamp, Table, Tx};
use serde::{Deserialize, Serialize};

use crate::record::{self, RECORDS, State};
use crate::{Accessor, CacheError, RecordId, RecordType};

const VALUES: Table<(RecordId, String), ValueRow> = Table::new("cache.values");
const INDEX: Table<(String, RecordId), u64> = Table::new("cache.index");
const EXTERNAL: Table<(RecordId, String), BytesRow> = Table::new("cache.external");

/// Key of the value that says of which operating system's kind a layer is.
pub const LAYER_TYPE: &str = "cache.layerType";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ValueRow {
    value: String,
    index: Option<String>,
}

impl Row for ValueRow {
    const VERSION: u8 = 1;
}

#[derive(Debug, Serialize, Deserialize)]
struct BytesRow(Vec<u8>);

impl Row for BytesRow {
    const VERSION: u8 = 1;
}

/// A value to be kept with a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// The value.
    pub value: String,
    /// What the record is found by as long as the value stands.
    pub index: Option<String>,
}

/// What is to change of a record, all together. What is `None` or not named stays.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// What it is, for people.
    pub description: Option<String>,
    /// What kind of thing it is.
    pub record_type: Option<RecordType>,
    /// Whether it is kept when its last ref goes although it was never finalized.
    pub retain: Option<bool>,
    /// When it was made.
    pub created_at: Option<Stamp>,
    /// Values by their keys; `None` takes one away.
    pub values: Vec<(String, Option<Value>)>,
    /// Opaque bytes by their keys; `None` takes them away.
    pub external: Vec<(String, Option<Vec<u8>>)>,
}

impl Accessor {
    /// Changes a record, in one transaction. A mutable record that somebody holds is retained, or no longer, from the
    /// next time on that it is held.
    ///
    /// # Errors
    /// [`CacheError::NotFound`]; then nothing has changed.
    pub fn update(&self, id: RecordId, changes: &Changes) -> Result<(), CacheError> {
        self.inner.store.write(|tx| {
            let found = record::change(tx, id, |row| {
                if let Some(description) = &changes.description {
                    row.description.clone_from(description);
                }
                row.record_type = changes.record_type.unwrap_or(row.record_type);
                row.retain = changes.retain.unwrap_or(row.retain);
                row.created_at = changes.created_at.unwrap_or(row.created_at);
            })?;
            if !found {
                return Err(CacheError::no_record(id));
            }
            for (key, value) in &changes.values {
                put_value(tx, id, key, value.as_ref())?;
            }
            for (key, bytes) in &changes.external {
                let key = (id, key.clone());
                match bytes {
                    Some(bytes) => tx.put(&EXTERNAL, &key, &BytesRow(bytes.clone())).map(drop)?,
                    None => tx.remove(&EXTERNAL, &key).map(drop)?,
                }
            }
            Ok(())
        })?;
        if let Some(retain) = changes.retain
            && let State::Shared { mutable, .. } = self.inner.must_have(id)?.state
        {
            // Decided when the last ref goes.
            match retain {
                true => self.inner.live.unpair(id),
                false => self.inner.live.pair(id, mutable),
            }
        }
        Ok(())
    }

    /// Sets a value of a record, and has the record found by `index` as long as the value stands.
    ///
    /// # Errors
    /// [`CacheError::NotFound`].
    pub fn set_value(&self, id: RecordId, key: &str, value: &str, index: Option<&str>) -> Result<(), CacheError> {
        let value = Value { value: value.to_owned(), index: index.map(str::to_owned) };
        self.update(id, &Changes { values: vec![(key.to_owned(), Some(value))], ..Changes::default() })
    }

    /// As [`Accessor::set_value`], durable with whatever is written next: for what nobody misses.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`]. Of a record that is not there nothing is kept, without a word.
    pub fn set_value_lazily(&self, id: RecordId, key: &str, value: &str, index: &str) -> Result<(), CacheError> {
        let value = Value { value: value.to_owned(), index: Some(index.to_owned()) };
        Ok(self.inner.store.write_lazily(|tx| match tx.contains(&RECORDS, &id)? {
            true => put_value(tx, id, key, Some(&value)).map(drop),
            false => Ok(()),
        })?)
    }

    /// A value of a record.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn value(&self, id: RecordId, key: &str) -> Result<Option<String>, CacheError> {
        let row = self.inner.read(|rows| rows.get(&VALUES, &(id, key.to_owned())))?;
        Ok(row.map(|row| row.value))
    }

    /// All values of a record, by their keys.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn values(&self, id: RecordId) -> Result<Vec<(String, Value)>, CacheError> {
        let rows = self.inner.read(|rows| rows.prefixed(&VALUES, &id))?;
        let value = |((_, key), ValueRow { value, index })| (key, Value { value, index });
        Ok(rows.into_iter().map(value).collect())
    }

    /// Takes a value back; true if there was one.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn clear_value(&self, id: RecordId, key: &str) -> Result<bool, CacheError> {
        Ok(self.inner.store.write(|tx| put_value(tx, id, key, None))?)
    }

    /// Records with a value under exactly this index.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn search(&self, index: &str) -> Result<Vec<RecordId>, CacheError> {
        self.inner.read(|rows| {
            let mut found = Vec::new();
            for (_, id) in rows.prefixed_keys(&INDEX, &index.to_owned())? {
                // One whose value did not decode when it went has left this behind.
                if rows.contains(&RECORDS, &id)? {
                    found.push(id);
                }
            }
            Ok(found)
        })
    }

    /// Keeps bytes of some other part of the program with a record.
    ///
    /// # Errors
    /// [`CacheError::NotFound`].
    pub fn set_external(&self, id: RecordId, key: &str, bytes: &[u8]) -> Result<(), CacheError> {
        let external = vec![(key.to_owned(), Some(bytes.to_vec()))];
        self.update(id, &Changes { external, ..Changes::default() })
    }

    /// As [`Accessor::set_external`], durable with whatever is written next: for what can be computed again.
    pub(crate) fn set_external_lazily(&self, id: RecordId, key: &str, bytes: &[u8]) -> Result<(), CacheError> {
        Ok(self.inner.store.write_lazily(|tx| match tx.contains(&RECORDS, &id)? {
            true => tx.put(&EXTERNAL, &(id, key.to_owned()), &BytesRow(bytes.to_vec())).map(drop),
            false => Ok(()),
        })?)
    }

    /// Those bytes.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn external(&self, id: RecordId, key: &str) -> Result<Option<Vec<u8>>, CacheError> {
        Ok(self.inner.read(|rows| rows.get(&EXTERNAL, &(id, key.to_owned())))?.map(|BytesRow(bytes)| bytes))
    }
}

/// Sets a value or takes it away, and its index with it; true if there was one.
pub(crate) fn put_value(
    tx: &mut Tx<'_>,
    id: RecordId,
    key: &str,
    value: Option<&Value>,
) -> Result<bool, CatalogueError> {
    let key = (id, key.to_owned());
    let before = readable(tx.get(&VALUES, &key))?;
    if let Some(index) = before.as_ref().and_then(|before| before.index.clone()) {
        unindex(tx, id, index)?;
    }
    let Some(Value { value, index }) = value else { return tx.remove(&VALUES, &key) };
    let row = ValueRow { value: value.clone(), index: index.clone() };
    let added = tx.insert(&VALUES, &key, &row)?;
    if let Some(index) = &row.index {
        let key = (index.clone(), id);
        let count = tx.get(&INDEX, &key)?.unwrap_or(0);
        tx.put(&INDEX, &key, &(count + 1))?;
    }
    Ok(!added)
}

fn unindex(tx: &mut Tx<'_>, id: RecordId, index: String) -> Result<(), CatalogueError> {
    let key = (index, id);
    match tx.get(&INDEX, &key)? {
        Some(count @ 2..) => tx.put(&INDEX, &key, &(count - 1)).map(drop),
        _ => tx.remove(&INDEX, &key).map(drop),
    }
}

/// A row that does not decode as one that is not there: whoever takes it away must not fail on it.
fn readable<T>(row: Result<Option<T>, CatalogueError>) -> Result<Option<T>, CatalogueError> {
    match row {
        Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => Ok(None),
        other => other,
    }
}

/// Drops all that is kept with a record.
pub(crate) fn forget(tx: &mut Tx<'_>, id: RecordId) -> Result<(), CatalogueError> {
    for key in tx.prefixed_keys(&VALUES, &id)? {
        if let Some(index) = readable(tx.get(&VALUES, &key))?.and_then(|row| row.index) {
            tx.remove(&INDEX, &(index, id))?;
        }
        tx.remove(&VALUES, &key)?;
    }
    for key in tx.prefixed_keys(&EXTERNAL, &id)? {
        tx.remove(&EXTERNAL, &key)?;
    }
    Ok(())
}

/// Values and bytes are those of records that exist, and values are found by their indexes.
pub(crate) fn check(rows: &ReadTx, known: &BTreeSet<RecordId>, findings: &mut Findings) -> Result<(), CatalogueError> {
    let mut index: BTreeMap<(String, RecordId), u64> = BTreeMap::new();
    for ((id, key), row) in findings.rows_or_drop(rows, &VALUES)? {
        if !known.contains(&id) {
            let remedy = Remedy::Rewrite(vec![Change::remove(&VALUES, &(id, key.clone()))]);
            findings.add(
                "values-stray",
                format!("record {id}"),
                format!("has a value {key} and does not exist"),
                remedy,
            );
        } else if let Some(by) = row.index {
            *index.entry((by, id)).or_default() += 1;
        }
    }
    for ((id, key), _) in findings.rows_or_drop(rows, &EXTERNAL)? {
        if !known.contains(&id) {
            let remedy = Remedy::Rewrite(vec![Change::remove(&EXTERNAL, &(id, key.clone()))]);
            findings.add(
                "external-stray",
                format!("record {id}"),
                format!("has bytes {key} and does not exist"),
                remedy,
            );
        }
    }
    findings.compare(rows, "index-wrong", &INDEX, index)
}
