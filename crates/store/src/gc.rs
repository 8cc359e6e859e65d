//! Garbage collection: what no lease and no owner holds, directly or over edges, goes.
//!
//! Marking and the deletion of rows are one write transaction, so nothing can become held in
//! between; readers pass. Bytes go after that commit, from a list kept in the `trash` table, so that
//! a crash in between is completed at the next open. A blob may be published again in the meantime:
//! each is looked up once more while publishers are kept out, and stays if it lives.
//!
//! Cost: one look at every hold, edge and row; some 100 bytes of memory per resource that is held,
//! while it runs.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::sync::PoisonError;

use plies_oci::ErrorKind;

use crate::catalogue::schema::{ACTIVES, BLOBS, EDGES, HOLDS, LAYERS, LEASE_HOLDS, LEASES, SNAPSHOTS, exists};
use crate::catalogue::{CatalogueError, Rows};
use crate::content::blob_path;
use crate::error::FileError;
use crate::layers::layer_dir;
use crate::{IngestError, IngestStatus, LeaseId, Resource, Stamp, Store, tree};

/// Blobs unlinked while publishers are kept out. An unlink takes tens of microseconds.
const UNLINK_BATCH: usize = 64;

/// Whether to do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcMode {
    /// Only say what would go.
    DryRun,
    /// Collect.
    Run,
}

/// Something that went, or would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// What.
    pub resource: Resource,
    /// Its bytes on disk, by the catalogue; 0 for an upper that was never measured.
    pub size_bytes: u64,
}

/// What a collection did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// What nothing held: actives, snapshots, layers, blobs, each sorted by id.
    pub collected: Vec<Collected>,
    /// Leases that had expired.
    pub leases: Vec<LeaseId>,
    /// Ingests that nobody had written to for too long.
    pub ingests: Vec<IngestStatus>,
    /// How many resources stay.
    pub kept_count: u64,
    /// The bytes of all that went.
    pub freed_bytes: u64,
}

/// Why a collection failed. What it did until then is done; running it again goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GcError {
    /// Removing bytes. Their rows are gone; the next open tries again.
    #[error(transparent)]
    File(#[from] FileError),
    /// Rows.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl GcError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// What is held, and which leases no longer hold anything.
struct Marked {
    live: HashSet<Resource>,
    expired: Vec<LeaseId>,
}

fn mark(rows: &impl Rows, now: Stamp) -> Result<Marked, CatalogueError> {
    let mut leases = HashSet::new();
    let mut expired = Vec::new();
    rows.scan(&LEASES, |id, row| {
        if row.expires.is_none_or(|expires| expires > now) {
            leases.insert(id);
        } else {
            expired.push(id);
        }
        ControlFlow::Continue(())
    })?;
    let mut pending = Vec::new();
    rows.scan(&LEASE_HOLDS, |(lease, held), ()| {
        if leases.contains(&lease) {
            pending.push(held);
        }
        ControlFlow::Continue(())
    })?;
    let mut live = HashSet::new();
    let mut trace = |pending: &mut Vec<Resource>| -> Result<(), CatalogueError> {
        while let Some(resource) = pending.pop() {
            if live.insert(resource) {
                rows.scan_prefix(&EDGES, &resource, |(_, to), ()| {
                    pending.push(to);
                    ControlFlow::Continue(())
                })?;
            }
        }
        Ok(())
    };
    trace(&mut pending)?;
    // Permanent holds may be a million: traced as they come, not gathered first.
    let mut failed = None;
    rows.scan(&HOLDS, |(_, held), ()| {
        pending.push(held);
        match trace(&mut pending) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    failed.map_or(Ok(Marked { live, expired }), Err)
}

/// All that has a row and is not live, with its bytes; and how many rows are live.
fn unmarked(rows: &impl Rows, live: &HashSet<Resource>) -> Result<(Vec<Collected>, u64), CatalogueError> {
    let mut found = Vec::new();
    let mut kept = 0;
    let mut judge = |resource: Resource, size_bytes: u64| {
        if live.contains(&resource) {
            kept += 1;
        } else {
            found.push(Collected { resource, size_bytes });
        }
        ControlFlow::Continue(())
    };
    rows.scan(&ACTIVES, |id, row| judge(id.into(), row.total().size_bytes))?;
    rows.scan(&SNAPSHOTS, |id, _| judge(id.into(), 0))?;
    rows.scan(&LAYERS, |id, row| judge(id.into(), row.total().size_bytes))?;
    rows.scan(&BLOBS, |digest, row| judge(digest.into(), row.size_bytes))?;
    Ok((found, kept))
}

fn judge(rows: &impl Rows, now: Stamp) -> Result<GcReport, CatalogueError> {
    let Marked { live, expired } = mark(rows, now)?;
    let (collected, kept_count) = unmarked(rows, &live)?;
    let freed_bytes = collected.iter().map(|collected| collected.size_bytes).sum();
    Ok(GcReport { collected, leases: expired, ingests: Vec::new(), kept_count, freed_bytes })
}

pub(crate) fn collect(store: &Store, mode: GcMode) -> Result<GcReport, GcError> {
    let _one_at_a_time = store.inner.collecting.lock().unwrap_or_else(PoisonError::into_inner);
    let mut report = match mode {
        GcMode::DryRun => store.read(|tx| judge(tx, store.now()))?,
        GcMode::Run => store.write(|tx| {
            let report = judge(tx, tx.now())?;
            report.leases.iter().try_for_each(|lease| tx.drop_lease(*lease))?;
            for collected in &report.collected {
                tx.discard(collected.resource)?;
            }
            Ok::<_, CatalogueError>(report)
        })?,
    };
    if mode == GcMode::Run {
        let bytes: Vec<Resource> = report
            .collected
            .iter()
            .map(|collected| collected.resource)
            .filter(|resource| !matches!(resource, Resource::Snapshot(_)))
            .collect();
        remove_bytes(store, &bytes)?;
    }
    collect_ingests(store, mode, &mut report)?;
    Ok(report)
}

/// Removes the bytes of what lies in the trash, and its trash rows.
pub(crate) fn remove_bytes(store: &Store, trash: &[Resource]) -> Result<(), GcError> {
    let mut first_error = None;
    let mut gone = Vec::with_capacity(trash.len());
    let (blobs, trees): (Vec<&Resource>, Vec<&Resource>) =
        trash.iter().partition(|resource| matches!(resource, Resource::Blob(_)));
    for batch in blobs.chunks(UNLINK_BATCH) {
        // Publishers are out: what has no row now will not get one before its file is gone.
        let _unlinking = store.inner.publishing.write().unwrap_or_else(PoisonError::into_inner);
        store.read(|tx| {
            for resource in batch {
                let Resource::Blob(digest) = **resource else { continue };
                if !exists(tx, **resource)? {
                    let path = blob_path(store, digest);
                    match fs::remove_file(&path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => {
                            first_error.get_or_insert(FileError::new("remove", path, error));
                            continue;
                        }
                        _ => {}
                    }
                }
                gone.push(**resource);
            }
            Ok::<_, CatalogueError>(())
        })?;
    }
    for resource in trees {
        // Ids are never reused, so nobody can have brought these back.
        let path = match resource {
            Resource::Layer(id) => layer_dir(store, *id),
            Resource::Active(id) => store.inner.paths.active.join(id.to_string()),
            Resource::Blob(_) | Resource::Snapshot(_) => continue,
        };
        match tree::remove(&path) {
            Ok(()) => gone.push(*resource),
            Err(error) => drop(first_error.get_or_insert(error)),
        }
    }
    // What may be lost: trash rows come back, and are found to be done.
    store.write_lazily(|tx| gone.iter().try_for_each(|resource| tx.empty_trash(*resource)))?;
    first_error.map_or(Ok(()), |error| Err(error.into()))
}

fn collect_ingests(store: &Store, mode: GcMode, report: &mut GcReport) -> Result<(), GcError> {
    let content = store.content();
    let kept = |error: IngestError| match error {
        // Somebody is writing to it: not abandoned after all.
        IngestError::Busy { .. } => Ok(false),
        IngestError::File(error) => Err(GcError::File(error)),
        IngestError::Catalogue(error) => Err(GcError::Catalogue(error)),
    };
    let all = content.ingests()?;
    let old = |status: &IngestStatus| store.now().since(status.updated) > store.inner.options.ingest_max_age;
    for status in all.into_iter().filter(old) {
        let collected = match mode {
            GcMode::DryRun => !content.is_open(&status.ingest),
            GcMode::Run => content.abort(&status.ingest).or_else(kept)?,
        };
        if collected {
            report.freed_bytes += status.offset_bytes;
            report.ingests.push(status);
        }
    }
    Ok(())
}
