//! Opening and closing: the lock, the versions, and what a dead process left behind.

use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use plies_oci::ErrorKind;

use crate::catalogue::schema::{META, META_CLEAN, META_PACKS, META_SCHEMA, META_SESSION, SCHEMA};
use crate::catalogue::{Catalogue, CatalogueError, Rows as _, Urgency};
use crate::driver::{Driver, DriverKind, Native, Overlay, Packs};
use crate::error::{At as _, FileError};
use crate::lock::{Holder, LockFailure, StoreLock, WaitPolicy};
use crate::migrate::{self, Migrate, MigrateAbove, Migrated};
use crate::progress::{Progress, Silent};
use crate::recover::{self, RecoverError};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, RwLock};
use crate::{ActiveId, Stamp, Store, packed, reserve, tree};

/// The file that says that `content/` is an image layout (image-spec, `image-layout.md`).
pub(crate) const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// Tells the time. Injected, since nothing below the engine reads clocks.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Told of errors that no caller is there to get: a hold that could not be released by `Drop`.
pub type Warn = Arc<dyn Fn(&dyn Error) + Send + Sync>;

/// Ends what a dead process left running.
pub type BeforeRecovery = Arc<dyn Fn(&Path) + Send + Sync>;

/// How to open a store.
#[derive(Clone)]
pub struct OpenOptions {
    /// Tells the time.
    pub clock: Clock,
    /// What this process calls itself to those who wait for it; one line.
    pub command: String,
    /// Told of errors in destructors.
    pub warn: Warn,
    /// Called with [`Store::run_dir`] once the store is ours and before anything that a dead process left is removed:
    /// the place to end processes that still use it.
    pub before_recovery: BeforeRecovery,
    /// Make the store if there is none.
    pub create: bool,
    /// Memory the catalogue may use for its pages.
    pub cache_bytes: usize,
    /// How long an ingest that nobody writes to is kept for resuming.
    pub ingest_max_age: Duration,
    /// How snapshots become trees. The layers on disk are the same either way.
    pub driver: DriverKind,
    /// Give up the reserve if the file system is full: for who wants to remove something.
    pub use_reserve: bool,
    /// What to do about a store that an older version made.
    pub migrate: Migrate,
    /// What crates above do to their own tables in a migration, in this order.
    pub migrate_above: Vec<MigrateAbove>,
    /// Told how far a migration is.
    pub progress: Arc<dyn Progress + Send>,
}

impl OpenOptions {
    /// Memory for catalogue pages: enough for the upper levels of the trees of a million rows
    /// (redb 4.5: 421 MiB for a million rows of 190 bytes), and small beside a build.
    pub const CACHE_BYTES: usize = 32 << 20;

    /// As containerd's lease on an ingest: a day.
    pub const INGEST_MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);

    /// The defaults around a clock.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            command: String::new(),
            warn: Arc::new(|_| {}),
            before_recovery: Arc::new(|_| {}),
            create: true,
            cache_bytes: Self::CACHE_BYTES,
            ingest_max_age: Self::INGEST_MAX_AGE,
            driver: DriverKind::default(),
            use_reserve: false,
            migrate: Migrate::default(),
            migrate_above: Vec::new(),
            progress: Arc::new(Silent),
        }
    }
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions").field("command", &self.command).finish_non_exhaustive()
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no store, and none was to be made.
    #[error("no store at {}", root.display())]
    Missing {
        /// Where.
        root: PathBuf,
    },
    /// There is data, but the catalogue that says what it is has gone.
    #[error("{} holds data but no catalogue: `ply fsck --rebuild` makes one of the data", root.display())]
    CatalogueMissing {
        /// Where.
        root: PathBuf,
    },
    /// Another process owns it.
    #[error("the store is in use by {holder}")]
    InUse {
        /// Which.
        holder: Holder,
    },
    /// A later version of plies wrote it.
    #[error("the store has schema {found}, this version knows {supported}: use a newer version")]
    TooNew {
        /// Its schema.
        found: u64,
        /// The newest known.
        supported: u64,
    },
    /// An earlier version wrote it, and to bring it up takes longer than a command should without being asked to.
    #[error(
        "the store has schema {found}, this version writes {supported}: run `ply migrate`, which copies the catalogue \
         ({} MiB) and keeps the old one", .catalogue_bytes >> 20
    )]
    NotMigrated {
        /// Its schema.
        found: u64,
        /// This version's.
        supported: u64,
        /// The size of its catalogue.
        catalogue_bytes: u64,
    },
    /// Making a new catalogue out of the data.
    #[error("make a new catalogue")]
    Rebuild {
        /// Why not.
        #[source]
        source: Box<crate::CheckError>,
    },
    /// An earlier version wrote it, and there is no way from there to here.
    #[error("the store has schema {found}, which is too old to migrate")]
    TooOld {
        /// Its schema; 0 if not even the database's own format is known any more.
        found: u64,
    },
    /// The catalogue is not a database that we wrote.
    #[error("the catalogue {} is corrupt: `ply fsck --rebuild` makes a new one of what is left", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// In which way.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The driver that was asked for does not work here.
    #[error("driver {driver} does not work here (--driver auto takes one that does)")]
    Driver {
        /// Which.
        driver: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the store.
    #[error(transparent)]
    File(#[from] FileError),
    /// A row.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl OpenError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::InUse { .. } => ErrorKind::Busy,
            Self::TooNew { .. } | Self::TooOld { .. } | Self::NotMigrated { .. } => ErrorKind::FailedPrecondition,
            Self::CatalogueMissing { .. } | Self::Corrupt { .. } => ErrorKind::DataLoss,
            Self::Driver { .. } => ErrorKind::Unavailable,
            Self::Rebuild { source } => source.kind(),
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

impl From<RecoverError> for OpenError {
    fn from(error: RecoverError) -> Self {
        match error {
            RecoverError::File(error) => Self::File(error),
            RecoverError::Catalogue(error) => Self::Catalogue(error),
        }
    }
}

impl From<LockFailure> for OpenError {
    fn from(failure: LockFailure) -> Self {
        match failure {
            LockFailure::Held(holder) => Self::InUse { holder },
            LockFailure::File(error) => Self::File(error),
        }
    }
}

/// Paths below the root. Their names are ours (words and hex ids), never anybody's input, so they
/// are joined as strings; what lies *inside* a layer or an upper is only reached by descriptor.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) catalog: PathBuf,
    pub(crate) content: PathBuf,
    pub(crate) blobs: PathBuf,
    pub(crate) ingest: PathBuf,
    pub(crate) layers: PathBuf,
    pub(crate) stage: PathBuf,
    pub(crate) active: PathBuf,
    pub(crate) mounts: PathBuf,
    pub(crate) run: PathBuf,
    /// What a repair put aside; made when it is needed.
    pub(crate) lost: PathBuf,
}

impl Paths {
    pub(crate) fn below(root: &Path) -> Self {
        Self {
            catalog: root.join("catalog"),
            content: root.join("content"),
            blobs: root.join("content/blobs/sha256"),
            ingest: root.join("content/ingest"),
            layers: root.join("layers"),
            stage: root.join("layers/stage"),
            active: root.join("active"),
            mounts: root.join("mounts"),
            run: root.join("run"),
            lost: root.join("lost"),
        }
    }

    pub(crate) fn create(&self) -> Result<(), FileError> {
        for dir in
            [&self.blobs, &self.ingest, &self.layers, &self.stage, &self.active, &self.mounts, &self.run, &self.catalog]
        {
            make_dir(dir)?;
        }
        let layout = self.content.join("oci-layout");
        // One that a power cut left empty is made again.
        if !fs::read(&layout).is_ok_and(|text| text == OCI_LAYOUT) {
            fs::write(&layout, OCI_LAYOUT).at("write", &layout)?;
        }
        // A catalogue says that all of this is there, so all of it is durable before there is one.
        let content = File::open(&self.content).at("open", &self.content)?;
        rustix::fs::syncfs(&content).at("sync", &self.content)
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.catalog.join("plies.redb")
    }
}

/// Makes a directory of the store and its parents, for its owner alone.
pub(crate) fn make_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).at("create directory", path)
}

/// A new file of the store, to read and to write, for its owner alone whatever the umask.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Earlier versions left the files of the catalogue to the umask.
fn keep_private(catalog: &Path) -> Result<(), FileError> {
    for path in recover::entries(catalog)? {
        let closed = fs::symlink_metadata(&path).and_then(|meta| {
            let is_open = meta.is_file() && meta.permissions().mode() & 0o077 != 0;
            if is_open { fs::set_permissions(&path, Permissions::from_mode(0o600)) } else { Ok(()) }
        });
        match closed {
            // Who waits for the lock may have given up the reserve.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            closed => closed.at("change mode", &path)?,
        }
    }
    Ok(())
}

/// Makes names in `path` durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|dir| dir.sync_all()).at("sync directory", path)
}

/// Where fresh ids come from: the session number and a count.
#[derive(Debug)]
pub(crate) struct Session {
    number: u32,
    ids: u32,
}

/// What all clones of a [`Store`] share. Fields drop in order: the database closes before the lock
/// goes.
pub(crate) struct Inner {
    pub(crate) root: PathBuf,
    pub(crate) paths: Paths,
    pub(crate) catalogue: Catalogue,
    pub(crate) options: OpenOptions,
    /// Begun by the first id asked for; a process that only reads leaves no trace.
    session: Mutex<Option<Session>>,
    pub(crate) publishing: RwLock<()>,
    pub(crate) collecting: Mutex<()>,
    pub(crate) open_ingests: Mutex<HashSet<[u8; 32]>>,
    pub(crate) mounted: Mutex<HashSet<ActiveId>>,
    pub(crate) driver: Box<dyn Driver>,
    /// Something was left behind that only the search after an unclean stop would find.
    unclean: AtomicBool,
    /// Somebody asked for a compaction of the catalogue.
    pub(crate) compact_at_end: AtomicBool,
    /// What was done when it was opened.
    pub(crate) migrated: Option<Migrated>,
    _lock: StoreLock,
}

impl Inner {
    pub(crate) fn now(&self) -> Stamp {
        (self.options.clock)().into()
    }

    pub(crate) fn warn(&self, error: &dyn Error) {
        (self.options.warn)(error);
    }

    /// An id that was never given out before and never will be again.
    pub(crate) fn fresh_id(&self) -> Result<[u8; 8], CatalogueError> {
        let mut session = self.session.lock().expect("because nothing panics while it is held");
        let session = match &mut *session {
            Some(session) if session.ids < u32::MAX => session,
            session => session.insert(Session { number: self.begin_session()?, ids: 0 }),
        };
        session.ids += 1;
        Ok((u64::from(session.number) << 32 | u64::from(session.ids)).to_be_bytes())
    }

    /// Whether an id was given out by this process.
    pub(crate) fn is_of_this_session(&self, id: [u8; 8]) -> bool {
        let session = self.session.lock().expect("because nothing panics while it is held");
        session.as_ref().is_some_and(|session| id[..4] == session.number.to_be_bytes())
    }

    /// The next open shall look for bytes without rows.
    pub(crate) fn leave_unclean(&self) {
        self.unclean.store(true, Ordering::Relaxed);
    }

    /// Removes a directory that no row names; if that fails, the next open tries again.
    pub(crate) fn discard_dir(&self, path: &Path) {
        if let Err(error) = tree::remove(path) {
            self.leave_unclean();
            self.warn(&error);
        }
    }

    /// Marks the store as being written to, durably and before anything is, so that whoever opens it
    /// after a crash looks for what was on its way.
    fn begin_session(&self) -> Result<u32, CatalogueError> {
        self.catalogue.write(Urgency::Durable, &|| self.now(), |tx| {
            let last = tx.get(&META, &META_SESSION.to_owned())?.unwrap_or(0);
            // No store sees 2^32 sessions.
            let number = u32::try_from(last).ok().and_then(|last| last.checked_add(1)).ok_or_else(|| {
                let what = "no number of a session: `ply fsck --repair` finds one";
                CatalogueError::Damaged { table: META.name(), key: META_SESSION.to_owned(), what }
            })?;
            tx.put(&META, &META_SESSION.to_owned(), &number.into())?;
            tx.put(&META, &META_CLEAN.to_owned(), &0)?;
            Ok(number)
        })
    }
}

impl Inner {
    pub(crate) fn close(mut self) -> Result<(), CatalogueError> {
        self.end_session()
    }

    fn end_session(&mut self) -> Result<(), CatalogueError> {
        self.catalogue.flush()?;
        let begun = self.session.get_mut().map_or(None, |session| session.take()).is_some();
        if begun && !*self.unclean.get_mut() {
            self.catalogue
                .write(Urgency::Durable, &Stamp::default, |tx| tx.put(&META, &META_CLEAN.to_owned(), &1).map(drop))?;
        }
        // Last, since all is well without it.
        if std::mem::take(self.compact_at_end.get_mut()) || self.catalogue.is_hollow()? {
            self.catalogue.compact()?;
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(error) = self.end_session() {
            self.warn(&error);
        }
    }
}

pub(crate) fn open(root: &Path, options: OpenOptions, wait: WaitPolicy<'_>) -> Result<Store, OpenError> {
    let root = std::path::absolute(root).at("resolve", root)?;
    let paths = Paths::below(&root);
    if !options.create && !paths.catalog.try_exists().at("stat", &paths.catalog)? {
        return Err(OpenError::Missing { root });
    }
    // One that was asked for and does not work makes no store.
    check_driver(options.driver, &paths)?;
    if options.use_reserve {
        reserve::spend(&paths.catalog)?;
    }
    make_dir(&paths.catalog)?;
    let lock = StoreLock::take(&paths.catalog.join("lock"), &options.command, wait)?;
    keep_private(&paths.catalog)?;
    let (catalogue, migrated) = migrate::open_migrated(&root, &paths, &options)?;
    let driver = make_driver(&catalogue, &paths, &options)?;
    let inner = Inner {
        root,
        paths,
        catalogue,
        options,
        session: Mutex::new(None),
        publishing: RwLock::new(()),
        collecting: Mutex::new(()),
        open_ingests: Mutex::default(),
        mounted: Mutex::default(),
        driver,
        unclean: AtomicBool::new(false),
        compact_at_end: AtomicBool::new(false),
        migrated,
        _lock: lock,
    };
    let store = Store { inner: Arc::new(inner) };
    (store.inner.options.before_recovery)(store.run_dir());
    recover::at_open(&store)?;
    reserve::keep(&store.inner.paths.catalog)?;
    Ok(store)
}

/// Whether a driver that was named works here.
fn check_driver(kind: DriverKind, paths: &Paths) -> Result<(), OpenError> {
    match kind {
        DriverKind::Auto | DriverKind::Native => Ok(()),
        DriverKind::Overlay | DriverKind::OverlayBy(_) => {
            Overlay::check_in(&paths.run).map_err(|source| OpenError::Driver { driver: "overlay", source })
        }
        DriverKind::Erofs => {
            check_erofs(paths).map_err(|error| OpenError::Driver { driver: "erofs", source: io::Error::other(error) })
        }
    }
}

fn check_erofs(paths: &Paths) -> Result<(), FileError> {
    match packed::check(&paths.run) {
        // To try it takes two files. Without room for them a store must open all the same: to make room.
        Err(error) if !is_full(&error.source) => Err(error),
        _ => Ok(()),
    }
}

/// A row that is none is nobody's at an opening: the store must open for a check to find it.
pub(crate) fn unless_damaged<T>(read: Result<Option<T>, CatalogueError>) -> Result<Option<T>, CatalogueError> {
    match read {
        Err(CatalogueError::Damaged { .. }) => Ok(None),
        read => read,
    }
}

/// The driver that was asked for, or for `auto` the one that the store was made with as far as that works here.
fn make_driver(catalogue: &Catalogue, paths: &Paths, options: &OpenOptions) -> Result<Box<dyn Driver>, CatalogueError> {
    let (method, packs) = match options.driver {
        DriverKind::Native => return Ok(Box::new(Native)),
        DriverKind::Overlay => (None, Packs::No),
        DriverKind::OverlayBy(method) => (Some(method), Packs::No),
        DriverKind::Erofs => (None, Packs::Yes),
        DriverKind::Auto => {
            let packs = unless_damaged(catalogue.read(|tx| tx.get(&META, &META_PACKS.to_owned())))? == Some(1);
            // Packed layers have their whiteouts elsewhere.
            let works = if packs { Overlay::check() } else { Overlay::check_in(&paths.run) };
            if works.is_err() {
                return Ok(Box::new(Native));
            }
            (None, if packs { can_pack(paths, options) } else { Packs::No })
        }
    };
    Ok(Box::new(Overlay::new(paths.run.clone(), method, packs)))
}

/// Tried when the first layer comes: most commands take in none, and each trial is a line in the kernel's log.
fn can_pack(paths: &Paths, options: &OpenOptions) -> Packs {
    let (paths, warn) = (paths.clone(), Arc::clone(&options.warn));
    let works = move || check_erofs(&paths).map_err(|source| warn(&NoErofs { made_with: true, source })).is_ok();
    Packs::If(LazyLock::new(Box::new(works)))
}

/// Whether a new store keeps the layers that come to it as tars packed: if it was asked to, or can.
fn new_packs(paths: &Paths, options: &OpenOptions) -> bool {
    match options.driver {
        DriverKind::Erofs => true,
        DriverKind::Auto => {
            let packs =
                check_erofs(paths).map_err(|source| (options.warn)(&NoErofs { made_with: false, source })).is_ok();
            if let Err(source) = Overlay::check_in(&paths.run) {
                (options.warn)(&NoOverlay { packs, source });
            }
            packs
        }
        DriverKind::Overlay | DriverKind::OverlayBy(_) | DriverKind::Native => false,
    }
}

/// `auto` does without the driver `erofs`, which is said once for a new store, and for one that was made with it whenever layers
/// come in.
#[derive(Debug, thiserror::Error)]
#[error("the driver erofs does not work here: {}", if *.made_with {
    "what is kept as tars cannot be mounted, new layers become directories (ply migrate --driver overlay keeps all so)"
} else {
    "this new store keeps its layers as directories"
})]
struct NoErofs {
    made_with: bool,
    source: FileError,
}

/// `auto` does without overlays, in part or at all, which is said once for a new store.
#[derive(Debug, thiserror::Error)]
#[error("overlay mounts do not work here: {}", if *.packs {
    "images can be loaded and mounted to read; what is written to needs --driver native, or another place for the store"
} else {
    "trees of this new store are copies, which takes time and space"
})]
struct NoOverlay {
    packs: bool,
    source: io::Error,
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

pub(crate) fn open_catalogue(root: &Path, paths: &Paths, options: &OpenOptions) -> Result<Catalogue, OpenError> {
    let path = paths.database();
    if !path.try_exists().at("stat", &path)? {
        if holds_data(paths)? {
            return Err(OpenError::CatalogueMissing { root: root.to_owned() });
        }
        if !options.create {
            return Err(OpenError::Missing { root: root.to_owned() });
        }
        paths.create()?;
        create_catalogue(&path, options, new_packs(paths, options))?;
    }
    // redb trusts a file that was closed cleanly, and may panic over one that was damaged since.
    let opened = catch_unwind(AssertUnwindSafe(|| Catalogue::open(&path, options.cache_bytes)))
        .map_err(|_| OpenError::Corrupt { path: path.clone(), source: "the database panicked over it".into() })?;
    opened.map_err(|error| match error {
        redb::DatabaseError::UpgradeRequired(_) => OpenError::TooOld { found: 0 },
        // We hold our own lock, so it is no plies that has the file open.
        redb::DatabaseError::DatabaseAlreadyOpen => {
            OpenError::InUse { holder: Holder { pid: None, command: String::new() } }
        }
        redb::DatabaseError::Storage(redb::StorageError::Io(error)) if error.kind() != io::ErrorKind::InvalidData => {
            OpenError::File(FileError::new("open", &path, error))
        }
        error => OpenError::Corrupt { path, source: error.into() },
    })
}

/// Whether there is something in the store that only a catalogue could explain.
fn holds_data(paths: &Paths) -> Result<bool, FileError> {
    for dir in [&paths.blobs, &paths.layers, &paths.active] {
        match fs::read_dir(dir) {
            Ok(mut entries) => {
                if entries.any(|entry| entry.is_ok_and(|entry| entry.file_name() != "stage")) {
                    return Ok(true);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(FileError::new("read directory", dir, error)),
        }
    }
    Ok(false)
}

/// Under another name until it is whole, so that a crash here leaves no half database to explain.
fn create_catalogue(path: &Path, options: &OpenOptions, packs: bool) -> Result<(), OpenError> {
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(FileError::new("remove", &new, error).into());
        }
        _ => {}
    }
    // The database takes an empty file for a new one.
    create_private(&new).at("create", &new)?;
    let database = Catalogue::builder(options.cache_bytes)
        .create(&new)
        .map_err(|error| CatalogueError::database("create")(error.into()))?;
    let catalogue = Catalogue::new(database, &new).map_err(|error| CatalogueError::database("create")(error.into()))?;
    catalogue.write(Urgency::Durable, &Stamp::default, |tx| {
        tx.put(&META, &META_SCHEMA.to_owned(), &SCHEMA)?;
        tx.put(&META, &META_PACKS.to_owned(), &u64::from(packs))?;
        tx.put(&META, &META_CLEAN.to_owned(), &1)?;
        Ok::<_, CatalogueError>(())
    })?;
    drop(catalogue);
    fs::rename(&new, path).at("rename", &new)?;
    let dir = path.parent().expect("because the catalogue lies in a directory of the store");
    sync_dir(dir)?;
    sync_dir(dir.parent().expect("because that lies in the root"))?;
    Ok(())
}
