//! What the solver knows: which record a step's key gave, and which step a key leads to. In the catalogue of the records,
//! so that a result and its record appear together and vanish together.
//!
//! ```text
//! cache.results     (CacheKey, RecordId)      -> ResultRow   what a key gave, several times maybe
//! cache.result_of   (RecordId, CacheKey)      -> ()          the same, by record
//! cache.links       (CacheKey, LinkId, CacheKey) -> ()       from an input's key, through a step, to its key
//! cache.back_links  (CacheKey, CacheKey, LinkId) -> ()       the same, from its end
//! ```
//!
//! A link that leads nowhere (its end has no result and no link that goes on) is dead, and so is the one before it then.
//! They go with the results that made them so.

use plies_oci::BlobDigest;
use plies_store::{CatalogueError, Row, Rows, Stamp, Table, Tx};
use serde::{Deserialize, Serialize};

use crate::record::{self, RECORDS};
use crate::{Accessor, CacheError, CacheKey, RecordId};

const RESULTS: Table<(CacheKey, RecordId), ResultRow> = Table::new("cache.results");
const RESULT_OF: Table<(RecordId, CacheKey), ()> = Table::new("cache.result_of");
const LINKS: Table<(CacheKey, BlobDigest, CacheKey), ()> = Table::new("cache.links");
const BACK_LINKS: Table<(CacheKey, CacheKey, BlobDigest), ()> = Table::new("cache.back_links");
/// Where version 1 kept the record of a key.
const KEYS_V1: Table<CacheKey, KeyRowV1> = Table::new("cache.keys");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct ResultRow {
    created_at: Stamp,
}

impl Row for ResultRow {
    const VERSION: u8 = 1;
}

#[derive(Debug, Serialize, Deserialize)]
struct KeyRowV1(RecordId);

impl Row for KeyRowV1 {
    const VERSION: u8 = 1;
}

/// How a step takes an input in: which step it is, which of its inputs, and which part of that input.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Link {
    /// Digest of the step's definition.
    pub digest: BlobDigest,
    /// Which of its inputs.
    pub input: u32,
    /// Which of the step's outputs.
    pub output: u32,
    /// The path that is selected from the input; empty for all of it.
    pub selector: String,
}

impl Link {
    fn id(&self) -> BlobDigest {
        BlobDigest::of(format!("{} {} {} {}", self.digest, self.input, self.output, self.selector).as_bytes())
    }
}

impl Accessor {
    /// Writes down that a key gave a record.
    ///
    /// # Errors
    /// [`CacheError::NotFound`] if the record is gone.
    pub fn add_result(&self, key: &CacheKey, id: RecordId) -> Result<(), CacheError> {
        self.inner.store.write(|tx| {
            if !tx.contains(&RECORDS, &id)? {
                return Err(CacheError::no_record(id));
            }
            Ok(put_result(tx, key, id)?)
        })
    }

    /// The records that a key gave, the newest first.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn results(&self, key: &CacheKey) -> Result<Vec<RecordId>, CacheError> {
        let mut found = self.inner.read(|rows| rows.prefixed(&RESULTS, key))?;
        found.sort_by_key(|(_, row)| std::cmp::Reverse(row.created_at));
        Ok(found.into_iter().map(|((_, id), _)| id).collect())
    }

    /// The keys that gave a record.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn keys_of(&self, id: RecordId) -> Result<Vec<CacheKey>, CacheError> {
        let rows = self.inner.read(|rows| rows.prefixed(&RESULT_OF, &id))?;
        Ok(rows.into_iter().map(|((_, key), ())| key).collect())
    }

    /// Takes a result back, and the links that now lead nowhere.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn remove_result(&self, key: &CacheKey, id: RecordId) -> Result<(), CacheError> {
        Ok(self.inner.store.write(|tx| {
            tx.remove(&RESULTS, &(*key, id))?;
            tx.remove(&RESULT_OF, &(id, *key))?;
            sweep(tx, *key)
        })?)
    }

    /// Writes down that the step `link` makes of the input with key `from` what has key `to`.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn add_link(&self, from: &CacheKey, link: &Link, to: &CacheKey) -> Result<(), CacheError> {
        Ok(self.inner.store.write(|tx| {
            tx.put(&LINKS, &(*from, link.id(), *to), &())?;
            tx.put(&BACK_LINKS, &(*to, *from, link.id()), &()).map(drop)
        })?)
    }

    /// The keys that a step leads to from an input.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn links(&self, from: &CacheKey, link: &Link) -> Result<Vec<CacheKey>, CacheError> {
        let rows = self.inner.read(|rows| rows.prefixed(&LINKS, &(*from, link.id())))?;
        Ok(rows.into_iter().map(|((_, _, to), ())| to).collect())
    }
}

pub(crate) fn put_result(tx: &mut Tx<'_>, key: &CacheKey, id: RecordId) -> Result<(), CatalogueError> {
    let row = ResultRow { created_at: tx.now() };
    tx.put(&RESULTS, &(*key, id), &row)?;
    tx.put(&RESULT_OF, &(id, *key), &()).map(drop)
}

/// Takes the links to `key` away if nothing is known of it any more, and so on along them.
fn sweep(tx: &mut Tx<'_>, key: CacheKey) -> Result<(), CatalogueError> {
    let mut pending = vec![key];
    while let Some(key) = pending.pop() {
        if any(tx, &RESULTS, &key)? || any(tx, &LINKS, &key)? {
            continue;
        }
        for ((_, from, link), ()) in tx.prefixed(&BACK_LINKS, &key)? {
            tx.remove(&BACK_LINKS, &(key, from, link))?;
            tx.remove(&LINKS, &(from, link, key))?;
            pending.push(from);
        }
    }
    Ok(())
}

fn any<K: plies_store::Key, V: Row, P: plies_store::PrefixOf<K>>(
    rows: &impl Rows,
    table: &Table<K, V>,
    prefix: &P,
) -> Result<bool, CatalogueError> {
    let mut found = false;
    rows.scan_prefix(table, prefix, |_, _| {
        found = true;
        std::ops::ControlFlow::Break(())
    })?;
    Ok(found)
}

/// A record goes: its results go with it.
pub(crate) fn forget(tx: &mut Tx<'_>, id: RecordId) -> Result<(), CatalogueError> {
    for ((_, key), ()) in tx.prefixed(&RESULT_OF, &id)? {
        tx.remove(&RESULT_OF, &(id, key))?;
        tx.remove(&RESULTS, &(key, id))?;
        sweep(tx, key)?;
    }
    Ok(())
}

/// Moves the keys of version 1 over; at no cost when there are none.
pub(crate) fn migrate(tx: &mut Tx<'_>) -> Result<(), CatalogueError> {
    for (key, KeyRowV1(id)) in tx.all(&KEYS_V1)? {
        if let Some(row) = record::get(tx, id)? {
            tx.put(&RESULTS, &(key, id), &ResultRow { created_at: row.created_at })?;
            tx.put(&RESULT_OF, &(id, key), &())?;
        }
        tx.remove(&KEYS_V1, &key)?;
    }
    Ok(())
}

/// Whether [`migrate`] has something to do.
pub(crate) fn is_old(rows: &impl Rows) -> Result<bool, CatalogueError> {
    let mut found = false;
    rows.scan(&KEYS_V1, |_, _| {
        found = true;
        std::ops::ControlFlow::Break(())
    })?;
    Ok(found)
}
