//! Getting and making records.

use std::ops::ControlFlow;
use std::panic::Location;
use std::sync::{Arc, PoisonError};

use plies_archive::Limits;
use plies_oci::{BlobDigest, ChainId, Descriptor, DiffId, MediaClass, classify};
use plies_store::{
    ActiveId, ActiveOptions, CatalogueError, LayerId, LeaseOptions, Rows, SnapshotError, Stamp, Store, Turns, Warn,
};

use crate::lazy::{Flights, Providers};
use crate::live::{Live, Refused, Ticket};
use crate::prune::SharedChecker;
use crate::record::{self, BlobRow, Parents, RecordRow, RecordType, State, UseRow};
use crate::solver;
use crate::sync::Mutex;
use crate::uses::Uses;
use crate::{CacheError, Holder, ImmutableRef, MutableRef, RecordId};

/// Annotation of a layer's descriptor with the digest of its tar (containerd's name for it).
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// How to open a manager.
pub struct ManagerOptions {
    /// What archives may ask for.
    pub limits: Limits,
    /// Says which records an image store keeps as well; nobody, if `None`.
    pub checker: Option<Arc<dyn SharedChecker>>,
    /// Told of errors that no caller is there to get.
    pub warn: Warn,
}

impl std::fmt::Debug for ManagerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManagerOptions").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// What a get or a new record is to be like. Fields that are `None` change nothing.
#[derive(Debug, Clone, Default)]
pub struct RecordOptions {
    /// What it is, for people.
    pub description: Option<String>,
    /// What kind of thing it is.
    pub record_type: Option<RecordType>,
    /// When it was made; now, by default.
    pub created_at: Option<Stamp>,
    /// Whether it is kept when its last ref goes although it was never finalized (cache policy "retain"). What is
    /// written to a mutable record of this kind survives this process.
    pub retain: Option<bool>,
    /// Images that it is a part of; added to those that are known, also to an old record.
    pub image_refs: Vec<String>,
    /// Who can fetch its blobs and those below it.
    pub providers: Providers,
    /// Whether releasing the ref leaves the time of the last use as it is.
    pub keep_last_used: bool,
    /// Who asks, for messages; by default the place in the code.
    pub holder: Option<Arc<str>>,
}

impl RecordOptions {
    /// Options that only say who asks.
    pub fn by(holder: &str) -> Self {
        Self { holder: Some(holder.into()), ..Self::default() }
    }

    pub(crate) fn apply(&self, row: &mut RecordRow) {
        if let Some(description) = &self.description {
            row.description.clone_from(description);
        }
        row.record_type = self.record_type.unwrap_or(row.record_type);
        row.created_at = self.created_at.unwrap_or(row.created_at);
        row.retain = self.retain.unwrap_or(row.retain);
        row.add_image_refs(&self.image_refs);
    }
}

/// The build cache of one store.
///
/// # Locks
/// In this order: `pruning`; `composing`, a record's before those that it stands on; the store's own; `live` and `uses`,
/// which are leaves. No lock is held while files are read or written, but `composing`, whose waiters all want that very
/// work done.
pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) limits: Limits,
    pub(crate) checker: Option<Arc<dyn SharedChecker>>,
    pub(crate) warn: Warn,
    pub(crate) live: Live,
    pub(crate) uses: Uses,
    pub(crate) flights: Arc<Flights>,
    /// One at a time finalizes a record or makes its tree.
    pub(crate) composing: Turns<RecordId>,
    pub(crate) pruning: Mutex<()>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("store", &self.store).finish_non_exhaustive()
    }
}

/// Owns the build cache of a store: hands out the two roles in which it is used, and closes it.
#[derive(Debug)]
pub struct Manager {
    inner: Arc<Inner>,
}

/// The role of whoever builds: gets and makes records.
#[derive(Debug, Clone)]
pub struct Accessor {
    pub(crate) inner: Arc<Inner>,
}

/// The role of whoever looks after space: disk usage and prune.
#[derive(Debug, Clone)]
pub struct Controller {
    pub(crate) inner: Arc<Inner>,
}

impl Manager {
    /// Opens the build cache of a store. Loads nothing: the cost does not grow with the number of records. Records of
    /// mutable trees that a dead process left unfinished are removed.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn open(store: Store, options: ManagerOptions) -> Result<Self, CacheError> {
        let ManagerOptions { limits, checker, warn } = options;
        let inner = Inner {
            store,
            limits,
            checker,
            warn,
            live: Live::default(),
            uses: Uses::default(),
            flights: Arc::default(),
            composing: Turns::default(),
            pruning: Mutex::new(()),
        };
        if inner.read(solver::is_old)? {
            inner.store.write(solver::migrate)?;
        }
        inner.remove_stale()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// For whoever builds.
    pub fn accessor(&self) -> Accessor {
        Accessor { inner: Arc::clone(&self.inner) }
    }

    /// For whoever looks after space.
    pub fn controller(&self) -> Controller {
        Controller { inner: Arc::clone(&self.inner) }
    }

    /// Every record that is held now, with its holders: after a request there should be none left of it.
    pub fn held(&self) -> Vec<(RecordId, Vec<Holder>)> {
        self.inner.live.all()
    }

    /// Writes down what may lag. The store closes when all that was made from it is gone.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn close(self) -> Result<(), CacheError> {
        self.inner.flush_uses()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Err(error) = self.inner.flush_uses() {
            (self.inner.warn)(&error);
        }
    }
}

impl Accessor {
    /// A ref to an immutable record. Of a mutable one that nobody holds: it is committed, lazily, and the new immutable
    /// record is what you get; of one that was committed already, the record that it was committed as.
    ///
    /// # Errors
    /// [`CacheError::NotFound`]; [`CacheError::Locked`] if somebody writes to it;
    /// [`CacheError::NeedsProviders`] if blobs below it are not here and nobody in the options fetches them, with all of
    /// them; [`CacheError::Damaged`] for a row or a parent that cannot be read: that concerns this record alone.
    #[track_caller]
    pub fn get(&self, id: RecordId, options: &RecordOptions) -> Result<ImmutableRef, CacheError> {
        self.inner.get(id, options, Holder::of(options, Location::caller()))
    }

    /// A ref to a record by the beginning of its ID.
    ///
    /// # Errors
    /// [`CacheError::NotFound`], [`CacheError::Ambiguous`], and those of [`Accessor::get`].
    #[track_caller]
    pub fn get_by_prefix(&self, wanted: &str, options: &RecordOptions) -> Result<ImmutableRef, CacheError> {
        let holder = Holder::of(options, Location::caller());
        self.inner.get(self.find(wanted)?, options, holder)
    }

    /// Finds a record by the beginning of its ID.
    ///
    /// # Errors
    /// [`CacheError::NotFound`], [`CacheError::Ambiguous`].
    pub fn find(&self, wanted: &str) -> Result<RecordId, CacheError> {
        self.inner.store.read(|rows| find(rows, wanted))
    }

    /// Makes a mutable record on top of `parent`, or of nothing.
    ///
    /// # Errors
    /// Those of finalizing and extracting the parent, and of preparing a directory.
    #[track_caller]
    pub fn create(&self, parent: Option<&ImmutableRef>, options: &RecordOptions) -> Result<MutableRef, CacheError> {
        let holder = Holder::of(options, Location::caller());
        self.inner.create(parent, options, holder)
    }

    /// The mutable record, for writing. If it was committed lazily and nobody holds the immutable record, that commit is
    /// undone.
    ///
    /// # Errors
    /// [`CacheError::NotFound`]; [`CacheError::WrongKind`] if it is not mutable; [`CacheError::Locked`].
    #[track_caller]
    pub fn get_mutable(&self, id: RecordId, options: &RecordOptions) -> Result<MutableRef, CacheError> {
        self.inner.get_mutable(id, options, Holder::of(options, Location::caller()))
    }

    /// The record of a layer's blob on top of `parent`: one that is there, or a new one that shares the layer with any
    /// record that has it, or else a lazy one, whose blob is fetched and unpacked when somebody needs its files.
    ///
    /// The descriptor says in annotation [`UNCOMPRESSED`] what the blob decompresses to.
    ///
    /// # Errors
    /// [`CacheError::NoDiffId`], [`CacheError::BadDiffId`], [`CacheError::NotALayer`]; [`CacheError::NeedsProviders`] if
    /// the blob is not here and nobody fetches it; [`CacheError::NotAddressable`] if the parent has no chain of blobs.
    #[track_caller]
    pub fn get_by_blob(
        &self,
        descriptor: &Descriptor,
        parent: Option<&ImmutableRef>,
        options: &RecordOptions,
    ) -> Result<ImmutableRef, CacheError> {
        let holder = Holder::of(options, Location::caller());
        self.inner.get_by_blob(descriptor, parent, options, holder)
    }

    /// The record of a layer that is in the store, on top of `parent`, with or without a blob: one that is there, or a new
    /// one. `None` if the layer is not here.
    ///
    /// # Errors
    /// [`CacheError::NotAddressable`] if a tar of the parent's layers is not known yet; those of finalizing it.
    #[track_caller]
    pub fn get_by_diff_id(
        &self,
        diff_id: DiffId,
        parent: Option<&ImmutableRef>,
        options: &RecordOptions,
    ) -> Result<Option<ImmutableRef>, CacheError> {
        let holder = Holder::of(options, Location::caller());
        self.inner.get_by_diff_id(diff_id, parent, options, holder)
    }

    /// Calls `visit` for every record, in the order of their IDs, until it breaks. A row that cannot be read comes as an
    /// error and hides no other.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn scan(
        &self,
        mut visit: impl FnMut(RecordId, Result<RecordRow, CacheError>, UseRow) -> ControlFlow<()>,
    ) -> Result<(), CacheError> {
        self.inner.read(|rows| {
            let mut failed = Ok(());
            record::scan_ids_from(rows, RecordId::from_bytes([0; 16]), |id| {
                let row = match record::get(rows, id) {
                    Ok(None) => return true,
                    Ok(Some(row)) => Ok(row),
                    Err(CatalogueError::Damaged { what, .. }) => Err(CacheError::Damaged { id, what: what.to_owned() }),
                    Err(error) => Err(error.into()),
                };
                match rows.get(&record::USES, &id) {
                    Ok(written) => visit(id, row, self.inner.uses.with(id, written.unwrap_or_default())).is_continue(),
                    Err(error) => {
                        failed = Err(error);
                        false
                    }
                }
            })?;
            failed
        })
    }

    /// How many records there are.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn count(&self) -> Result<usize, CacheError> {
        let count = self.inner.read(|rows| rows.rows_count(&record::RECORDS))?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// The layers of a record's tree, bottom first, as far as they are there: what is lazy is left out.
    ///
    /// # Errors
    /// [`CacheError::NotFound`], [`CacheError::Damaged`].
    pub fn known_layers(&self, id: RecordId) -> Result<Vec<LayerId>, CacheError> {
        let mut layers = Vec::new();
        for (_, row) in self.inner.walk(id)? {
            match row.state {
                State::Sealed { layer } => layers.extend(layer),
                State::Stack(snapshot) => layers.extend(self.inner.store.snapshots().info(snapshot)?.layers),
                _ => {}
            }
        }
        Ok(layers)
    }

    /// A record's row, without holding it.
    ///
    /// # Errors
    /// [`CacheError::NotFound`], [`CacheError::Damaged`].
    pub fn row(&self, id: RecordId) -> Result<RecordRow, CacheError> {
        self.inner.must_have(id)
    }

    /// When and how often a record was used.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn uses(&self, id: RecordId) -> Result<UseRow, CacheError> {
        let written = self.inner.read(|rows| rows.get(&record::USES, &id))?;
        Ok(self.inner.uses.with(id, written.unwrap_or_default()))
    }

    /// The records that stand on this one.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn children(&self, id: RecordId) -> Result<Vec<RecordId>, CacheError> {
        self.inner.read(|rows| record::children(rows, id))
    }

    /// Records with this chain of layers, whatever the blobs.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn search_chain(&self, chain: ChainId) -> Result<Vec<RecordId>, CacheError> {
        self.inner.read(|rows| {
            let found = rows.prefixed(&record::BY_CHAIN, &chain)?;
            record::that_are_there(rows, found.into_iter().map(|((_, id), ())| id))
        })
    }

    /// Records with this chain of blobs.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn search_blob_chain(&self, chain: BlobDigest) -> Result<Vec<RecordId>, CacheError> {
        self.inner.read(|rows| {
            let found = rows.prefixed(&record::BY_BLOB_CHAIN, &chain)?;
            record::that_are_there(rows, found.into_iter().map(|((_, id), ())| id))
        })
    }

    /// Keeps a record from ever being pruned, or no longer.
    ///
    /// # Errors
    /// [`CacheError::NotFound`].
    pub fn pin(&self, id: RecordId, pinned: bool) -> Result<(), CacheError> {
        match self.inner.store.write(|tx| record::change(tx, id, |row| row.pinned = pinned))? {
            true => Ok(()),
            false => Err(CacheError::no_record(id)),
        }
    }

    /// Removes records that nobody holds and nothing else stands on: all of them, or none.
    ///
    /// # Errors
    /// [`CacheError::NotFound`], [`CacheError::Locked`], [`CacheError::HasChildren`].
    pub fn remove(&self, ids: &[RecordId]) -> Result<(), CacheError> {
        self.inner.remove(ids)
    }
}

/// Finds a record by the beginning of its ID: one look, however many records there are.
pub(crate) fn find(rows: &impl Rows, wanted: &str) -> Result<RecordId, CacheError> {
    let not_found = || CacheError::NotFound { wanted: wanted.to_owned() };
    let lowest = RecordId::lowest_with(wanted).ok_or_else(not_found)?;
    let mut found = Vec::new();
    // Keys alone would do; a row that does not decode must not hide the others.
    record::scan_ids_from(rows, lowest, |id| {
        let fits = id.to_string().starts_with(wanted);
        if fits {
            found.push(id);
        }
        fits
    })?;
    match found.as_slice() {
        [] => Err(not_found()),
        [id] => Ok(*id),
        more => Err(CacheError::Ambiguous { wanted: wanted.to_owned(), count: more.len() }),
    }
}

pub(crate) fn refused(id: RecordId, refused: Refused) -> CacheError {
    match refused {
        Refused::Condemned => CacheError::no_record(id),
        Refused::Locked(holder) => CacheError::Locked { id, holder },
    }
}

impl Inner {
    pub(crate) fn read<T>(
        &self,
        read: impl FnOnce(&plies_store::ReadTx) -> Result<T, CatalogueError>,
    ) -> Result<T, CacheError> {
        Ok(self.store.read(read)?)
    }

    /// Reads what concerns one record, and maybe those that it stands on; a row that does not decode is this record's own
    /// trouble.
    pub(crate) fn read_of<T>(
        &self,
        id: RecordId,
        read: impl FnOnce(&plies_store::ReadTx) -> Result<T, CatalogueError>,
    ) -> Result<T, CacheError> {
        match self.read(read) {
            Err(CacheError::Catalogue(error @ CatalogueError::Damaged { .. })) => {
                Err(CacheError::Damaged { id, what: error.to_string() })
            }
            other => other,
        }
    }

    /// A record's row.
    pub(crate) fn row(&self, id: RecordId) -> Result<Option<RecordRow>, CacheError> {
        self.read_of(id, |rows| record::get(rows, id))
    }

    pub(crate) fn must_have(&self, id: RecordId) -> Result<RecordRow, CacheError> {
        self.row(id)?.ok_or_else(|| CacheError::no_record(id))
    }

    pub(crate) fn fresh_id() -> Result<RecordId, CacheError> {
        RecordId::random().map_err(CacheError::Random)
    }

    pub(crate) fn get(
        self: &Arc<Self>,
        id: RecordId,
        options: &RecordOptions,
        holder: Holder,
    ) -> Result<ImmutableRef, CacheError> {
        let (ticket, ready) = self.live.hold(id, &holder).map_err(|why| refused(id, why))?;
        let mut held = ImmutableRef::new(self, id, ticket, options, holder);
        if ready && options.image_refs.is_empty() {
            held.is_loaded();
            return Ok(held);
        }
        self.load(held, options)
    }

    /// Reads the row of a record that is held by now, and sees that it can be had.
    fn load(self: &Arc<Self>, mut held: ImmutableRef, options: &RecordOptions) -> Result<ImmutableRef, CacheError> {
        let id = held.id();
        let (row, missing) = self
            .read_of(id, |rows| {
                let Some(row) = record::get(rows, id)? else { return Ok(None) };
                let missing = missing_below(rows, &row, &options.providers, &self.live)?;
                Ok(Some((row, missing)))
            })?
            .ok_or_else(|| CacheError::no_record(id))?;
        match row.state {
            State::Mutable { active, .. } | State::Shared { active, .. } if !self.check_active(id, active)? => {
                return self.load(held, options);
            }
            State::Mutable { .. } => {
                // Several may get it at once: none of them needs it for itself, and one commits it.
                let (committed, ticket) = self.commit(id, row.retain, held.holder())?;
                let committed = ImmutableRef::new(self, committed, ticket, options, held.holder().clone());
                held.abandon();
                return self.load(committed, options);
            }
            State::Shared { mutable, .. } => {
                // A mutable record whose row is lost can say nothing; what it wrote is still here.
                let goes = match self.row(mutable) {
                    Ok(Some(partner)) => !partner.retain && !row.retain,
                    Ok(None) | Err(CacheError::Damaged { .. }) => false,
                    Err(error) => return Err(error),
                };
                if goes {
                    self.live.pair(id, mutable);
                }
            }
            State::Sealed { .. } | State::Lazy | State::Composed | State::Stack(_) => {}
        }
        match missing {
            Missing::Nothing { ready: true } => self.live.set_ready(id),
            Missing::Nothing { ready: false } => {}
            Missing::Blobs(blobs) => return Err(CacheError::NeedsProviders(blobs)),
            Missing::Record(parent) => return Err(CacheError::gone_below(id, parent)),
        }
        if options.image_refs.iter().any(|name| !row.image_refs.contains(name)) {
            self.store.write(|tx| record::change(tx, id, |row| row.add_image_refs(&options.image_refs)))?;
        }
        held.is_loaded();
        Ok(held)
    }

    /// Whether a mutable record's directory can still be trusted. If not, the record is removed. False if the record has
    /// other files by now: somebody finalized it, and its row is to be read again.
    fn check_active(&self, id: RecordId, active: ActiveId) -> Result<bool, CacheError> {
        match self.store.snapshots().check_usable(active) {
            Ok(()) => Ok(true),
            Err(SnapshotError::NotFound { .. } | SnapshotError::Stale { .. }) => match self.remove_dead(id, active)? {
                true => Err(CacheError::no_record(id)),
                false => Ok(false),
            },
            Err(SnapshotError::Sealed { .. })
                if !self.read(|rows| record::get(rows, id))?.is_some_and(|row| is_in(&row.state, active)) =>
            {
                Ok(false)
            }
            Err(other) => Err(other.into()),
        }
    }

    /// Removes a record whose files were in a directory that is gone, with the partner that shared them; false if it has
    /// others by now.
    fn remove_dead(&self, id: RecordId, active: ActiveId) -> Result<bool, CacheError> {
        Ok(self.store.write_lazily(|tx| {
            let partner = match record::get(tx, id) {
                Ok(Some(row)) if !is_in(&row.state, active) => return Ok(false),
                Ok(row) => row.and_then(|row| partner_of(&row.state)),
                Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => None,
                Err(error) => return Err(error),
            };
            record::remove(tx, id)?;
            if let Some(partner) = partner {
                record::remove(tx, partner)?;
            }
            Ok::<_, CatalogueError>(true)
        })?)
    }

    /// Removes what processes that are gone left of unfinished trees.
    fn remove_stale(&self) -> Result<(), CacheError> {
        for active in self.store.snapshots().stale_actives()? {
            let id = self.read(|rows| rows.get(&record::ACTIVES, &active))?;
            if let Some(record::IdRow(id)) = id {
                self.remove_dead(id, active)?;
            }
        }
        Ok(())
    }

    fn create(
        self: &Arc<Self>,
        parent: Option<&ImmutableRef>,
        options: &RecordOptions,
        holder: Holder,
    ) -> Result<MutableRef, CacheError> {
        let base = match parent {
            Some(parent) => parent.extract(&plies_store::Cancel::new())?,
            None => None,
        };
        let retain = options.retain.unwrap_or(false);
        let id = Self::fresh_id()?;
        let parents = parent.map_or(Parents::None, |parent| Parents::Layer(parent.id()));
        let ticket = self.live.hold_alone(id, &holder).map_err(|why| refused(id, why))?;
        // The record appears with its directory. What ends with this process anyway needs no sync.
        let put = |tx: &mut plies_store::Tx<'_>, active| {
            let mut row = RecordRow::new(State::Mutable { active, committed_as: None }, parents.clone(), tx.now());
            options.apply(&mut row);
            record::replace(tx, id, None, Some(&row))
        };
        if let Err(error) = self.store.snapshots().prepare_with(base, ActiveOptions { volatile: !retain }, put) {
            self.live.let_go(id, ticket, false);
            return Err(error.into());
        }
        let mut options = options.clone();
        if let Some(parent) = parent {
            options.providers = parent.providers().and(&options.providers);
        }
        Ok(MutableRef::new(self, id, ticket, retain, &options, holder))
    }

    fn get_mutable(
        self: &Arc<Self>,
        id: RecordId,
        options: &RecordOptions,
        holder: Holder,
    ) -> Result<MutableRef, CacheError> {
        let ticket = match self.live.hold_alone(id, &holder) {
            Ok(ticket) => ticket,
            // That it is in use is no help to whoever wants to write to what nobody can.
            Err(Refused::Locked(_)) if !self.must_have(id)?.is_mutable() => {
                return Err(CacheError::WrongKind { id, wanted: "mutable" });
            }
            Err(why) => return Err(refused(id, why)),
        };
        match self.open_mutable(id) {
            Ok(retain) => Ok(MutableRef::new(self, id, ticket, retain, options, holder)),
            Err(error) => {
                self.live.let_go(id, ticket, false);
                Err(error)
            }
        }
    }

    /// Undoes a lazy commit of a record that is held for writing, if there was one; says whether it is retained.
    fn open_mutable(&self, id: RecordId) -> Result<bool, CacheError> {
        let row = self.must_have(id)?;
        let State::Mutable { active, committed_as } = row.state else {
            return Err(CacheError::WrongKind { id, wanted: "mutable" });
        };
        if !self.check_active(id, active)? {
            return self.open_mutable(id);
        }
        let Some(partner) = committed_as else { return Ok(row.retain) };
        self.live.condemn(partner).map_err(|why| refused(partner, why))?;
        let undo = |tx: &mut plies_store::Tx<'_>| {
            record::remove(tx, partner)?;
            let undone = |row: &mut RecordRow| row.state = State::Mutable { active, committed_as: None };
            // The last ref of the partner may just have taken both away.
            if record::change(tx, id, undone)? { Ok(()) } else { Err(CacheError::no_record(id)) }
        };
        let undone = if row.retain { self.store.write(undo) } else { self.store.write_lazily(undo) };
        self.live.absolve(partner);
        undone.map(|()| row.retain)
    }

    fn get_by_blob(
        self: &Arc<Self>,
        descriptor: &Descriptor,
        parent: Option<&ImmutableRef>,
        options: &RecordOptions,
        holder: Holder,
    ) -> Result<ImmutableRef, CacheError> {
        let diff_id = diff_id_of(descriptor)?;
        let digest = descriptor.digest;
        if !matches!(classify(&descriptor.media_type), Some(MediaClass::Layer(_))) {
            let media_type = descriptor.media_type.to_string();
            return Err(CacheError::NotALayer { digest: digest.to_string(), media_type });
        }
        if options.providers.get(digest).is_none() && !self.read(|rows| rows.has(digest))? {
            return Err(CacheError::NeedsProviders(vec![digest]));
        }
        let below = match parent {
            None => None,
            Some(parent) => {
                parent.finalize()?;
                let row = self.must_have(parent.id())?;
                match (row.chain_id, row.blob_chain_id) {
                    (Some(chain), Some(blob_chain)) => Some((parent.id(), chain, blob_chain)),
                    _ => return Err(CacheError::NotAddressable { id: parent.id() }),
                }
            }
        };
        let chain_id = ChainId::extend(below.map(|(_, chain, _)| chain), diff_id);
        let blob_chain_id = extend_blob_chain(below.map(|(_, _, chain)| chain), digest, diff_id);
        let lease = self.store.lease(LeaseOptions::process("layer"))?;
        // The layer itself, whatever it stands on: layers are kept by diff ID. One that nobody has verified is, when it is needed.
        let layers = self.store.layers();
        let layer = match layers.hold_verified_by_diff_id(diff_id, &lease)? {
            None => layers.hold_by_chain(chain_id, &lease)?,
            found => found,
        };
        // A row whose files are gone is no layer to stand on: it is unpacked anew.
        let layer = layer.filter(|layer| layers.root(*layer).is_ok());
        let known = parent.map_or_else(Providers::none, |parent| parent.providers().clone()).and(&options.providers);
        let fresh = Self::fresh_id()?;
        let fresh_ticket = self.live.hold_again(fresh, &holder);
        let mut won: Option<(RecordId, Ticket)> = None;
        let found = self.store.write(|tx| {
            for ((_, id), ()) in tx.prefixed(&record::BY_BLOB_CHAIN, &blob_chain_id)? {
                let row = match record::get(tx, id) {
                    Ok(Some(row)) => row,
                    // It is found by `get`, and says there what is wrong with it.
                    Ok(None) | Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => continue,
                    Err(error) => return Err(error),
                };
                // Merges and diffs may have the same chain, and their files elsewhere; and so may records that add
                // nothing to one that has it.
                let own = row.blob.as_ref().and_then(|blob| blob.digest);
                if !matches!(row.parents, Parents::None | Parents::Layer(_)) || own != Some(digest) || row.is_mutable()
                {
                    continue;
                }
                // One that stands on what nobody can fetch or find is no help.
                match missing_below(tx, &row, &known, &self.live) {
                    Ok(Missing::Nothing { .. }) => {}
                    Ok(Missing::Blobs(_) | Missing::Record(_)) | Err(CatalogueError::Damaged { .. }) => continue,
                    Err(error) => return Err(error),
                }
                let Ok((ticket, _)) = self.live.hold(id, &holder) else { continue };
                won = Some((id, ticket));
                record::change(tx, id, |row| row.add_image_refs(&options.image_refs))?;
                return Ok::<_, CatalogueError>(());
            }
            let state = layer.map_or(State::Lazy, |layer| State::Sealed { layer: Some(layer) });
            let parents = below.map_or(Parents::None, |(parent, ..)| Parents::Layer(parent));
            let mut row = RecordRow::new(state, parents, tx.now());
            options.apply(&mut row);
            row.chain_id = Some(chain_id);
            row.blob_chain_id = Some(blob_chain_id);
            row.blob = Some(blob_row(descriptor, diff_id));
            record::replace(tx, fresh, None, Some(&row))
        });
        let (id, ticket) = self.settle(found, won, (fresh, fresh_ticket))?;
        let mut held = ImmutableRef::new(self, id, ticket, options, holder).with_providers(known);
        lease.release()?;
        held.is_loaded();
        Ok(held)
    }

    /// After a search that found a record or made a fresh one: the hold of that one. The other is let go, and both are if
    /// nothing came of it.
    pub(crate) fn settle(
        &self,
        written: Result<(), CatalogueError>,
        found: Option<(RecordId, Ticket)>,
        fresh: (RecordId, Ticket),
    ) -> Result<(RecordId, Ticket), CacheError> {
        let let_go = |(id, ticket): (RecordId, Ticket)| {
            self.live.let_go(id, ticket, false);
        };
        match (written, found) {
            (Ok(()), None) => Ok(fresh),
            (Ok(()), Some(found)) => {
                let_go(fresh);
                Ok(found)
            }
            (Err(error), found) => {
                let_go(fresh);
                found.into_iter().for_each(let_go);
                Err(error.into())
            }
        }
    }

    fn get_by_diff_id(
        self: &Arc<Self>,
        diff_id: DiffId,
        parent: Option<&ImmutableRef>,
        options: &RecordOptions,
        holder: Holder,
    ) -> Result<Option<ImmutableRef>, CacheError> {
        let below = match parent {
            None => None,
            Some(parent) => {
                parent.finalize()?;
                let chain = self.chain_of_tree(parent.id())?;
                Some((parent.id(), chain.ok_or(CacheError::NotAddressable { id: parent.id() })?))
            }
        };
        let chain_id = ChainId::extend(below.map(|(_, chain)| chain), diff_id);
        let lease = self.store.lease(LeaseOptions::process("layer"))?;
        let layers = self.store.layers();
        let layer = match layers.hold_by_diff_id(diff_id, &lease)? {
            None => layers.hold_by_chain(chain_id, &lease)?,
            found => found,
        };
        let Some(layer) = layer else { return Ok(None) };
        let fresh = Self::fresh_id()?;
        let fresh_ticket = self.live.hold_again(fresh, &holder);
        let mut won: Option<(RecordId, Ticket)> = None;
        let found = self.store.write(|tx| {
            if let Some((id, ticket)) = won.take() {
                self.live.let_go(id, ticket, false);
            }
            for ((_, id), ()) in tx.prefixed(&record::BY_CHAIN, &chain_id)? {
                let row = match record::get(tx, id) {
                    Ok(Some(row)) => row,
                    // Its own trouble, and no reason for others to fail.
                    Ok(None) | Err(CatalogueError::Damaged { .. } | CatalogueError::RowTooNew { .. }) => continue,
                    Err(error) => return Err(error),
                };
                let on_parent = row.parents == below.map_or(Parents::None, |(parent, _)| Parents::Layer(parent));
                if !on_parent || row.state == State::Lazy {
                    continue;
                }
                let Ok((ticket, _)) = self.live.hold(id, &holder) else { continue };
                won = Some((id, ticket));
                record::change(tx, id, |row| row.add_image_refs(&options.image_refs))?;
                return Ok::<_, CatalogueError>(());
            }
            let parents = below.map_or(Parents::None, |(parent, _)| Parents::Layer(parent));
            let mut row = RecordRow::new(State::Sealed { layer: Some(layer) }, parents, tx.now());
            options.apply(&mut row);
            row.chain_id = Some(chain_id);
            record::replace(tx, fresh, None, Some(&row))
        });
        let (id, ticket) = self.settle(found, won, (fresh, fresh_ticket))?;
        let mut held = ImmutableRef::new(self, id, ticket, options, holder);
        held.is_loaded();
        lease.release()?;
        Ok(Some(held))
    }

    /// The chain of a record's tree: its own, or that of the layers that it is composed of, if the tars of all are known.
    fn chain_of_tree(self: &Arc<Self>, id: RecordId) -> Result<Option<ChainId>, CacheError> {
        if let Some(chain) = self.must_have(id)?.chain_id {
            return Ok(Some(chain));
        }
        let mut chain = None;
        for (_, row) in self.walk(id)? {
            let State::Sealed { layer } = row.state else { return Ok(None) };
            let Some(layer) = layer else { continue };
            let Some(diff_id) = self.store.layers().info(layer)?.diff_id else { return Ok(None) };
            chain = Some(ChainId::extend(chain, diff_id));
        }
        Ok(chain)
    }

    fn remove(&self, ids: &[RecordId]) -> Result<(), CacheError> {
        let mut condemned = Vec::new();
        let removed = self.condemn_all(ids, &mut condemned).and_then(|()| {
            self.store.write(|tx| {
                for id in &condemned {
                    let staying: Vec<_> =
                        record::children(tx, *id)?.into_iter().filter(|child| !condemned.contains(child)).collect();
                    if let Some(child) = staying.first() {
                        return Err(CacheError::HasChildren { id: *id, child: *child, count: staying.len() });
                    }
                    if !record::remove(tx, *id)? {
                        return Err(CacheError::no_record(*id));
                    }
                }
                Ok(())
            })
        });
        condemned.iter().for_each(|id| self.live.absolve(*id));
        removed
    }

    /// Condemns records and those that share their files.
    fn condemn_all(&self, ids: &[RecordId], condemned: &mut Vec<RecordId>) -> Result<(), CacheError> {
        for id in ids {
            // One may be named twice, or be the partner of another.
            if condemned.contains(id) {
                continue;
            }
            self.live.condemn(*id).map_err(|why| refused(*id, why))?;
            condemned.push(*id);
            let partner = match self.row(*id) {
                Ok(row) => row.and_then(|row| partner_of(&row.state)),
                Err(CacheError::Damaged { .. }) => None,
                Err(error) => return Err(error),
            };
            if let Some(partner) = partner
                && !condemned.contains(&partner)
            {
                self.live.condemn(partner).map_err(|why| refused(partner, why))?;
                condemned.push(partner);
            }
        }
        Ok(())
    }
}

/// Whether a record's files are in this directory.
fn is_in(state: &State, active: ActiveId) -> bool {
    matches!(state, State::Mutable { active: its, .. } | State::Shared { active: its, .. } if *its == active)
}

/// The record that shares its files, of a pair that was committed and not finalized.
pub(crate) fn partner_of(state: &State) -> Option<RecordId> {
    match state {
        State::Mutable { committed_as, .. } => *committed_as,
        State::Shared { mutable, .. } => Some(*mutable),
        _ => None,
    }
}

enum Missing {
    /// All that is needed can be had; `ready`: and is unpacked.
    Nothing {
        ready: bool,
    },
    Blobs(Vec<BlobDigest>),
    /// A record that it stands on is gone.
    Record(RecordId),
}

/// Blobs of a record and of all that it stands on that are not here and that nobody fetches. All of them: whoever asks
/// again can bring them together.
fn missing_below(
    rows: &impl Rows,
    row: &RecordRow,
    providers: &Providers,
    live: &Live,
) -> Result<Missing, CatalogueError> {
    let (mut seen, mut pending) = (std::collections::HashSet::new(), Vec::new());
    let (mut missing, mut ready) = (Vec::new(), true);
    let mut next = Some(row.clone());
    while let Some(row) = next {
        if row.state == State::Lazy {
            ready = false;
            let blob = row.blob.as_ref().and_then(|blob| blob.digest);
            if let Some(digest) = blob
                && !rows.has(digest)?
                && providers.get(digest).is_none()
                && !missing.contains(&digest)
            {
                missing.push(digest);
            }
        }
        // What somebody holds and was found to need nothing needs no second look.
        let mut unseen = |parent: &RecordId| seen.insert(*parent) && !live.is_ready(*parent);
        pending.extend(row.parents.ids().into_iter().filter(|parent| unseen(parent)));
        next = match pending.pop() {
            Some(id) => match record::get(rows, id)? {
                None => return Ok(Missing::Record(id)),
                found => found,
            },
            None => None,
        };
    }
    Ok(if missing.is_empty() { Missing::Nothing { ready } } else { Missing::Blobs(missing) })
}

/// What a descriptor says that its blob decompresses to.
pub(crate) fn diff_id_of(descriptor: &Descriptor) -> Result<DiffId, CacheError> {
    let digest = descriptor.digest.to_string();
    let text =
        descriptor.annotations.get(UNCOMPRESSED).ok_or_else(|| CacheError::NoDiffId { digest: digest.clone() })?;
    text.parse().map_err(|_| CacheError::BadDiffId { digest, text: text.clone() })
}

pub(crate) fn blob_row(descriptor: &Descriptor, diff_id: DiffId) -> BlobRow {
    BlobRow {
        digest: Some(descriptor.digest),
        diff_id,
        media_type: descriptor.media_type.to_string(),
        size_bytes: descriptor.size_bytes,
        urls: descriptor.urls.clone(),
        annotations: descriptor.annotations.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
    }
}

fn digest_of_two(first: &dyn std::fmt::Display, second: &dyn std::fmt::Display) -> BlobDigest {
    BlobDigest::of(format!("{first} {second}").as_bytes())
}

/// The chain of blobs with one more on top: as a chain of layers, over the digests of each blob with its diff ID.
pub(crate) fn extend_blob_chain(below: Option<BlobDigest>, blob: BlobDigest, diff_id: DiffId) -> BlobDigest {
    let own = digest_of_two(&blob, &diff_id);
    below.map_or(own, |below| digest_of_two(&below, &own))
}

impl Inner {
    /// Runs `work` with `pruning` held: one prune at a time.
    pub(crate) fn one_prune<T>(&self, work: impl FnOnce() -> T) -> T {
        let _one = self.pruning.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use plies_store::{DriverKind, OpenOptions, WaitPolicy};

    use super::*;

    #[test]
    fn what_was_finalized_meanwhile_is_not_removed_for_the_directory_it_had() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = OpenOptions::new(Arc::new(SystemTime::now));
        options.driver = DriverKind::Native;
        let store = Store::open(&dir.path().join("store"), options, WaitPolicy::Fail).unwrap();
        let warn: plies_store::Warn = Arc::new(|error| panic!("{error}"));
        let manager = Manager::open(store, ManagerOptions { limits: Limits::default(), checker: None, warn }).unwrap();
        let accessor = manager.accessor();
        let by = RecordOptions::by("test");

        let work = accessor.create(None, &by).unwrap();
        let mounted = work.mount(plies_store::Attach::Detached).unwrap();
        rustix::fs::mkdirat(mounted.root(), "d", 0o755.into()).unwrap();
        mounted.unmount().unwrap();
        let made = work.commit().unwrap();
        let State::Shared { active, .. } = accessor.row(made.id()).unwrap().state else { panic!("it was finalized") };
        assert!(manager.inner.check_active(made.id(), active).unwrap());
        made.finalize().unwrap();
        assert!(!manager.inner.check_active(made.id(), active).unwrap());
        assert!(!manager.inner.remove_dead(made.id(), active).unwrap());
        assert!(accessor.row(made.id()).is_ok());

        let lost = accessor.create(None, &by).unwrap().commit().unwrap();
        let State::Shared { active, .. } = accessor.row(lost.id()).unwrap().state else { panic!("it was finalized") };
        assert!(manager.inner.remove_dead(lost.id(), active).unwrap());
        assert!(accessor.row(lost.id()).is_err());
        lost.release().unwrap();
    }
}
