//! Operations become snapshots: from the cache, or by doing them.
//!
//! A vertex's key is the digest of what it does, of the keys of what it stands on, and of the *content* of the files it
//! takes in: mode, owner, extended attributes and bytes, not times. So a changed input changes the keys of all that
//! stands on it, and an unchanged one finds its record whatever happened to file times.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use plies_archive::tar::EntryPath;
use plies_archive::{ApplyStyle, NewOwner, UnpackError, compress, unpack};
use plies_cache::contenthash::inroot;
use plies_cache::{
    Accessor, CacheError, CacheKey, Changes, ImmutableRef, KeyBuilder, MutableRef, Parents, RecordOptions, RecordRow,
    State, Value,
};
use plies_oci::{BlobDigest, Compression, DiffId, ErrorKind};
use plies_registry::{self as registry, Client};
use plies_store::{Attach, CatalogueError, LayerError, LayerId, Mounted, SnapshotError, Stamp, canceled_inside};

use super::buildkit::Asked;
use super::cache_from::CacheFrom;
use super::config::DEFAULT_PATH;
use super::explain::Inputs;
use super::graph::{CopyOp, FilesFrom, Graph, Op, RunOp, Vertex, VertexId};
use super::mounts::{MountError, Prepared, Secret, SshAgent};
use super::remote::{DOWNLOAD_BYTES_MAX, Download, GitSource, RemoteError};
use super::{RunOptions, with_causes};
use crate::context::{
    self, Chmod, ContentHash, CopyError, CopyOptions, Destination, HashError, ListedFile, Owner, SelectError,
    Selection, Tree,
};
use crate::dockerfile::{Ignore, IgnoreError, Location, RunNetwork, RunSecurity, SCRIPT_DIR};
use crate::exec::{
    self, Access, Cancel, ExecError, Executor, MountSource, Network, Step, StepMount, Streams, User, UserError,
    resolve_user,
};
use crate::policy::Moment;
use crate::progress::{self, Outcome, Progress, Stream, Task, Watched};
use crate::prune::PruneError;
use crate::records::RecordsError;
use crate::run::RunError;
use crate::{Canceled, Engine};

/// Goes up when a step comes to mean something else, so that results of an older Plies are not taken for it.
const KEY_VERSION: u32 = 4;

/// What is kept with the record of a download, under BuildKit's names.
const HTTP_CHECKSUM: &str = "http.checksum";
/// See [`HTTP_CHECKSUM`].
const HTTP_ETAG: &str = "http.etag";
/// See [`HTTP_CHECKSUM`].
const HTTP_MODIFIED: &str = "http.modtime";

/// How much of a download is read at a time, in bytes.
const DOWNLOAD_CHUNK_BYTES: usize = 128 << 10;

/// Memory that unpacking xz may take, in KiB: 256 MiB, over the 65 that `xz -9` asks for.
const XZ_MEMORY_KIB_MAX: u32 = 256 << 10;

/// Output of one step that is shown, as in BuildKit (`BUILDKIT_STEP_LOG_MAX_SIZE`).
const OUTPUT_BYTES_MAX: usize = 2 << 20;

/// Lines of its output that the error of a step quotes.
const LAST_LINES_MAX: usize = 10;

/// Bytes of its output that are kept for that.
const LAST_BYTES_MAX: usize = 4 << 10;

/// Characters of a command that an error quotes.
const COMMAND_CHARS_MAX: usize = 200;

/// Vertices that are worked on at a time at least: most of them wait for something else than a core.
const WORKERS_MIN: usize = 2;

/// Where a step looks up names first.
const HOSTS: &str = "/etc/hosts";

/// Longest description of a record.
const DESCRIPTION_CHARS_MAX: usize = 300;

/// Why a step could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SolveError {
    /// Its command failed.
    #[error("exit code {code}{}{}", reason.as_ref().map(|why| format!(" ({why})")).unwrap_or_default(), quoted(said))]
    Exit {
        /// The command.
        command: String,
        /// As docker reports it.
        code: i32,
        /// Why, if more is known.
        reason: Option<String>,
        /// The last lines that it wrote.
        said: Vec<String>,
    },
    /// Its command could not be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// Its user is not known.
    #[error(transparent)]
    User(#[from] UserError),
    /// Its sources could not be chosen.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// Its sources could not be hashed.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// Its sources could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Its `--exclude`.
    #[error(transparent)]
    Exclude(#[from] IgnoreError),
    /// Its `--chmod`.
    #[error(transparent)]
    Chmod(#[from] context::ChmodError),
    /// Its archive could not be unpacked.
    #[error("unpack {name}")]
    Unpack {
        /// Which file.
        name: String,
        /// What is wrong with it.
        #[source]
        source: UnpackError,
    },
    /// It makes more layers than an image may have.
    #[error("the image would have {layers} layers, the limit limits.layers is {maximum}")]
    TooManyLayers {
        /// How many may be.
        maximum: u64,
        /// How many.
        layers: usize,
    },
    /// It does not fit on the tree below it.
    #[error(
        "{path} is no directory in the tree below: COPY --link does not follow links there (use it without --link)"
    )]
    Link {
        /// Where.
        path: EntryPath,
    },
    /// What is mounted into it.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A cache of it is in use.
    #[error(transparent)]
    CacheInUse(#[from] Box<RunError>),
    /// A download or a repository.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A directory could not be made.
    #[error("make directory {path}")]
    Directory {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of ours.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Its record.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The record of the image that it starts from.
    #[error(transparent)]
    Image(#[from] Box<RecordsError>),
    /// Its tree.
    #[error("prepare, mount or seal a tree")]
    Snapshot(#[from] SnapshotError),
    /// Its layer.
    #[error("read a layer's row")]
    Layer(#[from] LayerError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The build cache cannot be kept as the policy says.
    #[error(transparent)]
    Policy(#[from] Box<PruneError>),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl SolveError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Exit { .. } => ErrorKind::FailedPrecondition,
            Self::Exec(source) => source.kind(),
            Self::User(source) => source.kind(),
            Self::Select(source) => source.kind(),
            Self::Hash(source) => source.kind(),
            Self::Copy(source) => source.kind(),
            Self::Exclude(source) => source.kind(),
            Self::Mount(source) => source.kind(),
            Self::CacheInUse(source) => source.kind(),
            Self::Remote(source) => source.kind(),
            Self::Chmod(_) | Self::Link { .. } => ErrorKind::InvalidInput,
            Self::TooManyLayers { .. } => ErrorKind::Limit,
            Self::Unpack { source, .. } => source.kind(),
            Self::Directory { .. } | Self::Io { .. } => ErrorKind::Unavailable,
            Self::Cache(source) => source.kind(),
            Self::Image(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Policy(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }

    /// What the line of the Dockerfile that asked for it did not get; the cause follows.
    pub(crate) fn headline(&self) -> String {
        match self {
            Self::Exit { command, .. } => {
                let (shown, rest) = match command.char_indices().nth(COMMAND_CHARS_MAX) {
                    Some((end, _)) => (&command[..end], "…"),
                    None => (command.as_str(), ""),
                };
                format!("process \"{}{rest}\" did not complete successfully", shown.escape_debug())
            }
            Self::Select(_) | Self::Hash(_) | Self::Copy(_) | Self::Exclude(_) | Self::Unpack { .. } => {
                "files could not be copied".into()
            }
            _ => "the step could not be done".into(),
        }
    }
}

/// A step that could not be done, and where it was asked for.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) location: Location,
    /// What to point at in the line; empty for the whole of it.
    pub(crate) focus: String,
    pub(crate) error: SolveError,
}

/// The result of one vertex.
#[derive(Debug, Clone)]
pub(crate) struct Solved {
    pub(crate) key: CacheKey,
    /// The record of its tree; `None` is the empty one.
    pub(crate) tree: Option<ImmutableRef>,
    /// Diff IDs of the image that it stands on.
    pub(crate) base_diff_ids: Vec<DiffId>,
    /// Layers added to that image, bottom first.
    pub(crate) layers: Vec<LayerId>,
    /// When this vertex made its layer; `None` if it made none.
    pub(crate) made: Option<Stamp>,
    /// The image of [`CacheFrom`] that it, or the last below it that was found in one, came from.
    pub(crate) source: Option<usize>,
}

/// The results of a graph.
#[derive(Debug)]
pub(crate) struct Results {
    /// By the numbers of their vertices.
    solved: Vec<OnceLock<Solved>>,
    pub(crate) steps_count: usize,
    pub(crate) cached_count: usize,
}

impl Results {
    /// The result of a vertex that was solved.
    pub(crate) fn of(&self, vertex: VertexId) -> &Solved {
        self.solved[vertex.0].get().expect("because a vertex waits for its inputs")
    }
}

/// What is left of a graph, shared by those who work on it.
struct Queue {
    /// How many inputs each vertex still waits for.
    waits_for: Vec<usize>,
    /// Who waits for each vertex.
    users: Vec<Vec<VertexId>>,
    /// What can be worked on; the first in the file goes first.
    ready: BTreeSet<VertexId>,
    left_count: usize,
    steps_count: usize,
    cached_count: usize,
    /// Of several that failed at once, the first in the file.
    failed: Option<(VertexId, Failed)>,
    /// Nothing new is begun.
    stopped: bool,
}

impl Queue {
    fn of(graph: &Graph) -> Self {
        let count = graph.len();
        let (mut waits_for, mut users) = (vec![0; count], vec![Vec::new(); count]);
        for (id, vertex) in graph.iter() {
            for input in vertex.op.inputs() {
                waits_for[id.0] += 1;
                users[input.0].push(id);
            }
        }
        let ready = graph.iter().map(|(id, _)| id).filter(|id| waits_for[id.0] == 0).collect();
        let (left_count, failed) = (count, None);
        Self { waits_for, users, ready, left_count, steps_count: 0, cached_count: 0, failed, stopped: false }
    }

    fn solved(&mut self, id: VertexId) {
        self.left_count -= 1;
        for user in std::mem::take(&mut self.users[id.0]) {
            self.waits_for[user.0] -= 1;
            if self.waits_for[user.0] == 0 {
                self.ready.insert(user);
            }
        }
    }

    fn fail(&mut self, id: VertexId, failed: Failed) {
        let is_canceled = |failed: &Failed| matches!(failed.error, SolveError::Canceled(_));
        let goes_first = self.failed.as_ref().is_none_or(|(known, before)| {
            // What was stopped because of another failure is none.
            (is_canceled(&failed), id) < (is_canceled(before), *known)
        });
        if goes_first {
            self.failed = Some((id, failed));
        }
        self.stopped = true;
    }
}

/// A queue and a bell for who waits for it.
type SharedQueue = (Mutex<Queue>, Condvar);

/// Stops the others if the thread that holds it panics: they would wait for it forever.
struct StopOnPanic<'a>(&'a SharedQueue, &'a Cancel);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.0.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
            self.0.1.notify_all();
            self.1.cancel();
        }
    }
}

/// Solves graphs.
pub(crate) struct Solver<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) graph: &'a Graph,
    pub(crate) cache: Accessor,
    pub(crate) context: &'a Tree,
    pub(crate) executor: &'a dyn Executor,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) cancel: &'a Cancel,
    pub(crate) no_cache: bool,
    /// Who downloads.
    pub(crate) client: &'a Client,
    /// Images that are asked for what the cache has not.
    pub(crate) cache_from: &'a CacheFrom,
    /// There are results of another builder.
    pub(crate) has_imports: bool,
    /// Say for every step where its result came from.
    pub(crate) explain: bool,
    /// How all commands are run.
    pub(crate) run_options: &'a RunOptions,
    /// What steps see as `/etc/hosts`.
    pub(crate) hosts: &'a Path,
    pub(crate) secrets: &'a [Secret],
    pub(crate) ssh: &'a [SshAgent],
    /// What steps made in this build.
    pub(crate) made: Mutex<HashMap<CacheKey, ImmutableRef>>,
}

/// A result of another builder; true with one that holds for all builds.
type Imported = Option<(ImmutableRef, bool)>;

/// A step that is looked for, and done if it is not found.
struct Wanted<'a> {
    key: CacheKey,
    inputs: Inputs,
    /// Looks for it among the results of another builder.
    imported: Box<dyn FnOnce() -> Result<Imported, SolveError> + 'a>,
}

/// What a step made, besides what can be seen in its tree.
#[derive(Default)]
struct Made {
    /// Directories that are only there to have a place for something.
    on_the_way: Vec<EntryPath>,
    /// Its sources changed while they were taken in: what was hashed is not what was copied, and the result must not be
    /// found by that hash again.
    changing: bool,
}

impl Made {
    /// With `--link`, the directories that lead to the files say nothing about those that will be there: a copy to
    /// /tmp/x must not make /tmp 0755.
    fn by(copy: &CopyOp, root: BorrowedFd<'_>) -> Result<Self, SolveError> {
        if !copy.link {
            return Ok(Self::default());
        }
        let dest = EntryPath::clean(copy.dest.as_bytes()).expect("because lowering made it clean");
        let is_directory = inroot::open(root, dest.as_bytes(), rustix::fs::OFlags::DIRECTORY).is_ok();
        let mut on_the_way: Vec<EntryPath> = vec![];
        let mut at = if is_directory { Some(dest) } else { dest.split().map(|(parent, _)| parent) };
        while let Some(path) = at {
            at = path.split().map(|(parent, _)| parent);
            on_the_way.push(path);
        }
        Ok(Self { on_the_way, changing: false })
    }
}

/// Where an operation's files come from, opened.
pub(super) enum Source<'a> {
    Context(&'a Tree),
    Stage(Box<Stage>),
}

/// What a copy takes from one tree.
struct Part<'a> {
    source: Source<'a>,
    selection: Selection,
    content: ContentHash,
    /// What is in it, by path, with digests.
    files: Vec<ListedFile>,
    unpack: bool,
}

/// The tree of an earlier stage or of an image.
pub(super) struct Stage {
    tree: Tree,
    /// Keeps it mounted; the empty tree needs no mount.
    _mounted: Option<Mounted>,
}

impl Source<'_> {
    pub(super) fn tree(&self) -> &Tree {
        match self {
            Source::Context(tree) => tree,
            Source::Stage(stage) => &stage.tree,
        }
    }
}

impl Solver<'_> {
    /// Solves all vertices of a graph that was lowered for one target: each of them is needed. What does not need each
    /// other is done at the same time; after a failure the rest is cancelled, by way of this solver's `cancel`.
    pub(crate) fn solve(&self, graph: &Graph) -> Result<Results, Failed> {
        let solved = (0..graph.len()).map(|_| OnceLock::new()).collect();
        let mut results = Results { solved, steps_count: 0, cached_count: 0 };
        let queue = (Mutex::new(Queue::of(graph)), Condvar::new());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers_count = cores.max(WORKERS_MIN).min(graph.len());
        std::thread::scope(|scope| {
            for _ in 1..workers_count {
                scope.spawn(|| self.work(graph, &results, &queue));
            }
            self.work(graph, &results, &queue);
        });
        let queue = queue.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        match queue.failed {
            Some((_, failed)) => Err(failed),
            None => {
                (results.steps_count, results.cached_count) = (queue.steps_count, queue.cached_count);
                Ok(results)
            }
        }
    }

    /// Solves one vertex after the other until there is none left.
    fn work(&self, graph: &Graph, results: &Results, shared: &SharedQueue) {
        let _guard = StopOnPanic(shared, self.cancel);
        let (queue, changed) = shared;
        let mut held = queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if held.stopped || held.left_count == 0 {
                return;
            }
            let Some(id) = held.ready.pop_first() else {
                held = changed.wait(held).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(held);
            let done = self.solve_one(graph.vertex(id), results);
            held = queue.lock().unwrap_or_else(PoisonError::into_inner);
            match done {
                Ok((solved, outcome)) => {
                    if graph.vertex(id).op.is_step() {
                        held.steps_count += 1;
                        held.cached_count += usize::from(outcome == Outcome::Cached);
                    }
                    results.solved[id.0].set(solved).expect("because a vertex is taken once");
                    held.solved(id);
                }
                Err(failed) => {
                    held.fail(id, failed);
                    // Not under the lock: what is called may want to tell others.
                    drop(held);
                    self.cancel.cancel();
                    held = queue.lock().unwrap_or_else(PoisonError::into_inner);
                }
            }
            changed.notify_all();
        }
    }

    fn solve_one(&self, vertex: &Vertex, results: &Results) -> Result<(Solved, Outcome), Failed> {
        let failed = |error: SolveError| {
            let error = if canceled_inside(&error) { Canceled.into() } else { error };
            let focus = if let SolveError::Select(_) = &error { vertex.op.focus() } else { String::new() };
            Failed { location: vertex.location, focus, error }
        };
        if self.cancel.is_canceled() {
            return Err(failed(Canceled.into()));
        }
        let task = (!vertex.name.is_empty()).then(|| {
            let inputs = self.graph.digests_of_inputs(&vertex.op);
            let told = progress::Vertex { digest: vertex.digest, inputs: &inputs };
            Task::start_vertex(self.progress, &vertex.name, told)
        });
        let (solved, outcome) = match self.vertex(vertex, results, task.as_ref()).map_err(failed) {
            Ok(solved) => solved,
            Err(failed) => {
                match (task, &failed.error) {
                    (Some(task), SolveError::Canceled(_)) => task.end(Outcome::Canceled),
                    (Some(task), error) => task.fail(&format!("{}: {}", error.headline(), with_causes(error))),
                    (None, _) => {}
                }
                return Err(failed);
            }
        };
        let layers = solved.base_diff_ids.len() + solved.layers.len();
        let maximum = self.engine.document_limits().layers;
        if layers as u64 > maximum {
            return Err(failed(SolveError::TooManyLayers { layers, maximum }));
        }
        if let Some(task) = task {
            task.end(outcome);
        }
        Ok((solved, outcome))
    }

    fn vertex(
        &self,
        vertex: &Vertex,
        results: &Results,
        task: Option<&Task<'_>>,
    ) -> Result<(Solved, Outcome), SolveError> {
        match &vertex.op {
            Op::Scratch => {
                let key = KeyBuilder::new("scratch", KEY_VERSION).finish();
                let solved =
                    Solved { key, tree: None, base_diff_ids: vec![], layers: vec![], made: None, source: None };
                Ok((solved, Outcome::Done))
            }
            Op::Image { diff_ids, name } => {
                let key = KeyBuilder::new("image", KEY_VERSION).list(diff_ids.iter().map(DiffId::as_bytes)).finish();
                let base_diff_ids = diff_ids.clone();
                // Two records of one image would be two bases, on which nothing is shared.
                let _turn = self.engine.steps().take([key], self.cancel)?;
                let tree = self.engine.image_record(diff_ids, name, self.cancel).map_err(Box::new)?;
                let solved = Solved { key, tree, base_diff_ids, layers: vec![], made: None, source: None };
                Ok((solved, Outcome::Cached))
            }
            Op::Merge { base, over } => {
                let (base, over) = (results.of(*base), results.of(*over));
                let options = RecordOptions { description: Some(short(&vertex.name)), ..RecordOptions::by("build") };
                let tree = self.cache.merge(&[base.tree.as_ref(), over.tree.as_ref()], &options)?;
                if let Some(merged) = &tree {
                    match merged.extract(self.cancel) {
                        Err(CacheError::Snapshot(SnapshotError::NeedsBase { path, .. })) => {
                            return Err(SolveError::Link { path });
                        }
                        extracted => drop(extracted?),
                    }
                }
                let solved = Solved {
                    key: KeyBuilder::new("merge", KEY_VERSION).input(&base.key).input(&over.key).finish(),
                    tree,
                    base_diff_ids: base.base_diff_ids.clone(),
                    layers: base.layers.iter().chain(&over.layers).copied().collect(),
                    made: over.made,
                    source: base.source,
                };
                Ok((solved, Outcome::Done))
            }
            Op::Run { base, run } => {
                let base = results.of(*base);
                let mounts = self.key_of_mounts(run, results, KeyBuilder::new("mounts", KEY_VERSION))?.finish();
                let key = self.run_key(run, &base.key, &mounts);
                let inputs = self.run_inputs(run, &mounts, Inputs::on(&base.key));
                let imported = Box::new(|| self.imported_by(base, Asked::of_run(run, self.run_options)));
                let wanted = Wanted { key, inputs, imported };
                self.step(vertex, base, wanted, task, |root, path| self.run(run, results, root, path, task))
            }
            Op::Directory { base, path, user } => {
                let base = results.of(*base);
                let key = KeyBuilder::new("directory", KEY_VERSION)
                    .input(&base.key)
                    .bytes(path.as_bytes())
                    .bytes(user.as_bytes())
                    .finish();
                let inputs = Inputs::on(&base.key).value("the directory", path).value("the user", user);
                let imported = Box::new(|| self.imported_by(base, Asked::of_directory(path, user)));
                self.step(vertex, base, Wanted { key, inputs, imported }, task, |root, _| {
                    let user = self::user(root, user)?;
                    make_directory(root, path, Some(Owner { uid: user.uid, gid: user.gid }))?;
                    Ok(Made::default())
                })
            }
            Op::Copy { base, copy } => {
                let base = results.of(*base);
                let excludes = match copy.excludes.as_slice() {
                    [] => None,
                    patterns => Some(Ignore::from_patterns(patterns.iter().map(String::as_str))?),
                };
                let parts = copy.parts.iter().map(|part| {
                    let source = self.source(part.from, results)?;
                    let mut selection = Selection::new(excludes.clone());
                    for path in &part.paths {
                        match part.parents {
                            true => selection.add_with_parents(source.tree(), path.as_bytes())?,
                            false => selection.add(source.tree(), path.as_bytes())?,
                        };
                    }
                    for (name, bytes) in &part.inline {
                        selection.add_inline(name.as_bytes(), bytes.clone());
                    }
                    let (content, files) = source.tree().hash_listed(&selection)?;
                    Ok(Part { source, selection, content, files, unpack: part.unpack })
                });
                let parts = parts.collect::<Result<Vec<_>, SolveError>>()?;
                let mut key = KeyBuilder::new("copy", KEY_VERSION).input(&base.key).number(parts.len() as u64);
                for part in &parts {
                    key = key.bytes(part.content.as_bytes()).number(part.unpack.into());
                }
                let key = key
                    .bytes(copy.dest.as_bytes())
                    .list(copy.chown.iter())
                    .list(copy.chmod.iter())
                    .number(copy.link.into())
                    .finish();
                let mut inputs = Inputs::on(&base.key)
                    .value("the destination", &copy.dest)
                    .value("--chown", copy.chown.as_deref().unwrap_or_default())
                    .value("--chmod", copy.chmod.as_deref().unwrap_or_default());
                for (part, planned) in parts.iter().zip(&copy.parts) {
                    let from = if planned.from == FilesFrom::Context { "the context" } else { "another tree" };
                    let inline = planned.inline.iter().map(|(name, _)| name.as_str());
                    let names: Vec<&str> = planned.paths.iter().map(String::as_str).chain(inline).collect();
                    inputs = inputs.files(from, &names.join(" "), part.content.as_bytes(), &part.files);
                }
                let imported = Box::new(|| {
                    let [part] = parts.as_slice() else { return Ok(None) };
                    let source = (part.source.tree(), &part.selection);
                    let under = copy.under.map(|under| results.of(under));
                    let on_nothing = under.unwrap_or(base).tree.is_none();
                    let asked = Asked::of_copy(copy, on_nothing, source)?;
                    match (under, asked) {
                        (Some(under), Some(asked)) => Ok(self.imported_under(under, &asked)?.map(|tree| (tree, false))),
                        (_, asked) => self.imported_by(base, asked),
                    }
                });
                self.step(vertex, base, Wanted { key, inputs, imported }, task, |root, _| {
                    let made = self.copy(copy, &parts, root)?;
                    // A context is a directory that people work in.
                    let changing = parts.iter().any(|part| {
                        matches!(part.source, Source::Context(_))
                            && part.source.tree().hash(&part.selection).ok() != Some(part.content)
                    });
                    Ok(Made { changing, ..made })
                })
            }
            Op::Download(download) => self.download(download, &vertex.name),
            Op::Git(git) => self.git(git, vertex),
        }
    }

    /// What is known of a URL, or what comes from there: a tree with that one file.
    fn download(&self, download: &Download, name: &str) -> Result<(Solved, Outcome), SolveError> {
        let Download { url, name: file_name, checksum } = download;
        let index = KeyBuilder::new("download", KEY_VERSION).bytes(url.as_bytes()).bytes(file_name.as_bytes()).finish();
        let _turn = self.engine.steps().take([index], self.cancel)?;
        let known = self.known_alone(&index)?;
        let of = |tree: &ImmutableRef, key: &str| self.cache.value(tree.id(), key);
        if let (Some(tree), Some(checksum)) = (&known, checksum)
            && of(tree, HTTP_CHECKSUM)?.as_ref() == Some(checksum)
        {
            return Ok((self.alone(tree.clone(), file_name)?, Outcome::Cached));
        }
        let (etag, last_modified) = match &known {
            Some(tree) => (of(tree, HTTP_ETAG)?, of(tree, HTTP_MODIFIED)?),
            None => (None, None),
        };
        let old = known.as_ref().map(ImmutableRef::id);
        let came = self.client.download(url, etag.as_deref(), last_modified.as_deref());
        let came = came.map_err(|error| match self.cancel.is_canceled() {
            false => SolveError::from(RemoteError::from(error)),
            true => Canceled.into(),
        })?;
        let (mut bytes, etag, last_modified) = match (came, known) {
            // What is here can't be what the file expects: that was looked at before.
            (registry::Download::NotModified, Some(tree)) => {
                let actual = of(&tree, HTTP_CHECKSUM)?.unwrap_or_default();
                return match checksum {
                    Some(expected) => {
                        Err(RemoteError::Checksum { what: url.clone(), expected: expected.clone(), actual }.into())
                    }
                    None => Ok((self.alone(tree, file_name)?, Outcome::Cached)),
                };
            }
            (registry::Download::NotModified, None) => {
                let source = io::Error::other("not modified, says the server, and nothing is here");
                return Err(RemoteError::Download { url: url.clone(), source }.into());
            }
            (registry::Download::Body { bytes, etag, last_modified }, _) => (bytes, etag, last_modified),
        };
        let options = RecordOptions { description: Some(short(name)), ..RecordOptions::by("build") };
        let record = self.cache.create(None, &options)?;
        let mounted = record.mount(Attach::InStore)?;
        let path = mounted.path().expect("because it was attached").join(file_name);
        let written = self.write_download(&mut bytes, &path, last_modified.as_deref(), url);
        let unmounted = mounted.unmount();
        let actual = written?;
        unmounted?;
        if let Some(expected) = checksum.as_ref().filter(|expected| **expected != actual) {
            return Err(RemoteError::Checksum { what: url.clone(), expected: expected.clone(), actual }.into());
        }
        let tree = self.sealed(record, &[], Some(&index))?;
        let values = [(HTTP_CHECKSUM, Some(actual)), (HTTP_ETAG, etag), (HTTP_MODIFIED, last_modified)];
        let values =
            values.into_iter().map(|(key, value)| (key.to_owned(), value.map(|value| Value { value, index: None })));
        self.cache.update(tree.id(), &Changes { values: values.collect(), ..Changes::default() })?;
        // The next question is about the newest.
        if let Some(old) = old {
            self.cache.remove_result(&index, old)?;
        }
        Ok((self.alone(tree, file_name)?, Outcome::Done))
    }

    /// Writes what comes, as BuildKit does: root's, mode 0600, as old as the server says. Gives the digest.
    fn write_download(
        &self,
        bytes: &mut dyn io::Read,
        path: &Path,
        last_modified: Option<&str>,
        url: &str,
    ) -> Result<String, SolveError> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let io = |op| move |source| SolveError::Io { op, path: path.to_owned(), source };
        let options = || std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = options().map_err(io("create"))?;
        let mut sum = plies_oci::Sha256Hasher::default();
        let mut buffer = vec![0; DOWNLOAD_CHUNK_BYTES];
        let mut total = 0u64;
        loop {
            let failed = |source| RemoteError::Download { url: url.to_owned(), source };
            self.cancel.check().map_err(failed)?;
            let length = match bytes.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error).into()),
            };
            total += length as u64;
            if total > DOWNLOAD_BYTES_MAX {
                return Err(RemoteError::TooLong { url: url.to_owned() }.into());
            }
            sum.update(&buffer[..length]);
            file.write_all(&buffer[..length]).map_err(io("write"))?;
        }
        // Without a word of the server, the file is of no time at all: equal downloads are equal files.
        let modified = last_modified.and_then(|text| jiff::fmt::rfc2822::parse(text).ok());
        let modified = modified.map_or(std::time::UNIX_EPOCH, |zoned| zoned.timestamp().into());
        file.set_modified(modified).map_err(io("change the times of"))?;
        Ok(BlobDigest::from_bytes(sum.finish()).to_string())
    }

    /// The tree of a repository at the commit that it stands for now.
    fn git(&self, git: &GitSource, vertex: &Vertex) -> Result<(Solved, Outcome), SolveError> {
        let run_dir = self.engine.store().run_dir();
        let commit = git.resolve(run_dir, self.cancel)?;
        let key = KeyBuilder::new("git", KEY_VERSION)
            .bytes(git.remote.as_bytes())
            .bytes(commit.as_bytes())
            .bytes(git.subdir.as_bytes())
            .number(git.keep_git_dir.into())
            .number(git.submodules.into())
            .finish();
        let _turn = self.engine.steps().take([key], self.cancel)?;
        if let Some(tree) = self.known_alone(&key)?.filter(|_| !self.no_cache && !vertex.no_cache) {
            return Ok((self.alone(tree, &commit)?, Outcome::Cached));
        }
        let work = git.check_out(&commit, run_dir, self.cancel)?;
        let io = |op, path: &Path| {
            let path = path.to_owned();
            move |source| SolveError::Io { op, path, source }
        };
        let dir = Tree::open_dir(&work.path).map_err(io("open", &work.path))?;
        let from = Tree::context(dir, None).cancelable(self.cancel);
        let mut selection = Selection::new(None);
        selection.add(&from, if git.subdir.is_empty() { b"/" } else { git.subdir.as_bytes() })?;
        let options = RecordOptions { description: Some(short(&vertex.name)), ..RecordOptions::by("build") };
        let record = self.cache.create(None, &options)?;
        let mounted = record.mount(Attach::InStore)?;
        // Git knows of a file whether it is a program; the rest is the umask of whoever builds.
        let chmod = Some(Chmod::parse("u=rwX,go=rX")?);
        let options = CopyOptions { dest: Destination::new(b"/", b"/"), owner: None, chmod };
        let copied = context::copy(&from, &selection, mounted.root(), &options);
        let unmounted = mounted.unmount();
        copied?;
        unmounted?;
        let tree = self.sealed(record, &[], Some(&key))?;
        Ok((self.alone(tree, &commit)?, Outcome::Done))
    }

    /// The record of a source that stands on nothing, if it is here.
    fn known_alone(&self, key: &CacheKey) -> Result<Option<ImmutableRef>, SolveError> {
        let nothing = Solved { key: *key, tree: None, base_diff_ids: vec![], layers: vec![], made: None, source: None };
        self.lookup(&nothing, key)
    }

    /// A source that stands on nothing, as what others stand on. Its own key tells only about others' files, which are
    /// hashed when they are taken.
    fn alone(&self, tree: ImmutableRef, named: &str) -> Result<Solved, SolveError> {
        let id = tree.id().to_string();
        let key = KeyBuilder::new("source", KEY_VERSION).bytes(id.as_bytes()).bytes(named.as_bytes()).finish();
        let nothing = Solved { key, tree: None, base_diff_ids: vec![], layers: vec![], made: None, source: None };
        self.solved(&nothing, key, tree)
    }

    /// Finds the result of a step in the cache, or does `work` in a tree on top of `base`.
    fn step(
        &self,
        vertex: &Vertex,
        base: &Solved,
        wanted: Wanted<'_>,
        task: Option<&Task<'_>>,
        work: impl FnOnce(BorrowedFd<'_>, &Path) -> Result<Made, SolveError>,
    ) -> Result<(Solved, Outcome), SolveError> {
        let Wanted { key, inputs, imported } = wanted;
        let explain = |says: &str| {
            if let Some(task) = task.filter(|_| self.explain) {
                task.output(Stream::Stderr, format!("{says}\n").as_bytes());
            }
        };
        let _turn = self.engine.steps().take([key], self.cancel)?;
        if self.no_cache || vertex.no_cache {
            // A step that is there twice is still done once.
            let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
            if let Some(tree) = made.filter(|tree| self.stands_on(tree, base)) {
                return Ok((self.solved(base, key, tree)?, Outcome::Cached));
            }
            explain("not looked for in the cache, as was asked for");
        } else if let Some(tree) = self.lookup(base, &key)? {
            explain(&format!("cached: record {}", tree.id()));
            return Ok((self.solved(base, key, tree)?, Outcome::Cached));
        } else if self.has_imports
            && let Some((tree, holds)) = imported()?
        {
            explain(&format!("cached: record {}, which was imported", tree.id()));
            if holds {
                self.cache.add_result(&key, tree.id())?;
                inputs.keep(&self.cache, tree.id(), &vertex.name)?;
            }
            return Ok((self.solved(base, key, tree)?, Outcome::Cached));
        } else if let Some((solved, says)) = self.found_in_image(vertex, base, &key)? {
            explain(&says);
            return Ok((solved, Outcome::Cached));
        } else {
            explain(&format!(
                "not cached: nothing is known by key {key}{}",
                self.cache_from.and_not_there(&self.graph.story(vertex))
            ));
            if self.explain
                && let Some(changed) = inputs.changed(&self.cache, &vertex.name)?
            {
                explain(&changed);
            }
        }
        let options = RecordOptions { description: Some(short(&vertex.name)), ..RecordOptions::by("build") };
        let record = self.cache.create(base.tree.as_ref(), &options)?;
        let mounted = record.mount(Attach::InStore)?;
        let path = mounted.path().expect("because it was attached").to_owned();
        let worked = work(mounted.root(), &path);
        let unmounted = mounted.unmount();
        // Why the step failed says more than that its tree was still in use then.
        let Made { on_the_way, changing } = worked?;
        unmounted?;
        let tree = self.sealed(record, &on_the_way, (!changing).then_some(&key))?;
        if !changing {
            inputs.keep(&self.cache, tree.id(), &vertex.name)?;
            self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(key, tree.clone());
        }
        Ok((self.solved(base, key, tree)?, Outcome::Done))
    }

    /// Makes what a step wrote its record, and room for it if the policy asks for that.
    fn sealed(
        &self,
        record: MutableRef,
        on_the_way: &[EntryPath],
        key: Option<&CacheKey>,
    ) -> Result<ImmutableRef, SolveError> {
        let tree = record.seal(on_the_way, key)?;
        self.engine.keep_policy(Moment::Added, self.cancel).map_err(Box::new)?;
        Ok(tree)
    }

    /// Whether a record was made on top of this very base.
    fn stands_on(&self, tree: &ImmutableRef, base: &Solved) -> bool {
        let below = base.tree.as_ref().map_or(Parents::None, |tree| Parents::Layer(tree.id()));
        tree.row().is_ok_and(|row| row.parents == below)
    }

    fn solved(&self, base: &Solved, key: CacheKey, tree: ImmutableRef) -> Result<Solved, SolveError> {
        let row = tree.row()?;
        let layer = match row.state {
            State::Sealed { layer } => layer,
            _ => None,
        };
        Ok(Solved {
            key,
            // A step that changes nothing adds no layer.
            tree: Some(tree),
            base_diff_ids: base.base_diff_ids.clone(),
            layers: base.layers.iter().copied().chain(layer).collect(),
            made: layer.map(|_| row.created_at),
            source: base.source,
        })
    }

    /// Finds a step's result in an image that the user named as a source, and what to say of it.
    fn found_in_image(
        &self,
        vertex: &Vertex,
        base: &Solved,
        key: &CacheKey,
    ) -> Result<Option<(Solved, String)>, SolveError> {
        // A copy that stands on nothing is the same on whatever it is laid over.
        let alone = matches!(&vertex.op, Op::Copy { copy, .. } if copy.link);
        let mut below = base.base_diff_ids.clone();
        for layer in &base.layers {
            // A layer whose diff ID nobody needed yet was made here just now, and came from no image.
            let Some(diff_id) = self.engine.store().layers().info(*layer)?.diff_id else { return Ok(None) };
            below.push(diff_id);
        }
        let below = (!alone).then_some(below.as_slice());
        // No text tells of what all commands of a build are given.
        let is_told = *self.run_options == RunOptions::default();
        let story = if is_told { self.graph.story(vertex) } else { Vec::new() };
        let Some(found) = self.cache_from.find(below, base.source, key, &story) else { return Ok(None) };
        let Some(diff_id) = found.diff_id else {
            return Ok(Some((Solved { key: *key, made: None, source: found.source, ..base.clone() }, found.says)));
        };
        let description = Some(short(&vertex.name));
        let options = RecordOptions { description, created_at: found.created, ..RecordOptions::by("build") };
        let tree = match self.cache.get_by_diff_id(diff_id, base.tree.as_ref(), &options) {
            Ok(Some(tree)) => tree,
            // The step runs then.
            Ok(None) | Err(CacheError::NotAddressable { .. } | CacheError::Damaged { .. }) => return Ok(None),
            Err(other) => return Err(other.into()),
        };
        let row = tree.row()?;
        let State::Sealed { layer: Some(layer) } = row.state else { return Ok(None) };
        if !self.is_whole(&row) {
            return Ok(None);
        }
        // What only a text says holds where the image is named, and no further.
        if found.by_key {
            self.cache.add_result(key, tree.id())?;
        }
        let solved = Solved {
            key: *key,
            tree: Some(tree),
            base_diff_ids: base.base_diff_ids.clone(),
            layers: base.layers.iter().copied().chain([layer]).collect(),
            made: Some(found.created.unwrap_or(row.created_at)),
            source: found.source,
        };
        Ok(Some((solved, found.says)))
    }

    /// Finds the record that a step's key gave on this very base: the step below may have run again since, with another
    /// result.
    fn lookup(&self, base: &Solved, key: &CacheKey) -> Result<Option<ImmutableRef>, SolveError> {
        let below = base.tree.as_ref().map_or(Parents::None, |tree| Parents::Layer(tree.id()));
        self.result_on(&below, key)
    }

    fn imported_by(&self, base: &Solved, asked: Option<Asked>) -> Result<Imported, SolveError> {
        match asked {
            Some(asked) => Ok(self.imported(base, &asked)?.map(|tree| (tree, true))),
            None => Ok(None),
        }
    }

    /// Finds the record that a key gave on these parents.
    pub(super) fn result_on(&self, below: &Parents, key: &CacheKey) -> Result<Option<ImmutableRef>, SolveError> {
        for id in self.cache.results(key)? {
            let found = match self.cache.get(id, &RecordOptions::by("build")) {
                Ok(found) => found,
                // Gone, or of no use: the step runs again.
                Err(CacheError::NotFound { .. } | CacheError::Damaged { .. } | CacheError::NeedsProviders(_)) => {
                    continue;
                }
                Err(other) => return Err(other.into()),
            };
            let mut row = found.row()?;
            if row.parents == *below && row.state == State::Lazy {
                // What another builder left packed is a result all the same, if its blob can be had.
                match found.extract(self.cancel) {
                    Ok(_) => row = found.row()?,
                    Err(_) if self.cancel.is_canceled() => return Err(Canceled.into()),
                    Err(_) => continue,
                }
            }
            if row.parents == *below && self.is_whole(&row) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Whether a record's own files are there. A layer whose directory is gone is no result.
    fn is_whole(&self, row: &RecordRow) -> bool {
        match row.state {
            State::Sealed { layer } => layer.is_none_or(|layer| self.engine.store().layers().root(layer).is_ok()),
            _ => false,
        }
    }

    fn run_key(&self, run: &RunOp, base: &CacheKey, mounts: &CacheKey) -> CacheKey {
        let script = run.invocation.script.iter().flat_map(|(name, text)| [name, text]);
        let limit = |of: Option<u64>| of.map_or("-1".to_owned(), |of| of.to_string());
        let limits = self.run_options.limits.iter();
        let limits = limits.flat_map(|of| [of.name().to_owned(), limit(of.soft), limit(of.hard)]);
        let without_network = u64::from(self.network(run) == Network::None);
        let insecure = u64::from(run.security == RunSecurity::Insecure);
        KeyBuilder::new("run", KEY_VERSION)
            .input(base)
            .list(run.invocation.argv.iter())
            .list(script.collect::<Vec<_>>())
            .list(run.env.iter().flat_map(|(name, value)| [name, value]).collect::<Vec<_>>())
            .bytes(run.working_dir.as_bytes())
            .bytes(run.user.as_bytes())
            .number(without_network | insecure << 1)
            .list(self.run_options.add_hosts.iter().flat_map(|(name, address)| [name, address]).collect::<Vec<_>>())
            .list(limits.collect::<Vec<_>>())
            .number(self.run_options.shm_size_bytes.unwrap_or(0))
            .input(mounts)
            .finish()
    }

    /// A command's inputs, for people.
    fn run_inputs(&self, run: &RunOp, mounts: &CacheKey, inputs: Inputs) -> Inputs {
        let script = run.invocation.script.iter().flat_map(|(name, text)| [name, text]);
        let command: Vec<&String> = run.invocation.argv.iter().chain(script).collect();
        let options = format!("{:?} {:?} {:?}", self.network(run), run.security, self.run_options);
        let inputs = inputs
            .value("the command", format!("{command:?}"))
            .value("the working directory", &run.working_dir)
            .value("the user", &run.user)
            .value("network, security, hosts and limits", options)
            .digest("what is mounted", mounts);
        run.env.iter().fold(inputs, |inputs, (name, value)| inputs.value(format!("variable {name}"), value))
    }

    /// Steps have the host's network, as under `docker build --network=host`, unless they are to have none.
    fn network(&self, run: &RunOp) -> Network {
        match (run.network, self.run_options.no_network) {
            (RunNetwork::None, _) | (RunNetwork::Default, true) => Network::None,
            (RunNetwork::Host, _) | (RunNetwork::Default, false) => Network::Host,
        }
    }

    fn run(
        &self,
        run: &RunOp,
        results: &Results,
        root: BorrowedFd<'_>,
        path: &Path,
        task: Option<&Task<'_>>,
    ) -> Result<Made, SolveError> {
        let mut prepared = self.prepare_mounts(run, results)?;
        let made = self.run_prepared(run, &mut prepared, root, path, task);
        let ended = prepared.end();
        let made = made?;
        ended.map(|()| made)
    }

    fn run_prepared(
        &self,
        run: &RunOp,
        prepared: &mut Prepared<'_>,
        root: BorrowedFd<'_>,
        path: &Path,
        task: Option<&Task<'_>>,
    ) -> Result<Made, SolveError> {
        make_directory(root, &run.working_dir, None)?;
        let os = |(name, value): &(String, String)| (OsString::from(name), OsString::from(value));
        let mut mounts = StepMount::host_network_files();
        mounts.retain(|mount| mount.target != Path::new(HOSTS));
        let source = MountSource::Bind { path: self.hosts.to_owned(), access: Access::ReadOnly };
        mounts.push(StepMount { target: HOSTS.into(), source });
        mounts.extend(self.run_options.shm_size_bytes.map(|bytes| StepMount {
            target: "/dev/shm".into(),
            source: MountSource::Tmpfs { size_bytes: Some(bytes), access: Access::ReadWrite },
        }));
        let script = run.invocation.script.as_ref();
        let script = script.map(|(name, text)| Script::write(self.engine.store().run_dir(), name, text)).transpose()?;
        mounts.extend(script.as_ref().map(Script::mount));
        mounts.append(&mut prepared.mounts);
        let user = user(root, &run.user)?;
        let defaults =
            [("PATH".to_owned(), DEFAULT_PATH.to_owned()), ("HOME".to_owned(), exec::home_of(root, user.uid)?)];
        let step = Step {
            args: run.invocation.argv.iter().map(OsString::from).collect(),
            // Of equal names the last counts.
            env: defaults.iter().chain(&run.unkeyed_env).chain(&run.env).chain(&prepared.env).map(os).collect(),
            cwd: PathBuf::from(&run.working_dir),
            user,
            rootfs: path.to_owned(),
            mounts,
            hostname: "buildkitsandbox".into(),
            network: self.network(run),
            limits: self.run_options.limits.clone(),
            insecure: run.security == RunSecurity::Insecure,
            secret: prepared.secret,
            streams: Streams::Captured,
        };
        let left_bytes = AtomicUsize::new(OUTPUT_BYTES_MAX);
        let last = Mutex::new(VecDeque::new());
        let output = |stream| TaskOutput { task, stream, left_bytes: &left_bytes, last: &last };
        let (mut stdout, mut stderr) = (output(Stream::Stdout), output(Stream::Stderr));
        let status = match self.executor.run(&step, &mut stdout, &mut stderr, self.cancel) {
            Err(ExecError::Canceled) => return Err(Canceled.into()),
            other => other?,
        };
        if !status.success() {
            let (code, reason) = (status.code(), status.reason().map(str::to_owned));
            let said = last_lines(last.into_inner().unwrap_or_else(PoisonError::into_inner));
            return Err(SolveError::Exit { command: run.invocation.argv.join(" "), code, reason, said });
        }
        Ok(Made::default())
    }

    pub(super) fn source(&self, from: FilesFrom, results: &Results) -> Result<Source<'_>, SolveError> {
        let FilesFrom::Vertex(vertex) = from else { return Ok(Source::Context(self.context)) };
        let mounted = match &results.of(vertex).tree {
            Some(tree) => tree.mount(Attach::Detached, self.cancel)?,
            None => None,
        };
        let Some(mounted) = mounted else {
            let empty = self.engine.store().run_dir().join("empty");
            let io = |op| {
                let path = empty.clone();
                move |source| SolveError::Io { op, path, source }
            };
            std::fs::create_dir_all(&empty).map_err(io("create directory"))?;
            let tree = Tree::stage(Tree::open_dir(&empty).map_err(io("open"))?);
            return Ok(Source::Stage(Box::new(Stage { tree, _mounted: None })));
        };
        let dir = rustix::io::fcntl_dupfd_cloexec(mounted.root(), 0);
        let dir = dir.map_err(|errno| SolveError::Io { op: "open", path: "/".into(), source: errno.into() })?;
        let tree = Tree::stage(dir).cancelable(self.cancel);
        Ok(Source::Stage(Box::new(Stage { tree, _mounted: Some(mounted) })))
    }

    fn copy(&self, copy: &CopyOp, parts: &[Part<'_>], root: BorrowedFd<'_>) -> Result<Made, SolveError> {
        let owner = copy.chown.as_ref().map(|chown| owner(root, chown)).transpose()?;
        let chmod = copy.chmod.as_ref().map(|chmod| Chmod::parse(chmod)).transpose()?;
        let several = parts.iter().map(|part| part.selection.items().len()).sum::<usize>() > 1;
        let dest = if several && !copy.dest.ends_with('/') { format!("{}/", copy.dest) } else { copy.dest.clone() };
        let options = CopyOptions { dest: Destination::new(b"/", dest.as_bytes()), owner, chmod };
        for part in parts {
            let mut plain = part.selection.emptied();
            for item in part.selection.items() {
                let archive = match item.path() {
                    Some(path) if part.unpack && !item.is_dir() => Archive::open(part.source.tree(), path)?,
                    _ => None,
                };
                match archive {
                    // ADD: archives go where they are unpacked, the rest is copied.
                    Some(archive) => {
                        make_directory(root, &copy.dest, owner)?;
                        let dir = inroot::open(root, copy.dest.as_bytes(), rustix::fs::OFlags::DIRECTORY);
                        let dir = dir.map_err(|source| SolveError::Directory { path: copy.dest.clone(), source })?;
                        archive.unpack(dir.as_fd(), owner, self.engine.limits(), self.cancel)?;
                    }
                    None => plain.push(item.clone()),
                }
            }
            if !plain.items().is_empty() {
                context::copy(part.source.tree(), &plain, root, &options)?;
            }
        }
        Made::by(copy, root)
    }
}

impl Op {
    /// Whether it counts as a step for people.
    fn is_step(&self) -> bool {
        matches!(self, Op::Run { .. } | Op::Copy { .. } | Op::Directory { .. })
    }

    /// Whether the text of a history tells all of what it takes in, where the steps and settings before it are known: not
    /// the files that are copied, not a script or a mount, and not whose a directory is.
    pub(super) fn is_told_by_text(&self) -> bool {
        match self {
            Op::Run { run, .. } => {
                let is_plain = run.network == RunNetwork::Default && run.security == RunSecurity::Sandbox;
                is_plain && run.invocation.script.is_none() && run.mounts.is_empty()
            }
            Op::Directory { user, .. } => ["", "root", "0"].contains(&user.as_str()),
            _ => false,
        }
    }

    /// What a complaint about its files points at.
    fn focus(&self) -> String {
        match self {
            Op::Copy { copy, .. } => copy.parts.iter().flat_map(|part| &part.paths).next().cloned().unwrap_or_default(),
            _ => String::new(),
        }
    }
}

/// A record's description: a Dockerfile's line can hold a whole script.
pub(super) fn short(name: &str) -> String {
    name.chars().take(DESCRIPTION_CHARS_MAX).collect()
}

/// Distinguishes the scripts and other files of one process.
static NEXT_FILE: AtomicU64 = AtomicU64::new(0);

/// Makes a directory with its parents (0755, the owner's or root's) inside a root; what is there is left alone.
pub(crate) fn make_directory(root: BorrowedFd<'_>, path: &str, owner: Option<Owner>) -> Result<(), SolveError> {
    let own = |dir: BorrowedFd<'_>| match owner {
        Some(Owner { uid, gid }) => {
            let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
            rustix::fs::fchown(dir, Some(uid), Some(gid))
        }
        None => Ok(()),
    };
    let make = || -> io::Result<()> {
        let mut made_parent = |_: BorrowedFd<'_>, made: Option<inroot::MadeDir>| match made {
            Some(made) => Ok(own(made.dir.as_fd())?),
            None => Ok(()),
        };
        let resolved = inroot::resolve(root, path.as_bytes(), inroot::Missing::Make(&mut made_parent))?;
        let Some(name) = &resolved.name else { return Ok(()) };
        let mode = rustix::fs::Mode::from_raw_mode(0o755);
        rustix::fs::mkdirat(resolved.dir(), name.as_slice(), mode).map_err(|errno| match errno {
            rustix::io::Errno::EXIST => io::Error::from(rustix::io::Errno::NOTDIR),
            other => other.into(),
        })?;
        let made = inroot::open_dir(resolved.dir(), name)?;
        own(made.as_fd())?;
        // mkdir obeys the umask, which is the caller's business and not the image's.
        Ok(rustix::fs::fchmod(&made, mode)?)
    };
    make().map_err(|source| SolveError::Directory { path: path.to_owned(), source })
}

pub(crate) fn user(root: BorrowedFd<'_>, text: &str) -> Result<User, UserError> {
    if text.is_empty() { Ok(User::root()) } else { resolve_user(root, text) }
}

/// `--chown`: a number alone is user and group, a name alone brings its primary group (Dockerfile reference, "COPY
/// --chown").
fn owner(root: BorrowedFd<'_>, text: &str) -> Result<Owner, UserError> {
    let user = resolve_user(root, text)?;
    let number_alone = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    Ok(Owner { uid: user.uid, gid: if number_alone { user.uid } else { user.gid } })
}

/// Passes a command's output on to its task, up to a limit: a step that floods its log costs neither a terminal nor a
/// disk, and still runs to its end.
struct TaskOutput<'a> {
    task: Option<&'a Task<'a>>,
    stream: Stream,
    /// What both streams of the step may still say.
    left_bytes: &'a AtomicUsize,
    /// The last bytes that they said, for the error.
    last: &'a Mutex<VecDeque<u8>>,
}

impl Write for TaskOutput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.extend(&bytes[bytes.len().saturating_sub(LAST_BYTES_MAX)..]);
        let over = last.len().saturating_sub(LAST_BYTES_MAX);
        last.drain(..over);
        drop(last);
        let take = |left: usize| Some(left.saturating_sub(bytes.len()));
        let left = self.left_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or(0);
        if let Some(task) = self.task.filter(|_| left > 0) {
            task.output(self.stream, &bytes[..bytes.len().min(left)]);
            if bytes.len() >= left {
                task.output(Stream::Stderr, b"\n[output clipped here, OUTPUT_BYTES_MAX = 2 MiB]\n");
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The last whole lines of an output, without what a terminal would obey.
fn last_lines(bytes: VecDeque<u8>) -> Vec<String> {
    let bytes: Vec<u8> = bytes.into();
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().map(|line| line.replace(|c: char| c.is_control() && c != '\t', " "));
    let mut lines: Vec<String> = lines.filter(|line| !line.trim().is_empty()).collect();
    lines.drain(..lines.len().saturating_sub(LAST_LINES_MAX));
    lines
}

fn quoted(lines: &[String]) -> String {
    match lines {
        [] => String::new(),
        lines => format!("; its last words:\n  {}", lines.join("\n  ")),
    }
}

/// What a build's steps see as `/etc/hosts`, as BuildKit writes it; gone when dropped.
pub(super) struct HostsFile(PathBuf);

impl HostsFile {
    pub(super) fn write(run_dir: &Path, more: &[(String, String)]) -> Result<Self, SolveError> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = run_dir.join(format!("hosts-{}", NEXT_FILE.fetch_add(1, Ordering::Relaxed)));
        let mut text = "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
        more.iter().for_each(|(name, address)| text.push_str(&format!("{address}\t{name}\n")));
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
        match written {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(SolveError::Io { op: "write", path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for HostsFile {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// A here-document that is executed: a file in a directory of its own, gone when dropped.
struct Script {
    dir: PathBuf,
}

impl Script {
    fn write(run_dir: &Path, name: &str, text: &str) -> Result<Self, SolveError> {
        use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
        let dir = run_dir.join(format!("script-{}", NEXT_FILE.fetch_add(1, Ordering::Relaxed)));
        let io = |op, path: PathBuf| move |source| SolveError::Io { op, path, source };
        std::fs::create_dir(&dir).map_err(io("create directory", dir.clone()))?;
        let script = Self { dir };
        // The step may run as anybody.
        std::fs::set_permissions(&script.dir, std::fs::Permissions::from_mode(0o755))
            .map_err(io("change the mode of", script.dir.clone()))?;
        let path = script.dir.join(name);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path);
        file.as_mut().map_or(Ok(()), |file| file.write_all(text.as_bytes())).map_err(io("write", path.clone()))?;
        file.map_err(io("create", path))?;
        Ok(script)
    }

    fn mount(&self) -> StepMount {
        let source = MountSource::Bind { path: self.dir.clone(), access: Access::ReadOnly };
        StepMount { target: SCRIPT_DIR.into(), source }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // What is left is removed with the run directory at the next start.
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

/// A file that ADD unpacks.
struct Archive {
    name: String,
    file: std::fs::File,
    packing: Packing,
}

/// How an archive is compressed.
#[derive(Clone, Copy)]
enum Packing {
    /// As layers may be.
    Layers(Compression),
    Bzip2,
    Xz,
}

impl Packing {
    fn detect(first: &[u8]) -> Self {
        match first {
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            first => Self::Layers(compress::detect(first)),
        }
    }

    /// The bytes, and how those still are compressed for whoever reads layers.
    fn open<R: io::Read + Send>(self, packed: R) -> (Unpacking<R>, Compression) {
        match self {
            Self::Layers(compression) => (Unpacking::No(packed), compression),
            Self::Bzip2 => (Unpacking::Bzip2(bzip2::read::MultiBzDecoder::new(packed)), Compression::None),
            Self::Xz => {
                let reader = lzma_rust2::XzReader::new_mem_limit(packed, true, XZ_MEMORY_KIB_MAX);
                (Unpacking::Xz(Box::new(reader)), Compression::None)
            }
        }
    }
}

/// A reader that undoes what no layer has.
enum Unpacking<R: io::Read> {
    No(R),
    Bzip2(bzip2::read::MultiBzDecoder<R>),
    Xz(Box<lzma_rust2::XzReader<R>>),
}

impl<R: io::Read> io::Read for Unpacking<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::No(reader) => reader.read(buffer),
            Self::Bzip2(reader) => reader.read(buffer),
            Self::Xz(reader) => reader.read(buffer),
        }
    }
}

impl Archive {
    /// Opens `path` if it is an archive: by its content, as docker decides, not by its name.
    fn open(tree: &Tree, path: &[u8]) -> Result<Option<Self>, SolveError> {
        use std::os::unix::fs::FileExt as _;
        let name = path.escape_ascii().to_string();
        let io = |source| SolveError::Io { op: "read", path: PathBuf::from(&name), source };
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
        let file = std::fs::File::from(inroot::open(tree.as_fd(), path, flags).map_err(io)?);
        let mut head = [0; 512];
        let length = file.read_at(&mut head, 0).map_err(io)?;
        let packing = Packing::detect(&head[..length]);
        let mut first = [0; 512];
        let (reader, compression) = packing.open(file.try_clone().map_err(io)?);
        let decoder = compress::Decoder::new(reader, compression, &Default::default());
        let peeked = decoder.and_then(|mut decoder| io::Read::read_exact(&mut decoder, &mut first));
        // What does not decompress to a tar is a file like any other.
        let is_tar = peeked.is_ok() && plies_archive::tar::is_header(&first);
        io::Seek::rewind(&mut &file).map_err(io)?;
        Ok(is_tar.then_some(Self { name, file, packing }))
    }

    fn unpack(
        self,
        dir: BorrowedFd<'_>,
        owner: Option<Owner>,
        limits: &plies_archive::Limits,
        cancel: &Cancel,
    ) -> Result<(), SolveError> {
        let style = ApplyStyle::Added { owner: owner.map(|Owner { uid, gid }| NewOwner { uid, gid }) };
        let (reader, compression) = self.packing.open(Watched { inner: self.file, task: None, cancel });
        let unpacked = unpack(reader, compression, dir, style, limits, None);
        unpacked.map(drop).map_err(|source| SolveError::Unpack { name: self.name, source })
    }
}
