//! What is put right when a store is opened, before anybody sees it.
//!
//! Always, and at no cost if there is nothing to do: leases of processes that are gone, their
//! mounts and stages, persistent uppers that were being sealed, a layer that was being kept in another form, bytes whose rows
//! were deleted. After
//! an unclean stop (a marker says so), also: bytes that never got a row, found by reading the
//! directories once. Every step can be interrupted and done again. A row that cannot be read is nobody's here: a store must
//! open for a check to find it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use plies_oci::BlobDigest;

use crate::catalogue::schema::{
    ACTIVES, ActiveRow, LAYERS, LEASES, LayerRow, META, META_CLEAN, META_REPACKING, SEALING, TRASH, exists,
};
use crate::catalogue::{CatalogueError, Rows as _};
use crate::error::{At as _, FileError};
use crate::gc::{self, GcError};
use crate::layers::{Sidecar, beside_of, layer_dir};
use crate::open::{Paths, make_dir, sync_dir, unless_damaged};
use crate::refs::count_of;
use crate::snapshots::detach;
use crate::{ActiveId, LayerId, LeaseId, Resource, Store, tree};

/// What can go wrong while putting things right.
#[derive(Debug)]
pub(crate) enum RecoverError {
    File(FileError),
    Catalogue(CatalogueError),
}

impl From<FileError> for RecoverError {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

impl From<CatalogueError> for RecoverError {
    fn from(error: CatalogueError) -> Self {
        Self::Catalogue(error)
    }
}

impl From<GcError> for RecoverError {
    fn from(error: GcError) -> Self {
        match error {
            GcError::File(error) => Self::File(error),
            GcError::Catalogue(error) => Self::Catalogue(error),
        }
    }
}

pub(crate) fn at_open(store: &Store) -> Result<(), RecoverError> {
    let paths = &store.inner.paths;
    unmount_stale(&paths.mounts)?;
    for id in store.read(|tx| tx.readable(&SEALING))?.into_iter().map(|(id, _)| id) {
        unseal(store, id)?;
    }
    settle(store)?;
    for scratch in [&paths.stage, &paths.run, &paths.mounts] {
        // A new store has them; somebody may have tidied up an old one.
        make_dir(scratch)?;
        for entry in entries(scratch)? {
            tree::remove(&entry)?;
        }
    }
    drop_process_leases(store)?;
    let clean = unless_damaged(store.read(|tx| tx.get(&META, &META_CLEAN.to_owned())))? == Some(1);
    if !clean {
        remove_stale_uppers(store)?;
        remove_unlisted(store)?;
        // What only leases of the dead process held goes too: nobody should have to ask for that.
        gc::collect_some(store)?;
        // What was found is gone, for good: a clean session may begin.
        [&paths.blobs, &paths.layers, &paths.active].into_iter().try_for_each(|dir| sync_dir(dir))?;
        store.write(|tx| tx.put(&META, &META_CLEAN.to_owned(), &1).map(drop))?;
    }
    let trash: Vec<Resource> =
        store.read(|tx| tx.readable(&TRASH))?.into_iter().map(|(resource, _)| resource).collect();
    if !trash.is_empty() {
        gc::remove_bytes(store, &trash)?;
    }
    Ok(())
}

pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>, FileError> {
    let read = fs::read_dir(dir).at("read directory", dir)?;
    read.map(|entry| Ok(entry.at("read directory", dir)?.path())).collect()
}

/// Ends the mounts that a process left below `mounts/`. Its detached ones ended with it.
fn unmount_stale(mounts: &Path) -> Result<(), FileError> {
    let table = Path::new("/proc/self/mountinfo");
    if entries(mounts).map(|entries| entries.is_empty()).unwrap_or(true) {
        return Ok(());
    }
    let text = match fs::read(table) {
        Ok(text) => text,
        // Without /proc there is nothing to learn; a mount that is left shows as a busy directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(FileError::new("read", table, error)),
    };
    let below = fs::canonicalize(mounts).at("resolve", mounts)?;
    let stale: Vec<PathBuf> = mount_points(&text).filter(|path| path.starts_with(&below) && *path != below).collect();
    // Later mounts may lie on earlier ones.
    stale.iter().rev().try_for_each(|path| detach(path))
}

/// The fifth field of every line, unescaped (proc_pid_mountinfo(5)).
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> + '_ {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let field = line.split(|byte| *byte == b' ').nth(4)?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
    })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let octal = (*byte == b'\\').then(|| after.first_chunk::<3>()).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match value {
            Some(value) => {
                out.push(value);
                rest = &after[3..];
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    out
}

/// Leases without expiry belong to the process that owns the store, and that is us now.
fn drop_process_leases(store: &Store) -> Result<(), CatalogueError> {
    let leases = store.read(|tx| tx.readable(&LEASES))?;
    let dead: Vec<LeaseId> = leases.into_iter().filter(|(_, row)| row.expires.is_none()).map(|(id, _)| id).collect();
    if dead.is_empty() {
        return Ok(());
    }
    store.write(|tx| dead.iter().try_for_each(|id| tx.drop_lease(*id)))
}

/// Puts a persistent upper back where it was before somebody began to seal it.
pub(crate) fn unseal(store: &Store, id: ActiveId) -> Result<(), RecoverError> {
    let layer: Option<LayerId> = store.read(|tx| tx.get(&SEALING, &id))?;
    layer.map_or(Ok(()), |layer| put_back(store, id, layer))
}

/// As [`unseal`], for an upper that was to become this layer.
pub(crate) fn put_back(store: &Store, id: ActiveId, layer: LayerId) -> Result<(), RecoverError> {
    let paths = &store.inner.paths;
    let active = paths.active.join(id.to_string());
    let published = store.read(|tx| tx.contains(&LAYERS, &layer))?;
    if !published && !active.join("fs").try_exists().at("stat", &active)? {
        for dir in [paths.stage.join(layer.to_string()), paths.layers.join(layer.to_string())] {
            let from = dir.join("fs");
            if from.try_exists().at("stat", &from)? {
                make_dir(&active)?;
                fs::rename(&from, active.join("fs")).at("rename", &from)?;
                sync_dir(&active)?;
                sync_dir(&paths.active)?;
            }
        }
    }
    if !published {
        tree::remove(&paths.stage.join(layer.to_string()))?;
        tree::remove(&paths.layers.join(layer.to_string()))?;
    }
    Ok(store.write(|tx| tx.remove(&SEALING, &id).map(drop))?)
}

/// Has the row of the layer whose directory was being exchanged say what the directory is, the old one or the new one.
/// Nothing to do if there is none. Whoever exchanges the directories does this afterwards, also if that failed, and whoever
/// opens the store does it for those who were killed.
pub(crate) fn settle(store: &Store) -> Result<(), RecoverError> {
    let marker = store.read(|tx| tx.get(&META, &META_REPACKING.to_owned()));
    let Some(number) = unless_damaged(marker)? else { return Ok(()) };
    let id = LayerId::from_bytes(number.to_be_bytes());
    // What is seen may be in memory only.
    sync_dir(&store.inner.paths.layers)?;
    let row: Option<LayerRow> = store.read(|tx| tx.get(&LAYERS, &id))?;
    let settled = match (row, Sidecar::read(&layer_dir(store, id))?) {
        (Some(row), Some(sidecar)) => {
            let row = LayerRow { diff_id: row.diff_id, ..sidecar.row };
            match beside_of(store, id, &row) {
                Ok(beside) => Some(LayerRow { beside, ..row }),
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error.into()),
            }
        }
        // What is damaged is for a check to find.
        _ => None,
    };
    Ok(store.write(|tx| {
        tx.remove(&META, &META_REPACKING.to_owned())?;
        settled.iter().try_for_each(|row| tx.replace_layer(id, row))
    })?)
}

/// Volatile uppers of earlier sessions: nothing says that their files are whole. Their rows go when
/// nothing holds them, and are refused until then. The others may have been written to by whoever was killed.
fn remove_stale_uppers(store: &Store) -> Result<(), RecoverError> {
    let actives: Vec<(ActiveId, ActiveRow)> = store.read(|tx| tx.readable(&ACTIVES))?;
    let (stale, kept): (Vec<_>, Vec<_>) = actives.into_iter().partition(|(_, row)| row.volatile);
    for (id, _) in &stale {
        tree::remove(&store.inner.paths.active.join(id.to_string()))?;
    }
    if stale.iter().any(|(_, row)| row.usage.is_some()) {
        store.write(|tx| {
            stale.iter().try_for_each(|(id, row)| tx.put_active(*id, &ActiveRow { usage: None, ..row.clone() }))
        })?;
    }
    if kept.iter().any(|(_, row)| !row.changed) {
        store.write(|tx| kept.iter().try_for_each(|(id, _)| tx.mark_changed(*id)))?;
    }
    Ok(())
}

/// Bytes that no row names: what was between its rename and its commit.
fn remove_unlisted(store: &Store) -> Result<(), RecoverError> {
    let paths = &store.inner.paths;
    for dir in [&paths.blobs, &paths.layers, &paths.active] {
        for path in unlisted::<RecoverError>(store, dir)? {
            // What somebody counts on has lost its row, and no crash does that: a repair gives it back.
            let counted = match path.file_name().and_then(|name| name.to_str()).and_then(|name| named(paths, dir, name))
            {
                Some(resource) => store.read(|tx| count_of(tx, resource))? > 0,
                None => false,
            };
            if !counted {
                tree::remove(&path)?;
            }
        }
    }
    Ok(())
}

/// What a name in one of the directories of blobs, layers and uppers stands for.
fn named(paths: &Paths, dir: &Path, name: &str) -> Option<Resource> {
    if *dir == paths.blobs {
        BlobDigest::from_hex(name).ok().map(Into::into)
    } else if *dir == paths.layers {
        LayerId::from_str(name).ok().map(Into::into)
    } else {
        ActiveId::from_str(name).ok().map(Into::into)
    }
}

/// The entries of one of the directories of blobs, layers and uppers that no row names. What is in the trash counts as
/// listed here; its turn comes.
pub(crate) fn unlisted<E: From<FileError> + From<CatalogueError>>(
    store: &Store,
    dir: &Path,
) -> Result<Vec<PathBuf>, E> {
    let paths = &store.inner.paths;
    let resource = |name: &str| named(paths, dir, name);
    // One by one: there may be a million.
    let entries = fs::read_dir(dir).at("read directory", dir)?;
    store.read(|tx| {
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.at("read directory", dir)?.path();
            let listed = match path.file_name().and_then(|name| name.to_str()).and_then(resource) {
                Some(resource) => exists(tx, resource)? || tx.contains(&TRASH, &resource)?,
                None => path == paths.stage,
            };
            if !listed {
                found.push(path);
            }
        }
        Ok(found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let table = b"36 35 98:0 / /mnt/a\\040b rw - ext4 /dev/x rw\n37 35 0:1 / /c\\134 rw - overlay o rw\n";
        let found: Vec<PathBuf> = mount_points(table).collect();
        assert_eq!(found, [Path::new("/mnt/a b"), Path::new("/c\\")]);
        assert_eq!(unescape(b"\\04"), b"\\04");
    }
}
