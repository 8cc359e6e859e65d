//! Changes rows of a store's catalogue behind its back, to see whether that is noticed.

use std::path::Path;

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableError, TableHandle as _};

/// A catalogue that nobody has open.
#[derive(Debug)]
pub struct Catalogue {
    database: Database,
}

/// A key and what is under it.
pub type Row = (Vec<u8>, Vec<u8>);

fn raw(table: &str) -> TableDefinition<'_, &'static [u8], &'static [u8]> {
    TableDefinition::new(table)
}

impl Catalogue {
    /// The one of the store at `root`.
    pub fn open(root: &Path) -> Self {
        Self { database: Database::open(root.join("catalog/plies.redb")).expect("the catalogue opens") }
    }

    /// The names of all tables, sorted.
    pub fn tables(&self) -> Vec<String> {
        let txn = self.database.begin_read().expect("a reader begins");
        let tables = txn.list_tables().expect("the tables can be listed");
        let mut names: Vec<_> = tables.map(|table| table.name().to_owned()).collect();
        names.sort();
        names
    }

    /// All rows of a table, in the order of their keys; none if there is no such table.
    pub fn rows(&self, table: &str) -> Vec<Row> {
        let txn = self.database.begin_read().expect("a reader begins");
        let table = match txn.open_table(raw(table)) {
            Err(TableError::TableDoesNotExist(_)) => return Vec::new(),
            table => table.expect("the table opens"),
        };
        let rows = table.iter().expect("the table can be read");
        rows.map(|row| {
            let (key, value) = row.expect("a row can be read");
            (key.value().to_vec(), value.value().to_vec())
        })
        .collect()
    }

    /// Puts a row.
    pub fn put(&self, table: &str, key: &[u8], row: &[u8]) {
        self.change(table, |table| drop(table.insert(key, row).expect("a row is put")));
    }

    /// Removes a row.
    pub fn remove(&self, table: &str, key: &[u8]) {
        self.change(table, |table| drop(table.remove(key).expect("a row is removed")));
    }

    fn change(&self, table: &str, change: impl FnOnce(&mut redb::Table<'_, &'static [u8], &'static [u8]>)) {
        let txn = self.database.begin_write().expect("a writer begins");
        change(&mut txn.open_table(raw(table)).expect("the table opens"));
        txn.commit().expect("the change is written down");
    }
}
