//! `ply build`: parse -> graph of operations -> solve -> export.
//!
//! ```text
//! mod.rs     the request: reads the context and the Dockerfile, runs the four steps
//! explain.rs what changed since a step was done before
//! export.rs  what becomes of the result
//! graph.rs   a Dockerfile becomes a graph of operations and a config
//! solve.rs   operations become snapshots: from the cache, or by doing them
//! mounts.rs  what RUN --mount shows
//! keys.rs    agents for key files
//! remote.rs  what ADD takes from elsewhere
//! values.rs  what single values of instructions mean
//! config.rs  the image config in the making
//! cache_from.rs  images that may have a step's result
//! ```

mod buildkit;
mod cache_from;
mod config;
mod explain;
mod export;
mod graph;
mod keys;
mod mounts;
mod remote;
mod solve;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plies_image::{Found, ImageError, LayerStoreError};
use plies_oci::{BlobDigest, ErrorKind, ImageConfig, ImageId, Platform, Reference};
use plies_store::{CatalogueError, CommitError, GcMode, IngestError, Lease, TransferError};
use serde::Serialize;

use crate::context::Tree;
use crate::dockerfile::{
    self, BuildArgs, CheckOptions, Dockerfile, DockerfileError, Ignore, IgnoreError, Location, Warning,
};
use crate::exec::{self, Cancel, ExecError, ExecutorChoice, ResourceLimit};
use crate::images::{ImagesError, plain_name};
use crate::progress::{Outcome, Progress, Task};
use crate::{Canceled, Engine, PushError, PushedImage, SaveError};

pub(crate) use config::{Config, DEFAULT_PATH};
pub use export::{BuildOutput, ExportError, ImageOptions, TreeOutput};
use graph::Lower;
pub use keys::KeyError;
pub(crate) use mounts::CacheMounts;
pub use mounts::{MountError, SECRET_BYTES_MAX, Secret, SecretSource, SshAgent, SshSource};
pub use remote::RemoteError;
pub use solve::SolveError;
pub(crate) use solve::{make_directory, user};

/// Bytes of a Dockerfile. Generated ones reach some hundred KiB.
const DOCKERFILE_BYTES_MAX: u64 = 16 << 20;

/// The build argument that takes the place of a file's `# check=` line, as in BuildKit.
const CHECK_ARG: &str = "BUILDKIT_DOCKERFILE_CHECK";

/// The build argument that says when the result was made (reproducible-builds.org, "SOURCE_DATE_EPOCH").
const EPOCH_ARG: &str = "SOURCE_DATE_EPOCH";

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct BuildRequest {
    /// Directory whose files COPY and ADD take.
    pub context: PathBuf,
    /// The Dockerfile, if it is not `Dockerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// The stage to build, if it is not the last.
    pub target: Option<String>,
    /// Where the result goes; nowhere: its steps only are cached.
    pub outputs: Vec<BuildOutput>,
    /// Names of the result.
    pub names: Vec<String>,
    /// Values of ARGs.
    pub build_args: Vec<(String, String)>,
    /// Labels of the result.
    pub labels: Vec<(String, String)>,
    /// Run every step, whatever is cached.
    pub no_cache: bool,
    /// What the result is to run on; this machine, by default.
    pub platform: Option<Platform>,
    /// Ask the registries for images to build on, also for those that are here.
    pub pull: bool,
    /// Stages whose steps are run whatever is cached, by name or number.
    pub no_cache_stages: Vec<String>,
    /// Images that may have the results of steps that the build cache has not, in the order in which they are asked.
    pub cache_from: Vec<String>,
    /// Say for every step where its result came from.
    pub explain: bool,
    /// What runs commands.
    pub executor: ExecutorChoice,
    /// Directories in which OCI runtimes are looked for.
    pub search_path: Vec<PathBuf>,
    /// How commands are run.
    pub run: RunOptions,
    /// Secrets that commands may ask for.
    pub secrets: Vec<Secret>,
    /// SSH agents that commands may ask for.
    pub ssh: Vec<SshAgent>,
    /// What commands may ask for that takes them out of their sandbox.
    pub allow: Vec<Entitlement>,
}

/// What a Dockerfile gets only if whoever builds it says so, by BuildKit's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entitlement {
    /// `RUN --network=host`
    NetworkHost,
    /// `RUN --security=insecure`
    SecurityInsecure,
}

impl Entitlement {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::NetworkHost, Self::SecurityInsecure];

    /// As `--allow` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NetworkHost => "network.host",
            Self::SecurityInsecure => "security.insecure",
        }
    }
}

/// How a build's commands are run: part of their keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Commands that don't say otherwise have no network.
    pub no_network: bool,
    /// More lines of `/etc/hosts`: name and address.
    pub add_hosts: Vec<(String, String)>,
    /// Limits of their processes.
    pub limits: Vec<ResourceLimit>,
    /// How much `/dev/shm` holds; 64 MiB if nothing is said.
    pub shm_size_bytes: Option<u64>,
}

/// What was built.
#[derive(Debug, Clone, Serialize)]
pub struct Built {
    /// The ID of the image that went into the store, if one did.
    pub id: Option<ImageId>,
    /// Its manifest, if one was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<BlobDigest>,
    /// Its names, as short as docker prints them.
    pub names: Vec<String>,
    /// The names that it was pushed under.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pushed: Vec<PushedImage>,
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
    /// The file wants to be told by an error what it is else warned of.
    #[error("{}", first_of(.0))]
    Check(Vec<Warning>),
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
    /// Times are to be rewritten, and nobody says to which.
    #[error("rewrite-timestamp needs a time: set {EPOCH_ARG} in the environment or as a build argument")]
    NoEpoch,
    /// Its files could not be written where they were asked for.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// It could not be written into an archive, or packed.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// It could not be pushed.
    #[error(transparent)]
    Push(#[from] Box<PushError>),
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

fn first_of(warnings: &[Warning]) -> String {
    let first = warnings.first().map(ToString::to_string).unwrap_or_default();
    match warnings.len() {
        0 | 1 => first,
        count => format!("{first}\n(and {} more: see ply build --check)", count - 1),
    }
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
            Self::Dockerfile(_) | Self::Check(_) | Self::NoEpoch => ErrorKind::InvalidInput,
            Self::Export(source) => source.kind(),
            Self::Save(source) => source.kind(),
            Self::Push(source) => source.kind(),
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
        let (file, bytes) = read_dockerfile(request)?;
        let dockerfile = dockerfile::parse(&file, &bytes)?;
        let built = self.with_lease(&format!("build {}", request.context.display()), |lease| {
            self.build_held(request, &dockerfile, &names, lease, progress, cancel)
        });
        let to_archive = request.outputs.iter().any(|output| matches!(output, BuildOutput::Archive { .. }));
        if built.is_ok() && to_archive {
            // Of what only an archive has nobody holds the documents here. What could not be removed now goes with the
            // next collection.
            drop(self.store().gc(GcMode::Run));
        }
        self.keep_policy_after(built, cancel)
    }

    /// What `docker build --check` says about a Dockerfile: nothing is built, and a base image that is not here is taken
    /// for one that says nothing.
    ///
    /// # Errors
    /// [`BuildError::Dockerfile`] for what would stop a build before its first step, [`BuildError::Read`],
    /// [`BuildError::Ignore`].
    pub fn check(&self, request: &BuildRequest) -> Result<Vec<Warning>, BuildError> {
        let (file, bytes) = read_dockerfile(request)?;
        let dockerfile = dockerfile::parse(&file, &bytes)?;
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        let args = build_args(request, &dockerfile, &platform)?;
        let ignore = ignore_of(request)?;
        let plan = self.with_lease("check a Dockerfile", |lease| {
            let here = |name: &str| {
                let found = self.find_image(name).ok().filter(|found| found.name.is_some())?;
                self.base_image(name, &found, lease).ok()
            };
            let mut find_image = |name: &str, platform: &Platform| match here(name) {
                Some(image) => Ok(image),
                None => {
                    let config = Config::scratch(platform).finish(None, &[], &[]);
                    let config = ImageConfig::parse(&config).map_err(|error| with_causes(&error))?;
                    Ok(graph::BaseImage { config, name: name.to_owned() })
                }
            };
            let what = Lower {
                dockerfile: &dockerfile,
                args: &args,
                target: request.target.as_deref(),
                labels: &request.labels,
                platform: &platform,
                ignore: &ignore,
                no_cache_stages: &[],
                all_stages: request.target.is_none(),
                allow: &Entitlement::ALL,
                has_imports: false,
            };
            graph::lower(&what, &mut find_image).map_err(BuildError::from)
        })?;
        Ok(dockerfile.wanted(plan.warnings, Some(&check_options(&dockerfile, &args)?)))
    }

    fn build_held(
        &self,
        request: &BuildRequest,
        dockerfile: &Dockerfile,
        names: &[Reference],
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Built, BuildError> {
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        let args = build_args(request, dockerfile, &platform)?;
        let mut find_image = |name: &str, platform: &Platform| {
            let found = self.ensure_image(name, request.pull, platform, progress, cancel);
            let found = found.map_err(|error| with_causes(&error))?;
            self.base_image(name, &found, lease)
        };
        let ignore = ignore_of(request)?;
        let has_imports = self.cache().has_links()?;
        let mut plan = graph::lower(
            &Lower {
                dockerfile,
                args: &args,
                target: request.target.as_deref(),
                labels: &request.labels,
                platform: &platform,
                ignore: &ignore,
                no_cache_stages: &request.no_cache_stages,
                all_stages: false,
                allow: &request.allow,
                has_imports,
            },
            &mut find_image,
        )?;
        let epoch = epoch(dockerfile, &args)?;
        if epoch.is_none() && request.outputs.iter().any(BuildOutput::rewrites_timestamps) {
            return Err(BuildError::NoEpoch);
        }
        let options = check_options(dockerfile, &args)?;
        let warnings = dockerfile.wanted(std::mem::take(&mut plan.warnings), Some(&options));
        let told = warnings
            .iter()
            .map(|found| format!("{}: {} ({}:{})", found.rule(), found.message(), found.file(), found.line()));
        for warning in plan.notes.iter().cloned().chain(told) {
            let task = Task::start(progress, &format!("warning: {warning}"), None);
            task.end(Outcome::Done);
        }
        if options.error && !warnings.is_empty() {
            return Err(BuildError::Check(warnings));
        }

        // A step that fails stops the others, and nothing else of the caller's.
        let stop = Cancel::new();
        let _passed_on = cancel.on_cancel({
            let stop = stop.clone();
            move || stop.cancel()
        });
        let context = Tree::context(open_context(&request.context)?, Some(ignore)).cancelable(&stop);
        let executor = exec::pick(&request.executor, self.store().run_dir(), &request.search_path)?;
        let cache_from = cache_from::CacheFrom::open(self, &request.cache_from, &platform, progress);
        let session = self.registries(cancel);
        let hosts = solve::HostsFile::write(self.store().run_dir(), &request.run.add_hosts)?;
        let solver = solve::Solver {
            engine: self,
            graph: &plan.graph,
            cache_from: &cache_from,
            explain: request.explain,
            has_imports,
            cache: self.cache(),
            context: &context,
            executor: &*executor,
            progress,
            cancel: &stop,
            made: Default::default(),
            no_cache: request.no_cache,
            client: &session.client,
            run_options: &request.run,
            hosts: hosts.path(),
            secrets: &request.secrets,
            ssh: &request.ssh,
        };
        let solved = solver.solve(&plan.graph).map_err(|failed| match failed.error {
            SolveError::Canceled(canceled) => canceled.into(),
            error => BuildError::Step {
                at: dockerfile.error(failed.location, &failed.focus, error.headline()),
                source: Box::new(error),
            },
        })?;

        let transfer = self.transfer(lease, progress, cancel);
        let export = export::Export { engine: self, plan: &plan, solved: &solved, names, epoch, transfer, progress };
        let exported = export.write(&request.outputs);
        let exported = exported.map_err(|error| if cancel.is_canceled() { Canceled.into() } else { error })?;
        Ok(Built {
            id: exported.id,
            manifest: exported.manifest,
            names: exported.names.iter().map(Reference::familiar).collect(),
            pushed: exported.pushed,
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

fn build_args(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    platform: &Platform,
) -> Result<BuildArgs, DockerfileError> {
    let given: BTreeMap<String, String> = request.build_args.iter().cloned().collect();
    BuildArgs::new(dockerfile, given, &Platform::host(), platform, request.target.as_deref())
}

/// Which warnings are wanted: the build argument's word goes before the file's.
fn check_options(dockerfile: &Dockerfile, args: &BuildArgs) -> Result<CheckOptions, DockerfileError> {
    match args.given(CHECK_ARG) {
        Some(text) => CheckOptions::parse(text)
            .map_err(|why| dockerfile.error(Location::default(), "", format!("build argument {CHECK_ARG}: {why}"))),
        None => Ok(dockerfile.check.clone()),
    }
}

/// What of the context is not there. An ignore file may stand beside the Dockerfile, wherever that is.
fn ignore_of(request: &BuildRequest) -> Result<Ignore, BuildError> {
    let context = Tree::context(open_context(&request.context)?, None);
    let path = dockerfile_path(request);
    let Some(name) = path.file_name() else { return Ok(Ignore::of_context(&context, None)?) };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = Tree::context(open_context(dir)?, None);
    Ok(Ignore::of_context(&context, Some((&dir, &name.to_string_lossy())))?)
}

fn dockerfile_path(request: &BuildRequest) -> PathBuf {
    request.dockerfile.clone().unwrap_or_else(|| request.context.join("Dockerfile"))
}

/// The time that the result is to tell, if the build argument gives one.
fn epoch(dockerfile: &Dockerfile, args: &BuildArgs) -> Result<Option<jiff::Timestamp>, DockerfileError> {
    let Some(text) = args.given(EPOCH_ARG).filter(|text| !text.is_empty()) else { return Ok(None) };
    let time = text.parse().ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    let told = || format!("build argument {EPOCH_ARG}: {text:?} is no number of seconds since 1970");
    Ok(Some(time.ok_or_else(|| dockerfile.error(Location::default(), "", told()))?))
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

/// The Dockerfile's name for messages, and its bytes.
fn read_dockerfile(request: &BuildRequest) -> Result<(String, Vec<u8>), BuildError> {
    let path = dockerfile_path(request);
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
    let name = match &request.dockerfile {
        None => "Dockerfile".to_owned(),
        Some(path) => path.display().to_string(),
    };
    Ok((name, bytes))
}
