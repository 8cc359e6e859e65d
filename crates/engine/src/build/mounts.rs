//! `RUN --mount`: what a step sees beside its tree.
//!
//! ```text
//! bind    a view of a stage or an image, or a copy of the context's files; written to, a record that is thrown away
//! cache   a mutable record of type exec.cachemount, found again by its id (and what it began with)
//! tmpfs   the executor's
//! secret  a file in a tmpfs of the step's own, or a variable
//! ssh     a socket in that tmpfs, passed on to the agent that whoever builds names, or to one with the keys they name
//! ```
//!
//! A step's key takes in what a bind mount shows, by content; of the others it takes in how they are asked for.
//!
//! # Locks
//! `CacheMounts::held`, under which records of caches are taken: so two steps that want the same new cache at once get one.
//! One that is given back is noted under it, and unmounted without it; who wants that one waits. A step takes its caches in the order of their ids, so that no two wait for each other.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use plies_cache::contenthash::inroot;
use plies_cache::{CacheError, ImmutableRef, KeyBuilder, MutableRef, RecordOptions, RecordType, State};
use plies_oci::ErrorKind;
use plies_store::{Attach, Mounted};

use super::graph::{FilesFrom, MountOp, RunOp, escaped};
use super::keys::{KeyAgent, KeyError};
use super::solve::{Results, SolveError, Solver, short};
use crate::Canceled;
use crate::context::{self, CopyOptions, Destination, Selection};
use crate::dockerfile::{MountKind, Permissions, Sharing};
use crate::exec::{Access, MemoryDir, MountSource, StepMount};

/// Bytes of a secret, as in BuildKit (`MaxSecretSize`).
pub const SECRET_BYTES_MAX: u64 = 500 << 10;

/// How often a step that waits for a cache looks whether it was told to stop.
const WAIT: Duration = Duration::from_millis(50);

/// The key of the value that a cache's record is found by.
const CACHE_ID: &str = "cache-dir";

/// Where the context's files lie in the record that a bind mount shows.
const BOUND: &str = "/bound";

/// A secret that steps may ask for.
#[derive(Debug, Clone)]
pub struct Secret {
    /// What they ask for it by.
    pub id: String,
    /// Where it is.
    pub source: SecretSource,
}

/// Where a secret is.
#[derive(Clone)]
pub enum SecretSource {
    /// In a file, which is read when a step needs it.
    File(PathBuf),
    /// Here.
    Value(Vec<u8>),
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Value(_) => f.write_str("Value(..)"),
        }
    }
}

impl Secret {
    fn read(&self) -> Result<Vec<u8>, MountError> {
        let too_long = || MountError::SecretTooLong { id: self.id.clone() };
        let bytes = match &self.source {
            SecretSource::Value(bytes) => bytes.clone(),
            SecretSource::File(path) => {
                let io = |source| MountError::Secret { id: self.id.clone(), path: path.clone(), source };
                let file = std::fs::File::open(path).map_err(io)?;
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut io::Read::take(file, SECRET_BYTES_MAX + 1), &mut bytes).map_err(io)?;
                bytes
            }
        };
        if bytes.len() as u64 > SECRET_BYTES_MAX { Err(too_long()) } else { Ok(bytes) }
    }
}

/// The agent that steps may ask to sign.
#[derive(Debug, Clone)]
pub struct SshAgent {
    /// What they ask for it by.
    pub id: String,
    /// Who signs.
    pub source: SshSource,
}

/// Who signs for steps.
#[derive(Debug, Clone)]
pub enum SshSource {
    /// An agent that listens at this socket.
    Socket(PathBuf),
    /// An agent of each step's own, with the keys in these files. They are read when a step needs them, into memory only.
    Keys(Vec<PathBuf>),
}

/// Why a step's mount can't be there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// A required secret was not given.
    #[error("the secret {id:?} was not given: add --secret id={id},src=FILE or --secret id={id},env=NAME")]
    NoSecret {
        /// Which.
        id: String,
    },
    /// A secret's file can't be read.
    #[error("read the secret {id:?} from {}", path.display())]
    Secret {
        /// Which.
        id: String,
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A secret is too long.
    #[error("the secret {id:?} has more than {SECRET_BYTES_MAX} bytes, the limit SECRET_BYTES_MAX")]
    SecretTooLong {
        /// Which.
        id: String,
    },
    /// A secret that is to be a variable is not text.
    #[error("the secret {id:?} cannot be a variable: it is not UTF-8, or holds a NUL byte")]
    SecretNotText {
        /// Which.
        id: String,
    },
    /// A required agent was not given.
    #[error("no SSH agent {id:?} was given: add --ssh {id}, or --ssh {id}=SOCKET or {id}=KEYFILE")]
    NoAgent {
        /// Which.
        id: String,
    },
    /// An agent of the step's own does not get its keys.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A mount's source is not there.
    #[error("{path:?}, the source of the mount at {target}")]
    NoSource {
        /// What was looked for.
        path: String,
        /// Where it was to be seen.
        target: String,
        /// Why it can't be taken.
        #[source]
        source: io::Error,
    },
    /// What is needed around a mount can't be made.
    #[error("{op} for the mount at {target}")]
    Prepare {
        /// What was tried.
        op: &'static str,
        /// Where the mount was to be seen.
        target: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl MountError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSecret { .. } | Self::NoAgent { .. } | Self::SecretNotText { .. } => ErrorKind::InvalidInput,
            Self::SecretTooLong { .. } => ErrorKind::Limit,
            Self::Keys(KeyError::Refused { .. }) => ErrorKind::InvalidInput,
            Self::Secret { source, .. } | Self::NoSource { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorKind::NotFound
            }
            Self::Secret { .. } | Self::NoSource { .. } | Self::Prepare { .. } | Self::Keys(_) => {
                ErrorKind::Unavailable
            }
        }
    }
}

/// The caches that steps of this process use now.
#[derive(Debug, Default)]
pub(crate) struct CacheMounts {
    held: Mutex<HeldCaches>,
    /// One was given back.
    freed: Condvar,
}

#[derive(Debug, Default)]
struct HeldCaches {
    /// Shared ones, by what they are found by.
    shared: HashMap<String, Weak<CacheDir>>,
    /// By the same, those that are being given back: taken still, and free in a moment.
    ending: Vec<String>,
}

impl CacheMounts {
    /// Gives back a cache that nobody uses any more. An unmount may have to wait, and others want other caches meanwhile.
    fn give_back<T>(&self, mut held: MutexGuard<'_, HeldCaches>, index: &str, work: impl FnOnce() -> T) -> T {
        held.ending.push(index.to_owned());
        drop(held);
        let done = work();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = held.ending.iter().position(|ending| ending == index) {
            held.ending.swap_remove(at);
        }
        drop(held);
        self.freed.notify_all();
        done
    }
}

/// A cache, mounted.
#[derive(Debug)]
struct CacheDir {
    // The mount goes before what it shows.
    mounted: Mounted,
    record: MutableRef,
    /// What it is found by.
    index: String,
}

/// A step's use of a cache.
struct CacheUse<'a> {
    mounts: &'a CacheMounts,
    /// `None` once given back.
    dir: Option<Arc<CacheDir>>,
}

impl CacheUse<'_> {
    fn root(&self) -> BorrowedFd<'_> {
        self.dir.as_ref().expect("because it was not given back").mounted.root()
    }

    fn end(&mut self) -> Result<(), SolveError> {
        let held = self.mounts.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(CacheDir { mounted, record, index }) = self.dir.take().and_then(Arc::into_inner) else {
            return Ok(());
        };
        self.mounts.give_back(held, &index, || {
            let unmounted = mounted.unmount();
            record.release()?;
            Ok(unmounted?)
        })
    }
}

impl Drop for CacheUse<'_> {
    fn drop(&mut self) {
        // Told by `end` where nothing else failed.
        let _ = self.end();
    }
}

/// What keeps a step's mounts there, and what the step is to be started with.
#[derive(Default)]
pub(super) struct Prepared<'a> {
    pub(super) mounts: Vec<StepMount>,
    /// Variables for the step; secrets among them.
    pub(super) env: Vec<(String, String)>,
    /// Whether one of them is secret.
    pub(super) secret: bool,
    agents: Vec<Agent>,
    key_agents: Vec<KeyAgent>,
    memory: Option<MemoryDir>,
    views: Vec<Mounted>,
    copies: Vec<(Mounted, MutableRef)>,
    caches: Vec<CacheUse<'a>>,
}

impl Prepared<'_> {
    /// Takes all of it away.
    pub(super) fn end(mut self) -> Result<(), SolveError> {
        drop(std::mem::take(&mut self.agents));
        drop(std::mem::take(&mut self.key_agents));
        drop(self.memory.take());
        for view in self.views.drain(..) {
            view.unmount()?;
        }
        for (mounted, record) in self.copies.drain(..) {
            mounted.unmount()?;
            record.release()?;
        }
        self.caches.iter_mut().try_for_each(CacheUse::end)
    }

    fn memory(&mut self, run_dir: &Path) -> Result<&Path, SolveError> {
        if self.memory.is_none() {
            self.memory = Some(MemoryDir::new(run_dir)?);
        }
        Ok(self.memory.as_ref().expect("because it was just made").path())
    }
}

impl Solver<'_> {
    /// Adds to a step's key what its mounts bring in.
    pub(super) fn key_of_mounts(
        &self,
        run: &RunOp,
        results: &Results,
        mut key: KeyBuilder,
    ) -> Result<KeyBuilder, SolveError> {
        let permissions = |of: &Permissions| [of.mode, of.uid, of.gid].map(|of| of.map_or(u64::MAX, u64::from));
        for mount in &run.mounts {
            key = key.list(mount.target.iter());
            let (name, words, numbers) = match &mount.kind {
                MountKind::Bind { source, read_only } => {
                    let from = self.source(mount.from.unwrap_or(FilesFrom::Context), results)?;
                    let mut selection = Selection::new(None);
                    selection.add(from.tree(), source_pattern(source).as_bytes())?;
                    key = key.bytes(from.tree().hash(&selection)?.as_bytes());
                    ("bind", vec![source], vec![u64::from(*read_only)])
                }
                MountKind::Cache { id, sharing, source, read_only, permissions: of } => {
                    if let Some(FilesFrom::Vertex(vertex)) = mount.from {
                        key = key.input(&results.of(vertex).key);
                    }
                    let numbers = [*sharing as u64, u64::from(*read_only)].into_iter().chain(permissions(of));
                    ("cache", vec![id, source], numbers.collect())
                }
                MountKind::Tmpfs { size_bytes, read_only } => {
                    ("tmpfs", vec![], vec![size_bytes.unwrap_or(u64::MAX), u64::from(*read_only)])
                }
                MountKind::Secret { id, env, required, permissions: of } => {
                    let words = [id].into_iter().chain(env);
                    let numbers = [u64::from(*required)].into_iter().chain(permissions(of));
                    ("secret", words.collect(), numbers.collect())
                }
                MountKind::Ssh { id, required, permissions: of } => {
                    let numbers = [u64::from(*required)].into_iter().chain(permissions(of));
                    ("ssh", vec![id], numbers.collect())
                }
            };
            key = numbers.into_iter().fold(key.bytes(name.as_bytes()).list(words), KeyBuilder::number);
        }
        Ok(key)
    }

    /// Makes what a step's mounts show.
    pub(super) fn prepare_mounts(&self, run: &RunOp, results: &Results) -> Result<Prepared<'_>, SolveError> {
        let mut prepared = Prepared::default();
        // Caches first, in the order in which all steps take them.
        let mut caches: Vec<(usize, &MountOp)> = run.mounts.iter().enumerate().collect();
        caches.retain(|(_, mount)| matches!(mount.kind, MountKind::Cache { .. }));
        caches.sort_by_key(|(_, mount)| match &mount.kind {
            MountKind::Cache { id, .. } => id,
            _ => unreachable!("because the others were left out"),
        });
        let mut paths = HashMap::new();
        for (index, mount) in caches {
            paths.insert(index, self.cache_dir(mount, results, &mut prepared)?);
        }
        let access = |read_only: bool| if read_only { Access::ReadOnly } else { Access::ReadWrite };
        for (index, mount) in run.mounts.iter().enumerate() {
            let source = match &mount.kind {
                MountKind::Cache { read_only, .. } => {
                    let path = paths.remove(&index).expect("because all caches were taken");
                    Some(MountSource::Bind { path, access: access(*read_only) })
                }
                MountKind::Bind { source, read_only } => {
                    let path = self.bound(mount, source, *read_only, results, &mut prepared)?;
                    Some(MountSource::Bind { path, access: access(*read_only) })
                }
                MountKind::Tmpfs { size_bytes, read_only } => {
                    Some(MountSource::Tmpfs { size_bytes: *size_bytes, access: access(*read_only) })
                }
                MountKind::Secret { id, env, required, permissions } => {
                    let secret = self.secrets.iter().find(|secret| secret.id == *id);
                    let Some(secret) = secret else {
                        if *required {
                            return Err(MountError::NoSecret { id: id.clone() }.into());
                        }
                        continue;
                    };
                    let bytes = secret.read()?;
                    if let Some(name) = env {
                        let text = String::from_utf8(bytes.clone()).ok().filter(|text| !text.contains('\0'));
                        let value = text.ok_or_else(|| MountError::SecretNotText { id: id.clone() })?;
                        prepared.env.push((name.clone(), value));
                        prepared.secret = true;
                    }
                    match &mount.target {
                        None => None,
                        Some(target) => {
                            let path = prepared.memory(self.engine.store().run_dir())?.join(format!("secret-{index}"));
                            write_secret(&path, &bytes, permissions)
                                .map_err(|source| prepare("keep a secret", target, source))?;
                            Some(MountSource::Bind { path, access: Access::ReadOnly })
                        }
                    }
                }
                MountKind::Ssh { id, required, permissions } => {
                    let agent = self.ssh.iter().find(|agent| agent.id == *id);
                    let Some(agent) = agent else {
                        if *required {
                            return Err(MountError::NoAgent { id: id.clone() }.into());
                        }
                        continue;
                    };
                    let target = mount.target.as_deref().unwrap_or_default();
                    let memory = prepared.memory(self.engine.store().run_dir())?;
                    let (path, own) = (memory.join(format!("ssh-{index}")), memory.join(format!("keys-{index}")));
                    let socket = match &agent.source {
                        SshSource::Socket(socket) => socket,
                        SshSource::Keys(keys) => {
                            prepared.key_agents.push(KeyAgent::start(&own, keys).map_err(MountError::from)?);
                            &own
                        }
                    };
                    let agent = Agent::listen(&path, socket, permissions);
                    prepared.agents.push(agent.map_err(|source| prepare("reach the SSH agent", target, source))?);
                    prepared.env.push(("SSH_AUTH_SOCK".to_owned(), target.to_owned()));
                    Some(MountSource::Bind { path, access: Access::ReadOnly })
                }
            };
            if let (Some(source), Some(target)) = (source, &mount.target) {
                prepared.mounts.push(StepMount { target: target.into(), source });
            }
        }
        Ok(prepared)
    }

    /// The directory or the file that a bind mount shows.
    fn bound(
        &self,
        mount: &MountOp,
        source: &str,
        read_only: bool,
        results: &Results,
        prepared: &mut Prepared<'_>,
    ) -> Result<PathBuf, SolveError> {
        let target = mount.target.as_deref().unwrap_or_default();
        let options =
            || RecordOptions { description: Some(format!("files bound to {target}")), ..RecordOptions::by("build") };
        let tree = match mount.from {
            Some(FilesFrom::Vertex(vertex)) => results.of(vertex).tree.as_ref(),
            // Ignored files are not there, owners are root: a copy, and what is written to it goes with it.
            Some(FilesFrom::Context) | None => {
                let mut selection = Selection::new(None);
                selection.add(self.context, source_pattern(source).as_bytes())?;
                let record = self.cache.create(None, &options())?;
                let mounted = record.mount(Attach::InStore)?;
                let dest = Destination::new(b"/", BOUND.as_bytes());
                context::copy(
                    self.context,
                    &selection,
                    mounted.root(),
                    &CopyOptions { dest, owner: None, chmod: None },
                )?;
                let path = host_path(mounted.root(), BOUND, target)?;
                prepared.copies.push((mounted, record));
                return Ok(path);
            }
        };
        let (path, keep) = match (tree, read_only) {
            (Some(tree), true) => {
                let mounted = tree.mount(Attach::InStore, self.cancel)?;
                (mounted.as_ref().map(|mounted| host_path(mounted.root(), source, target)), mounted)
            }
            _ => (None, None),
        };
        if let (Some(path), Some(mounted)) = (path, keep) {
            prepared.views.push(mounted);
            return path;
        }
        let record = self.cache.create(tree, &options())?;
        let mounted = record.mount(Attach::InStore)?;
        let path = host_path(mounted.root(), source, target);
        prepared.copies.push((mounted, record));
        path
    }

    /// Takes a cache for a step and tells where it lies.
    fn cache_dir<'s>(
        &'s self,
        mount: &MountOp,
        results: &Results,
        prepared: &mut Prepared<'s>,
    ) -> Result<PathBuf, SolveError> {
        let MountKind::Cache { id, sharing, source, permissions, .. } = &mount.kind else {
            unreachable!("because the caller asks for caches")
        };
        let target = mount.target.as_deref().unwrap_or_default();
        let seed = match mount.from {
            Some(FilesFrom::Vertex(vertex)) => results.of(vertex).tree.as_ref(),
            _ => None,
        };
        // As in BuildKit: what a cache began with is a part of its name.
        let seeded = seed.map(|tree| format!(":{}", tree.id())).unwrap_or_default();
        let index = format!("{CACHE_ID}:{id}{seeded}");
        let mounts = self.engine.cache_mounts();
        let mut held = mounts.held.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = loop {
            if *sharing == Sharing::Shared
                && let Some(dir) = held.shared.get(&index).and_then(Weak::upgrade)
            {
                break dir;
            }
            match self.free_cache(&index)? {
                Free::Found(record) => break self.mount_cache(record, &index)?,
                Free::Taken if *sharing == Sharing::Locked || held.ending.contains(&index) => {
                    if self.cancel.is_canceled() {
                        return Err(Canceled.into());
                    }
                    let waited = mounts.freed.wait_timeout(held, WAIT);
                    held = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Free::Taken | Free::Nothing => break self.new_cache(id, &index, target, seed, permissions)?,
            }
        };
        if *sharing == Sharing::Shared {
            held.shared.retain(|_, dir| dir.strong_count() > 0);
            held.shared.insert(index, Arc::downgrade(&dir));
        }
        drop(held);
        let used = CacheUse { mounts, dir: Some(dir) };
        let path = host_path(used.root(), source, target);
        prepared.caches.push(used);
        path
    }

    fn free_cache(&self, index: &str) -> Result<Free, SolveError> {
        let mut taken = false;
        for id in self.cache.search(index)? {
            match self.cache.get_mutable(id, &RecordOptions::by("build")) {
                Ok(record) => {
                    if let State::Mutable { active, .. } = record.row()?.state {
                        self.engine.check_not_mounted(active).map_err(Box::new)?;
                    }
                    return Ok(Free::Found(record));
                }
                Err(CacheError::Locked { .. }) => taken = true,
                Err(CacheError::NotFound { .. } | CacheError::Damaged { .. } | CacheError::WrongKind { .. }) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(if taken { Free::Taken } else { Free::Nothing })
    }

    fn mount_cache(&self, record: MutableRef, index: &str) -> Result<Arc<CacheDir>, SolveError> {
        let mounted = record.mount(Attach::InStore)?;
        Ok(Arc::new(CacheDir { mounted, record, index: index.to_owned() }))
    }

    fn new_cache(
        &self,
        id: &str,
        index: &str,
        target: &str,
        seed: Option<&ImmutableRef>,
        permissions: &Permissions,
    ) -> Result<Arc<CacheDir>, SolveError> {
        let options = RecordOptions {
            description: Some(short(&format!("cached mount {target} with id {id:?}"))),
            record_type: Some(RecordType::CacheMount),
            retain: Some(true),
            ..RecordOptions::by("build")
        };
        let dir = self.mount_cache(self.cache.create(seed, &options)?, index)?;
        permit(dir.mounted.root(), permissions)
            .map_err(|source| prepare("set mode and owner of a new cache", target, source))?;
        self.cache.set_value(dir.record.id(), CACHE_ID, id, Some(index))?;
        Ok(dir)
    }
}

/// What there is of a cache.
enum Free {
    Found(MutableRef),
    /// Only such as other steps hold.
    Taken,
    Nothing,
}

fn prepare(op: &'static str, target: &str, source: io::Error) -> MountError {
    MountError::Prepare { op, target: target.to_owned(), source }
}

/// A mount's source as a pattern that stands for nothing else.
fn source_pattern(source: &str) -> String {
    if source.is_empty() { "/".to_owned() } else { escaped(source) }
}

/// Where the host sees a path of a mounted tree; links on the way are followed inside the tree.
fn host_path(root: BorrowedFd<'_>, path: &str, target: &str) -> Result<PathBuf, SolveError> {
    let find = || -> io::Result<PathBuf> {
        let handle = match path {
            "" => rustix::fs::openat(root, ".", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())?,
            path => inroot::open(root, path.as_bytes(), rustix::fs::OFlags::PATH)?,
        };
        std::fs::read_link(inroot::fd_path(handle.as_fd()))
    };
    find().map_err(|source| MountError::NoSource { path: path.to_owned(), target: target.to_owned(), source }.into())
}

/// Sets what is given of mode and owner.
fn permit(file: BorrowedFd<'_>, permissions: &Permissions) -> io::Result<()> {
    let (uid, gid) = (permissions.uid.map(rustix::fs::Uid::from_raw), permissions.gid.map(rustix::fs::Gid::from_raw));
    rustix::fs::fchown(file, uid, gid)?;
    if let Some(mode) = permissions.mode {
        rustix::fs::fchmod(file, rustix::fs::Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// BuildKit's defaults: 0400, root's.
fn write_secret(path: &Path, bytes: &[u8], permissions: &Permissions) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    permit(file.as_fd(), &Permissions { mode: permissions.mode.or(Some(0o400)), ..*permissions })
}

/// Passes on what comes over a socket to an agent's: the agent's own may not be the step's user's to open.
struct Agent {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    fn listen(path: &Path, agent: &Path, permissions: &Permissions) -> io::Result<Self> {
        // Somebody is to answer: told now, a wrong socket is no riddle inside the step.
        drop(UnixStream::connect(agent)?);
        let listener = UnixListener::bind(path)?;
        let (uid, gid) = (permissions.uid.unwrap_or(0), permissions.gid.unwrap_or(0));
        std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(permissions.mode.unwrap_or(0o600)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (agent, stopped) = (agent.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            for client in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let Ok(client) = client else { continue };
                let agent = agent.clone();
                // Ends with the step, whose processes hold the other end.
                std::thread::spawn(move || drop(UnixStream::connect(agent).and_then(|agent| pass_on(client, agent))));
            }
        });
        Ok(Self { path: path.to_owned(), stop, thread: Some(thread) })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes it from waiting for the next one.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            drop(thread.join());
        }
    }
}

/// Copies both ways until both ends have ended.
fn pass_on(client: UnixStream, agent: UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_agent) = (client.try_clone()?, agent.try_clone()?);
    let asking = std::thread::spawn(move || {
        let copied = io::copy(&mut from_client, &mut to_agent);
        drop(to_agent.shutdown(std::net::Shutdown::Write));
        copied
    });
    let (mut from_agent, mut to_client) = (agent, client);
    let answered = io::copy(&mut from_agent, &mut to_client);
    drop(to_client.shutdown(std::net::Shutdown::Both));
    drop(asking.join());
    answered.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_asked_and_answers() {
        let dir = tempfile::tempdir().unwrap();
        let (path, socket) = (dir.path().join("step"), dir.path().join("agent"));
        let nobody = Agent::listen(&path, &socket, &Permissions::default());
        assert!(nobody.is_err());
        let listener = UnixListener::bind(&socket).unwrap();
        let real = std::thread::spawn(move || {
            // First only to see that somebody is there.
            drop(listener.accept().unwrap());
            let (mut client, _) = listener.accept().unwrap();
            let mut asked = String::new();
            io::Read::read_to_string(&mut client, &mut asked).unwrap();
            client.write_all(b"signed").unwrap();
            asked
        });
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let permissions = Permissions { mode: Some(0o640), uid: Some(uid), gid: Some(gid) };
        let agent = Agent::listen(&path, &socket, &permissions).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let mut step = UnixStream::connect(&path).unwrap();
        step.write_all(b"sign this").unwrap();
        step.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        io::Read::read_to_string(&mut step, &mut answer).unwrap();
        assert_eq!((answer.as_str(), real.join().unwrap().as_str()), ("signed", "sign this"));
        drop(agent);
    }

    #[test]
    fn while_a_cache_is_unmounted_others_can_be_taken() {
        let mounts = CacheMounts::default();
        let now = || mounts.held.try_lock().expect("because nobody holds it").ending.clone();
        mounts.give_back(mounts.held.lock().unwrap(), "one", || {
            assert_eq!(now(), ["one"]);
            mounts.give_back(mounts.held.lock().unwrap(), "one", || assert_eq!(now(), ["one", "one"]));
            assert_eq!(now(), ["one"]);
        });
        assert!(now().is_empty());
    }

    #[test]
    fn a_secret_is_in_no_message() {
        let secret = Secret { id: "s".into(), source: SecretSource::Value(b"hidden".to_vec()) };
        assert!(!format!("{secret:?}").contains("hidden"));
        let long = Secret { id: "s".into(), source: SecretSource::Value(vec![0; SECRET_BYTES_MAX as usize + 1]) };
        assert!(matches!(long.read(), Err(MountError::SecretTooLong { .. })));
    }
}
