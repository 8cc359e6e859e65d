//! `ply ref`: records of the build cache by hand.

use plies_cache::{RecordError, RecordId, RecordRow, Tree};
use plies_oci::ErrorKind;
use plies_store::{ActiveId, ActiveInfo, ActiveOptions, CatalogueError, LayerError, LayerId, Lease, SnapshotError};
use serde::Serialize;

use crate::Engine;
use crate::build::{SolveError, random_id};
use crate::images::chain;
use crate::run::{RunError, Target};

/// Why a request on records failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordsError {
    /// The build cache said no.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Finding what to start from, or whether the record is mounted.
    #[error(transparent)]
    Tree(Box<RunError>),
    /// What to start from can still change.
    #[error("{parent} is mutable: commit it first")]
    MutableParent {
        /// As it was named.
        parent: String,
    },
    /// Naming the record.
    #[error(transparent)]
    Id(#[from] SolveError),
    /// Preparing or sealing its tree.
    #[error("prepare or seal a tree")]
    Snapshot(#[from] SnapshotError),
    /// Its layer.
    #[error("read a layer's row")]
    Layer(#[from] LayerError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
}

impl RecordsError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Record(source) => source.kind(),
            Self::Tree(source) => source.kind(),
            Self::MutableParent { .. } => ErrorKind::FailedPrecondition,
            Self::Id(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// One line of `ply ref ls`.
#[derive(Debug, Clone, Serialize)]
pub struct RecordSummary {
    /// The record's ID.
    pub id: String,
    /// `mutable` or `immutable`.
    pub state: &'static str,
    /// What it is.
    pub description: String,
    /// RFC 3339.
    pub created: String,
    /// RFC 3339.
    pub last_used: String,
    /// Uses since it was made.
    pub usage_count: u64,
    /// What its topmost layer takes on disk: what it adds to what it stands on. Of a mutable record what it takes now,
    /// or what was measured last if it is changing.
    pub size_bytes: u64,
    /// The layers of its tree, bottom first.
    pub layers: Vec<String>,
    /// Why its size and layers are not known: it is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl RecordSummary {
    fn new(id: RecordId, row: RecordRow, size_bytes: u64, layers: &[LayerId]) -> Self {
        Self {
            id: id.to_string(),
            state: if matches!(row.tree, Tree::Mutable(_)) { "mutable" } else { "immutable" },
            description: row.description,
            created: crate::rfc3339(row.created_at),
            last_used: crate::rfc3339(row.last_used_at),
            usage_count: row.usage_count,
            size_bytes,
            layers: layers.iter().map(ToString::to_string).collect(),
            error: None,
        }
    }
}

impl Engine {
    /// All records, the last used first. One that cannot be read is listed with its error: it hides no other.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn records(&self) -> Result<Vec<RecordSummary>, RecordsError> {
        let mut records = self.store().read(plies_cache::list)?;
        records.sort_by_key(|(id, row)| (std::cmp::Reverse(row.last_used_at), *id));
        let summary = |(id, row): (RecordId, RecordRow)| {
            self.record_summary(id, row.clone()).unwrap_or_else(|error| RecordSummary {
                error: Some(chain(&error)),
                ..RecordSummary::new(id, row, 0, &[])
            })
        };
        Ok(records.into_iter().map(summary).collect())
    }

    /// One record.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn record(&self, wanted: &str) -> Result<RecordSummary, RecordsError> {
        let (id, row) = self.store().read(|rows| plies_cache::find(rows, wanted))?;
        self.record_summary(id, row)
    }

    pub(crate) fn record_summary(&self, id: RecordId, row: RecordRow) -> Result<RecordSummary, RecordsError> {
        let snapshots = self.store().snapshots();
        let layers = match row.tree {
            Tree::Immutable(snapshot) => snapshots.info(snapshot)?.layers,
            Tree::Scratch | Tree::Mutable(_) => vec![],
        };
        let size_bytes = match row.tree {
            Tree::Mutable(active) => self.active_bytes(&snapshots.active(active)?),
            Tree::Scratch | Tree::Immutable(_) => match layers.last() {
                Some(layer) => self.store().layers().info(*layer)?.usage.size_bytes,
                None => 0,
            },
        };
        Ok(RecordSummary::new(id, row, size_bytes, &layers))
    }

    /// What an active takes on disk. One that cannot be measured, since it is in use or sealed, takes what it took when
    /// it could.
    pub(crate) fn active_bytes(&self, info: &ActiveInfo) -> u64 {
        let measured = match info.sealed {
            None => self.store().snapshots().measure(info.id).ok(),
            Some(_) => None,
        };
        measured.or(info.usage).map_or(0, |usage| usage.size_bytes)
    }

    /// Makes a mutable record on top of an image or an immutable record, or of nothing.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn new_record(&self, parent: Option<&str>, description: &str) -> Result<RecordId, RecordsError> {
        let base = match parent.map(|parent| (parent, self.target(parent))) {
            None => None,
            Some((_, Ok(Target::Tree(tree)))) => tree,
            Some((parent, Ok(Target::Mutable(_)))) => {
                return Err(RecordsError::MutableParent { parent: parent.to_owned() });
            }
            Some((_, Err(error))) => return Err(RecordsError::Tree(Box::new(error))),
        };
        let id = random_id()?;
        let now = self.store().now();
        self.with_lease("ref new", |lease| {
            let active = self.store().snapshots().prepare(base, lease, ActiveOptions { volatile: false })?;
            let row = RecordRow {
                tree: Tree::Mutable(active),
                description: description.to_owned(),
                key: None,
                created_at: now,
                last_used_at: now,
                usage_count: 0,
            };
            self.store().write(|tx| plies_cache::put(tx, id, &row))?;
            Ok(id)
        })
    }

    /// Makes a mutable record immutable, under the same ID.
    ///
    /// # Errors
    /// [`RecordsError`], among them that it is mounted.
    pub fn commit_record(&self, wanted: &str) -> Result<RecordId, RecordsError> {
        let (id, row) = self.store().read(|rows| plies_cache::find(rows, wanted))?;
        let Tree::Mutable(active) = row.tree else { return Err(RecordError::NotMutable { id }.into()) };
        self.with_lease("ref commit", |lease| self.commit_held(id, active, lease))?;
        Ok(id)
    }

    fn commit_held(&self, id: RecordId, active: ActiveId, lease: &Lease) -> Result<(), RecordsError> {
        let snapshots = self.store().snapshots();
        let info = snapshots.active(active)?;
        // Sealed, and stopped before the record knew: go on from there.
        let layer = match info.sealed {
            Some(layer) => layer,
            None => {
                self.check_not_mounted(active).map_err(|error| RecordsError::Tree(Box::new(error)))?;
                snapshots.seal(active, lease)?
            }
        };
        let base = info.base;
        let tree = if self.store().layers().is_empty(layer)? {
            base
        } else {
            let mut layers =
                base.map(|base| snapshots.info(base)).transpose()?.map_or_else(Vec::new, |info| info.layers);
            layers.push(layer);
            Some(snapshots.ensure(&layers, lease)?)
        };
        let tree = tree.map_or(Tree::Scratch, Tree::Immutable);
        self.store().write(|tx| plies_cache::commit(tx, id, tree))?;
        Ok(())
    }

    /// Removes records: all that are named, or none. One that is named twice is removed once.
    ///
    /// # Errors
    /// [`RecordsError`], among them that one is mounted for writing.
    pub fn remove_records(&self, wanted: &[String]) -> Result<Vec<RecordId>, RecordsError> {
        let mut going: Vec<(RecordId, RecordRow)> = Vec::new();
        for one in wanted {
            let found = self.store().read(|rows| plies_cache::find(rows, one))?;
            if !going.iter().any(|(id, _)| *id == found.0) {
                going.push(found);
            }
        }
        // Nobody can mount it between this and its removal: the store is ours alone.
        for (_, row) in &going {
            if let Tree::Mutable(active) = row.tree {
                self.check_not_mounted(active).map_err(|error| RecordsError::Tree(Box::new(error)))?;
            }
        }
        let removed = self.store().write(|tx| {
            let mut removed = Vec::new();
            for (id, _) in &going {
                plies_cache::remove(tx, *id)?;
                removed.push(*id);
            }
            Ok::<_, RecordError>(removed)
        })?;
        Ok(removed)
    }
}
