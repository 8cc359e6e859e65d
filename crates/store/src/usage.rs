//! Disk usage: sums that are kept as rows come and go, never a walk of what is stored.
//!
//! The kinds add up to what the file system says of the root, but for the last block of each blob, which is counted by
//! its length. What has no rows is looked at: the store's own directories, ingests, and scratch, all of which are few;
//! and for what should not be there the names in the directories are compared with the rows.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use plies_archive::Usage;
use plies_oci::{DiffId, ErrorKind};

use crate::catalogue::schema::{ACTIVES, BLOBS, Kind, LAYERS, TOTALS, TRASH};
use crate::catalogue::{CatalogueError, Rows};
use crate::error::{At as _, FileError};
use crate::recover::{entries, unlisted};
use crate::reserve::RESERVE;
use crate::tree::STAT_BLOCK_BYTES;
use crate::{Resource, Store, tree};

/// A kind of thing that takes space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsageKind {
    /// Published blobs.
    Blobs,
    /// Trees of published layers.
    Layers,
    /// What lies beside the trees of layers: index, sidecar, tar-split, and the directory that they are in.
    Sidecars,
    /// Upper directories, as last measured.
    Actives,
    /// Writes not yet visible.
    Ingests,
    /// What was collected but could not be unlinked yet.
    Trash,
    /// The database file.
    Catalogue,
    /// Room that is kept to make room.
    Reserve,
    /// The store's own directories and small files, those of uppers and ingests included.
    Directories,
    /// What running work has not finished: stages, mount points, scratch.
    Scratch,
    /// What lies below the root and is nobody's.
    Orphans,
    /// What a repair put aside.
    Lost,
}

/// What all things of one kind cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsageRow {
    /// Of which kind.
    pub kind: UsageKind,
    /// How many there are.
    pub count: u64,
    /// Their bytes.
    pub size_bytes: u64,
    /// Their inodes.
    pub inodes: u64,
}

/// Why usage could not be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// The ingests, or the database file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The sums.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl UsageError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// What one blob, layer or upper costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeRow {
    /// Which.
    pub resource: Resource,
    /// Its bytes; those of an upper as last measured.
    pub size_bytes: u64,
    /// Of a layer: the digest of its tar, if that is known.
    pub diff_id: Option<DiffId>,
}

/// Calls `visit` for every blob, then for every layer, then for every upper that was not sealed, each in the order of
/// their IDs. Rows that are damaged are left out, and hide no other.
///
/// # Errors
/// [`CatalogueError`].
pub fn scan_sizes(rows: &impl Rows, mut visit: impl FnMut(SizeRow)) -> Result<(), CatalogueError> {
    rows.scan_each(&BLOBS, |id, row| {
        if let (Some(id), Ok(row)) = (id, row) {
            visit(SizeRow { resource: id.into(), size_bytes: row.size_bytes, diff_id: None });
        }
        ControlFlow::Continue(())
    })?;
    rows.scan_each(&LAYERS, |id, row| {
        if let (Some(id), Ok(row)) = (id, row) {
            visit(SizeRow { resource: id.into(), size_bytes: row.usage.size_bytes, diff_id: row.diff_id });
        }
        ControlFlow::Continue(())
    })?;
    rows.scan_each(&ACTIVES, |id, row| {
        if let (Some(id), Ok(row)) = (id, row)
            && row.sealed.is_none()
        {
            visit(SizeRow { resource: id.into(), size_bytes: row.total().size_bytes, diff_id: None });
        }
        ControlFlow::Continue(())
    })
}

pub(crate) fn usage(store: &Store) -> Result<Vec<UsageRow>, UsageError> {
    let mut rows = store.read(|tx| {
        let row = |kind, counted| {
            let total = tx.get(&TOTALS, &counted)?.unwrap_or_default();
            Ok::<_, CatalogueError>(UsageRow {
                kind,
                count: total.count,
                size_bytes: total.size_bytes,
                inodes: total.inodes,
            })
        };
        Ok::<_, CatalogueError>(vec![
            row(UsageKind::Blobs, Kind::Blobs)?,
            row(UsageKind::Layers, Kind::Layers)?,
            row(UsageKind::Sidecars, Kind::Sidecars)?,
            row(UsageKind::Actives, Kind::Actives)?,
            row(UsageKind::Trash, Kind::Trash)?,
        ])
    })?;
    // Ingests have no rows: there are few, and each changes with every write to it.
    let ingests = store.content().ingests()?;
    rows.push(UsageRow {
        kind: UsageKind::Ingests,
        count: ingests.len() as u64,
        size_bytes: ingests.iter().map(|ingest| ingest.offset_bytes).sum(),
        // What goes with each is among the directories.
        inodes: ingests.len() as u64,
    });
    let paths = &store.inner.paths;
    let mut add = |kind, found: Vec<Usage>| {
        rows.push(UsageRow {
            kind,
            count: found.len() as u64,
            size_bytes: found.iter().map(|one| one.size_bytes).sum(),
            inodes: found.iter().map(|one| one.inodes).sum(),
        });
    };
    add(UsageKind::Catalogue, vec![own_size(&paths.database())?]);
    add(UsageKind::Reserve, vec![own_size(&paths.catalog.join(RESERVE))?]);
    let directories = own_paths(store)?.iter().map(|path| own_size(path)).collect::<Result<_, _>>()?;
    add(UsageKind::Directories, directories);
    let scratch = [&paths.stage, &paths.mounts, &paths.run].map(|dir| tree_size(dir));
    add(UsageKind::Scratch, scratch.into_iter().collect::<Result<_, _>>()?);
    add(UsageKind::Lost, if paths.lost.is_dir() { vec![tree_size(&paths.lost)?] } else { vec![] });
    add(UsageKind::Orphans, orphans(store)?.into_iter().map(|(_, usage)| usage).collect());
    rows.sort_unstable_by_key(|row| row.kind);
    Ok(rows)
}

/// The directories and small files that a store is made of, without what is in the others.
fn own_paths(store: &Store) -> Result<Vec<PathBuf>, UsageError> {
    let (root, paths) = (&store.inner.root, &store.inner.paths);
    let mut own = vec![root.clone(), root.join("content/blobs")];
    own.extend(
        [&paths.catalog, &paths.content, &paths.blobs, &paths.ingest, &paths.layers, &paths.active].map(Clone::clone),
    );
    own.extend([paths.catalog.join("lock"), paths.content.join("oci-layout")]);
    for ingest in entries(&paths.ingest)? {
        own.extend([ingest.join("ref"), ingest]);
    }
    store.read(|tx| {
        tx.scan_each(&ACTIVES, |id, _| {
            let Some(dir) = id.map(|id| paths.active.join(id.to_string())) else { return ControlFlow::Continue(()) };
            // overlayfs makes the inner one.
            own.extend([dir.join("work"), dir.join("work/work"), dir.join("prepared"), dir]);
            ControlFlow::Continue(())
        })
    })?;
    Ok(own)
}

/// What is below the root and belongs to no row and to no part of the store, with what it costs. Reads the names in the
/// directories of blobs, layers and uppers; asks the catalogue about them only if there are more than it has rows.
///
/// # Errors
/// [`UsageError`].
pub(crate) fn orphans(store: &Store) -> Result<Vec<(PathBuf, Usage)>, UsageError> {
    let (root, paths) = (&store.inner.root, &store.inner.paths);
    let mut found = Vec::new();
    let mut strangers = |dir: &Path, known: &[&str]| -> Result<(), UsageError> {
        let is_known = |path: &Path| known.iter().any(|known| path.file_name() == Some(OsStr::new(known)));
        found.extend(entries(dir)?.into_iter().filter(|path| !is_known(path)));
        Ok(())
    };
    strangers(root, &["catalog", "content", "layers", "active", "mounts", "run", "lost"])?;
    strangers(&paths.catalog, &["lock", "plies.redb", RESERVE])?;
    strangers(&paths.content, &["oci-layout", "blobs", "ingest"])?;
    strangers(&root.join("content/blobs"), &["sha256"])?;
    let (counts, trash) = store.read(|tx| {
        let counts = [tx.rows_count(&BLOBS)?, tx.rows_count(&LAYERS)?, tx.rows_count(&ACTIVES)?];
        Ok::<_, CatalogueError>((counts, tx.rows_count(&TRASH)?))
    })?;
    // Of an upper that was sealed there is a row and no directory.
    let dirs = [(&paths.blobs, counts[0]), (&paths.layers, counts[1] + 1), (&paths.active, 0)];
    for (dir, expected) in dirs {
        let names_count = fs::read_dir(dir).at("read directory", dir)?.count() as u64;
        if names_count != expected || trash > 0 {
            found.extend(unlisted::<UsageError>(store, dir)?);
        }
    }
    found.into_iter().map(|path| tree_size(&path).map(|usage| (path, usage))).collect()
}

/// What one file or directory costs by itself; nothing if it is gone.
fn own_size(path: &Path) -> Result<Usage, FileError> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Usage { size_bytes: meta.blocks() * STAT_BLOCK_BYTES, inodes: 1, content_bytes: 0 }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Usage::default()),
        Err(error) => Err(FileError::new("stat", path, error)),
    }
}

/// What is at `path` costs with all that is in it; nothing if it goes meanwhile.
fn tree_size(path: &Path) -> Result<Usage, UsageError> {
    if !fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Ok(own_size(path)?);
    }
    match tree::open_own(path).map_err(|error| error.source).and_then(tree::measure) {
        Ok(usage) => Ok(usage),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(own_size(path)?),
        Err(error) => Err(FileError::new("measure", path, error).into()),
    }
}
