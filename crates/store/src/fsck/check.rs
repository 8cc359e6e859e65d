//! Does what the store's own tables say agree with itself, and with what is on disk?

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, Metadata};
use std::io::{self, Read as _};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use plies_archive::Limits;
use plies_oci::{BlobDigest, ErrorKind, Sha256Hasher};

use super::rebuild::last_session;
use super::{Change, ChangeKind, Findings, Remedy};
use crate::catalogue::schema::{
    ACTIVES, ActiveRow, BLOBS, BlobRow, EDGES, HOLDS, Kind, LAYERS, LAYERS_BY_CHAIN, LAYERS_BY_DIFF, LEASE_HOLDS,
    LEASES, LOOSE, LayerKind, LayerRow, META, META_PACKS, META_SESSION, REFS, SEALING, SNAPSHOTS, SQUASHES,
    SnapshotRow, TOTALS, TRASH, TotalRow,
};
use crate::catalogue::{CatalogueError, ReadTx, Rows as _};
use crate::content::blob_path;
use crate::error::{At as _, FileError};
use crate::layers::{Sidecar, layer_dir, open_root, read_index};
use crate::open::OCI_LAYOUT;
use crate::progress::{Outcome, Progress, Silent, Task};
use crate::recover::unlisted;
use crate::snapshots::snapshot_id;
use crate::transfer;
use crate::{
    ActiveId, Cancel, Canceled, LayerId, LeaseOptions, Resource, SnapshotId, Store, Transfer, TransferError, packed,
    tree,
};

/// How deep to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Depth {
    /// The store's own directories, and names in them against rows. Opens no blob and no layer.
    Quick,
    /// All references both ways, all counts and sums; of blobs their length and mode, of layers what lies beside the tree.
    #[default]
    Graph,
    /// Also what the bytes say: blobs hashed, layers' tars made and hashed, trees counted again.
    Deep(Sample),
}

/// A part of all blobs and layers, by their IDs: the same part for the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Of a hundred parts, the first one that is taken.
    pub from: u8,
    /// How many of a hundred parts are taken.
    pub count: u8,
}

impl Sample {
    /// Everything.
    pub const ALL: Sample = Sample { from: 0, count: 100 };

    /// Whether it takes what has this ID.
    pub(crate) fn takes(self, id: &[u8]) -> bool {
        // Ids of layers count up: only a digest spreads them.
        let digest = BlobDigest::of(id);
        let part = u16::from(digest.as_bytes()[0]) << 8 | u16::from(digest.as_bytes()[1]);
        let part = part % 100;
        (part + 100 - u16::from(self.from) % 100) % 100 < u16::from(self.count)
    }
}

/// How to check.
#[derive(Clone)]
pub struct CheckOptions<'a> {
    /// How deep to look.
    pub depth: Depth,
    /// What archives may ask for, where blobs are unpacked to compare.
    pub limits: Limits,
    /// Told of what is read.
    pub progress: &'a dyn Progress,
    /// Asked whether to go on.
    pub cancel: Cancel,
}

impl CheckOptions<'_> {
    /// As deep as this, with nobody watching.
    pub fn new(depth: Depth) -> Self {
        Self { depth, limits: Limits::default(), progress: &Silent, cancel: Cancel::new() }
    }

    /// Everything there is to check.
    pub fn deep() -> Self {
        Self::new(Depth::Deep(Sample::ALL))
    }
}

impl std::fmt::Debug for CheckOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckOptions").field("depth", &self.depth).finish_non_exhaustive()
    }
}

/// Why a check could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// The database itself. Rows that can't be read are findings.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Making a layer's tar, for a reason that is not the layer's.
    #[error(transparent)]
    Transfer(Box<TransferError>),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl CheckError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
            Self::Transfer(error) => error.kind(),
            Self::Canceled(error) => error.kind(),
        }
    }
}

/// How many numbers of sessions are left out when the last one is not known: more commands than will have begun since the
/// newest directory was made that is still here. Ids of what has gone may stand in rows of other crates, which would take what
/// is new for it. 2^32 numbers are enough for four thousand such repairs.
const SESSIONS_SKIPPED: u64 = 1 << 20;

/// In which way `meta`/`session` is no number from which ids can be made that were never given out, and what makes it one.
/// Nothing about a row of a later version.
pub(super) fn session_wrong(store: &Store) -> Result<Option<(String, Change)>, CheckError> {
    let read = store.read(|tx| tx.get(&META, &META_SESSION.to_owned()));
    let given = last_session(&store.inner.paths)?;
    let what = match read {
        Ok(session) if session.unwrap_or(0) < given => {
            format!("is {}, but session {given} has given out ids", session.unwrap_or(0))
        }
        Ok(Some(session)) if session >= u32::MAX.into() => format!("is {session}, and a store sees fewer sessions"),
        Err(error @ CatalogueError::Damaged { .. }) => error.to_string(),
        Ok(_) | Err(CatalogueError::RowTooNew { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some((what, Change::of(ChangeKind::Session(session_after(given))))))
}

/// The number to go on with where it is only known that this session was not the last.
pub(super) fn session_after(given: u64) -> u64 {
    (given + SESSIONS_SKIPPED).min(u64::from(u32::MAX) - 1)
}

pub(crate) fn check(store: &Store, options: &CheckOptions<'_>) -> Result<Findings, CheckError> {
    let mut checker = Checker {
        store,
        options,
        findings: Findings::default(),
        totals: BTreeMap::new(),
        owner: (0, 0),
        deep: Vec::new(),
    };
    checker.directories()?;
    checker.tables()?;
    checker.unlisted()?;
    checker.data()?;
    Ok(checker.findings)
}

struct Checker<'a> {
    store: &'a Store,
    options: &'a CheckOptions<'a>,
    findings: Findings,
    totals: BTreeMap<Kind, TotalRow>,
    /// User and group that the root belongs to.
    owner: (u32, u32),
    /// Layers whose files seem to be all there, to be read.
    deep: Vec<(LayerId, LayerRow)>,
}

impl Checker<'_> {
    fn drops(&self, table: &crate::Table<LayerId, LayerRow>, id: LayerId) -> Vec<Change> {
        vec![Change::remove(table, &id)]
    }

    fn is_quick(&self) -> bool {
        self.options.depth == Depth::Quick
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.store.inner.root).unwrap_or(path).display().to_string()
    }

    /// The store's own directories are there, and for their owner alone.
    fn directories(&mut self) -> Result<(), CheckError> {
        let (root, paths) = (&self.store.inner.root, &self.store.inner.paths);
        let meta = fs::metadata(root).at("stat", root)?;
        self.owner = (meta.uid(), meta.gid());
        let blobs = root.join("content/blobs");
        let own = [&paths.catalog, &paths.content, &blobs, &paths.blobs, &paths.ingest, &paths.layers, &paths.stage];
        for path in own.into_iter().chain([&paths.active, &paths.mounts, &paths.run]) {
            self.permissions("directory-wrong", path, 0o700, fs::symlink_metadata(path))?;
        }
        let layout = paths.content.join("oci-layout");
        if fs::read(&layout).ok().as_deref() != Some(OCI_LAYOUT) {
            self.findings.add(
                "oci-layout-wrong",
                "content/oci-layout",
                "does not say that this is a layout",
                Remedy::Layout,
            );
        }
        Ok(())
    }

    /// A file or directory of the store's own has its mode and owner.
    fn permissions(
        &mut self,
        code: &'static str,
        path: &Path,
        mode: u32,
        found: io::Result<Metadata>,
    ) -> Result<(), CheckError> {
        let what = match found {
            Ok(meta) if meta.permissions().mode() & 0o7777 != mode => {
                format!("has mode {:o}, not {mode:o}", meta.permissions().mode() & 0o7777)
            }
            Ok(meta) if (meta.uid(), meta.gid()) != self.owner => {
                format!("belongs to {}:{}, not to the owner of the store", meta.uid(), meta.gid())
            }
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => "is missing".to_owned(),
            Err(error) => return Err(FileError::new("stat", path, error).into()),
        };
        self.findings.add(code, self.relative(path), what, Remedy::Permissions(path.to_owned()));
        Ok(())
    }

    fn count(&mut self, kind: Kind, row: TotalRow) {
        self.totals.entry(kind).or_default().add(row);
    }

    /// One view of all tables.
    fn tables(&mut self) -> Result<(), CheckError> {
        let store = self.store;
        store.read(|tx| {
            let blobs = self.findings.rows(tx, &BLOBS, restored)?;
            let layers = self.findings.rows(tx, &LAYERS, restored)?;
            let actives = self.findings.rows_or_drop(tx, &ACTIVES)?;
            for (digest, row) in &blobs {
                self.count(Kind::Blobs, row.total());
                self.blob(*digest, row)?;
            }
            for (id, row) in &layers {
                self.count(Kind::Layers, row.total());
                self.totals.entry(Kind::Sidecars).or_default().add(row.sidecars());
                self.layer(*id, row)?;
            }
            for (id, row) in &actives {
                self.count(Kind::Actives, row.total());
                self.active(tx, *id, row)?;
            }
            self.trash(tx)?;
            self.totals(tx)?;
            if self.is_quick() {
                return Ok(());
            }
            self.layer_indexes(tx, &layers)?;
            let snapshots = self.findings.rows_or_drop(tx, &SNAPSHOTS)?;
            self.snapshots(tx, &snapshots)?;
            self.meta(tx, &layers)?;
            self.references(tx)?;
            transfer::check_known(tx, &mut self.findings)?;
            Ok(())
        })
    }

    fn blob(&mut self, digest: BlobDigest, row: &BlobRow) -> Result<(), CheckError> {
        let path = blob_path(self.store, digest);
        let lost = || Remedy::Restore { resource: digest.into(), otherwise: vec![Change::remove(&BLOBS, &digest)] };
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.findings.add("blob-missing", Resource::from(digest), "has a row and no bytes", lost());
            }
            Err(error) => return Err(FileError::new("stat", path, error).into()),
            Ok(meta) if !meta.is_file() => {
                self.findings.add("blob-damaged", Resource::from(digest), "is no file", lost());
            }
            Ok(meta) if meta.len() != row.size_bytes => {
                let what = format!("has {} bytes, not {}", meta.len(), row.size_bytes);
                self.findings.add("blob-size-wrong", Resource::from(digest), what, lost());
            }
            Ok(meta) => {
                self.permissions("blob-mode-wrong", &path, 0o444, Ok(meta))?;
                if let Depth::Deep(sample) = self.options.depth
                    && sample.takes(digest.as_bytes())
                {
                    let actual = self.hash(&path, digest, row.size_bytes)?;
                    if actual != digest {
                        let what = format!("has bytes that hash to {actual}");
                        self.findings.add("blob-damaged", Resource::from(digest), what, lost());
                    }
                }
            }
        }
        Ok(())
    }

    fn hash(&self, path: &Path, digest: BlobDigest, size_bytes: u64) -> Result<BlobDigest, CheckError> {
        let task = Task::start(self.options.progress, &format!("read blob {digest}"), Some(size_bytes));
        let actual = hash_file(path, |bytes| {
            task.advance(bytes as u64);
            go_on(&self.options.cancel)
        })?;
        task.end(Outcome::Done);
        Ok(actual)
    }

    fn layer(&mut self, id: LayerId, row: &LayerRow) -> Result<(), CheckError> {
        let dir = layer_dir(self.store, id);
        let otherwise = self.drops(&LAYERS, id);
        let lost = || Remedy::Restore { resource: id.into(), otherwise: otherwise.clone() };
        let subject = Resource::from(id);
        match fs::symlink_metadata(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.findings.add("layer-missing", subject, "has a row and no directory", lost());
                return Ok(());
            }
            found => self.permissions("layer-mode-wrong", &dir, 0o700, found)?,
        }
        if self.is_quick() {
            return Ok(());
        }
        let before = self.findings.found.len();
        if !packed::has_tree(&dir)? {
            self.findings.add("layer-tree-missing", subject, "has a directory without its tree", lost());
        } else if let Err(error) = read_index(self.store, id) {
            self.findings.add("layer-index-damaged", subject, error.to_string(), lost());
        } else if row.tar_split
            && !packed::is_packed(&dir)?
            && !matches!(self.store.layers().tar_split(id), Ok(Some(_)))
        {
            self.findings.add("layer-tar-split-missing", subject, "cannot give its tar back without it", lost());
        }
        if before == self.findings.found.len()
            && let Depth::Deep(sample) = self.options.depth
            && sample.takes(id.as_bytes())
        {
            self.deep.push((id, row.clone()));
        }
        match Sidecar::read(&dir)? {
            // It may already know a diff ID that a crash kept from the row.
            Some(sidecar) if sidecar.says(row) => {}
            Some(_) => {
                self.findings.add(
                    "layer-sidecar-wrong",
                    subject,
                    "has a layer.json that says otherwise",
                    Remedy::Sidecar(id),
                );
            }
            None => {
                self.findings.add("layer-sidecar-missing", subject, "has no readable layer.json", Remedy::Sidecar(id));
            }
        }
        Ok(())
    }

    /// The tables by which layers are found.
    fn layer_indexes(&mut self, tx: &ReadTx, layers: &[(LayerId, LayerRow)]) -> Result<(), CatalogueError> {
        let (mut by_diff, mut by_chain, mut squashes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (id, row) in layers {
            match (row.diff_id, row.chain_id) {
                (_, Some(chain_id)) => drop(by_chain.insert((chain_id, *id), ())),
                (Some(diff_id), None) => drop(by_diff.insert((diff_id, *id), ())),
                (None, None) => {}
            }
            if let LayerKind::Squash(list) = row.kind {
                squashes.insert(list, *id);
            }
        }
        self.findings.compare(tx, "layers-by-diff-wrong", &LAYERS_BY_DIFF, by_diff)?;
        self.findings.compare(tx, "layers-by-chain-wrong", &LAYERS_BY_CHAIN, by_chain)?;
        self.findings.compare(tx, "squashes-wrong", &SQUASHES, squashes)
    }

    fn active(&mut self, tx: &ReadTx, id: ActiveId, row: &ActiveRow) -> Result<(), CheckError> {
        let subject = Resource::from(id);
        let otherwise = vec![Change::remove(&ACTIVES, &id)];
        // The directory of a volatile one is made when it is needed, and goes with its process.
        if row.sealed.is_none() && !row.volatile {
            let dir = self.store.inner.paths.active.join(id.to_string());
            match fs::symlink_metadata(dir.join("fs")) {
                Ok(_) => self.permissions("active-mode-wrong", &dir, 0o700, fs::symlink_metadata(&dir))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let remedy = Remedy::Drop(otherwise.clone());
                    self.findings.add("active-missing", subject, "has a row and no upper directory", remedy);
                }
                Err(error) => return Err(FileError::new("stat", dir, error).into()),
            }
        }
        for needs in row.base.map(Resource::from).into_iter().chain(row.sealed.map(Resource::from)) {
            self.needs(tx, "active-base-missing", subject, needs, otherwise.clone())?;
        }
        Ok(())
    }

    fn snapshots(&mut self, tx: &ReadTx, snapshots: &[(SnapshotId, SnapshotRow)]) -> Result<(), CatalogueError> {
        for (id, row) in snapshots {
            let drop = vec![Change::remove(&SNAPSHOTS, id)];
            if snapshot_id(&row.layers) != *id {
                let what = "is not the snapshot of the layers that it lists";
                self.findings.add("snapshot-id-wrong", Resource::from(*id), what, Remedy::Drop(drop));
                continue;
            }
            for layer in row.layers.iter().chain(&row.fixup) {
                self.needs(tx, "snapshot-layer-missing", (*id).into(), (*layer).into(), drop.clone())?;
            }
        }
        Ok(())
    }

    /// What a row names is there, and kept by it.
    fn needs(
        &mut self,
        tx: &ReadTx,
        code: &'static str,
        subject: Resource,
        needed: Resource,
        otherwise: Vec<Change>,
    ) -> Result<(), CatalogueError> {
        if !tx.has(needed)? {
            let remedy = Remedy::Restore { resource: needed, otherwise };
            self.findings.add(code, subject, format!("needs {needed}, which is not in the store"), remedy);
        } else if !tx.contains(&EDGES, &(subject, needed))? {
            let remedy = Remedy::Rewrite(vec![Change::of(ChangeKind::AddEdge(subject, needed))]);
            self.findings.add("edge-missing", subject, format!("does not keep {needed}, which it needs"), remedy);
        }
        Ok(())
    }

    /// What the store knows of itself.
    fn meta(&mut self, tx: &ReadTx, layers: &[(LayerId, LayerRow)]) -> Result<(), CheckError> {
        let session = session_wrong(self.store)?;
        let mut has_packed = false;
        for (id, _) in layers {
            has_packed |= packed::is_packed(&layer_dir(self.store, *id))?;
        }
        let rows = self.findings.rows(tx, &META, |key, drop| match (key.as_str(), &session) {
            (META_SESSION, Some((_, change))) => Remedy::Rewrite(vec![change.clone()]),
            (META_PACKS, _) => Remedy::Rewrite(vec![Change::put(&META, &key, &u64::from(has_packed))]),
            _ => Remedy::Rewrite(drop),
        })?;
        let is_readable = rows.iter().any(|(key, _)| key == META_SESSION);
        if let Some((what, change)) = session
            && (is_readable || !tx.contains(&META, &META_SESSION.to_owned())?)
        {
            self.findings.add("session-behind", "meta/session", what, Remedy::Rewrite(vec![change]));
        }
        Ok(())
    }

    /// Everything that names a resource names one that is there, and is counted.
    fn references(&mut self, tx: &ReadTx) -> Result<(), CatalogueError> {
        let leases: HashSet<_> = self.findings.rows_or_drop(tx, &LEASES)?.into_iter().map(|(id, _)| id).collect();
        let mut counted: BTreeMap<Resource, u64> = BTreeMap::new();
        for ((owner, held), ()) in self.findings.rows_or_drop(tx, &HOLDS)? {
            *counted.entry(held).or_default() += 1;
            if !tx.has(held)? {
                let remedy = Remedy::Restore { resource: held, otherwise: vec![Change::unhold(&owner, held)] };
                self.findings.add("hold-dangling", &owner, format!("holds {held}, which is not in the store"), remedy);
            }
        }
        for ((lease, held), ()) in self.findings.rows_or_drop(tx, &LEASE_HOLDS)? {
            *counted.entry(held).or_default() += 1;
            let let_go = vec![Change::of(ChangeKind::LetGo(lease, held))];
            if !leases.contains(&lease) && !tx.contains(&LEASES, &lease)? {
                let what = format!("holds {held} and does not exist");
                self.findings.add("lease-missing", format!("lease {lease}"), what, Remedy::Rewrite(let_go));
            } else if !tx.has(held)? {
                let remedy = Remedy::Restore { resource: held, otherwise: let_go };
                let what = format!("holds {held}, which is not in the store");
                self.findings.add("lease-dangling", format!("lease {lease}"), what, remedy);
            }
        }
        let mut edges: BTreeMap<Resource, Vec<Resource>> = BTreeMap::new();
        for ((from, to), ()) in self.findings.rows_or_drop(tx, &EDGES)? {
            *counted.entry(to).or_default() += 1;
            edges.entry(from).or_default().push(to);
            let cut = vec![Change::of(ChangeKind::RemoveEdge(from, to))];
            if !tx.has(from)? {
                let remedy = Remedy::Restore { resource: from, otherwise: cut };
                self.findings.add("edge-dangling", from, format!("keeps {to} and is not in the store"), remedy);
            } else if !tx.has(to)? {
                let remedy = Remedy::Restore { resource: to, otherwise: cut };
                self.findings.add("edge-dangling", from, format!("keeps {to}, which is not in the store"), remedy);
            }
        }
        for ring in rings(&edges) {
            let cut = vec![Change::of(ChangeKind::RemoveEdge(ring.0, ring.1))];
            let what = format!("keeps {}, which keeps it: neither would ever be collected", ring.1);
            self.findings.add("edge-cycle", ring.0, what, Remedy::Rewrite(cut));
        }
        let mut loose = BTreeMap::new();
        let mut judge = |resource: Option<Resource>| {
            loose.extend(resource.filter(|resource| !counted.contains_key(resource)).map(|resource| (resource, ())));
            ControlFlow::Continue(())
        };
        tx.scan_each(&BLOBS, |id, _| judge(id.map(Into::into)))?;
        tx.scan_each(&LAYERS, |id, _| judge(id.map(Into::into)))?;
        tx.scan_each(&SNAPSHOTS, |id, _| judge(id.map(Into::into)))?;
        tx.scan_each(&ACTIVES, |id, _| judge(id.map(Into::into)))?;
        self.findings.compare(tx, "refs-wrong", &REFS, counted)?;
        self.findings.compare(tx, "loose-wrong", &LOOSE, loose)
    }

    fn trash(&mut self, tx: &ReadTx) -> Result<(), CatalogueError> {
        for (resource, size_bytes) in self.findings.rows(tx, &TRASH, |_, changes| Remedy::Rewrite(changes))? {
            self.count(Kind::Trash, TotalRow::one(size_bytes, 0));
            if tx.has(resource)? {
                let remedy = Remedy::Rewrite(vec![Change::remove(&TRASH, &resource)]);
                self.findings.add("trash-wrong", resource, "is both there and thrown away", remedy);
            }
        }
        // Opening has dealt with all of them.
        for (active, layer) in self.findings.rows(tx, &SEALING, |_, changes| Remedy::Rewrite(changes))? {
            let remedy = Remedy::Rewrite(vec![Change::remove(&SEALING, &active)]);
            self.findings.add(
                "sealing-stale",
                Resource::from(active),
                format!("is not becoming layer {layer}"),
                remedy,
            );
        }
        Ok(())
    }

    fn totals(&mut self, tx: &ReadTx) -> Result<(), CatalogueError> {
        let mut should = std::mem::take(&mut self.totals);
        should.retain(|_, total| *total != TotalRow::default());
        // A kind of which there is nothing may have a row of zeroes, or none.
        for kind in Kind::ALL {
            if !should.contains_key(&kind)
                && tx.get(&TOTALS, &kind).ok().flatten().is_some_and(|total| total == TotalRow::default())
            {
                should.insert(kind, TotalRow::default());
            }
        }
        self.findings.compare(tx, "totals-wrong", &TOTALS, should)
    }

    /// Bytes that no row names.
    fn unlisted(&mut self) -> Result<(), CheckError> {
        let paths = &self.store.inner.paths;
        for (code, dir) in
            [("blob-unlisted", &paths.blobs), ("layer-unlisted", &paths.layers), ("active-unlisted", &paths.active)]
        {
            // That it is missing was said.
            if !dir.try_exists().at("stat", dir)? {
                continue;
            }
            for path in unlisted::<CheckError>(self.store, dir)? {
                let subject = self.relative(&path);
                self.findings.add(code, subject, "has no row", Remedy::Quarantine(path));
            }
        }
        let orphans = self.store.orphans().map_err(|error| match error {
            crate::UsageError::File(error) => CheckError::File(error),
            crate::UsageError::Catalogue(error) => CheckError::Catalogue(error),
        })?;
        let listed_above = [&paths.blobs, &paths.layers, &paths.active];
        for (path, _) in orphans {
            if listed_above.iter().any(|dir| path.parent() == Some(dir.as_path())) {
                continue;
            }
            let subject = self.relative(&path);
            self.findings.add("stranger", subject, "is no part of a store", Remedy::Quarantine(path));
        }
        Ok(())
    }

    /// What the trees of layers say. That one is right is written down, if it was another program's word.
    fn data(&mut self) -> Result<(), CheckError> {
        if self.deep.is_empty() {
            return Ok(());
        }
        let lease = match self.store.lease(LeaseOptions::process("fsck")) {
            // The row that ids come from is among what was found; a repair reads when it has put that right.
            Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => return Ok(()),
            lease => lease?,
        };
        let transfer =
            Transfer { lease: &lease, limits: &self.options.limits, progress: &Silent, cancel: &self.options.cancel };
        for (id, row) in std::mem::take(&mut self.deep) {
            go_on(&self.options.cancel)?;
            let name = format!("read layer {id}");
            let task = Task::start(self.options.progress, &name, Some(row.usage.content_bytes));
            self.tree(id, &row, &transfer)?;
            task.advance(row.usage.content_bytes);
            task.end(Outcome::Done);
        }
        Ok(lease.release()?)
    }

    fn tree(&mut self, id: LayerId, row: &LayerRow, transfer: &Transfer<'_>) -> Result<(), CheckError> {
        let lost = || Remedy::Restore { resource: id.into(), otherwise: vec![Change::remove(&LAYERS, &id)] };
        let subject = Resource::from(id);
        let dir = layer_dir(self.store, id);
        if packed::is_packed(&dir)? {
            return self.packed(id, row, &dir);
        }
        let root = match open_root(self.store, id) {
            Ok(root) => root,
            Err(_) => return Ok(()),
        };
        if let Ok(index) = read_index(self.store, id)
            && let Some(path) = index.implied().find(|path| tree::open_dir(&root, path).is_err())
        {
            let what = format!("lists a directory {path} in its index that its tree does not have");
            self.findings.add("layer-index-wrong", subject, what, lost());
            return Ok(());
        }
        let mut row = row.clone();
        if let Some(diff_id) = row.diff_id {
            let judged = transfer.tree_is(id, diff_id, row.chain_id.is_some());
            match judged {
                Ok(true) if row.unverified => {
                    row.unverified = false;
                    let set = self.store.layers().set_verified(id);
                    set.map_err(|error| CheckError::Transfer(Box::new(error.into())))?;
                }
                Ok(true) => {}
                Ok(false) => {
                    let what = format!("has a tree whose tar does not have diff ID {diff_id}");
                    self.findings.add("layer-tree-damaged", subject, what, lost());
                    return Ok(());
                }
                Err(TransferError::Canceled(canceled)) => return Err(canceled.into()),
                Err(
                    error @ (TransferError::Assemble { .. } | TransferError::Diff { .. } | TransferError::Read { .. }),
                ) => {
                    let what = format!("does not give its tar back: {error}");
                    self.findings.add("layer-tree-damaged", subject, what, lost());
                    return Ok(());
                }
                Err(error) => return Err(CheckError::Transfer(Box::new(error))),
            }
        }
        let counted = tree::measure(root).at("measure", dir)?;
        self.usage(id, &row, counted);
        Ok(())
    }

    /// As [`Checker::tree`], for a packed layer: its tar is hashed, and all that follows from it is made again.
    fn packed(&mut self, id: LayerId, row: &LayerRow, dir: &Path) -> Result<(), CheckError> {
        let lost = || Remedy::Restore { resource: id.into(), otherwise: vec![Change::remove(&LAYERS, &id)] };
        let examined = packed::examine(dir, &self.options.limits)?;
        let wrong = match examined.sound {
            _ if row.diff_id != Some(examined.diff_id) => {
                Some(("layer-tree-damaged", format!("has a tar with diff ID {}", examined.diff_id)))
            }
            None => Some(("layer-tree-damaged", "has an EROFS index that is not its tar's".to_owned())),
            Some((_, index)) if read_index(self.store, id).is_ok_and(|kept| kept != index) => {
                Some(("layer-index-wrong", "lists other directories in its index than its tar implies".to_owned()))
            }
            Some((counted, _)) => {
                self.usage(id, row, counted);
                None
            }
        };
        if let Some((code, what)) = wrong {
            self.findings.add(code, Resource::from(id), what, lost());
        }
        Ok(())
    }

    /// Holds what a layer was found to cost against its row.
    fn usage(&mut self, id: LayerId, row: &LayerRow, counted: plies_archive::Usage) {
        let kept: plies_archive::Usage = row.usage.into();
        if !is_what_it_costs(kept, counted) {
            let what = format!("costs {counted:?}, its row says {kept:?}");
            let put = vec![Change::put(&LAYERS, &id, &LayerRow { usage: counted.into(), ..row.clone() })];
            // Bytes on disk are the file system's; other files are not what was published.
            let is_same = (counted.inodes, counted.content_bytes) == (kept.inodes, kept.content_bytes);
            let remedy = match is_same || row.diff_id.is_none() {
                true => Remedy::Rewrite(put),
                false => Remedy::Restore { resource: id.into(), otherwise: put },
            };
            self.findings.add("layer-usage-wrong", Resource::from(id), what, remedy);
        }
    }
}

/// The largest block that ext4, XFS and Btrfs have as a rule, in bytes: a page of most machines.
const BLOCK_BYTES: u64 = 4096;

/// Whether a layer that was found to cost `counted` is the one that cost `kept` when it was published. Files are the same; the
/// bytes on disk may differ by a block for each: ext4 adds blocks of its own to a file of many pieces, and while it writes a
/// file back, some count neither as waiting nor as written for a moment.
fn is_what_it_costs(kept: plies_archive::Usage, counted: plies_archive::Usage) -> bool {
    (kept.inodes, kept.content_bytes) == (counted.inodes, counted.content_bytes)
        && kept.size_bytes.abs_diff(counted.size_bytes) <= counted.inodes.saturating_mul(BLOCK_BYTES)
}

pub(super) fn go_on(cancel: &Cancel) -> Result<(), Canceled> {
    if cancel.is_canceled() { Err(Canceled) } else { Ok(()) }
}

/// A row of something with bytes: those may say what it said.
fn restored(id: impl Into<Resource>, otherwise: Vec<Change>) -> Remedy {
    Remedy::Restore { resource: id.into(), otherwise }
}

/// Edges that close a ring: one of each.
fn rings(edges: &BTreeMap<Resource, Vec<Resource>>) -> Vec<(Resource, Resource)> {
    let mut closing = Vec::new();
    let mut done: BTreeSet<Resource> = BTreeSet::new();
    let mut open: BTreeSet<Resource> = BTreeSet::new();
    for start in edges.keys() {
        // A path, with the place in the edges of each on it.
        let mut path: Vec<(Resource, usize)> = Vec::new();
        if done.contains(start) {
            continue;
        }
        open.insert(*start);
        path.push((*start, 0));
        while let Some((at, next)) = path.last_mut() {
            let at = *at;
            match edges.get(&at).and_then(|to| to.get(*next)) {
                Some(to) => {
                    *next += 1;
                    if open.contains(to) {
                        closing.push((at, *to));
                    } else if !done.contains(to) {
                        open.insert(*to);
                        path.push((*to, 0));
                    }
                }
                None => {
                    open.remove(&at);
                    done.insert(at);
                    path.pop();
                }
            }
        }
    }
    closing
}

/// The digest of a file of the store's own. `on_read` hears of every piece and may stop it.
pub(super) fn hash_file(
    path: &Path,
    mut on_read: impl FnMut(usize) -> Result<(), Canceled>,
) -> Result<BlobDigest, CheckError> {
    let mut file = fs::File::open(path).at("open", path)?;
    let mut hasher = Sha256Hasher::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer).at("read", path)? {
            0 => return Ok(BlobDigest::from_bytes(hasher.finish())),
            n => {
                on_read(n)?;
                hasher.update(&buffer[..n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use plies_archive::Usage;

    use super::*;

    #[test]
    fn parts_of_a_sample_cover_everything_once() {
        for count in [1, 7, 10, 33, 50, 100] {
            for id in 0..500_u64 {
                let id = id.to_be_bytes();
                let taken = (0..100u8).filter(|from| Sample { from: *from, count }.takes(&id)).count();
                assert_eq!(taken, usize::from(count), "every start that is at most {count} parts before takes it");
            }
            let taken = (0..10_000_u64).filter(|id| Sample { from: 95, count }.takes(&id.to_be_bytes())).count();
            assert!(taken.abs_diff(100 * usize::from(count)) < 300, "{count}%: {taken}");
        }
    }

    #[test]
    fn a_ring_is_cut_once_and_a_diamond_never() {
        let blob = |n: u8| Resource::from(BlobDigest::of(&[n]));
        let edges = |list: &[(u8, u8)]| {
            let mut edges: BTreeMap<Resource, Vec<Resource>> = BTreeMap::new();
            list.iter().for_each(|(from, to)| edges.entry(blob(*from)).or_default().push(blob(*to)));
            edges
        };
        assert_eq!(rings(&edges(&[(0, 1), (0, 2), (1, 3), (2, 3)])), []);
        assert_eq!(rings(&edges(&[(0, 1), (1, 2), (2, 0), (3, 0)])).len(), 1);
        assert_eq!(rings(&edges(&[(4, 4)])), [(blob(4), blob(4))]);
    }

    #[test]
    fn a_block_for_each_file_more_or_less_is_no_damage() {
        let kept = Usage { size_bytes: 100_000, inodes: 3, content_bytes: 70_000 };
        let costs =
            |size_bytes, inodes, content_bytes| is_what_it_costs(kept, Usage { size_bytes, inodes, content_bytes });
        assert!(
            costs(100_000, 3, 70_000) && costs(100_000 + 3 * 4096, 3, 70_000) && costs(100_000 - 3 * 4096, 3, 70_000)
        );
        assert!(!costs(100_000 + 3 * 4096 + 512, 3, 70_000) && !costs(100_000 - 3 * 4096 - 512, 3, 70_000));
        assert!(!costs(100_000, 4, 70_000) && !costs(100_000, 2, 70_000));
        assert!(!costs(100_000, 3, 70_001) && !costs(100_000, 3, 69_999));
    }
}
