//! A BuildKit daemon's state directory, or one worker's below it.
//!
//! ```text
//! mod.rs    which directories, what is to become of each record, and doing it
//! rows.rs   the rows of its metadata        v1.rs   those of version 1, moved on to version 2
//! keys.rs   what its solver remembers     images.rs   images that it can build on without a registry
//!
//! <root>/cache.db                 keys of steps, of all workers
//! <root>/<worker>/workerid        how cache.db calls it
//!                 metadata.db     records, version 1 (BuildKit before 0.7)
//!                 metadata_v2.db  records, version 2; counts if both are there
//!                 containerdmeta.db  snapshots/metadata.db  snapshots/snapshots/<id>/  content/blobs/sha256/<hex>
//! ```
//!
//! | record | becomes |
//! |---|---|
//! | with a committed snapshot | a record with a layer: the snapshot's files, by hard link |
//! | committed lazily, sharing a mutable record's files | the same, by copy: BuildKit may take that commit back and go on writing |
//! | of a blob that was never unpacked | a lazy record |
//! | merge, diff | a composed record |
//! | mutable and retained (a cache mount, a local source) | a mutable record, by copy |
//! | mutable and not retained | nothing: what came of it is the record that shares its files, or it was never finished |
//! | that says which image its layer was pulled for | also a name of that image |

mod images;
mod keys;
mod rows;
mod v1;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{Scope, ScopedJoinHandle};

pub use keys::key;
use plies_bolt::Bolt;
use plies_cache::{
    Accessor, Adopted, BlobRow, CacheError, CacheKey, Link, Parents, RecordId, RecordOptions, RecordRow, State, UseRow,
    Value,
};
use plies_oci::{BlobDigest, DiffId, Family};
use plies_store::progress::{self, Task};
use plies_store::{GcMode, Indexes, LayerBlob, LayerId, Lease, LeaseOptions, Stamp, TransferError};

use self::keys::Keys;
use self::rows::Row;
use crate::containerd::{Namespace, SnapshotInfo, SnapshotKind};
use crate::take::{TakenLayer, Tar, TookLayer, WantedBlob, WantedLayer, measure};
use crate::{Import, ImportError, ImportReport, ImportedItem, Outcome, chain};

const WANTED: &str =
    "state directory of BuildKit: there is neither metadata.db nor metadata_v2.db in it or right below";
const V1: &str = "metadata.db";
const V2: &str = "metadata_v2.db";
const SOLVER: &str = "cache.db";
/// containerd's namespace for all that BuildKit has.
const NAMESPACE: &str = "buildkit";
/// The key under which BuildKit keeps a cache mount's ID, and the beginning of its index; the same here.
const CACHE_DIR: &str = "cache-dir";
/// Rows that are written in one transaction: while it is made, nobody else writes.
const ROWS_MAX: usize = 10_000;

/// How this store calls a record of BuildKit's: always the same.
pub fn record_id(name: &str) -> RecordId {
    let digest = BlobDigest::of(format!("buildkit record {name}").as_bytes());
    RecordId::from_bytes(*digest.as_bytes().first_chunk().expect("because 16 is less than 32"))
}

/// What is to become of a record.
#[derive(Debug)]
enum Plan {
    Layer { snapshot: SnapshotInfo, before: Option<PathBuf>, may_change: bool },
    Lazy,
    Composed,
    Active { dir: PathBuf },
    Here,
    Left(String),
    Failed(String),
}

/// One worker's state. The databases stay open, and so locked, until it is dropped.
struct Worker {
    dir: PathBuf,
    /// How `cache.db` calls it, if it says so.
    id: Option<String>,
    rows: BTreeMap<String, Row>,
    plans: BTreeMap<String, Plan>,
    namespace: Namespace,
    _locks: Vec<Bolt>,
}

/// Takes over what can be taken of the state directory at `path`, of a daemon or of one worker.
///
/// # Errors
/// [`ImportError::NotOne`]; [`ImportError::Bolt`] if BuildKit is running; [`ImportError::OtherFileSystem`]; what the store
/// says. What of the source cannot be read is in the report instead.
pub fn import(import: &Import<'_>, path: &Path) -> Result<ImportReport, ImportError> {
    let mut report = ImportReport { dry_run: import.options.dry_run, ..ImportReport::default() };
    let dirs = workers_at(path)?;
    let mut solvers: BTreeMap<PathBuf, (Keys, Bolt)> = BTreeMap::new();
    let mut workers = Vec::new();
    for dir in dirs {
        import.check_file_system(&dir)?;
        let near = [dir.parent(), Some(dir.as_path())].into_iter().flatten().map(|dir| dir.join(SOLVER));
        let solver = near.into_iter().find(|solver| solver.is_file()).filter(|solver| !solvers.contains_key(solver));
        let bolt = match &solver {
            Some(solver) => open(solver, &mut report)?,
            None => None,
        };
        let (keys, worker) = std::thread::scope(|scope| {
            let keys = bolt.map(|bolt| scope.spawn(|| (Keys::read(&bolt), bolt)));
            let worker = Worker::open(dir.clone(), &mut report);
            (keys.map(|keys| keys.join().expect("because it does not panic")), worker)
        });
        if let Some((((keys, failed), bolt), path)) = keys.zip(solver) {
            failed.into_iter().for_each(|error| report.problem("database", path.display().to_string(), chain(&error)));
            solvers.insert(path, (keys, bolt));
        }
        match worker {
            Ok(mut worker) => {
                let results = solvers.values().flat_map(|(keys, _)| &keys.results);
                worker.plan(results.map(|(_, _, record)| record.as_str()).collect(), import)?;
                workers.push(worker);
            }
            // One worker's trouble is not the others'; that somebody uses it is everybody's.
            Err(ImportError::Bolt(error)) if !matches!(error, plies_bolt::BoltError::InUse { .. }) => {
                report.problem("worker", dir.display().to_string(), chain(&error));
            }
            Err(other) => return Err(other),
        }
    }
    let mut came: HashMap<String, HashSet<String>> = HashMap::new();
    for mut worker in workers {
        report.sources.push(worker.dir.clone());
        let task = Task::start(import.progress, &format!("import {} records", worker.rows.len()), None);
        let here = worker.take(import, &mut report)?;
        task.end(progress::Outcome::Done);
        images::take(import, &worker, &mut report)?;
        came.entry(worker.id.clone().unwrap_or_default()).or_default().extend(here);
    }
    for (mut keys, _lock) in solvers.into_values() {
        let anybody = came.get("");
        keys.retain(|worker, record| {
            [came.get(worker), anybody].into_iter().flatten().any(|here| here.contains(record))
        });
        report.keys_count += adopt_keys(import, &keys)?;
    }
    // Rows were written in order, and not one by one to the disk.
    import.store.sync()?;
    Ok(report)
}

/// The workers' directories at or right below a path.
fn workers_at(path: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let is_worker = |dir: &Path| [V1, V2].into_iter().any(|name| dir.join(name).is_file());
    if is_worker(path) {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    match fs::read_dir(path) {
        Ok(entries) => found.extend(entries.flatten().map(|entry| entry.path()).filter(|dir| is_worker(dir))),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {}
        Err(source) => return Err(ImportError::Io { op: "read", path: path.to_owned(), source }),
    }
    found.sort();
    match found.is_empty() {
        true => Err(ImportError::NotOne { path: path.to_owned(), wanted: WANTED }),
        false => Ok(found),
    }
}

/// Opens a database. One that its owner uses ends the import; one that is damaged or missing is a problem of its own.
fn open(path: &Path, report: &mut ImportReport) -> Result<Option<Bolt>, ImportError> {
    match Bolt::open(path) {
        Ok(bolt) => Ok(Some(bolt)),
        Err(error @ plies_bolt::BoltError::InUse { .. }) => Err(error.into()),
        Err(error) => {
            report.problem("database", path.display().to_string(), chain(&error));
            Ok(None)
        }
    }
}

impl Worker {
    /// Reads a worker's databases; of a row that cannot be read, why.
    fn open(dir: PathBuf, report: &mut ImportReport) -> Result<Self, ImportError> {
        let is_v2 = dir.join(V2).is_file();
        let metadata_path = dir.join(if is_v2 { V2 } else { V1 });
        // Without its records a worker is nothing.
        let metadata = Bolt::open(&metadata_path)?;
        let (meta_path, own_path) = (dir.join("containerdmeta.db"), dir.join("snapshots/metadata.db"));
        let (meta, own) = (open(&meta_path, report)?, open(&own_path, report)?);
        let (((raw, failed_rows), metadata), (namespace, failed)) = std::thread::scope(|scope| {
            let rows = scope.spawn(|| (rows::read(&metadata), metadata));
            let read = |meta| Namespace::read(meta, own.as_ref(), NAMESPACE, &dir.join("snapshots"));
            let namespace = meta.as_ref().map(read).unwrap_or_default();
            (rows.join().expect("because it does not panic"), namespace)
        });
        let mut problem = |path: &Path, error| report.problem("database", path.display().to_string(), chain(error));
        failed_rows.iter().for_each(|error| problem(&metadata_path, error));
        failed.iter().for_each(|error| problem(&meta_path, error));
        let (raw, failed) = if is_v2 { (raw, BTreeMap::new()) } else { v1::migrate(raw, &namespace) };
        let id = fs::read_to_string(dir.join("workerid")).ok().map(|id| id.trim().to_owned());
        let locks = [Some(metadata), meta, own].into_iter().flatten().collect();
        let mut worker = Self { dir, id, rows: BTreeMap::new(), plans: BTreeMap::new(), namespace, _locks: locks };
        let parsed = raw.into_iter().map(|(id, raw)| (id, Row::parse(&raw)));
        for (id, row) in failed.into_iter().map(|(id, why)| (id, Err(why))).chain(parsed) {
            if let Err(why) = &row {
                worker.plans.insert(id.clone(), Plan::Failed(why.clone()));
            }
            worker.rows.insert(id, row.unwrap_or_default());
        }
        Ok(worker)
    }

    /// Decides what is to become of each record, of which solvers have some as `results`.
    fn plan(&mut self, results: HashSet<&str>, import: &Import<'_>) -> Result<(), ImportError> {
        // Whose own files somebody needs, beside those who have them.
        let mut needed: HashSet<&str> = self.rows.values().flat_map(Row::parents).map(String::as_str).collect();
        needed.extend(results);
        let shared_by: HashMap<String, String> =
            self.rows.iter().filter_map(|(id, row)| Some((row.equal_mutable.clone()?, id.clone()))).collect();
        let here = import.cache.known(self.rows.keys().map(|id| record_id(id)))?;
        for (id, row) in &self.rows {
            if self.plans.contains_key(id) {
                continue;
            }
            let plan = match here.contains(&record_id(id)) {
                true => Plan::Here,
                false => self.plan_of(id, row, needed.contains(id.as_str()), shared_by.get(id)),
            };
            self.plans.insert(id.clone(), plan);
        }
        Ok(())
    }

    fn plan_of(&self, id: &str, row: &Row, is_needed: bool, shared_by: Option<&String>) -> Plan {
        if row.deleted {
            return Plan::Left("BuildKit was removing it".into());
        }
        if row.merge_parents.len() > 1 || (row.lower.is_some() && row.merge_parents.is_empty()) {
            return Plan::Composed;
        }
        if row.upper.is_some() {
            return Plan::Failed("it is a diff that begins with nothing".into());
        }
        if let Some(mutable) = &row.equal_mutable {
            return match self.rows.get(mutable).map(|row| (row, self.snapshot_of(mutable, row))) {
                Some((shared, _)) if shared.retain && !is_needed => {
                    Plan::Left(format!("its files are those of {mutable}, which stays mutable"))
                }
                Some((_, Some(snapshot))) => self.layer(snapshot, true),
                // It was finalized, and the power went before that was written down.
                _ => match self.snapshot_of(id, row) {
                    Some(snapshot) => self.layer(snapshot, false),
                    None => Plan::Failed(format!("it shares the files of {mutable}, which are gone")),
                },
            };
        }
        if !row.committed {
            return match (self.snapshot_of(id, row), row.retain, shared_by) {
                (None, ..) => Plan::Failed("its snapshot is gone".into()),
                (_, false, Some(other)) => Plan::Left(format!("its files are those of {other}")),
                (_, false, None) => Plan::Left("the step that wrote to it never ended".into()),
                (_, true, _) if row.parent.is_some() => {
                    Plan::Left("it is mutable on top of another record, which no step here could ask for".into())
                }
                (Some(snapshot), true, _) => Plan::Active { dir: snapshot.dir.clone() },
            };
        }
        match self.snapshot_of(id, row) {
            Some(snapshot) => self.layer(snapshot, snapshot.kind != SnapshotKind::Committed),
            None if row.blob.is_some() && self.diff_id_of(row).is_some() => Plan::Lazy,
            None => Plan::Failed("its snapshot is gone, and there is no blob of it".into()),
        }
    }

    /// A record's snapshot, if its files are there.
    fn snapshot_of(&self, id: &str, row: &Row) -> Option<&SnapshotInfo> {
        let key = row.snapshot.as_deref().unwrap_or(id);
        self.namespace.snapshots.get(key).filter(|snapshot| snapshot.dir.is_dir())
    }

    fn layer(&self, snapshot: &SnapshotInfo, may_change: bool) -> Plan {
        let before = snapshot.parent.as_ref().and_then(|parent| self.namespace.snapshots.get(parent));
        Plan::Layer { snapshot: snapshot.clone(), before: before.map(|before| before.dir.clone()), may_change }
    }

    fn diff_id_of(&self, row: &Row) -> Option<DiffId> {
        let blob = || self.namespace.blobs.get(&row.blob?)?.diff_id;
        row.diff_id.or_else(blob)
    }

    fn blob_path(&self, digest: BlobDigest) -> PathBuf {
        self.dir.join("content/blobs/sha256").join(digest.hex())
    }

    /// Records in groups: each stands on those of earlier groups. What stands on itself, by way of others, is in none.
    fn levels(&self) -> Vec<Vec<&str>> {
        let mut waits_for: HashMap<&str, usize> = HashMap::new();
        let mut users: HashMap<&str, Vec<&str>> = HashMap::new();
        for (id, row) in &self.rows {
            let parents: BTreeSet<&String> = row.parents().filter(|parent| self.rows.contains_key(*parent)).collect();
            waits_for.insert(id, parents.len());
            parents.into_iter().for_each(|parent| users.entry(parent).or_default().push(id));
        }
        let mut levels = Vec::new();
        let mut level: Vec<&str> =
            self.rows.keys().map(String::as_str).filter(|id| waits_for.get(id) == Some(&0)).collect();
        while !level.is_empty() {
            let mut next = Vec::new();
            for user in level.iter().flat_map(|id| users.get(id).into_iter().flatten()) {
                if let Some(left) = waits_for.get_mut(user) {
                    *left -= 1;
                    if *left == 0 {
                        next.push(*user);
                    }
                }
            }
            levels.push(std::mem::replace(&mut level, next));
        }
        levels
    }

    /// Takes over all that is planned, and tells; the records that are here then.
    fn take(&mut self, import: &Import<'_>, report: &mut ImportReport) -> Result<HashSet<String>, ImportError> {
        let lease = import.store.lease(LeaseOptions::process("import"))?;
        let taken = self.take_held(import, report, &lease);
        lease.release()?;
        if taken.is_err() {
            // The error to tell is the first one; what could not be removed now goes with the next collection.
            drop(import.store.gc(GcMode::Run));
        }
        taken
    }

    fn take_held(
        &mut self,
        import: &Import<'_>,
        report: &mut ImportReport,
        lease: &Lease,
    ) -> Result<HashSet<String>, ImportError> {
        let mut plans = std::mem::take(&mut self.plans);
        let blobs = self.take_blobs(&plans, import, report, lease)?;
        std::thread::scope(|scope| {
            let adopting = Adopting { cache: import.cache, scope, running: None };
            let (indexes, told, trees) = (Indexes::default(), BTreeMap::new(), Trees::default());
            let mut passage = Passage { import, lease, report, blobs, trees, adopting, indexes, told };
            self.take_levels(&mut plans, &mut passage)?;
            for id in plans.keys() {
                let why = "the records that it stands on stand on each other in a circle".to_owned();
                passage.tell(id, &self.rows[id], Outcome::Failed, 0, Some(why));
            }
            passage.adopting.wait()?;
            let Passage { report, trees, told, .. } = passage;
            report.items.extend(told.into_values());
            Ok(trees.came)
        })
    }

    fn take_levels(
        &self,
        plans: &mut BTreeMap<String, Plan>,
        passage: &mut Passage<'_, '_, '_>,
    ) -> Result<(), ImportError> {
        let import = passage.import;
        for level in self.levels() {
            let mut ready = Vec::new();
            for id in level {
                let (row, plan) = (&self.rows[id], plans.remove(id).expect("because each row has a plan"));
                let missing = row.parents().find(|parent| !passage.trees.came.contains(*parent));
                let plan = match (plan, missing) {
                    (plan @ (Plan::Here | Plan::Left(_) | Plan::Failed(_)), _) | (plan, None) => plan,
                    (_, Some(parent)) => {
                        let what = if self.rows.contains_key(parent) { "did not come over" } else { "is not there" };
                        Plan::Failed(format!("it stands on {parent}, which {what}"))
                    }
                };
                match plan {
                    Plan::Here => {
                        passage.trees.note(id, row, is_lazy_here(import, id)?);
                        passage.tell(id, row, Outcome::Here, 0, None);
                    }
                    Plan::Left(why) => passage.tell(id, row, Outcome::Left, 0, Some(why)),
                    Plan::Failed(why) => passage.tell(id, row, Outcome::Failed, 0, Some(why)),
                    plan => ready.push((id, plan)),
                }
            }
            match import.options.dry_run {
                true => self.tell_level(&ready, passage),
                false => self.take_level(&ready, passage)?,
            }
        }
        Ok(())
    }

    /// Says of records what would come over.
    fn tell_level(&self, ready: &[(&str, Plan)], passage: &mut Passage<'_, '_, '_>) {
        for (id, plan) in ready {
            let row = &self.rows[*id];
            let size_bytes = match plan {
                Plan::Layer { snapshot, .. } if !snapshot.whole => measure(&snapshot.dir),
                Plan::Active { dir } => measure(dir),
                _ => row.size_bytes.unwrap_or(0),
            };
            if matches!(plan, Plan::Layer { .. } | Plan::Active { .. }) {
                passage.report.layers_count += 1;
                passage.report.layer_bytes += size_bytes;
            }
            passage.trees.note(id, row, false);
            passage.tell(id, row, Outcome::Taken, size_bytes, None);
        }
    }

    /// Takes in the blobs of all records that are to come over, and others with the same tars.
    fn take_blobs(
        &self,
        plans: &BTreeMap<String, Plan>,
        import: &Import<'_>,
        report: &mut ImportReport,
        lease: &Lease,
    ) -> Result<Blobs, ImportError> {
        let mut same: HashMap<DiffId, Vec<BlobDigest>> = HashMap::new();
        for (digest, blob) in &self.namespace.blobs {
            if let Some(diff_id) = blob.diff_id {
                same.entry(diff_id).or_default().push(*digest);
            }
        }
        let mut wanted: BTreeMap<BlobDigest, WantedBlob> = BTreeMap::new();
        for (id, row) in &self.rows {
            if matches!(plans.get(id), Some(Plan::Here | Plan::Left(_) | Plan::Failed(_)) | None) {
                continue;
            }
            let Some(diff_id) = self.diff_id_of(row) else { continue };
            for digest in same.get(&diff_id).into_iter().flatten().chain(&row.blob) {
                let path = self.blob_path(*digest);
                if path.is_file() {
                    wanted.insert(*digest, WantedBlob { digest: *digest, diff_id, path });
                }
            }
        }
        let wanted: Vec<WantedBlob> = wanted.into_values().collect();
        let mut blobs = Blobs { same, taken: HashMap::new() };
        if import.options.dry_run {
            report.blobs_count += wanted.len();
            report.blob_bytes +=
                wanted.iter().filter_map(|blob| fs::metadata(&blob.path).ok()).map(|meta| meta.len()).sum::<u64>();
            return Ok(blobs);
        }
        let mut was_here = HashSet::new();
        for blob in &wanted {
            if import.store.content().info(blob.digest)?.is_some() {
                was_here.insert(blob.digest);
            }
        }
        for (digest, taken) in import.take_blobs(&wanted, lease)? {
            match taken {
                Ok(blob) => {
                    if !was_here.contains(&digest) {
                        report.blobs_count += 1;
                        report.blob_bytes += blob.size_bytes;
                    }
                    blobs.taken.insert(digest, blob);
                }
                Err(error @ (TransferError::Catalogue(_) | TransferError::Canceled(_) | TransferError::Ingest(_))) => {
                    return Err(error.into());
                }
                Err(error) => report.problem("blob", digest.to_string(), chain(&error)),
            }
        }
        Ok(blobs)
    }

    /// Takes over records that all stand on what is here by now.
    fn take_level(&self, ready: &[(&str, Plan)], passage: &mut Passage<'_, '_, '_>) -> Result<(), ImportError> {
        let (import, lease) = (passage.import, passage.lease);
        let mut failed: Vec<(&str, String)> = Vec::new();
        // Layers first, all that can be made at the same time.
        let mut stacks: HashMap<&str, Result<Vec<LayerId>, String>> = HashMap::new();
        let (mut wanted, mut whose) = (Vec::new(), Vec::new());
        for (id, plan) in ready {
            let Plan::Layer { snapshot, before, may_change } = plan else { continue };
            let row = &self.rows[*id];
            let below = match &row.parent {
                None => Ok(Vec::new()),
                Some(parent) => match stacks.get(parent.as_str()) {
                    Some(known) => known.clone(),
                    None => {
                        let stack = passage.stack(parent, &self.rows)?;
                        stacks.insert(parent, stack.clone());
                        stack
                    }
                },
            };
            match below {
                Ok(below) => {
                    let (snapshot, before, may_change) = (snapshot.clone(), before.clone(), *may_change);
                    let blob = row.blob.and_then(|digest| passage.blobs.taken.get(&digest));
                    let tar = self.diff_id_of(row).zip(blob.copied().map(Tar::Blob));
                    wanted.push(WantedLayer { snapshot, before, below, tar, may_change });
                    whose.push(*id);
                }
                Err(why) => failed.push((id, why)),
            }
        }
        let taken = import.take_layers(&wanted, &passage.indexes, lease)?;
        let mut layers: HashMap<&str, TakenLayer> = HashMap::new();
        let mut differ: BTreeSet<&str> = BTreeSet::new();
        for (id, taken) in whose.into_iter().zip(taken) {
            match taken {
                TookLayer::Differs => drop(differ.insert(id)),
                TookLayer::Taken(layer) => {
                    passage.report.layers_count += usize::from(!layer.was_here);
                    passage.report.layer_bytes += if layer.was_here { 0 } else { layer.size_bytes };
                    layers.insert(id, layer);
                }
                TookLayer::Wrong(why) => failed.push((id, why)),
                TookLayer::Failed(error) => failed.push((id, chain(&error))),
            }
        }
        let mut adopted = Vec::new();
        for (id, plan) in ready {
            let row = &self.rows[*id];
            let (state, size_bytes, why) = match plan {
                // The blob is what everybody else has by that diff ID: it is unpacked, below.
                Plan::Layer { .. } if differ.contains(id) => (State::Lazy, 0, None),
                Plan::Layer { .. } => match layers.get(id) {
                    Some(layer) => (State::Sealed { layer: Some(layer.id) }, layer.size_bytes, None),
                    None => continue,
                },
                Plan::Active { dir } => match import.take_active(dir, lease) {
                    Ok(active) => {
                        let size_bytes = measure(dir);
                        passage.report.layers_count += 1;
                        passage.report.layer_bytes += size_bytes;
                        (State::Mutable { active, committed_as: None }, size_bytes, None)
                    }
                    Err(error) => {
                        failed.push((id, chain(&error)));
                        continue;
                    }
                },
                Plan::Lazy => {
                    let is_here = row.blob.is_some_and(|digest| passage.blobs.taken.contains_key(&digest));
                    let why = "its blob is not here: it can be used when somebody fetches that";
                    (State::Lazy, 0, (!is_here).then(|| why.to_owned()))
                }
                _ => (State::Composed, 0, None),
            };
            passage.trees.note(id, row, matches!(plan, Plan::Lazy) || row.lower.is_some() || differ.contains(id));
            passage.tell(id, row, Outcome::Taken, size_bytes, why);
            adopted.push(self.adopted(id, row, state, &passage.blobs));
        }
        for (id, why) in failed {
            passage.tell(id, &self.rows[id], Outcome::Failed, 0, Some(why));
        }
        passage.trees.own.extend(layers.into_iter().map(|(id, layer)| (id.to_owned(), layer.id)));
        passage.adopting.start(adopted)?;
        for id in differ {
            match passage.stack(id, &self.rows)? {
                Ok(layers) => {
                    let own = layers.last().map(|layer| import.store.layers().info(*layer)).transpose()?;
                    let size_bytes = own.map_or(0, |own| own.usage.size_bytes);
                    passage.report.layers_count += 1;
                    passage.report.layer_bytes += size_bytes;
                    passage.tell(id, &self.rows[id], Outcome::Taken, size_bytes, None);
                }
                Err(why) => passage.tell(id, &self.rows[id], Outcome::Failed, 0, Some(why)),
            }
        }
        Ok(())
    }

    fn adopted(&self, id: &str, row: &Row, state: State, blobs: &Blobs) -> Adopted {
        let parents = match (&row.parent, &row.lower) {
            _ if row.merge_parents.len() > 1 => {
                Parents::Merge(row.merge_parents.iter().map(|id| record_id(id)).collect())
            }
            (None, Some(lower)) => {
                Parents::Diff { lower: record_id(lower), upper: row.upper.as_deref().map(record_id) }
            }
            (Some(parent), _) => Parents::Layer(record_id(parent)),
            (None, None) => Parents::None,
        };
        let stamp = |nanos: u64| Stamp::from_micros(nanos / 1000);
        let blob = self.diff_id_of(row).map(|diff_id| {
            let taken = row.blob.and_then(|digest| blobs.taken.get(&digest));
            // What was damaged there is not here, and can be fetched all the same.
            let known = row.blob.filter(|_| taken.is_some() || state == State::Lazy);
            BlobRow {
                digest: known,
                diff_id,
                media_type: match taken {
                    Some(blob) if row.media_type.is_empty() => blob.descriptor(Family::Oci).media_type.to_string(),
                    _ => row.media_type.clone(),
                },
                size_bytes: taken.map_or(row.blob_bytes, |blob| blob.size_bytes),
                urls: row.urls.clone(),
                annotations: Vec::new(),
            }
        });
        let same = blob.as_ref().and_then(|blob| blobs.same.get(&blob.diff_id));
        let variants = same.into_iter().flatten().copied().filter(|digest| blobs.taken.contains_key(digest)).collect();
        let mut record = RecordRow::adopted(state, parents, stamp(row.created_at));
        record.description.clone_from(&row.description);
        record.record_type = row.record_type;
        record.retain = row.retain && record.is_mutable();
        record.blob = blob;
        record.chain_id = row.chain_id;
        record.blob_chain_id = row.blob_chain_id;
        record.image_refs.clone_from(&row.image_refs);
        let uses = UseRow { last_used_at: row.last_used_at.map(stamp), count: row.usage_count };
        Adopted { id: record_id(id), row: record, uses, variants, values: self.values(row) }
    }

    /// What else is kept with a record, by the names that it has here.
    fn values(&self, row: &Row) -> Vec<(String, Value)> {
        let value = |(key, value, index): &(String, String, Option<String>)| {
            if key != CACHE_DIR {
                return (key.clone(), Value { value: value.clone(), index: index.clone() });
            }
            // BuildKit puts a namespace in front, which is empty, and behind it the record that the cache began with.
            let id = value.strip_prefix('/').unwrap_or(value);
            let (id, seed) = match id.rsplit_once(':') {
                Some((id, seed)) if self.rows.contains_key(seed) => (id, format!(":{}", record_id(seed))),
                _ => (id, String::new()),
            };
            (key.clone(), Value { value: id.to_owned(), index: Some(format!("{CACHE_DIR}:{id}{seed}")) })
        };
        row.others.iter().map(value).collect()
    }
}

/// One worker's records on their way.
struct Passage<'a, 'scope, 'env> {
    import: &'a Import<'a>,
    lease: &'a Lease,
    report: &'a mut ImportReport,
    blobs: Blobs,
    trees: Trees,
    adopting: Adopting<'scope, 'env>,
    indexes: Indexes,
    /// By their names, of which the report's order follows.
    told: BTreeMap<String, ImportedItem>,
}

impl Passage<'_, '_, '_> {
    /// The layers of a record's tree, which is unpacked if need be; or why there are none.
    fn stack(&mut self, id: &str, rows: &BTreeMap<String, Row>) -> Result<Result<Vec<LayerId>, String>, ImportError> {
        if let Some(layers) = self.trees.layers(id, rows) {
            return Ok(Ok(layers));
        }
        // The store is asked, which has to have the record.
        self.adopting.wait()?;
        let Import { cache, cancel, .. } = *self.import;
        if !self.trees.lazy.contains(id) {
            return Ok(Ok(cache.known_layers(record_id(id))?));
        }
        let options = RecordOptions { keep_last_used: true, ..RecordOptions::by("import") };
        let layers = cache.get(record_id(id), &options).and_then(|record| record.layers(cancel));
        if cancel.is_canceled() {
            return Err(plies_store::Canceled.into());
        }
        Ok(layers.map_err(|error| format!("the tree of {id}, which it stands on, cannot be made: {}", chain(&error))))
    }

    fn tell(&mut self, id: &str, row: &Row, outcome: Outcome, size_bytes: u64, why: Option<String>) {
        let is_here = matches!(outcome, Outcome::Taken | Outcome::Here);
        let item = ImportedItem {
            kind: "record",
            name: id.to_owned(),
            description: row.description.clone(),
            outcome,
            id: is_here.then(|| record_id(id).to_string()),
            size_bytes,
            why,
        };
        self.told.insert(id.to_owned(), item);
    }
}

/// Blobs that came over, and all that have one tar.
struct Blobs {
    same: HashMap<DiffId, Vec<BlobDigest>>,
    taken: HashMap<BlobDigest, LayerBlob>,
}

/// Records that are written down while the layers of the next ones are taken in, a level after the other.
struct Adopting<'scope, 'env> {
    cache: &'env Accessor,
    scope: &'scope Scope<'scope, 'env>,
    running: Option<ScopedJoinHandle<'scope, Result<(), CacheError>>>,
}

impl Adopting<'_, '_> {
    /// Until all that was started is in the store.
    fn wait(&mut self) -> Result<(), CacheError> {
        let ended = self.running.take().map(|running| running.join().expect("because it does not panic"));
        ended.unwrap_or(Ok(()))
    }

    fn start(&mut self, rows: Vec<Adopted>) -> Result<(), CacheError> {
        self.wait()?;
        let cache = self.cache;
        self.running = Some(self.scope.spawn(move || rows.chunks(ROWS_MAX).try_for_each(|rows| cache.adopt(rows))));
        Ok(())
    }
}

/// What is known of records that came over.
#[derive(Default)]
struct Trees {
    came: HashSet<String>,
    /// Those whose trees are not all layers yet.
    lazy: HashSet<String>,
    /// The layers of those that were taken in as one.
    own: HashMap<String, LayerId>,
}

impl Trees {
    fn note(&mut self, id: &str, row: &Row, is_lazy: bool) {
        if is_lazy || row.parents().any(|parent| self.lazy.contains(parent)) {
            self.lazy.insert(id.to_owned());
        }
        self.came.insert(id.to_owned());
    }

    /// The layers of a record's tree, bottom first, if all of them were taken in now.
    fn layers(&self, id: &str, rows: &BTreeMap<String, Row>) -> Option<Vec<LayerId>> {
        let mut layers = vec![*self.own.get(id)?];
        let mut row = rows.get(id)?;
        while let Some(parent) = &row.parent {
            layers.push(*self.own.get(parent)?);
            row = rows.get(parent)?;
        }
        layers.reverse();
        Some(layers)
    }
}

/// Whether a record that is here has a tree that is not all layers.
fn is_lazy_here(import: &Import<'_>, id: &str) -> Result<bool, ImportError> {
    match import.cache.row(record_id(id)) {
        Ok(row) => Ok(!matches!(row.state, State::Sealed { .. })),
        Err(plies_cache::CacheError::Damaged { .. } | plies_cache::CacheError::NotFound { .. }) => Ok(true),
        Err(other) => Err(other.into()),
    }
}

/// Writes down the keys that are not known yet; how many results that were, or would be.
fn adopt_keys(import: &Import<'_>, keys: &Keys) -> Result<usize, ImportError> {
    let result = |(name, _, record): &(String, String, String)| (keys::key(name), record_id(record));
    if import.options.dry_run {
        let mut new = 0;
        for (key, id) in keys.results.iter().map(result) {
            new += usize::from(!import.cache.results(&key)?.contains(&id));
        }
        return Ok(new);
    }
    // Links first: a result without them would be found by nobody.
    let mut new = 0;
    for links in keys.links.chunks(ROWS_MAX) {
        let links: Vec<(CacheKey, Link, CacheKey)> =
            links.iter().map(|(from, link, to)| (keys::key(from), link.clone(), keys::key(to))).collect();
        new += import.cache.adopt_keys(&[], &links)?;
    }
    for results in keys.results.chunks(ROWS_MAX) {
        let results: Vec<(CacheKey, RecordId)> = results.iter().map(result).collect();
        new += import.cache.adopt_keys(&results, &[])?;
    }
    Ok(new)
}
