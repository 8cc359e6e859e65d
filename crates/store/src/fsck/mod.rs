//! Finding and mending what is wrong with a store.
//!
//! Rows are either *primary* or *derived*. A primary row says what nothing else says: that there is a layer, what a name
//! points at. A derived one follows from primary ones: counts, indexes, the other direction of a link, holds under an
//! owner who has a row. A check therefore consists of two things: what is derived is made again and compared both ways
//! ([`Findings::compare`]), and of every primary row it is asked whether all that it names is there. Each crate checks its own
//! tables, in a function that fills [`Findings`]; nobody looks into another's.
//!
//! A finding says which [`Remedy`] it needs. [`Mender`] applies them, those first that lose nothing. What a dropped row left
//! behind (its holds, its indexes, who stood on it) is found by the next check, so a repair is rounds of checking and
//! mending until nothing is left to do, and a crash in between leaves what the next repair finds.

mod check;
mod mend;
mod rebuild;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

pub(crate) use check::check;
pub use check::{CheckError, CheckOptions, Depth, Sample};
pub(crate) use mend::empty_lost;
pub use mend::{MendError, Mender};
pub(crate) use rebuild::rebuild;
pub use rebuild::{Rebuilt, rebuild_owner};

use plies_oci::BlobDigest;

use crate::catalogue::schema::{BLOBS, META, META_SESSION};
use crate::catalogue::{CatalogueError, Key, Row, Rows, Table, Tx};
use crate::open::unless_damaged;
use crate::{LayerId, LeaseId, Owner, Resource};

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong, as a stable word for programs: `blob-missing`.
    pub code: &'static str,
    /// With what: a resource, a record, an image, a path below the root, a row as `table/key`.
    pub subject: String,
    /// What is wrong, in a sentence without its subject.
    pub what: String,
    /// What puts it right.
    pub remedy: Remedy,
}

/// What puts a finding right, from what costs nothing to what costs most.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// Rows are written, or go, as other rows say. Nothing is lost.
    Rewrite(Vec<Change>),
    /// A directory or file of the store's own gets the mode and owner that it should have; a directory is made if it is
    /// missing.
    Permissions(PathBuf),
    /// A layer's `layer.json` is written again from its row.
    Sidecar(LayerId),
    /// A file of the store's own is written again.
    Layout,
    /// A resource is made again from what else is here: its row from its bytes, a layer from its blob, a blob from its
    /// layer. If that cannot be, `otherwise` happens, as in [`Remedy::Drop`].
    Restore {
        /// Which.
        resource: Resource,
        /// What goes if it cannot be restored.
        otherwise: Vec<Change>,
    },
    /// A snapshot is made again of its layers. If that cannot be, `otherwise` happens.
    Restack {
        /// The layers, bottom first.
        layers: Vec<LayerId>,
        /// What goes if they cannot be stacked.
        otherwise: Vec<Change>,
    },
    /// Bytes that belong to nobody are moved to `lost/`.
    Quarantine(PathBuf),
    /// Rows go: what they said is lost. Copies of them are kept in `lost/`.
    Drop(Vec<Change>),
    /// Nothing that a repair could do; the text says what a user can.
    Advice(String),
}

impl Remedy {
    /// What it does, as a stable word for programs.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Rewrite(_) => "rewrite",
            Self::Permissions(_) => "permissions",
            Self::Sidecar(_) => "sidecar",
            Self::Layout => "layout",
            Self::Restore { .. } => "restore",
            Self::Restack { .. } => "restack",
            Self::Quarantine(_) => "quarantine",
            Self::Drop(_) => "drop",
            Self::Advice(_) => "advice",
        }
    }
}

/// A change of one row of any crate's tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    kind: ChangeKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ChangeKind {
    Row {
        table: &'static str,
        key: Vec<u8>,
        row: Option<Vec<u8>>,
    },
    Hold(Owner, Resource),
    Unhold(Owner, Resource),
    LetGo(LeaseId, Resource),
    AddEdge(Resource, Resource),
    RemoveEdge(Resource, Resource),
    /// Sessions go on with a number beyond this one: once made it is not made again, whatever began since.
    Session(u64),
}

impl Change {
    /// A row is put.
    pub fn put<K: Key, V: Row>(table: &Table<K, V>, key: &K, row: &V) -> Self {
        Self::row(table.name(), key.to_bytes(), Some(crate::catalogue::encode_row(row)))
    }

    /// A row goes.
    pub fn remove<K: Key, V: Row>(table: &Table<K, V>, key: &K) -> Self {
        Self::row(table.name(), key.to_bytes(), None)
    }

    /// An owner holds a resource.
    pub fn hold(owner: &Owner, resource: impl Into<Resource>) -> Self {
        Self { kind: ChangeKind::Hold(owner.clone(), resource.into()) }
    }

    /// An owner lets go of a resource.
    pub fn unhold(owner: &Owner, resource: impl Into<Resource>) -> Self {
        Self { kind: ChangeKind::Unhold(owner.clone(), resource.into()) }
    }

    fn row(table: &'static str, key: Vec<u8>, row: Option<Vec<u8>>) -> Self {
        Self { kind: ChangeKind::Row { table, key, row } }
    }

    fn of(kind: ChangeKind) -> Self {
        Self { kind }
    }

    /// Makes the change; a hold of something that is gone is left out.
    fn apply(&self, tx: &mut Tx<'_>) -> Result<(), CatalogueError> {
        match &self.kind {
            ChangeKind::Row { table, key, row } => {
                tx.set_raw(table, key.clone(), row.clone());
                Ok(())
            }
            ChangeKind::Hold(owner, resource) if tx.has(*resource)? => tx.hold(owner, *resource),
            ChangeKind::AddEdge(from, to) if tx.has(*from)? && tx.has(*to)? => tx.add_edge(*from, *to),
            ChangeKind::Hold(..) | ChangeKind::AddEdge(..) => Ok(()),
            ChangeKind::Unhold(owner, resource) => tx.unhold(owner, *resource).map(drop),
            ChangeKind::LetGo(lease, resource) => tx.let_go(*lease, *resource),
            ChangeKind::RemoveEdge(from, to) => tx.remove_edge(*from, *to).map(drop),
            ChangeKind::Session(number) => {
                let key = META_SESSION.to_owned();
                let last = unless_damaged(tx.get(&META, &key))?.filter(|last| *last < u32::MAX.into());
                tx.put(&META, &key, &last.unwrap_or(0).max(*number))
            }
        }
    }
}

/// What checks found so far.
#[derive(Debug, Default)]
pub struct Findings {
    /// In the order in which they were found.
    pub found: Vec<Finding>,
    /// Rows that were looked at.
    pub rows_count: u64,
}

impl Findings {
    /// Notes one.
    pub fn add(&mut self, code: &'static str, subject: impl ToString, what: impl Into<String>, remedy: Remedy) {
        self.found.push(Finding { code, subject: subject.to_string(), what: what.into(), remedy });
    }

    /// All rows of a primary table that can be read. Each that cannot is a finding `row-unreadable`, and is dropped unless
    /// `remedy` knows better; one that a later version wrote is `row-too-new`.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn rows<K: Key, V: Row>(
        &mut self,
        rows: &impl Rows,
        table: &Table<K, V>,
        remedy: impl Fn(K, Vec<Change>) -> Remedy,
    ) -> Result<Vec<(K, V)>, CatalogueError> {
        let mut readable = Vec::new();
        rows.scan_bytes(table, |bytes, key, row| {
            self.rows_count += 1;
            match (key, row) {
                (Some(key), Ok(row)) => readable.push((key, row)),
                (key, Err(error)) => {
                    let drop = vec![Change::row(table.name(), bytes.to_vec(), None)];
                    let remedy = key.map_or_else(|| Remedy::Drop(drop.clone()), |key| remedy(key, drop.clone()));
                    self.unreadable(table.name(), bytes, &error, remedy);
                }
                (None, Ok(_)) => {}
            }
            ControlFlow::Continue(())
        })?;
        Ok(readable)
    }

    /// As [`Findings::rows`], for a table whose unreadable rows can only be dropped.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn rows_or_drop<K: Key, V: Row>(
        &mut self,
        rows: &impl Rows,
        table: &Table<K, V>,
    ) -> Result<Vec<(K, V)>, CatalogueError> {
        self.rows(rows, table, |_, changes| Remedy::Drop(changes))
    }

    /// Notes a blob whose bytes somebody else has seen to be wrong.
    pub fn damaged_blob(&mut self, digest: BlobDigest, what: &str) {
        let otherwise = vec![Change::remove(&BLOBS, &digest)];
        self.add("blob-damaged", Resource::from(digest), what, Remedy::Restore { resource: digest.into(), otherwise });
    }

    fn unreadable(&mut self, table: &'static str, key: &[u8], error: &CatalogueError, remedy: Remedy) {
        match error {
            CatalogueError::RowTooNew { .. } => self.too_new(table, key, error),
            error => self.add("row-unreadable", format!("{table}/{}", hex(key)), error.to_string(), remedy),
        }
    }

    fn too_new(&mut self, table: &'static str, key: &[u8], error: &CatalogueError) {
        let advice = "use the version of ply that wrote it".to_owned();
        self.add("row-too-new", format!("{table}/{}", hex(key)), error.to_string(), Remedy::Advice(advice));
    }

    /// Compares a derived table with what it should be, both ways. A difference is a finding with this code; it is
    /// rewritten.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn compare<K: Key + Ord, V: Row + PartialEq>(
        &mut self,
        rows: &impl Rows,
        code: &'static str,
        table: &Table<K, V>,
        mut should: BTreeMap<K, V>,
    ) -> Result<(), CatalogueError> {
        let name = table.name();
        let subject = |key: &[u8]| format!("{name}/{}", hex(key));
        rows.scan_bytes(table, |bytes, key, row| {
            self.rows_count += 1;
            let expected = key.and_then(|key| should.remove(&key));
            let (what, row) = match (row, expected) {
                (Err(error @ CatalogueError::RowTooNew { .. }), _) => {
                    self.too_new(name, bytes, &error);
                    return ControlFlow::Continue(());
                }
                (Ok(row), Some(expected)) if row == expected => return ControlFlow::Continue(()),
                (Ok(_), Some(expected)) => ("says something else than what it is kept of", Some(expected)),
                (Ok(_), None) => ("is kept of nothing", None),
                (Err(_), expected) => ("does not decode", expected),
            };
            let row = row.map(|row| crate::catalogue::encode_row(&row));
            let change = Change::row(name, bytes.to_vec(), row);
            self.add(code, subject(bytes), what, Remedy::Rewrite(vec![change]));
            ControlFlow::Continue(())
        })?;
        for (key, row) in should {
            let change = Change::put(table, &key, &row);
            self.add(code, subject(&key.to_bytes()), "is missing", Remedy::Rewrite(vec![change]));
        }
        Ok(())
    }

    /// Compares what owners of one kind hold with what they should. Those that should hold something and that is not
    /// here are not told of: what they need it for is found where it is needed. `may` says which holds are nobody's
    /// business though nothing asks for them.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn compare_holds(
        &mut self,
        rows: &impl Rows,
        code: &'static str,
        kind: &str,
        should: &BTreeMap<Owner, Vec<Resource>>,
        may: impl Fn(&Owner, Resource) -> bool,
    ) -> Result<(), CatalogueError> {
        let mut missing: std::collections::BTreeSet<(Owner, Resource)> =
            should.iter().flat_map(|(owner, held)| held.iter().map(|one| (owner.clone(), *one))).collect();
        let prefix = format!("{kind}:");
        let mut stray = Vec::new();
        crate::scan_holds(rows, |owner, held| {
            if owner.as_str().starts_with(&prefix) && !missing.remove(&(owner.clone(), held)) && !may(owner, held) {
                stray.push((owner.clone(), held));
            }
            ControlFlow::Continue(())
        })?;
        for (owner, held) in stray {
            let remedy = Remedy::Rewrite(vec![Change::unhold(&owner, held)]);
            self.add(code, &owner, format!("holds {held}, which it has no use for"), remedy);
        }
        for (owner, held) in missing {
            if rows.has(held)? {
                let remedy = Remedy::Rewrite(vec![Change::hold(&owner, held)]);
                self.add(code, &owner, format!("does not hold {held}, which it needs"), remedy);
            }
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
