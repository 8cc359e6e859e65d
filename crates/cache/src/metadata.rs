//! What others keep with a record: values that can be searched by an index, and opaque bytes. They go with the record.
//!
//! ```text
//! cache.values    (RecordId, key)    -> ValueRow
//! cache.index     (index, RecordId)  -> number of values under it
//! cache.external  (RecordId, key)    -> bytes
//! ```

use plies_store::{CatalogueError, Row, Rows, Table, Tx};
use serde::{Deserialize, Serialize};

use crate::record::RECORDS;
use crate::{Accessor, CacheError, RecordId};

const VALUES: Table<(RecordId, String), ValueRow> = Table::new("cache.values");
const INDEX: Table<(String, RecordId), u64> = Table::new("cache.index");
const EXTERNAL: Table<(RecordId, String), BytesRow> = Table::new("cache.external");

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

impl Accessor {
    /// Sets a value of a record, and has the record found by `index` as long as the value stands.
    ///
    /// # Errors
    /// [`CacheError::NotFound`].
    pub fn set_value(&self, id: RecordId, key: &str, value: &str, index: Option<&str>) -> Result<(), CacheError> {
        self.inner.store.write(|tx| {
            if !tx.contains(&RECORDS, &id)? {
                return Err(CacheError::no_record(id));
            }
            let key = (id, key.to_owned());
            if let Some(before) = tx.get(&VALUES, &key)? {
                unindex(tx, id, before.index.as_deref())?;
            }
            let row = ValueRow { value: value.to_owned(), index: index.map(str::to_owned) };
            tx.put(&VALUES, &key, &row)?;
            if let Some(index) = &row.index {
                let key = (index.clone(), id);
                let count = tx.get(&INDEX, &key)?.unwrap_or(0);
                tx.put(&INDEX, &key, &(count + 1))?;
            }
            Ok(())
        })
    }

    /// A value of a record.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn value(&self, id: RecordId, key: &str) -> Result<Option<String>, CacheError> {
        let row = self.inner.read(|rows| rows.get(&VALUES, &(id, key.to_owned())))?;
        Ok(row.map(|row| row.value))
    }

    /// Takes a value back; true if there was one.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn clear_value(&self, id: RecordId, key: &str) -> Result<bool, CacheError> {
        Ok(self.inner.store.write(|tx| {
            let Some(before) = tx.take(&VALUES, &(id, key.to_owned()))? else { return Ok(false) };
            unindex(tx, id, before.index.as_deref())?;
            Ok::<_, CatalogueError>(true)
        })?)
    }

    /// Records with a value under exactly this index.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn search(&self, index: &str) -> Result<Vec<RecordId>, CacheError> {
        let rows = self.inner.read(|rows| rows.prefixed(&INDEX, &index.to_owned()))?;
        Ok(rows.into_iter().map(|((_, id), _)| id).collect())
    }

    /// Keeps bytes of some other part of the program with a record.
    ///
    /// # Errors
    /// [`CacheError::NotFound`].
    pub fn set_external(&self, id: RecordId, key: &str, bytes: &[u8]) -> Result<(), CacheError> {
        self.inner.store.write(|tx| {
            if !tx.contains(&RECORDS, &id)? {
                return Err(CacheError::no_record(id));
            }
            Ok(tx.put(&EXTERNAL, &(id, key.to_owned()), &BytesRow(bytes.to_vec())).map(drop)?)
        })
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

fn unindex(tx: &mut Tx<'_>, id: RecordId, index: Option<&str>) -> Result<(), CatalogueError> {
    let Some(index) = index else { return Ok(()) };
    let key = (index.to_owned(), id);
    match tx.get(&INDEX, &key)? {
        Some(2..) => {
            let count = tx.get(&INDEX, &key)?.unwrap_or(1);
            tx.put(&INDEX, &key, &(count - 1)).map(drop)
        }
        _ => tx.remove(&INDEX, &key).map(drop),
    }
}

/// Drops all that is kept with a record.
pub(crate) fn forget(tx: &mut Tx<'_>, id: RecordId) -> Result<(), CatalogueError> {
    for ((_, key), row) in tx.prefixed(&VALUES, &id)? {
        tx.remove(&VALUES, &(id, key))?;
        if let Some(index) = row.index {
            tx.remove(&INDEX, &(index, id))?;
        }
    }
    for ((_, key), _) in tx.prefixed(&EXTERNAL, &id)? {
        tx.remove(&EXTERNAL, &(id, key))?;
    }
    Ok(())
}
