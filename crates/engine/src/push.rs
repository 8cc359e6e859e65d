//! `ply push`: images into a registry.

use std::io::{self, Read, Seek as _, SeekFrom};

use plies_oci::{BlobDigest, Descriptor, DiffId, ErrorKind, ImageConfig, Manifest, Reference};
use plies_registry::{PushedBlob, RegistryError, Repository, Upload};
use plies_store::{CatalogueError, Lease, TransferError, parallel};
use serde::Serialize;

use crate::exec::Cancel;
use crate::images::{ImagesError, plain_name};
use crate::progress::{Outcome, Progress, Task, Watched};
use crate::pull::{Session, add_sources, sources_of};
use crate::save::SaveError;
use crate::{Canceled, Engine};

/// Blobs that are sent at once: docker's `max-concurrent-uploads`.
const UPLOADS: usize = 5;

/// Why an image could not be pushed. Blobs that were sent stay at the registry, which removes them in its time if nothing
/// names them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// An image was given by ID, and no name to push it to.
    #[error("{wanted} is an image's ID: say under which name it is to be pushed")]
    NoName {
        /// What was given.
        wanted: String,
    },
    /// Finding the image or a name.
    #[error(transparent)]
    Image(#[from] ImagesError),
    /// Finding or making its manifest and blobs.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The registry.
    #[error("push to {repository}")]
    Registry {
        /// Where to.
        repository: Repository,
        /// Why.
        #[source]
        source: RegistryError,
    },
    /// A layer that is here without its blob, which the registry wants.
    #[error("fetch a layer that is here without its blob")]
    Layer(#[from] TransferError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl PushError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoName { .. } => ErrorKind::InvalidInput,
            Self::Image(source) => source.kind(),
            Self::Save(source) => source.kind(),
            Self::Registry { source, .. } => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// A name under which an image was pushed.
#[derive(Debug, Clone, Serialize)]
pub struct PushedImage {
    /// The name, as short as docker prints it.
    pub name: String,
    /// The manifest's digest.
    pub digest: BlobDigest,
    /// The manifest's length.
    pub size_bytes: u64,
}

impl Engine {
    /// Pushes an image under names, or under the one that it is given by.
    ///
    /// # Errors
    /// [`PushError`]; names that come after the one that failed were not pushed.
    pub fn push(
        &self,
        wanted: &str,
        names: &[String],
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<PushedImage>, PushError> {
        let names = names.iter().map(|name| plain_name(name)).collect::<Result<Vec<Reference>, _>>()?;
        let pushed =
            self.with_lease(&format!("push {wanted}"), |lease| self.push_held(wanted, names, lease, progress, cancel));
        pushed.map_err(|error: PushError| if cancel.is_canceled() { Canceled.into() } else { error })
    }

    fn push_held(
        &self,
        wanted: &str,
        mut names: Vec<Reference>,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<PushedImage>, PushError> {
        let found = self.find_image(wanted).map_err(ImagesError::from)?;
        if names.is_empty() {
            names.push(found.name.clone().ok_or_else(|| PushError::NoName { wanted: wanted.to_owned() })?);
        }
        let found = self.whole_image(found, progress, cancel).map_err(SaveError::from)?;
        let (manifest, config) = self.manifest_of(&found, wanted, lease, progress, cancel)?;
        self.push_image(&manifest, &config, names, lease, progress, cancel)
    }

    /// Pushes an image whose blobs are here, or are known to be somewhere.
    pub(crate) fn push_image(
        &self,
        manifest: &Manifest,
        config: &ImageConfig,
        names: Vec<Reference>,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<PushedImage>, PushError> {
        let session = self.registries(cancel);
        let descriptor = manifest.descriptor();
        let mut pushed = Vec::new();
        let mut filled: Vec<Repository> = Vec::new();
        for name in names {
            let repository = Repository::of(&name);
            if !filled.contains(&repository) {
                self.push_blobs(manifest, config, &repository, &session, lease, progress, cancel)?;
                filled.push(repository.clone());
            }
            let task = Task::start(progress, &format!("push {name}"), None);
            let raw = manifest.document().raw();
            let put = session.client.push_manifest(&repository, name.tag(), &descriptor, raw);
            put.map_err(|source| PushError::Registry { repository, source })?;
            task.end(Outcome::Done);
            let (digest, size_bytes) = (descriptor.digest, descriptor.size_bytes);
            pushed.push(PushedImage { name: name.familiar(), digest, size_bytes });
        }
        Ok(pushed)
    }

    /// Puts all that a manifest names into a repository.
    #[allow(clippy::too_many_arguments, reason = "the parts of one request, each of its own type")]
    fn push_blobs(
        &self,
        manifest: &Manifest,
        config: &ImageConfig,
        repository: &Repository,
        session: &Session,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), PushError> {
        let layers = manifest.layers().iter().zip(config.diff_ids().iter().copied().map(Some));
        let mut blobs: Vec<(&Descriptor, Option<DiffId>)> = Vec::new();
        for (descriptor, diff_id) in layers.chain([(manifest.config(), None)]) {
            // An image may list a layer more than once.
            if !blobs.iter().any(|(have, _)| have.digest == descriptor.digest) {
                blobs.push((descriptor, diff_id));
            }
        }
        parallel(
            &blobs,
            UPLOADS,
            |(descriptor, _)| descriptor.size_bytes,
            |(descriptor, diff_id)| self.push_blob(descriptor, *diff_id, repository, session, lease, progress, cancel),
        )?;
        let digests = manifest.layers().iter().map(|layer| layer.digest);
        self.store().write(|tx| add_sources(tx, repository, digests.clone()))?;
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one request, each of its own type")]
    fn push_blob(
        &self,
        descriptor: &Descriptor,
        diff_id: Option<DiffId>,
        repository: &Repository,
        session: &Session,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(), PushError> {
        let failed = |source| PushError::Registry { repository: repository.clone(), source };
        let digest = descriptor.digest;
        let what = if diff_id.is_some() { "layer" } else { "config" };
        let task = Task::start(progress, &format!("push {what} {digest}"), Some(descriptor.size_bytes));
        let known_in = self.store().read(|rows| sources_of(rows, digest))?;
        // A layer may be here without its blob. The registry may have it all the same.
        let is_here = lease.hold_if_present(digest)?;
        if let (false, Some(diff_id)) = (is_here, diff_id)
            && !session.client.has_blob(repository, digest).map_err(failed)?
        {
            self.fetch_blob(descriptor, diff_id, lease, progress, cancel)?;
        }
        let open = |offset| {
            let mut blob = self.store().content().open(digest).map_err(io::Error::other)?;
            blob.seek(SeekFrom::Start(offset))?;
            Ok(Box::new(Watched { inner: blob, task: Some(&task), cancel }) as Box<dyn Read + Send>)
        };
        let upload = Upload { digest, size_bytes: descriptor.size_bytes, known_in: &known_in, open: &open };
        let pushed = session.client.push_blob(repository, &upload).map_err(failed)?;
        task.end(if pushed == PushedBlob::Uploaded { Outcome::Done } else { Outcome::Cached });
        Ok(())
    }
}
