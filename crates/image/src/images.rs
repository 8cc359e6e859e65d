//! The image store: images by their config digest, and the names that point at them.
//!
//! ```text
//! image.images     ImageId             -> ImageRow   manifests, snapshot, chain, parent, what a list shows
//! image.children   ImageId, ImageId    -> ()         parent, child
//! image.names      full reference      -> NameRow    image, the manifest it was loaded with
//! ```
//!
//! # Invariants
//! - An image row has an owner `image:<id>` in the store that holds its config, its manifests and its snapshot, and a hold
//!   `image:<id>` on its topmost layer in the layer store, made and dropped in the same transaction as the row. So an
//!   image that is listed is whole.
//! - A parent is an image that is here. Parents never lead in a circle.
//! - A name always points at a row that exists. An image without a name ("dangling") stays until it is removed.
//!
//! All functions take the transaction to work in, so that an image appears together with what was written for it.
//! There are no locks here.

use std::collections::HashMap;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::str::FromStr as _;

use plies_oci::{BlobDigest, ChainId, DiffId, DocumentError, ErrorKind, ImageConfig, ImageId, Manifest, Reference};
use plies_store::{
    CatalogueError, CommitError, Expected, IngestError, LayerId, Lease, Owner, Resource, Row, Rows, SnapshotError,
    SnapshotId, Stamp, Store, Table, Tx,
};
use serde::{Deserialize, Serialize};

use crate::layerstore::{ChainLayer, hold_chain, layers_of, put_chain, unhold_chain};

pub(crate) const IMAGES: Table<ImageId, ImageRow> = Table::new("image.images");
pub(crate) const CHILDREN: Table<(ImageId, ImageId), ()> = Table::new("image.children");
pub(crate) const NAMES: Table<String, NameRow> = Table::new("image.names");

/// Hex digits that an ID must be given with at least, so that a short name is not taken for one.
const ID_PREFIX_DIGITS_MIN: usize = 2;

/// A manifest that an image is known under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRow {
    /// The manifest's blob.
    pub digest: BlobDigest,
    /// Its length.
    pub size_bytes: u64,
    /// Its media type.
    pub media_type: String,
}

impl From<&Manifest> for ManifestRow {
    fn from(manifest: &Manifest) -> Self {
        let descriptor = manifest.descriptor();
        Self {
            digest: descriptor.digest,
            size_bytes: descriptor.size_bytes,
            media_type: descriptor.media_type.to_string(),
        }
    }
}

/// What a list says of an image, so that it need not read every config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// When the image was made, as it says itself (RFC 3339).
    pub created: Option<String>,
    /// What it runs on: `os/architecture[/variant]`.
    pub platform: String,
    /// How many layers it has.
    pub layers_count: u32,
    /// What its unpacked layers take on disk, shared or not.
    pub size_bytes: u64,
}

/// What is kept of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// Length of the config, whose digest is the image's ID.
    pub config_bytes: u64,
    /// Manifests with this config, the first one seen first. None: nobody has saved it yet.
    pub manifests: Vec<ManifestRow>,
    /// The image's layers as one stack; `None` for an image without layers.
    pub snapshot: Option<SnapshotId>,
    /// When it came into this store.
    pub added_at: Stamp,
    /// Its topmost layer in the layer store. `None` for an image without layers, and for one that came here before there
    /// was a layer store.
    pub chain: Option<ChainId>,
    /// The image that it was built on, where that is known.
    pub parent: Option<ImageId>,
    /// It was built here. Only such images, and those that a user names, may answer for a build step (CVE-2024-24557).
    pub built_here: bool,
    /// What a list says of it. `None` for one that came here before this was kept.
    pub listed: Option<Listed>,
}

/// What a name points at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRow {
    /// The image.
    pub image: ImageId,
    /// The manifest that the name was given with, if there was one.
    pub manifest: Option<BlobDigest>,
}

impl Row for ImageRow {
    const VERSION: u8 = 2;

    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct First {
            config_bytes: u64,
            manifests: Vec<ManifestRow>,
            snapshot: Option<SnapshotId>,
            added_at: Stamp,
        }
        (version == 1).then_some(())?;
        let First { config_bytes, manifests, snapshot, added_at } = postcard::from_bytes(body).ok()?;
        // What was built here had no manifest before it was saved.
        let built_here = manifests.is_empty();
        let row =
            Self { config_bytes, manifests, snapshot, added_at, chain: None, parent: None, built_here, listed: None };
        Some(row)
    }
}
impl Row for NameRow {
    const VERSION: u8 = 1;
}

/// Why an image could not be found or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No image has this name or ID.
    #[error("no image {wanted:?} (see `ply images`)")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// Several images have an ID that begins so.
    #[error("{wanted:?} is short for {count} images, give more digits")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// How many images fit.
        count: usize,
    },
    /// An image cannot be removed by its ID while several names point at it.
    #[error("image {} has several names ({}), remove those", short(.id), names.join(", "))]
    ManyNames {
        /// The image.
        id: ImageId,
        /// Its names.
        names: Vec<String>,
    },
    /// Other images were built on it.
    #[error("image {} is the parent of {}, remove {} first", short(.id), images(.children), if .children.len() == 1 { "it" } else { "them" })]
    Dependents {
        /// The image.
        id: ImageId,
        /// Its children.
        children: Vec<ImageId>,
    },
    /// A name that may not be moved points at another image.
    #[error("{name} is the name of image {} already", short(.image))]
    NameTaken {
        /// The name.
        name: String,
        /// Its image.
        image: ImageId,
    },
    /// An image would be its own ancestor.
    #[error("image {} descends from {}", short(.parent), short(.child))]
    Circle {
        /// The image that was to get a parent.
        child: ImageId,
        /// The parent.
        parent: ImageId,
    },
    /// A config does not parse, or names more layers in its history than it has.
    #[error("create an image")]
    Config(#[from] DocumentError),
    /// A config names layers that are not those it comes with.
    #[error("image {} names {diff_ids} layers, but comes with {layers} of them", short(.id))]
    Layers {
        /// The image.
        id: ImageId,
        /// Diff IDs in the config.
        diff_ids: usize,
        /// How many of them are there, from the bottom.
        layers: usize,
    },
    /// Stacking its layers.
    #[error("stack the layers of an image")]
    Snapshot(#[from] SnapshotError),
    /// Keeping its config or a manifest.
    #[error("keep a document")]
    Ingest(#[from] IngestError),
    /// Keeping its config or a manifest.
    #[error("keep a document")]
    Commit(#[from] CommitError),
    /// Writing its config or a manifest.
    #[error("write a document")]
    Write(#[source] std::io::Error),
    /// The catalogue failed.
    #[error("read or change the image store")]
    Catalogue(#[from] CatalogueError),
}

/// Images in a message; of very many some.
fn images(ids: &[ImageId]) -> String {
    const SHOWN: usize = 10;
    let mut text = ids.iter().take(SHOWN).map(short).collect::<Vec<_>>().join(", ");
    if ids.len() > SHOWN {
        text.push_str(&format!(" and {} more", ids.len() - SHOWN));
    }
    text
}

fn short(id: &ImageId) -> String {
    id.hex()[..12].to_owned()
}

impl ImageError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } => ErrorKind::InvalidInput,
            Self::ManyNames { .. } | Self::Dependents { .. } => ErrorKind::FailedPrecondition,
            Self::NameTaken { .. } => ErrorKind::AlreadyExists,
            Self::Circle { .. } | Self::Layers { .. } => ErrorKind::InvalidInput,
            Self::Config(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Ingest(source) => source.kind(),
            Self::Commit(source) => source.kind(),
            Self::Write(_) => ErrorKind::Unavailable,
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// An image with its names.
#[derive(Debug, Clone)]
pub struct Image {
    /// The image's ID.
    pub id: ImageId,
    /// Its row.
    pub row: ImageRow,
    /// Its names in full, sorted.
    pub names: Vec<String>,
}

/// An image as a user named it.
#[derive(Debug, Clone)]
pub struct Found {
    /// The image's ID.
    pub id: ImageId,
    /// Its row.
    pub row: ImageRow,
    /// The name that led here; `None` when it was the ID.
    pub name: Option<Reference>,
    /// The manifest that goes with that name.
    pub manifest: Option<BlobDigest>,
}

impl Found {
    /// The manifest that it goes out with: the one of its name, else the first that is known.
    pub fn saved_with(&self) -> Option<BlobDigest> {
        self.manifest.or_else(|| self.row.manifests.first().map(|row| row.digest))
    }
}

/// What [`remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// A name went; others are left, or the image had none.
    Name(String),
    /// An image went.
    Image(ImageId),
}

pub(crate) fn owner(id: &ImageId) -> Owner {
    Owner::new("image", id)
}

/// An image that is to be added.
#[derive(Debug, Clone)]
pub struct NewImage<'a> {
    /// Its config.
    pub config: &'a ImageConfig,
    /// Manifests that it is known under.
    pub manifests: Vec<ManifestRow>,
    /// Its layers as one stack.
    pub snapshot: Option<SnapshotId>,
    /// Its layers, bottom first, as the config lists them. `None`: they are not all known by their chains, and the image
    /// is not in the layer store.
    pub layers: Option<&'a [ChainLayer]>,
    /// What its unpacked layers take on disk.
    pub size_bytes: u64,
    /// It was built here.
    pub built_here: bool,
}

/// Adds an image, or a further manifest to one that is there. What it needs (config, manifests, snapshot, layers) must be
/// in the store by now, held by the caller's lease. Its layers are put into the layer store.
///
/// # Errors
/// [`ImageError::Layers`]; [`ImageError::Catalogue`], among them that a needed resource is missing.
pub fn put(tx: &mut Tx<'_>, new: &NewImage<'_>) -> Result<ImageId, ImageError> {
    let (id, config) = (new.config.id(), new.config);
    let owner = owner(&id);
    tx.hold(&owner, Resource::Blob(BlobDigest::from_bytes(*id.as_bytes())))?;
    let mut row = match tx.get(&IMAGES, &id)? {
        Some(row) => row,
        None => ImageRow {
            config_bytes: config.document().raw().len() as u64,
            manifests: vec![],
            snapshot: new.snapshot,
            added_at: tx.now(),
            chain: None,
            parent: None,
            built_here: false,
            listed: None,
        },
    };
    // One that was pulled lazily has its layers now.
    let was_lazy = row.snapshot.is_none() && new.snapshot.is_some();
    row.snapshot = row.snapshot.or(new.snapshot);
    if let Some(snapshot) = row.snapshot {
        tx.hold(&owner, Resource::Snapshot(snapshot))?;
    }
    if let (Some(layers), None) = (new.layers, row.chain) {
        let fits = layers.iter().map(|layer| &layer.diff_id).eq(config.diff_ids());
        if !fits {
            return Err(ImageError::Layers { id, diff_ids: config.diff_ids().len(), layers: layers.len() });
        }
        row.chain = put_chain(tx, layers)?;
        if let Some(chain) = row.chain {
            hold_chain(tx, chain, owner.as_str())?;
        }
    }
    for manifest in &new.manifests {
        add_manifest_to(tx, &owner, &mut row, manifest)?;
    }
    row.built_here |= new.built_here;
    let listed = row.listed.take().filter(|_| !was_lazy);
    row.listed = listed.or_else(|| {
        Some(Listed {
            created: config.document().value().created().clone(),
            platform: config.platform().to_string(),
            layers_count: u32::try_from(config.diff_ids().len()).unwrap_or(u32::MAX),
            size_bytes: new.size_bytes,
        })
    });
    tx.put(&IMAGES, &id, &row)?;
    Ok(id)
}

/// Keeps a manifest and its config as blobs, held by `lease`, and writes down that the manifest needs the config and those of
/// `layer_blobs` that are here.
///
/// # Errors
/// [`ImageError::Write`], [`ImageError::Ingest`], [`ImageError::Commit`], [`ImageError::Catalogue`].
pub fn keep_documents(
    store: &Store,
    manifest: &Manifest,
    config: &[u8],
    layer_blobs: &[BlobDigest],
    lease: &Lease,
) -> Result<(), ImageError> {
    let mut ingests = Vec::new();
    for bytes in [config, manifest.document().raw()] {
        let mut ingest = store.content().ingest_unnamed()?;
        ingest.write_all(bytes).map_err(ImageError::Write)?;
        ingests.push((ingest, Expected::exactly(BlobDigest::of(bytes), bytes.len() as u64)));
    }
    store.content().commit_all(ingests, lease)?;
    let (manifest, config) = (manifest.document().digest(), BlobDigest::of(config));
    store.write(|tx| {
        tx.add_edge(manifest, config)?;
        for needed in layer_blobs {
            // One whose layer was here already was not fetched.
            match tx.add_edge(manifest, *needed) {
                Err(CatalogueError::NoSuchResource { .. }) => {}
                added => added?,
            }
        }
        Ok::<_, CatalogueError>(())
    })?;
    Ok(())
}

/// Adds a further manifest to an image that is there.
///
/// # Errors
/// [`ImageError::NotFound`]; [`ImageError::Catalogue`], among them that the manifest is not in the store.
pub fn add_manifest(tx: &mut Tx<'_>, id: ImageId, manifest: &ManifestRow) -> Result<(), ImageError> {
    let mut row = tx.get(&IMAGES, &id)?.ok_or_else(|| ImageError::NotFound { wanted: id.to_string() })?;
    add_manifest_to(tx, &owner(&id), &mut row, manifest)?;
    tx.put(&IMAGES, &id, &row)?;
    Ok(())
}

fn add_manifest_to(
    tx: &mut Tx<'_>,
    owner: &Owner,
    row: &mut ImageRow,
    manifest: &ManifestRow,
) -> Result<(), CatalogueError> {
    tx.hold(owner, Resource::Blob(manifest.digest))?;
    if !row.manifests.iter().any(|have| have.digest == manifest.digest) {
        row.manifests.push(manifest.clone());
    }
    Ok(())
}

/// Creates an image from the bytes of its config, as Docker's image store does: its ID is their digest, and the layers
/// that it names must be registered. One that is there is left as it is.
///
/// # Errors
/// [`ImageError::Config`] if it is none, or names more layers in its history than it has; [`ImageError::Layers`] if its
/// layers are not registered. Nothing is created then.
pub fn create(store: &Store, raw: &[u8], built_here: bool, lease: &Lease) -> Result<ImageId, ImageError> {
    let config = ImageConfig::parse(raw)?;
    let mut layers = Vec::new();
    let mut chain = None;
    for diff_id in config.diff_ids() {
        chain = Some(ChainId::extend(chain, *diff_id));
        match store.read(|rows| layers_of(rows, chain))?.and_then(|chain| chain.last().copied()) {
            Some(layer) => layers.push((*diff_id, layer)),
            None => {
                let (diff_ids, layers) = (config.diff_ids().len(), layers.len());
                return Err(ImageError::Layers { id: config.id(), diff_ids, layers });
            }
        }
    }
    let (diff_ids, ids): (Vec<DiffId>, Vec<LayerId>) = layers.into_iter().unzip();
    let layers = crate::chain_layers(store, &diff_ids, &ids).map_err(SnapshotError::from)?;
    let snapshot = if ids.is_empty() { None } else { Some(store.snapshots().ensure(&ids, lease)?) };
    let mut ingest = store.content().ingest_unnamed()?;
    ingest.write_all(raw).map_err(ImageError::Write)?;
    ingest.commit(Expected::exactly(BlobDigest::of(raw), raw.len() as u64), lease)?;
    let mut size_bytes = 0;
    for id in &ids {
        size_bytes += store.layers().info(*id).map_err(SnapshotError::from)?.usage.size_bytes;
    }
    let new = NewImage { config: &config, manifests: vec![], snapshot, layers: Some(&layers), size_bytes, built_here };
    store.write(|tx| put(tx, &new))
}

/// What becomes of a name that points at another image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It points at the new one from now on. The other one may become dangling by that.
    Move,
    /// It stays, and the request fails.
    Refuse,
}

/// Points a name at an image that is there, unless it does so already. A name with a digest is never moved.
///
/// # Errors
/// [`ImageError::NotFound`] if there is no such image; [`ImageError::NameTaken`].
pub fn add_name(
    tx: &mut Tx<'_>,
    name: &Reference,
    image: ImageId,
    manifest: Option<BlobDigest>,
    taken: Taken,
) -> Result<(), ImageError> {
    if !tx.contains(&IMAGES, &image)? {
        return Err(ImageError::NotFound { wanted: image.to_string() });
    }
    let key = name.to_string();
    match tx.get(&NAMES, &key)? {
        Some(row) if row.image != image && (taken == Taken::Refuse || name.digest().is_some()) => {
            return Err(ImageError::NameTaken { name: name.familiar(), image: row.image });
        }
        // What it was loaded with before is known better than nothing.
        Some(row) if row.image == image && (manifest.is_none() || row.manifest == manifest) => return Ok(()),
        _ => {}
    }
    tx.put(&NAMES, &key, &NameRow { image, manifest })?;
    Ok(())
}

/// Points a name at an image that is there. An image that loses its last name by this becomes dangling.
///
/// # Errors
/// As [`add_name`], with [`Taken::Move`].
pub fn set_name(
    tx: &mut Tx<'_>,
    name: &Reference,
    image: ImageId,
    manifest: Option<BlobDigest>,
) -> Result<(), ImageError> {
    add_name(tx, name, image, manifest, Taken::Move)
}

/// The image that a name points at.
///
/// # Errors
/// [`CatalogueError`].
pub fn named(rows: &impl Rows, name: &Reference) -> Result<Option<ImageId>, CatalogueError> {
    Ok(rows.get(&NAMES, &name.to_string())?.map(|row| row.image))
}

/// Says what image an image was built on, instead of what was said before.
///
/// # Errors
/// [`ImageError::NotFound`], [`ImageError::Circle`].
pub fn set_parent(tx: &mut Tx<'_>, child: ImageId, parent: Option<ImageId>) -> Result<(), ImageError> {
    let missing = |id: ImageId| ImageError::NotFound { wanted: id.to_string() };
    let mut row = tx.get(&IMAGES, &child)?.ok_or_else(|| missing(child))?;
    let mut ancestor = parent;
    while let Some(id) = ancestor {
        if id == child {
            return Err(ImageError::Circle { child, parent: parent.unwrap_or(child) });
        }
        ancestor = tx.get(&IMAGES, &id)?.ok_or_else(|| missing(id))?.parent;
    }
    if let Some(before) = row.parent {
        tx.remove(&CHILDREN, &(before, child))?;
    }
    if let Some(parent) = parent {
        tx.put(&CHILDREN, &(parent, child), &())?;
    }
    row.parent = parent;
    tx.put(&IMAGES, &child, &row)?;
    Ok(())
}

/// The images whose parent an image is.
///
/// # Errors
/// [`CatalogueError`].
pub fn children(rows: &impl Rows, parent: &ImageId) -> Result<Vec<ImageId>, CatalogueError> {
    Ok(rows.prefixed(&CHILDREN, parent)?.into_iter().map(|((_, child), ())| child).collect())
}

/// The names of an image in full, sorted.
///
/// # Errors
/// [`CatalogueError`].
pub fn names_of(rows: &impl Rows, image: &ImageId) -> Result<Vec<String>, CatalogueError> {
    let mut names = Vec::new();
    rows.scan(&NAMES, |name, row| {
        if row.image == *image {
            names.push(name);
        }
        ControlFlow::Continue(())
    })?;
    Ok(names)
}

/// Finds an image by name, by ID, or by the beginning of an ID. A name wins over an ID. A name with a digest means the
/// image that has this digest for a name in that repository, whatever its tag, or that a name of that repository was loaded
/// with under that manifest.
///
/// # Errors
/// [`ImageError::NotFound`], [`ImageError::Ambiguous`].
pub fn find(rows: &impl Rows, wanted: &str) -> Result<Found, ImageError> {
    if let Ok(name) = Reference::from_str(wanted) {
        let row = match (rows.get(&NAMES, &name.to_string())?, name.digest()) {
            (None, Some(digest)) => match rows.get(&NAMES, &name.with_digest(digest).to_string())? {
                None => pinned(rows, &name, digest)?,
                row => row,
            },
            (row, _) => row,
        };
        if let Some(row) = row
            && let Some(image) = rows.get(&IMAGES, &row.image)?
        {
            return Ok(Found { id: row.image, row: image, name: Some(name), manifest: row.manifest });
        }
    }
    let missing = || ImageError::NotFound { wanted: wanted.to_owned() };
    let digits = wanted.strip_prefix("sha256:").unwrap_or(wanted);
    // The first ID that begins so, if there is one.
    let first = format!("{digits:0<64}");
    let first = if digits.len() < ID_PREFIX_DIGITS_MIN { Err(()) } else { ImageId::from_hex(&first).map_err(drop) };
    let mut fits = Vec::new();
    rows.scan_from(&IMAGES, &first.map_err(|()| missing())?, |id, row| match id.hex().starts_with(digits) {
        true => {
            fits.push((id, row));
            ControlFlow::Continue(())
        }
        false => ControlFlow::Break(()),
    })?;
    match fits.len() {
        1 => {
            let (id, row) = fits.remove(0);
            Ok(Found { id, row, name: None, manifest: None })
        }
        0 => Err(missing()),
        count => Err(ImageError::Ambiguous { wanted: wanted.to_owned(), count }),
    }
}

fn pinned(rows: &impl Rows, name: &Reference, digest: BlobDigest) -> Result<Option<NameRow>, CatalogueError> {
    let mut found = None;
    rows.scan(&NAMES, |known, row| {
        let same = Reference::from_str(&known).is_ok_and(|known| {
            known.registry() == name.registry()
                && known.repository() == name.repository()
                && name.tag().is_none_or(|tag| known.tag() == Some(tag))
        });
        if same && row.manifest == Some(digest) {
            found = Some(row);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// The image of an exact ID.
///
/// # Errors
/// [`CatalogueError`].
pub fn get(rows: &impl Rows, id: &ImageId) -> Result<Option<ImageRow>, CatalogueError> {
    rows.get(&IMAGES, id)
}

/// All images with their names, newest first.
///
/// # Errors
/// [`CatalogueError`].
pub fn list(rows: &impl Rows) -> Result<Vec<Image>, CatalogueError> {
    let mut names: HashMap<ImageId, Vec<String>> = HashMap::new();
    for (name, row) in rows.all(&NAMES)? {
        names.entry(row.image).or_default().push(name);
    }
    let image = |(id, row)| Image { id, row, names: names.remove(&id).unwrap_or_default() };
    let mut images: Vec<Image> = rows.all(&IMAGES)?.into_iter().map(image).collect();
    images.sort_by_key(|image| (std::cmp::Reverse(image.row.added_at), image.id));
    Ok(images)
}

/// Removes a name, and its image if that was the last one; or an image by ID. An image that others were built on stays
/// when it loses its last name, as in Docker; by its ID it cannot be removed. Bytes go with the next gc.
///
/// # Errors
/// [`ImageError::NotFound`], [`ImageError::Ambiguous`], [`ImageError::ManyNames`], [`ImageError::Dependents`].
pub fn remove(tx: &mut Tx<'_>, wanted: &str) -> Result<Vec<Removed>, ImageError> {
    let found = find(tx, wanted)?;
    let names = names_of(tx, &found.id)?;
    let children = children(tx, &found.id)?;
    let going = match &found.name {
        // With a digest it is another way to say a name that may have any tag.
        Some(name) if tx.contains(&NAMES, &name.to_string())? => vec![name.to_string()],
        Some(name) => return Err(ImageError::NotFound { wanted: name.familiar() }),
        None if names.len() > 1 => return Err(ImageError::ManyNames { id: found.id, names }),
        None if !children.is_empty() => return Err(ImageError::Dependents { id: found.id, children }),
        None => names.clone(),
    };
    let mut removed = Vec::new();
    for name in &going {
        tx.remove(&NAMES, name)?;
        removed.push(Removed::Name(name.clone()));
    }
    if going.len() == names.len() && children.is_empty() {
        delete(tx, found.id)?;
        removed.push(Removed::Image(found.id));
    }
    Ok(removed)
}

/// Removes all images that no name points at and no other image was built on; and then those that only they were built
/// on. Bytes go with the next gc.
///
/// # Errors
/// [`CatalogueError`].
pub fn prune_dangling(tx: &mut Tx<'_>) -> Result<Vec<Removed>, CatalogueError> {
    let mut removed = Vec::new();
    let mut left: Vec<ImageId> =
        list(tx)?.into_iter().filter(|image| image.names.is_empty()).map(|image| image.id).collect();
    loop {
        let mut kept = Vec::new();
        let before = left.len();
        for id in left {
            if children(tx, &id)?.is_empty() {
                delete(tx, id)?;
                removed.push(Removed::Image(id));
            } else {
                kept.push(id);
            }
        }
        if kept.len() == before {
            return Ok(removed);
        }
        left = kept;
    }
}

/// Removes a nameless image, and what holds for it. Its children have no parent from then on.
fn delete(tx: &mut Tx<'_>, id: ImageId) -> Result<(), CatalogueError> {
    for child in children(tx, &id)? {
        tx.remove(&CHILDREN, &(id, child))?;
        if let Some(row) = tx.get(&IMAGES, &child)? {
            tx.put(&IMAGES, &child, &ImageRow { parent: None, ..row })?;
        }
    }
    let owner = owner(&id);
    if let Some(row) = tx.take(&IMAGES, &id)? {
        if let Some(parent) = row.parent {
            tx.remove(&CHILDREN, &(parent, id))?;
        }
        if let Some(chain) = row.chain {
            unhold_chain(tx, chain, owner.as_str())?;
        }
    }
    tx.unhold_all(&owner)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_first_version_is_upgraded() {
        let manifest = ManifestRow { digest: BlobDigest::of(b"m"), size_bytes: 3, media_type: "t".into() };
        let body = |manifests: &[ManifestRow]| {
            postcard::to_stdvec(&(7_u64, manifests, None::<SnapshotId>, Stamp::from_micros(5))).unwrap()
        };
        let loaded = ImageRow::upgrade(1, &body(std::slice::from_ref(&manifest))).unwrap();
        assert_eq!((loaded.config_bytes, loaded.added_at, loaded.built_here), (7, Stamp::from_micros(5), false));
        assert_eq!((&loaded.manifests, loaded.chain, loaded.listed), (&vec![manifest], None, None));
        assert!(ImageRow::upgrade(1, &body(&[])).unwrap().built_here);
        assert!(ImageRow::upgrade(0, &body(&[])).is_none() && ImageRow::upgrade(1, b"\xff").is_none());
    }
}
