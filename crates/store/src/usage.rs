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

use crate::catalogue::schema::{ACTIVES, BLOBS, Kind, LAYERS, LayerRow, TOTALS, TRASH};
use crate::catalogue::{CatalogueError, Rows};
use crate::error::{At as _, FileError};
use crate::layers::beside_of;
use crate::migrate::kept_catalogues;
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
    /// The database file, and those of older schemas that are kept beside it.
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

pub(crate) fn stored_bytes(store: &Store) -> Result<u64, CatalogueError> {
    store.read(|tx| {
        let totals = [Kind::Blobs, Kind::Layers, Kind::Actives].map(|kind| tx.get(&TOTALS, &kind));
        totals.into_iter().map(|total| Ok(total?.unwrap_or_default().size_bytes)).sum()
    })
}

/// Layers whose sidecars are counted in one transaction.
const COUNTED_AT_ONCE: usize = 256;

/// Counts what lies beside the layers of version 1, whose rows do not say: four looks a layer, once. One that is damaged
/// is left to the check.
fn count_sidecars(store: &Store) -> Result<(), UsageError> {
    let uncounted = store.read(|tx| {
        let mut uncounted = Vec::new();
        let counted = tx.get(&TOTALS, &Kind::Sidecars)?.unwrap_or_default().count;
        if counted != tx.rows_count(&LAYERS)? {
            tx.scan_each(&LAYERS, |id, row| {
                uncounted.extend(id.zip(row.ok()).filter(|(_, row)| row.beside.inodes == 0));
                ControlFlow::Continue(())
            })?;
        }
        Ok::<_, CatalogueError>(uncounted)
    })?;
    for some in uncounted.chunks(COUNTED_AT_ONCE) {
        let counted: Vec<_> =
            some.iter().filter_map(|(id, row)| Some((*id, beside_of(store, *id, row).ok()?))).collect();
        store.write_lazily(|tx| {
            counted.iter().try_for_each(|(id, beside)| match tx.get(&LAYERS, id)? {
                Some(row) => tx.put_layer(*id, &LayerRow { beside: *beside, ..row }),
                None => Ok(()),
            })
        })?;
    }
    Ok(())
}

pub(crate) fn usage(store: &Store) -> Result<Vec<UsageRow>, UsageError> {
    count_sidecars(store)?;
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
    let catalogues = [vec![paths.database()], kept_catalogues(paths)?].concat();
    add(UsageKind::Catalogue, catalogues.iter().map(|path| own_size(path)).collect::<Result<_, _>>()?);
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
    let kept = kept_catalogues(paths)?;
    strangers(&paths.content, &["oci-layout", "blobs", "ingest"])?;
    strangers(&root.join("content/blobs"), &["sha256"])?;
    found.retain(|path| !kept.contains(path));
    let (counts, trash) = store.read(|tx| {
        let counts = [tx.rows_count(&BLOBS)?, tx.rows_count(&LAYERS)?, tx.rows_count(&ACTIVES)?];
        Ok::<_, CatalogueError>((counts, tx.rows_count(&TRASH)?))
    })?;
    // Of an upper that was sealed there is a row and no directory.
    let dirs = [(&paths.blobs, counts[0]), (&paths.layers, counts[1] + 1), (&paths.active, 0)];
    for (dir, expected) in dirs {
        if tree::names_count(dir).at("read directory", dir)? != expected || trash > 0 {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::catalogue::schema::StoredUsage;
    use crate::{LayerContents, LeaseOptions, OpenOptions, WaitPolicy};

    #[test]
    fn what_lies_beside_layers_of_version_1_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let options = OpenOptions::new(Arc::new(|| UNIX_EPOCH));
        let store = Store::open(&dir.path().join("store"), options, WaitPolicy::Fail).unwrap();
        let lease = store.lease(LeaseOptions::process("test")).unwrap();
        let publish = || {
            let stage = store.layers().stage().unwrap();
            fs::write(stage.tree().join("f"), "f").unwrap();
            let usage = Usage { size_bytes: 8192, inodes: 2, content_bytes: 1 };
            let finished = stage.finish(LayerContents { usage, ..LayerContents::default() });
            store.layers().publish(&lease, vec![finished]).unwrap()[0]
        };
        let layers = [publish(), publish(), publish()];
        let sidecars = || {
            let rows = store.usage().unwrap();
            let row = rows.into_iter().find(|row| row.kind == UsageKind::Sidecars).unwrap();
            (row.count, row.size_bytes, row.inodes)
        };
        let before = sidecars();
        assert!(before.0 == 3 && before.1 > 0, "{before:?}");
        let as_version_1 = |id| {
            store.write_lazily(|tx| {
                let row = tx.get(&LAYERS, &id)?.unwrap();
                tx.put_layer(id, &LayerRow { beside: StoredUsage::default(), ..row })
            })
        };
        as_version_1(layers[0]).unwrap();
        as_version_1(layers[1]).unwrap();
        assert_eq!(sidecars(), before);
        assert_eq!(sidecars(), before, "it is counted already");
        let found = store.check(&crate::CheckOptions::deep()).unwrap().found;
        assert!(found.is_empty(), "{found:?}");
        // Of one that is damaged nothing is known, and the others are counted.
        as_version_1(layers[0]).unwrap();
        as_version_1(layers[1]).unwrap();
        fs::remove_dir_all(store.inner.paths.layers.join(layers[0].to_string())).unwrap();
        assert_eq!(sidecars().0, 2);
    }
}
