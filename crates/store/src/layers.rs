//! Layers: immutable filesystem differences, a directory each.
//!
//! ```text
//! layers/<id>/fs/                 the tree: whiteouts are character devices 0:0, opaque
//!                                 directories have trusted.overlay.opaque=y
//! layers/<id>/index               which directories are implied (plies_archive::DirIndex)
//! layers/<id>/layer.json          the row again, so that the catalogue can be rebuilt
//! layers/<id>/tar-split.json.gz   optional: how to put the tar together again
//! layers/<id>/layer.{tar,erofs}   instead of fs/ and tar-split: a packed layer ([`crate::packed`])
//! layers/stage/<id>/…             the same, seen by nobody
//! ```
//!
//! A stage belongs to the process that made it and goes with it: the next open removes all. To
//! publish is: sidecars, one sync of the file system for the whole group, renames, one sync of
//! `layers/`, one transaction. A crash before the last leaves directories without rows, which the
//! next open removes.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use plies_oci::{BlobDigest, ChainId, DiffId, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::catalogue::schema::{LAYERS, LAYERS_BY_CHAIN, LAYERS_BY_DIFF, LayerKind, LayerRow, SQUASHES, StoredUsage};
use crate::catalogue::{CatalogueError, Rows, Tx};
use crate::error::{At as _, FileError};
use crate::open::sync_dir;
use crate::recover::RecoverError;
use crate::tree::STAT_BLOCK_BYTES;
use crate::{LayerId, Lease, Stamp, Store, packed, parallel, tree};
use plies_archive::tar::EntryPath;
use plies_archive::{DirIndex, Usage};

const TREE: &str = "fs";
const INDEX: &str = "index";
const SIDECAR: &str = "layer.json";
const TAR_SPLIT: &str = "tar-split.json.gz";

/// Version of the sidecar; docs/format/catalogue.md.
const SIDECAR_VERSION: u32 = 1;

/// Stages whose files are written by several threads: for fewer, starting those takes longer than writing.
const LAYERS_SHARED_MIN: usize = 16;
/// Threads that write them.
const WRITERS: usize = 4;

/// Why an operation on layers failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// Not in the store.
    #[error("layer {layer} is not in the store")]
    NotFound {
        /// Which.
        layer: LayerId,
    },
    /// In the catalogue, but what is on disk is not what was published.
    #[error("layer {layer} is damaged: {what}")]
    Damaged {
        /// Which.
        layer: LayerId,
        /// In which way.
        what: &'static str,
    },
    /// It has a diff ID, and this is another.
    #[error("layer {layer} has diff id {has}, not {given}")]
    OtherDiffId {
        /// Which.
        layer: LayerId,
        /// Its diff ID.
        has: DiffId,
        /// The one to be set.
        given: DiffId,
    },
    /// Its files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its row.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl From<RecoverError> for LayerError {
    fn from(error: RecoverError) -> Self {
        match error {
            RecoverError::File(error) => Self::File(error),
            RecoverError::Catalogue(error) => Self::Catalogue(error),
        }
    }
}

impl LayerError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::OtherDiffId { .. } => ErrorKind::FailedPrecondition,
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// What is known of a layer when it is finished.
#[derive(Debug, Clone, Default)]
pub struct LayerContents {
    /// Digest of its tar, if it came from one.
    pub diff_id: Option<DiffId>,
    /// `Some` if it is not self-contained (a hard link into a lower layer, a directory over a
    /// lower symlink): the chain that it completes, by which alone it is found again.
    pub chain_id: Option<ChainId>,
    /// What it costs on disk.
    pub usage: Usage,
    /// Which of its directories are implied.
    pub index: DirIndex,
    /// The diff ID is another program's word, and was not held against the bytes of the files.
    pub unverified: bool,
}

/// A layer as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// Which.
    pub id: LayerId,
    /// Digest of its tar; `None` until known.
    pub diff_id: Option<DiffId>,
    /// `Some` if it is only good in this chain.
    pub chain_id: Option<ChainId>,
    /// What it costs on disk.
    pub usage: Usage,
    /// When it was published.
    pub created: Stamp,
    /// Whether its tar can be put together again byte by byte.
    pub has_tar_split: bool,
    /// Made by the store (a fix-up or a squash): nobody's difference, never exported.
    pub derived: bool,
    /// Its diff ID is the word of the program that it was taken over from.
    pub unverified: bool,
}

impl LayerInfo {
    fn new(id: LayerId, row: LayerRow) -> Self {
        Self {
            id,
            diff_id: row.diff_id,
            chain_id: row.chain_id,
            usage: row.usage.into(),
            created: row.created,
            has_tar_split: row.tar_split,
            derived: row.kind != LayerKind::Full,
            unverified: row.unverified,
        }
    }
}

/// The row beside its layer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sidecar {
    version: u32,
    #[serde(flatten)]
    pub(crate) row: LayerRow,
}

impl Sidecar {
    pub(crate) fn write(dir: &Path, row: &LayerRow) -> Result<(), FileError> {
        let path = dir.join(SIDECAR);
        fs::write(&path, Self::encode(row)).at("write", path)
    }

    /// Writes it anew, durably; there is always one that is whole.
    pub(crate) fn replace(store: &Store, id: LayerId, row: &LayerRow) -> Result<(), LayerError> {
        // Two exports of one layer may come here at once: each writes under a name of its own, where a crash leaves
        // nothing.
        let fresh = LayerId::from_bytes(store.inner.fresh_id()?);
        let new = store.inner.paths.stage.join(format!("{fresh}.json"));
        let dir = layer_dir(store, id);
        let path = dir.join(SIDECAR);
        let mut file = File::create(&new).at("create", &new)?;
        file.write_all(&Self::encode(row)).and_then(|()| file.sync_all()).at("write", &new)?;
        fs::rename(&new, &path).at("rename", &new)?;
        Ok(sync_dir(&dir)?)
    }

    fn encode(row: &LayerRow) -> Vec<u8> {
        serde_json::to_vec_pretty(&Self { version: SIDECAR_VERSION, row: row.clone() })
            .expect("because rows are plain data, which JSON always encodes")
    }

    /// Whether it says what the row says. It may know a diff ID that a crash kept from the row.
    pub(crate) fn says(&self, row: &LayerRow) -> bool {
        let diff_id = row.diff_id.or(self.row.diff_id);
        self.row == LayerRow { diff_id, ..row.clone() }
    }

    /// `None` if it is not there or not ours.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, FileError> {
        let path = dir.join(SIDECAR);
        match fs::read(&path) {
            Ok(text) => {
                Ok(serde_json::from_slice(&text).ok().filter(|sidecar: &Self| sidecar.version == SIDECAR_VERSION))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FileError::new("read", path, error)),
        }
    }
}

pub(crate) fn layer_dir(store: &Store, id: LayerId) -> PathBuf {
    store.inner.paths.layers.join(id.to_string())
}

/// Layers of a store.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    store: &'a Store,
}

impl<'a> Layers<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store }
    }

    /// A directory nobody sees, to make a layer in.
    ///
    /// # Errors
    /// [`LayerError`].
    pub fn stage(&self) -> Result<Stage, LayerError> {
        Stage::new(self.store)
    }

    /// Makes finished stages layers, held by `lease`: one sync of the file system for all, one
    /// transaction; durable when this returns. A stage whose diff ID (or chain ID) is there already
    /// yields that layer, and goes; unless it was verified and that layer was not.
    ///
    /// # Errors
    /// [`LayerError`]; then none of them is visible.
    pub fn publish(&self, lease: &Lease, finished: Vec<FinishedStage>) -> Result<Vec<LayerId>, LayerError> {
        publish(self.store, finished, LayerKind::Full, |tx, ids| {
            ids.iter().try_for_each(|id| tx.lease_hold(lease.id(), *id))
        })
    }

    /// Finds the self-contained layer with this diff ID and holds it, in one step: no collection
    /// can come between.
    ///
    /// # Errors
    /// [`LayerError::Catalogue`].
    pub fn hold_by_diff_id(&self, diff_id: DiffId, lease: &Lease) -> Result<Option<LayerId>, LayerError> {
        Ok(lease.write(|tx| {
            let found = by_diff_id(tx, diff_id)?;
            found.map(|id| tx.lease_hold(lease.id(), id)).transpose()?;
            Ok::<_, CatalogueError>(found)
        })?)
    }

    /// As [`Layers::hold_by_diff_id`], but none whose diff ID is another program's word.
    ///
    /// # Errors
    /// [`LayerError::Catalogue`].
    pub fn hold_verified_by_diff_id(&self, diff_id: DiffId, lease: &Lease) -> Result<Option<LayerId>, LayerError> {
        let Some(id) = self.hold_by_diff_id(diff_id, lease)? else { return Ok(None) };
        Ok((!self.row(id)?.unverified).then_some(id))
    }

    /// Finds the layer that was made to complete this chain, and only this, and holds it.
    ///
    /// # Errors
    /// [`LayerError::Catalogue`].
    pub fn hold_by_chain(&self, chain_id: ChainId, lease: &Lease) -> Result<Option<LayerId>, LayerError> {
        Ok(lease.write(|tx| {
            let found = by_chain_id(tx, chain_id)?;
            found.map(|id| tx.lease_hold(lease.id(), id)).transpose()?;
            Ok::<_, CatalogueError>(found)
        })?)
    }

    /// What the catalogue knows of the self-contained layer with this diff ID, if it is here. It is not held.
    ///
    /// # Errors
    /// [`LayerError::Catalogue`].
    pub fn find_by_diff_id(&self, diff_id: DiffId) -> Result<Option<LayerInfo>, LayerError> {
        Ok(self.store.read(|tx| {
            let Some(id) = by_diff_id(tx, diff_id)? else { return Ok(None) };
            Ok::<_, CatalogueError>(tx.get(&LAYERS, &id)?.map(|row| LayerInfo::new(id, row)))
        })?)
    }

    /// Whether it changes nothing of what it is put on: no entries, and a root that is only implied.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::Damaged`].
    pub fn is_empty(&self, id: LayerId) -> Result<bool, LayerError> {
        Ok(self.row(id)?.usage.inodes <= 1 && read_index(self.store, id)?.is_implied(&EntryPath::root()))
    }

    /// What the catalogue knows of it.
    ///
    /// # Errors
    /// [`LayerError::NotFound`].
    pub fn info(&self, id: LayerId) -> Result<LayerInfo, LayerError> {
        Ok(LayerInfo::new(id, self.row(id)?))
    }

    /// Calls `visit` for every layer, in the order of their ids, until it breaks.
    ///
    /// # Errors
    /// [`LayerError::Catalogue`].
    pub fn scan(&self, mut visit: impl FnMut(LayerInfo) -> ControlFlow<()>) -> Result<(), LayerError> {
        Ok(self.store.read(|tx| tx.scan(&LAYERS, |id, row| visit(LayerInfo::new(id, row))))?)
    }

    /// Which of its directories are implied.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::Damaged`].
    pub fn index(&self, id: LayerId) -> Result<DirIndex, LayerError> {
        self.row(id)?;
        read_index(self.store, id)
    }

    /// Its tree, for reading only.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::Damaged`].
    pub fn root(&self, id: LayerId) -> Result<OwnedFd, LayerError> {
        self.row(id)?;
        open_root(self.store, id)
    }

    /// Its tar-split (gzipped), if it has one.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::Damaged`].
    pub fn tar_split(&self, id: LayerId) -> Result<Option<File>, LayerError> {
        if !self.row(id)?.tar_split {
            return Ok(None);
        }
        let path = layer_dir(self.store, id).join(TAR_SPLIT);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(LayerError::Damaged { layer: id, what: "its tar-split is missing" })
            }
            Err(error) => Err(FileError::new("open", path, error).into()),
        }
    }

    /// Its tar, if it is kept packed: as the tar itself, with an index.
    ///
    /// # Errors
    /// [`LayerError::NotFound`], [`LayerError::File`].
    pub fn packed_tar(&self, id: LayerId) -> Result<Option<File>, LayerError> {
        self.row(id)?;
        Ok(packed::open_tar(&layer_dir(self.store, id))?)
    }

    /// The tar of the self-contained layer with this diff ID, if it is here and kept packed. What was opened stays there to be
    /// read, whatever becomes of the layer.
    ///
    /// # Errors
    /// [`LayerError::Catalogue`], [`LayerError::File`].
    pub fn packed_tar_of(&self, diff_id: DiffId) -> Result<Option<File>, LayerError> {
        let found = self.store.read(|rows| by_diff_id(rows, diff_id))?;
        Ok(found.map(|id| packed::open_tar(&layer_dir(self.store, id))).transpose()?.flatten())
    }

    /// Gives a sealed layer its diff ID, once somebody has made its tar. Idempotent.
    ///
    /// # Errors
    /// [`LayerError::NotFound`]; [`LayerError::OtherDiffId`] if it has another.
    pub fn set_diff_id(&self, id: LayerId, diff_id: DiffId) -> Result<(), LayerError> {
        let mut row = self.row(id)?;
        match row.diff_id {
            Some(has) if has == diff_id => return Ok(()),
            Some(has) => return Err(LayerError::OtherDiffId { layer: id, has, given: diff_id }),
            None => row.diff_id = Some(diff_id),
        }
        // Bytes before rows: a sidecar that knows more than the row is right all the same.
        Sidecar::replace(self.store, id, &row)?;
        self.store.write(|tx| {
            let mut row = tx.get(&LAYERS, &id)?.ok_or(LayerError::NotFound { layer: id })?;
            match row.diff_id {
                Some(has) if has != diff_id => return Err(LayerError::OtherDiffId { layer: id, has, given: diff_id }),
                _ => row.diff_id = Some(diff_id),
            }
            Ok(tx.put_layer(id, &row)?)
        })
    }

    /// Says that somebody has held a layer's files against its diff ID. Who did not hear of it asks again.
    ///
    /// # Errors
    /// [`LayerError::NotFound`].
    pub fn set_verified(&self, id: LayerId) -> Result<(), LayerError> {
        self.store.write_lazily(|tx| {
            let row = tx.get(&LAYERS, &id)?.ok_or(LayerError::NotFound { layer: id })?;
            Ok(tx.put_layer(id, &LayerRow { unverified: false, ..row })?)
        })
    }

    fn row(&self, id: LayerId) -> Result<LayerRow, LayerError> {
        let row = self.store.read(|tx| tx.get(&LAYERS, &id))?;
        row.ok_or(LayerError::NotFound { layer: id })
    }
}

/// The layer of a diff ID; one of which that was verified, if there are several.
fn by_diff_id(rows: &impl Rows, diff_id: DiffId) -> Result<Option<LayerId>, CatalogueError> {
    let mut found: Vec<LayerId> = Vec::new();
    rows.scan_prefix(&LAYERS_BY_DIFF, &diff_id, |(_, id), ()| {
        found.push(id);
        ControlFlow::Continue(())
    })?;
    if let [_, _, ..] = *found {
        for id in &found {
            if rows.get(&LAYERS, id)?.is_some_and(|row| !row.unverified) {
                return Ok(Some(*id));
            }
        }
    }
    Ok(found.first().copied())
}

fn by_chain_id(rows: &impl Rows, chain_id: ChainId) -> Result<Option<LayerId>, CatalogueError> {
    let mut found = None;
    rows.scan_prefix(&LAYERS_BY_CHAIN, &chain_id, |(_, id), ()| {
        found = Some(id);
        ControlFlow::Break(())
    })?;
    Ok(found)
}

pub(crate) fn open_root(store: &Store, id: LayerId) -> Result<OwnedFd, LayerError> {
    match packed::open_tree(&layer_dir(store, id)) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
            Err(LayerError::Damaged { layer: id, what: "its tree is missing" })
        }
        opened => Ok(opened?),
    }
}

pub(crate) fn read_index(store: &Store, id: LayerId) -> Result<DirIndex, LayerError> {
    read_index_at(&layer_dir(store, id), id)
}

/// As [`read_index`], from the layer's directory.
pub(crate) fn read_index_at(dir: &Path, id: LayerId) -> Result<DirIndex, LayerError> {
    let path = dir.join(INDEX);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(LayerError::Damaged { layer: id, what: "its index is missing" });
        }
        Err(error) => return Err(FileError::new("read", path, error).into()),
    };
    DirIndex::decode(&bytes).map_err(|_| LayerError::Damaged { layer: id, what: "its index does not decode" })
}

/// A layer being made. Dropping it removes it.
#[derive(Debug)]
#[must_use = "a stage that is dropped is removed"]
pub struct Stage {
    store: Store,
    id: LayerId,
    dir: PathBuf,
    root: Option<OwnedFd>,
    tar_split: bool,
    /// Published, or holding what is not ours to remove.
    keep: bool,
}

impl Stage {
    pub(crate) fn new(store: &Store) -> Result<Self, LayerError> {
        let mut stage = Self::without_tree(store)?;
        let tree = stage.tree();
        fs::create_dir(&tree).at("create directory", &tree)?;
        // Whatever the umask: this is the root directory of what will be mounted.
        fs::set_permissions(&tree, fs::Permissions::from_mode(0o755)).at("change mode", &tree)?;
        stage.root = Some(tree::open_own(&tree)?);
        Ok(stage)
    }

    /// A stage without a tree yet: a sealed upper comes to [`Stage::tree`].
    pub(crate) fn without_tree(store: &Store) -> Result<Self, LayerError> {
        let id = LayerId::from_bytes(store.inner.fresh_id()?);
        let dir = store.inner.paths.stage.join(id.to_string());
        DirBuilder::new().mode(0o700).create(&dir).at("create directory", &dir)?;
        Ok(Self { store: store.clone(), id, dir, root: None, tar_split: false, keep: false })
    }

    /// A new file for the tar of a packed layer, to write and read, in a stage without a tree.
    pub(crate) fn tar_file(&self) -> Result<File, LayerError> {
        let path = self.dir.join(packed::TAR);
        Ok(File::options().read(true).write(true).create_new(true).open(&path).at("create", path)?)
    }

    /// `layers/stage/<id>`.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Dropping it removes nothing any more.
    pub(crate) fn keep(&mut self) {
        self.keep = true;
    }

    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.join(TREE)
    }

    /// The id it will have, unless the same layer turns out to be there already.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The empty directory to fill (0755, owned by this process's user).
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_ref().expect("because only the store makes stages without a tree, and fills them itself").as_fd()
    }

    /// A new file for the gzipped tar-split of what is unpacked, to write and read; making it says that there is one.
    ///
    /// # Errors
    /// [`LayerError::File`].
    pub fn tar_split_file(&mut self) -> Result<File, LayerError> {
        let path = self.dir.join(TAR_SPLIT);
        let file = File::options().read(true).write(true).create_new(true).open(&path).at("create", path)?;
        self.tar_split = true;
        Ok(file)
    }

    /// Gives the tar-split file up: it cannot give the archive back.
    ///
    /// # Errors
    /// [`LayerError::File`].
    pub fn forget_tar_split(&mut self) -> Result<(), LayerError> {
        self.tar_split = false;
        let path = self.dir.join(TAR_SPLIT);
        Ok(fs::remove_file(&path).at("remove", path)?)
    }

    /// The tar-split that was written, from its start.
    pub(crate) fn read_tar_split(&self) -> Result<File, LayerError> {
        let path = self.dir.join(TAR_SPLIT);
        Ok(File::open(&path).at("open", path)?)
    }

    /// Nothing more will be written.
    pub fn finish(mut self, contents: LayerContents) -> FinishedStage {
        // Thousands may wait to be published together: more than a process may have open.
        self.root = None;
        FinishedStage { stage: self, contents }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.keep {
            self.store.inner.discard_dir(&self.dir);
        }
    }
}

/// A stage with what is known of it. Dropping it removes it.
#[derive(Debug)]
#[must_use = "a stage that is dropped is removed"]
pub struct FinishedStage {
    stage: Stage,
    contents: LayerContents,
}

impl FinishedStage {
    /// Its tree.
    pub(crate) fn open_root(&self) -> Result<OwnedFd, FileError> {
        packed::open_tree(&self.stage.dir)
    }

    /// Whether it is packed.
    pub(crate) fn is_packed(&self) -> Result<bool, FileError> {
        packed::is_packed(&self.stage.dir)
    }

    /// Whether a tar-split lies beside its tree.
    pub(crate) fn has_tar_split(&self) -> bool {
        self.stage.tar_split
    }

    /// What is known of it.
    pub fn contents(&self) -> &LayerContents {
        &self.contents
    }

    /// Makes it the directory of a layer that is there, and leaves what was there in its place at `aside`, which does not
    /// exist and lies on the same file system. Durable when it returns; a crash leaves one or the other. The row that goes
    /// with it is returned, and is the caller's to put.
    pub(crate) fn replace(
        mut self,
        store: &Store,
        id: LayerId,
        before: &LayerRow,
        aside: &Path,
    ) -> Result<LayerRow, FileError> {
        let index = self.stage.dir.join(INDEX);
        fs::write(&index, self.contents.index.encode()).at("write", index)?;
        let row = self.row(before.kind, before.created)?;
        let row = LayerRow { diff_id: before.diff_id.or(row.diff_id), chain_id: before.chain_id, ..row };
        Sidecar::write(&self.stage.dir, &row)?;
        let layers = tree::open_own(&store.inner.paths.layers)?;
        rustix::fs::syncfs(&layers).at("sync", &store.inner.paths.layers)?;
        let target = layer_dir(store, id);
        if target.try_exists().at("stat", &target)? {
            fs::rename(&self.stage.dir, aside).at("rename", &self.stage.dir)?;
            self.stage.keep();
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            renameat_with(CWD, aside, CWD, &target, RenameFlags::EXCHANGE).at("exchange", &target)?;
        } else {
            fs::rename(&self.stage.dir, &target).at("rename", &self.stage.dir)?;
            self.stage.keep();
        }
        rustix::fs::fsync(&layers).at("sync directory", &store.inner.paths.layers)?;
        Ok(row)
    }

    fn row(&self, kind: LayerKind, created: Stamp) -> Result<LayerRow, FileError> {
        let mut row = LayerRow {
            kind,
            diff_id: self.contents.diff_id,
            chain_id: self.contents.chain_id,
            usage: StoredUsage::from(self.contents.usage),
            created,
            tar_split: self.stage.tar_split,
            beside: StoredUsage::default(),
            unverified: self.contents.unverified,
        };
        row.beside = self.beside(&Sidecar::encode(&row))?;
        Ok(row)
    }

    /// What the directory costs besides the tree, with a sidecar of about this text that is not written yet.
    fn beside(&self, sidecar: &[u8]) -> Result<StoredUsage, FileError> {
        let (dir, length) = (&self.stage.dir, sidecar.len() as u64);
        let block_bytes = fs::symlink_metadata(dir).at("stat", dir)?.blksize().max(1);
        let mut beside = beside(dir, &[], self.stage.tar_split)?;
        beside.size_bytes += length.next_multiple_of(block_bytes);
        beside.inodes += 1;
        beside.content_bytes += length;
        Ok(beside)
    }
}

/// What a published layer's directory costs besides the tree.
pub(crate) fn beside_of(store: &Store, id: LayerId, row: &LayerRow) -> Result<StoredUsage, FileError> {
    beside(&layer_dir(store, id), &[SIDECAR], row.tar_split)
}

/// What a layer's directory costs with its index, its tar-split if it has one, and these files.
fn beside(dir: &Path, files: &[&str], tar_split: bool) -> Result<StoredUsage, FileError> {
    let mut beside = StoredUsage::default();
    let names = files.iter().chain(&[INDEX]).chain(tar_split.then_some(&TAR_SPLIT));
    for path in names.map(|name| dir.join(name)).chain([dir.to_owned()]) {
        let meta = fs::symlink_metadata(&path).at("stat", &path)?;
        beside.size_bytes += meta.blocks() * STAT_BLOCK_BYTES;
        beside.inodes += 1;
        beside.content_bytes += if meta.is_file() { meta.len() } else { 0 };
    }
    Ok(beside)
}

/// Publishes stages; `and_then` runs in the same transaction, with the ids in order, and must make
/// something hold them.
pub(crate) fn publish<E: From<LayerError> + From<CatalogueError> + From<FileError>>(
    store: &Store,
    mut finished: Vec<FinishedStage>,
    kind: LayerKind,
    mut and_then: impl FnMut(&mut Tx<'_>, &[LayerId]) -> Result<(), CatalogueError>,
) -> Result<Vec<LayerId>, E> {
    if finished.is_empty() {
        return Ok(Vec::new());
    }
    let paths = &store.inner.paths;
    let now = store.now();
    let write = |finished: &FinishedStage| {
        let path = finished.stage.dir.join(INDEX);
        fs::write(&path, finished.contents.index.encode()).at("write", path)?;
        let row = finished.row(kind, now)?;
        Sidecar::write(&finished.stage.dir, &row)?;
        Ok::<_, FileError>((finished.stage.id, row))
    };
    let rows = match finished.len() {
        ..LAYERS_SHARED_MIN => finished.iter().map(write).collect::<Result<Vec<_>, _>>()?,
        _ => parallel(&finished, WRITERS, |_| 0, write)?,
    };
    let layers = tree::open_own(&paths.layers)?;
    rustix::fs::syncfs(&layers).at("sync", &paths.layers)?;
    for FinishedStage { stage, .. } in &mut finished {
        let target = layer_dir(store, stage.id);
        fs::rename(&stage.dir, &target).at("rename", &stage.dir)?;
        stage.dir = target;
    }
    if let Err(error) = rustix::fs::fsync(&layers).at("sync directory", &paths.layers) {
        // Nobody knows what of it is there after a power cut, or after what is done about it now.
        store.inner.leave_unclean();
        return Err(error.into());
    }

    // The point of no return: from here the layers are visible and held.
    let published = store.write(|tx| {
        let mut ids = Vec::with_capacity(rows.len());
        for (id, row) in &rows {
            let there = match (row.diff_id, row.chain_id) {
                (_, Some(chain_id)) => by_chain_id(tx, chain_id)?,
                // What was verified does not give way to what was not.
                (Some(diff_id), None) => by_diff_id(tx, diff_id)?
                    .map(|id| Ok((id, tx.get(&LAYERS, &id)?)))
                    .transpose()?
                    .filter(|(_, there)| row.unverified || !there.as_ref().is_some_and(|there| there.unverified))
                    .map(|(id, _)| id),
                (None, None) => None,
            };
            if there.is_none() {
                tx.put_layer(*id, row)?;
            }
            ids.push(there.unwrap_or(*id));
        }
        and_then(tx, &ids)?;
        Ok::<_, CatalogueError>(ids)
    });
    let ids = match published {
        Ok(ids) => ids,
        Err(error) => {
            // Whether a commit that failed reached the disk is not known before the next open, which
            // judges by the rows: until then the bytes stay.
            if matches!(error, CatalogueError::Database { .. }) {
                store.inner.leave_unclean();
                finished.iter_mut().for_each(|finished| finished.stage.keep());
            }
            return Err(error.into());
        }
    };
    for (FinishedStage { stage, .. }, id) in finished.iter_mut().zip(&ids) {
        // What was there already stays, and ours goes.
        stage.keep = stage.id == *id;
    }
    Ok(ids)
}

/// The squash of exactly this list of layers, if there is one.
pub(crate) fn squash_of(rows: &impl Rows, list: BlobDigest) -> Result<Option<LayerId>, CatalogueError> {
    rows.get(&SQUASHES, &list)
}
