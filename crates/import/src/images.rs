//! Images on their way into a store: layers by chain, images by config, names, and containers' writable layers. The reader of
//! each source finds out what there is ([`Source`]); what becomes of it is the same for all.
//!
//! | there | becomes |
//! |---|---|
//! | layer that an image needs | a layer that gives back the tar of its diff ID, if its files do; files by hard link |
//! | layer whose tree is not what its tar unpacks to (other owners, opaque directories) | what that tar unpacks to |
//! | image, name | an image with the same ID, the same name |
//! | container's writable layer, if asked for | a writable layer under the container's ID, by copy |
//!
//! The source may be in use meanwhile: what nobody writes to any more is linked, and what goes under our hands is told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use plies_image::{ImageError, LayerRef, LayerStore, LayerStoreError, LayerStoreOptions, NewRwLayer, Taken};
use plies_oci::{BlobDigest, ChainId, DiffId, DocumentLimits, ImageConfig, ImageId, Manifest, Reference};
use plies_store::progress::{self, Task};
use plies_store::{Canceled, GcMode, Indexes, LayerBlob, LayerId, Lease, LeaseOptions, parallel};

use crate::containerd::SnapshotInfo;
use crate::take::{Tar, TookLayer, WantedBlob, WantedLayer, measure, open_dir, open_file, workers};
use crate::{Import, ImportError, ImportReport, ImportedItem, Outcome, chain};

/// Layers that come over together: enough to keep all threads busy, and what a kill can undo.
const LAYERS_AT_ONCE: usize = 256;

/// What becomes of writable layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Containers {
    /// They are listed.
    List,
    /// They come over.
    Take,
}

/// A layer as its source has it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) diff_id: DiffId,
    pub(crate) parent: Option<ChainId>,
    pub(crate) files: Files,
}

/// The files of a layer, and what says which tar they are. A tree is an overlay's upper directory.
#[derive(Debug)]
pub(crate) enum Files {
    /// A tree that gives its tar back with a tar-split.
    Split { tree: PathBuf, recording: PathBuf },
    /// A blob, and the tree that it was unpacked to, if it was.
    Blob { blob: WantedBlob, tree: Option<PathBuf> },
}

/// An image, by the digest of its config.
#[derive(Debug)]
pub(crate) struct Image {
    raw: Vec<u8>,
    pub(crate) diff_ids: Vec<DiffId>,
    pub(crate) parent: Option<ImageId>,
    pub(crate) built_here: bool,
    /// The manifests that its source has of it, with the blobs of their layers.
    pub(crate) manifests: Vec<(Manifest, Vec<WantedBlob>)>,
}

/// A name of an image.
#[derive(Debug)]
pub(crate) struct Name {
    pub(crate) reference: Reference,
    pub(crate) image: ImageId,
    /// The one of its manifests that the name stands for, where that is kept.
    pub(crate) manifest: Option<BlobDigest>,
    /// Whose name it is, where there may be several.
    pub(crate) description: String,
}

/// A writable layer.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) parent: Option<ChainId>,
    pub(crate) upper: PathBuf,
    /// What lies between it and its parent, and is no layer of an image.
    pub(crate) init: Option<PathBuf>,
    /// What people call it.
    pub(crate) description: String,
}

/// What could be read of a thing, or why not.
pub(crate) type Read<T> = Result<T, String>;

/// How far a layer came by itself.
enum Staged {
    /// It is here.
    Layer(LayerId),
    /// It is to be unpacked over those below it.
    ToUnpack,
    /// In a dry run: it would be here, with so many bytes.
    WouldBe(u64),
}

/// A layer that is here by now, or would be.
#[derive(Debug, Clone, Copy)]
struct Came {
    diff_id: DiffId,
    /// `None` in a dry run.
    layer: Option<LayerId>,
}

/// A blob that is here by now, or would be.
#[derive(Debug, Clone, Copy)]
struct TakenBlob {
    blob: LayerBlob,
    /// What it decompresses to, in a dry run.
    tar_bytes: u64,
}

/// All that there is.
#[derive(Debug, Default)]
pub(crate) struct Source {
    pub(crate) layers: BTreeMap<ChainId, Read<Layer>>,
    pub(crate) images: BTreeMap<ImageId, Read<Image>>,
    pub(crate) names: Vec<(String, Read<Name>)>,
    pub(crate) containers: BTreeMap<String, Read<Container>>,
}

/// Takes over what can be taken of `source`. What of it cannot be is in the report.
pub(crate) fn take(
    import: &Import<'_>,
    source: &Source,
    containers: Containers,
    report: ImportReport,
) -> Result<ImportReport, ImportError> {
    let task = Task::start(import.progress, &format!("import {} layers", source.layers.len()), None);
    let lease = import.store.lease(LeaseOptions::process("import"))?;
    let layer_store = LayerStore::open(import.store, LayerStoreOptions::default())?;
    let (came, blobs) = (BTreeMap::new(), HashMap::new());
    let mut passage = Passage { import, source, lease: &lease, layer_store, report, came, blobs };
    let done = passage.run(containers);
    let report = passage.report;
    lease.release()?;
    if done.is_err() {
        // The error to tell is the first one; what could not be removed now goes with the next collection.
        drop(import.store.gc(GcMode::Run));
    }
    done?;
    task.end(progress::Outcome::Done);
    Ok(report)
}

impl Layer {
    fn blob(&self) -> Option<&WantedBlob> {
        match &self.files {
            Files::Split { .. } => None,
            Files::Blob { blob, .. } => Some(blob),
        }
    }
}

impl Name {
    /// A name of an image of which its source keeps no manifests.
    pub(crate) fn of(reference: Reference, image: ImageId) -> Self {
        Self { reference, image, manifest: None, description: String::new() }
    }
}

impl Image {
    /// Reads the config of the image `id`.
    pub(crate) fn read(id: ImageId, path: &Path, limits: &DocumentLimits) -> Read<Self> {
        let raw = read_bytes(path, limits.config_bytes)?;
        match ImageId::from_bytes(*BlobDigest::of(&raw).as_bytes()) {
            actual if actual == id => {}
            actual => return Err(format!("its config is damaged: it has the digest {actual}")),
        }
        let config = ImageConfig::parse_within(&raw, limits).map_err(|error| chain(&error))?;
        let diff_ids = config.diff_ids().to_vec();
        Ok(Self { raw, diff_ids, parent: None, built_here: false, manifests: Vec::new() })
    }
}

pub(crate) fn read_bytes(path: &Path, bytes_max: u64) -> Read<Vec<u8>> {
    let failed = |error: io::Error| format!("read {}: {error}", path.display());
    let mut bytes = Vec::new();
    open_file(path).map_err(failed)?.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > bytes_max {
        true => Err(format!("{} is longer than {bytes_max} bytes", path.display())),
        false => Ok(bytes),
    }
}

/// What is in a directory, by name. One that is not there has nothing.
pub(crate) fn entries(dir: &Path, report: &mut ImportReport) -> Vec<(String, PathBuf)> {
    let read = || -> io::Result<Vec<(String, PathBuf)>> {
        let entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries.into_iter().map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())).collect())
    };
    let mut found = match read() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            report.problem("directory", dir.display().to_string(), chain(&error));
            Vec::new()
        }
    };
    found.sort();
    found
}

impl Source {
    /// The chains from the bottom up to `top`; why they do not reach down.
    fn below(&self, top: Option<ChainId>) -> Read<Vec<ChainId>> {
        let mut chains = Vec::new();
        let mut next = top;
        while let Some(chain_id) = next {
            let layer = self.layers.get(&chain_id).ok_or_else(|| format!("there is no layer {chain_id}"))?;
            let layer = layer.as_ref().map_err(|why| format!("layer {chain_id}: {why}"))?;
            // A chain ID is a digest of the one below it, so this comes to an end.
            chains.push(chain_id);
            next = layer.parent;
        }
        chains.reverse();
        Ok(chains)
    }
}

pub(crate) fn tell(
    report: &mut ImportReport,
    kind: &'static str,
    name: impl ToString,
    outcome: Outcome,
    id: Option<String>,
    size_bytes: u64,
    why: Option<String>,
) {
    let (name, description) = (name.to_string(), String::new());
    report.items.push(ImportedItem { kind, name, description, outcome, id, size_bytes, why });
}

struct Passage<'a> {
    import: &'a Import<'a>,
    source: &'a Source,
    lease: &'a Lease,
    layer_store: LayerStore,
    report: ImportReport,
    came: BTreeMap<ChainId, Read<Came>>,
    blobs: HashMap<BlobDigest, Read<TakenBlob>>,
}

impl Passage<'_> {
    fn run(&mut self, containers: Containers) -> Result<(), ImportError> {
        self.take_layers(containers)?;
        self.take_images()?;
        self.take_names()?;
        self.take_containers(containers)
    }

    fn tell(&mut self, kind: &'static str, name: impl ToString, outcome: Outcome, why: Option<String>) {
        tell(&mut self.report, kind, name, outcome, None, 0, why);
    }

    /// Layers that somebody needs.
    fn take_layers(&mut self, containers: Containers) -> Result<(), ImportError> {
        let images = self.source.images.values().flatten().filter_map(|image| ChainId::of(&image.diff_ids));
        let wanted = self.source.containers.values().flatten().filter(|_| containers == Containers::Take);
        let mut needed: BTreeSet<ChainId> = BTreeSet::new();
        for top in images.chain(wanted.filter_map(|container| container.parent)).collect::<BTreeSet<_>>() {
            needed.extend(self.source.below(Some(top)).into_iter().flatten());
        }
        // Each behind those that it stands on.
        let mut ordered: Vec<(usize, ChainId, &Layer)> = Vec::new();
        for (chain_id, layer) in &self.source.layers {
            match (layer, self.source.below(Some(*chain_id))) {
                (Ok(layer), Ok(below)) if needed.contains(chain_id) => ordered.push((below.len(), *chain_id, layer)),
                (Ok(_), Ok(_)) => {
                    self.tell("layer", chain_id, Outcome::Left, Some("no image needs it".into()));
                }
                (Err(why), _) => self.fail_layer(*chain_id, why.clone()),
                (Ok(_), Err(why)) => self.fail_layer(*chain_id, format!("what it stands on failed: {why}")),
            }
        }
        ordered.sort_by_key(|(depth, chain_id, _)| (*depth, *chain_id));
        for some in ordered.chunks(LAYERS_AT_ONCE) {
            self.take_some(some)?;
        }
        Ok(())
    }

    fn fail_layer(&mut self, chain_id: ChainId, why: String) {
        self.came.insert(chain_id, Err(why.clone()));
        self.tell("layer", chain_id, Outcome::Failed, Some(why));
    }

    /// Takes layers in, all at the same time: a tree that was unpacked is a layer whatever it stands on.
    fn take_some(&mut self, some: &[(usize, ChainId, &Layer)]) -> Result<(), ImportError> {
        let import = self.import;
        let mut new: Vec<(ChainId, &Layer)> = Vec::new();
        // Those that are one with another of them, which comes first.
        let mut seen: BTreeSet<DiffId> = BTreeSet::new();
        let mut later: BTreeSet<ChainId> = BTreeSet::new();
        for (_, chain_id, layer) in some {
            if let Some(known) = self.known(*chain_id, layer)? {
                self.here(*chain_id, known);
            } else if seen.insert(layer.diff_id) {
                new.push((*chain_id, layer));
            } else {
                later.insert(*chain_id);
            }
        }
        self.take_blobs(new.iter().filter_map(|(_, layer)| layer.blob()))?;
        let mut came: BTreeMap<ChainId, Read<Staged>> = match import.options.dry_run {
            true => self.check_some(&new)?,
            false => self.link_some(&new)?,
        };
        for (_, chain_id, layer) in some {
            if self.came.contains_key(chain_id) {
                continue;
            }
            import.cancel.check().map_err(|_| Canceled)?;
            if later.contains(chain_id)
                && let Some(known) = self.known(*chain_id, layer)?
            {
                self.here(*chain_id, known);
                continue;
            }
            let below = self.stack(layer.parent).map_err(|why| format!("what it stands on failed: {why}"));
            let staged = below.and_then(|below| match came.remove(chain_id) {
                Some(Ok(Staged::Layer(id))) => Ok((Some(id), 0)),
                Some(Ok(Staged::WouldBe(size_bytes))) => Ok((None, size_bytes)),
                Some(Err(why)) => Err(why),
                None if import.options.dry_run => Ok((None, 0)),
                Some(Ok(Staged::ToUnpack)) | None => self.unpack(layer, *chain_id, &below).map(|id| (Some(id), 0)),
            });
            import.cancel.check().map_err(|_| Canceled)?;
            match staged {
                Ok((Some(id), _)) => {
                    let size_bytes = import.store.layers().info(id)?.usage.size_bytes;
                    self.took(*chain_id, layer, Some(id), size_bytes);
                }
                Ok((None, size_bytes)) => self.took(*chain_id, layer, None, size_bytes),
                Err(why) => self.fail_layer(*chain_id, why),
            }
        }
        Ok(())
    }

    /// Links the trees of layers whose blobs are here.
    fn link_some(&self, some: &[(ChainId, &Layer)]) -> Result<BTreeMap<ChainId, Read<Staged>>, ImportError> {
        let mut staged = BTreeMap::new();
        let (mut wanted, mut whose) = (Vec::new(), Vec::new());
        for (chain_id, layer) in some {
            let (tree, tar) = match &layer.files {
                Files::Split { tree, recording } => (tree, Tar::Split(recording.clone())),
                Files::Blob { blob, tree } => match (self.blob(blob), tree) {
                    (Ok(taken), Some(tree)) => (tree, Tar::Unpacked(taken.blob)),
                    (taken, _) => {
                        staged.insert(*chain_id, taken.map(|_| Staged::ToUnpack));
                        continue;
                    }
                },
            };
            whose.push(*chain_id);
            wanted.push(WantedLayer {
                snapshot: SnapshotInfo::upper(tree.clone()),
                before: None,
                below: Vec::new(),
                tar: Some((layer.diff_id, tar)),
                may_change: false,
            });
        }
        let taken = self.import.take_layers(&wanted, &Indexes::default(), self.lease)?;
        for (chain_id, taken) in whose.into_iter().zip(taken) {
            staged.insert(
                chain_id,
                match taken {
                    TookLayer::Taken(taken) => Ok(Staged::Layer(taken.id)),
                    TookLayer::Differs => Ok(Staged::ToUnpack),
                    TookLayer::Wrong(why) => Err(why),
                    TookLayer::Failed(error) => Err(chain(&error)),
                },
            );
        }
        Ok(staged)
    }

    /// What would become of layers whose blobs were looked at.
    fn check_some(&self, some: &[(ChainId, &Layer)]) -> Result<BTreeMap<ChainId, Read<Staged>>, ImportError> {
        let import = self.import;
        let check = |layer: &Layer| match &layer.files {
            Files::Split { tree, recording } => {
                import.would_take(layer.diff_id, recording, tree)?;
                Ok(measure(tree))
            }
            Files::Blob { blob, tree } => {
                let tar_bytes = self.blob(blob)?.tar_bytes;
                Ok(tree.as_ref().map_or(tar_bytes, |tree| measure(tree)))
            }
        };
        let checked = parallel(
            some,
            workers(),
            |_| 0,
            |(chain_id, layer)| {
                import.cancel.check().map_err(|_| Canceled)?;
                Ok::<_, Canceled>((*chain_id, check(layer).map(Staged::WouldBe)))
            },
        )?;
        Ok(checked.into_iter().collect())
    }

    fn here(&mut self, chain_id: ChainId, known: Came) {
        let id = known.layer.map(|layer| layer.to_string());
        tell(&mut self.report, "layer", chain_id, Outcome::Here, id, 0, None);
        self.came.insert(chain_id, Ok(known));
    }

    /// Makes a layer of what its tar unpacks to.
    fn unpack(&self, layer: &Layer, chain_id: ChainId, below: &[Came]) -> Read<LayerId> {
        let below: Vec<LayerId> = below.iter().filter_map(|below| below.layer).collect();
        match &layer.files {
            Files::Split { tree, recording } => {
                let below = (below.as_slice(), layer.parent);
                self.import.unpack_recording(layer.diff_id, recording, tree, below, self.lease)
            }
            Files::Blob { blob, .. } => self.import.unpack_blob(blob, chain_id, &below, self.lease),
        }
    }

    /// A blob that was taken in, or why it was not.
    fn blob(&self, wanted: &WantedBlob) -> Read<TakenBlob> {
        let taken = self.blobs.get(&wanted.digest);
        taken.map_or_else(|| Err(format!("blob {} was not looked for", wanted.digest)), Clone::clone)
    }

    /// Takes in blobs, each once, or looks whether it could be.
    fn take_blobs<'w>(&mut self, wanted: impl Iterator<Item = &'w WantedBlob>) -> Result<(), ImportError> {
        let mut new: BTreeMap<BlobDigest, WantedBlob> = wanted.map(|blob| (blob.digest, blob.clone())).collect();
        new.retain(|digest, _| !self.blobs.contains_key(digest));
        let new: Vec<WantedBlob> = new.into_values().collect();
        let content = self.import.store.content();
        let mut here = BTreeSet::new();
        for blob in &new {
            if content.info(blob.digest)?.is_some() {
                here.insert(blob.digest);
            }
        }
        for (digest, taken) in self.take_or_check(&new)? {
            if let Ok(taken) = &taken
                && !here.contains(&digest)
            {
                self.report.blobs_count += 1;
                self.report.blob_bytes += taken.blob.size_bytes;
            }
            self.blobs.insert(digest, taken);
        }
        Ok(())
    }

    fn took(&mut self, chain_id: ChainId, layer: &Layer, id: Option<LayerId>, size_bytes: u64) {
        self.report.layers_count += 1;
        self.report.layer_bytes += size_bytes;
        let text = id.map(|id| id.to_string());
        tell(&mut self.report, "layer", chain_id, Outcome::Taken, text, size_bytes, None);
        self.came.insert(chain_id, Ok(Came { diff_id: layer.diff_id, layer: id }));
    }

    /// A layer that is here, and held now; in a dry run, one that is or would be.
    fn known(&self, chain_id: ChainId, layer: &Layer) -> Result<Option<Came>, ImportError> {
        let layers = self.import.store.layers();
        if self.import.options.dry_run {
            let would_be = self.came.values().flatten().any(|came| came.diff_id == layer.diff_id);
            let diff_ids = || -> Read<Vec<DiffId>> {
                let below = self.source.below(Some(chain_id))?;
                Ok(below.iter().filter_map(|id| Some(self.source.layers.get(id)?.as_ref().ok()?.diff_id)).collect())
            };
            let is_here = would_be
                || layers.find_by_diff_id(layer.diff_id)?.is_some()
                || self
                    .import
                    .store
                    .read(|rows| plies_image::layers_of_chain(rows, &diff_ids().unwrap_or_default()))?
                    .is_some_and(|layers| !layers.is_empty());
            return Ok(is_here.then_some(Came { diff_id: layer.diff_id, layer: None }));
        }
        let found = match layers.hold_by_diff_id(layer.diff_id, self.lease)? {
            None => layers.hold_by_chain(chain_id, self.lease)?,
            found => found,
        };
        // A row whose files are gone is no layer to build on.
        let found = found.filter(|found| layers.root(*found).is_ok());
        Ok(found.map(|found| Came { diff_id: layer.diff_id, layer: Some(found) }))
    }

    /// The layers of a chain, all of which came, bottom first; or which did not.
    fn stack(&self, top: Option<ChainId>) -> Read<Vec<Came>> {
        let came = |chain_id: ChainId| match self.came.get(&chain_id) {
            Some(Ok(came)) => Ok(*came),
            Some(Err(why)) => Err(format!("layer {chain_id}: {why}")),
            None => Err(format!("there is no layer {chain_id}")),
        };
        self.source.below(top)?.into_iter().map(came).collect()
    }

    /// Puts a stack into the layer store; it stays there as long as the reference, or what is made on it until then.
    fn adopt(&self, stack: &[Came]) -> Result<Option<LayerRef>, ImportError> {
        let diff_ids: Vec<DiffId> = stack.iter().map(|came| came.diff_id).collect();
        let layers: Vec<LayerId> = stack.iter().filter_map(|came| came.layer).collect();
        Ok(self.layer_store.adopt(&plies_image::chain_layers(self.import.store, &diff_ids, &layers)?)?)
    }

    /// Images, each behind its parent.
    fn take_images(&mut self) -> Result<(), ImportError> {
        let source = self.source;
        let mut told: BTreeSet<ImageId> = BTreeSet::new();
        for first in source.images.keys() {
            // Up to what is done, or is on the way already: then parents lead in a circle.
            let mut line = Vec::new();
            let mut next = Some(*first);
            while let Some(id) = next.filter(|id| source.images.contains_key(id) && told.insert(*id)) {
                line.push(id);
                next = source.images.get(&id).and_then(|image| image.as_ref().ok()?.parent);
            }
            for id in line.into_iter().rev() {
                self.import.cancel.check().map_err(|_| Canceled)?;
                match &source.images[&id] {
                    Ok(image) => self.take_image(id, image)?,
                    Err(why) => self.tell("image", id, Outcome::Failed, Some(why.clone())),
                }
            }
        }
        Ok(())
    }

    fn take_image(&mut self, id: ImageId, image: &Image) -> Result<(), ImportError> {
        let (store, is_dry) = (self.import.store, self.import.options.dry_run);
        let here = store.read(|rows| plies_image::get(rows, &id))?;
        // One that was pulled lazily has its layers now.
        let is_whole = |row: &plies_image::ImageRow| {
            let has = |digest| row.manifests.iter().any(|manifest| manifest.digest == digest);
            (row.chain.is_some() || image.diff_ids.is_empty())
                && image.manifests.iter().all(|(manifest, _)| has(manifest.document().digest()))
        };
        let outcome = if here.as_ref().is_some_and(is_whole) { Outcome::Here } else { Outcome::Taken };
        let mut why = None;
        if outcome == Outcome::Taken {
            let stack = match self.stack(ChainId::of(&image.diff_ids)) {
                Ok(stack) => stack,
                Err(why) => {
                    self.tell("image", id, Outcome::Failed, Some(why));
                    return Ok(());
                }
            };
            if !is_dry {
                let _held = self.adopt(&stack)?;
                match plies_image::create(store, &image.raw, image.built_here, self.lease) {
                    Ok(_) => {}
                    Err(error @ (ImageError::Config(_) | ImageError::Layers { .. })) => {
                        self.tell("image", id, Outcome::Failed, Some(chain(&error)));
                        return Ok(());
                    }
                    Err(other) => return Err(other.into()),
                }
            }
            why = self.take_manifests(id, image)?;
        }
        if let Some(parent) = image.parent
            && !is_dry
            && here.is_none_or(|row| row.parent.is_none())
        {
            match store.write(|tx| plies_image::set_parent(tx, id, Some(parent))) {
                Ok(()) => {}
                Err(error @ (ImageError::NotFound { .. } | ImageError::Circle { .. })) => {
                    why = Some(format!("without its parent: {}", chain(&error)));
                }
                Err(other) => return Err(other.into()),
            }
        }
        tell(&mut self.report, "image", id, outcome, Some(id.to_string()), 0, why);
        Ok(())
    }

    fn take_or_check(&self, wanted: &[WantedBlob]) -> Result<Vec<(BlobDigest, Read<TakenBlob>)>, ImportError> {
        if !self.import.options.dry_run {
            let taken = self.import.take_blobs(wanted, self.lease)?;
            let taken = taken.into_iter().map(|(digest, taken)| {
                (digest, taken.map(|blob| TakenBlob { blob, tar_bytes: 0 }).map_err(|error| chain(&error)))
            });
            return Ok(taken.collect());
        }
        Ok(parallel(
            wanted,
            workers(),
            |_| 0,
            |wanted| {
                self.import.cancel.check().map_err(|_| Canceled)?;
                let checked = self.import.check_blob(wanted);
                Ok::<_, Canceled>((wanted.digest, checked.map(|(blob, tar_bytes)| TakenBlob { blob, tar_bytes })))
            },
        )?)
    }

    /// Takes the manifests of an image that is here by now; without which of them it has to do.
    fn take_manifests(&mut self, id: ImageId, image: &Image) -> Result<Option<String>, ImportError> {
        let store = self.import.store;
        let mut without = None;
        for (manifest, blobs) in &image.manifests {
            self.take_blobs(blobs.iter())?;
            if let Some(why) = blobs.iter().find_map(|blob| self.blob(blob).err()) {
                without = Some(format!("without its manifest {}: {why}", manifest.document().digest()));
                continue;
            }
            if !self.import.options.dry_run {
                let blobs: Vec<BlobDigest> = blobs.iter().map(|blob| blob.digest).collect();
                plies_image::keep_documents(store, manifest, &image.raw, &blobs, self.lease)?;
                store.write(|tx| plies_image::add_manifest(tx, id, &manifest.into()))?;
            }
        }
        Ok(without)
    }

    fn take_names(&mut self) -> Result<(), ImportError> {
        // In a dry run, what would be there.
        let mut names: BTreeMap<String, ImageId> = BTreeMap::new();
        for (name, read) in &self.source.names {
            let (outcome, why) = match read {
                Err(why) => (Outcome::Failed, Some(why.clone())),
                Ok(read) => self.take_name(read, &mut names)?,
            };
            self.tell("name", name, outcome, why);
            if let (Some(item), Ok(read)) = (self.report.items.last_mut(), read) {
                item.description.clone_from(&read.description);
            }
        }
        Ok(())
    }

    fn take_name(
        &self,
        name: &Name,
        names: &mut BTreeMap<String, ImageId>,
    ) -> Result<(Outcome, Option<String>), ImportError> {
        let (store, is_dry) = (self.import.store, self.import.options.dry_run);
        let Name { reference, image, manifest, .. } = name;
        let named = store.read(|rows| plies_image::named(rows, reference))?;
        match named.or_else(|| names.get(&reference.to_string()).copied()) {
            Some(named) if named == *image => return Ok((Outcome::Here, None)),
            Some(named) => return Ok((Outcome::Left, Some(format!("it is the name of image {named} here")))),
            None => {}
        }
        let row = store.read(|rows| plies_image::get(rows, image))?;
        let would_be = || {
            let text = image.to_string();
            let is_it = |item: &&ImportedItem| item.kind == "image" && item.name == text;
            self.report.items.iter().rev().find(is_it).is_some_and(|item| item.outcome == Outcome::Taken)
        };
        if row.is_none() && !(is_dry && would_be()) {
            return Ok((Outcome::Failed, Some(format!("its image {image} did not come over"))));
        }
        // Without its manifest the name stands for the image alone.
        let manifest = manifest.filter(|digest| {
            row.as_ref().is_some_and(|row| row.manifests.iter().any(|manifest| manifest.digest == *digest))
        });
        match is_dry {
            true => drop(names.insert(reference.to_string(), *image)),
            false => store.write(|tx| plies_image::add_name(tx, reference, *image, manifest, Taken::Refuse))?,
        }
        Ok((Outcome::Taken, None))
    }

    fn take_containers(&mut self, containers: Containers) -> Result<(), ImportError> {
        let source = self.source;
        let known: BTreeSet<String> = self.layer_store.list_rw()?.into_iter().map(|info| info.name).collect();
        for (name, container) in &source.containers {
            self.import.cancel.check().map_err(|_| Canceled)?;
            let mut size_bytes = 0;
            let (outcome, why) = match container {
                Err(why) => (Outcome::Failed, Some(why.clone())),
                Ok(_) if known.contains(name) => (Outcome::Here, None),
                Ok(_) if containers == Containers::List => (Outcome::Left, Some("it was not asked for".to_owned())),
                Ok(container) => match self.take_container(name, container)? {
                    Err(why) => (Outcome::Failed, Some(why)),
                    Ok(()) => {
                        size_bytes = measure(&container.upper);
                        self.report.layers_count += 1;
                        self.report.layer_bytes += size_bytes;
                        (Outcome::Taken, None)
                    }
                },
            };
            let id = matches!(outcome, Outcome::Taken | Outcome::Here).then(|| name.clone());
            tell(&mut self.report, "container", name, outcome, id, size_bytes, why);
            if let (Some(item), Ok(container)) = (self.report.items.last_mut(), container) {
                item.description.clone_from(&container.description);
            }
        }
        Ok(())
    }

    fn take_container(&self, name: &str, container: &Container) -> Result<Read<()>, ImportError> {
        let stack = match self.stack(container.parent) {
            Ok(stack) => stack,
            Err(why) => return Ok(Err(why)),
        };
        let import = self.import;
        if import.options.dry_run {
            return Ok(Ok(()));
        }
        let copy = |from: &Path, root: BorrowedFd<'_>| {
            let from = open_dir(from).map_err(io::Error::other)?;
            import.store.snapshots().copy_changes(&from, root, import.cancel).map_err(io::Error::other)
        };
        let mut init = |root: BorrowedFd<'_>| container.init.as_deref().map_or(Ok(()), |dir| copy(dir, root));
        let mut fill = |root: BorrowedFd<'_>| copy(&container.upper, root);
        // What it stands on stays until it is held by the writable layer.
        let _held = self.adopt(&stack)?;
        let new = NewRwLayer {
            parent: container.parent,
            init: if container.init.is_some() { Some(&mut init) } else { None },
            fill: Some(&mut fill),
            ..NewRwLayer::default()
        };
        match self.layer_store.create_rw(name, new, self.lease) {
            Ok(made) => {
                drop(made);
                Ok(Ok(()))
            }
            Err(_) if import.cancel.is_canceled() => Err(Canceled.into()),
            Err(error @ (LayerStoreError::Init { .. } | LayerStoreError::Name { .. })) => Ok(Err(chain(&error))),
            Err(other) => Err(other.into()),
        }
    }
}
