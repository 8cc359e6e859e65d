//! `ply save`: images into an archive.
//!
//! An image that was loaded goes out with the manifest and the blobs that it came with, byte for byte. One that was
//! built gets a manifest and compressed blobs here, from its layers, and keeps them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use plies_archive::compress;
use plies_archive::tar::{self, Entry, EntryKind, EntryPath, Timestamp, WriteError};
use plies_image::{Found, ImageError, ImageRow};
use plies_oci::{
    BlobDigest, Compression, Descriptor, DiffId, DocumentError, ErrorKind, ImageConfig, Index, Manifest, MediaClass,
    MediaType, classify,
};
use plies_store::{CatalogueError, CommitError, IngestError, Lease};
use serde_json::json;

use crate::exec::Cancel;
use crate::images::ImagesError;
use crate::layers::{LayerBlob, LayerTransferError};
use crate::load::{DocumentsError, blob_name, manifest_row};
use crate::progress::{Outcome, Progress, Task};
use crate::{Canceled, Engine};

/// What an OCI layout's marker file says (image-spec, `image-layout.md`).
const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

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
#[derive(Debug, Clone)]
pub enum Output {
    /// A file, which appears when it is whole; or the directory of an OCI layout, made if need be.
    Path(PathBuf),
    /// Standard output.
    Stdout,
}

/// Why images could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// Finding the image.
    #[error(transparent)]
    Image(#[from] ImagesError),
    /// A manifest that is here does not parse.
    #[error("manifest {digest} is damaged")]
    Document {
        /// Which one.
        digest: BlobDigest,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
    /// A layer.
    #[error("save {image}")]
    Layer {
        /// Which image.
        image: String,
        /// Which layer, and what is wrong with it.
        #[source]
        source: LayerTransferError,
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
    /// Keeping a document.
    #[error("keep a document")]
    Ingest(#[from] IngestError),
    /// Keeping a document.
    #[error("keep a document")]
    Commit(#[from] CommitError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl From<ImageError> for SaveError {
    fn from(source: ImageError) -> Self {
        Self::Image(source.into())
    }
}

impl From<DocumentsError> for SaveError {
    fn from(error: DocumentsError) -> Self {
        match error {
            DocumentsError::Write { source } => Self::Write { path: "a document".into(), source },
            DocumentsError::Ingest(source) => source.into(),
            DocumentsError::Commit(source) => source.into(),
            DocumentsError::Catalogue(source) => source.into(),
        }
    }
}

impl SaveError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image(source) => source.kind(),
            Self::Document { .. } | Self::Changed { .. } => ErrorKind::DataLoss,
            Self::Layer { source, .. } => source.kind(),
            Self::Write { .. } => ErrorKind::Unavailable,
            Self::Archive { source, .. } => source.kind(),
            Self::Ingest(source) => source.kind(),
            Self::Commit(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// An image with all that goes into an archive.
struct Saved {
    /// The name that the archive gives it.
    names: Vec<String>,
    manifest: Manifest,
    config: ImageConfig,
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
            let (manifest, config) = self.manifest_of(&found, one, lease, progress, cancel)?;
            match images.iter_mut().find(|have| have.manifest == manifest) {
                Some(have) => have.names.extend(names),
                None => images.push(Saved { names, manifest, config }),
            }
        }
        let task = Task::start(progress, &format!("save {}", wanted.join(" ")), None);
        let sink = |path: &Path| Sink { path: path.to_owned(), task: &task, cancel };
        match (format, output) {
            (SaveFormat::OciDirectory, Output::Path(dir)) => self.save_directory(&images, dir, &sink(dir))?,
            (_, Output::Path(path)) => {
                let mut partial = path.as_os_str().to_owned();
                partial.push(".partial");
                let partial = PathBuf::from(partial);
                let sink = sink(path);
                let file = File::create(&partial).map_err(sink.failed())?;
                let written = self.save_tar(&images, format, file, &sink).and_then(|file| {
                    file.sync_all().map_err(sink.failed())?;
                    std::fs::rename(&partial, path).map_err(sink.failed())
                });
                if written.is_err() {
                    // The error that made it useless is the one to tell.
                    drop(std::fs::remove_file(&partial));
                }
                written?;
            }
            (_, Output::Stdout) => {
                let sink = sink(Path::new("<standard output>"));
                self.save_tar(&images, format, io::stdout(), &sink)?.flush().map_err(sink.failed())?;
            }
        }
        task.end(Outcome::Done);
        Ok(())
    }

    /// The manifest to save an image with: the one that its name was loaded with, else any, else a new one.
    fn manifest_of(
        &self,
        found: &Found,
        wanted: &str,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(Manifest, ImageConfig), SaveError> {
        let config = self.config_of(found.id)?;
        let known = found.manifest.or_else(|| found.row.manifests.first().map(|row| row.digest));
        if let Some(digest) = known {
            let raw = self.blob_bytes(digest)?;
            let manifest = Manifest::parse(&raw).map_err(|source| SaveError::Document { digest, source })?;
            return Ok((manifest, config));
        }
        let layer = |source| SaveError::Layer { image: wanted.to_owned(), source };
        let mut blobs: Vec<LayerBlob> = Vec::new();
        for diff_id in config.diff_ids() {
            blobs.push(self.blob_of(*diff_id, lease, progress, cancel).map_err(layer)?);
        }
        let raw = config.document().raw();
        let config_descriptor = Descriptor::new(MediaType::ImageConfig, BlobDigest::of(raw), raw.len() as u64);
        let layers: Vec<Descriptor> = blobs.iter().map(LayerBlob::descriptor).collect();
        let manifest = Manifest::build(&config_descriptor, &layers);
        let layer_blobs: Vec<BlobDigest> = blobs.iter().map(|blob| blob.digest).collect();
        self.keep_documents(&manifest, raw, &layer_blobs, lease)?;
        let row = ImageRow { manifests: vec![manifest_row(&manifest)], ..found.row.clone() };
        self.store().write(|tx| plies_image::put(tx, found.id, &row))?;
        Ok((manifest, config))
    }

    /// Writes an OCI layout into a directory, or adds to the one that is there. Blobs come before the index that names
    /// them, so whoever reads meanwhile sees the old images or all.
    fn save_directory(&self, images: &[Saved], dir: &Path, sink: &Sink<'_>) -> Result<(), SaveError> {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).map_err(sink.failed())?;
        std::fs::write(dir.join("oci-layout"), OCI_LAYOUT).map_err(sink.failed())?;
        for (digest, _) in blobs_of(images) {
            let (path, partial) = (blobs.join(digest.hex()), blobs.join(format!(".{}.partial", digest.hex())));
            if path.exists() {
                continue;
            }
            let mut file = File::create(&partial).map_err(sink.failed())?;
            let mut blob = self.open_blob(digest)?;
            sink.copy(&mut blob, &mut file)?;
            file.sync_all().map_err(sink.failed())?;
            std::fs::rename(&partial, &path).map_err(sink.failed())?;
        }
        let index_path = dir.join("index.json");
        let mut entries: Vec<Descriptor> = match std::fs::read(&index_path) {
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
        let new = index_entries(images);
        let renamed = |old: &Descriptor| new.iter().any(|new| new.annotations == old.annotations);
        entries.retain(|old| !renamed(old));
        entries.extend(new);
        let partial = dir.join(".index.json.partial");
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(Index::build(&entries).document().raw())?;
            file.sync_all()
        });
        written.and_then(|()| std::fs::rename(&partial, &index_path)).map_err(sink.failed())?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(sink.failed())
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
                sink.file(&mut tar, &blob_name(digest), size_bytes, &mut self.open_blob(digest)?)?;
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
        for image in images {
            let id = image.config.id().hex();
            sink.bytes(tar, &format!("{id}.json"), image.config.document().raw())?;
            let mut files = Vec::new();
            for (diff_id, layer) in image.config.diff_ids().iter().zip(image.manifest.layers()) {
                let name = format!("{}/layer.tar", diff_id.hex());
                if layers.insert(*diff_id, name.clone()).is_none() {
                    self.save_plain_layer(*diff_id, layer, tar, &name, sink)?;
                }
                files.push(name);
            }
            let tags: Vec<String> = image.names.iter().map(|name| crate::familiar(name)).collect();
            list.push(json!({"Config": format!("{id}.json"), "RepoTags": tags, "Layers": files}));
        }
        sink.bytes(tar, "manifest.json", serde_json::Value::from(list).to_string().as_bytes())
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
            return sink.file(tar, name, layer.size_bytes, &mut self.open_blob(layer.digest)?);
        }
        // A tar says a file's length before its bytes, so the layer is decompressed twice: once to count and to check,
        // once to write.
        let decoder = || -> Result<_, SaveError> {
            let decoder = compress::Decoder::new(self.open_blob(layer.digest)?, compression, self.limits());
            decoder.map_err(sink.failed())
        };
        let mut hashing = plies_archive::hash::HashingReader::new(decoder()?);
        sink.copy(&mut hashing, &mut io::sink())?;
        let (_, hashed) = hashing.finish();
        let actual = DiffId::from_bytes(hashed.sha256);
        if actual != diff_id {
            return Err(SaveError::Changed { blob: layer.digest, expected: diff_id, actual });
        }
        sink.file(tar, name, hashed.size_bytes, &mut decoder()?)
    }

    fn open_blob(&self, digest: BlobDigest) -> Result<plies_store::Blob, SaveError> {
        let opened = self.store().content().open(digest);
        Ok(opened.map_err(|source| ImagesError::Content { digest, source })?)
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

/// An index entry a name. Both annotations are written: containerd and docker read the first, podman and skopeo the
/// second.
fn index_entries(images: &[Saved]) -> Vec<Descriptor> {
    let mut entries = Vec::new();
    for image in images {
        let mut descriptor = image.manifest.descriptor();
        descriptor.platform = Some(image.config.platform());
        if image.names.is_empty() {
            entries.push(descriptor.clone());
        }
        for name in &image.names {
            let mut named = descriptor.clone();
            named.annotations.insert("io.containerd.image.name".into(), name.clone());
            named.annotations.insert("org.opencontainers.image.ref.name".into(), name.clone());
            entries.push(named);
        }
    }
    entries
}

/// Where bytes of one save go, and who is told.
struct Sink<'a> {
    path: PathBuf,
    task: &'a Task<'a>,
    cancel: &'a Cancel,
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
