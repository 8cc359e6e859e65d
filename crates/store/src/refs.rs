//! How many rows hold each resource, so that a collection looks only at what changed.
//!
//! `refs` counts the rows of `holds`, `lease_holds` and `edges` that name a resource, and has no row
//! for a count of zero; `loose` lists the resources that have a row and a count of zero. So every
//! resource is in exactly one of the two, and what a collection takes begins with `loose`. Both
//! change in the transaction, and in the functions, that put or remove a row which counts: nothing
//! else may write those three tables.
//!
//! Counts find no cycles. There are none: a snapshot keeps layers, an active a snapshot and a layer,
//! a layer blobs, and a blob can only name blobs whose digests were known before its own. Should
//! somebody declare one all the same, [`crate::GcMode::Full`] takes it.
//!
//! A count that is too low would cost somebody their data, one that is too high only space. So
//! whatever does not add up keeps the resource, until [`crate::Store::check`] tells of it and a full
//! collection counts again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use crate::Resource;
use crate::catalogue::schema::{ACTIVES, BLOBS, EDGES, HOLDS, LAYERS, LEASE_HOLDS, LOOSE, REFS, SNAPSHOTS, exists};
use crate::catalogue::{CatalogueError, Key, Rows, Table, Tx};

/// How many rows hold `resource`.
pub(crate) fn count_of(rows: &impl Rows, resource: Resource) -> Result<u64, CatalogueError> {
    Ok(rows.get(&REFS, &resource)?.unwrap_or(0))
}

impl Tx<'_> {
    /// Puts a row by which `held` is held; idempotent.
    pub(crate) fn put_ref<K: Key>(
        &mut self,
        table: &Table<K, ()>,
        key: &K,
        held: Resource,
    ) -> Result<(), CatalogueError> {
        if !self.insert(table, key, &())? {
            return Ok(());
        }
        let count = count_of(self, held)?;
        self.put(&REFS, &held, &(count + 1))?;
        if count == 0 {
            self.remove(&LOOSE, &held)?;
        }
        Ok(())
    }

    /// Removes a row by which `held` was held; true if there was one.
    pub(crate) fn remove_ref<K: Key>(
        &mut self,
        table: &Table<K, ()>,
        key: &K,
        held: Resource,
    ) -> Result<bool, CatalogueError> {
        if !self.remove(table, key)? {
            return Ok(false);
        }
        match count_of(self, held)? {
            // Not counted, so others may not have been either: see the module.
            0 => {}
            1 => {
                self.remove(&REFS, &held)?;
                // What is held by something whose row went first may be gone already.
                if exists(self, held)? {
                    self.put(&LOOSE, &held, &())?;
                }
            }
            count => self.put(&REFS, &held, &(count - 1))?,
        }
        Ok(true)
    }

    /// Writes `refs` and `loose` from what they are kept of; how many rows of them were wrong.
    pub(crate) fn recount(&mut self) -> Result<u64, CatalogueError> {
        let Differences { refs, loose } = differences(self)?;
        for (resource, (_, counted)) in &refs {
            if *counted == 0 {
                self.remove(&REFS, resource)?;
            } else {
                self.put(&REFS, resource, counted)?;
            }
        }
        for (resource, counted) in &loose {
            if *counted {
                self.put(&LOOSE, resource, &())?;
            } else {
                self.remove(&LOOSE, resource)?;
            }
        }
        Ok((refs.len() + loose.len()) as u64)
    }
}

/// Where `refs` and `loose` do not say what they should.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// The count as kept, and as counted.
    pub(crate) refs: BTreeMap<Resource, (u64, u64)>,
    /// Whether it should be listed; it is if it should not, and the other way round.
    pub(crate) loose: BTreeMap<Resource, bool>,
}

/// Counts again. Cost: one look at every hold, edge and row; some 70 bytes of memory per resource
/// that is held.
pub(crate) fn differences(rows: &impl Rows) -> Result<Differences, CatalogueError> {
    // In order, and with less to spare than a hash table, which doubles.
    let mut counted: BTreeMap<Resource, u64> = BTreeMap::new();
    let mut count = |held: Resource| {
        *counted.entry(held).or_default() += 1;
        ControlFlow::Continue(())
    };
    rows.scan(&HOLDS, |(_, held), ()| count(held))?;
    rows.scan(&LEASE_HOLDS, |(_, held), ()| count(held))?;
    rows.scan(&EDGES, |(_, held), ()| count(held))?;

    let mut loose = BTreeSet::new();
    let mut judge = |resource: Resource| {
        if !counted.contains_key(&resource) {
            loose.insert(resource);
        }
        ControlFlow::Continue(())
    };
    rows.scan(&ACTIVES, |id, _| judge(id.into()))?;
    rows.scan(&SNAPSHOTS, |id, _| judge(id.into()))?;
    rows.scan(&LAYERS, |id, _| judge(id.into()))?;
    rows.scan(&BLOBS, |digest, _| judge(digest.into()))?;

    let mut found = Differences::default();
    rows.scan(&REFS, |resource, kept| {
        let counted = counted.remove(&resource).unwrap_or(0);
        if kept != counted {
            found.refs.insert(resource, (kept, counted));
        }
        ControlFlow::Continue(())
    })?;
    found.refs.extend(counted.into_iter().map(|(resource, counted)| (resource, (0, counted))));
    rows.scan(&LOOSE, |resource, ()| {
        if !loose.remove(&resource) {
            found.loose.insert(resource, false);
        }
        ControlFlow::Continue(())
    })?;
    found.loose.extend(loose.into_iter().map(|resource| (resource, true)));
    Ok(found)
}
