//! Operations become snapshots: from the cache, or by doing them.
//!
//! A vertex's key is the digest of what it does, of the keys of what it stands on, and of the *content* of the files it
//! takes in: mode, owner, extended attributes and bytes, not times. So a changed input changes the keys of all that
//! stands on it, and an unchanged one finds its record whatever happened to file times.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use plies_archive::tar::EntryPath;
use plies_archive::{ApplyStyle, UnpackError, compress, unpack};
use plies_cache::contenthash::inroot;
use plies_cache::{Accessor, CacheError, CacheKey, ImmutableRef, KeyBuilder, Parents, RecordOptions, RecordRow, State};
use plies_oci::{Compression, DiffId, ErrorKind, limits};
use plies_store::{Attach, CatalogueError, LayerError, LayerId, Mounted, SnapshotError, Stamp, canceled_inside};

use super::cache_from::CacheFrom;
use super::config::DEFAULT_PATH;
use super::graph::{CopyOp, FilesFrom, Graph, Op, RunOp, VertexId};
use crate::context::{
    self, Chmod, CopyError, CopyOptions, Destination, HashError, Owner, SelectError, Selection, Tree,
};
use crate::dockerfile::{Ignore, IgnoreError, Location, SCRIPT_DIR};
use crate::exec::{
    self, Access, Cancel, ExecError, Executor, MountSource, Network, Step, StepMount, Streams, User, UserError,
    resolve_user,
};
use crate::progress::{Outcome, Progress, Task, Watched};
use crate::records::RecordsError;
use crate::{Canceled, Engine};

/// Goes up when a step comes to mean something else, so that results of an older Plies are not taken for it.
const KEY_VERSION: u32 = 2;

/// Output of one step that is shown, as in BuildKit (`BUILDKIT_STEP_LOG_MAX_SIZE`).
const OUTPUT_BYTES_MAX: usize = 2 << 20;

/// Characters of a command that an error quotes.
const COMMAND_CHARS_MAX: usize = 200;

/// Longest description of a record.
const DESCRIPTION_CHARS_MAX: usize = 300;

/// Why a step could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SolveError {
    /// Its command failed.
    #[error("exit code {code}{}", reason.as_ref().map(|why| format!(" ({why})")).unwrap_or_default())]
    Exit {
        /// The command.
        command: String,
        /// As docker reports it.
        code: i32,
        /// Why, if more is known.
        reason: Option<String>,
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
    #[error("the image would have {layers} layers, the limit LAYERS_MAX is {}", limits::LAYERS_MAX)]
    TooManyLayers {
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
    /// Its archive is of a kind that is not unpacked yet.
    #[error("{name} is {format}-compressed, and only plain, gzip and zstd archives are unpacked yet (use COPY)")]
    Archive {
        /// Which file.
        name: String,
        /// How it is compressed.
        format: &'static str,
    },
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
            Self::Chmod(_) | Self::Archive { .. } | Self::Link { .. } => ErrorKind::InvalidInput,
            Self::TooManyLayers { .. } => ErrorKind::Limit,
            Self::Unpack { source, .. } => source.kind(),
            Self::Directory { .. } | Self::Io { .. } => ErrorKind::Unavailable,
            Self::Cache(source) => source.kind(),
            Self::Image(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
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
}

/// The results of a graph.
#[derive(Debug)]
pub(crate) struct Results {
    solved: HashMap<VertexId, Solved>,
    pub(crate) steps_count: usize,
    pub(crate) cached_count: usize,
}

impl Results {
    /// The result of a vertex of the graph.
    pub(crate) fn of(&self, vertex: VertexId) -> &Solved {
        &self.solved[&vertex]
    }
}

/// Solves graphs.
pub(crate) struct Solver<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) cache: Accessor,
    pub(crate) context: &'a Tree,
    pub(crate) executor: &'a dyn Executor,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) cancel: &'a Cancel,
    pub(crate) no_cache: bool,
    /// Images that are asked for what the cache has not.
    pub(crate) cache_from: &'a CacheFrom,
    /// Say for every step where its result came from.
    pub(crate) explain: bool,
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
enum Source<'a> {
    Context(&'a Tree),
    Stage(Box<Stage>),
}

/// The tree of an earlier stage or of an image.
struct Stage {
    tree: Tree,
    /// Keeps it mounted; the empty tree needs no mount.
    _mounted: Option<Mounted>,
}

impl Source<'_> {
    fn tree(&self) -> &Tree {
        match self {
            Source::Context(tree) => tree,
            Source::Stage(stage) => &stage.tree,
        }
    }
}

impl Solver<'_> {
    /// Solves all vertices of a graph that was lowered for one target: each of them is needed.
    pub(crate) fn solve(&self, graph: &Graph, target: VertexId) -> Result<Results, Failed> {
        let mut results = Results { solved: HashMap::new(), steps_count: 0, cached_count: 0 };
        for (id, vertex) in graph.iter() {
            if self.cancel.is_canceled() {
                return Err(Failed { location: vertex.location, focus: String::new(), error: Canceled.into() });
            }
            let task = (!vertex.name.is_empty()).then(|| Task::start(self.progress, &vertex.name, None));
            let solved = self.vertex(&vertex.op, &vertex.name, &results, task.as_ref());
            let (solved, outcome) = solved.map_err(|error| {
                let error = if canceled_inside(&error) { Canceled.into() } else { error };
                let focus = match &error {
                    SolveError::Select(_) => vertex.op.focus(),
                    _ => String::new(),
                };
                Failed { location: vertex.location, focus, error }
            })?;
            let layers = solved.base_diff_ids.len() + solved.layers.len();
            if layers > limits::LAYERS_MAX {
                let error = SolveError::TooManyLayers { layers };
                return Err(Failed { location: vertex.location, focus: String::new(), error });
            }
            if vertex.op.is_step() {
                results.steps_count += 1;
                results.cached_count += usize::from(outcome == Outcome::Cached);
            }
            if let Some(task) = task {
                task.end(outcome);
            }
            results.solved.insert(id, solved);
        }
        debug_assert!(results.solved.contains_key(&target));
        Ok(results)
    }

    fn vertex(
        &self,
        op: &Op,
        name: &str,
        results: &Results,
        task: Option<&Task<'_>>,
    ) -> Result<(Solved, Outcome), SolveError> {
        match op {
            Op::Scratch => {
                let key = KeyBuilder::new("scratch", KEY_VERSION).finish();
                let solved = Solved { key, tree: None, base_diff_ids: vec![], layers: vec![], made: None };
                Ok((solved, Outcome::Done))
            }
            Op::Image { diff_ids, name } => {
                let key = KeyBuilder::new("image", KEY_VERSION).list(diff_ids.iter().map(DiffId::as_bytes)).finish();
                let base_diff_ids = diff_ids.clone();
                let tree = self.engine.image_record(diff_ids, name, self.cancel).map_err(Box::new)?;
                let solved = Solved { key, tree, base_diff_ids, layers: vec![], made: None };
                Ok((solved, Outcome::Cached))
            }
            Op::Merge { base, over } => {
                let (base, over) = (results.of(*base), results.of(*over));
                let options = RecordOptions { description: Some(short(name)), ..RecordOptions::by("build") };
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
                };
                Ok((solved, Outcome::Done))
            }
            Op::Run { base, run } => {
                let base = results.of(*base);
                let key = run_key(run, &base.key);
                self.step(base, key, name, task, |root, path| self.run(run, root, path, task))
            }
            Op::Directory { base, path, user } => {
                let base = results.of(*base);
                let key = KeyBuilder::new("directory", KEY_VERSION)
                    .input(&base.key)
                    .bytes(path.as_bytes())
                    .bytes(user.as_bytes())
                    .finish();
                self.step(base, key, name, task, |root, _| {
                    let user = self::user(root, user)?;
                    make_directory(root, path, Some(Owner { uid: user.uid, gid: user.gid }))?;
                    Ok(Made::default())
                })
            }
            Op::Copy { base, copy } => {
                let base = results.of(*base);
                let source = self.source(copy.from, results)?;
                let excludes = match copy.excludes.as_slice() {
                    [] => None,
                    patterns => Some(Ignore::from_patterns(patterns.iter().map(String::as_str))?),
                };
                let mut selection = Selection::new(excludes);
                for path in &copy.paths {
                    selection.add(source.tree(), path.as_bytes())?;
                }
                for (name, bytes) in &copy.inline {
                    selection.add_inline(name.as_bytes(), bytes.clone());
                }
                let content = source.tree().hash(&selection)?;
                let key = KeyBuilder::new("copy", KEY_VERSION)
                    .input(&base.key)
                    .bytes(content.as_bytes())
                    .bytes(copy.dest.as_bytes())
                    .list(copy.chown.iter())
                    .list(copy.chmod.iter())
                    .number(copy.unpack.into())
                    .number(copy.link.into())
                    .finish();
                self.step(base, key, name, task, |root, _| {
                    let made = self.copy(copy, &source, &selection, root)?;
                    // A context is a directory that people work in.
                    let changing =
                        matches!(source, Source::Context(_)) && source.tree().hash(&selection).ok() != Some(content);
                    Ok(Made { changing, ..made })
                })
            }
        }
    }

    /// Finds the result of a step in the cache, or does `work` in a tree on top of `base`.
    fn step(
        &self,
        base: &Solved,
        key: CacheKey,
        name: &str,
        task: Option<&Task<'_>>,
        work: impl FnOnce(BorrowedFd<'_>, &Path) -> Result<Made, SolveError>,
    ) -> Result<(Solved, Outcome), SolveError> {
        let explain = |says: &str| {
            if let Some(task) = task.filter(|_| self.explain) {
                task.output(format!("{says}\n").as_bytes());
            }
        };
        if self.no_cache {
            explain("not looked for in the cache, as was asked for");
        } else if let Some(tree) = self.lookup(base, &key)? {
            explain(&format!("cached: record {}", tree.id()));
            return Ok((self.solved(base, key, tree)?, Outcome::Cached));
        } else if let Some((solved, says)) = self.found_in_image(base, &key, name)? {
            explain(&says);
            return Ok((solved, Outcome::Cached));
        } else {
            explain(&format!("not cached: nothing is known by key {key}{}", self.cache_from.and_not_there()));
        }
        let options = RecordOptions { description: Some(short(name)), ..RecordOptions::by("build") };
        let record = self.cache.create(base.tree.as_ref(), &options)?;
        let mounted = record.mount(Attach::InStore)?;
        let path = mounted.path().expect("because it was attached").to_owned();
        let worked = work(mounted.root(), &path);
        let unmounted = mounted.unmount();
        // Why the step failed says more than that its tree was still in use then.
        let Made { on_the_way, changing } = worked?;
        unmounted?;
        let tree = record.seal(&on_the_way, (!changing).then_some(&key))?;
        Ok((self.solved(base, key, tree)?, Outcome::Done))
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
        })
    }

    /// Finds a step's result in an image that the user named as a source, and what to say of it.
    fn found_in_image(
        &self,
        base: &Solved,
        key: &CacheKey,
        name: &str,
    ) -> Result<Option<(Solved, String)>, SolveError> {
        let mut below = base.base_diff_ids.clone();
        for layer in &base.layers {
            // A layer whose diff ID nobody needed yet was made here just now, and came from no image.
            let Some(diff_id) = self.engine.store().layers().info(*layer)?.diff_id else { return Ok(None) };
            below.push(diff_id);
        }
        let Some(found) = self.cache_from.find(&below, key) else { return Ok(None) };
        let Some(diff_id) = found.diff_id else {
            return Ok(Some((Solved { key: *key, made: None, ..base.clone() }, found.says)));
        };
        let options =
            RecordOptions { description: Some(short(name)), created_at: found.created, ..RecordOptions::by("build") };
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
        self.cache.add_result(key, tree.id())?;
        let solved = Solved {
            key: *key,
            tree: Some(tree),
            base_diff_ids: base.base_diff_ids.clone(),
            layers: base.layers.iter().copied().chain([layer]).collect(),
            made: Some(found.created.unwrap_or(row.created_at)),
        };
        Ok(Some((solved, found.says)))
    }

    /// Finds the record that a step's key gave on this very base: the step below may have run again since, with another
    /// result.
    fn lookup(&self, base: &Solved, key: &CacheKey) -> Result<Option<ImmutableRef>, SolveError> {
        let below = base.tree.as_ref().map_or(Parents::None, |tree| Parents::Layer(tree.id()));
        for id in self.cache.results(key)? {
            let found = match self.cache.get(id, &RecordOptions::by("build")) {
                Ok(found) => found,
                // Gone, or of no use: the step runs again.
                Err(CacheError::NotFound { .. } | CacheError::Damaged { .. } | CacheError::NeedsProviders(_)) => {
                    continue;
                }
                Err(other) => return Err(other.into()),
            };
            let row = found.row()?;
            if row.parents == below && self.is_whole(&row) {
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

    fn run(&self, run: &RunOp, root: BorrowedFd<'_>, path: &Path, task: Option<&Task<'_>>) -> Result<Made, SolveError> {
        make_directory(root, &run.working_dir, None)?;
        let os = |(name, value): &(String, String)| (OsString::from(name), OsString::from(value));
        let mut mounts = StepMount::host_network_files();
        let script = run.invocation.script.as_ref();
        let script = script.map(|(name, text)| Script::write(self.engine.store().run_dir(), name, text)).transpose()?;
        mounts.extend(script.as_ref().map(Script::mount));
        let user = user(root, &run.user)?;
        let defaults =
            [("PATH".to_owned(), DEFAULT_PATH.to_owned()), ("HOME".to_owned(), exec::home_of(root, user.uid)?)];
        let step = Step {
            args: run.invocation.argv.iter().map(OsString::from).collect(),
            // Of equal names the last counts.
            env: defaults.iter().chain(&run.unkeyed_env).chain(&run.env).map(os).collect(),
            cwd: PathBuf::from(&run.working_dir),
            user,
            rootfs: path.to_owned(),
            mounts,
            hostname: "buildkitsandbox".into(),
            network: Network::Host,
            streams: Streams::Captured,
        };
        let left_bytes = AtomicUsize::new(OUTPUT_BYTES_MAX);
        let output = || TaskOutput { task, left_bytes: &left_bytes };
        let (mut stdout, mut stderr) = (output(), output());
        let status = match self.executor.run(&step, &mut stdout, &mut stderr, self.cancel) {
            Err(ExecError::Canceled) => return Err(Canceled.into()),
            other => other?,
        };
        if !status.success() {
            let (code, reason) = (status.code(), status.reason().map(str::to_owned));
            return Err(SolveError::Exit { command: run.invocation.argv.join(" "), code, reason });
        }
        Ok(Made::default())
    }

    fn source(&self, from: FilesFrom, results: &Results) -> Result<Source<'_>, SolveError> {
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

    fn copy(
        &self,
        copy: &CopyOp,
        source: &Source<'_>,
        selection: &Selection,
        root: BorrowedFd<'_>,
    ) -> Result<Made, SolveError> {
        let owner = copy.chown.as_ref().map(|chown| owner(root, chown)).transpose()?;
        let chmod = copy.chmod.as_ref().map(|chmod| Chmod::parse(chmod)).transpose()?;
        let dest = Destination::new(b"/", copy.dest.as_bytes());
        let options = CopyOptions { dest, owner, chmod };
        if !copy.unpack {
            context::copy(source.tree(), selection, root, &options)?;
            return Made::by(copy, root);
        }
        // ADD: archives go where they are unpacked, the rest is copied.
        let mut plain = Selection::new(None);
        for item in selection.items() {
            let archive = match item.path() {
                Some(path) if !item.is_dir() => Archive::open(source.tree(), path)?,
                _ => None,
            };
            match archive {
                Some(archive) => {
                    make_directory(root, &copy.dest, owner)?;
                    let dir = inroot::open(root, copy.dest.as_bytes(), rustix::fs::OFlags::DIRECTORY);
                    let dir = dir.map_err(|source| SolveError::Directory { path: copy.dest.clone(), source })?;
                    archive.unpack(dir.as_fd(), self.engine.limits(), self.cancel)?;
                }
                None => plain.push(item.clone()),
            }
        }
        if !plain.items().is_empty() {
            context::copy(source.tree(), &plain, root, &options)?;
        }
        Made::by(copy, root)
    }
}

impl Op {
    /// Whether it counts as a step for people.
    fn is_step(&self) -> bool {
        matches!(self, Op::Run { .. } | Op::Copy { .. } | Op::Directory { .. })
    }

    /// What a complaint about its files points at.
    fn focus(&self) -> String {
        match self {
            Op::Copy { copy, .. } => copy.paths.first().cloned().unwrap_or_default(),
            _ => String::new(),
        }
    }
}

fn run_key(run: &RunOp, base: &CacheKey) -> CacheKey {
    let script = run.invocation.script.iter().flat_map(|(name, text)| [name, text]);
    KeyBuilder::new("run", KEY_VERSION)
        .input(base)
        .list(run.invocation.argv.iter())
        .list(script.collect::<Vec<_>>())
        .list(run.env.iter().flat_map(|(name, value)| [name, value]).collect::<Vec<_>>())
        .bytes(run.working_dir.as_bytes())
        .bytes(run.user.as_bytes())
        .finish()
}

/// A record's description: a Dockerfile's line can hold a whole script.
fn short(name: &str) -> String {
    name.chars().take(DESCRIPTION_CHARS_MAX).collect()
}

/// Distinguishes the scripts of one process.
static NEXT_SCRIPT: AtomicU64 = AtomicU64::new(0);

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
    /// What both streams of the step may still say.
    left_bytes: &'a AtomicUsize,
}

impl Write for TaskOutput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = |left: usize| Some(left.saturating_sub(bytes.len()));
        let left = self.left_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or(0);
        if let Some(task) = self.task.filter(|_| left > 0) {
            task.output(&bytes[..bytes.len().min(left)]);
            if bytes.len() >= left {
                task.output(b"\n[output clipped here, OUTPUT_BYTES_MAX = 2 MiB]\n");
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A here-document that is executed: a file in a directory of its own, gone when dropped.
struct Script {
    dir: PathBuf,
}

impl Script {
    fn write(run_dir: &Path, name: &str, text: &str) -> Result<Self, SolveError> {
        use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
        let dir = run_dir.join(format!("script-{}", NEXT_SCRIPT.fetch_add(1, Ordering::Relaxed)));
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

/// A local file that ADD unpacks.
struct Archive {
    name: String,
    file: std::fs::File,
    compression: Compression,
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
        let head = &head[..length];
        for (magic, format) in [(&b"\xfd7zXZ\0"[..], "xz"), (b"BZh", "bzip2")] {
            if head.starts_with(magic) {
                return Err(SolveError::Archive { name, format });
            }
        }
        let compression = compress::detect(head);
        let mut first = [0; 512];
        let decoder = compress::Decoder::new(file.try_clone().map_err(io)?, compression, &Default::default());
        let peeked = decoder.and_then(|mut decoder| {
            use std::io::Read as _;
            decoder.read_exact(&mut first)
        });
        // What does not decompress to a tar is a file like any other.
        let is_tar = peeked.is_ok() && plies_archive::tar::is_header(&first);
        io::Seek::rewind(&mut &file).map_err(io)?;
        Ok(is_tar.then_some(Self { name, file, compression }))
    }

    fn unpack(self, dir: BorrowedFd<'_>, limits: &plies_archive::Limits, cancel: &Cancel) -> Result<(), SolveError> {
        let style = ApplyStyle::Added;
        let file = Watched { inner: self.file, task: None, cancel };
        let unpacked = unpack(file, self.compression, dir, style, limits, None);
        unpacked.map(drop).map_err(|source| SolveError::Unpack { name: self.name, source })
    }
}
