//! Garbage collection: what no lease and no owner holds, directly or over edges, goes.
//!
//! A collection looks at what changed, not at the store: [`crate::refs`] lists the resources that no
//! row holds any longer. Each that is taken drops its edges, and what those led to may be listed
//! next. Expired leases are ended first; leases are few.
//!
//! It works in small steps, each a short write transaction of its own, so that writers never wait
//! for a collection, only for a step ([`STEP_CHANGES`]); readers pass anyway. Within a step nothing can
//! become held that the step takes: to hold something means to count it, in a transaction. Steps are
//! lazy, and every [`SYNC_STEPS`] of them one durable write makes their deletions safe; only then the
//! bytes go, from a list kept in the `trash` table, so that a crash in between is completed at the next
//! open. A blob may be published again in the meantime: each is looked up once more while publishers
//! are kept out, and stays if it lives.
//!
//! What is remembered of a blob or a layer (`transfer/known.rs`) goes in the transaction that takes its row. What earlier
//! versions left of it goes when a count tells that there is more of it than there can be.
//!
//! [`GcMode::Full`] trusts no count: it counts again and traces everything from the roots, in one
//! transaction. Cost: one look at every hold, edge and row; some 150 bytes of memory per resource
//! that is held, while it runs.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::PoisonError;

use plies_oci::ErrorKind;

use crate::catalogue::schema::{
    ACTIVES, BLOBS, EDGES, HOLDS, LAYERS, LEASE_HOLDS, LEASES, LOOSE, LeaseRow, SNAPSHOTS, exists,
};
use crate::catalogue::{CatalogueError, Rows, Tx};
use crate::content::blob_path;
use crate::error::FileError;
use crate::layers::layer_dir;
use crate::open::sync_dir;
use crate::refs::count_of;
use crate::transfer::threads;
use crate::{IngestError, IngestStatus, LeaseId, Resource, Stamp, Store, parallel, transfer, tree};

/// Rows that one step takes, with their edges: what a writer may have to wait for. Measured over a
/// million rows: less than 2 ms. The last resource of a step may have more edges than are left of this.
const STEP_CHANGES: usize = 128;

/// Steps between two durable writes. All their pages are synced together, during which writers wait:
/// 3 MiB if nothing lies near to anything else. Also bounds the bytes that a crash leaves to the next
/// open, and the pages that lazy commits keep the database from using again.
const SYNC_STEPS: usize = 4;

/// Rounds of [`SYNC_STEPS`] that an open makes after an unclean stop: some thousand rows, 0.1 s.
const ROUNDS_AT_OPEN: u64 = 4;

/// Blobs unlinked while publishers are kept out. An unlink takes tens of microseconds, of a large blob that is in the page cache a millisecond.
const UNLINK_BATCH: usize = 64;
/// Threads that remove files and trees: beyond that they wait for the journal.
const REMOVERS_MAX: usize = 4;

/// Whether to do it, and how thoroughly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcMode {
    /// Only say what a run would take.
    DryRun,
    /// Collect. Costs as much as there is to collect; writers hardly wait.
    Run,
    /// Count again what holds each resource, put right what was counted wrong, and collect what no
    /// path leads to. Costs a look at every row, and writers wait until it has looked: a matter of
    /// seconds for a million rows. For a store that [`Store::check`] complains of.
    Full,
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
    /// Rows by which a full collection put counts right; 0 for a healthy store and for the others.
    pub repaired_count: u64,
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
    let mut follow = |pending: &mut Vec<Resource>| -> Result<(), CatalogueError> {
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
    follow(&mut pending)?;
    // Permanent holds may be a million: traced as they come, not gathered first.
    let mut failed = None;
    rows.scan(&HOLDS, |(_, held), ()| {
        pending.push(held);
        match follow(&mut pending) {
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
    rows.scan(&LAYERS, |id, row| judge(id.into(), row.removal_bytes()))?;
    rows.scan(&BLOBS, |digest, row| judge(digest.into(), row.size_bytes))?;
    Ok((found, kept))
}

/// What a collection of now would take, by following everything that holds something.
fn trace(rows: &impl Rows, now: Stamp) -> Result<GcReport, CatalogueError> {
    let Marked { live, expired } = mark(rows, now)?;
    let (collected, kept_count) = unmarked(rows, &live)?;
    Ok(GcReport { collected, leases: expired, kept_count, ..GcReport::default() })
}

/// What a collection of now would take, by the counts: nothing is written, so the counts that would
/// fall are kept in memory.
fn foresee(rows: &impl Rows, now: Stamp) -> Result<GcReport, CatalogueError> {
    let mut report = GcReport::default();
    let mut counts: HashMap<Resource, u64> = HashMap::new();
    let mut loose = Vec::new();
    rows.scan(&LOOSE, |resource, ()| {
        loose.push(resource);
        ControlFlow::Continue(())
    })?;
    report.leases = expired(rows, now)?;
    let mut dropped = Vec::new();
    for lease in &report.leases {
        dropped.extend(rows.prefixed(&LEASE_HOLDS, lease)?.into_iter().map(|((_, held), ())| held));
    }
    loop {
        for held in dropped.drain(..) {
            let count = match counts.entry(held) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(count_of(rows, held)?),
            };
            // As in a step, here and below: what does not add up stays.
            if *count > 0 {
                *count -= 1;
                if *count == 0 {
                    loose.push(held);
                }
            }
        }
        let Some(resource) = loose.pop() else { break };
        let held = match counts.get(&resource) {
            Some(count) => *count,
            None => count_of(rows, resource)?,
        };
        let Some(size_bytes) = size_of(rows, resource)?.filter(|_| held == 0) else { continue };
        report.collected.push(Collected { resource, size_bytes });
        dropped.extend(rows.prefixed(&EDGES, &resource)?.into_iter().map(|((_, to), ())| to));
    }
    report.kept_count = resources_count(rows)?.saturating_sub(report.collected.len() as u64);
    Ok(report)
}

fn expired(rows: &impl Rows, now: Stamp) -> Result<Vec<LeaseId>, CatalogueError> {
    let mut expired = Vec::new();
    rows.scan(&LEASES, |id, row| {
        if row.expires.is_some_and(|expires| expires <= now) {
            expired.push(id);
        }
        ControlFlow::Continue(())
    })?;
    Ok(expired)
}

fn resources_count(rows: &impl Rows) -> Result<u64, CatalogueError> {
    Ok(rows.rows_count(&ACTIVES)?
        + rows.rows_count(&SNAPSHOTS)?
        + rows.rows_count(&LAYERS)?
        + rows.rows_count(&BLOBS)?)
}

/// The bytes of `resource` by its row, if it has one.
fn size_of(rows: &impl Rows, resource: Resource) -> Result<Option<u64>, CatalogueError> {
    Ok(match resource {
        Resource::Blob(digest) => rows.get(&BLOBS, &digest)?.map(|row| row.size_bytes),
        Resource::Layer(id) => rows.get(&LAYERS, &id)?.map(|row| row.removal_bytes()),
        Resource::Active(id) => rows.get(&ACTIVES, &id)?.map(|row| row.total().size_bytes),
        Resource::Snapshot(id) => rows.contains(&SNAPSHOTS, &id)?.then_some(0),
    })
}

/// What one step did.
#[derive(Default)]
struct Step {
    collected: Vec<Collected>,
    leases: Vec<LeaseId>,
    more: bool,
}

/// Ends leases that have expired, as far as one step goes.
fn end_leases(tx: &mut Tx<'_>) -> Result<Step, CatalogueError> {
    let mut step = Step::default();
    let mut left = STEP_CHANGES;
    for lease in expired(tx, tx.now())? {
        if left == 0 {
            step.more = true;
            break;
        }
        let mut held = Vec::new();
        tx.scan_prefix(&LEASE_HOLDS, &lease, |key, ()| {
            held.push(key);
            if held.len() < left { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        for key in &held {
            tx.remove_ref(&LEASE_HOLDS, key, key.1)?;
        }
        left -= held.len();
        if left == 0 {
            // A clock that is turned back must not bring back a lease that has lost half of its holds.
            let row = tx.get(&LEASES, &lease)?.map(|row| LeaseRow { expires: Some(Stamp::default()), ..row });
            if let Some(row) = row {
                tx.put(&LEASES, &lease, &row)?;
            }
            step.more = true;
            break;
        }
        tx.remove(&LEASES, &lease)?;
        step.leases.push(lease);
    }
    Ok(step)
}

/// Takes one resource, with what is remembered of it; the bytes that it frees.
fn take(tx: &mut Tx<'_>, resource: Resource) -> Result<Option<u64>, CatalogueError> {
    transfer::forget(tx, resource)?;
    tx.discard(resource)
}

/// Forgets what is remembered of things that are gone.
fn forget_gone(store: &Store) -> Result<(), CatalogueError> {
    // What may be lost here is found again by the next collection.
    store.write_lazily(transfer::trace_clamped)?;
    let gone: Vec<Resource> = store.read(transfer::gone)?.into_iter().collect();
    for some in gone.chunks(STEP_CHANGES) {
        store.write_lazily(|tx| {
            for resource in some {
                // It may have come back meanwhile.
                if !exists(tx, *resource)? {
                    transfer::forget(tx, *resource)?;
                }
            }
            Ok::<_, CatalogueError>(())
        })?;
    }
    Ok(())
}

/// Takes what is loose, as far as one step goes.
fn take_loose(tx: &mut Tx<'_>) -> Result<Step, CatalogueError> {
    let mut step = Step::default();
    let mut loose = Vec::new();
    tx.scan(&LOOSE, |resource, ()| {
        loose.push(resource);
        if loose.len() < STEP_CHANGES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    let mut changes = 0;
    for resource in loose {
        if changes >= STEP_CHANGES {
            break;
        }
        step.more = true;
        if count_of(tx, resource)? > 0 {
            // It should not have been listed: see `refs`.
            tx.remove(&LOOSE, &resource)?;
            changes += 1;
            continue;
        }
        // Before it goes, since its edges go with it.
        changes += 1 + tx.prefixed(&EDGES, &resource)?.len();
        if let Some(size_bytes) = take(tx, resource)? {
            step.collected.push(Collected { resource, size_bytes });
        }
    }
    Ok(step)
}

pub(crate) fn collect(store: &Store, mode: GcMode) -> Result<GcReport, GcError> {
    let _one_at_a_time = store.inner.collecting.lock().unwrap_or_else(PoisonError::into_inner);
    let mut report = match mode {
        GcMode::DryRun => store.read(|tx| foresee(tx, store.now()))?,
        GcMode::Run => {
            let report = run(store, u64::MAX)?;
            if store.read(transfer::is_outgrown)? {
                forget_gone(store)?;
            }
            report
        }
        GcMode::Full => full(store)?,
    };
    report.collected.sort_unstable_by_key(|collected| match collected.resource {
        Resource::Active(_) => (0, collected.resource),
        Resource::Snapshot(_) => (1, collected.resource),
        Resource::Layer(_) => (2, collected.resource),
        Resource::Blob(_) => (3, collected.resource),
    });
    report.leases.sort_unstable();
    report.freed_bytes = report.collected.iter().map(|collected| collected.size_bytes).sum();
    collect_ingests(store, mode, &mut report)?;
    Ok(report)
}

/// What is due at an open: of a little, all, and of a lot what costs a moment. The next collection
/// takes the rest.
pub(crate) fn collect_some(store: &Store) -> Result<(), GcError> {
    let _one_at_a_time = store.inner.collecting.lock().unwrap_or_else(PoisonError::into_inner);
    let mut report = run(store, ROUNDS_AT_OPEN)?;
    collect_ingests(store, GcMode::Run, &mut report)
}

/// At most so many `rounds` of [`SYNC_STEPS`].
fn run(store: &Store, rounds: u64) -> Result<GcReport, GcError> {
    let mut report = GcReport::default();
    loop {
        // What may be lost, here and below, until the next sync: the step, which will be taken again.
        let step = store.write_lazily(end_leases)?;
        report.leases.extend(step.leases);
        if !step.more {
            break;
        }
    }
    let mut first_error = None;
    for _ in 0..rounds {
        let mut more = true;
        let mut bytes = Vec::new();
        let before = report.collected.len();
        for _ in 0..SYNC_STEPS {
            let step = store.write_lazily(take_loose)?;
            bytes.extend(with_bytes(&step.collected));
            report.collected.extend(step.collected);
            more = step.more;
            if !more {
                break;
            }
        }
        if report.collected.len() > before || !report.leases.is_empty() {
            // The point of no return: from here no crash brings back the rows of the bytes that go.
            store.sync()?;
        }
        match remove_bytes(store, &bytes) {
            // One directory that does not go keeps nothing else from going.
            Err(GcError::File(error)) => drop(first_error.get_or_insert(error)),
            result => result?,
        }
        if !more {
            break;
        }
    }
    report.kept_count = store.read(resources_count)?;
    first_error.map_or(Ok(report), |error| Err(error.into()))
}

fn full(store: &Store) -> Result<GcReport, GcError> {
    let report = store.write(|tx| {
        let repaired_count = tx.recount()?;
        let report = GcReport { repaired_count, ..trace(tx, tx.now())? };
        report.leases.iter().try_for_each(|lease| tx.drop_lease(*lease))?;
        for collected in &report.collected {
            take(tx, collected.resource)?;
        }
        Ok::<_, CatalogueError>(report)
    })?;
    let bytes: Vec<Resource> = with_bytes(&report.collected).collect();
    remove_bytes(store, &bytes)?;
    forget_gone(store)?;
    Ok(report)
}

/// A snapshot has none of its own.
fn with_bytes(collected: &[Collected]) -> impl Iterator<Item = Resource> + '_ {
    collected.iter().map(|one| one.resource).filter(|resource| !matches!(resource, Resource::Snapshot(_)))
}

/// Removes the bytes of what lies in the trash, and its trash rows.
pub(crate) fn remove_bytes(store: &Store, trash: &[Resource]) -> Result<(), GcError> {
    let mut removed = Removed::default();
    let (blobs, trees): (Vec<Resource>, Vec<Resource>) =
        trash.iter().partition(|resource| matches!(resource, Resource::Blob(_)));
    for batch in blobs.chunks(UNLINK_BATCH) {
        // Publishers are out: what has no row now will not get one before its file is gone.
        let _unlinking = store.inner.publishing.write().unwrap_or_else(PoisonError::into_inner);
        let mut dead = Vec::with_capacity(batch.len());
        store.read(|tx| {
            for blob in batch {
                if exists(tx, *blob)? { removed.gone.push(*blob) } else { dead.push(*blob) }
            }
            Ok::<_, CatalogueError>(())
        })?;
        removed.remove(store, &dead);
    }
    // Ids are never reused, so nobody can have brought these back.
    removed.remove(store, &trees);
    let Removed { gone, first_error } = removed;
    // Gone for good before the rows go: else a power cut could bring back bytes that no row tells of. A directory that has
    // gone from the one that it lay in has gone with all that was in it.
    let paths = &store.inner.paths;
    for (dir, is_of) in [
        (&paths.blobs, (|one| matches!(one, Resource::Blob(_))) as fn(&Resource) -> bool),
        (&paths.layers, |one| matches!(one, Resource::Layer(_))),
        (&paths.active, |one| matches!(one, Resource::Active(_))),
    ] {
        if gone.iter().any(is_of) {
            sync_dir(dir)?;
        }
    }
    // What may be lost: trash rows come back, and are found to be done.
    for batch in gone.chunks(STEP_CHANGES) {
        store.write_lazily(|tx| batch.iter().try_for_each(|resource| tx.empty_trash(*resource)))?;
    }
    first_error.map_or(Ok(()), |error| Err(error.into()))
}

#[derive(Default)]
struct Removed {
    /// What has no bytes any longer that the trash would have to tell of.
    gone: Vec<Resource>,
    first_error: Option<FileError>,
}

impl Removed {
    /// The file system spends the time on the pages and blocks of large files, and on each name: two threads do it sooner.
    fn remove(&mut self, store: &Store, resources: &[Resource]) {
        let results = parallel(
            resources,
            threads().get().min(REMOVERS_MAX),
            |_| 0,
            |resource| {
                let path = match resource {
                    Resource::Blob(digest) => blob_path(store, *digest),
                    Resource::Layer(id) => layer_dir(store, *id),
                    Resource::Active(id) => store.inner.paths.active.join(id.to_string()),
                    Resource::Snapshot(_) => return Ok(None),
                };
                // One that stays is no reason to leave the others.
                Ok::<_, Infallible>(Some(tree::remove(&path).map(|()| *resource)))
            },
        );
        for result in results.into_iter().flatten().flatten() {
            match result {
                Ok(resource) => self.gone.push(resource),
                Err(error) => drop(self.first_error.get_or_insert(error)),
            }
        }
    }
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
            GcMode::Run | GcMode::Full => content.abort(&status.ingest).or_else(kept)?,
        };
        if collected {
            report.freed_bytes += status.offset_bytes;
            report.ingests.push(status);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, UNIX_EPOCH};

    use plies_oci::BlobDigest;
    use proptest::prelude::*;

    use super::*;
    use crate::catalogue::Catalogue;
    use crate::catalogue::schema::{ActiveRow, LayerKind, LayerRow, REFS, SnapshotRow, StoredUsage};
    use crate::refs::{Differences, differences};
    use crate::{ActiveId, LayerId, OpenOptions, Owner, SnapshotId, WaitPolicy};

    /// Rows without bytes, since it is about rows only.
    struct Rig {
        store: Store,
        clock_seconds: Arc<AtomicU64>,
        _dir: tempfile::TempDir,
    }

    impl Rig {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let clock_seconds = Arc::new(AtomicU64::new(1000));
            let clock = Arc::clone(&clock_seconds);
            let options =
                OpenOptions::new(Arc::new(move || UNIX_EPOCH + Duration::from_secs(clock.load(Ordering::SeqCst))));
            let store = Store::open(&dir.path().join("store"), options, WaitPolicy::Fail).unwrap();
            Self { store, clock_seconds, _dir: dir }
        }

        fn write<T>(&self, change: impl FnMut(&mut Tx<'_>) -> Result<T, CatalogueError>) -> T {
            self.store.write_lazily(change).unwrap()
        }

        fn differences(&self) -> Differences {
            self.store.read(differences).unwrap()
        }

        /// A lease that ends at `second` of the clock.
        fn lease_until(&self, n: u8, second: u64) -> LeaseId {
            let id = LeaseId::from_bytes([n; 8]);
            let expires = Some(Stamp::from_micros(second * 1_000_000));
            let row = LeaseRow { created: Stamp::default(), expires, label: String::new() };
            self.write(|tx| tx.put(&LEASES, &id, &row));
            id
        }
    }

    fn blob(n: u8) -> Resource {
        BlobDigest::of(&[n]).into()
    }

    fn owner(n: u8) -> Owner {
        Owner::new("test", n)
    }

    /// The n-th of a few resources of every kind, with its row; none is held.
    fn make(tx: &mut Tx<'_>, n: u8) -> Result<(), CatalogueError> {
        match resource(n) {
            Resource::Blob(digest) => tx.put_blob(digest, u64::from(n)).map(drop),
            Resource::Layer(id) if tx.contains(&LAYERS, &id)? => Ok(()),
            Resource::Layer(id) => {
                let usage = StoredUsage { size_bytes: u64::from(n), inodes: 1, content_bytes: 0 };
                let created = tx.now();
                let row = LayerRow {
                    kind: LayerKind::Full,
                    diff_id: None,
                    chain_id: None,
                    usage,
                    created,
                    tar_split: false,
                    beside: usage,
                    unverified: false,
                };
                tx.put_layer(id, &row)
            }
            Resource::Snapshot(id) => {
                let row = SnapshotRow { layers: Vec::new(), fixup: None, created: tx.now() };
                tx.put_snapshot(id, &row).map(drop)
            }
            Resource::Active(id) => {
                let row = ActiveRow {
                    base: None,
                    volatile: false,
                    created: tx.now(),
                    usage: None,
                    sealed: None,
                    changed: true,
                };
                tx.put_active(id, &row)
            }
        }
    }

    /// How many resources the random operations are about; edges lead from lower to higher numbers.
    const RESOURCES: u8 = 12;

    fn resource(n: u8) -> Resource {
        match n % 4 {
            0 => ActiveId::from_bytes([n; 8]).into(),
            1 => SnapshotId::from_bytes([n; 16]).into(),
            2 => LayerId::from_bytes([n; 8]).into(),
            _ => blob(n),
        }
    }

    #[derive(Debug, Clone, Copy)]
    enum Op {
        Make(u8),
        /// As [`crate::Layers::set_diff_id`] does.
        PutAgain(u8),
        Hold(u8, u8),
        Unhold(u8, u8),
        UnholdAll(u8),
        LeaseHold(u8, u8),
        LetGo(u8, u8),
        EndLease(u8),
        Expire(u8),
        Edge(u8, u8),
        NoEdge(u8, u8),
        Collect,
        CollectFully,
    }

    fn op() -> impl Strategy<Value = Op> {
        let n = || 0..RESOURCES;
        let few = || 0u8..3;
        prop_oneof![
            6 => n().prop_map(Op::Make),
            1 => n().prop_map(Op::PutAgain),
            4 => (few(), n()).prop_map(|(owner, n)| Op::Hold(owner, n)),
            2 => (few(), n()).prop_map(|(owner, n)| Op::Unhold(owner, n)),
            1 => few().prop_map(Op::UnholdAll),
            4 => (few(), n()).prop_map(|(lease, n)| Op::LeaseHold(lease, n)),
            2 => (few(), n()).prop_map(|(lease, n)| Op::LetGo(lease, n)),
            1 => few().prop_map(Op::EndLease),
            1 => few().prop_map(Op::Expire),
            6 => (n(), n()).prop_map(|(from, to)| Op::Edge(from, to)),
            2 => (n(), n()).prop_map(|(from, to)| Op::NoEdge(from, to)),
            1 => Just(Op::Collect),
            1 => Just(Op::CollectFully),
        ]
    }

    fn apply(rig: &Rig, op: Op) {
        let lease = |n: u8| LeaseId::from_bytes([n; 8]);
        // What is not there is refused, and nothing else can fail.
        let allowed = |result: Result<(), CatalogueError>| match result {
            Ok(()) | Err(CatalogueError::NoSuchResource { .. } | CatalogueError::NoSuchLease { .. }) => {}
            Err(error) => panic!("{error}"),
        };
        match op {
            Op::Make(n) => rig.write(|tx| make(tx, n)),
            Op::PutAgain(n) => rig.write(|tx| {
                match resource(n) {
                    Resource::Layer(id) => {
                        if let Some(row) = tx.get(&LAYERS, &id)? {
                            tx.put_layer(id, &LayerRow { tar_split: true, ..row })?;
                        }
                    }
                    Resource::Active(id) => {
                        if let Some(row) = tx.get(&ACTIVES, &id)? {
                            tx.put_active(id, &ActiveRow { usage: Some(StoredUsage::default()), ..row })?;
                        }
                    }
                    _ => {}
                }
                Ok(())
            }),
            Op::Hold(by, n) => allowed(rig.store.write_lazily(|tx| tx.hold(&owner(by), resource(n)))),
            Op::Unhold(by, n) => rig.write(|tx| tx.unhold(&owner(by), resource(n)).map(drop)),
            Op::UnholdAll(by) => rig.write(|tx| tx.unhold_all(&owner(by)).map(drop)),
            Op::LeaseHold(n, held) => {
                if rig.store.read(|tx| tx.get(&LEASES, &lease(n))).unwrap().is_none() {
                    rig.lease_until(n, u64::MAX / 1_000_000);
                }
                allowed(rig.store.write_lazily(|tx| tx.lease_hold(lease(n), resource(held))));
            }
            Op::LetGo(n, held) => {
                let key = (lease(n), resource(held));
                rig.write(|tx| tx.remove_ref(&LEASE_HOLDS, &key, key.1).map(drop));
            }
            Op::EndLease(n) => rig.write(|tx| tx.drop_lease(lease(n))),
            Op::Expire(n) => drop(rig.lease_until(n, rig.clock_seconds.load(Ordering::SeqCst))),
            Op::Edge(from, to) if from < to => {
                allowed(rig.store.write_lazily(|tx| tx.add_edge(resource(from), resource(to))));
            }
            Op::NoEdge(from, to) => rig.write(|tx| tx.remove_edge(resource(from), resource(to)).map(drop)),
            Op::Edge(..) => {}
            Op::Collect => drop(rig.store.gc(GcMode::Run).unwrap()),
            Op::CollectFully => assert_eq!(rig.store.gc(GcMode::Full).unwrap().repaired_count, 0),
        }
    }

    /// What is left, by kind and number.
    fn left(rig: &Rig) -> BTreeSet<Resource> {
        let there = |n: &u8| rig.store.read(|tx| exists(tx, resource(*n))).unwrap();
        (0..RESOURCES).filter(there).map(resource).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn counting_and_tracing_take_the_same(ops in prop::collection::vec(op(), 1..60)) {
            let rig = Rig::new();
            for op in &ops {
                apply(&rig, *op);
                prop_assert_eq!(rig.differences(), Differences::default(), "after {:?}", op);
            }
            let traced = {
                let mut traced = rig.store.read(|tx| trace(tx, rig.store.now())).unwrap();
                traced.freed_bytes = traced.collected.iter().map(|collected| collected.size_bytes).sum();
                traced
            };
            prop_assert_eq!(&rig.store.gc(GcMode::DryRun).unwrap(), &traced);
            let before = left(&rig);
            prop_assert_eq!(&rig.store.gc(GcMode::Run).unwrap(), &traced);
            let taken: BTreeSet<Resource> = traced.collected.iter().map(|collected| collected.resource).collect();
            prop_assert_eq!(left(&rig), &before - &taken);
            prop_assert_eq!(rig.differences(), Differences::default());
            prop_assert_eq!(rig.store.gc(GcMode::Full).unwrap().collected, []);
        }
    }

    #[test]
    fn putting_a_row_again_changes_no_count() {
        let rig = Rig::new();
        rig.write(|tx| {
            [0, 2].into_iter().try_for_each(|n| {
                make(tx, n)?;
                tx.hold(&owner(n), resource(n))
            })
        });
        // An active, and a layer.
        apply(&rig, Op::PutAgain(0));
        apply(&rig, Op::PutAgain(2));
        assert_eq!(rig.differences(), Differences::default());
        assert_eq!(rig.store.gc(GcMode::DryRun).unwrap().kept_count, 2);
    }

    #[test]
    fn a_step_takes_no_more_than_it_may() {
        let rig = Rig::new();
        let all = u8::MAX;
        // Every second one keeps the one after it, so that some become loose only by the others.
        rig.write(|tx| {
            (0..all).try_for_each(|n| tx.put_blob(BlobDigest::of(&[n]), 1).map(drop))?;
            (0..all - 1).step_by(2).try_for_each(|n| tx.add_edge(blob(n), blob(n + 1)))
        });
        let edges = || rig.store.read(|tx| tx.rows_count(&EDGES)).unwrap() as usize;
        let before = edges();
        let step = rig.write(take_loose);
        let changes = step.collected.len() + before - edges();
        assert!(step.more && (1..=STEP_CHANGES + 1).contains(&changes), "{changes}");
        assert_eq!(rig.differences(), Differences::default());
        assert_eq!(step.collected.len() + rig.store.gc(GcMode::Run).unwrap().collected.len(), usize::from(all));
    }

    #[test]
    fn an_open_takes_no_more_than_a_moment_allows() {
        let rig = Rig::new();
        let all = STEP_CHANGES * SYNC_STEPS * ROUNDS_AT_OPEN as usize + 500;
        rig.write(|tx| (0..all as u64).try_for_each(|n| tx.put_blob(BlobDigest::of(&n.to_be_bytes()), 1).map(drop)));
        collect_some(&rig.store).unwrap();
        assert_eq!(rig.store.read(resources_count).unwrap(), 500);
        assert_eq!(rig.differences(), Differences::default());
        assert_eq!(rig.store.gc(GcMode::Run).unwrap().collected.len(), 500);
    }

    #[test]
    fn no_kill_brings_back_the_row_of_bytes_that_went() {
        let rig = Rig::new();
        rig.store.write(|tx| tx.put_blob(BlobDigest::of(&[1]), 1)).unwrap();
        assert_eq!(rig.store.gc(GcMode::Run).unwrap().collected.len(), 1);
        // What a kill would leave: lazy commits are in this process only.
        let database = rig.store.inner.paths.database();
        let killed = database.with_extension("killed");
        fs::copy(&database, &killed).unwrap();
        let killed = Catalogue::open(&killed, OpenOptions::CACHE_BYTES).unwrap();
        let rows: Result<_, CatalogueError> = killed.read(|tx| tx.rows_count(&BLOBS));
        assert_eq!(rows.unwrap(), 0);
    }

    #[test]
    fn a_lease_that_lost_some_of_its_holds_stays_expired_when_the_clock_is_turned_back() {
        let rig = Rig::new();
        let (lease, all) = (rig.lease_until(1, 1001), u8::MAX);
        rig.write(|tx| {
            (0..all).try_for_each(|n| {
                tx.put_blob(BlobDigest::of(&[n]), 1)?;
                tx.lease_hold(lease, blob(n))
            })
        });
        rig.clock_seconds.store(1001, Ordering::SeqCst);
        let step = rig.write(end_leases);
        assert!(step.more && step.leases.is_empty());
        rig.clock_seconds.store(1000, Ordering::SeqCst);
        assert_eq!(rig.differences(), Differences::default());
        let dry = rig.store.gc(GcMode::DryRun).unwrap();
        let report = rig.store.gc(GcMode::Run).unwrap();
        assert_eq!(report, dry);
        assert_eq!((report.leases, report.collected.len()), (vec![lease], usize::from(all)));
    }

    #[test]
    fn wrong_counts_keep_their_resources_until_a_full_collection_puts_them_right() {
        let rig = Rig::new();
        rig.write(|tx| {
            (0..5).try_for_each(|n| tx.put_blob(BlobDigest::of(&[n]), 1).map(drop))?;
            (0..4).try_for_each(|n| tx.hold(&owner(n), blob(n)))?;
            tx.hold(&owner(9), blob(0))?;
            // Too low, and it will fall below zero; listed though held; held by nothing, and not listed.
            tx.remove(&REFS, &blob(0))?;
            tx.put(&REFS, &blob(1), &2)?;
            tx.put(&LOOSE, &blob(2), &())?;
            tx.remove(&LOOSE, &blob(4))
        });
        let found = rig.differences();
        assert_eq!(found.refs, [(blob(0), (0, 2)), (blob(1), (2, 1))].into());
        assert_eq!(found.loose, [(blob(2), false), (blob(4), true)].into());
        let found = rig.store.check(&crate::CheckOptions::new(crate::Depth::Graph)).unwrap().found;
        let count = |code| found.iter().filter(|finding| finding.code == code).count();
        assert_eq!((count("refs-wrong"), count("loose-wrong")), (2, 2), "{found:#?}");

        rig.write(|tx| tx.unhold(&owner(9), blob(0)));
        rig.write(|tx| tx.unhold(&owner(1), blob(1)));
        assert_eq!(rig.store.gc(GcMode::DryRun).unwrap().collected, []);
        assert_eq!(rig.store.gc(GcMode::Run).unwrap().collected, []);
        let report = rig.store.gc(GcMode::Full).unwrap();
        let mut taken: Vec<Resource> = report.collected.iter().map(|collected| collected.resource).collect();
        taken.sort_unstable();
        let mut unheld = [blob(1), blob(4)];
        unheld.sort_unstable();
        assert_eq!(taken, unheld);
        assert_eq!(report.repaired_count, 4);
        assert_eq!(rig.differences(), Differences::default());
    }

    #[test]
    fn only_a_full_collection_takes_a_ring() {
        let rig = Rig::new();
        rig.write(|tx| {
            tx.put_blob(BlobDigest::of(&[1]), 1)?;
            tx.put_blob(BlobDigest::of(&[2]), 1)?;
            tx.add_edge(blob(1), blob(2))?;
            tx.add_edge(blob(2), blob(1))
        });
        assert_eq!(rig.store.gc(GcMode::Run).unwrap().collected, []);
        assert_eq!(rig.store.gc(GcMode::Full).unwrap().collected.len(), 2);
        assert_eq!(rig.differences(), Differences::default());
    }
}
