//! A new catalogue out of what is left of the old one and out of the data.
//!
//! It is made beside the old one and takes its place in one rename; until then nothing else is changed. What is adopted is
//! held by [`rebuild_owner`], so that no collection takes it before those who need it are there again.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::str::FromStr as _;

use plies_oci::BlobDigest;
use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition, TableHandle as _};

use super::CheckOptions;
use super::check::{go_on, hash_file, session_after};
use crate::catalogue::schema::{
    BLOBS, BlobRow, HOLDS, LAYERS, META, META_CLEAN, META_PACKS, META_SCHEMA, META_SESSION, SCHEMA,
};
use crate::catalogue::{Catalogue, CatalogueError, Rows as _, Urgency};
use crate::error::{At as _, FileError};
use crate::layers::Sidecar;
use crate::lock::{StoreLock, WaitPolicy};
use crate::open::{Paths, create_private, make_dir, sync_dir};
use crate::progress::{Outcome, Task};
use crate::recover::entries;
use crate::{ActiveId, LayerId, OpenError, OpenOptions, Owner, Resource, Stamp, packed};

/// Rows that one transaction copies.
const COPIED_AT_ONCE: usize = 10_000;

/// Tables of the store that follow from others, and are made again by the repair that follows.
const DERIVED: [&str; 6] = ["refs", "loose", "totals", "layers_by_diff", "layers_by_chain", "squashes"];

/// What a rebuild found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rebuilt {
    /// Rows that could still be read.
    pub salvaged_count: u64,
    /// Layers that only their directories knew of.
    pub layers_count: u64,
    /// Blobs that only their files knew of.
    pub blobs_count: u64,
}

/// Who holds what was adopted until the rebuild is done.
pub fn rebuild_owner() -> Owner {
    Owner::new("fsck", "rebuild")
}

pub(crate) fn rebuild(
    root: &Path,
    options: &OpenOptions,
    check: &CheckOptions<'_>,
    wait: WaitPolicy<'_>,
    name: &str,
) -> Result<Rebuilt, OpenError> {
    let root = std::path::absolute(root).at("resolve", root)?;
    let paths = Paths::below(&root);
    if !paths.catalog.try_exists().at("stat", &paths.catalog)?
        && !paths.layers.try_exists().at("stat", &paths.layers)?
    {
        return Err(OpenError::Missing { root });
    }
    make_dir(&paths.catalog)?;
    let _lock = StoreLock::take(&paths.catalog.join("lock"), &options.command, wait)?;
    paths.create()?;
    let (old, new, copy) =
        (paths.database(), paths.catalog.join("plies.redb.new"), paths.catalog.join("plies.redb.copy"));
    for stale in [&new, &copy] {
        remove_if_there(stale)?;
    }
    let failed = |error: redb::Error| CatalogueError::database("rebuild")(error);
    create_private(&new).at("create", &new)?;
    let database = Catalogue::builder(options.cache_bytes).create(&new).map_err(|error| failed(error.into()))?;
    let mut rebuilt = Rebuilt::default();
    let had_catalogue = old.try_exists().at("stat", &old)?;
    if had_catalogue {
        // A copy, since to open a database is to change it.
        fs::copy(&old, &copy).at("copy", &old)?;
        rebuilt.salvaged_count = salvage(&copy, &database, options.cache_bytes).map_err(failed)?;
        remove_if_there(&copy)?;
    }
    let catalogue = Catalogue::new(database, &new).map_err(|error| failed(error.into()))?;
    let schema = catalogue.read(|tx| tx.get(&META, &META_SCHEMA.to_owned())).ok().flatten();
    if let Some(found) = schema
        && found > SCHEMA
    {
        return Err(OpenError::TooNew { found, supported: SCHEMA });
    }
    let now: Stamp = (options.clock)().into();
    let has_packed = adopt_layers(&catalogue, &paths, now, &mut rebuilt)?;
    adopt_blobs(&catalogue, &paths, now, check, &mut rebuilt)?;
    let session = last_session(&paths)?;
    write(&catalogue, now, |tx| {
        let known = tx.get(&META, &META_SESSION.to_owned()).ok().flatten();
        let known = known.filter(|known| (session..u32::MAX.into()).contains(known));
        tx.put(&META, &META_SCHEMA.to_owned(), &SCHEMA)?;
        tx.put(&META, &META_SESSION.to_owned(), &known.unwrap_or_else(|| session_after(session)))?;
        if tx.get(&META, &META_PACKS.to_owned()).ok().flatten().is_none() {
            tx.put(&META, &META_PACKS.to_owned(), &u64::from(has_packed))?;
        }
        // Nothing was on its way that an open should look for: it would remove what was not adopted.
        tx.put(&META, &META_CLEAN.to_owned(), &1)
    })?;
    drop(catalogue);

    let lost = paths.lost.join(name);
    make_dir(&lost)?;
    if had_catalogue {
        let kept = lost.join("plies.redb");
        remove_if_there(&kept)?;
        fs::hard_link(&old, &kept).at("link", &kept)?;
        sync_dir(&lost)?;
    }
    // The point of no return.
    fs::rename(&new, &old).at("rename", &new)?;
    sync_dir(&paths.catalog)?;
    Ok(rebuilt)
}

fn remove_if_there(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", path, error)),
        _ => Ok(()),
    }
}

fn write<T>(
    catalogue: &Catalogue,
    now: Stamp,
    change: impl FnOnce(&mut crate::Tx<'_>) -> Result<T, CatalogueError>,
) -> Result<T, CatalogueError> {
    catalogue.write(Urgency::Durable, &|| now, change)
}

/// Copies whatever rows a damaged database still gives, from both ends of each table. redb may panic over what it reads.
fn salvage(from: &Path, to: &redb::Database, cache_bytes: usize) -> Result<u64, redb::Error> {
    let opened = catch_unwind(AssertUnwindSafe(|| Catalogue::builder(cache_bytes).open(from)));
    let Ok(Ok(database)) = opened else { return Ok(0) };
    let names = catch_unwind(AssertUnwindSafe(|| -> Result<Vec<String>, redb::Error> {
        Ok(database.begin_read()?.list_tables()?.map(|table| table.name().to_owned()).collect())
    }));
    let Ok(Ok(names)) = names else { return Ok(0) };
    let mut count = 0;
    for name in names.iter().filter(|name| !DERIVED.contains(&name.as_str())) {
        let mut last: Option<Vec<u8>> = None;
        let mut rows = Vec::new();
        // A panic in here ends the table, not the salvage.
        drop(catch_unwind(AssertUnwindSafe(|| read_rows(&database, name, false, None, &mut rows))));
        if let Some((key, _)) = rows.last() {
            last = Some(key.clone());
        }
        drop(catch_unwind(AssertUnwindSafe(|| read_rows(&database, name, true, last.as_deref(), &mut rows))));
        count += rows.len() as u64;
        for some in rows.chunks(COPIED_AT_ONCE) {
            let txn = to.begin_write()?;
            {
                let mut table = txn.open_table(TableDefinition::<&[u8], &[u8]>::new(name))?;
                for (key, row) in some {
                    table.insert(key.as_slice(), row.as_slice())?;
                }
            }
            txn.commit()?;
        }
    }
    // Closing what is damaged may panic, too.
    drop(catch_unwind(AssertUnwindSafe(move || drop(database))));
    Ok(count)
}

type RawRow = (Vec<u8>, Vec<u8>);

/// The rows of a table in order, until one cannot be read or is `until`.
fn read_rows(
    database: &redb::Database,
    name: &str,
    backwards: bool,
    until: Option<&[u8]>,
    rows: &mut Vec<RawRow>,
) -> Result<(), redb::Error> {
    let txn = database.begin_read()?;
    let table = txn.open_table(TableDefinition::<&[u8], &[u8]>::new(name))?;
    let mut all = table.iter()?;
    while let Some(entry) = if backwards { all.next_back() } else { all.next() } {
        let (key, row) = entry?;
        if until.is_some_and(|until| key.value() <= until) {
            break;
        }
        rows.push((key.value().to_vec(), row.value().to_vec()));
    }
    Ok(())
}

/// Says whether any layer is kept packed.
fn adopt_layers(catalogue: &Catalogue, paths: &Paths, now: Stamp, rebuilt: &mut Rebuilt) -> Result<bool, OpenError> {
    let mut has_packed = false;
    for dir in entries(&paths.layers)? {
        let name = dir.file_name().and_then(|name| name.to_str());
        let Some(id) = name.and_then(|name| LayerId::from_str(name).ok()) else { continue };
        has_packed |= packed::is_packed(&dir)?;
        let known: Result<_, CatalogueError> = catalogue.read(|tx| tx.get(&LAYERS, &id));
        if matches!(known, Ok(Some(_))) {
            continue;
        }
        let Some(sidecar) = Sidecar::read(&dir)? else { continue };
        if !packed::has_tree(&dir)? || crate::layers::read_index_at(&dir, id).is_err() {
            continue;
        }
        adopt(catalogue, now, id.into(), |tx| tx.put(&LAYERS, &id, &sidecar.row))?;
        rebuilt.layers_count += 1;
    }
    Ok(has_packed)
}

fn adopt_blobs(
    catalogue: &Catalogue,
    paths: &Paths,
    now: Stamp,
    check: &CheckOptions<'_>,
    rebuilt: &mut Rebuilt,
) -> Result<(), OpenError> {
    for path in entries(&paths.blobs)? {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(digest) = name.and_then(|name| BlobDigest::from_hex(name).ok()) else { continue };
        let meta = fs::symlink_metadata(&path).at("stat", &path)?;
        let known: Result<_, CatalogueError> = catalogue.read(|tx| tx.get(&BLOBS, &digest));
        if !meta.is_file() || matches!(known, Ok(Some(row)) if row.size_bytes == meta.len()) {
            continue;
        }
        let task = Task::start(check.progress, &format!("read blob {digest}"), Some(meta.len()));
        let actual = hash_file(&path, |bytes| {
            task.advance(bytes as u64);
            go_on(&check.cancel)
        });
        let actual = actual.map_err(|error| OpenError::Rebuild { source: Box::new(error) })?;
        task.end(Outcome::Done);
        if actual != digest {
            continue;
        }
        let row = BlobRow { size_bytes: meta.len(), created: now };
        adopt(catalogue, now, digest.into(), |tx| tx.put(&BLOBS, &digest, &row))?;
        rebuilt.blobs_count += 1;
    }
    Ok(())
}

/// Puts a row and holds it. The counts are the repair's that follows; what is not counted is not collected.
fn adopt(
    catalogue: &Catalogue,
    now: Stamp,
    resource: Resource,
    put: impl FnOnce(&mut crate::Tx<'_>) -> Result<(), CatalogueError>,
) -> Result<(), CatalogueError> {
    catalogue.write(Urgency::Lazy, &|| now, |tx| {
        put(tx)?;
        tx.put(&HOLDS, &(rebuild_owner(), resource), &())
    })
}

/// The latest session that gave an id to something that is still here.
pub(super) fn last_session(paths: &Paths) -> Result<u64, FileError> {
    let mut last = 0;
    for path in entries(&paths.layers)?.into_iter().chain(entries(&paths.active)?) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if ActiveId::from_str(name).is_ok() {
            last = last.max(u64::from_str_radix(&name[..8], 16).unwrap_or(0));
        }
    }
    Ok(last)
}
