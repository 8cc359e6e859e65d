//! Refs: counted holds of records.
//!
//! ```text
//! create --> MutableRef --commit--> ImmutableRef (lazy: shares the mutable's files)
//!                 ^                      |  finalize: the upper becomes a layer, the mutable record goes
//!                 +------get_mutable-----+  (while nobody holds it: the commit is undone)
//! ```

use std::fmt;
use std::sync::Arc;

use plies_archive::tar::EntryPath;
use plies_store::{Attach, Cancel, CatalogueError, LayerId, Mounted, SnapshotId, Tx};

use crate::lazy::Providers;
use crate::live::{Ended, Ticket};
use crate::manager::{Inner, RecordOptions, refused};
use crate::record::{self, RecordRow, State};
use crate::{CacheError, CacheKey, Holder, RecordId, solver};

/// A hold of an immutable record. Cloning is another hold; dropping releases it and logs what went wrong, `release` says
/// it.
pub struct ImmutableRef {
    inner: Arc<Inner>,
    id: RecordId,
    /// `None` once released.
    ticket: Option<Ticket>,
    holder: Holder,
    providers: Providers,
    /// Whether the release counts as a use.
    touches: bool,
    loaded: bool,
}

/// The one hold of a mutable record.
pub struct MutableRef {
    inner: Arc<Inner>,
    id: RecordId,
    /// `None` once released or committed.
    ticket: Option<Ticket>,
    holder: Holder,
    providers: Providers,
    touches: bool,
    retain: bool,
}

impl fmt::Debug for ImmutableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImmutableRef({} held by {:?})", self.id, self.holder)
    }
}

impl fmt::Debug for MutableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MutableRef({} held by {:?})", self.id, self.holder)
    }
}

impl Clone for ImmutableRef {
    fn clone(&self) -> Self {
        let ticket = Some(self.inner.live.hold_again(self.id, &self.holder));
        Self {
            inner: Arc::clone(&self.inner),
            ticket,
            holder: self.holder.clone(),
            providers: self.providers.clone(),
            ..*self
        }
    }
}

impl ImmutableRef {
    pub(crate) fn new(
        inner: &Arc<Inner>,
        id: RecordId,
        ticket: Ticket,
        options: &RecordOptions,
        holder: Holder,
    ) -> Self {
        let (providers, touches) = (options.providers.clone(), !options.keep_last_used);
        Self { inner: Arc::clone(inner), id, ticket: Some(ticket), holder, providers, touches, loaded: false }
    }

    /// The record was seen to be there: from here on, the ref counts as a use of it.
    pub(crate) fn is_loaded(&mut self) {
        self.loaded = true;
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    pub(crate) fn with_providers(mut self, providers: Providers) -> Self {
        self.providers = providers;
        self
    }

    /// Ends the hold, and it was no use.
    pub(crate) fn abandon(mut self) {
        self.touches = false;
        drop(self);
    }

    /// Which record.
    pub fn id(&self) -> RecordId {
        self.id
    }

    /// Who holds it.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Who can fetch its blobs.
    pub fn providers(&self) -> &Providers {
        &self.providers
    }

    /// Its row.
    ///
    /// # Errors
    /// [`CacheError::Damaged`], [`CacheError::Catalogue`].
    pub fn row(&self) -> Result<RecordRow, CacheError> {
        self.inner.must_have(self.id)
    }

    /// Makes a lazily committed record one of its own: the upper it shares becomes a layer, and the mutable record goes.
    /// Nothing is copied; durable when this returns. Does nothing for other records.
    ///
    /// # Errors
    /// Those of sealing; the record is then as it was.
    pub fn finalize(&self) -> Result<(), CacheError> {
        self.inner.finalize(self.id)
    }

    /// Its whole tree as a snapshot that can be mounted; `None` is the empty tree. Fetches, unpacks and computes what is
    /// missing, and only that; several who ask at once do it once. The snapshot is the record's: it lives as long.
    ///
    /// # Errors
    /// Those of providers, archives and the store; [`CacheError::Canceled`].
    pub fn extract(&self, cancel: &Cancel) -> Result<Option<SnapshotId>, CacheError> {
        self.inner.extract(self.id, &self.providers, cancel)
    }

    /// Mounts its tree for reading; `None` is the empty tree, which needs no mount.
    ///
    /// # Errors
    /// As [`ImmutableRef::extract`], and those of mounting.
    pub fn mount(&self, attach: Attach<'_>, cancel: &Cancel) -> Result<Option<Mounted>, CacheError> {
        let Some(snapshot) = self.extract(cancel)? else { return Ok(None) };
        Ok(Some(self.inner.store.snapshots().view(snapshot, attach)?))
    }

    /// Its layers, bottom first, extracted.
    ///
    /// # Errors
    /// As [`ImmutableRef::extract`].
    pub fn layers(&self, cancel: &Cancel) -> Result<Vec<LayerId>, CacheError> {
        match self.extract(cancel)? {
            Some(snapshot) => Ok(self.inner.store.snapshots().info(snapshot)?.layers),
            None => Ok(Vec::new()),
        }
    }

    /// Whether it needs fetching or unpacking before its files can be seen.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn is_lazy(&self) -> Result<bool, CacheError> {
        let walked = self.inner.walk(self.id)?;
        Ok(walked.iter().any(|(_, row)| matches!(row.state, State::Lazy | State::Composed)))
    }

    /// Keeps the record when nobody holds it, also if it was never finalized: it is finalized for that.
    ///
    /// # Errors
    /// As [`ImmutableRef::finalize`].
    pub fn retain(&self) -> Result<(), CacheError> {
        self.finalize()?;
        self.inner.store.write(|tx| record::change(tx, self.id, |row| row.retain = true))?;
        Ok(())
    }

    /// Ends the hold.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`] when a record that nobody will ask for again could not be removed.
    pub fn release(mut self) -> Result<(), CacheError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), CacheError> {
        let Some(ticket) = self.ticket.take() else { return Ok(()) };
        if self.touches && self.loaded {
            self.inner.note_use(self.id);
        }
        self.inner.let_go(self.id, ticket, false)
    }
}

impl Drop for ImmutableRef {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            (self.inner.warn)(&error);
        }
    }
}

impl MutableRef {
    pub(crate) fn new(
        inner: &Arc<Inner>,
        id: RecordId,
        ticket: Ticket,
        retain: bool,
        options: &RecordOptions,
        holder: Holder,
    ) -> Self {
        let (providers, touches) = (options.providers.clone(), !options.keep_last_used);
        Self { inner: Arc::clone(inner), id, ticket: Some(ticket), holder, providers, touches, retain }
    }

    /// Which record.
    pub fn id(&self) -> RecordId {
        self.id
    }

    /// Who holds it.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Its row.
    ///
    /// # Errors
    /// [`CacheError::Damaged`], [`CacheError::Catalogue`].
    pub fn row(&self) -> Result<RecordRow, CacheError> {
        self.inner.must_have(self.id)
    }

    /// Mounts its tree for writing.
    ///
    /// # Errors
    /// Those of mounting; once at a time.
    pub fn mount(&self, attach: Attach<'_>) -> Result<Mounted, CacheError> {
        let (active, _) = self.active()?;
        Ok(self.inner.store.snapshots().mount_active(active, attach)?)
    }

    fn active(&self) -> Result<(plies_store::ActiveId, RecordRow), CacheError> {
        let row = self.row()?;
        match row.state {
            State::Mutable { active, .. } => Ok((active, row)),
            _ => Err(CacheError::WrongKind { id: self.id, wanted: "mutable" }),
        }
    }

    /// Makes an immutable record that shares the files, which costs nothing: they become a layer when somebody needs it
    /// as one ([`ImmutableRef::finalize`]). Unless retained, both records go with the last ref if nobody did until then.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`]; the mutable record is then released.
    pub fn commit(mut self) -> Result<ImmutableRef, CacheError> {
        let (id, ticket) = self.inner.commit(self.id, self.retain, &self.holder)?;
        let old = self.ticket.take().expect("because it was not released");
        self.inner.live.let_go(self.id, old, false);
        Ok(self.successor(id, ticket))
    }

    /// Commits and finalizes in one: the files become a layer, and the record immutable under a new ID. Directories
    /// `on_the_way` were only made to have a place for something, and hide nothing of what the layer is laid over. With a
    /// `result`, the record is what that key gave from the moment on that it appears.
    ///
    /// # Errors
    /// Those of sealing; the mutable record is then released.
    pub fn seal(mut self, on_the_way: &[EntryPath], result: Option<&CacheKey>) -> Result<ImmutableRef, CacheError> {
        let (active, before) = self.active()?;
        let id = Inner::fresh_id()?;
        let ticket = self.inner.live.hold_again(id, &self.holder);
        let (mutable, now) = (self.id, self.inner.store.now());
        let sealed = self.inner.store.snapshots().seal_with(active, on_the_way, |tx, layer| {
            // As it is now: it may have been pinned since.
            let row = record::get(tx, mutable)?.unwrap_or_else(|| before.clone());
            let took = Some(now.since(row.created_at));
            let made =
                RecordRow { state: State::Sealed { layer }, created_at: now, retain: false, took, ..row.clone() };
            record::replace(tx, id, None, Some(&made))?;
            record::replace(tx, mutable, Some(&row), None)?;
            result.map_or(Ok(()), |key| solver::put_result(tx, key, id))
        });
        if let Err(error) = sealed {
            self.inner.live.let_go(id, ticket, false);
            return Err(error.into());
        }
        let old = self.ticket.take().expect("because it was not released");
        self.inner.live.let_go(self.id, old, false);
        Ok(self.successor(id, ticket))
    }

    fn successor(&self, id: RecordId, ticket: Ticket) -> ImmutableRef {
        ImmutableRef {
            inner: Arc::clone(&self.inner),
            id,
            ticket: Some(ticket),
            holder: self.holder.clone(),
            providers: self.providers.clone(),
            touches: self.touches,
            loaded: true,
        }
    }

    /// Ends the hold. Unless retained, the record goes, with what was written to it.
    ///
    /// # Errors
    /// [`CacheError::Catalogue`].
    pub fn release(mut self) -> Result<(), CacheError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), CacheError> {
        let Some(ticket) = self.ticket.take() else { return Ok(()) };
        if self.touches && self.retain {
            self.inner.note_use(self.id);
        }
        self.inner.let_go(self.id, ticket, !self.retain)
    }
}

impl Drop for MutableRef {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            (self.inner.warn)(&error);
        }
    }
}

impl Inner {
    /// Ends a hold, and removes the record if that was all that kept it.
    pub(crate) fn let_go(&self, id: RecordId, ticket: Ticket, remove: bool) -> Result<(), CacheError> {
        let Ended::Goes(partner) = self.live.let_go(id, ticket, remove) else { return Ok(()) };
        // No crash outlives what is removed here, so nothing needs a sync.
        let removed = self.store.write_lazily(|tx| {
            record::remove(tx, id)?;
            if let Some(partner) = partner {
                record::remove(tx, partner)?;
            }
            Ok::<_, CatalogueError>(())
        });
        self.live.absolve(id);
        if let Some(partner) = partner {
            self.live.absolve(partner);
        }
        Ok(removed?)
    }

    /// Commits a mutable record lazily, or finds what it was committed as; and holds that. The caller holds the mutable
    /// record meanwhile, for reading or for writing.
    pub(crate) fn commit(
        &self,
        mutable: RecordId,
        retain: bool,
        holder: &Holder,
    ) -> Result<(RecordId, Ticket), CacheError> {
        let fresh = Self::fresh_id()?;
        let fresh_ticket = self.live.hold_again(fresh, holder);
        let mut won: Option<(RecordId, Ticket)> = None;
        let put = |tx: &mut Tx<'_>| {
            let row = record::get(tx, mutable)?.ok_or_else(|| CacheError::no_record(mutable))?;
            let State::Mutable { active, committed_as } = row.state else {
                return Err(CacheError::WrongKind { id: mutable, wanted: "mutable" });
            };
            if let Some(partner) = committed_as {
                let (ticket, _) = self.live.hold(partner, holder).map_err(|why| refused(partner, why))?;
                won = Some((partner, ticket));
                return Ok(());
            }
            let committed = RecordRow {
                description: row.description.clone(),
                took: Some(tx.now().since(row.created_at)),
                ..RecordRow::new(State::Shared { mutable, active }, row.parents.clone(), tx.now())
            };
            record::replace(tx, fresh, None, Some(&committed))?;
            let after = RecordRow { state: State::Mutable { active, committed_as: Some(fresh) }, ..row.clone() };
            Ok(record::replace(tx, mutable, Some(&row), Some(&after))?)
        };
        let written = if retain { self.store.write(put) } else { self.store.write_lazily(put) };
        if written.is_err() || won.is_some() {
            self.live.let_go(fresh, fresh_ticket, false);
        }
        if let Err(error) = written {
            if let Some((id, ticket)) = won {
                self.let_go(id, ticket, false)?;
            }
            return Err(error);
        }
        let (id, ticket) = won.unwrap_or((fresh, fresh_ticket));
        if !retain {
            self.live.pair(id, mutable);
        }
        Ok((id, ticket))
    }

    pub(crate) fn finalize(&self, id: RecordId) -> Result<(), CacheError> {
        let _one = self.composing.take([id], &Cancel::new())?;
        let State::Shared { mutable, active } = self.must_have(id)?.state else { return Ok(()) };
        self.store.snapshots().seal_with(active, &[], |tx, layer| {
            record::remove(tx, mutable)?;
            record::change(tx, id, |row| row.state = State::Sealed { layer }).map(drop)
        })?;
        self.live.keep(id);
        Ok(())
    }
}
