//! `ply pull`: images out of a registry. And what a build does with a base that is not here, and whoever needs the layers
//! of an image that was pulled lazily.
//!
//! ```text
//! engine.sources   blob digest, host/repository -> when it was seen there
//! ```
//!
//! That table says where a blob that is not here can be had, and from where a registry may mount it when it is pushed. It
//! is memory, not truth: a registry may have removed the blob since.

use std::io::{self, Read};
use std::sync::Arc;

use plies_cache::{BlobRow, Provider, Providers, RangeProvider};
use plies_image::{Found, ImageError};
use plies_oci::{
    BlobDigest, ChainId, Compression, Descriptor, DiffId, ErrorKind, ImageId, Manifest, MediaType, Platform, Reference,
};
use plies_registry::{BlobReader, Client, Fetched, RegistryError, Repository};
use plies_store::fsck::{Findings, Remedy};
use plies_store::{
    Cancel, CancelGuard, Canceled, CatalogueError, LayerSource, Lease, Origin, ReadTx, Rows, Table, TransferError, Tx,
};
use serde::Serialize;

use crate::Engine;
use crate::images::ImagesError;
use crate::load::{Candidate, ImageSource, LoadError, ReadyImage, candidate, manifest_for, put_image};
use crate::progress::{Outcome, Progress, Task};

const SOURCES: Table<(BlobDigest, String), u64> = Table::new("engine.sources");

/// Repositories that are remembered for one blob, as many as Docker remembers (`maxMetadata` of its `v2metadata`).
const SOURCES_MAX: usize = 50;

/// Digits of an image ID that stands where a name may stand: as many as docker prints.
const ID_DIGITS_MIN: usize = 12;

/// What to pull.
#[derive(Debug, Clone, Default)]
pub struct PullRequest {
    /// The image's name, with a tag or a digest.
    pub name: String,
    /// What it is to run on; this machine, by default.
    pub platform: Option<Platform>,
    /// Leave its layers where they are until somebody needs them.
    pub lazy: bool,
    /// Name it by its manifest's digest, and leave the tag to the image that has it: what one build needs for another
    /// platform is not what everybody means by the name.
    pub by_digest: bool,
}

/// When an image is asked for at its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// Every time.
    Always,
    /// When it is not here.
    #[default]
    Missing,
    /// Not at all.
    Never,
}

/// An image that was pulled.
#[derive(Debug, Clone, Serialize)]
pub struct PulledImage {
    /// Its ID.
    pub id: ImageId,
    /// Its name, as short as docker prints it.
    pub name: String,
    /// What the name stands for at the registry: a manifest, or an index of several.
    pub digest: BlobDigest,
    /// The manifest that was taken.
    pub manifest: BlobDigest,
    /// Whether the name stood for the same manifest before.
    pub up_to_date: bool,
    /// The image that had the name until now, if it was another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moved_from: Option<ImageId>,
}

/// Registries, as one request sees them: its cancel ends what blocks.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) client: Arc<Client>,
    cancel: Cancel,
    _stop: Arc<CancelGuard>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({:?})", self.client)
    }
}

impl Session {
    /// An error of the client's, or that the request was cancelled and it failed for that.
    fn error(&self, error: RegistryError) -> io::Error {
        match self.cancel.is_canceled() {
            true => io::Error::other(Canceled),
            // With this kind a reader says that the bytes are wrong, not that they stopped.
            false if error.kind() == ErrorKind::DataLoss => io::Error::new(io::ErrorKind::InvalidData, error),
            false => io::Error::other(error),
        }
    }

    fn open(&self, repository: &Repository, descriptor: &Descriptor, offset: u64) -> io::Result<Incoming> {
        let reader = self.client.blob(repository, descriptor, offset).map_err(|error| self.error(error))?;
        Ok(Incoming { reader, session: self.clone() })
    }
}

/// A blob on its way from a registry.
struct Incoming {
    reader: BlobReader,
    session: Session,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer).map_err(|error| match error.downcast::<RegistryError>() {
            Ok(error) => self.session.error(error),
            Err(error) => error,
        })
    }
}

/// A repository that serves an image. What is here already is not fetched.
struct Remote<'a> {
    engine: &'a Engine,
    session: Session,
    repository: Repository,
    /// For messages.
    path: String,
    /// What was fetched to find out what the name stands for.
    resolved: Option<Fetched>,
}

impl ImageSource for Remote<'_> {
    fn path(&self) -> &str {
        &self.path
    }

    fn document(&self, descriptor: &Descriptor, maximum: u64, limit: &'static str) -> Result<Vec<u8>, LoadError> {
        if let Some(resolved) = &self.resolved
            && resolved.descriptor.digest == descriptor.digest
        {
            return Ok(resolved.bytes.clone());
        }
        let content = self.engine.store().content();
        // It may be collected under our eyes, or be damaged: then it is fetched.
        if content.info(descriptor.digest)?.is_some_and(|info| info.size_bytes == descriptor.size_bytes)
            && let Ok(bytes) = content.read(descriptor.digest)
        {
            return Ok(bytes);
        }
        let client = &self.session.client;
        Ok(match plies_oci::classify(&descriptor.media_type) {
            Some(plies_oci::MediaClass::Manifest | plies_oci::MediaClass::Index) => {
                client.manifest(&self.repository, descriptor)?
            }
            _ => client.small_blob(&self.repository, descriptor, maximum, limit)?,
        })
    }

    fn layer(
        &self,
        descriptor: &Descriptor,
        compression: Compression,
        diff_id: DiffId,
        chain_id: ChainId,
    ) -> Result<LayerSource<'static>, LoadError> {
        let (session, repository, described) = (self.session.clone(), self.repository.clone(), descriptor.clone());
        let open = move |offset| {
            let incoming = session.open(&repository, &described, offset)?;
            Ok(Box::new(incoming) as Box<dyn Read + Send>)
        };
        Ok(LayerSource {
            digest: Some(descriptor.digest),
            size_bytes: descriptor.size_bytes,
            compression,
            diff_id,
            chain_id,
            origin: Origin::Far,
            open: Box::new(open),
        })
    }
}

/// Fetches a blob of the build cache out of a repository.
struct RegistryProvider {
    session: Session,
    repository: Repository,
}

impl RegistryProvider {
    fn fetch(&self, blob: &BlobRow, offset: u64) -> io::Result<Incoming> {
        let digest = blob.digest.ok_or(io::ErrorKind::InvalidInput)?;
        let media_type = MediaType::from(blob.media_type.as_str());
        self.session.open(&self.repository, &Descriptor::new(media_type, digest, blob.size_bytes), offset)
    }
}

impl Provider for RegistryProvider {
    fn open(&self, blob: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(self.fetch(blob, 0)?))
    }

    fn ranges(&self) -> Option<&dyn RangeProvider> {
        Some(self)
    }
}

impl RangeProvider for RegistryProvider {
    fn read_range(&self, blob: &BlobRow, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.fetch(blob, offset)?.take(length).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// An image whose layers are elsewhere: what they are called there, and who fetches them.
pub(crate) struct RemoteLayers {
    /// By diff ID, bottom first.
    pub(crate) layers: Vec<(DiffId, Descriptor)>,
    pub(crate) providers: Providers,
}

impl Engine {
    /// A client for one request.
    pub(crate) fn registries(&self, cancel: &Cancel) -> Session {
        let client = Arc::new(Client::new(self.registry.clone()));
        let stopped = Arc::clone(&client);
        let stop = cancel.on_cancel(move || stopped.stop());
        Session { client, cancel: cancel.clone(), _stop: Arc::new(stop) }
    }

    /// Pulls an image.
    ///
    /// # Errors
    /// [`LoadError`]; the store is then as it was, but for parts of layers that a next try goes on from.
    pub fn pull(
        &self,
        request: &PullRequest,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<PulledImage, LoadError> {
        let reference: Reference = request.name.parse().map_err(ImagesError::from)?;
        let pulled = self.with_lease(&format!("pull {reference}"), |lease| {
            self.pull_held(&reference, request, lease, progress, cancel)
        });
        let pulled = pulled.map_err(|error: LoadError| if cancel.is_canceled() { Canceled.into() } else { error });
        self.keep_policy_after(pulled, cancel)
    }

    fn pull_held(
        &self,
        reference: &Reference,
        request: &PullRequest,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<PulledImage, LoadError> {
        let session = self.registries(cancel);
        let task = Task::start(progress, &format!("resolve {reference}"), None);
        let resolved = session.client.resolve(reference)?;
        let descriptor = resolved.descriptor.clone();
        let repository = Repository::of(reference);
        let path = reference.to_string();
        let remote = Remote { engine: self, session, repository, path, resolved: Some(resolved) };
        let wanted = request.platform.clone().unwrap_or_else(Platform::host);
        let manifest = manifest_for(&remote, &descriptor, &wanted, 0)?;
        let row_digest = manifest.document().digest();
        let name = if request.by_digest { reference.with_digest(row_digest) } else { reference.clone() };
        let offered = candidate(&remote, manifest, vec![name.clone()])?;
        // An index was asked for the platform; a manifest alone is for what it is for.
        let there = offered.config.platform();
        let is_alone = descriptor.digest == row_digest;
        if let Some(wanted) = request.platform.as_ref().filter(|wanted| is_alone && !there.serves(wanted)) {
            let (wanted, there) = (wanted.to_string(), there.to_string());
            return Err(LoadError::NoPlatform { path: remote.path, wanted, there });
        }
        task.end(Outcome::Done);
        let before = self.find_image(&name.to_string()).ok().filter(|found| found.name.is_some());
        let up_to_date = before.is_some_and(|found| found.manifest == Some(row_digest));
        let ready = match request.lazy {
            true => self.keep_lazily(&offered, lease)?,
            false => self.take_far(&offered, &remote.path, lease, progress, cancel)?,
        };
        let loaded = self.store().write(|tx| {
            add_sources(tx, &remote.repository, offered.layers.iter().filter_map(|layer| layer.digest))?;
            put_image(tx, &offered, &ready)
        })?;
        Ok(PulledImage {
            id: loaded.id,
            name: name.familiar(),
            digest: descriptor.digest,
            manifest: row_digest,
            up_to_date,
            moved_from: loaded.moved.first().map(|moved| moved.from),
        })
    }

    /// Keeps an image's documents only.
    fn keep_lazily(&self, offered: &Candidate, lease: &Lease) -> Result<ReadyImage, LoadError> {
        let manifest = offered.manifest.as_ref().expect("because registries have manifests");
        plies_image::keep_documents(self.store(), manifest, offered.config.document().raw(), &[], lease)?;
        Ok(ReadyImage::lazy(manifest))
    }

    /// Takes in the layers of an image from afar. What came of them stays for a next try if they stopped coming, and goes
    /// if something is wrong with them.
    fn take_far(
        &self,
        offered: &Candidate,
        path: &str,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<ReadyImage, LoadError> {
        // What another request fetches right now is here when it is done.
        let _turn = self.fetches().take(offered.layers.iter().filter_map(|layer| layer.digest), cancel)?;
        self.take_image(offered, path, lease, progress, cancel).inspect_err(|error| {
            let kind = kind_at_registry(error).unwrap_or_else(|| error.kind());
            if !matches!(kind, ErrorKind::DataLoss | ErrorKind::InvalidInput | ErrorKind::Limit) {
                return;
            }
            for layer in &offered.layers {
                // What another request is writing is its own; what can't be removed now goes with age.
                drop(self.store().content().abort(&layer.ingest_ref()));
            }
        })
    }

    /// The image of a name: the one that is here, or one that is pulled, if it is not, or is for another platform, or if
    /// `always` says so. An ID counts only if it is long enough to be meant: a misspelt name must not find an image whose
    /// ID happens to begin so.
    ///
    /// # Errors
    /// [`LoadError`].
    pub(crate) fn ensure_image(
        &self,
        wanted: &str,
        always: bool,
        platform: &Platform,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Found, LoadError> {
        let is_meant = |found: &Found| {
            found.name.is_some() || wanted.strip_prefix("sha256:").unwrap_or(wanted).len() >= ID_DIGITS_MIN
        };
        // For this machine an image that stands alone is taken as it is: it may be a script for any.
        let other = Some(platform).filter(|platform| **platform != Platform::host());
        let (mut by_digest, mut is_here) = (false, false);
        match self.find_image(wanted) {
            Ok(found) if is_meant(&found) => {
                let serves = other
                    .is_none_or(|other| self.config_of(found.id).is_ok_and(|config| config.platform().serves(other)));
                // What an ID means is here or nowhere.
                if found.name.is_none() || (serves && !always) {
                    return Ok(found);
                }
                (by_digest, is_here) = (!serves, serves);
            }
            Ok(_) | Err(ImageError::NotFound { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        let request = PullRequest { name: wanted.to_owned(), platform: other.cloned(), lazy: false, by_digest };
        let pulled = self.pull(&request, progress, cancel);
        let pulled = if is_here { pulled? } else { pulled.map_err(LoadError::not_pulled(wanted, other))? };
        Ok(self.find_image(&pulled.name)?)
    }

    /// An image with all its layers: they are fetched if it was pulled lazily and nobody needed them so far.
    ///
    /// # Errors
    /// [`LoadError`].
    pub(crate) fn whole_image(
        &self,
        found: Found,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Found, LoadError> {
        if found.row.snapshot.is_some() || self.config_of(found.id)?.diff_ids().is_empty() {
            return Ok(found);
        }
        let fetched = self.with_lease(&format!("fetch {}", found.id), |lease| {
            let (manifest, repository) = self.remote_manifest(&found)?;
            let path = found.name.as_ref().map_or_else(|| found.id.to_string(), Reference::to_string);
            let remote = Remote { engine: self, session: self.registries(cancel), repository, path, resolved: None };
            let offered = candidate(&remote, manifest, vec![])?;
            let ready = self.take_far(&offered, &remote.path, lease, progress, cancel)?;
            self.store().write(|tx| put_image(tx, &offered, &ready))?;
            Ok(self.find_image(&found.id.to_string())?)
        });
        let fetched = fetched.map_err(|error: LoadError| if cancel.is_canceled() { Canceled.into() } else { error })?;
        Ok(Found { row: fetched.row, ..found })
    }

    /// The manifest of an image that was pulled, and a repository that had its layers.
    fn remote_manifest(&self, found: &Found) -> Result<(Manifest, Repository), LoadError> {
        let missing = || ImageError::NotFound { wanted: format!("the registry of image {}", found.id) };
        let digest = found.manifest.or_else(|| found.row.manifests.first().map(|row| row.digest));
        let raw = self.blob_bytes(digest.ok_or_else(missing)?)?;
        let path = || found.id.to_string();
        let manifest = Manifest::parse(&raw).map_err(|source| LoadError::Document { path: path(), source })?;
        let first = manifest.layers().first().ok_or_else(missing)?;
        let mut known = self.store().read(|rows| sources_of(rows, first.digest))?;
        // The one that the user named is the one that credentials are likeliest for.
        if let Some(named) = found.name.as_ref().map(Repository::of).filter(|named| known.contains(named)) {
            known = vec![named];
        }
        Ok((manifest, known.into_iter().next().ok_or_else(missing)?))
    }

    /// Who fetches the layers of an image that was pulled lazily.
    ///
    /// # Errors
    /// [`LoadError`], among them that it was never pulled.
    pub(crate) fn remote_layers(&self, wanted: &str, cancel: &Cancel) -> Result<RemoteLayers, LoadError> {
        let found = self.find_image(wanted)?;
        let (manifest, repository) = self.remote_manifest(&found)?;
        let config = self.config_of(found.id)?;
        let provider: Arc<dyn Provider> = Arc::new(RegistryProvider { session: self.registries(cancel), repository });
        let providers = manifest.layers().iter().map(|layer| (layer.digest, Arc::clone(&provider))).collect();
        let layers = config.diff_ids().iter().copied().zip(manifest.layers().iter().cloned()).collect();
        Ok(RemoteLayers { layers, providers })
    }

    /// Who fetches blobs, as far as anybody is known.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub(crate) fn providers_of(&self, blobs: &[BlobDigest], cancel: &Cancel) -> Result<Providers, CatalogueError> {
        let session = self.registries(cancel);
        let mut found = Vec::new();
        for blob in blobs {
            let known = self.store().read(|rows| sources_of(rows, *blob))?.into_iter().next();
            found.extend(known.map(|repository| {
                let provider: Arc<dyn Provider> = Arc::new(RegistryProvider { session: session.clone(), repository });
                (*blob, provider)
            }));
        }
        Ok(found.into_iter().collect())
    }

    /// Fetches the blob of a layer that is here without it, from where it was seen.
    ///
    /// # Errors
    /// [`TransferError`]; [`TransferError::Gone`] if nobody has it.
    pub(crate) fn fetch_blob(
        &self,
        descriptor: &Descriptor,
        diff_id: DiffId,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), TransferError> {
        let Some(plies_oci::MediaClass::Layer(compression)) = plies_oci::classify(&descriptor.media_type) else {
            return Err(TransferError::Gone { diff_id });
        };
        let session = self.registries(cancel);
        let _turn = self.fetches().take([descriptor.digest], cancel)?;
        let mut failure = TransferError::Gone { diff_id };
        for repository in self.store().read(|rows| sources_of(rows, descriptor.digest))? {
            let open = |offset| {
                let incoming = session.open(&repository, descriptor, offset)?;
                Ok(Box::new(incoming) as Box<dyn Read + Send>)
            };
            let offer = LayerSource {
                digest: Some(descriptor.digest),
                size_bytes: descriptor.size_bytes,
                compression,
                diff_id,
                chain_id: ChainId::extend(None, diff_id),
                origin: Origin::Far,
                open: Box::new(open),
            };
            match self.transfer(lease, progress, cancel).take_blob(&offer) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Canceled => return Err(error),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

/// What a registry did wrong, if that is why something failed. It comes through readers, and so inside of I/O errors.
fn kind_at_registry(error: &(dyn std::error::Error + 'static)) -> Option<ErrorKind> {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.find_map(|cause| {
        let inner = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let inside = inner.and_then(|inner| inner.downcast_ref::<RegistryError>());
        inside.or(cause.downcast_ref::<RegistryError>()).map(RegistryError::kind)
    })
}

/// Writes down that a repository has blobs. Those that were seen last are kept.
pub(crate) fn add_sources(
    tx: &mut Tx<'_>,
    repository: &Repository,
    blobs: impl Iterator<Item = BlobDigest>,
) -> Result<(), CatalogueError> {
    let now = tx.now().as_micros();
    for blob in blobs {
        tx.put(&SOURCES, &(blob, repository.to_string()), &now)?;
        let mut known = tx.prefixed(&SOURCES, &blob)?;
        known.sort_by_key(|(_, seen)| std::cmp::Reverse(*seen));
        for (key, _) in known.iter().skip(SOURCES_MAX) {
            tx.remove(&SOURCES, key)?;
        }
    }
    Ok(())
}

/// Checks the table of this module: memory, of which only what cannot be read is wrong.
pub(crate) fn check(rows: &ReadTx, findings: &mut Findings) -> Result<(), CatalogueError> {
    findings.rows(rows, &SOURCES, |_, changes| Remedy::Rewrite(changes)).map(drop)
}

/// The repositories that had a blob, the one that was seen last first.
pub(crate) fn sources_of(rows: &impl Rows, blob: BlobDigest) -> Result<Vec<Repository>, CatalogueError> {
    let mut known = rows.prefixed(&SOURCES, &blob)?;
    known.sort_by_key(|(_, seen)| std::cmp::Reverse(*seen));
    let repository = |((_, name), _): ((BlobDigest, String), u64)| {
        name.split_once('/').map(|(host, name)| Repository { host: host.to_owned(), name: name.to_owned() })
    };
    Ok(known.into_iter().filter_map(repository).collect())
}
