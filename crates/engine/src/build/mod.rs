//! `ply build`: parse -> graph of operations -> solve -> export.
//!
//! ```text
//! mod.rs     the request: reads the context and the Dockerfile, runs the four steps
//! graph.rs   a Dockerfile becomes a graph of operations and a config
//! solve.rs   operations become snapshots: from the cache, or by doing them
//! config.rs  the image config in the making
//! cache_from.rs  images that may have a step's result
//! ```

mod cache_from;
mod config;
mod graph;
mod solve;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plies_image::{Found, ImageError, LayerStoreError, NewImage, history_cache};
use plies_oci::{DiffId, ErrorKind, ImageConfig, ImageId, Platform, Reference};
use plies_store::{CatalogueError, CommitError, Expected, IngestError, LayerId, Lease, TransferError};
use serde::Serialize;

use crate::context::Tree;
use crate::dockerfile::{self, BuildArgs, Dockerfile, DockerfileError, Ignore, IgnoreError};
use crate::exec::{self, Cancel, ExecError, ExecutorChoice};
use crate::images::{ImagesError, plain_name};
use crate::progress::{Outcome, Progress, Task};
use crate::{Canceled, Engine};

pub(crate) use config::{Config, DEFAULT_PATH};
pub use solve::SolveError;
pub(crate) use solve::{make_directory, user};

/// Bytes of a Dockerfile. Generated ones reach some hundred KiB.
const DOCKERFILE_BYTES_MAX: u64 = 16 << 20;

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct BuildRequest {
    /// Directory whose files COPY and ADD take.
    pub context: PathBuf,
    /// The Dockerfile, if it is not `Dockerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// The stage to build, if it is not the last.
    pub target: Option<String>,
    /// Names of the result.
    pub names: Vec<String>,
    /// Values of ARGs.
    pub build_args: Vec<(String, String)>,
    /// Labels of the result.
    pub labels: Vec<(String, String)>,
    /// Run every step, whatever is cached.
    pub no_cache: bool,
    /// Ask the registries for images to build on, also for those that are here.
    pub pull: bool,
    /// Images that may have the results of steps that the build cache has not, in the order in which they are asked.
    pub cache_from: Vec<String>,
    /// Say for every step where its result came from.
    pub explain: bool,
    /// What runs commands.
    pub executor: ExecutorChoice,
    /// Directories in which OCI runtimes are looked for.
    pub search_path: Vec<PathBuf>,
}

/// What was built.
#[derive(Debug, Clone, Serialize)]
pub struct Built {
    /// The image's ID.
    pub id: ImageId,
    /// Its names, as short as docker prints them.
    pub names: Vec<String>,
    /// Steps that change files.
    pub steps_count: usize,
    /// How many of them were found in the cache.
    pub cached_count: usize,
}

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The Dockerfile, or something that one of its lines asks for.
    #[error(transparent)]
    Dockerfile(#[from] DockerfileError),
    /// A step, with the line that asks for it.
    #[error("{at}")]
    Step {
        /// File, line, and what could not be done.
        at: DockerfileError,
        /// Why.
        #[source]
        source: Box<SolveError>,
    },
    /// The ignore file.
    #[error(transparent)]
    Ignore(#[from] IgnoreError),
    /// The context or the Dockerfile can't be read.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is nothing to run steps with.
    #[error("find something to run steps with")]
    Executor(#[from] ExecError),
    /// An image or a name.
    #[error(transparent)]
    Image(#[from] ImagesError),
    /// A layer of the result.
    #[error("finish the image")]
    Layer(#[from] TransferError),
    /// The solver itself.
    #[error("solve")]
    Solve(#[from] SolveError),
    /// The layer store.
    #[error(transparent)]
    Layers(#[from] LayerStoreError),
    /// Keeping the config.
    #[error("keep the config")]
    Ingest(#[from] IngestError),
    /// Keeping the config.
    #[error("keep the config")]
    Commit(#[from] CommitError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl From<ImageError> for BuildError {
    fn from(source: ImageError) -> Self {
        Self::Image(source.into())
    }
}

impl BuildError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Dockerfile(_) => ErrorKind::InvalidInput,
            Self::Step { source, .. } => source.kind(),
            Self::Ignore(source) => source.kind(),
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Read { .. } => ErrorKind::Unavailable,
            Self::Executor(source) => source.kind(),
            Self::Image(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Solve(source) => source.kind(),
            Self::Layers(source) => source.kind(),
            Self::Ingest(source) => source.kind(),
            Self::Commit(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

impl Engine {
    /// Builds a Dockerfile.
    ///
    /// # Errors
    /// [`BuildError`]. Steps that succeeded stay in the cache, so that a repaired Dockerfile goes on from there.
    pub fn build(&self, request: &BuildRequest, progress: &dyn Progress, cancel: &Cancel) -> Result<Built, BuildError> {
        let names = request.names.iter().map(|name| plain_name(name)).collect::<Result<Vec<Reference>, _>>()?;
        let (file, bytes, in_context) = read_dockerfile(request)?;
        let dockerfile = dockerfile::parse(&file, &bytes)?;
        self.with_lease(&format!("build {}", request.context.display()), |lease| {
            self.build_held(request, &dockerfile, in_context.as_deref(), &names, lease, progress, cancel)
        })
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one request, each of its own type")]
    fn build_held(
        &self,
        request: &BuildRequest,
        dockerfile: &Dockerfile,
        in_context: Option<&str>,
        names: &[Reference],
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Built, BuildError> {
        let platform = Platform::host();
        let given: BTreeMap<String, String> = request.build_args.iter().cloned().collect();
        let args = BuildArgs::new(dockerfile, given, &platform, &platform, request.target.as_deref())?;
        let mut find_image = |name: &str| {
            let found = self.ensure_image(name, request.pull, &platform, progress, cancel);
            let found = found.map_err(|error| match self.find_image(name) {
                Err(ImageError::NotFound { .. }) => {
                    format!("image {name:?} is not here and could not be pulled: {}", with_causes(&error))
                }
                _ => with_causes(&error),
            })?;
            self.base_image(name, &found, lease)
        };
        let plan =
            graph::lower(dockerfile, &args, request.target.as_deref(), &request.labels, &platform, &mut find_image)?;
        for warning in &plan.warnings {
            let task = Task::start(progress, &format!("warning: {warning}"), None);
            task.end(Outcome::Done);
        }

        let context = open_context(&request.context)?;
        let ignore = Ignore::of_context(&Tree::context(context, None), in_context)?;
        let context = Tree::context(open_context(&request.context)?, Some(ignore)).cancelable(cancel);
        let executor = exec::pick(&request.executor, self.store().run_dir(), &request.search_path)?;
        let cache_from = cache_from::CacheFrom::open(self, &request.cache_from, &platform, progress);
        let solver = solve::Solver {
            engine: self,
            cache_from: &cache_from,
            explain: request.explain,
            cache: self.cache(),
            context: &context,
            executor: &*executor,
            progress,
            cancel,
            no_cache: request.no_cache,
        };
        let solved = solver.solve(&plan.graph, plan.target).map_err(|failed| match failed.error {
            SolveError::Canceled(canceled) => canceled.into(),
            error => BuildError::Step {
                at: dockerfile.error(failed.location, &failed.focus, error.headline()),
                source: Box::new(error),
            },
        })?;

        let task = Task::start(progress, "export the image", None);
        let target = solved.of(plan.target);
        let mut diff_ids: Vec<DiffId> = target.base_diff_ids.clone();
        for layer in &target.layers {
            diff_ids.push(self.transfer(lease, progress, cancel).diff_id_of(*layer)?);
        }
        let snapshot =
            target.tree.as_ref().map(|tree| tree.extract(cancel)).transpose().map_err(SolveError::from)?.flatten();
        let made = |vertex| solved.of(vertex).made.map(crate::rfc3339);
        let key = |vertex| format!("{}{}", history_cache::KEY_COMMENT, solved.of(vertex).key);
        let (history, created) = graph::history(&plan.history, plan.base_created.as_deref(), made, key);
        let config = plan.config.finish(created.as_deref(), &diff_ids, &history);
        let config = ImageConfig::parse(&config).map_err(ImageError::from)?;
        let id = config.id();
        let base = self.store().read(|rows| plies_image::layers_of_chain(rows, &target.base_diff_ids))?;
        let ids: Option<Vec<LayerId>> = base.map(|base| base.iter().chain(&target.layers).copied().collect());
        let layers = ids.map(|ids| plies_image::chain_layers(self.store(), &diff_ids, &ids)).transpose();
        let layers = layers.map_err(LayerStoreError::from)?;
        let size_bytes = self.layer_sizes(&diff_ids)?.into_iter().sum();

        let mut ingest = self.store().content().ingest_unnamed()?;
        std::io::Write::write_all(&mut ingest, config.document().raw())
            .map_err(|source| BuildError::Read { path: "the new config".into(), source })?;
        ingest.commit(Expected::anything(), lease)?;
        if cancel.is_canceled() {
            return Err(Canceled.into());
        }
        self.store().write(|tx| {
            let (config, layers) = (&config, layers.as_deref());
            plies_image::put(
                tx,
                &NewImage { config, manifests: vec![], snapshot, layers, size_bytes, built_here: true },
            )?;
            for name in names {
                plies_image::set_name(tx, name, id, None)?;
            }
            Ok::<_, ImageError>(())
        })?;
        task.end(Outcome::Done);
        Ok(Built {
            id,
            names: names.iter().map(Reference::familiar).collect(),
            steps_count: solved.steps_count,
            cached_count: solved.cached_count,
        })
    }

    /// An image to build on, held by `lease`.
    fn base_image(&self, name: &str, found: &Found, lease: &Lease) -> Result<graph::BaseImage, String> {
        let held = match found.row.snapshot {
            Some(snapshot) => lease.hold_if_present(snapshot).map_err(|error| with_causes(&error))?,
            None => true,
        };
        if !held {
            return Err(format!("image {name:?} was removed meanwhile"));
        }
        let config = self.config_of(found.id).map_err(|error| with_causes(&error))?;
        let name = found.name.as_ref().map_or_else(|| name.to_owned(), Reference::familiar);
        Ok(graph::BaseImage { config, name })
    }
}

/// An error and its causes in one sentence.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

fn open_context(path: &Path) -> Result<std::os::fd::OwnedFd, BuildError> {
    Tree::open_dir(path).map_err(|source| BuildError::Read { path: path.to_owned(), source })
}

/// The Dockerfile's name for messages, its bytes, and its path inside the context if it lies there (an ignore file may
/// stand beside it).
fn read_dockerfile(request: &BuildRequest) -> Result<(String, Vec<u8>, Option<String>), BuildError> {
    let path = request.dockerfile.clone().unwrap_or_else(|| request.context.join("Dockerfile"));
    let read = || -> std::io::Result<Vec<u8>> {
        let metadata = std::fs::metadata(&path)?;
        // A pipe would block and a device might never end.
        if !metadata.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() > DOCKERFILE_BYTES_MAX {
            let message = format!("has {} bytes, at most {DOCKERFILE_BYTES_MAX} are read", metadata.len());
            return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, message));
        }
        std::fs::read(&path)
    };
    let bytes = read().map_err(|source| BuildError::Read { path: path.clone(), source })?;
    let inside = match (path.canonicalize(), request.context.canonicalize()) {
        (Ok(file), Ok(context)) => file.strip_prefix(context).ok().map(|inside| inside.display().to_string()),
        _ => None,
    };
    let name = match &request.dockerfile {
        None => "Dockerfile".to_owned(),
        Some(path) => path.display().to_string(),
    };
    Ok((name, bytes, inside))
}
