//! Requests on images that are here: list, inspect, history, tag, remove.

use std::collections::BTreeMap;
use std::panic::resume_unwind;

use plies_image::{Found, ImageError, Removed};
use plies_oci::{
    BlobDigest, ChainId, DiffId, DocumentError, ErrorKind, ImageConfig, ImageId, Manifest, Reference, ReferenceError,
};
use plies_store::{BlobError, Cancel, CatalogueError, LayerError};
use serde::Serialize;
use serde_json::Value;

use crate::Engine;

/// Images that are worth a thread of their own in a list: at 5 µs each, some ms.
const SUMMARIES_MIN: usize = 1_000;

/// Why a request on images failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImagesError {
    /// The image store said no.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Not an image name.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A name was expected that can be given, not a digest.
    #[error("{name} holds a digest, which cannot be given as a name")]
    Pinned {
        /// The name.
        name: String,
    },
    /// A config or manifest could not be read back.
    #[error("read blob {digest}")]
    Content {
        /// Which one.
        digest: BlobDigest,
        /// Why.
        #[source]
        source: BlobError,
    },
    /// A layer's row could not be read.
    #[error("read a layer's row")]
    Layer(#[from] LayerError),
    /// A config or manifest that is here does not parse.
    #[error("image {id} is damaged")]
    Document {
        /// Which image.
        id: ImageId,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
}

impl From<CatalogueError> for ImagesError {
    fn from(source: CatalogueError) -> Self {
        Self::Image(source.into())
    }
}

impl ImagesError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image(source) => source.kind(),
            Self::Reference(source) => source.kind(),
            Self::Pinned { .. } => ErrorKind::InvalidInput,
            Self::Content { source, .. } => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Document { .. } => ErrorKind::DataLoss,
        }
    }
}

/// One line of `ply images`.
#[derive(Debug, Clone, Serialize)]
pub struct ImageSummary {
    /// The image's ID.
    pub id: ImageId,
    /// Its names, as short as docker prints them; none if it is dangling.
    pub names: Vec<String>,
    /// When the image was made, as it says itself (RFC 3339).
    pub created: Option<String>,
    /// What it runs on.
    pub platform: String,
    /// How many layers it has.
    pub layers_count: usize,
    /// What its unpacked layers take on disk, shared or not.
    pub size_bytes: u64,
    /// Why nothing but its ID and names is known: it is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What `ply inspect` shows.
#[derive(Debug, Clone, Serialize)]
pub struct ImageDetails {
    /// As in the list.
    #[serde(flatten)]
    pub summary: ImageSummary,
    /// Digests of the manifests that the image is known under.
    pub manifests: Vec<BlobDigest>,
    /// Free-form notes of the manifest that this name, or else the image, is saved and pushed with.
    pub annotations: BTreeMap<String, String>,
    /// The image that it was built on, where that is known.
    pub parent: Option<ImageId>,
    /// Images that were built on it.
    pub children: Vec<ImageId>,
    /// Whether it was built here.
    pub built_here: bool,
    /// Its topmost layer in the layer store.
    pub chain_id: Option<ChainId>,
    /// Diff IDs of the layers, bottom first.
    pub diff_ids: Vec<DiffId>,
    /// The config as it is.
    pub config: Value,
}

/// One step of how an image came to be.
#[derive(Debug, Clone, Serialize)]
pub struct HistoryLine {
    /// RFC 3339.
    pub created: Option<String>,
    /// The instruction.
    pub created_by: String,
    /// Free text.
    pub comment: Option<String>,
    /// The layer that the step made.
    pub diff_id: Option<DiffId>,
    /// What that layer takes on disk.
    pub size_bytes: u64,
}

impl Engine {
    /// All images, newest first. One that cannot be read is listed with its error: it hides no other.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn images(&self) -> Result<Vec<ImageSummary>, ImagesError> {
        let images = self.store().read(plies_image::list)?;
        let damaged = |image: &plies_image::Image, error: &ImagesError| ImageSummary {
            id: image.id,
            names: image.names.iter().map(|name| familiar(name)).collect(),
            created: None,
            platform: String::new(),
            layers_count: 0,
            size_bytes: 0,
            error: Some(chain(error)),
        };
        let summaries = |images: &[plies_image::Image]| -> Vec<ImageSummary> {
            images.iter().map(|image| self.summary(image).unwrap_or_else(|error| damaged(image, &error))).collect()
        };
        // Most of it is looking whether each config is there.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let share = images.len().div_ceil(cores).max(SUMMARIES_MIN);
        Ok(std::thread::scope(|scope| {
            let parts: Vec<_> = images.chunks(share).map(|part| scope.spawn(|| summaries(part))).collect();
            parts.into_iter().flat_map(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        }))
    }

    fn summary(&self, image: &plies_image::Image) -> Result<ImageSummary, ImagesError> {
        // Ten thousand configs take longer to read than people wait for a list.
        if let Some(listed) = &image.row.listed
            && self.store().content().has_file(BlobDigest::from_bytes(*image.id.as_bytes()))
        {
            return Ok(ImageSummary {
                id: image.id,
                names: image.names.iter().map(|name| familiar(name)).collect(),
                created: listed.created.clone(),
                platform: listed.platform.clone(),
                layers_count: usize::try_from(listed.layers_count).unwrap_or(usize::MAX),
                size_bytes: listed.size_bytes,
                error: None,
            });
        }
        let config = self.config_of(image.id)?;
        let size_bytes = self.layer_sizes(config.diff_ids())?.into_iter().sum();
        Ok(ImageSummary {
            id: image.id,
            names: image.names.iter().map(|name| familiar(name)).collect(),
            created: config.document().value().created().clone(),
            platform: config.platform().to_string(),
            layers_count: config.diff_ids().len(),
            size_bytes,
            error: None,
        })
    }

    /// What each layer takes on disk; 0 for one that is not unpacked under its diff ID.
    pub(crate) fn layer_sizes(&self, diff_ids: &[DiffId]) -> Result<Vec<u64>, ImagesError> {
        let layers = self.store().layers();
        let size = |diff_id: &DiffId| Ok(layers.find_by_diff_id(*diff_id)?.map_or(0, |info| info.usage.size_bytes));
        diff_ids.iter().map(size).collect()
    }

    /// Reads and parses an image's config.
    pub(crate) fn config_of(&self, id: ImageId) -> Result<ImageConfig, ImagesError> {
        let raw = self.blob_bytes(BlobDigest::from_bytes(*id.as_bytes()))?;
        ImageConfig::parse(&raw).map_err(|source| ImagesError::Document { id, source })
    }

    /// Reads a small blob whole.
    pub(crate) fn blob_bytes(&self, digest: BlobDigest) -> Result<Vec<u8>, ImagesError> {
        self.store().content().read(digest).map_err(|source| ImagesError::Content { digest, source })
    }

    /// Finds an image by name or ID.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Ambiguous`].
    pub fn find_image(&self, wanted: &str) -> Result<Found, ImageError> {
        self.store().read(|rows| plies_image::find(rows, wanted))
    }

    /// Everything about one image.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn inspect(&self, wanted: &str) -> Result<ImageDetails, ImagesError> {
        let found = self.find_image(wanted)?;
        let config = self.config_of(found.id)?;
        let names = self.store().read(|rows| plies_image::names_of(rows, &found.id))?;
        let children = self.store().read(|rows| plies_image::children(rows, &found.id))?;
        let (parent, built_here, chain_id) = (found.row.parent, found.row.built_here, found.row.chain);
        let annotations = match found.saved_with() {
            Some(digest) => {
                let manifest = Manifest::parse(&self.blob_bytes(digest)?);
                manifest.map_err(|source| ImagesError::Document { id: found.id, source })?.annotations()
            }
            None => BTreeMap::new(),
        };
        let manifests = found.row.manifests.iter().map(|manifest| manifest.digest).collect();
        Ok(ImageDetails {
            summary: self.summary(&plies_image::Image { id: found.id, row: found.row, names })?,
            manifests,
            annotations,
            parent,
            children,
            built_here,
            chain_id,
            diff_ids: config.diff_ids().to_vec(),
            config: serde_json::from_slice(config.document().raw()).expect("because it was parsed just now"),
        })
    }

    /// How an image came to be, newest step first.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn history(&self, wanted: &str) -> Result<Vec<HistoryLine>, ImagesError> {
        let config = self.config_of(self.find_image(wanted)?.id)?;
        let sizes = self.layer_sizes(config.diff_ids())?;
        let mut layers = config.diff_ids().iter().copied().zip(sizes);
        let history = config.document().value().history();
        let mut lines: Vec<HistoryLine> = history
            .iter()
            .flatten()
            .map(|entry| {
                let layer = if entry.empty_layer().unwrap_or(false) { None } else { layers.next() };
                HistoryLine {
                    created: entry.created().clone(),
                    created_by: entry.created_by().clone().unwrap_or_default(),
                    comment: entry.comment().clone(),
                    diff_id: layer.map(|(diff_id, _)| diff_id),
                    size_bytes: layer.map_or(0, |(_, size)| size),
                }
            })
            .collect();
        // Layers that no history speaks of are shown all the same.
        lines.extend(layers.map(|(diff_id, size_bytes)| HistoryLine {
            created: None,
            created_by: "<missing>".into(),
            comment: None,
            diff_id: Some(diff_id),
            size_bytes,
        }));
        lines.reverse();
        Ok(lines)
    }

    /// Gives an image another name. The name is taken from whatever had it.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn tag(&self, source: &str, target: &str) -> Result<ImageId, ImagesError> {
        let name = plain_name(target)?;
        let id = self.store().write(|tx| {
            let found = plies_image::find(tx, source)?;
            plies_image::set_name(tx, &name, found.id, found.manifest)?;
            Ok::<_, ImageError>(found.id)
        })?;
        Ok(id)
    }

    /// Removes all images that no name points at and that no other was built on.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn remove_dangling_images(&self) -> Result<Vec<Removed>, ImagesError> {
        Ok(self.keep_policy_after(self.store().write(plies_image::prune_dangling), &Cancel::new())?)
    }

    /// Removes names, and images that lose their last one: all that are given, or none. One that is given twice, or as
    /// a name and as the ID of what goes with it, is removed once.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn remove_images(&self, wanted: &[String]) -> Result<Vec<Removed>, ImagesError> {
        let removed: Result<Vec<Removed>, ImageError> = self.store().write(|tx| {
            // All are looked for before the first goes, which another may be a second way to say.
            let mut going: Vec<(&str, Found)> = Vec::new();
            for one in wanted {
                let found = plies_image::find(tx, one)?;
                if !going.iter().any(|(_, have)| have.id == found.id && have.name == found.name) {
                    going.push((one, found));
                }
            }
            let mut removed = Vec::new();
            for (one, found) in going {
                if !removed.contains(&Removed::Image(found.id)) {
                    removed.extend(plies_image::remove(tx, one)?);
                }
            }
            Ok(removed)
        });
        // What an image had is the build cache's own now.
        Ok(self.keep_policy_after(removed, &Cancel::new())?)
    }
}

/// A name that can be given to an image: one without a digest.
pub(crate) fn plain_name(text: &str) -> Result<Reference, ImagesError> {
    let name: Reference = text.parse()?;
    match name.digest() {
        Some(_) => Err(ImagesError::Pinned { name: text.to_owned() }),
        None => Ok(name),
    }
}

/// A stored name as short as docker prints it.
pub fn familiar(full: &str) -> String {
    full.parse::<Reference>().map_or_else(|_| full.to_owned(), |name| name.familiar())
}

/// An error with all its causes on one line, for lists that show it and go on.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
