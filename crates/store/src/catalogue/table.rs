use std::fmt;
use std::marker::PhantomData;
use std::ops::{Bound, ControlFlow};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::view::{Changes, RawBounds, RawVisit, View};
use super::{CatalogueError, Key, KeyReader, PrefixOf};

/// What a table keeps under a key: postcard after one byte of version.
pub trait Row: Serialize + DeserializeOwned {
    /// The version that is written. Rows are never rewritten wholesale: older ones are upgraded
    /// when they are read.
    const VERSION: u8;

    /// Makes a row of today from the body of an older version; `None` if that version never was.
    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        let _ = (version, body);
        None
    }
}

/// A set has keys only.
impl Row for () {
    const VERSION: u8 = 0;
}

impl Row for u64 {
    const VERSION: u8 = 0;
}

/// A table by name, with the types of its keys and rows. Tables come into being when first written.
///
/// Names carry their crate as a prefix (`cache.records`), since all crates share one catalogue.
pub struct Table<K, V> {
    name: &'static str,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> Table<K, V> {
    /// Declares a table.
    pub const fn new(name: &'static str) -> Self {
        Self { name, types: PhantomData }
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<K, V> fmt::Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({})", self.name)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn damaged(table: &'static str, key: &[u8], what: &'static str) -> CatalogueError {
    CatalogueError::Damaged { table, key: hex(key), what }
}

pub(crate) fn encode_row<V: Row>(row: &V) -> Vec<u8> {
    postcard::to_extend(row, vec![V::VERSION]).expect("because rows are plain data, which postcard always encodes")
}

pub(super) fn decode_row<V: Row>(table: &'static str, key: &[u8], bytes: &[u8]) -> Result<V, CatalogueError> {
    let (version, body) = bytes.split_first().ok_or_else(|| damaged(table, key, "empty value"))?;
    if *version > V::VERSION {
        return Err(CatalogueError::RowTooNew { table, found: *version, supported: V::VERSION });
    }
    if *version < V::VERSION {
        return V::upgrade(*version, body).ok_or_else(|| damaged(table, key, "value of an unknown older version"));
    }
    match postcard::take_from_bytes(body) {
        Ok((row, [])) => Ok(row),
        Ok(_) => Err(damaged(table, key, "bytes after the value")),
        Err(_) => Err(damaged(table, key, "value does not decode")),
    }
}

fn decode_key<K: Key>(table: &'static str, bytes: &[u8]) -> Result<K, CatalogueError> {
    KeyReader::decode_all(bytes).ok_or_else(|| damaged(table, bytes, "key does not decode"))
}

/// The first key after all that begin with `prefix`.
fn after_prefix(prefix: &[u8]) -> Bound<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Bound::Excluded(end);
        }
    }
    Bound::Unbounded
}

mod sealed {
    use super::{CatalogueError, RawBounds, RawVisit};

    /// The two primitives; `&mut dyn` keeps them out of the typed code's instantiations.
    pub trait RawRows {
        fn raw_get(&self, table: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogueError>;
        fn raw_scan(
            &self,
            table: &'static str,
            bounds: RawBounds,
            visit: &mut RawVisit<'_>,
        ) -> Result<(), CatalogueError>;
        fn raw_len(&self, table: &'static str) -> Result<u64, CatalogueError>;
    }
}

/// Reading rows: what [`ReadTx`] and [`Tx`] have in common, so that one function serves both.
pub trait Rows: sealed::RawRows {
    /// The row under `key`.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn get<K: Key, V: Row>(&self, table: &Table<K, V>, key: &K) -> Result<Option<V>, CatalogueError> {
        let key = key.to_bytes();
        self.raw_get(table.name, &key)?.map(|bytes| decode_row(table.name, &key, &bytes)).transpose()
    }

    /// Whether there is a row under `key`; does not decode it.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn contains<K: Key, V: Row>(&self, table: &Table<K, V>, key: &K) -> Result<bool, CatalogueError> {
        Ok(self.raw_get(table.name, &key.to_bytes())?.is_some())
    }

    /// How many rows there are. The database knows, so it costs the same for any number.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    fn rows_count<K: Key, V: Row>(&self, table: &Table<K, V>) -> Result<u64, CatalogueError> {
        self.raw_len(table.name)
    }

    /// Calls `visit` for every row in key order until it breaks. Memory stays constant. In a write
    /// transaction, `visit` may look at other rows through the same `&Tx`.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn scan<K: Key, V: Row>(
        &self,
        table: &Table<K, V>,
        mut visit: impl FnMut(K, V) -> ControlFlow<()>,
    ) -> Result<(), CatalogueError>
    where
        Self: Sized,
    {
        scan_within(self, table, (Bound::Unbounded, Bound::Unbounded), &mut visit)
    }

    /// As [`Rows::scan`], from the key `from` on (inclusive).
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn scan_from<K: Key, V: Row>(
        &self,
        table: &Table<K, V>,
        from: &K,
        mut visit: impl FnMut(K, V) -> ControlFlow<()>,
    ) -> Result<(), CatalogueError>
    where
        Self: Sized,
    {
        scan_within(self, table, (Bound::Included(from.to_bytes()), Bound::Unbounded), &mut visit)
    }

    /// As [`Rows::scan_from`], without decoding the rows: one that is damaged hides no other.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn scan_keys_from<K: Key, V: Row>(
        &self,
        table: &Table<K, V>,
        from: &K,
        mut visit: impl FnMut(K) -> ControlFlow<()>,
    ) -> Result<(), CatalogueError>
    where
        Self: Sized,
    {
        let bounds = (Bound::Included(from.to_bytes()), Bound::Unbounded);
        self.raw_scan(table.name, bounds, &mut |key, _| Ok(visit(decode_key(table.name, key)?)))
    }

    /// As [`Rows::scan`], but a row that does not decode is handed to `visit` as its error: it hides no other. So is a
    /// key that does not, as `None`.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    fn scan_each<K: Key, V: Row>(
        &self,
        table: &Table<K, V>,
        mut visit: impl FnMut(Option<K>, Result<V, CatalogueError>) -> ControlFlow<()>,
    ) -> Result<(), CatalogueError>
    where
        Self: Sized,
    {
        self.scan_bytes(table, |_, key, row| visit(key, row))
    }

    /// As [`Rows::scan_each`], with the bytes of each key: what names a row that can't be read.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    fn scan_bytes<K: Key, V: Row>(
        &self,
        table: &Table<K, V>,
        mut visit: impl FnMut(&[u8], Option<K>, Result<V, CatalogueError>) -> ControlFlow<()>,
    ) -> Result<(), CatalogueError>
    where
        Self: Sized,
    {
        let name = table.name;
        self.raw_scan(name, (Bound::Unbounded, Bound::Unbounded), &mut |key, value| {
            Ok(match decode_key(name, key) {
                Ok(decoded) => visit(key, Some(decoded), decode_row(name, key, value)),
                Err(error) => visit(key, None, Err(error)),
            })
        })
    }

    /// Whether a blob, layer, snapshot or active is in the store.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn has(&self, resource: impl Into<crate::Resource>) -> Result<bool, CatalogueError>
    where
        Self: Sized,
    {
        super::schema::exists(self, resource.into())
    }

    /// As [`Rows::scan`], over the rows whose key begins with `prefix`.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn scan_prefix<K: Key, V: Row, P: PrefixOf<K>>(
        &self,
        table: &Table<K, V>,
        prefix: &P,
        mut visit: impl FnMut(K, V) -> ControlFlow<()>,
    ) -> Result<(), CatalogueError>
    where
        Self: Sized,
    {
        let prefix = prefix.to_bytes();
        let end = after_prefix(&prefix);
        scan_within(self, table, (Bound::Included(prefix), end), &mut visit)
    }

    /// All rows whose key begins with `prefix`, in key order. For sets known to be small.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn prefixed<K: Key, V: Row, P: PrefixOf<K>>(
        &self,
        table: &Table<K, V>,
        prefix: &P,
    ) -> Result<Vec<(K, V)>, CatalogueError>
    where
        Self: Sized,
    {
        let mut rows = Vec::new();
        self.scan_prefix(table, prefix, |key, row| {
            rows.push((key, row));
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }

    /// As [`Rows::prefixed`], without decoding the rows: one that is damaged hides no other.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn prefixed_keys<K: Key, V: Row, P: PrefixOf<K>>(
        &self,
        table: &Table<K, V>,
        prefix: &P,
    ) -> Result<Vec<K>, CatalogueError>
    where
        Self: Sized,
    {
        let mut keys = Vec::new();
        let prefix = prefix.to_bytes();
        let end = after_prefix(&prefix);
        self.raw_scan(table.name, (Bound::Included(prefix), end), &mut |key, _| {
            keys.push(decode_key(table.name, key)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(keys)
    }

    /// All rows that can be read, in key order: for what goes on without the others, which a check finds. For tables known to
    /// be small.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    fn readable<K: Key, V: Row>(&self, table: &Table<K, V>) -> Result<Vec<(K, V)>, CatalogueError>
    where
        Self: Sized,
    {
        let mut rows = Vec::new();
        self.scan_each(table, |key, row| {
            rows.extend(key.zip(row.ok()));
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }

    /// All rows in key order. For tables known to be small.
    ///
    /// # Errors
    /// [`CatalogueError`].
    fn all<K: Key, V: Row>(&self, table: &Table<K, V>) -> Result<Vec<(K, V)>, CatalogueError>
    where
        Self: Sized,
    {
        let mut rows = Vec::new();
        self.scan(table, |key, row| {
            rows.push((key, row));
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }
}

fn scan_within<K: Key, V: Row>(
    rows: &impl sealed::RawRows,
    table: &Table<K, V>,
    bounds: RawBounds,
    visit: &mut dyn FnMut(K, V) -> ControlFlow<()>,
) -> Result<(), CatalogueError> {
    let name = table.name;
    rows.raw_scan(name, bounds, &mut |key, value| Ok(visit(decode_key(name, key)?, decode_row(name, key, value)?)))
}

/// A consistent view of the whole catalogue. Writers do not wait for it, nor it for them; but while
/// it lives, pages that writers replace stay in the file, so keep it short.
pub struct ReadTx {
    view: View,
}

impl ReadTx {
    pub(super) fn new(view: View) -> Self {
        Self { view }
    }
}

impl fmt::Debug for ReadTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadTx")
    }
}

impl sealed::RawRows for ReadTx {
    fn raw_get(&self, table: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogueError> {
        self.view.get(None, table, key)
    }

    fn raw_scan(&self, table: &'static str, bounds: RawBounds, visit: &mut RawVisit<'_>) -> Result<(), CatalogueError> {
        self.view.scan(None, table, &bounds, visit)
    }

    fn raw_len(&self, table: &'static str) -> Result<u64, CatalogueError> {
        self.view.len(None, table)
    }
}

impl Rows for ReadTx {}

/// A write transaction, as the closure given to [`crate::Store::write`] sees it: its own changes, over
/// those of all that ran before it.
pub struct Tx<'a> {
    view: &'a View,
    changes: Changes,
    now: crate::Stamp,
}

impl<'a> Tx<'a> {
    pub(super) fn new(view: &'a View, now: crate::Stamp) -> Self {
        Self { view, changes: Changes::default(), now }
    }

    /// What the closure changed.
    pub(super) fn finish(self) -> Changes {
        self.changes
    }

    /// The moment at which the closure began, by the store's clock.
    pub fn now(&self) -> crate::Stamp {
        self.now
    }

    /// Puts `row` under `key`, whether or not there was one before.
    ///
    /// # Errors
    /// None today: a change meets the database when it is written down. [`CatalogueError`] all the same, as of the
    /// other changes.
    pub fn put<K: Key, V: Row>(&mut self, table: &Table<K, V>, key: &K, row: &V) -> Result<(), CatalogueError> {
        self.changes.set(table.name, key.to_bytes(), Some(encode_row(row)));
        Ok(())
    }

    /// As [`Tx::put`]; true if there was no row before. Costs a look.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn insert<K: Key, V: Row>(&mut self, table: &Table<K, V>, key: &K, row: &V) -> Result<bool, CatalogueError> {
        let is_new = !self.contains(table, key)?;
        self.put(table, key, row)?;
        Ok(is_new)
    }

    /// Removes and returns the row under `key`.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn take<K: Key, V: Row>(&mut self, table: &Table<K, V>, key: &K) -> Result<Option<V>, CatalogueError> {
        let before = self.get(table, key)?;
        if before.is_some() {
            self.changes.set(table.name, key.to_bytes(), None);
        }
        Ok(before)
    }

    /// Puts the bytes of a row, or removes it. For repairs, which know rows of all crates by their bytes only.
    pub(crate) fn set_raw(&mut self, table: &'static str, key: Vec<u8>, row: Option<Vec<u8>>) {
        self.changes.set(table, key, row);
    }

    /// The bytes of a row.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub(crate) fn get_raw(&self, table: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogueError> {
        sealed::RawRows::raw_get(self, table, key)
    }

    /// Removes the row under `key` without decoding it; true if there was one.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn remove<K: Key, V: Row>(&mut self, table: &Table<K, V>, key: &K) -> Result<bool, CatalogueError> {
        let was_there = self.contains(table, key)?;
        if was_there {
            self.changes.set(table.name, key.to_bytes(), None);
        }
        Ok(was_there)
    }
}

impl fmt::Debug for Tx<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tx")
    }
}

impl sealed::RawRows for Tx<'_> {
    fn raw_get(&self, table: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>, CatalogueError> {
        self.view.get(Some(&self.changes), table, key)
    }

    fn raw_scan(&self, table: &'static str, bounds: RawBounds, visit: &mut RawVisit<'_>) -> Result<(), CatalogueError> {
        self.view.scan(Some(&self.changes), table, &bounds, visit)
    }

    fn raw_len(&self, table: &'static str) -> Result<u64, CatalogueError> {
        self.view.len(Some(&self.changes), table)
    }
}

impl Rows for Tx<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ends_after_its_last_key() {
        assert_eq!(after_prefix(&[1, 2]), Bound::Excluded(vec![1, 3]));
        assert_eq!(after_prefix(&[1, 0xff]), Bound::Excluded(vec![2]));
        assert_eq!(after_prefix(&[0xff, 0xff]), Bound::Unbounded);
        assert_eq!(after_prefix(&[]), Bound::Unbounded);
    }

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Named {
        name: String,
        count: u32,
    }

    impl Row for Named {
        const VERSION: u8 = 2;

        fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
            (version == 1).then_some(())?;
            Some(Self { name: postcard::from_bytes(body).ok()?, count: 0 })
        }
    }

    #[test]
    fn rows_of_other_versions_are_upgraded_or_refused() {
        let row = Named { name: "n".into(), count: 3 };
        let bytes = encode_row(&row);
        assert_eq!(bytes[0], 2);
        assert_eq!(decode_row::<Named>("t", &[], &bytes).unwrap(), row);
        assert_eq!(decode_row::<Named>("t", &[], &[1, 1, b'n']).unwrap(), Named { name: "n".into(), count: 0 });
        assert!(matches!(decode_row::<Named>("t", &[], &[3]), Err(CatalogueError::RowTooNew { found: 3, .. })));
        for bad in [&[][..], &[0, 0], &[2, 9], &[2, 1, b'n', 3, 0]] {
            let error = decode_row::<Named>("t", &[7], bad).unwrap_err();
            assert_eq!(error.kind(), plies_oci::ErrorKind::DataLoss, "{bad:?}: {error}");
        }
    }
}
