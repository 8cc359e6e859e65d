//! What the solver knows: which record a step's key gave, and which step a key leads to. In the catalogue of the records,
//! so that a result and its record appear together and vanish together.
//!
//! ```text
//! cache.results     (CacheKey, RecordId)         -> ResultRow  what a key gave, several times maybe
//! cache.result_of   (RecordId, CacheKey)         -> ()         the same, by record
//! cache.links       (CacheKey, LinkId, CacheKey) -> ()         from an input's key, through a step, to its key
//! cache.back_links  (CacheKey, CacheKey, LinkId) -> LinkRow    the same, from its end
//! ```
//!
//! A key from which no links lead to a result is dead, and the links to it with it. They go with the results that made
//! them so.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use plies_oci::BlobDigest;
use plies_store::fsck::{Change, Findings, Remedy};
use plies_store::{CatalogueError, ReadTx, Row, Rows, Stamp, Table, Tx};
use serde::{Deserialize, Serialize};

use crate::record::{self, RECORDS};
use crate::{Accessor, CacheError, CacheKey, RecordId};

const RESULTS: Table<(CacheKey, RecordId), ResultRow> = Table::new("cache.results");
const RESULT_OF: Table<(RecordId, CacheKey), ()> = Table::new("cache.result_of");
const LINKS: Table<(CacheKey, BlobDigest, CacheKey), ()> = Table::new("cache.links");
const BACK_LINKS: Table<(CacheKey, CacheKey, BlobDigest), LinkRow> = Table::new("cache.back_links");

/// Keys that are looked at, at most, to see whether a key leads to a result; one that leads to more stays. The first
/// few tell, nearly always.
const SWEEP_KEYS_MAX: usize = 4096;

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
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
        // The selector comes last: it alone can have spaces in it.
        BlobDigest::of(format!("{} {} {} {}", self.digest, self.input, self.output, self.selector).as_bytes())
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct LinkRow(Link);

impl Row for LinkRow {
    const VERSION: u8 = 1;
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
        let keys = self.inner.read(|rows| rows.prefixed_keys(&RESULT_OF, &id))?;
        Ok(keys.into_iter().map(|(_, key)| key).collect())
    }

    /// Whether anything is known of a key: a result, or a step that it leads to.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn knows_key(&self, key: &CacheKey) -> Result<bool, CacheError> {
        self.inner.read(|rows| {
            Ok(!rows.prefixed_keys(&RESULTS, key)?.is_empty() || !rows.prefixed_keys(&LINKS, key)?.is_empty())
        })
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
        Ok(self.inner.store.write(|tx| put_link(tx, from, link, to))?)
    }

    /// Whether that is known.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn has_link(&self, from: &CacheKey, link: &Link, to: &CacheKey) -> Result<bool, CacheError> {
        self.inner.read(|rows| rows.contains(&LINKS, &(*from, link.id(), *to)))
    }

    /// The keys that a step leads to from an input.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn links(&self, from: &CacheKey, link: &Link) -> Result<Vec<CacheKey>, CacheError> {
        let keys = self.inner.read(|rows| rows.prefixed_keys(&LINKS, &(*from, link.id())))?;
        Ok(keys.into_iter().map(|(_, _, to)| to).collect())
    }

    /// The keys and steps that lead to a key.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn back_links(&self, to: &CacheKey) -> Result<Vec<(CacheKey, Link)>, CacheError> {
        let rows = self.inner.read(|rows| rows.prefixed(&BACK_LINKS, to))?;
        Ok(rows.into_iter().map(|((_, from, _), LinkRow(link))| (from, link)).collect())
    }

    /// The records that a step gave of an input, with their keys, the newest first.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn results_by_link(&self, from: &CacheKey, link: &Link) -> Result<Vec<(CacheKey, RecordId)>, CacheError> {
        let mut found = self.inner.read(|rows| {
            let mut found = Vec::new();
            for (_, _, to) in rows.prefixed_keys(&LINKS, &(*from, link.id()))? {
                found.extend(rows.prefixed(&RESULTS, &to)?);
            }
            Ok(found)
        })?;
        found.sort_by_key(|(_, row)| std::cmp::Reverse(row.created_at));
        Ok(found.into_iter().map(|(key, _)| key).collect())
    }
}

pub(crate) fn put_result(tx: &mut Tx<'_>, key: &CacheKey, id: RecordId) -> Result<(), CatalogueError> {
    let row = ResultRow { created_at: tx.now() };
    tx.put(&RESULTS, &(*key, id), &row)?;
    tx.put(&RESULT_OF, &(id, *key), &()).map(drop)
}

pub(crate) fn has_result(rows: &impl Rows, key: &CacheKey, id: RecordId) -> Result<bool, CatalogueError> {
    rows.contains(&RESULTS, &(*key, id))
}

pub(crate) fn has_link(rows: &impl Rows, from: &CacheKey, link: &Link, to: &CacheKey) -> Result<bool, CatalogueError> {
    rows.contains(&LINKS, &(*from, link.id(), *to))
}

pub(crate) fn put_link(tx: &mut Tx<'_>, from: &CacheKey, link: &Link, to: &CacheKey) -> Result<(), CatalogueError> {
    tx.put(&LINKS, &(*from, link.id(), *to), &())?;
    tx.put(&BACK_LINKS, &(*to, *from, link.id()), &LinkRow(link.clone())).map(drop)
}

/// Whether there is any link.
pub(crate) fn has_links(rows: &impl Rows) -> Result<bool, CatalogueError> {
    let mut found = false;
    let lowest = (CacheKey::LOWEST, BlobDigest::from_bytes([0; 32]), CacheKey::LOWEST);
    rows.scan_keys_from(&LINKS, &lowest, |_| {
        found = true;
        std::ops::ControlFlow::Break(())
    })?;
    Ok(found)
}

/// Takes the links to `key` away if it leads to no result any more, and those from it, and so on backwards.
fn sweep(tx: &mut Tx<'_>, key: CacheKey) -> Result<(), CatalogueError> {
    let mut pending = vec![key];
    while let Some(key) = pending.pop() {
        let Some(dead) = dead_from(tx, key)? else { continue };
        for key in &dead {
            // A link from a dead key is one to a dead key, too.
            for (_, from, link) in tx.prefixed_keys(&BACK_LINKS, key)? {
                tx.remove(&BACK_LINKS, &(*key, from, link))?;
                tx.remove(&LINKS, &(from, link, *key))?;
                if !dead.contains(&from) {
                    pending.push(from);
                }
            }
        }
    }
    Ok(())
}

/// All that links lead to from `key`, itself included, if there is no result among it.
fn dead_from(rows: &impl Rows, key: CacheKey) -> Result<Option<HashSet<CacheKey>>, CatalogueError> {
    let mut seen = HashSet::from([key]);
    let mut pending = vec![key];
    while let Some(key) = pending.pop() {
        if !rows.prefixed_keys(&RESULTS, &key)?.is_empty() || seen.len() > SWEEP_KEYS_MAX {
            return Ok(None);
        }
        for (_, _, to) in rows.prefixed_keys(&LINKS, &key)? {
            if seen.insert(to) {
                pending.push(to);
            }
        }
    }
    Ok(Some(seen))
}

/// A record goes: its results go with it.
pub(crate) fn forget(tx: &mut Tx<'_>, id: RecordId) -> Result<(), CatalogueError> {
    let keys = tx.prefixed_keys(&RESULT_OF, &id)?;
    for (_, key) in &keys {
        tx.remove(&RESULT_OF, &(id, *key))?;
        tx.remove(&RESULTS, &(*key, id))?;
    }
    keys.into_iter().try_for_each(|(_, key)| sweep(tx, key))
}

/// Moves the keys of version 1 over; at no cost when there are none. Rows that do not decode go: they lead to
/// nothing, and must not keep the store from being opened.
pub(crate) fn migrate(tx: &mut Tx<'_>) -> Result<(), CatalogueError> {
    for key in all_keys_v1(tx)? {
        let found = match tx.get(&KEYS_V1, &key) {
            Ok(Some(KeyRowV1(id))) => record::get(tx, id).map(|row| row.map(|row| (id, row.created_at))),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        match found {
            Ok(Some((id, created_at))) => {
                tx.put(&RESULTS, &(key, id), &ResultRow { created_at })?;
                tx.put(&RESULT_OF, &(id, key), &())?;
            }
            Ok(None) | Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => {}
            Err(error) => return Err(error),
        }
        tx.remove(&KEYS_V1, &key)?;
    }
    Ok(())
}

fn all_keys_v1(rows: &impl Rows) -> Result<Vec<CacheKey>, CatalogueError> {
    let mut keys = Vec::new();
    rows.scan_keys_from(&KEYS_V1, &CacheKey::LOWEST, |key| {
        keys.push(key);
        std::ops::ControlFlow::Continue(())
    })?;
    Ok(keys)
}

/// Whether [`migrate`] has something to do.
pub(crate) fn is_old(rows: &impl Rows) -> Result<bool, CatalogueError> {
    let mut found = false;
    rows.scan_keys_from(&KEYS_V1, &CacheKey::LOWEST, |_| {
        found = true;
        std::ops::ControlFlow::Break(())
    })?;
    Ok(found)
}

/// Results are records that exist, and both directions of results and of links say the same.
pub(crate) fn check(rows: &ReadTx, known: &BTreeSet<RecordId>, findings: &mut Findings) -> Result<(), CatalogueError> {
    let mut result_of = BTreeMap::new();
    for ((key, id), _) in findings.rows_or_drop(rows, &RESULTS)? {
        if known.contains(&id) {
            result_of.insert((id, key), ());
        } else {
            let remedy = Remedy::Rewrite(vec![Change::remove(&RESULTS, &(key, id))]);
            findings.add(
                "results-stray",
                format!("record {id}"),
                format!("is a result of {key} and does not exist"),
                remedy,
            );
        }
    }
    findings.compare(rows, "result-of-wrong", &RESULT_OF, result_of)?;
    let mut links = BTreeMap::new();
    for ((to, from, id), LinkRow(link)) in findings.rows_or_drop(rows, &BACK_LINKS)? {
        if link.id() == id {
            links.insert((from, id, to), ());
        } else {
            let remedy = Remedy::Rewrite(vec![Change::remove(&BACK_LINKS, &(to, from, id))]);
            findings.add("link-wrong", format!("key {to}"), "has a link under another link's digest", remedy);
        }
    }
    findings.compare(rows, "links-wrong", &LINKS, links)
}
