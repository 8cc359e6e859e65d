//! Putting right what a check found, cheapest first.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use plies_oci::{BlobDigest, ChainId, ErrorKind};

use super::check::{go_on, hash_file, session_wrong};
use super::{Change, ChangeKind, CheckError, CheckOptions, Finding, Remedy, hex};
use crate::catalogue::schema::{BLOBS, BlobRow, LAYERS, LayerKind, LayerRow, META, META_REPACKING, SNAPSHOTS};
use crate::catalogue::{CatalogueError, Rows as _};
use crate::content::blob_path;
use crate::error::{At as _, FileError};
use crate::layers::{FinishedStage, Sidecar, layer_dir, read_index};
use crate::open::{OCI_LAYOUT, make_dir, sync_dir};
use crate::progress::{Outcome, Silent, Task};
use crate::recover::settle;
use crate::{
    LayerError, LayerId, Lease, LeaseOptions, Resource, SnapshotError, SnapshotId, Snapshots, Store, Transfer,
    TransferError, packed, tree,
};

/// Rows that one transaction changes at most: a closure has all of them in memory.
const CHANGES_MAX: usize = 4096;

/// Why a repair stopped. What it had done stays done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MendError {
    /// Files of the store's own.
    #[error(transparent)]
    File(#[from] FileError),
    /// Rows.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Reading what something was to be restored from, other than that it was damaged too.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] LayerError),
}

impl MendError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
            Self::Check(error) => error.kind(),
            Self::Layer(error) => error.kind(),
        }
    }
}

/// What is lost by a remedy; those that lose less come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Loss {
    /// Rows and modes follow from others.
    Nothing,
    /// It is made again, if there is something to make it of.
    Maybe,
    /// Bytes that nobody knows are moved.
    Place,
    /// Rows.
    Rows,
}

/// Applies remedies. One of these lives through all rounds of a repair: it holds what it restored until whoever needs it
/// does, and remembers what could not be restored.
#[derive(Debug)]
pub struct Mender<'a> {
    store: &'a Store,
    options: &'a CheckOptions<'a>,
    lease: Lease,
    /// Below `lost/`; made when something is put there.
    lost: PathBuf,
    gone: HashSet<Resource>,
}

impl<'a> Mender<'a> {
    /// Begins a repair. What it puts aside goes to `lost/<name>/`.
    ///
    /// # Errors
    /// [`MendError`].
    pub fn new(store: &'a Store, options: &'a CheckOptions<'a>, name: &str) -> Result<Self, MendError> {
        // A lease has an id, as all that is made again.
        if let Some((_, change)) = session_wrong(store)? {
            store.write(|tx| change.apply(tx))?;
        }
        let lease = store.lease(LeaseOptions::process("fsck"))?;
        let lost = store.inner.paths.lost.join(name);
        Ok(Self { store, options, lease, lost, gone: HashSet::new() })
    }

    /// Holds what is restored, until the repair ends.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Ends a repair.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn finish(self) -> Result<(), CatalogueError> {
        self.lease.release()
    }

    fn loss(&self, remedy: &Remedy) -> Option<Loss> {
        match remedy {
            Remedy::Rewrite(_) | Remedy::Permissions(_) | Remedy::Sidecar(_) | Remedy::Layout => Some(Loss::Nothing),
            Remedy::Restore { resource, .. } if self.gone.contains(resource) => Some(Loss::Rows),
            Remedy::Restack { layers, .. } if self.gone.contains(&Snapshots::id_of(layers).into()) => Some(Loss::Rows),
            Remedy::Restore { .. } | Remedy::Restack { .. } => Some(Loss::Maybe),
            Remedy::Quarantine(_) => Some(Loss::Place),
            Remedy::Drop(_) => Some(Loss::Rows),
            Remedy::Advice(_) => None,
        }
    }

    /// Puts right what loses least of what was found, and says of each finding that it dealt with what it did: `rewritten`,
    /// `restored`, `set aside` or `dropped`. Nothing if there is nothing that it can do. What is left is found again by the
    /// next check, and so is what follows from what was done.
    ///
    /// # Errors
    /// [`MendError`].
    pub fn mend(&mut self, found: Vec<Finding>) -> Result<Vec<(Finding, &'static str)>, MendError> {
        let mut done = Vec::new();
        // What can't be restored is tried once, and leaves the rest as it was.
        while done.is_empty() {
            let Some(least) = found.iter().filter_map(|finding| self.loss(&finding.remedy)).min() else { break };
            let now: Vec<&Finding> = found.iter().filter(|finding| self.loss(&finding.remedy) == Some(least)).collect();
            done = match least {
                Loss::Nothing => self.rewrite(&now)?,
                Loss::Maybe => self.restore(&now)?,
                Loss::Place => self.quarantine(&now)?,
                Loss::Rows => self.drop_rows(&now)?,
            };
        }
        Ok(done)
    }

    fn rewrite(&self, findings: &[&Finding]) -> Result<Vec<(Finding, &'static str)>, MendError> {
        let mut changes = Vec::new();
        for finding in findings {
            match &finding.remedy {
                Remedy::Rewrite(rows) => changes.extend(rows.clone()),
                Remedy::Permissions(path) => self.permissions(path)?,
                Remedy::Sidecar(layer) => self.sidecar(*layer)?,
                Remedy::Layout => {
                    let path = self.store.inner.paths.content.join("oci-layout");
                    fs::write(&path, OCI_LAYOUT).at("write", path)?;
                }
                _ => {}
            }
        }
        // Counts as they were found to be right come before what changes them.
        changes.sort_by_key(|change| !matches!(change.kind, ChangeKind::Row { .. }));
        self.apply(&changes)?;
        Ok(findings.iter().map(|finding| ((*finding).clone(), "rewritten")).collect())
    }

    fn apply(&self, changes: &[Change]) -> Result<(), CatalogueError> {
        changes
            .chunks(CHANGES_MAX)
            .try_for_each(|some| self.store.write(|tx| some.iter().try_for_each(|change| change.apply(tx))))
    }

    fn permissions(&self, path: &Path) -> Result<(), FileError> {
        let root = fs::metadata(&self.store.inner.root).at("stat", &self.store.inner.root)?;
        if !path.try_exists().at("stat", path)? {
            make_dir(path)?;
        }
        std::os::unix::fs::lchown(path, Some(root.uid()), Some(root.gid())).at("change owner", path)?;
        let is_dir = fs::symlink_metadata(path).at("stat", path)?.is_dir();
        let mode = if is_dir { 0o700 } else { 0o444 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).at("change mode", path)
    }

    /// Where row and sidecar name different tars, the tree says which is right.
    fn sidecar(&self, id: LayerId) -> Result<(), MendError> {
        let Some(row) = self.store.read(|tx| tx.get(&LAYERS, &id))? else { return Ok(()) };
        if let Some(sidecar) = Sidecar::read(&layer_dir(self.store, id))?
            && let (Some(_), Some(said)) = (row.diff_id, sidecar.row.diff_id)
            && row.diff_id != sidecar.row.diff_id
            && matches!(self.transfer().tree_is(id, said, row.chain_id.is_some()), Ok(true))
        {
            return Ok(self.put_layer(id, &sidecar.row)?);
        }
        Ok(Sidecar::replace(self.store, id, &row)?)
    }

    fn transfer(&self) -> Transfer<'_> {
        Transfer { lease: &self.lease, limits: &self.options.limits, progress: &Silent, cancel: &self.options.cancel }
    }

    /// Layers and blobs first: snapshots are made of them.
    fn restore(&mut self, findings: &[&Finding]) -> Result<Vec<(Finding, &'static str)>, MendError> {
        let mut tried: Vec<(Resource, bool)> = Vec::new();
        let mut wanted: Vec<(Resource, &[LayerId])> = Vec::new();
        for finding in findings {
            match &finding.remedy {
                Remedy::Restore { resource, .. } => wanted.push((*resource, &[])),
                Remedy::Restack { layers, .. } => wanted.push((Snapshots::id_of(layers).into(), layers)),
                _ => {}
            }
        }
        // Of a snapshot, somebody may know the layers.
        wanted.sort_by_key(|(resource, layers)| (rank(*resource), *resource, layers.is_empty()));
        for (resource, layers) in wanted {
            go_on(&self.options.cancel).map_err(CheckError::from)?;
            if tried.last().is_some_and(|(last, restored)| *last == resource && (*restored || layers.is_empty())) {
                continue;
            }
            let task = Task::start(self.options.progress, &format!("restore {resource}"), None);
            let restored = match resource {
                Resource::Blob(digest) => self.restore_blob(digest)?,
                Resource::Layer(id) => self.restore_layer(id)?,
                Resource::Snapshot(id) => self.restore_snapshot(id, layers)?,
                Resource::Active(_) => false,
            };
            task.end(if restored { Outcome::Done } else { Outcome::Failed });
            tried.push((resource, restored));
        }
        let restored: HashSet<Resource> =
            tried.iter().filter(|(_, restored)| *restored).map(|(resource, _)| *resource).collect();
        // Tried once in a repair: what is found damaged again cannot be helped in this way.
        self.gone.extend(tried.into_iter().map(|(resource, _)| resource));
        let of = |remedy: &Remedy| match remedy {
            Remedy::Restore { resource, .. } => Some(*resource),
            Remedy::Restack { layers, .. } => Some(Snapshots::id_of(layers).into()),
            _ => None,
        };
        let done = findings.iter().filter(|finding| of(&finding.remedy).is_some_and(|it| restored.contains(&it)));
        Ok(done.map(|finding| ((*finding).clone(), "restored")).collect())
    }

    fn restore_blob(&self, digest: BlobDigest) -> Result<bool, MendError> {
        let path = blob_path(self.store, digest);
        let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        if !is_file || hash_file(&path, |_| go_on(&self.options.cancel))? != digest {
            let made = match self.transfer().remake_blob(digest) {
                Err(TransferError::Canceled(canceled)) => return Err(CheckError::from(canceled).into()),
                // Its layer is damaged, too.
                other => other.ok().flatten(),
            };
            let Some(mut made) = made else { return Ok(false) };
            let new = self.store.inner.paths.run.join(format!("restored-{}", digest.hex()));
            made.seek(SeekFrom::Start(0)).at("read", &new)?;
            let mut file = File::create(&new).at("create", &new)?;
            io::copy(&mut made, &mut file).at("write", &new)?;
            file.set_permissions(fs::Permissions::from_mode(0o444)).at("change mode", &new)?;
            file.sync_all().at("sync", &new)?;
            if path.try_exists().at("stat", &path)? {
                self.put_aside(&path)?;
            }
            fs::rename(&new, &path).at("rename", &new)?;
            sync_dir(&self.store.inner.paths.blobs)?;
        }
        let size_bytes = fs::metadata(&path).at("stat", &path)?.len();
        self.store.write(|tx| {
            let created = tx.get(&BLOBS, &digest).ok().flatten().map_or(tx.now(), |row| row.created);
            tx.put(&BLOBS, &digest, &BlobRow { size_bytes, created })?;
            tx.lease_hold(self.lease.id(), digest)
        })?;
        Ok(true)
    }

    fn restore_layer(&self, id: LayerId) -> Result<bool, MendError> {
        let dir = layer_dir(self.store, id);
        let row: Option<LayerRow> = match self.store.read(|tx| tx.get(&LAYERS, &id)) {
            Err(error @ CatalogueError::Database { .. }) => return Err(error.into()),
            read => read.ok().flatten(),
        };
        let Some(row) = row else {
            let is_whole = packed::has_tree(&dir)? && read_index(self.store, id).is_ok();
            return match Sidecar::read(&dir)? {
                Some(sidecar) if is_whole => {
                    self.put_layer(id, &sidecar.row)?;
                    Ok(true)
                }
                _ => Ok(false),
            };
        };
        let stage = match self.restage(id, &row) {
            Err(TransferError::Canceled(canceled)) => return Err(CheckError::from(canceled).into()),
            other => other.ok().flatten(),
        };
        let Some(stage) = stage else { return Ok(false) };
        let aside = self.aside(&dir)?;
        // As with every exchange of a layer's directory: whoever dies in between leaves a row for the next opening to settle.
        self.store.write(|tx| tx.put(&META, &META_REPACKING.to_owned(), &u64::from_be_bytes(*id.as_bytes())))?;
        let replaced = stage.replace(self.store, id, &row, &aside);
        settle(self.store).map_err(LayerError::from)?;
        self.put_layer(id, &replaced?)?;
        Ok(true)
    }

    fn restage(&self, id: LayerId, row: &LayerRow) -> Result<Option<FinishedStage>, TransferError> {
        let of_snapshot = |wanted: &dyn Fn(&crate::catalogue::schema::SnapshotRow) -> bool| {
            let rows = self.store.read(|tx| tx.all(&SNAPSHOTS))?;
            Ok::<_, CatalogueError>(rows.into_iter().map(|(_, row)| row).find(|row| wanted(row)))
        };
        match (row.kind, row.diff_id, row.chain_id) {
            (LayerKind::FixUp, ..) => match of_snapshot(&|snapshot| snapshot.fixup == Some(id))? {
                Some(snapshot) => Ok(self.store.snapshots().fix_up_of(&snapshot.layers)?),
                None => Ok(None),
            },
            (LayerKind::Full, Some(diff_id), None) => self.transfer().restage(id, diff_id),
            (LayerKind::Full, Some(diff_id), Some(chain)) => {
                let below = |layers: &[LayerId]| {
                    let at = layers.iter().position(|layer| *layer == id)?;
                    Some(layers[..at].to_vec())
                };
                let is_of_chain = |snapshot: &crate::catalogue::schema::SnapshotRow| {
                    let below = below(&snapshot.layers)?;
                    let diff_ids = below.iter().map(|layer| self.store.layers().info(*layer).ok()?.diff_id);
                    let parent = diff_ids.collect::<Option<Vec<_>>>().map(|diff_ids| ChainId::of(&diff_ids))?;
                    (ChainId::extend(parent, diff_id) == chain).then_some(())
                };
                match of_snapshot(&|snapshot| is_of_chain(snapshot).is_some())? {
                    Some(snapshot) => {
                        self.transfer().restage_over(&below(&snapshot.layers).unwrap_or_default(), diff_id, chain)
                    }
                    None => Ok(None),
                }
            }
            // A squash is made again when somebody mounts; of a tree that never was a tar there is no other copy.
            (LayerKind::Squash(_), ..) | (LayerKind::Full, None, _) => Ok(None),
        }
    }

    /// What follows from the row is the next round's.
    fn put_layer(&self, id: LayerId, row: &LayerRow) -> Result<(), CatalogueError> {
        self.store.write(|tx| {
            tx.put(&LAYERS, &id, row)?;
            tx.lease_hold(self.lease.id(), id)
        })
    }

    fn restore_snapshot(&self, id: SnapshotId, layers: &[LayerId]) -> Result<bool, MendError> {
        if self.lease.hold_if_present(id)? {
            return Ok(true);
        }
        if layers.is_empty() {
            return Ok(false);
        }
        match self.store.snapshots().ensure(layers, &self.lease) {
            Ok(made) => Ok(made == id),
            Err(SnapshotError::Catalogue(error @ CatalogueError::Database { .. })) => Err(error.into()),
            Err(_) => Ok(false),
        }
    }

    fn quarantine(&self, findings: &[&Finding]) -> Result<Vec<(Finding, &'static str)>, MendError> {
        for finding in findings {
            if let Remedy::Quarantine(path) = &finding.remedy {
                self.put_aside(path)?;
            }
        }
        Ok(findings.iter().map(|finding| ((*finding).clone(), "set aside")).collect())
    }

    /// A free place in `lost/` for what is at `path`.
    fn aside(&self, path: &Path) -> Result<PathBuf, FileError> {
        let below = path.strip_prefix(&self.store.inner.root).unwrap_or(path);
        let mut target = self.lost.join(below);
        let mut n = 0;
        while fs::symlink_metadata(&target).is_ok() {
            n += 1;
            target = self.lost.join(format!("{}.{n}", below.display()));
        }
        make_dir(target.parent().expect("because it lies below lost/"))?;
        Ok(target)
    }

    fn put_aside(&self, path: &Path) -> Result<(), FileError> {
        let target = self.aside(path)?;
        fs::rename(path, &target).at("rename", path)?;
        sync_dir(target.parent().expect("because it lies below lost/"))
    }

    fn drop_rows(&self, findings: &[&Finding]) -> Result<Vec<(Finding, &'static str)>, MendError> {
        let mut changes = Vec::new();
        for finding in findings {
            match &finding.remedy {
                Remedy::Drop(rows) => changes.extend(rows.clone()),
                Remedy::Restore { otherwise, .. } | Remedy::Restack { otherwise, .. } => {
                    changes.extend(otherwise.clone())
                }
                _ => {}
            }
        }
        self.keep_rows(&changes)?;
        self.apply(&changes)?;
        Ok(findings.iter().map(|finding| ((*finding).clone(), "dropped")).collect())
    }

    /// Copies of rows that are about to go or to change, a JSON object a line.
    fn keep_rows(&self, changes: &[Change]) -> Result<(), MendError> {
        let mut text = String::new();
        self.store.write(|tx| {
            for change in changes {
                if let ChangeKind::Row { table, key, .. } = &change.kind
                    && let Some(row) = tx.get_raw(table, key)?
                {
                    let (key, row) = (hex(key), hex(&row));
                    text.push_str(&format!("{{\"table\":\"{table}\",\"key\":\"{key}\",\"row\":\"{row}\"}}\n"));
                }
            }
            Ok::<_, CatalogueError>(())
        })?;
        if text.is_empty() {
            return Ok(());
        }
        make_dir(&self.lost)?;
        let path = self.lost.join("rows.jsonl");
        let mut file = File::options().create(true).append(true).open(&path).at("open", &path)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).at("write", &path)?;
        Ok(sync_dir(&self.lost)?)
    }
}

/// Removes what repairs have put aside.
pub(crate) fn empty_lost(store: &Store) -> Result<u64, FileError> {
    let lost = &store.inner.paths.lost;
    if !lost.try_exists().at("stat", lost)? {
        return Ok(0);
    }
    let usage = tree::measure(tree::open_own(lost)?).at("measure", lost)?;
    tree::remove(lost)?;
    Ok(usage.size_bytes)
}

fn rank(resource: Resource) -> u8 {
    match resource {
        Resource::Blob(_) => 0,
        Resource::Layer(_) => 1,
        Resource::Snapshot(_) => 2,
        Resource::Active(_) => 3,
    }
}
