//! Leases, permanent holds and edges: what garbage collection starts from and follows.
//!
//! A **lease** holds resources for as long as it lives: a process-bound one until it is released or
//! the process ends (whoever opens the store next drops it), one with an expiry until that moment,
//! by the injected clock. A **hold** of a named [`Owner`] is permanent. An **edge** says that as long
//! as the first resource lives, the second does; whoever writes a resource declares its edges, and
//! nothing else is followed.
//!
//! All are rows, written in the transaction that makes what they hold visible, so there is no moment
//! at which a thing exists unheld. Process-bound leases are written lazily: a crash that loses such
//! a row ends the lease anyway.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::time::Duration;

use crate::catalogue::schema::{EDGES, HOLDS, LEASE_HOLDS, LEASES, LeaseRow, exists};
use crate::catalogue::{CatalogueError, Rows, Tx};
use crate::{LeaseId, Owner, Resource, Stamp, Store};

/// What kind of lease to make.
#[derive(Debug, Clone, Default)]
pub struct LeaseOptions {
    /// Who asks and what for, as shown to people. Not a key.
    pub label: String,
    /// How long the lease lives, over restarts. `None`: until released, or until this process ends.
    pub expiry: Option<Duration>,
}

impl LeaseOptions {
    /// A lease of this process.
    pub fn process(label: impl Into<String>) -> Self {
        Self { label: label.into(), expiry: None }
    }

    /// A lease that outlives this process.
    pub fn expiring(label: impl Into<String>, after: Duration) -> Self {
        Self { label: label.into(), expiry: Some(after) }
    }
}

/// A lease as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Which.
    pub id: LeaseId,
    /// As given when it was made.
    pub label: String,
    /// When it was made.
    pub created: Stamp,
    /// When it ends; `None` for one bound to the process.
    pub expires: Option<Stamp>,
}

/// A live lease. Dropping it releases a process-bound one; one with an expiry lives on.
#[derive(Debug)]
#[must_use = "a process-bound lease that is dropped holds nothing"]
pub struct Lease {
    store: Store,
    id: LeaseId,
    expires: Option<Stamp>,
    released: bool,
}

impl Lease {
    pub(crate) fn create(store: &Store, options: LeaseOptions) -> Result<Self, CatalogueError> {
        let id = LeaseId::from_bytes(store.inner.fresh_id()?);
        let make = |tx: &mut Tx<'_>| {
            let row = LeaseRow {
                created: tx.now(),
                expires: options.expiry.map(|after| tx.now().plus(after)),
                label: options.label.clone(),
            };
            tx.put(&LEASES, &id, &row)?;
            Ok::<_, CatalogueError>(row.expires)
        };
        let expires = if options.expiry.is_some() { store.write(make) } else { store.write_lazily(make) }?;
        Ok(Self { store: store.clone(), id, expires, released: false })
    }

    pub(crate) fn reopen(store: &Store, id: LeaseId) -> Result<Self, CatalogueError> {
        let row = store.read(|tx| tx.get(&LEASES, &id))?.ok_or(CatalogueError::NoSuchLease { lease: id })?;
        Ok(Self { store: store.clone(), id, expires: row.expires, released: false })
    }

    /// Its id, for [`Tx::lease_hold`].
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// The store it is a lease of.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Holds `resource` if it exists, found and held in one step; false if it does not.
    ///
    /// # Errors
    /// [`CatalogueError::NoSuchLease`] if the lease has expired and was collected.
    pub fn hold_if_present(&self, resource: impl Into<Resource>) -> Result<bool, CatalogueError> {
        let resource = resource.into();
        match self.write(|tx| tx.lease_hold(self.id, resource)) {
            Ok(()) => Ok(true),
            Err(CatalogueError::NoSuchResource { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Holds no longer.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn let_go(&self, resource: impl Into<Resource>) -> Result<(), CatalogueError> {
        let key = (self.id, resource.into());
        self.write(|tx| tx.remove_ref(&LEASE_HOLDS, &key, key.1).map(drop))
    }

    /// What it holds itself, without what edges keep.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn resources(&self) -> Result<Vec<Resource>, CatalogueError> {
        self.store.read(|tx| Ok(tx.prefixed(&LEASE_HOLDS, &self.id)?.into_iter().map(|((_, held), ())| held).collect()))
    }

    /// Ends the lease, whatever its expiry. What nothing else holds goes at the next collection.
    ///
    /// # Errors
    /// [`CatalogueError::Database`]; a process-bound lease then ends with the process.
    pub fn release(mut self) -> Result<(), CatalogueError> {
        self.released = true;
        self.end()
    }

    fn end(&self) -> Result<(), CatalogueError> {
        self.write(|tx| tx.drop_lease(self.id))
    }

    /// A write that is durable only if a crash would not end the lease.
    pub(crate) fn write<T, E: From<CatalogueError>>(
        &self,
        change: impl FnMut(&mut Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        if self.expires.is_some() { self.store.write(change) } else { self.store.write_lazily(change) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.released
            && self.expires.is_none()
            && let Err(error) = self.end()
        {
            self.store.inner.warn(&error);
        }
    }
}

/// Holds and edges.
impl Tx<'_> {
    /// Lets `lease` hold `resource`; idempotent.
    ///
    /// # Errors
    /// [`CatalogueError::NoSuchLease`], [`CatalogueError::NoSuchResource`]: nothing is ever held that
    /// is not there.
    pub fn lease_hold(&mut self, lease: LeaseId, resource: impl Into<Resource>) -> Result<(), CatalogueError> {
        let row = self.get(&LEASES, &lease)?.ok_or(CatalogueError::NoSuchLease { lease })?;
        if row.expires.is_some_and(|expires| expires <= self.now()) {
            return Err(CatalogueError::NoSuchLease { lease });
        }
        let resource = resource.into();
        self.must_exist(resource)?;
        self.put_ref(&LEASE_HOLDS, &(lease, resource), resource)
    }

    /// Lets `owner` hold `resource` until it lets go; idempotent.
    ///
    /// # Errors
    /// [`CatalogueError::NoSuchResource`].
    pub fn hold(&mut self, owner: &Owner, resource: impl Into<Resource>) -> Result<(), CatalogueError> {
        let resource = resource.into();
        self.must_exist(resource)?;
        self.put_ref(&HOLDS, &(owner.clone(), resource), resource)
    }

    /// `owner` holds `resource` no longer; true if it did.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn unhold(&mut self, owner: &Owner, resource: impl Into<Resource>) -> Result<bool, CatalogueError> {
        let resource = resource.into();
        self.remove_ref(&HOLDS, &(owner.clone(), resource), resource)
    }

    /// `owner` holds nothing any longer; how many it held.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn unhold_all(&mut self, owner: &Owner) -> Result<usize, CatalogueError> {
        let held = self.prefixed(&HOLDS, owner)?;
        for (key, ()) in &held {
            self.remove_ref(&HOLDS, key, key.1)?;
        }
        Ok(held.len())
    }

    /// As long as `from` lives, `to` does; idempotent. The edge goes with `from`.
    ///
    /// # Errors
    /// [`CatalogueError::NoSuchResource`] if either is not there.
    pub fn add_edge(&mut self, from: impl Into<Resource>, to: impl Into<Resource>) -> Result<(), CatalogueError> {
        let (from, to) = (from.into(), to.into());
        self.must_exist(from)?;
        self.must_exist(to)?;
        self.put_ref(&EDGES, &(from, to), to)
    }

    /// Takes an edge back; true if there was one.
    ///
    /// # Errors
    /// [`CatalogueError::Database`].
    pub fn remove_edge(&mut self, from: impl Into<Resource>, to: impl Into<Resource>) -> Result<bool, CatalogueError> {
        let (from, to) = (from.into(), to.into());
        self.remove_ref(&EDGES, &(from, to), to)
    }

    /// A lease holds `resource` no longer, whether or not there is such a lease.
    pub(crate) fn let_go(&mut self, lease: LeaseId, resource: Resource) -> Result<(), CatalogueError> {
        self.remove_ref(&LEASE_HOLDS, &(lease, resource), resource).map(drop)
    }

    fn must_exist(&self, resource: Resource) -> Result<(), CatalogueError> {
        if exists(self, resource)? { Ok(()) } else { Err(CatalogueError::NoSuchResource { resource }) }
    }

    pub(crate) fn drop_lease(&mut self, lease: LeaseId) -> Result<(), CatalogueError> {
        for (key, ()) in self.prefixed(&LEASE_HOLDS, &lease)? {
            self.remove_ref(&LEASE_HOLDS, &key, key.1)?;
        }
        self.remove(&LEASES, &lease).map(drop)
    }
}

/// What `owner` holds permanently.
///
/// # Errors
/// [`CatalogueError`].
pub fn held_by(rows: &impl Rows, owner: &Owner) -> Result<Vec<Resource>, CatalogueError> {
    Ok(rows.prefixed(&HOLDS, owner)?.into_iter().map(|((_, held), ())| held).collect())
}

/// Calls `visit` for every permanent hold, by owner, until it breaks. One look at the table.
///
/// # Errors
/// [`CatalogueError`].
pub fn scan_holds(
    rows: &impl Rows,
    mut visit: impl FnMut(&Owner, Resource) -> ControlFlow<()>,
) -> Result<(), CatalogueError> {
    rows.scan_each(&HOLDS, |key, _| match key {
        Some((owner, held)) => visit(&owner, held),
        // Nobody's hold: the check finds it.
        None => ControlFlow::Continue(()),
    })
}

/// What keeps a resource directly.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeper {
    /// Somebody who holds it for good.
    Owner(Owner),
    /// A lease, whether or not it has expired.
    Lease(LeaseId),
    /// Another resource, over an edge.
    Resource(Resource),
}

/// What keeps each of these resources, directly. One look at all holds and edges.
///
/// # Errors
/// [`CatalogueError`].
pub fn keepers_of(
    rows: &impl Rows,
    wanted: &HashSet<Resource>,
) -> Result<HashMap<Resource, Vec<Keeper>>, CatalogueError> {
    let mut keepers: HashMap<Resource, Vec<Keeper>> = HashMap::new();
    let mut note = |held: Resource, keeper: &dyn Fn() -> Keeper| {
        if wanted.contains(&held) {
            keepers.entry(held).or_default().push(keeper());
        }
        ControlFlow::Continue(())
    };
    scan_holds(rows, |owner, held| note(held, &|| Keeper::Owner(owner.clone())))?;
    rows.scan_each(&LEASE_HOLDS, |key, _| match key {
        Some((lease, held)) => note(held, &|| Keeper::Lease(lease)),
        None => ControlFlow::Continue(()),
    })?;
    scan_edges(rows, |from, to| note(to, &|| Keeper::Resource(from)))?;
    Ok(keepers)
}

/// Calls `visit` for every edge, by what it leads from, until it breaks. One look at the table.
///
/// # Errors
/// [`CatalogueError`].
pub fn scan_edges(
    rows: &impl Rows,
    mut visit: impl FnMut(Resource, Resource) -> ControlFlow<()>,
) -> Result<(), CatalogueError> {
    rows.scan_each(&EDGES, |key, _| match key {
        Some((from, to)) => visit(from, to),
        None => ControlFlow::Continue(()),
    })
}
