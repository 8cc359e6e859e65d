//! `ply run`, `ply mount`, `ply umount`: look inside, try.
//!
//! A mount outlives the process that made it, so what it shows is held in the store under the owner `mount:<path>`,
//! until `ply umount`, or until gc sees that nothing is mounted there any more (after a restart of the machine).

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};

use plies_cache::{CacheError, RecordOptions, State};
use plies_image::{Found, ImageError};
use plies_oci::{ErrorKind, Platform};
use plies_store::fsck::{Change, Findings, Remedy};
use plies_store::{
    ActiveId, ActiveOptions, Attach, CatalogueError, GcMode, Lease, MountOptions, Mounted, Owner, Resource, Row,
    Rows as _, SnapshotError, SnapshotId, Table, unmount_patiently,
};
use serde::{Deserialize, Serialize};

use crate::Engine;
use crate::build::SolveError;
use crate::exec::{self, Cancel, ExecError, ExecutorChoice, Network, Step, StepMount, Streams, UserError};
use crate::images::ImagesError;
use crate::load::LoadError;
use crate::progress::{Progress, Silent};
use crate::pull::PullPolicy;
use crate::records::RecordsError;

/// Where `ply mount` has mounted what.
pub(crate) const MOUNTS: Table<Vec<u8>, MountRow> = Table::new("engine.mounts");

/// A mount of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountRow {
    what: Mount,
    place: Place,
}

/// Where a mount can be seen: other processes may have other mounts, and after a restart there are none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    boot_id: String,
    /// Inode of the mount namespace.
    namespace: u64,
}

impl Place {
    fn here() -> Result<Self, RunError> {
        let io = |path: &'static str| move |source| RunError::Directory { dir: path.into(), source };
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        const NAMESPACE: &str = "/proc/self/ns/mnt";
        let boot_id = std::fs::read_to_string(BOOT_ID).map_err(io(BOOT_ID))?.trim().to_owned();
        let namespace = std::fs::metadata(NAMESPACE).map_err(io(NAMESPACE))?.ino();
        Ok(Self { boot_id, namespace })
    }
}

/// What is mounted on a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Mount {
    /// A tree to read.
    View(SnapshotId),
    /// A mutable record.
    Record(ActiveId),
    /// An upper that goes with the mount.
    Scratch(ActiveId),
}

impl Row for MountRow {
    const VERSION: u8 = 1;
}

/// Why a tree could not be mounted, or a command not be run in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// There is neither an image nor a record of this name.
    #[error("no image and no record {wanted:?} (see `ply images`, `ply ref ls`)")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// Finding the image.
    #[error(transparent)]
    Image(#[from] ImagesError),
    /// Fetching the layers of an image that was pulled without them.
    #[error(transparent)]
    Fetch(#[from] Box<LoadError>),
    /// Finding the record.
    #[error(transparent)]
    Record(#[from] RecordsError),
    /// The image has neither ENTRYPOINT nor CMD.
    #[error("image {image} has no command of its own: give one")]
    NoCommand {
        /// The image.
        image: String,
    },
    /// There is a mount of ours already.
    #[error("{} is a mount of ply's already", dir.display())]
    Mounted {
        /// Where.
        dir: PathBuf,
    },
    /// The mount would cover the store itself.
    #[error("{} is part of the state directory or holds it: mount somewhere else", dir.display())]
    OverStore {
        /// Where.
        dir: PathBuf,
    },
    /// The record, or the writable layer, is mounted.
    #[error("it is mounted on {}: unmount it first", dir.display())]
    RecordMounted {
        /// Where.
        dir: PathBuf,
    },
    /// There is no mount of ours.
    #[error("{} is no mount of ply's", dir.display())]
    NotMounted {
        /// Where.
        dir: PathBuf,
    },
    /// A mutable record can only be mounted to be written.
    #[error("record {record} is mutable: mount it with --rw")]
    Mutable {
        /// Which.
        record: String,
    },
    /// It is mounted where this process cannot see it.
    #[error("{} is mounted in another mount namespace: unmount it there", dir.display())]
    ElsewhereMounted {
        /// Where.
        dir: PathBuf,
    },
    /// The mount could not be undone.
    #[error("unmount {} (who uses it: fuser -m)", dir.display())]
    Unmount {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory can't be used.
    #[error("mount on {}", dir.display())]
    Directory {
        /// Which.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The user to run as.
    #[error(transparent)]
    User(#[from] UserError),
    /// The command could not be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// Preparing the tree.
    #[error(transparent)]
    Prepare(#[from] SolveError),
    /// Mounting.
    #[error("mount or unmount a tree")]
    Snapshot(#[from] SnapshotError),
    /// The build cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
}

impl From<ImageError> for RunError {
    fn from(source: ImageError) -> Self {
        Self::Image(source.into())
    }
}

impl RunError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } | Self::NotMounted { .. } => ErrorKind::NotFound,
            Self::Mounted { .. } => ErrorKind::AlreadyExists,
            Self::RecordMounted { .. } | Self::ElsewhereMounted { .. } | Self::Unmount { .. } => ErrorKind::Busy,
            Self::NoCommand { .. } | Self::Mutable { .. } | Self::OverStore { .. } => ErrorKind::InvalidInput,
            Self::Directory { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Directory { .. } => ErrorKind::Unavailable,
            Self::Image(source) => source.kind(),
            Self::Fetch(source) => source.kind(),
            Self::Record(source) => source.kind(),
            Self::User(source) => source.kind(),
            Self::Exec(source) => source.kind(),
            Self::Prepare(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Cache(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// A command to run in an image.
#[derive(Debug, Clone, Default)]
pub struct RunRequest {
    /// The image's name or ID.
    pub image: String,
    /// What it is to run on; this machine, by default.
    pub platform: Option<Platform>,
    /// Whether it is pulled.
    pub pull: PullPolicy,
    /// The command; empty means the image's own.
    pub command: Vec<OsString>,
    /// What runs it.
    pub executor: ExecutorChoice,
    /// Directories in which OCI runtimes are looked for.
    pub search_path: Vec<PathBuf>,
    /// Whether it is given a terminal.
    pub terminal: bool,
}

/// What a name given to `ply mount` means.
pub(crate) enum Target {
    /// A finished tree; `None` is the empty one.
    Tree(Option<SnapshotId>),
    /// A mutable record's.
    Mutable(ActiveId),
}

impl Engine {
    /// Runs a command in an image, with this process's streams, and tells its exit code. What it changes is thrown
    /// away.
    ///
    /// # Errors
    /// [`RunError`]. A command that fails is not an error.
    pub fn run(&self, request: &RunRequest, progress: &dyn Progress, cancel: &Cancel) -> Result<i32, RunError> {
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        let found = match request.pull {
            PullPolicy::Never => self.find_image(&request.image)?,
            pull => {
                let always = pull == PullPolicy::Always;
                self.ensure_image(&request.image, always, &platform, progress, cancel).map_err(Box::new)?
            }
        };
        let found = self.whole_image(found, progress, cancel).map_err(Box::new)?;
        let image = self.config_of(found.id)?;
        let config = crate::build::Config::from_image(&image);
        let mut args: Vec<OsString> = config.entrypoint().iter().map(OsString::from).collect();
        match request.command.as_slice() {
            [] => args.extend(config.cmd().iter().map(OsString::from)),
            command => args.extend_from_slice(command),
        }
        if args.is_empty() {
            return Err(RunError::NoCommand { image: request.image.clone() });
        }
        let executor = exec::pick(&request.executor, self.store().run_dir(), &request.search_path)?;
        let code = self.with_lease(&format!("run {}", request.image), |lease| {
            let snapshots = self.store().snapshots();
            let active = snapshots.prepare(found.row.snapshot, lease, ActiveOptions { volatile: true })?;
            let mounted = snapshots.mount_active(active, Attach::InStore)?;
            self.run_in(mounted, &found, &config, args, request, &*executor, cancel)
        })?;
        // What cannot be removed now goes with the next collection; the command has run all the same.
        drop(self.store().gc(GcMode::Run));
        Ok(code)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one request, each of its own type")]
    fn run_in(
        &self,
        mounted: Mounted,
        found: &Found,
        config: &crate::build::Config,
        args: Vec<OsString>,
        request: &RunRequest,
        executor: &dyn exec::Executor,
        cancel: &Cancel,
    ) -> Result<i32, RunError> {
        let rootfs = mounted.path().expect("because it was attached").to_owned();
        crate::build::make_directory(mounted.root(), config.working_dir(), None)?;
        let user = crate::build::user(mounted.root(), config.user())?;
        let home = exec::home_of(mounted.root(), user.uid)?;
        let mut env: Vec<(OsString, OsString)> =
            vec![("PATH".into(), crate::build::DEFAULT_PATH.into()), ("HOME".into(), home.into())];
        if request.terminal {
            env.push(("TERM".into(), "xterm".into()));
        }
        env.extend(config.env().iter().map(|line| {
            let (name, value) = line.split_once('=').unwrap_or((line, ""));
            (name.into(), value.into())
        }));
        let step = Step {
            args,
            env,
            cwd: PathBuf::from(config.working_dir()),
            user,
            rootfs,
            mounts: StepMount::host_network_files(),
            hostname: found.id.hex()[..12].to_owned(),
            network: Network::Host,
            limits: Vec::new(),
            insecure: false,
            secret: false,
            streams: Streams::Inherited { terminal: request.terminal },
        };
        let status = executor.run(&step, &mut io::stdout(), &mut io::stderr(), cancel);
        let unmounted = mounted.unmount();
        // What became of the command is what the caller asked for.
        let code = status?.code();
        unmounted?;
        Ok(code)
    }

    /// Mounts an image or a record on a directory until [`Engine::umount`]. With `rw`, a mutable record is written
    /// itself; anything else gets an upper of its own that goes with the mount.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn mount(&self, wanted: &str, dir: &Path, rw: bool) -> Result<(), RunError> {
        let turn = self.mounts_turn();
        self.free_place(dir)?;
        // What is wanted may have to be fetched first.
        drop(turn);
        self.with_lease(&format!("mount {wanted}"), |lease| self.mount_held(wanted, dir, rw, lease))
    }

    /// Held while a mount and its row are made or taken away, and while the two are held against each other: somebody else
    /// would take a row whose mount is about to be there for one of a mount that is gone.
    fn mounts_turn(&self) -> MutexGuard<'_, ()> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory that can be mounted on, and its key. To be asked in one's turn.
    fn free_place(&self, dir: &Path) -> Result<(PathBuf, Vec<u8>), RunError> {
        let dir = dir.canonicalize().map_err(|source| RunError::Directory { dir: dir.to_owned(), source })?;
        // The state directory may have been named by a link.
        let root = self.store().root();
        let root = root.canonicalize().map_err(|source| RunError::Directory { dir: root.to_owned(), source })?;
        if dir.starts_with(&root) || root.starts_with(&dir) {
            return Err(RunError::OverStore { dir });
        }
        let key = dir.as_os_str().as_bytes().to_vec();
        if let Some(row) = self.store().read(|rows| rows.get(&MOUNTS, &key))? {
            if !is_over(&dir, &row, &Place::here()?) {
                return Err(RunError::Mounted { dir });
            }
            self.forget_mount(&key)?;
        }
        Ok((dir, key))
    }

    /// As [`Engine::mount`], of an active that somebody else holds.
    pub(crate) fn mount_writable(
        &self,
        active: ActiveId,
        options: MountOptions<'_>,
        dir: &Path,
    ) -> Result<(), RunError> {
        self.mount_what(Mount::Record(active), options, dir)
    }

    /// Where an active is mounted by a process that has ended since.
    pub(crate) fn mounted_on(&self, active: ActiveId) -> Result<Option<PathBuf>, RunError> {
        let _turn = self.mounts_turn();
        self.mounted_on_in_turn(active)
    }

    fn mounted_on_in_turn(&self, active: ActiveId) -> Result<Option<PathBuf>, RunError> {
        for (key, row) in self.store().read(|rows| rows.readable(&MOUNTS))? {
            let dir = PathBuf::from(OsString::from_vec(key));
            if row.what == Mount::Record(active) && !is_over(&dir, &row, &Place::here()?) {
                return Ok(Some(dir));
            }
        }
        Ok(None)
    }

    fn mount_held(&self, wanted: &str, dir: &Path, rw: bool, lease: &Lease) -> Result<(), RunError> {
        let snapshots = self.store().snapshots();
        let what = match (self.target(wanted)?, rw) {
            (Target::Mutable(active), true) => Mount::Record(active),
            (Target::Mutable(_), false) => return Err(RunError::Mutable { record: wanted.to_owned() }),
            (Target::Tree(Some(snapshot)), false) if snapshots.views_can_be_kept() => Mount::View(snapshot),
            // The empty tree has no snapshot, and a copy would not outlive this process: an upper serves for both.
            (Target::Tree(tree), _) => {
                Mount::Scratch(snapshots.prepare(tree, lease, ActiveOptions { volatile: false })?)
            }
        };
        self.mount_what(what, MountOptions::default(), dir)
    }

    fn mount_what(&self, what: Mount, options: MountOptions<'_>, dir: &Path) -> Result<(), RunError> {
        let _turn = self.mounts_turn();
        let (dir, key) = self.free_place(dir)?;
        if let Mount::Record(active) = what {
            self.mounted_on_in_turn(active)?.map_or(Ok(()), |dir| Err(RunError::RecordMounted { dir }))?;
        }
        let snapshots = self.store().snapshots();
        // Held before it is mounted: a crash in between leaves a hold that the next gc sees to be for nothing, rather
        // than a mount whose layers are collected under it.
        let owner = owner(&key);
        let row = MountRow { what, place: Place::here()? };
        self.store().write(|tx| {
            match what {
                Mount::View(snapshot) => tx.hold(&owner, snapshot)?,
                Mount::Record(active) | Mount::Scratch(active) => tx.hold(&owner, active)?,
            }
            tx.put(&MOUNTS, &key, &row)
        })?;
        let mounted = match what {
            Mount::View(snapshot) => snapshots.view(snapshot, Attach::At(&dir)),
            Mount::Record(active) | Mount::Scratch(active) => {
                snapshots.mount_active_with(active, options, Attach::At(&dir))
            }
        };
        match mounted {
            Ok(mounted) => Ok(mounted.keep()?),
            Err(error) => {
                self.forget_mount(&key)?;
                Err(error.into())
            }
        }
    }

    /// Undoes [`Engine::mount`].
    ///
    /// # Errors
    /// [`RunError::NotMounted`]; [`RunError::Snapshot`] if something still uses the mount.
    pub fn umount(&self, dir: &Path) -> Result<(), RunError> {
        // The path may have been mounted over, or its directory be gone: as named is good enough then.
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let key = dir.as_os_str().as_bytes().to_vec();
        let here = Place::here()?;
        let turn = self.mounts_turn();
        let row = self.store().read(|rows| rows.get(&MOUNTS, &key))?;
        let row = row.ok_or_else(|| RunError::NotMounted { dir: dir.clone() })?;
        if is_over(&dir, &row, &here) {
            return self.forget_mount(&key);
        }
        if row.place != here {
            return Err(RunError::ElsewhereMounted { dir });
        }
        // Nobody else waits for whoever still uses it.
        drop(turn);
        unmount_patiently(&dir).map_err(|source| RunError::Unmount { dir: dir.clone(), source })?;
        let turn = self.mounts_turn();
        // Somebody may have mounted something there again meanwhile, or have forgotten it already.
        if self.store().read(|rows| rows.get(&MOUNTS, &key))?.is_some_and(|row| is_over(&dir, &row, &here)) {
            self.forget_mount(&key)?;
        }
        drop(turn);
        if let (Mount::Record(active), false) = (row.what, self.policy.rules().is_empty()) {
            // What was written through the mount is not counted yet; the rules are asked about sums.
            self.store().snapshots().measure(active)?;
        }
        self.keep_policy_after(Ok(()), &Cancel::new())
    }

    /// Fails if a mutable record is mounted by a process that has ended since: nobody else may write to it or seal it.
    pub(crate) fn check_not_mounted(&self, active: ActiveId) -> Result<(), RunError> {
        self.mounted_on(active)?.map_or(Ok(()), |dir| Err(RunError::RecordMounted { dir }))
    }

    /// Forgets mounts that are not there any more, as after a restart of the machine.
    pub(crate) fn forget_dead_mounts(&self) -> Result<(), RunError> {
        let _turn = self.mounts_turn();
        let here = Place::here()?;
        for (key, row) in self.store().read(|rows| rows.readable(&MOUNTS))? {
            if is_over(Path::new(&OsString::from_vec(key.clone())), &row, &here) {
                self.forget_mount(&key)?;
            }
        }
        Ok(())
    }

    /// Where something of the store is mounted by processes that have ended since.
    pub(crate) fn mounted_dirs(&self) -> Result<Vec<PathBuf>, CatalogueError> {
        let mounts = self.store().read(|rows| rows.all(&MOUNTS))?;
        Ok(mounts.into_iter().map(|(key, _)| PathBuf::from(OsString::from_vec(key))).collect())
    }

    /// The uppers that are mounted by a process that has ended since, and may be written to at any time.
    pub(crate) fn mounted_uppers(&self) -> Result<Vec<ActiveId>, CatalogueError> {
        let mounts = self.store().read(|rows| rows.all(&MOUNTS))?;
        let upper = |what| match what {
            Mount::Record(active) | Mount::Scratch(active) => Some(active),
            Mount::View(_) => None,
        };
        Ok(mounts.into_iter().filter_map(|(_, row)| upper(row.what)).collect())
    }

    /// Holds the mounts that are written down against those that there are, and against what they show.
    pub(crate) fn check_mounts(&self, findings: &mut Findings) -> Result<(), RunError> {
        let _turn = self.mounts_turn();
        let here = Place::here()?;
        self.store().read(|rows| {
            let mut should: BTreeMap<Owner, Vec<Resource>> = BTreeMap::new();
            for (key, row) in findings.rows_or_drop(rows, &MOUNTS)? {
                let dir = PathBuf::from(OsString::from_vec(key.clone()));
                let subject = format!("mount {}", dir.display());
                let forget = vec![Change::remove(&MOUNTS, &key)];
                let shown: Resource = match row.what {
                    Mount::View(snapshot) => snapshot.into(),
                    Mount::Record(active) | Mount::Scratch(active) => active.into(),
                };
                if is_over(&dir, &row, &here) {
                    findings.add("mount-gone", subject, "is written down and not mounted", Remedy::Rewrite(forget));
                } else if !rows.has(shown)? {
                    let remedy = Remedy::Restore { resource: shown, otherwise: forget };
                    findings.add(
                        "mount-target-missing",
                        subject,
                        format!("shows {shown}, which is not in the store"),
                        remedy,
                    );
                } else {
                    should.insert(owner(&key), vec![shown]);
                }
            }
            // Of one that goes, its hold goes with the next round.
            let going: HashSet<Owner> = rows.readable(&MOUNTS)?.into_iter().map(|(key, _)| owner(&key)).collect();
            let may = |owner: &Owner, _| going.contains(owner) && !should.contains_key(owner);
            findings.compare_holds(rows, "mount-hold-wrong", "mount", &should, may)
        })?;
        Ok(())
    }

    fn forget_mount(&self, key: &Vec<u8>) -> Result<(), RunError> {
        self.store().write(|tx| {
            if let Some(MountRow { what: Mount::Record(active), .. }) = tx.get(&MOUNTS, key)? {
                tx.mark_changed(active)?;
            }
            tx.remove(&MOUNTS, key)?;
            tx.unhold_all(&owner(key))
        })?;
        Ok(())
    }

    /// What a name or an ID means for looking at: an image first, then a record.
    pub(crate) fn target(&self, wanted: &str) -> Result<Target, RunError> {
        match self.find_image(wanted) {
            Ok(found) => {
                let found = self.whole_image(found, &Silent, &Cancel::new()).map_err(Box::new)?;
                return Ok(Target::Tree(found.row.snapshot));
            }
            Err(ImageError::NotFound { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        let cache = self.cache();
        let id = match cache.find(wanted) {
            Ok(id) => id,
            Err(CacheError::NotFound { .. }) => return Err(RunError::NotFound { wanted: wanted.to_owned() }),
            Err(other) => return Err(other.into()),
        };
        match cache.row(id)?.state {
            State::Mutable { active, committed_as: None } => Ok(Target::Mutable(active)),
            _ => Ok(Target::Tree(cache.get(id, &RecordOptions::by("ply mount"))?.extract(&Cancel::new())?)),
        }
    }
}

/// Who holds what is mounted on a path.
fn owner(path: &[u8]) -> Owner {
    Owner::new("mount", path.escape_ascii())
}

/// Whether a mount of ours is known to be gone: the machine was restarted since, or we would see it and don't. One in
/// another mount namespace counts as there.
fn is_over(dir: &Path, row: &MountRow, here: &Place) -> bool {
    row.place.boot_id != here.boot_id || (row.place.namespace == here.namespace && !is_mount_point(dir))
}

/// Whether something is mounted right on `path`: its device or mount differs from its parent's.
fn is_mount_point(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let mount_id = |path: &Path| {
        let stat = statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID).ok()?;
        Some(stat.stx_mnt_id)
    };
    path.parent().is_some_and(|parent| mount_id(path) != mount_id(parent))
}
