//! The store: content, catalogue, leases, garbage collection, layers, snapshots and mounts; and the way between blobs
//! and layers, which the caches above share.
//!
//! Everything on disk under one root directory, and the one catalogue that says what it is:
//!
//! ```text
//! <root>/                         0700
//! ├── catalog/
//! │   ├── lock                    advisory lock; pid and command of the holder
//! │   └── plies.redb              every row (docs/format/catalogue.md); beside it, those of older schemas
//! ├── content/                    an OCI layout's blobs
//! │   ├── oci-layout
//! │   ├── blobs/sha256/<hex>      verified bytes, read-only
//! │   └── ingest/<hex>/{ref,data} bytes on their way in; resumable
//! ├── layers/
//! │   ├── <id>/{fs/,index,layer.json,tar-split.json.gz}
//! │   ├── <id>/{layer.tar,layer.erofs,index,layer.json}
//! │   └── stage/<id>/…            layers nobody sees yet
//! ├── active/<id>/{fs/,work/}     upper directories
//! ├── mounts/<id>/                mount points handed out by the store
//! └── run/                        scratch; emptied at open
//! ```
//!
//! # Invariants
//! - Bytes before rows, rows deleted before bytes. A crash leaves something whole, or garbage that
//!   the next open or collection removes; never a row without its bytes.
//! - A thing becomes visible and held in the same transaction.
//! - What `write` acknowledged is durable, except holds of process-bound leases and volatile
//!   actives, which end with the process.
//! - Opening costs the same for a million rows as for none, after a clean stop. After an unclean
//!   one it reads the directories once, to find what was on its way, and no table of many rows.
//!
//! # Lock order
//! Each may be taken while holding those above it, never the other way round:
//!
//! 1. `collecting`: one garbage collection at a time.
//! 2. `publishing` (shared by publishers from rename to commit, exclusive for unlinking): without
//!    it a collection could unlink a blob that was published again after its row had gone.
//! 3. the catalogue's gate (taken by `write`, held while a closure runs and while it commits).
//! 4. `open_ingests`, `mounted`, `session`: leaves; held for a few instructions, except that
//!    `session` is held over the one commit that begins a session, so it comes before the gate and
//!    is never asked for inside a closure.
//!
//! No lock is held while a caller's code runs, except the gate while its own closure does.

mod cancel;
mod catalogue;
mod content;
mod difference;
mod driver;
mod error;
mod fixup;
mod foreign;
pub mod fsck;
mod gc;
mod id;
mod idmap;
mod layers;
mod lease;
mod lock;
mod migrate;
mod open;
mod packed;
pub mod progress;
mod recover;
mod refs;
mod reserve;
mod snapshots;
mod stack;
mod sync;
mod sys;
pub mod transfer;
mod tree;
mod turns;
mod usage;
mod write_back;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cancel::{Cancel, CancelGuard, Canceled, canceled_inside};
use catalogue::Urgency;
use catalogue::schema::{META, META_PACKS};
pub use catalogue::{CatalogueError, Key, KeyReader, PrefixOf, ReadTx, Row, Rows, Table, Tx};
pub use content::{
    Blob, BlobError, BlobInfo, CommitError, Content, Expected, Ingest, IngestError, IngestRef, IngestStatus,
};
pub use difference::DifferenceError;
pub use driver::{DriverKind, OverlayMethod};
pub use error::FileError;
pub use foreign::{ForeignName, ForeignTree, NotLinked, Taking, Unpacked};
pub use fsck::{CheckError, CheckOptions, Depth, Finding, Findings};
pub use gc::{Collected, GcError, GcMode, GcReport};
pub use id::{ActiveId, IdError, LayerId, LeaseId, Owner, Resource, SnapshotId, Stamp};
pub use idmap::{IdMapError, IdMaps, IdRange};
pub use layers::{FinishedStage, LayerContents, LayerError, LayerInfo, Layers, Stage};
pub use lease::{Keeper, Lease, LeaseInfo, LeaseOptions, held_by, keepers_of, scan_edges, scan_holds};
pub use lock::{Holder, WaitPolicy};
pub use migrate::{Migrate, MigrateAbove, Migrated, MigrationPlan, migration_plan};
use open::Inner;
pub use open::{BeforeRecovery, Clock, OpenError, OpenOptions, Warn};
pub use snapshots::{
    ActiveInfo, ActiveOptions, Attach, MountOptions, Mounted, SnapshotError, SnapshotInfo, Snapshots, unmount_patiently,
};
pub use stack::Indexes;
pub use transfer::{
    LayerBlob, LayerSource, OpenBlob, Origin, Packing, ReceivedLayer, Taken, Transfer, TransferError, parallel,
};
pub use turns::{Turn, Turns};
pub use usage::{SizeRow, UsageError, UsageKind, UsageRow, scan_sizes};

/// A store that this process owns. Cloning is cheap; the store closes when the last clone and the
/// last lease, ingest, stage and mount made from it are gone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl Store {
    /// Opens the store at `root`, making it if there is none.
    ///
    /// Drops the leases of processes that are gone, unmounts what they left, and finishes what they
    /// had begun to delete; after an unclean stop, removes what they had begun to write.
    ///
    /// # Errors
    /// [`OpenError`] tells a store that is missing, owned by another process, too new or corrupt
    /// apart.
    pub fn open(root: &Path, options: OpenOptions, wait: WaitPolicy<'_>) -> Result<Self, OpenError> {
        open::open(root, options, wait)
    }

    /// The root directory, absolute.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// A directory for files that nobody needs after this process; emptied at the next start.
    pub fn run_dir(&self) -> &Path {
        &self.inner.paths.run
    }

    /// What was migrated when it was opened, if anything was.
    pub fn migrated(&self) -> Option<&Migrated> {
        self.inner.migrated.as_ref()
    }

    /// How snapshots are mounted, and why so.
    pub fn driver(&self) -> &'static str {
        self.inner.driver.describe()
    }

    /// Has [`DriverKind::Auto`] keep the layers of this store as the driver does that it was opened with.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn remember_driver(&self) -> Result<(), CatalogueError> {
        let packs = u64::from(self.inner.driver.packs());
        self.write(|tx| tx.put(&META, &META_PACKS.to_owned(), &packs).map(drop))
    }

    /// Whether the driver `overlay` would work here.
    ///
    /// # Errors
    /// Why not.
    pub fn try_overlay(&self) -> io::Result<()> {
        driver::Overlay::check_in(self.run_dir())
    }

    /// Tries whether the driver `erofs` would work here: mounts an empty layer and an overlay over it, attached nowhere.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn try_erofs(&self) -> Result<(), FileError> {
        packed::check(self.run_dir())
    }

    /// The moment, by the injected clock.
    pub fn now(&self) -> Stamp {
        self.inner.now()
    }

    /// Runs `read` on a consistent view of the catalogue.
    ///
    /// # Errors
    /// What `read` returns, or [`CatalogueError`].
    pub fn read<T, E: From<CatalogueError>>(&self, read: impl FnOnce(&ReadTx) -> Result<T, E>) -> Result<T, E> {
        self.inner.catalogue.read(read)
    }

    /// Runs `change` in a write transaction and returns when it is durable. Others see what it changed
    /// a little earlier; concurrent writers share a commit. `change` leaves nothing if it fails.
    ///
    /// # Errors
    /// What `change` returns, or [`CatalogueError`].
    ///
    /// # Panics
    /// If called from within such a closure.
    pub fn write<T, E: From<CatalogueError>>(&self, change: impl FnOnce(&mut Tx<'_>) -> Result<T, E>) -> Result<T, E> {
        self.inner.catalogue.write(Urgency::Durable, &|| self.inner.now(), change)
    }

    /// As [`Store::write`], but visible at once and durable only with the next durable write: for
    /// last-used stamps and the like, which may be lost.
    ///
    /// # Errors
    /// What `change` returns, or [`CatalogueError`].
    pub fn write_lazily<T, E: From<CatalogueError>>(
        &self,
        change: impl FnOnce(&mut Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.inner.catalogue.write(Urgency::Lazy, &|| self.inner.now(), change)
    }

    /// Returns when what was changed so far is durable, lazily or not.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn sync(&self) -> Result<(), CatalogueError> {
        self.inner.catalogue.flush()
    }

    /// Makes a lease.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn lease(&self, options: LeaseOptions) -> Result<Lease, CatalogueError> {
        Lease::create(self, options)
    }

    /// Takes up a lease that was made earlier.
    ///
    /// # Errors
    /// [`CatalogueError::NoSuchLease`].
    pub fn reopen_lease(&self, id: LeaseId) -> Result<Lease, CatalogueError> {
        Lease::reopen(self, id)
    }

    /// All leases, those included that have expired and were not collected yet.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn leases(&self) -> Result<Vec<LeaseInfo>, CatalogueError> {
        let rows = self.read(|tx| tx.readable(&catalogue::schema::LEASES))?;
        let info = |(id, row): (LeaseId, catalogue::schema::LeaseRow)| LeaseInfo {
            id,
            label: row.label,
            created: row.created,
            expires: row.expires,
        };
        Ok(rows.into_iter().map(info).collect())
    }

    /// Blobs and ingests.
    pub fn content(&self) -> Content<'_> {
        Content::new(self)
    }

    /// Layers and stages.
    pub fn layers(&self) -> Layers<'_> {
        Layers::new(self)
    }

    /// Snapshots, actives and mounts.
    pub fn snapshots(&self) -> Snapshots<'_> {
        Snapshots::new(self)
    }

    /// Removes what no lease and no owner holds, directly or over edges; or says what it would.
    ///
    /// # Errors
    /// [`GcError`].
    pub fn gc(&self, mode: GcMode) -> Result<GcReport, GcError> {
        gc::collect(self, mode)
    }

    /// Asks for the catalogue to be compacted when the store closes, whatever was removed. A session that removes more
    /// rows than it leaves does so by itself.
    pub fn compact_at_close(&self) {
        self.inner.compact_at_end.store(true, sync::atomic::Ordering::Relaxed);
    }

    /// What everything under the root costs, from the rows: a row for each kind.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn usage(&self) -> Result<Vec<UsageRow>, UsageError> {
        usage::usage(self)
    }

    /// The bytes of all blobs, layers' trees and uppers, of the last as last measured: three rows.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn stored_bytes(&self) -> Result<u64, CatalogueError> {
        usage::stored_bytes(self)
    }

    /// What lies below the root and belongs to nobody, with its bytes on disk: what a crash left until the next open, and
    /// what others have put there. What is just being published may be among it.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn orphans(&self) -> Result<Vec<(PathBuf, u64)>, UsageError> {
        Ok(usage::orphans(self)?.into_iter().map(|(path, usage)| (path, usage.size_bytes)).collect())
    }

    /// Looks for anything that breaks the store's invariants. Nothing may be written meanwhile by
    /// this process: what is half done looks broken.
    ///
    /// # Errors
    /// [`CheckError`] if it could not look. What it found wrong is in the findings.
    pub fn check(&self, options: &CheckOptions<'_>) -> Result<Findings, CheckError> {
        fsck::check(self, options)
    }

    /// Removes what repairs have put aside: how many bytes that were.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn empty_lost(&self) -> Result<u64, FileError> {
        fsck::empty_lost(self)
    }

    /// Makes a new catalogue for the store at `root`, out of what can still be read of the old one, the layers' directories
    /// and the blobs. The old one is kept as `lost/<name>/plies.redb`. What was adopted is held by
    /// [`fsck::rebuild_owner`]; counts and indexes are missing, so a repair must follow. A kill leaves the old catalogue or the
    /// new one.
    ///
    /// # Errors
    /// [`OpenError`]; then the old catalogue is as it was.
    pub fn rebuild(
        root: &Path,
        options: &OpenOptions,
        check: &CheckOptions<'_>,
        wait: WaitPolicy<'_>,
        name: &str,
    ) -> Result<fsck::Rebuilt, OpenError> {
        fsck::rebuild(root, options, check, wait, name)
    }

    /// Ends the session: marks the store as cleanly stopped. Dropping the last clone does so too,
    /// but cannot report an error. Does nothing while anything made from the store is still alive.
    ///
    /// # Errors
    /// [`CatalogueError::Database`]; the next open then looks for leftovers.
    pub fn close(self) -> Result<(), CatalogueError> {
        Arc::into_inner(self.inner).map_or(Ok(()), Inner::close)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("root", &self.inner.root).finish_non_exhaustive()
    }
}
