//! `ply load`: images out of an archive. And what `ply pull` does in the same way, whoever brings an image's documents and
//! layers ([`ImageSource`]).

use std::collections::BTreeMap;
use std::io::Read;

use plies_image::{ChainLayer, ImageError, ManifestRow, NewImage};
use plies_oci::{
    BlobDigest, ChainId, Compression, Descriptor, DiffId, DocumentError, ErrorKind, Family, ImageConfig, ImageId,
    Index, Manifest, MediaClass, MediaType, Platform, Reference, classify, limits,
};
use plies_store::{BlobError, CatalogueError, LayerSource, Lease, Origin, SnapshotId, Taken, TransferError, Tx};
use serde::{Deserialize, Serialize};

use plies_registry::RegistryError;

use crate::Canceled;
use crate::Engine;
use crate::archive::{Archive, ArchiveError, Input, Section};
use crate::exec::Cancel;
use crate::images::{ImagesError, plain_name};
use crate::progress::Progress;

/// Indexes inside indexes that are followed. Builders nest one level (a manifest list in an `index.json`); a chain of
/// them could be endless.
const INDEX_DEPTH_MAX: usize = 4;

/// Bytes of docker's `manifest.json`: a line of names and paths an image.
const DOCKER_MANIFEST_BYTES_MAX: u64 = 8 << 20;

/// The only version of an OCI layout that there is (image-spec, `image-layout.md`).
const LAYOUT_VERSION: &str = "1.0.0";

/// Bytes of an OCI layout's marker file, which holds its version.
const LAYOUT_BYTES_MAX: u64 = 64 << 10;

/// Where containerd and BuildKit put an image's whole name in an OCI layout.
const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// Where the specification puts it. By its letter this is a tag, and skopeo and umoci write bare tags; others write names.
const REF_NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// Why an archive could not be loaded. Nothing of it is then in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The archive itself.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Neither kind of archive that we know.
    #[error("{path} is neither an OCI layout nor a docker archive: it has no index.json and no manifest.json")]
    Unknown {
        /// The archive.
        path: String,
    },
    /// An OCI layout of another version.
    #[error("{path}: oci-layout has version {version:?}, only {LAYOUT_VERSION} is known")]
    LayoutVersion {
        /// The archive.
        path: String,
        /// Its version.
        version: String,
    },
    /// An OCI layout's marker file.
    #[error("{path}: oci-layout is not valid")]
    Layout {
        /// The archive.
        path: String,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A document in the archive.
    #[error("load {path}")]
    Document {
        /// The archive.
        path: String,
        /// What is wrong.
        #[source]
        source: DocumentError,
    },
    /// docker's `manifest.json`.
    #[error("{path}: manifest.json is not valid")]
    DockerManifest {
        /// The archive.
        path: String,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Bytes are not those of their digest.
    #[error("{path}: {what} {expected} has other bytes: they give {actual}")]
    Digest {
        /// The archive.
        path: String,
        /// What it should be.
        what: &'static str,
        /// The digest that names it.
        expected: BlobDigest,
        /// The digest of what is there.
        actual: BlobDigest,
    },
    /// A blob is longer or shorter than its descriptor says.
    #[error("{path}: {what} {digest} has {actual} bytes, its descriptor says {expected}")]
    Size {
        /// The archive.
        path: String,
        /// What it is.
        what: &'static str,
        /// Which one.
        digest: BlobDigest,
        /// As announced.
        expected: u64,
        /// As it is.
        actual: u64,
    },
    /// A descriptor of something that is no image.
    #[error("{path}: {digest} has media type {media_type:?}, which is not supported")]
    MediaType {
        /// The archive.
        path: String,
        /// What it describes.
        digest: BlobDigest,
        /// Its media type.
        media_type: String,
    },
    /// An image that is needed is not here.
    #[error("image {wanted:?} is not here{platform} and could not be pulled")]
    NotPulled {
        /// As it was asked for.
        wanted: String,
        /// What it is to run on, as the sentence goes on; empty for this machine.
        platform: String,
        /// Why not.
        #[source]
        source: Box<LoadError>,
    },
    /// A document calls itself something else than its descriptor does.
    #[error("{path}: {digest} is a {outside:?} by its descriptor and a {inside:?} by itself")]
    TwoMediaTypes {
        /// The archive.
        path: String,
        /// The document.
        digest: BlobDigest,
        /// By its descriptor.
        outside: String,
        /// By itself.
        inside: String,
    },
    /// Layers and diff IDs do not pair up.
    #[error("{path}: image {config} has {layers} layers but {diff_ids} diff IDs")]
    LayerCount {
        /// The archive.
        path: String,
        /// The image's config.
        config: BlobDigest,
        /// Layers in the manifest.
        layers: usize,
        /// Diff IDs in the config.
        diff_ids: usize,
    },
    /// An index without an image for this machine.
    #[error("{path}: no image for {wanted} (there are: {there})")]
    NoPlatform {
        /// The archive.
        path: String,
        /// What was looked for.
        wanted: String,
        /// What there is.
        there: String,
    },
    /// Indexes nested too deep.
    #[error("{path}: indexes are nested more than {INDEX_DEPTH_MAX} deep (INDEX_DEPTH_MAX)")]
    Nested {
        /// The archive.
        path: String,
    },
    /// An archive without images.
    #[error("{path}: there is no image in it")]
    Empty {
        /// The archive.
        path: String,
    },
    /// `--tag` for an archive with several images.
    #[error("{path} has {count} images, --tag can name only one")]
    TagForMany {
        /// The archive.
        path: String,
        /// How many images it has.
        count: usize,
    },
    /// A layer.
    #[error("load {path}")]
    Layer {
        /// The archive.
        path: String,
        /// Which layer, and what is wrong with it.
        #[source]
        source: TransferError,
    },
    /// A registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A document that is here could not be read.
    #[error("read a document")]
    Read(#[from] BlobError),
    /// A name.
    #[error(transparent)]
    Name(#[from] ImagesError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl From<ImageError> for LoadError {
    fn from(source: ImageError) -> Self {
        Self::Name(source.into())
    }
}

impl LoadError {
    /// That an image which was needed could not be had.
    pub(crate) fn not_pulled(wanted: &str, platform: Option<&Platform>) -> impl FnOnce(Self) -> Self {
        let platform = platform.map(|platform| format!(" for {platform}")).unwrap_or_default();
        move |error| match error {
            Self::Canceled(canceled) => canceled.into(),
            error => Self::NotPulled { wanted: wanted.to_owned(), platform, source: Box::new(error) },
        }
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Archive(source) => source.kind(),
            Self::Document { source, .. } => source.kind(),
            Self::Digest { .. } | Self::Size { .. } => ErrorKind::DataLoss,
            Self::Nested { .. } => ErrorKind::Limit,
            Self::NoPlatform { .. } | Self::Empty { .. } => ErrorKind::NotFound,
            Self::Unknown { .. }
            | Self::LayoutVersion { .. }
            | Self::Layout { .. }
            | Self::DockerManifest { .. }
            | Self::MediaType { .. }
            | Self::TwoMediaTypes { .. }
            | Self::LayerCount { .. }
            | Self::TagForMany { .. } => ErrorKind::InvalidInput,
            Self::Layer { source, .. } => source.kind(),
            Self::Registry(source) => source.kind(),
            Self::NotPulled { source, .. } => source.kind(),
            Self::Read(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
            Self::Name(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// An image that was loaded.
#[derive(Debug, Clone, Serialize)]
pub struct LoadedImage {
    /// Its ID.
    pub id: ImageId,
    /// The names that it was given, as short as docker prints them.
    pub names: Vec<String>,
    /// Those of them that other images had until now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub moved: Vec<MovedName>,
}

/// A name that was taken from an image.
#[derive(Debug, Clone, Serialize)]
pub struct MovedName {
    /// The name.
    pub name: String,
    /// The image that had it.
    pub from: ImageId,
}

/// Whoever brings an image: its documents and its layers, by their descriptors.
pub(crate) trait ImageSource {
    /// What messages call it.
    fn path(&self) -> &str;
    /// A document's bytes. Their size and digest are checked by whoever asked.
    fn document(&self, descriptor: &Descriptor, maximum: u64, limit: &'static str) -> Result<Vec<u8>, LoadError>;
    /// A layer, that may be read later on.
    fn layer(
        &self,
        descriptor: &Descriptor,
        compression: Compression,
        diff_id: DiffId,
        chain_id: ChainId,
    ) -> Result<LayerSource<'static>, LoadError>;
}

/// An archive in the form of an OCI layout.
struct Layout<'a> {
    archive: &'a Archive,
    path: &'a str,
}

impl ImageSource for Layout<'_> {
    fn path(&self) -> &str {
        self.path
    }

    fn document(&self, descriptor: &Descriptor, maximum: u64, _: &'static str) -> Result<Vec<u8>, LoadError> {
        Ok(self.archive.read(&blob_name(descriptor.digest), maximum)?)
    }

    fn layer(
        &self,
        descriptor: &Descriptor,
        compression: Compression,
        diff_id: DiffId,
        chain_id: ChainId,
    ) -> Result<LayerSource<'static>, LoadError> {
        let section = self.archive.section(&blob_name(descriptor.digest))?;
        check_size(self.path, "layer", descriptor, section.size_bytes())?;
        Ok(source(section, Some(descriptor.digest), compression, diff_id, chain_id))
    }
}

/// An image that somebody offers, checked as far as documents go.
pub(crate) struct Candidate {
    pub(crate) names: Vec<Reference>,
    /// `None`: a docker archive has no manifests, it is made once the layers' digests are known.
    pub(crate) manifest: Option<Manifest>,
    pub(crate) config: ImageConfig,
    pub(crate) layers: Vec<LayerSource<'static>>,
}

/// An image whose blobs and layers are here.
pub(crate) struct ReadyImage {
    manifest: ManifestRow,
    snapshot: Option<SnapshotId>,
    /// `None`: they are still to come.
    layers: Option<Vec<ChainLayer>>,
    /// What its layers take on disk.
    size_bytes: u64,
}

impl ReadyImage {
    /// An image whose layers come when they are needed.
    pub(crate) fn lazy(manifest: &Manifest) -> Self {
        Self { manifest: manifest.into(), snapshot: None, layers: None, size_bytes: 0 }
    }
}

/// An OCI layout's marker file.
#[derive(Deserialize)]
struct OciLayout {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

/// An entry of docker's `manifest.json`.
#[derive(Deserialize)]
struct DockerImage {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    repo_tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

impl Engine {
    /// Loads all images of an archive. `tag` names an image that the archive leaves nameless.
    ///
    /// # Errors
    /// [`LoadError`]; the store is then as it was.
    pub fn load(
        &self,
        input: &Input,
        tag: Option<&str>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<LoadedImage>, LoadError> {
        let loaded = self.load_held(input, tag, progress, cancel);
        self.keep_policy_after(loaded, cancel)
    }

    fn load_held(
        &self,
        input: &Input,
        tag: Option<&str>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<LoadedImage>, LoadError> {
        let tag = tag.map(plain_name).transpose()?;
        let archive = Archive::open(input, self.store().run_dir(), self.limits(), cancel)?;
        let path = archive.path().display().to_string();
        let mut candidates = if archive.find("index.json")?.is_some() {
            self.oci_candidates(&archive, &path)?
        } else if archive.find("manifest.json")?.is_some() {
            self.docker_candidates(&archive, &path)?
        } else {
            return Err(LoadError::Unknown { path });
        };
        match (tag, candidates.as_mut_slice()) {
            (_, []) => return Err(LoadError::Empty { path }),
            (Some(tag), [only]) if !only.names.contains(&tag) => only.names.push(tag),
            (Some(_), [_]) | (None, _) => {}
            (Some(_), several) => return Err(LoadError::TagForMany { path, count: several.len() }),
        }
        self.with_lease(&format!("load {path}"), |lease| {
            let mut ready = Vec::new();
            for candidate in &candidates {
                ready.push(self.take_image(candidate, &path, lease, progress, cancel)?);
            }
            // All images of an archive appear at once.
            self.store().write(|tx| {
                let loaded = candidates.iter().zip(&ready).map(|(candidate, ready)| put_image(tx, candidate, ready));
                loaded.collect::<Result<Vec<_>, LoadError>>()
            })
        })
    }

    /// Keeps the blobs and layers of one image, held by `lease`.
    pub(crate) fn take_image(
        &self,
        candidate: &Candidate,
        path: &str,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<ReadyImage, LoadError> {
        let failed = |source| LoadError::Layer { path: path.to_owned(), source };
        let Taken { blobs, snapshot, layers } =
            self.transfer(lease, progress, cancel).take_layers(&candidate.layers, &[]).map_err(failed)?;
        let chain = plies_image::chain_layers(self.store(), candidate.config.diff_ids(), &layers);
        let mut size_bytes = 0;
        for layer in &layers {
            let info = self.store().layers().info(*layer).map_err(|error| failed(error.into()))?;
            size_bytes += info.usage.size_bytes;
        }
        let config = candidate.config.document().raw();
        let manifest = match &candidate.manifest {
            Some(manifest) => manifest.clone(),
            None => {
                let digest = candidate.config.document().digest();
                let config = Descriptor::new(MediaType::ImageConfig, digest, config.len() as u64);
                let layers: Vec<Descriptor> = blobs.iter().map(|blob| blob.descriptor(Family::Oci)).collect();
                let built = Manifest::build(&config, &layers, &BTreeMap::new());
                built.map_err(|source| LoadError::Document { path: path.to_owned(), source })?
            }
        };
        let layer_blobs: Vec<BlobDigest> = blobs.iter().map(|blob| blob.digest).collect();
        plies_image::keep_documents(self.store(), &manifest, config, &layer_blobs, lease)?;
        let layers = chain.map_err(|error| failed(error.into()))?;
        Ok(ReadyImage { manifest: (&manifest).into(), snapshot, layers: Some(layers), size_bytes })
    }

    fn oci_candidates(&self, archive: &Archive, path: &str) -> Result<Vec<Candidate>, LoadError> {
        if archive.find("oci-layout")?.is_some() {
            let raw = archive.read("oci-layout", LAYOUT_BYTES_MAX)?;
            let layout: Result<OciLayout, _> = serde_json::from_slice(&raw);
            match layout {
                Ok(layout) if layout.version == LAYOUT_VERSION => {}
                Ok(layout) => return Err(LoadError::LayoutVersion { path: path.to_owned(), version: layout.version }),
                Err(source) => return Err(LoadError::Layout { path: path.to_owned(), source }),
            }
        }
        let index = Index::parse(&archive.read("index.json", limits::MANIFEST_BYTES_MAX)?)
            .map_err(|source| LoadError::Document { path: format!("{path}: index.json"), source })?;
        let mut candidates: Vec<Candidate> = Vec::new();
        let layout = Layout { archive, path };
        for descriptor in index.manifests() {
            let manifest = manifest_for(&layout, descriptor, &Platform::host(), 0)?;
            let ref_name = || descriptor.annotations.get(REF_NAME_ANNOTATION).filter(|name| name.contains(['/', ':']));
            let name = descriptor.annotations.get(NAME_ANNOTATION).or_else(ref_name);
            // What is no name leaves the image nameless rather than unloaded.
            let name = name.and_then(|name| name.parse::<Reference>().ok()).filter(|name| name.digest().is_none());
            match candidates.iter_mut().find(|have| have.manifest.as_ref() == Some(&manifest)) {
                Some(have) => have.names.extend(name),
                None => candidates.push(candidate(&layout, manifest, name.into_iter().collect())?),
            }
        }
        Ok(candidates)
    }

    fn docker_candidates(&self, archive: &Archive, path: &str) -> Result<Vec<Candidate>, LoadError> {
        let raw = archive.read("manifest.json", DOCKER_MANIFEST_BYTES_MAX)?;
        let images = plies_oci::check_unique_keys(&raw).and_then(|()| serde_json::from_slice(&raw));
        let images: Vec<DockerImage> =
            images.map_err(|source| LoadError::DockerManifest { path: path.to_owned(), source })?;
        let mut candidates = Vec::new();
        for image in images {
            let raw = archive.read(&image.config, limits::CONFIG_BYTES_MAX)?;
            let config = ImageConfig::parse(&raw)
                .map_err(|source| LoadError::Document { path: format!("{path}: {}", image.config), source })?;
            let files = image.layers.unwrap_or_default();
            let mut chain = Chain::new(path, &config, files.len())?;
            let mut layers = Vec::new();
            for file in &files {
                let section = archive.section(file)?;
                let compression = section.compression().map_err(|source| ArchiveError::Io {
                    op: "read",
                    path: archive.path().join(file),
                    source,
                })?;
                let (diff_id, chain_id) = chain.next();
                // A plain layer's blob is its tar, so the diff ID is the digest to expect.
                let plain = compression == plies_oci::Compression::None;
                let digest = plain.then(|| BlobDigest::from_bytes(*diff_id.as_bytes()));
                layers.push(source(section, digest, compression, diff_id, chain_id));
            }
            let names = image.repo_tags.unwrap_or_default();
            let names = names.iter().map(|name| plain_name(name)).collect::<Result<_, _>>()?;
            candidates.push(Candidate { names, manifest: None, config, layers });
        }
        Ok(candidates)
    }
}

/// Adds an image that is ready, and gives it its names.
pub(crate) fn put_image(tx: &mut Tx<'_>, candidate: &Candidate, ready: &ReadyImage) -> Result<LoadedImage, LoadError> {
    let id = plies_image::put(
        tx,
        &NewImage {
            config: &candidate.config,
            manifests: vec![ready.manifest.clone()],
            snapshot: ready.snapshot,
            layers: ready.layers.as_deref(),
            size_bytes: ready.size_bytes,
            built_here: false,
        },
    )?;
    let mut moved = Vec::new();
    for name in &candidate.names {
        match plies_image::named(tx, name)? {
            Some(before) if before != id => moved.push(MovedName { name: name.familiar(), from: before }),
            _ => {}
        }
        plies_image::set_name(tx, name, id, Some(ready.manifest.digest))?;
    }
    let names = candidate.names.iter().map(Reference::familiar).collect();
    Ok(LoadedImage { id, names, moved })
}

/// Follows indexes down to the manifest for a platform.
pub(crate) fn manifest_for(
    from: &dyn ImageSource,
    descriptor: &Descriptor,
    wanted: &Platform,
    depth: usize,
) -> Result<Manifest, LoadError> {
    let path = from.path();
    let document = |source| LoadError::Document { path: path.to_owned(), source };
    match classify(&descriptor.media_type) {
        Some(MediaClass::Manifest) => {
            let raw = document_bytes(from, "manifest", descriptor, limits::MANIFEST_BYTES_MAX, "MANIFEST_BYTES_MAX")?;
            let manifest = Manifest::parse(&raw).map_err(document)?;
            same_media_type(path, descriptor, manifest.document().value().media_type().as_ref())?;
            Ok(manifest)
        }
        Some(MediaClass::Index) if depth < INDEX_DEPTH_MAX => {
            let raw = document_bytes(from, "index", descriptor, limits::MANIFEST_BYTES_MAX, "MANIFEST_BYTES_MAX")?;
            let index = Index::parse(&raw).map_err(document)?;
            same_media_type(path, descriptor, index.document().value().media_type().as_ref())?;
            let is_exact = |one: &&Descriptor| one.platform.as_ref() == Some(wanted);
            let serves = |one: &&Descriptor| one.platform.as_ref().is_none_or(|there| there.serves(wanted));
            let chosen = index.manifests().iter().find(is_exact).or_else(|| index.manifests().iter().find(serves));
            let chosen = chosen.ok_or_else(|| {
                let there: Vec<String> =
                    index.manifests().iter().flat_map(|one| one.platform.iter().map(Platform::to_string)).collect();
                LoadError::NoPlatform { path: path.to_owned(), wanted: wanted.to_string(), there: there.join(", ") }
            })?;
            manifest_for(from, chosen, wanted, depth + 1)
        }
        Some(MediaClass::Index) => Err(LoadError::Nested { path: path.to_owned() }),
        _ => Err(LoadError::MediaType {
            path: path.to_owned(),
            digest: descriptor.digest,
            media_type: descriptor.media_type.to_string(),
        }),
    }
}

/// The image of a manifest: its config is read, its layers are not.
pub(crate) fn candidate(
    from: &dyn ImageSource,
    manifest: Manifest,
    names: Vec<Reference>,
) -> Result<Candidate, LoadError> {
    let path = from.path();
    let raw = document_bytes(from, "config", manifest.config(), limits::CONFIG_BYTES_MAX, "CONFIG_BYTES_MAX")?;
    let config = ImageConfig::parse(&raw).map_err(|source| LoadError::Document { path: path.to_owned(), source })?;
    let mut chain = Chain::new(path, &config, manifest.layers().len())?;
    let mut layers = Vec::new();
    for layer in manifest.layers() {
        let Some(MediaClass::Layer(compression)) = classify(&layer.media_type) else {
            unreachable!("because a manifest with another kind of layer does not parse");
        };
        let (diff_id, chain_id) = chain.next();
        layers.push(from.layer(layer, compression, diff_id, chain_id)?);
    }
    Ok(Candidate { names, manifest: Some(manifest), config, layers })
}

/// A layer that is part of an archive.
fn source(
    section: Section,
    digest: Option<BlobDigest>,
    compression: Compression,
    diff_id: DiffId,
    chain_id: ChainId,
) -> LayerSource<'static> {
    let size_bytes = section.size_bytes();
    let open = Box::new(move |_| Ok(Box::new(section.clone()) as Box<dyn Read + Send>));
    LayerSource { digest, size_bytes, compression, diff_id, chain_id, origin: Origin::Near, open }
}

/// Where an OCI layout keeps a blob.
pub(crate) fn blob_name(digest: BlobDigest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Pairs layers with the diff IDs and chain IDs of their config.
struct Chain<'a> {
    diff_ids: std::slice::Iter<'a, plies_oci::DiffId>,
    chain: Option<ChainId>,
}

impl<'a> Chain<'a> {
    fn new(path: &str, config: &'a ImageConfig, layers: usize) -> Result<Self, LoadError> {
        if layers != config.diff_ids().len() {
            return Err(LoadError::LayerCount {
                path: path.to_owned(),
                config: config.document().digest(),
                layers,
                diff_ids: config.diff_ids().len(),
            });
        }
        Ok(Self { diff_ids: config.diff_ids().iter(), chain: None })
    }

    fn next(&mut self) -> (plies_oci::DiffId, ChainId) {
        let diff_id = *self.diff_ids.next().expect("because the counts were compared");
        let chain_id = ChainId::extend(self.chain, diff_id);
        self.chain = Some(chain_id);
        (diff_id, chain_id)
    }
}

fn check_size(path: &str, what: &'static str, descriptor: &Descriptor, actual: u64) -> Result<(), LoadError> {
    if actual == descriptor.size_bytes {
        return Ok(());
    }
    let (digest, expected) = (descriptor.digest, descriptor.size_bytes);
    Err(LoadError::Size { path: path.to_owned(), what, digest, expected, actual })
}

/// Refuses a document that calls itself something else than its descriptor does: two names for one document are two
/// meanings for two readers (CVE-2021-41190).
fn same_media_type(path: &str, descriptor: &Descriptor, own: Option<&MediaType>) -> Result<(), LoadError> {
    match own {
        Some(own) if *own != descriptor.media_type => Err(LoadError::TwoMediaTypes {
            path: path.to_owned(),
            digest: descriptor.digest,
            outside: descriptor.media_type.to_string(),
            inside: own.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Reads a document and checks that it is the one described.
fn document_bytes(
    from: &dyn ImageSource,
    what: &'static str,
    descriptor: &Descriptor,
    maximum: u64,
    limit: &'static str,
) -> Result<Vec<u8>, LoadError> {
    let path = from.path();
    let raw = from.document(descriptor, maximum, limit)?;
    check_size(path, what, descriptor, raw.len() as u64)?;
    let actual = BlobDigest::of(&raw);
    if actual != descriptor.digest {
        return Err(LoadError::Digest { path: path.to_owned(), what, expected: descriptor.digest, actual });
    }
    Ok(raw)
}
