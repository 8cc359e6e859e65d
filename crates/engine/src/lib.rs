//! Requests composed of the other parts: each file is one request, and this is the only crate that knows both the
//! build cache and the image store.
//!
//! ```text
//! lib.rs        Engine: a store with what requests need; opening and closing
//! archive.rs    an image archive that a user hands in, readable at any place
//! load.rs       archive -> images          save.rs     images -> archive
//! pull.rs       registry -> images         push.rs     images -> registry
//! images.rs     list, inspect, history, tag, remove     layers.rs  `ply layer`
//! build/        Dockerfile -> graph -> solve -> image
//! run.rs        run, mount, umount         records.rs  `ply ref`
//! import.rs     another program's state -> records and layers
//! space.rs      du, tree, gc, info       why.rs      what keeps something
//! prune.rs      what goes from the build cache     policy.rs  the same at all times, by rules
//! fsck.rs       check and repair
//! dockerfile/ context/ exec/   the parts of a build that need no store
//! ```
//!
//! # Locks
//! Of a build's own: the queue of what is to be solved; a step's turn ([`Turns`]), held while the step is done;
//! then the caches in use (`build::CacheMounts`), held while one is taken. Whoever waits for a turn holds nothing, and
//! whoever waits for a cache holds one turn and caches whose ids are lower. Fetching an image takes the turns of all its
//! blobs at once, and waits for nothing else then. Of mounts: one at a time, and nothing is fetched or built meanwhile. The
//! store's own locks come after these.

mod archive;
pub mod build;
pub mod context;
pub mod dockerfile;
pub mod exec;
mod fsck;
mod images;
mod import;
mod layers;
mod load;
mod policy;
mod prune;
mod pull;
mod push;
mod records;
mod repack;
mod run;
mod save;
mod space;
mod why;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use plies_cache::{CacheError, CacheKey, Manager, ManagerOptions, SharedChecker};
pub use plies_cache::{PruneOptions, parse_bytes, parse_duration};
use plies_oci::{BlobDigest, ErrorKind};
use plies_registry::ClientOptions;
use plies_store::{
    Cancel, CatalogueError, Holder, Lease, LeaseOptions, OpenError, OpenOptions, Stamp, Store, Transfer, Turns,
    WaitPolicy, Warn,
};

pub use archive::{ArchiveError, Input};
pub use fsck::{FsckDepth, FsckError, FsckFinding, FsckReport, FsckRequest, Rebuild, RebuiltSummary};
pub use images::{HistoryLine, ImageDetails, ImageSummary, ImagesError, familiar};
pub use import::ImportSource;
pub use layers::{ChangeSummary, LayerDetails, LayerSummary, LayersError, RemovedLayerSummary, RwSummary};
pub use load::{LoadError, LoadedImage, MovedName};
pub use plies_archive::Limits as ArchiveLimits;
pub use plies_image::Removed as RemovedImage;
pub use plies_import::containerd::ContainerdOptions;
pub use plies_import::{Containers, ImportError, ImportOptions, ImportReport, ImportedItem, Outcome as ImportOutcome};
pub use plies_oci::DocumentLimits;
pub use plies_registry as registry;
pub use plies_store::{
    Canceled, DriverKind, GcMode, IdMapError, IdMaps, IdRange, Migrate, Migrated, MigrationPlan, Packing,
    TransferError, progress,
};
pub use policy::disk_bytes;
pub use prune::{PruneError, PruneRow, PruneSummary};
pub use pull::{PullPolicy, PullRequest, PulledImage};
pub use push::{PushError, PushedImage};
pub use records::{RecordSummary, RecordsError};
pub use repack::{RepackError, Repacked};
pub use run::{RunError, RunRequest};
pub use save::{ManifestOptions, Output, SaveError, SaveFormat};
pub use space::{
    GcSummary, Info, PolicyRow, RecordSpace, RecordTotals, SpaceError, SpaceReport, SpaceRow, SpaceTotals, TreeNode,
};
pub use why::WhyNode;

/// How to open an engine.
pub struct EngineOptions {
    /// How layers are kept and mounted.
    pub driver: DriverKind,
    /// Give up the reserve if the file system is full: for requests that remove something.
    pub use_reserve: bool,
    /// Whether to wait for another process that owns the store.
    pub wait: bool,
    /// Told once for whom we wait.
    pub on_wait: Box<dyn FnMut(&Holder)>,
    /// What this process calls itself to those who wait for it.
    pub command: String,
    /// What to do about a store that an older version made.
    pub migrate: Migrate,
    /// Told how far that is.
    pub progress: Arc<dyn progress::Progress + Send>,
    /// What is known of registries.
    pub registry: ClientOptions,
    /// The rules that the build cache is kept by, one after the other; none: it grows until somebody prunes it.
    pub policy: Vec<PruneOptions>,
    /// What archives may cost. What documents may is said by `registry`, for all that come in.
    pub limits: ArchiveLimits,
    /// Told of errors that no caller is there to get.
    pub warn: Warn,
}

/// Nobody is told of anything, nothing is waited for, and the build cache grows.
impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            driver: DriverKind::default(),
            use_reserve: false,
            wait: false,
            on_wait: Box::new(|_| {}),
            command: String::new(),
            migrate: Migrate::default(),
            progress: Arc::new(progress::Silent),
            registry: ClientOptions::default(),
            policy: Vec::new(),
            limits: ArchiveLimits::default(),
            warn: Arc::new(|_| {}),
        }
    }
}

impl std::fmt::Debug for EngineOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineOptions").field("driver", &self.driver).field("wait", &self.wait).finish_non_exhaustive()
    }
}

/// Why an engine could not be opened or closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The build cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Writing down what was left to write.
    #[error(transparent)]
    Close(#[from] CatalogueError),
}

impl EngineError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Open(source) => source.kind(),
            Self::Cache(source) => source.kind(),
            Self::Close(source) => source.kind(),
        }
    }
}

/// An open store, ready for requests.
pub struct Engine {
    store: Store,
    cache: Manager,
    limits: ArchiveLimits,
    registry: ClientOptions,
    policy: policy::Policy,
    warn: Warn,
    /// Mounts that outlive a request are made and taken away one after the other; see [`Engine::mount`].
    mounts: Mutex<()>,
    /// Caches that steps use, of all builds that run in this process.
    cache_mounts: build::CacheMounts,
    /// Steps that are worked on, of all builds that run in this process.
    steps: Turns<CacheKey>,
    /// Blobs that are fetched for images, by all requests of this process.
    fetches: Turns<BlobDigest>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Engine {
    fn store_options(options: &EngineOptions) -> OpenOptions {
        OpenOptions {
            command: options.command.clone(),
            driver: options.driver,
            use_reserve: options.use_reserve,
            migrate: options.migrate,
            migrate_above: vec![plies_cache::migrate],
            progress: Arc::clone(&options.progress),
            // Steps that outlived their `ply` use mounts and files that are about to go.
            before_recovery: Arc::new(exec::end_leftovers),
            warn: Arc::clone(&options.warn),
            ..OpenOptions::new(Arc::new(SystemTime::now))
        }
    }

    fn wait_policy(options: &mut EngineOptions) -> WaitPolicy<'_> {
        if options.wait { WaitPolicy::Wait(&mut *options.on_wait) } else { WaitPolicy::Fail }
    }

    /// Opens the store at `root`, making it if there is none.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn open(root: &Path, mut options: EngineOptions) -> Result<Self, EngineError> {
        let store_options = Self::store_options(&options);
        let store = Store::open(root, store_options, Self::wait_policy(&mut options))?;
        let limits = options.limits;
        let checker: Option<Arc<dyn SharedChecker>> = Some(Arc::new(prune::ImageChecker::new(store.clone())));
        let warn = options.warn;
        let cache_options = ManagerOptions { limits: limits.clone(), checker, warn: Arc::clone(&warn) };
        let cache = Manager::open(store.clone(), cache_options)?;
        let (mounts, cache_mounts, steps, fetches) = Default::default();
        let (registry, policy) = (options.registry, policy::Policy::new(options.policy));
        Ok(Self { store, cache, limits, registry, policy, warn, mounts, cache_mounts, steps, fetches })
    }

    /// What opening the store at `root` would migrate; changes nothing.
    ///
    /// # Errors
    /// [`EngineError::Open`].
    pub fn migration_plan(root: &Path, mut options: EngineOptions) -> Result<MigrationPlan, EngineError> {
        let store_options = Self::store_options(&options);
        Ok(plies_store::migration_plan(root, &store_options, Self::wait_policy(&mut options))?)
    }

    /// What was migrated when the store was opened, if anything was.
    pub fn migrated(&self) -> Option<&Migrated> {
        self.store.migrated()
    }

    /// Gives the store up, telling what went wrong.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn close(self) -> Result<(), EngineError> {
        let Self { store, cache, .. } = self;
        cache.close()?;
        Ok(store.close()?)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    pub(crate) fn steps(&self) -> &Turns<CacheKey> {
        &self.steps
    }

    pub(crate) fn fetches(&self) -> &Turns<BlobDigest> {
        &self.fetches
    }

    pub(crate) fn cache_mounts(&self) -> &build::CacheMounts {
        &self.cache_mounts
    }

    pub(crate) fn limits(&self) -> &ArchiveLimits {
        &self.limits
    }

    pub(crate) fn document_limits(&self) -> &DocumentLimits {
        &self.registry.limits
    }

    pub(crate) fn transfer<'a>(
        &'a self,
        lease: &'a Lease,
        progress: &'a dyn progress::Progress,
        cancel: &'a Cancel,
    ) -> Transfer<'a> {
        Transfer { lease, limits: &self.limits, progress, cancel }
    }

    /// Does `work` with a lease that holds what it makes until something else does. If it fails, what it made is
    /// removed again: the store is then as it was.
    pub(crate) fn with_lease<T, E: From<CatalogueError>>(
        &self,
        label: &str,
        work: impl FnOnce(&Lease) -> Result<T, E>,
    ) -> Result<T, E> {
        let lease = self.store.lease(LeaseOptions::process(label))?;
        let done = work(&lease);
        match done {
            Ok(_) => lease.release()?,
            // The error to tell is the first one; what could not be removed now goes with the next collection.
            Err(_) => {
                drop(lease.release().map(|()| self.store.gc(GcMode::Run)));
                self.policy.forget();
            }
        }
        done
    }
}

/// A stored time as documents and people read it.
pub(crate) fn rfc3339(stamp: Stamp) -> String {
    let micros = i64::try_from(stamp.as_micros()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_microsecond(micros).unwrap_or(jiff::Timestamp::MAX).to_string()
}
