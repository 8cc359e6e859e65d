//! `ply save`: images into an archive.
//!
//! An image that was loaded goes out with the manifest and the blobs that it came with, byte for byte. One that was
//! built gets a manifest and compressed blobs here, from its layers, and keeps them. `ply layer export` goes the same way.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use plies_archive::compress;
use plies_archive::hash::HashingReader;
use plies_archive::tar::{self, Entry, EntryKind, EntryPath, Timestamp, WriteError};
use plies_image::{Found, ImageError, LayerStoreError};
use plies_oci::{
    BlobDigest, Compression, Descriptor, DiffId, DocumentError, ErrorKind, Family, ImageConfig, ImageId, Index,
    Manifest, MediaClass, Reference, classify,
};
use plies_store::{BlobError, CatalogueError, LayerBlob, Lease, Packing, Transfer, TransferError};
use serde_json::json;

use crate::exec::Cancel;
use crate::images::ImagesError;
use crate::load::{LoadError, blob_name};
use crate::progress::{Outcome, Progress, Task};
use crate::{Canceled, Engine};

/// What an OCI layout's marker file says (image-spec, `image-layout.md`).
const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// Where an index carries an image's name: containerd and docker read the first, podman and skopeo the second.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// Other ways to say standard output. Opened anew, a redirected one would be written from its beginning.
const STDOUT_PATHS: [&str; 3] = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];

/// Symbolic links that are followed at most, as the kernel does (`path_resolution(7)`).
const SYMLINKS_MAX: usize = 40;

/// How long to wait before looking again whether a FIFO has a reader.
const READER_WAIT: Duration = Duration::from_millis(50);

/// Buffer in front of the output.
const BUFFER_BYTES: usize = 256 << 10;

/// What kind of archive to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveFormat {
    /// OCI layout in a tar.
    Oci,
    /// OCI layout in a directory.
    OciDirectory,
    /// Docker archive: plain layers.
    Docker,
}

/// Where to write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// A file, which appears when it is whole; or the directory of an OCI layout, made if need be. What is there and
    /// no regular file (a FIFO, a device) is written to as it is.
    Path(PathBuf),
    /// Standard output.
    Stdout,
}

/// What the manifest of a built image is like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ManifestOptions {
    /// How its layers are packed.
    pub packing: Packing,
    /// Whose media types it has.
    pub family: Family,
    /// Free-form notes. Docker's family has none.
    pub annotations: BTreeMap<String, String>,
}

/// Why images could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// Finding the image.
    #[error(transparent)]
    Image(ImagesError),
    /// Fetching what is not here.
    #[error(transparent)]
    Fetch(Box<LoadError>),
    /// A manifest that is here does not parse.
    #[error("manifest {digest} is damaged")]
    Document {
        /// Which one.
        digest: BlobDigest,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
    /// A manifest would be too large.
    #[error("make a manifest")]
    Manifest(#[source] DocumentError),
    /// A layer.
    #[error("save {image}")]
    Layer {
        /// Which image.
        image: String,
        /// Which layer, and what is wrong with it.
        #[source]
        source: TransferError,
    },
    /// A layer's tar is not the one of its diff ID.
    #[error("blob {blob} no longer decompresses to diff ID {expected}, but to {actual}")]
    Changed {
        /// The blob.
        blob: BlobDigest,
        /// As it was.
        expected: DiffId,
        /// As it is.
        actual: DiffId,
    },
    /// A blob was changed on disk.
    #[error("blob {digest} was changed on disk, it now has {actual}: remove its images (ply rmi) and load them again")]
    Damaged {
        /// The blob.
        digest: BlobDigest,
        /// The digest of what is there.
        actual: BlobDigest,
    },
    /// A blob is not all there any more.
    #[error("blob {digest} is damaged: remove its images (ply rmi) and load them again")]
    Cut {
        /// The blob.
        digest: BlobDigest,
        /// How much of it is there.
        #[source]
        source: BlobError,
    },
    /// Writing.
    #[error("write {}", path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Writing an archive.
    #[error("write {}", path.display())]
    Archive {
        /// Which.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: WriteError,
    },
    /// The layer store.
    #[error(transparent)]
    Layers(#[from] LayerStoreError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl From<ImagesError> for SaveError {
    fn from(source: ImagesError) -> Self {
        match source {
            ImagesError::Content { source: BlobError::Changed { digest, actual }, .. } => {
                Self::Damaged { digest, actual }
            }
            ImagesError::Content { source: source @ BlobError::Damaged { digest, .. }, .. } => {
                Self::Cut { digest, source }
            }
            source => Self::Image(source),
        }
    }
}

impl From<LoadError> for SaveError {
    fn from(source: LoadError) -> Self {
        Self::Fetch(Box::new(source))
    }
}

impl From<ImageError> for SaveError {
    fn from(source: ImageError) -> Self {
        Self::Image(source.into())
    }
}

impl SaveError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image(source) => source.kind(),
            Self::Cut { source, .. } => source.kind(),
            Self::Manifest(source) => source.kind(),
            Self::Fetch(source) => source.kind(),
            Self::Document { .. } | Self::Changed { .. } | Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::Layer { source, .. } => source.kind(),
            Self::Write { .. } => ErrorKind::Unavailable,
            Self::Archive { source, .. } => source.kind(),
            Self::Layers(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// An image with all that goes into an archive.
pub(crate) struct Saved {
    /// The names that the archive gives it, each once.
    pub(crate) names: Vec<String>,
    pub(crate) manifest: Manifest,
    pub(crate) config: ImageConfig,
    /// What else its entry in the index of a layout says.
    pub(crate) entry_annotations: BTreeMap<String, String>,
}

impl Saved {
    fn add_name(&mut self, name: String) {
        if !self.names.contains(&name) {
            self.names.push(name);
        }
    }
}

impl Engine {
    /// Writes images into one archive.
    ///
    /// # Errors
    /// [`SaveError`]; a file is then not there, and what a directory held stays in it.
    pub fn save(
        &self,
        wanted: &[String],
        format: SaveFormat,
        output: &Output,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), SaveError> {
        self.with_lease("save", |lease| self.save_held(wanted, format, output, lease, progress, cancel))
    }

    fn save_held(
        &self,
        wanted: &[String],
        format: SaveFormat,
        output: &Output,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), SaveError> {
        let mut images: Vec<Saved> = Vec::new();
        for one in wanted {
            let found = self.store().read(|rows| plies_image::find(rows, one))?;
            let names: Vec<String> = found.name.iter().map(ToString::to_string).collect();
            let found = self.whole_image(found, progress, cancel)?;
            let (manifest, config) = self.manifest_of(&found, one, lease, progress, cancel)?;
            for (layer, diff_id) in manifest.layers().iter().zip(config.diff_ids()) {
                // One whose layer was here already was not fetched when the image was pulled.
                if !lease.hold_if_present(layer.digest)? {
                    let failed = |source| SaveError::Layer { image: one.clone(), source };
                    self.fetch_blob(layer, *diff_id, lease, progress, cancel).map_err(failed)?;
                }
            }
            match images.iter_mut().find(|have| have.manifest == manifest) {
                Some(have) => names.into_iter().for_each(|name| have.add_name(name)),
                None => images.push(Saved { names, manifest, config, entry_annotations: BTreeMap::new() }),
            }
        }
        let task = Task::start(progress, &format!("save {}", wanted.join(" ")), None);
        self.write_images(&images, format, output, task, cancel)
    }

    /// Writes images whose blobs are here, held.
    pub(crate) fn write_images(
        &self,
        images: &[Saved],
        format: SaveFormat,
        output: &Output,
        task: Task<'_>,
        cancel: &Cancel,
    ) -> Result<(), SaveError> {
        let sink = |path: &Path| Sink { path: path.to_owned(), task: &task, cancel };
        match (format, output) {
            (SaveFormat::OciDirectory, Output::Path(dir)) => self.save_directory(images, dir, &sink(dir))?,
            (_, Output::Path(path)) if !STDOUT_PATHS.iter().any(|stdout| path == Path::new(stdout)) => {
                let sink = sink(path);
                save_file(path, &sink, |file| self.save_tar(images, format, file, &sink).map(drop))?;
            }
            (_, Output::Path(_) | Output::Stdout) => {
                let sink = sink(Path::new("<standard output>"));
                self.save_tar(images, format, io::stdout(), &sink)?.flush().map_err(sink.failed())?;
            }
        }
        task.end(Outcome::Done);
        Ok(())
    }

    /// The manifest to save an image with: the one that its name was loaded with, else any, else a new one.
    pub(crate) fn manifest_of(
        &self,
        found: &Found,
        wanted: &str,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(Manifest, ImageConfig), SaveError> {
        let config = self.config_of(found.id)?;
        if let Some(digest) = found.saved_with() {
            let raw = self.blob_bytes(digest)?;
            let manifest = Manifest::parse(&raw).map_err(|source| SaveError::Document { digest, source })?;
            return Ok((manifest, config));
        }
        let layer = |source| SaveError::Layer { image: wanted.to_owned(), source };
        let transfer = self.transfer(lease, progress, cancel);
        let manifest = self.make_manifest(&config, &ManifestOptions::default(), &transfer, layer)?;
        self.store().write(|tx| plies_image::add_manifest(tx, found.id, &(&manifest).into()))?;
        Ok((manifest, config))
    }

    /// Makes a manifest for an image whose layers are here, packs them, and keeps all of it under the lease.
    pub(crate) fn make_manifest(
        &self,
        config: &ImageConfig,
        options: &ManifestOptions,
        transfer: &Transfer<'_>,
        failed: impl Fn(TransferError) -> SaveError,
    ) -> Result<Manifest, SaveError> {
        let ManifestOptions { packing, family, annotations } = options;
        let mut blobs: Vec<LayerBlob> = Vec::new();
        for diff_id in config.diff_ids() {
            blobs.push(transfer.blob_as(*diff_id, packing).map_err(&failed)?);
        }
        let raw = config.document().raw();
        let config = Descriptor::new(family.config(), BlobDigest::of(raw), raw.len() as u64);
        let layers: Vec<Descriptor> = blobs.iter().map(|blob| blob.descriptor(*family)).collect();
        let manifest = Manifest::build(&config, &layers, annotations).map_err(SaveError::Manifest)?;
        let layer_blobs: Vec<BlobDigest> = blobs.iter().map(|blob| blob.digest).collect();
        plies_image::keep_documents(self.store(), &manifest, raw, &layer_blobs, transfer.lease)?;
        Ok(manifest)
    }

    /// Writes a registered layer's tar, byte for byte.
    ///
    /// # Errors
    /// [`SaveError`]; a file is then not there.
    pub fn export_layer(
        &self,
        wanted: &str,
        output: &Output,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), SaveError> {
        self.with_lease("layer export", |lease| {
            let layers = self.layer_store()?;
            let layer = layers.get(layers.find(wanted)?)?;
            let transfer = self.transfer(lease, progress, cancel);
            let task = Task::start(progress, &format!("export layer {}", layer.chain_id()), None);
            let sink = |path: &Path| Sink { path: path.to_owned(), task: &task, cancel };
            match output {
                Output::Path(path) if !STDOUT_PATHS.iter().any(|stdout| path == Path::new(stdout)) => {
                    save_file(path, &sink(path), |file| Ok::<_, SaveError>(layers.export(&layer, file, &transfer)?))?;
                }
                Output::Path(_) | Output::Stdout => {
                    // The locked handle would look for line ends in every byte.
                    let stdout = io::stdout().as_fd().try_clone_to_owned();
                    let stdout = File::from(stdout.map_err(sink(Path::new("<standard output>")).failed())?);
                    layers.export(&layer, stdout, &transfer)?;
                }
            }
            task.end(Outcome::Done);
            layers.release(layer)?;
            Ok(())
        })
    }

    /// Writes an OCI layout into a directory, or adds to the one that is there. Blobs come before the index that names
    /// them, so whoever reads meanwhile sees the old images or all.
    fn save_directory(&self, images: &[Saved], dir: &Path, sink: &Sink<'_>) -> Result<(), SaveError> {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).map_err(sink.failed())?;
        sink.publish(&dir.join("oci-layout"), OCI_LAYOUT)?;
        for (digest, size_bytes) in blobs_of(images) {
            let path = blobs.join(digest.hex());
            // One of another size was cut off, by a full disk or a crash of whoever wrote it.
            if std::fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == size_bytes) {
                continue;
            }
            let mut blob = HashingReader::new(self.open_blob(digest)?);
            let partial = Partial::create(&blobs).map_err(sink.failed())?;
            sink.copy(&mut blob, &mut &partial.file)?;
            check_blob(digest, blob)?;
            partial.publish(&path).map_err(sink.failed())?;
        }
        sync_directory(&blobs).map_err(sink.failed())?;
        let index_path = dir.join("index.json");
        let old: Vec<Descriptor> = match std::fs::read(&index_path) {
            Ok(raw) => {
                let index = Index::parse(&raw);
                index
                    .map_err(|source| SaveError::Document { digest: BlobDigest::of(&raw), source })?
                    .manifests()
                    .to_vec()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => vec![],
            Err(error) => return Err(sink.failed()(error)),
        };
        let entries = merge_entries(old, index_entries(images));
        sink.publish(&index_path, Index::build(&entries).document().raw())?;
        sync_directory(dir).map_err(sink.failed())
    }

    fn save_tar<W: Write>(
        &self,
        images: &[Saved],
        format: SaveFormat,
        out: W,
        sink: &Sink<'_>,
    ) -> Result<W, SaveError> {
        let mut tar = tar::Writer::new(BufWriter::with_capacity(BUFFER_BYTES, out));
        if format == SaveFormat::Docker {
            self.save_docker(images, &mut tar, sink)?;
        } else {
            sink.bytes(&mut tar, "oci-layout", OCI_LAYOUT)?;
            sink.bytes(&mut tar, "index.json", Index::build(&index_entries(images)).document().raw())?;
            for (digest, size_bytes) in blobs_of(images) {
                let mut blob = HashingReader::new(self.open_blob(digest)?);
                sink.file(&mut tar, &blob_name(digest), size_bytes, &mut blob)?;
                check_blob(digest, blob)?;
            }
        }
        let out = tar.finish().map_err(|source| sink.archive(source))?;
        out.into_inner().map_err(|error| sink.failed()(error.into_error()))
    }

    /// Docker's own archive: configs and plain layer tars, listed by `manifest.json`.
    fn save_docker<W: Write>(
        &self,
        images: &[Saved],
        tar: &mut tar::Writer<W>,
        sink: &Sink<'_>,
    ) -> Result<(), SaveError> {
        let mut layers: BTreeMap<DiffId, String> = BTreeMap::new();
        let mut list = Vec::new();
        // Manifests that differ in how layers are packed are one image here: a file twice is what no reader expects.
        let mut grouped: Vec<(ImageId, &Saved, Vec<String>)> = Vec::new();
        for image in images {
            let id = image.config.id();
            match grouped.iter_mut().find(|(have, ..)| *have == id) {
                Some((.., names)) => names.extend(image.names.iter().cloned()),
                None => grouped.push((id, image, image.names.clone())),
            }
        }
        for (id, image, names) in grouped {
            let id = id.hex();
            sink.bytes(tar, &format!("{id}.json"), image.config.document().raw())?;
            let mut files = Vec::new();
            for (diff_id, layer) in image.config.diff_ids().iter().zip(image.manifest.layers()) {
                let name = format!("{}/layer.tar", diff_id.hex());
                if layers.insert(*diff_id, name.clone()).is_none() {
                    let failed = |source| SaveError::Layer { image: id.to_owned(), source };
                    if !self.save_packed_layer(*diff_id, tar, &name, sink, failed)? {
                        self.save_plain_layer(*diff_id, layer, tar, &name, sink)?;
                    }
                }
                files.push(name);
            }
            let tags: Vec<String> = names.iter().map(|name| crate::familiar(name)).collect();
            list.push(json!({"Config": format!("{id}.json"), "RepoTags": tags, "Layers": files}));
        }
        sink.bytes(tar, "manifest.json", serde_json::Value::from(list).to_string().as_bytes())
    }

    /// Whether there was a tar to copy.
    fn save_packed_layer<W: Write>(
        &self,
        diff_id: DiffId,
        tar: &mut tar::Writer<W>,
        name: &str,
        sink: &Sink<'_>,
        failed: impl Fn(TransferError) -> SaveError,
    ) -> Result<bool, SaveError> {
        let packed = self.store().layers().packed_tar_of(diff_id).map_err(|source| failed(source.into()))?;
        let Some(packed) = packed else { return Ok(false) };
        let size_bytes = packed.metadata().map_err(sink.failed())?.len();
        let mut packed = HashingReader::new(packed);
        sink.file(tar, name, size_bytes, &mut packed)?;
        match DiffId::from_bytes(packed.finish().1.sha256) {
            actual if actual == diff_id => Ok(true),
            actual => Err(failed(TransferError::Changed { diff_id, actual })),
        }
    }

    fn save_plain_layer<W: Write>(
        &self,
        diff_id: DiffId,
        layer: &Descriptor,
        tar: &mut tar::Writer<W>,
        name: &str,
        sink: &Sink<'_>,
    ) -> Result<(), SaveError> {
        let Some(MediaClass::Layer(compression)) = classify(&layer.media_type) else {
            unreachable!("because a manifest with another kind of layer does not parse");
        };
        if compression == Compression::None {
            let mut blob = HashingReader::new(self.open_blob(layer.digest)?);
            sink.file(tar, name, layer.size_bytes, &mut blob)?;
            return check_blob(layer.digest, blob);
        }
        // A tar says a file's length before its bytes, so the layer is decompressed twice: once to count and to check,
        // once to write.
        let decoder = || -> Result<_, SaveError> {
            let decoder = compress::Decoder::new(self.open_blob(layer.digest)?, compression, self.limits());
            decoder.map_err(sink.failed())
        };
        let count = || {
            let mut hashing = HashingReader::new(decoder()?);
            sink.copy(&mut hashing, &mut io::sink())?;
            let (_, hashed) = hashing.finish();
            match DiffId::from_bytes(hashed.sha256) {
                actual if actual == diff_id => Ok(hashed.size_bytes),
                actual => Err(SaveError::Changed { blob: layer.digest, expected: diff_id, actual }),
            }
        };
        // What a decompressor says of changed bytes helps nobody: that they were changed does.
        let size_bytes = count().or_else(|error| {
            let mut blob = HashingReader::new(self.open_blob(layer.digest)?);
            sink.copy(&mut blob, &mut io::sink())?;
            check_blob(layer.digest, blob)?;
            Err(error)
        })?;
        sink.file(tar, name, size_bytes, &mut decoder()?)
    }

    fn open_blob(&self, digest: BlobDigest) -> Result<plies_store::Blob, SaveError> {
        let opened = self.store().content().open(digest);
        Ok(opened.map_err(|source| ImagesError::Content { digest, source })?)
    }
}

/// Fails if a blob that was read to its end is not what its digest says: what goes out is never worse than what came in.
fn check_blob(digest: BlobDigest, read: HashingReader<plies_store::Blob>) -> Result<(), SaveError> {
    let (_, hashed) = read.finish();
    match BlobDigest::from_bytes(hashed.sha256) {
        actual if actual == digest => Ok(()),
        actual => Err(SaveError::Damaged { digest, actual }),
    }
}

/// Opens what is no regular file for writing. A FIFO without a reader would block the open, and with it an interrupt.
fn open_patiently(path: &Path, cancel: &Cancel) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    loop {
        match rustix::fs::open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
            Ok(opened) => {
                rustix::fs::fcntl_setfl(&opened, OFlags::empty())?;
                return Ok(opened.into());
            }
            Err(rustix::io::Errno::NXIO) if std::fs::metadata(path)?.file_type().is_fifo() => {
                cancel.check()?;
                std::thread::sleep(READER_WAIT);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// All blobs of some images, each once, with their sizes.
fn blobs_of(images: &[Saved]) -> BTreeMap<BlobDigest, u64> {
    let described = images.iter().flat_map(|image| {
        let documents = [image.manifest.descriptor(), image.manifest.config().clone()];
        documents.into_iter().chain(image.manifest.layers().iter().cloned())
    });
    described.map(|descriptor| (descriptor.digest, descriptor.size_bytes)).collect()
}

/// An index entry a name, under both annotations.
fn index_entries(images: &[Saved]) -> Vec<Descriptor> {
    let mut entries = Vec::new();
    for image in images {
        let mut descriptor = image.manifest.descriptor();
        descriptor.platform = Some(image.config.platform());
        descriptor.annotations.extend(image.entry_annotations.clone());
        if image.names.is_empty() {
            entries.push(descriptor.clone());
        }
        for name in &image.names {
            let mut named = descriptor.clone();
            for key in NAME_ANNOTATIONS {
                named.annotations.insert(key.into(), name.clone());
            }
            entries.push(named);
        }
    }
    entries
}

/// The name of an index entry in full, however short or under whichever annotation somebody wrote it.
fn name_of(entry: &Descriptor) -> Option<String> {
    let name = NAME_ANNOTATIONS.iter().find_map(|key| entry.annotations.get(*key))?;
    Some(name.parse::<Reference>().map_or_else(|_| name.clone(), |name| name.to_string()))
}

/// Adds entries to those of a layout: a name goes over to the image that has it now, other images stay.
fn merge_entries(old: Vec<Descriptor>, new: Vec<Descriptor>) -> Vec<Descriptor> {
    let replaced = |old: &Descriptor| {
        let name = name_of(old);
        new.iter().any(|new| match &name {
            Some(_) => name_of(new) == name,
            None => new.digest == old.digest,
        })
    };
    let mut entries: Vec<Descriptor> = old.into_iter().filter(|old| !replaced(old)).collect();
    // What is there under a name needs no second, nameless entry.
    let known: Vec<BlobDigest> = entries.iter().map(|entry| entry.digest).collect();
    entries.extend(new.into_iter().filter(|new| name_of(new).is_some() || !known.contains(&new.digest)));
    entries
}

/// Writes a file, which is replaced when the new one is whole.
pub(crate) fn save_file<E: From<SaveError>>(
    path: &Path,
    sink: &Sink<'_>,
    write: impl FnOnce(&File) -> Result<(), E>,
) -> Result<(), E> {
    let path = resolve(path).map_err(sink.failed())?;
    let old = match std::fs::metadata(&path) {
        Ok(meta) => Some(meta),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(sink.failed()(error).into()),
    };
    if old.as_ref().is_some_and(|meta| !meta.is_file()) {
        // Putting a file in its place would leave whoever reads it waiting, and the machine without a device.
        let file = open_patiently(&path, sink.cancel).map_err(|source| match sink.cancel.is_canceled() {
            true => Canceled.into(),
            false => sink.failed()(source),
        })?;
        return write(&file);
    }
    let dir = directory_of(&path);
    let partial = Partial::create(dir).map_err(sink.failed())?;
    if let Some(old) = old {
        partial.file.set_permissions(old.permissions()).map_err(sink.failed())?;
    }
    write(&partial.file)?;
    Ok(partial.publish(&path).and_then(|()| sync_directory(dir)).map_err(sink.failed())?)
}

/// Where a path leads, whether something is there or not: a link is written through, not replaced.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..SYMLINKS_MAX {
        match std::fs::canonicalize(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        match std::fs::read_link(&path) {
            // A pipe behind `/dev/fd/63` has no path of its own: the link itself must be opened.
            Ok(_) if path.exists() => return Ok(path),
            Ok(target) => path = directory_of(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// The directory that a file is in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A name for what is on its way. Each state is keyed at random; two at once, or a planted name, only cost another turn.
pub(crate) fn partial_path(dir: &Path) -> PathBuf {
    dir.join(format!(".ply-{:016x}.partial", RandomState::new().build_hasher().finish()))
}

/// A file on its way, under a name that nobody else has. Dropped before it is published it is removed.
struct Partial {
    path: PathBuf,
    file: File,
    published: bool,
}

impl Partial {
    fn create(dir: &Path) -> io::Result<Self> {
        loop {
            let path = partial_path(dir);
            match File::create_new(&path) {
                Ok(file) => return Ok(Self { path, file, published: false }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives it its name, in the directory that it was made in, which the caller syncs.
    fn publish(mut self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, path)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // The error that made it useless is the one to tell.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// Where bytes of one save go, and who is told.
pub(crate) struct Sink<'a> {
    pub(crate) path: PathBuf,
    pub(crate) task: &'a Task<'a>,
    pub(crate) cancel: &'a Cancel,
}

impl Sink<'_> {
    fn failed(&self) -> impl Fn(io::Error) -> SaveError + use<> {
        let path = self.path.clone();
        move |source| SaveError::Write { path: path.clone(), source }
    }

    fn archive(&self, source: WriteError) -> SaveError {
        match self.cancel.is_canceled() {
            true => Canceled.into(),
            false => SaveError::Archive { path: self.path.clone(), source },
        }
    }

    /// Writes a small file of a layout, whole or not at all.
    fn publish(&self, path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
        let partial = Partial::create(directory_of(path)).map_err(self.failed())?;
        (&partial.file).write_all(bytes).and_then(|()| partial.publish(path)).map_err(self.failed())
    }

    fn copy(&self, from: &mut dyn Read, to: &mut dyn Write) -> Result<(), SaveError> {
        match io::copy(&mut Told { inner: from, sink: self }, to) {
            Ok(_) => Ok(()),
            Err(_) if self.cancel.is_canceled() => Err(Canceled.into()),
            Err(error) => Err(self.failed()(error)),
        }
    }

    fn bytes<W: Write>(&self, tar: &mut tar::Writer<W>, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.file(tar, name, bytes.len() as u64, &mut &*bytes)
    }

    /// Adds a file with fixed metadata: equal images give equal archives.
    fn file<W: Write>(
        &self,
        tar: &mut tar::Writer<W>,
        name: &str,
        size_bytes: u64,
        data: &mut dyn Read,
    ) -> Result<(), SaveError> {
        let entry = Entry {
            path: EntryPath::clean(name.as_bytes()).expect("because names in archives are ours"),
            kind: EntryKind::File { size_bytes, sparse: None },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: vec![],
        };
        tar.append(&entry, &mut Told { inner: data, sink: self }).map_err(|source| self.archive(source))
    }
}

/// Reports what is read through it, and stops when asked to.
struct Told<'a> {
    inner: &'a mut dyn Read,
    sink: &'a Sink<'a>,
}

impl Read for Told<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.sink.cancel.is_canceled() {
            return Err(io::Error::other(Canceled));
        }
        let read = self.inner.read(buffer)?;
        self.sink.task.advance(read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plies_oci::MediaType;

    fn entry(content: &str, annotations: &[(&str, &str)]) -> Descriptor {
        let mut entry = Descriptor::new(MediaType::ImageManifest, BlobDigest::of(content.as_bytes()), 1);
        for (key, value) in annotations {
            entry.annotations.insert((*key).into(), (*value).into());
        }
        entry
    }

    #[test]
    fn an_index_entry_is_replaced_by_one_of_its_name_only() {
        let [containerd, oci] = NAME_ANNOTATIONS;
        let named = |content, name| entry(content, &[(containerd, name), (oci, name)]);
        let new = [named("new", "docker.io/library/app:1")];
        for (what, old, stays) in [
            ("both annotations", named("old", "docker.io/library/app:1"), false),
            ("containerd's", entry("old", &[(containerd, "app:1")]), false),
            ("the specification's", entry("old", &[(oci, "app:1")]), false),
            ("containerd's and a tag", entry("old", &[(containerd, "docker.io/library/app:1"), (oci, "1")]), false),
            ("another annotation", entry("old", &[(oci, "app:1"), ("x", "y")]), false),
            ("another name", named("old", "docker.io/library/app:2"), true),
            ("another name of the same image", named("new", "docker.io/library/app:2"), true),
            ("no name, another image", entry("old", &[]), true),
            ("no name, the same image", entry("new", &[]), false),
        ] {
            let merged = merge_entries(vec![old.clone()], new.to_vec());
            assert_eq!(merged.contains(&old), stays, "{what}");
            assert!(merged.contains(&new[0]), "{what}");
        }
        let nameless = entry("new", &[]);
        assert_eq!(merge_entries(vec![entry("old", &[])], vec![nameless.clone()]).len(), 2, "nameless ones add up");
        assert_eq!(merge_entries(new.to_vec(), vec![nameless]).len(), 1, "known under a name");
    }
}
