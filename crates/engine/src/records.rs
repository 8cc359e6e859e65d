//! `ply ref`: records of the build cache by hand.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::ops::ControlFlow;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use plies_archive::compress::Encoder;
use plies_archive::{DiffError, diff_trees, tar};
use plies_cache::{
    Accessor, CacheError, ImmutableRef, RecordId, RecordOptions, RecordRow, State, UNCOMPRESSED, UseRow,
};
use plies_image::ImageError;
use plies_oci::{Compression, DiffId, ErrorKind};
use plies_store::{
    ActiveInfo, Attach, Cancel, CatalogueError, LayerError, SnapshotError, TransferError, canceled_inside, transfer,
};
use serde::Serialize;

use crate::images::{ImagesError, chain};
use crate::run::RunError;
use crate::{Canceled, Engine};

/// Why a request on records failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordsError {
    /// The build cache said no.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The image to start from.
    #[error(transparent)]
    Image(#[from] ImagesError),
    /// Finding out whether the record is mounted.
    #[error(transparent)]
    Mounts(Box<RunError>),
    /// What to start from can still change.
    #[error("{parent} is mutable: commit it first")]
    MutableParent {
        /// As it was named.
        parent: String,
    },
    /// A layer of an image is not there.
    #[error("layer {diff_id} of the image is not in the store")]
    LayerGone {
        /// Which.
        diff_id: DiffId,
    },
    /// Reading a tree.
    #[error("read a tree")]
    Snapshot(#[from] SnapshotError),
    /// Its layer.
    #[error("read a layer")]
    Layer(#[from] LayerError),
    /// Writing a layer's archive.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// Writing a tree's archive.
    #[error("write {}", path.display())]
    Export {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: DiffError,
    },
    /// The file to write.
    #[error("write {}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl From<ImageError> for RecordsError {
    fn from(source: ImageError) -> Self {
        Self::Image(source.into())
    }
}

impl RecordsError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Cache(source) => source.kind(),
            Self::Image(source) => source.kind(),
            Self::Mounts(source) => source.kind(),
            Self::MutableParent { .. } => ErrorKind::FailedPrecondition,
            Self::LayerGone { .. } => ErrorKind::DataLoss,
            Self::Snapshot(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Transfer(source) => source.kind(),
            Self::Export { source, .. } => source.kind(),
            Self::Io { .. } => ErrorKind::Unavailable,
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// One line of `ply ref ls`.
#[derive(Debug, Clone, Serialize)]
pub struct RecordSummary {
    /// The record's ID.
    pub id: String,
    /// `mutable`, `immutable`, or `lazy` for one that is not unpacked or computed yet.
    pub state: &'static str,
    /// What kind of thing it is, as BuildKit names it.
    pub record_type: &'static str,
    /// What it is.
    pub description: String,
    /// The records that it stands on: bottom first for a merge, lower and upper for a diff.
    pub parents: Vec<String>,
    /// RFC 3339.
    pub created: String,
    /// RFC 3339; `None` if it was never used.
    pub last_used: Option<String>,
    /// Uses since it was made.
    pub usage_count: u64,
    /// What its own layer takes on disk: what it adds to what it stands on. Of a mutable record what it takes now, or
    /// what was measured last if it is changing.
    pub size_bytes: u64,
    /// Whether prune leaves it alone.
    pub pinned: bool,
    /// The images that it was a part of.
    pub image_refs: Vec<String>,
    /// Its upper directory, while it is mutable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active: Option<String>,
    /// Its own layer, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<String>,
    /// Digest of its own layer's tar, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Its chain of layers, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain_id: Option<String>,
    /// Why it is damaged, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl RecordSummary {
    fn damaged(id: RecordId, error: &dyn std::error::Error) -> Self {
        Self {
            id: id.to_string(),
            state: "damaged",
            record_type: "regular",
            description: String::new(),
            parents: vec![],
            created: String::new(),
            last_used: None,
            usage_count: 0,
            size_bytes: 0,
            pinned: false,
            image_refs: vec![],
            active: None,
            layer: None,
            diff_id: None,
            chain_id: None,
            error: Some(chain(error)),
        }
    }
}

/// What `ply ref new --parent` and the like may be given.
enum Named {
    /// A record.
    Record(RecordId),
    /// The record of an image's tree; `None` for the empty one.
    Image(Option<ImmutableRef>),
}

impl Engine {
    /// The build cache.
    pub(crate) fn cache(&self) -> Accessor {
        self.cache.accessor()
    }

    /// All records, the last used first. One that cannot be read is listed with its error: it hides no other.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn records(&self) -> Result<Vec<RecordSummary>, RecordsError> {
        let mut found = Vec::new();
        self.cache().scan(|id, row, uses| {
            found.push((id, row, uses));
            ControlFlow::Continue(())
        })?;
        let mut records: Vec<RecordSummary> = found
            .into_iter()
            .map(|(id, row, uses)| match row {
                Ok(row) => self.record_summary(id, &row, uses),
                Err(error) => RecordSummary::damaged(id, &error),
            })
            .collect();
        records.sort_by(|a, b| {
            let used = |record: &RecordSummary| record.last_used.clone().unwrap_or_else(|| record.created.clone());
            used(b).cmp(&used(a)).then_with(|| a.id.cmp(&b.id))
        });
        Ok(records)
    }

    /// One record.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn record(&self, wanted: &str) -> Result<RecordSummary, RecordsError> {
        let cache = self.cache();
        let id = cache.find(wanted)?;
        Ok(self.record_summary(id, &cache.row(id)?, cache.uses(id)?))
    }

    fn record_summary(&self, id: RecordId, row: &RecordRow, uses: UseRow) -> RecordSummary {
        let own = match row.state {
            State::Sealed { layer } => layer.map(|layer| self.store().layers().info(layer)).transpose(),
            _ => Ok(None),
        };
        let (own, error) = match own {
            Ok(own) => (own, None),
            Err(error) => (None, Some(chain(&error))),
        };
        let size_bytes = match row.state {
            State::Mutable { active, .. } | State::Shared { active, .. } => {
                self.store().snapshots().active(active).map_or(0, |info| self.active_bytes(&info))
            }
            _ => own.as_ref().map_or(0, |layer| layer.usage.size_bytes),
        };
        let diff_id = own.as_ref().and_then(|layer| layer.diff_id).or(row.blob.as_ref().map(|blob| blob.diff_id));
        RecordSummary {
            id: id.to_string(),
            state: match row.state {
                State::Mutable { .. } => "mutable",
                State::Lazy => "lazy",
                State::Composed if matches!(row.parents, plies_cache::Parents::Diff { .. }) => "lazy",
                _ => "immutable",
            },
            record_type: row.record_type.name(),
            description: row.description.clone(),
            parents: row.parents.ids().iter().map(ToString::to_string).collect(),
            created: crate::rfc3339(row.created_at),
            last_used: uses.last_used_at.map(crate::rfc3339),
            usage_count: uses.count,
            size_bytes,
            pinned: row.pinned,
            image_refs: row.image_refs.clone(),
            active: match row.state {
                State::Mutable { active, .. } => Some(active.to_string()),
                _ => None,
            },
            layer: own.map(|layer| layer.id.to_string()),
            diff_id: diff_id.map(|diff_id| diff_id.to_string()),
            chain_id: row.chain_id.map(|chain| chain.to_string()),
            error,
        }
    }

    /// What an active takes on disk. One that cannot be measured, since it is in use or sealed, takes what it took when
    /// it could.
    pub(crate) fn active_bytes(&self, info: &ActiveInfo) -> u64 {
        let measured = match info.sealed {
            None => self.store().snapshots().measure(info.id).ok(),
            Some(_) => None,
        };
        measured.or(info.usage).map_or(0, |usage| usage.size_bytes)
    }

    /// What a name or an ID means: an image first, then a record.
    fn named(&self, wanted: &str) -> Result<Named, RecordsError> {
        match self.find_image(wanted) {
            Ok(found) => {
                let config = self.config_of(found.id)?;
                let name = found.name.as_ref().map_or_else(|| wanted.to_owned(), |name| name.familiar());
                Ok(Named::Image(self.image_record(config.diff_ids(), &name, &Cancel::new())?))
            }
            Err(ImageError::NotFound { .. }) => Ok(Named::Record(self.cache().find(wanted)?)),
            Err(other) => Err(other.into()),
        }
    }

    /// The record of an image's tree: one for each layer, found again or made now. `None` for an image without layers.
    /// Layers that were left at a registry become lazy records, whose blobs are fetched when somebody needs their files.
    pub(crate) fn image_record(
        &self,
        diff_ids: &[DiffId],
        name: &str,
        cancel: &Cancel,
    ) -> Result<Option<ImmutableRef>, RecordsError> {
        let cache = self.cache();
        let mut options = RecordOptions {
            description: Some(format!("layer of {name}")),
            image_refs: vec![name.to_owned()],
            ..RecordOptions::by("image")
        };
        let mut top: Option<ImmutableRef> = None;
        let mut remote = None;
        for (at, diff_id) in diff_ids.iter().enumerate() {
            let next = match cache.get_by_diff_id(*diff_id, top.as_ref(), &options)? {
                Some(next) => next,
                None => {
                    let gone = || RecordsError::LayerGone { diff_id: *diff_id };
                    let remote = match &remote {
                        Some(remote) => remote,
                        // An image that was never pulled has lost its layer.
                        None => remote.insert(self.remote_layers(name, cancel).map_err(|_| gone())?),
                    };
                    options.providers = remote.providers.clone();
                    let described = remote.layers.get(at).filter(|(have, _)| have == diff_id);
                    let mut descriptor = described.ok_or_else(gone)?.1.clone();
                    descriptor.annotations.insert(UNCOMPRESSED.to_owned(), diff_id.to_string());
                    cache.get_by_blob(&descriptor, top.as_ref(), &options)?
                }
            };
            top = Some(next);
        }
        Ok(top)
    }

    /// A ref to what a name or an ID means; `None` is the empty tree.
    fn immutable(&self, wanted: &str) -> Result<Option<ImmutableRef>, RecordsError> {
        match self.named(wanted)? {
            Named::Image(image) => Ok(image),
            Named::Record(id) if matches!(self.cache().row(id)?.state, State::Mutable { committed_as: None, .. }) => {
                Err(RecordsError::MutableParent { parent: wanted.to_owned() })
            }
            Named::Record(id) => Ok(Some(self.held_record(id, &Cancel::new())?)),
        }
    }

    /// A ref to an immutable record. Blobs below it that were left at a registry are fetched from where they were seen,
    /// when they are needed.
    fn held_record(&self, id: RecordId, cancel: &Cancel) -> Result<ImmutableRef, RecordsError> {
        let mut options = RecordOptions::by("ply ref");
        match self.cache().get(id, &options) {
            Err(CacheError::NeedsProviders(missing)) => {
                options.providers = self.providers_of(&missing, cancel)?;
                Ok(self.cache().get(id, &options)?)
            }
            held => Ok(held?),
        }
    }

    /// Makes a mutable record on top of an image or an immutable record, or of nothing. It stays until it is removed.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn new_record(&self, parent: Option<&str>, description: &str) -> Result<RecordId, RecordsError> {
        let base = parent.map(|parent| self.immutable(parent)).transpose()?.flatten();
        let options = RecordOptions {
            description: Some(description.to_owned()),
            retain: Some(true),
            ..RecordOptions::by("ply ref new")
        };
        let made = self.cache().create(base.as_ref(), &options)?;
        let id = made.id();
        made.release()?;
        Ok(id)
    }

    /// Makes an immutable record of a mutable one, which goes; gives its ID.
    ///
    /// # Errors
    /// [`RecordsError`], among them that it is mounted.
    pub fn commit_record(&self, wanted: &str) -> Result<RecordId, RecordsError> {
        let cache = self.cache();
        let id = cache.find(wanted)?;
        if let State::Mutable { active, .. } = cache.row(id)?.state {
            self.check_not_mounted(active).map_err(|error| RecordsError::Mounts(Box::new(error)))?;
        }
        let mutable = cache.get_mutable(id, &RecordOptions::by("ply ref commit"))?;
        let sealed = mutable.seal(&[], None).map(|sealed| sealed.id());
        Ok(self.keep_policy_after(sealed, &Cancel::new())?)
    }

    /// The immutable record that an ID stands for, extracted: what is lazy is fetched, unpacked or computed.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn get_record(&self, wanted: &str, cancel: &Cancel) -> Result<RecordId, RecordsError> {
        let id = self.cache().find(wanted)?;
        if let State::Mutable { .. } = self.cache().row(id)?.state {
            return Err(RecordsError::MutableParent { parent: wanted.to_owned() });
        }
        let held = self.held_record(id, cancel)?;
        let extracted = held.extract(cancel).map(|_| held.id());
        drop(held);
        Ok(self.keep_policy_after(extracted, cancel)?)
    }

    /// Makes the record that shows all of these over one another; `None` if they are all empty.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn merge_records(&self, wanted: &[String]) -> Result<Option<RecordId>, RecordsError> {
        let inputs = wanted.iter().map(|one| self.immutable(one)).collect::<Result<Vec<_>, _>>()?;
        let inputs: Vec<Option<&ImmutableRef>> = inputs.iter().map(Option::as_ref).collect();
        let description = Some(format!("merge {}", wanted.join(" ")));
        let merged =
            self.cache().merge(&inputs, &RecordOptions { description, ..RecordOptions::by("ply ref merge") })?;
        Ok(merged.map(|merged| merged.id()))
    }

    /// Makes the record that leads from `lower` (`-` is the empty tree) to `upper`, computed and ready.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn diff_records(&self, lower: &str, upper: &str, cancel: &Cancel) -> Result<RecordId, RecordsError> {
        let upper_ref = self.immutable(upper)?;
        let lower_ref = if lower == "-" { None } else { self.immutable(lower)? };
        let made = match (lower_ref, upper_ref) {
            // From nothing to a tree leads that tree.
            (None, Some(upper)) => upper,
            (None, None) => return Err(CacheError::NoLower.into()),
            (Some(lower), upper) => {
                let description =
                    Some(format!("diff {} {}", lower.id(), upper.as_ref().map_or("-".into(), |u| u.id().to_string())));
                let options = RecordOptions { description, ..RecordOptions::by("ply ref diff") };
                self.cache().diff(Some(&lower), upper.as_ref(), &options)?
            }
        };
        let extracted = made.extract(cancel).map(|_| made.id());
        drop(made);
        Ok(self.keep_policy_after(extracted, cancel)?)
    }

    /// Keeps a record from being pruned, or no longer.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn pin_record(&self, wanted: &str, pinned: bool) -> Result<RecordId, RecordsError> {
        let cache = self.cache();
        let id = cache.find(wanted)?;
        cache.pin(id, pinned)?;
        Ok(id)
    }

    /// Writes a record as a layer's archive, compressed as the file's name says: its own layer if it has one, else (a
    /// merge) its whole tree. Nothing is left at `path` if it fails.
    ///
    /// # Errors
    /// [`RecordsError`].
    pub fn export_record(&self, wanted: &str, path: &Path, cancel: &Cancel) -> Result<(), RecordsError> {
        let held = self.cache().get(self.cache().find(wanted)?, &RecordOptions::by("ply ref export"))?;
        let io = |source| RecordsError::Io { path: path.to_owned(), source };
        let compression = match path.extension().and_then(|extension| extension.to_str()) {
            Some("gz" | "tgz") => Compression::Gzip,
            Some("zst" | "zstd") => Compression::Zstd,
            _ => Compression::None,
        };
        let partial = PathBuf::from(format!("{}.partial", path.display()));
        let written = File::create(&partial).map_err(io).and_then(|file| {
            let encoder = Encoder::new(BufWriter::new(file), compression, transfer::threads()).map_err(io)?;
            let encoder = self.export_to(&held, path, encoder, cancel)?;
            let file = encoder.finish().map_err(io)?.into_inner().map_err(|error| io(error.into_error()))?;
            file.sync_all().map_err(io)?;
            std::fs::rename(&partial, path).map_err(io)
        });
        if written.is_err() {
            drop(std::fs::remove_file(&partial));
        }
        written
    }

    fn export_to<W: io::Write>(
        &self,
        held: &ImmutableRef,
        path: &Path,
        mut out: Encoder<W>,
        cancel: &Cancel,
    ) -> Result<Encoder<W>, RecordsError> {
        let snapshot = held.extract(cancel)?;
        if let State::Sealed { layer: Some(layer) } = held.row()?.state {
            return self.with_lease("ref export", |lease| {
                let transfer = self.transfer(lease, &crate::progress::Silent, cancel);
                let diff_id = transfer.diff_id_of(layer)?;
                transfer.write_tar(diff_id, Some(layer), &mut out)?;
                Ok(out)
            });
        }
        let mut writer = tar::Writer::new(crate::progress::Watched { inner: out, task: None, cancel });
        if let Some(snapshot) = snapshot {
            let mounted = self.store().snapshots().view(snapshot, Attach::Detached)?;
            let written = diff_trees(None, mounted.root().as_fd(), &mut writer);
            written.map_err(|source| match canceled_inside(&source) {
                true => Canceled.into(),
                false => RecordsError::Export { path: path.to_owned(), source },
            })?;
            mounted.unmount()?;
        }
        let finished = writer.finish();
        let mut watched =
            finished.map_err(|source| RecordsError::Export { path: path.to_owned(), source: source.into() })?;
        watched.flush().map_err(|source| RecordsError::Io { path: path.to_owned(), source })?;
        Ok(watched.inner)
    }

    /// Removes records: all that are named, or none. One that is named twice is removed once.
    ///
    /// # Errors
    /// [`RecordsError`], among them that one is mounted for writing.
    pub fn remove_records(&self, wanted: &[String]) -> Result<Vec<RecordId>, RecordsError> {
        let cache = self.cache();
        let mut going: Vec<RecordId> = Vec::new();
        for one in wanted {
            let id = cache.find(one)?;
            if let Ok(RecordRow { state: State::Mutable { active, .. }, .. }) = cache.row(id) {
                // Nobody can mount it between this and its removal: the store is ours alone.
                self.check_not_mounted(active).map_err(|error| RecordsError::Mounts(Box::new(error)))?;
            }
            if !going.contains(&id) {
                going.push(id);
            }
        }
        cache.remove(&going)?;
        Ok(going)
    }
}
