//! What becomes of a build's result: an image in the store, at a registry or in an archive, or the files of its tree.
//!
//! Archives and files are written first, then the image is pushed; the store's image and its names come last, in one
//! transaction. So whatever fails, no name points at what was not exported.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufWriter, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use plies_archive::{DiffError, diff_trees, tar};
use plies_image::{ChainLayer, ImageError, LayerStoreError, ManifestRow, NewImage};
use plies_oci::{BlobDigest, ChainId, ErrorKind, ImageConfig, ImageId, Manifest, Reference};
use plies_store::{Attach, Expected, LayerId, Mounted, SnapshotError, SnapshotId, Transfer, canceled_inside};

use super::graph::{self, Plan};
use super::solve::{Results, SolveError};
use super::{BuildError, Config};
use crate::context::{self, CopyError, CopyOptions, Destination, SelectError, Selection, Tree};
use crate::exec::Cancel;
use crate::progress::{Outcome, Progress, Task, Watched};
use crate::save::{ManifestOptions, Saved, Sink, directory_of, partial_path, save_file};
use crate::{Canceled, Engine, Output, PushedImage, SaveError, SaveFormat};

/// What an image is to be like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageOptions {
    /// Its manifest. The default one is made when somebody needs it.
    pub manifest: ManifestOptions,
    /// What else its entry in the index of a layout says.
    pub entry_annotations: BTreeMap<String, String>,
    /// Nothing in the layers that the build adds is later than `SOURCE_DATE_EPOCH`.
    pub rewrite_timestamp: bool,
}

/// Where the result of a build goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildOutput {
    /// Into the store.
    Image {
        /// What it is like.
        options: ImageOptions,
        /// Its names; none: those of the request.
        names: Vec<String>,
        /// It is pushed under its names as well.
        push: bool,
    },
    /// Into an archive.
    Archive {
        /// What it is like.
        options: ImageOptions,
        /// Its names in the archive; none: those of the request.
        names: Vec<String>,
        /// The kind of archive.
        format: SaveFormat,
        /// Where to.
        output: Output,
    },
    /// Only the files of its tree.
    Tree(TreeOutput),
}

/// Where a tree's files go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreeOutput {
    /// Into a directory, over what is there. One that is not there appears when it is whole.
    Directory(PathBuf),
    /// As a tar.
    Tar(Output),
}

/// An image in the store, as any other.
impl Default for BuildOutput {
    fn default() -> Self {
        Self::Image { options: ImageOptions::default(), names: Vec::new(), push: false }
    }
}

impl BuildOutput {
    pub(super) fn rewrites_timestamps(&self) -> bool {
        match self {
            Self::Image { options, .. } | Self::Archive { options, .. } => options.rewrite_timestamp,
            Self::Tree(_) => false,
        }
    }
}

/// Why a tree could not be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// Its tree.
    #[error("mount the tree")]
    Snapshot(#[from] SnapshotError),
    /// Choosing its files.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// Copying its files.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Writing.
    #[error("write {}", path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why it can't be written.
        #[source]
        source: io::Error,
    },
    /// Writing the tar's file.
    #[error(transparent)]
    File(#[from] SaveError),
    /// Reading the tree for the tar.
    #[error("write the tree to {}", path.display())]
    Tar {
        /// To where.
        path: PathBuf,
        /// Why.
        #[source]
        source: DiffError,
    },
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl ExportError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Snapshot(source) => source.kind(),
            Self::Select(source) => source.kind(),
            Self::Copy(source) => source.kind(),
            Self::File(source) => source.kind(),
            Self::Write { .. } | Self::Tar { .. } => ErrorKind::Unavailable,
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// An image whose parts are in the store, held, and that is not listed yet.
struct Finished {
    config: ImageConfig,
    snapshot: Option<SnapshotId>,
    /// `None`: it stands on an image that is not in the layer store.
    layers: Option<Vec<ChainLayer>>,
    size_bytes: u64,
}

/// What was exported.
#[derive(Default)]
pub(super) struct Exported {
    pub(super) id: Option<ImageId>,
    pub(super) manifest: Option<BlobDigest>,
    pub(super) names: Vec<Reference>,
    pub(super) pushed: Vec<PushedImage>,
}

/// A build whose steps are done.
pub(super) struct Export<'a> {
    pub(super) engine: &'a Engine,
    pub(super) plan: &'a Plan,
    pub(super) solved: &'a Results,
    /// Names for outputs that have none of their own.
    pub(super) names: &'a [Reference],
    /// `SOURCE_DATE_EPOCH`.
    pub(super) epoch: Option<jiff::Timestamp>,
    pub(super) transfer: Transfer<'a>,
    pub(super) progress: &'a dyn Progress,
}

impl Export<'_> {
    /// Writes the result to all outputs.
    ///
    /// # Errors
    /// [`BuildError`]; then nothing is listed or named. What was written to other outputs before stays there, and packed
    /// layers stay in the cache, as steps do.
    pub(super) fn write(&self, outputs: &[BuildOutput]) -> Result<Exported, BuildError> {
        let Transfer { lease, cancel, .. } = self.transfer;
        let mut images: BTreeMap<bool, Finished> = BTreeMap::new();
        for rewrite in outputs.iter().map(BuildOutput::rewrites_timestamps).collect::<BTreeSet<bool>>() {
            images.insert(rewrite, self.finish(rewrite)?);
        }
        let image = |options: &ImageOptions| &images[&options.rewrite_timestamp];
        for output in outputs {
            match output {
                BuildOutput::Image { .. } => {}
                BuildOutput::Tree(to) => self.engine.export_tree(images[&false].snapshot, to, self.progress, cancel)?,
                BuildOutput::Archive { options, names, format, output } => {
                    let config = image(options).config.clone();
                    let manifest = self.manifest(&config, &options.manifest)?;
                    let names = self.names_or(names)?.iter().map(ToString::to_string).collect();
                    let saved = Saved { names, manifest, config, entry_annotations: options.entry_annotations.clone() };
                    let task = Task::start(self.progress, "export the archive", None);
                    self.engine.write_images(&[saved], *format, output, task, cancel)?;
                }
            }
        }
        let mut exported = Exported::default();
        let mut listed = Vec::new();
        for output in outputs {
            let BuildOutput::Image { options, names, push } = output else { continue };
            let (image, names) = (image(options), self.names_or(names)?);
            let id = image.config.id();
            // The default one need not be made now, unless the names are those of another one until now.
            let known = self.engine.store().read(|rows| plies_image::get(rows, &id))?;
            let has_other = known.is_some_and(|row| !row.manifests.is_empty());
            // One that an archive has is here already.
            let is_same = |output: &BuildOutput| {
                matches!(output, BuildOutput::Archive { options: other, .. }
                    if (&other.manifest, other.rewrite_timestamp) == (&options.manifest, options.rewrite_timestamp))
            };
            let is_made = has_other || outputs.iter().any(is_same);
            let manifest = match *push || is_made || options.manifest != ManifestOptions::default() {
                true => Some(self.manifest(&image.config, &options.manifest)?),
                false => None,
            };
            if let (true, Some(manifest)) = (*push, &manifest) {
                let pushed =
                    self.engine.push_image(manifest, &image.config, names.clone(), lease, self.progress, cancel);
                exported.pushed.extend(pushed.map_err(Box::new)?);
            }
            exported.id.get_or_insert(id);
            exported.manifest = exported.manifest.or(manifest.as_ref().map(|manifest| manifest.document().digest()));
            exported.names.extend(names.clone());
            listed.push((image, manifest.as_ref().map(Into::into), names));
        }
        if cancel.is_canceled() {
            return Err(Canceled.into());
        }
        self.engine.store().write(|tx| {
            for (image, manifest, names) in &listed {
                let Finished { config, snapshot, layers, size_bytes } = image;
                let manifests: Vec<ManifestRow> = manifest.iter().cloned().collect();
                let (snapshot, layers, size_bytes) = (*snapshot, layers.as_deref(), *size_bytes);
                plies_image::put(tx, &NewImage { config, manifests, snapshot, layers, size_bytes, built_here: true })?;
                for name in names {
                    plies_image::set_name(tx, name, config.id(), manifest.as_ref().map(|row| row.digest))?;
                }
            }
            Ok::<_, ImageError>(())
        })?;
        Ok(exported)
    }

    /// Makes what an image consists of, apart from its manifest.
    fn finish(&self, rewrite_timestamp: bool) -> Result<Finished, BuildError> {
        let Transfer { lease, cancel, .. } = self.transfer;
        let (plan, solved, store) = (self.plan, self.solved, self.engine.store());
        let task = Task::start(self.progress, "export the image", None);
        let target = solved.of(plan.target);
        let snapshot = target.tree.as_ref().map(|tree| tree.extract(cancel)).transpose();
        let mut snapshot = snapshot.map_err(SolveError::from)?.flatten();
        let base = store.read(|rows| plies_image::layers_of_chain(rows, &target.base_diff_ids))?;
        let mut added = target.layers.clone();
        if let (true, Some(epoch), Some(of)) = (rewrite_timestamp, self.epoch, snapshot) {
            let below = || {
                let all = store.snapshots().info(of).map_err(plies_store::TransferError::from)?.layers;
                Ok::<_, BuildError>(all.into_iter().filter(|layer| !added.contains(layer)).collect())
            };
            let mut stack: Vec<LayerId> = base.clone().map_or_else(below, Ok)?;
            let mut chain = target.base_diff_ids.iter().fold(None, |chain, id| Some(ChainId::extend(chain, *id)));
            for layer in &mut added {
                *layer = self.transfer.clamped(*layer, epoch.as_second(), &stack, chain)?;
                chain = Some(ChainId::extend(chain, self.transfer.diff_id_of(*layer)?));
                stack.push(*layer);
            }
            snapshot = Some(store.snapshots().ensure(&stack, lease).map_err(plies_store::TransferError::from)?);
        }
        let mut diff_ids = target.base_diff_ids.clone();
        for layer in &added {
            diff_ids.push(self.transfer.diff_id_of(*layer)?);
        }
        let epoch = self.epoch.map(|epoch| epoch.to_string());
        let made = |vertex| solved.of(vertex).made.map(|made| epoch.clone().unwrap_or_else(|| crate::rfc3339(made)));
        let key = |vertex| solved.of(vertex).key.to_string();
        let (history, created) = graph::history(&plan.history, plan.base_created.as_deref(), made, key);
        let config: Config = plan.config.clone();
        let config = config.finish(epoch.or(created).as_deref(), &diff_ids, &history);
        let config = ImageConfig::parse(&config).map_err(ImageError::from)?;
        let ids: Option<Vec<LayerId>> = base.map(|base| base.into_iter().chain(added).collect());
        let layers = ids.map(|ids| plies_image::chain_layers(store, &diff_ids, &ids)).transpose();
        let layers = layers.map_err(LayerStoreError::from)?;
        let size_bytes = self.engine.layer_sizes(&diff_ids)?.into_iter().sum();
        let mut ingest = store.content().ingest_unnamed()?;
        std::io::Write::write_all(&mut ingest, config.document().raw())
            .map_err(|source| BuildError::Read { path: "the new config".into(), source })?;
        ingest.commit(Expected::anything(), lease)?;
        task.end(Outcome::Done);
        Ok(Finished { config, snapshot, layers, size_bytes })
    }

    fn manifest(&self, config: &ImageConfig, options: &ManifestOptions) -> Result<Manifest, BuildError> {
        let failed = |source| SaveError::Layer { image: config.id().to_string(), source };
        Ok(self.engine.make_manifest(config, options, &self.transfer, failed)?)
    }

    fn names_or(&self, own: &[String]) -> Result<Vec<Reference>, BuildError> {
        match own {
            [] => Ok(self.names.to_vec()),
            own => Ok(own.iter().map(|name| crate::images::plain_name(name)).collect::<Result<_, _>>()?),
        }
    }
}

impl Engine {
    /// Writes the files of a tree, with all their metadata. The caller holds it.
    ///
    /// # Errors
    /// [`ExportError`]. A directory that was there then holds a part of the files; of anything else there is nothing.
    fn export_tree(
        &self,
        snapshot: Option<SnapshotId>,
        output: &TreeOutput,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), ExportError> {
        let task = Task::start(progress, "export the files", None);
        let mounted = snapshot.map(|snapshot| self.store().snapshots().view(snapshot, Attach::Detached)).transpose()?;
        let written = match output {
            TreeOutput::Directory(path) => write_directory(mounted.as_ref(), path, cancel),
            TreeOutput::Tar(Output::Path(path)) => {
                let sink = Sink { path: path.clone(), task: &task, cancel };
                save_file(path, &sink, |file| write_tar(mounted.as_ref(), file, path, &task, cancel))
            }
            TreeOutput::Tar(Output::Stdout) => {
                write_tar(mounted.as_ref(), io::stdout(), Path::new("<standard output>"), &task, cancel)
            }
        };
        mounted.map_or(Ok(()), Mounted::unmount)?;
        written.map_err(|error| if canceled_inside(&error) { Canceled.into() } else { error })?;
        task.end(Outcome::Done);
        Ok(())
    }
}

fn write_directory(mounted: Option<&Mounted>, path: &Path, cancel: &Cancel) -> Result<(), ExportError> {
    let io = |source| ExportError::Write { path: path.to_owned(), source };
    // A link that leads nowhere is somebody's, and in the way.
    match std::fs::symlink_metadata(path) {
        Ok(_) => return copy_tree(mounted, path, cancel),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    let parent = directory_of(path);
    std::fs::create_dir_all(parent).map_err(io)?;
    let partial = loop {
        let partial = partial_path(parent);
        match std::fs::create_dir(&partial) {
            Ok(()) => break partial,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io(error)),
        }
    };
    let written = copy_tree(mounted, &partial, cancel).and_then(|()| std::fs::rename(&partial, path).map_err(io));
    if written.is_err() {
        // The error that made it useless is the one to tell.
        drop(std::fs::remove_dir_all(&partial));
    }
    written
}

fn copy_tree(mounted: Option<&Mounted>, path: &Path, cancel: &Cancel) -> Result<(), ExportError> {
    let io = |source| ExportError::Write { path: path.to_owned(), source };
    let dest = Tree::open_dir(path).map_err(io)?;
    let Some(mounted) = mounted else { return Ok(()) };
    let root = rustix::io::fcntl_dupfd_cloexec(mounted.root(), 0).map_err(|errno| io(errno.into()))?;
    let tree = Tree::stage(root).cancelable(cancel);
    let mut selection = Selection::new(None);
    selection.add(&tree, b"/")?;
    let options = CopyOptions { dest: Destination::new(b"/", b"/"), owner: None, chmod: None };
    context::copy(&tree, &selection, dest.as_fd(), &options)?;
    Ok(())
}

fn write_tar<W: io::Write>(
    mounted: Option<&Mounted>,
    out: W,
    path: &Path,
    task: &Task<'_>,
    cancel: &Cancel,
) -> Result<(), ExportError> {
    let io = |source: io::Error| ExportError::Write { path: path.to_owned(), source };
    let mut writer = tar::Writer::new(Watched { inner: BufWriter::new(out), task: Some(task), cancel });
    if let Some(mounted) = mounted {
        let written = diff_trees(None, mounted.root().as_fd(), &mut writer);
        written.map_err(|source| ExportError::Tar { path: path.to_owned(), source })?;
    }
    let finished = writer.finish().map_err(|source| ExportError::Tar { path: path.to_owned(), source: source.into() });
    finished?.flush().map_err(io)
}
