//! The image store: images by their config digest, and the names that point at them.
//!
//! ```text
//! image.images   ImageId               -> ImageRow   config size, manifests, snapshot, when added
//! image.names    full reference        -> NameRow    image, the manifest it was loaded with
//! ```
//!
//! # Invariants
//! - An image row has an owner `image:<id>` in the store that holds its config, its manifests and its snapshot, made
//!   and dropped in the same transaction as the row. So an image that is listed is whole.
//! - A name always points at a row that exists. An image without a name ("dangling") stays until it is removed.
//!
//! All functions take the transaction to work in, so that an image appears together with what was written for it.
//! There are no locks here.

use std::str::FromStr as _;

use plies_oci::{BlobDigest, ErrorKind, ImageId, Reference};
use plies_store::{CatalogueError, Owner, Resource, Row, Rows, SnapshotId, Stamp, Table, Tx};
use serde::{Deserialize, Serialize};

const IMAGES: Table<ImageId, ImageRow> = Table::new("image.images");
const NAMES: Table<String, NameRow> = Table::new("image.names");

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

/// What is kept of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// Length of the config, whose digest is the image's ID.
    pub config_bytes: u64,
    /// Manifests with this config, the first one seen first. None: built here and not saved yet.
    pub manifests: Vec<ManifestRow>,
    /// The image's layers as one stack; `None` for an image without layers.
    pub snapshot: Option<SnapshotId>,
    /// When it came into this store.
    pub added_at: Stamp,
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
    const VERSION: u8 = 1;
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
    /// The catalogue failed.
    #[error("read or change the image store")]
    Catalogue(#[from] CatalogueError),
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
            Self::ManyNames { .. } => ErrorKind::FailedPrecondition,
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

/// What [`remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// A name went; others are left, or the image had none.
    Name(String),
    /// An image went.
    Image(ImageId),
}

fn owner(id: &ImageId) -> Owner {
    Owner::new("image", id)
}

/// Adds an image, or a further manifest to one that is there. What it needs (config, manifests, snapshot) must be in
/// the store by now, held by the caller's lease.
///
/// # Errors
/// [`CatalogueError`], among them that a needed resource is missing.
pub fn put(tx: &mut Tx<'_>, id: ImageId, row: &ImageRow) -> Result<(), CatalogueError> {
    let owner = owner(&id);
    tx.hold(&owner, Resource::Blob(BlobDigest::from_bytes(*id.as_bytes())))?;
    let mut merged = tx.get(&IMAGES, &id)?.unwrap_or_else(|| ImageRow { manifests: vec![], ..row.clone() });
    if let Some(snapshot) = merged.snapshot {
        tx.hold(&owner, Resource::Snapshot(snapshot))?;
    }
    for manifest in &row.manifests {
        tx.hold(&owner, Resource::Blob(manifest.digest))?;
        if !merged.manifests.iter().any(|have| have.digest == manifest.digest) {
            merged.manifests.push(manifest.clone());
        }
    }
    tx.put(&IMAGES, &id, &merged)?;
    Ok(())
}

/// Points a name at an image that is there. An image that loses its last name by this becomes dangling.
///
/// # Errors
/// [`ImageError::NotFound`] if there is no such image.
pub fn set_name(
    tx: &mut Tx<'_>,
    name: &Reference,
    image: ImageId,
    manifest: Option<BlobDigest>,
) -> Result<(), ImageError> {
    if !tx.contains(&IMAGES, &image)? {
        return Err(ImageError::NotFound { wanted: image.to_string() });
    }
    tx.put(&NAMES, &name.to_string(), &NameRow { image, manifest })?;
    Ok(())
}

/// Finds an image by name, by ID, or by the beginning of an ID. A name wins over an ID.
///
/// # Errors
/// [`ImageError::NotFound`], [`ImageError::Ambiguous`].
pub fn find(rows: &impl Rows, wanted: &str) -> Result<Found, ImageError> {
    let name = Reference::from_str(wanted).ok();
    if let Some(name) = name
        && let Some(row) = rows.get(&NAMES, &name.to_string())?
        && let Some(image) = rows.get(&IMAGES, &row.image)?
    {
        return Ok(Found { id: row.image, row: image, name: Some(name), manifest: row.manifest });
    }
    let digits = wanted.strip_prefix("sha256:").unwrap_or(wanted);
    let plausible = digits.len() >= ID_PREFIX_DIGITS_MIN && digits.bytes().all(|c| c.is_ascii_hexdigit());
    let mut fits: Vec<_> = if plausible { rows.all(&IMAGES)? } else { vec![] };
    fits.retain(|(id, _)| id.hex().starts_with(digits));
    match fits.len() {
        1 => {
            let (id, row) = fits.remove(0);
            Ok(Found { id, row, name: None, manifest: None })
        }
        0 => Err(ImageError::NotFound { wanted: wanted.to_owned() }),
        count => Err(ImageError::Ambiguous { wanted: wanted.to_owned(), count }),
    }
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
    let names = rows.all(&NAMES)?;
    let of = |id: ImageId| names.iter().filter(move |(_, row)| row.image == id).map(|(name, _)| name.clone());
    let mut images: Vec<Image> =
        rows.all(&IMAGES)?.into_iter().map(|(id, row)| Image { id, row, names: of(id).collect() }).collect();
    images.sort_by_key(|image| (std::cmp::Reverse(image.row.added_at), image.id));
    Ok(images)
}

/// Removes a name, and its image if that was the last one; or an image by ID. Bytes go with the next gc.
///
/// # Errors
/// [`ImageError::NotFound`], [`ImageError::Ambiguous`], [`ImageError::ManyNames`].
pub fn remove(tx: &mut Tx<'_>, wanted: &str) -> Result<Vec<Removed>, ImageError> {
    let found = find(tx, wanted)?;
    let names: Vec<String> =
        tx.all(&NAMES)?.into_iter().filter(|(_, row)| row.image == found.id).map(|(name, _)| name).collect();
    let going = match &found.name {
        Some(name) => vec![name.to_string()],
        None if names.len() > 1 => return Err(ImageError::ManyNames { id: found.id, names }),
        None => names.clone(),
    };
    let mut removed = Vec::new();
    for name in &going {
        tx.remove(&NAMES, name)?;
        removed.push(Removed::Name(name.clone()));
    }
    if going.len() == names.len() {
        tx.remove(&IMAGES, &found.id)?;
        tx.unhold_all(&owner(&found.id))?;
        removed.push(Removed::Image(found.id));
    }
    Ok(removed)
}
