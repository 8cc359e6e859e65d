//! Records that another program made: they come as rows, many in one transaction.

use std::collections::HashSet;

use plies_oci::BlobDigest;
use plies_store::{CatalogueError, Rows as _, Stamp};

use crate::metadata::{self, Value};
use crate::record::{self, Parents, RecordRow, State, USES, UseRow};
use crate::{Accessor, CacheError, CacheKey, Link, RecordId, check, solver};

/// A record to be adopted.
#[derive(Debug, Clone)]
pub struct Adopted {
    /// Its ID: that of the same record each time, so that it is adopted once.
    pub id: RecordId,
    /// What it is. Its layer or active must be held by somebody.
    pub row: RecordRow,
    /// When and how often it was used.
    pub uses: UseRow,
    /// Blobs with the same tar as its own, which stay as long as it does.
    pub variants: Vec<BlobDigest>,
    /// What else is kept with it.
    pub values: Vec<(String, Value)>,
}

impl RecordRow {
    /// A record that nothing else is known of.
    pub fn adopted(state: State, parents: Parents, created_at: Stamp) -> Self {
        Self::new(state, parents, created_at)
    }
}

impl Accessor {
    /// Adopts records, all of them or none, in one transaction. It is durable with the store's next durable write: a crash
    /// leaves what earlier calls did. Those whose IDs are here stay as they are. Parents come before what stands on them,
    /// here or in an earlier call.
    ///
    /// # Errors
    /// [`CacheError::NotFound`] if a parent is not here; [`CacheError::Catalogue`] if the files of a record are not.
    pub fn adopt(&self, records: &[Adopted]) -> Result<(), CacheError> {
        self.inner.store.write_lazily(|tx| {
            for Adopted { id, row, uses, variants, values } in records {
                if tx.contains(&record::RECORDS, id)? {
                    continue;
                }
                for parent in row.parents.ids() {
                    if !tx.contains(&record::RECORDS, &parent)? {
                        return Err(CacheError::no_record(parent));
                    }
                }
                // BuildKit takes a merge that has no chain ID yet for one with an empty one; nothing would be found by that.
                let parent = match row.parents {
                    Parents::Layer(parent) => record::get(tx, parent)?,
                    _ => None,
                };
                let row = &check::with_right_chains(row, |_| parent.as_ref());
                record::replace(tx, *id, None, Some(row))?;
                tx.put(&USES, id, uses)?;
                for blob in variants {
                    match tx.hold(&record::owner(*id), *blob) {
                        // A blob that is not here is known all the same, as with a record's own.
                        Err(CatalogueError::NoSuchResource { .. }) => {}
                        other => other?,
                    }
                }
                for (key, value) in values {
                    metadata::put_value(tx, *id, key, Some(value))?;
                }
            }
            Ok(())
        })
    }

    /// Those of some records that are here, damaged or not.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn known(&self, ids: impl IntoIterator<Item = RecordId>) -> Result<HashSet<RecordId>, CatalogueError> {
        self.inner.store.read(|rows| {
            let mut known = HashSet::new();
            for id in ids {
                if rows.contains(&record::RECORDS, &id)? {
                    known.insert(id);
                }
            }
            Ok(known)
        })
    }

    /// Writes down what keys of another program's solver gave and lead to, in one transaction, durable as in
    /// [`Self::adopt`]. What is known already stays. Gives how many results were not.
    ///
    /// # Errors
    /// [`CacheError::NotFound`] if a record is not here.
    pub fn adopt_keys(
        &self,
        results: &[(CacheKey, RecordId)],
        links: &[(CacheKey, Link, CacheKey)],
    ) -> Result<usize, CacheError> {
        self.inner.store.write_lazily(|tx| {
            let mut new = 0;
            for (key, id) in results {
                if !tx.contains(&record::RECORDS, id)? {
                    return Err(CacheError::no_record(*id));
                }
                if !solver::has_result(tx, key, *id)? {
                    solver::put_result(tx, key, *id)?;
                    new += 1;
                }
            }
            for (from, link, to) in links {
                if !solver::has_link(tx, from, link, to)? {
                    solver::put_link(tx, from, link, to)?;
                }
            }
            Ok(new)
        })
    }

    /// Whether another program's links were ever adopted and not all removed since.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn has_links(&self) -> Result<bool, CatalogueError> {
        self.inner.store.read(solver::has_links)
    }
}
