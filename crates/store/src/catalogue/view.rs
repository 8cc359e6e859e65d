//! What a transaction sees: the database as of its last commit, and over it the changes that are not there yet.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::{Bound, ControlFlow};
use std::sync::{Arc, PoisonError};

use redb::{ReadableDatabase as _, ReadableTableMetadata as _, TableDefinition, TableError};
use rpds::RedBlackTreeMapSync;

use super::CatalogueError;
use crate::sync::RwLock;

type RawReadTable = Arc<redb::ReadOnlyTable<&'static [u8], &'static [u8]>>;

pub(super) type RawBounds = (Bound<Vec<u8>>, Bound<Vec<u8>>);
pub(super) type RawVisit<'f> = dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, CatalogueError> + 'f;

pub(super) fn raw(name: &'static str) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
    TableDefinition::new(name)
}

/// Rows of one table by key: what they became, or that they went.
type TableChanges = RedBlackTreeMapSync<Vec<u8>, Option<Vec<u8>>>;

/// Rows that were put and removed, by table. A copy shares what it has in common with the original, so a view of
/// thousands of changes costs a few counts.
#[derive(Debug, Default, Clone)]
pub(super) struct Changes {
    tables: BTreeMap<&'static str, TableChanges>,
    /// How many rows there are; one that was changed twice counts once.
    rows: usize,
}

impl Changes {
    pub(super) fn set(&mut self, table: &'static str, key: Vec<u8>, row: Option<Vec<u8>>) {
        let rows = self.tables.entry(table).or_default();
        let before = rows.size();
        rows.insert_mut(key, row);
        self.rows += rows.size() - before;
    }

    /// Takes over what came later.
    pub(super) fn extend(&mut self, later: &Changes) {
        if self.rows == 0 {
            self.clone_from(later);
            return;
        }
        for (table, rows) in &later.tables {
            for (key, row) in rows {
                self.set(table, key.clone(), row.clone());
            }
        }
    }

    /// As if the row had not been changed.
    pub(super) fn forget(&mut self, table: &'static str, key: &[u8]) {
        let Some(rows) = self.tables.get_mut(table) else { return };
        if rows.remove_mut(key) {
            self.rows -= 1;
            if rows.is_empty() {
                self.tables.remove(table);
            }
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that went.
    pub(super) fn removed_count(&self) -> u64 {
        self.tables.values().map(|rows| rows.iter().filter(|(_, row)| row.is_none()).count() as u64).sum()
    }

    fn get(&self, table: &'static str, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.tables.get(table)?.get(key)
    }

    /// Writes them down: each table is opened once, and its rows come in the order of their keys.
    pub(super) fn apply(&self, txn: &redb::WriteTransaction) -> Result<(), CatalogueError> {
        for (name, rows) in &self.tables {
            let mut table =
                txn.open_table(raw(name)).map_err(|error| CatalogueError::database("open table")(error.into()))?;
            for (key, row) in rows {
                match row {
                    Some(row) => table.insert(key.as_slice(), row.as_slice()).map(drop),
                    None => table.remove(key.as_slice()).map(drop),
                }
                .map_err(|error| CatalogueError::database("put")(error.into()))?;
            }
        }
        Ok(())
    }
}

/// A table by name; `None` if it was not there.
type OpenedTable = (&'static str, Option<RawReadTable>);

/// The database as of one commit, with the tables that somebody looked into.
pub(super) struct Base {
    txn: redb::ReadTransaction,
    /// There are some thirty, so a search by name is quick.
    tables: RwLock<Vec<OpenedTable>>,
}

impl Base {
    pub(super) fn begin(db: &redb::Database) -> Result<Self, redb::TransactionError> {
        Ok(Self { txn: db.begin_read()?, tables: RwLock::default() })
    }

    fn table(&self, name: &'static str) -> Result<Option<RawReadTable>, CatalogueError> {
        let opened = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = opened.iter().find(|(opened, _)| *opened == name) {
            return Ok(table.clone());
        }
        drop(opened);
        let table = match self.txn.open_table(raw(name)) {
            Ok(table) => Some(Arc::new(table)),
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(CatalogueError::database("open table")(error.into())),
        };
        // Twice, if two come at once: that costs nothing.
        self.tables.write().unwrap_or_else(PoisonError::into_inner).push((name, table.clone()));
        Ok(table)
    }

    /// Rows in all tables. The database knows how many are in each.
    pub(super) fn rows_count(&self) -> Result<u64, CatalogueError> {
        let failed = |error: redb::StorageError| CatalogueError::database("count")(error.into());
        let mut count = 0;
        for table in self.txn.list_tables().map_err(failed)? {
            let table = self.txn.open_untyped_table(table);
            let table = table.map_err(|error| CatalogueError::database("open table")(error.into()))?;
            count += table.len().map_err(failed)?;
        }
        Ok(count)
    }

    fn contains(&self, table: &'static str, key: &[u8]) -> Result<bool, CatalogueError> {
        let Some(table) = self.table(table)? else { return Ok(false) };
        Ok(table.get(key).map_err(|error| CatalogueError::database("get")(error.into()))?.is_some())
    }
}

/// A consistent state of all tables: the base, the changes that are just being written down, and those that wait.
#[derive(Clone)]
pub(super) struct View {
    pub(super) base: Arc<Base>,
    pub(super) flushing: Arc<Changes>,
    pub(super) pending: Arc<Changes>,
}

impl View {
    /// The layers of changes over the base, the latest first. `own` are those of a transaction that is not done.
    fn changes<'a>(&'a self, own: Option<&'a Changes>) -> impl Iterator<Item = &'a Changes> {
        own.into_iter().chain([&*self.pending, &*self.flushing])
    }

    pub(super) fn get(
        &self,
        own: Option<&Changes>,
        table: &'static str,
        key: &[u8],
    ) -> Result<Option<Vec<u8>>, CatalogueError> {
        if let Some(row) = self.changes(own).find_map(|changes| changes.get(table, key)) {
            return Ok(row.clone());
        }
        let Some(table) = self.base.table(table)? else { return Ok(None) };
        let row = table.get(key).map_err(|error| CatalogueError::database("get")(error.into()))?;
        Ok(row.map(|row| row.value().to_vec()))
    }

    /// Rows that `own` removes and that are neither in the database nor on their way there: once `own` is among the
    /// pending changes, these need no trace of ever having been.
    pub(super) fn traceless(&self, own: &Changes) -> Result<Vec<(&'static str, Vec<u8>)>, CatalogueError> {
        let mut traceless = Vec::new();
        for (table, rows) in &own.tables {
            for (key, _) in rows.iter().filter(|(_, row)| row.is_none()) {
                if self.flushing.get(table, key).is_none() && !self.base.contains(table, key)? {
                    traceless.push((*table, key.clone()));
                }
            }
        }
        Ok(traceless)
    }

    /// Calls `visit` for every row within `bounds`, in the order of their keys, until it breaks.
    pub(super) fn scan(
        &self,
        own: Option<&Changes>,
        table: &'static str,
        bounds: &RawBounds,
        visit: &mut RawVisit<'_>,
    ) -> Result<(), CatalogueError> {
        let bounds = (bounds.0.as_ref().map(Vec::as_slice), bounds.1.as_ref().map(Vec::as_slice));
        let mut changes: Vec<Peekable<_>> = self
            .changes(own)
            .filter_map(|changes| changes.tables.get(table))
            .map(|rows| rows.range::<[u8], _>(bounds).peekable())
            .collect();
        let failed = |error: redb::StorageError| CatalogueError::database("scan")(error.into());
        if let Some(base) = self.base.table(table)? {
            for entry in base.range::<&[u8]>(bounds).map_err(failed)? {
                let (key, row) = entry.map_err(failed)?;
                let key = key.value();
                // What was changed before this key, and then this one, unless it was changed itself.
                while let Some((changed, after)) = next_changed(&mut changes, Some(key)) {
                    if let Some(after) = after
                        && visit(changed, after)?.is_break()
                    {
                        return Ok(());
                    }
                }
                match take_changed(&mut changes, key) {
                    Some(None) => {}
                    Some(Some(after)) => {
                        if visit(key, after)?.is_break() {
                            return Ok(());
                        }
                    }
                    None => {
                        if visit(key, row.value())?.is_break() {
                            return Ok(());
                        }
                    }
                }
            }
        }
        while let Some((changed, after)) = next_changed(&mut changes, None) {
            if let Some(after) = after
                && visit(changed, after)?.is_break()
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// How many rows there are. Costs a look for every one that was changed, and none for the others.
    pub(super) fn len(&self, own: Option<&Changes>, table: &'static str) -> Result<u64, CatalogueError> {
        let failed = |error: redb::StorageError| CatalogueError::database("count")(error.into());
        let base = self.base.table(table)?;
        let mut len = base.as_ref().map_or(Ok(0), |base| base.len()).map_err(failed)?;
        let mut changes: Vec<Peekable<_>> = self
            .changes(own)
            .filter_map(|changes| changes.tables.get(table))
            .map(|rows| rows.range::<[u8], _>(..).peekable())
            .collect();
        while let Some((key, after)) = next_changed(&mut changes, None) {
            let before =
                base.as_ref().map_or(Ok(false), |base| base.get(key).map(|row| row.is_some())).map_err(failed)?;
            match (before, after.is_some()) {
                (false, true) => len += 1,
                (true, false) => len -= 1,
                _ => {}
            }
        }
        Ok(len)
    }
}

/// The lowest changed row, if its key is below `end`: its latest state. Older ones of the same key are passed over.
fn next_changed<'a, I>(changes: &mut [Peekable<I>], end: Option<&[u8]>) -> Option<(&'a [u8], Option<&'a [u8]>)>
where
    I: Iterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)>,
{
    let lowest = changes.iter_mut().filter_map(|rows| rows.peek().map(|(key, _)| key.as_slice())).min()?;
    if end.is_some_and(|end| lowest >= end) {
        return None;
    }
    take_changed(changes, lowest).map(|row| (lowest, row))
}

/// The latest state of the row under `key`, if all rows below it were taken.
fn take_changed<'a, I>(changes: &mut [Peekable<I>], key: &[u8]) -> Option<Option<&'a [u8]>>
where
    I: Iterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)>,
{
    let mut latest = None;
    for rows in changes {
        if let Some((_, row)) = rows.next_if(|(at, _)| at.as_slice() == key) {
            latest = latest.or(Some(row.as_deref()));
        }
    }
    latest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Model = BTreeMap<Vec<u8>, Vec<u8>>;
    /// A key of one byte, so that they meet, and what becomes of its row.
    type Change = (u8, Option<u8>);

    fn changes(of: &[Change], model: &mut Model) -> Changes {
        let mut changes = Changes::default();
        for (key, row) in of {
            let (key, row) = (vec![*key], row.map(|row| vec![row]));
            match row.clone() {
                Some(row) => drop(model.insert(key.clone(), row)),
                None => drop(model.remove(&key)),
            }
            changes.set("table", key, row);
        }
        changes
    }

    fn some_changes() -> impl Strategy<Value = Vec<Change>> {
        prop::collection::vec((0..12u8, prop::option::of(any::<u8>())), 0..12)
    }

    fn bound() -> impl Strategy<Value = Bound<Vec<u8>>> {
        let key = || (0..12u8).prop_map(|key| vec![key]);
        prop_oneof![Just(Bound::Unbounded), key().prop_map(Bound::Included), key().prop_map(Bound::Excluded)]
    }

    proptest! {
        #[test]
        fn what_is_seen_is_what_was_changed_last(
            layers in [some_changes(), some_changes(), some_changes(), some_changes()],
            later in some_changes(),
            from in bound(),
            to in bound(),
            enough in 1..6usize,
        ) {
            // An inverted range is nobody's.
            let key = |bound: &Bound<Vec<u8>>| match bound {
                Bound::Included(key) | Bound::Excluded(key) => Some(key[0]),
                Bound::Unbounded => None,
            };
            prop_assume!(key(&from).zip(key(&to)).is_none_or(|(from, to)| from < to));

            let mut model = Model::new();
            let db = redb::Database::builder().create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
            let txn = db.begin_write().unwrap();
            changes(&layers[0], &mut model).apply(&txn).unwrap();
            txn.commit().unwrap();
            let flushing = changes(&layers[1], &mut model);
            let mut pending = changes(&layers[2], &mut model);
            pending.extend(&changes(&layers[3], &mut model));
            let base = Arc::new(Base::begin(&db).unwrap());
            let view = View { base, flushing: Arc::new(flushing), pending: Arc::new(pending) };
            let own = changes(&later, &mut model);

            for key in 0..12u8 {
                prop_assert_eq!(view.get(Some(&own), "table", &[key]).unwrap(), model.get(&vec![key]).cloned());
            }
            prop_assert_eq!(view.len(Some(&own), "table").unwrap(), model.len() as u64);
            let mut seen = Vec::new();
            view.scan(Some(&own), "table", &(from.clone(), to.clone()), &mut |key, row| {
                seen.push((key.to_vec(), row.to_vec()));
                Ok(if seen.len() == enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })
            .unwrap();
            let expected: Vec<_> =
                model.range((from, to)).take(enough).map(|(key, row)| (key.clone(), row.clone())).collect();
            prop_assert_eq!(seen, expected);
        }
    }
}
